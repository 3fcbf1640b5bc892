"""Rows become batches: which rows a step takes, how they are cut, and how they are laid out."""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from minirlhf import streams


def cut_by_tokens(
    lengths: Tensor, max_rows: int, max_tokens: int, texts: Tensor | None = None
) -> list[Tensor]:
    """Sorts rows by length and cuts them so that little of a micro-batch is padding.

    Args:
        lengths: (B,) tokens of each row, of its longest text where it has several.
        max_rows: most rows of a micro-batch.
        max_tokens: most cells, texts times longest text; a larger single row stands alone.
        texts: (B,) texts of each row, which stay together; None: one each.
    Returns:
        Index tensors (b,), which together hold every row once, shortest first.
    """
    longest, order = torch.sort(lengths, stable=True)
    counts = [1] * len(order) if texts is None else texts[order].tolist()
    sizes: list[int] = []  # rows of each micro-batch
    held = 0  # texts of the last one
    for length, count in zip(longest.tolist(), counts, strict=True):
        if sizes and sizes[-1] < max_rows and (held + count) * length <= max_tokens:
            sizes[-1] += 1
            held += count
        else:
            sizes.append(1)
            held = count
    return list(order.split(sizes))


def epoch_batches(lengths: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Batches of one epoch: shuffled, yet each of rows of like length.

    The order is cut into pools of 32 batches (fewer where the data is small, or each epoch would
    have the same batches), each pool sorted by length and cut into batches, and the batches are
    shuffled. A pure function of its arguments.

    Args:
        lengths: (N,) tokens of each row.
        seed, epoch: decide the order.
    Returns:
        ceil(N / batch_size) index tensors; only the last may be shorter than batch_size.
    """
    order = streams.permutation(seed, "data order", epoch, len(lengths))
    batches, pooled = [], min(32, max(1, len(lengths) // batch_size // 4))
    for pool in order.split(pooled * batch_size):
        batches += pool[torch.argsort(lengths[pool], stable=True)].split(batch_size)
    short = [b for b in batches if len(b) < batch_size]
    whole = [b for b in batches if len(b) == batch_size]
    shuffled = streams.permutation(seed, "batch order", epoch, len(whole)).tolist()
    return [whole[i] for i in shuffled] + short


def training_batches(
    lengths: Tensor, batch_size: int, seed: int, step: int = 0
) -> Iterator[Tensor]:
    """The batches of this step, of the next, … without end, epoch after epoch.

    A step's batch is a function of the arguments of `epoch_batches` alone, so a resumed run goes
    on with the batches that it would have met.
    """
    batches: list[Tensor] = []
    while True:
        epoch, position = divmod(step, ceil(len(lengths) / batch_size))
        if position == 0 or not batches:
            batches = epoch_batches(lengths, batch_size, seed, epoch)
        yield batches[position]
        step += 1


def next_rows(
    consumed: int, count: int, total: int, seed: int, stream: str = "prompt order"
) -> Tensor:
    """(count,) numbers of the next rows; each epoch holds all of them in an order of its own.

    Args:
        consumed: rows that were taken since the start.
        total: rows that there are.
        stream: names the order: another one is another order.
    """
    rows: list[Tensor] = []
    for position in range(consumed, consumed + count):
        epoch, offset = divmod(position, total)
        if not rows or offset == 0:
            order = streams.permutation(seed, stream, epoch, total)
        rows.append(order[offset])
    return torch.stack(rows)


def total_steps(rows: int, batch_size: int, epochs: float, steps: int | None = None) -> int:
    """Optimizer steps of a whole run, the exact horizon of the learning rate: `steps`, or else
    what `epochs` take."""
    exact = epochs * ceil(rows / batch_size)
    return steps or max(1, ceil(round(exact, 6)))  # 0.07 * 100 is 7.000000000000001
