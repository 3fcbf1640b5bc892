"""Statistics of a rollout, under the names of `minirlhf.run.glossary`.

Tokens are weighed alike, whatever row or micro-batch they stand in; nothing outside the response
mask counts. Spreads are those of the population: one response has spread 0, not NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.batches.rollouts import RolloutBuffer
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.intervals import pearson
from minirlhf.equations.kl import kl_k1, kl_k3
from minirlhf.evaluation.updates import PPOStats
from minirlhf.rewards.source import Completions, Scores


def wide(x: Tensor) -> Tensor:
    """What statistics are made of: float64, on the CPU, since Apple GPUs have none."""
    return x.cpu().double()


def rollout_statistics(buffer: RolloutBuffer) -> dict[str, float]:
    """KL, log-probs, values, returns and lengths of B rows with N response tokens.

    Args:
        buffer: sampled and measured, with its returns.
    """
    rows = len(buffer)
    old, ref, sampled, values, returns = (
        wide(buffer.flat(name))
        for name in ("old_logprobs", "ref_logprobs", "sampled_logprobs", "old_values", "returns")
    )
    row_kl = wide(buffer.row_sums("old_logprobs")) - wide(buffer.row_sums("ref_logprobs"))
    prompts = wide(torch.cat([micro.prompt_lengths for micro in buffer.micro_batches]))
    responses = wide(torch.cat([micro.response_mask.sum(1) for micro in buffer.micro_batches]))
    return {
        **quantiles("objective/kl", row_kl),
        "objective/kl_k3": float(kl_k3(old, ref).sum()) / rows,
        "objective/kl_per_token": float(kl_k1(old, ref).mean()),
        "objective/logprobs": float(old.mean()), "objective/ref_logprobs": float(ref.mean()),
        "health/logprobs_diff": float((sampled - old).abs().max()),
        "policy/advantages_mean": float((returns - values).mean()),
        "val/mean": float(values.mean()), "val/var": float(values.var(correction=0)),
        "returns/mean": float(returns.mean()), "returns/var": float(returns.var(correction=0)),
        "prompt_length": float(prompts.mean()),
        "prompt_length_std": float(prompts.std(correction=0)),
        "response_length": float(responses.mean()),
        "response_length_std": float(responses.std(correction=0)),
        **quantiles("response_length", responses),
    }


def weight_statistics(buffer: RolloutBuffer) -> dict[str, float]:
    """Of the weights of the policy loss; none where the policy itself sampled."""
    if buffer.micro_batches[0].weights is None:
        return {}
    weights = wide(buffer.flat("weights"))
    log_ratio = wide(buffer.flat("old_logprobs")) - wide(buffer.flat("sampled_logprobs"))
    # The largest weight is the cap, if any is truncated; it was rounded to float32.
    truncated = log_ratio.exp() > weights.max() * (1 + 1e-6)
    return {
        "sampling/importance_sampling_ratio/mean": float(weights.mean()),
        "sampling/importance_sampling_ratio/truncated": float(truncated.double().mean()),
    }


def score_statistics(raw: Tensor, scores: Tensor) -> dict[str, float]:
    """The reward as its source gave it, (B,), and as PPO uses it, (B,)."""
    raw, scores = wide(raw), wide(scores)
    return {
        "reward": float(raw.mean()), "reward_std": float(raw.std(correction=0)),
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(correction=0)),
        **quantiles("objective/scores", scores),
    }


def text_statistics(
    responses: Sequence[Sequence[int]], finish_reasons: Sequence[str], scores: Tensor
) -> dict[str, float]:
    """How the B responses ended, how many repeat another, and whether long ones score higher.

    Args:
        responses: token ids of each.
        finish_reasons: eos, stop or length.
        scores: (B,)
    """
    rows, distinct = len(responses), len({tuple(ids) for ids in responses})
    truncated = sum(reason == "length" for reason in finish_reasons)
    r = pearson(scores.tolist(), [len(ids) for ids in responses])
    return {
        "val/num_eos_tokens": float(sum(reason == "eos" for reason in finish_reasons)),
        "health/eos_rate": (rows - truncated) / rows,
        "health/truncated_rate": truncated / rows,
        "health/dup_rate": (rows - distinct) / rows,
        "health/reward_len_corr": 0.0 if r is None else r,  # where either is constant
    }


def quantiles(stem: str, values: Tensor) -> dict[str, float]:
    """stem_p05, stem_p50 and stem_p95 of (B,) values, interpolated between neighbours."""
    shares = torch.tensor((0.05, 0.5, 0.95), dtype=values.dtype)
    found = torch.quantile(values, shares).tolist()
    return {f"{stem}_p{name}": value for name, value in zip(("05", "50", "95"), found, strict=True)}


def summarise(
    stats: PPOStats, completions: Completions, given: Scores, scores: Tensor,
    buffer: RolloutBuffer, sequence_kl: float, tokenizer: Tokenizer, bootstraps: bool,
) -> dict[str, float]:
    """TRL's metric names, with the numbers that the names promise: see `minirlhf.run.glossary`.

    Args:
        given: what the reward sources said.
        scores: (B,) under the rule for truncated responses, before they were scaled.
        bootstraps: whether the critic's value stands for the score of a truncated response.
    """
    by_token = given.sums - given.total  # (B,)
    scores = scores + by_token
    micros = buffer.micro_batches
    scaled = torch.cat([micro.scores for micro in micros]).cpu()
    if bootstraps:
        scaled = torch.where(torch.cat([micro.truncated for micro in micros]).cpu(), 0, scaled)
    learned = scaled + by_token[torch.cat([micro.rows for micro in micros]).cpu()]
    responses, tokens = completions.response_ids, len(buffer.flat("rewards"))
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    return given.metrics() | {
        **rollout_statistics(buffer), **weight_statistics(buffer),
        **score_statistics(given.sums, scores),
        **text_statistics(responses, completions.finish_reasons, scores),
        "objective/non_score_reward_per_token": stats.non_score_reward * len(buffer) / tokens,
        "objective/kl": sequence_kl,
        "objective/non_score_reward": stats.non_score_reward,
        "objective/learned_scores": float(learned.mean()),
        "objective/learned_scores_std": float(learned.std(correction=0)),
        "objective/rlhf_reward": float(learned.mean()) + stats.non_score_reward,
        "objective/entropy": -float(buffer.row_sums("old_logprobs").mean()),
        "policy/approxkl_avg": stats.approxkl, "policy/policykl_avg": stats.policykl,
        "policy/clipfrac_avg": stats.clipfrac, "policy/entropy_avg": stats.entropy,
        "loss/policy_avg": stats.policy_loss, "loss/value_avg": stats.value_loss,
        "loss/kl_avg": stats.kl_loss, "loss/ptx_avg": stats.ptx_loss,
        "loss/total_avg": stats.loss, "val/clipfrac_avg": stats.value_clipfrac,
        "val/vpred_avg": stats.vpred, "val/error_avg": stats.value_error,
        "val/ratio": stats.ratio, "val/ratio_var": stats.ratio_var,
        "grad_norm": stats.grad_norm, "critic_grad_norm": stats.critic_grad_norm,
        "policy/epochs": float(stats.epochs),
        "health/explained_variance": stats.explained_variance,
        "health/unknown_tokens": float(unknown),
    }
