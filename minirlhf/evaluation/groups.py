"""Statistics of a step without a critic, under the names of TRL's GRPO and RLOO where it has one.

See `minirlhf.run.glossary`. Tokens are weighed alike, whatever response they stand in; nothing
outside the response mask counts. Shapes: B responses that are learned from, M that were drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from minirlhf.batches.rollouts import RolloutBuffer
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.critic_free import without_spread
from minirlhf.equations.kl import kl_k1, kl_k3
from minirlhf.evaluation.rollout import text_statistics, weight_statistics, wide
from minirlhf.evaluation.updates import MiniBatchStats
from minirlhf.rewards.source import Completions, Scores


class GRPOStats(NamedTuple):
    """Statistics of one `grpo_step`; means over the response tokens, those of all updates alike."""

    loss: float  # what was minimised, mean over updates
    policy_loss: float
    kl_loss: float  # kl_coef times the KL where it is a loss; else 0
    approxkl: float  # mean of (new - old logprob)^2 / 2, nats
    clipfrac: float  # share of tokens whose ratio was clipped
    clip_low: float  # of these, with a ratio below 1
    clip_low_min: float  # of the update with the lowest share
    clip_high: float  # with a ratio above 1
    clip_high_max: float  # of the update with the highest share
    entropy: float  # nats a token
    ratio: float
    ratio_var: float
    grad_norm: float  # mean over optimizer steps, before clipping
    first_ratio_gap: float  # largest |ratio - 1| before the first optimizer step; 0 if exact
    epochs: int  # passes made; fewer than asked for where the KL ended them


# Of a rollout that nothing could be learned from.
NO_UPDATES = GRPOStats(**{**dict.fromkeys(GRPOStats._fields, 0.0), "ratio": 1.0, "epochs": 0})


def summarise_group_updates(updates: list[MiniBatchStats], epochs: int) -> GRPOStats:
    """Token means over all updates."""
    total = sum(seen.tokens for seen in updates)
    mean = {k: float(sum(seen.sums[k] for seen in updates)) / total for k in updates[0].sums}
    gap, gap_sq = mean.pop("gap"), mean.pop("gap_sq")  # squares around 1 keep small variances
    for name in ("k3", "policykl", "loss"):  # whatever loss_mean is, the last one is over tokens
        mean.pop(name)
    low, high = ([float(seen.sums[name]) / seen.tokens for seen in updates]
                 for name in ("clip_low", "clip_high"))
    return GRPOStats(
        **mean, loss=float(sum(sum(seen.losses) for seen in updates)) / len(updates),
        clip_low_min=min(low), clip_high_max=max(high), ratio=1 + gap,
        ratio_var=max(gap_sq - gap**2, 0.0),
        grad_norm=sum(seen.grad_norm for seen in updates) / len(updates),
        first_ratio_gap=updates[0].largest_gap, epochs=epochs,
    )


def reward_statistics(drawn: Scores, scores: Tensor, group_size: int) -> dict[str, float]:
    """Rewards of all M responses that were drawn, (M,); spreads where groups have several.

    Args:
        drawn: what the sources gave.
        scores: (M,) under the rule for truncated responses; groups adjacent.
    """
    metrics = drawn.metrics() | {"reward": float(scores.double().mean())}
    if group_size > 1:
        groups = scores.double().view(-1, group_size)
        flat = without_spread(scores, group_size)
        metrics["reward_std"] = float(groups.std(dim=1).mean())
        metrics["frac_reward_zero_std"] = float(flat.double().mean())
    return metrics


def length_statistics(lengths: Sequence[int], finish_reasons: Sequence[str]) -> dict[str, float]:
    """Of B responses, in tokens; those of the ones that ended by themselves where there are any."""
    ended = [n for n, why in zip(lengths, finish_reasons, strict=True) if why != "length"]
    metrics = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
    for kind, sizes in (("length", lengths), ("terminated_length", ended)):
        if sizes:
            metrics |= {
                f"completions/mean_{kind}": sum(sizes) / len(sizes),
                f"completions/min_{kind}": float(min(sizes)),
                f"completions/max_{kind}": float(max(sizes)),
            }
    return metrics


def kl_statistics(buffer: RolloutBuffer) -> dict[str, float]:
    """Of the policy that sampled to its reference; none where it has none."""
    if buffer.micro_batches[0].ref_logprobs is None:
        return {}
    old, ref = wide(buffer.flat("old_logprobs")), wide(buffer.flat("ref_logprobs"))
    return {
        "kl": float(kl_k3(old, ref).mean()),
        "objective/kl": float(kl_k1(old, ref).sum()) / len(buffer),
    }


def summarise_groups(
    stats: GRPOStats, completions: Completions, scores: Tensor, buffer: RolloutBuffer,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """What is said of the B responses that are learned from.

    Args:
        scores: (B,) as in `reward_statistics`.
    """
    responses, reasons = completions.response_ids, completions.finish_reasons
    sampled, old = wide(buffer.flat("sampled_logprobs")), wide(buffer.flat("old_logprobs"))
    texts = text_statistics(responses, reasons, scores)
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    return {
        **length_statistics([len(ids) for ids in responses], reasons),
        **kl_statistics(buffer), **weight_statistics(buffer),
        "entropy": stats.entropy, "loss": stats.loss,
        "loss/policy_avg": stats.policy_loss, "loss/kl_avg": stats.kl_loss,
        "clip_ratio/region_mean": stats.clipfrac,
        "clip_ratio/low_mean": stats.clip_low, "clip_ratio/low_min": stats.clip_low_min,
        "clip_ratio/high_mean": stats.clip_high, "clip_ratio/high_max": stats.clip_high_max,
        "policy/approxkl_avg": stats.approxkl, "policy/epochs": float(stats.epochs),
        "val/ratio": stats.ratio, "val/ratio_var": stats.ratio_var, "grad_norm": stats.grad_norm,
        "prompt_length": sum(map(len, completions.prompt_ids)) / len(responses),
        "health/dup_rate": texts["health/dup_rate"],
        "health/reward_len_corr": texts["health/reward_len_corr"],
        "health/logprobs_diff": float((sampled - old).abs().max()),
        "health/unknown_tokens": float(unknown),
    }
