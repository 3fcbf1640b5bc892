"""Statistics of groups, by hand."""

import pytest
import torch

from minirlhf.batches.collect import gather
from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.evaluation.groups import kl_statistics, length_statistics, reward_statistics
from minirlhf.rewards.source import Completions, Scores, joined_scores

nan = torch.nan


def test_reward_statistics_by_hand():
    # groups (1, 3), (2, 2) and (0, 4): sample stds sqrt(2), 0 and sqrt(8)
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 4.0])
    drawn = Scores(scores, {"a": torch.tensor([1.0, nan, 3.0, nan, nan, nan])})
    found = reward_statistics(drawn, scores, 2)
    assert found == pytest.approx({
        "reward": 2.0, "reward_std": (2**0.5 + 8**0.5) / 3, "frac_reward_zero_std": 1 / 3,
        "rewards/a/mean": 2.0, "rewards/a/std": 1.0,
    })
    assert reward_statistics(Scores(scores, {}), scores, 1) == {"reward": 2.0}


def test_length_statistics_by_hand():
    found = length_statistics([2, 6, 4, 6], ["eos", "length", "stop", "length"])
    assert found == {
        "completions/mean_length": 4.5, "completions/min_length": 2, "completions/max_length": 6,
        "completions/mean_terminated_length": 3, "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 4, "completions/clipped_ratio": 0.5,
    }
    assert "completions/mean_terminated_length" not in length_statistics([6], ["length"])


def test_kl_statistics_by_hand():
    buffer = RolloutBuffer(2, 99)
    buffer.add(Rollout(
        rows=torch.arange(2), tokens=torch.tensor([[1, 2, 3], [4, 5, 0]]),
        prompt_lengths=torch.tensor([1, 1]),
        response_mask=torch.tensor([[True, True], [True, False]]), scores=torch.zeros(2),
        old_logprobs=torch.tensor([[-1.0, -2.0], [-0.5, nan]]),
    ))
    assert kl_statistics(buffer) == {}
    ref = torch.tensor([[-2.0, -2.0], [-0.5, nan]])
    buffer.map(lambda micro: micro._replace(ref_logprobs=ref[micro.rows]))
    # d is 1 at one token of three: k3 e^-1 - 1 + 1 there; k1 a response, of two
    assert kl_statistics(buffer) == pytest.approx({"kl": 0.36787944 / 3, "objective/kl": 0.5})


def test_scores_of_batches_are_joined_with_nan_for_what_one_lacks():
    one = Scores(torch.tensor([1.0, 2.0]), {"a": torch.tensor([1.0, 2.0])},
                 logged={"x": torch.tensor([5.0, 6.0])})
    tokens = Scores(torch.tensor([1.0]), {"b": torch.tensor([4.0])}, [[1.0, 2.0]])
    found = joined_scores([one, tokens])
    assert found.sums.tolist() == [1, 2, 4] and found.token_rewards is None
    assert found.metrics() == {
        "rewards/a/mean": 1.5, "rewards/a/std": 0.5, "rewards/b/mean": 4, "rewards/b/std": 0,
        "rewards/x/mean": 5.5, "rewards/x/std": 0.5,
    }


def test_gather_takes_rows_of_each_batch():
    batches = [
        Completions([f"p{n}", f"q{n}"], [[n], [n, n]], [f"a{n}", f"b{n}"], [[n], [9]],
                    ["eos", "length"], {"x": [n, -n]})
        for n in (1, 2)
    ]
    found = gather([(batches[0], [1]), (batches[1], []), (batches[1], [1, 0])])
    assert found == Completions(
        ["q1", "q2", "p2"], [[1, 1], [2, 2], [2]], ["b1", "b2", "a2"], [[9], [9], [2]],
        ["length", "length", "eos"], {"x": [-1, -2, 2]})
