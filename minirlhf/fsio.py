"""Every file operation of a save, so that each can be watched, failed or interrupted by a test.

The rule of a commit: write files into a folder beside the old one, fsync each, fsync the folder,
rename once, fsync the parent. What can be read is then the old state or the new one, never a mix.
Folders that are not a state yet, or no longer, are called .tmp-… or .trash-…; `sweep` removes what
a process that died has left of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.errors import MACHINE, NON_FINITE, UserError

TEMPORARY, TRASH = ".tmp-", ".trash-"


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Names the file in errors of write and fsync, which know only a number."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(path: Path) -> None:
    """Makes a file's data, or a folder's names, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with _about(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with _about(path):
        path.write_text(text, encoding="utf-8")
    fsync(path)


def write_json(path: Path, value: object) -> None:
    """Strict JSON: a number that is not finite is an error, not a `NaN` nobody can read."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(path, f"cannot be written ({error})", "", NON_FINITE) from error
    write_text(path, text + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(path, f"cannot be written ({error})", "disk full?", MACHINE) from error
    fsync(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what cannot end: `needed` bytes must be free.

    Raises:
        UserError: too little space (exit code 4).
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{free:,} bytes are free, {needed:,} are needed"
        raise UserError(folder, what, "make room, then go on with --resume", MACHINE)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it; does nothing where it exists."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync(made.parent)


def commit_folder(temporary: Path, final: Path) -> None:
    """Makes a folder of fsynced files visible, by one rename where there was none of its name.

    An old one is put aside first: for that instant there is neither, and never a mix of both.
    """
    fsync(temporary)
    old = _put_aside(final) if final.exists() else None
    os.rename(temporary, final)
    fsync(final.parent)
    if old is not None:
        shutil.rmtree(old)


def replace_file(temporary: Path, final: Path) -> None:
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def remove_folder(folder: Path) -> None:
    """Takes the name away first, so that no reader finds half a folder."""
    shutil.rmtree(_put_aside(folder))


def _put_aside(folder: Path) -> Path:
    trash = folder.with_name(TRASH + folder.name)
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(folder, trash)
    return trash


def sweep(folder: Path) -> None:
    """Removes what processes that died left behind; only for who alone writes in this folder."""
    for pattern in (f"{TEMPORARY}*", f"{TRASH}*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def append_line(path: Path, text: str) -> int:
    """Adds one line; returns the file's length in bytes."""
    with _about(path), path.open("ab") as file:
        file.write(text.encode() + b"\n")
        return file.tell()


def truncate(path: Path, length: int) -> None:
    """Cuts a log back to what a checkpoint knows of it.

    Raises:
        UserError: it is shorter than that, so lines are lost that nothing can bring back.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        what = f"has {found:,} bytes, the checkpoint knows of {length:,}"
        raise UserError(path, what, "put the file back as it was")
    with _about(path), path.open("ab") as file:
        file.truncate(length)
    fsync(path)
