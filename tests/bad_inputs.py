"""What bad input must lead to: exit code 2, one line that says where and what, nothing written.

A command runs in a folder where everything is right (`lm`, `rm`, `texts.jsonl`, …), save for what
the case spoils, so that paths in commands and messages are short and the tables stay readable.
"""

import json
import os
import shlex
from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import BAD_INPUT
from tests.tiny_folders import save_lm, save_scorer

SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 48, "eos_token_id": 0,
}
TEXT = {"text": "The film was good."}
PAIR = {"prompt": "The film", "chosen": " was good.", "rejected": " was bad."}
PROMPT = {"prompt": "The film"}
REWARD = """
def length(completions):
    return [float(len(text)) for text in completions]

number = 3
"""
# Each is right as it stands.
COMMANDS = {
    "sft": "sft --model lm --data texts.jsonl --out out --steps 1",
    "new": "sft --init-config shape.json --data texts.jsonl --out out --steps 1 --vocab-size 258",
    "reward": "reward --model lm --data pairs.jsonl --out out --steps 1",
    "dpo": "dpo --model lm --data pairs.jsonl --out out --steps 1",
    "ppo": "ppo --model lm --data prompts.jsonl --reward rm --out out --steps 1 --batch-size 2 "
    "--micro-batch-size 2 --max-new-tokens 4",
    "grpo": "grpo --model lm --data prompts.jsonl --reward rm --out out --steps 1 --batch-size 1 "
    "--samples-per-prompt 2 --mini-batches 1 --micro-batch-size 2 --max-new-tokens 4",
    "distill": "distill --model lm --teacher teacher --data prompts.jsonl --out out --steps 1 "
    "--batch-size 2 --max-new-tokens 4",
    "sample": "sample --model lm --data prompts.jsonl --out out --max-new-tokens 4",
    "score": "score --model rm --data pairs.jsonl --out out",
}


def words(verb: str, **changes: object) -> list[str]:
    """The right command of a verb with some flags changed, added, or (None) left out."""
    given = shlex.split(COMMANDS[verb])
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in given:
            at = given.index(flag)
            del given[at : at + 2]
        if value is not None:
            given += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return given


def named(cases: list) -> list:
    """Cases under the last of their values, what is told, as a name that can be chosen with -k."""
    return [
        case if hasattr(case, "marks") else pytest.param(*case, id=str(case[-1])[:70])
        for case in cases
    ]


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_world(folder: Path) -> Path:
    """A language model, its teacher, its reward model, both with another tokenizer, and a file for
    each verb."""
    words = ["some words"] * 9
    for name, texts, size, save in (
        ("lm", [], 258, save_lm), ("teacher", [], 258, save_lm), ("rm", [], 258, save_scorer),
        ("other-lm", words, 260, save_lm), ("other", words, 260, save_scorer),
    ):
        vocabulary = train_tokenizer(texts, size, folder / name).vocab_size
        save(folder / name, SHAPE, vocab_size=vocabulary)
    files = {
        "texts.jsonl": json_lines(TEXT, TEXT), "pairs.jsonl": json_lines(PAIR, PAIR),
        "prompts.jsonl": json_lines(PROMPT, PROMPT), "reward.py": REWARD,
        "shape.json": json.dumps({k: v for k, v in SHAPE.items() if k != "vocab_size"}),
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and its time of change."""
    found = {}
    for folder in folders:
        for root, inner, names in os.walk(folder):
            for name in (*inner, *names):
                facts = os.lstat(os.path.join(root, name))
                found[os.path.join(root, name)] = facts.st_size, facts.st_mtime_ns
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(world, tmp_path, monkeypatch, capfd):
    """refused(argv) -> the one line, without its "error: ", of a command that writes nothing.

    The working folder is one with links to all of the world in it.
    """
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str]) -> str:
        before = listing(tmp_path, world)
        capfd.readouterr()
        code = cli.main(argv)
        told = capfd.readouterr().err
        assert code == BAD_INPUT, told or "it was accepted"
        assert told.startswith("error: ") and told.count("\n") == 1, told
        assert "Traceback" not in told and told[:-1].isprintable()
        assert listing(tmp_path, world) == before
        return told.removeprefix("error: ").removesuffix("\n")

    return run
