"""Settings: what a config class declares of each of its fields, and how a value is checked by it.

A setting is declared once, in a frozen dataclass that shares it with every command:

    @dataclass(frozen=True)
    class OptimizerSettings:
        learning_rate: float = setting(1e-5, "peak learning rate of AdamW", above=0)

    @dataclass(frozen=True)
    class PPOConfig(OptimizerSettings):
        learning_rate: float = override(3e-6)

Types: int, float, str, bool, each of the first three with `| None`, and tuple[str, ...]. All faults
are told at once, in one line, before any of them could cost a minute of training. What a command
line makes of a config class is in flags.py.
"""

import dataclasses
import difflib
import inspect
import itertools
import operator
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from minirlhf.errors import UserError, printable

Problem = tuple[str, str]  # where (flag, file and key, or field), and what is wrong there

RESUME = ("free", "ask", "start", "fixed")
NO_SECTIONS = "is a table: settings stand at the top of the file, in no section"
_NOUNS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no path and no UTF-8 file can hold these
_SHOWN_PROBLEMS = 20
_PLACES = ("FILE", "FOLDER", "DIR", "SOURCE")  # metavars of settings that name one

# ------------------------------------------------------------------------------------- declaration


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
    resume: str = "ask",
    data: bool = False,
) -> Any:
    """A dataclass field with its help and its legal range; required if it has no default.

    Args:
        required: a command line must give it although it has a default, which then serves those
            who build the config in their own code, where the setting may not matter.
        verbatim: a flag's "none" is that text.
        resume: whether a resumed run may change it. "free": always, no number depends on it.
            "ask": with --allow-setting-change. "start": never where the config's `remembers(name)`
            says that the run's state holds what came of it; a config without that method remembers
            all. "fixed": never, the weights of a checkpoint are of it.
        data: it names data files, whose content may change with --allow-data-change.

    Keyword-only, so that required settings may stand anywhere among the others.
    """
    rule = {"help": help, "choices": choices, "metavar": metavar, "verbatim": verbatim,
            "required": required or default is MISSING, "resume": _known(resume), "data": data,
            "limits": _limits({">=": at_least, ">": above, "<=": at_most, "<": below})}
    return dataclasses.field(default=default, kw_only=True, metadata=rule)


def override(
    default: Any = MISSING,
    help: str | None = None,
    *,
    choices: tuple | None = None,
    at_least: float | None = None,
    metavar: str | None = None,
    required: bool | None = None,
    resume: str | None = None,
) -> Any:
    """What a config class has otherwise in a setting that it inherits; what is not given stays.

    Arguments are those of `setting`; a limit replaces all. The annotation may give another type.
    """
    rule = {"help": help, "choices": choices, "metavar": metavar, "required": required,
            "resume": resume and _known(resume), "limits": _limits({">=": at_least}) or None}
    return _Override(default, {name: v for name, v in rule.items() if v is not None})


@dataclass
class _Override:
    """Becomes the field of the class that it stands in, once that class knows its bases."""

    default: object
    rule: dict[str, object]

    def __set_name__(self, owner: type, name: str) -> None:
        above = (getattr(base, "__dataclass_fields__", {}) for base in owner.__mro__[1:])
        inherited = next((fields[name] for fields in above if name in fields), None)
        if inherited is None:
            raise TypeError(f"{owner.__name__} inherits no setting {name}: declare it")
        default = inherited.default if self.default is MISSING else self.default
        rule = {**inherited.metadata, **self.rule}
        setattr(owner, name, dataclasses.field(default=default, kw_only=True, metadata=rule))


def _limits(limits: dict[str, float | None]) -> dict[str, float]:
    return {sign: limit for sign, limit in limits.items() if limit is not None}


def _known(resume: str) -> str:
    if resume not in RESUME:
        raise ValueError(f"resume is {resume!r}: one of {', '.join(RESUME)}")
    return resume


# --------------------------------------------------------------------------------- what is declared


@dataclass(frozen=True)
class Setting:
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
    resume: str = "ask"
    data: bool = False
    group: str = ""  # heading under which --help shows it; "" of the command itself

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_place(self) -> bool:
        """Whether it names a file, a folder or another source."""
        return self.metavar in _PLACES

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
            return NO_SECTIONS
        legal = self.legal()
        if self.many:  # what a file gave is a tuple by now, so a text or list is from code
            in_code = isinstance(value, str | list)
            legal = f"a tuple of {_NOUNS[self.type]}" if in_code else f"text or {legal}"
        if self.type is int and type(value) is int and value.bit_length() > 63:
            legal = "a whole number of at most 63 bits"
        return f"got {shown(value)}, must be {legal}"

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


def settings_of(config_class: type) -> dict[str, Setting]:
    """Every setting by its name: group by group, as the class lists its bases, its own last."""
    hints, fields = typing.get_type_hints(config_class), dataclasses.fields(config_class)
    groups, home = list(_from_the_bases(config_class)), {}
    for group in reversed(groups):  # the class that declares a setting stands before all others
        home |= dict.fromkeys(inspect.get_annotations(group), group)
    ordered = sorted(fields, key=lambda field: groups.index(home[field.name]))
    return {
        field.name: Setting(
            field.name, *_kind(hints[field.name]), default=field.default,
            group="" if home[field.name] is config_class else heading(home[field.name]),
            **field.metadata,
        )
        for field in ordered
    }


def _from_the_bases(group: type) -> Iterator[type]:
    for base in group.__bases__:
        yield from _from_the_bases(base)
    yield group


def heading(group: type) -> str:
    """The words of a class's docstring before its first colon or full stop."""
    return re.split(r"[:.]", group.__doc__ or "", maxsplit=1)[0].strip()


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """(type, optional, many) of a field's annotation."""
    if hint in _NOUNS:
        return hint, False, False
    if hint == tuple[str, ...]:
        return str, False, True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if len(parts) == 1 and parts[0] in (int, float, str):
            return parts[0], True, False
    raise TypeError(f"a setting cannot be {hint}: see the types that minirlhf.run.settings names")


# ------------------------------------------------------------------------------------------ configs


def validate(config: object) -> None:
    """Checks every field against its type and range, then what the config's own check() finds.

    A config class and each of its groups may have `check(self) -> list[str]` for what concerns
    several fields: each string is a problem, told in full. They are asked only when every field is
    legal by itself.

    Args:
        config: an instance of a config class.
    Raises:
        UserError: all problems, in one line.
    """
    problems = []
    for name, item in settings_of(type(config)).items():
        if problem := item.problem(getattr(config, name)):
            problems.append((name, problem))
    if not problems:
        groups = [group for group in type(config).__mro__ if "check" in group.__dict__]
        problems = [("", problem) for group in groups for problem in group.check(config)]
    refuse(problems)


def as_dict(config: Any) -> dict[str, Any]:
    """The config as JSON can hold it; as a file for --config it gives the same config back."""
    values = {name: getattr(config, name) for name in settings_of(type(config))}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def resume_rules(config: object) -> dict[str, str]:
    """Setting -> "free", "ask" or "fixed": what a run of this config may change when it goes on."""
    remembers = getattr(config, "remembers", lambda name: True)
    rules = {name: item.resume for name, item in settings_of(type(config)).items()}
    return {
        name: ("fixed" if remembers(name) else "ask") if rule == "start" else rule
        for name, rule in rules.items()
    }


def nearest(word: str, names: Iterable[str], otherwise: str) -> str:
    """Advice for a word that is none of the names, where one of them is near: it has these
    initials (lr of learning_rate), begins so or has such a part, or shares most letters.

    Args:
        otherwise: the advice where none is.
    """
    bare = {re.sub(r"\W+", "_", name.strip("-")): name for name in names}  # names are lower
    given = re.sub(r"\W+", "_", word[:80].lower()).strip("_")
    initials = (n for n in bare if given == "".join(part[:1] for part in n.split("_")))
    begun = (n for n in bare if len(given) > 2 and n.startswith(given))
    close = iter(difflib.get_close_matches(given, bare, n=1))  # at least 0.6 of their letters
    parts = (n for n in bare if len(given) > 1 and given in n.split("_"))
    found = next(itertools.chain(initials, begun, close, parts), None)
    return f"the nearest is {bare[found]}" if found else otherwise


def shown(value: object) -> str:
    """A value in a message: one line, of at most 80 characters."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    value = list(value) if isinstance(value, tuple) else value
    try:
        return printable(repr(value) if isinstance(value, str | list | dict) else value, 80)
    except ValueError:  # Python writes no number of thousands of digits; TOML may hold it in hex
        return "a number of thousands of digits"


def refuse(problems: list[Problem]) -> None:
    """Raises one UserError that tells them all, if there are any."""
    if problems:
        told = [": ".join(part for part in problem if part) for problem in problems]
        where, first = problems[0]
        rest = told[1:_SHOWN_PROBLEMS]
        if len(told) > _SHOWN_PROBLEMS:
            rest.append(f"and {len(told) - _SHOWN_PROBLEMS} more")
        raise UserError(where, "; ".join([first, *rest]))
