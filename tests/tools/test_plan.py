"""`minirlhf plan`: the recipes' flags, config.json alone, and the refusal of a small machine."""

import json
import shutil

import pytest
import torch

from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import BAD_INPUT, MACHINE, UserError, run
from minirlhf.run.machine import Machine
from minirlhf.tools import plan

SHAPE = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 4, "intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}


@pytest.fixture
def model(tmp_path):
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A process of 1 GB on a machine that has 1 GB left."""
    monkeypatch.setattr(plan, "process_bytes", lambda device: 10**9)
    monkeypatch.setattr(plan, "free_memory", lambda device: Machine(10**9, "MemAvailable"))


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def function(folder) -> str:
    """A reward function, which no plan calls."""
    (folder / "f.py").write_text("1 / 0", encoding="utf-8")
    return f"{folder / 'f.py'}:g"


def lines_of(out: str) -> dict[str, str]:
    """Part -> how it is counted, with one space between words."""
    table = out[out.index("memory of ") :].splitlines()
    pairs = (line.strip().split("  ", 1) for line in table if line.startswith("  "))
    return {name: " ".join(rest.split()[1:]) for name, rest in pairs}


def test_plan_ppo_needs_config_json_alone(model, capsys):
    words = ["ppo", "--model", str(model), "--reward", str(model), "--max-prompt-length", "10"]
    assert plan.main([*words, "--max-new-tokens", "20", "--batch_size", "16"]) == 0
    out = capsys.readouterr().out
    # 300 x 4 embeddings, 48 in attention, 72 in the MLP, 12 in norms
    assert lines_of(out)["weights"] == "1,332 x 4 B"
    assert lines_of(out)["reference"] == lines_of(out)["reward model"] == "1,332 x 4 B"
    assert lines_of(out)["KV cache"] == "16 rows x 30 tokens x 16 B"
    assert out.splitlines()[-1].endswith("more, 1.00 GB are free (MemAvailable)")


def test_plan_ppo_takes_the_longest_prompt_of_the_data(model, tmp_path, capsys):
    tokenizer = train_tokenizer(["a b c d"], 258, model)
    long, source = "x y z " * 3, function(tmp_path)
    data = rows(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": long})
    words = ["ppo", "--model", str(model), "--data", data, "--reward", source]
    assert plan.main([*words, "--max-new-tokens", "20", "--lora-rank", "2"]) == 0
    told = lines_of(capsys.readouterr().out)
    longest = len(tokenizer.encode(long))
    assert longest > 5
    assert told["KV cache"] == f"64 rows x {longest + 20} tokens x 16 B"
    assert not told.keys() & {"reference", "reward model"}


def test_plan_ppo_counts_texts_that_are_mixed_in(model, tmp_path, capsys):
    tokenizer = train_tokenizer(["a b c d"], 258, model)
    text, source = "x y z " * 5, function(tmp_path)
    data = rows(tmp_path / "p.jsonl", {"prompt": "a"})
    texts = rows(tmp_path / "t.jsonl", {"text": text})
    words = ["ppo", "--model", str(model), "--ptx-data", texts, "--ptx-coef", "1"]
    words += ["--max-new-tokens", "2", "--micro-batch-size", "1", "--ptx-batch-size", "1"]
    for more in (["--data", data, "--reward", source], ["--max-prompt-length", "1"]):
        assert plan.main([*words, *more]) == 0
        told = lines_of(capsys.readouterr().out)
        assert told["activations"].startswith(f"{len(tokenizer.encode(text)) + 1} tokens x ")


def test_plan_ppo_leaves_room_for_the_reward_model(model, tmp_path, capsys):
    train_tokenizer(["a b c d"], 258, model)
    short = shutil.copytree(model, tmp_path / "short")
    (short / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": 30}))
    data = rows(tmp_path / "p.jsonl", {"prompt": "a" * 20}, {"prompt": "a"})
    words = ["ppo", "--model", str(model), "--data", data, "--max-new-tokens", "20"]
    assert plan.main([*words, "--reward", str(model)]) == 0
    assert "kept 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"p\.jsonl:1: 20 tokens, max_length is 10"):
        plan.main([*words, "--reward", str(short)])


def test_plan_ppo_takes_the_held_out_prompts_of_the_run(model, tmp_path, capsys):
    train_tokenizer(["a b c d"], 258, model)
    data = rows(tmp_path / "p.jsonl", {"prompt": "a"})
    held_out = rows(tmp_path / "e.jsonl", *({"prompt": "a" * n} for n in (3, 5, 20)))
    words = ["ppo", "--model", str(model), "--data", data, "--eval-data", held_out]
    words += ["--max-new-tokens", "20"]
    assert plan.main([*words, "--eval-prompts", "2"]) == 0  # which leaves the long one out
    assert lines_of(capsys.readouterr().out)["KV cache"] == "64 rows x 25 tokens x 16 B"
    rows(tmp_path / "e.jsonl", {"prompt": "a"})
    with pytest.raises(UserError, match=r"e\.jsonl: 1 prompt to evaluate on: give 2 or more"):
        plan.main(words)


def test_plan_ppo_refuses_prompts_without_room_in_a_scorer_of_other_words(model, tmp_path):
    train_tokenizer(["a b c d"], 258, model)
    other = shutil.copytree(model, tmp_path / "other")
    train_tokenizer(["aa bb aa bb"] * 4, 260, other)
    (other / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": 22}))
    data = rows(tmp_path / "p.jsonl", {"prompt": "c" * 5})
    words = ["ppo", "--model", str(model), "--data", data, "--reward", str(other)]
    with pytest.raises(UserError, match=r"5 tokens once --reward .* re-encodes them, and 20 new"):
        plan.main([*words, "--max-new-tokens", "20"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reward", "gone.py:g"], "--reward: gone.py does not exist: give file.py:function"),
        (["--stop", "<|endoftext|>"], "stop strings: '<|endoftext|>' names a special token"),
        (["--ref", "other"], "--ref other: has another tokenizer than the policy"),
        (["--critic", "other"], "--critic other: has another tokenizer than the policy"),
    ],
)
def test_plan_ppo_refuses_what_a_run_would_before_it_loads(
    flags, told, model, tmp_path, monkeypatch
):
    train_tokenizer(["a b c d"], 258, model)
    train_tokenizer(["aa bb aa bb"] * 4, 260, shutil.copytree(model, tmp_path / "other"))
    data = rows(tmp_path / "p.jsonl", {"prompt": "a"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        plan.main(["ppo", "--model", "model", "--data", data, *flags])
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize(
    ("recipe", "row"),
    [("reward", {"chosen": "a" * 70, "rejected": "b"}), ("sft", {"text": "a" * 70})],
)
@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_plan_refuses_rows_that_the_model_does_not_read(recipe, row, flag, model, tmp_path):
    train_tokenizer(["a b c d"], 258, model)
    short = {key: "cd" for key in row} | {"rejected": "b"}
    files = {"--data": rows(tmp_path / "t.jsonl", short),
             flag: rows(tmp_path / "long.jsonl", row)}
    words = [word for item in files.items() for word in item]
    told = r"long\.jsonl: a row of 71 tokens, the model reads 64: give --max-length 64"
    with pytest.raises(UserError, match=told):
        plan.main([recipe, "--model", str(model), *words])


def test_plan_reward_leaves_eos_out_for_a_model_that_is_read_before_it(model, tmp_path, capsys):
    train_tokenizer(["a b c d"], 258, model)
    data = rows(tmp_path / "p.jsonl", {"chosen": "abc", "rejected": "ab"})
    for before, tokens in ((False, 4 + 3), (True, 3 + 2)):
        config = json.dumps(SHAPE | {"read_before_eos": before})
        (model / "config.json").write_text(config, encoding="utf-8")
        assert plan.main(["reward", "--model", str(model), "--data", data]) == 0
        told = lines_of(capsys.readouterr().out)
        assert told["activations"].startswith(f"{tokens} tokens x ")


def test_plan_reward_refuses_a_loss_that_means_nothing_for_the_data(model, tmp_path):
    train_tokenizer(["a b c d"], 258, model)
    data = rows(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "b"})
    words = ["reward", "--model", str(model), "--data", data, "--list-loss", "pairs"]
    with pytest.raises(UserError, match=r"--list-loss: is pairs, but .*p\.jsonl holds pairs"):
        plan.main(words)


def test_plan_reward_counts_the_evaluation_that_normalises(model, tmp_path, capsys):
    train_tokenizer(["a b c d"], 258, model)
    data = rows(tmp_path / "p.jsonl", {"chosen": "a", "rejected": "b"})
    words = ["reward", "--model", str(model), "--data", data]
    for more, counted in (([], False), (["--normalize", "train"], True)):
        assert plan.main([*words, *more]) == 0
        assert ("evaluation pass" in lines_of(capsys.readouterr().out)) == counted


def test_plan_ppo_without_data_asks_for_the_length(model):
    with pytest.raises(UserError, match=r"^--data: not given, .* give it, or --max-prompt-length$"):
        plan.main(["ppo", "--model", str(model), "--max-new-tokens", "20"])


@pytest.mark.parametrize(
    ("recipe", "more", "cells"),
    [
        ("reward", ["--max-length", "30"], 16 * 2 * 30),  # 16 pairs
        ("reward", [], 16 * 2 * 64),  # what the model reads
        ("sft", ["--batch-size", "2", "--max-length", "30"], 60),
    ],
)
def test_plan_takes_the_longest_legal_row_without_data(recipe, more, cells, model, capsys):
    assert plan.main([recipe, "--model", str(model), *more]) == 0
    assert lines_of(capsys.readouterr().out)["activations"].startswith(f"{cells:,} tokens")


def test_plan_reward_measures_all_files(model, tmp_path, capsys):
    tokenizer = train_tokenizer(["a b c d"], 258, model)
    pair = {"prompt": "q", "chosen": "a b", "rejected": "c"}
    train = rows(tmp_path / "t.jsonl", pair, pair)
    held_out = rows(tmp_path / "e.jsonl", *[pair | {"chosen": "a b c d e f"}] * 3)
    words = ["--model", str(model), "--data", train, "--eval-data", held_out, "--batch-size", "2"]
    assert plan.main(["reward", *words]) == 0
    told = lines_of(capsys.readouterr().out)
    prompt, end = len(tokenizer.encode("q")), 1
    chosen, rejected, longest = (
        prompt + len(tokenizer.encode(text, bos=False)) + end
        for text in ("a b", "c", "a b c d e f")
    )
    assert chosen != rejected
    assert told["activations"].startswith(f"{2 * (chosen + rejected)} tokens")  # of both pairs
    assert told["evaluation pass"].startswith(f"{2 * 3 * longest} tokens")


def test_plan_sft_of_a_model_from_nothing(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    given = {k: v for k, v in SHAPE.items() if k not in ("vocab_size", "num_key_value_heads")}
    path.write_text(json.dumps(given), encoding="utf-8")
    assert plan.main(["sft", "--init-config", str(path), "--vocab-size", "400"]) == 0
    # 400 x 4, and 16 for each of k and v as for q
    assert lines_of(capsys.readouterr().out)["weights"] == "1,748 x 4 B"


def test_plan_sft_of_a_model_from_nothing_reads_its_data(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({k: v for k, v in SHAPE.items() if k != "vocab_size"}))
    data = rows(tmp_path / "t.jsonl", {"text": "a"}, {"text": "b"})
    words = ["sft", "--init-config", str(path), "--data", data]
    assert plan.main(words) == 0
    told = lines_of(capsys.readouterr().out)
    # nothing to merge in these texts, so 258 tokens, not the 8192 that there may be
    assert told["weights"] == "1,164 x 4 B"
    assert told["activations"].startswith("4 tokens x ")  # a letter and its eos in each


@pytest.mark.parametrize("given", ["--data", "--tokenizer"])
def test_plan_sft_refuses_a_config_with_fewer_words_than_the_tokenizer(given, model, tmp_path):
    train_tokenizer(["a b c d"], 258, model)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SHAPE | {"vocab_size": 257}), encoding="utf-8")
    data = rows(tmp_path / "t.jsonl", {"text": "a"})
    value = {"--data": data, "--tokenizer": str(model)}[given]
    told = r"tiny\.json: vocab_size: is 257: must be at least the tokenizer's 258"
    with pytest.raises(UserError, match=told):
        plan.main(["sft", "--init-config", str(path), given, value])


def test_plan_counts_half_precision(model, capsys):
    assert plan.main(["sft", "--model", str(model), "--dtype", "bfloat16"]) == 0
    assert lines_of(capsys.readouterr().out)["weights"] == "1,332 x 2 B"


def test_plan_prints_then_refuses_where_the_machine_is_too_small(model, capsys, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: Machine(1000, "the cgroup's limit"))
    assert run(lambda: plan.main(["sft", "--model", str(model)])) == MACHINE
    told = capsys.readouterr()
    assert told.out.startswith("memory of sft, GB\n  process")
    assert told.err == (
        "error: memory: sft needs 0.00 GB, 0.00 GB are free (the cgroup's limit): "
        "largest are the logits, 0.00 GB: lower --micro-batch-tokens\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pop"], "pop: no such recipe: the nearest is ppo; give a recipe first: ppo, reward, sft"),
        (["--modle", "m"], "--modle: unknown flag: the nearest is --help; give a recipe first"),
        (["ppo", "--modle", "m"], "--modle: unknown flag: the nearest is --model"),
        (["reward"], "--model: required, but not given"),
    ],
)
def test_plan_refuses_other_words(words, told):
    with pytest.raises(UserError) as refused:
        plan.main(words)
    assert str(refused.value).startswith(told)
    assert refused.value.code == BAD_INPUT


@pytest.mark.parametrize("words", [[], ["--help"], ["ppo", "--help"]])
def test_plan_has_help(words, capsys):
    with pytest.raises(SystemExit) as left:
        plan.main(words)
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: minirlhf plan ")


@pytest.mark.parametrize("name", plan.RECIPES)
def test_without_files_keeps_every_setting(name):
    config_class, _ = plan.RECIPES[name]
    made = plan.without_files(config_class)(model="m")
    assert isinstance(made, config_class)
    assert (made.data, made.out) == ("", "")


def test_plan_allocates_no_weights(model, monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters",
                        lambda self: made.append(self.weight.device.type))
    assert plan.main(["sft", "--model", str(model)]) == 0
    assert set(made) == {"meta"}
