"""Rows of a Parquet file, as most data sets of the hub are stored, where pyarrow is installed."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from minirlhf.errors import UserError
from minirlhf.files.reading import disguise, opened

BATCH = 256  # rows that are decoded at once


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """(number of the row from 1, its columns). A list or an object within comes as Python's; of
    what an object has none of, its name is left out, since a column of objects names all names.

    Raises:
        UserError: pyarrow is missing, or the file is no Parquet.
    """
    numbers = count(1)
    with opened(path) as file:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(path, "reading Parquet needs pyarrow", "pip install pyarrow") from None
        start = file.read(64)
        if not start.startswith(b"PAR1"):
            raise UserError(path, "is no Parquet file", disguise(start))
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if len({*names}) != len(names):
                raise UserError(path, "column names must differ", str(names))
            for batch in table.iter_batches(BATCH):
                for columns in batch.to_pylist():
                    yield next(numbers), {name: _plain(v) for name, v in columns.items()}
        except (pyarrow.ArrowException, OSError, RuntimeError, ValueError) as error:
            told = str(error).splitlines()
            what = f"damaged Parquet file, behind row {next(numbers) - 1}"
            raise UserError(path, what, told[0] if told else "") from None


def _plain(value: object) -> object:
    """A value as JSON has it: NaN, which tables write for what is missing, is null, and what JSON
    has not its text."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if value is None or value != value:
        return None
    return value if isinstance(value, str | int | float) else str(value)
