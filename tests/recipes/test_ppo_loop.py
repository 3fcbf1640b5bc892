"""PPO's loop: dropped and rebuilt, learning, refused; and which settings it refuses."""

import json
import math

import pytest
import torch
from torch import nan

from minirlhf.batches.rollouts import measure
from minirlhf.data.examples import Prompt
from minirlhf.errors import BUG, NON_FINITE, UserError
from minirlhf.evaluation.samples import sample_table, show_samples
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.lora import add_lora, base_of
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import initialize
from minirlhf.run.flags import parse
from minirlhf.run.folder import Run
from minirlhf.run.optim import make_optimizer
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import validate
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy_settings import fitting_batches
from minirlhf.setup.ppo_settings import PPOConfig
from tests.tiny_folders import rebuilt_at_each_step
from tests.tiny_ppo import (
    PROMPTS,
    Letters,
    config_of,
    letter_d,
    measured,
    parameters,
    run_steps,
    state_of,
    steps_from,
    tiny_lm,
    tiny_policy,
)

# ---- dropped and rebuilt -------------------------------------------------------------------------


def with_lora(policy: ValueHeadModel) -> ValueHeadModel:
    return add_lora(policy, rank=2, alpha=8.0, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_target": 0.1, "kl_horizon": 20.0, "mini_batches": 2},
        {"lora_rank": 2},
        {
            "score_scaling": "normalize", "score_clip": 1.0, "top_p": 0.9, "min_new_tokens": 2,
            "kl_estimator": "full", "early_stop_kl": 1e-3, "max_ratio": 1.2, "whiten_rewards": True,
            "critic_warmup_steps": 1, "critic_learning_rate": 0.05, "dual_clip": 3.0,
            "mini_batches": 2,
        },
        {
            "kl_in": "loss", "kl_estimator": "full", "bootstrap_truncated": True,
            "entropy_coef": 0.01, "score_scaling": "scale", "kl_target": 0.1, "kl_horizon": 20.0,
        },
    ],
    ids=["adaptive", "lora", "counters", "bootstrap"],
)
def test_dropping_and_rebuilding_the_generator_at_every_yield_changes_no_bit(settings, tmp_path):
    config = config_of(save_rollouts=True, **settings)

    def fresh():
        policy = with_lora(tiny_policy()) if config.lora_rank else tiny_policy()
        state = state_of(policy, config)
        if config.critic_learning_rate:
            critic = policy.value_parameters()
            state.optimizer = make_optimizer(policy, 1e-2, critic=critic, critic_lr_scale=5.0)
        return state

    def steps_of(state):
        ref = base_of(state.model.lm) if config.lora_rank else tiny_lm()
        return steps_from(state, config, ref=ref)

    whole = fresh()
    expected = [(step.metrics, step.samples) for step in steps_of(whole)]
    assert len(expected) == 4
    steps, state = rebuilt_at_each_step(fresh, steps_of, tmp_path)
    assert json.dumps([(step.metrics, step.samples) for step in steps]) == json.dumps(expected)
    assert torch.equal(parameters(state.model), parameters(whole.model))
    assert (state.kl_coef, state.samples, state.step) == (whole.kl_coef, 16, 4)
    assert state.meters.as_dict() == whole.meters.as_dict()
    assert (state.counters, state.score_moments) == (whole.counters, whole.score_moments)
    assert whole.counters.get("early_stops", 0) > 0 or config.early_stop_kl is None


def test_ppo_samples_the_prompts_of_each_epoch_once():
    seen = []

    def reward(completions):
        seen.extend(tuple(ids) for ids in completions.prompt_ids)
        return letter_d(completions)

    run_steps(config_of(steps=3, batch_size=2, epochs=1), reward, prompts=PROMPTS[:3])
    assert len(set(seen[:3])) == len(set(seen[3:])) == 3


def test_ppo_texts_do_not_depend_on_how_many_rows_are_sampled_at_once():
    runs = []
    for rows in (1, 3, 256):
        config = config_of(rollout_batch_size=rows, steps=1, save_rollouts=True)
        (step,), _ = run_steps(config)
        runs.append([row["response_ids"] for row in step.samples])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ppo_learns_to_write_a_letter(dtype):
    config = config_of(steps=15, batch_size=16, micro_batch_size=16, learning_rate=5e-3)
    steps, _ = run_steps(config, policy=tiny_policy(dtype))
    scores = [step.metrics["objective/scores"] for step in steps]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert first < 1 and last > first + 2  # of 6 letters


def test_ppo_trains_on_rows_that_fill_a_model_with_learned_positions():
    shape = {"family": "gpt2", "norm": "layer", "positions": "learned", "gated_mlp": False,
             "num_kv_heads": 4, "max_positions": 12}
    steps, _ = run_steps(
        config_of(max_new_tokens=6, steps=1), policy=ValueHeadModel(tiny_lm(**shape)),
        ref=tiny_lm(**shape), prompts=[Prompt([5] * 6, "x", "p", {})],  # 6 + 6 tokens
    )
    assert steps[0].metrics["response_length"] > 5


# ---- the reference -------------------------------------------------------------------------------


def test_lora_reference_is_the_policy_without_its_adapters():
    policy = with_lora(tiny_policy())
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    steps, _ = run_steps(config_of(lora_rank=2), policy=policy, ref=base_of(policy.lm))
    assert steps[0].metrics["objective/kl"] == 0
    assert steps[3].metrics["objective/kl"] != 0
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in base.items())
    buffer = measured(policy)
    own = buffer.flat("ref_logprobs")
    measure(policy, base_of(policy.lm), buffer, 1.0)
    assert torch.equal(buffer.flat("ref_logprobs"), own)  # as a copy of the base gives
    assert not torch.equal(buffer.flat("old_logprobs"), own)


def test_ppo_stops_where_the_reference_is_not_the_starting_policy():
    other = initialize(tiny_lm(), torch.Generator().manual_seed(9))
    with pytest.raises(UserError, match=r"nats before any training.*--ref") as caught:
        run_steps(config_of(), ref=other)
    assert caught.value.code == BUG
    (step,), _ = run_steps(config_of(ref="another folder", steps=1), ref=other)
    assert step.metrics["objective/kl"] != 0


def test_ppo_stops_where_training_passes_are_not_those_that_measured():
    policy, calls = tiny_policy(), []

    def drift(module, inputs, hidden):
        calls.append(1)
        return hidden * (1 + 1e-2 * len(calls))

    policy.lm.model.norm.register_forward_hook(drift)
    config = config_of(ref="another folder")  # else the KL of step 1 would tell first
    with pytest.raises(UserError, match="step 1: val/ratio: the first ratio is off 1") as caught:
        run_steps(config, policy=policy)
    assert caught.value.code == BUG


# ---- scores and samples --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, math.inf])
def test_ppo_stops_at_a_score_that_is_not_finite_and_changes_nothing(bad):
    state = state_of(tiny_policy(), config_of())
    before = parameters(state.model)
    with pytest.raises(UserError, match=r"step 1, response 2: score: is (nan|inf)") as caught:
        next(steps_from(state, config_of(), lambda c: torch.tensor([0, 0, bad, 0])))
    assert caught.value.code == NON_FINITE
    assert torch.equal(parameters(state.model), before)
    assert (state.step, state.samples) == (0, 0)


def test_score_refuses_another_number_of_scores():
    with pytest.raises(ValueError, match=r"reward gave \(4, 1\): give one score each, 4"):
        run_steps(config_of(), reward=lambda completions: torch.zeros(4, 1))


def test_sample_table_takes_the_same_prompts_and_keys_at_every_step():
    state = state_of(tiny_policy(), config_of())
    first = sample_table(state.model.lm, 0, PROMPTS, letter_d, Letters(), Sampling(6), 3, 2, seed=0)
    again = sample_table(state.model.lm, 7, PROMPTS, letter_d, Letters(), Sampling(6), 3, 4, seed=0)
    assert [row.pop("step") for row in first] == [0, 0, 0]
    assert [row.pop("step") for row in again] == [7, 7, 7]
    assert again == first
    assert first[0].keys() == {"kind", "prompt", "response", "finish_reason", "score"}


def test_show_samples_prints_and_keeps_them(tmp_path, capsys):
    prompts = [Prompt([3], [{"role": "user", "content": "how are you"}], "p", {})]
    state = state_of(tiny_policy(), config_of())
    state.step = 7
    rows = sample_table(state.model.lm, 7, prompts, letter_d, Letters(), Sampling(6), 4, 4, seed=0)
    with Run(RunSettings(out=str(tmp_path / "out")), "ppo") as r:
        show_samples(r, state, rows)
    shown = capsys.readouterr().out
    assert "samples at step 7" in shown
    assert "how are you |" in shown  # the last message of a dialogue
    kept = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in kept] == rows


# ---- settings ------------------------------------------------------------------------------------

BOOT, OWN, RAMP = {"bootstrap_truncated": True}, {"critic": "c"}, {"missing_eos": "ramp"}
FIXED, SINGLE = {"train_critic": False}, {"epochs": 1, "mini_batches": 1}
FULL = {"kl_in": "loss", "kl_estimator": "full"}


def split(rows: int, mini_batches: int, micro: int) -> dict:
    return {"batch_size": rows, "mini_batches": mini_batches, "micro_batch_size": micro}


REFUSED = [
    ({"temperature": 0.0}, "temperature: got 0.0, must be a finite number >= 0.0001"),
    ({"min_new_tokens": 7}, "min_new_tokens 7 is above max_new_tokens 6: lower one or raise"),
    ({"stop": ("", "!")}, "stop: got an empty string, which every text contains"),
    ({"top_k": 1}, "top_k 1: one token is left to draw, .*; use 0, or 2 or more$"),
    ({"min_p": 1.0}, "min_p 1: one token is left to draw, .*; use less$"),
    (BOOT | OWN | {"score_scaling": "normalize"},
     "bootstrap_truncated: a critic from a reward model values truncated responses in that"),
    (BOOT | OWN | {"whiten_rewards": True},
     "leave out score_scaling, score_clip and whiten_rewards"),
    (BOOT | {"missing_eos_penalty": 1.0},
     "bootstrap_truncated: a truncated response then has no score that a missing_eos rule"),
    (BOOT | {"missing_eos": "replace"}, "leave out one of them"),
    (RAMP | {"missing_eos_penalty": 1.0},
     "missing_eos_buffer is 0, must be from 1 to max_new_tokens 6"),
    (RAMP | {"missing_eos_penalty": 1.0, "missing_eos_buffer": 7},
     "missing_eos_buffer is 7, must be from 1 to max_new_tokens 6"),
    (RAMP | {"missing_eos_buffer": 3}, "a ramp to nothing; use one above 0"),
    ({"missing_eos_buffer": 3}, "missing_eos_buffer goes with missing_eos ramp"),
    ({"compile": True, "dtype": "bfloat16"}, "compile with bfloat16: graphs with and without"),
    (FULL | {"offload_frozen": True}, "offload_frozen: a full KL in the loss reads the reference"),
    ({"kl_in": "loss"}, "kl_in loss with kl_estimator k1: the gradient .* use k2 or full"),
    ({"kl_in": "loss", "kl_estimator": "abs"}, "kl_in loss with kl_estimator abs"),
    ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef is 0, which no factor can move"),
    ({"kl_target": 6.0, "kl_horizon": 0.8},
     "kl_horizon 0.8 is too short for batch_size 4: .*use more than 0.8"),
    ({"dual_clip": 1.2}, r"dual_clip 1.2: must be above 1 \+ clip_high 0.2"),
    (SINGLE | {"dual_clip": 3.0},
     "dual_clip: the ratio of the only update is 1; raise epochs or mini_batches"),
    (SINGLE | {"max_ratio": 3.0}, "max_ratio: the ratio of the only"),
    ({"early_stop_kl": 0.1, "epochs": 1}, "there is one epoch, and none after it to leave out"),
    ({"early_stop_kl": 0.1, "epochs": 2, "mini_batches": 1},
     "early_stop_kl: one mini-batch moves nothing before the last of two epochs"),
    (FIXED, "no-train-critic: goes with --critic, a value head has to learn"),
    (FIXED | OWN | {"critic_learning_rate": 1.0},
     "leave out critic_learning_rate and critic_warmup_steps"),
    (FIXED | OWN | {"critic_warmup_steps": 1},
     "leave out critic_learning_rate and critic_warmup_steps"),
    *((FIXED | OWN | rescaled, "no-train-critic: its values stay") for rescaled in (
        {"score_scaling": "scale"}, {"score_clip": 1.0}, {"whiten_rewards": True},
        {"reward": ("0.1*c",)},
    )),
    ({"critic_warmup_steps": 4}, "the policy would never learn, there are 4 steps"),
    ({"ptx_data": "texts.jsonl"}, "ptx_data and ptx_coef go together: give both, or neither"),
    ({"ptx_coef": 1.0}, "ptx_data and ptx_coef go together"),
    (split(10, 3, 4), "batch_size 10 is less than 3 mini_batches of micro_batch_size 4: use "
     "batch_size 12 or micro_batch_size 3 or mini_batches 2"),
    (split(2, 3, 1), "use batch_size 3 or mini_batches 2$"),
    (split(2, 1, 3), "use batch_size 3 or micro_batch_size 2$"),
]


FITTING = [  # given, what becomes of micro_batch_size 8 and mini_batches (PPO 1, GRPO 4, of 8 each)
    (PPOConfig, {"batch_size": 8}, {}),
    (PPOConfig, {"batch_size": 3}, {"micro_batch_size": 3}),
    (PPOConfig, {"batch_size": 10, "mini_batches": 3}, {"micro_batch_size": 3}),
    (PPOConfig, {"batch_size": 3, "micro_batch_size": 8}, {}),  # both given: an error, as before
    (PPOConfig, {"batch_size": 2, "mini_batches": 3}, {"micro_batch_size": 1}),  # still one
    (PPOConfig, {"batch_size": "3"}, {}),
    (GRPOConfig, {"batch_size": 8}, {}),
    (GRPOConfig, {"batch_size": 2}, {"micro_batch_size": 4}),  # 16 rows in 4 mini-batches
    (GRPOConfig, {"batch_size": 1, "samples_per_prompt": 2},
     {"micro_batch_size": 1, "mini_batches": 2}),
    (GRPOConfig, {"batch_size": 2, "micro_batch_size": 6}, {"mini_batches": 2}),
    (GRPOConfig, {"batch_size": 2, "micro_batch_size": 6, "mini_batches": 4}, {}),
]


@pytest.mark.parametrize(("config_class", "given", "fitting"), FITTING)
def test_batches_that_are_not_given_fit_a_small_rollout(config_class, given, fitting):
    assert fitting_batches(config_class, given) == fitting


def test_fitted_batches_are_told_once(capsys):
    words = "--model m --data d --reward length:4 --out o --batch-size 3".split()
    assert parse(PPOConfig, words, "minirlhf ppo").micro_batch_size == 3
    assert capsys.readouterr().err == "note: micro_batch_size 3, to fit what is given\n"
    with pytest.raises(UserError, match="batch_size 3 is less than 1 mini_batches of micro_batch"):
        parse(PPOConfig, [*words, "--micro-batch-size", "8"], "minirlhf ppo")
    with pytest.raises(UserError, match=r"use batch_size 4 or mini_batches 3$"):
        parse(PPOConfig, [*words, "--mini-batches", "4"], "minirlhf ppo")


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_config_refuses_what_ppo_cannot_do(settings, message):
    with pytest.raises(UserError, match=message):
        validate(config_of(**settings))
    with pytest.raises(UserError, match=message):  # a loop of one's own is told as well
        run_steps(config_of(**settings))


def test_config_takes_the_values_that_its_errors_name():
    for legal in (
        *(split(*n) for n in
          ((12, 3, 4), (10, 3, 3), (10, 2, 4), (3, 3, 1), (2, 2, 1), (2, 1, 2))),
        {"kl_target": 6.0, "kl_horizon": 0.81},
        {"critic": "c", "train_critic": False, "reward": ("c",)},
        *({"dual_clip": 3.0, "max_ratio": 3.0, "epochs": n, "mini_batches": 3 - n} for n in (1, 2)),
    ):
        assert config_of(**legal).check() == []
