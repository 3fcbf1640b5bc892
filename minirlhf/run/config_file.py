"""Settings that stand in a file: that of --config, and the presets of --preset.

A preset is a config file, too: settings as another tool or a paper has them, one a line, each with
its source as a comment behind it. Its first line says whose they are, and the comments at its end
what is not as there, on purpose.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_text, strict_json
from minirlhf.run.repeat import is_record, settings_kept
from minirlhf.run.settings import NO_SECTIONS, Problem, Setting, nearest, shown
from minirlhf.run.yaml_file import read_yaml

_CAP, _LINE_CAP = 1 << 16, 1 << 12  # bytes, and characters of a line, which tomllib takes long for
_LINE = re.compile(r"^(\w+) = .*?  # (.+)$", re.MULTILINE)  # of a preset: (setting, source)
KINDS = (".toml", ".json", ".yaml", ".yml")
NOT_ONE = "the settings are the flags that --help tells of"
DIFFERS = "Not as there, on purpose:"


def read_settings(
    settings: Mapping[str, Setting], path: str | Path, called: str | None = None,
    beside: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, object], dict[str, str], list[Problem]]:
    """(values, where each stands, problems) of a config file.

    Args:
        called: the file's name in messages, where that is not its path.
        beside: values that are given -> other defaults beside them. With it, settings of a run
            that are as the command has them by itself count as not given.
        tell: takes a line about settings of a run that are none here.
    Raises:
        UserError: the file cannot be read, or is none of TOML, JSON and YAML.
    """
    values: dict[str, object] = {}
    where: dict[str, str] = {}
    problems: list[Problem] = []
    table = _load(path)
    if is_record(table):
        values = settings_kept(Path(path), table, settings, beside, tell)
        return values, {name: f"{path}: {name}" for name in values}, problems
    for key, given in table.items():
        name, place = key.replace("-", "_"), f"{called or path}: {printable(key, 80)}"
        if name not in settings and isinstance(given, dict):
            problems.append((place, NO_SECTIONS))
        elif name not in settings:
            problems.append((place, f"unknown setting: {nearest(name, settings, NOT_ONE)}"))
        elif name in values:
            problems.append((place, "given twice"))
        else:
            values[name], where[name] = settings[name].from_file(given), place
    return values, where, problems


def _load(path: str | Path) -> dict[str, Any]:
    """The top table of a TOML, JSON or YAML file."""
    kind = Path(path).suffix
    if kind not in KINDS:
        raise UserError(path, f"--config reads {', '.join(KINDS)} files only")
    text = read_text(path, _CAP)
    if kind in (".yaml", ".yml"):
        return read_yaml(text, path)
    if kind == ".json":
        table = strict_json(text, path)
        if not isinstance(table, dict):
            raise UserError(path, f"holds {shown(table)}", "must be an object of settings")
        return table
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > _LINE_CAP:
            what = f"a line of more than {_LINE_CAP:,} characters"
            raise UserError(f"{path}:{number}", what, "write it as JSON, or on several lines")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, a huge integer, nested too deeply
        raise UserError(path, f"not valid TOML: {error}") from None


def presets_of(config_class: type) -> dict[str, Path]:
    """Preset -> its file, in the folder that a config class names as its PRESETS."""
    folder = getattr(config_class, "PRESETS", None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find_preset(presets: Mapping[str, Path], name: str, flag: str) -> Path:
    if name not in presets:
        known = f"presets: {', '.join(presets)}"
        do = f"{nearest(name, presets, '')}; {known}".removeprefix("; ")
        raise UserError(flag, f"no preset {shown(name)}", do)
    return presets[name]


def explain(preset: Path, settings: Mapping[str, Setting]) -> str:
    """What a preset sets, beside the default here and the source there, and what it cannot."""
    text, (values, _, _) = preset.read_text("utf-8"), read_settings(settings, preset)
    about, differs = text.partition("\n")[0], text.partition(f"# {DIFFERS}\n")[2]
    sources = dict(_LINE.findall(text))
    rows = [("setting", "value", "default", "source")]
    for name, value in values.items():
        default = settings[name].default
        rows.append((name, _as_flag(value), _as_flag(default), sources.get(name, "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"--preset {preset.stem}: {about.removeprefix('# ')}"]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [DIFFERS, *(f"  {line.removeprefix('# - ')}" for line in differs.splitlines())]
    return "\n".join(lines)


def _as_flag(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
