"""The estimate of a run's memory: by hand on a tiny model, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import bfloat16, float32

from minirlhf.errors import MACHINE, UserError
from minirlhf.models.config import ModelConfig
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.run.machine import Machine
from minirlhf.setup import memory
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.memory import Estimate, Part
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig

# 40 embeddings; q 16, k 8, v 8, o 16; three MLP matrices of 24; three norms of 4: 172 parameters
TINY = ModelConfig(
    family="llama", vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=2, max_positions=64,
)
UNTIED = replace(TINY, tied_embeddings=False)
WIDE = replace(
    TINY, vocab_size=50, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8,
)
FAMILIES = {
    "llama": WIDE,
    "qwen3": replace(WIDE, qk_norm=True, head_dim=16),
    "gpt2": replace(
        WIDE, family="gpt2", norm="layer", positions="learned", gated_mlp=False, num_kv_heads=4,
        activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
    ),
}


def sizes(parts: list[Part]) -> dict[str, int]:
    return {part.name: part.bytes for part in parts}


# ---- the models ----------------------------------------------------------------------------------


def test_parameters_are_counted_once_where_tied_and_adapters_by_rank():
    assert memory.parameters(TINY) == 172
    assert memory.parameters(UNTIED) == 212
    # rank times in plus out: q 4+4, k 4+2, v 4+2, o 4+4, gate 4+6, up 4+6, down 6+4
    assert memory.parameters(TINY, 1) == 58
    assert memory.parameters(TINY, 3) == 174


def test_parameters_allocates_no_weights(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters",
                        lambda self: made.append(self.weight.device.type))
    memory.parameters(TINY)
    assert set(made) == {"meta"}


def test_stored_weights_by_hand():
    assert memory.stored(TINY, float32) == 172 * 4 and memory.stored(UNTIED, bfloat16) == 212 * 2
    # 120 of the 172 are in linear layers, which have 4 + 2 + 2 + 4 + 6 + 6 + 4 = 28 outputs
    assert memory.stored(TINY, float32, 8) == 120 + 28 * 4 + 52 * 4
    # 7 layers of one block of 64: 32 bytes, its scale 1, and that one's scale and mean 8
    assert memory.stored(TINY, bfloat16, 4) == 7 * (32 + 1 + 8) + 52 * 2


def test_kept_per_token_by_hand():
    block = 6 * 4 + 4 * 2 * 2 + 4 * 6  # around the norms; q, k, v and output; in the MLP
    assert memory.kept_per_token(TINY, float32) == 4 * block
    assert memory.kept_per_token(TINY, bfloat16) == 2 * block + 2 * 2 * 4  # norms read float32
    # q and k of 2 and 1 heads are normed, too
    assert memory.kept_per_token(replace(TINY, qk_norm=True), float32) == 4 * (block + 2 * 6)
    assert memory.kept_per_token(replace(TINY, gated_mlp=False), float32) == 4 * (block - 2 * 6)
    deep = replace(TINY, num_layers=9)
    assert memory.kept_per_token(deep, float32) == 9 * 4 * block
    assert memory.kept_per_token(deep, float32, checkpointing=True) == 4 * (block + 9 * 4)


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_per_token_is_within_a_quarter_of_what_autograd_keeps(family, dtype):
    config, rows, width = FAMILIES[family], 3, 7
    lm = initialize(CausalLM(config), torch.Generator().manual_seed(0)).to(dtype)
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = lm(torch.zeros(rows, width, dtype=torch.int64))
    rotary = lm.model.rotary
    for x in [*lm.parameters(), *((rotary.cos, rotary.sin) if rotary else ())]:
        kept.pop(x.untyped_storage()._cdata, None)
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    estimated = rows * width * memory.kept_per_token(config, dtype)
    assert 0.75 * total < estimated < 1.25 * total
    assert output.requires_grad


# ---- the recipes ---------------------------------------------------------------------------------


def test_of_training_by_hand():
    estimate = memory.of_training("sft", SFTConfig(batch_size=2), TINY, [3, 5, 2], float32)
    assert sizes(estimate.peak) == {
        "weights": 172 * 4, "moments": 2 * 172 * 4,
        "gradients": (172 + 40) * 4,  # of the embeddings twice
        "activations": 8 * 256 + 3 * 8 * 10 * 4,  # the two longest; 3 tiles of 8 x 10 logits
    }
    assert estimate.total == 688 + 1376 + 848 + 3008
    small = replace(SFTConfig(batch_size=2), micro_batch_tokens=7)
    small = memory.of_training("sft", small, UNTIED, [3, 5, 2], float32)
    assert sizes(small.peak)["gradients"] == 212 * 4
    assert sizes(small.peak)["activations"] == 7 * 256 + 3 * 7 * 10 * 4


def test_of_dpo_holds_its_reference_before_the_first_step_or_all_the_time():
    plain = memory.of_training("dpo", DPOConfig(batch_size=2), TINY, [3, 5, 2], float32)
    kept, each = (
        memory.of_dpo(DPOConfig(batch_size=2, cache_ref=cached), TINY, TINY, [3, 5, 2], float32)
        for cached in (True, False)
    )
    assert kept.total == plain.total and "reference" not in sizes(kept.peak)
    assert sizes(each.peak)["reference"] == 172 * 4 and each.total == plain.total + 172 * 4
    own = memory.of_dpo(DPOConfig(batch_size=2, lora_rank=2), TINY, None, [3, 5, 2], float32)
    assert sizes(own.parts)["reference"] == 0


def test_of_training_of_a_reward_model_reads_no_logits_and_holds_the_longest_row():
    config = RewardConfig(micro_batch_tokens=1)
    estimate = memory.of_training("reward", config, TINY, [3, 5, 2], float32, False)
    assert sizes(estimate.peak)["gradients"] == 172 * 4
    assert sizes(estimate.peak)["activations"] == 5 * 256


def test_of_training_with_adapters_trains_little():
    config = SFTConfig(lora_rank=2)
    found = sizes(memory.of_training("sft", config, TINY, [5], float32).peak)
    assert (found["weights"], found["moments"], found["gradients"]) == (688, 2 * 464, 464)


def test_of_training_counts_a_quantised_trunk_and_its_largest_layer_unpacked():
    config = SFTConfig(lora_rank=2, trunk_bits=8)
    weights = memory.of_training("sft", config, TINY, [5], float32).parts[0]
    assert weights.bytes == memory.stored(TINY, float32, 8) + 8 * 6 * 4
    assert weights.lower == "give --trunk-bits 4"


def test_of_training_in_half_precision_has_float32_masters_and_gradients():
    found = sizes(memory.of_training("sft", SFTConfig(), UNTIED, [5], bfloat16).peak)
    assert found["weights"] == 212 * 2
    assert found["moments"] == 2 * 212 * 4 + 212 * 4  # and the masters
    assert found["gradients"] == 212 * 4


SETTINGS = PPOConfig(batch_size=4, max_new_tokens=3, micro_batch_size=2)


def test_of_ppo_by_hand():
    estimate = memory.of_ppo(SETTINGS, TINY, None, [TINY, TINY], 2, 0, float32)
    assert sizes(estimate.parts) == {
        "weights": 688, "moments": 1376, "gradients": 848,
        "activations": 10 * 256 + 3 * 10 * 10 * 4,  # 2 rows of 2 + 3 tokens
        "frozen models": 2 * 688,
        # keys and values of 2 numbers for each of 5 tokens; 4 copies of 10 logits
        "KV cache and logits of sampling": 4 * (5 * 16 + 4 * 10 * 4),
    }
    assert estimate.total == 688 + 1376 + 848 + 3760 + 1376  # in an update
    assert "KV cache and logits of sampling" not in sizes(estimate.peak)


def test_of_ppo_counts_the_copy_that_is_sampled_from():
    config = replace(SETTINGS, batch_size=900, rollout_batch_size=800, rollout_bits=8)
    estimate = memory.of_ppo(config, TINY, None, [], 2, 0, float32)
    assert estimate.total == 688 + 1376 + 800 * 240 + 172


def test_of_ppo_peaks_in_sampling_where_many_rows_stand_side_by_side():
    config = replace(SETTINGS, batch_size=900, rollout_batch_size=800)
    estimate = memory.of_ppo(config, TINY, None, [], 2, 0, float32)
    assert estimate.total == 688 + 1376 + 800 * 240


def test_of_ppo_offloaded_holds_the_largest_frozen_model_while_nothing_learns():
    config = replace(SETTINGS, offload_frozen=True)
    estimate = memory.of_ppo(config, TINY, None, [TINY, UNTIED], 2, 0, float32)
    assert sizes(estimate.parts)["frozen models"] == 212 * 4
    assert "frozen models" not in sizes(estimate.peak)
    huge = replace(TINY, vocab_size=10_000)
    estimate = memory.of_ppo(config, TINY, None, [TINY, huge], 2, 0, float32)
    assert estimate.total == 688 + 1376 + memory.parameters(huge) * 4


def test_of_ppo_counts_a_critic_as_a_second_trunk_that_adapters_freeze():
    found = sizes(memory.of_ppo(SETTINGS, TINY, TINY, [], 2, 0, float32).parts)
    assert (found["weights"], found["moments"]) == (2 * 688, 2 * 1376)
    assert found["activations"] == 2 * 10 * 256 + 1200
    config = replace(SETTINGS, lora_rank=2)
    found = sizes(memory.of_ppo(config, TINY, TINY, [], 2, 0, float32).parts)
    assert (found["weights"], found["moments"]) == (2 * 688, 2 * 464)
    assert found["activations"] == 10 * 256 + 1200


def test_of_ppo_takes_the_larger_micro_batch_of_rollouts_and_texts():
    config = replace(SETTINGS, ptx_batch_size=3)
    found = sizes(memory.of_ppo(config, TINY, None, [], 2, 7, float32).parts)
    assert found["activations"] == 21 * 256 + 3 * 21 * 10 * 4


def test_of_policy_samples_every_response_to_a_prompt_side_by_side():
    config = GRPOConfig(batch_size=2, samples_per_prompt=3, max_new_tokens=3, micro_batch_size=2)
    found = sizes(memory.of_policy("grpo", config, TINY, [TINY], 2, float32).parts)
    assert found["activations"] == 10 * 256 + 3 * 10 * 10 * 4  # 2 rows of 2 + 3 tokens
    assert found["KV cache and logits of sampling"] == 6 * (5 * 16 + 4 * 10 * 4)
    assert (found["weights"], found["frozen models"]) == (688, 688)


# ---- what is told, and refused -------------------------------------------------------------------

ESTIMATE = Estimate("ppo", [
    Part("weights", 3_000_000_000, "take a smaller model"),
    Part("activations", 5_000_000_000, "lower --rows", "update"),
    Part("KV cache", 2_000_000_000, "lower --side", "sampling"),
])


def test_peak_is_the_phase_that_holds_most():
    assert [part.name for part in ESTIMATE.peak] == ["weights", "activations"]
    assert ESTIMATE.total == 8_000_000_000


@pytest.mark.parametrize(
    ("free", "warns"), [(8_000_000_000, False), (7_999_999_999, True), (6_000_000_000, True)]
)
def test_check_fits_warns_where_an_estimate_is_above_what_is_free(free, warns):
    told = memory.check_fits(ESTIMATE, Machine(free, "MemAvailable"))
    assert told == [
        f"memory: ppo needs about 8.0 GB, {free / 1e9:.1f} GB are free (MemAvailable): "
        "largest are the activations, 5.0 GB: lower --rows"
    ] * warns


def test_check_fits_refuses_what_cannot_fit_naming_the_largest_part_and_what_lowers_it():
    with pytest.raises(UserError) as refused:
        memory.check_fits(ESTIMATE, Machine(5_999_999_999, "ulimit -v"))
    assert refused.value.code == MACHINE
    assert str(refused.value) == (
        "memory: ppo needs about 8.0 GB, 6.0 GB are free (ulimit -v): largest are the "
        "activations, 5.0 GB: lower --rows"
    )


@pytest.mark.parametrize("free", [0, 7_000_000_000, 9_000_000_000])
def test_announce_warns_and_tells_what_the_process_will_hold(monkeypatch, capsys, free):
    rounded = ["a: weights are rounded", "b: weights are rounded"]
    monkeypatch.setattr(memory.pretrained, "remarks", lambda folders, dtype: rounded)
    monkeypatch.setattr(memory, "free_memory", lambda device: Machine(free, device))
    monkeypatch.setattr(memory, "process_bytes", lambda device: 300_000_000)
    if not free:
        with pytest.raises(UserError, match=r"0\.0 GB are free \(cpu\)"):
            memory.announce(SFTConfig(), ESTIMATE, [Path("a")], bfloat16, "cpu")
        return
    told = memory.announce(SFTConfig(), ESTIMATE, [Path("a")], bfloat16, "cpu")
    memory_told = "about 8.3 GB; --dry-run measures it"
    assert told == {"memory": memory_told, "device": "cpu", "dtype": "bfloat16"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"warning: {line}" for line in rounded]
    assert [line[:21] for line in lines[2:]] == ["warning: memory: ppo "] * (free < 8_000_000_000)


def test_shards_are_a_part_of_every_model(monkeypatch):
    """Of 8 bytes of weights, 16 of moments, 4 of a reference and 3 of a cache, a rank of two holds
    4 + 8 + 2; 6 more while models are whole, and 8 + 3 while it samples: 25 at most."""
    estimate = Estimate("ppo", [
        Part("weights", 8, ""), Part("moments", 16, ""), Part("reference", 4, ""),
        Part("cache", 3, "", "sampling"),
    ])
    assert memory.shared_out(estimate, "fsdp") is estimate  # one process
    monkeypatch.setattr(memory.ranks, "count", lambda: 2)
    assert memory.shared_out(estimate, "ddp") is estimate
    shared = memory.shared_out(estimate, "fsdp")
    assert [part.bytes for part in shared.parts] == [4, 8, 2, 3, 6, 8]
    assert shared.total == 4 + 8 + 2 + 3 + 8
