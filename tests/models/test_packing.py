"""Tokens that several rows begin with are computed once."""

import torch
from torch.testing import assert_close

from minirlhf.models.alignment import pad_right
from minirlhf.models.cache import Packing, pack_rows
from tests.models.test_transformer import TINY, f64, tiny

RNG = torch.Generator().manual_seed(0)
# Two answers to one prompt of 3, one that shares 2 tokens with the second, one with nothing.
ROWS = [[5, 6, 7, 1, 2], [5, 6, 7, 1, 3, 4], [5, 6, 9], [8, 6, 7]]


def lengths_of(rows) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows])


def test_packing_by_hand():
    packing = Packing(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 0]]), torch.tensor([3, 3, 2]))
    # 1 2 3 of the first row, 4 of the second, whose 1 2 are above, 5 of the third
    assert packing.cells.tolist() == [0, 1, 2, 5, 7]
    # the 1 of the third is that of the second, which is that of the first; its padding has any
    assert packing.places.tolist()[:8] == [0, 1, 2, 0, 1, 3, 0, 4]
    x = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert packing.unpack(x).flatten().tolist()[:8] == [10, 20, 30, 10, 20, 40, 10, 50]
    assert packing.pack(packing.unpack(x)).tolist() == x.tolist()


def test_equal_tokens_behind_a_difference_or_in_the_padding_are_no_beginning():
    tokens = torch.tensor([[1, 2, 0], [3, 2, 0], [3, 2, 0]])
    packing = Packing(tokens, torch.tensor([2, 2, 3]))
    assert packing.cells.tolist() == [0, 1, 3, 4, 8]  # the last 0 is a token, that above is none


def test_rows_without_padding_or_a_common_beginning_are_not_packed():
    tokens = torch.tensor([[1, 2], [3, 2]])
    assert pack_rows(tokens, torch.tensor([2, 2])) is None
    assert pack_rows(torch.tensor([[1, 2], [1, 3]]), torch.tensor([2, 2])) is not None


def test_common_beginnings_change_no_state_and_no_gradient():
    tokens, lengths = pad_right(ROWS), lengths_of(ROWS)
    weights = torch.randn(*tokens.shape, TINY.hidden_size, dtype=f64, generator=RNG)
    weights *= (torch.arange(tokens.shape[1]) < lengths[:, None])[..., None]
    for changes in ({}, {"positions": "learned"}, {"qk_norm": True}):
        states, gradients = [], []
        for given in (None, lengths):
            lm = tiny(**changes)
            states.append(lm(tokens, lengths=given))
            (states[-1] * weights).sum().backward()
            gradients.append([p.grad for p in lm.parameters() if p.grad is not None])
        for row, (padded, packed) in enumerate(zip(*states, strict=True)):
            assert_close(packed[: lengths[row]], padded[: lengths[row]], atol=1e-12, rtol=0)
        for padded, packed in zip(*gradients, strict=True):
            assert_close(packed, padded, atol=1e-11, rtol=0)


def test_common_beginnings_are_computed_once():
    lm, seen = tiny(), []
    lm.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[1][0].shape[0]))
    lm(pad_right(ROWS), lengths=lengths_of(ROWS))
    assert seen == [5 + 2 + 1 + 3]  # the second goes on behind 4 tokens, the third behind 2
