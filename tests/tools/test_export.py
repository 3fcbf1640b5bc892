"""A checkpoint as a folder: the same that the run itself leaves."""

from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.models.pretrained import load_pretrained, save_pretrained
from minirlhf.recipes import ppo
from tests.bad_inputs import make_world, words

LORA = ("--lora-rank", "2", "--learning-rate", "0.1", "--save-every", "1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


def weights(folder):
    return next(Path(folder).glob("*model.safetensors")).read_bytes()


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo", "grpo"])
def test_the_newest_checkpoint_is_what_the_run_left(verb, here, capsys):
    assert cli.main([*words(verb), *LORA]) == OK
    capsys.readouterr()
    assert cli.main(["export", "out", "--adapter"]) == OK
    told = capsys.readouterr().out
    assert "adapter of step-00000001 in out/adapter-step-00000001" in told and "peft: Peft" in told
    assert cli.main(["export", "out", "--merge", "--out", "merged"]) == OK
    assert weights("out/adapter-step-00000001") == weights("out/adapter")
    assert weights("merged") == weights("out/model")
    for name in ("adapter_config.json", "tokenizer_config.json"):
        made, left = (Path(folder, name).read_text()
                      for folder in ("out/adapter-step-00000001", "out/adapter"))
        assert made == left


def test_an_earlier_step_of_a_policy_with_a_critic_of_its_own(here):
    argv = [*words("ppo", critic="rm"), *LORA, "--no-train-critic"]
    assert cli.main(argv) == OK
    assert cli.main(["export", "out", "--adapter", "--step", "0"]) == OK
    assert weights("out/adapter-step-00000000") != weights("out/adapter")
    assert cli.main(["export", "out", "--merge"]) == OK
    assert weights("out/model-step-00000001") == weights("out/model")


def test_all_weights_are_exported_too(here):
    assert cli.main([*words("sft"), "--learning-rate", "0.1"]) == OK
    assert cli.main(["export", "out", "--merge"]) == OK
    assert weights("out/model-step-00000001") == weights("out/model")


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_an_adapter_is_merged(verb, here):
    assert cli.main([*words(verb), *LORA, "--no-merge"]) == OK
    assert cli.main(["export", "out/adapter", "--merge"]) == OK
    assert cli.main(["export", "out", "--merge"]) == OK
    assert weights("out/adapter/merged") == weights("out/model-step-00000001")
    assert cli.main(["export", "out/adapter", "--adapter"]) == BAD_INPUT


KEPT = ("--keep-best", "--eval-data", "prompts.jsonl", "--eval-every", "1",
        "--save-every", "1", "--learning-rate", "0.1")


@pytest.mark.parametrize("kind", [LORA[:2], (*LORA[:2], "--trunk-bits", "4")], ids=["lora", "nf4"])
def test_the_best_policy_of_a_run_is_exported(kind, here, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "keep_best", lambda _, state, __, write: state.step == 1 and write())
    assert cli.main([*words("ppo", steps=2), *kind, *KEPT]) == OK
    assert weights("out/best") != weights("out/model")  # which is of step 2
    for made, kept in (("adapter", "best-adapter"), ("model", "best")):
        flag = "--merge" if made == "model" else "--adapter"
        assert cli.main(["export", "out", "--best-policy", flag]) == OK
        assert f"{made} of the best policy in out/{made}-best" in capsys.readouterr().out
        assert weights(f"out/{made}-best") == weights(f"out/{kept}")
        assert not list(Path("out").glob(".*tmp*"))


@pytest.mark.parametrize(("argv", "told"), [
    (["out", "--merge", "--best-policy"],
     "out: has no best: --keep-best of ppo and grpo keeps one; of a checkpoint"),
    (["out", "--merge", "--best-policy", "--step", "1"], "give one of --best-policy and --step"),
    (["out"], "give one of --merge and --adapter"),
    (["out", "--merge", "--adapter"], "give one of --merge and --adapter"),
    (["lm", "--merge"], "lm: holds no run.json: give the folder of a run"),
    (["out", "--merge", "--step", "7"], "is no checkpoint: there are: step-00000000, step-0000000"),
    (["out", "--adapter"], "--adapter: out trained all weights: give --merge"),
    (["out", "--merge", "--out", "lm"], "--out: lm exists: give a new folder"),
])
def test_what_cannot_be_exported_is_refused(argv, told, here, capsys):
    assert cli.main([*words("sft"), "--save-every", "1"]) == OK
    capsys.readouterr()
    assert cli.main(["export", *argv]) == BAD_INPUT
    assert told in capsys.readouterr().err


def test_a_base_that_has_changed_is_refused(here, capsys):
    assert cli.main([*words("sft"), *LORA]) == OK
    lm = load_pretrained("lm")
    lm.model.layers[0].mlp.up_proj.weight.data += 0.5
    save_pretrained(lm, "lm")
    assert cli.main(["export", "out", "--adapter"]) == BAD_INPUT
    assert "was saved over other frozen weights" in capsys.readouterr().err
