"""A reward model gives the same scores here and in transformers: rendered by its chat template, in
padded batches, whoever wrote its folder."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from minirlhf.batches.preferences import unread_end
from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import load_reward_model
from minirlhf.rewards.model import model_reward, scores_read
from minirlhf.rewards.source import Completions
from minirlhf.setup.reward import write_reward_model
from minirlhf.tools.answers import answer_with
from tests.tiny_folders import change_json, random_lm, read_lines, write_lines

transformers = pytest.importorskip("transformers")

TEXTS = ["the film was good...\n", "the plot was bad...\n", "a good film?\n", "### user:\nit was"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DOTS = (  # its end is one token with the full stop of an answer
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '..\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.3}
KINDS = {  # chat template, eos, pad (None: the eos, and no token is left to spare), model
    "a tail behind the eos": (CHATML, "<|im_end|>", "<|endoftext|>", LLAMA),
    "no tail": (CHATML.replace(">\n'", ">'"), "<|im_end|>", "<|endoftext|>", LLAMA),
    "no eos": (DOTS, "<|endoftext|>", "<|pad|>", LLAMA),
    "another eos": (CHATML, "<|endoftext|>", "<|pad|>", LLAMA),
    "a tail, pad is eos": (CHATML, "<|im_end|>", None, GPT2),
    "no tail, pad is eos": (CHATML.replace(">\n'", ">'"), "<|im_end|>", None, GPT2),
    "no template, pad is eos": (None, "<|endoftext|>", None, GPT2),
}
NAMES = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder: Path, template: str | None, eos: str, pad: str | None) -> None:
    train_tokenizer(TEXTS, 290, folder)
    path = folder / "tokenizer.json"
    size = load_tokenizer(folder).vocab_size
    ids = dict(zip(NAMES, (0, 1, size, size + 1), strict=True))
    # where the pad token is the eos, the others are ordinary words: none is left to spare
    special = {eos, "<|im_start|>"} | ({pad} if pad else set())
    added = [{"id": id, "content": name, "special": name in special, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False} for name, id in ids.items()]
    change_json(path, added_tokens=added)
    named = {"eos_token": eos, "pad_token": pad or eos, "unk_token": None, "bos_token": None}
    named |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(named | ({"chat_template": template} if template else {}))
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a folder that was written here, and one of the same kind by transformers."""
    made = {}
    for kind, (template, eos, pad, shape) in KINDS.items():
        base = tmp_path_factory.mktemp("base")
        save_tokenizer(base, template, eos, pad)
        tokenizer, here, there = load_tokenizer(base), base / "here", base / "there"
        lm = random_lm(shape, vocab_size=tokenizer.vocab_size)
        model = RewardModel(lm, unread_end(lm.config, tokenizer))
        assert (model.unread is None) == (pad is not None)
        initialize_score(model, torch.Generator().manual_seed(1))
        write_reward_model(model, tokenizer, here)
        # as TRL saves one: the tokenizer's pad token in config.json, and nothing of ours
        own = transformers.AutoTokenizer.from_pretrained(here)
        config = transformers.AutoConfig.for_model(
            **{k: v for k, v in shape.items() if k != "initializer_range"},
            initializer_range=0.3, vocab_size=tokenizer.vocab_size, num_labels=1,
            pad_token_id=own.pad_token_id, eos_token_id=own.eos_token_id,
        )
        torch.manual_seed(2)
        theirs = transformers.AutoModelForSequenceClassification.from_config(config)
        theirs.save_pretrained(there)
        own.save_pretrained(there)
        made[kind] = {"here": here, "there": there}
    return made


@pytest.fixture(params=[(kind, side) for kind in KINDS for side in ("here", "there")],
                ids=lambda p: f"{p[0]}, written {p[1]}")
def folder(request, folders):
    kind, side = request.param
    return folders[kind][side]


@cache
def peer(folder: Path) -> tuple:
    """transformers' tokenizer and model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder), model.eval()


def elsewhere(folder: Path, chats: list[list[dict] | str]) -> torch.Tensor:
    """transformers' scores, in one padded batch; a string is taken as it is."""
    tokenizer, model = peer(folder)
    texts = [c if isinstance(c, str) else tokenizer.apply_chat_template(c, tokenize=False)
             for c in chats]
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False,
                      return_tensors="pt")
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


PROMPTS = [[turn("user", "a film?")],
           [turn("system", "so"), turn("user", "it was"), turn("assistant", "bad."),
            turn("user", "the plot was bad, the film was")]]
GOOD, BAD = [turn("assistant", "it was good.")], [turn("assistant", "bad")]


def close(found, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def scores(folder: Path, rows: list[dict], tmp_path: Path, capsys) -> list[dict]:
    data = write_lines(tmp_path / "rows.jsonl", rows)
    assert main(["score", "--model", str(folder), "--data", data]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_pairs_lists_and_dialogues_are_scored_as_elsewhere(folder, tmp_path, capsys):
    chats = [p + answer for p in PROMPTS for answer in (GOOD, BAD)]
    expected = elsewhere(folder, chats)
    rows = [{"prompt": p, "chosen": GOOD, "rejected": BAD} for p in PROMPTS]
    found = scores(folder, rows, tmp_path, capsys)
    close([row[f"{side}_score"] for row in found for side in ("chosen", "rejected")], expected)
    rows = [{"chosen": p + GOOD, "rejected": p + BAD} for p in PROMPTS]
    found = scores(folder, rows, tmp_path, capsys)
    close([row[f"{side}_score"] for row in found for side in ("chosen", "rejected")], expected)
    rows = [{"prompt": p, "responses": [GOOD, BAD]} for p in PROMPTS]
    close([x for row in scores(folder, rows, tmp_path, capsys) for x in row["scores"]], expected)
    rows = [{"messages": chat} for chat in chats]
    close([row["score"] for row in scores(folder, rows, tmp_path, capsys)], expected)


def test_a_folder_that_says_end_of_turn_is_read_there(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["a tail behind the eos"]["here"], tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["score_position"], config["read_before_eos"]) == ("end_of_text", False)
    change_json(folder / "config.json", score_position="end_of_turn")
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
    chats = [prompt + GOOD for prompt in PROMPTS]
    expected = elsewhere(folder, [tokenizer.render_chat(c, False).rstrip("\n") for c in chats])
    found = scores(folder, [{"messages": chat} for chat in chats], tmp_path, capsys)
    close([row["score"] for row in found], expected)
    ids = [tokenizer.encode_chat(prompt) for prompt in PROMPTS]
    answer = tokenizer.encode(GOOD[0]["content"]) + list(tokenizer.eos_ids)
    batch = Completions(PROMPTS, ids, [GOOD[0]["content"]] * 2, [answer] * 2, ["eos"] * 2, {})
    for again in (False, True):
        close(model_reward(model, tokenizer, 256, own_tokenizer=again)(batch), expected)
    assert scores_read(model, tokenizer).startswith("messages at the end of turn, as its config")
    # a model that is trained further is read, and says so, as the one before it
    data = write_lines(tmp_path / "pairs.jsonl", [{"chosen": PROMPTS[0] + GOOD,
                                                   "rejected": PROMPTS[0] + BAD}] * 2)
    words = ["reward", "--model", str(folder), "--data", data, "--out", str(tmp_path / "out")]
    assert main([*words, "--steps", "1"]) == 0
    assert not load_reward_model(tmp_path / "out" / "model").whole
    change_json(folder / "config.json", score_position="eos")
    for command in (["score", *words[1:5]], [*words[:-1], "o"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "score_position: is 'eos': legal: end_of_text, end_of_turn" in told


def test_a_run_evaluates_what_others_read(folders, tmp_path, capsys):
    for kind in ("a tail behind the eos", "no tail, pad is eos"):
        out, base = tmp_path / kind[:2], folders[kind]["here"]
        rows = [{"prompt": p, "chosen": GOOD, "rejected": BAD} for p in PROMPTS]
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        words = ["--steps", "2", "--learning-rate", "1e-2", "--eval-data", data, "--out", str(out)]
        assert main(["reward", "--model", str(base), "--data", data, *words, "--verbose"]) == 0
        shown = capsys.readouterr().out
        tail = ', tail "\\n" included' if "tail behind" in kind else ""
        assert f"messages at the end of the rendered text{tail}; strings" in shown
        theirs = elsewhere(out / "model", [p + answer for p in PROMPTS for answer in (GOOD, BAD)])
        margin = float((theirs[::2] - theirs[1::2]).mean())
        last = [row for row in read_lines(out / "metrics.jsonl") if "eval_margin" in row][-1]
        assert last["eval_margin"] == pytest.approx(margin, abs=1e-5) and abs(margin) > 0.01


def test_strings_are_scored_as_elsewhere(folder, tmp_path, capsys):
    eos = peer(folder)[0].eos_token
    texts = ["the film was good.", "bad", "it was a bad plot"]
    found = scores(folder, [{"text": text} for text in texts], tmp_path, capsys)
    close([row["score"] for row in found], elsewhere(folder, [text + eos for text in texts]))


ANSWERS = [
    ("it was good.", "eos"), ("bad", "stop"), ("it was good.", "stop"), ("the plot", "length")
]


@pytest.mark.parametrize("other", [False, True])
def test_rollouts_are_scored_as_elsewhere(other, folder, tmp_path):
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
    policy = tokenizer if not other else train_tokenizer(TEXTS, 270, tmp_path)
    drawn = {"eos": list(policy.eos_ids[:1]), "stop": policy.encode("###"), "length": []}
    rows = [(prompt, text, reason) for prompt in PROMPTS for text, reason in ANSWERS]
    plain = "assistant: " in tokenizer.render_chat(PROMPTS[0] + GOOD, False)  # a blank in front
    batch = Completions(
        [prompt for prompt, _, _ in rows], [policy.encode_chat(prompt) for prompt, _, _ in rows],
        [text for _, text, _ in rows],
        [policy.encode(" " * plain + text) + drawn[reason] for _, text, reason in rows],
        [reason for _, _, reason in rows], {},
    )
    theirs, _ = peer(folder)
    chats = [
        theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        + " " * plain + text if reason == "length" else [*prompt, turn("assistant", text)]
        for prompt, text, reason in rows
    ]
    found = model_reward(model, tokenizer, 256, own_tokenizer=other)(batch)
    close(found, elsewhere(folder, chats))


def test_rendered_texts_are_scored_as_their_dialogues(folder, tmp_path, capsys):
    """Texts for serve, ids of sampled rows, and prompts of ids: what an eos ends gets its tail."""
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder)
    eos, _ = tokenizer.eos_token()
    heads = [tokenizer.render_chat(prompt) for prompt in PROMPTS]
    chats = [prompt + answer for prompt in PROMPTS for answer in (GOOD, BAD)]
    whole = [tokenizer.render_chat(chat, False) for chat in chats]
    # where no special token tells a dialogue, text and eos are all that is known
    known = "<|im_start|>" in whole[0]
    cut = [f"{head}{answer[0]['content']}" for head in heads for answer in (GOOD, BAD)]
    drawn = [text + eos for text in cut]
    expected = elsewhere(folder, chats if known else drawn)

    answer = answer_with(model, tokenizer, 256)
    close(answer({"messages": drawn})["scores"], expected)
    close(answer({"messages": whole})["scores"], elsewhere(folder, whole))
    close(answer({"messages": cut})["scores"], elsewhere(folder, cut))
    items = [{"id": i, "prompt": prompt, "completion": turns[0]["content"]}
             for i, (prompt, turns) in enumerate((p, a) for p in PROMPTS for a in (GOOD, BAD))]
    close([row["score"] for row in answer({"items": items})["scores"]], elsewhere(folder, chats))

    prompts = [tokenizer.encode_marked(head) for head in heads for _ in (GOOD, BAD)]
    ids = [tokenizer.encode_marked(text) for text in drawn]
    rows = [{"prompt": "p", "response": "r", "finish_reason": "eos", "input_ids": row,
             "prompt_length": len(head), "tokenizer": tokenizer.fingerprint}
            for head, row in zip(prompts, ids, strict=True)]
    close([row["score"] for row in scores(folder, rows, tmp_path, capsys)], expected)
    rows = [row | {"finish_reason": "length", "input_ids": row["input_ids"][:-1]} for row in rows]
    close([row["score"] for row in scores(folder, rows, tmp_path, capsys)], elsewhere(folder, cut))

    texts = [tokenizer.decode(head, skip_special=False) for head in prompts]
    answers = [row[len(head):] for head, row in zip(prompts, ids, strict=True)]
    batch = Completions(texts, prompts, [tokenizer.decode(row[:-1]) for row in answers], answers,
                        ["eos"] * 4, {})
    close(model_reward(model, tokenizer, 256)(batch), expected)

    for lines in (drawn, whole) if known else (drawn,):
        data = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in lines])
        assert main(["score", "--model", str(folder), "--data", data, "--rendered"]) == 0
        rows = map(json.loads, capsys.readouterr().out.splitlines())
        close([row["score"] for row in rows], expected)
