"""stdout and stderr where they may be closed, full, or a terminal that is gone: no word of ours
ends a command in the middle of its work.

From its first failure on a stream writes into nothing. What stderr loses is lost: the exit code
says the rest. A run whose stdout is lost stops as at a signal (`unread`); a command whose result
it is fails (`check`).
"""

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TextIO, TypeVar

T = TypeVar("T")

STDOUT = "stdout"  # the file of its errors


class Nowhere(io.TextIOBase):
    """Takes all text, and keeps none."""

    def write(self, text: str) -> int:
        return len(text)


class Stream:
    """A text stream that cannot fail.

    Attributes:
        lost: why something was not written; None where nothing was lost.

    Args:
        inner: where it writes; None where it was closed when the process began.
        name: in errors.
    """

    def __init__(self, inner: TextIO | None, name: str):
        self.inner, self.called, self.absent = inner or Nowhere(), name, inner is None
        self.lost: OSError | None = None
        with suppress(AttributeError, OSError, ValueError):  # for terminals without all characters
            self.inner.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.absent and text:
            self._lose(OSError(errno.EBADF, "is closed"))
        try:
            return self.inner.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.inner.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        if isinstance(error, ValueError):
            if not self.inner.closed:
                raise error
            error = OSError(errno.EBADF, "is closed")
        self.lost = self.lost or OSError(error.errno, error.strerror, self.called)
        try:  # what waits in its buffer goes there too: Python's own last flush shall not fail
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.inner.fileno())
        except (OSError, ValueError):  # it has no descriptor
            self.inner = Nowhere()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class _State:
    muted = False  # in a process whose words another one says
    stdout: Stream | None = None  # while a command speaks
    bars = True  # unless the command is to be quiet
    is_run = False  # which keeps its results in files: nothing but words are on stdout


@contextmanager
def speaking() -> Iterator[None]:
    """Around a command: its stdout and stderr are `Stream`s."""
    if _State.stdout is not None:
        yield
        return
    _fill()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = Stream(sys.stdout, STDOUT), Stream(sys.stderr, "stderr")
    _State.stdout, _State.is_run = streams[0], False
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
        _State.stdout, _State.muted = None, False


def _fill() -> None:
    """Opens what is closed of 0, 1 and 2: a file of ours with such a number would get the words
    that libraries write there by themselves."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def mute() -> None:
    """Says nothing until the command ends: another process of the same run says it."""
    _State.muted = True
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.inner = Nowhere()


def muted() -> bool:
    return _State.muted


def only_words() -> None:
    """Says that a run has begun: nothing of its results is on stdout."""
    _State.is_run = True


def unread() -> bool:
    """Whether words of a run were lost that somebody wanted to read."""
    stdout = _State.stdout
    return _State.is_run and stdout is not None and not stdout.absent and stdout.lost is not None


def check() -> None:
    """Fails where a result was to be on stdout and is not.

    Raises:
        OSError: what the stream met; a BrokenPipeError where its reader left.
    """
    if (stdout := _State.stdout) is not None:
        stdout.flush()
        if stdout.lost and not _State.is_run:
            raise stdout.lost


def why_unread() -> str:
    """Of a run that is `unread`."""
    return f"{STDOUT}: {_State.stdout.lost.strerror}"


def show_bars(shown: bool) -> None:
    """Whether `progress` may show itself."""
    _State.bars = shown


def has_bars() -> bool:
    """Whether somebody looks at a bar."""
    return _State.bars and not _State.muted and (sys.stderr.isatty() or in_notebook())


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this: its stderr is no terminal, and is looked at."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def bar_kind() -> type:
    """tqdm's bar; in a notebook that has ipywidgets its widget."""
    if in_notebook() and find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm  # not before --help
    return tqdm


def progress(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """The items, with a bar on stderr that has their rate and the time left.

    It comes where they take more than two seconds and somebody looks: stderr is a terminal.
    """
    yield from bar_kind()(
        items, what, total, leave=False, delay=2, unit=unit, disable=not has_bars()
    )
