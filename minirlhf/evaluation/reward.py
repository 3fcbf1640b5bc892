"""Held-out preferences, scored once: metrics, calibration, and tables of pairs.

Shapes: P pairs, M texts.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.preferences import (
    Batch,
    E,
    Example,
    as_pairs,
    collate,
    micro_batches,
    ordered,
    texts_of,
)
from minirlhf.console import progress
from minirlhf.data.examples import Pair
from minirlhf.data.rankings import Ranking
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.preference import preference_accuracy
from minirlhf.errors import UserError, printable
from minirlhf.models.heads import RewardModel
from minirlhf.run import optim
from minirlhf.run.terminal import differing


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    pairs: list[Pair]  # P: the pairs themselves, or all of each ranked list
    chosen: Tensor  # (P,) scores
    rejected: Tensor  # (P,)
    scores: Tensor  # (M,) of each text once
    lengths: Tensor  # (M,) tokens of each text


@torch.no_grad()
def evaluate_preferences(
    model: RewardModel, examples: list[E], micro_batch_tokens: int = 4096,
    metrics: Callable[[Tensor, Tensor, list[Pair]], dict[str, float]] | None = None,
    collate: Callable[[list[E]], Batch] = collate,
) -> Evaluation:
    """Scores held-out pairs or ranked lists once.

    Args:
        metrics: adds to them; a function of (chosen scores (P,), rejected scores (P,), pairs).
        collate: examples -> batch, as in training.
    Returns:
        loss (with the examples' margins and probabilities), the metrics of `preference_metrics`,
        calibration_error; and the scores in the examples' order.
    Raises:
        UserError: a score is not finite (exit code 3).
    """
    device = model.score.weight.device
    scores: list[Tensor] = [torch.empty(0)] * len(examples)
    losses = torch.zeros(len(examples))
    parts = list(micro_batches(examples, micro_batch_tokens))
    for part in progress(parts, "evaluate", unit=" micro-batches"):
        interrupt.check()
        batch = collate([examples[i] for i in part.tolist()])
        found = model(batch.tokens.to(device), batch.lengths.to(device)).float().cpu()  # (M,)
        losses[part] = batch.loss(found)
        for at, each in zip(part.tolist(), batch.split(found), strict=True):
            scores[at] = each
    values = {"loss": float(losses.mean())} | preference_metrics(examples, scores)
    optim.check_finite("evaluation", values)
    chosen, rejected = ordered_scores(examples, scores)
    pairs = [pair for example in examples for pair in as_pairs(example)]
    values["calibration_error"] = calibration_error(chosen, rejected)
    if metrics is not None:
        values |= metrics(chosen, rejected, pairs)
    lengths = torch.tensor([len(text) for example in examples for text in texts_of(example)])
    return Evaluation(values, pairs, chosen, rejected, torch.cat(scores), lengths)


def score_moments(
    model: RewardModel, sets: Iterable[list[Example]], micro_batch_tokens: int, where: str
) -> tuple[float, float]:
    """Mean and population standard deviation of a model's scores of all texts of all sets.

    Args:
        sets: each of pairs, or of ranked lists.
        where: the setting that asked for it.
    Raises:
        UserError: all scores are alike (exit code 2).
    """
    results = [evaluate_preferences(model, one, micro_batch_tokens) for one in sets]
    scores = torch.cat([result.scores for result in results]).double()
    std, mean = torch.std_mean(scores, correction=0)
    if not std > 0:
        what = f"all {len(scores):,} scores are {float(mean):.6g}"
        raise UserError(where, what, "such a model prefers nothing: train it longer")
    return float(mean), float(std)


# ------------------------------------------------------------------------------ what the scores say


def preference_metrics(examples: list[E], scores: list[Tensor]) -> dict[str, float]:
    """`score_metrics` over all pairs of each example; of ranked lists `top1` too."""
    values = score_metrics(*ordered_scores(examples, scores), torch.cat(scores))
    lists = isinstance(examples[0], Ranking)
    return values | ({"top1": top1(examples, scores)} if lists else {})


def ordered_scores(examples: list[E], scores: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(P,) scores of the better and (P,) of the worse response of each pair, in `as_pairs` order.

    Args:
        scores: of each example's responses, best first.
    """
    pairs, start = [], 0
    for example in examples:
        pairs += [(start + i, start + j) for i, j in ordered(example.ranks)]
        start += len(example.ranks)
    better, worse = torch.tensor(pairs).T
    flat = torch.cat(scores)
    at = better.to(flat.device), worse.to(flat.device)
    return flat[at[0]], flat[at[1]]


def score_metrics(better: Tensor, worse: Tensor, scores: Tensor) -> dict[str, float]:
    """Accuracy and margins of scores; the margins in the data play no part.

    Args:
        better, worse: (P,) scores of the two responses of each pair.
        scores: (M,) of each text once.
    Returns:
        accuracy (strict), accuracy_half (a tie counts half), ties: fractions of P; margin and
        margin_std: mean and population standard deviation of better - worse; min_reward,
        mean_reward, max_reward: over the scores.
    """
    accuracy = preference_accuracy(better, worse)
    every = scores.double()
    margin = better.double() - worse.double()
    values = {
        "margin": margin.mean(), "margin_std": margin.std(correction=0),
        "min_reward": every.min(), "mean_reward": every.mean(), "max_reward": every.max(),
    }
    values = {name: float(value) for name, value in values.items()}
    strict, ties, half = accuracy
    return {"accuracy": strict, "accuracy_half": half, "ties": ties} | values


def top1(rankings: list[Ranking], scores: list[Tensor]) -> float:
    """Fraction of lists where a response of the best rank scores above all of other ranks."""
    right = 0
    for ranking, each in zip(rankings, scores, strict=True):
        best = sum(rank == ranking.ranks[0] for rank in ranking.ranks)
        right += bool(each[:best].max() > each[best:].max())
    return right / len(rankings)


# -------------------------------------------------------------------------------------- calibration


BINS = 10


class Bin(NamedTuple):
    """Pairs whose confidence lies from low to high."""

    low: float
    high: float
    pairs: int
    confidence: float | None  # mean; None without pairs
    accuracy: float | None  # fraction that is right, a tie counting half; None without pairs


def calibration_table(chosen: Tensor, rejected: Tensor) -> list[Bin]:
    """How often a reward model is right, by its confidence: ten bins of equal width on [1/2, 1].
    Guo et al. 2017 (arXiv:1706.04599), section 2.

    Args:
        chosen, rejected: (N,) scores.
    """
    probability = torch.sigmoid(chosen.double() - rejected.double())
    confidence = torch.maximum(probability, 1 - probability)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    index = ((2 * confidence - 1) * BINS).long().clamp(max=BINS - 1)  # (N,)
    table = []
    for number in range(BINS):
        here = index == number
        count, edges = int(here.sum()), (0.5 + 0.5 * at / BINS for at in (number, number + 1))
        means = (float(confidence[here].mean()), float(right[here].mean())) if count else ()
        table.append(Bin(*edges, count, *(means or (None, None))))
    return table


def calibration_error(chosen: Tensor, rejected: Tensor) -> float:
    """Expected calibration error of P(chosen) = sigmoid(chosen - rejected), over the bins b of
    `calibration_table`. Guo et al. 2017 (arXiv:1706.04599), eq. 3.

        sum_b |sum_{i in b} (right_i - confidence_i)| / N,   confidence = max(P, 1 - P)

    It is 0 if, for instance, 9 in 10 of the pairs that are ordered with confidence 0.9 are ordered
    rightly.
    """
    table = calibration_table(chosen, rejected)
    gaps = (row.pairs * abs(row.accuracy - row.confidence) for row in table if row.pairs)
    return sum(gaps) / len(chosen)


# -------------------------------------------------------------------------------- pairs to look at


def pair_rows(result: Evaluation, tokenizer: Tokenizer | None, count: int) -> list[dict]:
    """The first `count` pairs (-1: all) with both scores and P(chosen > rejected).

    Args:
        result: only its pairs, and scores of chosen and rejected, are read.
        tokenizer: without one the texts are their ids.
    """
    shown = len(result.pairs) if count < 0 else min(count, len(result.pairs))
    return [pair_row(result, i, tokenizer) for i in range(shown)]


def pair_row(result: Evaluation, i: int, tokenizer: Tokenizer | None) -> dict:
    pair = result.pairs[i]
    ids = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
    texts = {name: tokenizer.decode(v) if tokenizer else v for name, v in ids.items()}
    return texts | {
        "chosen_score": float(result.chosen[i]), "rejected_score": float(result.rejected[i]),
        "margin": pair.margin,
        "probability": float(torch.sigmoid(result.chosen[i] - result.rejected[i])),
        "chosen_tokens": len(pair.prompt_ids) + len(pair.chosen_ids),
        "rejected_tokens": len(pair.prompt_ids) + len(pair.rejected_ids),
    }


def pair_table(rows: list[dict]) -> str:
    """`pair_rows` for a console: the responses only, since both have the same prompt, from the word
    in which they differ."""
    lines = [f"  {'chosen':<36}  {'rejected':<36}  {'scores':>15}  margin  P(chosen)  tokens"]
    for row in rows:
        sides = [printable(row[side], 2000) for side in ("chosen", "rejected")]
        chosen, rejected = differing(sides, 36)
        scores = f"{row['chosen_score']:>7.3f} {row['rejected_score']:>7.3f}"
        sizes = f"{row['chosen_tokens']}/{row['rejected_tokens']}"
        lines.append(
            f"  {chosen}  {rejected}  {scores}  {row['margin']:>6.3g}  "
            f"{row['probability']:>9.3f}  {sizes}"
        )
    return "\n".join(lines)
