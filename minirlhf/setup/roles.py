"""Which models of a run lie over one set of frozen weights: policy, reference, reward, critic.

Adapters leave their base as it is. So with --lora-rank a reference that is this base is a tree of
modules over the policy's own frozen weights (`lora.base_of`).
"""

from pathlib import Path

import torch
from torch import nn

from minirlhf.files.folders import resolve
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel
from minirlhf.models.lora import Model, add_lora, base_of
from minirlhf.models.transformer import CausalLM
from minirlhf.setup.groups import TrainingSettings


def shares_trunk(config: TrainingSettings, policy: Path, folder: Path) -> bool:
    """Whether a frozen model of a run lies over the policy's frozen weights.

    Args:
        policy, folder: of both models.
    """
    return bool(config.lora_rank) and policy.resolve() == folder.resolve()


def with_adapters(config: TrainingSettings, model: Model) -> Model:
    """The model with new adapters, as --lora-* ask for."""
    return add_lora(model, config.lora_rank, config.lora_alpha, config.seed)


def load_trained(
    config: TrainingSettings, folder: str | Path, dtype: torch.dtype, device: str | None = None
) -> CausalLM:
    """The language model that a run trains, with adapters if they are asked for."""
    lm = pretrained.load_pretrained(resolve(folder), dtype, device, config.trunk_bits)
    return with_adapters(config, lm) if config.lora_rank else lm


def load_trained_scorer(
    config: TrainingSettings, folder: Path, dtype: torch.dtype
) -> RewardModel:
    """As `load_trained`, of a reward model."""
    model = pretrained.load_reward_model(folder, dtype, trunk_bits=config.trunk_bits)
    return with_adapters(config, model) if config.lora_rank else model


def load_reference(
    config: TrainingSettings, policy: CausalLM, start: Path, folder: Path, dtype: torch.dtype,
    device: str,
) -> CausalLM:
    """The frozen reference, over the policy's weights where it can be.

    Args:
        policy: with its adapters.
        start, folder: of the policy, and of the reference.
    """
    if shares_trunk(config, start, folder):
        return base_of(policy)
    return pretrained.load_pretrained(folder, dtype, device).requires_grad_(False)


def share_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether both hold a parameter that is the same tensor."""
    return bool({id(p) for p in model.parameters()} & {id(p) for p in other.parameters()})
