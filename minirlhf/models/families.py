"""config.json <-> ModelConfig: which models run here, and which settings would change them; also
the names and the layout that GPT-2's tensors have in files.

Keys that this code does not know are carried through unread; keys that it knows to change the
computation in a way it does not implement are refused by name. Keys that name code for other tools
to run are neither acted on nor carried on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf.errors import UserError, printable
from minirlhf.files.folders import CODE_KEYS
from minirlhf.models.config import ModelConfig

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# Settings that change the computation: the only values that are implemented.
FIXED = {
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "add_cross_attention": (False, None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, None),  # float32 attention scores in half precision only
}
QUANTISED = ("quantization_config", "quantization", "compression_config")  # MLX has the second
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
LARGEST = 1e30  # of a number; its inverse and its products with sizes are finite, too
GPT2_PARTS = {  # of a block: our name -> GPT-2's
    "input_layernorm": "ln_1", "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
}
YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor")  # each may be absent


class _Reader:
    """Typed look-ups in config.json; an error names the file and the key."""

    def __init__(self, values: dict, where: Path | str):
        self.values, self.where = values, where

    def fail(self, key: str, got: Any, legal: str):
        raise UserError(f"{self.where}: {key}", f"is {printable(repr(got), 80)}", legal)

    def integer(self, key: str, default: int | None = None, most: int = 2**20) -> int:
        """The cap stops absurd sizes before they fill memory or overflow an element count."""
        got = self.values.get(key)
        got = default if got is None else got
        if type(got) is not int or not 1 <= got <= most:
            self.fail(key, got, f"must be an integer from 1 to {most}")
        return got

    def number(self, key: str, default: float) -> float:
        got = self.values.get(key)
        got = default if got is None else got
        if type(got) not in (int, float) or not 1 / LARGEST < got < LARGEST:
            self.fail(key, got, "must be a positive number")
        return float(got)

    def flag(self, key: str, default: bool) -> bool:
        got = self.values.get(key)
        got = default if got is None else got
        if type(got) is not bool:
            self.fail(key, got, "must be true or false")
        return got

    def activation(self, key: str, default: str) -> str:
        got = self.values.get(key) or default
        if got not in tuple(ACTIVATION_NAMES):  # a tuple also answers for a list or an object
            self.fail(key, got, f"supported: {', '.join(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[got]


def _rope(read: _Reader, max_positions: int) -> tuple[float, dict | None]:
    """Theta and scaling, in the older spelling (rope_theta, rope_scaling) or rope_parameters; where
    both stand there, transformers takes what the older says of scaling, unless it says nothing."""
    spelling = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    scaling = read.values.get(spelling)
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
        read.fail(spelling, scaling, "must be one object, the same for all layers")
    inner = _Reader(scaling, f"{read.where}: {spelling}")
    theta = inner.number("rope_theta", read.number("rope_theta", 10000.0))
    if theta <= 1:  # YaRN divides by its logarithm
        (inner if "rope_theta" in scaling else read).fail("rope_theta", theta, "must be above 1")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in tuple(ROPE_NEEDS):
        inner.fail("rope_type", kind, f"supported: {', '.join(ROPE_NEEDS)}")
    if inner.number("partial_rotary_factor", 1.0) != 1.0:
        inner.fail("partial_rotary_factor", scaling["partial_rotary_factor"], "supported: 1.0")
    if kind == "default":
        return theta, None
    for key in ROPE_NEEDS[kind]:
        if scaling.get(key) is None:
            inner.fail(key, None, f"rope_type {kind} needs it")
    keys = ("factor", "low_freq_factor", "high_freq_factor", *YARN_NUMBERS)
    numbers = {key: inner.number(key, 1.0) for key in keys}
    numbers = {key: value for key, value in numbers.items() if scaling.get(key) is not None}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        inner.fail("low_freq_factor", scaling["low_freq_factor"], "must be below high_freq_factor")
    for key in ("mscale", "mscale_all_dim"):
        if scaling.get(key):
            inner.fail(key, scaling[key], "YaRN with mscale is not implemented")
    if scaling.get("truncate") is False:
        inner.fail("truncate", False, "YaRN without truncate is not implemented")
    before = inner.integer("original_max_position_embeddings", max_positions, 2**31)
    if kind in ("llama3", "yarn"):  # transformers 4 needs it of the first
        numbers["original_max_position_embeddings"] = before
    kept = {key: value for key, value in scaling.items() if key not in ("type", "rope_theta")}
    return theta, kept | {"rope_type": kind} | numbers  # floats: torch takes no integer of 10^30


def _sliding_window(read: _Reader, family: str) -> int | None:
    layers = read.values.get("layer_types")
    if not isinstance(layers, list | None):
        read.fail("layer_types", layers, "must be a list")
    if layers is not None and "sliding_attention" not in layers:
        return None
    if family.startswith("qwen") and layers is None and not read.flag("use_sliding_window", False):
        return None
    window = read.values.get("sliding_window", 4096)  # the default of each family that has one
    return None if window is None else read.integer("sliding_window", window, 2**31)


def config_from_hf(values: dict, where: Path | str = "config.json") -> ModelConfig:
    """ModelConfig of a parsed config.json.

    Raises:
        UserError: an architecture, activation, rope form or value that is not supported, by key.
    """
    if not isinstance(values, dict):
        raise UserError(where, f"is a {type(values).__name__}", "must be a JSON object")
    read = _Reader(values, where)
    family = values.get("model_type")
    if family not in tuple(FAMILIES):
        read.fail("model_type", family, f"supported: {', '.join(FAMILIES)}")
    for key in QUANTISED:
        if values.get(key) is not None:
            read.fail(key, values[key], "quantised weights are not read: give those before")
    for key, legal in FIXED.items():
        if values.get(key, legal[0]) not in legal:
            read.fail(key, values[key], f"not implemented; supported: {legal[0]}")
    if "initializer_range" in values and values["initializer_range"] is None:
        read.fail("initializer_range", None, "must be a positive number, or left out")
    read.number("initializer_range", 0.02)
    vocab = read.integer("vocab_size", most=2**31)
    if family == "gpt2":
        hidden, heads = read.integer("n_embd"), read.integer("n_head")
        _check_heads(read, hidden, heads, heads, None)
        return ModelConfig(
            family=family, vocab_size=vocab, hidden_size=hidden,
            intermediate_size=read.integer("n_inner", 4 * hidden),
            num_layers=read.integer("n_layer", most=1024), num_heads=heads, num_kv_heads=heads,
            head_dim=hidden // heads, max_positions=read.integer("n_positions", most=2**31),
            norm_eps=read.number("layer_norm_epsilon", 1e-5), norm="layer",
            activation=read.activation("activation_function", "gelu_new"), gated_mlp=False,
            positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
            tied_embeddings=read.flag("tie_word_embeddings", True), source=values,
        )
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    head_dim = values.get("head_dim")
    if head_dim is None and family == "qwen3":
        head_dim = 128  # Qwen3Config's default, whatever the hidden size
    _check_heads(read, hidden, heads, kv_heads, head_dim)
    max_positions = read.integer("max_position_embeddings", most=2**31)
    theta, scaling = _rope(read, max_positions)
    attention_bias = read.flag("attention_bias", False)
    return ModelConfig(
        family=family, vocab_size=vocab, hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers", most=1024),
        num_heads=heads, num_kv_heads=kv_heads,
        head_dim=read.integer("head_dim", head_dim or hidden // heads), max_positions=max_positions,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        activation=read.activation("hidden_act", "silu"), rope_theta=theta, rope_scaling=scaling,
        # Qwen2 always has biases on q, k, v; Llama and Qwen3 have them on all four when asked.
        qkv_bias=family == "qwen2" or (attention_bias and family != "mistral"),
        out_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=family == "llama" and read.flag("mlp_bias", False),
        qk_norm=family == "qwen3", tied_embeddings=read.flag("tie_word_embeddings", False),
        sliding_window=None if family == "llama" else _sliding_window(read, family), source=values,
    )


def _check_heads(read: _Reader, hidden: int, heads: int, kv_heads: int, head_dim: int | None):
    if head_dim is None and hidden % heads:
        read.fail("hidden_size", hidden, f"must be a multiple of the {heads} attention heads")
    if heads % kv_heads:
        read.fail("num_key_value_heads", kv_heads, f"must divide the {heads} attention heads")
    per_head = hidden // heads if head_dim is None else read.integer("head_dim", head_dim)
    if "n_embd" not in read.values and per_head % 2:
        read.fail("head_dim", per_head, "must be even: rotary positions turn pairs of channels")


def config_to_hf(config: ModelConfig) -> dict:
    """The config.json of a causal language model: the one it was read from, less `CODE_KEYS`.

    Rotary settings stand in it twice: transformers 4 would take rope_parameters for nothing.
    """
    if config.source.get("model_type") != config.family:
        raise ValueError("a ModelConfig made by hand has no config.json: use config_from_hf")
    kept = {key: value for key, value in config.source.items() if key not in CODE_KEYS}
    if config.positions == "rotary":
        theta, scaling = {"rope_theta": config.rope_theta}, config.rope_scaling
        newer = theta | (scaling or {"rope_type": "default"})
        kept |= theta | {"rope_scaling": scaling, "rope_parameters": newer}
    return {**kept, "architectures": [FAMILIES[config.family]]}


def name_eos(config: ModelConfig, eos_ids: Sequence[int]) -> None:
    """Makes config.json name these: one as a number, several as a list; none change nothing."""
    if eos_ids:
        config.source["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)


def stored_layer(config: ModelConfig, name: str) -> str:
    """What files call a linear layer of the decoder; query, key and value are one in GPT-2's."""
    if config.family != "gpt2":
        return f"model.{name}"
    _, block, part = name.split(".", 2)
    return f"transformer.h.{block}.{GPT2_PARTS.get(part, 'attn.c_attn')}"


def _gpt2_names(config: ModelConfig) -> dict[str, str]:
    """Our name -> GPT-2's, for tensors that are one to one."""
    names = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.embed_positions.weight": "transformer.wpe.weight",
    }
    for kind in ("weight", "bias"):
        names[f"model.norm.{kind}"] = f"transformer.ln_f.{kind}"
        for i in range(config.num_layers):
            for ours, theirs in GPT2_PARTS.items():
                names[f"model.layers.{i}.{ours}.{kind}"] = f"transformer.h.{i}.{theirs}.{kind}"
    return names


def from_gpt2(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 keeps weights transposed ("Conv1D") and query, key and value fused."""
    tensors, out = dict(tensors), {}
    for ours, theirs in _gpt2_names(config).items():
        tensor = tensors.pop(theirs)
        out[ours] = tensor.t() if "_proj.weight" in ours else tensor
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            fused = tensors.pop(f"transformer.h.{i}.attn.c_attn.{kind}")
            for part, tensor in zip("qkv", fused.chunk(3, dim=-1), strict=True):
                out[f"model.layers.{i}.self_attn.{part}_proj.{kind}"] = tensor.t()
    return {**out, **tensors}


def to_gpt2(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_gpt2`."""
    tensors, out = dict(tensors), {}
    for ours, theirs in _gpt2_names(config).items():
        tensor = tensors.pop(ours)
        out[theirs] = tensor.t() if "_proj.weight" in ours else tensor
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"model.layers.{i}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            out[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat([p.t() for p in parts], dim=-1)
    return {**out, **tensors}
