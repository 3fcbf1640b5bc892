"""models.alignment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.errors import UserError


def response_states(hidden: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """The state each response token was chosen in: the one off-by-one of RLHF lives here.

    Response token t of row b stands at index P_b + t, so its log-prob and the value of the state
    before it are both read at index P_b - 1 + t.

    Args:
        hidden: (B, T, …) per-token states or values, rows left-aligned.
        prompt_lengths: (B,) P_b >= 1.
        width: R, columns of the result.
    Returns:
        (B, R, …); column t beyond a row's response repeats the last column and is to be masked.
    """
    index = prompt_lengths[:, None] - 1 + torch.arange(width, device=hidden.device)
    index = index.clamp(max=hidden.shape[1] - 1)  # (B, R)
    # gather, because the backward of indexing with repeated indices differs from run to run
    shape = index.shape + hidden.shape[2:]
    return hidden.gather(1, index.view(index.shape + (1,) * (hidden.dim() - 2)).expand(shape))


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ragged ids -> (B, longest) int64, zeros on the right; only lengths say where a row ends."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])


def check_known(tokens: Tensor, words: int, who: str) -> None:
    """A policy whose vocabulary is padded further than another model's may draw what it lacks."""
    if int(tokens.max()) >= words:
        what = f"token {int(tokens.max())} was sampled, {who} has {words:,}"
        raise UserError("vocabulary", what, "take models of one size of vocabulary")
