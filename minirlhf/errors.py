"""One class for everything a user can mend, one printer, one table of exit codes.

An error is one line: where (file:line or setting), what was found, what is legal or what to do.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from minirlhf import console

OK, BUG, BAD_INPUT, NON_FINITE, MACHINE = 0, 1, 2, 3, 4
REWARD_SERVICE, DISTRIBUTED, STOPPED = 5, 6, 75
INTERRUPTED = 130  # as a shell reports Ctrl-C
BEFORE_OTHERS = 3.0  # seconds


class UserError(Exception):
    """Something outside our code is wrong: input, configuration, disk, numbers.

    Args:
        where: file:line, file, setting or metric that the user can look at.
        what: what was found there.
        do: what is legal, or what to do.
        code: exit code of the process, one of the table above.
    """

    def __init__(self, where: object, what: str, do: str = "", code: int = BAD_INPUT):
        self.where, self.what, self.do, self.code = str(where), what, do, code
        super().__init__(": ".join(part for part in (self.where, what, do) if part))


class NonFinite(UserError):
    """A loss or gradient that is NaN or infinite (exit code 3); it has changed nothing."""

    def __init__(self, where: object, what: str, do: str = ""):
        super().__init__(where, what, do, NON_FINITE)


class _State:
    told = ""  # the error that ended this process
    hear: Callable[[BaseException], None] | None = None


def told() -> str:
    """The error that ended the command; empty where none did."""
    return _State.told


def heard_by(hear: Callable[[BaseException], None]) -> None:
    """Lets a function hear of each fault before anything is told of it: where it only follows from
    that of another process, the function ends this one."""
    _State.hear = staticmethod(hear)


def hear(error: BaseException | None) -> bool:
    """Whether an error is a fault of ours; tells the one who hears of those."""
    is_fault = isinstance(error, Exception) and not isinstance(error, UserError | OSError)
    if is_fault and of_user(error) is None and _State.hear is not None:
        _State.hear(error)
    return is_fault  # or memory ran out


class Stopped(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt, no `except Exception` swallows it."""


def printable(text: object, limit: int = 200) -> str:
    """Text that came from a file, safe for a terminal: one line, no control characters, capped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    shown = "".join(escaped)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def named(error: BaseException) -> str:
    """An error with its class, in one line.

    >>> named(ValueError("is empty"))
    'ValueError: is empty'
    """
    return f"{type(error).__name__}: {printable(error)}"


def of_user(error: BaseException) -> UserError | None:
    """What a user can mend of any error; None where it is our fault."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        where = printable(error.filename or "the operating system")
        return UserError(where, printable(error.strerror or error), "", MACHINE)
    if isinstance(error, MemoryError | RuntimeError | ImportError):
        return _of_machine(error)
    return None


def run(program: Callable[[], int | None]) -> int:
    """Runs a command; what a user can mend becomes one line on stderr and an exit code."""
    with console.speaking():
        try:
            return _finished(program)
        except KeyboardInterrupt:  # before a run listens to signals: nothing is written yet
            _tell("interrupted")
            return INTERRUPTED
        except Exception as error:
            hear(error)
            if isinstance(error, BrokenPipeError) and error.filename == console.STDOUT:
                return OK  # its reader left, as `head` does
            if (known := of_user(error)) is None:
                raise
            _tell(known)
            return known.code


def _finished(program: Callable[[], int | None]) -> int:
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "was removed while this shell is in it"
        raise UserError("the working folder", what, "cd to another", MACHINE) from None
    try:
        code = program() or OK
    except Stopped:  # before the first step
        code = STOPPED
    except SystemExit:  # after --help
        console.check()
        raise
    console.check()
    if code == STOPPED and console.unread():
        print(f"{console.why_unread()}: stopped", file=sys.stderr)
    return code


def _tell(error: object) -> None:
    _State.told = printable(error, 2000)
    if console.muted() and _State.hear is None:  # nobody knows of this process yet
        time.sleep(BEFORE_OTHERS)  # where others say the same, their launcher ends this one here
        with suppress(OSError):
            os.write(2, f"error: {_State.told}\n".encode())
    print(f"error: {_State.told}", file=sys.stderr)


def _of_machine(error: BaseException) -> UserError | None:
    """What the machine lacks where an error says that; torch and Python have no class for it."""
    text = printable(str(error).partition("\n")[0])
    if isinstance(error, ImportError):  # of a library that the loader of the system refuses
        if "shared object" not in text and not text.startswith("dlopen("):
            return None
        hint = "is there memory, and is it installed as a whole?"
        return UserError("a library cannot be loaded", text, hint, MACHINE)
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        hint = "raise the limit (ulimit -u, or pids.max of a container)"
        return UserError("no thread can be started", "", hint, MACHINE)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        "allocate memory" in text
    ):
        hint = "give smaller batches; training goes on with --resume --gradient-checkpointing"
        return UserError("out of memory", text or "no memory is left", hint, MACHINE)
    return None
