"""The output folder of a run: its facts, logs, checkpoints, and the model at the end.

    run.json  metrics.jsonl  samples.jsonl  checkpoints/step-…/  best/  model/

It is not a trainer: recipes own their loops and call it at their safe points.
"""

import fcntl
import json
import math
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

import minirlhf
from minirlhf import interrupt
from minirlhf.errors import NON_FINITE, REWARD_SERVICE, Stopped, UserError, printable
from minirlhf.files import atomic
from minirlhf.files.reading import read_json
from minirlhf.files.sieve import Report
from minirlhf.rewards.parse import parse_source
from minirlhf.run import checkpoint
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.machine import peak_bytes
from minirlhf.run.meters import Step
from minirlhf.setup.common import named_files

# Settings that a resumed run may change: no number depends on them, save for the device, and what
# that does to the last bits is said when a run is resumed.
FREE = {"out", "resume", "log_every", "save_every", "keep", "show_samples", "device",
        "reward_timeout", "reward_connect_timeout", "reward_retries", "reward_batch_size",
        "reward_token_file", "allow_data_change", "allow_setting_change", "offload_frozen",
        "gradient_checkpointing"}
# And those that it never may, whatever is allowed: a checkpoint's weights are of them.
FIXED = {"model", "init_config", "tokenizer", "vocab_size", "ref", "critic", "train_critic",
         "heads", "lora_rank", "lora_alpha", "dtype"}
# Settings that decide which rows a step takes, for recipes that count their place by steps.
PLACE = {"batch_size", "seed", "max_length", "overlong", "columns", "bad_rows", "fix_text",
         "allow_empty_prompt"}
LOGS = ("metrics.jsonl", "samples.jsonl")


class Run:
    """Holds the folder for its life: a second run on it is refused. Use as a context manager.

    Nothing is written before it is entered, so that bad input leaves no folder behind.

    Args:
        out: folder; made where missing, refused where it holds something and `resume` is not set.
        recipe: name of the recipe, for run.json.
        settings: the resolved config as plain values.
        resume: go on from the newest whole checkpoint.
        inputs: data files and folders of frozen models; a run is only resumed with the same bytes
            in them.
        fixed: settings beside FIXED that no resume may change.
    Raises:
        UserError: the folder is in use, not empty, or of a run with other settings or data.
    """

    def __init__(
        self, out: str, recipe: str, settings: dict, resume: bool, inputs: Iterable[str] = (),
        fixed: Iterable[str] = (),
    ):
        self.folder, self.recipe, self.settings = Path(out), recipe, settings
        self.resume, self.inputs, self.fixed = resume, list(inputs), FIXED.union(fixed)
        self.hashes: dict[str, str] = {}  # file -> sha256 of each input, once it is entered
        self.data_changes: list[dict] = []  # of all starts
        self.setting_changes: list[dict] = []  # likewise
        self.before: dict = {}  # settings of the last start
        self.state: TrainState | None = None  # once restored
        self.changed: dict[str, str] = {}  # setting -> how it differs from the last start's
        self.started = time.perf_counter()
        self._check_folder()

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked to stop: what there is to save is the state of a yield."""
        return interrupt.requested()

    def _check_folder(self) -> None:
        """Refuses a folder that is not this run's to write in."""
        facts = self.folder / "run.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(self.folder, "is not a folder", "give another --out")
        above = next(parent for parent in self.folder.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(self.folder, f"{above.name} is a file", "give another --out")
        read = [(name, self.settings.get(name)) for name in ("model", "ref", "critic")]
        sources = self.settings.get("reward", ())
        read += [("reward", parse_source(source).place) for source in sources]
        for name, source in read:  # what is read there would change
            if source and inside(self.folder, Path(source)):
                what = f"is --{name} {source} or lies in it"
                raise UserError(self.folder, what, "give another --out")
        if self.resume and facts.exists():
            self._check_same_run(read_json(facts), facts)
        elif self.folder.exists():
            unfinished = {".lock", f"{atomic.TEMPORARY}run.json"}  # of a start that was cut short
            if any(p.name not in unfinished for p in self.folder.iterdir()):
                hint = "give another --out" if self.resume else "give another --out, or --resume"
                raise UserError(self.folder, "is not empty", hint)

    def _check_same_run(self, before: object, where: Path) -> None:
        if not isinstance(before, dict) or before.get("recipe") != self.recipe:
            raise UserError(where, f"is not of a {self.recipe} run", "give another --out")
        old, now = before.get("settings"), json.loads(json.dumps(self.settings))
        if not isinstance(old, dict):
            raise UserError(where, "has no settings", "give another --out")
        past = [before.get(f"{name}_changes", []) for name in ("data", "setting")]
        if not (isinstance(before.get("inputs", {}), dict) and all(type(p) is list for p in past)):
            raise UserError(where, "has no list of its inputs", "give another --out")
        changed = {
            key: f"{key} was {printable(repr(old[key]), 80)}, is {now[key]!r}"
            for key in now
            if key in old and old[key] != now[key]
        }
        allowed = now.get("allow_setting_change")
        never = self.fixed if allowed else now.keys() - FREE
        if frozen := [text for key, text in changed.items() if key in never]:
            more = f" and {len(frozen) - 5} more" if len(frozen) > 5 else ""
            do = "resume with the settings of the first start"
            if changed.keys().isdisjoint(self.fixed):
                do += ", or --allow-setting-change"
            raise UserError(where, "; ".join(frozen[:5]) + more, do)
        newer = [key for key in now if key not in old and key not in FREE]
        if newer and not allowed:
            what = f"has no setting {', '.join(newer[:5])}: an older minirlhf began the run"
            do = "let that one finish it, give another --out, or --allow-setting-change"
            raise UserError(where, what, do)
        changed |= {key: f"{key} did not exist, is {now[key]!r}" for key in newer}
        # What is told by the command itself is not told again.
        told = ("out", "resume", "allow_data_change", "allow_setting_change")
        self.before = old
        self.changed = {key: text for key, text in changed.items() if key not in told}

    def __enter__(self) -> "Run":
        atomic.make_folder(self.folder)
        self._lock = self._take_lock()
        try:
            self._check_folder()  # another run may have come and gone since the first look
            atomic.sweep(self.folder)
            atomic.sweep(self.folder / "checkpoints")  # a finished run sweeps none by saving
            self._write_facts()
        except BaseException:
            self._lock.close()
            raise
        self._listening = interrupt.listening()
        self._listening.__enter__()
        return self

    def _take_lock(self) -> TextIO:
        """The kernel gives the lock back when the process dies, however it dies."""
        lock = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise UserError(self.folder, f"is in use by {owner}", "give another --out") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}")
        lock.flush()
        return lock

    def _write_facts(self) -> None:
        """run.json: what would have to be known to do this run again."""
        path = self.folder / "run.json"
        inputs = {str(file): atomic.sha256(file) for name in self.inputs for file in contents(name)}
        self.hashes = inputs
        past = read_json(path) if path.exists() else {}
        changes = self._changed_inputs(past.get("inputs", inputs), inputs)
        self.data_changes = past.get("data_changes", []) + changes
        self.setting_changes = past.get("setting_changes", []) + [
            {"setting": name, "was": self.before.get(name), "is": self.settings[name]}
            for name in self.changed if name not in FREE
        ]
        facts = {
            "recipe": self.recipe,
            "settings": self.settings,
            "inputs": inputs,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {
                "minirlhf": minirlhf.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        changes = {"data_changes": self.data_changes, "setting_changes": self.setting_changes}
        facts |= {name: made for name, made in changes.items() if made}
        self.write_file("run.json", atomic.json_text(facts))

    def provenance(self, places: Iterable[str]) -> dict:
        """What the model was trained on: the data's sha256, and the settings that change numbers.

        It is written for others to read, so files go by their names, not by this machine's folders.

        Args:
            places: settings that name files or folders.
        """
        kept = {k: v for k, v in self.settings.items() if k not in {*FREE, *places}}
        given = self._data()
        data = [{"file": Path(name).name, "sha256": sha256}
                for name, sha256 in self.hashes.items() if name in given]
        data += [{"file": Path(c["file"]).name, "sha256": c["was"]}
                 for c in self.data_changes if c["was"] is not None]
        changes = [c for c in self.setting_changes if c["setting"] in kept]
        return {"data": data, "settings": kept} | ({"changes": changes} if changes else {})

    def _data(self) -> set[str]:
        """Those of the inputs that are data and may change, or were at the last start."""
        names = []
        for settings in (self.settings, self.before):
            names += [settings.get("data"), settings.get("ptx_data")]
            if "eval_data" not in self.fixed:
                names += named_files(settings.get("eval_data", ())).values()
        return {str(Path(name)) for name in names if name}

    def _is_reward(self, file: str) -> bool:
        """Whether an input is of a reward source that may change, or was at the last start."""
        if "reward" in self.fixed:
            return False
        sources = [*self.settings.get("reward", ()), *self.before.get("reward", ())]
        places = [parse_source(source).place.partition(".py:") for source in sources]
        return any(Path(file).is_relative_to(p + ".py" * bool(py)) for p, py, _ in places)

    def _changed_inputs(self, before: dict[str, str], now: dict[str, str]) -> list[dict]:
        """What differs in the inputs, told; refused, unless it is what may change."""
        data, changes = self._data(), []
        # Older versions kept no sums of tokenizers.
        older = all(Path(name).name != "tokenizer.json" for name in before)
        for name in now | before:
            if (old := before.get(name)) == (new := now.get(name)):
                continue
            flags = [("allow_data_change", name in data)]
            flags += [("allow_setting_change", self._is_reward(name))]
            would = [flag for flag, fits in flags if fits]
            if older and old is None and not would:
                continue
            if not any(self.settings.get(flag) for flag in would):
                do = "".join(f", or --{flag.replace('_', '-')}" for flag in would)
                what = "has changed since the run began"
                raise UserError(name, what, f"give another --out{do}")
            was, now_is = (str(sha256)[:12] for sha256 in (old, new))
            print(f"changed: {printable(name)}: sha256 was {was}, is {now_is}")
            changes.append({"file": name, "was": old, "is": new})
        return changes

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, UserError | OSError):
                with suppress(OSError):  # the fault itself is the one to tell
                    self._write_crash(error)
            if _of_service(error) and self.state is not None:
                # Scores are asked for where all that has begun can be dropped, as at a signal.
                self.save(self.state)
                step = self.state.step
                do = f"{error.do}; step {step} is saved, --resume goes on at step {step + 1}"
                raise UserError(error.where, error.what, do, error.code) from error
        finally:
            self._listening.__exit__(None, None, None)
            self._lock.close()

    def _write_crash(self, error: Exception) -> None:
        """crash.json: what a report of the fault would have to say."""
        atomic.write_json(self.folder / "crash.json", {
            "error": f"{type(error).__name__}: {error}",
            "after_step": self.state.step if self.state else None,
            "samples": self.state.samples if self.state else None,
            "trace": traceback.format_exception(error),
            "settings": self.settings,
        })

    def restore(self, state: TrainState) -> None:
        """Puts the newest whole checkpoint into `state`, or commits it as step 0."""
        self.state = state
        newest, passed_over = checkpoint.newest_commit(self.folder / "checkpoints")
        for reason in passed_over:
            self.say(f"passed over {reason}")
        if newest is None:
            if self.resume:
                self.say("no checkpoint yet: starting at step 0")
            for name in LOGS:
                atomic.write_text(self.folder / name, "")
            atomic.fsync(self.folder)
            state.log_bytes = dict.fromkeys(LOGS, 0)
            self.save(state)
            return
        checkpoint.load_checkpoint(state, newest)
        for name, length in state.log_bytes.items():
            atomic.truncate(self.folder / name, length)
        self.say(f"resumed from {newest.name}")
        for text in self.changed.values():
            self.say(f"changed: {text}")
        then = read_json(newest / "manifest.json")["environment"]
        for name, now in checkpoint.environment(state.model).items():
            if then.get(name) != now:
                was = then.get(name, "not recorded")
                self.say(f"not bit for bit from here on: {name} was {was}, is {now}")

    def list_left_out(self, reports: Iterable[Report]) -> None:
        """rejected.jsonl and dropped.jsonl: rows of the data that this run does not see, and why.

        Each is written whole, by one rename, and only where that changes it: a function of the
        data and the settings, it is the same after every resume.
        """
        reports = list(reports)
        rejected = [row._asdict() for report in reports for row in report.rejected_rows]
        dropped = [
            {"where": row.where, "reason": row.reason}
            for report in reports for row in report.dropped_rows
        ]
        for name, rows in (("rejected.jsonl", rejected), ("dropped.jsonl", dropped)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path, temporary = self.folder / name, self.folder / f"{atomic.TEMPORARY}{name}"
            if text.encode() != (path.read_bytes() if path.exists() else b""):
                atomic.write_text(temporary, text)
                atomic.replace_file(temporary, path)

    def say(self, text: str) -> None:
        """Prints above the progress bar. A run that nobody reads any more stops as at a signal."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # for as long as the process lasts
            interrupt.request()

    def facts(self, facts: dict[str, object]) -> None:
        """Prints what is about to happen, one aligned line each."""
        width = max(map(len, facts))
        for name, value in facts.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            self.say(f"  {name:<{width}}  {shown}")

    def bar(self, steps: Iterable[Step], state: TrainState, total: int) -> Iterator[Step]:
        """The steps with a progress bar; ends early when a signal asked for it.

        A step that is trained but not reported, because a signal cut its report short, comes first.
        """
        if state.step >= total and state.unreported is None:
            print("no steps left to do")
        upcoming = iter(steps)
        with tqdm(
            total=total, initial=state.step, desc=self.recipe, disable=not sys.stderr.isatty()
        ) as bar:
            if state.unreported is not None:
                yield Step(**state.unreported)
            try:
                while not self.stopped and (step := next(upcoming, None)) is not None:
                    yield step
                    bar.update()
            except Stopped:
                pass  # what had begun is dropped: the state is that of the last yield

    @contextmanager
    def report(self, state: TrainState, step: Step) -> Iterator[None]:
        """Around what is written about a step: all of it, or nothing where a signal cuts it short.

        Then the resumed run writes it: an evaluation may take longer than the one who sent the
        signal will wait. The same where a reward service fails.
        """
        meters, log_bytes = state.meters.as_dict(), dict(state.log_bytes)
        best, health = state.best, state.health
        try:
            yield
            state.unreported = None
        except (Stopped, UserError) as error:
            if isinstance(error, UserError) and not _of_service(error):
                raise
            state.meters.load(meters)
            state.log_bytes, state.best, state.health = log_bytes, best, health
            for name, length in log_bytes.items():
                atomic.truncate(self.folder / name, length)
            state.unreported = step._asdict()
            if isinstance(error, UserError):
                raise

    def log(self, state: TrainState, extra: dict, clock: dict, columns: Iterable[str]) -> None:
        """One line in metrics.jsonl from the open meters, and one on the console.

        Args:
            extra: metrics that are not averaged over the window.
            clock: what depends on the machine; kept under one key, so that the rest of the file
                is the same in every run of the same settings.
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
        shown = [f"{n.rpartition('/')[2]} {metrics[n]:<9.4g}" for n in columns if n in metrics]
        self.say(f"step {state.step:>5}  " + "  ".join(shown).rstrip())

    def write_samples(self, state: TrainState, rows: list[dict]) -> None:
        """Adds rows to samples.jsonl."""
        self._append(state, "samples.jsonl", rows)

    def _append(self, state: TrainState, name: str, rows: list[dict]) -> None:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            state.log_bytes[name] = atomic.append_line(self.folder / name, text)

    def save(self, state: TrainState) -> None:
        """Commits a checkpoint; the logs are on disk before it says how long they are."""
        for name in state.log_bytes:
            atomic.fsync(self.folder / name)
        keep = self.settings.get("keep", 2)
        checkpoint.save_checkpoint(state, self.folder / "checkpoints", keep)

    def write_file(self, name: str, text: str) -> None:
        """Puts a file into the folder of the run, or another text under its name, by one rename."""
        temporary = self.folder / f"{atomic.TEMPORARY}{name}"
        atomic.write_text(temporary, text)
        atomic.replace_file(temporary, self.folder / name)

    def export(self, write: Callable[[Path], None], name: str = "model") -> Path:
        """Lets `write` fill a new folder that then takes its name; returns it."""
        temporary, final = self.folder / f"{atomic.TEMPORARY}{name}", self.folder / name
        atomic.sweep(self.folder)
        atomic.make_folder(temporary)
        write(temporary)
        for path in temporary.iterdir():
            atomic.fsync(path)
        atomic.commit_folder(temporary, final)
        return final


def _of_service(error: BaseException | None) -> bool:
    return isinstance(error, UserError) and error.code == REWARD_SERVICE


def inside(folder: Path, other: Path) -> bool:
    """Whether a folder is another one that exists, or lies below it."""
    return other.is_dir() and folder.resolve().is_relative_to(other.resolve())


def contents(name: str) -> list[Path]:
    """The file itself, or what a model is made of in a folder."""
    path = Path(name)
    if path.is_file():
        return [path]
    kinds = (".json", ".safetensors", ".jinja", ".txt")
    return sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
