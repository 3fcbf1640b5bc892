"""One decoder-only transformer for Llama, Mistral, SmolLM2, Qwen2/2.5, Qwen3 and GPT-2.

Parameters carry Hugging Face's names, so a Llama-like checkpoint loads without renaming. Rows are
left-aligned (padding on the right only): under causal attention no real token ever sees a pad, so
there is no padding mask, no position offset and no pad id here. Dropout does not exist.

Shapes: B rows, T tokens, D hidden size, H query heads, K key-value heads, E head dim, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture depends on; `hf_config.config_from_hf` builds it from config.json."""

    family: str  # llama, mistral, qwen2, qwen3, gpt2: decides the names in files
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    norm: str = "rms"  # rms | layer
    activation: str = "silu"  # a key of ACTIVATIONS
    gated_mlp: bool = True
    positions: str = "rotary"  # rotary | learned
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": linear | llama3 | yarn | dynamic, ...}
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    sliding_window: int | None = None
    source: dict = field(default_factory=dict, compare=False)  # config.json as read, written back

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row it reads: its positions, or the window of its attention."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels, (E/2,) float64, and a factor on cos and sin.

    Su et al. 2021 (arXiv:2104.09864), eq. 15: theta_i = base^(-2i/E). Scaled forms: linear
    (arXiv:2306.15595), Llama 3.1's by wavelength, and YaRN (arXiv:2309.00071, sec. 3.2 and 3.4).
    """
    dim, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    freqs = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = scaling.get("rope_type", "default")
    if kind in ("default", "dynamic"):  # dynamic NTK differs only beyond max_positions
        return freqs, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return freqs / factor, 1.0
    trained = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained * freqs / (2 * math.pi)  # full turns within the trained context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / factor, 1.0

    def channel_of(turns: float) -> float:  # the pair that makes so many turns in `trained`
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel_of(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(channel_of(scaling.get("beta_slow") or 1)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1
    return (1 - ramp) * freqs + ramp * freqs / factor, attention_factor


class RotaryTable:
    """cos and sin of every position, (T, E) each: a function of the config, grown on demand."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.cos = self.sin = torch.empty(0, 0)

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.cos) < length or self.cos.dtype != like.dtype or self.cos.device != like.device:
            rows = 1 << max(length - 1, 255).bit_length()
            freqs, factor = rotary_frequencies(self.config)
            angles = torch.outer(torch.arange(rows, dtype=torch.float64), freqs)
            angles = torch.cat((angles, angles), dim=-1)  # (rows, E): halves, not interleaved
            self.cos = (angles.cos() * factor).to(like)
            self.sin = (angles.sin() * factor).to(like)
        return self.cos, self.sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i with channel i + E/2 by its position's angle; x (B, H, T, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; the statistics in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps)


class KVCache:
    """Keys and values of the tokens seen so far, for sampling. Row b holds `lengths[b]` of them.

    It starts as zeros: cells beyond a row's length are masked, but 0 x NaN would still be NaN.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor):
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.key_mask = torch.empty(0)  # (B, S) bool: what a decoding step attends to
        self.hold(torch.zeros(rows, dtype=torch.int64, device=like.device))

    def hold(self, lengths: Tensor) -> None:
        """Row b has lengths[b] tokens, (B,) int64, from now on."""
        self.lengths, self.rows = lengths, torch.arange(len(lengths), device=lengths.device)
        self.longest = int(lengths.max())  # once, since reading a number off a GPU waits for it

    def grow(self) -> None:
        """Each row has one token more."""
        self.lengths, self.longest = self.lengths + 1, self.longest + 1

    def repeat(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, (A,) int64; for several samples of one prompt."""
        for cells in (self.keys, self.values):
            for layer, cell in enumerate(cells):
                cells[layer] = cell[rows]
        self.hold(self.lengths[rows])

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, (A,) int64.

        In place, since rows end one by one: a new cache for each of them costs several decoding
        steps. The rows behind the first gap move, their cells that hold something; no memory is
        given back.
        """
        A, filled = len(rows), self.longest
        at_home = rows == self.rows[:A]
        stay = int(at_home.int().cumprod(0).sum())
        for cells in (self.keys, self.values):
            for layer, cell in enumerate(cells):
                cell[stay:A, :, :filled] = cell[rows[stay:], :, :filled]
                cells[layer] = cell[:A]
        self.hold(self.lengths[rows])


def totals(lengths: Tensor) -> tuple[int, int]:
    """(sum, longest) of (B,) lengths, in one transfer, since each one waits for a GPU."""
    cells, longest = torch.stack((lengths.sum(), lengths.max())).tolist()
    return cells, longest


class Packing:
    """Which cells of left-aligned rows hold tokens. Only attention has to know rows: all else in a
    decoder treats each token by itself, so it runs on the tokens alone and padding costs nothing.

    Args:
        lengths: (B,) tokens of each row.
        width: T.
    """

    def __init__(self, lengths: Tensor, width: int):
        columns = torch.arange(width, device=lengths.device)
        self.shape = (len(lengths), width)
        self.cells = (columns < lengths[:, None]).flatten().nonzero()[:, 0]  # (n,) of B * T

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (n, …)."""
        return x.flatten(0, 1).index_select(0, self.cells)

    def unpack(self, x: Tensor) -> Tensor:
        """(n, …) -> (B, T, …), zeros where there is no token."""
        B, T = self.shape
        return x.new_zeros(B * T, *x.shape[1:]).index_copy(0, self.cells, x).unflatten(0, (B, T))


class Attention(nn.Module):
    """Causal self-attention; groups of query heads share a key-value head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, E = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, config.num_heads * E, bias=config.qkv_bias)
        self.k_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.v_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * E, D, bias=config.out_bias)
        if config.qk_norm:  # Qwen3: over each head's channels, before the rotation
            self.q_norm = make_norm(config, E)
            self.k_norm = make_norm(config, E)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None,
        packing: Packing | None,
    ) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if packing is not None:
            q, k, v = packing.unpack(q), packing.unpack(k), packing.unpack(v)
        B, T, _ = q.shape
        H, K, E = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q, k = q.view(B, T, H, E), k.view(B, T, K, E)
        v = v.view(B, T, K, E).transpose(1, 2)  # (B, K, T, E)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, E), (B, K, T, E)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None and T == 1:
            out = self.decode(q, k, v, cache)
        else:
            if cache is not None:
                cache.keys[self.layer][:, :, :T] = k
                cache.values[self.layer][:, :, :T] = v
            if K != H:
                k, v = (kv.repeat_interleave(H // K, dim=1) for kv in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(B, T, H * E)
        return self.o_proj(out if packing is None else packing.pack(out))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """One new token a row, (B, H, 1, E), against the row's own past."""
        B, H, _, E = q.shape
        K, keys, values = k.shape[1], cache.keys[self.layer], cache.values[self.layer]
        keys[cache.rows, :, cache.lengths] = k[:, :, 0]
        values[cache.rows, :, cache.lengths] = v[:, :, 0]
        S, mask = cache.key_mask.shape[1], cache.key_mask[:, None, None]
        # The H/K query heads of a group stand where query positions stand: no copy of the keys.
        grouped = q.view(B, K, H // K, E)
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :S], values[:, :, :S], mask)
        return out.view(B, H, 1, E)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202) or, ungated, GPT-2's two layers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, I, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = Linear(D, I, bias=config.mlp_bias)
        self.down_proj = Linear(I, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None,
        packing: Packing | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, D), after the final norm.

    `lengths` (B,) tells where rows end: then their padding is not computed, and its states are 0.
    With `checkpointing` a block's activations are not kept but computed again in the backward pass
    (Chen et al. 2016, arXiv:1604.06174): a forward pass more, for one block's memory.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.rotary = RotaryTable(config) if config.positions == "rotary" else None
        self.checkpointing = False

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        if tokens.dim() != 2:
            raise ValueError(f"tokens is {tuple(tokens.shape)}: give (B, T), rows left-aligned")
        if lengths is not None and (lengths.shape != tokens.shape[:1] or cache is not None):
            raise ValueError(
                f"lengths is {tuple(lengths.shape)}, tokens is {tuple(tokens.shape)}: give one "
                "length a row, and none beside a cache, which knows its own"
            )
        T = tokens.shape[1]
        past = None if cache is None or T > 1 else cache.lengths  # decoding: own position a row
        if cache is not None and T > 1 and cache.longest > 0:
            raise ValueError("a prompt goes into an empty cache; after it, one token at a time")
        longest = T if past is None else cache.longest + 1
        self.check_length(longest)
        if past is not None:
            # for all layers, the new token included
            cache.key_mask = torch.arange(longest, device=tokens.device) <= past[:, None]
        where = torch.arange(T, device=tokens.device) if past is None else past[:, None]
        packing, rope = None, None
        cells, most = (tokens.numel(), T) if lengths is None else totals(lengths)
        if most > T:
            raise ValueError(f"a row's length is {most}, tokens has {T} columns")
        if cells < tokens.numel():
            packing = Packing(lengths, T)
            tokens, where = packing.pack(tokens), packing.pack(where.expand_as(tokens))
        x = self.embed_tokens(tokens)  # (B, T, D), or (n, D) where it is packed
        if self.rotary is None:
            x = x + self.embed_positions(where)
        else:
            cos, sin = self.rotary(longest, x)
            if past is None:
                rope = cos[:T], sin[:T]
            else:
                rope = cos[where][:, None], sin[where][:, None]
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, cache, packing, use_reentrant=False,
                               preserve_rng_state=False)
            elif cache is None:
                x = block(x, rope, None, packing)
            else:  # past what `compiling.compile_blocks` made of it: a cache changes in place
                x = block.forward(x, rope, cache, packing)
        x = self.norm(x)
        return x if packing is None else packing.unpack(x)

    def check_length(self, length: int) -> None:
        """Refuses rows whose attention or positions this model does not define here."""
        config = self.config
        if config.sliding_window is not None and length > config.sliding_window:
            raise ValueError(
                f"a row of {length} tokens is longer than the model's sliding window of "
                f"{config.sliding_window}: sliding attention is not implemented, shorten the rows"
            )
        dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
        if (self.rotary is None or dynamic) and length > config.max_positions:
            raise ValueError(
                f"a row of {length} tokens exceeds the model's {config.max_positions} positions"
            )


class CausalLM(nn.Module):
    """Decoder with an unembedding: `lm(tokens)` -> hidden (B, T, D); `lm.logits(hidden)` -> (…, V).

    The two are apart because the logits of a prompt are never needed and those of a response only
    as one log-prob each (`logprobs.token_logprobs`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding(self) -> Tensor:
        """(V, D)."""
        tied = self.config.tied_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        return self.model(tokens, cache, lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.unembedding)


class _NoInitialization(TorchFunctionMode):
    """Makes every function of `torch.nn.init` return its tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Models that are built in here have shapes and no weights, on torch's meta device. To draw
    none there is not only for speed: torch imports its compiler for it, 70 MB."""
    with torch.device("meta"), _NoInitialization():
        yield


def initialize(lm: CausalLM, rng: torch.Generator) -> CausalLM:
    """Random weights as GPT-2's (Radford et al. 2019, sec. 2.3): N(0, 0.02), residual outputs
    divided by sqrt(2 * layers), norms 1, biases 0. Returns the same model."""
    std = lm.config.source.get("initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / math.sqrt(2 * lm.config.num_layers) if residual else std
                parameter.normal_(0.0, scale, generator=rng)
    return lm

BLOCKS = 8  # of the weight's rows: fixed, so that no result depends on the number of threads
MOST_ROWS = 128  # tokens; with more there is work enough for a plain product
MOST_COLUMNS = 4  # tokens; up to so many, W x^T is faster than x W^T


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `F.linear`; x (…, in), weight (out, in), bias (out,) -> (…, out).

    Split is only x (B, 1, in), one token a row, on a CPU and without a gradient: the two products
    differ in rounding, and whole rows must be computed alike whether they are measured or trained.
    """
    decoding = x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()
    if not decoding or not x.is_cpu or len(x) > MOST_ROWS or len(weight) % BLOCKS:
        return F.linear(x, weight, bias)
    tokens = x[:, 0]
    blocks = weight.unflatten(0, (BLOCKS, -1))  # (BLOCKS, out / BLOCKS, in)
    if len(x) <= MOST_COLUMNS:
        out = torch.bmm(blocks, tokens.T.expand(BLOCKS, -1, -1)).flatten(0, 1).T
    else:
        out = torch.bmm(tokens.expand(BLOCKS, -1, -1), blocks.mT).transpose(0, 1).flatten(1)
    return (out if bias is None else out + bias)[:, None]


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
