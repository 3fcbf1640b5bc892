"""The tokenizers library: what a tokenizer.json may cost, and how its faults are told.

It is loaded in this process. A child that loaded it first, within limits of time and memory, would
cost 0.35 s more for SmolLM2's 1.5 MB, since all is parsed twice, and 0.07 s for the smallest. So
what may be costly in a file is bounded before it is loaded instead.
"""

import math
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minirlhf.errors import UserError

GROWTH = 1 << 10  # times its length that a text may grow to; Llama's blanks grow to three bytes
PATTERN_CAP = 1 << 13  # characters of a regular expression; those in use have some 300
_turn = threading.RLock()


@contextmanager
def one_line() -> Iterator[None]:
    """Keeps from stderr what Rust writes about a panic, pages of it, before Python hears of it.
    What anyone else wrote meanwhile follows at the end, unless there was one."""
    with _turn, _scratch() as aside:
        try:
            kept = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        os.dup2(aside.fileno(), 2)
        size = 0
        try:
            yield
            size = os.fstat(aside.fileno()).st_size
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            if size:
                with suppress(OSError):  # nobody reads it
                    os.write(2, os.pread(aside.fileno(), size, 0))


def _scratch() -> BinaryIO:
    if hasattr(os, "memfd_create"):  # not on macOS; a tenth of the time
        return open(os.memfd_create("stderr"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def check_parts(parsed: object, path: Path) -> None:
    """Refuses a tokenizer.json that fills the memory by a short text, or takes minutes to load, or
    encodes a text otherwise each time.

    Args:
        parsed: its value; what is no object the library refuses.
    Raises:
        UserError: its replacements, one after another, may lengthen a text too much; a regular
            expression is too long; BPE drops merges at random.
    """
    if not isinstance(parsed, dict):
        return
    for name in ("normalizer", "decoder"):
        times = _growth(parsed.get(name))
        if times > GROWTH:
            what = f"{name} may lengthen a text {times:,.0f} times"
            raise UserError(path, what, f"at most {GROWTH:,} times")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        longest = max(map(len, _expressions(parsed.get(name))), default=0)
        if longest > PATTERN_CAP:  # a class of characters takes the square of its length
            what = f"{name} has a regular expression of {longest:,} characters"
            raise UserError(path, what, f"at most {PATTERN_CAP:,}")
    match parsed.get("model"):
        case {"dropout": int() | float() as share} if share:
            what = f"model.dropout is {share}: a text has other ids each time"
            raise UserError(path, what, "set it to null")


def _expressions(step: object) -> Iterator[str]:
    """All regular expressions in a part of the file, however deep."""
    match step:
        case {"Regex": str(expression)}:
            yield expression
        case dict():
            for inner in step.values():
                yield from _expressions(inner)
        case list():
            for inner in step:
                yield from _expressions(inner)


def _growth(step: object) -> float:
    match step:
        case {"normalizers": list(steps)} | {"decoders": list(steps)}:
            return math.prod(map(_growth, steps))
        case {"pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return max(1.0, len(content.encode()) / len(pattern.encode()))
        case {"pattern": _, "content": str(content)}:  # a pattern that may match between letters
            return 1.0 + len(content.encode())
        case {"prepend": str(content)}:
            return 1.0 + len(content.encode())
    return 1.0
