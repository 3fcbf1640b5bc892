"""Several processes that make one run: what they do apart, and how they stay together.

Each process is a rank, started by torchrun. All ranks hold the same rows, states and numbers and
take the same way through the code; they part only inside the functions below, and leave them with
the same result, the same error or the same stop. With one process each of them is a plain call, and
nothing of torch.distributed is loaded.

    share(B)           the rows that this rank passes through a model
    gather_rows(...)   what all ranks made of their rows, in order
    each(function)     every rank's own result
    from_first(...)    what rank 0 alone may do: ask a service, read a log, write a file
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minirlhf import errors, interrupt
from minirlhf.errors import DISTRIBUTED, NonFinite, Stopped, UserError

T = TypeVar("T")
GOOD, STOP, BAD = range(3)  # how a rank came out of a part of its own


@dataclass
class _Group:
    number: int = 0  # of this process
    count: int = 1
    device: str = "cpu"  # of the tensors that are sent
    apart: bool = False  # inside a part of its own
    where: str = "the start"  # for messages


_group = _Group()


def join(number: int, count: int, device: str) -> None:
    """Says that torch.distributed is up; `run/distributed.py` starts it."""
    _group.number, _group.count, _group.device = number, count, device
    interrupt.agrees(count > 1)


def number() -> int:
    return _group.number


def count() -> int:
    return _group.count


def device() -> str:
    """Of this process."""
    return _group.device


def neighbours() -> int:
    """Processes of the run on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group.count > 1 else 1


def alone() -> bool:
    """Whether there is nobody to share with: one process, or a part of its own."""
    return _group.count == 1 or _group.apart


def is_first() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return _group.number == 0


def at(where: str) -> None:
    """Remembers how far the run is, for the messages of those that lose a rank."""
    _group.where = where


def place() -> str:
    return _group.where


@contextmanager
def apart() -> Iterator[None]:
    """Around what this rank does by itself: it shares nothing there, and may be stopped."""
    before, _group.apart = _group.apart, True
    interrupt.agrees(False)
    try:
        yield
    finally:
        _group.apart = before
        interrupt.agrees(not alone())


def share(rows: int, of: int | None = None) -> slice:
    """The rows of this rank (or of another): neighbours, as many as others have or one more."""
    least, more = divmod(rows, _group.count)
    here = _group.number if of is None else of
    start = here * least + min(here, more)
    return slice(start, start + least + (here < more))


def gather_rows(parts: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The (B, …) tensors of all ranks, each rank's `share` of them given: (b, …), in its order.

    It is also where all learn that one of them was asked to stop.

    Args:
        rows: B.
    """
    import torch.distributed as dist

    most = math.ceil(rows / _group.count)
    device = _group.device
    padded = []
    for part in parts:
        whole = part.new_zeros(most, *part.shape[1:])
        whole[: len(part)] = part
        padded.append(whole.contiguous().reshape(-1).view(torch.uint8).to(device))
    stop = torch.tensor([interrupt.asked()], dtype=torch.uint8, device=device)
    own = torch.cat([*padded, stop])
    table = own.new_empty(_group.count, len(own))
    dist.all_gather(list(table), own)
    if table[:, -1].any():
        interrupt.agree()
    at, out = 0, []
    for part, sent in zip(parts, padded, strict=True):
        block = table[:, at : at + len(sent)].contiguous().view(part.dtype)
        block = block.view(_group.count, most, *part.shape[1:]).to(part.device)
        sizes = [share(rows, rank) for rank in range(_group.count)]
        out.append(torch.cat([
            block[rank, : size.stop - size.start] for rank, size in enumerate(sizes)
        ]))
        at += len(sent)
    return out


def each(function: Callable[[], bytes], only_first: bool = False) -> list[bytes]:
    """What every rank made by itself, in the order of the ranks.

    Args:
        only_first: rank 0 alone makes something.
    Raises:
        Stopped: one was asked to stop.
        UserError: what one of them raised, on all of them; a fault of our own stays what it is
            where it was raised, and is exit code 6 elsewhere.
    """
    if alone():
        return [function()]
    how, made, fault = GOOD, b"", None
    try:
        with apart():
            if is_first() or not only_first:
                made = function()
    except Stopped:
        how = STOP
    except Exception as error:
        how, fault, made = BAD, error, json.dumps(_told(error)).encode()
    found = _all_bytes(how, made)
    for rank, (came_out, text) in enumerate(found):
        if came_out == BAD:
            raise (fault if rank == _group.number else _error_of(json.loads(text)))
    if any(came_out == STOP for came_out, _ in found):
        interrupt.agree()
        raise Stopped
    return [text for _, text in found]


def _told(error: Exception) -> tuple[str, str, str, int]:
    """The parts of the UserError that other ranks raise."""
    known = errors.of_user(error)
    if known is None:
        known = lost(f"rank {_group.number}", f"failed during {place()}: {errors.named(error)}")
    return known.where, known.what, known.do, known.code


def _error_of(told: list) -> UserError:
    where, what, do, code = told
    return NonFinite(where, what, do) if code == NonFinite("", "").code else UserError(*told)


def _all_bytes(how: int, made: bytes) -> list[tuple[int, bytes]]:
    import torch.distributed as dist

    device, count = _group.device, _group.count
    head = torch.tensor([how, len(made)], device=device)
    heads = head.new_empty(count, 2)
    dist.all_gather(list(heads), head)
    table = heads.tolist()
    longest = max(1, *(size for _, size in table))
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(made)] = torch.frombuffer(bytearray(made or b"\0"), dtype=torch.uint8)[: len(made)]
    every = torch.empty(count, longest, dtype=torch.uint8, device=device)
    dist.all_gather(list(every), own.to(device))
    rows = every.cpu().numpy()
    return [(way, rows[i, :size].tobytes()) for i, (way, size) in enumerate(table)]


def gather_tensors(function: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The named tensors that every rank made by itself, on the CPU; of any sizes."""
    if alone():
        return [function()]
    from safetensors.torch import load, save

    def packed() -> bytes:
        return save({name: x.cpu().contiguous() for name, x in function().items()})

    return [load(made) for made in each(packed)]


def from_first(function: Callable[[], T]) -> T:
    """The result of rank 0, which alone calls the function, for all; what JSON can hold."""
    if alone():
        return function()
    made = each(lambda: json.dumps(function()).encode(), only_first=True)
    return json.loads(made[0])


def lost(where: str, what: str) -> UserError:
    """The error of a rank that cannot go on without another one."""
    do = "start it again with --resume: it goes on from the last checkpoint"
    return UserError(where, what, do, DISTRIBUTED)
