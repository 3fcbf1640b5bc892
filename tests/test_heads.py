import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf.errors import UserError
from minirlhf.heads import (
    RewardModel,
    ValueHeadModel,
    critic_from_reward_model,
    initialize_score,
    normalize_scores,
    response_states,
    token_kl,
    token_logprobs,
    widened,
)
from minirlhf.support import RowSupport, Support, stack_supports
from minirlhf.transformer import CausalLM, ModelConfig, initialize

f64 = torch.float64
CONFIG = ModelConfig("llama", 50, 16, 24, 2, 4, 2, 4, 32)


def assert_close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def make_lm(dtype=f64) -> CausalLM:
    lm = initialize(CausalLM(CONFIG).to(dtype), torch.Generator().manual_seed(0))
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(20)  # logits of a few nats
    return lm


class Unembedding(nn.Module):
    """All that token_logprobs looks at."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.unembedding = nn.Parameter(weight)


def states(*shape: int, dtype=f64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 16, generator=rng, dtype=f64).to(dtype).requires_grad_()


def targets(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(2))


# ---- token_logprobs ------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
    # Logits (log 3, 0) and (0, log 3): the laws are (3/4, 1/4) and (1/4, 3/4).
    lm = Unembedding(torch.eye(2, dtype=f64))
    hidden = torch.tensor([[[math.log(3), 0], [0, math.log(3)]]], dtype=f64)
    stats = token_logprobs(lm, hidden, torch.tensor([[0, 0]]))
    assert_close(stats.logprobs, torch.tensor([[math.log(3 / 4), math.log(1 / 4)]], dtype=f64))
    # Entropy 3/4 log 4/3 + 1/4 log 4 = log 4 - 3/4 log 3, whatever the target
    assert_close(stats.entropy, torch.full((1, 2), math.log(4) - 0.75 * math.log(3), dtype=f64))


def test_token_logprobs_temperature_by_hand():
    # At temperature 1/2 the logits double: 2 log 3 = log 9, the law is (9/10, 1/10).
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


def test_uniform_law_has_the_entropy_of_its_size():
    stats = token_logprobs(make_lm(), torch.zeros(3, 16, dtype=f64), torch.tensor([0, 7, 49]))
    assert_close(stats.entropy, torch.full((3,), math.log(50), dtype=f64))
    assert_close(stats.logprobs, torch.full((3,), -math.log(50), dtype=f64))


@pytest.mark.parametrize("chunk", [1, 4, 11, 12, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_gradient_are_those_of_full_logits(chunk, temperature):
    lm, hidden, ids = make_lm(), states(3, 4), targets(3, 4)
    weights = torch.arange(12, dtype=f64).view(3, 4)
    leaves = [hidden, lm.unembedding]

    law = (lm.logits(hidden) / temperature).log_softmax(-1)
    logprobs = law.gather(-1, ids[..., None])[..., 0]
    entropy = -(law.exp() * law).sum(-1)
    expected = torch.autograd.grad((weights * (logprobs + 0.3 * entropy)).sum(), leaves)

    stats = token_logprobs(lm, hidden, ids, temperature, chunk)
    assert_close(stats.logprobs, logprobs, atol=1e-12)
    assert_close(stats.entropy, entropy, atol=1e-12)
    got = torch.autograd.grad((weights * (stats.logprobs + 0.3 * stats.entropy)).sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, atol=1e-11)


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
    law = (hidden.double() @ lm.unembedding.double().T).log_softmax(-1)
    assert_close(stats.logprobs.double(), law.gather(-1, ids[:, None])[:, 0], atol=1e-5)
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

    with Largest(50) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        stats = token_logprobs(lm, hidden, ids, chunk=32)
    with Largest(50) as backward:
        (stats.logprobs + stats.entropy).sum().backward()
    assert forward.rows == backward.rows == 32  # of 256
    # The largest of all are the states, 256 x 16; all logits would be 256 x 50.
    assert forward.elements == backward.elements == 256 * 16
    assert sum(held) < 256 * 50  # nor are they kept in pieces from one pass to the other


def test_token_logprobs_refuses():
    lm = make_lm()
    with pytest.raises(ValueError, match=r"targets is \(3,\), hidden is \(4, 16\): give one"):
        token_logprobs(lm, torch.zeros(4, 16), torch.zeros(3, dtype=torch.int64))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: must be above 0"):
            token_logprobs(lm, torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64), temperature)


# ---- the law that could be sampled ---------------------------------------------------------------


def support_of(*allowed: list[int], banned: bool = False) -> Support:
    ids = torch.tensor([i for position in allowed for i in position], dtype=torch.int32)
    return Support(ids, torch.tensor([len(position) for position in allowed]), banned)


EYE = torch.eye(3, dtype=f64)
# Laws (1/2, 1/3, 1/6) and (1/6, 1/2, 1/3); what is left of them: 0 and 1, 2 alone
LAWS = torch.tensor([[1 / 2, 1 / 3, 1 / 6], [1 / 6, 1 / 2, 1 / 3]], dtype=f64).log()
LEFT = [support_of([0, 1], [2]), support_of([2], [0, 1], banned=True)]


@pytest.mark.parametrize("support", LEFT)
@pytest.mark.parametrize("chunk", [1, 2])
def test_token_logprobs_are_renormalised_on_the_support_by_hand(support, chunk):
    hidden = LAWS.clone().requires_grad_()
    stats = token_logprobs(
        Unembedding(EYE), hidden, torch.tensor([1, 2]), chunk=chunk, support=support
    )
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
    assert flat.allowed(slice(1, 2), 5).tolist() == [[False, False, True, True, False]]


def test_stack_supports_by_hand():
    narrow = RowSupport([torch.tensor([1])], torch.tensor([[1]]))
    wide = RowSupport([torch.tensor([2, 3]), torch.tensor([4])], torch.tensor([[1, 1], [1, 0]]))
    both = stack_supports([narrow, wide])
    assert [row.tolist() for row in both.rows] == [[1], [2, 3], [4]]
    assert both.counts.tolist() == [[1, 0], [1, 1], [1, 0]]


# ---- token_kl ------------------------------------------------------------------------------------


def test_token_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2 = 3/4 log 3 - log 2
    hidden = torch.tensor([[math.log(3), 0]], dtype=f64, requires_grad=True)
    lm = Unembedding(torch.eye(2, dtype=f64))
    kl = token_kl(lm, hidden, lm, torch.zeros(1, 2, dtype=f64))
    expected = 0.75 * math.log(3) - math.log(2)
    assert_close(kl, torch.tensor([expected], dtype=f64))
    # d kl / d logits = p (log p - log q - kl): the first is 3/4 (log 3/2 - kl) = 3/16 log 3
    kl.sum().backward()
    slope = 0.1875 * math.log(3)
    assert_close(hidden.grad, torch.tensor([[slope, -slope]], dtype=f64))


def test_token_kl_on_a_support_by_hand():
    # p (1/2, 1/3, 1/6) and q (1/6, 1/2, 1/3) left with 0 and 1: (3/5, 2/5) against (1/4, 3/4)
    lm, support = Unembedding(EYE), support_of([0, 1])
    kl = token_kl(lm, LAWS[:1], lm, LAWS[1:], support=support)
    expected = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)
    assert_close(kl, torch.tensor([expected], dtype=f64))


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("narrowed", [False, True])
def test_token_kl_and_gradient_are_those_of_full_logits(chunk, temperature, narrowed):
    lm, ref = make_lm(), make_lm()
    with torch.no_grad():
        ref.unembedding.mul_(0.5)
    hidden, ref_hidden = states(2, 5), states(2, 5).detach() * 0.3
    support, allowed = None, torch.ones(10, 50, dtype=torch.bool)
    if narrowed:
        support = support_of(*[[i, i + 7, 40] for i in range(10)])
        allowed = support.allowed(slice(0, 10), 50)
        assert allowed.sum(1).tolist() == [3] * 10
    ours = token_kl(lm, hidden, ref, ref_hidden, temperature, chunk, support)
    weight = torch.linspace(-1, 2, 10, dtype=f64).view(2, 5)
    got = torch.autograd.grad((ours * weight).sum(), [hidden, lm.unembedding])

    def law(model, x):
        logits = (x @ model.unembedding.T / temperature).view(10, 50)
        return logits.masked_fill(~allowed, -1e9).log_softmax(-1)

    logp, logq = law(lm, hidden), law(ref, ref_hidden)
    theirs = (logp.exp() * (logp - logq)).sum(-1).view(2, 5)
    assert_close(ours, theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), [hidden, lm.unembedding])
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)


def test_token_kl_refuses():
    lm = Unembedding(EYE)
    with pytest.raises(ValueError, match="give the reference's state for each of the policy's"):
        token_kl(lm, LAWS, lm, LAWS[:1])
    with pytest.raises(ValueError, match="temperature is 0: must be above 0"):
        token_kl(lm, LAWS, lm, LAWS, temperature=0)


# ---- response_states -----------------------------------------------------------------------------


def test_response_states_by_hand():
    # Row 0: prompt at 0..1, response at 2, 3, 4; it was chosen in the states 1, 2, 3.
    # Row 1: prompt at 0..2, response at 3, 4; states 2, 3, then the last column again.
    values = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
    got = response_states(values, torch.tensor([2, 3]), 3)
    assert got.tolist() == [[1, 2, 3], [12, 13, 14]]
    assert response_states(values, torch.tensor([1, 4]), 3).tolist() == [[0, 1, 2], [13, 14, 14]]
    hidden = torch.stack((values, -values), dim=-1)
    assert response_states(hidden, torch.tensor([2, 3]), 2)[1].tolist() == [[12, -12], [13, -13]]


def test_response_states_gradient_by_hand():
    hidden = torch.zeros(1, 4, 2, requires_grad=True)
    response_states(hidden, torch.tensor([3]), 3)[..., 0].sum().backward()
    assert hidden.grad[0].tolist() == [[0, 0], [0, 0], [1, 0], [2, 0]]  # index 2, 3, and 3 again


def test_response_states_give_the_logprobs_of_the_response():
    lm = make_lm()
    tokens = torch.tensor([[4, 8, 15, 16, 23], [42, 4, 8, 0, 0]])
    lengths, responses = torch.tensor([2, 1]), torch.tensor([[15, 16, 23], [4, 8, 0]])
    hidden = response_states(lm(tokens), lengths, 3)
    logprobs = token_logprobs(lm, hidden, responses).logprobs
    law = lm.logits(lm(tokens)).log_softmax(-1)
    # The law of the token at index i stands at index i - 1.
    expected = [law[0, 1, 15], law[0, 2, 16], law[0, 3, 23], law[1, 0, 4], law[1, 1, 8]]
    assert_close(torch.cat((logprobs[0], logprobs[1, :2])), torch.stack(expected), atol=1e-12)


# ---- value head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64])
def test_value_head_starts_at_zero(dtype):
    lm = make_lm(dtype)
    hidden, values = ValueHeadModel(lm)(targets(2, 5))
    assert hidden.shape == (2, 5, 16) and hidden.dtype == dtype
    assert values.shape == (2, 5) and values.dtype == widened(dtype) and (values == 0).all()
    assert torch.equal(hidden, lm(targets(2, 5)))


def test_value_head_by_hand():
    model = ValueHeadModel(make_lm())
    with torch.no_grad():
        model.v_head.weight[0, 3], model.v_head.bias[0] = 2.0, 5.0
    hidden, values = model(targets(2, 5))
    assert_close(values, 2 * hidden[..., 3] + 5)


@pytest.mark.parametrize("trainable", [True, False])
def test_critic_from_reward_model_values_a_state_at_the_score_of_the_text_so_far(trainable):
    reward_model, lm, tokens = make_reward(f64), make_lm(), targets(2, 5)
    policy = critic_from_reward_model(lm, reward_model, trainable)
    hidden, values = policy(tokens)
    assert torch.equal(hidden, lm(tokens))
    for length in range(1, 6):
        scores = reward_model(tokens, torch.tensor([length, length]))
        assert_close(values[:, length - 1], scores, atol=1e-12)
    parts = [*policy.critic.parameters(), *policy.v_head.parameters()]
    assert all(p.requires_grad is trainable for p in parts)
    assert all(p.requires_grad for p in policy.lm.parameters())


def test_critic_from_reward_model_is_a_copy():
    reward_model, tokens = make_reward(f64), targets(1, 3)
    policy = critic_from_reward_model(make_lm(), reward_model)
    policy(tokens)[1].sum().backward()
    assert policy.v_head.weight.grad is not None and policy.critic.norm.weight.grad is not None
    assert all(p.grad is None for p in [*reward_model.parameters(), *policy.lm.parameters()])


# ---- reward model --------------------------------------------------------------------------------


def make_reward(dtype=torch.float32) -> RewardModel:
    return initialize_score(RewardModel(make_lm(dtype)), torch.Generator().manual_seed(5))


@torch.no_grad()
def test_reward_is_read_at_the_last_real_token():
    model, tokens, lengths = make_reward(f64), targets(3, 6), torch.tensor([1, 4, 6])
    scores = model(tokens, lengths)
    states = model.model(tokens)[[0, 1, 2], [0, 3, 5]]
    assert_close(scores, states @ model.score.weight[0], atol=1e-12)
    assert scores.shape == (3,)
    alone = [model(tokens[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths)]
    assert_close(scores, torch.cat(alone), atol=1e-12)


@torch.no_grad()
def test_reward_does_not_depend_on_padding_width_or_order():
    model, tokens, lengths = make_reward(), targets(4, 9), torch.tensor([2, 9, 5, 1])
    scores = model(tokens, lengths)
    real = torch.arange(9) < lengths[:, None]
    for garbage in (0, 7, 49):
        assert_close(model(tokens.masked_fill(~real, garbage), lengths), scores, atol=1e-5)
    wider = torch.cat((tokens, targets(4, 11)), dim=1)
    assert_close(model(wider, lengths), scores, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(model(tokens[order], lengths[order]), scores[order], atol=1e-5)
    assert scores.std() > 0.1


def test_reward_head_trains_and_widens():
    model = make_reward(torch.bfloat16)
    scores = model(targets(2, 3), torch.tensor([3, 2]))
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_reward_refuses_lengths_of_another_batch():
    with pytest.raises(ValueError, match=r"lengths is \(2,\), tokens is \(3, 4\): give one length"):
        make_reward()(targets(3, 4), torch.tensor([1, 2]))


def test_initialize_score_has_the_published_spread():
    # Standard deviation 1 / sqrt(D + 1); of 16 draws a few times 200 seeds it is known to 1.3 %.
    model = make_reward()
    rng = torch.Generator().manual_seed(0)
    draws = torch.cat([initialize_score(model, rng).score.weight[0].clone() for _ in range(200)])
    assert draws.std().item() == pytest.approx(17**-0.5, rel=0.05)
    assert abs(draws.mean().item()) < 4 * 17**-0.5 / 3200**0.5


# ---- ensembles, and what normalises a score ------------------------------------------------------


def make_ensemble(heads: int, lcb_coef: float) -> RewardModel:
    model = RewardModel(make_lm(f64), heads=heads, lcb_coef=lcb_coef)
    return initialize_score(model, *(torch.Generator().manual_seed(h) for h in range(heads)))


def test_combine_is_a_lower_bound_by_hand():
    each = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=f64)
    # mean 3, deviations -2, -1, 3: std sqrt(14 / 3); heads that agree are certain
    assert_close(make_ensemble(3, 0.0).combine(each), torch.tensor([3.0, 4.0], dtype=f64))
    bound = torch.tensor([3 - 1.5 * (14 / 3) ** 0.5, 4.0], dtype=f64)
    assert_close(make_ensemble(3, 1.5).combine(each), bound, atol=1e-12)


@torch.no_grad()
def test_ensemble_scores_by_each_of_its_heads():
    model, tokens, lengths = make_ensemble(2, 0.5), targets(3, 6), torch.tensor([1, 4, 6])
    one, two = model.head_scores(tokens, lengths).unbind(1)
    for head, scores in ((0, one), (1, two)):
        alone = RewardModel(make_lm(f64))
        alone.score.weight.copy_(model.score.weight[head : head + 1])
        assert_close(alone(tokens, lengths), scores, atol=1e-12)
    # of two numbers: their middle, and half of their distance
    assert_close(model(tokens, lengths), (one + two) / 2 - 0.5 * (one - two).abs() / 2, atol=1e-12)


def test_ensemble_heads_are_drawn_apart_and_the_first_as_a_single_one():
    three, single = make_ensemble(3, 0.0), make_ensemble(1, 0.0)
    assert torch.equal(three.score.weight[:1], single.score.weight)
    assert len(set(three.score.weight[:, 0].tolist())) == 3


@pytest.mark.parametrize(("heads", "lcb_coef"), [(0, 0.0), (2, -0.5), (1, 0.5)])
def test_ensemble_refuses(heads, lcb_coef):
    with pytest.raises(ValueError, match=rf"heads is {heads} and lcb_coef {lcb_coef}: at least 1"):
        RewardModel(make_lm(), heads=heads, lcb_coef=lcb_coef)


def test_initialize_score_refuses_too_few_generators():
    with pytest.raises(ValueError, match="zip"):
        initialize_score(RewardModel(make_lm(), heads=2), torch.Generator())


@pytest.mark.parametrize(("heads", "lcb_coef"), [(1, 0.0), (3, 0.75)])
@torch.no_grad()
def test_normalize_scores_shifts_and_scales_what_the_model_says(heads, lcb_coef):
    model, tokens, lengths = (
        make_ensemble(heads, lcb_coef),
        targets(4, 6),
        torch.tensor([1, 4, 6, 2]),
    )
    before, weight = model(tokens, lengths), model.score.weight.clone()
    assert normalize_scores(model, 3.0, 2.0) is model
    assert_close(model(tokens, lengths), (before - 3) / 2, atol=1e-12)
    assert torch.equal(model.score.weight, weight / 2)  # the scale is there, the mean beside it
    assert (model.reward_mean, model.reward_std) == (1.5, 1.0)
    normalize_scores(model, 0.5, 4.0)
    assert_close(model(tokens, lengths), ((before - 3) / 2 - 0.5) / 4, atol=1e-12)
    model.reward_std = 5.0  # as another tool's config.json may have it
    third = model(tokens, lengths)
    normalize_scores(model, 0.25, 0.5)
    assert_close(model(tokens, lengths), (third - 0.25) / 0.5, atol=1e-12)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_normalize_scores_refuses(std):
    with pytest.raises(ValueError, match=r"std is .*: scores that are all alike cannot"):
        normalize_scores(make_reward(), 0.0, std)


def test_critic_from_reward_model_takes_what_normalises_it_and_the_mean_of_an_ensemble():
    reward_model, tokens = normalize_scores(make_ensemble(3, 0.0), 3.0, 2.0), targets(2, 5)
    reward_model.reward_std = 0.5
    values = critic_from_reward_model(make_lm(), reward_model)(tokens)[1]
    assert_close(values[:, -1], reward_model(tokens, torch.tensor([5, 5])), atol=1e-12)


def test_critic_from_reward_model_refuses_a_lower_bound():
    with pytest.raises(UserError, match=r"--critic: is an ensemble with a lcb_coef of 0.5, a crit"):
        critic_from_reward_model(make_lm(), make_ensemble(2, 0.5))
