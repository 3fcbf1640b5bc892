"""Strict reading: what is let through, and which line every refusal names."""

import errno
import gzip
import os

import pytest

from minirlhf.errors import UserError
from minirlhf.files.reading import LINE_CAP, read_file, read_json, strict_json
from minirlhf.files.rows import Row, read_rows


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def columns(path):
    return [row.columns for row in read_rows(path)]


# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "f:7: not valid JSON at column 1"),
        ("{", "f:7: not valid JSON at column 2"),
        ('{"a": 1,}', "f:7: not valid JSON at column "),  # Python 3.13 counts otherwise
        ("{'a': 1}", "f:7: not valid JSON at column 2"),
        ('{"a": 1} {"b": 2}', "f:7: not valid JSON at column 10"),
        ('{"a": 1}\n\n  x', "f:9: not valid JSON at column 3"),
        ('{"a":\n tru}', "f:8: not valid JSON at column 2"),
        ('"tab\there"', "f:7: not valid JSON at column 5"),
        ('"\\x41"', "f:7: not valid JSON at column 2"),
        ("01", "f:7: not valid JSON at column 2"),
        ("NaN", "f:7: NaN is not JSON"),
        ("[-Infinity]", "f:7: -Infinity is not JSON"),
        ("1e999", "f:7: number 1e999 is not finite"),
        ('{"a": 1, "b": 2, "a": 3}', "f:7: key 'a' stands twice in one object"),
        ('{"x": {"a": 1, "a": 1}}', "f:7: key 'a' stands twice in one object"),
        ("9" * 5000, "f:7: an integer of thousands of digits"),
        ("[" * 65 + "]" * 65, "f:7: nested deeper than 64 levels"),
        ("[" * 100_000, "f:7: nested deeper than 64 levels"),
        ('"\\ud83d"', "f:7: half of a surrogate pair (\\ud83d) in a string"),
        ('{"\\uDC00": 1}', "f:7: half of a surrogate pair (\\udc00) in a string"),
        ('["\\ude00\\ud83d"]', "f:7: half of a surrogate pair (\\ude00) in a string"),
    ],
)
def test_strict_json_refuses(text, what):
    with pytest.raises(UserError) as error:
        strict_json(text, "f", line=7)
    assert str(error.value).startswith(what)


def test_strict_json_reads_what_is_json():
    assert strict_json(' {"a": [1, -2.5e3, true, null, "\\u0000"]}\r\n', "f") == {
        "a": [1, -2500.0, True, None, "\0"]
    }
    assert strict_json('"\\ud83d\\ude00"', "f") == "😀"  # a whole pair is one character
    nested = strict_json("[" * 64 + "]" * 64, "f")
    for _ in range(63):
        (nested,) = nested
    assert nested == []


# ------------------------------------------------------------------------------------------ files


def test_read_file_refuses_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, what in (
        ("pipe.jsonl", "not a regular file"), ("loop.jsonl", "cannot be read"),
        ("none.jsonl", "no such file"), ("", "a folder"), ("nul\0.jsonl", "cannot be read"),
    ):
        with pytest.raises(UserError, match=what):
            read_file(tmp_path / name)


def test_read_file_names_the_file_that_the_system_does_not_give(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", "{}")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: Permission denied"):
        read_file(path)


def test_read_file_refuses_more_than_its_cap(tmp_path):
    path = write(tmp_path, "f", "abc")
    assert read_file(path, cap=3) == b"abc"
    with pytest.raises(UserError, match="larger than 2 bytes"):
        read_file(path, cap=2)


def test_read_json_names_the_line_inside_the_file(tmp_path):
    assert read_json(write(tmp_path, "good.json", b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    with pytest.raises(UserError, match=r"bad\.json:2: not valid JSON at column 4"):
        read_json(write(tmp_path, "bad.json", '{"a": 1,\n   b}'))


# ------------------------------------------------------------------------------------------- rows


def test_read_rows_skips_blank_lines_and_keeps_line_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_rows(path)) == [Row(f"{path}:1", {"a": 1}), Row(f"{path}:4", {"a": 2})]


def test_read_rows_keeps_unusual_line_separators_inside_a_row(tmp_path):
    # U+2028 and U+0085 end a line for str.splitlines, but neither in JSON nor in a text file.
    path = write(tmp_path, "a.jsonl", '{"a": "x\u2028y\x85z"}\n')
    assert columns(path) == [{"a": "x\u2028y\x85z"}]


BROKEN = {  # a file's ending -> what it holds, what is told
    "jsonl": [
        (b'{"a": 1}\n{"a": }\n', r":2: not valid JSON at column 7"),
        (b'{"a": 1}\n{"a": 1\r\n', r":2: not valid JSON at column 8: Expecting ','"),
        (b'{"a": 1}\n{"a": "b\n', r":2: not valid JSON at column 7: a string without its closing"),
        (b'{"a": 1}\n[1]\n', r":2: a row must be a JSON object, got a list"),
        (b'{"a": 1}\n3\n', r":2: a row must be a JSON object, got a number"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r":2: not UTF-8 at byte 7"),
        ('{"a": 1}\n'.encode("utf-16"), r":1: not UTF-8 at byte 0: it looks like UTF-16"),
        (b'{"a": 1}\n[\n', r":2: not valid JSON: a lone '\['"),
        (b"PK\3\4", r":1: not valid JSON at column 1: it looks like a zip archive"),
        (b"\x1f\x8b", r":1: not UTF-8 at byte 1: it looks like gzip"),
        (b"", ": no rows"),
        (b"\n \r\n", ": no rows"),
    ],
    "json": [
        ("[]", ": no rows"),
        ('[{"a": 1}', ":1: not valid JSON: rows in"),
        ('[{"a": 1}\n{"a": 2}]', ":2: not valid JSON: rows in"),
        ('[{"a": 1},\n]', ":2: not valid JSON at column 1"),
        ('[{"a": 1}] x', ":1: not valid JSON: rows in"),
        ('[{"a": 1},\n\n {"a": NaN}]', ":3: NaN is not JSON"),
        ('[{"a": 1},\n 5]', ":2: a row must be a JSON object, got a number"),
    ],
    "csv": [
        ("a,a\n1,2\n", ":1: column names must be non-empty and differ"),
        ("a,\n1,2\n", ":1: column names must be non-empty and differ"),
        ("a,b\n1,2\n1,2,3\n", ":3: 3 fields: the header names 2 columns"),
        ('a,b\n1,"2" x\n', ":2: not valid CSV"),
        ('a,b\n1,"2\n', ":2: not valid CSV"),
        ("a,b\n", ": no rows"),
        ("a;b\n1;2\n", r":1: one column, named 'a;b': put ',' between columns, not ';'"),
        ('{"a": 1}\n', ":1: a column named '{\"a\": 1}': JSON lines"),
    ],
}
CASES = [(ending, *case) for ending, cases in BROKEN.items() for case in cases]


@pytest.mark.parametrize(("ending", "content", "what"), CASES)
def test_read_rows_refuses_a_broken_file_by_its_line(tmp_path, ending, content, what):
    with pytest.raises(UserError, match=rf"a\.{ending}" + what):
        columns(write(tmp_path, f"a.{ending}", content))


def test_read_rows_refuses_an_endless_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(LINE_CAP * 4)  # a sparse file: zeros without a line end
    with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 16,777,216 bytes"):
        columns(path)


def test_read_rows_of_a_json_array_names_the_line_of_each_object(tmp_path):
    path = write(tmp_path, "a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n')
    rows = [(row.where, row.columns["a"]) for row in read_rows(path)]
    assert rows == [(f"{path}:2", 1), (f"{path}:4", 2), (f"{path}:5", 3)]


def test_read_rows_of_a_json_array_on_one_line_tells_its_rows_apart(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, {"a": 2},\n{"a": 3}, {"a": 4}]')
    assert [row.where for row in read_rows(path)] == [
        f"{path}:1", f"{path}:1 (row 2)", f"{path}:2", f"{path}:2 (row 4)",
    ]


def test_read_rows_of_json_takes_one_object_a_line_too(tmp_path):
    assert columns(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


def test_read_rows_of_csv_reads_quotes_and_line_ends_inside_them(tmp_path):
    path = write(tmp_path, "a.csv", 'p, q\r\n"x, ""y""\nz",1\r\n\r\n😀,\r\n')
    assert list(read_rows(path)) == [
        Row(f"{path}:2", {"p": 'x, "y"\nz', "q": "1"}, typed=False),
        Row(f"{path}:5", {"p": "😀", "q": ""}, typed=False),
    ]


def test_read_rows_of_csv_takes_a_field_of_more_than_128_kib(tmp_path):
    long = "x" * 200_000
    assert columns(write(tmp_path, "a.tsv", f"p\tq\n{long}\t1\n")) == [{"p": long, "q": "1"}]


def test_read_rows_of_text_gives_one_row_a_line(tmp_path):
    path = write(tmp_path, "a.txt", " one \r\n\n\ttwo\0")
    assert columns(path) == [{"text": " one "}, {"text": "\ttwo\0"}]


def test_read_rows_unpacks_gzip_and_refuses_damage(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 100)
    assert columns(write(tmp_path, "a.jsonl.gz", packed)) == [{"a": 1}] * 100
    for damaged in (packed[:-12], b'{"a": 1}\n', packed[:12] + b"\xff\xff" + packed[14:]):
        with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged gzip file"):
            columns(write(tmp_path, "b.jsonl.gz", damaged))


@pytest.mark.parametrize("name", ["data.py", "data", "data.parquet", "data.gz"])
def test_read_rows_refuses_files_that_are_no_data(tmp_path, name):
    with pytest.raises(UserError, match=r"not a data file.*legal: \.jsonl \.json \.csv"):
        columns(write(tmp_path, name, "x"))
