"""The models of a run, and which of them lie over one set of frozen weights.

Adapters leave their base as it is. So with --lora-rank all models whose folders are the policy's
base or adapters of it, be they reference, reward model or critic, are trees of modules over the
policy's own frozen weights (`lora.base_of`). Whether two bases are one is told by where they lie.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minirlhf.errors import UserError
from minirlhf.files.folders import AdapterFolder, resolve, weights_of
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel
from minirlhf.models.lora import Model, adapters, add_lora, base_of
from minirlhf.models.peft_files import load_adapter, read_adapter
from minirlhf.models.transformer import CausalLM
from minirlhf.setup.groups import TrainingSettings


def shares_trunk(
    config: TrainingSettings, policy: Path, folder: Path, reward: bool = False
) -> bool:
    """Whether another model of a run lies over the policy's frozen weights.

    Args:
        policy, folder: of both models.
        reward: whether it is a reward model: of these, only an adapter leaves its base as it was.
    """
    one = weights_of(policy).resolve() == weights_of(folder).resolve()
    return bool(config.lora_rank) and one and (isinstance(folder, AdapterFolder) or not reward)


def one_trunk(
    config: TrainingSettings, policy: Path, folder: Path, reward: bool = False
) -> bool:
    """Whether such a model takes no memory beside the policy; fsdp shards each by itself."""
    return config.parallel != "fsdp" and shares_trunk(config, policy, folder, reward)


def trunk_facts(
    config: TrainingSettings, policy: Path, ref: Path | None = None, scorers: Sequence[Path] = (),
    critic: Sequence[Path] = (),
) -> dict[str, str]:
    """What is told of adapters that go on being trained, and of models that share weights."""
    told, roles = {}, [("reference", ref is not None and one_trunk(config, policy, ref))]
    if config.lora_rank and isinstance(policy, AdapterFolder):
        told["adapters"] = f"those of {policy} are trained on, with their own alpha and layers"
    for name, folders in ("reward model", scorers), ("critic", critic):
        roles += [(name, one_trunk(config, policy, each, reward=True)) for each in folders]
    if shared := dict.fromkeys(name for name, shares in roles if shares):
        told["one set of weights for"] = ", ".join(["policy", *shared])
    return told


def with_adapters(config: TrainingSettings, model: Model) -> Model:
    """The model with new adapters, as --lora-* ask for."""
    return add_lora(model, config.lora_rank, config.lora_alpha, config.seed, config.lora_targets,
                    config.rslora, config.dora)


def goes_on(config: TrainingSettings, model: Model, folder: AdapterFolder) -> Model:
    """The base with the adapters of a folder, which are trained on.

    Raises:
        UserError: they have another rank than --lora-rank, or are of another kind than a setting
            asks for.
    """
    load_adapter(model, folder)
    layers = list(adapters(model).values())
    asked = {
        "lora_targets": config.lora_targets != ("all",),
        "rslora": config.rslora and not all(layer.rslora for layer in layers),
        "dora": config.dora and not all(layer.magnitude is not None for layer in layers),
    }
    for name in (name for name, differs in asked.items() if differs):
        what = f"goes with new adapters; those of {folder} are trained on as they are"
        raise UserError(f"--{name.replace('_', '-')}", what, "leave it out")
    ranks = sorted({len(layer.lora_A) for layer in layers})
    if ranks != [config.lora_rank]:
        has = ", ".join(map(str, ranks))
        do = f"give --lora-rank {has}" if len(ranks) == 1 else "merge it: minirlhf export --merge"
        raise UserError("--lora-rank", f"is {config.lora_rank}, the adapter {folder} has {has}", do)
    return model


def load_trained(
    config: TrainingSettings, folder: str | Path, dtype: torch.dtype, device: str | None = None
) -> CausalLM:
    """The language model that a run trains. With --lora-rank, its adapters are new or those of its
    folder; without, those are merged into their base, and all weights are trained."""
    folder = resolve(folder)
    if config.lora_rank and isinstance(folder, AdapterFolder):
        base = pretrained.load_pretrained(folder.base, dtype, device, config.trunk_bits)
        return goes_on(config, base, folder)
    lm = pretrained.load_pretrained(folder, dtype, device, config.trunk_bits)
    return with_adapters(config, lm) if config.lora_rank else lm


def load_trained_scorer(
    config: TrainingSettings, folder: Path, dtype: torch.dtype
) -> RewardModel:
    """As `load_trained`, of a reward model."""
    if config.lora_rank and isinstance(folder, AdapterFolder):
        base = pretrained.load_pretrained(folder.base, dtype, trunk_bits=config.trunk_bits)
        return goes_on(config, _with_heads(base, folder), folder)
    model = pretrained.load_reward_model(folder, dtype, trunk_bits=config.trunk_bits)
    return with_adapters(config, model) if config.lora_rank else model


def _with_heads(base: CausalLM, folder: AdapterFolder) -> RewardModel:
    """A reward model with as many heads as the adapter brings; `load_adapter` brings them."""
    return RewardModel(base, heads=len(read_adapter(folder).head))


def load_reference(
    config: TrainingSettings, policy: CausalLM, start: Path, folder: Path, dtype: torch.dtype,
    device: str,
) -> CausalLM:
    """The frozen reference, over the policy's weights where it can be.

    Args:
        policy: with its adapters.
        start, folder: of the policy, and of the reference.
    """
    if not shares_trunk(config, start, folder):
        return pretrained.load_pretrained(folder, dtype, device).requires_grad_(False)
    ref, adapted = _base(config, policy, folder, dtype, device), isinstance(folder, AdapterFolder)
    return load_adapter(ref, folder, trainable=False) if adapted else ref


def load_scorer(
    config: TrainingSettings, policy: CausalLM | None, start: Path, folder: Path,
    dtype: torch.dtype, device: str, trainable: bool = False,
) -> RewardModel:
    """A reward model, or what a critic begins as; over the policy's weights where it can be.
    Arguments as of `load_reference`; policy: None where `shares_trunk` is not true."""
    if shares_trunk(config, start, folder, reward=True):
        base = _base(config, policy, folder, dtype, device)
        return load_adapter(_with_heads(base, folder), folder, trainable)
    model = pretrained.load_reward_model(folder, dtype, device)
    return model.requires_grad_(trainable and not config.lora_rank)


def _base(
    config: TrainingSettings, policy: CausalLM, folder: Path, dtype: torch.dtype, device: str
) -> CausalLM:
    """The policy's base over the same weights; of its own with fsdp, which shards a tree of modules
    by itself."""
    if config.parallel == "fsdp":
        lm = pretrained.load_pretrained(weights_of(folder), dtype, device)
        return lm.requires_grad_(False)
    return base_of(policy)


def share_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether both hold a parameter that is the same tensor."""
    return bool({id(p) for p in model.parameters()} & {id(p) for p in other.parameters()})
