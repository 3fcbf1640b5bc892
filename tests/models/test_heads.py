import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.models.alignment import response_states, response_tokens
from minirlhf.models.heads import (
    RewardModel,
    ValueHeadModel,
    critic_from_reward_model,
    initialize_score,
    normalize_scores,
)
from minirlhf.models.logprobs import token_logprobs, widened
from tests.tiny_states import assert_close, f64, make_lm, targets

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


def test_response_tokens_by_hand():
    # Row 0: prompt of 2, so its response begins at index 2; behind a row's end its last id again.
    ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert response_tokens(ids, torch.tensor([2, 3]), 2).tolist() == [[12, 13], [23, 23]]


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


def test_critic_from_reward_model_values_a_state_at_the_score_of_the_text_so_far():
    reward_model, lm, tokens = make_reward(f64), make_lm(), targets(2, 5)
    policy = critic_from_reward_model(lm, reward_model)
    hidden, values = policy(tokens)
    assert torch.equal(hidden, lm(tokens))
    for length in range(1, 6):
        scores = reward_model(tokens, torch.tensor([length, length]))
        assert_close(values[:, length - 1], scores, atol=1e-12)
    policy(tokens)[1].sum().backward()
    assert policy.v_head.weight.grad is not None and policy.critic.norm.weight.grad is not None
    assert all(p.grad is None for p in policy.lm.parameters())
    assert policy.critic is reward_model.model  # not a copy
    assert reward_model.score.weight.grad is None


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
    with pytest.raises(ValueError, match="a row's length is 5, tokens has 3 columns"):
        make_reward()(targets(2, 3), torch.tensor([5, 1]))


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


@pytest.mark.parametrize("count", [1, 3])
def test_initialize_score_refuses_another_number_of_generators(count):
    model = RewardModel(make_lm(), heads=2)
    before = model.score.weight.clone()
    with pytest.raises(ValueError, match=f"rngs are {count}, heads are 2: give one generator each"):
        initialize_score(model, *[torch.Generator()] * count)
    assert torch.equal(model.score.weight, before)


@pytest.mark.parametrize(("heads", "lcb_coef"), [(1, 0.0), (3, 0.75)])
@torch.no_grad()
def test_normalize_scores_shifts_and_scales_what_the_model_says(heads, lcb_coef):
    model, tokens, lengths = (
        make_ensemble(heads, lcb_coef), targets(4, 6), torch.tensor([1, 4, 6, 2])
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
    with pytest.raises(UserError, match=r"critic: is an ensemble with a lcb_coef of 0.5, a crit"):
        critic_from_reward_model(make_lm(), make_ensemble(2, 0.5))
