"""How prompts and responses lie in a batch, and where in it a response token finds its state.

Rows are left-aligned: prompt, response, zeros. Column t of a (B, R) tensor belongs to response
token t and to the state in which it was chosen.

Shapes: B rows, T columns, P_b tokens of row b's prompt, R tokens of the longest response.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.errors import UserError


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids -> (B, T) int64, with zeros on the right; only lengths tell where a row ends.

    >>> pad_right([[5, 6], [7]])
    tensor([[5, 6],
            [7, 0]])
    """
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])


def response_states(hidden: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """The state in which each response token was chosen: the one off-by-one of RLHF is here.

    Response token t of row b stands at index P_b + t, and the model chose it after it had read
    index P_b + t - 1. So its log-prob, and the value of the state before it, are read there.

    Args:
        hidden: (B, T, …), a state or a value of each token.
        prompt_lengths: (B,) P_b >= 1.
        width: R.
    Returns:
        (B, R, …). Columns behind a row's response hold other states of the row: mask them.

    >>> states = torch.tensor([[10, 11, 12, 13]])  # prompt of 2 tokens, response of 2
    >>> response_states(states, torch.tensor([2]), 2)
    tensor([[11, 12]])
    """
    return _window(hidden, prompt_lengths - 1, width)


def response_tokens(tokens: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """(B, T) ids -> (B, R) ids of the response tokens; mask the columns behind a row's response.

    >>> response_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([2]), 2)
    tensor([[7, 8]])
    """
    return _window(tokens, prompt_lengths, width)


def _window(x: Tensor, start: Tensor, width: int) -> Tensor:
    """x[b, start_b : start_b + width] of each row, the last column again behind its end."""
    index = start[:, None] + torch.arange(width, device=x.device)
    index = index.clamp(max=x.shape[1] - 1)  # (B, R)
    # gather, because the backward of indexing with repeated indices differs from run to run
    shape = index.shape + x.shape[2:]
    return x.gather(1, index.view(index.shape + (1,) * (x.dim() - 2)).expand(shape))


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """(N, …) values of the True cells, row by row -> (B, R, …) with 0 elsewhere."""
    cells = mask.view(*mask.shape, *[1] * (values.dim() - 1))
    shape = mask.shape + values.shape[1:]
    return values.new_zeros(shape).masked_scatter(cells.expand(shape), values)


def check_known(tokens: Tensor, words: int, who: str) -> None:
    """Refuses sampled ids that another model has no embedding for.

    A policy whose vocabulary is padded further than that of its reference can sample such an id.

    Args:
        tokens: ids, of any shape.
        words: ids that the other model knows.
        who: what the error calls the other model.
    Raises:
        UserError: an id of `words` or more.
    """
    if (largest := int(tokens.max())) >= words:
        what = f"token {largest} was sampled, {who} has {words:,}"
        raise UserError("vocabulary", what, "take models of one size of vocabulary")
