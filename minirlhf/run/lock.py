"""One run a folder: the lock that its process holds."""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

from minirlhf.errors import MACHINE, UserError, printable
from minirlhf.files import atomic

HOLDER = "process "  # what a lock file begins with
_held: WeakSet[TextIO] = WeakSet()


def take_lock(folder: Path) -> TextIO:
    """The open lock of a folder. The kernel gives it back when the process dies, however it dies.

    Raises:
        UserError: another process has it, or something else has its name.
    """
    path = folder / ".lock"
    atomic.check_own(path)
    lock = open(path, "a+", encoding="utf-8", errors="replace", opener=_no_link)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    lock.seek(0)
    owner = lock.read(200).strip()
    if held:
        lock.close()
        what = f"is in use by {printable(owner) or 'another process'}"
        raise UserError(folder, what, "give another --out")
    if owner and not owner.startswith(HOLDER):
        lock.close()
        raise UserError(path, "is not the lock of a run", "remove it, or give another --out")
    lock.truncate(0)
    lock.write(f"{HOLDER}{os.getpid()} on {platform.node()} since {time.ctime()}")
    lock.flush()
    _held.add(lock)
    return lock


def check_held(lock: TextIO, folder: Path) -> None:
    """Refuses to write where this process's lock no longer lies: the folder was moved or removed,
    and what has its name now is another run's.

    Raises:
        UserError: exit code 4.
    """
    here, there = os.fstat(lock.fileno()), folder / ".lock"
    if not os.path.lexists(there) or not os.path.samestat(here, os.lstat(there)):
        do = "put it back, then resume: the last checkpoint in it stands"
        raise UserError(folder, "is no longer the folder of this run", do, MACHINE)


def _let_go() -> None:
    """A child that outlives the run must not hold its folder."""
    for lock in _held:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def _no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)
