"""The output folder of a run: its facts, logs, checkpoints, and the model at the end.

    run.json  metrics.jsonl  samples.jsonl  checkpoints/step-…/  model/

It is not a trainer: recipes own their loops and call it at their safe points.
"""

import fcntl
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import minirlhf
from minirlhf import checkpoint, fsio
from minirlhf.checkpoint import TrainState
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.meters import Step
from minirlhf.rows import read_json

# Settings that a resumed run may change, since no number depends on them.
FREE = {"out", "resume", "log_every", "save_every", "keep", "show_samples", "device"}
LOGS = ("metrics.jsonl", "samples.jsonl")


class Run:
    """Holds the folder for its life: a second run on it is refused. Use as a context manager.

    Args:
        out: folder; made where missing, refused where it holds something and `resume` is not set.
        recipe: name of the recipe, for run.json.
        settings: the resolved config as plain values.
        resume: go on from the newest whole checkpoint.
    Raises:
        UserError: the folder is in use, not empty, or of a run with other settings.
    """

    def __init__(self, out: str, recipe: str, settings: dict, resume: bool):
        self.folder, self.recipe, self.settings = Path(out), recipe, settings
        self.stopped = False
        self.started = time.perf_counter()
        facts = self.folder / "run.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(out, "is not a folder", "give another --out")
        if resume and facts.exists():
            self._check_same_run(read_json(facts), facts)
        elif self.folder.exists() and any(p.name != ".lock" for p in self.folder.iterdir()):
            hint = "give another --out" if resume else "give another --out, or --resume"
            raise UserError(out, "is not empty", hint)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _check_same_run(self, before: dict, where: Path) -> None:
        if before.get("recipe") != self.recipe:
            raise UserError(where, f"is of a {before.get('recipe')} run", "give another --out")
        old = before.get("settings", {})
        now = json.loads(json.dumps(self.settings))
        changed = [
            f"{key} was {old.get(key)!r}, is {now[key]!r}"
            for key in now
            if key not in FREE and old.get(key) != now[key]
        ]
        if changed:
            raise UserError(
                where, "; ".join(changed), "resume with the settings of the first start"
            )

    def __enter__(self) -> "Run":
        self._lock = (self.folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(self.folder, f"is in use by {owner}", "give another --out") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()
        facts = {
            "recipe": self.recipe,
            "settings": self.settings,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {
                "minirlhf": minirlhf.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        fsio.write_json(self.folder / ".run.json.tmp", facts)
        fsio.replace_file(self.folder / ".run.json.tmp", self.folder / "run.json")
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._lock.close()

    def _stop(self, number: int, _frame: object) -> None:
        """First signal: stop at the next safe point. Second: at once; the last commit stands."""
        if self.stopped:
            os._exit(128 + number)
        self.stopped = True
        print("\nstopping after this step; once more to leave at once", file=sys.stderr)

    def restore(self, state: TrainState) -> None:
        """Puts the newest whole checkpoint into `state`, or commits it as step 0."""
        commits = self.folder / "checkpoints"
        newest, passed_over = checkpoint.newest_commit(commits)
        for reason in passed_over:
            print(f"passed over {reason}")
        if newest is None:
            if self.settings.get("resume"):
                print("no checkpoint yet: starting at step 0")
            for name in LOGS:
                (self.folder / name).write_text("", encoding="utf-8")
            state.log_bytes = dict.fromkeys(LOGS, 0)
            self.save(state)
            return
        checkpoint.load_checkpoint(state, newest)
        for name, length in state.log_bytes.items():
            fsio.truncate(self.folder / name, length)
        print(f"resumed from {newest.name}")

    def facts(self, facts: dict[str, object]) -> None:
        """Prints what is about to happen, one aligned line each."""
        width = max(map(len, facts))
        for name, value in facts.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            print(f"  {name:<{width}}  {shown}", flush=True)

    def bar(self, steps: Iterable[Step], state: TrainState, total: int) -> Iterator[Step]:
        """The steps with a progress bar; ends early when a signal asked for it."""
        with tqdm(
            total=total, initial=state.step, desc=self.recipe, disable=not sys.stderr.isatty()
        ) as bar:
            for step in steps:
                yield step
                bar.update()
                if self.stopped:
                    return

    def log(self, state: TrainState, extra: dict, clock: dict, columns: Iterable[str]) -> None:
        """One line in metrics.jsonl from the open meters, and one on the console.

        Args:
            extra: metrics that are not averaged over the window.
            clock: what depends on the machine; kept under one key, so that the rest of the file
                is the same in every run of the same settings.
            columns: metrics shown on the console.
        """
        metrics = {"step": state.step} | state.meters.flush() | extra
        for name, value in metrics.items():
            if isinstance(value, float) and not -float("inf") < value < float("inf"):
                raise UserError(f"step {state.step}: {name}", f"is {value}", "", NON_FINITE)
        clock = {"elapsed": time.perf_counter() - self.started} | clock
        self._append(state, "metrics.jsonl", [metrics | {"clock": clock}])
        shown = [f"{n.rpartition('/')[2]} {metrics[n]:<9.4g}" for n in columns if n in metrics]
        tqdm.write(f"step {state.step:>5}  " + "  ".join(shown).rstrip(), file=sys.stdout)
        sys.stdout.flush()

    def write_samples(self, state: TrainState, rows: list[dict]) -> None:
        self._append(state, "samples.jsonl", rows)

    def _append(self, state: TrainState, name: str, rows: list[dict]) -> None:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            state.log_bytes[name] = fsio.append_line(self.folder / name, text)

    def save(self, state: TrainState) -> None:
        """Commits a checkpoint; the logs are on disk before it says how long they are."""
        for name in state.log_bytes:
            fsio.fsync(self.folder / name)
        keep = self.settings.get("keep", 2)
        checkpoint.save_checkpoint(state, self.folder / "checkpoints", keep)

    def export(self, write: Callable[[Path], None]) -> Path:
        """Lets `write` fill a new folder that then becomes model/; returns it."""
        temporary, final = self.folder / ".tmp-model", self.folder / "model"
        if temporary.exists():
            fsio.remove_folder(temporary)
        temporary.mkdir()
        write(temporary)
        for path in temporary.iterdir():
            fsio.fsync(path)
        if final.exists():
            fsio.remove_folder(final)
        fsio.commit_folder(temporary, final)
        return final
