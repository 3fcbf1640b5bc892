"""Presets: what they set is legal, has a source, and is what the papers and tools say."""

import json
from dataclasses import fields

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.run.config_file import explain, presets_of, read_settings
from minirlhf.run.flags import parse
from minirlhf.run.settings import settings_of
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from tests.kill_harness import command, make_world

CONFIGS = (PPOConfig, GRPOConfig)
PRESETS = {name: file for config in CONFIGS for name, file in presets_of(config).items()}
OF = {name: config for config in CONFIGS for name in presets_of(config)}
HERE = {field.name for field in fields(PPOConfig)}
NEEDED = ["--model", "m", "--data", "d", "--reward", "r", "--out", "o"]
NUMBERS = {  # from the papers and the tools, not from the files under test
    "trl-0.9": {"learning_rate": 1.41e-5, "kl_coef": 0.2, "kl_target": 6, "batch_size": 128,
                "max_ratio": 10, "max_grad_norm": None, "vf_coef": 0.1},
    "llama-factory": {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024,
                      "max_grad_norm": 1, "kl_coef": 0.2, "lora_alpha": 2 * 8},
    "nplus": {"learning_rate": 3e-6, "adam_epsilon": 1e-5, "kl_coef": 0.05, "kl_target": None,
              "temperature": 0.7, "max_new_tokens": 53, "batch_size": 512, "epochs": 4},
    "instructgpt": {"kl_coef": 0.02, "batch_size": 512, "mini_batches": 512 // 64, "epochs": 1,
                    "gamma": 1, "temperature": 1, "steps": 256_000 // 512},
    "deepseekmath": {"samples_per_prompt": 64, "batch_size": 1024 // 64, "mini_batches": 1,
                     "kl_coef": 0.04, "kl_estimator": "k3", "kl_in": "loss", "advantage": "grpo",
                     "loss_mean": "sequence", "learning_rate": 1e-6, "max_new_tokens": 1024},
    "dr_grpo": {"advantage": "dr_grpo", "loss_mean": "fixed", "kl_coef": 0, "batch_size": 128,
                "mini_batches": 128 * 8 // 128, "samples_per_prompt": 8, "learning_rate": 1e-6,
                "schedule": "constant", "max_new_tokens": 3000, "temperature": 1},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "batch_size": 512, "samples_per_prompt": 16,
             "mini_batches": 512 * 16 // 512, "loss_mean": "token", "kl_coef": 0,
             "missing_eos_buffer": 4096, "max_new_tokens": 16384 + 4096, "warmup_steps": 20},
    "gspo": {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "mini_batches": 4,
             "loss_mean": "sequence", "advantage": "grpo"},
}


@pytest.mark.parametrize("name", sorted(NUMBERS.keys() | PRESETS.keys()))
def test_a_preset_reaches_the_config_with_the_numbers_of_its_source(name):
    verb = "ppo" if OF[name] is PPOConfig else "grpo"
    config = parse(OF[name], [*NEEDED, "--preset", name], f"minirlhf {verb}")
    values, _, problems = read_settings(settings_of(OF[name]), PRESETS[name])
    assert not problems
    for key, value in values.items():
        assert getattr(config, key) == value and type(getattr(config, key)) is type(value), key
    assert {key: values[key] for key in NUMBERS[name]} == NUMBERS[name]
    free = {"model", "data", "reward", "out", "ref", "critic", "seed", "device", "dtype", "resume"}
    assert not values.keys() & free


@pytest.mark.parametrize("name", PRESETS)
def test_its_explanation_has_a_line_with_a_source_for_each_setting(name):
    settings = settings_of(OF[name])
    values, _, _ = read_settings(settings, PRESETS[name])
    title, header, *lines = explain(PRESETS[name], settings).splitlines()
    assert title.removeprefix(f"--preset {name}: ")
    end = lines.index("Not as there, on purpose:")
    assert [line.split()[0] for line in lines[:end]] == list(values)
    at = header.index("source")
    assert all(line[at:].strip() for line in lines[:end]) and lines[end + 1 :]


def test_a_run_with_a_preset_writes_plain_values_and_is_resumed_with_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(PPOConfig, "PRESETS", tmp_path)
    preset = tmp_path / "mine.toml"
    preset.write_text("temperature = 0.7\nclip_high = 0.3\nepochs = 9\n", encoding="utf-8")
    argv = command("ppo", make_world(tmp_path / "world"), tmp_path / "run", preset="mine")
    assert cli.main(argv) == OK
    written = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["settings"]
    assert written.keys() == HERE  # the preset itself is not one of them
    assert (written["temperature"], written["clip_high"]) == (0.7, 0.3)
    assert written["epochs"] == 2  # of a flag
    assert cli.main([*argv, "--resume"]) == OK
    preset.write_text("temperature = 0.8\n", encoding="utf-8")
    assert cli.main([*argv, "--resume"]) == BAD_INPUT
    assert "temperature was 0.7, is 0.8" in capsys.readouterr().err
