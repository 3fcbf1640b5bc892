"""Single answers, each liked or not by itself, and their loader.

    prompt, completion (or response), label     true: liked; also called kto_tag
    messages, label                             the last turn, the assistant's, is the answer
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minirlhf.data.examples import Encoded, load_examples
from minirlhf.data.formats import LIKED, Format, text_format, truth
from minirlhf.data.parts import Part, wrong_value
from minirlhf.data.split import first_row, split_rows
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.rows import Row
from minirlhf.files.sieve import STRICT, Report, RowPolicy, Sieve


@dataclass(frozen=True)
class Unpaired:
    """An answer to a prompt.

    Args:
        prompt_ids: may be empty where the file gives whole texts.
        desirable: whether it was liked.
        where: "file:line".
        columns: the row's other columns.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    desirable: bool
    where: str
    columns: dict

    @property
    def responses(self) -> list[list[int]]:
        return [self.response_ids]

    @property
    def ranks(self) -> list[int]:
        return [1]


def is_unpaired(row: Row) -> bool:
    """Whether a row says of one answer that it was liked or not."""
    pairs = {"chosen", "rejected"} & row.columns.keys()
    return not pairs and any(truth(row, name) is not None for name in LIKED)


def unpaired_format(row: Row, empty_prompt: bool = False) -> Format:
    """The kind of file that starts with this row; parts (prompt or None, response).

    Args:
        empty_prompt: a prompt may be empty.
    """
    labels = [name for name in LIKED if name in row.columns]
    if len(labels) != 1:
        what = f"has {' and '.join(labels)}" if labels else "has no label"
        do = "needs one of label, kto_tag: true where the answer was liked, else false"
        raise UserError(row.where, what, f"{do}; other names: --columns label=good")
    form, label = text_format(row, empty_prompt), labels[0]

    def parts(row: Row) -> tuple[Part | None, ...]:
        if truth(row, label) is None:
            raise wrong_value(row, label, row.columns.get(label), "needs true or false")
        return form.parts(row)

    return Format(f"{form.detected}, each with {label}", (*form.used, label), parts, form.absent)


def load_unpaired(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[Unpaired], Unpaired] | None = None,
) -> tuple[list[Unpaired], Report]:
    """Single answers of a file, arguments and errors as in `load_pairs`."""
    split = split_rows(path, unpaired_format, Sieve(policy))

    def make(e: Encoded) -> Unpaired:
        liked = any(truth(e.row, name) for name in LIKED)
        return Unpaired(e.prompt_ids, e.responses[0], liked, e.row.where, e.columns)

    rows, report = load_examples(split, make, finish, tokenizer, max_length, overlong)
    liked = sum(row.desirable for row in rows)
    report.notes.append(f"{liked:,} answers were liked, {len(rows) - liked:,} were not")
    return rows, report


def holds_unpaired(path: str | Path, policy: RowPolicy = STRICT) -> bool:
    """Whether the first well-formed row of a file is a single answer with its label; errors as in
    `first_row`."""
    return first_row(path, is_unpaired, policy)
