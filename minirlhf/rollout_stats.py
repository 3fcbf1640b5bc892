"""Statistics of a rollout beyond what its losses tell, under the names of `minirlhf.metrics`.

Tokens are weighed alike, whatever row or micro-batch they stand in; nothing outside the response
mask counts. Spreads are those of the population: one response has spread 0, not NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.kl import kl_k1, kl_k3
from minirlhf.rollout import RolloutBuffer


def rollout_statistics(buffer: RolloutBuffer) -> dict[str, float]:
    """KL, log-probs, values, returns and lengths of B rows with N response tokens.

    Args:
        buffer: sampled and measured, with its returns.
    """
    rows = len(buffer)
    old, ref = buffer.tokens("old_logprobs").double(), buffer.tokens("ref_logprobs").double()
    sampled = buffer.tokens("sampled_logprobs").double()
    values, returns = buffer.tokens("old_values").double(), buffer.tokens("returns").double()
    row_kl = buffer.row_sums("old_logprobs").double() - buffer.row_sums("ref_logprobs").double()
    prompts = torch.cat([micro.prompt_lengths for micro in buffer.micro_batches]).double()
    responses = torch.cat([micro.response_mask.sum(1) for micro in buffer.micro_batches]).double()
    return {
        **quantiles("objective/kl", row_kl),
        "objective/kl_k3": float(kl_k3(old, ref).sum()) / rows,
        "objective/kl_per_token": float(kl_k1(old, ref).mean()),
        "objective/logprobs": float(old.mean()),
        "objective/ref_logprobs": float(ref.mean()),
        "health/logprobs_diff": float((sampled - old).abs().max()),
        "policy/advantages_mean": float((returns - values).mean()),
        "val/mean": float(values.mean()),
        "val/var": float(values.var(correction=0)),
        "returns/mean": float(returns.mean()),
        "returns/var": float(returns.var(correction=0)),
        "prompt_length": float(prompts.mean()),
        "prompt_length_std": float(prompts.std(correction=0)),
        "response_length": float(responses.mean()),
        "response_length_std": float(responses.std(correction=0)),
        **quantiles("response_length", responses),
    }


def score_statistics(raw: Tensor, scores: Tensor) -> dict[str, float]:
    """The reward as its source gave it, (B,), and as PPO uses it, (B,)."""
    raw, scores = raw.double(), scores.double()
    return {
        "reward": float(raw.mean()),
        "reward_std": float(raw.std(correction=0)),
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
    cut = sum(reason == "length" for reason in finish_reasons)
    return {
        "val/num_eos_tokens": float(sum(reason == "eos" for reason in finish_reasons)),
        "health/eos_rate": (rows - cut) / rows,
        "health/truncated_rate": cut / rows,
        "health/dup_rate": (rows - distinct) / rows,
        "health/reward_len_corr": correlation(scores.tolist(), [len(ids) for ids in responses]),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r of two equally long series; 0 where either is constant.

    >>> correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    1.0
    """
    n = len(x)
    dx, dy = ([value - sum(series) / n for value in series] for series in (x, y))
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    spread = (sum(a * a for a in dx) * sum(b * b for b in dy)) ** 0.5
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / spread


def quantiles(stem: str, values: Tensor) -> dict[str, float]:
    """stem_p05, stem_p50 and stem_p95 of (B,) values, interpolated between neighbours."""
    shares = torch.tensor((0.05, 0.5, 0.95), dtype=values.dtype, device=values.device)
    found = torch.quantile(values, shares).tolist()
    return {f"{stem}_p{name}": value for name, value in zip(("05", "50", "95"), found, strict=True)}
