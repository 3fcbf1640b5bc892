"""Responses that the length limit cut: left out of the loss, and counted."""

import pytest
import torch

from minirlhf.recipes import grpo as recipe
from tests.recipes.test_grpo import (
    config_of,
    credited,
    hand_step,
    moved_table,
    run_steps,
    table_pass,
)
from tests.tiny_ppo import assert_close, f64, tiny_lm


def cut(buffer, *truncated: bool):
    """The two rows of `credited`, cut or not."""
    of_rows = torch.tensor(truncated)
    buffer.map(lambda micro: micro._replace(truncated=of_rows[micro.rows]))
    return buffer


# As in test_grpo_step_by_hand: losses -1.2, -1 of the first row and 0.8 of the second, which is
# cut; the one token with a gradient has 2 · 0.5.
@pytest.mark.parametrize(
    ("mean", "weight", "loss"),
    [("token", 1 / 2, -2.2 / 2), ("sequence", 1 / 2, -2.2 / 2), ("fixed", 1 / 6, -2.2 / 6)],
)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_cut_response_has_no_part_in_the_loss_by_hand(
    mean, weight, loss, micro_batch_size, monkeypatch
):
    buffer = cut(credited(micro_batch_size=micro_batch_size), False, True)
    moved, stats = hand_step(monkeypatch, buffer, loss_mean=mean, mask_truncated=True)
    assert_close(moved, torch.tensor([[0.0, weight], [0.0, 0.0]], dtype=f64))
    assert stats.loss == pytest.approx(loss)
    # means over what is left: the tokens of the first row, with ratios 1.5 and 0.5
    assert stats.policy_loss == pytest.approx(-2.2 / 2) and stats.entropy == pytest.approx(1.5)
    assert (stats.clip_high, stats.clip_low, stats.ratio) == pytest.approx((1 / 2, 0, 1))


def test_without_the_setting_cut_responses_are_learned_from(monkeypatch):
    plain = hand_step(monkeypatch, credited())
    for truncated in ((False, False), (True, True)):
        moved, stats = hand_step(monkeypatch, cut(credited(), *truncated))
        assert torch.equal(moved, plain[0]) and stats == plain[1]


def test_an_update_whose_responses_were_all_cut_is_left_out_and_counted(monkeypatch):
    buffer, counters = cut(credited(micro_batch_size=1), False, True), {}
    policy = moved_table()
    monkeypatch.setattr(recipe, "lm_pass", table_pass)
    config = config_of(batch_size=1, samples_per_prompt=2, micro_batch_size=1, mini_batches=2,
                       kl_coef=0.0, max_grad_norm=None, mask_truncated=True)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = recipe.grpo_step(policy, optimizer, buffer, config, counters=counters)
    assert counters == {"skipped_truncated": 1} and stats.loss == pytest.approx(-2.2 / 2)
    before = moved_table().logprobs
    assert_close(policy.logprobs - before, torch.tensor([[0.0, 0.5], [0.0, 0.0]], dtype=f64))


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_run_whose_responses_were_all_cut_learns_nothing_and_goes_on(mini_batches):
    lm = tiny_lm()
    config = config_of(mask_truncated=True, mini_batches=mini_batches, max_new_tokens=2,
                       min_new_tokens=2, steps=2)
    steps, state = run_steps(config, lm=lm)  # no response may end before the limit
    assert all(map(torch.equal, lm.parameters(), tiny_lm().parameters()))
    assert state.counters["skipped_truncated"] == 2 * mini_batches
    assert state.counters["masked_responses"] == 2 * 8
    told = {name: steps[-1].metrics[name] for name in ("loss", "grad_norm", "val/ratio", "kl")}
    assert told == {"loss": 0, "grad_norm": 0, "val/ratio": 1, "kl": 0}


def test_a_run_counts_them_and_compares_the_others_with_them():
    config = config_of(mask_truncated=True, advantage="dr_grpo", save_rollouts=True,
                       max_new_tokens=6)
    steps, state = run_steps(config)
    rows = [row for step in steps for row in step.samples]
    reasons = [row["finish_reason"] for row in rows]
    assert 0 < reasons.count("length") < len(reasons)
    assert state.counters["masked_responses"] == reasons.count("length")
    assert steps[-1].metrics["masked_responses"] == reasons.count("length")
    for at in range(0, len(rows), 4):  # a group; its mean is that of all, cut or not
        group = rows[at : at + 4]
        mean = sum(row["score"] for row in group) / 4
        for row in group:
            assert row["advantages"] == pytest.approx([row["score"] - mean] * len(
                row["response_ids"]))
