"""Every file operation of a save, so that each can be watched, failed or interrupted by a test.

Whatever changes the disk is one call of `os` in this file. The rule of a commit: write files into a
folder beside the old one, fsync each, fsync the folder, rename once, fsync the parent. What can be
read is then the old state or the new one, never a mix, after a kill as after a power loss.

Folders that are no state yet, or no longer, are called .tmp-… or .trash-…; one that is about to be
replaced is .old-… until the new one stands. `sweep` ends what a process that died had begun.
"""

import hashlib
import json
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.errors import MACHINE, NON_FINITE, UserError

TEMPORARY, ASIDE, TRASH = ".tmp-", ".old-", ".trash-"

PIECE = 4 << 20  # bytes that are handed to the disk and to the hash at once
SMALL = 1 << 16  # bytes that are hashed sooner than a thread is started
BEHIND = 64  # pieces by which the hash may lag; bounds what is held of tensors from another device

# safetensors' types in the order in which it lays them out: by alignment, so largest last here.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}


class Written(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


# ------------------------------------------------------------------------------------------ files


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file's number. Errors of write and fsync, which know only that, get the file's name.

    Raises:
        UserError: it is to be written and is there already as a link, a pipe or a device: what is
            written would land somewhere else.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        check_own(path)
        flags |= os.O_NOFOLLOW
    try:
        handle = os.open(path, flags, 0o666)
        try:
            yield handle
        finally:
            os.close(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_own(path: Path) -> None:
    """Refuses what is there under this name and is no plain file."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(path, "is no plain file", "remove it: nothing is written through links")


def _write_all(handle: int, data: memoryview | bytes) -> None:
    while data:  # a write may be cut short, by a full disk for one: the next call then says so
        data = data[os.write(handle, data) :]


def _write(path: Path, pieces: Iterable[memoryview | bytes]) -> Written:
    """Writes and fsyncs a file; its hash is computed meanwhile, in a thread beside."""
    digest, size, hashing = hashlib.sha256(), 0, deque[Future[None]]()
    with (
        _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as handle,
        ThreadPoolExecutor(1) as beside,
    ):
        for piece in pieces:
            if hashing or len(piece) >= SMALL:
                hashing.append(beside.submit(digest.update, piece))
            else:
                digest.update(piece)
            if len(hashing) > BEHIND:
                hashing.popleft().result()
            _write_all(handle, piece)
            size += len(piece)
        os.fsync(handle)
    return Written(size, digest.hexdigest())


def write_text(path: Path, text: str) -> Written:
    return _write(path, [text.encode()])


def json_text(value: object) -> str:
    """The one spelling in which a value is written.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: object) -> Written:
    """Strict JSON: a number that is not finite is an error, not a `NaN` nobody can read."""
    try:
        text = json_text(value)
    except ValueError as error:
        raise UserError(path, f"cannot be written ({error})", "", NON_FINITE) from error
    return write_text(path, text)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """A safetensors file, byte for byte as its own library writes it, but hashed on the way.

    The tensors of a CPU are written from where they lie; others are copied one at a time.

    Args:
        metadata: what the header says besides, in this order: the library's own order of several
            differs from one process to the next.
    Raises:
        ValueError: a tensor's type has no name in safetensors.
        UserError: a number is not finite (exit code 3).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"'{name}' is {tensor.dtype}, which safetensors cannot hold")
    check_finite(path, tensors)
    return _write(path, _safetensors(tensors, metadata or {}))


def check_finite(where: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses to write what is not finite: whoever reads it could only throw it away.

    Raises:
        UserError: exit code 3.
    """
    for name, tensor in tensors.items():
        # A sum is quick, but may leave float32 where no number does; float8 has none.
        if tensor.itemsize == 1 or isfinite(tensor.detach().sum()):
            continue
        if count := int((~tensor.isfinite()).sum()):
            what = f"'{name}' has {count:,} numbers of {tensor.numel():,} that are not finite"
            raise UserError(where, what, "nothing is written; lower learning_rate", NON_FINITE)


def _safetensors(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Iterator[memoryview | bytes]:
    """Length of the header in 8 bytes, the header in JSON padded to 8 bytes, the tensors."""
    names = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        shape, offsets = list(tensor.shape), [start, end]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy())
        yield from (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def sha256(path: Path) -> str:
    with _opened(path, os.O_RDONLY) as handle, open(handle, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_each(paths: list[Path]) -> list[str]:
    """sha256 of several files, side by side where that is worth threads."""
    if sum(path.stat().st_size for path in paths) < SMALL:
        return [sha256(path) for path in paths]
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(sha256, paths))


def fsync(path: Path) -> None:
    """Makes a file's data, or a folder's names, survive a power loss."""
    with _opened(path, os.O_RDONLY) as handle:
        os.fsync(handle)


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what cannot end: `needed` bytes must be free.

    Raises:
        UserError: too little space (exit code 4).
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{free:,} bytes are free, {needed:,} are needed"
        raise UserError(folder, what, "make room, then resume", MACHINE)


def replace_file(temporary: Path, final: Path) -> None:
    """Makes a file visible under a name that may be taken, by one rename."""
    fsync(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


# ---------------------------------------------------------------------------------------- folders


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each name synced before the next is made.

    The lowest one that is there already may be of a process that died before it could sync its
    name, so that name is synced too, unless it cannot be ours.
    """
    above = folder.absolute().parent
    if not folder.is_dir():
        make_folder(above)
        os.mkdir(folder)
        fsync(above)
    elif os.access(above, os.R_OK | os.W_OK):
        fsync(above)


def commit_folder(temporary: Path, final: Path) -> None:
    """Makes a folder of fsynced files visible under its name, by one rename where that is free.

    One of that name is put aside first, as .old-…, and removed last. So at every instant the new
    folder has the name, or the old one has one of the two; `sweep` gives it its name back where
    nothing took that.

    Raises:
        OSError: the disk failed; an old folder has its name again, if the disk let it.
    """
    fsync(temporary)
    _settle(final)
    aside = _aside(final)
    try:
        if os.path.lexists(final):
            os.rename(final, aside)
            fsync(final.parent)
        os.rename(temporary, final)
    except OSError:
        if not os.path.lexists(final) and os.path.lexists(aside):
            with suppress(OSError):  # the first failure is the one to tell
                os.rename(aside, final)
        raise
    fsync(final.parent)
    if os.path.lexists(aside):
        remove_folder(aside)


def write_folder(write: Callable[[Path], object], final: Path) -> None:
    """Lets `write` fill a new folder that then takes its name, as `commit_folder` says."""
    temporary = final.with_name(TEMPORARY + final.name)
    if os.path.lexists(temporary):  # of a process that died
        _remove(temporary)
    make_folder(temporary)
    write(temporary)
    for path in temporary.iterdir():
        fsync(path)
    commit_folder(temporary, final)


def _aside(final: Path) -> Path:
    return final.with_name(ASIDE + final.name)


def _settle(final: Path) -> None:
    """Ends a replacement that was cut short: the new folder stands, or the old is back."""
    aside = _aside(final)
    if os.path.lexists(aside):
        if os.path.lexists(final):
            fsync(final.parent)  # the new name must be on the disk before the old files go
            remove_folder(aside)
        else:
            os.rename(aside, final)


def remove_folder(folder: Path) -> None:
    """Takes the name away first, so that no reader finds half a folder."""
    trash = folder.with_name(TRASH + folder.name)
    if os.path.lexists(trash):
        _remove(trash)
    os.rename(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    """A file, or a folder with all that is in it; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        for inside in sorted(path.iterdir()):
            _remove(inside)
        os.rmdir(path)
    else:
        os.unlink(path)


def discard(temporary: Path) -> None:
    """Removes what was not to become a commit, as far as the disk that failed lets it."""
    with suppress(OSError):  # the failure that led here is the one to tell
        if os.path.lexists(temporary):
            _remove(temporary)


def sweep(folder: Path) -> None:
    """Ends what processes that died had begun; only for who alone writes in this folder."""
    for aside in sorted(folder.glob(f"{ASIDE}*")):
        _settle(aside.with_name(aside.name.removeprefix(ASIDE)))
    for pattern in (f"{TEMPORARY}*", f"{TRASH}*"):
        for left in sorted(folder.glob(pattern)):
            _remove(left)


# ------------------------------------------------------------------------------------------- logs


def append_line(path: Path, text: str) -> int:
    """Adds one line; returns the file's length in bytes."""
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as handle:
        _write_all(handle, text.encode() + b"\n")
        return os.lseek(handle, 0, os.SEEK_CUR)


def check_length(path: Path, length: int) -> None:
    """Refuses a log that is shorter than a checkpoint knows of: nothing can bring lines back."""
    check_own(path)
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        what = f"has {found:,} bytes, the checkpoint knows of {length:,}"
        raise UserError(path, what, "put the file back as it was")


def truncate(path: Path, length: int) -> None:
    """Cuts a log back to what a checkpoint knows of it; errors as in `check_length`."""
    check_length(path, length)
    with _opened(path, os.O_WRONLY | os.O_CREAT) as handle:
        os.ftruncate(handle, length)
        os.fsync(handle)
    fsync(path.parent)  # it may be new
