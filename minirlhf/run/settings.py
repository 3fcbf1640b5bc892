"""Settings: a recipe's dataclass becomes its flags, its file reader, its validator and its --help.

A setting is declared once, beside the algorithm that reads it:

    @dataclass
    class PPOConfig:
        model: str = setting(help="folder of the policy", metavar="FOLDER")
        learning_rate: float = setting(3e-6, "peak step size of AdamW", above=0)

Types: int, float, str, bool, each of the first three with `| None`, and tuple[str, ...].
Flags beat the file of `--config`, which beats a `--preset`, which beats the defaults. All
faults are told at once, in one line, before any of them could cost a minute of training.
"""

import argparse
import dataclasses
import difflib
import operator
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_text, strict_json

C = TypeVar("C")
Problem = tuple[str, str]  # where (flag, file and key, or field), and what is wrong there

_NOUNS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no path and no UTF-8 file can hold these
_SHOWN_PROBLEMS = 20
_FILE_CAP = 1 << 20  # bytes; nobody writes a longer file of settings on purpose
_NO_SECTIONS = "is a table: settings stand at the top of the file, in no section"
_PLACES = ("FILE", "FOLDER", "DIR", "SOURCE")  # metavars of settings that name one


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: tuple | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    required: bool = False,
    verbatim: bool = False,
) -> Any:
    """A dataclass field with its help and its legal range; required if it has no default.

    `required` asks a command line for it all the same: such a default serves those who build the
    config in their own code, where the setting may not matter. `verbatim` takes a flag's "none" for
    that text. Keyword-only, so that required settings may stand anywhere among the others.
    """
    limits = {">=": at_least, ">": above, "<=": at_most, "<": below}
    limits = {sign: limit for sign, limit in limits.items() if limit is not None}
    rule = {"help": help, "choices": choices, "limits": limits, "metavar": metavar,
            "verbatim": verbatim}
    rule["required"] = required or default is MISSING
    return dataclasses.field(default=default, kw_only=True, metadata=rule)


@dataclass(frozen=True)
class _Setting:
    """One field of a config class: its type, taken apart, and its rule."""

    name: str
    type: type  # int, float, str or bool
    optional: bool  # None is legal
    many: bool  # a tuple of `type`
    default: object
    help: str = ""
    choices: tuple | None = None
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)  # sign -> limit
    metavar: str | None = None
    required: bool = False
    verbatim: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def bounds(self) -> str:
        return " and ".join(f"{sign} {limit}" for sign, limit in self.limits.items())

    def legal(self) -> str:
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
        else:
            words = f"{_NOUNS[self.type]} {self.bounds}".rstrip()
        return ("a list of " if self.many else "") + words + (" or none" if self.optional else "")

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, or None."""
        if value is None and self.optional:
            return None
        items = value if self.many else (value,)
        if isinstance(items, tuple) and all(map(self._accepts, items)):
            return None
        if isinstance(value, dict):
            return _NO_SECTIONS
        legal = self.legal()
        if self.many:  # what a file gave is a tuple by now, so a text or list is from code
            in_code = isinstance(value, str | list)
            legal = f"a tuple of {_NOUNS[self.type]}" if in_code else f"text or {legal}"
        if self.type is int and type(value) is int and value.bit_length() > 63:
            legal = "a whole number of at most 63 bits"
        return f"got {_shown(value)}, must be {legal}"

    def _accepts(self, value: Any) -> bool:
        if self.type is float:  # the comparison is False for nan and inf, and takes any int
            right = type(value) in (int, float) and abs(value) <= sys.float_info.max
        elif self.type is str:
            right = type(value) is str and not _UNWRITABLE.search(value)
        else:
            right = type(value) is self.type and (self.type is bool or value.bit_length() <= 63)
        in_range = all(_COMPARE[sign](value, limit) for sign, limit in self.limits.items() if right)
        return right and in_range and (self.choices is None or value in self.choices)

    def from_flag(self, given: Any) -> object:
        """The value that a flag's text stands for; the text itself, if it stands for none."""
        if self.many:
            return tuple(given)
        if self.type is bool:
            return given
        if self.optional and not self.verbatim and given.lower() == "none":
            return None
        try:
            if self.type is float:
                return float(given)
            return int(given) if self.type is int and _WHOLE.fullmatch(given) else given
        except ValueError:
            return given  # `problem` will name it

    def from_file(self, given: Any) -> object:
        """The value of a TOML or JSON value; types are not mended, but an int may stand for a
        float, and one text for a list of it."""
        if self.many and type(given) in (list, str):
            return tuple(given) if type(given) is list else (given,)
        if self.optional and given == "none":  # TOML has no null
            return None
        if self.type is float and type(given) is int and self._accepts(given):
            return float(given)
        return given


class Preset(NamedTuple):
    """Settings as another tool or a paper has them."""

    about: str
    values: dict[str, tuple[object, str]]  # setting -> (value, where it is from)
    differs: tuple[str, ...]  # what is not as there, on purpose


def parse(
    config_class: type[C], argv: list[str] | None, prog: str, description: str,
    presets: Mapping[str, Preset] = types.MappingProxyType({}),
) -> C:
    """The config that a command line asks for; argv None stands for the process's own.

    Args:
        presets: what --preset can name; with none there is no such flag.
    Raises:
        UserError: every unknown, repeated, missing, mistyped or illegal setting, in one line.
        SystemExit: 0 after --help or --explain-preset.
    """
    settings, words = _settings(config_class), sys.argv[1:] if argv is None else argv
    given = _read_flags(settings, words, prog, description, presets)
    if (name := given.pop("explain_preset", None)) is not None:
        print(explain(name, _find(presets, name, "--explain-preset"), settings))
        raise SystemExit(0)
    values, where, problems = {}, {}, []
    if (name := given.pop("preset", None)) is not None:
        for key, (value, _) in _find(presets, name, "--preset").values.items():
            values[key], where[key] = value, f"--preset {name}: {settings[key].name}"
    if (path := given.pop("config", None)) is not None:
        from_file, places, problems = _read_file(settings, path)
        values |= from_file
        where |= places
    for name, text in given.items():
        values[name], where[name] = settings[name].from_flag(text), settings[name].flag
    for name, item in settings.items():
        if name in values and (problem := item.problem(values[name])):
            problems.append((where[name], problem))
        elif name in values and item.metavar in _PLACES and values[name] in ("", ("",)):
            problems.append((where[name], f"got '', must be the name of a {item.metavar.lower()}"))
        elif name not in values and item.required:
            problems.append((item.flag, "required, but not given"))
    _refuse(problems)
    config = config_class(**values)
    validate(config)
    return config


def _find(presets: Mapping[str, Preset], name: str, flag: str) -> Preset:
    if name not in presets:
        known = ", ".join(presets)
        raise UserError(
            flag, f"no preset {_shown(name)}", f"{nearest(name, presets)}; presets: {known}"
        )
    return presets[name]


def explain(name: str, preset: Preset, settings: Mapping[str, "_Setting"]) -> str:
    """What a preset sets, beside the default here and the source there, and what it cannot."""
    rows = [("setting", "value", "default", "source")]
    for key, (value, source) in preset.values.items():
        rows.append((key, _shown_value(value), _shown_value(settings[key].default), source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"--preset {name}: {preset.about}"]
    for row in rows:
        *cells, source = (f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        lines.append("  " + "  ".join([*cells, source.rstrip()]))
    lines.append("Not as there, on purpose:")
    lines += (f"  {text}" for text in preset.differs)
    return "\n".join(lines)


def _shown_value(value: object) -> str:
    """As a flag takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def validate(config: object) -> None:
    """Checks every field against its type and range, then what the config's own check() finds.

    A config class may have `check(self) -> list[str]` for what concerns several fields: each
    string is a problem, told in full. It is asked only when every field is legal by itself.

    Args:
        config: an instance of a config class.
    Raises:
        UserError: all problems, in one line.
    """
    problems = []
    for name, item in _settings(type(config)).items():
        if problem := item.problem(getattr(config, name)):
            problems.append((name, problem))
    if not problems and hasattr(config, "check"):
        problems = [("", problem) for problem in config.check()]
    _refuse(problems)


def as_dict(config: Any) -> dict[str, Any]:
    """The config as JSON can hold it; as a file for --config it gives the same config back."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def nearest(word: str, names: Iterable[str]) -> str:
    """Advice for a word that is none of the names; "lr" is as near to learning_rate as can be."""
    names = list(names)
    short = re.sub(r"\W", "", word).lower()
    initials = (n for n in names if short == "".join(part[:1] for part in re.findall(r"[a-z]+", n)))
    found = next(initials, None) or difflib.get_close_matches(word[:80], names, n=1, cutoff=0)[0]
    return f"the nearest is {found}"


def _settings(config_class: type) -> dict[str, _Setting]:
    hints = typing.get_type_hints(config_class)
    return {
        field.name: _Setting(
            field.name, *_kind(hints[field.name]), default=field.default, **field.metadata
        )
        for field in dataclasses.fields(config_class)
    }


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(type, optional, many) of a field's annotation."""
    if hint in _NOUNS:
        return hint, False, False
    if hint == tuple[str, ...]:
        return str, False, True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if len(parts) == 1 and parts[0] in _METAVARS:
            return parts[0], True, False
    raise TypeError(f"a setting cannot be {hint}: see the types that minirlhf.run.settings names")


def _read_flags(
    settings: dict[str, _Setting], argv: list[str], prog: str, description: str,
    presets: Iterable[str],
) -> dict[str, Any]:
    """Field name -> text, texts of a tuple, or bool, for the flags that were given."""
    parser, flags = _parser(settings, prog, description, presets)
    words: list[str] = []
    seen: set[str] = set()
    problems: list[Problem] = []
    several = ""  # the flag of several values that the next word may belong to
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            several = ""
            name = name.replace("_", "-")
            action = flags.get(name)
            if action is None:
                problems.append((name, f"unknown flag: {nearest(name, flags)}"))
            elif action.dest in seen and action.nargs != "+":
                problems.append((name, "given twice"))
            elif equals and action.nargs == 0:
                both = " or ".join(action.option_strings)
                problems.append((name, f"got {_shown(value)}, takes no value: give {both}"))
            else:
                seen.add(action.dest)
                several = name if action.nargs == "+" and not equals else ""
            words.append(name + equals + value)
        elif several and re.match(r"[^-]|-$|-[0-9.]|$", word):
            # Each under a flag of its own: argparse would take -0.5*SOURCE for one.
            words += [] if words[-1] == several else [several]
            words[-1] += "=" + word
        elif word[:1] == "-" and words and words[-1] in flags and flags[words[-1]].nargs != 0:
            words[-1] += "=" + word  # argparse would take -1e-5 for a flag
        else:
            words.append(word)
    _refuse(problems)
    given, strays = parser.parse_known_args(words)
    _refuse([(prog, _stray(stray, flags)) for stray in strays])
    return vars(given)


def _stray(word: str, flags: Iterable[str]) -> str:
    """What is wrong with a word that belongs to no flag: often it began with another dash."""
    advice = f": {nearest(word, flags)}" if word[:1] in ("-", "–", "—", "−") else ""
    return f"unexpected argument {_shown(word)}{advice}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag, _, what = message.removeprefix("argument ").partition(": ")
        raise UserError(flag, what.replace("argument", "value"))


def _parser(
    settings: dict[str, _Setting], prog: str, description: str, presets: Iterable[str]
) -> tuple[_Parser, dict[str, argparse.Action]]:
    """The parser, and which action each of its flags stands for."""
    required = [s for s in settings.values() if s.required]
    parser = _Parser(
        prog=prog,
        description=description,
        usage=" ".join([prog, *(f"{s.flag} {_metavar(s)}" for s in required), "[settings]"]),
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
        allow_abbrev=False,
        add_help=False,
    )
    file_help = "settings from a .toml or .json file; flags beat it"
    actions = [
        parser.add_argument("-h", "--help", action="help", help="show this and leave"),
        parser.add_argument("--config", metavar="FILE", help=file_help),
    ]
    if names := ", ".join(presets):
        about = f"settings as another has them: {names}; --config and flags beat it"
        explained = "show what a preset sets and where that is from, and leave"
        actions.append(parser.add_argument("--preset", metavar="NAME", help=about))
        actions.append(parser.add_argument("--explain-preset", metavar="NAME", help=explained))
    for item in settings.values():
        if item.type is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif item.many:
            how = {"action": "extend", "nargs": "+", "metavar": _metavar(item)}
        else:
            how = {"metavar": _metavar(item)}
        text = _help(item).replace("%", "%%")  # argparse formats it with %
        actions.append(parser.add_argument(item.flag, help=text, **how))
    return parser, {flag: action for action in actions for flag in action.option_strings}


def _metavar(item: _Setting) -> str:
    choices = "{" + ",".join(map(str, item.choices)) + "}" if item.choices else None
    return item.metavar or choices or _METAVARS[item.type]


def _help(item: _Setting) -> str:
    if item.required:
        default = "required"
    elif item.type is bool:
        default = "default: " + ("on" if item.default else "off")
    else:
        default = "default: " + ("none" if item.default in (None, ()) else str(item.default))
    facts = "; ".join(fact for fact in (item.bounds, default) if fact)
    return f"{item.help} [{facts}]".lstrip()


def _read_file(
    settings: dict[str, _Setting], path: str
) -> tuple[dict[str, object], dict[str, str], list[Problem]]:
    """(values, where each stands, problems) of a config file."""
    values: dict[str, object] = {}
    where: dict[str, str] = {}
    problems: list[Problem] = []
    for key, given in _load(path).items():
        name, place = key.replace("-", "_"), f"{path}: {printable(key, 80)}"
        if name not in settings and isinstance(given, dict):
            problems.append((place, _NO_SECTIONS))
        elif name not in settings:
            problems.append((place, f"unknown setting: {nearest(name, settings)}"))
        elif name in values:
            problems.append((place, "given twice"))
        else:
            values[name], where[name] = settings[name].from_file(given), place
    return values, where, problems


def _load(path: str) -> dict[str, Any]:
    """The top table of a TOML or JSON file."""
    kind = Path(path).suffix
    if kind not in (".toml", ".json"):
        raise UserError(path, "--config reads .toml and .json files only")
    text = read_text(path, _FILE_CAP)
    if kind == ".json":
        table = strict_json(text, path)
        if not isinstance(table, dict):
            raise UserError(path, f"holds {_shown(table)}", "must be an object of settings")
        return table
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, a huge integer, nested too deeply
        raise UserError(path, f"not valid TOML: {error}") from None


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    value = list(value) if isinstance(value, tuple) else value
    try:
        return printable(repr(value) if isinstance(value, str | list | dict) else value, 80)
    except ValueError:  # Python writes no number of thousands of digits; TOML may hold it in hex
        return "a number of thousands of digits"


def _refuse(problems: list[Problem]) -> None:
    """Raises one UserError that tells them all, if there are any."""
    if problems:
        told = [": ".join(part for part in problem if part) for problem in problems]
        where, first = problems[0]
        rest = told[1:_SHOWN_PROBLEMS]
        if len(told) > _SHOWN_PROBLEMS:
            rest.append(f"and {len(told) - _SHOWN_PROBLEMS} more")
        raise UserError(where, "; ".join([first, *rest]))
