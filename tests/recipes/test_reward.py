"""Reward training: the loss by hand, and a run that is the same however it is cut."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from minirlhf.batches.preferences import bootstrap_weights, collate_pairs
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.recipes.reward import reward
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.settings import validate
from minirlhf.setup.common import named_files
from minirlhf.setup.reward_settings import RewardConfig
from tests.tiny_folders import rebuilt_at_each_step
from tests.tiny_reward import (
    LISTS,
    PAIRS,
    V,
    config_of,
    pair,
    scored_by_last_token,
    state_of,
    tiny_model,
    weights,
)

# ---- training ------------------------------------------------------------------------------------


def test_first_loss_by_hand_with_a_zero_head():
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    step = next(reward(state_of(model), PAIRS, config_of(batch_size=5)))
    # all scores are 0: mean of -log sigmoid(-margin) = log(1 + e^margin) over .5, 0, 1.5, .25, 0
    expected = sum(math.log1p(math.exp(m)) for m in (0.5, 0.0, 1.5, 0.25, 0.0)) / 5
    assert step.metrics["loss"] == pytest.approx(expected, rel=0, abs=1e-12)
    assert step.metrics["accuracy"] == 0.0 and step.metrics["ties"] == 1.0
    assert step.metrics["num_tokens"] == 37  # (5 + 2 + 2 + 4 + 3) + (3 + 3 + 8 + 4 + 3)
    assert step.number == 1 and step.samples == []


def test_margins_reach_the_pairs_they_belong_to():
    """Rows are shuffled, sorted and cut: each pair's gradient must still see its own margin."""
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    seen = {}

    def watch(pairs):
        batch = collate_pairs(pairs)
        seen.update(zip((p.where for p in pairs), batch.margin.tolist(), strict=True))
        return batch

    list(reward(state_of(model), PAIRS, config_of(micro_batch_tokens=16), collate=watch))
    assert seen == {"t:1": 0.5, "t:2": 0.0, "t:3": 1.5, "t:4": 0.25, "t:5": 0.0}


class HingeBatch(NamedTuple):
    """Nothing but what the README says that a batch needs."""

    tokens: Tensor
    lengths: Tensor

    def loss(self, scores, label_smoothing=0.0, center=0.0):
        chosen, rejected = scores.chunk(2)
        return (1 - chosen + rejected).clamp(min=0)

    def split(self, scores):
        return list(torch.stack(scores.chunk(2), 1))


def test_a_batch_of_four_members_is_enough_to_train_and_to_evaluate():
    def hinge(pairs):
        return HingeBatch(*collate_pairs(pairs)[:2])

    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    result = evaluate_preferences(model, PAIRS, collate=hinge)
    assert result.metrics["loss"] == 1  # all scores are 0
    step = next(reward(state_of(model), PAIRS, config_of(batch_size=5), collate=hinge))
    assert step.metrics["loss"] == 1 and step.metrics["grad_norm"] > 0


def test_centre_term_enters_the_training_loss():
    losses = [
        next(reward(state_of(scored_by_last_token(tiny_model())), PAIRS, config)).metrics["loss"]
        for config in (
            config_of(batch_size=5), config_of(batch_size=5, center_rewards_coefficient=0.01)
        )
    ]
    # sums of both scores: 5 + 6, 8 + 1, 4 + 1, 1 + 2, 7 + 5
    extra = 0.01 * (11**2 + 9**2 + 5**2 + 3**2 + 12**2) / 5
    assert losses[1] - losses[0] == pytest.approx(extra, rel=0, abs=1e-12)


def random_pairs() -> list:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(1, V, (8, 2, 4), generator=rng).tolist()
    return [pair([1], chosen, rejected) for chosen, rejected in rows]


@pytest.mark.parametrize("examples", [random_pairs(), LISTS], ids=["pairs", "lists"])
def test_training_learns_by_heart(examples):
    model = tiny_model()
    before = evaluate_preferences(model, examples).metrics
    config = config_of(batch_size=len(examples), steps=40, learning_rate=0.03)
    steps = list(reward(state_of(model), examples, config))
    after = evaluate_preferences(model, examples).metrics
    assert before["accuracy"] < 1 and before["loss"] > 0.5
    assert after["accuracy"] == after.get("top1", 1.0) == 1.0 and after["loss"] < 0.1
    assert steps[-1].metrics["loss"] < 0.1
    assert [step.number for step in steps] == list(range(1, 41))


def test_each_pair_counts_once_an_epoch_and_the_rate_falls_to_its_end():
    seen = []

    def watch(pairs):
        seen.extend(p.where for p in pairs)
        return collate_pairs(pairs)

    model = tiny_model()
    state = state_of(model)
    steps = list(reward(state, PAIRS, config_of(epochs=2.0), collate=watch))
    names = sorted(p.where for p in PAIRS)
    assert sorted(seen[:5]) == sorted(seen[5:]) == names and seen[:5] != seen[5:]
    # 3 batches an epoch (2, 2 and 1 pairs), 6 steps: the rate falls by a sixth of 0.01 a step
    rates = [step.metrics["learning_rate"] for step in steps]
    assert rates == pytest.approx([0.01 * k / 6 for k in (6, 5, 4, 3, 2, 1)], rel=0, abs=1e-15)
    assert [step.metrics["epoch"] for step in steps] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]
    assert (state.step, state.samples) == (6, 10)


def test_custom_collate_decides_what_the_model_sees():
    def two_tokens(pairs):
        short = [pair([], p.chosen_ids[:1], p.rejected_ids[:1], p.margin) for p in pairs]
        return collate_pairs(short)

    model = scored_by_last_token(tiny_model())
    assert evaluate_preferences(model, PAIRS, collate=two_tokens).chosen.tolist() == [3, 7, 4, 1, 8]
    # in training: the same, 2 pairs in the first micro-batch of all
    step = next(reward(state_of(model), PAIRS, config_of(batch_size=5), collate=two_tokens))
    assert step.metrics["max_reward"] == 9.0 and step.metrics["min_reward"] == 1.0


def hinge(chosen, rejected, margin, probability, label_smoothing):
    return torch.relu(1 + margin - (chosen - rejected))


def test_pair_loss_is_the_one_that_is_learned_from_by_hand():
    # The last token's id is the score (see tiny_reward), so hinge is 0 where chosen is 1 + margin
    # above rejected, and else 1 + margin - (chosen - rejected).
    model = scored_by_last_token(tiny_model())
    expected = 0.0
    for p in PAIRS:
        gap = p.chosen_ids[-1] - p.rejected_ids[-1]
        expected += max(0.0, 1 + p.margin - gap) / len(PAIRS)
    step = next(reward(state_of(model), PAIRS, config_of(batch_size=5), pair_loss=hinge))
    assert step.metrics["loss"] == pytest.approx(expected, abs=1e-6)


def test_pair_loss_must_give_a_loss_a_pair_and_goes_with_no_collate():
    state, config = state_of(tiny_model()), config_of(batch_size=5)
    wrong = reward(state, PAIRS, config, pair_loss=lambda chosen, *_: chosen.mean())
    with pytest.raises(ValueError, match=r"pair_loss is \(\), chosen is \(5,\)"):
        next(wrong)
    with pytest.raises(ValueError, match="pair_loss and collate: give one"):
        next(reward(state, PAIRS, config, pair_loss=hinge, collate=collate_pairs))
    with pytest.raises(ValueError, match="plackett-luce is no loss of pairs"):
        next(reward(state, LISTS, config, pair_loss=hinge))


# ---- lists, soft labels, ensembles ---------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("examples", [PAIRS, LISTS], ids=["pairs", "lists"])
def test_a_step_is_the_same_for_any_micro_batch(examples, heads):
    made = []
    for tokens in (1, 24, 4096):
        model = tiny_model(heads=heads)
        config = config_of(
            batch_size=5, micro_batch_tokens=tokens, center_rewards_coefficient=0.01, steps=1
        )
        (step,) = reward(state_of(model), examples, config)
        made.append((step.metrics, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for metrics, parameters in made[:-1]:
        assert metrics == pytest.approx(made[-1][0], rel=0, abs=1e-9)
        torch.testing.assert_close(parameters, made[-1][1], rtol=0, atol=1e-6)


def test_first_loss_of_lists_by_hand_with_a_zero_head():
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    step = next(reward(state_of(model), LISTS, config_of(batch_size=3)))
    # all weights 1: 4! orders; one of three; one of two
    expected = (math.log(24) + math.log(3) + math.log(2)) / 3
    assert step.metrics["loss"] == pytest.approx(expected, rel=0, abs=1e-12)
    assert (step.metrics["top1"], step.metrics["ties"]) == (0.0, 1.0)
    assert step.metrics["num_tokens"] == 10 + 7 + 6 and step.number == 1


def test_first_loss_knows_soft_labels_and_smoothing():
    pairs = [replace(p, margin=0.0, chosen_probability=q) for p, q in
             zip(PAIRS[:3], (1.0, 0.5, 0.0), strict=True)]
    state = state_of(scored_by_last_token(tiny_model()))  # scores (5, 6) (8, 1) (4, 1)
    config = config_of(batch_size=3, label_smoothing=0.25)
    loss = next(reward(state, pairs, config)).metrics["loss"]
    labels = ((-1, 0.75), (7, 0.5), (3, 0.25))
    terms = [q * math.log1p(math.exp(-d)) + (1 - q) * math.log1p(math.exp(d)) for d, q in labels]
    assert loss == pytest.approx(sum(terms) / 3, rel=0, abs=1e-9)


def test_each_head_learns_from_its_own_bootstrap_of_the_rows():
    """d loss / d w_h = sum_n weight[n, h] / (N H) d loss_n / d w_h, by a model of one head each."""
    model = tiny_model(heads=3)
    config, N = config_of(batch_size=5, steps=1, max_grad_norm=None, seed=4), len(PAIRS)
    weights = bootstrap_weights(4, torch.arange(N), 3)
    assert weights.unique().numel() > 2
    state, grads = state_of(model), {}
    state.optimizer.register_step_pre_hook(
        lambda *_: grads.update(score=model.score.weight.grad.clone())
    )
    (step,) = reward(state, PAIRS, config)
    total = 0.0
    for h in range(3):
        alone = tiny_model(heads=3)
        for n, p in enumerate(PAIRS):
            batch = collate_pairs([p])
            loss = batch.loss(alone.head_scores(batch.tokens, batch.lengths)[:, h]).sum()
            (loss * float(weights[n, h]) / (N * 3)).backward()
            total += float(loss.detach()) * float(weights[n, h]) / (N * 3)
        expected = alone.score.weight.grad
        torch.testing.assert_close(grads["score"][h], expected[h], rtol=0, atol=1e-9)
    assert step.metrics["loss"] == pytest.approx(total, rel=0, abs=1e-9)


def test_reward_refuses_no_pairs():
    with pytest.raises(ValueError, match="examples is empty: give at least one"):
        next(reward(state_of(tiny_model()), [], config_of()))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows():
    model = tiny_model()
    model.score.weight.data[0, 0] = math.nan
    before, state = weights(model), state_of(model)
    with pytest.raises(UserError, match=r"^step 1 \(t:\d, t:\d\): loss: is nan") as error:
        next(reward(state, PAIRS, config_of()))
    assert error.value.code == NON_FINITE
    assert weights(model) == before and state.step == 0 and not state.optimizer.state


def test_scores_that_overflow_stop_the_run_though_the_loss_is_finite():
    model = tiny_model()
    model.head_scores = lambda tokens, lengths, dropout: torch.full(
        (len(lengths), 1), math.inf, dtype=torch.float64
    ).where(torch.arange(len(lengths))[:, None] < len(lengths) // 2, model.score.weight.sum())
    with pytest.raises(UserError, match=r"^step 1: margin: is inf"):
        next(reward(state_of(model), PAIRS, config_of()))


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("examples", [PAIRS, LISTS], ids=["pairs", "lists"])
def test_generator_rebuilt_at_every_yield_goes_on_bit_for_bit(examples, heads, tmp_path):
    config = config_of(epochs=2.0, center_rewards_coefficient=0.01)

    def fresh() -> TrainState:
        model = tiny_model(torch.float32, heads=heads, lcb_coef=0.5 if heads > 1 else 0.0)
        return TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))

    def steps_of(state):
        return reward(state, examples, config)

    whole = fresh()
    expected = [step.metrics for step in steps_of(whole)]
    steps, state = rebuilt_at_each_step(fresh, steps_of, tmp_path)
    assert [step.metrics for step in steps] == expected
    assert weights(state.model) == weights(whole.model)
    assert state.meters.as_dict() == whole.meters.as_dict()
    assert state.counters == whole.counters and state.samples == whole.samples == 2 * len(examples)


def test_a_log_window_weighs_steps_by_their_pairs():
    state = state_of(tiny_model())
    steps = list(reward(state, PAIRS, config_of(batch_size=2, epochs=1.0)))
    losses = [step.metrics["loss"] for step in steps]
    assert len(losses) == 3  # of 2, 2 and 1 pairs
    assert state.meters.flush()["loss"] == pytest.approx(
        (2 * losses[0] + 2 * losses[1] + losses[2]) / 5, abs=1e-9
    )


def test_named_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=name.jsonl").touch()
    assert named_files(("a.jsonl",)) == {"eval_": "a.jsonl"}
    assert named_files(("short=a.jsonl", "long=b=c.jsonl", "odd=name.jsonl")) == {
        "eval_short_": "a.jsonl", "eval_long_": "b=c.jsonl", "eval_": "odd=name.jsonl",
    }
    with pytest.raises(UserError, match="two sets are called 'eval': name each"):
        named_files(("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match="two sets are called 'x'"):
        named_files(("x=a.jsonl", "x=b.jsonl"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lcb_coef": 0.5}, r"^lcb_coef: got 0.5, must be 0 for a single head"),
        ({"lcb_coef": 0.5, "heads": 2}, r"^lcb_coef: got 0.5, heads that share no zero "),
        ({"normalize": "eval"}, r"^normalize: got 'eval', there is no eval_data: give it, or"),
    ],
)
def test_config_refuses(changes, match):
    with pytest.raises(UserError, match=match):
        validate(RewardConfig(**changes))


def test_config_takes_a_lower_bound_of_heads_that_share_a_zero():
    changes = {"lcb_coef": 0.5, "heads": 2, "center_rewards_coefficient": 0.01}
    assert validate(RewardConfig(**changes, normalize="eval", eval_data=("e",))) is None
