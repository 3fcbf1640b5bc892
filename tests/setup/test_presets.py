"""PPO's presets: what they set is legal, has a source, and is what the papers and tools say."""

import json
from dataclasses import fields

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.run.config_file import explain, presets_of, read_settings
from minirlhf.run.flags import parse
from minirlhf.run.settings import settings_of
from minirlhf.setup.ppo_settings import PPOConfig
from tests.kill_harness import command, make_world

PRESETS, SETTINGS = presets_of(PPOConfig), settings_of(PPOConfig)
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
}


@pytest.mark.parametrize("name", sorted(NUMBERS.keys() | PRESETS.keys()))
def test_a_preset_reaches_the_config_with_the_numbers_of_its_source(name):
    config = parse(PPOConfig, [*NEEDED, "--preset", name], "minirlhf ppo")
    values, _, problems = read_settings(SETTINGS, PRESETS[name])
    assert not problems
    for key, value in values.items():
        assert getattr(config, key) == value and type(getattr(config, key)) is type(value), key
    assert {key: values[key] for key in NUMBERS[name]} == NUMBERS[name]
    free = {"model", "data", "reward", "out", "ref", "critic", "seed", "device", "dtype", "resume"}
    assert not values.keys() & free


@pytest.mark.parametrize("name", PRESETS)
def test_its_explanation_has_a_line_with_a_source_for_each_setting(name):
    values, _, _ = read_settings(SETTINGS, PRESETS[name])
    title, header, *lines = explain(PRESETS[name], SETTINGS).splitlines()
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
