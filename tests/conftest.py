"""Tiny random models as transformers makes them: the other side of every comparison."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's library when it is first imported
torch.set_num_threads(1)

SHAPE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}
ROPE = {
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 48},
}


def rope(kind: str, theta: float = 10000.0, **more: float) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **ROPE[kind], **more}}


# name -> model_type, what differs from SHAPE
PEERS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama-linear": ("llama", rope("linear")),
    "llama-llama3": ("llama", rope("llama3", 500.0)),
    "llama-yarn": ("llama", rope("yarn")),
    "llama-yarn-given": ("llama", rope("yarn", attention_factor=1.5, beta_fast=2.0, beta_slow=0.5)),
    "llama-dynamic": ("llama", rope("dynamic")),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
}
EACH_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def make_peer(name: str, head: str, **changes: object) -> torch.nn.Module:
    """transformers' own model, every parameter random: norms and biases too."""
    import transformers

    family, differs = PEERS[name]
    values = {**SHAPE, **differs, **changes}
    if family == "gpt2":
        renamed = {
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
        }
        values = {renamed.get(k, k): v for k, v in values.items() if k != "num_key_value_heads"}
        values |= {"tie_word_embeddings": True, "resid_pdrop": 0.1}
    config = transformers.AutoConfig.for_model(family, **values)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0
            parameter.normal_(centre, 0.2, generator=rng)
    return model


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """peer(name) -> (transformers' causal language model, the folder it saved itself to)."""
    made = {}

    def of(name: str):
        if name not in made:
            model = make_peer(name, "CausalLM")
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return of
