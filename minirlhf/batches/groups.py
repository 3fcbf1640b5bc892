"""Drawing groups: several responses to each prompt, drawn again where their scores all agree.

Shapes: G responses of a group, B rows that are learned from, M rows that were drawn.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.collect import gather
from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.equations.critic_free import without_spread
from minirlhf.rewards.source import Completions, Scores, joined_scores

# (prompts drawn before, prompts to draw) -> their responses, as text and as tensors
Sample = Callable[[int, int], tuple[Completions, Rollout]]
# -> what sources said of M responses, all reward of each (M,), the rollout with that
Score = Callable[[Completions, Rollout], tuple[Scores, Tensor, Rollout]]


class Round(NamedTuple):
    """M responses that were drawn at once, groups adjacent, and those of them that are kept."""

    completions: Completions
    given: Scores  # as the sources gave it
    scores: Tensor  # (M,) all reward of each, under the rule for truncated responses
    kept: Tensor  # numbers of the rows that are learned from


class Drawn(NamedTuple):
    """An iteration's responses: B rows that are learned from, of M that were drawn."""

    completions: Completions  # of the B rows; they themselves are in the buffer
    scores: Tensor  # (B,) as in Round
    given: Scores  # of all M, as the sources gave it
    all_scores: Tensor  # (M,) as in Round
    prompts: int  # how many were drawn: those asked for, and more where groups were drawn again
    flat: int  # groups among all that were drawn whose scores agree
    sampled: int  # response tokens of all that were drawn
    tokens: int  # the same, with their prompts


def draw_groups(
    buffer: RolloutBuffer, count: int, group_size: int, resample: int, sample: Sample, score: Score,
    lap: Callable[[str], None],
) -> Drawn:
    """Fills the buffer with groups of responses to the next prompts.

    Groups whose scores all agree teach nothing. They give way to groups of the prompts after these,
    at most `resample` times; in the last round they are kept as they are, so that a rollout has
    B = count · group_size rows whatever the rewards. Yu et al. 2025, DAPO (arXiv:2503.14476), sec.
    3.2.

    Args:
        lap: is told the name of what has just been done, after each of its parts.
    """
    rounds: list[Round] = []
    drawn, missing, flat = 0, count, 0  # prompts, prompts, groups
    while missing:
        completions, rollout = sample(drawn, missing)
        lap("time/rollout")
        given, scores, rollout = score(completions, rollout)
        alone = group_size == 1  # then there is nothing to agree with
        agree = torch.zeros(missing).bool() if alone else without_spread(scores, group_size)
        keep = torch.ones_like(agree) if len(rounds) == resample else ~agree
        rows = keep.repeat_interleave(group_size).nonzero()[:, 0]
        if len(rows):
            chosen = rollout.select(rows.to(rollout.rows.device))
            places = torch.arange(len(rows), device=chosen.rows.device) + len(buffer)
            buffer.add(chosen._replace(rows=places), group_size)
        rounds.append(Round(completions, given, scores, rows))
        drawn, missing, flat = drawn + missing, missing - int(keep.sum()), flat + int(agree.sum())
        lap("time/score")
    sampled, read = (sum(len(ids) for r in rounds for ids in getattr(r.completions, name))
                     for name in ("response_ids", "prompt_ids"))
    return Drawn(
        gather([(r.completions, r.kept.tolist()) for r in rounds]),
        torch.cat([r.scores[r.kept] for r in rounds]), joined_scores([r.given for r in rounds]),
        torch.cat([r.scores for r in rounds]), drawn, flat, sampled, sampled + read,
    )
