"""Reward training: the loss by hand, and a run that is the same however it is cut."""

import math

import pytest
import torch

from minirlhf.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.config import validate
from minirlhf.data import Pair
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.heads import RewardModel, initialize_score
from minirlhf.hf_config import config_from_hf
from minirlhf.recipes.reward import (
    Evaluation,
    RewardConfig,
    calibration_error,
    collate_pairs,
    evaluate,
    named_files,
    pair_loss,
    pair_scores,
    reward,
    sample_rows,
    sample_table,
    score_metrics,
    total_steps,
    without_eos,
)
from minirlhf.transformer import CausalLM, initialize

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48,
}  # fmt: skip
V = 11


def pair(prompt, chosen, rejected, margin=0.0, where="t:1", **columns) -> Pair:
    return Pair(prompt, chosen, rejected, margin, where, columns)


PAIRS = [
    pair([1, 2], [3, 4, 5], [6], 0.5, "t:1"),
    pair([], [7, 8], [9, 10, 1], 0.0, "t:2"),
    pair([3], [4], [5, 6, 7, 8, 9, 10, 1], 1.5, "t:3"),
    pair([2, 2, 2], [1], [2], 0.25, "t:4"),
    pair([9], [8, 7], [6, 5], 0.0, "t:5"),
]


def tiny_model(dtype=torch.float64, **changes) -> RewardModel:
    config = config_from_hf({**TINY, "vocab_size": V, **changes})
    rng = torch.Generator().manual_seed(0)
    return initialize_score(RewardModel(initialize(CausalLM(config), rng)), rng).to(dtype)


def config_of(**changes) -> RewardConfig:
    return RewardConfig(**{"batch_size": 2, "learning_rate": 0.01, **changes})


def state_of(model: RewardModel) -> TrainState:
    return TrainState(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0))


def weights(model) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


def scored_by_last_token(model: RewardModel) -> RewardModel:
    """A stand-in whose score is the id of a row's last token, so that scores can be read off."""

    def last_ids(tokens, lengths):
        ids = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        return ids + 0 * model.score.weight.sum()  # with a gradient, of 0

    model.forward = last_ids
    return model


# ---- batches and loss ----------------------------------------------------------------------------


def test_collate_pairs_by_hand():
    batch = collate_pairs(PAIRS[:2])
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 6, 0, 0], [9, 10, 1, 0, 0],
    ]  # fmt: skip
    assert batch.lengths.tolist() == [5, 2, 3, 3]
    assert batch.margin.tolist() == [0.5, 0.0]


def test_pair_scores_splits_chosen_and_rejected():
    chosen, rejected = pair_scores(scored_by_last_token(tiny_model()), collate_pairs(PAIRS[:3]))
    assert chosen.tolist() == [5, 8, 4] and rejected.tolist() == [6, 1, 1]


def test_pair_scores_are_those_of_each_text_alone():
    model = tiny_model()
    chosen, rejected = pair_scores(model, collate_pairs(PAIRS))
    for i, p in enumerate(PAIRS):
        for scores, answer in ((chosen, p.chosen_ids), (rejected, p.rejected_ids)):
            ids = p.prompt_ids + answer
            alone = model(torch.tensor([ids]), torch.tensor([len(ids)]))
            torch.testing.assert_close(scores[i : i + 1], alone, rtol=0, atol=1e-12)


def test_pair_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0])
    margin = torch.tensor([1.0, 2.0])
    # -log sigmoid(2 - 1 - 1) = -log sigmoid(1 + 1 - 2) = log 2; 0.5 (2 + 1)^2 = 4.5, (1 - 1)^2 = 0
    expected = torch.tensor([math.log(2) + 4.5, math.log(2)])
    torch.testing.assert_close(pair_loss(chosen, rejected, margin, 0.5), expected)


def test_pair_loss_centre_term_is_zero_only_where_scores_are_opposite():
    chosen, rejected = torch.tensor([3.0, 3.0, 0.0, -2.0]), torch.tensor([-3.0, 3.0, 0.0, 2.5])
    extra = pair_loss(chosen, rejected, torch.zeros(4), 1.0)
    extra -= pair_loss(chosen, rejected, torch.zeros(4), 0.0)
    expected = torch.tensor([0.0, 36.0, 0.0, 0.25])  # 0^2, 6^2, 0^2, (1/2)^2
    torch.testing.assert_close(extra, expected, rtol=0, atol=1e-5)


def test_score_metrics_by_hand():
    # right, tie, wrong, right
    chosen, rejected = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0, -2.0])
    assert score_metrics(chosen, rejected) == pytest.approx(
        {
            "accuracy": 0.5, "accuracy_half": 0.625, "ties": 0.25,
            "margin": 0.5,  # (2 + 0 - 4 + 4) / 4
            "margin_std": math.sqrt(8.75),  # (4 + 0 + 16 + 16) / 4 - 0.5^2
            "min_reward": -2.0, "mean_reward": 1.25, "max_reward": 4.0,  # 10 / 8
        }, rel=0, abs=1e-12,
    )  # fmt: skip


def test_calibration_error_by_hand():
    def error(*differences: float) -> float:
        chosen = torch.tensor(differences, dtype=torch.float64)
        return calibration_error(chosen, torch.zeros_like(chosen))

    log4 = math.log(4)  # P(chosen) = 4/5 at a difference of log 4
    cases = [
        (error(log4, log4, log4, log4, -log4), 0.0),  # four of five right at confidence 4/5
        (error(log4, log4), 0.2),  # all right at 4/5
        (error(-log4, -log4), 0.8),  # all wrong at 4/5
        (error(log4, -99.0), (0.2 + 1.0) / 2),  # in two bins: they do not cancel
        (error(log4, -log4), 0.3),  # in one bin: half right at 4/5
        (error(0.0, 0.0), 0.0),  # ties: half right at 1/2
    ]
    for found, expected in cases:
        assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_total_steps():
    of = {"batch_size": 4}
    assert total_steps(config_of(**of), 40) == 10
    assert total_steps(config_of(**of), 41) == 11
    assert total_steps(config_of(epochs=2.5, **of), 40) == 25
    assert total_steps(config_of(epochs=1.1, **of), 40) == 11  # 1.1 * 10 is above 11 in binary
    assert total_steps(config_of(epochs=0.01, **of), 40) == 1
    assert total_steps(config_of(epochs=3.0, steps=7, **of), 40) == 7


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


def test_first_loss_is_about_log_2():
    rows = torch.randint(0, V, (64, 2, 3), generator=torch.Generator().manual_seed(2)).tolist()
    pairs = [pair([1], chosen, rejected, margin=0.01) for chosen, rejected in rows]
    step = next(reward(state_of(tiny_model()), pairs, config_of(batch_size=64)))
    assert step.metrics["loss"] == pytest.approx(math.log(2), abs=0.25)  # scores differ by about 1


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


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_a_step_is_the_same_for_any_micro_batch(center):
    made = []
    for tokens in (1, 24, 4096):
        model = tiny_model()
        config = config_of(
            batch_size=5, micro_batch_tokens=tokens, center_rewards_coefficient=center, steps=1
        )
        (step,) = reward(state_of(model), PAIRS, config)
        made.append((step.metrics, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for metrics, parameters in made[:-1]:
        assert metrics == pytest.approx(made[-1][0], rel=0, abs=1e-9)
        torch.testing.assert_close(parameters, made[-1][1], rtol=0, atol=1e-6)


def test_centre_term_enters_the_training_loss():
    losses = [
        next(reward(state_of(scored_by_last_token(tiny_model())), PAIRS, config)).metrics["loss"]
        for config in (
            config_of(batch_size=5), config_of(batch_size=5, center_rewards_coefficient=0.01)
        )
    ]  # fmt: skip
    # sums of both scores: 5 + 6, 8 + 1, 4 + 1, 1 + 2, 7 + 5
    extra = 0.01 * (11**2 + 9**2 + 5**2 + 3**2 + 12**2) / 5
    assert losses[1] - losses[0] == pytest.approx(extra, rel=0, abs=1e-12)


def test_training_learns_pairs_by_heart():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(1, V, (8, 2, 4), generator=rng).tolist()
    pairs = [pair([1], chosen, rejected) for chosen, rejected in rows]
    model = tiny_model()
    before = evaluate(model, pairs).metrics
    config = config_of(batch_size=8, steps=40, learning_rate=0.03)
    steps = list(reward(state_of(model), pairs, config))
    after = evaluate(model, pairs).metrics
    assert before["accuracy"] < 1 and before["loss"] > 0.5
    assert after["accuracy"] == 1.0 and after["loss"] < 0.05
    assert steps[-1].metrics["loss"] < 0.05 and state_counts(steps) == list(range(1, 41))


def state_counts(steps) -> list[int]:
    return [step.number for step in steps]


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
    assert evaluate(model, PAIRS, collate=two_tokens).chosen.tolist() == [3, 7, 4, 1, 8]


def test_reward_refuses_no_pairs():
    with pytest.raises(ValueError, match="pairs is empty: give at least one"):
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
    model.forward = lambda tokens, lengths: torch.full(
        lengths.shape, math.inf, dtype=torch.float64
    ).where(torch.arange(len(lengths)) < len(lengths) // 2, model.score.weight.sum())
    with pytest.raises(UserError, match=r"^step 1: margin: is inf"):
        next(reward(state_of(model), PAIRS, config_of()))


def test_gradients_that_others_left_do_not_count():
    made = []
    for left in (None, 7.0):
        model = tiny_model()
        for parameter in model.parameters():
            parameter.grad = None if left is None else torch.full_like(parameter, left)
        next(reward(state_of(model), PAIRS, config_of()))
        made.append(weights(model))
    assert made[0] == made[1]


# ---- resume --------------------------------------------------------------------------------------


def test_generator_rebuilt_at_every_yield_goes_on_bit_for_bit(tmp_path):
    config = config_of(epochs=2.0, center_rewards_coefficient=0.01)

    def fresh() -> TrainState:
        model = tiny_model(torch.float32)
        return TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))

    whole = fresh()
    expected = [step.metrics for step in reward(whole, PAIRS, config)]
    state, seen = fresh(), []
    while step := next(reward(state, PAIRS, config), None):
        seen.append(step.metrics)
        commit = save_checkpoint(state, tmp_path)
        state = fresh()
        for parameter in state.model.parameters():
            parameter.data.fill_(9.0)  # nothing but the checkpoint may matter
        load_checkpoint(state, commit)
    assert seen == expected
    assert weights(state.model) == weights(whole.model)
    assert state.meters.as_dict() == whole.meters.as_dict()
    assert state.counters == whole.counters and state.samples == whole.samples == 10


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluate_by_hand():
    # scores are the last ids: (5, 6) (8, 1) (4, 1) (1, 2) (7, 5)
    result = evaluate(scored_by_last_token(tiny_model()), PAIRS, micro_batch_tokens=20)
    assert result.chosen.tolist() == [5, 8, 4, 1, 7]
    assert result.rejected.tolist() == [6, 1, 1, 2, 5]
    differences = ((-1, 0.5), (7, 0), (3, 1.5), (-1, 0.25), (2, 0))  # and margins
    loss = sum(math.log1p(math.exp(m - d)) for d, m in differences) / 5
    assert result.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert (result.metrics["accuracy"], result.metrics["margin"]) == (0.6, 2.0)
    assert (result.metrics["min_reward"], result.metrics["max_reward"]) == (1.0, 8.0)


def test_evaluate_does_not_depend_on_the_batching_nor_change_the_model():
    model = tiny_model()
    before = weights(model)
    one, many = evaluate(model, PAIRS, 1), evaluate(model, PAIRS)
    torch.testing.assert_close(one.chosen, many.chosen, rtol=0, atol=1e-6)
    assert one.metrics == pytest.approx(many.metrics, abs=1e-6)
    assert weights(model) == before and all(p.grad is None for p in model.parameters())


def test_evaluate_refuses_scores_that_are_not_finite():
    model = scored_by_last_token(tiny_model())
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"^evaluation: loss: is nan") as error:
        evaluate(model, PAIRS)
    assert error.value.code == NON_FINITE


def test_evaluate_adds_ones_own_metrics():
    def by_column(chosen, rejected, pairs):
        hard = torch.tensor([p.columns["hard"] for p in pairs])
        return {"hard_accuracy": float((chosen > rejected)[hard].double().mean())}

    pairs = [pair([], [i], [4], hard=i > 3) for i in range(1, 7)]
    result = evaluate(scored_by_last_token(tiny_model()), pairs, metrics=by_column)
    assert result.metrics["hard_accuracy"] == pytest.approx(2 / 3)  # 4 ties, 5 and 6 win
    assert result.metrics["accuracy"] == pytest.approx(2 / 6)


RESULT = Evaluation({}, torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (2, 2), (3, 3), (9, 3), (-1, 3)])
def test_sample_rows_are_as_many_as_asked_and_minus_one_is_all(count, shown):
    assert len(sample_rows(PAIRS[:3], RESULT, None, count)) == shown


def test_sample_rows_by_hand():
    row = sample_rows(PAIRS[:3], RESULT, None, 1)[0]
    assert row == {
        "prompt": [1, 2], "chosen": [3, 4, 5], "rejected": [6], "margin": 0.5,
        "chosen_score": 2.0, "rejected_score": 2.0, "probability": 0.5,
        "chosen_tokens": 5, "rejected_tokens": 3,
    }  # fmt: skip


def test_sample_table_is_one_line_a_pair_and_safe_for_a_terminal():
    rows = sample_rows(PAIRS[:2], RESULT, None, -1)
    rows[0]["chosen"] = "\x1b[31mred\n" + "x" * 99
    lines = sample_table(rows).split("\n")
    assert len(lines) == 3 and "\x1b" not in lines[1]
    assert lines[2].split() == (
        "[7, 8] [9, 10, 1] 0.000 1.000 0 0.269 2/3".split()  # 0.269 = sigmoid(-1)
    )


def test_named_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=name.jsonl").touch()
    assert named_files(("a.jsonl",)) == {"eval_": "a.jsonl"}
    assert named_files(("short=a.jsonl", "long=b=c.jsonl", "odd=name.jsonl")) == {
        "eval_short_": "a.jsonl", "eval_long_": "b=c.jsonl", "eval_": "odd=name.jsonl",
    }  # fmt: skip
    with pytest.raises(UserError, match="two sets are called 'eval': name each"):
        named_files(("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match="two sets are called 'x'"):
        named_files(("x=a.jsonl", "x=b.jsonl"))


def test_without_eos_by_hand():
    cut = without_eos(pair([1], [2, 0], [0, 3]), (0, 9))
    assert (cut.prompt_ids, cut.chosen_ids, cut.rejected_ids) == ([1], [2], [0, 3])
    assert without_eos(pair([1], [0], [2, 0, 9]), (0, 9)).chosen_ids == []
    with pytest.raises(UserError, match="t:1: a text of nothing but eos: remove the row"):
        without_eos(pair([], [2], [0]), (0,))


def test_config_defaults_are_legal():
    assert validate(RewardConfig()) is None
