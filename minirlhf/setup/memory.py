"""What a run will hold in memory, counted before anything is allocated.

Each part is counted from what the code allocates and lives in some phases of a run; the run needs
what its largest phase holds. Not counted: the mapped pages of a safetensors file, which the system
takes back when it needs them; scalar heads; tensors of one layer where a whole trunk is held too.
Here is what a plan is and what one tensor takes; plans.py has the plan of each recipe.

Shapes: B rows, T tokens, R of a response, D hidden size, H query heads, K key-value heads, E head
dim, I width of the MLP, V vocabulary. Sizes are in bytes; a GB is 10^9 of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from minirlhf.errors import MACHINE, UserError
from minirlhf.models.config import ModelConfig
from minirlhf.models.logprobs import CHUNK, TILE, widened
from minirlhf.models.transformer import CausalLM, shapes_only
from minirlhf.run.machine import Machine


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
        ])


def gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


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
        )
    return f"needs {gb(needed)} GB more, {gb(here.free)} GB are free ({here.limit})"


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
    """Of `add_lora`: rank (in + out) for every linear layer."""
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
