"""What a policy has become on held-out prompts, and how often it beats the one that it started as.

Every evaluation of a run answers the same prompts with the same random keys, so that what changes
between two of them is the policy, and each answer has its partner: comparisons are paired.

Shapes: N held-out prompts, one response each.
"""

from collections.abc import Callable
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import torch

from minirlhf import streams
from minirlhf.checkpoint import TrainState
from minirlhf.data import Prompt
from minirlhf.errors import UserError
from minirlhf.generation import Sampling
from minirlhf.kl import kl_k1
from minirlhf.optim import check_finite
from minirlhf.rewards import Completions, RewardSource, as_scores
from minirlhf.rollout import RolloutBuffer, columns_of, sample
from minirlhf.run import Run
from minirlhf.tokenizer import Tokenizer
from minirlhf.transformer import CausalLM

CONSOLE = ("objective/scores", "objective/kl", "win_rate", "response_length", "distinct_2")


class WinRate(NamedTuple):
    rate: float  # share of pairs won, a tie counting half
    low: float  # of its confidence interval
    high: float


def win_rate(scores: list[float], baseline: list[float], confidence: float = 0.95) -> WinRate:
    """How often one score beats its partner, and between what the true rate lies.

    A pair counts x = 1 if won, 1/2 if tied, 0 if lost. With w the mean of N of them, t the share of
    ties and z the normal quantile, the interval holds the rates p that a score test does not reject
    (Wilson 1927, JASA 22, p. 209, where t = 0):

        (w - p)² <= z² (p (1 - p) - t / 4) / N,   since E[x²] = p - t / 4

    It holds w, lies in [0, 1], and leaves 1/2 out exactly where the sign test rejects it, which
    looks at the pairs without ties alone. Where all pairs tie it is the point 1/2: nothing differs.

    Args:
        scores, baseline: N >= 1 each, partners at the same place.
        confidence: above 0 and below 1.
    Raises:
        ValueError: the lengths differ, or are 0.

    >>> [round(p, 4) for p in win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)]  # Wilson's, 8 of 10
    [0.8, 0.4902, 0.9433]
    """
    if not scores or len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores, {len(baseline)} of the baseline: give pairs")
    N, pairs = len(scores), list(zip(scores, baseline, strict=True))
    ties = sum(a == b for a, b in pairs) / N
    rate = sum(a > b for a, b in pairs) / N + ties / 2
    a = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / N  # z² / N
    # The roots of (1 + a) p² - (2 w + a) p + w² + a t / 4.
    root = (a * (4 * rate * (1 - rate) - ties) + a**2 * (1 - ties)) ** 0.5
    low, high = ((2 * rate + a + side) / (2 * (1 + a)) for side in (-root, root))
    return WinRate(rate, low, high)


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts; Li et al. 2016 (arXiv:1510.03055),
    section 5.2, divide by all words. 0 where no text has n words.

    >>> distinct(["a b a", "a b"], 2)  # a b twice, b a once
    0.6666666666666666
    """
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def duplicates(texts: list[str]) -> float:
    """Share of the texts that say exactly what one before them said."""
    return 1 - len(set(texts)) / len(texts)


def text_metrics(texts: list[str], completions: list[Completions]) -> dict[str, float]:
    """Of N responses: what needs neither scores nor log-probs."""
    N = len(texts)
    cut = sum(part.finish_reasons.count("length") for part in completions)
    return {
        "response_length": sum(len(ids) for part in completions for ids in part.response_ids) / N,
        "eos_rate": 1 - cut / N,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "duplicates": duplicates(texts),
    }


class PolicyEvaluation(NamedTuple):
    metrics: dict[str, float]
    scores: list[float]  # N, in the prompts' order
    texts: list[str]  # N


@torch.no_grad()
def evaluate_policy(
    lm: CausalLM,
    prompts: list[Prompt],
    reward: RewardSource,
    measure: Callable[[RolloutBuffer], None],
    tokenizer: Tokenizer,
    sampling: Sampling,
    seed: int,
    rows_at_once: int = 64,
    micro_batch_size: int = 8,
    micro_batch_tokens: int = 4096,
    baseline: list[float] | None = None,
) -> PolicyEvaluation:
    """Answers held-out prompts once; a pure function of its arguments.

    Args:
        lm: the policy.
        prompts: N >= 2.
        reward: completions -> (B,) scores, which are taken as they are: no penalty is taken off,
            nothing is scaled or clipped, so that runs with other settings can be compared.
        measure: fills old_logprobs (the policy's) and ref_logprobs (the reference's), as training
            does it.
        seed: of the keys, one for each place among the prompts, the same at every evaluation.
        rows_at_once: how many prompts are answered, scored and measured side by side.
        micro_batch_size, micro_batch_tokens: of `measure`, as in `RolloutBuffer`.
        baseline: N scores of the policy to compare with, on these prompts.
    Returns:
        objective/scores (mean) and objective/scores_se (its standard error), reward units;
        objective/kl: k1 summed over a response, mean over responses, nats; response_length, tokens;
        eos_rate: share not cut by the length; distinct_1, distinct_2, duplicates; and with a
        baseline win_rate, win_rate_low, win_rate_high. Scores and texts beside them.
    Raises:
        ValueError: there are fewer than 2 prompts, or reward gave another number of scores.
        UserError: a score or the KL is not finite (exit code 3).
        Stopped: a signal asked the run to stop.
    """
    N = len(prompts)
    if N < 2:
        raise ValueError(f"{N} prompts: a standard error needs 2 or more")
    keys = streams.key(seed, "evaluation", torch.arange(N))  # (N,)
    parts, scores, kl = [], [], 0.0
    for start in range(0, N, rows_at_once):
        part = slice(start, start + rows_at_once)
        batch = prompts[part]
        completions, rollout = sample(
            lm, batch, keys[part], sampling, tokenizer, rows_at_once, columns_of(prompts)
        )
        given = as_scores(reward(completions), completions, "evaluation")
        parts.append(completions)
        scores += given.sums.tolist()
        buffer = RolloutBuffer(micro_batch_size, micro_batch_tokens)
        buffer.add(rollout)
        measure(buffer)
        gaps = kl_k1(buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs"))
        kl += float(gaps.double().sum())
    check_finite("evaluation", {"objective/kl": kl})
    texts = [text for completions in parts for text in completions.completions]
    metrics = {
        "objective/scores": fmean(scores),
        "objective/scores_se": stdev(scores) / N**0.5,
        "objective/kl": kl / N,
    } | text_metrics(texts, parts)
    if baseline is not None:
        rate, low, high = win_rate(scores, baseline)
        metrics |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    return PolicyEvaluation(metrics, scores, texts)


# ------------------------------------------------------------------------------------------ a run


def held_out(prompts: list[Prompt], most: int | None, file: str) -> list[Prompt]:
    """The first prompts of a held-out file.

    Raises:
        UserError: there are fewer than 2.
    """
    if len(prompts) < 2:
        what = f"{len(prompts)} prompt to evaluate on"
        raise UserError(file, what, "give 2 or more: a standard error needs them")
    return prompts[:most]


def evaluate_sets(
    r: Run,
    state: TrainState,
    sets: dict[str, list[Prompt]],
    evaluate: Callable[..., PolicyEvaluation],
) -> dict[str, float]:
    """Every held-out set, one line of the console each; the metrics under their prefixes.

    The first call of a run, before any training, finds the scores that later ones compare with.

    Args:
        evaluate: (prompts=, baseline=) -> PolicyEvaluation.
    """
    metrics, scores = {}, {}
    for prefix, prompts in sets.items():
        result = evaluate(prompts=prompts, baseline=state.baselines.get(prefix))
        scores[prefix] = result.scores
        metrics |= {prefix + name: value for name, value in result.metrics.items()}
        shown = (f"{n.rpartition('/')[2]} {result.metrics[n]:.4g}" for n in CONSOLE
                 if n in result.metrics)  # fmt: skip
        r.say(f"  {prefix.rstrip('/')}: {len(prompts):,} prompts  " + "  ".join(shown))
    if state.step == 0:
        state.baselines = scores
    return metrics


def keep_best(
    r: Run, state: TrainState, metrics: dict[str, float], write: Callable[[], object]
) -> None:
    """Lets `write` export a policy that scores above all evaluations before it, the start's too.

    Args:
        metrics: of `evaluate_sets`; the mean score on the first set decides.
    """
    score = next(value for name, value in metrics.items() if name.endswith("/objective/scores"))
    if state.best is None:  # of the policy that training started from, which --model holds
        state.best = score
    elif score > state.best:
        before, state.best = state.best, score
        write()
        r.say(f"  best so far: {score:.4g}, was {before:.4g}; the policy is in {r.folder / 'best'}")
