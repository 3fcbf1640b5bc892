"""One decoder-only transformer for Llama, Mistral, SmolLM2, Qwen2/2.5, Qwen3 and GPT-2.

Parameters carry Hugging Face's names, so a Llama-like checkpoint loads without renaming. Rows are
left-aligned (padding on the right only): under causal attention no real token ever sees a pad, so
there is no padding mask, no position offset and no pad id here. Only adapters have dropout.

Shapes: B rows, T tokens, D hidden size, H query heads, K key-value heads, E head dim, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from minirlhf.models.cache import KVCache, Packing, pack_rows
from minirlhf.models.config import ModelConfig
from minirlhf.models.dropout import Dropout
from minirlhf.models.rotary import RotaryTable, rotate

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}

MOST_ROWS = 128  # tokens; with more there is work enough for a plain product
# MKL reads weights at full speed on the processors of its own maker.
CPUS = Path("/proc/cpuinfo")
ONEDNN = torch.backends.mkldnn.is_available() and not (
    CPUS.exists() and "GenuineIntel" in CPUS.read_text(encoding="utf-8")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `F.linear`; x (…, in), weight (out, in), bias (out,) -> (…, out).

    With so little to compute as in decoding, what counts is that all threads read the weights at
    full speed. A plain product on a CPU is MKL's, which does so on Intel's alone. oneDNN's does on
    others too, from the same weights; but torch has no public name for it. It is asked for
    x (B, 1, in) alone, one token a row, on a CPU and without a gradient: the two differ in
    rounding, and whole rows must be computed alike whether they are measured or trained.
    """
    decoding = x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()
    fits = ONEDNN and x.is_cpu and x.dtype == torch.float32  # a bfloat16 product is oneDNN's anyway
    if not decoding or not fits or len(x) > MOST_ROWS:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():  # which knows it with constant weights only
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`. Only adapters have dropout (`lora.LoRALinear`)."""

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; the statistics in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # The weight comes last: as in transformers, what it multiplies is rounded to x's dtype.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps)


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
        packing: Packing | None, dropout: Dropout | None = None,
    ) -> Tensor:
        q, k, v = (layer(x, dropout) for layer in (self.q_proj, self.k_proj, self.v_proj))
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
        return self.o_proj(out if packing is None else packing.pack(out), dropout)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """One new token a row, (B, H, 1, E), against the row's own past."""
        B, H, _, E = q.shape
        K, keys, values = k.shape[1], cache.keys[self.layer], cache.values[self.layer]
        keys.view(-1, E).index_copy_(0, cache.cells, k.reshape(-1, E))
        values.view(-1, E).index_copy_(0, cache.cells, v.reshape(-1, E))
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

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        up = self.up_proj(x, dropout)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up), dropout)
        return self.down_proj(self.activation(self.gate_proj(x, dropout)) * up, dropout)


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
        packing: Packing | None, dropout: Dropout | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, packing, dropout)
        return x + self.mlp(self.post_attention_layernorm(x), dropout)


class Decoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, D), after the final norm.

    `lengths` (B,) tells where rows end: then their padding is not computed, and its states are 0;
    nor are tokens that a row has in common with the one above it, from its start on. With a
    `dropout` each row has masks of its own, and computes all its tokens.
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
        self, tokens: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        self._check(tokens, cache, lengths, dropout)
        T = tokens.shape[1]
        decoding = cache is not None and T == 1
        longest = cache.longest + 1 if decoding else T
        self.check_length(longest)
        if decoding:  # each row has a position of its own
            where = cache.lengths[:, None]
            cache.attend()
        else:
            where = torch.arange(T, device=tokens.device)
        packing = None if lengths is None else pack_rows(tokens, lengths, shared=dropout is None)
        if dropout is not None:
            dropout = dropout.of_tokens(tokens)
            if packing is not None:
                dropout = dropout._replace(keys=packing.pack(dropout.keys))
        if packing is not None:
            tokens, where = packing.pack(tokens), packing.pack(where.expand_as(tokens))
        x = self.embed_tokens(tokens)  # (B, T, D), or (n, D) where it is packed
        rope = None
        if self.rotary is None:
            x = x + self.embed_positions(where)
        else:
            cos, sin = self.rotary(longest, x)
            rope = (cos[where][:, None], sin[where][:, None]) if decoding else (cos[:T], sin[:T])
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, cache, packing, dropout, use_reentrant=False,
                               preserve_rng_state=False)
            elif cache is None:
                x = block(x, rope, None, packing, dropout)
            else:  # past what `compiling.compile_blocks` made of it: a cache changes in place
                x = block.forward(x, rope, cache, packing)
        x = self.norm(x)
        return x if packing is None else packing.unpack(x).where(packing.real[..., None], 0)

    def _check(
        self, tokens: Tensor, cache: KVCache | None, lengths: Tensor | None,
        dropout: Dropout | None,
    ) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens is {tuple(tokens.shape)}: give (B, T), rows left-aligned")
        if lengths is not None and (lengths.shape != tokens.shape[:1] or cache is not None):
            raise ValueError(
                f"lengths is {tuple(lengths.shape)}, tokens is {tuple(tokens.shape)}: give one "
                "length a row, and none beside a cache, which knows its own"
            )
        if dropout is not None and (dropout.keys.shape != tokens.shape[:1] or cache is not None):
            raise ValueError(
                f"dropout.keys is {tuple(dropout.keys.shape)}, tokens is {tuple(tokens.shape)}: "
                "give one key a row, and none in decoding"
            )
        if cache is not None and tokens.shape[1] > 1 and cache.longest > 0:
            raise ValueError("a prompt goes into an empty cache; after it, one token at a time")

    def check_length(self, length: int) -> None:
        """Raises ValueError for a row of more tokens than the model's attention or positions are
        defined for, as far as that is implemented here."""
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

    The two are apart since nobody needs the logits of a prompt, nor more of a response's than a
    log-prob a token (`logprobs.token_logprobs`).
    """

    compiles_decoding = False  # see `compiled_decoding`

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
        self, tokens: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        return self.model(tokens, cache, lengths, dropout)

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
    """Models that are built within have shapes and no weights: they are on torch's meta device.

    Initial weights are not drawn there either: for that, torch would import its compiler, 70 MB."""
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
