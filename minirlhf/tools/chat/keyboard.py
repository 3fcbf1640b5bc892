"""What is typed, or piped in, line by line."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


def say(text: str = "") -> None:
    print(text, flush=True)


def lines(interactive: bool) -> Iterator[str]:
    """What is typed, or what is piped in. Ctrl-C forgets the line; twice at an empty one, or
    Ctrl-D, is the end."""
    empty = 0
    while True:
        try:
            line = ask() if interactive else next(sys.stdin, None)
        except EOFError:
            line = None
            say()
        except KeyboardInterrupt as stop:
            if not interactive:
                raise
            empty = 0 if str(stop).strip() else empty + 1
            say("\n(Ctrl-C once more, or Ctrl-D, leaves)" if empty == 1 else "")
            if empty < 2:
                continue
            line = None
        if line is None:
            return
        empty, line = 0, line.rstrip("\r\n")
        if any("\ud800" <= c <= "\udfff" for c in line):
            say("error: message: is not UTF-8: it is left out")
        else:
            yield line


def ask() -> str:
    """A line that is typed. Ctrl-C raises a KeyboardInterrupt with what stood in it by then."""
    def leave(*_: object) -> NoReturn:
        typed = ""
        with suppress(ImportError):
            import readline

            typed = readline.get_line_buffer()
        raise KeyboardInterrupt(typed)

    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its keys)
    before = signal.signal(signal.SIGINT, leave)
    try:
        return input("> ")
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def unseen() -> Iterator[None]:
    """While a model speaks, keys are not shown, nor is the ^C that stops it: they would stand in
    its answer, and move what is drawn."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError, termios.error):  # another system, or no terminal
        yield
        return
    quiet = before[:]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
