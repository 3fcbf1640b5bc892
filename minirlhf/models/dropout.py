"""Dropout of what adapters read, from masks that are derived. Srivastava et al. 2014 (JMLR 15).

    h = W x + b + s B A (m ⊙ x) / (1 - p)      m_i is 0 with probability p, else 1

The frozen layer sees x whole. Divided by 1 - p, the adapter's input is x on average, so that
without dropout, in an evaluation or once it is merged, the adapter does what it learned to do.

Nothing here has a state or a mode. Whoever trains hands a key for each row to the forward pass; who
gives none has no dropout. A mask is a hash of that key, the position in the row, the layer and the
channel. So a block that is computed again in the backward pass draws its mask again, a resumed run
draws what the first one would have drawn, and a row's mask does not depend on its micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import streams

STEPS = 1 << 16  # of probabilities


class Dropout(NamedTuple):
    """What a forward pass is told of it.

    Attributes:
        p: of a number to be dropped, above 0 and below 1.
        keys: int64, one a row, (B,); in a decoder one a token, (B, T) or (n,) of packed ones.
    """

    p: float
    keys: Tensor

    def of_tokens(self, tokens: Tensor) -> "Dropout":
        """From keys of rows (B,) to those of their tokens (B, T)."""
        keys = self.keys.to(tokens.device)[:, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self._replace(keys=streams.mix(keys ^ streams.mix(places)))

    def __call__(self, x: Tensor, layer: Tensor) -> Tensor:
        """x (…, in) with some numbers dropped and the others divided by 1 - p.

        A hash of 64 bits serves four channels, which takes less time than torch's own dropout. So p
        is taken as the nearest multiple of 2^-16.

        Args:
            layer: () int64, its key: each layer draws for itself.
        """
        width, dropped = x.shape[-1], round(self.p * STEPS)
        fours = torch.arange(-(-width // 4), device=x.device)
        keys = streams.mix(self.keys ^ layer)  # (…)
        bits = streams.mix(keys[..., None] ^ streams.mix(fours))  # (…, in / 4)
        draws = bits.view(torch.int16)[..., :width]  # each of -2^15 … 2^15 - 1 as likely
        kept = draws >= dropped - STEPS // 2
        return (x * kept).div_(1 - dropped / STEPS)


def dropout_of(p: float, seed: int, step: int, rows: Tensor) -> Dropout | None:
    """The dropout of a micro-batch; None where p is 0.

    Args:
        step: of the optimizer, from 0.
        rows: (B,) int64, which of all rows of the step these are.
    """
    return Dropout(p, streams.key(seed, "dropout", step, rows)) if p else None
