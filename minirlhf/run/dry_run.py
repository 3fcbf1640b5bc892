"""A dry run: the first two steps of a run, on its longest rows. It measures and leaves no file.

A recipe makes a `DryRun` in place of its `Run` and goes the same way with it: what is measured is
the run's own loading, training, evaluation and export.
"""

import math
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from minirlhf.errors import UserError
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.machine import peak_bytes
from minirlhf.run.meters import Step
from minirlhf.run.resume import RunSettings

STEPS = 2  # Adam's moments are there from the second one on


class DryRun(Run):
    """Has the interface of `Run`, and tells at the end what was measured.

    Its folder is a temporary one beside `out`, which is removed however the run ends. Checkpoints
    are not written: a CPU writes them from where the tensors lie, so they never decide the peak.

    Attributes:
        steps: of the run that it stands for.
        work: of that run's steps together, in steps of the dry run.
        evaluations: of that run together, in evaluations of the dry run.
        once_seconds: of what that run does once, before its first step.
    """

    def __init__(
        self, config: RunSettings, recipe: str,
        inputs: Mapping[str, Iterable[str | Path]] = MappingProxyType({}),
    ):
        if config.resume:
            do = "leave out --resume: a dry run starts from the models and may have the same --out"
            raise UserError("--dry-run", "goes without --resume", do)
        super().__init__(config, recipe, inputs)
        above = next(parent for parent in self.folder.absolute().parents if parent.exists())
        self.folder = above / f".dry-run-{secrets.token_hex(8)}"
        self.steps, self.work, self.evaluations, self.device = STEPS, float(STEPS), 0.0, "cpu"
        self.once_seconds = 0.0
        self._step_seconds: list[float] = []
        self._report_seconds = 0.0  # of the last step's, which evaluates

    def check_folder(self) -> None:
        """Refuses what a run refuses, but no folder that holds something: nothing is put there."""
        self.check_place()

    def __enter__(self) -> "DryRun":
        self.inputs = {}  # no later start compares with their sums
        try:
            super().__enter__()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._remove()

    def _remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def restore(self, state: TrainState) -> None:
        """Begins at step 0. Whatever the first evaluation finds is the best: it is exported."""
        super().restore(state)
        self.device = str(next(state.model.parameters()).device)
        self.state = None  # there is no step to go back to where a reward service fails
        state.best = -math.inf

    def save(self, state: TrainState) -> None:
        """Writes nothing."""

    def bar(self, steps: Iterable[Step], state: TrainState, total: int) -> Iterator[Step]:
        return super().bar(self._timed(steps), state, total)

    def _timed(self, steps: Iterable[Step]) -> Iterator[Step]:
        upcoming, started = iter(steps), time.perf_counter()
        for step in upcoming:
            self._step_seconds.append(time.perf_counter() - started)
            yield step
            started = time.perf_counter()

    @contextmanager
    def report(self, state: TrainState, step: Step) -> Iterator[None]:
        started = time.perf_counter()
        with super().report(state, step):
            yield
        self._report_seconds = time.perf_counter() - started

    def done(self, what: str, folder: Path) -> None:
        """Tells the measured peak and the time of a step, and how long the run would take."""
        a_step = self._step_seconds[-1]
        whole = self.once_seconds + self.work * a_step + self.evaluations * self._report_seconds
        self.say(f"dry run: {len(self._step_seconds)} of {self.steps:,} steps, on the longest rows")
        self.display.table({
            "peak memory": f"{peak_bytes(self.device) / 1e9:.2f} GB",
            "seconds a step": f"{a_step:.1f}",
            "the whole run": f"about {duration(whole)}, saves not counted",
        })


def duration(seconds: float) -> str:
    """As in 12 s, 25 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
