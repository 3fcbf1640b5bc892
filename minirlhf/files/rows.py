"""Rows of data files: JSON lines, a JSON array, CSV, TSV or lines of text, each also with gzip, or
Parquet.

Every fault of a row is an error with file:line, or a row that the sieve takes (sieve.py).
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from minirlhf.errors import UserError, printable
from minirlhf.files.parquet import read_parquet
from minirlhf.files.reading import (
    LINE_CAP,
    decode_value,
    disguise,
    json_kind,
    read_lines,
    read_text,
    skip_space,
    strict_json,
    utf8_text,
)
from minirlhf.files.sieve import RAW_CAP, OfEveryRow, Sieve, column_names

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # each also with .gz behind
# Beginnings of lines that a text would not have, unlike "<"
NO_TEXT = (b"version https://git-lfs", b"<!doctype html", b"<html")


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Args:
        where: "file:line", the line on which the row starts; "file:row number" in Parquet.
        columns: name -> value.
        typed: False where the format knows only text (CSV, TSV), so that numbers come as strings.
        raw: how it begins in the file, to be shown where the row is left out.
    """

    where: str
    columns: dict
    typed: bool = True
    raw: str = field(default="", compare=False)


def _row(value: object, where: str, raw: str) -> Row:
    if not isinstance(value, dict):
        what = f"a row must be a JSON object, got {json_kind(value)}"
        raise UserError(where, what, 'like {"text": "..."}')
    return Row(where, value, raw=raw[: RAW_CAP + 1])


def _json_row(data: bytes, path: Path, number: int, sieve: Sieve) -> Row | None:
    """The row of one line; None where it is blank."""
    line, where = utf8_text(data, f"{path}:{number}"), f"{path}:{number}"
    if line.strip() in ("[", "{"):
        do = "write a whole JSON object a line, or an array of them in a .json file"
        raise UserError(where, f"not valid JSON: a lone {line.strip()!r}", do)
    if not line.strip():
        return None
    # With its line end, a line that was cut off would be told as the next one.
    line = line.rstrip("\r\n")
    return _row(strict_json(sieve.mend(line), path, number), where, line)


def _json_lines(path: Path, sieve: Sieve) -> Iterator[Row]:
    for number, data in read_lines(path):
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
    at = skip_space(text, text.index("[") + 1)
    line, counted, more, number = 1, 0, text[at : at + 1] != "]", 0
    while more:
        before, number = line if number else 0, number + 1
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}" + (f" (row {number})" if line == before else "")
        value, end = decode_value(text, at, path, 1)
        raw = text[at : min(end, at + RAW_CAP + 1)]
        try:
            row = _row(value, where, raw)
        except UserError as error:
            sieve.reject(error, raw)
        else:
            yield row
        at = skip_space(text, end)
        if more := text[at : at + 1] == ",":
            at = skip_space(text, at + 1)
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        raise UserError(f"{path}:{line}", "not valid JSON", "rows in [ ], with ',' between them")


def _table(path: Path, delimiter: str, sieve: Sieve) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_CAP))  # 128 KiB cuts off long texts
    lines = (utf8_text(data, f"{path}:{number}") for number, data in read_lines(path))
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
    for number, data in read_lines(path):
        where = f"{path}:{number}"
        if number == 1 and data.lower().startswith(NO_TEXT):
            raise UserError(where, "is no text", disguise(data))
        try:
            line = utf8_text(data, where).rstrip("\r\n")
        except UserError as error:
            sieve.reject(error, _shown(data))
            continue
        if line.strip():
            yield Row(where, {"text": line}, raw=line[: RAW_CAP + 1])


def _parquet(path: Path) -> Iterator[Row]:
    for number, columns in read_parquet(path):
        raw = json.dumps(columns, ensure_ascii=False)[: RAW_CAP + 1]
        yield Row(f"{path}:row {number}", columns, raw=raw)


def _shown(data: bytes) -> str:
    """The beginning of a line that may be no text."""
    return data[: 4 * RAW_CAP + 4].decode(errors="backslashreplace").rstrip("\r\n")


def _renamed(row: Row, names: dict[str, str]) -> Row:
    """The row under our names for its columns; another one that has such a name gives way."""
    for name, column in names.items():
        if column not in row.columns:
            keys = ", ".join(printable(key, 40) for key in row.columns) or "none"
            what = f"no column {printable(column, 40)!r} to take as {name}"
            raise OfEveryRow(row.where, what, f"keys present: {keys}")
    values = {key: v for key, v in row.columns.items() if key not in names.values()}
    values |= {name: row.columns[column] for name, column in names.items()}
    return replace(row, columns=values)


def read_rows(path: str | Path, sieve: Sieve | None = None) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv, .tsv or .txt file, or of one of these with .gz behind, or of a
    .parquet file.

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
    packed = path.suffix == ".gz" and Path(path.stem).suffix in SUFFIXES
    suffix = Path(path.stem).suffix if packed else path.suffix
    readers: dict[str, Iterable] = {
        ".jsonl": _json_lines(path, sieve),
        ".json": _json_array(path, sieve),
        ".csv": _table(path, ",", sieve),
        ".tsv": _table(path, "\t", sieve),
        ".txt": _text_lines(path, sieve),
        ".parquet": _parquet(path),
    }
    if suffix not in readers:
        ending = f"ends in {path.suffix!r}" if path.suffix else "its name has no ending"
        what = "a folder" if path.is_dir() else f"not a data file: {ending}"
        legal = f"legal: {' '.join(SUFFIXES)}, each also with .gz behind, and .parquet"
        raise UserError(path, what, legal)
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
