"""The output folder of a run: its facts, logs, checkpoints, and the model at the end.

    run.json  metrics.jsonl  samples.jsonl  checkpoints/step-…/  best/  model/

It is not a trainer: recipes own their loops and call it at their safe points. Of several processes
all call it, and rank 0 alone writes.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

import minirlhf
from minirlhf import console, errors, interrupt, ranks
from minirlhf.errors import NON_FINITE, REWARD_SERVICE, STOPPED, Stopped, UserError
from minirlhf.files import atomic
from minirlhf.files.reading import check_unchanged, forget_read, read_json
from minirlhf.files.sieve import Report, files_of_left_out
from minirlhf.run import checkpoint
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.crash import write_crash
from minirlhf.run.display import Display, this_command
from minirlhf.run.kinds import LOGS
from minirlhf.run.lock import check_held, take_lock
from minirlhf.run.machine import environment, peak_bytes
from minirlhf.run.meters import Step
from minirlhf.run.place import check_place, place_of
from minirlhf.run.resume import (
    CHANGES,
    Record,
    RunSettings,
    changed_settings,
    contents,
    next_record,
    provenance,
    read_record,
)
from minirlhf.run.started import forget_start, made_no_step
from minirlhf.run.trackers import Trackers, next_step

T = TypeVar("T")


class Run:
    """Holds the folder for its life: a second run on it is refused. Use as a context manager.

    Nothing is written before it is entered, so that bad input leaves no folder behind.

    Args:
        config: of the recipe, with the settings of its run. `out` is made where it is missing, and
            refused where it holds something and `resume` is not set.
        recipe: name of the recipe, for run.json.
        inputs: setting -> the files and folders that it names, as far as a run is only resumed
            with the same bytes in them. More may be added until it is entered.
    Raises:
        UserError: the folder is in use, not empty, or of a run with other settings or inputs.
    """

    def __init__(
        self, config: RunSettings, recipe: str,
        inputs: Mapping[str, Iterable[str | Path]] = MappingProxyType({}),
    ):
        self.folder, self.recipe, self.config = place_of(config.out), recipe, config
        self.inputs = {name: list(places) for name, places in inputs.items()}
        self.sums: dict[str, str] = {}  # of inputs that were hashed as they were read
        self.before: Record | None = None  # of the last start
        self.changed: dict[str, str] = {}  # setting -> how it differs from the last start's
        self.record: Record | None = None  # of this start, once it is entered
        self.state: TrainState | None = None  # once restored
        self.started, self.display = time.perf_counter(), Display(config, recipe)
        tracked = config.track if ranks.is_first() and not config.dry_run else ()
        self.trackers, self._lock = Trackers(tracked, self.display.note), None
        ranks.from_first(self.check_folder)

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked to stop: what there is to save is the state of a yield."""
        return interrupt.requested()

    def check_place(self) -> None:
        """Refuses a place where no folder can be made, or that a model is read from."""
        check_place(self.folder, self.config, self.inputs)

    def check_folder(self) -> None:
        """Refuses a folder that is not this run's to write in."""
        self.check_place()
        facts = self.folder / "run.json"
        if self.config.resume and facts.exists():
            self.before = read_record(facts, self.recipe)
            self.changed = changed_settings(self.before, self.config, facts)
        elif self.folder.exists() and not made_no_step(self.folder):
            hint = "give another --out" + ("" if self.config.resume else ", or --resume")
            raise UserError(self.folder, "is not empty", hint)

    def __enter__(self) -> "Run":
        self.record = Record(**ranks.from_first(self._take_folder))
        self._listening = ExitStack()
        self._listening.enter_context(console.speaking())
        self._listening.enter_context(interrupt.listening())
        return self

    def _take_folder(self) -> dict:
        """Locks the folder, and writes what a start writes; the fields of its record."""
        atomic.make_folder(self.folder)
        self._lock = take_lock(self.folder)
        try:
            self.check_folder()  # another run may have come and gone since the first look
            atomic.sweep(self.folder)
            atomic.sweep(self.folder / "checkpoints")  # a finished run sweeps none by saving
            self._record_inputs()
            if self.before is None:
                if forget_start(self.folder):
                    self.say("no step was made here before: begins anew")
                self._write_facts()
        except BaseException:
            self._lock.close()
            raise
        return vars(self.record)

    def _record_inputs(self) -> None:
        """The sums of what was read: a file that was written meanwhile is refused."""
        named = {name: {str(file): self.sums.get(str(file)) or atomic.sha256(file)
                        for file in contents(places)}
                 for name, places in self.inputs.items()}
        for files in named.values():
            for file in files:
                check_unchanged(Path(file))
        self.record = next_record(self.before, self.changed, named, self.config)

    def _write_facts(self) -> None:
        """run.json: what would have to be known to do this run again."""
        facts = {
            "recipe": self.recipe,
            "settings": self.record.settings,
            "inputs": self.record.inputs,
            "named_by": self.record.named_by,
            "command": this_command(),
            "started_in": os.getcwd(),  # which relative paths are of
            "versions": {"minirlhf": minirlhf.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
        }
        facts |= {name: made for name in CHANGES if (made := getattr(self.record, name))}
        self.write_file("run.json", atomic.json_text(facts))

    def provenance(self) -> dict:
        """What the model was trained on, as `resume.provenance` tells it."""
        return provenance(self.record, self.config)

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        try:
            if errors.hear(error) and ranks.is_first():
                with suppress(OSError):  # the fault itself is the one to tell
                    write_crash(error, self.state, self.config)
            if _of_service(error) and self.state is not None:
                # Scores are asked for where all that has begun can be dropped, as at a signal.
                self.save(self.state)
                step = self.state.step
                do = f"{error.do}; step {step} is saved, --resume goes on at step {step + 1}"
                raise UserError(error.where, error.what, do, error.code) from error
        finally:
            self.trackers.close()
            self._listening.close()
            if self._lock is not None:
                self._lock.close()
            forget_read()

    def restore(self, state: TrainState) -> None:
        """Puts the newest whole checkpoint into `state`, or commits it as step 0.

        A resume that is refused leaves the folder as it was.

        Raises:
            UserError: no checkpoint fits, or a log is shorter than the checkpoint knows.
        """
        self.state, found = state, ranks.from_first(self._newest)
        if found is None:
            ranks.from_first(self._begin)
            state.log_bytes = dict.fromkeys(LOGS, 0)
            if self.config.save_every is not None:
                self.save(state)
            return
        newest = self.folder / "checkpoints" / found
        checkpoint.load_checkpoint(state, newest)
        ranks.from_first(lambda: self._go_on(state, newest))

    def _newest(self) -> str | None:
        """The name of the newest whole checkpoint."""
        kept = self.folder / "checkpoints"
        newest, passed_over = checkpoint.newest_commit(kept, self.config.resume_from)
        for reason in passed_over:
            self.display.note(f"passed over {reason}")
        return newest and newest.name

    def _go_on(self, state: TrainState, newest: Path) -> None:
        """Cuts the logs to what the checkpoint knows, and tells what has changed since."""
        for name, length in state.log_bytes.items():
            atomic.check_length(self.folder / name, length)
        sent = next_step(self.folder / "metrics.jsonl")
        self._write_facts()
        if self.config.resume_from is not None:
            for commit in checkpoint.remove_later(newest):
                self.display.note(f"removed {commit.name}, which is later")
        self._cut_logs(state)
        self.trackers.open(self.folder, self.config, sent)
        self.say(f"resumed from {newest.name}")
        for text in self.changed.values():
            self.display.note(f"changed: {text}")
        then = {"processes": 1} | read_json(newest / "manifest.json")["environment"]
        for name, now in environment(state.model).items():
            if then.get(name) != now:
                was = then.get(name, "not recorded")
                self.display.note(f"not bit for bit from here on: {name} was {was}, is {now}")

    def _cut_logs(self, state: TrainState) -> None:
        for name, length in state.log_bytes.items():
            atomic.truncate(self.folder / name, length)

    def _begin(self) -> None:
        """Empties the logs."""
        kept_none = self.before is not None and self.before.settings.get("save_every", 1) is None
        ended = [name for name in ("model", "adapter") if (self.folder / name).exists()]
        if kept_none and ended:
            what = "has ended, and kept no checkpoint to go on from (--save-every none)"
            raise UserError(self.folder, what, "give another --out")
        if self.config.resume and not kept_none:
            for path in (self.folder / name for name in LOGS):
                if path.exists() and path.stat().st_size:  # of steps that were saved somewhere
                    what = f"holds no checkpoint, and {path.name} is not empty"
                    do = "put the checkpoints back, or give another --out"
                    raise UserError(self.folder / "checkpoints", what, do)
        if self.config.resume:
            self.say("no checkpoint yet: starting at step 0")
        for name in LOGS:
            atomic.write_text(self.folder / name, "")
        atomic.fsync(self.folder)
        self._write_facts()
        self.trackers.open(self.folder, self.config, 0)

    def list_left_out(self, reports: Iterable[Report]) -> None:
        """rejected.jsonl and dropped.jsonl: rows of the data that this run does not see, and why.

        Each is written whole, by one rename, and only where that changes it: a function of the
        data and the settings, it is the same after every resume.
        """
        texts = files_of_left_out(list(reports))

        def write() -> None:
            for name, text in texts.items():
                path = self.folder / name
                if text.encode() != (path.read_bytes() if path.exists() else b""):
                    self.write_file(name, text)

        self._write(write)

    def say(self, text: str) -> None:
        """Tells what is as it should be; see `display.Display`."""
        self.display.say(text)

    def bar(self, steps: Iterable[Step], state: TrainState, total: int) -> Iterator[Step]:
        """The steps with a progress bar; ends early when a signal asked for it.

        A step that is trained but not reported, because a signal cut its report short, comes first.
        """
        if state.step >= total and state.unreported is None:
            self.say("no steps left to do")
        upcoming = iter(steps)
        with console.bar_kind()(
            total=total, initial=state.step, desc=self.recipe, unit="step",
            disable=not console.has_bars(),
        ) as bar:
            if state.unreported is not None:
                yield Step(**state.unreported)
            try:
                while not self.stopped:
                    ranks.at(f"step {state.step + 1}")
                    if (step := next(upcoming, None)) is None:
                        break
                    yield step
                    bar.update()
            except Stopped:
                pass  # what had begun is dropped: the state is that of the last yield
            ranks.at("the end")

    @contextmanager
    def report(self, state: TrainState, step: Step) -> Iterator[None]:
        """Around what is written about a step: all of it, or nothing where a signal cuts it short.

        Then the resumed run writes it: an evaluation may take longer than the one who sent the
        signal will wait. The same where a reward service fails.
        """
        before = state.before_report()
        try:
            yield
            state.unreported = None
            self.trackers.send()
        except (Stopped, UserError) as error:
            if isinstance(error, UserError) and not _of_service(error):
                raise
            self.trackers.drop()
            state.take_back(before, step)
            ranks.from_first(lambda: self._cut_logs(state))
            if isinstance(error, UserError):
                raise

    def log(self, state: TrainState, extra: dict, clock: dict, columns: Iterable[str]) -> None:
        """One line in metrics.jsonl from the open meters, and one on the console.

        Args:
            extra: metrics that are not averaged over the window.
            clock: what depends on the machine; under one key, since all else is reproduced.
            columns: metrics shown on the console.
        Raises:
            UserError: a metric is not finite (exit code 3); no line is written.
        """
        metrics = {"step": state.step} | state.meters.flush() | extra
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"step {state.step}: {name}", f"is {value}",
                    "the last checkpoint stands; lower learning_rate, or look at the data",
                    NON_FINITE,
                )
        peak = peak_bytes(str(next(state.model.parameters()).device)) / 1e9
        clock = {"elapsed": time.perf_counter() - self.started, "peak_memory": peak} | clock
        self._append(state, "metrics.jsonl", [metrics | {"clock": clock}])
        self.trackers.hold(metrics, clock)
        self.display.step(state.step, metrics, columns)

    def write_samples(self, state: TrainState, rows: list[dict]) -> None:
        """Adds rows to samples.jsonl."""
        self._append(state, "samples.jsonl", rows)

    def _write(self, write: Callable[[], T]) -> T:
        """Lets rank 0 write, where the folder is still this run's; what it returns, for all."""
        def checked() -> T:
            check_held(self._lock, self.folder)
            return write()

        return ranks.from_first(checked)

    def _append(self, state: TrainState, name: str, rows: list[dict]) -> None:
        texts = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
        if texts:
            path = self.folder / name
            state.log_bytes[name] = self._write(
                lambda: [atomic.append_line(path, text) for text in texts][-1]
            )

    def save(self, state: TrainState) -> None:
        """Commits a checkpoint; the logs are on disk before it says how long they are."""
        tensors, keep = checkpoint.gather(state), self.config.keep

        def commit() -> None:
            for name in state.log_bytes:
                atomic.fsync(self.folder / name)
            checkpoint.save_checkpoint(state, self.folder / "checkpoints", keep, tensors)

        self._write(commit)

    def write_file(self, name: str, text: str) -> None:
        """Puts a file into the folder of the run, or another text under its name, by one rename."""
        temporary = self.folder / f"{atomic.TEMPORARY}{name}"

        def put() -> None:
            atomic.write_text(temporary, text)
            atomic.replace_file(temporary, self.folder / name)

        self._write(put)

    def export(self, write: Callable[[Path], None], name: str = "model") -> Path:
        """Lets `write` fill a new folder that then takes its name; returns it."""
        def fill() -> None:
            atomic.sweep(self.folder)
            atomic.write_folder(write, self.folder / name)

        self._write(fill)
        return self.folder / name

    def done(self, what: str, folder: Path) -> None:
        """Tells what the run has made, and where it is."""
        self.display.done(what, folder)

    def stop(self, state: TrainState) -> int:
        """Saves what a signal has stopped, tells the command that goes on; the exit code."""
        self.save(state)
        self.display.stopped(state.step)
        return STOPPED


def _of_service(error: BaseException | None) -> bool:
    return isinstance(error, UserError) and error.code == REWARD_SERVICE
