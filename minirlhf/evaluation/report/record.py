"""What the folder of a run holds, read whatever state it is in: running, killed, without a step.

A report is made of what there is. Lines that cannot be read are counted, never an error: the last
one of a run that was killed may be half. Both logs are read in one pass that keeps little: of
metrics.jsonl the numbers, of samples.jsonl its first and its last part.
"""

import json
import math
from array import array
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minirlhf.errors import UserError
from minirlhf.evaluation.alarms import DPO_RULES, RULES, Alarm, Rule, alarms_told, check_alarms
from minirlhf.run.glossary import METRICS
from minirlhf.run.kinds import KINDS

PART = 4 << 20  # bytes of samples.jsonl that are read at its start, and at its end
ROOM = 1e300  # what is further from 0 has no room on an axis: ends of it would be infinite
LONGEST = 1 << 20  # bytes of a line of metrics.jsonl; run.json and card.json may have 16 times that


@dataclass
class Series:
    """One metric over the steps: finite values, and nan where the log has none that is finite."""

    steps: MutableSequence[float] = field(default_factory=lambda: array("d"))  # 8 bytes each
    values: MutableSequence[float] = field(default_factory=lambda: array("d"))

    @property
    def gaps(self) -> int:
        """How many values are not finite."""
        return sum(map(math.isnan, self.values))

    @property
    def last(self) -> float | None:
        """The last finite value."""
        return next((v for v in reversed(self.values) if not math.isnan(v)), None)


@dataclass
class RunRecord:
    """A run as its folder tells it."""

    folder: Path
    name: str  # on the page; several runs have several
    recipe: str
    settings: dict
    facts: dict  # run.json
    series: dict[str, Series] = field(default_factory=dict)  # of metrics.jsonl, and of its clock
    lines: int = 0  # of metrics.jsonl that were read
    broken: int = 0  # of both logs that could not be
    step: int = 0  # the last one that is logged
    samples: list[dict] = field(default_factory=list)
    unread: int = 0  # bytes in the middle of samples.jsonl
    card: dict | None = None
    alarms: list[Alarm] | None = None  # None: neither a checkpoint nor the log tells
    told: int = 0  # the step up to which they are

    @property
    def state(self) -> str:
        """How far the run has come, as a sentence with a `{step}`."""
        steps = self.settings.get("steps")
        behind = type(steps) is int and self.step < steps  # also where it was told to go on
        if not self.lines:
            return "finished, and no step is logged" if self.has_model else "no step is logged yet"
        if self.has_model and not behind:
            return "finished at step {step:,}"
        if steps == self.step:
            return "step {step:,} is logged, its last one, and no model is there"
        return "not finished: step {step:,} is the last one that is logged"

    @property
    def has_model(self) -> bool:
        """Whether the folder holds the model that the run was for."""
        return any((self.folder / name).is_dir() for name in ("model", "adapter"))


def read_run(folder: str | Path, name: str = "") -> RunRecord:
    """The record of a run's folder.

    Raises:
        UserError: it is none: there is no run.json of a recipe.
    """
    folder = Path(folder)
    where = folder / "run.json"
    if not where.is_file():
        what = "is not the folder of a run: no run.json" if folder.exists() else "no such folder"
        raise UserError(folder, what, "give what --out named")
    facts = _read_object(where)
    recipe = facts.get("recipe") if facts else None
    if recipe not in tuple(METRICS) or not isinstance(facts.get("settings"), dict):
        raise UserError(where, "is not what a run has written", "give what --out named")
    record = RunRecord(folder, name or folder.resolve().name, recipe, facts["settings"], facts)
    read_metrics(record, folder / "metrics.jsonl")
    read_samples(record, folder / "samples.jsonl")
    record.card = _read_object(folder / "card.json")
    read_alarms(record)
    return record


def read_metrics(record: RunRecord, path: Path) -> None:
    """Every number of the log, by its name; those of its clock too."""
    for line in _lines(path):
        row = _parsed(line)
        step = number(row.get("step")) if row else None
        if step is None or math.isnan(step):
            record.broken += 1
            continue
        record.lines, record.step = record.lines + 1, int(step)
        clock = row.pop("clock", None)
        for part in (row, clock if isinstance(clock, dict) else {}):
            for name, value in part.items():
                if not (type(value) is float and -ROOM < value < ROOM):  # the usual one costs least
                    value = number(value)
                if value is not None and name != "step":
                    series = record.series.get(name) or record.series.setdefault(name, Series())
                    series.steps.append(step)
                    series.values.append(value)


def number(value: object) -> float | None:
    """A JSON value as a float, nan where it is not finite or has no room on an axis; None where it
    is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return value if abs(value) < ROOM else math.nan


def read_samples(record: RunRecord, path: Path) -> None:
    """The rows in the first and in the last part of the log: what came before, and after."""
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(PART)
        record.unread = max(0, size - 2 * PART)
        file.seek(max(len(first), size - PART))
        last = file.read(PART)
    lines = (first + last).split(b"\n") if not record.unread else [
        *first.split(b"\n")[:-1], *last.split(b"\n")[1:]  # without the halves at the cut
    ]
    for line in filter(None, lines):
        if (row := _parsed(line)) is None:
            record.broken += 1
        else:
            record.samples.append(row)


def read_alarms(record: RunRecord) -> None:
    """What the run has warned of, up to its newest checkpoint; of one that keeps none, what its log
    says."""
    commits = sorted((record.folder / "checkpoints").glob("step-*/state.json"), reverse=True)
    rules = {"ppo": RULES, "grpo": RULES, "dpo": DPO_RULES}.get(record.recipe, ())
    if not commits:
        record.alarms, record.told = alarms_of_log(record, rules), record.step
        return
    state = _read_object(commits[0]) or {}
    health = state.get("health")
    if KINDS["health"](health) and KINDS["step"](state.get("step")):
        record.alarms, record.told = alarms_told(health, rules), state["step"]


def alarms_of_log(record: RunRecord, rules: Sequence[Rule]) -> list[Alarm] | None:
    """The alarms that the numbers of a log raise; None where it has not each step in a line of its
    own, since a rule looks at steps and not at means of several."""
    steps: dict[float, dict[str, float]] = {}
    for name in {name for rule in rules for name in rule.metrics} & record.series.keys():
        series = record.series[name]
        for step, value in zip(series.steps, series.values, strict=True):
            if not math.isnan(value):
                steps.setdefault(step, {})[name] = value
    if not steps or sorted(steps) != list(range(1, len(steps) + 1)) or record.step != len(steps):
        return None
    history, alarms = {}, []
    for step in range(1, record.step + 1):
        found, history = check_alarms(history, step, steps[step], rules)
        alarms += found
    return alarms


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log; of one that is longer than LONGEST, pieces, none of which is JSON."""
    if path.is_file():
        with path.open("rb") as file:
            while line := file.readline(LONGEST):
                yield line


def _parsed(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) else None


def _read_object(path: Path) -> dict | None:
    if not path.is_file() or path.stat().st_size > 16 * LONGEST:
        return None
    return _parsed(path.read_bytes())
