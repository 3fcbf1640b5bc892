"""Runs with dropout of their adapters: what they learn, where they go on, what they leave."""

import json

import pytest
import torch

from minirlhf.batches.preferences import text_numbers
from minirlhf.cli import main
from minirlhf.errors import UserError
from minirlhf.models.lora import add_lora, merged_copy
from minirlhf.models.pretrained import load_pretrained
from minirlhf.recipes.dpo import dpo
from minirlhf.recipes.reward import reward
from minirlhf.recipes.sft import evaluate, sft
from minirlhf.run.settings import validate
from minirlhf.setup.sft_settings import SFTConfig
from tests import tiny_dpo, tiny_reward
from tests.kill_harness import command, make_world
from tests.recipes.test_sft import TEXTS, adam_state, config_of, tiny_lm
from tests.tiny_folders import rebuilt_at_each_step
from tests.tiny_reward import LISTS, PAIRS

ADAPTED = {"lora_rank": 2, "steps": 4, "learning_rate": 0.05, "batch_size": 3}


def sft_with(p, **more):
    return lambda state: sft(state, TEXTS, config_of(lora_dropout=p, **ADAPTED | more))


def reward_with(p, examples=PAIRS, **more):
    config = tiny_reward.config_of(lora_dropout=p, **ADAPTED | more)
    return lambda state: reward(state, examples, config)


def dpo_with(p, examples=PAIRS, **more):
    config, ref = tiny_dpo.config_of(lora_dropout=p, **ADAPTED | more), tiny_dpo.tiny_lm()
    return lambda state: dpo(state, examples, tiny_dpo.reference(ref), config)


CASES = {
    "sft": (lambda: adam_state(add_lora(tiny_lm(), 2, 32.0)), sft_with),
    "reward": (lambda: tiny_reward.state_of(add_lora(tiny_reward.tiny_model(), 2, 32.0)),
               reward_with),
    "dpo": (lambda: tiny_dpo.state_of(add_lora(tiny_dpo.tiny_lm(), 2, 32.0)), dpo_with),
}
EACH = pytest.mark.parametrize(("fresh", "steps_with"), CASES.values(), ids=CASES)


@EACH
def test_a_run_goes_on_with_the_masks_that_it_would_have_drawn(fresh, steps_with, tmp_path):
    whole = fresh()
    expected = [step.metrics for step in steps_with(0.3)(whole)]
    steps, state = rebuilt_at_each_step(fresh, steps_with(0.3), tmp_path)
    assert [step.metrics for step in steps] == expected
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], tensor), name


@EACH
def test_the_masks_do_not_depend_on_the_micro_batches(fresh, steps_with):
    one, other = fresh(), fresh()
    alone = steps_with(0.3, micro_batch_tokens=1)
    for steps in zip(steps_with(0.3)(one), alone(other), strict=True):
        losses = [step.metrics["loss"] for step in steps]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    *_, last = steps_with(0.0)(fresh())
    assert abs(last.metrics["loss"] - losses[0]) > 1e-3


def test_lists_have_a_mask_a_text_too():
    fresh = CASES["dpo"][0]
    one, other = fresh(), fresh()
    for steps in zip(dpo_with(0.3, LISTS)(one), dpo_with(0.3, LISTS, micro_batch_tokens=1)(other),
                     strict=True):
        assert steps[0].metrics["loss"] == pytest.approx(steps[1].metrics["loss"], abs=1e-6)


def test_chosen_and_rejected_texts_have_numbers_of_their_own():
    # Of pairs 0 1 | 2 3 | 4 5 | …: chosen 8 and 2, then rejected 9 and 3
    assert text_numbers(PAIRS, [4, 1]).tolist() == [8, 2, 9, 3]
    # Of lists of 4, 3 and 2 texts: 0 … 3 | 4 5 6 | 7 8
    assert text_numbers(LISTS, [2, 0]).tolist() == [7, 8, 0, 1, 2, 3]


def test_equal_responses_differ_under_their_masks():
    # Both sides of a pair are one text: without dropout the margin is 0 and the loss log 2.
    same = [tiny_reward.pair([1, 2], [3, 4, 5], [3, 4, 5], where=f"t:{i}") for i in range(3)]
    state = CASES["dpo"][0]()
    steps = dpo_with(0.3, same, steps=2)(state)
    first, second = (step.metrics["rewards/margins"] for step in steps)
    assert first == 0 and abs(second) > 1e-9  # B is 0 at first: no mask shows


def test_an_evaluation_drops_nothing():
    state = CASES["sft"][0]()
    for _ in sft_with(0.3)(state):
        pass
    found, merged = evaluate(state.model, TEXTS), evaluate(merged_copy(state.model), TEXTS)
    assert found == pytest.approx(merged, abs=1e-9)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_an_adapter_says_what_it_was_trained_with_and_is_trained_on(recipe, world, tmp_path):
    asked = {"lora_rank": 2, "lora_dropout": 0.25, "steps": 1}
    assert main(command(recipe, world, tmp_path / "a", **asked)) == 0
    adapter = tmp_path / "a" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert main(["export", str(tmp_path / "a"), "--adapter", "--out", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert again["lora_dropout"] == 0.25
    assert main(command(recipe, world, tmp_path / "c", model=adapter, **asked)) == 0
    if recipe != "reward":
        load_pretrained(adapter)


@pytest.mark.parametrize("recipe", ["ppo", "grpo", "distill"])
def test_who_learns_from_own_samples_has_no_such_setting(recipe, world, tmp_path, capsys):
    argv = [*command(recipe, world, tmp_path / "run"), "--lora-dropout", "0.1"]
    assert main(argv) == 2
    assert "--lora-dropout" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("settings", "message"), [
    ({"lora_dropout": -0.1}, "lora_dropout: got -0.1, must be a finite number >= 0 and < 1"),
    ({"lora_dropout": 1.0}, "lora_dropout: got 1.0, must be a finite number >= 0 and < 1"),
    ({"lora_dropout": 0.1, "lora_rank": 0}, "lora_dropout: goes with --lora-rank"),
    ({"lora_dropout": 1e-6}, "lora_dropout: got 1e-06, must be 0, or 1.5e-05 or more and 0.99998"),
    ({"lora_dropout": 0.999999}, "masks are drawn with 16 bits"),
])
def test_a_probability_that_is_none_is_refused(settings, message):
    with pytest.raises(UserError) as error:
        validate(SFTConfig(**{"model": "m", "data": "d", "out": "o", "lora_rank": 2, **settings}))
    assert message in str(error.value)
