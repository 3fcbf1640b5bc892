"""What a data file holds, as facts that JSON can hold; words.py puts them into words."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count, pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf.batches.demonstrations import with_target
from minirlhf.batches.preferences import without_unread
from minirlhf.batches.responses import with_answers
from minirlhf.data.examples import tell_labels
from minirlhf.data.rankings import says_nothing
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.data.turns import Gaps
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models.config import ModelConfig
from minirlhf.tools.check import warn
from minirlhf.tools.check.rows import KINDS, SeenFile, SeenRow, row_of

BINS = 8  # of a histogram
UNLEARNED = ("<<<", ">>>")  # around what of a response is not learned


class Model(NamedTuple):
    """What can be known of a folder without its weights."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    is_reward: bool
    parameters: int
    unread: int | None  # the id that a reward is read before, so that pairs lose it at their end
    whole: bool  # a reward of messages is read at the end of the rendered text


class Reading(NamedTuple):
    """A file as its recipe reads it."""

    report: Report
    rows: list[SeenRow]  # before any is truncated or dropped for its length
    facts: dict  # unit, limits, samples
    odd: warn.Oddities
    problem: UserError | None  # what the recipe would refuse the file for


def facts_of(file: SeenFile, read: Reading, first: SeenFile | None) -> dict:
    """All facts of a file as JSON can hold them.

    Args:
        first: the file to find shared rows in; None: this is it.
    """
    facts = {
        "recipe": file.recipe, **asdict(read.report),
        "dropped_rows": [row._asdict() for row in read.report.dropped_rows],
        "rejected_rows": [row._asdict() for row in read.report.rejected_rows],
        "different_prompts": len({row.key[0] for row in file.rows} - {None}),
        "lengths": length_facts(file.kind.names, read.rows), **read.facts,
    }
    if file.kind in (KINDS["pairs"], KINDS["lists"]):
        facts["pairs"] = pair_facts(read.rows, [margin for margin, _ in file.labels])
    if file.kind == KINDS["lists"]:
        facts["lists"] = list_facts(read.rows)
    odd = read.odd | warn.odd_lengths(read.rows)
    if first is not None:
        facts["shared"], shared = warn.shared_with(first, file)
        odd |= shared
    facts["warnings"] = [
        {"what": what, "rows": len(where), "first": where[0]}
        for what, where in odd.items() if where
    ]
    return facts


# ---- reading -------------------------------------------------------------------------------------


def read_tokens(
    file: SeenFile, model: Model | None, most: int | None, overlong: str, policy: RowPolicy
) -> Reading:
    """The file by the loader of its recipe.

    Args:
        model: None is enough for a file of token ids.
        most: tokens of the longest row or, for ppo, prompt; None: no limit.
        overlong: what happens to longer ones.
    """
    if model is None:
        config, tokenizer, unread, whole = None, None, None, True
    else:
        _, config, tokenizer, _, _, unread, whole = model
    finish, ended, as_read = None, True, {}
    if file.recipe == "sft":
        finish = with_target
    elif file.recipe == "dpo":
        finish = with_answers
    elif file.recipe == "reward":
        as_read, ended = {"whole": whole}, unread is None and not (whole and file.is_chat)
        finish = None if unread is None else partial(without_unread, unread=unread)

    def load(limit: int | None, overlong: str, policy: RowPolicy) -> tuple[list[SeenRow], Report]:
        path = file.report.path
        found, report = file.load(path, tokenizer, limit, overlong, policy, finish, **as_read)
        return list(map(row_of, found)), report

    rows, report = load(None, "drop", replace(policy, max_drop=1.0))
    kept, problem, longest = rows, None, np.array([row.longest for row in rows])
    try:
        if most is not None and longest.max() > most:
            kept, report = load(most, overlong, policy)
        report.check(policy.max_drop)
        reads = max(row.longest for row in kept)
        if config is not None and reads > config.longest_row:
            what = f"a row of {reads} tokens, the model reads {config.longest_row}"
            raise UserError(report.path, what, f"give --max-length {config.longest_row}")
    except UserError as error:
        problem = error
    limits = {"max_length": most, "positions": config and config.longest_row}
    over = {name: {"tokens": limit, "rows_beyond": int((longest > limit).sum())}
            for name, limit in limits.items() if limit is not None}
    facts = {"unit": "tokens", "limits": over | {"overlong": overlong},
             "samples": samples(file.kind.names, kept, tokenizer)}
    facts["gaps"] = any(row.gaps for row in kept)
    odd = warn.odd_texts(file)
    if tokenizer is not None:
        odd |= warn.odd_tokens(rows, tokenizer, ended=ended)
        if file.is_chat and tokenizer.template_origin == "plain fallback":
            what = "written by a plain template, the model has none"
            odd[what] = [row.where for row in file.rows]
    return Reading(report, rows, facts, odd, problem)


def read_text(file: SeenFile, policy: RowPolicy) -> Reading:
    """Without a tokenizer: rows are dropped for what they say, not for their length."""
    report, kept, problem = file.report, [], None
    for row in file.rows:
        why = says_nothing(row.key[1:], row.ranks) if file.kind == KINDS["lists"] else None
        if file.labels and row.key[1] == row.key[2]:
            why = "chosen equals rejected"
        if why is None:
            kept.append(row)
        else:
            report.drop(row.where, why)
    report.kept = len(kept)
    if file.labels:
        tell_labels(report, file.labels)
    try:
        report.check(policy.max_drop)
    except UserError as error:
        if not kept:
            raise
        problem = error
    facts = {"unit": "characters", "limits": None, "samples": []}
    return Reading(report, kept, facts, warn.odd_texts(file), problem)


# ---- in numbers ----------------------------------------------------------------------------------


def samples(
    names: tuple[str, ...], rows: list[SeenRow], tokenizer: Tokenizer | None
) -> list[dict]:
    """The first, the shortest and the longest row, where faults show."""

    def text(ids: Sequence[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(ids, skip_special=False)

    def shown(ids: Sequence[int], gaps: Gaps) -> str:
        """Of a response, with a mark around what is not learned."""
        starts = [0, *(at for gap in gaps for at in gap)]
        pieces = [text(ids[a:b]) for a, b in pairwise([*starts, len(ids)])]
        marks = [UNLEARNED[at % 2] for at in range(len(pieces) - 1)]
        return "".join(map("".join, zip_longest(pieces, marks, fillvalue="")))

    def seen(row: SeenRow, why: str) -> dict:
        ranked = ("prompt", *(f"rank {rank}" for rank in row.ranks))
        parts = zip(ranked if names[-1] == "others" else names, row.parts, strict=True)
        return {"where": row.where, "why": why, "parts": [
            {"part": name, "tokens": len(ids),
             "text": text(ids) if name == "prompt" else shown(ids, row.gaps),
             "begins": [[id, text([id])] for id in ids[:2]],
             "ends": [[id, text([id])] for id in ids[2:][-3:]]}
            for name, ids in parts if ids
        ]}

    sizes = [sum(row.sizes) for row in rows]
    picks = {int(np.argmax(sizes)): "longest", int(np.argmin(sizes)): "shortest", 0: "first"}
    return [seen(rows[at], picks[at]) for at in reversed(picks)]


def length_facts(names: tuple[str, ...], rows: list[SeenRow]) -> dict:
    """Minimum to maximum of each part, and a histogram whose last bin takes the long tail.

    Args:
        names: of the prompt, of responses of rank 1, and of the others. The prompt is left out
            where it is empty beside responses.
    """
    sizes: dict[str, list[int]] = {name: [] for name in names}
    for row in rows:
        for length, rank in zip(row.sizes, [0, *row.ranks], strict=True):
            sizes[names[min(rank, 2)]].append(length)
    if len(names) > 1 and not any(sizes["prompt"]):
        del sizes["prompt"]
    together = np.concatenate(list(sizes.values()))
    low, high, most = int(together.min()), int(np.quantile(together, 0.95)), int(together.max())
    widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < BINS - 1)
    edges = [at * width for at in range(low // width, most // width + 1)][:BINS]
    labels = [str(e) if width == 1 else f"{e:,}-{e + width - 1:,}" for e in edges]
    if most >= edges[-1] + width:
        labels[-1] = f"{edges[-1]:,}+"
    return {
        "parts": {
            name: {"min": min(v), "median": float(np.median(v)),
                   "p95": int(np.quantile(v, 0.95, method="inverted_cdf")), "max": max(v)}
            for name, v in sizes.items()
        },
        "bins": labels,
        "counts": {
            name: np.histogram(v, [*edges, np.inf])[0].tolist() for name, v in sizes.items()
        },
    }


def _spread(values: Sequence[float]) -> dict:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def pair_facts(rows: list[SeenRow], margins: list[float | None]) -> dict:
    """How often the longer response is preferred, and what the margins are like.

    Args:
        rows: pairs, or ranked lists, of which all pairs of different rank count.
    """
    longer_by = np.array([by for row in rows for by in row.longer_by])
    decided = int(np.count_nonzero(longer_by))
    given = [margin for margin in margins if margin is not None]
    shape = _spread(given) if given else {}
    return {
        "longer_wins": int((longer_by > 0).sum()), "of_pairs": decided,
        "same_length": len(longer_by) - decided, "chosen_longer_by": float(longer_by.mean()),
        "margins": shape | {"missing": len(margins) - len(given)},
    }


def list_facts(rows: list[SeenRow]) -> dict:
    """How many responses the ranked lists have, and how many pairs of them tie."""
    counts = [len(row.ranks) for row in rows]
    ties = sum(n * (n - 1) // 2 for n in counts) - sum(len(row.longer_by) for row in rows)
    return {"responses": _spread(counts), "tied_pairs": ties}
