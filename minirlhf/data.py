"""A data file -> the ids of its examples: preference pairs, prompts, texts.

Prompt and response are encoded apart and their ids joined, so the boundary between them is exact.
Texts end alike everywhere: with eos, unless they were cut. What is dropped or cut is counted in the
Report; every fault of a row is an error with file:line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minirlhf.errors import UserError, printable
from minirlhf.formats import (
    Format,
    Messages,
    Part,
    chosen_probability,
    margin,
    pair_format,
    prompt_format,
    text_format,
)
from minirlhf.rows import Row, read_rows
from minirlhf.tokenizer import Tokenizer

OVERLONG = ("drop", "truncate_prompt_left", "truncate_response", "error")
PAIR_LABELS = {"margin": 0.0, "chosen_probability": 1.0}  # optional columns, and what none means


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred; an answer's full text is prompt + answer.

    Args:
        prompt_ids: the shared start; may be empty where the file gives whole texts.
        margin: by how much chosen should win, in reward units; 0 where the row has none.
        where: "file:line".
        columns: the row's other columns.
        chosen_probability: that chosen is the better one, in [0, 1]; 1 where the row has none.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    where: str
    columns: dict
    chosen_probability: float = 1.0

    @property
    def responses(self) -> list[list[int]]:
        return [self.chosen_ids, self.rejected_ids]

    @property
    def ranks(self) -> list[int]:
        return [1, 2]


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Args:
        ids: what the model continues.
        text: what reward functions see: the string, or the list of messages.
        where: "file:line".
        columns: the row's other columns, for reward functions.
    """

    ids: list[int]
    text: str | Messages
    where: str
    columns: dict


@dataclass(frozen=True)
class Text:
    """A text to imitate.

    Args:
        ids: the whole text.
        prompt_length: tokens before the loss starts; 0 for a plain text.
        where: "file:line".
        columns: the row's other columns.
    """

    ids: list[int]
    prompt_length: int
    where: str
    columns: dict


@dataclass
class Report:
    """What a file was taken for and what became of its rows: rows = kept + dropped."""

    path: str
    detected: str
    rows: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"detected: {self.detected} · {self.rows:,} rows · kept {self.kept:,}"]
        lines += [f"dropped:  {count:,} ({why})" for why, count in self.dropped.items()]
        lines += [f"cut:      {self.cut:,} to max_length"] if self.cut else []
        lines += [f"note:     {note}" for note in self.notes]
        return "\n".join([printable(self.path), *(f"  {line}" for line in lines)])


class _Example(NamedTuple):
    row: Row
    prompt: Part | None  # as it stood in the file
    prompt_ids: list[int]
    responses: list[list[int]]
    columns: dict


def load_pairs(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    columns: dict[str, str] | None = None,
) -> tuple[list[Pair], Report]:
    """Preference pairs of a file. Pairs whose two answers are equal are dropped and counted.

    Args:
        path: .jsonl, .json, .csv, .tsv or .txt, or one of these with .gz behind.
        tokenizer: None is enough for a file of token ids, which are taken as they are.
        max_length: tokens of prompt + answer, eos included; None: no limit.
        overlong: "drop", "truncate_prompt_left", "truncate_response" or "error". A cut answer has
            no eos, since its text did not end there.
        columns: legal column name -> name in this file.
    Raises:
        UserError: a fault in a row (file:line), no row left, or an illegal setting.
    """
    rows = _rows(path, columns)
    labels = [(margin(row), chosen_probability(row)) for row in rows]
    examples, report = _load(path, rows, pair_format, tokenizer, max_length, overlong, _equal_sides)
    named = []
    for (name, default), values in zip(PAIR_LABELS.items(), zip(*labels, strict=True), strict=True):
        missing = sum(value is None for value in values)
        named += [name] if missing < len(rows) else []
        if 0 < missing < len(rows):
            report.notes.append(f"{name} missing in {missing:,} rows: they count as {default:g}")
    report.detected = report.detected.replace("rejected)", ", ".join(["rejected", *named]) + ")")
    pairs = []
    for e in examples:  # not looked up by e.row.where: one line may hold many rows
        by, probability = margin(e.row), chosen_probability(e.row)
        others = {k: v for k, v in e.columns.items() if k not in PAIR_LABELS}
        pairs.append(Pair(e.prompt_ids, *e.responses, by or 0.0, e.row.where, others,
                          1.0 if probability is None else probability))  # fmt: skip
    if unlikely := sum(pair.chosen_probability < 0.5 for pair in pairs):
        report.notes.append(f"chosen_probability below 1/2 in {unlikely:,} rows: rejected leads")
    return pairs, report


def _equal_sides(row: Row, responses: list[list[int]]) -> str | None:
    return "chosen equals rejected" if responses[0] == responses[1] else None


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    columns: dict[str, str] | None = None,
) -> tuple[list[Prompt], Report]:
    """Prompts of a file, arguments as in `load_pairs`; `overlong` cannot be "truncate_response"."""
    if overlong == "truncate_response":
        legal = "drop, truncate_prompt_left or error: prompts have no response"
        raise UserError("overlong", f"is {overlong!r}", legal)
    rows = _rows(path, columns)
    examples, report = _load(path, rows, prompt_format, tokenizer, max_length, overlong)
    prompts = []
    for e in examples:
        text = e.prompt
        if not isinstance(text, str) and isinstance(text[0], int):
            text = tokenizer.decode(text, skip_special=False) if tokenizer else ""
        prompts.append(Prompt(e.prompt_ids, text, e.row.where, e.columns))
    return prompts, report


def load_texts(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    columns: dict[str, str] | None = None,
) -> tuple[list[Text], Report]:
    """Texts of a file for supervised training, arguments as in `load_pairs`."""
    rows = _rows(path, columns)
    examples, report = _load(path, rows, text_format, tokenizer, max_length, overlong)
    texts = []
    for e in examples:
        length = 0 if e.prompt is None else len(e.prompt_ids)
        texts.append(Text(e.prompt_ids + e.responses[0], length, e.row.where, e.columns))
    return texts, report


def _rows(path: str | Path, columns: dict[str, str] | None) -> list[Row]:
    """All rows of a file, columns renamed."""
    rows = []
    for row in read_rows(path):
        values = {k: v for k, v in row.columns.items() if k not in (columns or {}).values()}
        for name, source in (columns or {}).items():
            if source not in row.columns:
                keys = ", ".join(printable(key, 40) for key in row.columns)
                raise UserError(row.where, f"no column {source!r} to take as {name}", f"has {keys}")
            values[name] = row.columns[source]
        rows.append(Row(row.where, values, row.typed))
    return rows


def _load(
    path: str | Path,
    rows: list[Row],
    detect: Callable[[Row], Format],
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    reject: Callable[[Row, list[list[int]]], str | None] | None = None,
) -> tuple[list[_Example], Report]:
    """Examples of a file's rows.

    Args:
        detect: the first row -> what all rows are taken for.
        reject: row, ids of its responses as they would be trained -> why it is dropped, or None.
    """
    if overlong not in OVERLONG:
        raise UserError("overlong", f"is {overlong!r}", f"legal: {', '.join(OVERLONG)}")
    if max_length is not None and max_length < 1:
        raise UserError("max_length", f"is {max_length}", "needs at least 1")
    form = detect(rows[0])
    parts = [form.split(row) for row in rows]
    encoded, lead = _encode(path, rows, parts, tokenizer)
    report = Report(str(path), form.detected, len(rows))
    examples = []
    for row, (prompt, *_), (prompt_ids, *responses) in zip(rows, parts, encoded, strict=True):
        length = len(prompt_ids) + max(map(len, responses), default=0)
        why = None
        if cut := max_length is not None and length > max_length:
            if overlong == "error":
                what = f"{length} tokens, max_length is {max_length}"
                raise UserError(row.where, what, "shorten the row, or choose another overlong")
            prompt_ids, responses, why = _fit(prompt_ids, responses, max_length, overlong, lead)
        if why is None and reject is not None:
            why = reject(row, responses)
        if why is not None:
            report.dropped[why] = report.dropped.get(why, 0) + 1
            continue
        report.cut += cut
        others = {key: value for key, value in row.columns.items() if key not in form.used}
        examples.append(_Example(row, prompt, prompt_ids, responses, others))
    report.kept = len(examples)
    if not examples:
        counts = ", ".join(f"{count:,} ({why})" for why, count in report.dropped.items())
        raise UserError(path, f"no row left of {len(rows):,}", f"dropped: {counts}")
    return examples, report


def _fit(
    prompt: list[int], responses: list[list[int]], max_length: int, overlong: str, lead: list[int]
) -> tuple[list[int], list[list[int]], str | None]:
    """(prompt, responses, None) cut to max_length, or the reason why the row is dropped."""
    if overlong == "drop":
        return prompt, responses, "longer than max_length"
    if overlong == "truncate_response":
        room = max_length - len(prompt)
        why = "prompt alone fills max_length" if room < 1 else None
        return prompt, [ids[:room] for ids in responses], why
    kept = len(lead) if prompt[: len(lead)] == lead else 0  # beginning-of-text stays in front
    room = max_length - kept - max(map(len, responses), default=0)
    if room < 1 or len(prompt) <= kept:
        return prompt, responses, "no room for the prompt within max_length"
    return prompt[:kept] + prompt[kept:][-room:], responses, None


def _encode(
    path: str | Path,
    rows: list[Row],
    parts: list[tuple[Part | None, ...]],
    tokenizer: Tokenizer | None,
) -> tuple[list[tuple[list[int], ...]], list[int]]:
    """((prompt ids, response ids, ...) of each row, ids that the tokenizer puts before a text)."""
    sample = parts[0][-1]
    ready = isinstance(sample, list) and not isinstance(sample[0], dict)
    if tokenizer is None and not ready:
        raise UserError(path, "holds text and there is no tokenizer", "give one, or token ids")
    lead = [] if tokenizer is None else tokenizer.encode("")
    if ready:
        limit = None if tokenizer is None else tokenizer.vocab_size
        return [_checked(row, part, limit) for row, part in zip(rows, parts, strict=True)], lead
    if len(parts[0]) > 1 and not tokenizer.eos_ids:
        what = "names no eos token, which every text ends with"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    if isinstance(sample, str):
        whole = parts[0][0] is None
        prompts = [prompt for prompt, *_ in parts]
        heads = [lead] * len(rows) if whole else tokenizer.encode_batch(prompts)
        answers = [text for _, *texts in parts for text in texts]
        tails = iter(tokenizer.encode_batch(answers, bos=False))
        encoded = [
            (head, *islice(tails, len(part) - 1)) for head, part in zip(heads, parts, strict=True)
        ]
    else:
        whole = False
        encoded = [_dialogue(row, part, tokenizer) for row, part in zip(rows, parts, strict=True)]
    for row, (prompt, *responses) in zip(rows, encoded, strict=True):
        if not all(responses) or not (prompt or whole):
            raise UserError(row.where, "a text without any token", "remove the row")
    return [(prompt, *(_ended(ids, tokenizer) for ids in rest)) for prompt, *rest in encoded], lead


def _dialogue(row: Row, part: tuple[Messages, ...], tokenizer: Tokenizer) -> tuple[list[int], ...]:
    """Ids of a prompt of messages and of the answers to it, if there are any."""
    try:
        return tokenizer.encode_dialogue(*part)
    except UserError as error:
        raise UserError(row.where, str(error)) from None


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """With eos at the end; a template's own end of turn is one."""
    return ids if ids[-1] in tokenizer.eos_ids else [*ids, tokenizer.eos_ids[0]]


def _checked(
    row: Row, part: tuple[list[int] | None, ...], limit: int | None
) -> tuple[list[int], ...]:
    """Ids that came as ids: each must have a token."""
    for ids in part:
        if limit is not None and ids and max(ids) >= limit:
            legal = f"the tokenizer has the ids 0 to {limit - 1}"
            raise UserError(row.where, f"token id {max(ids)}", legal)
    return tuple(ids or [] for ids in part)
