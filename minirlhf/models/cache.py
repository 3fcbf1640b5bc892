"""What spares a decoder work: keys and values of past tokens, and which cells are no padding.

Shapes: B rows, A rows that are kept, T tokens of the longest, n tokens of all rows together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.models.config import ModelConfig


class KVCache:
    """Keys and values of the tokens read so far, for sampling. Row b holds `lengths[b]` of them.

    It starts as zeros: cells beyond a row's length are masked, but 0 x NaN would still be NaN.

    Args:
        capacity: most tokens of a row.
        like: a tensor of the dtype and on the device that the cells get.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor):
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.key_mask = like.new_empty(0)  # (B, longest + 1), added to scores: 0 or -inf
        self.cells = torch.empty(0)  # (B * K,) of all B * K * capacity: where a new token goes
        self.hold(torch.zeros(rows, dtype=torch.int64, device=like.device))

    def hold(self, lengths: Tensor) -> None:
        """Sets how many tokens each row has, (B,) int64."""
        self.lengths, self.rows = lengths, torch.arange(len(lengths), device=lengths.device)
        # Known here too, since reading a number off a GPU waits for it
        self.held = lengths.tolist()
        self.longest = max(self.held)

    def attend(self) -> None:
        """For a new token of each row, sets where it goes and the cells it attends to."""
        B, K, capacity, _ = self.keys[0].shape
        at = torch.arange(self.longest + 1, device=self.lengths.device)
        beyond = at > self.lengths[:, None]
        self.key_mask = torch.where(beyond, -torch.inf, self.key_mask.new_zeros(()))
        heads = torch.arange(B * K, device=self.lengths.device).view(B, K)
        self.cells = (heads * capacity + self.lengths[:, None]).flatten()

    def grow(self) -> None:
        """Each row has one token more."""
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self.held = [length + 1 for length in self.held]

    def read(self, lm: Callable[[Tensor, "KVCache"], Tensor], tokens: Tensor) -> Tensor:
        """(A, D) hidden states of one more token a row, (A,) int64."""
        return lm(tokens[:, None], self)[:, 0]

    def repeat(self, rows: Tensor) -> None:
        """Puts a copy of row rows[i] in the place of row i, (A,) int64: samples of one prompt."""
        for cells in (self.keys, self.values):
            for layer, cell in enumerate(cells):
                cells[layer] = cell[rows]
        self.hold(self.lengths[rows])

    def keep(self, rows: list[int]) -> Tensor:
        """Drops all rows but these A, ascending; returns them as (A,) int64 beside the cells.

        Rows end one by one, and a new cache for each of them would cost several decoding steps. So
        the rows behind the first gap move within the cells that are there. No memory is freed.
        """
        A, filled = len(rows), self.longest
        moved = (place for place, row in enumerate(rows) if row != place)
        stay = next(moved, A)  # rows before the first gap
        kept = torch.tensor(rows, device=self.lengths.device)
        for cells in (self.keys, self.values):
            for layer, cell in enumerate(cells):
                cell[stay:A, :, :filled] = cell[kept[stay:], :, :filled]
                cells[layer] = cell[:A]
        self.lengths, self.rows = self.lengths[kept], self.rows[:A]
        self.held = [self.held[row] for row in rows]
        self.longest = max(self.held)
        return kept


class Packing:
    """Which cells of left-aligned rows hold tokens that are computed, and whose states the others
    have.

    Only attention has to know rows. All else in a decoder treats each token by itself, so it runs
    on the n tokens alone, and padding costs nothing. Under causal attention tokens that a row
    begins with have the states of the same tokens in the row above, so they are computed once: the
    prompt of several responses, the first words of a chat template.

    Args:
        tokens: (B, T) ids.
        lengths: (B,) tokens of each row.
        shared: whether a row takes what it has in common with the row above from there.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, shared: bool = True):
        self.shape = tokens.shape
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self.real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, T)
        equal = (tokens[1:] == tokens[:-1]) & self.real[1:] & self.real[:-1]
        known = torch.zeros_like(self.real)  # of the row above
        known[1:] = equal.cumprod(1).bool() & shared
        computed = self.real & ~known
        self.cells = computed.flatten().nonzero()[:, 0]  # (n,) of B * T
        # Where a cell's state is computed: itself, or the last row above that does not know it.
        owner = torch.where(known, 0, rows).cummax(0).values
        places = (computed.flatten().cumsum(0) - 1).view_as(known).clamp(min=0)
        self.places = places.gather(0, owner).flatten()  # (B * T,) of n; padding has any

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (n, …)."""
        return x.flatten(0, 1).index_select(0, self.cells)

    def unpack(self, x: Tensor) -> Tensor:
        """(n, …) -> (B, T, …); padding has the state of some token."""
        return x.index_select(0, self.places).unflatten(0, self.shape)


def pack_rows(tokens: Tensor, lengths: Tensor, shared: bool = True) -> Packing | None:
    """The packing of rows (B, T) of these lengths (B,); None where all cells are computed.

    Raises:
        ValueError: a row is longer than T.
    """
    packing = Packing(tokens, lengths, shared)
    if (longest := int(lengths.max())) > tokens.shape[1]:
        raise ValueError(f"a row's length is {longest}, tokens has {tokens.shape[1]} columns")
    return None if len(packing.cells) == tokens.numel() else packing
