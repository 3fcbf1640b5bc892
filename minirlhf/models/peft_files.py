"""Adapters as PEFT's folders: adapter_config.json, and in adapter_model.safetensors

    base_model.model.<layer>.lora_A.weight           (rank, in)
                            .lora_B.weight           (out, rank)
                            .lora_magnitude_vector   (out,)      with DoRA
    base_model.model.score.weight                    (1, D)      the head of a reward model

where <layer> is transformers' name of a linear layer. GPT-2 has one layer c_attn where three are
here. Read, its A serves query, key and value, and B's rows are split. Written, three adapters are
one whose A stands in for all of them, exactly:

    c_attn = [q; k; v]:   A = [A_q; A_k; A_v]   (3 rank, in)    B = diag(B_q, B_k, B_v)

The header of the tensors' file says two things more, which other tools pass over: a fingerprint of
the base, and of a reward model how its score is read.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf import streams
from minirlhf.errors import UserError, printable
from minirlhf.files.atomic import check_finite, write_json, write_tensors
from minirlhf.files.folders import ADAPTER, file_inside, find, read_adapter_config
from minirlhf.files.reading import strict_json
from minirlhf.models.families import stored_layer
from minirlhf.models.fingerprint import fingerprint
from minirlhf.models.heads import REWARD_KEYS, RewardModel, reward_keys, reward_model_of
from minirlhf.models.logprobs import widened
from minirlhf.models.lora import LoRALinear, Model, adapters, has_lora, trunk_of
from minirlhf.models.peft_config import AdapterConfig, config_from_peft, config_to_peft
from minirlhf.models.stored import read_metadata, read_tensors
from minirlhf.models.stored_heads import Head
from minirlhf.models.transformer import CausalLM, Decoder, shapes_only

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX, SCORE = "base_model.model.", "base_model.model.score.weight"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, (A, B, MAGNITUDE)))})")
POSITION_KEYS = ("read_before_eos", "score_position", "pad_token_id")
OTHER_BASE = "give the base that it was trained on, with --base"


class Adapter(NamedTuple):
    """What a folder holds, read but not yet put on a model.

    Attributes:
        layers: transformers' name of a layer -> end of a tensor's name -> tensor.
        head: (heads, D), of a reward model.
        fingerprint: of the base; None where the file does not say.
        reward: keys of config.json that say how a reward model's score is read.
    """

    folder: Path
    config: AdapterConfig
    layers: dict[str, dict[str, Tensor]]
    head: Tensor | None
    fingerprint: str | None
    reward: dict


# ------------------------------------------------------------------------------------------- read


def read_adapter(folder: Path) -> Adapter:
    """An adapter's folder, checked as far as it can be without its base.

    Raises:
        UserError: naming the file, and the key or tensor that is wrong.
    """
    config = config_from_peft(read_adapter_config(folder), folder / ADAPTER)
    path = file_inside(folder, TENSORS)
    if not path.exists():
        if (folder / PICKLE).exists():
            do = f"peft writes {TENSORS}: PeftModel.from_pretrained, then save_pretrained"
            raise UserError(folder / PICKLE, "pickle files are not read", do)
        raise UserError(folder, f"has no {TENSORS}", "incomplete download?")
    tensors, metadata = read_tensors([path]), read_metadata(path)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        shown = f"'{printable(name, 80)}'"
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise UserError(path, f"{shown} is {tensor.dtype}", "floating-point numbers are read")
        if not tensor.isfinite().all():
            raise UserError(path, f"{shown} holds numbers that are not finite",
                            "the training diverged: take an earlier checkpoint")
        if match := KEY.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif name != SCORE:
            raise UserError(path, f"has {shown}, which is no adapter of a linear layer",
                            "merge it with peft (merge_and_unload), and give the result")
    if not layers:
        raise UserError(path, "holds no adapter", "incomplete download?")
    wanted = {A, B, MAGNITUDE} if config.dora else {A, B}
    for layer, parts in layers.items():
        if parts.keys() != wanted:
            odd = printable(f"{PREFIX}{layer}.{min(parts.keys() ^ wanted)}", 120)
            what = f"lacks '{odd}'" if wanted - parts.keys() else f"has '{odd}'"
            raise UserError(path, what, f"{ADAPTER} says use_dora is {str(config.dora).lower()}")
    reward = metadata.get("reward")
    reward = {} if reward is None else strict_json(reward, path)
    if not isinstance(reward, dict) or reward.keys() - {*REWARD_KEYS, *POSITION_KEYS}:
        raise UserError(path, "has a header that is not as a save writes it", "bad export?")
    head = tensors.get(SCORE)
    return Adapter(folder, config, layers, head, metadata.get("base_fingerprint"), reward)


def check_role(adapter: Adapter, is_reward: bool) -> None:
    """Refuses the adapter of a reward model on a language model, and the reverse."""
    if is_reward and adapter.head is None:
        what = "is an adapter without 'score.weight': the head of its reward model would be random"
        raise UserError(adapter.folder, what, 'save it with modules_to_save ["score"]')
    if not is_reward and adapter.head is not None:
        raise UserError(adapter.folder, "is a reward model's adapter, not a language model's",
                        "give the language model's; ppo takes a reward model as its reward")


def _split(parts: dict[str, Tensor], pieces: int) -> list[dict[str, Tensor]]:
    """The adapter of a layer that is `pieces` layers here, for each: exactly as it was before
    `_fused` where B is block-diagonal; else A serves all."""
    down, ups = parts[A], parts[B].chunk(pieces)
    blocks = torch.stack(ups).unflatten(2, (pieces, -1)) if len(down) % pieces == 0 else None
    apart = blocks is not None and all(
        not blocks[i, :, j].any() for i in range(pieces) for j in range(pieces) if i != j)
    split = [{A: down.chunk(pieces)[i] if apart else down,
              B: blocks[i, :, i] if apart else up} for i, up in enumerate(ups)]
    if MAGNITUDE in parts:
        for piece, magnitude in zip(split, parts[MAGNITUDE].chunk(pieces), strict=True):
            piece[MAGNITUDE] = magnitude
    return split


def _alpha(alpha: float, before: int, rank: int, rslora: bool) -> float:
    """The alpha that scales a rank as `alpha` scales the rank before."""
    return alpha * math.sqrt(rank / before) if rslora else alpha * rank / before


def _stored_layers(trunk: Decoder) -> dict[str, list[str]]:
    """Transformers' name of each linear layer -> ours, several where it is one in files."""
    names: dict[str, list[str]] = {}
    for name, module in trunk.named_modules():
        is_layer = hasattr(module, "in_features") and not name.endswith(".base")
        if is_layer or isinstance(module, LoRALinear):
            names.setdefault(stored_layer(trunk.config, name), []).append(name)
    return names


def check_fit(model: Model, adapter: Adapter) -> None:
    """Raises UserError where tensors do not fit the base's layers, or are not all there.

    Args:
        model: the base; no weight is read, so it may be on the meta device.
    """
    where, config, trunk = adapter.folder / TENSORS, adapter.config, trunk_of(model)
    names = _stored_layers(trunk)
    for name, parts in adapter.layers.items():
        if name not in names:
            do = "adapters of linear layers are read; of another base? give that with --base"
            raise UserError(where, f"adapts '{printable(name, 80)}', which its base lacks", do)
        layers = [trunk.get_submodule(own) for own in names[name]]
        rank, height = config.rank(name), sum(layer.out_features for layer in layers)
        wanted = {A: (rank, layers[0].in_features), B: (height, rank), MAGNITUDE: (height,)}
        for end, tensor in parts.items():
            if tensor.shape != wanted[end]:
                raise UserError(where, f"'{PREFIX}{name}.{end}' is {tuple(tensor.shape)}, its base "
                                f"and rank {rank} ask for {wanted[end]}", OTHER_BASE)
    if lost := [n for n in names if n not in adapter.layers and config.asks_for(n)]:
        what = f"lacks '{PREFIX}{lost[0]}.{A}', which {ADAPTER} asks for"
        raise UserError(where, what, "incomplete? or give another base, with --base")
    if isinstance(model, RewardModel) and adapter.head.shape != model.score.weight.shape:
        shape = tuple(model.score.weight.shape)
        what = f"'{SCORE}' is {tuple(adapter.head.shape)}, the model asks for {shape}"
        raise UserError(where, what, OTHER_BASE)


def put_adapter(model: Model, adapter: Adapter, dtype: torch.dtype | None = None) -> Model:
    """Puts an adapter that was read on a model, in place, frozen; see `load_adapter`.

    Args:
        dtype: of A, B and m; None is the layer's own.
    """
    if has_lora(model):
        raise ValueError("the model has adapters already: call merge_lora before adding new ones")
    check_role(adapter, isinstance(model, RewardModel))
    check_fit(model, adapter)
    trunk, config = trunk_of(model), adapter.config
    if adapter.fingerprint not in (None, fingerprint(trunk)):
        what = "was trained on another base: the weights of this one differ"
        raise UserError(adapter.folder, what, OTHER_BASE)
    names = _stored_layers(trunk)
    model.requires_grad_(False)
    for stored, parts in adapter.layers.items():
        own = names[stored]
        pieces = _split(parts, len(own)) if len(own) > 1 else [parts]
        for name, piece in zip(own, pieces, strict=True):
            rank = len(piece[A])
            alpha = _alpha(config.alpha(stored), len(parts[A]), rank, config.rslora)
            rng = streams.generator(0, f"lora {name}")
            base = trunk.get_submodule(name)
            layer = LoRALinear(base, rank, alpha, rng, config.rslora, config.dora)
            like = {"dtype": dtype or layer.lora_A.dtype, "device": layer.lora_A.device}
            layer.lora_A, layer.lora_B = (nn.Parameter(piece[e].to(**like)) for e in (A, B))
            if config.dora:
                layer.magnitude = nn.Parameter(piece[MAGNITUDE].to(**like))
            trunk.set_submodule(name, layer.requires_grad_(False))
    if isinstance(model, RewardModel):
        with torch.no_grad():
            model.score.weight.copy_(adapter.head)
    return model


def _read_as_saved(model: RewardModel, adapter: Adapter) -> None:
    """Lets a reward model read its score as the one that was saved."""
    with shapes_only():
        lm = CausalLM(model.config)
    lm.config.source.update(adapter.reward)
    saved = reward_model_of(lm, Head("score", adapter.head, 0.0), adapter.folder)
    for name in ("unread", "whole", "lcb_coef", "reward_mean", "reward_std"):
        setattr(model, name, getattr(saved, name))


def load_adapter(model: Model, folder: str | os.PathLike, trainable: bool = True) -> Model:
    """Puts the adapters of a PEFT folder on a model that they were trained on, in place, unmerged.

    Args:
        model: the base: policy, policy with critic or reward model; it is frozen.
        folder: with adapter_config.json and adapter_model.safetensors; or a hub name.
        trainable: whether the adapters, and a scalar head, are trained on.
    Returns:
        The same model. Adapters have the dtype of their layer.
    Raises:
        UserError: a kind of adapter that is not read, by name; damaged or incomplete tensors; the
            adapter of another base, by its fingerprint or by shapes; of a reward model on a
            language model, or the reverse.
        ValueError: the model has adapters already.
    """
    adapter = read_adapter(find(folder))
    put_adapter(model, adapter)
    if isinstance(model, RewardModel):
        _read_as_saved(model, adapter)
    for layer in adapters(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(trainable)
    for head in ("v_head", "score"):
        if hasattr(model, head):
            getattr(model, head).requires_grad_(trainable)
    return model


# ------------------------------------------------------------------------------------------ write


def _fused(trunk: Decoder, names: list[str], has: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """The tensors of one layer that is several here; A once where it is the same for all."""
    layers = [has[name] for name in names if name in has]
    first, wide = layers[0], widened(layers[0].lora_A.dtype)
    shared = len(layers) == len(names) and all(
        torch.equal(layer.lora_A, first.lora_A) for layer in layers)
    downs = [first.lora_A] if shared else [layer.lora_A for layer in layers]
    out, at = {A: torch.cat(downs)}, 0
    ups, magnitudes = [], []
    for name in names:
        plain = trunk.get_submodule(name)
        height = len(plain.lora_B) if name in has else plain.out_features
        up = plain.lora_B if name in has else first.lora_B.new_zeros(height, 0)
        block = up.new_zeros(height, len(out[A]))
        at = 0 if shared else at
        # One alpha and one rank scale all blocks: where they differ, the block makes up for it.
        scale = plain.scaling / first.scaling if name in has else 1.0
        block[:, at : at + up.shape[1]] = up if scale == 1.0 else (up.to(wide) * scale).to(up)
        ups, at = [*ups, block], at + up.shape[1]
        if first.magnitude is not None:
            length = plain.weight.to(wide).norm(dim=1) if name not in has else plain.magnitude
            magnitudes.append(length.to(first.magnitude))
    out[B] = torch.cat(ups)
    return out | ({MAGNITUDE: torch.cat(magnitudes)} if magnitudes else {})


def _tensors(layer: LoRALinear) -> dict[str, Tensor]:
    tensors = {A: layer.lora_A, B: layer.lora_B}
    return tensors if layer.magnitude is None else {**tensors, MAGNITUDE: layer.magnitude}


def adapter_tensors(
    trunk: Decoder
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, float]], set[str]]:
    """(layer -> its tensors, layer -> rank and alpha, layers without), in transformers' names."""
    has, names = adapters(trunk), _stored_layers(trunk)
    tensors, kinds = {}, {}
    for stored, own in names.items():
        if layers := [has[name] for name in own if name in has]:
            first = layers[0]
            tensors[stored] = _tensors(first) if len(own) == 1 else _fused(trunk, own, has)
            rank = len(tensors[stored][A])
            alpha = _alpha(first.alpha, len(first.lora_A), rank, first.rslora)
            kinds[stored] = rank, alpha
    return tensors, kinds, names.keys() - tensors.keys()


def save_adapter(
    model: Model, folder: str | os.PathLike, base_name: str, dropout: float = 0.0,
    pad_token_id: int | None = None,
) -> None:
    """Writes the adapters of a model as PEFT's folder, and of a reward model its head.

    Args:
        model: policy, policy with critic (whose head is left out) or reward model.
        folder: made where missing; files of the same name are replaced.
        base_name: folder or hub name of the base, by which others find it.
        dropout: that it was trained with; told, and of no effect on what it computes.
        pad_token_id: of a reward model, as `save_pretrained` takes it.
    Raises:
        ValueError: the model has no adapters, or rsLoRA or DoRA on some only.
        UserError: a number is not finite.
    """
    has = adapters(model)
    kinds = {(layer.rslora, layer.magnitude is not None) for layer in has.values()}
    if len(kinds) != 1:
        what = "no adapters: call add_lora first" if not has else "adapters of several kinds"
        raise ValueError(f"the model has {what}")
    trunk, is_reward, folder = trunk_of(model), isinstance(model, RewardModel), Path(folder)
    layers, ranks, others = adapter_tensors(trunk)
    named = {f"{PREFIX}{n}.{end}": t for n, parts in layers.items() for end, t in parts.items()}
    metadata = {"base_fingerprint": fingerprint(trunk)}
    if is_reward:
        named[SCORE] = model.score.weight
        keys = {k: v for k, v in reward_keys(model).items() if k in (*REWARD_KEYS, *POSITION_KEYS)}
        pad = {} if pad_token_id is None else {"pad_token_id": pad_token_id}
        metadata["reward"] = json.dumps(keys | pad)
    check_finite(folder, named)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, named, metadata)
    rslora, dora = kinds.pop()
    transposed = trunk.config.family == "gpt2"
    write_json(folder / ADAPTER, config_to_peft(
        base_name, ranks, others, rslora, dora, dropout, transposed, is_reward))
