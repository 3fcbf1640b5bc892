"""Tiny models, files of rows, and the command `minirlhf check` on them."""

import json

import pytest

from minirlhf.cli import main
from minirlhf.data.tokenizer import train_tokenizer
from tests.tiny_folders import save_lm, save_scorer, write_lines

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48, "tie_word_embeddings": True,
    "eos_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48,
    "eos_token_id": 0,
}
TEXTS = ["it was a good film", "we left before it was over", "so: bad"]


def save_model(folder, values, vocab_size, reward=False) -> str:
    (save_scorer if reward else save_lm)(folder, values, vocab_size=vocab_size)
    return str(folder)


def warned(facts: dict) -> list[tuple]:
    """(what, up to a comma; in how many rows; in which line first)."""
    return [(w["what"].split(",")[0], w["rows"], int(w["first"].rpartition(":")[2]))
            for w in facts["warnings"]]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(rows, name) -> the name of the file, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def lines(rows: list[dict], name: str = "rows.jsonl") -> str:
        write_lines(tmp_path / name, rows)
        return name

    return lines


@pytest.fixture
def lm(tmp_path):
    """The folder of a language model."""
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "lm")
    return save_model(tmp_path / "lm", LLAMA, tokenizer.vocab_size)


@pytest.fixture
def rm(tmp_path):
    """The folder of a reward model."""
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "rm")
    return save_model(tmp_path / "rm", LLAMA, tokenizer.vocab_size, reward=True)


@pytest.fixture
def look(capsys):
    """look(words) -> (exit code, stdout, stderr)."""

    def command(*words: object) -> tuple[int, str, str]:
        code = main(["check", *map(str, words)])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def facts_of(tmp_path, look):
    """facts_of(words) -> facts of each file, of a command that must succeed."""

    def command(*words: object) -> list[dict]:
        code, _, err = look(*words, "--json", tmp_path / "facts.json")
        assert (code, err) == (0, "")
        text = (tmp_path / "facts.json").read_text("utf-8")
        (tmp_path / "facts.json").unlink()
        return json.loads(text)["files"]

    return command
