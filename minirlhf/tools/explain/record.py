"""What a run recorded of one step: its settings, its rows in samples.jsonl, its tokenizer."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.pieces import pieces
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.files import folders
from minirlhf.files.reading import read_lines, strict_json, utf8_text
from minirlhf.run import settings
from minirlhf.tools.explain.settings import ExplainConfig
from minirlhf.tools.export import settings_in

RECORDED_BY = {
    "ppo": "--save-rollouts records them", "grpo": "--save-rollouts records them",
    "reward": "--show-samples with --eval-data records them",
    "dpo": "--show-samples with --eval-data records them",
}
PER_TOKEN = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
OF_PAIRS = ("chosen_score", "rejected_score", "margin")
# How a recipe begins a row; others are parsed to see their step.
BEGINNING = re.compile(rb'\{"step": (\d{1,18}), "kind": "(\w+)"')


class Update(NamedTuple):
    """The sample under the weights that the update has reached, where they are known."""

    logprobs: list[float]
    values: list[float] | None


class Record(NamedTuple):
    """All samples of one step, and which of them is explained."""

    where: str  # file and step, or what the demo's model did, for people
    config: object  # the recipe's
    rows: list[dict]  # as in samples.jsonl
    at: int
    tokenizer: Tokenizer | None  # None: nothing says the tokens' texts
    update: Update | None = None  # None: the ratio is 1
    example: bool = False  # of the demo's model, made in memory

    @property
    def row(self) -> dict:
        return self.rows[self.at]


def read_record(asked: ExplainConfig) -> Record:
    """The record that a command asks for.

    Raises:
        UserError: no such run, step or sample; a run of another recipe; rows that are not of the
            form.
    """
    place, algorithm = Path(asked.run), asked.algorithm
    recipe, config = settings_in(place, None)
    if recipe != algorithm:
        explained = f"minirlhf explain {recipe} {printable(place)}"
        do = explained if recipe in RECORDED_BY else f"give the folder of a {algorithm} run"
        raise UserError(place, f"is of a run of {recipe}", do)
    settings.validate(config)
    path = place / "samples.jsonl"
    rows = _rows_of_step(path, algorithm, asked.step)
    step = rows[0]["step"]
    tokenizer = tokenizer_of(place, config.model, config.base)
    return Record(f"step {step} of {printable(place)}", config, rows, asked.sample, tokenizer)


def _rows_of_step(path: Path, algorithm: str, step: int | None) -> list[dict]:
    """The rows of a step, or of the last one that has any."""
    kind = "rollout" if algorithm in ("ppo", "grpo") else None
    seen: set[int] = set()
    kept: list[tuple[int, bytes]] = []
    for number, line in read_lines(path) if path.exists() else ():
        if start := BEGINNING.match(line):
            of, what = int(start[1]), start[2].decode()
        else:
            row = _parsed(line, path, number)
            of, what = row.get("step"), row.get("kind")
        if type(of) is not int:
            raise UserError(f"{path}:{number}", "has no step", "is it of another program?")
        if what != kind:
            continue
        if step is None and of > max(seen, default=-1):
            kept = []
        seen.add(of)
        if of == (max(seen) if step is None else step):
            kept.append((number, line))
    if not seen:
        raise UserError(path, f"holds no samples of {algorithm}", RECORDED_BY[algorithm])
    if not kept:
        raise UserError("--step", f"got {step}", f"recorded are {ranges(seen)}")
    check = _check_rollout if kind else _check_pair
    rows = [check(_parsed(line, path, number), f"{path}:{number}") for number, line in kept]
    for row, (number, _) in zip(rows, kept, strict=True):
        if row.keys() != rows[0].keys():
            raise UserError(f"{path}:{number}", "has other fields than its step's first row",
                            "is it of another program?")
    return rows


def _parsed(line: bytes, path: Path, number: int) -> dict:
    row = strict_json(utf8_text(line, f"{path}:{number}").rstrip("\r\n"), path, number)
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}", "is no JSON object", "is it of another program?")
    return row


def ranges(steps: Iterable[int]) -> str:
    """Whole numbers in a line.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    parts: list[list[int]] = []
    for n in sorted(steps):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return printable(", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts), 80)


# -------------------------------------------------------------------------------- rows, checked


def _check_rollout(row: dict, where: str) -> dict:
    for name in ("prompt_ids", "response_ids"):
        ids = row.get(name)
        if not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
            raise UserError(where, f"has no list of ids {name}", "is it of another program?")
    tokens = len(row["response_ids"])
    for name in PER_TOKEN:
        values = row.get(name, [0.0] * tokens)
        if not (isinstance(values, list) and len(values) == tokens and all(map(_finite, values))):
            what = f"{name} is not a number for each of {tokens} tokens"
            raise UserError(where, what, "is it of another program?")
    for name in ("old_logprobs", "advantages"):
        if name not in row:
            raise UserError(where, f"has no {name}", "is it of another program?")
    _check_numbers(row, ("score",), where)
    return row


def _check_pair(row: dict, where: str) -> dict:
    if "desirable" in row:
        raise UserError(where, "is a single response", "explain shows the losses of pairs")
    _check_numbers(row, OF_PAIRS, where)
    return row


def _check_numbers(row: dict, names: Iterable[str], where: str) -> None:
    for name in names:
        if not _finite(row.get(name)):
            raise UserError(where, f"{name} is no number", "is it of another program?")


def _finite(x: object) -> bool:
    return type(x) in (int, float) and abs(x) < 1e30 and math.isfinite(x)


# ------------------------------------------------------------------------------------- its texts


def tokenizer_of(place: Path, model: str, base: str | None) -> Tokenizer | None:
    """Of the run's own model, else of the one that it began with; None where neither is there."""
    if (place / "model" / "tokenizer.json").exists():
        return load_tokenizer(place / "model")
    if not Path(model).is_dir():
        return None
    return load_tokenizer(folders.resolve(model, base=base))


def token_texts(record: Record) -> list[str]:
    """Of each response token; where several write one character, it stands at the first."""
    ids, tokenizer = record.row["response_ids"], record.tokenizer
    if tokenizer is None:
        return [f"id {i}" for i in ids]
    if max(*ids, *record.row["prompt_ids"]) >= tokenizer.vocab_size:
        return [f"id {i}" for i in ids]  # a padded vocabulary has ids without a text
    texts = ["″"] * len(ids)
    for piece in pieces(tokenizer, record.row["prompt_ids"], ids):
        texts[piece.start] = f"'{printable(piece.text, 40)}'"
    return texts
