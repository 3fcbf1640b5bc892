"""Passes that several processes share: each reads its rows, and all get the result of all rows.

A function under `over_ranks` splits the rows of its batch, and gathers what comes of them. So every
rank holds all log-probs, values and scores, and computes the whole loss of them, whatever that is;
the gradient of this loss goes back through the rank's own rows alone, and the sum over ranks is the
gradient of one process. The rows of others are constants there:

    d loss / d theta = sum_r sum_{rows i of rank r} (d loss / d out_i) (d out_i / d theta)

The sum is made by torch, whose DistributedDataParallel and FSDP2 take the mean over ranks in the
backward pass. `wrap` hands a model over to one of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minirlhf import ranks
from minirlhf.models.sharded import Sharded

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)


class Passes(nn.Module):
    """A module whose forward pass is any function that reads the model: what torch hooks into."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        return function(*args, **kwargs)


class Replicated:
    """A model of which every rank holds a copy; DistributedDataParallel sums their gradients.

    Args:
        in_parts: some passes read a part of what is trained only; torch then looks for it, in the
            graph behind what a pass returns.
    """

    def __init__(self, model: nn.Module, in_parts: bool):
        from torch.nn.parallel import DistributedDataParallel

        passes = Passes(model)
        if in_parts:  # and torch warns where a pass leaves nothing out: this is always left out
            passes.unread = nn.Parameter(next(model.parameters()).new_zeros(()))
        self.passes = DistributedDataParallel(
            passes, forward_sync_buffers=False, find_unused_parameters=in_parts
        )

    def __call__(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return self.passes(function, *args, **kwargs)

    def sync(self, now: bool) -> None:
        """Whether the next backward pass sums the gradients, those that were added up included."""
        self.passes.require_backward_grad_sync = now


_wrappers: WeakKeyDictionary[nn.Module, Replicated | Sharded] = WeakKeyDictionary()


def wrap(
    model: nn.Module, kind: str | None = None, in_parts: bool = False, offload: bool = False
) -> None:
    """Lets all ranks train a model together; with one process it changes nothing.

    Args:
        kind: "ddp" or None: all hold all of it; "fsdp": each holds a part, as in `Sharded`.
        in_parts: as in `Replicated`.
        offload: as in `Sharded`.
    """
    if ranks.alone():
        return
    if kind == "fsdp":
        wrapper = Sharded(model, Passes(model), offload)
    else:
        wrapper = Replicated(model, in_parts)
    for module in model.modules():
        _wrappers[module] = wrapper


def wrap_frozen(model: nn.Module, kind: str | None, offload: bool = False) -> None:
    """As `wrap`, of a model that is only read: there is nothing to do but to share it out."""
    if kind == "fsdp":
        wrap(model, kind, offload=offload)


@contextmanager
def whole(model: Model, on_first: bool = False) -> Iterator[Model]:
    """The model with all its weights on every rank, for what is no pass over rows: sampling,
    merging, writing. All ranks enter and leave it together.

    Args:
        on_first: as in `Sharded.whole`.
    """
    wrapper = _wrappers.get(model)
    if not isinstance(wrapper, Sharded):
        yield model
        return
    with wrapper.whole(on_first) as plain:
        yield plain[model]


def passed(function: Callable[..., T], model: nn.Module, *args: object) -> T:
    """function(model, …), a pass within that of another model, over rows that are this rank's."""
    wrapper = _wrappers.get(model)
    if isinstance(wrapper, Sharded):
        return wrapper(function, model, *args)
    return function(model, *args)


def accumulated(model: nn.Module, parts: Iterable[T]) -> Iterator[T]:
    """The micro-batches of an optimizer step: their gradients are added up on each rank, and summed
    over the ranks once, in the backward pass of the last one."""
    wrapper, parts = _wrappers.get(model), list(parts)
    try:
        for part in parts:
            if wrapper is not None:
                wrapper.sync(part is parts[-1])
            yield part
    finally:
        if wrapper is not None:
            wrapper.sync(True)


def over_ranks(function: Callable[..., T]) -> Callable[..., T]:
    """Makes a pass of one process one of all: `function(model, …)` is called with the rank's rows.

    Of its further arguments, tensors and named tuples of tensors have a row each along their first
    dimension; others are handed on. What it returns is a tensor or a named tuple, likewise by rows.
    A rank without rows passes one for nothing: the others wait for its share of the collectives.
    """

    @wraps(function)
    def pass_rows(model: nn.Module, *args: object, **kwargs: object) -> T:
        if ranks.alone():
            return function(model, *args, **kwargs)
        batch = (*args, *kwargs.values())
        rows = next(n for n in map(_rows_of, batch) if n is not None)
        mine = ranks.share(rows)
        read = mine if mine.stop > mine.start else slice(rows - 1, rows)
        args = [_take(x, read) for x in args]
        kwargs = {name: _take(x, read) for name, x in kwargs.items()}
        wrapper = _wrappers.get(model)
        if wrapper is None:
            out = function(model, *args, **kwargs)
        else:
            out = wrapper(function, model, *args, **kwargs)
        fields = out if isinstance(out, tuple) else (out,)
        whole = _gathered([x for x in fields if x is not None], rows, mine, wrapper is not None)
        found = [None if x is None else whole.pop(0) for x in fields]
        return type(out)(*found) if isinstance(out, tuple) else found[0]

    return pass_rows


def _rows_of(x: object) -> int | None:
    """Of a tensor or of a named tuple with one; None of anything else."""
    if isinstance(x, Tensor):
        return len(x) if x.dim() else None
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return next((n for n in map(_rows_of, x) if n is not None), None)
    return None


def _take(x: object, rows: slice) -> object:
    """These rows of what has rows."""
    if isinstance(x, Tensor):
        return x[rows] if x.dim() else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_take(each, rows) for each in x))
    return x[rows] if isinstance(x, list) else x


def _gathered(parts: list[Tensor], rows: int, mine: slice, trained: bool) -> list[Tensor]:
    """All rows of each (b, …) tensor of this rank's; gradients reach its own."""
    count = mine.stop - mine.start
    every = ranks.gather_rows([x.detach()[:count] for x in parts], rows)
    out = []
    for own, whole in zip(parts, every, strict=True):
        if own.requires_grad:
            if not trained:
                raise ValueError("several ranks train a model that is not wrapped: call wrap")
            own.register_hook(_times_ranks)
            whole = torch.cat([whole[: mine.start], own[:count], whole[mine.stop :]])
            whole = whole if count else whole + 0 * own.sum()
        out.append(whole)
    return out


def _times_ranks(gradient: Tensor | None) -> Tensor | None:
    """Torch takes the mean over ranks, and the sum is wanted; None where the loss reads no part."""
    return None if gradient is None else gradient * ranks.count()
