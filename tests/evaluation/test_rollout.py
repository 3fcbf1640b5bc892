"""Statistics of a rollout by hand: two rows, three response tokens, NaN wherever none counts."""

import math

import pytest
import torch
from torch import nan

from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.evaluation.rollout import (
    quantiles,
    rollout_statistics,
    score_statistics,
    text_statistics,
)

T, F, f64 = True, False, torch.float64


def matrix(first: list[float], second: list[float]) -> torch.Tensor:
    return torch.tensor([first, second], dtype=f64)


def hand_buffer(rows_at_once: int) -> RolloutBuffer:
    """Prompts of 1 and 3 tokens, responses of 2 and 1."""
    buffer = RolloutBuffer(rows_at_once, 99)
    buffer.add(Rollout(
        rows=torch.arange(2),
        tokens=torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]),
        prompt_lengths=torch.tensor([1, 3]),
        response_mask=torch.tensor([[T, T], [T, F]]),
        scores=torch.tensor([1.0, -1.0], dtype=f64),
        old_logprobs=matrix([-1.0, -2.0], [-0.5, nan]),
        sampled_logprobs=matrix([-1.001, -1.998], [-0.5, nan]),
        ref_logprobs=matrix([-1.5, -1.0], [-0.7, nan]),
        old_values=matrix([0.2, 0.4], [0.3, nan]),
        returns=matrix([1.0, 2.0], [3.0, nan]),
    ))
    return buffer


EXPECTED = {
    # rows' KL: 0.5 - 1 = -0.5 and 0.2, which lie 0.7 apart
    "objective/kl_p05": -0.5 + 0.05 * 0.7,
    "objective/kl_p50": -0.15,
    "objective/kl_p95": -0.5 + 0.95 * 0.7,
    # exp(-d) - 1 + d for d = 0.5, -1 and 0.2, over two rows
    "objective/kl_k3": (math.exp(-0.5) - 0.5 + math.e - 2 + math.exp(-0.2) - 0.8) / 2,
    "objective/kl_per_token": (0.5 - 1 + 0.2) / 3,
    "objective/logprobs": -3.5 / 3,
    "objective/ref_logprobs": -3.2 / 3,
    "health/logprobs_diff": 0.002,
    "policy/advantages_mean": (6 - 0.9) / 3,
    "val/mean": 0.3,
    "val/var": 0.02 / 3,  # deviations -0.1, 0.1 and 0
    "returns/mean": 2.0,
    "returns/var": 2 / 3,  # deviations -1, 0 and 1
    "prompt_length": 2.0,
    "prompt_length_std": 1.0,
    "response_length": 1.5,
    "response_length_std": 0.5,
    "response_length_p05": 1.05,
    "response_length_p50": 1.5,
    "response_length_p95": 1.95,
}


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_rollout_statistics_by_hand_however_the_rows_are_cut(rows_at_once):
    found = rollout_statistics(hand_buffer(rows_at_once))
    assert found == pytest.approx(EXPECTED, rel=0, abs=1e-9)


def test_rollout_statistics_of_one_token_have_no_spread():
    buffer = hand_buffer(2)
    buffer.micro_batches = [m.select(torch.tensor([1])) for m in buffer.micro_batches]
    found = rollout_statistics(buffer)
    spreads = [v for name, v in found.items() if name.endswith(("_std", "var"))]
    assert spreads == [0.0] * 4
    assert all(math.isfinite(value) for value in found.values())


def test_score_statistics_tell_the_source_from_what_is_learned_from():
    found = score_statistics(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
    assert found == pytest.approx(
        {"reward": 2.0, "reward_std": 1.0, "objective/scores": 0.5, "objective/scores_std": 0.5,
         "objective/scores_p05": 0.05, "objective/scores_p50": 0.5, "objective/scores_p95": 0.95},
        rel=0, abs=1e-9,
    )


def test_text_statistics_by_hand():
    responses = [[5, 0], [5, 0], [5, 6, 7, 8], [9]]
    found = text_statistics(
        responses, ["eos", "eos", "length", "stop"], torch.tensor([1.0, 1.0, 3.0, 3.0])
    )
    # lengths 2, 2, 4, 1 deviate by -.25, -.25, 1.75, -1.25; scores by -1, -1, 1, 1
    r = (0.25 + 0.25 + 1.75 - 1.25) / math.sqrt((2 * 0.0625 + 3.0625 + 1.5625) * 4)
    assert found == pytest.approx(
        {"val/num_eos_tokens": 2, "health/eos_rate": 0.75, "health/truncated_rate": 0.25,
         "health/dup_rate": 0.25, "health/reward_len_corr": r},
        rel=0, abs=1e-9,
    )


def test_quantiles_lie_between_neighbours():
    # of 0 … 20 the p-th lies at 20 p / 100
    values = torch.arange(20, -1, -1, dtype=f64)
    assert quantiles("x", values) == {"x_p05": 1.0, "x_p50": 10.0, "x_p95": 19.0}
