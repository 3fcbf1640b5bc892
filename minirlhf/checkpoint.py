"""Everything that changes in a run, and how it is saved: safetensors and JSON, one rename a commit.

    checkpoints/step-00000040/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest is written last and holds size and sha256 of each file; a commit counts only if it
verifies.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minirlhf import fsio
from minirlhf.errors import UserError
from minirlhf.meters import Meters
from minirlhf.rows import read_json

FORMAT = 1
WEIGHTS, MOMENTS, NUMBERS = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """All that changes during a run and that later steps depend on; changed by the recipe only.

    What is a function of (seed, step, sample) is derived, not stored: data order, sampling noise,
    mini-batch order, learning rate. So a recipe's generator can be dropped at any yield, rebuilt
    from this state, and goes on bit for bit. Every field below the optimizer is saved by its name
    and must be what JSON can hold.
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
    unreported: dict | None = None  # the last Step, where a signal cut its logs short

    def count(self, event: str, n: int = 1) -> None:
        self.counters[event] = self.counters.get(event, 0) + n


def _numbers(state: TrainState) -> dict[str, object]:
    """The fields that are no tensors, as JSON."""
    names = [f.name for f in fields(state) if f.name not in ("model", "optimizer")]
    return {n: getattr(state, n) for n in names} | {"meters": state.meters.as_dict()}


def _moments(state: TrainState) -> dict[str, Tensor]:
    """Moments under their parameters' names: independent of the order of groups."""
    names = {id(p): n for n, p in state.model.named_parameters()}
    out = {}
    for parameter, values in state.optimizer.state.items():
        for key, value in values.items():
            name = f"{names[id(parameter)]}.{key}"
            out[name] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def _restore_moments(state: TrainState, saved: dict[str, Tensor], where: Path) -> None:
    names = dict(state.model.named_parameters())
    on_device = {
        id(p): bool(group.get("fused") or group.get("capturable"))
        for group in state.optimizer.param_groups
        for p in group["params"]
    }
    split = {full: full.rsplit(".", 1) for full in saved}
    if lost := [n for n, _ in split.values() if n not in names or id(names[n]) not in on_device]:
        raise UserError(where, f"holds moments of '{lost[0]}', which is not trained here",
                        "build model and optimizer as in the run that saved it")  # fmt: skip
    state.optimizer.state.clear()
    for full, (name, key) in split.items():
        parameter = names[name]
        # torch keeps the step count on the CPU, except for its fused and capturable kernels
        here = key != "step" or on_device[id(parameter)]
        device = parameter.device if here else "cpu"
        state.optimizer.state[parameter][key] = saved[full].to(device, copy=True)


def environment(model: nn.Module) -> dict[str, object]:
    """What else the last bit of a sum depends on."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": name}


def save_checkpoint(state: TrainState, folder: str | Path, keep: int = 2) -> Path:
    """Commits the state as folder/step-NNNNNNNN; returns the commit's folder.

    Of older commits only the newest stay, `keep` in all. One of the same step is replaced. Later
    ones that are damaged are removed: the run was resumed before them.

    Raises:
        UserError: whole commits of later steps are here, too little space, or a number is not
            finite; what was there before stays.
        OSError: the disk failed; what was there before stays.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the new commit must stay, 2 are safe")
    folder = Path(folder)
    fsio.make_folder(folder)
    fsio.sweep(folder)
    later = [c for c in commits(folder) if _step(c) > state.step]
    if whole := [c for c in later if verify(c) is None]:
        raise UserError(whole[0], f"is later than step {state.step}, which is to be saved",
                        "save into another folder, or remove it")  # fmt: skip
    weights = {n: t.detach().cpu().contiguous() for n, t in state.model.state_dict().items()}
    moments = _moments(state)
    fsio.check_space(folder, sum(t.nbytes for t in (*weights.values(), *moments.values())))
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f"{fsio.TEMPORARY}{final.name}"
    fsio.make_folder(temporary)
    try:
        fsio.write_tensors(temporary / WEIGHTS, weights)
        fsio.write_tensors(temporary / MOMENTS, moments)
        fsio.write_json(temporary / NUMBERS, _numbers(state))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}
            for path in (temporary / name for name in FILES)
        }
        manifest = {"format": FORMAT, "step": state.step, "files": files}
        manifest["environment"] = environment(state.model)
        fsio.write_json(temporary / "manifest.json", manifest)
        fsio.commit_folder(temporary, final)
    except (OSError, UserError):
        fsio.sweep(folder)  # half a checkpoint on a full disk would keep it full
        raise
    older = [c for c in commits(folder) if c not in later]
    for commit in later + older[:-keep]:
        fsio.remove_folder(commit)
    return final


def _step(commit: Path) -> int:
    return int(commit.name.removeprefix("step-"))


def commits(folder: str | Path) -> list[Path]:
    """Commits of a folder, oldest first; not yet verified."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=_step)


def verify(commit: Path) -> str | None:
    """What is wrong with a commit, in a few words; None where every byte is as written."""
    try:
        manifest = read_json(commit / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"is of format {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != _step(commit):
            return f"manifest.json is of step {manifest['step']}"
        if manifest["files"].keys() != set(FILES):
            return "manifest.json does not list every file"
        for name, expected in manifest["files"].items():
            path = commit / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if fsio.sha256(path) != expected["sha256"]:
                return f"{name} does not match its sha256"
    except UserError as error:
        return f"manifest.json: {error.what}"
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    return None


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
        UserError: the commit is damaged, or of another model; the state is then as it was.
    """
    commit = Path(commit)
    problem = verify(commit)
    if problem is not None:
        raise UserError(commit, problem, "use another checkpoint")
    weights, wanted = load_file(commit / WEIGHTS), state.model.state_dict()
    kinds = [{n: (t.shape, t.dtype) for n, t in of.items()} for of in (weights, wanted)]
    if kinds[0] != kinds[1]:
        raise UserError(
            commit, "holds the weights of another model", "resume with the same --model"
        )
    numbers = read_json(commit / NUMBERS)
    if numbers.keys() != _numbers(state).keys():
        other = ", ".join(sorted(numbers.keys() ^ _numbers(state).keys()))
        raise UserError(commit / NUMBERS, f"was saved by another version ({other})", "use that one")
    _restore_moments(state, load_file(commit / MOMENTS), commit)
    state.model.load_state_dict(weights)
    state.meters.load(numbers.pop("meters"))
    for name, value in numbers.items():
        setattr(state, name, value)
