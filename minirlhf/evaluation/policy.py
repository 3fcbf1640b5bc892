"""What a policy has become on held-out prompts, and how often it beats the one that it started as.

Every evaluation of a run answers the same prompts with the same random keys, so that what changes
between two of them is the policy, and each answer has its partner: comparisons are paired.

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
from minirlhf.equations.intervals import distinct, duplicates, win_rate
from minirlhf.equations.kl import kl_k1
from minirlhf.models.generation import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, RewardSource, as_scores
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.optim import check_finite

CONSOLE = ("objective/scores", "objective/kl", "win_rate", "response_length", "distinct_2")


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
                 if n in result.metrics)
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
