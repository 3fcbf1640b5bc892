"""What a data file holds, in numbers: its rows as a recipe reads them, and how long they are.

Nothing is printed here: `minirlhf check` shows it, or writes it as JSON.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

from minirlhf.errors import UserError
from minirlhf.preferences import without_eos
from minirlhf.recipes.sft import with_target
from minirlhf.sieve import Report, RowPolicy
from minirlhf.tokenizer import Tokenizer
from minirlhf.tools.data_rows import RECIPES, Model, Raw, ids_of, strings_of
from minirlhf.tools.data_warnings import token_warnings

BINS = 8  # of a histogram


class Measured(NamedTuple):
    """What the loader makes of a file."""

    report: Report
    unit: str  # "tokens" or, without a tokenizer, "characters"
    lengths: dict[str, np.ndarray]  # side -> (N,), before any row is cut or dropped for its length
    limits: dict | None
    samples: list[dict]
    warnings: list[dict]
    problem: UserError | None  # what the recipe would refuse the file for


# ---------------------------------------------------------------------------------- rows as tokens


def sample_rows(recipe: str, examples: list, tokenizer: Tokenizer | None) -> list[dict]:
    """The first, the shortest and the longest row: where faults show."""

    def text(ids: Sequence[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special=False)

    sizes = [sum(map(len, ids_of(example))) for example in examples]
    picks = {int(np.argmax(sizes)): "longest", int(np.argmin(sizes)): "shortest", 0: "first"}
    rows = []
    for at in reversed(picks):
        sides = [
            {"side": side, "tokens": len(ids), "text": text(ids),
             "begins": [[id, text([id])] for id in ids[:2]],
             "ends": [[id, text([id])] for id in ids[2:][-3:]]}
            for side, ids in zip(RECIPES[recipe].sides, ids_of(examples[at]), strict=True) if ids
        ]  # fmt: skip
        rows.append({"where": examples[at].where, "why": picks[at], "sides": sides})
    return rows


def _lengths(recipe: str, sizes: list[list[int]]) -> dict[str, np.ndarray]:
    """Side -> (N,) lengths; no "prompt" where all are empty."""
    columns = zip(RECIPES[recipe].sides, np.array(sizes, dtype=np.int64).T, strict=True)
    return {side: column for side, column in columns if side != "prompt" or column.any()}


def _whole(sizes: Iterable[list[int]]) -> np.ndarray:
    """(N,) tokens of each row's prompt with its longer answer."""
    return np.array([prompt + max(answers, default=0) for prompt, *answers in sizes])


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
    ) -> tuple[list, Report, list[list[int]]]:
        examples, report = RECIPES[raw.recipe].load(
            raw.path, tokenizer, limit, overlong, policy=policy, finish=finish
        )
        return examples, report, [list(map(len, ids_of(example))) for example in examples]

    examples, report, sizes = load(None, "drop", replace(policy, max_drop=1.0))
    lengths, whole, problem = _lengths(raw.recipe, sizes), _whole(sizes), None
    warnings = [] if model is None else token_warnings(examples, model, not before_eos)
    try:
        if most is not None and whole.max() > most:
            examples, report, sizes = load(most, overlong, policy)
        else:
            report.check(policy.max_drop)
    except UserError as error:
        problem = error
    positions = None if model is None else model.config.longest_row
    if problem is None and positions is not None and (kept := _whole(sizes).max()) > positions:
        what = f"a row of {kept} tokens, the model reads {positions}"
        problem = UserError(raw.path, what, f"give --max-length {positions}")
    over = {name: {"tokens": limit, "rows_beyond": int((whole > limit).sum())}
            for name, limit in (("max_length", most), ("positions", positions))
            if limit is not None}  # fmt: skip
    samples = sample_rows(raw.recipe, examples, tokenizer)
    over["overlong"] = overlong
    return Measured(report, "tokens", lengths, over, samples, warnings, problem)


def measure_text(raw: Raw, policy: RowPolicy) -> Measured:
    """A file of text without a tokenizer."""
    equal = [len(key) == 3 and key[1] == key[2] for key in raw.keys]
    sizes = [
        [sum(map(len, strings_of(part))) for part in parts]
        for parts, same in zip(raw.parts, equal, strict=True) if not same
    ]  # fmt: skip
    report = Report(raw.path, raw.detected, raw.total, len(sizes), rejected_rows=raw.rejected)
    for where, same in zip(raw.where, equal, strict=True):
        if same:
            report.drop(where, "chosen equals rejected")
    problem = None
    try:
        report.check(policy.max_drop)
    except UserError as error:
        if not sizes:
            raise
        problem = error
    return Measured(report, "characters", _lengths(raw.recipe, sizes), None, [], [], problem)


# -------------------------------------------------------------------------------------- in numbers


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
    }  # fmt: skip
    return {"sides": shape, "bins": labels, "counts": counts}


def pair_facts(lengths: dict[str, np.ndarray], margins: list[float | None]) -> dict:
    """How far length alone tells which answer is preferred, and what the margins are like."""
    longer_by = lengths["chosen"] - lengths["rejected"]
    decided = int(np.count_nonzero(longer_by))
    given = [m for m in margins if m is not None]
    shape = (
        {"min": min(given), "median": float(np.median(given)), "max": max(given)} if given else {}
    )
    return {
        "longer_wins": int((longer_by > 0).sum()), "of_pairs": decided,
        "same_length": len(longer_by) - decided, "chosen_longer_by": float(longer_by.mean()),
        "margins": shape | {"missing": len(margins) - len(given)},
    }  # fmt: skip
