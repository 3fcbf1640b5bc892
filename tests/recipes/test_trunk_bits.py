"""Recipes whose frozen trunk is quantised: what they train, and what they leave."""

import json

import pytest
import torch

from minirlhf.cli import main
from minirlhf.errors import OK
from minirlhf.models.lora import add_lora, merge_lora
from minirlhf.models.pretrained import load_pretrained
from tests.kill_harness import RECIPES, command, make_world

BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@BITS
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_on_a_quantised_trunk_and_exports_a_plain_model(
    recipe, bits, world, tmp_path
):
    runs = {}
    for name, trunk_bits in (("whole", 0), ("packed", bits)):
        out = tmp_path / name
        assert main(command(recipe, world, out, lora_rank=2, trunk_bits=trunk_bits)) == OK
        runs[name] = load_model(recipe, out).state_dict()
    start = load_pretrained(world / "model").state_dict()
    assert runs["packed"].keys() == runs["whole"].keys()
    for name, after in runs["packed"].items():
        assert after.dtype == torch.float32
        if "_proj" in name:
            assert not torch.equal(after, start[name])
            assert not torch.equal(after, runs["whole"][name])
        elif name in start:
            assert torch.equal(after, start[name])


def load_model(recipe, out):
    from minirlhf.models.pretrained import load_reward_model

    return (load_reward_model if recipe == "reward" else load_pretrained)(out / "model")


@BITS
def test_the_exported_model_is_the_one_that_was_trained_not_its_finer_original(
    bits, world, tmp_path
):
    """Unpacked weights plus adapters: what every score of the run was measured on."""
    out = tmp_path / "out"
    assert main(command("sft", world, out, lora_rank=2, trunk_bits=bits, eval_every=3)) == OK
    lm = add_lora(load_pretrained(world / "model", trunk_bits=bits), 2, 32.0)
    last = max((out / "checkpoints").glob("step-*"))
    load_adapters(lm, last)
    tokens = torch.tensor([[67, 68, 0, 257, 5]])
    trained, exported = lm(tokens), load_pretrained(out / "model")(tokens)
    torch.testing.assert_close(exported, trained, rtol=0, atol=1e-5)
    whole = add_lora(load_pretrained(world / "model"), 2, 32.0)
    load_adapters(whole, last)
    assert (merge_lora(whole)(tokens) - trained).abs().max() > 1e-4


def load_adapters(lm, commit):
    from safetensors.torch import load_file

    saved = load_file(commit / "model.safetensors")
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(saved[name])


@BITS
@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_the_reference_is_the_quantised_trunk_so_that_the_first_kl_is_0(
    recipe, bits, world, tmp_path
):
    out = tmp_path / "out"
    argv = command(recipe, world, out, lora_rank=2, trunk_bits=bits, log_every=1)
    assert main(argv) == OK
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    kl = [abs(line["objective/kl"]) for line in lines if "objective/kl" in line]
    assert kl[0] < 1e-6 < kl[-1]
