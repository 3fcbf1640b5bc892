"""Strict reading of files that others wrote: one JSON parser, one line reader, rows of data files.

Every refusal names file:line. What Python's json would let through (NaN, a key given twice, half a
surrogate pair) is refused here, before it turns into a wrong number far from its cause.
"""

import csv
import gzip
import json
import math
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from minirlhf.errors import UserError, printable
from minirlhf.files.sieve import RAW_CAP, Sieve, column_names

LINE_CAP = 16 << 20  # bytes; nobody writes a longer line on purpose
FILE_CAP = 1 << 30  # bytes of a file that is parsed in one piece
DEPTH_CAP = 64
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
# How a file begins that is not what its name says, and what to do.
DISGUISES = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file: run `git lfs pull`"),
    (b"<", "it looks like a web page: download the file itself"),
    (b"PK\3\4", "it looks like a zip archive or a spreadsheet: save it as JSON lines or CSV"),
    (b"PAR1", "it looks like Parquet: save it as JSON lines"),
    (b"\x1f\x8b", "it looks like gzip: let its name end in .gz"),
    (b"\xff\xfe", "it looks like UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16: save it as UTF-8"),
)
# Beginnings of lines that a text would not have, unlike "<"
NO_TEXT = (b"version https://git-lfs", b"<!doctype html", b"<html")


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Args:
        where: "file:line", the line on which the row starts.
        columns: name -> value.
        typed: False where the format knows only text (CSV, TSV), so that numbers come as strings.
        raw: how it begins in the file, to be shown where the row is left out.
    """

    where: str
    columns: dict
    typed: bool = True
    raw: str = field(default="", compare=False)


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


def _decode(text: str, start: int, path: object, line: int) -> tuple[object, int]:
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


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def strict_json(text: str, path: object, line: int = 1) -> object:
    """The value of a JSON text that starts at `line` of `path`.

    Raises:
        UserError: not JSON; NaN, Infinity or a number beyond float64; a key twice in one object;
            an integer of thousands of digits; deeper than 64 levels; half of a surrogate pair.
    """
    value, end = _decode(text, _skip_space(text, 0), path, line)
    rest = _skip_space(text, end)
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


@contextmanager
def _opened(path: Path) -> Iterator[object]:
    _check_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(path, "damaged gzip file", str(error)) from None
    except OSError as error:
        raise UserError(path, "cannot be read", error.strerror or str(error)) from None


def _text(data: bytes, where: str) -> str:
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
    with _opened(Path(path)) as file:
        data = file.read(cap + 1)
    if len(data) > cap:
        raise UserError(path, f"larger than {cap:,} bytes")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_text(path: str | Path, cap: int = FILE_CAP) -> str:
    """The text of a UTF-8 file, otherwise as `read_file`."""
    return _text(read_file(path, cap), str(path))


def read_json(path: str | Path, cap: int = FILE_CAP) -> object:
    """The value of a JSON file, read by `strict_json`."""
    return strict_json(read_text(path, cap), path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its line end); one line is the most that is ever held."""
    with _opened(path) as file:
        number = 0
        while data := file.readline(LINE_CAP + 1):
            number += 1
            if len(data) > LINE_CAP:
                raise UserError(f"{path}:{number}", f"a line of more than {LINE_CAP:,} bytes")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            yield number, data


# ------------------------------------------------------------------------------------------- rows


def _row(value: object, where: str, raw: str) -> Row:
    if not isinstance(value, dict):
        what = f"a row must be a JSON object, got {json_kind(value)}"
        raise UserError(where, what, 'like {"text": "..."}')
    return Row(where, value, raw=raw[: RAW_CAP + 1])


def _json_row(data: bytes, path: Path, number: int, sieve: Sieve) -> Row | None:
    """The row of one line; None where it is blank."""
    line, where = _text(data, f"{path}:{number}"), f"{path}:{number}"
    if line.strip() in ("[", "{"):
        do = "write a whole JSON object a line, or an array of them in a .json file"
        raise UserError(where, f"not valid JSON: a lone {line.strip()!r}", do)
    if not line.strip():
        return None
    # With its line end, a line that was cut off would be told as the next one.
    line = line.rstrip("\r\n")
    return _row(strict_json(sieve.mend(line), path, number), where, line)


def _json_lines(path: Path, sieve: Sieve) -> Iterator[Row]:
    for number, data in _lines(path):
        try:
            row = _json_row(data, path, number, sieve)
        except UserError as error:
            sieve.reject(error, _shown(data))
            continue
        if row is not None:
            yield row


def _json_array(path: Path, sieve: Sieve) -> Iterator[Row]:
    text = read_text(path)
    if text.lstrip()[:1] != "[":  # many files named .json hold one object a line
        yield from _json_lines(path, sieve)
        return
    text = sieve.mend(text)
    at = _skip_space(text, text.index("[") + 1)
    line, counted, more, number = 1, 0, text[at : at + 1] != "]", 0
    while more:
        before, number = line if number else 0, number + 1
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}" + (f" (row {number})" if line == before else "")
        value, end = _decode(text, at, path, 1)
        raw = text[at : min(end, at + RAW_CAP + 1)]
        try:
            row = _row(value, where, raw)
        except UserError as error:
            sieve.reject(error, raw)
        else:
            yield row
        at = _skip_space(text, end)
        if more := text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise UserError(f"{path}:{line}", "not valid JSON", "rows in [ ], with ',' between them")


def _table(path: Path, delimiter: str, sieve: Sieve) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_CAP))  # 128 KiB cuts off long texts
    lines = (_text(data, f"{path}:{number}") for number, data in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [name.strip() for name in fields]
                other = next((sign for sign in ";\t,|" if sign in header[0]), None)
                if len(header) == 1 and other:
                    do = f"put {delimiter!r} between columns, not {other!r}"
                    raise UserError(where, f"one column, named {header[0]!r}", do)
                if header[0].startswith("{"):
                    do = "JSON lines? let its name end in .jsonl"
                    raise UserError(where, f"a column named {header[0]!r}", do)
                if len(set(header)) != len(header) or "" in header:
                    raise UserError(where, "column names must be non-empty and differ", str(header))
                continue
            raw = delimiter.join(fields)[: RAW_CAP + 1]
            if len(fields) != len(header):
                do = f"the header names {len(header)} columns"
                sieve.reject(UserError(where, f"{len(fields)} fields", do), raw)
                continue
            yield Row(where, dict(zip(header, fields, strict=True)), typed=False, raw=raw)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", "not valid CSV", str(error)) from None


def _text_lines(path: Path, sieve: Sieve) -> Iterator[Row]:
    for number, data in _lines(path):
        where = f"{path}:{number}"
        if number == 1 and data.lower().startswith(NO_TEXT):
            raise UserError(where, "is no text", disguise(data))
        try:
            line = _text(data, where).rstrip("\r\n")
        except UserError as error:
            sieve.reject(error, _shown(data))
            continue
        if line.strip():
            yield Row(where, {"text": line}, raw=line[: RAW_CAP + 1])


def _shown(data: bytes) -> str:
    """The beginning of a line that may be no text."""
    return data[: 4 * RAW_CAP + 4].decode(errors="backslashreplace").rstrip("\r\n")


def _renamed(row: Row, names: dict[str, str]) -> Row:
    """The row under our names for its columns; another one that has such a name gives way."""
    for name, column in names.items():
        if column not in row.columns:
            keys = ", ".join(printable(key, 40) for key in row.columns) or "none"
            what = f"no column {printable(column, 40)!r} to take as {name}"
            raise UserError(row.where, what, f"keys present: {keys}")
    values = {key: v for key, v in row.columns.items() if key not in names.values()}
    values |= {name: row.columns[column] for name, column in names.items()}
    return replace(row, columns=values)


def read_rows(path: str | Path, sieve: Sieve | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv, .tsv or .txt file, or of one of these with .gz behind.

    Blank lines are skipped and keep their number; a byte-order mark and CRLF are accepted. A .txt
    file gives one row {"text": line} a line.

    Args:
        sieve: takes the rows that are broken; None: the first of them is an error. Its policy
            renames columns; a row that lacks one of them is broken, too.
    Raises:
        UserError: not a regular file of a known kind; a row that is broken (file:line), unless the
            sieve took it; no rows.
    """
    sieve = Sieve() if sieve is None else sieve
    if not str(path):
        raise UserError("''", "no such file", "the name of a data file is empty")
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers: dict[str, Iterable] = {
        ".jsonl": _json_lines(path, sieve),
        ".json": _json_array(path, sieve),
        ".csv": _table(path, ",", sieve),
        ".tsv": _table(path, "\t", sieve),
        ".txt": _text_lines(path, sieve),
    }
    if suffix not in readers:
        ending = f"ends in {path.suffix!r}" if path.suffix else "its name has no ending"
        what = "a folder" if path.is_dir() else f"not a data file: {ending}"
        raise UserError(path, what, f"legal: {' '.join(SUFFIXES)}, each also with .gz behind")
    rows, names = 0, column_names(sieve.policy.columns)
    for row in readers[suffix]:
        rows += 1
        try:
            found = _renamed(row, names) if names else row
        except UserError as error:
            sieve.reject(error, row.raw)
            continue
        yield found
    if not rows and not sieve.rejected:
        raise UserError(path, "no rows", "one row a line")
