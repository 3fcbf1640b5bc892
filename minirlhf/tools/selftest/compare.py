"""What a device gave, beside the numbers that a CPU gave in float64.

A difference is the largest of a kind of numbers, as a share of the largest of these numbers; of
sampled texts it is the share of tokens that are others. What is allowed leaves room for processors
that add in another order (float32 on a CPU: up to 2e-6, three steps of PPO 1e-5), and none for
products that are cut to 10 bits (TF32) or for a wrong sign.
"""

import json
import math
import traceback
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minirlhf.errors import UserError, printable
from minirlhf.tools.selftest.checks import CHECKS, Numbers
from minirlhf.tools.selftest.tiny import Place

STORED = Path(__file__).with_name("numbers.json")
PACKAGE = Path(__file__).parents[2]
ALLOWED = {  # check -> of float32, of bfloat16
    "sampled texts": (0.0, 0.25),
    "checkpoint, saved and read": (0.0, 0.0),
    # One other token in the first step is another run from there on, as happens in bfloat16.
    "three steps of PPO": (1e-3, 0.8),
}
USUAL = (1e-4, 0.1)
FLOAT32_ONLY = {"objective/kl", "policy/approxkl_avg", "val/vpred_avg", "weights after"}


class Result(NamedTuple):
    check: str
    numbers: int  # that were compared
    difference: float  # the largest; inf where something is missing, or not finite
    allowed: float
    problem: str = ""  # why it could not be computed

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


@cache
def stored() -> dict[str, Numbers]:
    return json.loads(STORED.read_text("utf-8"))


def compare(check: str, place: Place) -> Result:
    """One check of CHECKS; what stops it is told, since an operation that a device lacks is what an
    owner of it can tell us."""
    half = place.dtype.itemsize == 2
    allowed, skipped = ALLOWED.get(check, USUAL)[half], FLOAT32_ONLY if half else set()
    expected = {kind: n for kind, n in stored()[check].items() if kind not in skipped}
    numbers = sum(map(len, expected.values()))
    try:
        found = CHECKS[check](place)
    except (RuntimeError, TypeError, ValueError, UserError) as error:
        return Result(check, numbers, math.inf, allowed, told(error))
    largest = max(difference(kind, found.get(kind, []), n) for kind, n in expected.items())
    return Result(check, numbers, largest, allowed)


def told(error: Exception) -> str:
    """Where in this package, and the first line of what."""
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)][-1]
    where = Path(last.filename).relative_to(PACKAGE.parent).as_posix()
    what = printable(str(error).partition("\n")[0])
    return f"{where}:{last.lineno}: {type(error).__name__}: {what}"


def difference(kind: str, found: list[float], expected: list[float]) -> float:
    """See the top of this file.

    >>> difference("logits", [1.0, -3.75], [1.0, -4.0])  # 0.25 of 4
    0.0625
    >>> difference("tokens", [5, 7, 9, 2], [5, 7, 8, 2])
    0.25
    """
    if len(found) != len(expected) or not all(map(math.isfinite, found)):
        return math.inf
    gaps = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if kind == "tokens":
        return sum(map(bool, gaps)) / len(gaps)
    return max(gaps) / (max(map(abs, expected)) or 1.0)
