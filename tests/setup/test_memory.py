"""What one tensor takes: by hand on a tiny model, and against what torch really keeps."""

from dataclasses import replace

import pytest
import torch
from torch import bfloat16, float32

from minirlhf.errors import MACHINE, UserError
from minirlhf.models.config import ModelConfig
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.logprobs import token_logprobs
from minirlhf.models.lora import add_lora
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.run.machine import Machine
from minirlhf.setup import memory
from minirlhf.setup.memory import Part, Plan

# 40 embeddings; q 16, k 8, v 8, o 16; three MLP matrices of 24; three norms of 4: 172 parameters
TINY = ModelConfig(
    family="llama", vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=2, max_positions=64,
)
UNTIED = replace(TINY, tied_embeddings=False)
GPT2 = replace(
    TINY, family="gpt2", norm="layer", positions="learned", gated_mlp=False, num_kv_heads=2,
    activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
)
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


# ---- what is printed, and refused ----------------------------------------------------------------

PLAN = Plan(
    "ppo", ("load", "loss", "save"),
    (Part("weights", 3_000_000_000, "750,000,000 x 4 B", ("load", "loss", "save"), "halve"),
     Part("activations", 4_000_000_000, "1,000 tokens x 4,000,000 B", ("loss",), "lower --rows"),
     Part("critic", 0, "", ("load",), "")),
    500_000_000,
)


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
