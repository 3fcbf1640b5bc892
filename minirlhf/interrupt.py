"""Signals set a flag; loops that may last look at it between two pieces of work.

`check` stands where everything that has begun can be thrown away: in sampling, scoring, evaluation
and before an optimizer step. From an optimizer step on an update is finished first. So what is
saved after a signal is always the state of a yield.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from minirlhf.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is how Slurm gives notice


@dataclass
class _Flag:
    requested: bool = False  # a signal came
    outside: bool = False  # running code that cannot look at the flag


_flag = _Flag()


def requested() -> bool:
    """Whether a signal has asked the run to stop."""
    return _flag.requested


def request() -> None:
    """Asks to stop, as a signal does."""
    _flag.requested = True


def check() -> None:
    """Leaves here if a signal has come.

    Raises:
        Stopped: it has.
    """
    if _flag.requested:
        raise Stopped


def listens() -> bool:
    """Whether a Ctrl-C would come here, and is no KeyboardInterrupt."""
    return signal.getsignal(signal.SIGINT) is _take


@contextmanager
def listening() -> Iterator[None]:
    """Takes SIGTERM, SIGINT and SIGUSR1 over: the first asks to stop, the second leaves at once."""
    _flag.requested = False
    before = {number: signal.signal(number, _take) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _flag.requested = False


@contextmanager
def outside() -> Iterator[None]:
    """Around code that is not ours and cannot look: a signal ends it where it stands.

    Raises:
        Stopped: a signal has come, though that code may have caught what ended it.
    """
    _flag.outside = True
    try:
        check()
        yield
    finally:
        _flag.outside = False
        check()


def _take(number: int, _frame: object) -> None:
    if _flag.requested:
        os._exit(128 + number)  # what is committed stands
    _flag.requested = True
    # not print: the signal may have come in the middle of one
    with suppress(OSError):  # whoever read it may be gone
        os.write(2, b"\nstopping at the last whole step; once more to leave at once\n")
    if _flag.outside:
        raise Stopped
