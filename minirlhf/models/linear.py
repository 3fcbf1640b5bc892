"""A linear layer that is fast in decoding too, where a row of a batch is a single token.

With so little to compute, what counts is that all threads read the weights at full speed. On a CPU
a plain product leaves them waiting; split by the weight's rows, without a copy, it reads them 1.2
to 3 times as fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 8  # of the weight's rows: fixed, so that no result depends on the number of threads
MOST_ROWS = 128  # tokens; with more there is work enough for a plain product
MOST_COLUMNS = 4  # tokens; up to so many, W x^T is faster than x W^T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `F.linear`; x (…, in), weight (out, in), bias (out,) -> (…, out).

    Split is only x (B, 1, in), one token a row, on a CPU and without a gradient: the two products
    differ in rounding, and whole rows must be computed alike whether they are measured or trained.
    """
    decoding = x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()
    if not decoding or not x.is_cpu or len(x) > MOST_ROWS or len(weight) % BLOCKS:
        return F.linear(x, weight, bias)
    tokens = x[:, 0]
    blocks = weight.unflatten(0, (BLOCKS, -1))  # (BLOCKS, out / BLOCKS, in)
    if len(x) <= MOST_COLUMNS:
        out = torch.bmm(blocks, tokens.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
    else:
        out = torch.bmm(tokens.expand(BLOCKS, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
    return (out if bias is None else out + bias)[:, None]


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
