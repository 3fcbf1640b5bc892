"""Presets: what they set is legal, has a source, and gives way to files and flags."""

import json
from dataclasses import dataclass, fields

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK, UserError
from minirlhf.run.flags import Preset, parse
from minirlhf.run.settings import setting
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.presets import PPO
from tests.kill_harness import command, make_world

# ---- the mechanism -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    model: str = setting("", "a model", metavar="FOLDER", required=True)
    rate: float = setting(0.1, "step size", above=0)
    clip: float | None = setting(None, "clip", above=0)
    white: bool = setting(True, "whiten")
    kind: str = setting("a", "kind", choices=("a", "b"))
    steps: int = setting(7, "steps", at_least=1)


OLD = Preset(
    "the old tool",
    {"rate": (0.5, "old.py: lr"), "clip": (2.0, "old.py: clip"), "white": (False, "sec. 3"),
     "kind": ("b", "eq. 1")},
    ("its bug is not here",),
)
PRESETS = {"old-tool": OLD, "bad": Preset("bad", {"rate": (-1.0, "x")}, ("x",))}


def read(*argv: str) -> Toy:
    return parse(Toy, list(argv), "minirlhf try", PRESETS)


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert caught.value.code == BAD_INPUT
    return str(caught.value)


def test_a_preset_beats_the_defaults():
    expected = Toy(model="m", rate=0.5, clip=2.0, white=False, kind="b", steps=7)
    assert read("--model", "m", "--preset", "old-tool") == expected
    assert read("--preset=old-tool", "--model", "m") == expected


def test_a_file_beats_the_preset_and_flags_beat_both(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('rate = 0.7\nkind = "a"\nsteps = 3\n', encoding="utf-8")
    argv = ["--model", "m", "--preset", "old-tool", "--config", str(file)]
    expected = Toy(model="m", rate=0.7, clip=2.0, white=False, kind="a", steps=3)
    assert read(*argv) == expected
    got = read(*argv, "--rate", "0.9", "--clip", "none", "--white")
    assert got == Toy(model="m", rate=0.9, clip=None, white=True, kind="a", steps=3)


def test_a_preset_does_not_give_what_is_required():
    assert "--model: required" in refused("--preset", "old-tool")


def test_another_preset_is_told_the_nearest():
    message = refused("--model", "m", "--preset", "oldtool")
    assert message == (
        "--preset: no preset 'oldtool': the nearest is old-tool; presets: old-tool, bad"
    )
    assert refused("--explain-preset", "oldtool").startswith("--explain-preset: no preset")
    assert "given twice" in refused("--model", "m", "--preset", "bad", "--preset", "bad")


def test_an_illegal_value_is_told_by_its_preset():
    assert refused("--model", "m", "--preset", "bad") == (
        "--preset bad: rate: got -1.0, must be a finite number > 0"
    )


def test_without_presets_there_is_no_such_flag():
    with pytest.raises(UserError, match="--preset: unknown flag"):
        parse(Toy, ["--model", "m", "--preset", "old-tool"], "minirlhf try")


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    assert "old-tool, bad" in " ".join(capsys.readouterr().out.split())


def test_explain_lists_settings_with_default_and_source_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        read("--explain-preset", "old-tool")  # --model is not asked for
    assert left.value.code == 0
    assert (
        capsys.readouterr().out
        == """\
--preset old-tool: the old tool
  setting  value  default  source
  rate     0.5    0.1      old.py: lr
  clip     2      none     old.py: clip
  white    off    on       sec. 3
  kind     b      a        eq. 1
Not as there, on purpose:
  its bug is not here
"""
    )


# ---- those of PPO --------------------------------------------------------------------------------

HERE = {field.name for field in fields(PPOConfig)}
NEEDED = ["--model", "m", "--data", "d", "--reward", "r", "--out", "o"]


@pytest.mark.parametrize("name", PPO)
def test_preset_sets_settings_that_there_are_and_each_has_a_source(name):
    preset = PPO[name]
    assert set(preset.values) <= HERE
    assert preset.about and preset.differs
    assert all(source.strip() for _, source in preset.values.values())
    free = {"model", "data", "reward", "out", "ref", "critic", "seed", "device", "dtype", "resume"}
    assert not set(preset.values) & free


@pytest.mark.parametrize("name", PPO)
def test_preset_is_legal_and_reaches_the_config(name):
    config = parse(PPOConfig, [*NEEDED, "--preset", name], "minirlhf ppo", PPO)
    for key, (value, _) in PPO[name].values.items():
        assert getattr(config, key) == value, key
        assert type(getattr(config, key)) is type(value), key


@pytest.mark.parametrize("name", PPO)
def test_explanation_has_a_line_a_setting(name, capsys):
    with pytest.raises(SystemExit):
        parse(PPOConfig, ["--explain-preset", name], "minirlhf ppo", PPO)
    out = capsys.readouterr().out
    assert out.startswith(f"--preset {name}: {PPO[name].about}\n")
    lines = out.splitlines()
    for key, (_, source) in PPO[name].values.items():
        assert any(line.startswith(f"  {key} ") and line.endswith(source) for line in lines), key
    assert all(f"  {text}" in lines for text in PPO[name].differs)


def test_numbers_of_the_presets():
    """From the papers and the tools, not from the table under test."""
    wanted = {
        "trl-0.9": {"learning_rate": 1.41e-5, "kl_coef": 0.2, "kl_target": 6, "batch_size": 128,
                    "max_ratio": 10, "max_grad_norm": None, "vf_coef": 0.1},
        "llama-factory": {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024,
                          "max_grad_norm": 1, "kl_coef": 0.2, "lora_alpha": 2 * 8},
        "nplus": {"learning_rate": 3e-6, "adam_epsilon": 1e-5, "kl_coef": 0.05, "kl_target": None,
                  "temperature": 0.7, "max_new_tokens": 53, "batch_size": 512, "epochs": 4},
        "instructgpt": {"kl_coef": 0.02, "batch_size": 512, "mini_batches": 512 // 64, "epochs": 1,
                        "gamma": 1, "temperature": 1, "steps": 256_000 // 512},
    }
    for name, numbers in wanted.items():
        found = {key: PPO[name].values[key][0] for key in numbers}
        assert found == numbers, name


def test_a_run_with_a_preset_writes_plain_values_and_is_resumed_with_it(
    tmp_path, monkeypatch, capsys
):
    values = {"temperature": (0.7, "table 1"), "clip_high": (0.3, "x"), "epochs": (9, "x")}
    monkeypatch.setitem(PPO, "mine", Preset("mine", values, ()))
    argv = command("ppo", make_world(tmp_path), tmp_path / "run", preset="mine")
    assert cli.main(argv) == OK
    written = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["settings"]
    assert written.keys() == HERE  # the preset itself is not one of them
    assert (written["temperature"], written["clip_high"]) == (0.7, 0.3)
    assert written["epochs"] == 2  # of a flag
    assert cli.main([*argv, "--resume"]) == OK
    values["temperature"] = 0.8, "table 1"
    assert cli.main([*argv, "--resume"]) == BAD_INPUT
    assert "temperature was 0.7, is 0.8" in capsys.readouterr().err
    plan = ["plan", *argv, "--max-prompt-length", "20"]
    assert cli.main(plan) == OK
