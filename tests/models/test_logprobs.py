import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf.models.logprobs import (
    Tile,
    plain_token_logprobs,
    token_logprobs,
    widened,
)
from minirlhf.models.support import RowSupport
from tests.tiny_states import (
    EYE,
    LAWS,
    Unembedding,
    assert_close,
    f64,
    make_lm,
    states,
    support_of,
    targets,
)

# ---- token_logprobs ------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
    # Logits (log 3, 0) and (0, log 3): the distributions are (3/4, 1/4) and (1/4, 3/4).
    lm = Unembedding(torch.eye(2, dtype=f64))
    hidden = torch.tensor([[[math.log(3), 0], [0, math.log(3)]]], dtype=f64)
    stats = token_logprobs(lm, hidden, torch.tensor([[0, 0]]))
    assert_close(stats.logprobs, torch.tensor([[math.log(3 / 4), math.log(1 / 4)]], dtype=f64))
    # Entropy 3/4 log 4/3 + 1/4 log 4 = log 4 - 3/4 log 3, whatever the target
    assert_close(stats.entropy, torch.full((1, 2), math.log(4) - 0.75 * math.log(3), dtype=f64))


def test_token_logprobs_temperature_by_hand():
    # At temperature 1/2 the logits double: 2 log 3 = log 9, the distribution is (9/10, 1/10).
    lm = Unembedding(torch.eye(2, dtype=f64))
    hidden = torch.tensor([[math.log(3), 0]], dtype=f64)
    stats = token_logprobs(lm, hidden, torch.tensor([1]), temperature=0.5)
    assert_close(stats.logprobs, torch.tensor([math.log(1 / 10)], dtype=f64))
    assert_close(stats.entropy, torch.tensor([math.log(10) - 0.9 * math.log(9)], dtype=f64))


def test_token_logprobs_gradient_by_hand():
    # d log p(a) / d logits = onehot(a) - p = (1, 0) - (3/4, 1/4); the states are the logits.
    # d entropy / d logits = -p (log p + entropy): with H = log 4 - 3/4 log 3 the first is
    # -3/4 (log 3/4 + H) = -3/4 (1/4 log 3), and the two sum to 0.
    lm = Unembedding(torch.eye(2, dtype=f64))
    for part, expected in (("logprobs", 0.25), ("entropy", -0.1875 * math.log(3))):
        hidden = torch.tensor([[math.log(3), 0]], dtype=f64, requires_grad=True)
        getattr(token_logprobs(lm, hidden, torch.tensor([0])), part).sum().backward()
        assert_close(hidden.grad, torch.tensor([[expected, -expected]], dtype=f64))


def test_a_uniform_distribution_has_the_entropy_of_its_size():
    stats = token_logprobs(make_lm(), torch.zeros(3, 16, dtype=f64), torch.tensor([0, 7, 49]))
    assert_close(stats.entropy, torch.full((3,), math.log(50), dtype=f64))
    assert_close(stats.logprobs, torch.full((3,), -math.log(50), dtype=f64))


@pytest.mark.parametrize("tile", [(1, 7), (4, 50), (11, 49), (12, 1), (512, 4096)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_gradient_are_those_of_full_logits(tile, temperature):
    lm, hidden, ids = make_lm(), states(3, 4), targets(3, 4)
    weights = torch.arange(12, dtype=f64).view(3, 4)
    leaves = [hidden, lm.unembedding]

    distribution = (lm.logits(hidden) / temperature).log_softmax(-1)
    logprobs = distribution.gather(-1, ids[..., None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    expected = torch.autograd.grad((weights * (logprobs + 0.3 * entropy)).sum(), leaves)

    plain = plain_token_logprobs(lm, hidden, ids, temperature)
    assert_close(plain.logprobs, logprobs, atol=1e-12)
    assert_close(plain.entropy, entropy, atol=1e-12)
    stats = token_logprobs(lm, hidden, ids, temperature, tile=Tile(*tile))
    assert_close(stats.logprobs, logprobs, atol=1e-12)
    assert_close(stats.entropy, entropy, atol=1e-12)
    got = torch.autograd.grad((weights * (stats.logprobs + 0.3 * stats.entropy)).sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, atol=1e-11)


def test_token_logprobs_are_the_plain_ones_in_float32():
    lm, hidden, ids = make_lm(torch.float32), states(3, 9, dtype=torch.float32), targets(3, 9)
    plain = plain_token_logprobs(lm, hidden, ids, 0.7)
    for one, other in zip(token_logprobs(lm, hidden, ids, 0.7), plain, strict=True):
        assert_close(one, other, atol=1e-5)  # of sums in another order: 1e-6 of about 10 nats


@pytest.mark.parametrize("shape", [(), (5,), (2, 0), (2, 3, 2)])
def test_token_logprobs_keeps_any_shape(shape):
    lm, hidden, ids = make_lm(), states(*shape), targets(*shape)
    stats = token_logprobs(lm, hidden, ids)
    assert stats.logprobs.shape == stats.entropy.shape == shape
    expected = lm.logits(hidden).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert_close(stats.logprobs, expected, atol=1e-12)


def test_token_logprobs_of_bfloat16_are_float32_from_float32_logits():
    lm, hidden, ids = make_lm(torch.bfloat16), states(6, dtype=torch.bfloat16), targets(6)
    stats = token_logprobs(lm, hidden, ids)
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    distribution = (hidden.double() @ lm.unembedding.double().T).log_softmax(-1)
    assert_close(stats.logprobs.double(), distribution.gather(-1, ids[:, None])[:, 0], atol=1e-5)
    stats.logprobs.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.abs().sum() > 0
    assert widened(torch.float16) == torch.float32 and widened(f64) == f64


class Largest(TorchDispatchMode):
    """The most rows that any (rows, V) tensor had, made in the forward or the backward pass."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows, self.elements = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.dim() and tensor.shape[-1] == self.vocabulary:
                    self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def test_token_logprobs_never_hold_all_logits():
    lm, hidden, ids = make_lm(), states(4, 64), targets(4, 64)
    held = []

    def keep(tensor):
        held.append(tensor.numel())
        return tensor

    with Largest(10) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        stats = token_logprobs(lm, hidden, ids, tile=Tile(32, 10))
    with Largest(10) as backward:
        (stats.logprobs + stats.entropy).sum().backward()
    assert forward.rows == backward.rows == 32  # of 256, for 10 words of 50 each
    # The largest of all are the states, 256 x 16; all logits would be 256 x 50.
    assert forward.elements == backward.elements == 256 * 16
    assert sum(held) < 256 * 50  # nor are they kept in pieces from one pass to the other


def test_token_logprobs_of_logits_that_overflow_by_hand():
    # exp(1000) is infinite; the distribution of (1000, 1000 + log 3, -1000, 0) is (1/4, 3/4, 0, 0).
    logits = torch.tensor([[1000, 1000 + math.log(3), -1000, 0]], dtype=f64)
    for tile in (Tile(), Tile(1, 1), Tile(1, 3)):
        lm = Unembedding(torch.eye(4, dtype=f64))
        stats = token_logprobs(lm, logits, torch.tensor([1]), tile=tile)
        assert_close(stats.logprobs, torch.tensor([math.log(3 / 4)], dtype=f64))
        assert_close(stats.entropy, torch.tensor([math.log(4) - 0.75 * math.log(3)], dtype=f64))


def test_a_certain_token_has_logprob_and_entropy_0_exactly():
    logits = torch.tensor([[200.0, 0.0, 0.0, -50.0]])
    stats = token_logprobs(Unembedding(torch.eye(4)), logits, torch.tensor([0]), tile=Tile(1, 2))
    assert stats.logprobs.item() == stats.entropy.item() == 0


def test_token_logprobs_refuses():
    lm = make_lm()
    for ids in ([0, 50], [-1, 3]):
        with pytest.raises(ValueError, match=rf"targets lie in {min(ids)}..{max(ids)}: the model"):
            token_logprobs(lm, torch.zeros(2, 16, dtype=f64), torch.tensor(ids))
    with pytest.raises(ValueError, match=r"targets is \(3,\), hidden is \(4, 16\): give one"):
        token_logprobs(lm, torch.zeros(4, 16), torch.zeros(3, dtype=torch.int64))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: must be above 0"):
            token_logprobs(lm, torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64), temperature)


# ---- the distribution that could be sampled ------------------------------------------------------


LEFT = [support_of([0, 1], [2]), support_of([2], [0, 1], banned=True)]


@pytest.mark.parametrize("support", LEFT)
@pytest.mark.parametrize("tile", [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_token_logprobs_are_renormalised_on_the_support_by_hand(support, tile):
    hidden = LAWS.clone().requires_grad_()
    ids, tile = torch.tensor([1, 2]), Tile(*tile)
    stats = token_logprobs(Unembedding(EYE), hidden, ids, support=support, tile=tile)
    # (1/3) / (1/2 + 1/3) = 2/5; the only token that was left has probability 1
    assert_close(stats.logprobs, torch.tensor([math.log(2 / 5), 0], dtype=f64))
    # of (3/5, 2/5): log 5 - 3/5 log 3 - 2/5 log 2; of a certain token: 0
    entropy = math.log(5) - 0.6 * math.log(3) - 0.4 * math.log(2)
    assert_close(stats.entropy, torch.tensor([entropy, 0], dtype=f64))
    # d logprob / d logits = (0, 1) - (3/5, 2/5) on the support, 0 elsewhere and where it is certain
    (grad,) = torch.autograd.grad(stats.logprobs.sum(), hidden, retain_graph=True)
    assert_close(grad, torch.tensor([[-0.6, 0.6, 0], [0, 0, 0]], dtype=f64))
    # d entropy / d logits = -p (log p + H): -3/5 (2/5 log 3/2) and its negative
    (grad,) = torch.autograd.grad(stats.entropy.sum(), hidden)
    slope = 0.24 * math.log(3 / 2)
    assert_close(grad, torch.tensor([[-slope, slope, 0], [0, 0, 0]], dtype=f64))


def test_a_target_outside_the_support_has_no_probability():
    stats = token_logprobs(Unembedding(EYE), LAWS, torch.tensor([2, 0]), support=LEFT[0])
    assert (stats.logprobs == -torch.inf).all() and torch.isfinite(stats.entropy).all()


def test_a_support_of_everything_changes_nothing():
    everything = support_of([0, 1, 2], [0, 1, 2])
    with_it, without = (
        token_logprobs(Unembedding(EYE), LAWS, torch.tensor([1, 2]), support=support)
        for support in (everything, None)
    )
    assert_close(with_it.logprobs, without.logprobs)
    assert_close(with_it.entropy, without.entropy)


def test_support_of_another_number_of_positions_is_refused():
    with pytest.raises(ValueError, match="support is of 1 positions, there are 2"):
        token_logprobs(Unembedding(EYE), LAWS, torch.tensor([1, 2]), support=support_of([0]))


def test_row_support_selects_and_flattens_by_hand():
    ids = [torch.tensor(row, dtype=torch.int32) for row in ([1, 2, 3], [4], [5, 6, 7])]
    rows = RowSupport(ids, torch.tensor([[1, 0, 2], [1, 0, 0], [2, 1, 0]]))
    some = rows.select(torch.tensor([2, 1]), 2)
    assert some.counts.tolist() == [[2, 1], [1, 0]] and not some.banned
    flat = some.flat(torch.tensor([[True, True], [True, False]]))
    assert flat.ids.tolist() == [5, 6, 7, 4] and flat.counts.tolist() == [2, 1, 1]
    # a hole between two tokens has no ids
    flat = rows.select(torch.tensor([0]), 3).flat(torch.tensor([[True, False, True]]))
    assert flat.ids.tolist() == [1, 2, 3] and flat.counts.tolist() == [1, 2]
    assert flat.excluded(slice(1, 2), slice(0, 5)).tolist() == [[True, True, False, False, True]]
    assert flat.excluded(slice(0, 2), slice(2, 4)).tolist() == [[True, True], [False, False]]


def test_excluded_of_few_banned_ids_by_hand():
    banned = support_of([3], [0, 3], [], banned=True)
    by_words = {(0, 4): [(0, 3), (1, 0), (1, 3)], (1, 4): [(0, 2), (1, 2)]}
    for words, expected in by_words.items():
        rows, columns = banned.excluded(slice(0, 3), slice(*words))
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    rows, _ = banned.excluded(slice(1, 3), slice(0, 2))
    assert rows.tolist() == [0]
