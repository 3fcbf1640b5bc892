"""Every file operation of a save, so that each can be watched, failed or interrupted by a test.

The rule of a commit: write files beside the old ones, fsync each, fsync the folder, rename once,
fsync the parent. What can be read is then always the old state or the new one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.errors import MACHINE, UserError


def fsync(path: Path) -> None:
    """Makes a file's data, or a folder's names, survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)


def write_json(path: Path, value: object) -> None:
    """Strict JSON: a number that is not finite is an error, not a `NaN` nobody can read."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(path, f"cannot be written ({error})", "disk full?", MACHINE) from error
    fsync(path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def commit_folder(temporary: Path, final: Path) -> None:
    """The one rename that makes a folder of fsynced files visible."""
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)


def replace_file(temporary: Path, final: Path) -> None:
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def remove_folder(folder: Path) -> None:
    """Takes the name away first, so that no reader finds half a folder."""
    if not folder.name.startswith("."):
        trash = folder.with_name(f".trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        folder = trash
    shutil.rmtree(folder)


def append_line(path: Path, text: str) -> int:
    """Adds one line; returns the file's length in bytes."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        return file.tell()


def truncate(path: Path, length: int) -> None:
    """Cuts a log back to what a checkpoint knows of it."""
    with path.open("ab") as file:
        file.truncate(length)
        file.flush()
        os.fsync(file.fileno())
