"""What a reward model is worth, on one page: card.json, and card.md for people.

Each number is a small function of the scores of held-out data, so the same checkpoint gives the
same bytes. Pairs of one ranked list share their texts: intervals of lists are too narrow.
"""

import html
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.intervals import Interval, pearson, spearman, wilson_interval
from minirlhf.errors import printable
from minirlhf.evaluation.reward import Bin, Evaluation, calibration_table, sample_row
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


# ---------------------------------------------------------------------------------------- the card


def describe(result: Evaluation, tokenizer: Tokenizer | None) -> dict:
    """The part of the card about one held-out set, as JSON can hold it."""
    pairs, right = result.pairs, result.chosen > result.rejected
    longer_by = torch.tensor([len(p.chosen_ids) - len(p.rejected_ids) for p in pairs])
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    worst = []
    for i in worst_pairs(result.chosen, result.rejected):
        row = sample_row(result, i, tokenizer)
        texts = {side: printable(row[side], TEXT) for side in ("prompt", "chosen", "rejected")}
        numbers = ("chosen_score", "rejected_score", "probability", "margin")
        where = Path(pairs[i].where).name  # not the folders of this machine
        worst.append({"where": where} | texts | {name: row[name] for name in numbers})
    return result.metrics | {
        "pairs": len(pairs), "texts": len(result.scores),
        "accuracy_95": wilson_interval(int(right.sum()), len(pairs)),
        "calibration": [row._asdict() for row in calibration_table(result.chosen, result.rejected)],
        "by_margin": [bucket._asdict() for bucket in accuracy_by(margins, right)],
        "by_length_difference": [bucket._asdict() for bucket in accuracy_by(longer_by, right)],
        "length_score_pearson": pearson(result.lengths, result.scores),
        "length_score_spearman": spearman(result.lengths, result.scores),
        "longer": longer_wins(longer_by, result.chosen - result.rejected)._asdict(),
        "worst": worst,
    }


def card_files(
    facts: dict, results: dict[str, Evaluation], tokenizer: Tokenizer | None
) -> dict[str, str]:
    """The texts of card.json and card.md.

    Args:
        facts: about the model itself: heads, lcb_coef, normalized, and a run's provenance.
        results: name of a held-out set -> what the model that is written scores on it.
    """
    sets = {name: describe(result, tokenizer) for name, result in results.items()}
    card = {"model": facts, "sets": sets}
    pages = [_page(name, numbers) for name, numbers in sets.items()]
    text = "\n\n".join(["# Reward model", _model_lines(facts), *pages]) + "\n"
    return {"card.json": atomic.json_text(card), "card.md": text}


# ------------------------------------------------------------------------------------ for people


def escaped(text: str, limit: int = CELL) -> str:
    """A stranger's text for a cell of a Markdown table: one line that formats and runs nothing."""
    plain = html.escape(printable(text, limit), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", plain)


def _model_lines(facts: dict) -> str:
    lines = [f"- heads: {facts['heads']}"]
    if facts["heads"] > 1:
        lines.append(f"- score: mean of the heads - {facts['lcb_coef']:g} of their deviations")
    if normalized := facts.get("normalized"):
        lines.append(
            f"- normalised: over {normalized['over']}, whose scores had mean "
            f"{normalized['mean']:.4f} and standard deviation {normalized['std']:.4f}"
        )
    for data in facts.get("data", ()):
        lines.append(f"- data: {escaped(data['file'])}, sha256 {data['sha256'][:16]}")
    if settings := facts.get("settings"):
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        lines.append(f"- settings: {escaped(told, 10_000)}")
    for change in facts.get("changes", ()):
        told = f"{change['setting']} was {change['was']} before it was {change['is']}"
        lines.append(f"- changed on the way: {escaped(told)}")
    return "\n".join(lines)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _buckets(rows: list[dict], what: str) -> str:
    cells = [
        (f"{row['low']:g} to {row['high']:g}", f"{row['pairs']:,}", _number(row["accuracy"]),
         " to ".join(map(_number, row["accuracy_95"])))
        for row in rows
    ]
    return _table((what, "pairs", "accuracy", "95% interval"), cells)


def _bins(rows: list[dict]) -> str:
    cells = [
        (f"{row.low:.2f} to {row.high:.2f}", f"{row.pairs:,}", _number(row.confidence),
         _number(row.accuracy))
        for row in (Bin(**row) for row in rows)
    ]
    return _table(("confidence", "pairs", "mean confidence", "accuracy"), cells)


def _page(name: str, of: dict) -> str:
    """The part of card.md about one held-out set."""
    longer = of["longer"]
    shown = [("pairs", f"{of['pairs']:,}"), ("accuracy (strict)", _number(of["accuracy"])),
             ("95% interval (Wilson)", " to ".join(map(_number, of["accuracy_95"]))),
             *([("top 1 of lists", _number(of["top1"]))] if "top1" in of else []),
             ("ties", _number(of["ties"])), ("loss", _number(of["loss"])),
             ("mean margin of scores", _number(of["margin"])),
             ("calibration error", _number(of["calibration_error"])),
             ("length and score, Pearson", _number(of["length_score_pearson"])),
             ("length and score, Spearman", _number(of["length_score_spearman"])),
             ("the longer answer is preferred in the data", _number(longer["in_data"])),
             ("the longer answer scores higher", _number(longer["in_scores"]))]
    worst = [
        (*(escaped(row[key]) for key in ("where", "prompt", "chosen", "rejected")),
         _number(row["chosen_score"], 3), _number(row["rejected_score"], 3))
        for row in of["worst"]
    ]
    heads = ("row", "prompt", "chosen", "rejected", "chosen score", "rejected score")
    return "\n\n".join([
        f"## {escaped(name)}", _table(("", ""), shown),
        "How often it is right where it says so:", _bins(of["calibration"]),
        "By the margin in the data:", _buckets(of["by_margin"], "margin"),
        "By how many tokens the preferred answer is longer:",
        _buckets(of["by_length_difference"], "tokens"),
        "Its most confident mistakes:", _table(heads, worst) if worst else "none",
    ])
