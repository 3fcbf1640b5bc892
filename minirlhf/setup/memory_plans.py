"""The memory plans of the recipes: what each holds, part by part, and in which of its phases.

What a single tensor takes is counted in memory.py.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from minirlhf.files import folders
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.models.logprobs import widened
from minirlhf.rewards.parse import parse_source
from minirlhf.run.machine import free_memory
from minirlhf.setup.memory import (
    Part,
    Plan,
    adapter_parameters,
    embedding_parameters,
    kept_per_token,
    kl_held,
    largest_cells,
    logits_held,
    parameters,
    passing_per_token,
    trunk_parameters,
    verdict,
)
from minirlhf.setup.ppo_settings import PPOConfig

HEAP_BLOCK = 32 << 20  # bytes from which on glibc gives every freed block back to the system
TRAINING = ("load", "loss", "step", "evaluate", "save")


def heaviest(tokens: Sequence[int], rows: int) -> int:
    """Most tokens that so many examples of a file hold together."""
    return sum(sorted(tokens)[-rows:])


class TrainingSettings(Protocol):
    """Those of `minirlhf reward` and `minirlhf sft` that decide what they hold."""

    batch_size: int
    micro_batch_tokens: int
    lora_rank: int
    gradient_checkpointing: bool


class PPOModels(NamedTuple):
    """What is loaded; None where there is none, or no copy."""

    policy: ModelConfig
    ref: ModelConfig | None
    rewards: tuple[ModelConfig, ...]
    critic: ModelConfig | None


def ppo_models(settings: PPOConfig) -> PPOModels:
    """Reads their config.json; a policy with adapters is its own reference."""
    ref = settings.ref or ("" if settings.lora_rank else settings.model)
    sources = (parse_source(source) for source in settings.reward)

    def read(name: str) -> ModelConfig:
        return pretrained.read_config(folders.resolve(name, weights=False))

    return PPOModels(
        read(settings.model), read(ref) if ref else None,
        tuple(read(source.place) for source in sources if source.kind == "model"),
        read(settings.critic) if settings.critic else None,
    )


def ppo_plan(
    settings: PPOConfig, models: PPOModels, longest_prompt: int, dtype: torch.dtype, held: int,
    longest_text: int = 0,
) -> Plan:
    """The plan of a PPO run.

    Args:
        longest_prompt: tokens.
        held: what the process holds now (`process_bytes`); 0 for a GPU.
        longest_text: tokens, of the texts that are mixed in; 0 without.
    """
    policy, rewards, critic = models.policy, models.rewards, models.critic
    phases = ("load", "prompts", "sampling", "score", "measure", "loss", "step", "save")
    rank, item = settings.lora_rank, dtype.itemsize
    V, wide = policy.vocab_size, widened(dtype).itemsize
    longest = longest_prompt + settings.max_new_tokens
    rows = min(settings.rollout_batch_size, settings.batch_size)  # side by side in sampling
    cells = largest_cells(settings.micro_batch_size, longest, settings.micro_batch_tokens)
    micro_rows = max(1, cells // longest)
    mixed = largest_cells(settings.ptx_batch_size, longest_text, settings.micro_batch_tokens)
    trained = max(cells, mixed if longest_text else 0)
    scored = largest_cells(settings.batch_size, longest, settings.micro_batch_tokens)
    logits = logits_held(
        policy, dtype, micro_rows * settings.max_new_tokens, not rank, settings.entropy_coef > 0
    )
    # Of top-p: the sorted logits, their places, law, sum and mass before each.
    law = item + 3 * wide + (3 * wide + 8 if settings.top_p < 1 else 0)
    drawable = settings.top_k  # ids of a token's support
    uncounted = not drawable and (settings.top_p < 1 or settings.min_p > 0)
    passing, again = passing_per_token(policy, dtype, rank), settings.gradient_checkpointing
    kept = kept_per_token(policy, dtype, rank, again)
    # Reward models score one after the other; re-encoded texts are taken to be as long.
    scoring = max((passing_per_token(reward, dtype) for reward in rewards), default=0)
    own = trunk_parameters(critic) if critic else 0  # of a critic with its own trunk
    learns = 0 if rank or not settings.train_critic else own  # adapters freeze it
    kept += kept_per_token(critic, dtype, checkpointing=again) if learns else 0
    cache = 2 * policy.num_layers * policy.num_kv_heads * policy.head_dim * item  # of a token
    capacity = rows * longest * cache
    fewer = "lower --micro-batch-size" if micro_rows > 1 else "lower --max-new-tokens"
    abreast = "lower --rollout-batch-size"
    reading = ("score", "measure", "loss", "step")
    parts = [
        *_trained(policy, parameters(policy), learns, dtype, rank, phases,
                  settings.batch_size > settings.mini_batches * micro_rows or longest_text > 0,
                  unembeds=True),
        _frozen("critic", own - learns, dtype, phases, "leave out --critic"),
        # The critic is a copy of the reward model that is read for it.
        _frozen("critic as read", own, dtype, ("load",), "leave out --critic"),
        *_scorers(settings, models, dtype, phases),
        Part("KV cache", capacity, f"{rows} rows x {longest} tokens x {cache:,} B",
             ("prompts", "sampling"), abreast),
        # As a row ends, the rows behind it move up: layer by layer, first keys, then values.
        Part("KV copy", capacity // (2 * policy.num_layers),
             "keys of a layer, while an ended row leaves", ("sampling",), abreast),
        Part("prompt pass", rows * longest_prompt * passing,
             f"{rows} rows x {longest_prompt} tokens x {passing:,} B", ("prompts",), abreast),
        # The logits, and three of their size in float32: scaled logits, the law of this step and
        # of the last; then the law, its exponential and the cumulative sum.
        Part("sampling law", rows * V * law, f"{rows} rows x {V:,} x {law} B", ("sampling",),
             abreast),
        Part("scoring pass", scored * scoring, f"{scored:,} tokens", ("score",),
             "lower --micro-batch-tokens"),
        Part("measuring pass", cells * passing + logits.forward,
             f"{cells:,} tokens x {passing:,} B, and logits", ("measure",), fewer),
        Part("activations", trained * kept, f"{trained:,} tokens x {kept:,} B", ("loss",), fewer),
        Part("logits", max(logits[:2]), logits.counted, ("loss",), fewer),
        # Ids twice, and a byte of mask and seven float32 for each response token.
        Part("rollout", settings.batch_size * (16 * longest + 29 * settings.max_new_tokens),
             f"{settings.batch_size} rows x {longest} tokens"
             + (", without the ids that could be drawn" if uncounted else ""),
             reading, "lower --batch-size"),
        Part("ids to draw from", 4 * drawable * settings.batch_size * settings.max_new_tokens,
             f"{settings.batch_size} rows x {settings.max_new_tokens} tokens x {drawable} x 4 B",
             ("sampling", *reading), "lower --top-k"),
        *_full_kl(settings, models, dtype, micro_rows * settings.max_new_tokens),
        # Adapters are folded into a copy, while the policy goes on learning with them.
        _frozen("best policy, merged", parameters(policy) if rank and settings.keep_best else 0,
                dtype, ("save",), "give --no-keep-best"),
        *_exported(policy, parameters(policy), dtype),
    ]
    return Plan("ppo", phases, tuple(parts), held)


def _scorers(
    settings: PPOConfig, models: PPOModels, dtype: torch.dtype, phases: tuple[str, ...]
) -> list[Part]:
    """Reference and reward models; offloaded they are read where they are needed, reward models one
    after the other."""
    ref, rewards, away = models.ref, models.rewards, settings.offload_frozen
    note = ", only while needed" if away else ""
    largest = max(map(trunk_parameters, rewards), default=0)
    measuring = ("load", "measure") if away else phases
    instead = "leave out --ref" if settings.lora_rank else "give --lora-rank 16"
    parts = [_frozen("reference", parameters(ref) if ref else 0, dtype, measuring, instead, note)]
    for count in map(trunk_parameters, rewards):
        scoring = ("load", "score") if count == largest else ("load",)
        parts.append(_frozen("reward model", count, dtype, scoring if away else phases,
                             _smaller(dtype), note))
    return parts


def _full_kl(settings: PPOConfig, models: PPOModels, dtype: torch.dtype, tokens: int) -> list[Part]:
    """Of --kl-estimator full: laws of a micro-batch's tokens, and what a loss keeps for them."""
    if settings.kl_estimator != "full":
        return []
    of_loss, advice = settings.kl_in == "loss", "use another --kl-estimator"
    held = kl_held(models.policy, dtype, tokens, of_loss, of_loss and not settings.lora_rank)
    rows, new = settings.batch_size, settings.max_new_tokens
    states = rows * new * (models.ref or models.policy).hidden_size * dtype.itemsize
    return [
        Part("full KL", held, "laws of policy and reference, a piece at a time",
             ("loss" if of_loss else "measure",), advice),
        Part("reference states", states if of_loss else 0, f"{rows} rows x {new} tokens",
             ("measure", "loss", "step"), advice),
    ]


def reward_plan(
    settings: TrainingSettings, model: ModelConfig, longest: int, dtype: torch.dtype, held: int,
    held_out: int = 0, texts: int = 2, heaviest: int | None = None,
) -> Plan:
    """The plan of a reward model's training.

    Args:
        longest: tokens of the longest text, a prompt with one of its answers.
        held: as in `ppo_plan`.
        held_out: pairs or lists of the largest held-out set.
        texts: of the longest list, which stay in one micro-batch; 2 for pairs.
        heaviest: as `heaviest` counts them; None: all texts are as long as the longest.
    """
    rank, most = settings.lora_rank, settings.micro_batch_tokens
    one = texts * longest
    cells = largest_cells(settings.batch_size, one, most)
    tokens = cells if heaviest is None else min(cells, heaviest)  # padding is not computed
    evaluated = largest_cells(held_out, one, most) if held_out else 0
    passing = passing_per_token(model, dtype, rank)
    kept = kept_per_token(model, dtype, rank, settings.gradient_checkpointing)
    count = trunk_parameters(model)
    fewer = "lower --micro-batch-tokens" if cells > one else "lower --max-length"
    parts = [
        *_trained(model, count, 0, dtype, rank, TRAINING,
                  settings.batch_size * one > most, unembeds=False),
        Part("activations", tokens * kept, f"{tokens:,} tokens x {kept:,} B", ("loss",), fewer),
        Part("backward pass", tokens * passing, f"{tokens:,} tokens x {passing:,} B, of one layer",
             ("loss",), fewer),
        Part("evaluation pass", evaluated * passing, f"{evaluated:,} tokens x {passing:,} B",
             ("evaluate",), fewer),
        *_exported(model, count, dtype),
    ]
    return Plan("reward", TRAINING, tuple(parts), held)


def sft_plan(
    settings: TrainingSettings, model: ModelConfig, longest: int, dtype: torch.dtype, held: int,
    held_out: int = 0, heaviest: int | None = None,
) -> Plan:
    """The plan of supervised fine-tuning; arguments as in `reward_plan`, texts instead of pairs."""
    rank, most = settings.lora_rank, settings.micro_batch_tokens
    cells = largest_cells(settings.batch_size, longest, most)
    tokens = cells if heaviest is None else min(cells, heaviest)
    evaluated = largest_cells(held_out, longest, most) if held_out else 0
    passing = passing_per_token(model, dtype, rank)
    kept = kept_per_token(model, dtype, rank, settings.gradient_checkpointing)
    logits = logits_held(model, dtype, tokens, not rank)
    evaluation = logits_held(model, dtype, evaluated, False).forward if held_out else 0
    fewer = "lower --micro-batch-tokens" if cells > longest else "lower --max-length"
    count = parameters(model)
    parts = [
        *_trained(model, count, 0, dtype, rank, TRAINING,
                  settings.batch_size * longest > most, unembeds=True),
        Part("activations", tokens * kept, f"{tokens:,} tokens x {kept:,} B", ("loss",), fewer),
        Part("logits", max(logits[:2]), logits.counted, ("loss",), fewer),
        Part("evaluation pass", evaluated * passing + evaluation,
             f"{evaluated:,} tokens x {passing:,} B, and logits", ("evaluate",), fewer),
        *_exported(model, count, dtype),
    ]
    return Plan("sft", TRAINING, tuple(parts), held)


def _smaller(dtype: torch.dtype) -> str:
    return "give --dtype bfloat16" if dtype == torch.float32 else "take smaller models"


def _frozen(
    name: str, count: int, dtype: torch.dtype, phases: tuple[str, ...], lower: str, note: str = ""
) -> Part:
    size = dtype.itemsize
    return Part(name, count * size, f"{count:,} x {size} B{note}", phases, lower)


def _trained(
    config: ModelConfig, own: int, critic: int, dtype: torch.dtype, rank: int,
    phases: tuple[str, ...], accumulates: bool, unembeds: bool,
) -> list[Part]:
    """Weights, gradients and moments of what learns, its scalar head (a few KB) left out; in half
    precision masters too, as `optim.MasterAdamW` keeps them.

    Args:
        own, critic: parameters of the model and of a critic's trunk that learns.
        accumulates: several micro-batches make an optimizer step.
        unembeds: the loss reads logits.
    """
    item, wide = dtype.itemsize, widened(dtype)
    adapters = adapter_parameters(config, rank) if rank else 0
    trained = adapters or own
    fewer = "lower --lora-rank" if rank else "give --lora-rank 16"
    # Gradients are freed after each step, but blocks below 32 MB stay in glibc's heap, where few
    # activations, of other sizes, fit into the holes: both then count at the same time.
    block = config.hidden_size * config.intermediate_size * wide.itemsize
    stays = accumulates or block < HEAP_BLOCK
    # The gradient of the embeddings is dense, a matrix of its own beside what is there already:
    # that of the unembedding, if tied, and that of the micro-batches before.
    dense = 0 if rank else (unembeds and config.tied_embeddings) + accumulates
    return [
        _frozen("weights", own + adapters + critic, dtype, phases, _smaller(dtype)),
        _frozen("masters", trained + critic if item < wide.itemsize else 0, wide, phases[1:],
                fewer),
        Part("moments", 2 * (trained + critic) * wide.itemsize,
             f"2 x {trained + critic:,} x {wide.itemsize} B", phases[1:], fewer),
        _frozen("gradients", trained + critic, wide, ("loss", "step") if stays else ("step",),
                fewer),
        Part("embedding gradient", dense * embedding_parameters(config) * item,
             f"{dense} x {embedding_parameters(config):,} x {item} B", ("step",), fewer),
    ]


def _exported(config: ModelConfig, count: int, dtype: torch.dtype) -> list[Part]:
    """GPT-2's matrices are transposed for its file; other models are written as they are."""
    copied = count if config.family == "gpt2" else 0
    return [_frozen("file", copied, dtype, ("save",), _smaller(dtype))]


def announce(plan: Plan, folders: Iterable[Path], dtype: torch.dtype, device: str) -> str:
    """What a run tells before it loads its models: the plan, and which folders' weights `dtype`
    rounds. Returns the verdict on what is free, errors as there."""
    print(plan)
    for line in pretrained.rounded(folders, dtype):
        print(f"warning: {line}")
    return verdict(plan, free_memory(device))
