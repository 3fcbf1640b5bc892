"""What a checkpoint holds of a model and its optimizer: whole tensors, by name.

They are the same files whatever holds the model: one process, several with a copy each, or several
with a part each (`shards`). So a run goes on with another number of processes, in another way.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from minirlhf import shards
from minirlhf.errors import UserError
from minirlhf.files.fingerprint import fingerprint_of

MASTER = "master"  # of a moment: the float32 weight itself, as in `optim.MasterAdamW`


def _frozen(model: nn.Module) -> set[str]:
    """Names of what is not saved of a model, but read again from where it came. What is packed are
    buffers of a module that says so."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "frozen", False):
            frozen |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)}
    return frozen


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: shards.stored_dtype(p) for name, p in model.named_parameters()}


def kinds_of(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor that is saved."""
    frozen, dtypes = _frozen(model), _dtypes(model)
    return {name: (x.shape, dtypes.get(name, x.dtype))
            for name, x in model.state_dict().items() if name not in frozen}


def frozen_below(model: nn.Module) -> str | None:
    """A fingerprint of what is not saved; None where all is."""
    frozen = _frozen(model)
    rest = {name: x for name, x in model.state_dict().items() if name in frozen}
    return fingerprint_of(rest) if rest else None


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is saved of a model, and what is told of the rest. On ranks other than 0, which do not
    write, parts are left out."""
    frozen, dtypes, below = _frozen(model), _dtypes(model), frozen_below(model)
    kept = {name: shards.for_file(x).to(dtypes.get(name, x.dtype))
            for name, x in model.state_dict().items() if name not in frozen}
    return kept, {} if below is None else {"frozen": below}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments under their parameters' names: independent of the order of groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    out = {}
    for parameter, values in optimizer.state.items():
        if shards.is_master(parameter):
            values = values | {MASTER: parameter}
        for key, value in values.items():
            out[f"{names[id(parameter)]}.{key}"] = shards.for_file(torch.as_tensor(value))
    return out


def check_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], where: Path
) -> None:
    """Refuses moments of what is not trained."""
    names = dict(model.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name in (full.rpartition(".")[0] for full in saved):
        if name not in names or id(names[name]) not in trained:
            raise UserError(where, f"holds moments of '{name}', which is not trained here",
                            "build model and optimizer as in the run that saved it")


def put_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Whole tensors into the model, of which each rank takes its part."""
    held = model.state_dict()
    model.load_state_dict({n: shards.part_of(x, held[n]) for n, x in saved.items()}, strict=False)


def put_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> None:
    """Whole tensors into the optimizer, likewise; after `put_weights`."""
    names = dict(model.named_parameters())
    on_device = {
        id(p): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.state.clear()
    for full, value in saved.items():
        name, _, key = full.rpartition(".")
        parameter = names[name]
        if key == "step":  # torch keeps it on the CPU, except for its fused and capturable kernels
            device = parameter.device if on_device[id(parameter)] else "cpu"
            optimizer.state[parameter][key] = value.to(device, copy=True)
        elif key == MASTER and shards.is_master(parameter):
            with torch.no_grad():
                parameter.copy_(shards.part_of(value, parameter))
        else:
            part = shards.part_of(value.to(parameter.device, copy=True), parameter)
            optimizer.state[parameter][key] = part
