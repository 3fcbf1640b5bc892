"""A tokenizer of one token a byte, so that each id can be spelled by hand, and files of rows."""

import json

import pytest

from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer

EOS = 0


def spell(text):
    """Ids of ASCII text. Ids 0 and 1 are special; the byte-level alphabet is sorted by its
    characters: "!" to "~" stand for themselves from id 2; 94 + 12 + 82 of them end at 189; then
    come the bytes without a character of their own, from byte 0 at 190: newline 200, space 222."""
    return [190 + ord(c) if c in "\n " else 2 + ord(c) - ord("!") for c in text]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tokenizer without any merge."""
    folder = tmp_path_factory.mktemp("bytes")
    train_tokenizer([], 258, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def write(tmp_path):
    """write(row, …) -> a.jsonl of these rows."""

    def write(*rows):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
