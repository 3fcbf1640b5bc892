"""How much memory a run will hold, estimated before its models are loaded.

Counted is what grows with the models and the settings; `--dry-run` measures the rest too. The
estimate is off by up to a quarter. Sizes are in bytes, a GB is 10^9 of them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf import ranks
from minirlhf.errors import MACHINE, UserError
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.models.divergence import CHUNK
from minirlhf.models.logprobs import TILE, widened
from minirlhf.models.lora import target_layers
from minirlhf.models.quantized import quantize_trunk
from minirlhf.models.transformer import CausalLM, shapes_only
from minirlhf.run.display import Display
from minirlhf.run.machine import Machine, free_memory, process_bytes
from minirlhf.setup.adapter_settings import dropout_in
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.groups import TrainingSettings
from minirlhf.setup.policy_settings import PolicyInputSettings, PromptInputSettings
from minirlhf.setup.ppo_settings import PPOConfig

MODELS = ("weights", "frozen models", "reference", "teacher")  # parts of an estimate
SHARED = (*MODELS, "moments", "gradients")  # that fsdp shards
SURE = 0.75  # share of an estimate that a run holds in any case


class Part(NamedTuple):
    """What is held in one phase of a run, or in all of them where `phase` is empty."""

    name: str
    bytes: int
    lower: str  # the setting that makes it smaller
    phase: str = ""


class Estimate(NamedTuple):
    recipe: str
    parts: list[Part]

    @property
    def peak(self) -> list[Part]:
        """The parts of the phase that holds most."""
        held = [[p for p in self.parts if p.phase in ("", part.phase)] for part in self.parts]
        return max(held, key=lambda parts: sum(part.bytes for part in parts))

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.peak)


def parameters(
    config: ModelConfig, rank: int = 0, targets: tuple[str, ...] = ("all",), dora: bool = False
) -> int:
    """Of the language model, tied embeddings once; of its adapters alone where a rank is given."""
    with shapes_only():
        lm = CausalLM(config)
    if rank:
        try:
            layers = target_layers(lm.model, targets).values()
        except ValueError as error:
            raise UserError("--lora-targets", str(error)) from None
        return sum(rank * (layer.in_features + layer.out_features) + dora * layer.out_features
                   for layer in layers)
    return sum(p.numel() for p in lm.parameters())


def stored(config: ModelConfig, dtype: torch.dtype, trunk_bits: int = 0) -> int:
    """Bytes of the language model's weights, the trunk's in so many bits."""
    with shapes_only():
        lm = CausalLM(config).to(dtype)
    if trunk_bits:
        quantize_trunk(lm, trunk_bits)
    return sum(tensor.nbytes for tensor in (*lm.parameters(), *lm.buffers()))


def unpacked(config: ModelConfig) -> int:
    """Bytes of the largest layer while a product needs it: its weights in float32, and what they
    are looked up by."""
    widest = max(config.intermediate_size, config.num_heads * config.head_dim)
    return 8 * widest * config.hidden_size


def kept_per_token(config: ModelConfig, dtype: torch.dtype, checkpointing: bool = False) -> int:
    """Bytes a token that a forward pass keeps for the backward pass: of each block what its norms
    read and made, RMSNorm in float32; 2 vectors more of the hidden size; q, k, v and the output of
    attention; of the MLP gate, act(gate), up and their product, or up and act(up). Checkpointing
    keeps the input of each block, and one block."""
    D, E, item, layers = config.hidden_size, config.head_dim, dtype.itemsize, config.num_layers
    read = item if config.norm == "layer" else widened(dtype).itemsize
    normed = 2 * D + config.qk_norm * (config.num_heads + config.num_kv_heads) * E
    others = 2 * D + 4 * config.num_heads * E
    others += (4 if config.gated_mlp else 2) * config.intermediate_size
    block = normed * (read + item) + others * item
    return block + layers * D * item if checkpointing else layers * block


def kept_by_dropout(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token that dropout keeps of a block: what each adapter reads, and its mask."""
    read = config.hidden_size * (5 if config.gated_mlp else 4) + config.intermediate_size
    return (read + config.num_heads * config.head_dim) * (dtype.itemsize + 1)


def learning(
    model: ModelConfig, tokens: int, config: TrainingSettings, dtype: torch.dtype, critic: int = 0,
    unembeds: bool = True, shared_critic: bool = False,
) -> list[Part]:
    """A model that learns from micro-batches of so many tokens; its loss reads logits if it
    `unembeds`. `critic`: parameters of a critic's own trunk, which adapters leave as it is; a
    `shared_critic` has adapters of its own on the model's trunk."""
    own, wide, rank = parameters(model), widened(dtype).itemsize, config.lora_rank
    bits = config.trunk_bits
    weights = stored(model, dtype, bits) + (unpacked(model) if bits else 0)
    trained = own + critic
    if rank:
        adapters = parameters(model, rank, config.lora_targets, config.dora)
        trained = adapters * (1 + shared_critic)
    # The gradient of tied embeddings is made as two matrices, of the first layer and of the last.
    twice = model.vocab_size * model.hidden_size * (unembeds and model.tied_embeddings and not rank)
    masters = trained * wide if dtype.itemsize < wide else 0
    tile = 3 * min(tokens, TILE.tokens) * min(model.vocab_size, TILE.words) * wide * unembeds
    trunks = 2 if shared_critic or (critic and not rank) else 1
    kept = trunks * tokens * kept_per_token(model, dtype, config.gradient_checkpointing)
    if dropout_in(config):
        blocks = 1 if config.gradient_checkpointing else model.num_layers
        kept += tokens * blocks * kept_by_dropout(model, dtype)
    fewer = "lower --lora-rank" if rank else "give --lora-rank 16"
    return [
        Part("weights", weights + critic * dtype.itemsize,
             "give --trunk-bits 4" if rank and bits != 4 else "take a smaller model"),
        Part("moments", 2 * trained * wide + masters, fewer),
        Part("gradients", (trained + twice) * wide, fewer, "update"),
        Part("activations", kept + tile, "lower --micro-batch-tokens", "update"),
    ]


def of_training(
    recipe: str, config: TrainingSettings, model: ModelConfig, tokens: Sequence[int],
    dtype: torch.dtype, unembeds: bool = True,
) -> Estimate:
    """The estimate of a recipe that learns from data.

    Args:
        tokens: of each row.
        unembeds: whether its loss reads logits.
    """
    most = max(config.micro_batch_tokens, max(tokens))
    largest = min(sum(sorted(tokens)[-config.batch_size :]), most)
    return Estimate(recipe, learning(model, largest, config, dtype, unembeds=unembeds))


def of_dpo(
    config: DPOConfig, policy: ModelConfig, ref: ModelConfig | None, tokens: Sequence[int],
    dtype: torch.dtype,
) -> Estimate:
    """The estimate of DPO; `ref`: the reference that is loaded, if one is."""
    estimate = of_training("dpo", config, policy, tokens, dtype)
    size = parameters(ref) * dtype.itemsize if ref else 0
    frozen = Part("reference", size, "leave out --no-cache-ref")
    if config.cache_ref:
        frozen = Part("reference", size, "take a smaller one", "measuring")
    return Estimate("dpo", [*estimate.parts, frozen])


def of_policy(
    recipe: str, config: PolicyInputSettings, policy: ModelConfig, frozen: Sequence[ModelConfig],
    prompt: int, dtype: torch.dtype, critic: int = 0, texts: int = 0, shared_critic: bool = False,
) -> Estimate:
    """The estimate of a recipe that learns from what its policy writes.

    Args:
        config: has PolicyTrainingSettings too.
        frozen: reference and reward models that do not lie over the policy's weights.
        prompt: tokens of the longest prompt.
        critic: parameters of a critic's own trunk.
        texts: tokens of a micro-batch of other texts that are learned from.
        shared_critic: as in `learning`.
    """
    row, most = prompt + config.max_new_tokens, config.micro_batch_tokens
    tokens = max(row, texts, min(most, config.micro_batch_size * row))
    sizes = [parameters(model) * dtype.itemsize for model in frozen]
    away = config.offload_frozen  # one of them is in memory at a time, and none in an update
    copied = Part("int8 copy of the policy", parameters(policy), "leave out --rollout-bits",
                  "sampling")
    return Estimate(recipe, [
        *learning(policy, tokens, config, dtype, critic, shared_critic=shared_critic),
        *([copied] if config.rollout_bits else []),
        Part("frozen models", max(sizes, default=0) if away else sum(sizes),
             "give --offload-frozen", "measuring" if away else ""),
        of_sampling(config, policy, row, dtype),
    ])


def of_ppo(
    config: PPOConfig, policy: ModelConfig, critic: ModelConfig | None,
    frozen: Sequence[ModelConfig], prompt: int, text: int, dtype: torch.dtype,
    shared_critic: bool = False,
) -> Estimate:
    """The estimate of PPO; `text`: tokens of the longest text that is mixed in. `critic` is None
    where it has no trunk, or shares the policy's."""
    texts = max(text, min(config.micro_batch_tokens, config.ptx_batch_size * text))
    of_critic = parameters(critic) if critic else 0
    return of_policy(
        "ppo", config, policy, frozen, prompt, dtype, of_critic, texts, shared_critic)


def of_distill(
    config: PromptInputSettings, student: ModelConfig, teacher: ModelConfig, prompt: int,
    dtype: torch.dtype,
) -> Estimate:
    """The estimate of distillation. Arguments as of `of_policy`."""
    row = prompt + config.max_new_tokens
    tokens = max(row, min(config.micro_batch_tokens, config.micro_batch_size * row))
    logits = 6 * min(tokens, CHUNK) * student.vocab_size * widened(dtype).itemsize
    return Estimate("distill", [
        *learning(student, tokens, config, dtype),
        Part("teacher", parameters(teacher) * dtype.itemsize, "take a smaller teacher"),
        Part("logits of student and teacher", logits, "lower --micro-batch-tokens", "update"),
        of_sampling(config, student, row, dtype),
    ])


def of_sampling(
    config: PromptInputSettings, policy: ModelConfig, row: int, dtype: torch.dtype
) -> Part:
    """What responses take while they are sampled, in rows of so many tokens with their prompts."""
    side = min(config.rollout_batch_size, config.rollout_rows)
    cache = 2 * policy.num_layers * policy.num_kv_heads * policy.head_dim * dtype.itemsize
    logits = 4 * policy.vocab_size * widened(dtype).itemsize
    return Part("KV cache and logits of sampling", side * (row * cache + logits),
                "lower --rollout-batch-size", "sampling")


def shared_out(estimate: Estimate, parallel: str | None) -> Estimate:
    """What one of several processes holds: with fsdp a share of every model, but whole ones while
    they are loaded, and the whole of what it samples from."""
    count = ranks.count()
    if parallel != "fsdp" or count == 1:
        return estimate
    models = sum(p.bytes for p in estimate.parts if p.name in MODELS)
    parts = [p._replace(bytes=p.bytes // count) if p.name in SHARED else p for p in estimate.parts]
    parts.append(Part("models before they are shared out", models - models // count,
                      "take a smaller model", "loading"))
    if any(p.phase == "sampling" for p in parts):
        weights = sum(p.bytes for p in estimate.parts if p.name == "weights")
        parts.append(Part("weights that are sampled from", weights, "take a smaller model",
                          "sampling"))
    return estimate._replace(parts=parts)


def announce(
    config: TrainingSettings, estimate: Estimate, folders: Iterable[Path], dtype: torch.dtype,
    device: str,
) -> dict[str, str]:
    """What a run tells of its machine; warns of what `remarks` tells, and of a tight one.
    Raises UserError (exit code 4) where not even three quarters of the estimate are free."""
    estimate, here = shared_out(estimate, config.parallel), free_memory(device)
    if device == "cpu":  # which the processes of one machine share
        here = here._replace(free=here.free // ranks.neighbours())
    for line in [*pretrained.remarks(folders, dtype), *check_fits(estimate, here)]:
        Display(config).note(f"warning: {line}")
    held = (process_bytes(device) + estimate.total) / 1e9
    each = " a process" if ranks.count() > 1 else ""
    return {"memory": f"about {held:.1f} GB{each}; --dry-run measures it",
            "device": device + (f" x {ranks.count()} processes" if each else ""),
            "dtype": str(dtype).removeprefix("torch.")}


def check_fits(estimate: Estimate, here: Machine) -> list[str]:
    """A warning where the estimate does not fit into what is free; raises as `announce`."""
    if estimate.total <= here.free:
        return []
    part = max(estimate.peak, key=lambda part: part.bytes)
    what = f"{estimate.recipe} needs about {estimate.total / 1e9:.1f} GB, "
    what += f"{here.free / 1e9:.1f} GB are free ({here.limit})"
    do = f"largest are the {part.name}, {part.bytes / 1e9:.1f} GB: {part.lower}"
    if SURE * estimate.total > here.free:
        raise UserError("memory", what, do, MACHINE)
    return [f"memory: {what}: {do}"]
