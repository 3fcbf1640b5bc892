"""The memory plan: every part by hand on a tiny model, and against what torch really keeps."""

import json
from dataclasses import replace

import pytest
import torch
from torch import bfloat16, float32

from minirlhf import memory
from minirlhf.errors import MACHINE, UserError
from minirlhf.heads import ValueHeadModel
from minirlhf.logprobs import token_logprobs
from minirlhf.lora import add_lora
from minirlhf.machine import Machine
from minirlhf.memory import Part, Plan, PPOModels
from minirlhf.ppo_config import PPOConfig
from minirlhf.recipes.reward import RewardConfig
from minirlhf.recipes.sft import SFTConfig
from minirlhf.transformer import CausalLM, ModelConfig, initialize

# 40 embeddings; q 16, k 8, v 8, o 16; three MLP matrices of 24; three norms of 4: 172 parameters
TINY = ModelConfig(
    family="llama", vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=2, max_positions=64,
)  # fmt: skip
UNTIED = replace(TINY, tied_embeddings=False)
GPT2 = replace(
    TINY, family="gpt2", norm="layer", positions="learned", gated_mlp=False, num_kv_heads=2,
    activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
FAMILIES = {
    "llama": TINY,
    "untied": UNTIED,
    "qwen2": replace(TINY, qkv_bias=True),
    "qwen3": replace(TINY, qk_norm=True, num_layers=2, head_dim=4),
    "gpt2": GPT2,
}

# ---- one tensor ----------------------------------------------------------------------------------


def test_parameters_are_counted_once_where_tied():
    assert memory.parameters(TINY) == 172
    assert memory.parameters(UNTIED) == 212
    assert memory.trunk_parameters(TINY) == memory.trunk_parameters(UNTIED) == 172


def test_adapter_parameters_are_rank_times_in_plus_out():
    # q 4+4, k 4+2, v 4+2, o 4+4, gate 4+6, up 4+6, down 6+4
    assert memory.adapter_parameters(TINY, 1) == 58
    assert memory.adapter_parameters(TINY, 3) == 174


@pytest.mark.parametrize(
    ("dtype", "rank", "expected"),
    [
        # two norms of (4 + 4) x 4 + 4 B; 2 x 4 + 4 x 4 + 4 x 6 numbers; 2 heads; norm; state
        (float32, 0, 72 + 4 * 48 + 8 + 36 + 16),
        # no normed x; one number a layer for each of 7 adapters; the first norm keeps nothing
        (float32, 1, 40 + 4 * 48 + 8 + 28 + 16),
        # norms of 4 x (4 + 2) + 4 B, twice, and once more at the end
        (bfloat16, 0, 56 + 2 * 48 + 8 + 28 + 16),
    ],
)
def test_kept_per_token_by_hand(dtype, rank, expected):
    assert memory.kept_per_token(TINY, dtype, rank) == expected


def test_kept_per_token_with_checkpointing_is_one_block_and_each_input():
    plain, deep = (memory.kept_per_token(replace(TINY, num_layers=n), float32) for n in (1, 2))
    block = deep - plain
    deep = memory.kept_per_token(replace(TINY, num_layers=9), float32, checkpointing=True)
    assert deep == plain + 9 * 4 * 4  # inputs of 4 channels; plain holds the one block
    assert 9 * 4 * 4 < 8 * block


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_per_token_is_what_autograd_keeps(family, dtype, rank):
    config, rows, width = FAMILIES[family], 3, 7
    lm = initialize(CausalLM(config), torch.Generator().manual_seed(0)).to(dtype)
    model = ValueHeadModel(lm)
    if rank:
        add_lora(model, rank, 8.0)
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(torch.zeros(rows, width, dtype=torch.int64))
    rotary = lm.model.rotary
    known = [*model.parameters(), *((rotary.cos, rotary.sin) if rotary else ())]
    for x in known:
        kept.pop(x.untyped_storage()._cdata, None)
    # Indices and the head's float32 weight are left out of the plan: they are small.
    total = sum(x.untyped_storage().nbytes() for x in kept.values() if x.dtype != torch.int64)
    total -= 4 * config.hidden_size if dtype == bfloat16 else 0
    assert total == rows * width * memory.kept_per_token(config, dtype, rank)
    assert output[1].requires_grad


def test_passing_per_token_is_the_larger_of_attention_and_mlp():
    assert memory.passing_per_token(TINY, float32) == 4 * (8 + 4 * 4 + 2 * 2)
    wide = replace(TINY, intermediate_size=20)
    assert memory.passing_per_token(wide, float32) == 4 * (8 + 3 * 20)
    assert memory.passing_per_token(wide, bfloat16, rank=2) == 2 * (8 + 4 * 20)
    assert memory.passing_per_token(replace(wide, gated_mlp=False), float32) == 4 * (8 + 2 * 20)


@pytest.mark.parametrize(
    ("dtype", "tokens", "trained", "entropy", "forward", "backward"),
    [
        (float32, 3, False, False, 2 * 120, 120),
        (float32, 3, True, False, 2 * 120, 120 + 160),
        (float32, 3, True, True, 2 * 120, 2 * 120 + 160),
        (float32, 512, True, False, 2 * 20480, 20480 + 160),
        (float32, 513, True, False, 3 * 20480, 2 * 20480 + 160),
        (bfloat16, 3, False, False, 2 * 120 + 160, 120 + 160),
    ],
)
def test_logits_held_by_hand(dtype, tokens, trained, entropy, forward, backward):
    planned = memory.logits_held(TINY, dtype, tokens, trained, entropy)
    assert planned[:2] == (forward, backward)


def peak_of(work) -> int:
    """Largest number of bytes that the CPU's allocator had handed out more than before."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        work()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tokens", [40, 1100])
def test_logits_held_is_what_the_allocator_hands_out(tokens, entropy):
    config = replace(TINY, vocab_size=2000)
    lm = initialize(CausalLM(config), torch.Generator().manual_seed(0))
    hidden, ids = torch.zeros(tokens, 4, requires_grad=True), torch.zeros(tokens).long()
    planned = memory.logits_held(config, float32, tokens, True, entropy)
    stats = []
    forward = peak_of(lambda: stats.append(token_logprobs(lm, hidden, ids)))
    loss = stats[0].logprobs.sum() + (stats[0].entropy.sum() if entropy else 0)
    backward = peak_of(loss.backward)
    assert planned.forward <= forward <= 1.05 * planned.forward
    assert planned.backward <= backward <= 1.05 * planned.backward


@pytest.mark.parametrize(
    ("rows", "longest", "most", "cells"), [(2, 5, 100, 10), (9, 5, 30, 30), (2, 50, 30, 50)]
)
def test_largest_cells_is_bound_by_rows_tokens_or_one_row(rows, longest, most, cells):
    assert memory.largest_cells(rows, longest, most) == cells


# ---- the plans -----------------------------------------------------------------------------------


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.bytes for part in plan.parts if part.bytes}


def totals(plan: Plan) -> dict[str, int]:
    return {phase: plan.total(phase) for phase in plan.phases}


SETTINGS = PPOConfig(batch_size=4, max_new_tokens=3, micro_batch_size=2)


def test_ppo_plan_counts_the_merged_copy_of_the_best_policy():
    models = PPOModels(TINY, None, (), None)
    for rank, kept, expected in ((2, True, 172 * 4), (2, False, 0), (0, True, 0)):
        settings = replace(SETTINGS, lora_rank=rank, keep_best=kept)
        plan = memory.ppo_plan(settings, models, 2, float32, held=0)
        assert sizes(plan).get("best policy, merged", 0) == expected
        assert all(p.phases == ("save",) for p in plan.parts if p.name.startswith("best"))


def test_ppo_plan_by_hand():
    plan = memory.ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY,), None), 2, float32, held=1000)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688, "embedding gradient": 320,
        "reference": 688, "reward model": 688,
        "KV cache": 4 * 5 * 16, "KV copy": 160,  # a token: keys and values of 2 numbers
        "prompt pass": 4 * 2 * 112, "sampling law": 4 * 10 * 16,
        "scoring pass": 20 * 112,
        "measuring pass": 10 * 112 + 2 * 240,
        "activations": 10 * 324, "logits": 2 * 240,
        "rollout": 4 * (5 * 16 + 3 * 25),
    }  # fmt: skip
    assert totals(plan) == {
        "load": 3064, "prompts": 5656, "sampling": 5560, "score": 7300, "measure": 6660,
        "loss": 9468, "step": 6068, "save": 4440,
    }  # fmt: skip
    assert plan.peak == "loss"
    assert plan.largest.name == "activations"
    deep = PPOModels(replace(TINY, num_layers=3), None, (), None)
    found = sizes(memory.ppo_plan(SETTINGS, deep, 2, float32, held=0))
    assert (found["KV cache"], found["KV copy"]) == (3 * 320, 160)


def test_ppo_plan_counts_what_a_truncated_law_takes():
    # 4 rows of 10 words: 16 B, and of top-p three numbers and a place more: 20 B
    models = PPOModels(TINY, TINY, (), None)
    for changes, law, ids in (
        ({"top_k": 3}, 4 * 10 * 16, 4 * 3 * 4 * 3),  # 3 ids at each of 4 x 3 tokens
        ({"top_p": 0.9}, 4 * 10 * 36, 0),
        ({"min_p": 0.1}, 4 * 10 * 16, 0),
    ):
        plan = memory.ppo_plan(replace(SETTINGS, **changes), models, 2, float32, held=0)
        found = sizes(plan)
        assert (found["sampling law"], found.get("ids to draw from", 0)) == (law, ids)
        (told,) = (part.counted for part in plan.parts if part.name == "rollout")
        assert told.endswith("could be drawn") == (not ids)


def test_ppo_plan_holds_gradients_while_texts_are_mixed_in():
    models, one = PPOModels(TINY, None, (), None), replace(SETTINGS, batch_size=2)
    assert one.batch_size == one.mini_batches * one.micro_batch_size
    found = [
        sizes(memory.ppo_plan(one, models, 2, float32, held=0, longest_text=length))
        for length in (0, 3)
    ]
    assert found[1]["embedding gradient"] == 2 * found[0]["embedding gradient"]


@pytest.mark.parametrize("dtype", [float32, torch.bfloat16])
@pytest.mark.parametrize(("kl_in", "phase"), [("reward", "measure"), ("loss", "loss")])
def test_ppo_plan_counts_a_full_kl(kl_in, phase, dtype):
    # 2 rows of 3 tokens: 3 laws of 6 x 10 float32; the unembedding in float32 has 10 x D numbers
    settings = replace(SETTINGS, kl_estimator="full", kl_in=kl_in)
    plan = memory.ppo_plan(settings, PPOModels(TINY, TINY, (), None), 2, dtype, held=0)
    matrix, trained = 10 * TINY.hidden_size * 4, kl_in == "loss"
    copies = (0 if dtype == float32 else 1 + trained) + trained
    assert sizes(plan)["full KL"] == 3 * 6 * 10 * 4 + copies * matrix
    states = 4 * 3 * TINY.hidden_size * dtype.itemsize if trained else 0
    assert sizes(plan).get("reference states", 0) == states
    (part,) = (part for part in plan.parts if part.name == "full KL")
    assert part.phases == (phase,)
    plain = memory.ppo_plan(SETTINGS, PPOModels(TINY, TINY, (), None), 2, dtype, held=0)
    assert "full KL" not in sizes(plain)
    # Adapters leave the unembedding as it is: no gradient of it, but the copies.
    adapted = memory.ppo_plan(replace(settings, lora_rank=2), PPOModels(TINY, None, (), None), 2,
                              dtype, held=0)  # fmt: skip
    copies = 0 if dtype == float32 else 1 + trained
    assert sizes(adapted)["full KL"] == 3 * 6 * 10 * 4 + copies * matrix


def test_ppo_plan_holds_all_reward_models_and_scores_with_one_after_the_other():
    # a wider one: 32 numbers of MLP instead of its own; passes are counted by the widest
    wide = replace(TINY, intermediate_size=TINY.intermediate_size + 32)
    one = memory.ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY,), None), 2, float32, 0)
    two = memory.ppo_plan(SETTINGS, PPOModels(TINY, TINY, (TINY, wide), None), 2, float32, 0)
    held = [part.bytes for part in two.parts if part.name == "reward model"]
    # three matrices (gate, up, down) of 32 more rows
    assert held == [688, 688 + 3 * 32 * TINY.hidden_size * TINY.num_layers * 4]
    assert sizes(two)["scoring pass"] > sizes(one)["scoring pass"]
    assert sizes(two)["reference"] == 688


def test_ppo_models_reads_every_folder_of_reward(tmp_path):
    values = {"model_type": "llama", "vocab_size": 9, "hidden_size": 4, "intermediate_size": 4,
              "num_hidden_layers": 1, "num_attention_heads": 1,
              "max_position_embeddings": 8}  # fmt: skip
    for name, size in (("lm", 4), ("a", 8), ("b", 12)):
        (tmp_path / name).mkdir()
        text = json.dumps(values | {"intermediate_size": size})
        (tmp_path / name / "config.json").write_text(text)
    rewards = (f"{tmp_path}/a", f"0.5*{tmp_path}/b", "no.py:f", "http://h/p")
    config = PPOConfig(model=f"{tmp_path}/lm", reward=rewards)
    models = memory.ppo_models(config)
    assert [model.intermediate_size for model in models.rewards] == [8, 12]
    assert models.policy.intermediate_size == 4 and models.critic is None


def test_ppo_plan_of_offloaded_models_has_them_where_they_are_needed():
    models = PPOModels(TINY, TINY, (TINY,), None)
    plain, away = (
        totals(memory.ppo_plan(replace(SETTINGS, offload_frozen=is_away), models, 2, float32, 0))
        for is_away in (False, True)
    )
    less = {phase: plain[phase] - away[phase] for phase in plain}
    # reference and reward model of 688 bytes each
    assert less == {
        "load": 0, "prompts": 1376, "sampling": 1376, "score": 688, "measure": 688, "loss": 1376,
        "step": 1376, "save": 1376,
    }  # fmt: skip
    wide = replace(TINY, intermediate_size=TINY.intermediate_size + 32)
    models = PPOModels(TINY, TINY, (TINY, wide, TINY), None)
    plan = memory.ppo_plan(replace(SETTINGS, offload_frozen=True), models, 2, float32, 0)
    held = [part.phases for part in plan.parts if part.name == "reward model"]
    assert held == [("load",), ("load", "score"), ("load",)]  # one after the other: the largest


def test_ppo_plan_with_adapters_has_no_reference_and_trains_little():
    settings = replace(SETTINGS, lora_rank=1, batch_size=2)
    parts = sizes(memory.ppo_plan(settings, PPOModels(TINY, None, (), None), 2, float32, 0))
    assert parts["weights"] == 4 * (172 + 58)
    assert (parts["moments"], parts["gradients"]) == (2 * 4 * 58, 4 * 58)
    assert not parts.keys() & {"reference", "reward model", "scoring pass", "embedding gradient"}


@pytest.mark.parametrize(("trained", "count"), [(True, 344), (False, 172)])
def test_ppo_plan_counts_a_critic_twice_while_it_is_read(trained, count):
    settings = replace(SETTINGS, critic="c", train_critic=trained)
    plan = memory.ppo_plan(settings, PPOModels(TINY, None, (), TINY), 2, float32, 0)
    assert sizes(plan)["moments"] == 2 * 4 * count
    assert totals(plan)["load"] == 3 * 688
    assert sizes(plan)["activations"] == 10 * 324 * (2 if trained else 1)


def test_ppo_plan_freezes_a_critic_under_adapters():
    settings = replace(SETTINGS, critic="c", lora_rank=1)
    parts = sizes(memory.ppo_plan(settings, PPOModels(TINY, None, (), TINY), 2, float32, 0))
    assert (parts["critic"], parts["moments"]) == (688, 2 * 4 * 58)


@pytest.mark.parametrize(("rollout", "rows"), [(3, 3), (9, 4)])
def test_ppo_plan_samples_as_many_rows_as_stand_side_by_side(rollout, rows):
    settings = replace(SETTINGS, rollout_batch_size=rollout)
    parts = sizes(memory.ppo_plan(settings, PPOModels(TINY, None, (), None), 2, float32, 0))
    assert parts["KV cache"] == rows * 80


def test_large_gradients_are_beside_activations_only_where_they_accumulate():
    large = replace(TINY, hidden_size=4096, intermediate_size=2048)  # 32 MiB: back to the system
    models = PPOModels(large, None, (), None)
    for batch, phases in ((2, ("step",)), (4, ("loss", "step"))):
        plan = memory.ppo_plan(replace(SETTINGS, batch_size=batch), models, 2, float32, 0)
        assert {p.name: p.phases for p in plan.parts}["gradients"] == phases


def test_reward_plan_by_hand():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    plan = memory.reward_plan(settings, UNTIED, 5, float32, held=10, held_out=50)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688,
        "activations": 30 * 324, "backward pass": 30 * 112,
        "evaluation pass": 100 * 112,
    }  # fmt: skip
    assert totals(plan) == {
        "load": 698, "loss": 15842, "step": 2762, "evaluate": 13274, "save": 2074
    }  # fmt: skip
    assert plan.largest.lower == "lower --micro-batch-tokens"


def test_reward_plan_counts_the_tokens_that_are_there():
    settings = RewardConfig(batch_size=2, micro_batch_tokens=100)
    heaviest = memory.heaviest([3, 9, 8, 4], 2)  # of the two longest pairs, both sides
    assert heaviest == 17
    plan = memory.reward_plan(settings, UNTIED, 5, float32, 0, heaviest=heaviest)
    assert sizes(plan)["activations"] == 17 * 324 and sizes(plan)["backward pass"] == 17 * 112
    full = memory.reward_plan(settings, UNTIED, 5, float32, 0, heaviest=99)
    assert sizes(full)["activations"] == 20 * 324  # no more than a micro-batch has cells


def test_reward_plan_of_one_long_pair_can_only_shorten_it():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    plan = memory.reward_plan(settings, TINY, 60, float32, 0)
    assert sizes(plan)["activations"] == 120 * 324
    assert sizes(plan)["embedding gradient"] == 160  # three pairs accumulate
    assert plan.largest.lower == "lower --max-length"


def test_reward_plan_keeps_the_texts_of_a_list_together():
    settings = RewardConfig(batch_size=3, micro_batch_tokens=100)
    small = memory.reward_plan(settings, TINY, 5, float32, 0, held_out=9, texts=4)
    assert sizes(small)["activations"] == 60 * 324  # 3 lists of 4 texts of 5 tokens
    assert sizes(small)["evaluation pass"] == 100 * 112  # 9 lists are 180 tokens: cut at 100
    large = memory.reward_plan(settings, TINY, 30, float32, 0, texts=4)
    assert sizes(large)["activations"] == 120 * 324  # one list, more than a micro-batch holds
    assert large.largest.lower == "lower --max-length"


def test_sft_plan_by_hand():
    settings = SFTConfig(batch_size=4, micro_batch_tokens=100)
    plan = memory.sft_plan(settings, TINY, 5, float32, held=10, held_out=2)
    assert sizes(plan) == {
        "weights": 688, "moments": 1376, "gradients": 688, "embedding gradient": 160,
        "activations": 20 * 324, "logits": 2 * 800,
        "evaluation pass": 10 * 112 + 2 * 400,
    }  # fmt: skip
    assert totals(plan) == {
        "load": 698, "loss": 10842, "step": 2922, "evaluate": 3994, "save": 2074
    }  # fmt: skip


def test_gpt2_is_copied_for_its_file():
    plan = memory.sft_plan(SFTConfig(), GPT2, 5, float32, 0)
    assert sizes(plan)["file"] == sizes(plan)["weights"]
    assert plan.total("save") == 4 * sizes(plan)["weights"]


def test_sft_plan_counts_the_tokens_that_are_there():
    settings = SFTConfig(batch_size=4, micro_batch_tokens=100)
    parts = sizes(memory.sft_plan(settings, TINY, 5, float32, 0, heaviest=11))
    assert parts["activations"] == 11 * 324 and parts["logits"] == 2 * 11 * 40


def test_half_precision_halves_the_weights_and_keeps_float32_masters():
    plan = memory.sft_plan(SFTConfig(), TINY, 5, bfloat16, 0)
    parts = sizes(plan)
    assert [parts[name] for name in ("weights", "masters", "moments", "gradients")] == [
        2 * 172, 4 * 172, 8 * 172, 4 * 172
    ]  # fmt: skip
    assert "masters" not in sizes(memory.sft_plan(SFTConfig(), TINY, 5, float32, 0))
    assert {p.lower for p in plan.parts if p.name == "weights"} == {"take smaller models"}


# ---- what is printed, and refused ----------------------------------------------------------------

PLAN = Plan(
    "ppo", ("load", "loss", "save"),
    (Part("weights", 3_000_000_000, "750,000,000 x 4 B", ("load", "loss", "save"), "halve"),
     Part("activations", 4_000_000_000, "1,000 tokens x 4,000,000 B", ("loss",), "lower --rows"),
     Part("critic", 0, "", ("load",), "")),
    500_000_000,
)  # fmt: skip


def test_plan_prints_a_line_a_part_and_the_totals():
    assert str(PLAN).splitlines() == [
        "memory of ppo, GB",
        "  process         0.50  libraries, tokenizer and data, measured",
        "  weights         3.00  750,000,000 x 4 B",
        "  activations     4.00  1,000 tokens x 4,000,000 B",
        "  phases       load 3.50, loss 7.50 (peak), save 3.50",
    ]


def test_verdict_says_what_is_needed_beside_what_the_process_holds():
    told = memory.verdict(PLAN, Machine(7_000_000_000, "MemAvailable"))
    assert told == "needs 7.00 GB more, 7.00 GB are free (MemAvailable)"


def test_verdict_refuses_naming_the_largest_part_and_what_lowers_it():
    with pytest.raises(UserError) as refused:
        memory.verdict(PLAN, Machine(6_999_999_999, "ulimit -v"))
    assert refused.value.code == MACHINE
    assert str(refused.value) == (
        "memory: ppo needs 7.00 GB, 7.00 GB are free (ulimit -v): largest are the activations, "
        "4.00 GB: lower --rows"
    )


@pytest.mark.parametrize("free", [0, 7_000_000_000])
def test_announce_tells_the_plan_and_the_warnings_before_the_verdict(monkeypatch, capsys, free):
    rounded = "a: weights are rounded", "b: weights are rounded"
    monkeypatch.setattr(memory.pretrained, "rounded", lambda folders, dtype: rounded)
    monkeypatch.setattr(memory, "free_memory", lambda device: Machine(free, device))
    if free:
        told = memory.announce(PLAN, [], torch.bfloat16, "cpu")
        assert told == "needs 7.00 GB more, 7.00 GB are free (cpu)"
    else:
        with pytest.raises(UserError, match=r"0\.00 GB are free \(cpu\)"):
            memory.announce(PLAN, [], torch.bfloat16, "cpu")
    assert capsys.readouterr().out == f"{PLAN}\nwarning: {rounded[0]}\nwarning: {rounded[1]}\n"
