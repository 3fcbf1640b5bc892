"""One class for everything a user can mend, one printer, one table of exit codes.

An error is one line: where (file:line or setting), what was found, what is legal or what to do.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

OK, BUG, BAD_INPUT, NON_FINITE, MACHINE = 0, 1, 2, 3, 4
REWARD_SERVICE, STOPPED = 5, 75
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


class Stopped(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt, no `except Exception` swallows it."""


def printable(text: object, limit: int = 200) -> str:
    """Text that came from a file, safe for a terminal: one line, no control characters, capped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    shown = "".join(escaped)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def run(program: Callable[[], int | None]) -> int:
    """Runs a command; what a user can mend becomes one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a terminal that cannot show every character
            stream.reconfigure(errors="backslashreplace")
    try:
        return program() or OK
    except UserError as error:
        print(f"error: {printable(error, 2000)}", file=sys.stderr)
        return error.code
    except Stopped:
        return STOPPED
    except KeyboardInterrupt:  # before a run listens to signals: nothing is written yet
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        with suppress(OSError, ValueError):  # else Python would fail at its last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except MemoryError as error:
        return _out_of_memory(error)
    except RuntimeError as error:  # torch's own classes and words for the same
        if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
            raise
        return _out_of_memory(error)
    except OSError as error:
        where = error.filename or "the operating system"
        print(f"error: {printable(where)}: {printable(error.strerror or error)}", file=sys.stderr)
        return MACHINE


def _out_of_memory(error: BaseException) -> int:
    what = printable(str(error).partition("\n")[0]) or "no memory is left"
    hint = "give smaller batches; training goes on with --resume --gradient-checkpointing"
    print(f"error: out of memory: {what}: {hint}", file=sys.stderr)
    return MACHINE
