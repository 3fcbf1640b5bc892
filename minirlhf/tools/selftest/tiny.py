"""A tiny model and what it reads, the same to the last bit on every machine.

No generator of torch is asked, whose numbers differ from device to device: weights and ids are
those of `streams`, which computes with integers. A weight has six binary digits, so that bfloat16
holds it exactly too: what differs there is computation alone.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf import streams
from minirlhf.batches.rollouts import Rollout
from minirlhf.data.examples import Pair, Prompt, Text
from minirlhf.models.alignment import pad_right
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.transformer import CausalLM

WORDS = 258  # ids: those of a tokenizer of bytes
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": SHAPE | {"model_type": "llama"},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 64},
}


class Place(NamedTuple):
    """Where is computed, and how."""

    device: str
    dtype: torch.dtype
    folder: Path  # a temporary one


def fill(module: nn.Module, stream: str) -> None:
    """Gives each parameter numbers of its own: 1 ± 1/4 of norms, ± 1 of embeddings, ± 1/4 else."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = streams.key(0, f"selftest {stream} {name}")
            share = streams.uniform(key, torch.arange(parameter.numel()))  # (numel,) in [0, 1)
            even = ((share * 64).floor() - 32) / 32  # -1, …, 31/32
            if "norm" in name and not name.endswith("bias"):
                even = 1 + even / 4
            elif not ("embed" in name or "lm_head" in name or "score" in name):
                even = even / 4
            parameter.copy_(even.view_as(parameter))


def language_model(place: Place, family: str = "llama", stream: str = "policy") -> CausalLM:
    """The weights are made on the CPU, and moved."""
    lm = CausalLM(config_from_hf(FAMILIES[family]))
    fill(lm, stream)
    return lm.to(device=place.device, dtype=place.dtype)


def value_head_model(place: Place, stream: str = "policy") -> ValueHeadModel:
    policy = ValueHeadModel(language_model(place, stream=stream))
    fill(policy.v_head, stream)
    return policy


def reward_model(place: Place) -> RewardModel:
    model = RewardModel(language_model(place))
    fill(model.score, "score")
    return model


# --------------------------------------------------------------------------------------------- data


def ids(stream: str, count: int) -> list[int]:
    share = streams.uniform(streams.key(0, f"selftest {stream}"), torch.arange(count))
    return (share * WORDS).long().tolist()


def texts() -> list[Text]:
    """Of several lengths, one without a prompt."""
    sizes = ((9, 3), (5, 0), (14, 5), (7, 2))
    return [Text(ids(f"text {n}", length), prompt, "", {})
            for n, (length, prompt) in enumerate(sizes)]


def pairs() -> list[Pair]:
    sizes = ((3, 4, 6), (5, 7, 2), (2, 5, 5))
    return [Pair(*(ids(f"pair {n} {part}", length) for part, length in enumerate(each)), 0.25 * n,
                 "", {}) for n, each in enumerate(sizes)]


def prompts(count: int = 8) -> list[Prompt]:
    return [Prompt(ids(f"prompt {n}", 2 + n % 4), str(n), "", {}) for n in range(count)]


def rollout(place: Place) -> Rollout:
    """Two responses to each of two prompts, of several lengths, with scores."""
    starts, sizes = [ids("start 0", 3)] * 2 + [ids("start 1", 2)] * 2, torch.tensor([5, 3, 6, 2])
    rows = [start + ids(f"response {n}", int(size))
            for n, (start, size) in enumerate(zip(starts, sizes, strict=True))]
    made = Rollout(
        rows=torch.arange(4), tokens=pad_right(rows),
        prompt_lengths=torch.tensor([len(start) for start in starts]),
        response_mask=torch.arange(6) < sizes[:, None], scores=torch.tensor([0.5, -1, 0.25, 1.5]),
    )
    return Rollout(*(x if x is None else x.to(place.device) for x in made))


def offsets(stream: str, rows: Tensor, columns: int) -> Tensor:
    """(b, R) in [-1/2, 1/2), each of a row of the rollout and a column."""
    keys = streams.key(0, f"selftest {stream}", rows.cpu())[:, None]
    return (streams.uniform(keys, torch.arange(columns)) - 0.5).float().to(rows.device)
