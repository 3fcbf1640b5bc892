"""The recipes' memory plans: every part by hand on a tiny model."""

import json
from dataclasses import replace

import pytest
from torch import bfloat16, float32

from minirlhf.errors import UserError
from minirlhf.run.machine import Machine
from minirlhf.setup import memory_plans
from minirlhf.setup.memory import Plan
from minirlhf.setup.memory_plans import PPOModels, ppo_plan
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig
from tests.setup.test_memory import GPT2, PLAN, TINY, UNTIED


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.bytes for part in plan.parts if part.bytes}


def totals(plan: Plan) -> dict[str, int]:
    return {phase: plan.total(phase) for phase in plan.phases}


SETTINGS = PPOConfig(batch_size=4, max_new_tokens=3, micro_batch_size=2)


def test_ppo_plan_counts_the_merged_copy_of_the_best_policy():
    models = PPOModels(TINY, None, (), None)
    for rank, kept, expected in ((2, True, 172 * 4), (2, False, 0), (0, True, 0)):
        settings = replace(SETTINGS, lora_rank=rank, keep_best=kept)
        plan = ppo_plan(settings, models, 2, float32, held=0)
        assert sizes(plan).get("best policy, merged", 0) == expected
        assert all(p.phases == ("save",) for p in plan.parts if p.name.startswith("best"))


def test_ppo_plan_by_hand():
    plan = ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY,), None), 2, float32, held=1000)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688, "embedding gradient": 320,
        "reference": 688, "reward model": 688,
        "KV cache": 4 * 5 * 16, "KV copy": 160,  # a token: keys and values of 2 numbers
        "prompt pass": 4 * 2 * 112, "sampling law": 4 * 10 * 16,
        "scoring pass": 20 * 112,
        "measuring pass": 10 * 112 + 2 * 240,
        "activations": 10 * 324, "logits": 2 * 240,
        "rollout": 4 * (5 * 16 + 3 * 29),
    }
    assert totals(plan) == {
        "load": 3064, "prompts": 5656, "sampling": 5560, "score": 7348, "measure": 6708,
        "loss": 9516, "step": 6116, "save": 4440,
    }
    assert plan.peak == "loss"
    assert plan.largest.name == "activations"
    deep = PPOModels(replace(TINY, num_layers=3), None, (), None)
    found = sizes(ppo_plan(SETTINGS, deep, 2, float32, held=0))
    assert (found["KV cache"], found["KV copy"]) == (3 * 320, 160)


def test_ppo_plan_counts_what_a_truncated_law_takes():
    # 4 rows of 10 words: 16 B, and of top-p three numbers and a place more: 20 B
    models = PPOModels(TINY, TINY, (), None)
    for changes, law, ids in (
        ({"top_k": 3}, 4 * 10 * 16, 4 * 3 * 4 * 3),  # 3 ids at each of 4 x 3 tokens
        ({"top_p": 0.9}, 4 * 10 * 36, 0),
        ({"min_p": 0.1}, 4 * 10 * 16, 0),
    ):
        plan = ppo_plan(replace(SETTINGS, **changes), models, 2, float32, held=0)
        found = sizes(plan)
        assert (found["sampling law"], found.get("ids to draw from", 0)) == (law, ids)
        (told,) = (part.counted for part in plan.parts if part.name == "rollout")
        assert told.endswith("could be drawn") == (not ids)


def test_ppo_plan_holds_gradients_while_texts_are_mixed_in():
    models, one = PPOModels(TINY, None, (), None), replace(SETTINGS, batch_size=2)
    assert one.batch_size == one.mini_batches * one.micro_batch_size
    found = [
        sizes(ppo_plan(one, models, 2, float32, held=0, longest_text=length))
        for length in (0, 3)
    ]
    assert found[1]["embedding gradient"] == 2 * found[0]["embedding gradient"]


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize(("kl_in", "phase"), [("reward", "measure"), ("loss", "loss")])
def test_ppo_plan_counts_a_full_kl(kl_in, phase, dtype):
    # 2 rows of 3 tokens: 3 laws of 6 x 10 float32; the unembedding in float32 has 10 x D numbers
    settings = replace(SETTINGS, kl_estimator="full", kl_in=kl_in)
    plan = ppo_plan(settings, PPOModels(TINY, TINY, (), None), 2, dtype, held=0)
    matrix, trained = 10 * TINY.hidden_size * 4, kl_in == "loss"
    copies = (0 if dtype == float32 else 1 + trained) + trained
    assert sizes(plan)["full KL"] == 3 * 6 * 10 * 4 + copies * matrix
    states = 4 * 3 * TINY.hidden_size * dtype.itemsize if trained else 0
    assert sizes(plan).get("reference states", 0) == states
    (part,) = (part for part in plan.parts if part.name == "full KL")
    assert part.phases == (phase,)
    plain = ppo_plan(SETTINGS, PPOModels(TINY, TINY, (), None), 2, dtype, held=0)
    assert "full KL" not in sizes(plain)
    # Adapters leave the unembedding as it is: no gradient of it, but the copies.
    adapted = ppo_plan(replace(settings, lora_rank=2), PPOModels(TINY, None, (), None), 2,
                              dtype, held=0)
    copies = 0 if dtype == float32 else 1 + trained
    assert sizes(adapted)["full KL"] == 3 * 6 * 10 * 4 + copies * matrix


def test_ppo_plan_holds_all_reward_models_and_scores_with_one_after_the_other():
    # a wider one: 32 numbers of MLP instead of its own; passes are counted by the widest
    wide = replace(TINY, intermediate_size=TINY.intermediate_size + 32)
    one = ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY,), None), 2, float32, 0)
    two = ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY, wide), None), 2, float32, 0)
    held = [part.bytes for part in two.parts if part.name == "reward model"]
    # three matrices (gate, up, down) of 32 more rows
    assert held == [688, 688 + 3 * 32 * TINY.hidden_size * TINY.num_layers * 4]
    assert sizes(two)["scoring pass"] > sizes(one)["scoring pass"]
    assert sizes(two)["reference"] == 688


def test_ppo_models_reads_every_folder_of_reward(tmp_path):
    values = {"model_type": "llama", "vocab_size": 9, "hidden_size": 4, "intermediate_size": 4,
              "num_hidden_layers": 1, "num_attention_heads": 1,
              "max_position_embeddings": 8}
    for name, size in (("lm", 4), ("a", 8), ("b", 12)):
        (tmp_path / name).mkdir()
        text = json.dumps(values | {"intermediate_size": size})
        (tmp_path / name / "config.json").write_text(text)
    rewards = (f"{tmp_path}/a", f"0.5*{tmp_path}/b", "no.py:f", "http://h/p")
    config = PPOConfig(model=f"{tmp_path}/lm", reward=rewards)
    models = memory_plans.ppo_models(config)
    assert [model.intermediate_size for model in models.rewards] == [8, 12]
    assert models.policy.intermediate_size == 4 and models.critic is None


def test_ppo_plan_of_offloaded_models_has_them_where_they_are_needed():
    models = PPOModels(TINY, TINY, (TINY,), None)
    plain, away = (
        totals(ppo_plan(replace(SETTINGS, offload_frozen=is_away), models, 2, float32, 0))
        for is_away in (False, True)
    )
    less = {phase: plain[phase] - away[phase] for phase in plain}
    # reference and reward model of 688 bytes each
    assert less == {
        "load": 0, "prompts": 1376, "sampling": 1376, "score": 688, "measure": 688, "loss": 1376,
        "step": 1376, "save": 1376,
    }
    wide = replace(TINY, intermediate_size=TINY.intermediate_size + 32)
    models = PPOModels(TINY, TINY, (TINY, wide, TINY), None)
    plan = ppo_plan(replace(SETTINGS, offload_frozen=True), models, 2, float32, 0)
    held = [part.phases for part in plan.parts if part.name == "reward model"]
    assert held == [("load",), ("load", "score"), ("load",)]  # one after the other: the largest


def test_ppo_plan_with_adapters_has_no_reference_and_trains_little():
    settings = replace(SETTINGS, lora_rank=1, batch_size=2)
    parts = sizes(ppo_plan(settings, PPOModels(TINY, None, (), None), 2, float32, 0))
    assert parts["weights"] == 4 * (172 + 58)
    assert (parts["moments"], parts["gradients"]) == (2 * 4 * 58, 4 * 58)
    assert not parts.keys() & {"reference", "reward model", "scoring pass", "embedding gradient"}


@pytest.mark.parametrize(("trained", "count"), [(True, 344), (False, 172)])
def test_ppo_plan_counts_a_critic_twice_while_it_is_read(trained, count):
    settings = replace(SETTINGS, critic="c", train_critic=trained)
    plan = ppo_plan(settings, PPOModels(TINY, None, (), TINY), 2, float32, 0)
    assert sizes(plan)["moments"] == 2 * 4 * count
    assert totals(plan)["load"] == 3 * 688
    assert sizes(plan)["activations"] == 10 * 324 * (2 if trained else 1)


def test_ppo_plan_freezes_a_critic_under_adapters():
    settings = replace(SETTINGS, critic="c", lora_rank=1)
    parts = sizes(ppo_plan(settings, PPOModels(TINY, None, (), TINY), 2, float32, 0))
    assert (parts["critic"], parts["moments"]) == (688, 2 * 4 * 58)


@pytest.mark.parametrize(("rollout", "rows"), [(3, 3), (9, 4)])
def test_ppo_plan_samples_as_many_rows_as_stand_side_by_side(rollout, rows):
    settings = replace(SETTINGS, rollout_batch_size=rollout)
    parts = sizes(ppo_plan(settings, PPOModels(TINY, None, (), None), 2, float32, 0))
    assert parts["KV cache"] == rows * 80


def test_large_gradients_are_beside_activations_only_where_they_accumulate():
    large = replace(TINY, hidden_size=4096, intermediate_size=2048)  # 32 MiB: back to the system
    models = PPOModels(large, None, (), None)
    for batch, phases in ((2, ("step",)), (4, ("loss", "step"))):
        plan = ppo_plan(replace(SETTINGS, batch_size=batch), models, 2, float32, 0)
        assert {p.name: p.phases for p in plan.parts}["gradients"] == phases


def test_reward_plan_by_hand():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    plan = memory_plans.reward_plan(settings, UNTIED, 5, float32, held=10, held_out=50)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688,
        "activations": 30 * 324, "backward pass": 30 * 112,
        "evaluation pass": 100 * 112,
    }
    assert totals(plan) == {
        "load": 698, "loss": 15842, "step": 2762, "evaluate": 13274, "save": 2074
    }
    assert plan.largest.lower == "lower --micro-batch-tokens"


def test_reward_plan_counts_the_tokens_that_are_there():
    settings = RewardConfig(batch_size=2, micro_batch_tokens=100)
    heaviest = memory_plans.heaviest([3, 9, 8, 4], 2)  # of the two longest pairs, both sides
    assert heaviest == 17
    plan = memory_plans.reward_plan(settings, UNTIED, 5, float32, 0, heaviest=heaviest)
    assert sizes(plan)["activations"] == 17 * 324 and sizes(plan)["backward pass"] == 17 * 112
    full = memory_plans.reward_plan(settings, UNTIED, 5, float32, 0, heaviest=99)
    assert sizes(full)["activations"] == 20 * 324  # no more than a micro-batch has cells


def test_reward_plan_of_one_long_pair_can_only_shorten_it():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    plan = memory_plans.reward_plan(settings, TINY, 60, float32, 0)
    assert sizes(plan)["activations"] == 120 * 324
    assert sizes(plan)["embedding gradient"] == 160  # three pairs accumulate
    assert plan.largest.lower == "lower --max-length"


def test_reward_plan_keeps_the_texts_of_a_list_together():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    small = memory_plans.reward_plan(settings, TINY, 5, float32, 0, held_out=9, texts=4)
    assert sizes(small)["activations"] == 60 * 324  # 3 lists of 4 texts of 5 tokens
    assert sizes(small)["evaluation pass"] == 100 * 112  # 9 lists are 180 tokens: cut at 100
    large = memory_plans.reward_plan(settings, TINY, 30, float32, 0, texts=4)
    assert sizes(large)["activations"] == 120 * 324  # one list, more than a micro-batch holds
    assert large.largest.lower == "lower --max-length"


def test_sft_plan_by_hand():
    settings = SFTConfig(batch_size=4, micro_batch_tokens=100)
    plan = memory_plans.sft_plan(settings, TINY, 5, float32, held=10, held_out=2)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688, "embedding gradient": 160,
        "activations": 20 * 324, "logits": 2 * 800,
        "evaluation pass": 10 * 112 + 2 * 400,
    }
    assert totals(plan) == {
        "load": 698, "loss": 10842, "step": 2922, "evaluate": 3994, "save": 2074
    }


def test_gpt2_is_copied_for_its_file():
    plan = memory_plans.sft_plan(SFTConfig(), GPT2, 5, float32, 0)
    assert sizes(plan)["file"] == sizes(plan)["weights"]
    assert plan.total("save") == 4 * sizes(plan)["weights"]


def test_sft_plan_counts_the_tokens_that_are_there():
    settings = SFTConfig(batch_size=4, micro_batch_tokens=100)
    parts = sizes(memory_plans.sft_plan(settings, TINY, 5, float32, 0, heaviest=11))
    assert parts["activations"] == 11 * 324 and parts["logits"] == 2 * 11 * 40


def test_half_precision_halves_the_weights_and_keeps_float32_masters():
    plan = memory_plans.sft_plan(SFTConfig(), TINY, 5, bfloat16, 0)
    parts = sizes(plan)
    assert [parts[name] for name in ("weights", "masters", "moments", "gradients")] == [
        2 * 172, 4 * 172, 8 * 172, 4 * 172
    ]
    assert "masters" not in sizes(memory_plans.sft_plan(SFTConfig(), TINY, 5, float32, 0))
    assert {p.lower for p in plan.parts if p.name == "weights"} == {"take smaller models"}


@pytest.mark.parametrize("free", [0, 7_000_000_000])
def test_announce_tells_the_plan_and_the_warnings_before_the_verdict(monkeypatch, capsys, free):
    rounded = "a: weights are rounded", "b: weights are rounded"
    monkeypatch.setattr(memory_plans.pretrained, "rounded", lambda folders, dtype: rounded)
    monkeypatch.setattr(memory_plans, "free_memory", lambda device: Machine(free, device))
    if free:
        told = memory_plans.announce(PLAN, [], bfloat16, "cpu")
        assert told == "needs 7.00 GB more, 7.00 GB are free (cpu)"
    else:
        with pytest.raises(UserError, match=r"0\.00 GB are free \(cpu\)"):
            memory_plans.announce(PLAN, [], bfloat16, "cpu")
    assert capsys.readouterr().out == f"{PLAN}\nwarning: {rounded[0]}\nwarning: {rounded[1]}\n"
