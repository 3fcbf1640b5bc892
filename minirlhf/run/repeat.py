"""The settings that run.json keeps, as those of another run: `--config RUN/run.json` and `rerun`.

What a run was given in its place, such as its folder or --resume, is no part of it. Relative paths
are of the folder in which the run was started, wherever that lies now.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_json
from minirlhf.run.settings import Setting

OF_ITS_PLACE = {"out", "resume", "resume_from", "dry_run", "allow_data_change",
                "allow_setting_change"}
_PARTS = re.compile(r"([^/=*]*[=*])?(.*?)(:[A-Za-z_]\w*)?", re.DOTALL)  # of NAME=FILE, 0.5*a.py:f


def is_record(table: Mapping[str, Any]) -> bool:
    """Whether the object of a JSON file is that of a run.json."""
    return {"recipe", "settings"} <= table.keys() and isinstance(table["settings"], dict)


def read_run(run: Path) -> dict[str, Any]:
    """What run.json says of the run in a folder."""
    path = run / "run.json"
    if not path.is_file():
        raise UserError(run, "holds no run.json", "give the folder of a run")
    facts = read_json(path)
    if not (isinstance(facts, dict) and is_record(facts) and isinstance(facts["recipe"], str)):
        raise UserError(path, "is not of a run", "give the folder of a run")
    return facts


def started_in(run: Path, facts: Mapping[str, Any]) -> Path | None:
    """The folder that a run's relative paths are of: its own path without what --out gave of it,
    so that it may have been moved with what it names; else that in which it was started, where
    run.json knows it."""
    out, here = Path(str(facts["settings"].get("out", "."))), run.resolve()
    parts = out.parts
    if parts and not out.is_absolute() and ".." not in parts and here.parts[-len(parts):] == parts:
        return here.parents[len(parts) - 1]
    then = facts.get("started_in")
    return Path(then) if isinstance(then, str) else None


def seen_from(folder: Path, place: str) -> str:
    """A place as NAME=FILE or 0.5*file.py:function whose path is of this folder, by a whole path;
    as it is where nothing is there: hub names, rules, addresses."""
    if place and _is_there(folder, place):
        return str(folder / place)
    before, path, behind = (part or "" for part in _PARTS.fullmatch(place).groups())
    return f"{before}{folder / path}{behind}" if path and _is_there(folder, path) else place


def _is_there(folder: Path, path: str) -> bool:
    """Whether a relative path names something; a pattern may be longer than a path can be."""
    return not Path(path).is_absolute() and os.path.exists(folder / path)


def settings_kept(
    path: Path, facts: Mapping[str, Any], settings: Mapping[str, Setting],
    beside: Callable[[dict[str, Any]], Mapping[str, Any]] | None, tell: Callable[[str], object],
) -> dict[str, Any]:
    """The settings of a run.json that another command has too; tells which it has not.

    Args:
        settings: of the command.
        beside: values that are given -> other defaults beside them. With it, what is as the
            command has it by itself is left to it, and counts as not given.
        tell: takes the line.
    """
    kept = {name: v for name, v in facts["settings"].items() if name not in OF_ITS_PLACE}
    if unknown := [printable(name, 40) for name in kept if name not in settings]:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        tell(f"note: {printable(path)}: no settings here: {', '.join(unknown[:8])}{more}")
    kept = {name: settings[name].from_file(v) for name, v in kept.items() if name in settings}
    folder = started_in(path.parent, facts)
    if folder is not None and folder.resolve() != Path.cwd():
        for name in (name for name in kept if settings[name].is_place):
            kept[name] = _all(kept[name], folder)
    if beside is None:
        return kept
    others = beside(kept)
    return {name: value for name, value in kept.items()
            if value != others.get(name, settings[name].default) or settings[name].required}


def _all(value: Any, folder: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_all(item, folder) for item in value)
    return seen_from(folder, value) if isinstance(value, str) else value
