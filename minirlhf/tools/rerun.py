"""A run again, as its run.json has it: `minirlhf rerun RUN`, with what --set gives changed.

It runs in the folder in which that run was started, so that each path means what it meant. On the
same machine the same settings and files give the same numbers.
"""

import os
import platform
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import minirlhf
from minirlhf.errors import UserError, printable
from minirlhf.files import atomic
from minirlhf.run import flags
from minirlhf.run.repeat import read_run, seen_from, started_in
from minirlhf.run.settings import Setting, settings_of
from minirlhf.tools.settings import RerunConfig

_TRUTHS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def free_name(run: Path) -> Path:
    """RUN-2, RUN-3, …: the first that is not there."""
    here = run.resolve()
    return next(p for n in count(2) if not (p := here.with_name(f"{here.name}-{n}")).exists())


def flags_of(given: tuple[str, ...], settings: Mapping[str, Setting], here: Path) -> list[str]:
    """The words of a command line that change these settings.

    Args:
        given: words such as learning_rate=1e-5; a setting of many values may stand several times.
        here: the folder that their paths are of.
    """
    words = []
    for word in given:
        name, _, value = word.partition("=")
        flag, item = name.replace("_", "-").lstrip("-"), settings.get(name.replace("-", "_"))
        if item is not None and item.type is bool:
            if value.lower() not in _TRUTHS:
                raise UserError(f"--set {name}", f"got {printable(value, 40)!r}", "true or false")
            words.append(f"--{'' if _TRUTHS[value.lower()] else 'no-'}{flag}")
        else:
            value = seen_from(here, value) if item is not None and item.is_place else value
            words.append(f"--{flag}={value}")
    return words


def changed_inputs(folder: Path, facts: Mapping[str, Any], replaced: set[str]) -> list[str]:
    """What of the files that a run read is not as it was; those that only the settings `replaced`
    name are of no matter."""
    named, inputs = (facts.get(name) for name in ("named_by", "inputs"))
    if not (isinstance(named, dict) and isinstance(inputs, dict)):
        return []
    still = [files for name, files in named.items()
             if name not in replaced and isinstance(files, list)]
    was = {file: sha256 for file, sha256 in inputs.items() if any(file in files for files in still)}
    there = [file for file in was if os.path.isfile(folder / file)]
    now = dict(zip(there, atomic.sha256_each([folder / file for file in there]), strict=True))
    return [file for file in was if now.get(file) != was[file]]


def tell_changes(folder: Path, facts: Mapping[str, Any], replaced: set[str]) -> None:
    """One line for what is not as it was: files, and the versions that round otherwise."""
    if changed := changed_inputs(folder, facts, replaced):
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        print(f"warning: changed since that run: {printable(', '.join(changed[:5]), 500)}{more}")
    import torch

    now = {"minirlhf": minirlhf.__version__, "torch": torch.__version__,
           "python": platform.python_version()}
    then = facts.get("versions")
    if isinstance(then, dict) and then != now:
        told = ", ".join(f"{name} was {printable(then.get(name), 40)}, is {version}"
                         for name, version in now.items() if then.get(name) != version)
        print(f"note: numbers may differ in their last digits: {told}")


def main(argv: list[str] | None, verbs: Mapping[str, Any]) -> int:
    """The command.

    Args:
        verbs: name -> what has the config() of a verb, and does it by run(words).
    """
    config = flags.parse(RerunConfig, argv, "minirlhf rerun")
    run, here = Path(config.run), Path.cwd()
    facts = read_run(run)
    recipe = facts["recipe"]
    if recipe not in verbs:
        what = f"is of a run of {printable(recipe, 40)}, which is no verb here"
        raise UserError(run / "run.json", what, "use the minirlhf that began it")
    out = free_name(run) if config.out is None else here / config.out
    words = flags_of(config.set, settings_of(verbs[recipe].config()), here)
    folder = started_in(run, facts)
    if folder is None or not folder.is_dir():
        why = "it does not say where" if folder is None else f"it was in {printable(folder)}"
        print(f"note: that run's relative paths are read from here: {why}")
        folder = here
    record = run.resolve() / "run.json"
    os.chdir(folder)
    folder = Path.cwd()
    new = out.relative_to(folder) if out.is_relative_to(folder) else out
    print(f"{recipe} as in {printable(run)}, into {printable(out)}")
    if folder != here:
        print(f"paths are of {printable(folder)}: to resume it, cd there")
    tell_changes(folder, facts, {word.partition("=")[0].replace("-", "_") for word in config.set})
    sys.stdout.flush()
    words = ["--config", str(record), "--out", str(new), *words]
    sys.argv = [sys.argv[0], recipe, *words]  # what is to be typed to go on with --resume
    return verbs[recipe].run(words)
