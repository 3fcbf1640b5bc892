"""`minirlhf grpo` as a user runs it: what it prints, writes, resumes and exports."""

import json
import math
import os
import signal

import pytest
import torch

from minirlhf.cli import main
from minirlhf.equations.critic_free import sequence_surrogate
from minirlhf.errors import BAD_INPUT, OK, STOPPED
from minirlhf.models import pretrained
from minirlhf.models.lora import add_lora, merge_lora
from minirlhf.recipes import grpo as recipe
from minirlhf.run.checkpoint import TrainState, load_checkpoint
from minirlhf.run.folder import Run
from minirlhf.run.optim import make_optimizer
from tests import tiny_ppo
from tests.tiny_folders import leftovers, read_lines, timeless

world = tiny_ppo.world


def command(world, out, *flags: str, **settings) -> list[str]:
    values = {
        "model": world / "policy", "data": world / "prompts.jsonl", "out": out,
        "reward": f"{world / 'reward.py'}:letters", "steps": 4, "save_every": 2, "batch_size": 2,
        "samples_per_prompt": 3, "micro_batch_size": 2, "mini_batches": 2, "max_new_tokens": 5,
        "learning_rate": 1e-2, "sample_every": 3, "sample_prompts": 2, "log_every": 3, **settings,
    }
    return ["grpo", *flags] + [w for k, v in values.items() for w in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(world, out, "--save-rollouts", resample=2)) == OK
    return out


def test_main_prints_what_is_about_to_happen(world, tmp_path, capsys):
    flags = {"steps": 1, "resample": 2, "advantage": "rloo", "loss_mean": "fixed"}
    assert main(command(world, tmp_path / "run", "--verbose", **flags)) == OK
    printed = capsys.readouterr().out
    # embedded and unembedded, 2 layers, a norm
    count = 2 * 258 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 64) + 32
    facts = (
        ("prompts", "5"), ("epochs over prompts", "0.40"),
        ("rows in a forward pass", "at most 2, 4,096 tokens"),
        ("rows in an optimizer step", "about 3, 2 or more forward passes"),
        ("rows in a rollout", "6: 2 prompts, 3 responses to each, drawn again up to 2 times where "
         "scores agree"),
        ("optimisation", "1 epochs of 2 mini-batches a rollout"), ("steps", "1"),
        ("trainable parameters", f"{count:,}"), ("learning rate", "0.01, linear, 0 warm-up steps"),
        ("advantage", "rloo"), ("loss", "clip, ratio 0.8 to 1.2, mean by fixed"),
        ("kl_coef", "0.04, k2 in the loss"),
        ("reference", "the policy at step 0; their KL must be 0 there"), ("memory", "about "),
    )
    for name, value in facts:
        assert f"\n  {name:<25}  {value}" in printed, name
    assert f"aligned model in {tmp_path / 'run' / 'model'}" in printed


def test_main_writes_metrics_samples_and_checkpoints(whole):
    lines = read_lines(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[1]["epoch"] == (8 + lines[1]["resampled_prompts"]) / 5
    rows = read_lines(whole / "samples.jsonl")
    kinds = [(row["step"], row["kind"]) for row in rows]
    rollouts = {n: 6 * [(n, "rollout")] for n in (1, 2, 3, 4)}
    tables = {n: 2 * [(n, "sample")] for n in (0, 3, 4)}
    assert kinds == tables[0] + rollouts[1] + rollouts[2] + rollouts[3] + tables[3] + \
        rollouts[4] + tables[4]
    assert all(math.isfinite(v) for line in timeless(whole) for v in line.values())
    assert leftovers(whole) == []


def test_main_resumes_after_a_signal_to_the_same_bytes(whole, world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    argv, log = command(world, out, "--save-rollouts", resample=2), Run.log

    def interrupted(self, state, *rest):
        log(self, state, *rest)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        assert main(argv) == STOPPED
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(out)) == json.dumps(timeless(whole))
    for name in ("samples.jsonl", "model/model.safetensors",
                 "checkpoints/step-00000004/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_main_evaluates_without_a_reference(world, tmp_path, capsys):
    flags = {"kl_coef": 0, "eval_data": world / "prompts.jsonl", "eval_every": 2}
    assert main(command(world, tmp_path / "run", "--verbose", **flags)) == OK
    printed = capsys.readouterr().out
    assert "reference                  none: kl_coef is 0" in printed and "KL" not in printed
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3, 4]
    assert "eval/win_rate" in lines[3] and "eval/objective/kl" not in lines[3]


def test_main_measures_a_reference_that_is_named_and_weighs_nothing(world, tmp_path):
    argv = command(world, tmp_path / "run", kl_coef=0, ref=world / "other", log_every=1)
    assert main(argv) == OK
    first, *_ = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["kl"] > 0 and first["loss/kl_avg"] == 0


def test_main_exports_a_lora_run_merged(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, steps=2, lora_rank=2, log_every=1)) == OK
    assert read_lines(out / "metrics.jsonl")[0]["objective/kl"] == 0
    lm = add_lora(pretrained.load_pretrained(world / "policy"), 2, 32.0, 0)
    commit = out / "checkpoints" / "step-00000002"
    load_checkpoint(TrainState(lm, make_optimizer(lm, 1e-2)), commit)
    lm, row = merge_lora(lm), torch.tensor([[67, 68, 0, 257, 5]])
    exported = pretrained.load_pretrained(out / "model")
    start = pretrained.load_pretrained(world / "policy")
    with torch.no_grad():
        logits = lm.logits(lm(row))
        assert torch.equal(exported.logits(exported(row)), logits)
        assert not torch.equal(start.logits(start(row)), logits)


def test_main_without_frozen_models_in_memory_changes_no_bit(world, tmp_path):
    weights = []
    for name in ("held", "away"):
        flags = ["--offload-frozen"] if name == "away" else []
        argv = command(world, tmp_path / name, *flags, steps=2, reward=world / "reward")
        assert main(argv) == OK
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_main_learns_from_a_weighted_sum_and_logs_each_part(world, tmp_path):
    argv = command(world, tmp_path / "run", log_every=1, missing_eos_penalty=0.5)
    at = argv.index("--reward")
    argv[at + 1 : at + 2] = [f"{world / 'reward.py'}:letters", f"0.5*{world / 'reward'}"]
    assert main(argv) == OK
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        parts = line["rewards/letters/mean"] + 0.5 * line["rewards/reward/mean"]
        penalty = 0.5 * line["completions/clipped_ratio"]
        assert line["reward"] == pytest.approx(parts - penalty, abs=1e-6)


def test_main_learns_from_a_policy_loss_of_ones_own(world, tmp_path):
    weights = []

    def whole(logprobs, old_logprobs, advantages, response_mask):
        return sequence_surrogate(logprobs, old_logprobs, advantages, response_mask, 0.2, 0.2)

    for name, loss, own in (("own", "clip", whole), ("gspo", "gspo", None), ("clip", "clip", None)):
        argv = command(world, tmp_path / name, steps=2, policy_loss=loss, epochs=2)
        assert recipe.main(argv[1:], policy_loss=own) == OK
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 64}, "--max-new-tokens: 64 fill the model's context: use less than 64"),
        ({"ref": "nowhere"}, "nowhere: no such folder"),
        ({"samples_per_prompt": 1}, "samples_per_prompt 1 with advantage grpo"),
    ],
)
def test_main_refuses_before_it_writes(settings, message, world, tmp_path, capsys):
    assert main(command(world, tmp_path / "run", **settings)) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
