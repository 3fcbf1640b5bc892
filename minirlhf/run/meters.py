"""Meters that average what happened since the last log line, and the record a recipe yields."""

import time
from typing import NamedTuple


class Step(NamedTuple):
    """What a recipe yields after each iteration: a safe point to save, evaluate, print or stop."""

    number: int  # iterations completed, 1-based, the same everywhere
    metrics: dict[str, float]  # a pure function of the run's settings
    clock: dict[str, float]  # seconds and rates: what depends on the machine
    samples: list[dict]  # rows for samples.jsonl, where the recipe makes texts


class AverageMeter:
    """Weighted running average of one number."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.val, self.sum, self.count = 0.0, 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        """Adds `value`, the mean of n observations."""
        self.val = value
        self.sum += value * n
        self.count += n

    @property
    def avg(self) -> float:
        """The mean since the last reset; 0 where nothing was added."""
        return self.sum / self.count if self.count else 0.0


class Meters:
    """Named meters of an open window. They are part of the state: a killed run loses none."""

    def __init__(self):
        self.meters: dict[str, AverageMeter] = {}

    def update(self, values: dict[str, float], n: int = 1) -> None:
        """Adds one observation of each name, the mean of n."""
        for name, value in values.items():
            self.meters.setdefault(name, AverageMeter()).update(value, n)

    def flush(self) -> dict[str, float]:
        """The averages of the window, which is then empty."""
        averages = {name: meter.avg for name, meter in self.meters.items()}
        self.meters.clear()
        return averages

    def as_dict(self) -> dict[str, list[float]]:
        """name -> [val, sum, count], as JSON holds it to the last bit."""
        return {name: [m.val, m.sum, m.count] for name, m in self.meters.items()}

    def load(self, saved: dict[str, list[float]]) -> None:
        """The inverse of `as_dict`; what was open before is dropped."""
        self.meters.clear()
        for name, (val, total, count) in saved.items():
            meter = self.meters[name] = AverageMeter()
            meter.val, meter.sum, meter.count = val, total, count


class Stopwatch:
    """Seconds of the parts of one step, and what they make of rates."""

    def __init__(self):
        self.started = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Adds what has passed since the last lap to the part of this name."""
        passed = time.perf_counter() - self.started - sum(self.laps.values())
        self.laps[name] = self.laps.get(name, 0.0) + passed

    def clock(self, total: str, counts: dict[str, int]) -> dict[str, float]:
        """The laps, their sum (of a watch without laps what has passed) under the name `total`, and
        each count by the second."""
        seconds = sum(self.laps.values()) or time.perf_counter() - self.started
        rates = {name: count / seconds for name, count in counts.items()}
        return self.laps | {total: seconds} | rates
