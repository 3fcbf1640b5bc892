"""Everything that changes in a run, and how it is saved: safetensors and JSON, one rename a commit.

    checkpoints/step-00000040/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest is written last and holds size and sha256 of each file; a commit counts only if it
verifies.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minirlhf import fsio
from minirlhf.errors import UserError
from minirlhf.meters import Meters
from minirlhf.rows import read_json

FORMAT = 1


@dataclass
class TrainState:
    """All that changes during a run and that later steps depend on; changed by the recipe only.

    What is a function of (seed, step, sample) is derived, not stored: data order, sampling noise,
    mini-batch order, learning rate. So a recipe's generator can be dropped at any yield, rebuilt
    from this state, and goes on bit for bit.
    """

    model: nn.Module  # what is trained, its heads included
    optimizer: torch.optim.Optimizer
    step: int = 0  # iterations completed
    samples: int = 0  # rows of data consumed
    kl_coef: float | None = None  # PPO: current coefficient of the KL penalty
    best: float | None = None  # best value of the metric that evaluation watches
    counters: dict[str, int] = field(default_factory=dict)  # events since the start
    meters: Meters = field(default_factory=Meters)  # the open log window
    log_bytes: dict[str, int] = field(default_factory=dict)  # length of each log file

    def count(self, event: str, n: int = 1) -> None:
        self.counters[event] = self.counters.get(event, 0) + n


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Moments under their parameters' names: independent of the order of groups."""
    names = {id(p): n for n, p in state.model.named_parameters()}
    out = {}
    for parameter, values in state.optimizer.state.items():
        for key, value in values.items():
            out[f"{names[id(parameter)]}.{key}"] = torch.as_tensor(value).detach().cpu()
    return out


def _restore_optimizer(state: TrainState, saved: dict[str, Tensor], where: Path) -> None:
    names = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for full, value in saved.items():
        name, key = full.rsplit(".", 1)
        if name not in names:
            raise UserError(where, f"holds moments of '{name}', which the model lacks", "")
        parameter = names[name]
        on_cpu = key == "step" and not parameter.is_cuda
        value = value if on_cpu else value.to(parameter.device)
        state.optimizer.state[parameter][key] = value


def save_checkpoint(state: TrainState, folder: str | Path, keep: int = 2) -> Path:
    """Commits the state as folder/step-NNNNNNNN and prunes all but the newest `keep` commits.

    A commit of the same step that verifies is left as it is. Returns the commit's folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    if final.exists():
        if verify(final) is None:
            return final
        fsio.remove_folder(final)
    temporary = folder / f".tmp-{final.name}"
    if temporary.exists():
        fsio.remove_folder(temporary)
    temporary.mkdir()
    weights = {n: t.detach().cpu().contiguous() for n, t in state.model.state_dict().items()}
    fsio.write_tensors(temporary / "model.safetensors", weights)
    fsio.write_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(state))
    numbers = {
        "step": state.step, "samples": state.samples, "kl_coef": state.kl_coef,
        "best": state.best, "counters": state.counters, "meters": state.meters.as_dict(),
        "log_bytes": state.log_bytes,
    }  # fmt: skip
    fsio.write_json(temporary / "state.json", numbers)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}
        for path in sorted(temporary.iterdir())
    }
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    manifest = {"format": FORMAT, "step": state.step, "files": files, "environment": environment}
    fsio.write_json(temporary / "manifest.json", manifest)
    fsio.commit_folder(temporary, final)
    for old in commits(folder)[:-keep]:
        fsio.remove_folder(old)
    return final


def commits(folder: str | Path) -> list[Path]:
    """Commits of a folder, oldest first; not yet verified."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
    return sorted(found)


def verify(commit: Path) -> str | None:
    """What is wrong with a commit, in a few words; None where every byte is as written."""
    try:
        manifest = json.loads((commit / "manifest.json").read_text(encoding="utf-8"))
        files, step = dict(manifest["files"]), manifest["step"]
        for name, expected in files.items():
            path = commit / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if fsio.sha256(path) != expected["sha256"]:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    if {"model.safetensors", "optimizer.safetensors", "state.json"} - files.keys():
        return "manifest.json does not list every file"
    return None if commit.name == f"step-{step:08d}" else f"manifest.json is of step {step}"


def newest_commit(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest commit that verifies, and why newer ones were passed over.

    Raises:
        UserError: there are commits, and all of them are bad.
    """
    passed_over = []
    for commit in reversed(commits(folder)):
        problem = verify(commit)
        if problem is None:
            return commit, passed_over
        passed_over.append(f"{commit.name}: {problem}")
    if passed_over:
        raise UserError(folder, "no checkpoint is whole: " + "; ".join(passed_over[:5]),
                        "restore one from a copy, or start in a new folder")  # fmt: skip
    return None, []


def load_checkpoint(state: TrainState, commit: str | Path) -> None:
    """Puts a commit into a state whose model and optimizer are already built alike, in place.

    Raises:
        UserError: the commit is damaged, or of another model.
    """
    commit = Path(commit)
    problem = verify(commit)
    if problem is not None:
        raise UserError(commit, problem, "use another checkpoint")
    weights, wanted = load_file(commit / "model.safetensors"), state.model.state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in wanted.items()}:
        raise UserError(
            commit, "holds the weights of another model", "resume with the same --model"
        )
    state.model.load_state_dict(weights)
    _restore_optimizer(state, load_file(commit / "optimizer.safetensors"), commit)
    numbers = read_json(commit / "state.json")
    state.meters.load(numbers.pop("meters"))
    for name, value in numbers.items():
        setattr(state, name, value)
