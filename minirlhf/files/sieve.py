"""Which columns a file's rows have under which names, and what becomes of malformed rows.

A file is malformed in one of two ways. Where the fault lies inside a row, the row can be left out
and the next one read (`--bad-rows skip`). Where it hides where the next row begins (a JSON array or
a quoted CSV field that does not end, a bad header, text that is not UTF-8 in either), nothing
behind it can be trusted, and the file is refused whatever the policy says.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import NamedTuple

from minirlhf.errors import UserError, printable

# Columns that data/formats.py, rankings.py, arguments.py and rewards/verifiers.py read. Those of
# token ids are spelled as in TRL: a file in another tool's spelling is told by it, and needs no
# names.
COLUMNS = (
    "text", "messages", "prompt", "completion", "response", "chosen", "rejected", "margin",
    "chosen_probability", "responses", "ranks", "scores", "best", "choice", "completions",
    "label", "input_ids", "attention_mask", "prompt_length", "prompt_ids", "chosen_ids",
    "chosen_mask", "rejected_ids", "rejected_mask", "tools", "chat_template_kwargs", "answer",
)
RAW_CAP = 200  # characters of a row that is left out, as they are shown

# One escape of a JSON string: a whole surrogate pair, half of one (the group), or any other.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def column_names(words: Iterable[str]) -> dict[str, str]:
    """Our name of a column -> the file's, of legal words such as prompt=question."""
    return dict(word.split("=", 1) for word in words)


def column_problems(words: Iterable[str]) -> list[str]:
    """What is wrong with such words, in sentences; none where `column_names` can read them."""
    found: list[str] = []
    columns: dict[str, str] = {}
    for word in words:
        name, _, column = word.partition("=")
        shown = printable(name, 40)
        if not (name and column):
            got = printable(repr(word), 80)
            found.append(f"columns: got {got}, must be NAME=COLUMN, as in prompt=question")
        elif name not in COLUMNS:
            near = get_close_matches(name[:80], COLUMNS, n=1)
            do = f"the nearest is {near[0]}" if near else f"legal: {', '.join(COLUMNS)}"
            if column in COLUMNS:
                do = f"our name comes first: {column}={shown}"
            found.append(f"columns: no {shown!r} is read: {do}")
        elif name in columns:
            two = printable(f"{columns[name]} and {column}", 80)
            found.append(f"columns: two for {shown}: {two}")
        elif column in columns.values():
            found.append(f"columns: {printable(column, 40)!r} is given for two names")
        else:
            columns[name] = column
    return found


def name_problems(rendered: bool, spelled: bool) -> list[str]:
    """What is wrong with two settings that cannot both be meant."""
    both = rendered and spelled
    return ["rendered: names are tokens, spelled: they are text: give one of them"] if both else []


@dataclass(frozen=True)
class RowPolicy:
    """What is done about rows that are not as they should be.

    Args:
        bad_rows: "error": the first malformed row is an error; "skip": such rows are left out.
        fix_text: half of a surrogate pair, which has no UTF-8 form, becomes U+FFFD.
        allow_empty_prompt: a prompt may be empty. Something must still stand before the first
            token that is sampled, so a prompt to answer then needs a tokenizer that puts
            beginning-of-text in front.
        max_drop: largest share of a file's rows that may be left out, for whatever reason; 0 to 1.
        columns: words such as prompt=question, the file's name of a column behind ours.
        chat: texts are turns, a prompt the user's and an answer the assistant's.
        template_kwargs: words such as enable_thinking=false, what each row of messages tells its
            chat template (data/arguments.py).
        rendered: strings are rendered already: names of control tokens in them are these tokens,
            and nothing is put in front.
        spelled: such names are text. Where neither is said, a row whose string or assistant's turn
            holds one elsewhere than at its end is malformed.
    Raises:
        UserError: columns that cannot be meant, or both of the last two.
    """

    bad_rows: str = "error"
    fix_text: bool = False
    allow_empty_prompt: bool = False
    max_drop: float = 1.0
    columns: tuple[str, ...] = ()
    chat: bool = False
    template_kwargs: tuple[str, ...] = ()
    rendered: bool = False
    spelled: bool = False

    def __post_init__(self):
        if problems := column_problems(self.columns) + name_problems(self.rendered, self.spelled):
            raise UserError("RowPolicy", "; ".join(problems))

    @classmethod
    def of(cls, config: object) -> "RowPolicy":
        """The policy that a recipe's config asks for by settings of the same names."""
        return cls(*(getattr(config, rule.name) for rule in fields(cls)))


STRICT = RowPolicy()


class OfEveryRow(UserError):
    """A fault that the rows behind have too, so that leaving this one out does not help."""


class LeftOut(NamedTuple):
    """A row that is not trained on; `raw` is empty where the row itself is as it should be."""

    where: str  # file:line
    reason: str
    raw: str = ""  # as it stands in the file: escaped, capped


@dataclass
class Sieve:
    """Keeps back the malformed rows of one file, or raises at the first of them."""

    policy: RowPolicy = STRICT
    rejected: list[LeftOut] = field(default_factory=list)
    mended: int = 0  # halves of surrogate pairs that became U+FFFD

    def reject(self, fault: UserError, raw: str) -> None:
        """Leaves out the row in which the fault was found.

        Args:
            fault: its `where` is the row's file:line.
            raw: the row's text, of which RAW_CAP characters suffice.
        Raises:
            UserError: the fault, where bad rows are errors, and how to leave such rows out.
        """
        if self.policy.bad_rows == "error":
            if isinstance(fault, OfEveryRow):
                raise fault
            mend = "--fix-text mends it" if fault.what.startswith("half of a surrogate") else ""
            skip = "--bad-rows skip leaves such rows out"
            do = "; ".join(filter(None, (fault.do, mend, skip)))
            raise UserError(fault.where, fault.what, do, fault.code)
        reason = ": ".join(part for part in (fault.what, fault.do) if part)
        self.rejected.append(LeftOut(fault.where, printable(reason, 300), printable(raw, RAW_CAP)))

    @property
    def notes(self) -> list[str]:
        """What was mended, for the report."""
        if not self.mended:
            return []
        return [f"{self.mended:,} halves of surrogate pairs became U+FFFD"]

    def in_order(self) -> list[LeftOut]:
        """The rows that were left out, as they stand in the file."""
        # file:line, or file:line (row number) where a line has several
        return sorted(
            self.rejected,
            key=lambda row: [int(n) for n in re.findall(r"\d+", row.where.rpartition(":")[2])],
        )

    def mend(self, text: str) -> str:
        """A JSON text with each half of a surrogate pair replaced, where the policy says so.

        No character moves: the escape of U+FFFD is as long as the one that it replaces.
        """
        if not self.policy.fix_text:
            return text

        def whole(escape: re.Match) -> str:
            self.mended += escape[1] is not None
            return escape[0] if escape[1] is None else "\\ufffd"

        return _ESCAPE.sub(whole, text)


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
    truncated: int = 0
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
        kept = f" · kept {self.kept:,}" if self.kept != self.rows else ""
        lines = [f"{kind + ':':<9} {count}" for kind, count in self.left_out()]
        lines += [f"truncated: {self.truncated:,} to max_length"] if self.truncated else []
        lines += [n if n.startswith("warning: ") else f"note:     {n}" for n in self.notes]
        first = f"{printable(self.path)}: detected {self.detected} · {self.rows:,} rows{kept}"
        return "\n".join([first, *(f"  {printable(line, 400)}" for line in lines)])


def files_of_left_out(reports: list[Report]) -> dict[str, str]:
    """The text of each file that lists rows of the data that a run does not see, and why."""
    rejected = [row._asdict() for report in reports for row in report.rejected_rows]
    dropped = [
        {"where": row.where, "reason": row.reason}
        for report in reports for row in report.dropped_rows
    ]
    listed = {"rejected.jsonl": rejected, "dropped.jsonl": dropped}
    return {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            for name, rows in listed.items()}
