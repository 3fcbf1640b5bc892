"""What a data file holds, in numbers: its rows as a recipe reads them, and how long they are.

Nothing is printed here: `minirlhf check` shows it, or writes it as JSON.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

from minirlhf.batches.demonstrations import with_target
from minirlhf.batches.preferences import without_eos
from minirlhf.data.examples import tell_labels
from minirlhf.data.rankings import Ranking, says_nothing
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.tools.check.rows import (
    RECIPES,
    Example,
    Model,
    Raw,
    Sizes,
    ids_of,
    sizes_of,
    strings_of,
)
from minirlhf.tools.check.warn import token_warnings

BINS = 8  # of a histogram


class Measured(NamedTuple):
    """What the loader makes of a file."""

    report: Report
    unit: str  # "tokens" or, without a tokenizer, "characters"
    sizes: list[Sizes]  # before any row is cut or dropped for its length
    limits: dict | None
    samples: list[dict]
    warnings: list[dict]
    problem: UserError | None  # what the recipe would refuse the file for


# ---------------------------------------------------------------------------------- rows as tokens


def sample_rows(
    sides: tuple[str, ...], examples: list[Example], tokenizer: Tokenizer | None
) -> list[dict]:
    """The first, the shortest and the longest row: where faults show.

    Args:
        sides: names of the parts; responses of a ranked list are named by their ranks.
    """

    def text(ids: Sequence[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special=False)

    sizes = [sum(map(len, ids_of(example))) for example in examples]
    picks = {int(np.argmax(sizes)): "longest", int(np.argmin(sizes)): "shortest", 0: "first"}
    rows = []
    for at in reversed(picks):
        names = sides
        if isinstance(examples[at], Ranking):
            names = ("prompt", *(f"rank {rank}" for rank in examples[at].ranks))
        shown = [
            {"side": side, "tokens": len(ids), "text": text(ids),
             "begins": [[id, text([id])] for id in ids[:2]],
             "ends": [[id, text([id])] for id in ids[2:][-3:]]}
            for side, ids in zip(names, ids_of(examples[at]), strict=True) if ids
        ]
        rows.append({"where": examples[at].where, "why": picks[at], "sides": shown})
    return rows


def measure_tokens(
    raw: Raw, model: Model | None, most: int | None, overlong: str, policy: RowPolicy
) -> Measured:
    """A file as its recipe reads it."""
    tokenizer = None if model is None else model.tokenizer
    before_eos = model is not None and raw.recipe == "reward" and model.before_eos
    finish = with_target if raw.recipe == "sft" else None
    if before_eos:
        finish = partial(without_eos, eos_ids=tokenizer.eos_ids)

    def load(
        limit: int | None, overlong: str, policy: RowPolicy
    ) -> tuple[list[Example], Report, np.ndarray]:
        examples, report = RECIPES[raw.recipe].load(
            raw.path, tokenizer, limit, overlong, policy=policy, finish=finish
        )
        return examples, report, np.array([sizes_of(example).whole for example in examples])

    examples, report, whole = load(None, "drop", replace(policy, max_drop=1.0))
    sizes, kept, problem = list(map(sizes_of, examples)), whole, None
    warnings = [] if model is None else token_warnings(examples, tokenizer, not before_eos)
    try:
        if most is not None and whole.max() > most:
            examples, report, kept = load(most, overlong, policy)
        else:
            report.check(policy.max_drop)
    except UserError as error:
        problem = error
    positions = None if model is None else model.config.longest_row
    if problem is None and positions is not None and kept.max() > positions:
        what = f"a row of {kept.max()} tokens, the model reads {positions}"
        problem = UserError(raw.path, what, f"give --max-length {positions}")
    over = {name: {"tokens": limit, "rows_beyond": int((whole > limit).sum())}
            for name, limit in (("max_length", most), ("positions", positions))
            if limit is not None}
    samples = sample_rows(raw.sides, examples, tokenizer)
    over["overlong"] = overlong
    return Measured(report, "tokens", sizes, over, samples, warnings, problem)


def measure_text(raw: Raw, policy: RowPolicy) -> Measured:
    """A file of text without a tokenizer."""
    report, sizes = Report(raw.path, raw.detected, raw.total, rejected_rows=raw.rejected), []
    for where, parts, key, ranks in zip(raw.where, raw.parts, raw.keys, raw.ranks, strict=True):
        why = says_nothing(key[1:], ranks) if raw.lists else None
        if ranks == [1, 2] and key[1] == key[2] and not raw.lists:
            why = "chosen equals rejected"
        if why is not None:
            report.drop(where, why)
            continue
        prompt, *responses = (sum(map(len, strings_of(part))) for part in parts)
        sizes.append(Sizes(prompt, responses, ranks))
    report.kept, problem = len(sizes), None
    report.notes += raw.notes
    if raw.labels:
        tell_labels(report, raw.labels)
    try:
        report.check(policy.max_drop)
    except UserError as error:
        if not sizes:
            raise
        problem = error
    return Measured(report, "characters", sizes, None, [], [], problem)


# -------------------------------------------------------------------------------------- in numbers


def lengths_of(sides: tuple[str, ...], rows: list[Sizes]) -> dict[str, np.ndarray]:
    """Side -> lengths of it in all rows; no "prompt" beside responses where all are empty.

    Args:
        sides: names of the prompt, of responses of rank 1, and of the others.
    """
    found: dict[str, list[int]] = {side: [] for side in sides}
    for row in rows:
        found["prompt"].append(row.prompt)
        for length, rank in zip(row.responses, row.ranks, strict=True):
            found[sides[min(rank, 2)]].append(length)
    columns = {side: np.array(lengths, dtype=np.int64) for side, lengths in found.items()}
    alone = len(columns) == 1
    return {side: v for side, v in columns.items() if side != "prompt" or alone or v.any()}


def length_facts(lengths: dict[str, np.ndarray]) -> dict:
    """Minimum to maximum of each side, and a histogram whose last bin takes the long tail."""
    together = np.concatenate(list(lengths.values()))
    low, high = int(together.min()), int(np.quantile(together, 0.95))
    widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < BINS - 1)
    start = low // width
    slots = {side: np.minimum(v // width - start, BINS - 1) for side, v in lengths.items()}
    used = 1 + max(int(slot.max()) for slot in slots.values())
    edges = [(start + i) * width for i in range(used)]
    labels = [str(e) if width == 1 else f"{e:,}-{e + width - 1:,}" for e in edges]
    if together.max() >= edges[-1] + width:
        labels[-1] = f"{edges[-1]:,}+"
    counts = {side: np.bincount(slot, minlength=used).tolist() for side, slot in slots.items()}
    shape = {
        side: {"min": int(v.min()), "median": float(np.median(v)),
               "p95": int(np.quantile(v, 0.95, method="inverted_cdf")), "max": int(v.max())}
        for side, v in lengths.items()
    }
    return {"sides": shape, "bins": labels, "counts": counts}


def pair_facts(rows: list[Sizes], margins: list[float | None]) -> dict:
    """How far length alone tells which answer is preferred, and what the margins are like.

    Args:
        rows: pairs, or ranked lists, of which all pairs of different rank count.
    """
    longer_by = np.concatenate([row.longer_by for row in rows])
    decided = int(np.count_nonzero(longer_by))
    given = [m for m in margins if m is not None]
    shape = (
        {"min": min(given), "median": float(np.median(given)), "max": max(given)} if given else {}
    )
    return {
        "longer_wins": int((longer_by > 0).sum()), "of_pairs": decided,
        "same_length": len(longer_by) - decided, "chosen_longer_by": float(longer_by.mean()),
        "margins": shape | {"missing": len(margins) - len(given)},
    }


def list_facts(rows: list[Sizes]) -> dict:
    """How many responses the ranked lists have, and how many pairs of them tie."""
    counts = [len(row.ranks) for row in rows]
    pairs = sum(count * (count - 1) // 2 for count in counts)
    decided = sum(len(row.longer_by) for row in rows)
    shape = {"min": min(counts), "median": float(np.median(counts)), "max": max(counts)}
    return {"responses": shape, "tied_pairs": pairs - decided}
