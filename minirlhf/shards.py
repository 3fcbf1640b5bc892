"""Tensors of which each process holds a part: torch's DTensor, to and from whole ones.

Under FSDP2 a parameter, its gradient and its moments are such tensors: of the first dimension each
rank holds a piece. What is no DTensor passes through here as it is, so that one process and several
take the same way. All ranks must call these functions, in the same order.
"""

import torch
from torch import Tensor

from minirlhf import ranks


def is_part(x: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """The tensor with the parts of all ranks."""
    return x.full_tensor() if is_part(x) else x


def here(x: Tensor) -> Tensor:
    """What this process holds of it."""
    return x.to_local() if is_part(x) else x


def for_file(x: Tensor) -> Tensor:
    """The whole tensor on the CPU of rank 0, which writes; no other rank keeps it."""
    if not is_part(x):
        return x
    full = x.detach().full_tensor()
    return full.cpu() if ranks.is_first() else full.new_empty(0, device="cpu")


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that all ranks have, where `like` is held so."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def stored_dtype(parameter: Tensor) -> torch.dtype:
    """Of its weights in files: that of the passes, where the parameter is a master of them."""
    return getattr(parameter, "of_passes", parameter.dtype)


def is_master(parameter: Tensor) -> bool:
    """Whether passes read a copy of lower precision."""
    return stored_dtype(parameter) != parameter.dtype
