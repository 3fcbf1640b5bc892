"""The tokenizers library: what a tokenizer.json may cost, and how its faults are told."""

import math
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minirlhf.errors import UserError

GROWTH = 1 << 10  # times its length that a text may grow to; Llama's blanks grow to three bytes
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
                os.write(2, os.pread(aside.fileno(), size, 0))


def _scratch() -> BinaryIO:
    if hasattr(os, "memfd_create"):  # not on macOS; a tenth of the time
        return open(os.memfd_create("stderr"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def check_growth(parsed: object, path: Path) -> None:
    """Refuses a tokenizer.json that makes a short text fill the memory, before it is loaded.

    Args:
        parsed: its value; what is no object the library refuses.
    Raises:
        UserError: its replacements, one after another, may lengthen a text too much.
    """
    for name in ("normalizer", "decoder"):
        times = _growth(parsed.get(name)) if isinstance(parsed, dict) else 1
        if times > GROWTH:
            what = f"{name} may lengthen a text {times:,.0f} times"
            raise UserError(path, what, f"at most {GROWTH:,} times")


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
