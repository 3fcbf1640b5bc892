"""A command line becomes a config: flags, the file of --config, --preset, and --help.

Flags beat the file, which beats the preset, which beats the defaults. `-` and `_` are the same in
every name. Whatever is wrong is told in one line, all of it at once.
"""

import argparse
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from minirlhf.errors import UserError
from minirlhf.run.config_file import explain, find_preset, presets_of, read_settings
from minirlhf.run.settings import (
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


def parse(
    config_class: type[C], argv: list[str] | None, prog: str,
    tell: Callable[[str], object] | None = None,
) -> C:
    """The config that a command line asks for; argv None stands for the process's own.

    Args:
        config_class: its docstring's first line says in --help what the command does. Where it has
            SHOWN_FIRST, names of settings, --help shows these alone and --help-all the rest too.
            Where it has PRESETS, a folder, its files are what --preset can name. Words that come
            before any flag are values of the setting that it names as FIRST_WORDS. Its method
            defaults_beside gives other defaults beside what was given.
        tell: takes lines about what was left out, or fitted to what is given; None: stderr.
    Raises:
        UserError: every unknown, repeated, missing, mistyped or illegal setting, in one line.
        SystemExit: 0 after --help or --explain-preset.
    """
    tell = tell or (lambda line: print(line, file=sys.stderr))
    settings, words = settings_of(config_class), sys.argv[1:] if argv is None else argv
    first_words = getattr(config_class, "FIRST_WORDS", None)
    if (name := first_words) and words[:1] and words[0][:1] != "-":
        words = [settings[name].flag, *words]
    presets = presets_of(config_class)
    parser, flags = _parser(config_class, settings, words, prog, presets)
    given = _read_flags(parser, flags, words, prog)
    if (name := given.pop("explain_preset", None)) is not None:
        print(explain(find_preset(presets, name, "--explain-preset"), settings))
        raise SystemExit(0)
    files = {}  # name in messages -> file; what a later one holds counts
    if (name := given.pop("preset", None)) is not None:
        files[f"--preset {name}"] = find_preset(presets, name, "--preset")
    if (path := given.pop("config", None)) is not None:
        files[path] = path
    values, where, problems = {}, {}, []
    others = getattr(config_class, "defaults_beside", lambda given: {})
    for name, path in files.items():
        own = others if len(files) == 1 else None  # beside a preset its defaults are given, too
        from_file, places, wrong = read_settings(settings, path, name, own, tell)
        values, where, problems = values | from_file, where | places, problems + wrong
    for name, text in given.items():
        values[name], where[name] = settings[name].from_flag(text), settings[name].flag
    for name, item in settings.items():
        if name in values and (problem := item.problem(values[name])):
            problems.append((where[name], problem))
        elif name in values and item.is_place and values[name] in ("", ("",)):
            problems.append((where[name], f"got '', must be the name of a {item.metavar.lower()}"))
        elif name not in values and item.required:
            first = "|".join(item.choices or [item.metavar or name.upper()])
            how = f": {prog} {first}" if name == first_words else ""
            problems.append((item.flag, f"required, but not given{how}"))
    refuse(problems)
    fitting = {name: value for name, value in others(values).items() if name not in values}
    config = config_class(**fitting | values)
    validate(config)
    if counts := [f"{n} {v}" for n, v in fitting.items() if settings[n].type is int]:
        tell(f"note: {' and '.join(counts)}, to fit what is given")
    return config


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
                problems.append((name, f"unknown flag: {nearest(name, flags, _every(flags))}"))
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


def _every(flags: Iterable[str]) -> str:
    """Where all flags stand."""
    return f"{'--help-all' if '--help-all' in flags else '--help'} lists them"


def _stray(word: str, flags: Iterable[str]) -> str:
    """What is wrong with a word that belongs to no flag: often it began with another dash."""
    dash = word[:1] in ("-", "–", "—", "−")
    advice = f": {nearest(word, flags, _every(flags))}" if dash else ""
    return f"unexpected argument {shown(word)}{advice}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag, _, what = message.removeprefix("argument ").partition(": ")
        raise UserError(flag, what.replace("argument", "value"))

    def format_help(self) -> str:
        """In as many columns as the terminal has: argparse breaks neither a usage line that it did
        not write nor a flag with its choices."""
        room = max(shutil.get_terminal_size().columns - 2, 20)
        lines = []
        for line in super().format_help().splitlines():
            if len(line) > room:
                indent = " " * (len(line) - len(line.lstrip()) + 4)
                parts = re.sub(r",(?=\w)", ", ", line)
                lines += textwrap.wrap(parts, room, subsequent_indent=indent,
                                       break_on_hyphens=False) or [""]
            else:
                lines.append(line)
        return "\n".join(lines) + "\n"


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
    file_help = "settings from a .toml, .json or .yaml file, or a run's run.json; flags beat it"
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
