"""Every setting of every recipe changes something that can be seen, or is refused with a reason.

A run of two steps is made with and without each change. Seen are its exit code, the metrics, the
samples, the exported weights and the names of all files; not run.json, which holds the settings
themselves. What changes memory alone is seen in the estimate of it.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minirlhf.cli import VERBS, main
from minirlhf.errors import BAD_INPUT, MACHINE, NON_FINITE, OK
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.models.pretrained import load_pretrained
from minirlhf.run import optim
from minirlhf.setup import memory
from tests.kill_harness import RECIPES, ROWS, SHAPE, make_world
from tests.tiny_folders import save_lm, save_scorer, write_lines

CONFIGS = {recipe: VERBS[recipe].config() for recipe in RECIPES}
BASE = {
    "sft": {"model": "model", "data": "all.jsonl", "batch_size": 4},
    "reward": {"model": "model", "data": "all.jsonl", "batch_size": 4},
    "dpo": {"model": "model", "data": "all.jsonl", "batch_size": 4},
    "ppo": {
        "model": "model", "data": "all.jsonl", "reward": "reward.py:letters", "batch_size": 4,
        "micro_batch_size": 2, "epochs": 2, "max_new_tokens": 3,
    },
    "grpo": {
        "model": "model", "data": "all.jsonl", "reward": "reward.py:letters", "batch_size": 2,
        "samples_per_prompt": 2, "micro_batch_size": 2, "epochs": 2, "mini_batches": 2,
        "max_new_tokens": 3,
    },
    "distill": {
        "model": "model", "teacher": "teacher", "data": "all.jsonl", "batch_size": 4,
        "micro_batch_size": 2, "max_new_tokens": 3,
    },
}
PLACES = {"model", "base", "data", "eval_data", "ref", "critic", "tokenizer", "init_config",
          "reward", "ptx_data", "teacher"}


class Change(NamedTuple):
    value: object  # of the setting in the second run
    beside: dict = {}  # noqa: RUF012  what both runs have
    first: object = None  # of the setting in the first run; None: the default
    held: bool = False  # seen in the estimate of memory
    needed: str = ""  # what it is beside is refused without it, in these words
    refused: str = ""  # the second run is not made, for this reason


LETTERS = [chr(i) for i in range(33, 127)]  # a third of the 258 tokens
ENDS = {"stop": LETTERS, "max_new_tokens": 8}
ENDS_CHANGE = Change(LETTERS, {"max_new_tokens": 8})
SAMPLED = {  # of recipes that sample responses to prompts
    "eval_data": Change("few.jsonl"),
    "eval_every": Change(1, {"eval_data": "few.jsonl"}),
    "eval_prompts": Change(2, {"eval_data": "few.jsonl"}),
    "max_new_tokens": Change(2),
    "temperature": Change(0.5),
    "top_k": Change(5),
    "top_p": Change(0.5),
    "min_p": Change(0.9),
    "min_new_tokens": Change(3, {"model": "ending"}),
    "stop": ENDS_CHANGE,
    "rollout_batch_size": Change(1, held=True),
    "max_prompt_length": Change(8, {"overlong": "truncate_prompt_left"}),
    "overlong": Change("truncate_prompt_left", {"max_prompt_length": 8}, first="drop"),
    "micro_batch_size": Change(1),
    "allow_empty_prompt": Change(True, {"data": "empty.jsonl"}, refused="no beginning-of-text"),
    "sample_every": Change(1),
    "sample_prompts": Change(1),
}
POLICY = SAMPLED | {  # of recipes that learn from what a policy writes
    "rollout_bits": Change(8),
    "rollout_weight_cap": Change(1.0, {"rollout_bits": 8}),
    "reward": Change("reward.py:short"),
    "chat": Change(True, {"reward": "reward.py:shown"}),  # which is given messages then
    "template_kwargs": Change(  # `letters` reads strings
        ["mood=dull"], {"model": "told", "data": "turns.jsonl", "reward": "reward.py:short"}
    ),
    **{
        name: Change(value, refused="is for a service; no --reward is http://host:port/path")
        for name, value in {
            "reward_format": "llama-factory", "reward_timeout": 1.0, "reward_retries": 1,
            "reward_connect_timeout": 1.0, "reward_batch_size": 1, "reward_token_file": "t",
        }.items()
    },
    "keep_best": Change(
        True, {"eval_data": "few.jsonl", "eval_every": 1, "steps": 8, "learning_rate": 3e-2}
    ),
    "ref": Change("other"),
    "kl_coef": Change(0.5),
    "kl_estimator": Change("k3"),
    "missing_eos_penalty": Change(1.0),
    "missing_eos": Change("replace"),
    "missing_eos_buffer": Change(
        1, {"missing_eos": "ramp", "missing_eos_penalty": 1.0, **ENDS}, first=6
    ),
    "epochs": Change(1),
    "mini_batches": Change(2, first=1),
    "clip_low": Change(0.0),
    "clip_high": Change(0.0),
    "dual_clip": Change(1.21, {"learning_rate": 5e-2, "epochs": 4}),
    "max_ratio": Change(1.0001, {"learning_rate": 5e-2, "epochs": 4}),
    "early_stop_kl": Change(1e-9, {"mini_batches": 2}),
    "entropy_coef": Change(0.1),
    "offload_frozen": Change(True, held=True),
    "save_rollouts": Change(True),
}
CHANGES = {
    "all": {
        "model": Change("other"),
        "base": Change("model", {"model": "adapter"}, needed="its base gone: no such folder"),
        "data": Change("few.jsonl"),
        "steps": Change(1),
        "batch_size": Change(2, {"micro_batch_size": 1}),
        "micro_batch_tokens": Change(8),
        "learning_rate": Change(2e-2),
        "schedule": Change("constant"),
        "warmup_steps": Change(1),
        "weight_decay": Change(0.5),
        "adam_epsilon": Change(1e-2),
        "max_grad_norm": Change(1e-3),
        "skip_nonfinite": Change(5),
        "lora_rank": Change(2),
        "lora_alpha": Change(2.0, {"lora_rank": 2}),
        "lora_targets": Change(["attention"], {"lora_rank": 2}),
        "rslora": Change(True, {"lora_rank": 2}),
        "dora": Change(True, {"lora_rank": 2}),
        "merge": Change(False, {"lora_rank": 2}),
        "trunk_bits": Change(4, {"lora_rank": 2}, first=8),
        "gradient_checkpointing": Change(True, held=True),
        "compile": Change(True, refused="torch.compile: fails here: no compiler"),
        "dtype": Change("bfloat16"),
        "device": Change("cuda", refused="--device: 'cuda' cannot be used"),
        "parallel": Change("ddp", refused="--parallel: is ddp, and this is a single process"),
        "offload_params": Change(True, refused="offload_params: goes with --parallel fsdp"),
        "seed": Change(1),
        "dry_run": Change(True),
        "log_every": Change(2),
        "save_every": Change(2),
        "track": Change(["nobody"], refused="must be of tensorboard, wandb, trackio"),
        "keep": Change(3, {"steps": 3}),
        "columns": Change(
            ["prompt=question"], {"data": "renamed.jsonl"}, needed="columns of no known format"
        ),
        "chat": Change(True),
        "rendered": Change(True, {"data": "named.jsonl"}, needed="name of a control token"),
        "spelled": Change(True, {"data": "named.jsonl"}, needed="name of a control token"),
        "bad_rows": Change("skip", {"data": "broken.jsonl"}, needed="not valid JSON"),
        "fix_text": Change(True, {"data": "surrogate.jsonl"}, needed="surrogate"),
        "allow_empty_prompt": Change(True, {"data": "empty.jsonl"}, needed="empty"),
        "template_kwargs": Change(["mood=dull"], {"model": "told", "data": "turns.jsonl"}),
        "max_drop": Change(
            0.1, {"data": "broken.jsonl", "bad_rows": "skip"}, refused="max_drop is 0.1"
        ),
    },
    "sft": {
        "lora_dropout": Change(0.5, {"lora_rank": 2}),
        "epochs": Change(2.0, {"steps": None}),
        "init_config": Change(
            "tiny.json", {"model": None}, needed="give exactly one of --model and --init-config"
        ),
        "tokenizer": Change("model", {"model": None, "init_config": "tiny.json"}),
        "train_on": Change("last", {"data": "talk.jsonl"}),
        "vocab_size": Change(262, {"model": None, "init_config": "tiny.json"}),
        "eval_data": Change("few.jsonl"),
        "eval_every": Change(1, {"eval_data": "few.jsonl"}),
        "max_length": Change(9, {"overlong": "truncate_response"}),
        "overlong": Change("truncate_response", {"max_length": 12}, first="drop"),
    },
    "reward": {
        "lora_dropout": Change(0.5, {"lora_rank": 2}),
        "model": Change("other"),
        "epochs": Change(2.0, {"steps": None}),
        "eval_data": Change("few.jsonl"),
        "eval_every": Change(1, {"eval_data": "few.jsonl"}),
        "show_samples": Change(1, {"eval_data": "few.jsonl"}),
        "center_rewards_coefficient": Change(0.5),
        "label_smoothing": Change(0.1),
        "list_loss": Change("pairs", {"data": "lists.jsonl"}),
        "heads": Change(2),
        "lcb_coef": Change(0.5, {"heads": 2, "center_rewards_coefficient": 0.01}),
        "normalize": Change("train"),
        "columns": Change(["prompt=question"], {"data": "renamed.jsonl"}),  # pairs without prompt
        "max_length": Change(9, {"overlong": "truncate_response"}),
        "overlong": Change("truncate_response", {"max_length": 13}, first="drop"),
    },
    "dpo": {
        "lora_dropout": Change(0.5, {"lora_rank": 2}),
        "ref": Change("other"),
        "cache_ref": Change(False),
        "epochs": Change(2.0, {"steps": None}),
        "eval_data": Change("few.jsonl"),
        "eval_every": Change(1, {"eval_data": "few.jsonl"}),
        "show_samples": Change(1, {"eval_data": "few.jsonl"}),
        "loss": Change("ipo"),
        "beta": Change(0.5),
        "label_smoothing": Change(0.1),
        "simpo_gamma": Change(0.5, {"loss": "simpo"}),
        "desirable_weight": Change(2.0, {"loss": "kto", "data": "liked.jsonl"}),
        "undesirable_weight": Change(2.0, {"loss": "kto", "data": "liked.jsonl"}),
        "sft_coef": Change(0.5),
        "columns": Change(["prompt=question"], {"data": "renamed.jsonl"}),  # pairs without prompt
        "max_length": Change(9, {"overlong": "truncate_response"}),
        "overlong": Change("truncate_response", {"max_length": 13}, first="drop"),
    },
    "ppo": POLICY | {
        "critic": Change("rm"),
        "train_critic": Change(False, {"critic": "rm"}),
        "batch_size": Change(8),
        "kl_in": Change("loss", {"kl_estimator": "k3"}),
        "kl_target": Change(0.1, {"kl_horizon": 50.0}),
        "kl_horizon": Change(100.0, {"kl_target": 0.1}),
        "score_scaling": Change("normalize"),
        "score_clip": Change(0.1),
        "whiten_rewards": Change(True),
        "bootstrap_truncated": Change(True),
        "gamma": Change(0.5),
        "lam": Change(0.5),
        "value_clip": Change(1e-4),
        "vf_coef": Change(1.0),
        "whiten_advantages": Change(False),
        "ptx_data": Change(
            "texts.jsonl", {"ptx_coef": 1.0}, needed="ptx_data and ptx_coef go together"
        ),
        "ptx_coef": Change(2.0, {"ptx_data": "texts.jsonl"}, first=1.0),
        "ptx_batch_size": Change(2, {"ptx_data": "texts.jsonl", "ptx_coef": 1.0}),
        "critic_learning_rate": Change(1e-3),
        "critic_warmup_steps": Change(1),
    },
    "grpo": POLICY | {
        "batch_size": Change(4),
        "samples_per_prompt": Change(4),
        "resample": Change(2, {"reward": "reward.py:parity"}),
        "advantage": Change("dr_grpo"),
        "policy_loss": Change("cispo"),
        "loss_mean": Change("sequence", {"model": "ending"}),  # of unequal lengths
        "mask_truncated": Change(True, {"model": "ending"}),
        "kl_in": Change(
            "reward", {"kl_estimator": "k1"}, needed="kl_in loss with kl_estimator k1"
        ),
    },
    "distill": SAMPLED | {
        "batch_size": Change(8),
        "teacher": Change("other"),
        "gkd_beta": Change(0.5),
        "epochs": Change(2.0, {"steps": None}),
    },
}
# see the last test
OTHERWISE = {"out", "resume", "resume_from", "allow_data_change", "allow_setting_change",
             "verbose", "quiet", "json", "rank_timeout"}
CASES = [
    (recipe, name, ({**CHANGES["all"], **CHANGES[recipe]})[name])
    for recipe in CONFIGS
    for name in ({**CHANGES["all"], **CHANGES[recipe]})
]


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_setting_has_its_change(recipe):
    """A setting that is added must be shown to do something."""
    fields = {field.name for field in dataclasses.fields(CONFIGS[recipe])}
    assert {name for r, name, _ in CASES if r == recipe} == fields - OTHERWISE


def in_turns(row: dict) -> dict:
    """A row of strings as one of messages."""
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": value}]
        if isinstance(value, str) else value for name, value in row.items()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    for name in ("other", "rm"):
        shutil.copytree(folder / "model", folder / name)
    save_lm(folder / "other", SHAPE, 1, vocab_size=258)
    save_adapter(add_lora(load_pretrained(folder / "model"), 2, 4.0), folder / "adapter", "gone")
    save_scorer(folder / "rm", SHAPE, 1, 2, vocab_size=258)
    shutil.copytree(folder / "model", folder / "ending")  # half of the tokens end a response
    vocabulary = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    ends = [i for token, i in vocabulary.items() if token not in set("It was!Ġ")][:130]
    config = json.dumps({"eos_token_id": ends})
    (folder / "ending" / "generation_config.json").write_text(config)
    shutil.copytree(folder / "model", folder / "told")
    template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "told" / "chat_template.jinja").write_text(template)
    write_lines(folder / "texts.jsonl", ROWS["texts"])
    write_lines(folder / "lists.jsonl", ROWS["lists"])
    write_lines(folder / "liked.jsonl", ROWS["liked"])
    (folder / "tiny.json").write_text(json.dumps(SHAPE))
    data = dict.fromkeys(("reward", "dpo"), "pairs")
    data |= dict.fromkeys(("ppo", "grpo", "distill"), "prompts")
    for recipe, rows in {"sft": "texts", **data}.items():
        lines = [json.dumps(row) + "\n" for row in ROWS[rows]]
        files = {
            "all": lines, "few": lines[:3], "broken": [*lines, "{"],
            "surrogate": [lines[0].replace("It was", "It was \\ud83d"), *lines],
            "empty": [lines[0].replace("It was", ""), *lines],
            "named": [lines[0].replace("It was", "It <|pad|> was"), *lines],
            "renamed": [line.replace('"prompt"', '"question"') for line in lines],
            "turns": [json.dumps(in_turns(row)) + "\n" for row in ROWS[rows]],
        }
        (folder / recipe).mkdir()
        for name, some in files.items():
            (folder / recipe / f"{name}.jsonl").write_text("".join(some))
    twice = [[turn | {"content": turn["content"][:2]} for part in in_turns(row).values()
              for turn in part] * 2 for row in ROWS["texts"]]
    write_lines(folder / "sft" / "talk.jsonl", [{"messages": turns} for turns in twice])
    with (folder / "reward.py").open("a") as file:
        file.write("\ndef short(completions):\n    return [-len(t) for t in completions]\n")
        file.write("\ndef shown(completions):\n    return [len(str(t)) for t in completions]\n")
    return folder


def words(recipe: str, world: Path, out: Path, settings: dict) -> list[str]:
    argv = [recipe, "--out", str(out)]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        if name in PLACES:
            own = world / recipe / value
            value = own if own.suffix == ".jsonl" and own.exists() else world / value
        argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def seen(recipe: str, world: Path, out: Path, settings: dict, capsys) -> str:
    """Digest of what a run leaves."""
    code = main(words(recipe, world, out, settings))
    printed = capsys.readouterr()
    assert code in (OK, NON_FINITE), printed.err
    digest = hashlib.sha256(str(code).encode())
    for path in sorted(out.rglob("*")):
        digest.update(str(path.relative_to(out)).encode())
        if path.name in ("metrics.jsonl", "samples.jsonl") or path.parent.name == "model":
            digest.update(re.sub(rb', "clock": \{[^{}]*\}', b"", path.read_bytes()))
    return digest.hexdigest()


def not_finite_once(clip):
    """`optim.clip_gradients` that finds the second gradient infinite."""
    calls = count(1)

    def clip_gradients(model, max_norm, where):
        if next(calls) == 2:
            optim.check_finite(where, {"grad_norm": math.inf})
        return clip(model, max_norm, where)

    return clip_gradients


def no_compiler(*args, **settings):
    raise RuntimeError("no compiler\nand much more")


@pytest.mark.parametrize(("recipe", "name", "change"), CASES, ids=[f"{r}-{n}" for r, n, _ in CASES])
def test_a_setting_does_something_or_is_refused(
    recipe, name, change, world, tmp_path, capsys, monkeypatch
):
    fields = {field.name for field in dataclasses.fields(CONFIGS[recipe])}
    start = {"steps": 2, "log_every": 1, "save_every": 1, "learning_rate": 1e-2, **BASE[recipe]}
    start |= {k: v for k, v in change.beside.items() if k in fields}
    first = start if change.first is None else start | {name: change.first}
    changed = {**start, name: change.value}
    if change.refused:
        # What it does where there is a compiler is in test_compiling.py: it takes a minute.
        monkeypatch.setattr(torch, "compile", no_compiler)
        assert main(words(recipe, world, tmp_path / "b", changed)) in (BAD_INPUT, MACHINE)
        assert change.refused in capsys.readouterr().err
        return
    if change.needed:
        assert main(words(recipe, world, tmp_path / "a", first)) == BAD_INPUT
        assert change.needed in capsys.readouterr().err
        assert main(words(recipe, world, tmp_path / "b", changed)) == OK
        return
    announce, estimates = memory.announce, []

    def keep(config, estimate, *others):
        estimates.append(estimate)
        return announce(config, estimate, *others)

    monkeypatch.setattr(memory, "announce", keep)
    found, clip = [], optim.clip_gradients
    for out, settings in (("a", first), ("b", changed)):
        if name == "skip_nonfinite":
            monkeypatch.setattr(optim, "clip_gradients", not_finite_once(clip))
        found.append(seen(recipe, world, tmp_path / out, settings, capsys))
    if change.held:
        assert len(estimates) == 2 and estimates[0] != estimates[1]
    else:
        assert found[0] != found[1]


@pytest.mark.parametrize("recipe", CONFIGS)
def test_out_is_where_a_run_goes_and_resume_lets_it_go_on(recipe, world, tmp_path, capsys):
    settings = {"steps": 1, **BASE[recipe]}
    argv = words(recipe, world, tmp_path / "here", settings)
    assert main(argv) == OK and (tmp_path / "here" / "metrics.jsonl").is_file()
    assert main(argv) == BAD_INPUT
    assert "is not empty" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == OK
    assert "resumed from step-00000001" in capsys.readouterr().out
    assert main([*argv, "--resume", "--resume-from", "step-00000000"]) == OK
    assert "resumed from step-00000000" in capsys.readouterr().out
