"""A data file -> the ids of its examples: preference pairs, prompts, texts.

Prompt and response are cut from the ids of the whole text (encoding.py). A text ends with eos,
unless it is truncated. The Report counts what is dropped or truncated; every fault of a row is an
error with file:line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from minirlhf.data.arguments import template_arguments
from minirlhf.data.encoding import encode, fit, unread_arguments
from minirlhf.data.formats import (
    PAIR_LABELS,
    imitated_format,
    pair_format,
    pair_labels,
    prompt_format,
    text_format,
    was_sampled,
)
from minirlhf.data.parts import TRAIN_ON, Messages, Part, Useless
from minirlhf.data.split import Split, split_rows
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.data.turns import Gaps
from minirlhf.errors import UserError
from minirlhf.files.rows import Row
from minirlhf.files.sieve import STRICT, Report, RowPolicy, Sieve

T = TypeVar("T")

OVERLONG = ("drop", "truncate_prompt_left", "truncate_response", "error")
BARE = "warning: texts, read without the model's chat template: --chat makes turns of them"
PASSED = "passed to reward functions"


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
        gaps: (first, behind the last) tokens behind the prompt that the loss leaves out, as turns
            of the user between those of the assistant; counted from the prompt's end.
    """

    ids: list[int]
    prompt_length: int
    where: str
    columns: dict
    gaps: Gaps = ()


def is_bare(prompt: Part | None, tokenizer: Tokenizer) -> bool:
    """Whether a prompt is a text that goes as it stands to a model with a chat template."""
    return isinstance(prompt, str) and tokenizer.has_template


class Encoded(NamedTuple):
    """A row in tokens, of which a loader makes its example."""

    row: Row
    prompt: Part | None  # as it stood in the file
    prompt_ids: list[int]
    responses: list[list[int]]
    columns: dict
    truncated: bool = False  # to max_length
    gaps: Gaps = ()  # as in Text, before it was truncated


def load_pairs(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[Pair], Pair] | None = None,
    whole: bool = False,
) -> tuple[list[Pair], Report]:
    """Preference pairs of a file. Pairs whose two answers are equal are dropped and counted.

    Args:
        path: .jsonl, .json, .csv, .tsv or .txt, or one of these with .gz behind; or .parquet.
        tokenizer: None is enough for a file of token ids, which are taken as they are.
        max_length: tokens of prompt + answer, eos included; None: no limit.
        overlong: "drop", "truncate_prompt_left", "truncate_response" or "error". A truncated answer
            has no eos, since its text did not end there.
        policy: what becomes of malformed rows, how much may be left out, and how the file calls its
            columns.
        finish: a last change of each pair; a UserError that it raises is a fault of the row, a
            Useless why it is dropped.
        whole: answers in messages end where the rendered text does, as a reward model reads them,
            not at the eos that a policy learns to end them with.
    Raises:
        UserError: a fault in a row (file:line), no row left, more left out than the policy
            allows, or an illegal setting.
    """
    split = split_rows(path, pair_format, Sieve(policy), also=pair_labels)

    def make(e: Encoded) -> Pair:
        by, probability = pair_labels(e.row)
        probability = 1.0 if probability is None else probability
        return Pair(e.prompt_ids, *e.responses, by or 0.0, e.row.where, e.columns, probability)

    pairs, report = load_examples(
        split, make, finish, tokenizer, max_length, overlong, _equal_sides, whole
    )
    tell_labels(report, [pair_labels(row) for row, _ in split.rows])
    return pairs, report


def tell_labels(report: Report, labels: list[tuple[float | None, float | None]]) -> None:
    """Says in a report which of PAIR_LABELS the rows have, how many lack one, and what is odd."""
    named = []
    for (name, default), values in zip(PAIR_LABELS.items(), zip(*labels, strict=True), strict=True):
        missing = sum(value is None for value in values)
        named += [name] if missing < len(labels) else []
        if 0 < missing < len(labels):
            report.notes.append(f"{name} missing in {missing:,} rows: they count as {default:g}")
    at = report.detected.rfind("rejected)") + len("rejected")
    if at >= len("rejected"):
        report.detected = ", ".join([report.detected[:at], *named]) + report.detected[at:]
    if unlikely := sum(q is not None and q < 0.5 for _, q in labels):
        report.notes.append(f"chosen_probability below 1/2 in {unlikely:,} rows: rejected leads")


def _equal_sides(row: Row, responses: list[list[int]]) -> str | None:
    return "chosen equals rejected" if responses[0] == responses[1] else None


def load_prompts(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[Prompt], Prompt] | None = None,
    others: str = PASSED, longer: str = "",
) -> tuple[list[Prompt], Report]:
    """Prompts of a file, arguments as in `load_pairs`; `overlong` cannot be "truncate_response".

    Args:
        others: what becomes of the columns beside the prompt, in words.
        longer: what else than --overlong helps where a prompt is too long, likewise.
    """
    if overlong == "truncate_response":
        legal = "drop, truncate_prompt_left or error: prompts have no response"
        raise UserError("overlong", f"is {overlong!r}", legal)
    split = split_rows(path, prompt_format, Sieve(policy), others=others, asking=True)

    def make(e: Encoded) -> Prompt:
        text = e.prompt
        if isinstance(text, list) and isinstance(text[0], int):
            text = tokenizer.decode(e.prompt_ids, skip_special=False) if tokenizer else ""
        elif isinstance(text, str) and e.truncated:  # rewards see what the policy sees
            text = tokenizer.decode(e.prompt_ids, skip_special=not policy.rendered)
        return Prompt(e.prompt_ids, text, e.row.where, e.columns)

    return load_examples(split, make, finish, tokenizer, max_length, overlong, longer=longer)


def encoded_text(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt's text by any tokenizer; by its own, others than those that it has where it
    came as ids or was truncated."""
    if isinstance(prompt.text, str):
        return tokenizer.encode(prompt.text)
    return tokenizer.encode_chat(prompt.text, template_arguments(prompt.columns, prompt.where))


def load_texts(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[Text], Text] | None = None,
    whole: bool = False, imitated: bool = True, train_on: str = "all",
) -> tuple[list[Text], Report]:
    """Texts of a file, arguments as in `load_pairs`.

    Args:
        imitated: to learn from, so that those that are not to be learned are refused or dropped.
        train_on: of messages to learn from, as in `turns.learned_parts`.
    """
    if train_on not in TRAIN_ON:
        raise UserError("train_on", f"is {train_on!r}", f"legal: {', '.join(TRAIN_ON)}")
    detect = partial(imitated_format, train_on=train_on) if imitated else text_format
    split = split_rows(path, detect, Sieve(policy))

    def make(e: Encoded) -> Text:
        length, (answer,) = 0 if e.prompt is None else len(e.prompt_ids), e.responses
        gaps = tuple((start, min(end, len(answer))) for start, end in e.gaps if start < len(answer))
        return Text(e.prompt_ids + answer, length, e.row.where, e.columns, gaps)

    return load_examples(split, make, finish, tokenizer, max_length, overlong, whole=whole,
                         each_turn=imitated and train_on == "all")


# -------------------------------------------------------------------------------- parts, in tokens


def load_examples(
    split: Split, make: Callable[[Encoded], T], finish: Callable[[T], T] | None,
    tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    drop: Callable[[Row, list[list[int]]], str | None] | None = None, whole: bool = False,
    each_turn: bool = False, longer: str = "",
) -> tuple[list[T], Report]:
    """Examples of a file's rows; what is not said here as in `load_pairs`.

    Args:
        make: a row and its ids -> the example.
        drop: row, ids of its responses as they would be trained -> why it is dropped, or None.
        each_turn: as in `encode`.
        longer: what else helps where a row is too long, in words.
    """
    if overlong not in OVERLONG:
        raise UserError("overlong", f"is {overlong!r}", f"legal: {', '.join(OVERLONG)}")
    if max_length is not None and max_length < 1:
        raise UserError("max_length", f"is {max_length}", "needs at least 1")
    form, rows, report, sieve = split
    encoded, gaps, lead, notes = encode(report.path, rows, tokenizer, sieve, whole, each_turn)
    report.notes += notes + unread_arguments(rows, tokenizer, sieve.policy)
    first, (prompt, *_) = rows[0]
    ready = tokenizer is None or was_sampled(first) or sieve.policy.rendered
    if not ready and is_bare(prompt, tokenizer):
        report.notes.append(BARE)
    examples = []
    for (row, (prompt, *_)), ids, left in zip(rows, encoded, gaps, strict=True):
        if ids is None:
            continue  # the sieve has it
        prompt_ids, *responses = ids
        length = len(prompt_ids) + max(map(len, responses), default=0)
        why = None
        if truncated := max_length is not None and length > max_length:
            if overlong == "error":
                what = f"{length} tokens, max_length is {max_length}"
                raise UserError(row.where, what, f"--overlong drop leaves such rows out{longer}")
            prompt_ids, responses, why = fit(prompt_ids, responses, max_length, overlong, lead)
        if why is None and drop is not None:
            why = drop(row, responses)
        if why is not None:
            report.drop(row.where, why)
            continue
        others = {k: v for k, v in row.columns.items() if k not in form.used}
        example = make(Encoded(row, prompt, prompt_ids, responses, others, truncated, left))
        try:
            examples.append(example if finish is None else finish(example))
        except Useless as why:
            report.drop(row.where, str(why))
            continue
        except UserError as error:
            sieve.reject(error, row.raw)
            continue
        report.truncated += truncated
    report.kept = len(examples)
    report.rejected_rows = sieve.in_order()
    report.notes += sieve.notes
    report.check(sieve.policy.max_drop)
    return examples, report
