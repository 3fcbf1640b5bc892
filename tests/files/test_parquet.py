"""Parquet files are read like JSON lines; without pyarrow they are refused in one line."""

import datetime
from importlib.util import find_spec

import pytest

from minirlhf.data.examples import load_pairs, load_texts
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.rows import read_rows
from minirlhf.files.sieve import RowPolicy


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError) as refused:
        list(read_rows(tmp_path / "a.parquet"))
    told = "reading Parquet needs pyarrow: pip install pyarrow"
    assert str(refused.value) == f"{tmp_path / 'a.parquet'}: {told}"


@pytest.fixture
def tokenizer(tmp_path):
    return train_tokenizer([], 258, tmp_path / "bytes")


@pytest.fixture
def write(tmp_path):
    """write(rows) -> a.parquet of these."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(rows, **settings):
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
        return path

    return write


def test_parquet_gives_what_json_would(write):
    rows = [
        {"a": "x", "b": 1, "c": 0.5, "d": True, "e": None, "f": [{"role": "user", "n": 1}]},
        {"a": "y", "b": None, "c": float("nan"), "d": False, "e": [1], "f": [{"role": "tool"}]},
    ]
    first, second = read_rows(path := write(rows))
    assert (first.where, second.where) == (f"{path}:row 1", f"{path}:row 2")
    assert first.columns == rows[0] and first.typed
    # a column of objects has all names in each: those without a value are no names
    assert second.columns == rows[1] | {"c": None}
    assert first.raw.startswith('{"a": "x", "b": 1')
    (row,) = read_rows(write([{"a": b"\xc3\xa4\xff", "b": datetime.date(2024, 1, 2)}]))
    assert row.columns == {"a": "ä\\xff", "b": "2024-01-02"}


def test_parquet_rows_are_numbered_over_its_groups(write):
    path = write([{"text": str(i)} for i in range(600)], row_group_size=7)
    rows = list(read_rows(path))
    assert [row.columns["text"] for row in rows] == [str(i) for i in range(600)]
    assert [row.where for row in rows[::599]] == [f"{path}:row 1", f"{path}:row 600"]


def test_parquet_is_read_as_its_columns_say(write, tokenizer):
    ask = {"role": "user", "content": "q"}
    sides = {side: [ask, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": "q", **sides, "score_chosen": 9.0}] * 3
    rows[1] = rows[1] | {"chosen": []}
    path = write(rows)
    with pytest.raises(UserError, match=r"a\.parquet:row 2: chosen is empty"):
        load_pairs(path, tokenizer, None, "drop")
    pairs, report = load_pairs(path, tokenizer, None, "drop", policy=RowPolicy("skip"))
    assert [pair.where for pair in pairs] == [f"{path}:row 1", f"{path}:row 3"]
    assert report.rejected_rows[0].where == f"{path}:row 2"
    assert pairs[0].columns["score_chosen"] == 9.0


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[: len(data) // 2], "damaged Parquet file, behind row 0: "),
        (lambda data: data[:4] + b"\0" * 16 + data[20:], "damaged Parquet file, behind row 0: "),
        (lambda data: data.replace(b"a" * 99, b"\xff" * 99), "damaged Parquet file, behind row 0"),
        (lambda data: b'{"text": "a"}', "is no Parquet file"),
        (lambda data: b"<html>", "is no Parquet file: it looks like a web page"),
        (lambda data: b"", "is no Parquet file"),
    ],
)
def test_a_broken_parquet_file_is_refused(write, tokenizer, spoil, told):
    path = write([{"text": "a" * 99}] * 5, compression="none")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError) as refused:
        load_texts(path, tokenizer, None, "drop")
    assert str(refused.value).startswith(f"{path}: {told}")


def test_a_parquet_file_without_rows_or_with_a_name_twice_is_refused(write, tmp_path):
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(UserError, match=r"a\.parquet: no rows"):
        list(read_rows(write([])))
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: column names must differ: \['text', 't"):
        list(read_rows(tmp_path / "b.parquet"))
