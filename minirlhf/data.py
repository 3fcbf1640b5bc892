"""A data file -> the ids of its examples: preference pairs, prompts, texts.

Prompt and response are encoded apart and their ids joined, so the boundary between them is exact.
Texts end alike everywhere: with eos, unless they were cut. What is dropped or cut is counted in the
Report; every fault of a row is an error with file:line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from minirlhf.errors import UserError, printable
from minirlhf.formats import Format, Messages, Part, margin, pair_format, prompt_format, text_format
from minirlhf.rows import Row, read_rows
from minirlhf.sieve import STRICT, LeftOut, RowPolicy, Sieve
from minirlhf.tokenizer import Tokenizer

Parts = tuple[Part | None, ...]  # (prompt or None, response, ...)
T = TypeVar("T")

OVERLONG = ("drop", "truncate_prompt_left", "truncate_response", "error")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred; an answer's full text is prompt + answer.

    Args:
        prompt_ids: the shared start; may be empty where the file gives whole texts.
        margin: by how much chosen should win, in reward units; 0 where the row has none.
        where: "file:line".
        columns: the row's other columns.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    where: str
    columns: dict


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
    """What a file was taken for and what became of its rows.

    rows = kept + dropped + rejected: a dropped row is as it should be but of no use (too long, or
    its answers are equal), a rejected one is malformed.
    """

    path: str
    detected: str
    rows: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    notes: list[str] = field(default_factory=list)
    dropped_rows: list[LeftOut] = field(default_factory=list)
    rejected_rows: list[LeftOut] = field(default_factory=list)

    def drop(self, where: str, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1
        self.dropped_rows.append(LeftOut(where, why))

    def left_out(self) -> list[tuple[str, str]]:
        """What was left out, in words: "dropped" for each reason, "rejected" with the first row."""
        counts = [("dropped", f"{count:,} ({why})") for why, count in self.dropped.items()]
        if self.rejected_rows:
            where, reason, _ = self.rejected_rows[0]
            counts.append(("rejected", f"{len(self.rejected_rows):,} (first: {where}: {reason})"))
        return counts

    def check(self, max_drop: float) -> None:
        """Refuses a file of which too little is left.

        Raises:
            UserError: no row is left, or a larger share than max_drop is left out.
        """
        if not self.kept:
            raise self.nothing_left()
        if (out := self.rows - self.kept) / self.rows > max_drop:
            what = f"{out:,} of {self.rows:,} rows are left out, max_drop is {max_drop:g}"
            do = "mend the rows, or raise max_drop"
            raise UserError(self.path, what, f"{self._counts()}; {do}")

    def nothing_left(self) -> UserError:
        return UserError(self.path, f"no row left of {self.rows:,}", self._counts())

    def _counts(self) -> str:
        return "; ".join(map(": ".join, self.left_out()))

    def __str__(self) -> str:
        lines = [f"detected: {self.detected} · {self.rows:,} rows · kept {self.kept:,}"]
        lines += [f"{kind + ':':<9} {count}" for kind, count in self.left_out()]
        lines += [f"cut:      {self.cut:,} to max_length"] if self.cut else []
        lines += [f"note:     {note}" for note in self.notes]
        return "\n".join([printable(self.path), *(f"  {printable(line, 400)}" for line in lines)])


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
    policy: RowPolicy = STRICT,
    finish: Callable[[Pair], Pair] | None = None,
) -> tuple[list[Pair], Report]:
    """Preference pairs of a file. Pairs whose two answers are equal are dropped and counted.

    Args:
        path: .jsonl, .json, .csv, .tsv or .txt, or one of these with .gz behind.
        tokenizer: None is enough for a file of token ids, which are taken as they are.
        max_length: tokens of prompt + answer, eos included; None: no limit.
        overlong: "drop", "truncate_prompt_left", "truncate_response" or "error". A cut answer has
            no eos, since its text did not end there.
        columns: legal column name -> name in this file.
        policy: what becomes of malformed rows, and how much may be left out.
        finish: a last change of each pair; a UserError that it raises is a fault of the row.
    Raises:
        UserError: a fault in a row (file:line), no row left, more left out than the policy
            allows, or an illegal setting.
    """
    sieve = Sieve(policy)
    split = split_rows(path, pair_format, sieve, columns, also=margin)

    def make(e: _Example) -> Pair:
        others = {key: value for key, value in e.columns.items() if key != "margin"}
        return Pair(e.prompt_ids, *e.responses, margin(e.row) or 0.0, e.row.where, others)

    pairs, report = _load(path, split, make, finish, tokenizer, max_length, overlong, sieve)
    missing = sum(margin(row) is None for row, _ in split.rows)
    if missing < len(split.rows):
        report.detected = report.detected.replace("rejected)", "rejected, margin)")
        if missing:
            report.notes.append(f"margin missing in {missing:,} rows: they count as 0")
    return pairs, report


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    columns: dict[str, str] | None = None,
    policy: RowPolicy = STRICT,
    finish: Callable[[Prompt], Prompt] | None = None,
) -> tuple[list[Prompt], Report]:
    """Prompts of a file, arguments as in `load_pairs`; `overlong` cannot be "truncate_response"."""
    if overlong == "truncate_response":
        legal = "drop, truncate_prompt_left or error: prompts have no response"
        raise UserError("overlong", f"is {overlong!r}", legal)
    sieve = Sieve(policy)
    split = split_rows(path, prompt_format, sieve, columns)

    def make(e: _Example) -> Prompt:
        text = e.prompt
        if isinstance(text, list) and isinstance(text[0], int):
            text = tokenizer.decode(text, skip_special=False) if tokenizer else ""
        return Prompt(e.prompt_ids, text, e.row.where, e.columns)

    return _load(path, split, make, finish, tokenizer, max_length, overlong, sieve)


def load_texts(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    columns: dict[str, str] | None = None,
    policy: RowPolicy = STRICT,
    finish: Callable[[Text], Text] | None = None,
) -> tuple[list[Text], Report]:
    """Texts of a file for supervised training, arguments as in `load_pairs`."""
    sieve = Sieve(policy)
    split = split_rows(path, text_format, sieve, columns)

    def make(e: _Example) -> Text:
        length = 0 if e.prompt is None else len(e.prompt_ids)
        return Text(e.prompt_ids + e.responses[0], length, e.row.where, e.columns)

    return _load(path, split, make, finish, tokenizer, max_length, overlong, sieve)


# ---------------------------------------------------------------------------- a file, taken apart


class Split(NamedTuple):
    """The rows of a file that are of its kind, with their parts."""

    form: Format
    rows: list[tuple[Row, Parts]]
    total: int  # rows that were read, those that the sieve kept back included


def split_rows(
    path: str | Path,
    detect: Callable[[Row, bool], Format],
    sieve: Sieve,
    columns: dict[str, str] | None = None,
    also: Callable[[Row], object] | None = None,
) -> Split:
    """Reads a whole file and takes its rows apart; its first well-formed row tells its kind.

    Args:
        detect: pair_format, prompt_format or text_format.
        sieve: takes malformed rows.
        columns: legal column name -> name in this file.
        also: what else a row must stand: raises a UserError where it does not.
    Raises:
        UserError: a fault in a row that the sieve does not take, or no row left.
    """
    rows = list(_renamed(read_rows(path, sieve), columns or {}, sieve))
    total, form, split = len(rows) + len(sieve.rejected), None, []
    for row in rows:
        try:
            if also is not None:
                also(row)
            form = form or detect(row, sieve.policy.allow_empty_prompt)
            split.append((row, form.split(row)))
        except UserError as error:
            sieve.reject(error, row.raw)
    if not split:
        raise Report(str(path), "", total, rejected_rows=sieve.in_order()).nothing_left()
    return Split(form, split, total)


def _renamed(rows: Iterator[Row], columns: dict[str, str], sieve: Sieve) -> Iterator[Row]:
    for row in rows:
        values = {k: v for k, v in row.columns.items() if k not in columns.values()}
        lacking = [name for name, source in columns.items() if source not in row.columns]
        if lacking:
            keys = ", ".join(printable(key, 40) for key in row.columns)
            what = f"no column {columns[lacking[0]]!r} to take as {lacking[0]}"
            sieve.reject(UserError(row.where, what, f"has {keys}"), row.raw)
            continue
        values |= {name: row.columns[source] for name, source in columns.items()}
        yield replace(row, columns=values)


# -------------------------------------------------------------------------------- parts, in tokens


def _load(
    path: str | Path,
    split: Split,
    make: Callable[[_Example], T],
    finish: Callable[[T], T] | None,
    tokenizer: Tokenizer | None,
    max_length: int | None,
    overlong: str,
    sieve: Sieve,
) -> tuple[list[T], Report]:
    if overlong not in OVERLONG:
        raise UserError("overlong", f"is {overlong!r}", f"legal: {', '.join(OVERLONG)}")
    if max_length is not None and max_length < 1:
        raise UserError("max_length", f"is {max_length}", "needs at least 1")
    encoded, lead = _encode(path, split, tokenizer, sieve)
    report = Report(str(path), split.form.detected, split.total)
    examples = []
    for (row, (prompt, *_)), ids in zip(split.rows, encoded, strict=True):
        if ids is None:
            continue  # the sieve has it
        prompt_ids, *responses = ids
        length = len(prompt_ids) + max(map(len, responses), default=0)
        why = None
        if cut := max_length is not None and length > max_length:
            if overlong == "error":
                what = f"{length} tokens, max_length is {max_length}"
                raise UserError(row.where, what, "shorten the row, or choose another overlong")
            prompt_ids, responses, why = _fit(prompt_ids, responses, max_length, overlong, lead)
        if why is None and len(responses) == 2 and responses[0] == responses[1]:
            why = "chosen equals rejected"
        if why is not None:
            report.drop(row.where, why)
            continue
        others = {k: v for k, v in row.columns.items() if k not in split.form.used}
        example = make(_Example(row, prompt, prompt_ids, responses, others))
        try:
            examples.append(example if finish is None else finish(example))
        except UserError as error:
            sieve.reject(error, row.raw)
            continue
        report.cut += cut
    report.kept = len(examples)
    report.rejected_rows = sieve.in_order()
    if sieve.mended:
        report.notes.append(f"{sieve.mended:,} halves of surrogate pairs became U+FFFD")
    report.check(sieve.policy.max_drop)
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
    path: str | Path, split: Split, tokenizer: Tokenizer | None, sieve: Sieve
) -> tuple[list[tuple[list[int], ...] | None], list[int]]:
    """((prompt ids, response ids, ...) of each row, None where the sieve took it;
    ids that the tokenizer puts before a text)."""
    parts = [part for _, part in split.rows]
    sample = parts[0][-1]
    ready = isinstance(sample, list) and not isinstance(sample[0], dict)
    if tokenizer is None and not ready:
        raise UserError(path, "holds text and there is no tokenizer", "give one, or token ids")
    lead = [] if tokenizer is None else tokenizer.encode("")
    if not ready and len(parts[0]) > 1 and not tokenizer.eos_ids:
        what = "names no eos token, which every text ends with"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    limit = None if tokenizer is None else tokenizer.vocab_size
    batch = [] if ready else _encode_strings(parts, lead, tokenizer)
    headless = parts[0][0] is None or (sieve.policy.allow_empty_prompt and len(parts[0]) > 1)
    encoded: list[tuple[list[int], ...] | None] = []
    for at, (row, part) in enumerate(split.rows):
        try:
            if ready:
                ids = _checked(row, part, limit)
            else:
                ids = batch[at] if batch else _dialogue(row, part, tokenizer)
                ids = _ended(row, ids, headless, tokenizer)
            encoded.append(ids)
        except UserError as error:
            sieve.reject(error, row.raw)
            encoded.append(None)
    return encoded, lead


def _encode_strings(
    parts: list[Parts], lead: list[int], tokenizer: Tokenizer
) -> list[tuple[list[int], ...]]:
    """Ids of all rows at once, which takes the tokenizer least time; [] if they are dialogues."""
    if not isinstance(parts[0][-1], str):
        return []
    prompts, *answers = zip(*parts, strict=True)
    heads = [lead] * len(parts) if prompts[0] is None else tokenizer.encode_batch(prompts)
    tails = [tokenizer.encode_batch(texts, bos=False) for texts in answers]
    return list(zip(heads, *tails, strict=True))


def _dialogue(row: Row, part: tuple[Messages, ...], tokenizer: Tokenizer) -> tuple[list[int], ...]:
    """Ids of a prompt of messages and of the answers to it, if there are any."""
    try:
        return tokenizer.encode_dialogue(*part)
    except UserError as error:
        raise UserError(row.where, str(error)) from None


def _ended(
    row: Row, ids: tuple[list[int], ...], headless: bool, tokenizer: Tokenizer
) -> tuple[list[int], ...]:
    """Ids of a row, its answers with eos at the end; a template's own end of turn is one.

    Args:
        headless: whether there may be nothing before the answers.
    """
    prompt, *answers = ids
    if not all(answers) or not (prompt or headless):
        why = "" if answers else "the tokenizer puts no beginning-of-text there: "
        raise UserError(row.where, "a text without any token", f"{why}remove the row")
    eos = tokenizer.eos_ids
    return (prompt, *(ids if ids[-1] in eos else [*ids, eos[0]] for ids in answers))


def _checked(
    row: Row, part: tuple[list[int] | None, ...], limit: int | None
) -> tuple[list[int], ...]:
    """Ids that came as ids: each must have a token."""
    for ids in part:
        if limit is not None and ids and max(ids) >= limit:
            legal = f"the tokenizer has the ids 0 to {limit - 1}"
            raise UserError(row.where, f"token id {max(ids)}", legal)
    return tuple(ids or [] for ids in part)
