"""What a reward model is worth, on one page: card.json, and card.md for people.

Each number is a small function of the scores of held-out data, so the same checkpoint gives the
same bytes.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.intervals import Interval, pearson, spearman, wilson_interval
from minirlhf.errors import printable
from minirlhf.evaluation.reward import Evaluation, calibration_table, pair_row
from minirlhf.files import atomic

WORST, TEXT, CELL = 10, 1000, 160  # pairs shown; characters of a text in card.json, in card.md


class Bucket(NamedTuple):
    """Pairs whose value lies from low to high, both of which occur."""

    low: float
    high: float
    pairs: int
    accuracy: float  # strict
    accuracy_95: Interval


class Longer(NamedTuple):
    """How often the longer answer wins, among pairs of different lengths; None without any."""

    pairs: int
    in_data: float | None  # it is the chosen one
    in_scores: float | None  # it scores higher, strictly


def accuracy_by(values: Tensor, right: Tensor, count: int = 4) -> list[Bucket]:
    """Accuracy of pairs in `count` buckets of about as many pairs, by one number of each pair.

    Args:
        values: (P,); equal ones stay in one bucket, so there may be fewer.
        right: (P,) bool.
    """
    ordered = values.sort().values
    cuts = torch.unique(ordered[[len(values) * at // count for at in range(1, count)]])
    index, buckets = torch.bucketize(values, cuts, right=True), []
    for number in index.unique().tolist():
        here = index == number
        pairs, hits = int(here.sum()), int(right[here].sum())
        low, high = float(values[here].min()), float(values[here].max())
        buckets.append(Bucket(low, high, pairs, hits / pairs, wilson_interval(hits, pairs)))
    return buckets


def longer_wins(longer_by: Tensor, score_gap: Tensor) -> Longer:
    """Args: (P,) tokens of chosen minus rejected, and the same of their scores."""
    differ = longer_by != 0
    pairs = int(differ.sum())
    if not pairs:
        return Longer(0, None, None)
    wins = torch.where(longer_by > 0, score_gap > 0, score_gap < 0)[differ]
    return Longer(pairs, int((longer_by > 0).sum()) / pairs, int(wins.sum()) / pairs)


def worst_pairs(chosen: Tensor, rejected: Tensor, count: int = WORST) -> list[int]:
    """Indices of the most confident mistakes, the worst first; of equal ones the first."""
    gap = rejected.double() - chosen.double()
    order = torch.argsort(gap, descending=True, stable=True)[:count].tolist()
    return [i for i in order if gap[i] > 0]


# --------------------------------------------------------------------------------------- the card


def card_files(
    facts: dict, results: dict[str, Evaluation], tokenizer: Tokenizer | None
) -> dict[str, str]:
    """The texts of card.json and card.md.

    Args:
        facts: about the model itself: heads, lcb_coef, normalized, and a run's provenance.
        results: name of a held-out set -> what the model that is written scores on it.
    """
    sets = {name: describe(result, tokenizer) for name, result in results.items()}
    json_text = atomic.json_text({"model": facts, "sets": sets})
    return {"card.json": json_text, "card.md": "\n\n".join(_page(facts, sets)) + "\n"}


def describe(result: Evaluation, tokenizer: Tokenizer | None) -> dict:
    """The part of the card about one held-out set, as JSON can hold it."""
    pairs, right = result.pairs, result.chosen > result.rejected
    longer_by = torch.tensor([len(p.chosen_ids) - len(p.rejected_ids) for p in pairs])
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    lengths, scores = result.lengths.tolist(), result.scores.tolist()
    worst = []
    for i in worst_pairs(result.chosen, result.rejected):
        row = pair_row(result, i, tokenizer)
        texts = {side: printable(row[side], TEXT) for side in ("prompt", "chosen", "rejected")}
        numbers = ("chosen_score", "rejected_score", "probability", "margin")
        where = Path(pairs[i].where).name  # not the folders of this machine
        worst.append({"where": where} | texts | {name: row[name] for name in numbers})
    return result.metrics | {
        "pairs": len(pairs), "texts": len(scores),
        "accuracy_95": wilson_interval(int(right.sum()), len(pairs)),
        "calibration": [row._asdict() for row in calibration_table(result.chosen, result.rejected)],
        "by_margin": [bucket._asdict() for bucket in accuracy_by(margins, right)],
        "by_length_difference": [bucket._asdict() for bucket in accuracy_by(longer_by, right)],
        "length_score_pearson": pearson(lengths, scores),
        "length_score_spearman": spearman(lengths, scores),
        "longer": longer_wins(longer_by, result.chosen - result.rejected)._asdict(),
        "worst": worst,
    }


# ------------------------------------------------------------------------------------- for people

LEGEND = (
    "Accuracy counts a tie as wrong, accuracy half as half right. Intervals are Wilson's; where "
    "pairs of one list share their texts, they are too narrow. Of several heads, the score is "
    "their mean minus lcb_coef times their standard deviation."
)


def _page(facts: dict, sets: dict[str, dict]) -> Iterator[str]:
    """The paragraphs of card.md; numbers go by their keys in card.json."""
    yield "# Reward model"
    yield "\n".join(f"- {key}: {_cell(value)}" for key, value in facts.items())
    yield LEGEND
    for name, numbers in sets.items():
        yield f"## {escaped(name)}"
        single = {key: v for key, v in numbers.items() if not isinstance(v, (list, dict))}
        yield _table([{"": _heading(key), " ": value} for key, value in single.items()])
        yield "How often the longer answer is preferred, among pairs of different lengths:"
        yield _table([numbers["longer"]])
        yield "How often it is right where it says so, a tie counting half:"
        yield _table(numbers["calibration"])
        yield "By the margin in the data:"
        yield _table(numbers["by_margin"])
        yield "By how many tokens the preferred answer is longer:"
        yield _table(numbers["by_length_difference"])
        yield "Its most confident mistakes:"
        yield _table(numbers["worst"]) if numbers["worst"] else "none"


def _table(rows: list[dict]) -> str:
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [map(_heading, rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(key: str) -> str:
    return key.replace("_95", ", 95% interval").replace("_", " ")


def _cell(value: object) -> str:
    match value:
        case dict():
            return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
        case list():
            return "; ".join(map(_cell, value))
        case tuple():  # an interval
            return " to ".join(map(_cell, value))
        case float():
            return f"{value:.4g}"
        case None:
            return "none"
    return escaped(str(value))


def escaped(text: str, limit: int = CELL) -> str:
    """A stranger's text for a cell of a Markdown table: one line that formats and runs nothing."""
    plain = html.escape(printable(text, limit), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", plain)
