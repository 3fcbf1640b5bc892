"""A file's rows, each split into its parts, and what is to be told of columns that are no part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from minirlhf.data.arguments import ARGUMENTS, given_arguments, with_arguments
from minirlhf.data.formats import Format, was_sampled
from minirlhf.data.parts import Parts, Useless, as_turns, is_chat, unpack
from minirlhf.data.published import reshape, shape_of
from minirlhf.errors import UserError
from minirlhf.files.rows import Row, read_rows
from minirlhf.files.sieve import STRICT, Report, RowPolicy, Sieve, column_names

T = TypeVar("T")

# (our column, a file's) that mean the same where the file's own columns are a published shape's.
SAME = {("prompt", "instruction"), ("prompt", "question"), ("completion", "output"),
        ("response", "output"), ("completion", "response"), ("response", "response"),
        ("chosen", "chosen"), ("rejected", "rejected"), ("messages", "conversations")}
NOT_READ = "not read"
ASKING = ("instruction", "question", "query", "input", "context", "system")  # a prompt elsewhere
JOINED = ("input", "context", "system", "history")  # elsewhere, to a prompt
SEEN = ("image", "images", "video", "videos", "audio", "audios")  # elsewhere, beside the text
# What `minirlhf sample` writes.
SAMPLED = ("prompt", "response", "finish_reason", "tokens", "input_ids", "prompt_length",
           "tokenizer")


class Split(NamedTuple):
    """The rows of a file that are of its kind, with their parts."""

    form: Format
    rows: list[tuple[Row, Parts]]
    report: Report  # of all rows, with the useless ones dropped
    sieve: Sieve


def split_rows(
    path: str | Path, detect: Callable[[Row, bool], Format], sieve: Sieve,
    also: Callable[[Row], object] | None = None, others: str = NOT_READ, asking: bool = False,
) -> Split:
    """Reads a whole file and splits its rows; its first well-formed row tells its kind.

    Args:
        detect: pair_format, prompt_format or text_format.
        sieve: takes malformed rows.
        also: what else a row must stand: raises a UserError where it does not.
        others: what becomes of the columns that no part is made of, in words.
        asking: prompts are all that is needed, whatever the answers beside them say.
    Raises:
        UserError: a fault in a row that the sieve does not take, or no row left.
    """
    rows, beside = list(read_rows(path, sieve)), given_arguments(sieve.policy.template_kwargs)
    report = Report(str(path), "", len(rows) + len(sieve.rejected))
    form, shape, split, packed, chat = None, None, [], {}, sieve.policy.chat
    renamed, joined = column_names(sieve.policy.columns), []
    for given in rows:
        try:
            joined = joined if form else _joined(given, renamed)
            row, names = unpack(_named_back(given, renamed) if joined else given)
            kind = shape if form else shape_of(row)
            row = reshape(row, kind, asking)
            if also is not None:
                also(row)
            found = form or detect(row, sieve.policy.allow_empty_prompt)
            if kind is not None and form is None:
                found = found._replace(detected=f"{kind.told}, read as {found.detected}")
            parts = found.split(row)
            parts, plain = (as_turns(row, parts) if chat else parts), parts
            for name in SEEN:
                if row.columns.get(name):
                    raise UserError(row.where, f"has {name}", "only text is read: remove the row")
            if form is None and chat:
                told = "as turns" if parts is not plain else "which --chat does not change"
                found = found._replace(detected=f"{found.detected}, {told}")
            if is_chat(parts[-1]):
                row = with_arguments(row, beside)
            form, shape = found, kind
            split.append((row, parts))
            packed |= dict.fromkeys(names)
        except Useless as why:
            report.drop(given.where, str(why))
        except UserError as error:
            sieve.reject(error, given.raw)
    if form is None:
        report.rejected_rows = sieve.in_order()
        raise report.nothing_left()
    report.detected = form.detected
    if joined:
        told = f"{', '.join(joined)} beside the columns named: read as {shape.name}"
        report.notes.append(f"{told}, where it is part of the prompt")
    if packed:
        report.notes.append(f"messages in texts, as JSON: {', '.join(packed)}")
    report.notes += _unread(form, split, others)
    return Split(form, split, report, sieve)


def _named_back(row: Row, renamed: dict[str, str]) -> Row:
    """With the file's own names for its columns."""
    columns = {renamed.get(name, name): value for name, value in row.columns.items()}
    return replace(row, columns=columns)


def _joined(row: Row, renamed: dict[str, str]) -> list[str]:
    """Columns that were not named and are part of the prompt, where the names given are just ours
    for those of a published shape; none where the names are to be taken as they are."""
    own = _named_back(row, renamed)
    shape = shape_of(own) if renamed and SAME >= set(renamed.items()) else None
    return [name for name in shape.reads if name in own.columns] if shape else []


def _unread(form: Format, split: list[tuple[Row, Parts]], others: str) -> list[str]:
    """What is told of the columns that no part is made of."""
    first, (prompt, *_) = split[0]
    read = {*form.used, *ARGUMENTS, *(SAMPLED if was_sampled(first) else ())}
    counts: dict[str, int] = {}
    for row, _ in split:
        for name, value in row.columns.items():
            if name not in read and value not in (None, "", [], {}):
                counts[name] = counts.get(name, 0) + 1
    notes = []
    if others == NOT_READ and prompt is None and "prompt" in form.absent:
        if there := [name for name in ASKING if counts.pop(name, 0)]:
            name = f"--columns prompt={there[0]}"
            told = f"warning: {', '.join(there)} not read"
            notes.append(f"{told}: if answers need it, {name}")
    elif others == NOT_READ and "prompt" in form.used:
        for name in JOINED:
            if rows := counts.pop(name, 0):
                what = f"warning: {name} not read, which {rows:,} rows have"
                notes.append(f"{what}: other tools make it part of the prompt")
    return notes + [f"{others}: {', '.join(counts)}"] * bool(counts)


def first_row(path: str | Path, tell: Callable[[Row], T], policy: RowPolicy = STRICT) -> T:
    """What `tell` says of the first row that it does not refuse; it refuses malformed ones.

    Raises:
        UserError: a fault in a row before it that the policy does not skip, or no such row.
    """
    sieve, report = Sieve(policy), Report(str(path), "", 0)
    for given in read_rows(path, sieve):
        try:
            row, _ = unpack(given)
            return tell(reshape(row, shape_of(row)))
        except Useless as why:
            report.drop(given.where, str(why))
        except UserError as error:
            sieve.reject(error, given.raw)
    report.rejected_rows = sieve.in_order()
    report.rows = sum(report.dropped.values()) + len(report.rejected_rows)
    raise report.nothing_left()
