"""Tiny models and files for the tools, and what peers say of them."""

import json

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.tokenizer import train_tokenizer
from tests.tiny_folders import change_json, save_lm, save_scorer

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}
PROMPTS = ["a film", "the film that we saw", "so", "it was a good film and", "bad", "we left when"]
TEXTS = ["a good film", "bad", "we left before it was over", "it was good"]
LISTS = [{"prompt": "it was ", "responses": ["bad", "good", "over"], "ranks": [3, 1, 2]},
         {"prompt": "so ", "responses": ["bad", "good"], "ranks": [1, 1]},
         {"prompt": "a film ", "responses": ["that", "we left", "so"], "ranks": [1, 2, 2]}]
TURNS = (  # a chat template
    "{% for m in messages %}{{ m.role }}> {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
KINDS = {
    "sample": {"prompt": "a film"},
    "score": {"text": "a film"},
    "pairs": {"prompt": "a ", "chosen": "film", "rejected": "bad"},
    "lists": {"prompt": "a ", "responses": ["film", "bad"]},
}


def write_lines(path, *rows) -> str:
    """A row is an object, or a line as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def save_reward_model(folder, tokenizer, **changes) -> str:
    save_scorer(folder, TINY, 1, 2, vocab_size=tokenizer.vocab_size)
    change_json(folder / "config.json", **changes)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Name -> path: a language model, two reward models with the same weights, and data."""
    made = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer(PROMPTS + TEXTS, 280, made / "lm")
    save_lm(made / "lm", TINY, vocab_size=tokenizer.vocab_size)
    pairs = [{"prompt": "it was ", "chosen": "good", "rejected": "bad"},
             {"prompt": "a film ", "chosen": "that we saw", "rejected": "we left"},
             {"prompt": "a film ", "chosen": "same", "rejected": "same"},
             {"prompt": "so ", "chosen": "bad", "rejected": "over and over"}]
    tokenizer.save(made / "talker")
    save_lm(made / "talker", TINY, vocab_size=tokenizer.vocab_size)
    change_json(made / "talker" / "tokenizer_config.json", chat_template=TURNS)
    chat = [{"prompt": [{"role": "user", "content": "a film"}]}]
    return {
        "LM": str(made / "lm"),
        "TALKER": str(made / "talker"),  # the same weights, with a chat template
        "RM": save_reward_model(made / "rm", tokenizer),
        "BEFORE": save_reward_model(
            made / "before", tokenizer, read_before_eos=True, pad_token_id=0
        ),
        "PROMPTS": write_lines(made / "prompts.jsonl", *[{"prompt": p, "id": 7} for p in PROMPTS]),
        "CHAT": write_lines(made / "chat.jsonl", *chat),
        "TEXTS": write_lines(made / "texts.jsonl", *[{"text": text} for text in TEXTS]),
        "PAIRS": write_lines(made / "pairs.jsonl", *pairs),
        "LISTS": write_lines(made / "lists.jsonl", *LISTS),
    }


def lines_of(capsys, *words) -> list[dict]:
    """The rows on stdout of a command that must succeed."""
    assert main(list(map(str, words))) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def peer_score(folder: str, ids: list[int]) -> float:
    """transformers' score of one unpadded text."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        return float(model.eval()(torch.tensor([ids])).logits[0, 0])


def command_of(kind: str, files: dict, path: str) -> list[str]:
    if kind == "sample":
        return ["sample", "--model", files["LM"], "--max-new-tokens", "4", "--data", path]
    return ["score", "--model", files["RM"], "--data", path]
