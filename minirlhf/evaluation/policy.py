"""What a policy scores on held-out prompts, and how often it beats the one that it started as.

Every evaluation of a run answers the same prompts with the same random keys. So what changes
between two of them is the policy, and each answer has a partner to be compared with.

Shapes: N held-out prompts, one response each.
"""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from minirlhf import streams
from minirlhf.batches.collect import columns_of, sample
from minirlhf.batches.rollouts import RolloutBuffer
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.intervals import win_rate
from minirlhf.equations.kl import kl_k1
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, RewardSource, as_scores
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.optim import check_finite

CONSOLE = ("objective/scores", "objective/kl", "win_rate", "response_length", "distinct_2")


class PolicyEvaluation(NamedTuple):
    metrics: dict[str, float]
    scores: list[float]  # N, in the prompts' order
    texts: list[str]  # N


@torch.no_grad()
def evaluate_policy(
    lm: CausalLM, prompts: list[Prompt], reward: RewardSource,
    measure: Callable[[RolloutBuffer], None], tokenizer: Tokenizer, sampling: Sampling, seed: int,
    rows_at_once: int = 64, micro_batch_size: int = 8, micro_batch_tokens: int = 4096,
    baseline: list[float] | None = None,
) -> PolicyEvaluation:
    """Answers N >= 2 held-out prompts once; a pure function of its arguments.

    Args:
        lm: the policy.
        reward: completions -> (B,) scores. They are taken as they are: no penalty, scale or clip,
            so that runs with other settings can be compared.
        measure: fills old_logprobs (the policy's) and, where there is a reference, its
            ref_logprobs, as training does it.
        seed: of the keys, one for each place among the prompts, the same at every evaluation.
        rows_at_once: how many prompts are answered, scored and measured side by side.
        micro_batch_size, micro_batch_tokens: of `measure`, as in `RolloutBuffer`.
        baseline: N scores of the policy to compare with, on these prompts.
    Returns:
        Metrics (see `answer_metrics`), scores and texts.
    Raises:
        ValueError: there are fewer than 2 prompts, or reward gave another number of scores.
        UserError: a score or the KL is not finite (exit code 3).
        Stopped: a signal asked the run to stop.
    """
    N = len(prompts)
    if N < 2:
        raise ValueError(f"{N} prompts: a standard error needs 2 or more")
    keys = streams.key(seed, "evaluation", torch.arange(N))  # (N,)
    columns, parts, scores, log_ratios = columns_of(prompts), [], [], []
    for start in range(0, N, rows_at_once):
        part = slice(start, start + rows_at_once)
        completions, rollout = sample(
            lm, prompts[part], keys[part], sampling, tokenizer, rows_at_once, columns
        )
        parts.append(completions)
        scores += as_scores(reward(completions), completions, "evaluation").sums.tolist()
        buffer = RolloutBuffer(micro_batch_size, micro_batch_tokens)
        buffer.add(rollout)
        measure(buffer)
        if buffer.micro_batches[0].ref_logprobs is not None:
            k1 = kl_k1(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs"))
            log_ratios.append(float(k1.cpu().double().sum()))
    kl = sum(log_ratios) if log_ratios else None
    check_finite("evaluation", {"objective/kl": kl or 0.0})
    metrics = answer_metrics(parts, scores, kl, baseline)
    return PolicyEvaluation(metrics, scores, [text for part in parts for text in part.completions])


def answer_metrics(
    parts: list[Completions], scores: list[float], kl: float | None,
    baseline: list[float] | None = None,
) -> dict[str, float]:
    """What N answers are worth.

    Args:
        parts: the answers, N in all.
        scores, baseline: N each, in their order.
        kl: nats, summed over all response tokens; None: there is no reference.
    Returns:
        objective/scores (mean) and objective/scores_se (its standard error), reward units;
        objective/kl: nats a response, where there is a reference; response_length: tokens;
        eos_rate: share that ended before the limit; distinct_1, distinct_2, duplicates; with a
        baseline win_rate, win_rate_low and win_rate_high.
    """
    N, texts = len(scores), [text for part in parts for text in part.completions]
    truncated = sum(part.finish_reasons.count("length") for part in parts)
    metrics = {
        "objective/scores": fmean(scores),
        "objective/scores_se": stdev(scores) / N**0.5,
        **({} if kl is None else {"objective/kl": kl / N}),
        "response_length": sum(len(ids) for part in parts for ids in part.response_ids) / N,
        "eos_rate": 1 - truncated / N,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "duplicates": duplicates(texts),
    }
    if baseline is not None:
        rate, low, high = win_rate(scores, baseline)
        metrics |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    return metrics


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts; Li et al. 2016 (arXiv:1510.03055),
    section 5.2, divide by all words. 0 where no text has n words.

    >>> distinct(["a b a", "a b"], 2)  # a b twice, b a once
    0.6666666666666666
    """
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def duplicates(texts: list[str]) -> float:
    """Share of the texts that equal an earlier one.

    >>> duplicates(["a", "b", "a", "a"])
    0.5
    """
    return 1 - len(set(texts)) / len(texts)


# ------------------------------------------------------------------------------------ within a run


def evaluate_sets(
    r: Run, state: TrainState, sets: dict[str, list[Prompt]],
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
        r.display.evaluation(prefix, f"{len(prompts):,} prompts", result.metrics, CONSOLE)
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
