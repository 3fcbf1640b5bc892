"""Divergences over the whole vocabulary: by hand, and against full logits."""

import math

import pytest
import torch

from minirlhf.models.divergence import token_divergence, token_kl
from tests.tiny_states import (
    EYE,
    LAWS,
    Unembedding,
    assert_close,
    f64,
    make_lm,
    states,
    support_of,
)

LOG3, LOG5 = math.log(3), math.log(5)


def apart(beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of p = (3/4, 1/4) from q = (1/2, 1/2), and its gradient by the logits."""
    hidden = torch.tensor([[LOG3, 0]], dtype=f64, requires_grad=True)
    lm = Unembedding(torch.eye(2, dtype=f64))
    value = token_divergence(lm, hidden, lm, torch.zeros(1, 2, dtype=f64), beta)
    value.sum().backward()
    return value, hidden.grad


def test_reverse_kl_by_hand():
    # 3/4 log 3/2 + 1/4 log 1/2 = 3/4 log 3 - log 2
    value, slope = apart(1.0)
    assert_close(value, torch.tensor([0.75 * LOG3 - math.log(2)], dtype=f64))
    # p (log p - log q - kl): the first is 3/4 (log 3/2 - kl) = 3/16 log 3
    assert_close(slope, torch.tensor([[0.1875 * LOG3, -0.1875 * LOG3]], dtype=f64))


def test_forward_kl_by_hand():
    # 1/2 log 2/3 + 1/2 log 2 = 1/2 log 4/3
    value, slope = apart(0.0)
    assert_close(value, torch.tensor([0.5 * math.log(4 / 3)], dtype=f64))
    assert_close(slope, torch.tensor([[0.25, -0.25]], dtype=f64))  # p - q


def test_mixed_divergence_by_hand():
    # beta 1/4: m = 1/4 (1/2, 1/2) + 3/4 (3/4, 1/4) = (11/16, 5/16), so q/m = (8/11, 8/5) and
    # p/m = (12/11, 4/5)
    value, slope = apart(0.25)
    of_q = 0.5 * math.log(8 / 11) + 0.5 * math.log(8 / 5)
    of_p = 0.75 * math.log(12 / 11) + 0.25 * math.log(4 / 5)
    assert_close(value, torch.tensor([0.25 * of_q + 0.75 * of_p], dtype=f64))
    # g = 3/4 log(p/m); of two words p_1 (g_1 - sum p g) = p_1 p_2 (g_1 - g_2), and
    # g_1 - g_2 = 3/4 log(12/11 · 5/4) = 3/4 log(15/11)
    first = 3 / 16 * 0.75 * math.log(15 / 11)
    assert_close(slope, torch.tensor([[first, -first]], dtype=f64))


def test_mixed_divergence_has_the_kls_as_its_limits():
    small = 1e-7
    assert_close(apart(small)[0] / small, apart(0.0)[0])
    assert_close(apart(1 - small)[0] / small, apart(1.0)[0])


def test_equal_models_are_not_apart():
    lm = Unembedding(EYE)
    for beta in (0.0, 0.3, 1.0):
        assert_close(token_divergence(lm, LAWS, lm, LAWS, beta), torch.zeros(2, dtype=f64))


def test_token_kl_on_a_support_by_hand():
    # p (1/2, 1/3, 1/6) and q (1/6, 1/2, 1/3) left with 0 and 1: (3/5, 2/5) against (1/4, 3/4)
    lm, support = Unembedding(EYE), support_of([0, 1])
    kl = token_kl(lm, LAWS[:1], lm, LAWS[1:], support=support)
    expected = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)
    assert_close(kl, torch.tensor([expected], dtype=f64))


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.25])
def test_models_of_different_padding_are_compared_on_the_words_of_both(beta):
    """A third word of one of them, of whatever logit, changes neither value nor gradient."""
    two, three = torch.eye(2, dtype=f64), torch.tensor([[1, 0], [0, 1], [9, -7]], dtype=f64)
    value, slope = apart(beta)  # of p (3/4, 1/4) and q (1/2, 1/2), by hand above
    for weight, ref_weight in ((three, two), (two, three)):
        lm, ref = Unembedding(weight), Unembedding(ref_weight)
        hidden = torch.tensor([[LOG3, 0]], dtype=f64, requires_grad=True)
        got = token_divergence(lm, hidden, ref, torch.zeros(1, 2, dtype=f64), beta)
        assert_close(got, value)
        got.sum().backward()
        assert_close(hidden.grad, slope)
        # row j: slope_j times the state (log 3, 0); a word that the other lacks has none
        rows = torch.zeros_like(weight)
        rows[:2, 0] = slope[0] * LOG3
        assert_close(lm.unembedding.grad, rows)


def test_padding_is_cut_from_a_support_too():
    # ids 0, 1 and 2 could be drawn, the reference lacks 2: (3/5, 2/5) against (1/4, 3/4)
    lm, ref, support = Unembedding(EYE), Unembedding(EYE[:2]), support_of([0, 1, 2])
    kl = token_kl(lm, LAWS[:1], ref, LAWS[1:], support=support)
    expected = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)
    assert_close(kl, torch.tensor([expected], dtype=f64))


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("narrowed", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_and_gradient_are_those_of_full_logits(chunk, temperature, narrowed, beta):
    lm, ref = make_lm(), make_lm()
    with torch.no_grad():
        ref.unembedding.mul_(0.5)
    hidden, ref_hidden = states(2, 5), states(2, 5).detach() * 0.3
    support, allowed = None, torch.ones(10, 50, dtype=torch.bool)
    if narrowed:
        support = support_of(*[[i, i + 7, 40] for i in range(10)])
        allowed = ~support.excluded(slice(0, 10), slice(0, 50))
        assert allowed.sum(1).tolist() == [3] * 10
    ours = token_divergence(lm, hidden, ref, ref_hidden, beta, temperature, chunk, support)
    weight = torch.linspace(-1, 2, 10, dtype=f64).view(2, 5)
    got = torch.autograd.grad((ours * weight).sum(), [hidden, lm.unembedding])

    def distribution(model, x):
        logits = (x @ model.unembedding.T / temperature).view(10, 50)
        return logits.masked_fill(~allowed, -1e9).log_softmax(-1)

    logp, logq = distribution(lm, hidden), distribution(ref, ref_hidden)
    of_p, of_q = logq, logp  # what p and q are each compared with
    if 0 < beta < 1:
        of_p = of_q = (beta * logq.exp() + (1 - beta) * logp.exp()).clamp(min=1e-300).log()
    forward = (logq.exp() * (logq - of_q)).sum(-1)
    reverse = (logp.exp() * (logp - of_p)).sum(-1)
    weights = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
    theirs = (weights[0] * forward + weights[1] * reverse).view(2, 5)
    assert_close(ours, theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), [hidden, lm.unembedding])
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)


def test_divergence_refuses():
    lm = Unembedding(EYE)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*: at least 0 and at most 1 is legal"):
            token_divergence(lm, LAWS, lm, LAWS, beta)
    with pytest.raises(ValueError, match="give the reference's state for each of the policy's"):
        token_kl(lm, LAWS, lm, LAWS[:1])
    with pytest.raises(ValueError, match="temperature is 0: must be above 0"):
        token_kl(lm, LAWS, lm, LAWS, temperature=0)
