"""`torch.compile` for a decoding step: one graph without breaks, of sizes that do not change.

A step of decoding is many small kernels, and on a GPU starting them takes longer than they do. A
graph is for one size: so rows that have ended stay in the batch, and what is computed of them is
not read; a row attends to all cells of the cache, of which those beyond its length are masked. On
a CPU, which starts a kernel in no time, that is more work than a plain step, so none is compiled
there unless a program asks for it.
"""

from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from minirlhf.models.cache import KVCache
from minirlhf.models.config import ModelConfig
from minirlhf.models.transformer import CausalLM

CELLS = 128  # capacities are multiples of it, and rows powers of two: few sizes, few graphs


def longest_row(config: ModelConfig) -> float:
    """Cells beyond which `Decoder.check_length` refuses a row."""
    dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
    bounded = config.positions == "learned" or dynamic
    return min(config.sliding_window or torch.inf, config.max_positions if bounded else torch.inf)


class StaticCache(KVCache):
    """A cache that has read its prompts, in sizes that stay: B rows, of which A are active, never
    leave it, and a new token attends to all cells. It takes the other one's place."""

    def __init__(self, cache: KVCache, config: ModelConfig):
        A, K, capacity, E = cache.keys[0].shape
        B = 1 << (A - 1).bit_length()
        S = min(-(-capacity // CELLS) * CELLS, longest_row(config))
        filled = min(capacity, S)
        self.keys, self.values = [], []
        for old, new in ((cache.keys, self.keys), (cache.values, self.values)):
            for layer, cell in enumerate(old):
                new.append(cell.new_zeros(B, K, S, E))
                new[-1][:A, :, :filled] = cell[:, :, :filled]
                old[layer] = new[-1]  # or both would lie there until the last layer is copied
        # As `attend` leaves it: a first step that met another shape would be another graph.
        self.key_mask, self.longest = self.keys[0].new_zeros(B, S), S - 1
        self.lengths = cache.lengths.new_zeros(B)
        self.lengths[:A] = cache.lengths
        self.rows = torch.arange(B, device=self.lengths.device)
        self.active, self.tokens = self.rows[:A], torch.zeros_like(self.lengths)

    def grow(self) -> None:
        """Each row has one token more, also one that has ended: all have room for it."""
        self.lengths = self.lengths + 1

    def keep(self, rows: list[int]) -> Tensor:
        kept = torch.tensor(rows, device=self.lengths.device)
        self.active = self.active[kept]
        return kept

    def read(self, lm: CausalLM, tokens: Tensor) -> Tensor:
        self.tokens[self.active] = tokens
        return compiled_step()(lm, self.tokens, self)[self.active]


def step(lm: CausalLM, tokens: Tensor, cache: StaticCache) -> Tensor:
    """(B,) ids -> (B, D) hidden states."""
    return lm(tokens[:, None], cache)[:, 0]


@once
def compiled_step() -> Callable[[CausalLM, Tensor, StaticCache], Tensor]:
    return torch.compile(step, fullgraph=True, dynamic=False)
