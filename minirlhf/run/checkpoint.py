"""Everything that changes in a run, and how it is saved: safetensors and JSON, one rename a commit.

    checkpoints/step-00000040/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest is written last and holds size and sha256 of each file, and a seal, the sha256 of its
own text; a commit counts only if all of it verifies. The newest commit is the highest step that
does: there is no pointer that could point elsewhere.

Weights are those that are trained, with adapters these and the heads alone; of what is frozen below
them the header tells a fingerprint.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minirlhf.errors import UserError, printable
from minirlhf.files import atomic
from minirlhf.files.reading import read_json, read_text, strict_json
from minirlhf.run.kinds import KINDS
from minirlhf.run.machine import environment
from minirlhf.run.meters import Meters, Step
from minirlhf.run.tensors import (
    check_moments,
    frozen_below,
    kinds_of,
    moments_of,
    put_moments,
    put_weights,
    weights_of,
)

Tensors = tuple[tuple[dict[str, Tensor], dict[str, str]], dict[str, Tensor]]
FORMAT = 2
WEIGHTS, MOMENTS, NUMBERS = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
DESCRIBED = set(atomic.Written._fields)  # of each file
MANIFEST_CAP = 1 << 20  # bytes; ours has about a thousand
_NAME = re.compile(rf"({re.escape(atomic.ASIDE)})?step-([0-9]{{8,}})")
# Manifests of commits that this process wrote or has read to the end. Pruning counts whole commits
# and would otherwise read all of them at every save; resuming always reads.
_known_whole: set[str] = set()


@dataclass
class TrainState:
    """All that changes during a run and that later steps depend on.

    The recipe changes it. `Run`, which writes what the recipe reports, changes what that leaves
    behind: the lengths of the logs, the window of the meters, a step that is not reported.

    What is a function of (seed, step, sample) is derived, not stored: data order, sampling noise,
    mini-batch order, learning rate. So a recipe's generator can be dropped at any yield, rebuilt
    from this state, and goes on bit for bit. Every field below the optimizer is saved by its name,
    must be what JSON can hold, and has its kind in `kinds.KINDS`.
    """

    model: nn.Module  # what is trained, its heads included
    optimizer: torch.optim.Optimizer
    step: int = 0  # iterations completed
    samples: int = 0  # rows of data consumed
    kl_coef: float | None = None  # PPO: current coefficient of the KL penalty
    score_moments: list[float] = field(default_factory=list)  # of `scores.RunningMoments`
    best: float | None = None  # best value of the metric that evaluation watches
    baselines: dict[str, list[float]] = field(default_factory=dict)  # held-out scores of the start
    counters: dict[str, int] = field(default_factory=dict)  # events since the start
    health: dict[str, list[float]] = field(default_factory=dict)  # what alarms look back on
    meters: Meters = field(default_factory=Meters)  # the open log window
    log_bytes: dict[str, int] = field(default_factory=dict)  # length of each log file
    unreported: dict | None = None  # the last Step, where a signal cut its logs short

    def count(self, event: str, n: int = 1) -> None:
        self.counters[event] = self.counters.get(event, 0) + n

    def before_report(self) -> dict[str, object]:
        """What the report of a step changes, as it stands."""
        return {"meters": self.meters.as_dict(), "log_bytes": dict(self.log_bytes),
                "best": self.best, "health": self.health}

    def take_back(self, before: dict, step: Step) -> None:
        """Undoes a report that was cut short; a resumed run makes it."""
        self.meters.load(before["meters"])
        self.log_bytes = before["log_bytes"]
        self.best, self.health = before["best"], before["health"]
        self.unreported = step._asdict()


def _numbers(state: TrainState) -> dict[str, object]:
    """The fields that are no tensors, as JSON."""
    names = [f.name for f in fields(state) if f.name not in ("model", "optimizer")]
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"{unknown[0]} is no field of `kinds.KINDS`: say there what fits it")
    return {n: getattr(state, n) for n in names} | {"meters": state.meters.as_dict()}


# ------------------------------------------------------------------------------------------- save


def gather(state: TrainState) -> Tensors:
    """What `save_checkpoint` writes of model and optimizer: of several processes all call this, and
    rank 0 alone saves."""
    return weights_of(state.model), moments_of(state.model, state.optimizer)


def save_checkpoint(
    state: TrainState, folder: str | Path, keep: int = 2, tensors: Tensors | None = None
) -> Path:
    """Commits the state as folder/step-NNNNNNNN; returns the commit's folder.

    A commit of the same step, whole or not, is replaced and not reused: the state of a step may
    differ from what was saved of it, by a log line that was written since. Until the new one
    stands, the old one can be loaded, from the name under which it is put aside.

    Then, of older commits, all that are before the newest `keep` whole ones are removed, the new
    one counted; and later ones, which are damaged: the run was resumed before them.

    Args:
        keep: how many commits stay, this one counted.
        tensors: of `gather`; None: gathered here.
    Raises:
        UserError: whole commits of later steps are here, too little space, or a number is not
            finite; what was there before stays.
        OSError: the disk failed; what was there before stays. Where it failed in removing what is
            no longer needed, which the error then names, the new one stands too.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the new commit must stay, 2 are safe")
    folder = Path(folder)
    final = folder / f"step-{state.step:08d}"
    (weights, told), moments = gather(state) if tensors is None else tensors
    atomic.make_folder(folder)
    atomic.sweep(folder)
    later = [c for c in commits(folder) if _step(c) > state.step]
    if whole := [c for c in later if verify(c) is None]:
        raise UserError(whole[0], f"is later than step {state.step}, which is to be saved",
                        "save into another folder, or remove it")
    atomic.check_space(folder, sum(t.nbytes for t in (*weights.values(), *moments.values())))
    temporary = folder / f"{atomic.TEMPORARY}{final.name}"
    try:
        atomic.make_folder(temporary)
        files = {
            WEIGHTS: atomic.write_tensors(temporary / WEIGHTS, weights, told),
            MOMENTS: atomic.write_tensors(temporary / MOMENTS, moments),
            NUMBERS: atomic.write_json(temporary / NUMBERS, _numbers(state)),
        }
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "files": {name: written._asdict() for name, written in files.items()},
            "environment": environment(state.model),
        }
        text = _sealed(atomic.json_text(manifest).removesuffix("\n}\n"))
        atomic.write_text(temporary / MANIFEST, text)
        atomic.commit_folder(temporary, final)
    except BaseException:
        atomic.discard(temporary)  # half a checkpoint on a full disk would keep it full
        raise
    _known_whole.add(text)
    _prune(folder, later, keep)
    return final


def _prune(folder: Path, later: list[Path], keep: int) -> None:
    found = 0
    for commit in reversed([c for c in commits(folder) if c not in later]):
        if found == keep:
            atomic.remove_folder(commit)
        else:
            found += _is_whole(commit)
    for commit in later:
        atomic.remove_folder(commit)


# ----------------------------------------------------------------------------------------- commits


def _step(commit: Path) -> int:
    return int(_NAME.fullmatch(commit.name)[2])


def commits(folder: str | Path) -> list[Path]:
    """Commits of a folder, oldest first; not yet verified.

    One that was put aside for another of the same step, in a save that died, comes before that.
    """
    found = [p for p in Path(folder).glob("*step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: (_step(p), not p.name.startswith(atomic.ASIDE)))


def _sealed(body: str) -> str:
    """A manifest's text: its body, and the sha256 of that. No bit of it can change unseen."""
    return f'{body},\n  "seal": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


class _Damage(Exception):
    """What is wrong with a commit; the text begins with the file's name."""


def _manifest(commit: Path) -> tuple[dict[str, dict], str]:
    """(size and sha256 of each file, whole text), once all is as a save writes and sizes agree.

    Raises:
        _Damage, UserError, OSError: they are not, or cannot be read.
    """
    text = read_text(commit / MANIFEST, MANIFEST_CAP)
    manifest = strict_json(text, MANIFEST)
    if not isinstance(manifest, dict):
        raise _Damage(f"{MANIFEST} is no JSON object")
    if manifest.get("format") != FORMAT:
        found = printable(manifest.get("format"), 40)
        raise _Damage(f"{MANIFEST} is of format {found}, this version reads {FORMAT}")
    if text != _sealed(text.rpartition(",\n")[0]):
        raise _Damage(f"{MANIFEST} does not match its seal")
    # What matches its seal and is none of a save's was forged.
    forged = manifest.keys() != {"format", "step", "files", "environment", "seal"}
    files, step = manifest.get("files"), manifest.get("step")
    forged |= not isinstance(manifest.get("environment"), dict) or type(step) is not int
    forged |= not isinstance(files, dict) or files.keys() != set(FILES)
    if forged or any(not isinstance(f, dict) or f.keys() != DESCRIBED for f in files.values()):
        raise _Damage(f"{MANIFEST} is not as a save writes it")
    ours = _NAME.fullmatch(commit.name)  # a copy may be called anything else
    if ours and step != int(ours[2]):
        raise _Damage(f"{MANIFEST} is of step {printable(step, 40)}")
    for name, expected in files.items():
        try:
            found = os.lstat(commit / name)
        except FileNotFoundError:
            raise _Damage(f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise _Damage(f"{name} is not a regular file")
        if found.st_size != expected["bytes"]:
            size = printable(expected["bytes"], 40)
            raise _Damage(f"{name} has {found.st_size} bytes, not {size}")
    return files, text


def verify(commit: Path) -> str | None:
    """What is wrong with a commit, in one line; None where every byte is as written."""
    try:
        files, text = _manifest(commit)
        found = atomic.sha256_each([commit / name for name in files])
        for (name, expected), digest in zip(files.items(), found, strict=True):
            if digest != expected["sha256"]:
                return f"{name} does not match its sha256"
    except _Damage as damage:
        return str(damage)
    except UserError as error:
        return f"{MANIFEST}: {error.what}"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    _known_whole.add(text)
    return None


def _is_whole(commit: Path) -> bool:
    """As `verify`, without reading again the files of a commit that is known to be whole."""
    try:
        return _manifest(commit)[1] in _known_whole or verify(commit) is None
    except (_Damage, UserError, OSError):
        return False


def newest_commit(folder: str | Path, name: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest commit that verifies, and why newer ones were passed over.

    Args:
        name: of the one that must be it.
    Raises:
        UserError: there are commits, and all of them are bad; or the named one is bad or missing.
    """
    found, passed_over = commits(folder), []
    if name is not None:
        found = [commit for commit in found if commit.name == name]
        if not found:
            there = ", ".join(commit.name for commit in commits(folder)) or "none"
            raise UserError(Path(folder) / name, "is no checkpoint", f"there are: {there}")
    for commit in reversed(found):
        problem = verify(commit)
        if problem is None:
            return commit, passed_over
        passed_over.append(f"{commit.name}: {problem}")
    if passed_over:
        raise UserError(folder, "no checkpoint is whole: " + "; ".join(passed_over[:5]),
                        "restore one from a copy, or start in a new folder")
    return None, []


def remove_later(commit: Path) -> list[Path]:
    """Removes the commits after this one; returns them."""
    later = [each for each in commits(commit.parent) if _step(each) > _step(commit)]
    for each in reversed(later):
        atomic.remove_folder(each)
    return later


# ------------------------------------------------------------------------------------------- load


def load_checkpoint(state: TrainState, commit: str | Path) -> None:
    """Puts a commit into a state whose model and optimizer are already built alike, in place.

    Raises:
        UserError: the commit is damaged, or of another model; the state is then as it was.
    """
    commit = Path(commit)
    problem = verify(commit)
    if problem is not None:
        raise UserError(commit, problem, "use another checkpoint")
    try:
        weights, moments = load_file(commit / WEIGHTS), load_file(commit / MOMENTS)
        with safe_open(commit / WEIGHTS, "pt") as file:
            below = (file.metadata() or {}).get("frozen")
    except SafetensorError as error:
        raise UserError(commit, f"cannot be read ({error})", "use another checkpoint") from error
    if {n: (t.shape, t.dtype) for n, t in weights.items()} != kinds_of(state.model):
        raise UserError(
            commit, "holds the weights of another model", "resume with the same --model"
        )
    if below != frozen_below(state.model):
        what = "was saved over other frozen weights: the base is another, or has changed"
        raise UserError(commit, what, "resume with the same --model, as it was")
    check_moments(state.model, state.optimizer, moments, commit)
    numbers, known = read_json(commit / NUMBERS), _numbers(state).keys()
    found = numbers.keys() if isinstance(numbers, dict) else set()
    if found != known:
        other = ", ".join(sorted(found ^ known))
        raise UserError(commit / NUMBERS, f"was saved by another version ({other})", "use that one")
    if wrong := [name for name, value in numbers.items() if not KINDS[name](value)]:
        raise UserError(commit / NUMBERS, f"has a {wrong[0]} of another kind", "use another one")
    put_weights(state.model, weights)
    put_moments(state.model, state.optimizer, moments)
    state.meters.load(numbers.pop("meters"))
    for name, value in numbers.items():
        setattr(state, name, value)


def load_weights(model: nn.Module, commit: Path, all_of_it: bool = True) -> None:
    """Puts the weights of a whole commit into a model of the run's kind.

    Args:
        all_of_it: False where the run had more beside it, as a critic is.

    Raises:
        UserError: the commit lacks some of them, or was saved over other frozen weights.
    """
    weights, wanted = load_file(commit / WEIGHTS), kinds_of(model)
    if any(n not in weights or weights[n].shape != shape for n, (shape, _) in wanted.items()):
        raise UserError(commit, "holds the weights of another model", "give the run's own --base")
    with safe_open(commit / WEIGHTS, "pt") as file:
        below = (file.metadata() or {}).get("frozen")
    if all_of_it and below != frozen_below(model):
        raise UserError(commit, "was saved over other frozen weights", "give the run's own --base")
    put_weights(model, {name: weights[name] for name in wanted})
