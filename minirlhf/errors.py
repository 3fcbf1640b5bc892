"""One class for everything a user can mend, one printer, one table of exit codes.

An error is one line: where (file:line or setting), what was found, what is legal or what to do.
"""

import os
import sys
from collections.abc import Callable

from minirlhf import console

OK, BUG, BAD_INPUT, NON_FINITE, MACHINE = 0, 1, 2, 3, 4
REWARD_SERVICE, DISTRIBUTED, STOPPED = 5, 6, 75
INTERRUPTED = 130  # as a shell reports Ctrl-C


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
    explain: Callable[[BaseException], UserError | None] = staticmethod(lambda error: None)


def told() -> str:
    """The error that ended the command; empty where none did."""
    return _State.told


def explained_by(explain: Callable[[BaseException], UserError | None]) -> None:
    """Lets a function say what a user can mend of errors that torch has no class for."""
    _State.explain = staticmethod(explain)


class Stopped(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt, no `except Exception` swallows it."""


def printable(text: object, limit: int = 200) -> str:
    """Text that came from a file, safe for a terminal: one line, no control characters, capped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    shown = "".join(escaped)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def run(program: Callable[[], int | None]) -> int:
    """Runs a command; what a user can mend becomes one line on stderr and an exit code."""
    with console.speaking():
        try:
            return _finished(program)
        except UserError as error:
            _tell(error)
            return error.code
        except KeyboardInterrupt:  # before a run listens to signals: nothing is written yet
            _tell("interrupted")
            return INTERRUPTED
        except (MemoryError, RuntimeError, ImportError) as error:
            if (known := _State.explain(error)) is not None:
                _tell(known)
                return known.code
            if (what := _of_machine(error)) is None:
                raise
            _tell(what)
            return MACHINE
        except OSError as error:
            if isinstance(error, BrokenPipeError) and error.filename == console.STDOUT:
                return OK  # its reader left, as `head` does
            where = error.filename or "the operating system"
            _tell(f"{printable(where)}: {printable(error.strerror or error)}")
            return MACHINE


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
    print(f"error: {printable(error, 2000)}", file=sys.stderr)


def _of_machine(error: BaseException) -> str | None:
    """What the machine lacks where an error says that; torch and Python have no class for it."""
    text = printable(str(error).partition("\n")[0])
    if isinstance(error, ImportError):  # of a library that the loader of the system refuses
        of_loader = "shared object" in text or text.startswith("dlopen(")
        hint = "is there memory, and is it installed as a whole?"
        return f"a library cannot be loaded: {text}: {hint}" if of_loader else None
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return "no thread can be started: raise the limit (ulimit -u, or pids.max of a container)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        "allocate memory" in text
    ):
        hint = "give smaller batches; training goes on with --resume --gradient-checkpointing"
        return f"out of memory: {text or 'no memory is left'}: {hint}"
    return None
