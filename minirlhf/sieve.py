"""What becomes of rows that are not as they should be: refused, mended or left out, and told.

A file is malformed in one of two ways. Where the fault lies inside a row, the row can be left out
and the next one read (`--bad-rows skip`). Where it hides where the next row begins (a JSON array or
a quoted CSV field that does not end, a bad header, text that is not UTF-8 in either), nothing
behind it can be trusted, and the file is refused whatever the policy says.
"""

import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from minirlhf.errors import UserError, printable

RAW_CAP = 200  # characters of a row that is left out, as they are shown

# One escape of a JSON string: a whole surrogate pair, half of one (the group), or any other.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


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
    """

    bad_rows: str = "error"
    fix_text: bool = False
    allow_empty_prompt: bool = False
    max_drop: float = 1.0

    @classmethod
    def of(cls, config: object) -> "RowPolicy":
        """The policy that a recipe's config asks for by settings of the same names."""
        return cls(*(getattr(config, rule.name) for rule in fields(cls)))


STRICT = RowPolicy()


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
            UserError: the fault itself, where bad rows are errors.
        """
        if self.policy.bad_rows == "error":
            raise fault
        reason = ": ".join(part for part in (fault.what, fault.do) if part)
        self.rejected.append(LeftOut(fault.where, printable(reason, 300), printable(raw, RAW_CAP)))

    def in_order(self) -> list[LeftOut]:
        """The rows that were left out, as they stand in the file."""
        return sorted(self.rejected, key=lambda row: int(row.where.rpartition(":")[2]))

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
