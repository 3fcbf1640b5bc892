"""Strict reading of files that others wrote: regular files only, UTF-8, one JSON parser.

Every refusal names the file, and the line where there is one. What Python's json lets through (NaN,
a key given twice, half of a surrogate pair) is refused here, before it turns into a wrong number
far from its cause.
"""

import gzip
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minirlhf.errors import UserError, printable

LINE_CAP = 16 << 20  # bytes; nobody writes a longer line on purpose
FILE_CAP = 1 << 30  # bytes of a file that is parsed in one piece
UNPACKED, RATIO = 64 << 20, 200  # bytes that any gzip file may hold, and times its own size
DEPTH_CAP = 64
# How a file begins that is not what its name says, and what to do.
DISGUISES = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file: run `git lfs pull`"),
    (b"<", "it looks like a web page: download the file itself"),
    (b"PK\3\4", "it looks like a zip archive or a spreadsheet: save it as JSON lines or CSV"),
    (b"PAR1", "it looks like Parquet: let its name end in .parquet"),
    (b"\x1f\x8b", "it looks like gzip: let its name end in .gz"),
    (b"\xff\xfe", "it looks like UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16: save it as UTF-8"),
)


def json_kind(value: object) -> str:
    """What a JSON value is, in the words of who wrote the file."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}
    return kinds[type(value)]


def disguise(data: bytes) -> str:
    """Advice for a file that begins like one of another kind; "" where it does not."""
    return next((advice for start, advice in DISGUISES if data.startswith(start)), "")


# ------------------------------------------------------------------------------------------- JSON


def _object(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"key {printable(twice, 40)!r} stands twice in one object")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {printable(text, 40)} is not finite")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse_constant
)


def _check_tree(value: object) -> None:
    """Refuses deep nesting and strings that have no UTF-8 form."""
    stack = [(value, 1)]
    while stack:
        node, depth = stack.pop()
        if depth > DEPTH_CAP:
            raise ValueError(f"nested deeper than {DEPTH_CAP} levels")
        if isinstance(node, str):
            try:
                node.encode()
            except UnicodeEncodeError as error:
                code = ord(node[error.start])
                raise ValueError(f"half of a surrogate pair (\\u{code:04x}) in a string") from None
        elif isinstance(node, dict):
            stack += [(key, depth) for key in node]
            stack += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in node]


def decode_value(text: str, start: int, path: object, line: int) -> tuple[object, int]:
    """(value, its end) of the JSON value at text[start]; `line` is that of text[0]."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        # Both checks walk the tree in Python, so they wait until the text gives a reason.
        if (
            text.count("[", start, end) + text.count("{", start, end) > DEPTH_CAP
            or text.find("\\ud", start, end) >= 0
            or text.find("\\uD", start, end) >= 0
        ):
            _check_tree(value)
        return value, end
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        do = disguise(text[:64].encode()) if line == 1 else ""
        if error.msg.startswith("Invalid control character"):
            do = "a raw tab or line end inside a string: write \\t or \\n"
        if error.msg.startswith("Unterminated string"):
            do = "a string without its closing quote"
        raise UserError(where, f"not valid JSON at column {error.colno}", do or error.msg) from None
    except RecursionError:
        what = f"nested deeper than {DEPTH_CAP} levels"
    except ValueError as error:
        what = str(error)
        if what.startswith("Exceeds the limit"):  # the interpreter's own guard against huge numbers
            what = "an integer of thousands of digits"
    raise UserError(f"{path}:{line + text.count(chr(10), 0, start)}", what)


def skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def strict_json(text: str, path: object, line: int = 1) -> object:
    """The value of a JSON text that starts at `line` of `path`.

    Raises:
        UserError: not JSON; NaN, Infinity or a number beyond float64; a key twice in one object;
            an integer of thousands of digits; deeper than 64 levels; half of a surrogate pair.
    """
    value, end = decode_value(text, skip_space(text, 0), path, line)
    rest = skip_space(text, end)
    if rest < len(text):
        line += text.count("\n", 0, rest)
        column = rest - text.rfind("\n", 0, rest)
        raise UserError(f"{path}:{line}", f"not valid JSON at column {column}", "text after it")
    return value


# ------------------------------------------------------------------------------------------ files


def _check_regular(path: Path) -> None:
    """A pipe or a device would block or never end; only regular files are read."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(path, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        raise UserError(path, "cannot be read", getattr(error, "strerror", "") or "") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(path, kind, "give a regular file")


_seen: dict[str, tuple] = {}  # what files were when they were last read


def _identity(path: Path) -> tuple:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def note_read(path: Path) -> None:
    """Remembers what a file is, before it is read: see `check_unchanged`."""
    _seen[os.path.abspath(path)] = _identity(path)


def check_unchanged(path: Path) -> None:
    """Refuses a file that was written since this process read it last; then what was read is what
    stands there now.

    Raises:
        UserError: it was.
    """
    seen = _seen.get(os.path.abspath(path))
    if seen is not None and seen != _identity(path):
        raise UserError(path, "has changed since it was read", "start again when nothing writes it")


def forget_read() -> None:
    """Whoever goes on may change all files."""
    _seen.clear()


@contextmanager
def opened(path: Path) -> Iterator[object]:
    """The bytes of a regular file, unpacked where it ends in .gz."""
    _check_regular(path)
    note_read(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(path, "damaged gzip file", str(error)) from None
    except OSError as error:
        raise UserError(path, "cannot be read", error.strerror or str(error)) from None


def utf8_text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        do = disguise(data) or "save the file as UTF-8"
        raise UserError(where, f"not UTF-8 at byte {error.start}", do) from None


def read_file(path: str | Path, cap: int = FILE_CAP) -> bytes:
    """All bytes of a regular file (unpacked where it ends in .gz), without a byte-order mark.

    Raises:
        UserError: not there, not a regular file, unreadable, or more than `cap` bytes.
    """
    with opened(Path(path)) as file:
        data = file.read(cap + 1)
    if len(data) > cap:
        raise UserError(path, f"larger than {cap:,} bytes")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_text(path: str | Path, cap: int = FILE_CAP) -> str:
    """The text of a UTF-8 file, otherwise as `read_file`."""
    return utf8_text(read_file(path, cap), str(path))


def read_json(path: str | Path, cap: int = FILE_CAP) -> object:
    """The value of a JSON file, read by `strict_json`."""
    return strict_json(read_text(path, cap), path)


def _check_unpacked(path: Path) -> None:
    """Refuses a gzip file that would fill the memory: text shrinks to a tenth, not to a 200th."""
    most = max(UNPACKED, RATIO * path.stat().st_size)
    with opened(path) as file:
        while most >= 0 and (piece := file.read(1 << 20)):
            most -= len(piece)
    if most < 0:
        what = f"unpacks to more than {RATIO} times its size"
        raise UserError(path, what, "unpack it first, if it is meant to be read")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its line end); one line is the most that is ever held."""
    if path.suffix == ".gz":
        _check_unpacked(path)
    with opened(path) as file:
        number = 0
        while data := file.readline(LINE_CAP + 1):
            number += 1
            if len(data) > LINE_CAP:
                raise UserError(f"{path}:{number}", f"a line of more than {LINE_CAP:,} bytes")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            yield number, data
