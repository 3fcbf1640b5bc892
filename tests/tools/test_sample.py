"""`minirlhf sample`: responses as JSON lines, the same however they were batched."""

import io
import json
import shutil
import sys

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.tools.sample import json_lines, sample
from tests.tiny_folders import random_lm
from tests.tools.conftest import PROMPTS, TINY, command_of, lines_of, write_lines


def test_sample_row_does_not_depend_on_the_batch(files, capsys):
    command = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--batch-size", 16)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(list(row) == ["prompt", "response", "finish_reason", "tokens"] for row in rows)
    for size in (1, 4):
        assert lines_of(capsys, *command, "--batch-size", size) == rows
    assert lines_of(capsys, *command, "--limit", 2) == rows[:2]


def test_sample_draws_anew_for_each_row_and_seed(files, capsys, tmp_path):
    same = write_lines(tmp_path / "same.jsonl", *[{"prompt": "a film"}] * 3)
    command = ["sample", "--model", files["LM"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--data", same)
    others = lines_of(capsys, *command, "--data", same, "--seed", 1)
    assert len({row["response"] for row in rows + others}) == 6
    assert lines_of(capsys, *command, "--prompt", "a film") == rows[:1]


def test_sample_draws_several_responses_of_each_prompt(files, capsys, tmp_path):
    command = ["sample", "--model", files["LM"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--data", files["PROMPTS"], "--samples", 3, "--limit", 2)
    assert [row["prompt"] for row in rows] == 3 * PROMPTS[:1] + 3 * PROMPTS[1:2]
    assert len({row["response"] for row in rows}) == 6
    # as if each prompt stood in the file three times, in any batch
    thrice = write_lines(tmp_path / "thrice.jsonl", *({"prompt": row["prompt"]} for row in rows))
    assert lines_of(capsys, *command, "--data", thrice, "--batch-size", 2) == rows


def test_rows_are_json_whatever_the_terminal_can_show(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    json_lines(None)({"prompt": "caf\u00e9 \U0001f600"})
    stream.seek(0)
    assert json.loads(stream.read()) == {"prompt": "caf\u00e9 \U0001f600"}


def test_sample_takes_every_text_for_a_prompt(files, capsys):
    (row,) = lines_of(
        capsys, "sample", "--model", files["LM"], "--prompt", "none", "--max-new-tokens", 1
    )
    assert row["prompt"] == "none"


def test_sample_greedy_equals_transformers(files, capsys):
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(files["LM"], dtype=torch.float32)
    tokenizer = load_tokenizer(files["LM"])
    command = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 12]
    for row in lines_of(capsys, *command, "--temperature", 0):
        tokens = torch.tensor([tokenizer.encode(row["prompt"])])
        out = peer.eval().generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False
        )
        response = out[0, tokens.shape[1] :].tolist()
        assert row["response"] == tokenizer.decode(response)
        assert row["tokens"] == len(response)
        assert row["finish_reason"] == ("eos" if response[-1] == 0 else "length")


def lm_that_says(files, text: str) -> CausalLM:
    """Whatever came before, its most probable next token is the next of a cycle: text, eos."""
    tokenizer = load_tokenizer(files["LM"])
    ids = [*tokenizer.encode(text), 0]
    assert len(set(ids)) == len(ids) <= 8
    lm = random_lm(TINY, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        lm.model.norm.weight.fill_(1.0)
        channel = {id: i for i, id in enumerate(ids)}  # each token of the cycle has its own
        for now, then in zip([ids[-1], *ids], ids, strict=False):
            lm.model.embed_tokens.weight[now, channel[now]] = 1.0
            lm.lm_head.weight[then, channel[now]] = 1.0
    return lm


def test_sample_counts_the_eos_and_leaves_it_out_of_the_text(files):
    tokenizer = load_tokenizer(files["LM"])
    prompts = [Prompt([0], "", "p:1", {})]
    lm = lm_that_says(files, "good film")
    said = len(tokenizer.encode("good film"))
    rows = list(sample(lm, tokenizer, prompts, Sampling(30, temperature=0)))
    row = {"prompt": "", "response": "good film", "finish_reason": "eos", "tokens": said + 1}
    ids = {"input_ids": [0, *tokenizer.encode("good film"), 0], "prompt_length": 1,
           "tokenizer": tokenizer.fingerprint}
    assert rows == [row | ids]  # the prompt's ids are not those of its text


def test_sample_cuts_before_a_stop_string(files):
    tokenizer = load_tokenizer(files["LM"])
    prompts = [Prompt([0], "", "p:1", {})]
    sampling = Sampling(30, temperature=0, stop_strings=(" fil",))
    (row,) = sample(lm_that_says(files, "good film"), tokenizer, prompts, sampling)
    assert (row["response"], row["finish_reason"]) == ("good", "stop")


def test_sample_answers_messages_with_a_message(files, capsys):
    pytest.importorskip("jinja2")
    command = ["sample", "--model", files["LM"], "--data", files["CHAT"], "--max-new-tokens", 8]
    (row,) = lines_of(capsys, *command)
    assert row["prompt"] == [{"role": "user", "content": "a film"}]
    (message,) = row["response"]
    assert message["role"] == "assistant" and isinstance(message["content"], str)
    command = ["sample", "--model", files["LM"], "--max-new-tokens", 8, "--chat"]
    assert lines_of(capsys, *command, "--prompt", "a film") == [row]


def test_sample_stopped_by_hand_keeps_what_it_wrote(files, capsys, monkeypatch):
    from minirlhf.tools import sample as module

    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*given)

    generate = module.generate
    monkeypatch.setattr(module, "generate", interrupted)
    words = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--batch-size", "2"]
    assert main([*words, "--max-new-tokens", "8"]) == 75
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err.endswith("stopped after 2 of 6 rows\n")


def test_a_stop_string_that_no_text_shows_is_refused(files, capsys):
    words = ["sample", "--model", files["LM"], "--prompt", "a", "--stop", "a<|endoftext|>"]
    assert main(list(map(str, words))) == 2
    assert "stop strings: 'a<|endoftext|>' names a special token" in capsys.readouterr().err


def test_sample_takes_empty_prompts_where_something_stands_before_them(files, capsys, tmp_path):
    shutil.copytree(files["LM"], tmp_path / "bos")
    tokenizer = json.loads((tmp_path / "bos/tokenizer.json").read_text("utf-8"))
    name = "<|endoftext|>"  # of id 0, which then begins texts too
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    (tmp_path / "bos/tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_lines(tmp_path / "d.jsonl", {"prompt": ""})
    for folder, words, told in (
        (files["LM"], [], "d.jsonl:1: prompt is empty"),
        (files["LM"], ["--allow-empty-prompt"], "d.jsonl:1: a text without any token: the token"),
        (tmp_path / "bos", [], "d.jsonl:1: prompt is empty"),
    ):
        assert main([*command_of("sample", {"LM": str(folder)}, path), *words]) == 2
        assert told in capsys.readouterr().err
    command = command_of("sample", {"LM": str(tmp_path / "bos")}, path)
    (row,) = lines_of(capsys, *command, "--allow-empty-prompt")
    assert row["prompt"] == "" and row["tokens"] >= 1


# ---- chat models ---------------------------------------------------------------------------------


def said(capsys, *words) -> tuple[dict, str]:
    """(the row, what is told beside it) of a `sample` with one prompt."""
    assert main(["sample", "--max-new-tokens", "4", *map(str, words)]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_a_prompt_is_the_users_turn_where_the_model_has_a_chat_template(files, capsys, tmp_path):
    talker, turn = ["--model", files["TALKER"]], [{"role": "user", "content": "so"}]
    path = write_lines(tmp_path / "p.jsonl", {"prompt": turn})
    row, told = said(capsys, *talker, "--prompt", "so")
    assert row == said(capsys, *talker, "--data", path)[0] and row["prompt"] == turn
    assert "prompt: the user's turn, by the model's chat template (--raw: as it stands)\n" in told
    assert "sampling: temperature 0.7 (the default of chats)\n" in told
    raw, told = said(capsys, *talker, "--prompt", "so", "--raw")
    lm, of_lm = said(capsys, "--model", files["LM"], "--prompt", "so")
    assert raw == lm and raw["prompt"] == "so"  # the same weights
    assert told == "prompt: as it stands (--raw)\nsampling: temperature 1 (the model itself)\n"
    assert of_lm.startswith("prompt: as it stands: the model has no chat template\nsampling: temp")
    _, told = said(capsys, "--model", files["LM"], "--prompt", "so", "--chat")
    assert told.startswith("prompt: the user's turn, by a plain template: the model has none\n")


def test_strings_in_a_file_stay_strings_and_are_warned_of(files, capsys, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "so"}, {"prompt": "so"})
    words = ["--model", files["TALKER"], "--data", path, "--limit", 1]
    row, told = said(capsys, *words)
    assert row["prompt"] == "so" and "sampling: temperature 1 (the model itself)" in told
    warning = "warning: texts, read without the model's chat template: --chat makes turns of them"
    assert told.count(warning) == 1
    row, told = said(capsys, *words, "--chat")
    assert row["prompt"][0]["role"] == "user" and "warning" not in told
    assert main(["sample", *map(str, words), "--raw"]) == 2
    assert "raw: is for --prompt; strings in a file" in capsys.readouterr().err


OWN = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True}


@pytest.mark.parametrize(("words", "drawn", "told"), [
    ([], (0.6, 20, 0.9), "temperature 0.6 (generation_config.json), top_k 20 (generation_config"
     ".json), top_p 0.9 (generation_config.json)"),
    (["--temperature", 0, "--top-k", 5], (0, 5, 0.9),
     "temperature 0, top_k 5, top_p 0.9 (generation_config.json)"),
    (["--top-k", 0, "--top-p", 1, "--min-p", 0.1, "--repetition-penalty", 2], (0.6, 0, 1.0),
     "temperature 0.6 (generation_config.json), min_p 0.1, repetition_penalty 2"),
    (["--raw"], (1.0, 0, 1.0), "temperature 1 (the model itself)"),
])
def test_a_chat_is_drawn_as_its_folder_says_where_nothing_else_is_said(
    words, drawn, told, files, capsys, tmp_path, monkeypatch
):
    from minirlhf.tools import sample as module

    seen, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *a: seen.append(a[2]) or generate(*a))
    folder = shutil.copytree(files["TALKER"], tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(OWN))
    _, shown = said(capsys, "--model", folder, "--prompt", "so", *words)
    assert f"sampling: {told}\n" in shown
    assert [(s.temperature, s.top_k, s.top_p) for s in seen] == [drawn]


@pytest.mark.parametrize(("name", "value", "legal"), [
    ("temperature", "hot", "0, or from 0.0001 on: mend it, or give --temperature"),
    ("temperature", 1e-9, "0, or from 0.0001 on"), ("temperature", 1e9, "0, or from"),
    ("top_k", 2.5, "a whole number from 0 on: mend it, or give --top-k"), ("top_k", -1, "a whole"),
    ("top_p", 0, "above 0, at most 1: mend it, or give --top-p"), ("top_p", True, "above 0"),
])
def test_what_a_folder_says_of_sampling_must_be_legal(name, value, legal, files, capsys, tmp_path):
    folder = shutil.copytree(files["TALKER"], tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    words = ["sample", "--model", str(folder), "--prompt", "so", "--max-new-tokens", "2"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {folder}/generation_config.json: {name}: is ") and legal in told
    assert main([*words, f"--{name.replace('_', '-')}", "1"]) == 0  # the file is not asked then
    (folder / "generation_config.json").write_text(json.dumps({name: None}))
    assert main(words) == 0
