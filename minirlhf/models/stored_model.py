"""The tensors of a model's folder under one set of names, and whether they are the model's."""

import re
from pathlib import Path

import torch
from torch import Tensor

from minirlhf.errors import UserError, printable
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import to_gpt2
from minirlhf.models.heads import RewardModel
from minirlhf.models.stored import UNKNOWN, likely_origin, read_tensors, tensor_files
from minirlhf.models.stored_heads import head_names
from minirlhf.models.transformer import CausalLM

LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d{1,9})\.")
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what weights may be
WRAPPED = "pretrained_model."  # before each name that TRL 0.x saved of its wrapper


def stored_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder under the names that transformers gives them today.

    Raises:
        UserError: a file that is not whole, or fewer layers than config.json asks for: building
            those would take long before anyone could see that they are not there.
    """
    stored = read_tensors(tensor_files(folder))
    tensors = {name.removeprefix(WRAPPED): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        what = f"holds a tensor with and without '{WRAPPED}' before its name"
        raise UserError(folder, what, "bad export?")
    if config.family == "gpt2":
        # The first files were saved from the bare trunk, without its name before each tensor.
        heads = tuple(f"{name}." for name in head_names(config.source))
        named = ("transformer.", "lm_head.", *heads)
        tensors = {n if n.startswith(named) else f"transformer.{n}": t for n, t in tensors.items()}
    layers = {match[1] for name in tensors if (match := LAYER.match(name))}
    if 0 < len(layers) < config.num_layers:
        what = f"holds {len(layers)} layers, config.json asks for {config.num_layers}"
        raise UserError(folder, what, UNKNOWN)
    return tensors


def check_tensors(
    module: CausalLM | RewardModel, tensors: dict[str, Tensor], where: Path
) -> None:
    """Raises UserError where names, shapes or dtypes are not those of the module."""
    wanted = module.state_dict()
    if module.config.family == "gpt2":
        wanted = to_gpt2(module.config, wanted)  # the names a reader finds in files
    shown = {n: f"'{printable(n, 80)}'" for n in (*wanted, *tensors)}
    problems = [f"lacks {shown[n]}" for n in wanted if n not in tensors]
    unknown = [n for n in tensors if n not in wanted]
    problems += [f"has {shown[n]}, which this architecture lacks" for n in unknown]
    problems += [
        f"{shown[n]} is {tuple(tensors[n].shape)}, config.json asks for {tuple(wanted[n].shape)}"
        for n in wanted
        if n in tensors and tensors[n].shape != wanted[n].shape
    ]
    problems += [f"{shown[n]} is {t.dtype}" for n, t in tensors.items() if t.dtype not in STORED]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(where, "; ".join(problems[:5]) + more, likely_origin(unknown))
