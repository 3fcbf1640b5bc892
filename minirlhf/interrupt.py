"""Signals set a flag; loops that may last look at it between two pieces of work.

`check` stands where everything that has begun can be thrown away: in sampling, scoring, evaluation
and before an optimizer step. From an optimizer step on an update is finished first. So what is
saved after a signal is always the state of a yield.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from minirlhf import console
from minirlhf.errors import BUG, Stopped, printable

# Slurm gives notice by SIGUSR1, a terminal that is closed by SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class _Flag:
    requested: bool = False  # a signal came
    several: bool = False  # this is one of the processes of a run
    together: bool = False  # and they must leave at the same place
    agreed: bool = False  # all of them know that one was asked
    outside: bool = False  # running code that cannot look at the flag
    before: dict[int, Any] = field(default_factory=dict)  # handlers of before the first `listening`


_flag = _Flag()


def asked() -> bool:
    """Whether a signal has asked this process to stop, or nobody reads it any more."""
    return _flag.requested or console.unread()


def agrees(together: bool) -> None:
    """Whether this process stops only where all processes of the run know that one was asked to:
    they are in the midst of the same work, and none may leave the others waiting."""
    _flag.several |= together
    _flag.together = together


def agree() -> None:
    """Says that all processes of the run know it, each at this place."""
    if not _flag.agreed:
        _tell()
    _flag.agreed = True


def requested() -> bool:
    """Whether the run is to stop."""
    return _flag.agreed or (not _flag.together and asked())


def check() -> None:
    """Leaves here if a signal has come.

    Raises:
        Stopped: it has.
    """
    if requested():
        raise Stopped


def listens() -> bool:
    """Whether a Ctrl-C would come here, and is no KeyboardInterrupt."""
    return signal.getsignal(signal.SIGINT) is _take


@contextmanager
def listening() -> Iterator[None]:
    """Takes the signals over: the first asks to stop, the second leaves at once.

    A SIGHUP that is ignored stays so: that is how nohup starts a command.
    """
    _flag.requested = _flag.agreed = False
    console.only_words()
    taken = [n for n in SIGNALS if (n, signal.getsignal(n)) != (signal.SIGHUP, signal.SIG_IGN)]
    before = {number: signal.signal(number, _take) for number in taken}
    outer, _flag.before = _flag.before, _flag.before or before
    try:
        yield
    finally:
        _give_back(before)
        _flag.before = outer


def _give_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _flag.requested = _flag.agreed = False


# A child is no run: a signal ends it.
os.register_at_fork(after_in_child=lambda: _give_back(_flag.before))


@contextmanager
def outside() -> Iterator[None]:
    """Around code that is not ours and cannot look: a signal ends it where it stands.

    A child that it forked and that comes back ends here: one process alone goes on with the run.

    Raises:
        Stopped: a signal has come, though that code may have caught what ended it.
    """
    _flag.outside, home, error = True, os.getpid(), None
    try:
        check()
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        if os.getpid() != home:
            _end_child(error)
        _flag.outside = False
        check()


def _end_child(error: BaseException | None) -> None:
    """Ends a process whose stack is its parent's, as `sys.exit` would have or else with 1."""
    if isinstance(error, SystemExit):
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    how = f"raised {type(error).__name__}: {printable(error)}" if error else "returned"
    with suppress(OSError):
        os.write(2, f"error: a process that a reward function forked {how}; it ends\n".encode())
    os._exit(BUG)


def _take(number: int, _frame: object) -> None:
    if _flag.requested:
        os._exit(128 + number)  # what is committed stands
    _flag.requested = True
    if not _flag.several:  # or torchrun, which asks the others where one has died
        _tell()
    if _flag.outside:
        raise Stopped


def _tell() -> None:
    # not print: the signal may have come in the middle of one
    with suppress(OSError):  # whoever read it may be gone
        if not console.muted():
            os.write(2, b"\nstopping at the last whole step; once more to leave at once\n")
