"""The score or value head of a folder, under the names of whoever saved it.

    transformers            score.weight          in place of the language model's head
    OpenRLHF                value_head.weight, or the name in config.json's value_head_prefix
    TRL 0.x, LLaMA-Factory  v_head.summary.weight and .bias, beside the language model: among its
                            tensors, or in value_head.safetensors
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.errors import UserError
from minirlhf.models.config import ModelConfig
from minirlhf.models.stored import UNKNOWN

VALUE_HEAD = "v_head.summary"  # a folder that has it is a language model, too
HEADS = ("score", "value_head", VALUE_HEAD)


class Head(NamedTuple):
    """A linear layer on the last hidden states.

    Attributes:
        name: of its tensors in the file, without ".weight".
        weight: (heads, D) as stored.
        bias: of a single head; 0 where none is stored.
    """

    name: str
    weight: Tensor
    bias: float


def head_names(source: dict) -> tuple[str, ...]:
    """What a head may be called, by config.json."""
    prefix = source.get("value_head_prefix")
    is_name = isinstance(prefix, str) and re.fullmatch(r"\w{1,80}", prefix) and prefix != "lm_head"
    return tuple(dict.fromkeys((*HEADS, prefix))) if is_name else HEADS


def name_of_head(names: Iterable[str], source: dict, folder: Path) -> str | None:
    """Which head is among tensors of these names; None for a language model alone.

    Raises:
        UserError: several.
    """
    held = set(names)
    found = [name for name in head_names(source) if f"{name}.weight" in held]
    if len(found) > 1:
        what = f"holds '{found[0]}.weight' and '{found[1]}.weight'"
        raise UserError(folder, what, "a reward model has one head: remove the other")
    return found[0] if found else None


def take_head(tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> Head | None:
    """The head among these tensors, of which it is removed; None where there is none.

    Raises:
        UserError: several; one that does not fit the model; a bias of several outputs.
    """
    name = name_of_head(tensors, config.source, folder)
    if name is None:
        return None
    weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
    fits = weight.dim() == 2 and weight.shape[1] == config.hidden_size
    if not fits or (name == VALUE_HEAD and len(weight) != 1):
        legal = f"config.json asks for (1, {config.hidden_size})"
        raise UserError(folder, f"'{name}.weight' is {tuple(weight.shape)}, {legal}", UNKNOWN)
    if not weight.is_floating_point():
        raise UserError(folder, f"'{name}.weight' is {weight.dtype}", UNKNOWN)
    if bias is None:
        return Head(name, weight, 0.0)
    if bias.numel() != 1 or not bias.is_floating_point():
        what = f"'{name}.bias' is {tuple(bias.shape)}, {bias.dtype}"
        raise UserError(folder, what, "a single number is read: the bias of one output")
    if not torch.isfinite(bias).all():
        raise UserError(folder, f"'{name}.bias' is {bias.item()}", "the training diverged")
    return Head(name, weight, bias.item())
