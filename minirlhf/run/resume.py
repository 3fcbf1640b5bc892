"""Whether a run may go on: what has changed since its last start, and what of it may change.

run.json holds the settings of the last start and the sha256 of every input: of data files, files
with reward functions, folders of models that are read. Each setting says where it is declared
whether a resumed run may change it; an input may change where the setting that names it may, data
files with --allow-data-change, all others with --allow-setting-change.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_json
from minirlhf.run.display import ConsoleSettings, Display
from minirlhf.run.settings import as_dict, resume_rules, setting, settings_of
from minirlhf.run.trackers import TrackSettings

CHANGES = ("data_changes", "setting_changes")


@dataclass(frozen=True)
class OutSettings:
    """Run: where it writes."""

    out: str = setting(
        "", "folder of the run: logs, checkpoints and the finished model", metavar="DIR",
        required=True, resume="free",
    )


@dataclass(frozen=True)
class RunSettings(OutSettings, ConsoleSettings, TrackSettings):
    """Run: its logs and checkpoints, and how it goes on."""

    log_every: int = setting(
        10, "steps from one line of metrics.jsonl to the next", at_least=1, resume="free"
    )
    save_every: int | None = setting(
        100, "steps from one checkpoint to the next; none: none, not even of the start: a run that "
        "is killed begins again", at_least=1, resume="free",
    )
    keep: int = setting(2, "how many of the newest checkpoints are kept", at_least=2, resume="free")
    resume: bool = setting(False, "go on from the newest checkpoint in --out", resume="free")
    resume_from: str | None = setting(
        None, "go on from this checkpoint in --out, as step-00000040, and remove the later ones; "
        "needs --resume", metavar="NAME", resume="free",
    )
    dry_run: bool = setting(
        False, "make two steps on the longest rows, print peak memory and time, and leave no file",
        resume="free",
    )
    allow_data_change: bool = setting(
        False, "resume although data files have changed", resume="free"
    )
    allow_setting_change: bool = setting(
        False, "resume although settings or reward functions have changed", resume="free"
    )

    def check(self) -> list[str]:
        alone = self.resume_from is not None and not self.resume
        return ["resume_from: goes with --resume"] if alone else []


# What is told by the command itself is not told again.
OF_THE_START = ("out", "resume", "resume_from", "allow_data_change", "allow_setting_change")


@dataclass
class Record:
    """What run.json says of a run that was started."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the last start
    inputs: dict[str, str] = field(default_factory=dict)  # file -> sha256
    named_by: dict[str, list[str]] = field(default_factory=dict)  # setting -> files
    data_changes: list[dict] = field(default_factory=list)  # of inputs, over all starts
    setting_changes: list[dict] = field(default_factory=list)  # likewise

    def names_of(self, file: str) -> set[str]:
        """Settings that name an input."""
        return {name for name, files in self.named_by.items() if file in files}


def read_record(where: Path, recipe: str) -> Record:
    """The record in a run.json.

    Raises:
        UserError: it is of another recipe, or not of the form.
    """
    facts = read_json(where)
    if not isinstance(facts, dict) or facts.get("recipe") != recipe:
        raise UserError(where, f"is not of a {recipe} run", "give another --out")
    if not isinstance(facts.get("settings"), dict):
        raise UserError(where, "has no settings", "give another --out")
    inputs, named_by = facts.get("inputs", {}), facts.get("named_by", {})
    changes = [facts.get(name, []) for name in CHANGES]
    fits = isinstance(inputs, dict) and isinstance(named_by, dict)
    if not (fits and all(type(some) is list for some in (*named_by.values(), *changes))):
        raise UserError(where, "has no list of its inputs", "give another --out")
    return Record(facts["settings"], inputs, named_by, *changes)


def changed_settings(before: Record, config: RunSettings, where: Path) -> dict[str, str]:
    """Setting -> how it differs from the last start's; without those of the start itself.

    Raises:
        UserError: a setting that may not change has; there is one that the run did not know.
    """
    old, now = before.settings, json.loads(json.dumps(as_dict(config)))
    rules, allowed = resume_rules(config), config.allow_setting_change
    changed = {
        key: f"{key} was {printable(repr(old[key]), 80)}, is {now[key]!r}"
        for key in now
        if key in old and old[key] != now[key]
    }
    never = ("fixed",) if allowed else ("fixed", "ask")
    if refused := [text for key, text in changed.items() if rules[key] in never]:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        do = "resume with the settings of the first start"
        if all(rules[key] != "fixed" for key in changed):
            do += ", or --allow-setting-change"
        raise UserError(where, "; ".join(refused[:5]) + more, do)
    newer = [key for key in now if key not in old and rules[key] != "free"]
    if newer and not allowed:
        what = f"has no setting {', '.join(newer[:5])}: an older minirlhf began the run"
        do = "let that one finish it, give another --out, or --allow-setting-change"
        raise UserError(where, what, do)
    changed |= {key: f"{key} did not exist, is {now[key]!r}" for key in newer}
    return {key: text for key, text in changed.items() if key not in OF_THE_START}


def contents(places: Iterable[str | Path]) -> Iterator[Path]:
    """Each file itself, and of each folder what a model is made of."""
    kinds = (".json", ".safetensors", ".jinja", ".txt")
    for path in map(Path, places):
        if path.is_file():
            yield path
        else:
            yield from sorted(f for f in path.iterdir() if f.suffix in kinds and f.is_file())


def changed_inputs(before: Record, now: Record, config: RunSettings) -> list[dict]:
    """What differs in the inputs, told.

    Raises:
        UserError: one differs that may not.
    """
    rules, kinds, changes = resume_rules(config), settings_of(type(config)), []
    # Older versions kept no sums of tokenizers.
    older = all(Path(name).name != "tokenizer.json" for name in before.inputs)
    for file in now.inputs | before.inputs:
        if (was := before.inputs.get(file)) == (now_is := now.inputs.get(file)):
            continue
        names = (before.names_of(file) | now.names_of(file)) & rules.keys()
        may = [name for name in names if rules[name] != "fixed"]
        flags = [("allow_data_change", any(kinds[name].data for name in may)),
                 ("allow_setting_change", any(not kinds[name].data for name in may))]
        would = [flag for flag, fits in flags if fits]
        if older and was is None and not would:
            continue
        if not any(getattr(config, flag) for flag in would):
            do = "".join(f", or --{flag.replace('_', '-')}" for flag in would)
            what = "has changed since the run began"
            raise UserError(file, what, f"give another --out{do}")
        sums = f"sha256 was {str(was)[:12]}, is {str(now_is)[:12]}"
        Display(config).note(f"changed: {printable(file)}: {sums}")
        changes.append({"file": file, "was": was, "is": now_is})
    return changes


def next_record(
    before: Record | None, changed: Iterable[str], named: Mapping[str, Mapping[str, str]],
    config: RunSettings,
) -> Record:
    """The record of this start.

    Args:
        before: None at the first start.
        changed: settings that differ from the last start's.
        named: setting -> file -> sha256, of the inputs that it names.
    Raises:
        UserError: an input has changed that may not.
    """
    inputs = {file: sha256 for files in named.values() for file, sha256 in files.items()}
    now = Record(as_dict(config), inputs, {name: list(files) for name, files in named.items()})
    if before is not None:
        rules = resume_rules(config)
        now.data_changes = before.data_changes + changed_inputs(before, now, config)
        now.setting_changes = before.setting_changes + [
            {"setting": name, "was": before.settings.get(name), "is": now.settings[name]}
            for name in changed if rules[name] != "free"
        ]
    return now


def provenance(record: Record, config: RunSettings) -> dict:
    """What the model was trained on: the data's sha256, and the settings that change numbers.

    It is written for others to read, so files go by their names, not by this machine's folders.
    """
    kinds = settings_of(type(config))
    kept = {name: value for name, value in record.settings.items()
            if kinds[name].resume != "free" and not kinds[name].is_place}
    given = {file for name, files in record.named_by.items() if kinds[name].data for file in files}
    data = [{"file": Path(name).name, "sha256": sha256}
            for name, sha256 in record.inputs.items() if name in given]
    data += [{"file": Path(c["file"]).name, "sha256": c["was"]}
             for c in record.data_changes if c["was"] is not None]
    changes = [c for c in record.setting_changes if c["setting"] in kept]
    return {"data": data, "settings": kept} | ({"changes": changes} if changes else {})
