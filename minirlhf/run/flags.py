"""A command line becomes a config: flags, the file of --config, --preset, and --help.

Flags beat the file, which beats the preset, which beats the defaults. `-` and `_` are the same in
every name. Whatever is wrong is told in one line, all of it at once.
"""

import argparse
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_text, strict_json
from minirlhf.run.settings import (
    NO_SECTIONS,
    Problem,
    Setting,
    nearest,
    refuse,
    settings_of,
    shown,
    validate,
)

C = TypeVar("C")

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
_FILE_CAP = 1 << 20  # bytes; nobody writes a longer file of settings on purpose


class Preset(NamedTuple):
    """Settings as another tool or a paper has them."""

    about: str
    values: dict[str, tuple[object, str]]  # setting -> (value, where it is from)
    differs: tuple[str, ...]  # what is not as there, on purpose


def parse(
    config_class: type[C], argv: list[str] | None, prog: str,
    presets: Mapping[str, Preset] = types.MappingProxyType({}),
) -> C:
    """The config that a command line asks for; argv None stands for the process's own.

    Args:
        config_class: its docstring's first line says in --help what the command does. Where it has
            SHOWN_FIRST, names of settings, --help shows these alone and --help-all the rest too.
        presets: what --preset can name; with none there is no such flag.
    Raises:
        UserError: every unknown, repeated, missing, mistyped or illegal setting, in one line.
        SystemExit: 0 after --help or --explain-preset.
    """
    settings, words = settings_of(config_class), sys.argv[1:] if argv is None else argv
    parser, flags = _parser(config_class, settings, words, prog, presets)
    given = _read_flags(parser, flags, words, prog)
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
        elif name in values and item.is_place and values[name] in ("", ("",)):
            problems.append((where[name], f"got '', must be the name of a {item.metavar.lower()}"))
        elif name not in values and item.required:
            problems.append((item.flag, "required, but not given"))
    refuse(problems)
    config = config_class(**values)
    validate(config)
    return config


def _find(presets: Mapping[str, Preset], name: str, flag: str) -> Preset:
    if name not in presets:
        known = ", ".join(presets)
        raise UserError(
            flag, f"no preset {shown(name)}", f"{nearest(name, presets)}; presets: {known}"
        )
    return presets[name]


def explain(name: str, preset: Preset, settings: Mapping[str, Setting]) -> str:
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


def _read_flags(
    parser: "_Parser", flags: Mapping[str, argparse.Action], argv: list[str], prog: str
) -> dict[str, Any]:
    """Field name -> text, texts of a tuple, or bool, for the flags that were given."""
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
                problems.append((name, f"got {shown(value)}, takes no value: give {both}"))
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
    refuse(problems)
    given, strays = parser.parse_known_args(words)
    refuse([(prog, _stray(stray, flags)) for stray in strays])
    return vars(given)


def _stray(word: str, flags: Iterable[str]) -> str:
    """What is wrong with a word that belongs to no flag: often it began with another dash."""
    advice = f": {nearest(word, flags)}" if word[:1] in ("-", "–", "—", "−") else ""
    return f"unexpected argument {shown(word)}{advice}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag, _, what = message.removeprefix("argument ").partition(": ")
        raise UserError(flag, what.replace("argument", "value"))


def _parser(
    config_class: type, settings: dict[str, Setting], words: list[str], prog: str,
    presets: Iterable[str],
) -> tuple[_Parser, dict[str, argparse.Action]]:
    """The parser, its flags under the headings of their groups, and the action of each flag."""
    first = getattr(config_class, "SHOWN_FIRST", tuple(settings))
    visible = settings.keys() if "--help-all" in words else set(first)
    required = [s for s in settings.values() if s.required]
    left_out = len(settings) - len(visible)
    parser = _Parser(
        prog=prog,
        description=(config_class.__doc__ or "").partition("\n")[0],
        epilog=f"{left_out} more settings: {prog} --help-all" if left_out else None,
        usage=" ".join([prog, *(f"{s.flag} {_metavar(s)}" for s in required), "[settings]"]),
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
        allow_abbrev=False,
        add_help=False,
    )
    file_help = "settings from a .toml or .json file; flags beat it"
    actions = [parser.add_argument("-h", "--help", action="help", help="show this and leave")]
    if len(first) < len(settings):
        every = "show every setting and leave"
        actions.append(parser.add_argument("--help-all", action="help", help=every))
    actions.append(parser.add_argument("--config", metavar="FILE", help=file_help))
    if names := ", ".join(presets):
        about = f"settings as another has them: {names}; --config and flags beat it"
        explained = "show what a preset sets and where that is from, and leave"
        actions.append(parser.add_argument("--preset", metavar="NAME", help=about))
        actions.append(parser.add_argument("--explain-preset", metavar="NAME", help=explained))
    sections = {}
    for item in settings.values():
        if item.group not in sections:
            sections[item.group] = parser.add_argument_group(item.group or f"{prog}")
        help = _help(item).replace("%", "%%")  # argparse formats it with %
        help = help if item.name in visible else argparse.SUPPRESS
        actions.append(sections[item.group].add_argument(item.flag, help=help, **_how(item)))
    return parser, {flag: action for action in actions for flag in action.option_strings}


def _how(item: Setting) -> dict[str, Any]:
    """How argparse reads a flag: on or off, many values, or one."""
    if item.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"metavar": _metavar(item), **({"action": "extend", "nargs": "+"} if item.many else {})}


def _metavar(item: Setting) -> str:
    choices = "{" + ",".join(map(str, item.choices)) + "}" if item.choices else None
    return item.metavar or choices or _METAVARS[item.type]


def _help(item: Setting) -> str:
    if item.required:
        default = "required"
    elif item.type is bool:
        default = "default: " + ("on" if item.default else "off")
    else:
        default = "default: " + ("none" if item.default in (None, ()) else str(item.default))
    facts = "; ".join(fact for fact in (item.bounds, default) if fact)
    return f"{item.help} [{facts}]".lstrip()


def _read_file(
    settings: dict[str, Setting], path: str
) -> tuple[dict[str, object], dict[str, str], list[Problem]]:
    """(values, where each stands, problems) of a config file."""
    values: dict[str, object] = {}
    where: dict[str, str] = {}
    problems: list[Problem] = []
    for key, given in _load(path).items():
        name, place = key.replace("-", "_"), f"{path}: {printable(key, 80)}"
        if name not in settings and isinstance(given, dict):
            problems.append((place, NO_SECTIONS))
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
            raise UserError(path, f"holds {shown(table)}", "must be an object of settings")
        return table
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, a huge integer, nested too deeply
        raise UserError(path, f"not valid TOML: {error}") from None
