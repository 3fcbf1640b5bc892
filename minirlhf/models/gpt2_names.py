"""GPT-2's tensors, which have names and a layout of their own in files."""

import torch
from torch import Tensor

from minirlhf.models.config import ModelConfig


def _gpt2_names(config: ModelConfig) -> dict[str, str]:
    """Our name -> GPT-2's, for tensors that are one to one."""
    names = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.embed_positions.weight": "transformer.wpe.weight",
    }
    parts = {
        "input_layernorm": "ln_1", "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        names[f"model.norm.{kind}"] = f"transformer.ln_f.{kind}"
        for i in range(config.num_layers):
            for ours, theirs in parts.items():
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
