"""What metrics.jsonl says, in trackers too: TensorBoard, Weights & Biases, Trackio.

None of them is needed: each is imported when it is asked for. Steps and names are those of
metrics.jsonl, with what depends on the machine under `clock/`. A resumed run goes on where the
first one was: TensorBoard drops the steps behind the checkpoint and gets them anew, the others keep
what they got first, which is the same. No failure of a tracker ends a run.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_json
from minirlhf.run.settings import as_dict, setting

PROJECT, ID_FILE = "minirlhf", "track.json"


@dataclass(frozen=True)
class TrackSettings:
    """Run: where its metrics are shown besides."""

    track: tuple[str, ...] = setting(
        (), "send the metrics to tensorboard, wandb or trackio too, or to several, whose packages "
        "must be installed", metavar="NAME", resume="free",
    )

    def check(self) -> list[str]:
        legal = ", ".join(TRACKERS)
        return [f"track: got {printable(repr(name), 80)}, must be of {legal}"
                for name in names_of(self.track) if name not in TRACKERS]


def names_of(track: tuple[str, ...]) -> list[str]:
    """Each name once; several may stand in one word, between commas."""
    return list(dict.fromkeys(name for word in track for name in word.split(",")))


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Place:
    """What a tracker is told of its run.

    Attributes:
        first: the first step that the log does not hold.
        new: the first step that no tracker was sent, of a run that had the same ones.
    """

    def __init__(self, folder: Path, config: Mapping[str, object], first: int = 0, new: int = 0):
        self.folder, self.config, self.first, self.new = folder, dict(config), first, new

    @property
    def id(self) -> str:
        """Of the run, the same after a resume."""
        path = self.folder / ID_FILE
        if not path.exists():
            from minirlhf.files import atomic  # it needs torch, for which --help does not wait

            atomic.write_json(path, {"id": secrets.token_hex(4)})
        return str(read_json(path)["id"])


class _TensorBoard:
    def __init__(self, place: Place):
        from torch.utils.tensorboard import SummaryWriter

        folder = str(place.folder / "tensorboard")
        # Events of later steps are purged from what is read of the files before.
        self.writer = SummaryWriter(folder, purge_step=place.first)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class _Sent:
    """A run of wandb or trackio, which take each step once."""

    def __init__(self, run: Tracker, place: Place):
        self.run, self.new = run, place.new

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step >= self.new:
            self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


def _wandb(place: Place) -> Tracker:
    import wandb

    return _Sent(wandb.init(
        project=PROJECT, name=place.folder.name, id=place.id, resume="allow",
        dir=str(place.folder), config=place.config,
    ), place)


def _trackio(place: Place) -> Tracker:
    import trackio

    name = f"{place.folder.name}-{place.id}"  # which tells one run of a project from another
    run = trackio.init(project=PROJECT, name=name, config=place.config, resume="allow")
    return _Sent(run, place)


TRACKERS: dict[str, Callable[[Place], Tracker]] = {
    "tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio,
}


class Trackers:
    """All trackers of a run. A line is held back until its step is reported whole.

    Args:
        warn: tells that a tracker failed; it is not used any more.
    Raises:
        UserError: the package of a tracker is not installed.
    """

    def __init__(self, track: tuple[str, ...], warn: Callable[[str], None]):
        self.names, self.warn = names_of(track), warn
        self.opened: dict[str, Tracker] = {}
        self.held: list[tuple[int, dict[str, float]]] = []
        for name in self.names:
            if name in TRACKERS and find_spec(name) is None:
                do = f"pip install {name}, or leave it out"
                raise UserError(f"--track {name}", "is not installed", do)

    def open(self, folder: Path, config: object, new: int) -> None:
        """Begins; `new`: the first step that was not sent before."""
        place = Place(folder, as_dict(config), next_step(folder / "metrics.jsonl"), new)
        for name in self.names:
            self._try(name, lambda name=name: self.opened.update({name: TRACKERS[name](place)}))

    def hold(self, metrics: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """A line of metrics.jsonl."""
        values = {name: value for name, value in metrics.items() if name != "step"}
        values |= {f"clock/{name}": value for name, value in clock.items()}
        self.held.append((int(metrics["step"]), values))

    def send(self) -> None:
        """What is held."""
        held, self.held = self.held, []
        for step, values in held:
            for name, tracker in list(self.opened.items()):
                self._try(name, lambda t=tracker, v=values, s=step: t.log(v, s))

    def drop(self) -> None:
        """Takes back what is held."""
        self.held = []

    def close(self) -> None:
        self.send()
        for name, tracker in list(self.opened.items()):
            self._try(name, tracker.finish)
        self.opened = {}

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever its package raises: without a network, a login …
            self.opened.pop(name, None)
            why = printable(str(error).strip().partition("\n")[0], 200) or type(error).__name__
            self.warn(f"{name} failed, and is told no more: {why}")


def next_step(log: Path) -> int:
    """The step behind the last whole line of a metrics.jsonl; 0 where there is none."""
    lines = log.read_bytes().splitlines() if log.is_file() else []  # a pipe would never end
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except (ValueError, KeyError, TypeError):  # a line that was cut short
            continue
    return 0
