"""A folder in which a run was started and made no step: it may be started there again.

What it holds is what a run writes before its first step, which the next start writes anew: nothing
that was trained is lost.
"""

import json
from pathlib import Path

from minirlhf.errors import UserError
from minirlhf.files import atomic
from minirlhf.files.reading import read_lines
from minirlhf.run.kinds import LOGS

_CUT_SHORT = {".lock", f"{atomic.TEMPORARY}run.json"}  # of a start, before it wrote anything
_OF_A_START = {"run.json", "crash.json", "rejected.jsonl", "dropped.jsonl", "tokenizer",
               "checkpoints", *LOGS}
_FIRST = "step-00000000"


def made_no_step(folder: Path) -> bool:
    """Whether a folder is empty, or holds only what a start leaves that came to no step: of logs
    and checkpoints those of step 0."""
    there = [path for path in folder.iterdir() if path.name not in _CUT_SHORT]
    names = {path.name for path in there}
    if there and ("run.json" not in names or any(path.is_symlink() for path in there)):
        return False
    kept = folder / "checkpoints"
    commits = {path.name for path in kept.iterdir()} if kept.is_dir() else set()
    later = [name for name in commits if not name.endswith(_FIRST)]  # .tmp-step-00000000 is of it
    return names <= _OF_A_START and not later and all(_ends_at_0(folder / log) for log in LOGS)


def _ends_at_0(log: Path) -> bool:
    if not log.exists() or not log.stat().st_size:
        return True
    try:
        *_, (_, line) = read_lines(log)
        return json.loads(line).get("step") == 0
    except (UserError, ValueError, AttributeError):  # half a line; no object
        return False


def forget_start(folder: Path) -> bool:
    """Removes what the next start could take for its own: before its run.json is written, so that
    no checkpoint stands beside settings that are not its own. Returns whether there was a start."""
    for place in (folder / "checkpoints" / _FIRST, folder / "tokenizer"):
        if place.exists():
            atomic.remove_folder(place)
    (folder / "crash.json").unlink(missing_ok=True)
    return (folder / "run.json").exists()
