"""Strict reading: what is let through, as what; what is refused is in tests/test_bad_data.py."""

import errno
import gzip

import pytest

from minirlhf.errors import UserError
from minirlhf.files import reading
from minirlhf.files.reading import read_file, read_json, strict_json
from minirlhf.files.rows import Row, read_rows


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def columns(path):
    return [row.columns for row in read_rows(path)]


# ------------------------------------------------------------------------------------------- JSON


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


def test_a_gzip_bomb_is_refused_before_a_row_of_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "UNPACKED", 10_000)
    bomb, whole = tmp_path / "bomb.jsonl.gz", tmp_path / "whole.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000))  # 900,000 bytes in some 1,800
    assert 900_000 > 200 * bomb.stat().st_size
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz: unpacks to more than 200 times its"):
        next(read_rows(bomb))
    whole.write_bytes(gzip.compress(b'{"a": 1}\n' * 1_111))  # 9,999 bytes: any file may hold them
    assert len(list(read_rows(whole))) == 1_111


def test_read_rows_unpacks_gzip_and_refuses_damage(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 100)
    assert columns(write(tmp_path, "a.jsonl.gz", packed)) == [{"a": 1}] * 100
    for damaged in (packed[:-12], b'{"a": 1}\n', packed[:12] + b"\xff\xff" + packed[14:]):
        with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged gzip file"):
            columns(write(tmp_path, "b.jsonl.gz", damaged))
