"""What a run will hold in memory, counted before anything is allocated.

Each part is counted from what the code allocates and lives in some phases of a run; the run needs
what its largest phase holds. Not counted: the mapped pages of a safetensors file, which the system
takes back when it needs them; scalar heads; tensors of one layer where a whole trunk is held too.

Shapes: B rows, T tokens, R of a response, D hidden size, H query heads, K key-value heads, E head
dim, I width of the MLP, V vocabulary. Sizes are in bytes; a GB is 10^9 of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from minirlhf import pretrained
from minirlhf.errors import MACHINE, UserError
from minirlhf.logprobs import CHUNK, TILE, widened
from minirlhf.machine import Machine, free_memory
from minirlhf.reward_sources import parse
from minirlhf.transformer import CausalLM, ModelConfig, shapes_only

HEAP_BLOCK = 32 << 20  # bytes from which on glibc gives every freed block back to the system


class Part(NamedTuple):
    """One line of the plan."""

    name: str
    bytes: int
    counted: str  # how, as in "134,515,584 x 4 B"
    phases: tuple[str, ...]  # in which it is held
    lower: str  # the setting that makes it smaller


@dataclass(frozen=True)
class Plan:
    """What a recipe holds in each of its phases.

    Args:
        recipe: its name.
        phases: their names, in the order of the run.
        parts: what is held; those of 0 bytes are not shown.
        held: what the process holds already: libraries, tokenizer and data.
    """

    recipe: str
    phases: tuple[str, ...]
    parts: tuple[Part, ...]
    held: int

    def total(self, phase: str) -> int:
        return self.held + sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def peak(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=self.total)

    @property
    def largest(self) -> Part:
        """The largest part of that phase."""
        return max((p for p in self.parts if self.peak in p.phases), key=lambda p: p.bytes)

    def __str__(self) -> str:
        """One line a part, one of the phases' totals."""
        lines = [("process", self.held, "libraries, tokenizer and data, measured")]
        lines += [(p.name, p.bytes, p.counted) for p in self.parts if p.bytes]
        width = max(len(name) for name, _, _ in lines)
        totals = (
            f"{phase} {gb(self.total(phase))}{' (peak)' if phase == self.peak else ''}"
            for phase in self.phases
        )
        return "\n".join([
            f"memory of {self.recipe}, GB",
            *(f"  {name:<{width}}  {gb(size):>7}  {how}" for name, size, how in lines),
            f"  {'phases':<{width}}  {', '.join(totals)}",
        ])  # fmt: skip


def gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


# -------------------------------------------------------------------------------------- one tensor


def parameters(config: ModelConfig) -> int:
    """Of the language model; tied embeddings count once."""
    with shapes_only():
        return sum(p.numel() for p in CausalLM(config).parameters())


def trunk_parameters(config: ModelConfig) -> int:
    """Without `lm_head`: what a reward model or a critic keeps, whose scalar head is D more."""
    return parameters(config) - (0 if config.tied_embeddings else embedding_parameters(config))


def embedding_parameters(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Of `add_lora` with its default targets: rank (in + out) for every linear layer."""
    with shapes_only():
        layers = [m for m in CausalLM(config).model.modules() if isinstance(m, nn.Linear)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def kept_per_token(
    config: ModelConfig, dtype: torch.dtype, rank: int = 0, checkpointing: bool = False
) -> int:
    """Bytes a token that the trunk keeps for its backward pass, the final state included; with
    checkpointing each block's input, and of one block what its backward pass computes again.

    Whatever an operation's derivative reads is kept, once where two operations read the same:

        RMSNorm   x and its scale; the normed x where the weight is trained; in half precision x
                  is kept in float32. LayerNorm: x, mean, deviation.
        linear    its input where the weight is trained, or an adapter reads it, which adds `rank`;
                  q, k, v read one input, gate and up another.
        attention q, k, v with a key-value head for each query head, the output, its float32
                  normalizer. A rotation keeps nothing: the angles are not trained.
        MLP       gate, act(gate), up, their product; ungated: up, act(up).
    """
    D, I = config.hidden_size, config.intermediate_size
    HE = config.num_heads * config.head_dim
    item, wide = dtype.itemsize, widened(dtype).itemsize

    def norm(size: int, rows: int = 1) -> int:
        if config.norm == "layer":
            return rows * (size + 2) * item
        return rows * (size * (wide + (0 if rank else item)) + wide)

    block = 2 * norm(D) + item * (2 * D + 4 * HE + (4 if config.gated_mlp else 2) * I)
    block += wide * config.num_heads + item * rank * (7 if config.gated_mlp else 6)
    if config.qk_norm:
        block += norm(config.head_dim, config.num_heads + config.num_kv_heads)
    # Under frozen embeddings no derivative goes through the first norm.
    norms = norm(D) * (0 if rank else 1)
    blocks = block + config.num_layers * item * D if checkpointing else config.num_layers * block
    return blocks + norms + wide * D


def passing_per_token(config: ModelConfig, dtype: torch.dtype, rank: int = 0) -> int:
    """Bytes a token that a pass without gradient holds at most: one block at a time.

    The residual x and its norm, and beside them in the MLP act(gate), up and their product (an
    adapted layer holds its own output twice more); or in the attention, while q is rotated, q,
    both its terms and their sum, and k and v.
    """
    D, I = config.hidden_size, config.intermediate_size
    HE, KE = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * I + (I if rank else 0)
    return dtype.itemsize * (2 * D + max(mlp, 4 * HE + 2 * KE))


class Logits(NamedTuple):
    forward: int
    backward: int
    counted: str


def logits_held(
    config: ModelConfig, dtype: torch.dtype, tokens: int, trained: bool, entropy: bool = False
) -> Logits:
    """What `logprobs.token_logprobs` holds at most beside its arguments.

    Forward: a tile of logits and of the law, and the next tile's logits. Backward: log-probs, which
    become the gradient, and the next tile's; with an entropy's gradient, the law too; and the
    gradient of a trained unembedding. In half precision a tile's rows of the unembedding are copied
    to float32.

    Args:
        tokens: N of one call.
        trained: whether the unembedding is.
        entropy: whether the loss reads it.
    """
    wide = widened(dtype).itemsize
    held, words = min(tokens, TILE.tokens), min(config.vocab_size, TILE.words)
    one = held * words * wide
    more = 1 if tokens > held or config.vocab_size > words else 0
    matrix = embedding_parameters(config) * wide
    copied = 0 if dtype.itemsize == wide else (1 + more) * words * config.hidden_size * wide
    return Logits(
        (2 + more) * one + copied,
        (1 + more) * (1 + entropy) * one + (matrix if trained else 0) + copied,
        f"{held} tokens x {words:,} words x {wide} B x {2 + more}"
        + (", gradient of the unembedding" if trained else ""),
    )


def kl_held(
    config: ModelConfig, dtype: torch.dtype, tokens: int, backward: bool, trained: bool
) -> int:
    """What `logprobs.token_kl` holds at most beside its arguments: both laws of a chunk and one
    more of their size. In half precision an unembedding is copied to float32 whole; in the backward
    pass twice.

    Args:
        backward: whether there is a backward pass.
        trained: whether the unembedding is, whose gradient is then held.
    """
    wide = widened(dtype).itemsize
    matrix = embedding_parameters(config) * wide
    copies = 0 if dtype.itemsize == wide else 1 + backward
    return 3 * min(tokens, CHUNK) * config.vocab_size * wide + (copies + trained) * matrix


def largest_cells(rows: int, longest: int, most: int) -> int:
    """Cells of the largest micro-batch that `batching.cut_by_tokens` makes, padding included.

    Args:
        rows: most rows of one.
        longest: tokens of the longest row, which may stand alone above `most`.
        most: cells.
    """
    return max(longest, min(rows * longest, most))


# --------------------------------------------------------------------------------------- the plans


def heaviest(tokens: Sequence[int], rows: int) -> int:
    """Most tokens that so many examples of a file hold together."""
    return sum(sorted(tokens)[-rows:])


class PPOSettings(Protocol):
    """Those settings of `minirlhf ppo` that decide what it holds."""

    model: str
    ref: str | None
    reward: tuple[str, ...]  # each as `reward_sources.parse` takes it
    critic: str | None
    batch_size: int
    max_new_tokens: int
    rollout_batch_size: int
    mini_batches: int
    micro_batch_size: int
    micro_batch_tokens: int
    lora_rank: int
    train_critic: bool
    entropy_coef: float
    offload_frozen: bool
    gradient_checkpointing: bool
    ptx_batch_size: int
    keep_best: bool
    kl_estimator: str
    kl_in: str
    top_k: int
    top_p: float
    min_p: float


class TrainingSettings(Protocol):
    """Those of `minirlhf reward` and `minirlhf sft`."""

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


def ppo_models(settings: PPOSettings) -> PPOModels:
    """Reads their config.json; a policy with adapters is its own reference."""
    ref = settings.ref or ("" if settings.lora_rank else settings.model)
    sources = (parse(source) for source in settings.reward)

    def read(name: str) -> ModelConfig:
        return pretrained.read_config(pretrained.resolve(name, weights=False))

    return PPOModels(
        read(settings.model), read(ref) if ref else None,
        tuple(read(source.place) for source in sources if source.kind == "model"),
        read(settings.critic) if settings.critic else None,
    )  # fmt: skip


def ppo_plan(
    settings: PPOSettings, models: PPOModels, longest_prompt: int, dtype: torch.dtype, held: int,
    longest_text: int = 0,
) -> Plan:  # fmt: skip
    """Of a PPO run.

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
    drawable = settings.top_k or 0  # ids of a token's support
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
        # Ids twice, and a byte of mask and six float32 for each response token.
        Part("rollout", settings.batch_size * (16 * longest + 25 * settings.max_new_tokens),
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
    ]  # fmt: skip
    return Plan("ppo", phases, tuple(parts), held)


def _scorers(
    settings: PPOSettings, models: PPOModels, dtype: torch.dtype, phases: tuple[str, ...]
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
                             _smaller(dtype), note))  # fmt: skip
    return parts


def _full_kl(
    settings: PPOSettings, models: PPOModels, dtype: torch.dtype, tokens: int
) -> list[Part]:
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
    ]  # fmt: skip


TRAINING = ("load", "loss", "step", "evaluate", "save")


def reward_plan(
    settings: TrainingSettings, model: ModelConfig, longest: int, dtype: torch.dtype, held: int,
    held_out: int = 0, texts: int = 2, heaviest: int | None = None,
) -> Plan:  # fmt: skip
    """Of a reward model's training.

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
    ]  # fmt: skip
    return Plan("reward", TRAINING, tuple(parts), held)


def sft_plan(
    settings: TrainingSettings, model: ModelConfig, longest: int, dtype: torch.dtype, held: int,
    held_out: int = 0, heaviest: int | None = None,
) -> Plan:  # fmt: skip
    """Of supervised fine-tuning; arguments as in `reward_plan`, texts instead of pairs."""
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
    ]  # fmt: skip
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
) -> list[Part]:  # fmt: skip
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
    ]  # fmt: skip


def _exported(config: ModelConfig, count: int, dtype: torch.dtype) -> list[Part]:
    """GPT-2's matrices are transposed for its file; other models are written as they are."""
    copied = count if config.family == "gpt2" else 0
    return [_frozen("file", copied, dtype, ("save",), _smaller(dtype))]


def verdict(plan: Plan, here: Machine) -> str:
    """Whether what the plan adds to the process fits into what is free.

    Raises:
        UserError: it does not (exit code 4); names the largest part and what lowers it.
    """
    needed = plan.total(plan.peak) - plan.held
    if needed > here.free:
        part = plan.largest
        raise UserError(
            "memory", f"{plan.recipe} needs {gb(needed)} GB, {gb(here.free)} GB are free "
            f"({here.limit})",
            f"largest are the {part.name}, {gb(part.bytes)} GB: {part.lower}", MACHINE,
        )  # fmt: skip
    return f"needs {gb(needed)} GB more, {gb(here.free)} GB are free ({here.limit})"


def announce(plan: Plan, folders: Iterable[Path], dtype: torch.dtype, device: str) -> str:
    """What a run tells before it loads its models: the plan, and which folders' weights `dtype`
    rounds. Returns the verdict on what is free, errors as there."""
    print(plan)
    for line in pretrained.rounded(folders, dtype):
        print(f"warning: {line}")
    return verdict(plan, free_memory(device))
