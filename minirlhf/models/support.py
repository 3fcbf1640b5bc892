"""Which tokens could be drawn at each position: what top-k, top-p, min-p or a minimum length left.

The distribution that was sampled is the model's own, renormalised on that set. So that a ratio and
a KL keep their meaning, new and reference log-probs are renormalised on the very same set. It is
stored, since it cannot be found again: it depends on the logits of the policy that sampled.

Shapes: B rows, R response tokens of the longest, N positions, M ids in all, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """Of N positions: the ids that could be drawn, or, if `banned`, the few that could not."""

    ids: Tensor  # (M,) int32, position by position
    counts: Tensor  # (N,) int64, how many of them belong to each position
    banned: bool = False  # the ids are those that could not be drawn

    def excluded(self, at: slice, words: slice) -> Tensor | tuple[Tensor, Tensor]:
        """What could not be drawn, as an index into the logits (n, v) of a slice of the positions
        and of the vocabulary: a mask, or the rows and columns of a few."""
        counts = self.counts[at]
        start = int(self.counts[: at.start].sum())
        ids = self.ids[start : start + int(counts.sum())].long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
        inside = (ids >= words.start) & (ids < words.stop)
        cells = rows[inside], ids[inside] - words.start
        if self.banned:
            return cells
        mask = torch.ones(
            len(counts), words.stop - words.start, dtype=torch.bool, device=ids.device
        )
        mask[cells] = False
        return mask


class RowSupport(NamedTuple):
    """Of the response tokens of B rows."""

    rows: Sequence[Tensor]  # B of (M_b,) int32: the ids of each row, token by token
    counts: Tensor  # (B, R) int64, 0 where there is no token
    banned: bool = False

    def select(self, rows: Tensor, width: int) -> "RowSupport":
        """These rows (b,), of `width` columns, which none of them exceeds."""
        kept = [self.rows[i] for i in rows.tolist()]
        return RowSupport(kept, self.counts[rows, :width], self.banned)

    def flat(self, mask: Tensor) -> Support:
        """Of the True cells of the response mask (B, R), row by row."""
        return Support(torch.cat(list(self.rows)), self.counts[mask], self.banned)

    def to(self, device: str | torch.device) -> "RowSupport":
        rows = [row.to(device) for row in self.rows]
        return RowSupport(rows, self.counts.to(device), self.banned)
