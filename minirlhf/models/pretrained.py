"""Hugging Face folders in and out: language models and reward models.

Reading is strict both ways: a missing, extra or mis-shaped tensor is an error that names it.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.errors import MACHINE, UserError, printable
from minirlhf.files.folders import file_inside, resolve
from minirlhf.files.reading import read_json
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf, config_to_hf, from_gpt2, to_gpt2
from minirlhf.models.heads import (
    REWARD_KEYS,
    RewardModel,
    ValueHeadModel,
    reward_keys,
    reward_model_of,
)
from minirlhf.models.lora import has_lora
from minirlhf.models.stored import JSON_CAP, read_tensors, tensor_files
from minirlhf.models.transformer import CausalLM, shapes_only

LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d{1,9})\.")
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what weights may be
VALUE_HEAD = {"weight": "v_head.summary.weight", "bias": "v_head.summary.bias"}  # TRL's names


def read_config(folder: Path) -> ModelConfig:
    """The sizes and switches of a folder's model."""
    path = file_inside(folder, "config.json")
    if not path.exists():
        raise UserError(folder, "has no config.json", "give a Hugging Face model folder")
    return config_from_hf(read_json(path, JSON_CAP), path)


def rounded(folders: Iterable[Path], dtype: torch.dtype) -> list[str]:
    """A warning for each folder whose weights lose digits in `dtype`: what fine-tuning added to a
    weight is often less than half a step of bfloat16."""
    name = str(dtype).removeprefix("torch.")
    return [
        f"{folder}: weights are rounded to {name}, which can undo fine-tuning"
        for folder in dict.fromkeys(folders)
        if any(
            t.dtype.is_floating_point and torch.finfo(t.dtype).eps < torch.finfo(dtype).eps
            for t in read_tensors(tensor_files(folder)).values()
        )
    ]


def stored_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder under the names that transformers gives them today.

    Raises:
        UserError: a file that is not whole, or fewer layers than config.json asks for: building
            those would take long before anyone could see that they are not there.
    """
    tensors = read_tensors(tensor_files(folder))
    if config.family == "gpt2":
        # The first files were saved from the bare trunk, without its name before each tensor.
        named = ("transformer.", "lm_head.", "score.")
        tensors = {n if n.startswith(named) else f"transformer.{n}": t for n, t in tensors.items()}
    layers = {match[1] for name in tensors if (match := LAYER.match(name))}
    if 0 < len(layers) < config.num_layers:
        what = f"holds {len(layers)} layers, config.json asks for {config.num_layers}"
        raise UserError(folder, what, "incomplete download, or another model's config?")
    return tensors


def _check(module: CausalLM | RewardModel, tensors: dict[str, Tensor], where: Path) -> None:
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
        raise UserError(
            where, "; ".join(problems[:5]) + more, "incomplete download, or another model's config?"
        )


def _fill(
    module: CausalLM | RewardModel, tensors: dict[str, Tensor], where: Path,
    dtype: torch.dtype | None,
) -> None:
    """Puts tensors that `_check` let pass into a module that is on the meta device."""
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if dtype is None and len(kinds) > 1:
        raise UserError(where, f"mixes {' and '.join(kinds)}", "choose one dtype")
    _check_memory(tensors, where, dtype)
    if module.config.family == "gpt2":
        tensors = from_gpt2(module.config, tensors)
    # Copied out of the mapped file: its addresses are unaligned, and the last bit of a matrix
    # product depends on alignment, so the same weights from another file would round otherwise.
    rows = torch.contiguous_format
    as_asked = {
        n: t.to(dtype or t.dtype, copy=True, memory_format=rows) for n, t in tensors.items()
    }
    module.load_state_dict(as_asked, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _check_memory(tensors: dict[str, Tensor], where: Path, dtype: torch.dtype | None) -> None:
    """A file may claim more than it stores: its holes take no disk, but their copies memory."""
    needed = sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > held:
        what = f"weights of {needed:,} bytes, this machine has {held:,}"
        raise UserError(where, what, "choose a smaller model, or dtype bfloat16", MACHINE)


def without_weights(folder: str | os.PathLike, reward: bool = False) -> CausalLM | RewardModel:
    """The model of a folder without its weights, on the meta device; only headers are read.

    Raises:
        UserError: whatever `load_pretrained` or, with `reward`, `load_reward_model` would refuse
            before it reads a weight.
    """
    module, _, _ = _described(resolve(folder), reward)
    return module


def _described(
    folder: Path, reward: bool
) -> tuple[CausalLM | RewardModel, dict[str, Tensor], Tensor | None]:
    """(model on the meta device, its tensors as mapped files, a stored unembedding beside a tied
    embedding or None); names and shapes are right."""
    config = read_config(folder)
    tensors, stored = stored_tensors(folder, config), None
    score = tensors.get("score.weight")
    if score is not None and not reward:
        raise UserError(folder, "is a reward model, not a language model",
                        "give the language model; ppo takes a reward model as its reward")
    if score is None and reward:
        raise UserError(
            folder, "has no 'score.weight': not a reward model",
            "train one with `minirlhf reward`, or give a folder with a score head",
        )
    with shapes_only():
        module: CausalLM | RewardModel = CausalLM(config)
        if reward:
            module = reward_model_of(module, score, folder)
    if config.tied_embeddings and not reward:
        stored = tensors.pop("lm_head.weight", None)
    _check(module, tensors, folder)
    return module, tensors, stored


def load_pretrained(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, device: str | None = None
) -> CausalLM:
    """A causal language model from a Hugging Face folder (or hub name).

    Args:
        folder: config.json and model.safetensors, single or sharded with an index.
        dtype: of the parameters; None keeps the file's.
        device: None is the CPU.
    Raises:
        UserError: naming the file and the tensor or key that is wrong.
    """
    folder = resolve(folder)
    lm, tensors, stored = _described(folder, reward=False)
    if stored is not None:
        gpt2 = lm.config.family == "gpt2"
        embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
        tied = tensors.get(embedding, stored)
        if stored.dtype != tied.dtype or not torch.equal(stored, tied):
            raise UserError(
                folder, "'lm_head.weight' differs from the embedding it is tied to",
                "set tie_word_embeddings to false in config.json",
            )
    _fill(lm, tensors, folder, dtype)
    return lm.to(device or "cpu")


def load_reward_model(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, device: str | None = None
) -> RewardModel:
    """A reward model saved by `save_pretrained` or as Hugging Face's …ForSequenceClassification.

    Raises:
        UserError: as `load_pretrained`; also for a folder without a score head.
    """
    folder = resolve(folder)
    model, tensors, _ = _described(folder, reward=True)
    _fill(model, tensors, folder, dtype)
    return model.to(device or "cpu")


def offload(model: CausalLM | RewardModel, folder: Path) -> None:
    """Frees the memory of a frozen model. It can be used within `in_memory` only, then.

    Args:
        folder: that it was loaded from; it is read from there again, so its files must not change.
    """
    first = next(model.parameters())
    model.origin = folder, first.device, first.dtype
    model.to("meta")


@contextmanager
def in_memory(*models: CausalLM | RewardModel) -> Iterator[None]:
    """Reads those of the models that were offloaded, and frees them again at its end."""
    away = [model for model in models if next(model.parameters()).is_meta]
    try:
        for model in away:
            _refill(model, *model.origin)
        yield
    finally:
        for model in away:
            model.to("meta")


def _refill(
    model: CausalLM | RewardModel, folder: Path, device: torch.device, dtype: torch.dtype
) -> None:
    # A function of its own, so that no file stays mapped while the next is read.
    _, tensors, _ = _described(folder, isinstance(model, RewardModel))
    _fill(model, tensors, folder, dtype)
    model.to(device).requires_grad_(False)


def save_pretrained(
    model: CausalLM | ValueHeadModel | RewardModel, folder: str | os.PathLike,
    pad_token_id: int | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers loads to the same numbers.

    A value head goes into value_head.safetensors beside the language model, under TRL's names.

    Args:
        model: its dtype is the file's.
        folder: made where missing; files of the same name are replaced.
        pad_token_id: written to config.json; a reward model needs one so that other tools find the
            last real token of a padded row.
    """
    if has_lora(model):
        raise ValueError("the model has adapters: call merge_lora(model) before saving it")
    if isinstance(model, ValueHeadModel) and model.critic is not None:
        raise ValueError("the critic has a trunk of its own: save the policy, model.lm")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lm = model.lm if isinstance(model, ValueHeadModel) else model
    tensors = {n: t.detach().cpu() for n, t in lm.state_dict().items()}
    if lm.config.family == "gpt2":
        tensors = to_gpt2(lm.config, tensors)
    config = config_to_hf(lm.config)
    dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")
    config |= {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5, and for 4
    if isinstance(model, RewardModel):
        base = re.sub(r"(ForCausalLM|LMHeadModel)$", "", config["architectures"][0])
        config["architectures"] = [base + "ForSequenceClassification"]
        config = {k: v for k, v in config.items() if k not in REWARD_KEYS} | reward_keys(model)
    if pad_token_id is not None:
        config["pad_token_id"] = pad_token_id
    try:
        contiguous = {n: t.contiguous() for n, t in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        if isinstance(model, ValueHeadModel):
            head = {VALUE_HEAD[n]: t.detach().cpu() for n, t in model.v_head.state_dict().items()}
            save_file(head, folder / "value_head.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(folder, f"cannot be written ({error})", "disk full?", MACHINE) from error
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
