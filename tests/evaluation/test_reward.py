"""Held-out data scored once: metrics by hand, whatever the batching; tables safe for a terminal."""

import math
from dataclasses import replace

import pytest
import torch

from minirlhf.errors import BAD_INPUT, NON_FINITE, UserError
from minirlhf.evaluation.reward import (
    Evaluation,
    calibration_error,
    calibration_table,
    evaluate_preferences,
    pair_rows,
    pair_table,
    score_metrics,
    score_moments,
    top1,
)
from tests.tiny_reward import (
    LISTS,
    PAIRS,
    pair,
    ranking,
    scored_by_last_token,
    tiny_model,
    weights,
)


def test_score_metrics_by_hand():
    # right, tie, wrong, right
    chosen, rejected = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0, -2.0])
    found = score_metrics(chosen, rejected, torch.cat((chosen, rejected)))
    assert found == pytest.approx(
        {
            "accuracy": 0.5, "accuracy_half": 0.625, "ties": 0.25,
            "margin": 0.5,  # (2 + 0 - 4 + 4) / 4
            "margin_std": math.sqrt(8.75),  # (4 + 0 + 16 + 16) / 4 - 0.5^2
            "min_reward": -2.0, "mean_reward": 1.25, "max_reward": 4.0,  # 10 / 8
        }, rel=0, abs=1e-12,
    )


def test_top1_is_won_by_any_of_the_best_that_tie():
    tied = [ranking([1], [[2], [3], [4]], [1, 1, 2])]
    assert top1(tied, [torch.tensor([0.0, 2.0, 1.0])]) == 1.0
    assert top1(tied, [torch.tensor([0.0, 1.0, 1.0])]) == 0.0


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


def test_calibration_table_by_hand():
    log4 = math.log(4)  # confidence 4/5: bin 6 of 10, from 0.8 to 0.85
    chosen = torch.tensor([log4, -log4, 0.0, 99.0], dtype=torch.float64)
    table = calibration_table(chosen, torch.zeros(4, dtype=torch.float64))
    assert len(table) == 10 and [row.pairs for row in table] == [1, 0, 0, 0, 0, 0, 2, 0, 0, 1]
    assert table[0] == (0.5, 0.55, 1, 0.5, 0.5)  # a tie is half right
    assert table[6] == pytest.approx((0.8, 0.85, 2, 0.8, 0.5), rel=0, abs=1e-12)
    assert table[9] == pytest.approx((0.95, 1.0, 1, 1.0, 1.0), rel=0, abs=1e-12)
    assert table[1] == (0.55, 0.6, 0, None, None)


# ---- evaluation ----------------------------------------------------------------------------------


LAST_TOKEN = scored_by_last_token(tiny_model())


def test_evaluate_by_hand():
    # scores are the last ids: (5, 6) (8, 1) (4, 1) (1, 2) (7, 5)
    result = evaluate_preferences(LAST_TOKEN, PAIRS, micro_batch_tokens=20)
    assert result.chosen.tolist() == [5, 8, 4, 1, 7]
    assert result.rejected.tolist() == [6, 1, 1, 2, 5]
    differences = ((-1, 0.5), (7, 0), (3, 1.5), (-1, 0.25), (2, 0))  # and margins
    loss = sum(math.log1p(math.exp(m - d)) for d, m in differences) / 5
    assert result.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert (result.metrics["accuracy"], result.metrics["margin"]) == (0.6, 2.0)
    assert "top1" not in result.metrics
    assert (result.metrics["min_reward"], result.metrics["max_reward"]) == (1.0, 8.0)


def test_evaluate_does_not_depend_on_the_batching_nor_change_the_model():
    model = tiny_model()
    before = weights(model)
    one, many = evaluate_preferences(model, PAIRS, 1), evaluate_preferences(model, PAIRS)
    torch.testing.assert_close(one.chosen, many.chosen, rtol=0, atol=1e-6)
    assert one.metrics == pytest.approx(many.metrics, abs=1e-6)
    assert weights(model) == before and all(p.grad is None for p in model.parameters())


def test_evaluate_refuses_scores_that_are_not_finite():
    model = scored_by_last_token(tiny_model())
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"^evaluation: loss: is nan") as error:
        evaluate_preferences(model, PAIRS)
    assert error.value.code == NON_FINITE


def test_evaluate_adds_ones_own_metrics():
    def by_column(chosen, rejected, pairs):
        hard = torch.tensor([p.columns["hard"] for p in pairs])
        return {"hard_accuracy": float((chosen > rejected)[hard].double().mean())}

    pairs = [pair([], [i], [4], hard=i > 3) for i in range(1, 7)]
    result = evaluate_preferences(LAST_TOKEN, pairs, metrics=by_column)
    assert result.metrics["hard_accuracy"] == pytest.approx(2 / 3)  # 4 ties, 5 and 6 win
    assert result.metrics["accuracy"] == pytest.approx(2 / 6)


RESULT = Evaluation(
    {}, PAIRS[:3], torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]), torch.zeros(6),
    torch.ones(6),
)


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (2, 2), (3, 3), (9, 3), (-1, 3)])
def test_pair_rows_are_as_many_as_asked_and_minus_one_is_all(count, shown):
    assert len(pair_rows(RESULT, None, count)) == shown


def test_pair_rows_by_hand():
    row = pair_rows(RESULT, None, 1)[0]
    assert row == {
        "prompt": [1, 2], "chosen": [3, 4, 5], "rejected": [6], "margin": 0.5,
        "chosen_score": 2.0, "rejected_score": 2.0, "probability": 0.5,
        "chosen_tokens": 5, "rejected_tokens": 3,
    }


def test_pair_table_is_one_line_a_pair_and_safe_for_a_terminal():
    rows = pair_rows(RESULT, None, 2)
    rows[0]["chosen"] = "\x1b[31mred\n" + "x" * 99
    lines = pair_table(rows).split("\n")
    assert len(lines) == 3 and "\x1b" not in lines[1]
    row = "[7, 8] [9, 10, 1] 0.000 1.000 0 0.269 2/3"  # 0.269 = sigmoid(-1)
    assert lines[2].split() == row.split()


def test_evaluate_lists_by_hand():
    # last ids: 9 5 3 2 in order; 2 chosen before 8 and 6; 7 6
    result = evaluate_preferences(LAST_TOKEN, LISTS, micro_batch_tokens=9)
    assert result.scores.tolist() == [9, 5, 3, 2, 2, 8, 6, 7, 6]
    assert result.lengths.tolist() == [2, 3, 2, 3, 3, 2, 2, 4, 2]
    assert result.chosen.tolist() == [9, 9, 9, 5, 5, 3, 2, 2, 7]
    assert result.rejected.tolist() == [5, 3, 2, 3, 2, 2, 8, 6, 6]
    assert [p.where for p in result.pairs] == ["t:1"] * 6 + ["t:2"] * 2 + ["t:3"]
    assert result.metrics["accuracy"] == pytest.approx(7 / 9, rel=0, abs=1e-12)
    assert result.metrics["top1"] == pytest.approx(2 / 3, rel=0, abs=1e-12)
    assert result.metrics["mean_reward"] == pytest.approx(48 / 9, rel=0, abs=1e-12)  # a text once

    def factor(best, *others):
        return math.log(sum(math.exp(s - best) for s in (best, *others)))

    losses = [factor(9, 5, 3, 2) + factor(5, 3, 2) + factor(3, 2), factor(2, 8, 6), factor(7, 6)]
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_evaluate_loss_knows_soft_labels():
    pairs = [pair([1], [3], [2]) for _ in range(2)]
    pairs[1] = replace(pairs[1], chosen_probability=0.25)
    loss = evaluate_preferences(LAST_TOKEN, pairs).metrics["loss"]
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert loss == pytest.approx((right + 0.25 * right + 0.75 * wrong) / 2, abs=1e-6)


def test_evaluate_scores_by_the_lower_bound_and_what_normalises_it():
    model = tiny_model(torch.float32, heads=3, lcb_coef=0.7)
    before = evaluate_preferences(model, PAIRS)
    model.reward_mean, model.reward_std = 2.0, 4.0
    after = evaluate_preferences(model, PAIRS)
    torch.testing.assert_close(after.scores, (before.scores - 2) / 4)
    assert after.metrics["accuracy"] == before.metrics["accuracy"]


def test_score_moments_by_hand_and_of_scores_that_are_all_alike():
    # 5 6 8 1 4 1 1 2 7 5: sum 40, squares 222
    found = score_moments(LAST_TOKEN, [PAIRS], 4096, "--normalize")
    assert found == pytest.approx((4.0, math.sqrt(22.2 - 16)), rel=0, abs=1e-9)
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    match = r"^--normalize: all 10 scores are 0: such a model prefers nothing"
    with pytest.raises(UserError, match=match) as error:
        score_moments(model, [PAIRS], 4096, "--normalize")
    assert error.value.code == BAD_INPUT
