"""Models that say what they are told to say, and a terminal that is none."""

import io
import sys

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.models.pretrained import save_pretrained
from tests.tiny_folders import change_json, random_lm
from tests.tools.conftest import TINY

END = "<|endoftext|>"
TURNS = "{% for m in messages %}{{ m.role }}> {{ m.content }}" + END + "{% endfor %}"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def says(files, tmp_path):
    """says(text) -> the folder of a chat model whose most probable answer is the text, whatever
    was said: each of its tokens, eos too, leads to the next."""

    def make(text: str, **changes) -> str:
        tokenizer = load_tokenizer(files["LM"])
        ids = [*tokenizer.encode(text), 0]
        assert len({*ids}) == len(ids) <= 16
        lm = random_lm(TINY, vocab_size=tokenizer.vocab_size, **changes)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.zero_()
            lm.model.norm.weight.fill_(1.0)
            channel = {id: i for i, id in enumerate(ids)}
            for now, then in zip([ids[-1], *ids], ids, strict=False):
                lm.model.embed_tokens.weight[now, channel[now]] = 1.0
                lm.lm_head.weight[then, channel[now]] = 9.0
        folder = tmp_path / f"says{len(list(tmp_path.iterdir()))}"
        save_pretrained(lm, folder)
        tokenizer.save(folder)
        change_json(folder / "tokenizer_config.json", chat_template=TURNS)
        return str(folder)

    return make


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(lines, words of the command) -> what stands on stdout."""

    def run(lines: str, *words: object, code: int = 0) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert main(["chat", *map(str, words)]) == code
        run.told = (shown := capsys.readouterr()).err
        return shown.out

    return run
