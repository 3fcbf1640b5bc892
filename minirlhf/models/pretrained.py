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
from torch import Tensor, nn

from minirlhf.console import progress
from minirlhf.errors import MACHINE, UserError
from minirlhf.files.atomic import check_finite
from minirlhf.files.fingerprint import fingerprint_of
from minirlhf.files.folders import AdapterFolder, file_inside, resolve, weights_of
from minirlhf.files.foreign import no_model
from minirlhf.files.reading import check_unchanged, read_json
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf, config_to_hf, from_gpt2, to_gpt2
from minirlhf.models.heads import (
    REWARD_KEYS,
    RewardModel,
    ValueHeadModel,
    reward_keys,
    reward_model_of,
)
from minirlhf.models.logprobs import widened
from minirlhf.models.lora import has_lora, merge_lora
from minirlhf.models.peft_files import TENSORS, check_fit, check_role, put_adapter, read_adapter
from minirlhf.models.quantized import pack, quantize_trunk, quantized_layers
from minirlhf.models.stored import (
    JSON_CAP,
    VALUE_FILE,
    read_tensors,
    tensor_files,
    tensor_names,
)
from minirlhf.models.stored_heads import VALUE_HEAD, Head, name_of_head, take_head
from minirlhf.models.stored_model import STORED, check_tensors, stored_tensors
from minirlhf.models.transformer import CausalLM, shapes_only


def read_config(folder: Path) -> ModelConfig:
    """The sizes and switches of a folder's model; of an adapter's those of its base."""
    folder = resolve(folder)
    if isinstance(folder, AdapterFolder):
        config = read_config(folder.base)
        config.source.update(read_adapter(folder).reward)
        return config
    path = file_inside(folder, "config.json")
    if not path.exists():
        lack = UserError(folder, "has no config.json", "give a Hugging Face model folder")
        raise no_model(folder, lack)
    return config_from_hf(read_json(path, JSON_CAP), path)


def stored_head(folder: Path) -> str | None:
    """What the head of a folder's reward model is called; None for a language model alone."""
    folder = resolve(folder)
    if isinstance(folder, AdapterFolder):
        return "score" if read_adapter(folder).head is not None else stored_head(folder.base)
    config = read_config(folder)
    return name_of_head(tensor_names(tensor_files(folder)), config.source, folder)


def remarks(folders: Iterable[Path], dtype: torch.dtype) -> list[str]:
    """What is to be told of folders that are read in `dtype`: of weights that lose digits, since
    what fine-tuning added to one is often less than half a step of bfloat16, and of what is left
    out."""
    name, told = str(dtype).removeprefix("torch."), []
    for given in dict.fromkeys(map(resolve, folders)):
        folder, adapter = weights_of(given), {}
        source, tensors = read_config(folder).source, read_tensors(tensor_files(folder))
        if folder is not given:  # what it adds is lost as easily
            adapter = read_tensors([given / TENSORS])
        if any(
            t.dtype in STORED and torch.finfo(t.dtype).eps < torch.finfo(dtype).eps
            for t in (*tensors.values(), *adapter.values())
        ):
            told.append(f"{given}: weights are rounded to {name}, which can undo fine-tuning")
        head = name_of_head(tensors, source, folder)
        if head == VALUE_HEAD:
            told.append(f"{folder}: a language model with a value head, from which a reward model "
                        "and ppo's critic are read; all else leaves it out")
        elif head is not None and "lm_head.weight" in tensors:
            told.append(f"{folder}: 'lm_head.weight' is left out: scores do not depend on it")
        if head is not None and "mean" in source and not source.get("normalize_reward"):
            told.append(f"{folder}: config.json's mean and std are left out: normalize_reward is "
                        "not true in it")
    return told


def _load(
    module: CausalLM | RewardModel, tensors: dict[str, Tensor], folder: Path,
    dtype: torch.dtype | None, trunk_bits: int,
) -> None:
    """Fills a module with what `_described` gave, and merges into it what an adapter adds."""
    if not isinstance(folder, AdapterFolder):
        return _fill(module, tensors, folder, dtype, trunk_bits)
    _fill(module, tensors, folder.base, dtype)
    wide = widened(next(module.parameters()).dtype)
    merge_lora(put_adapter(module, read_adapter(folder), wide))
    if trunk_bits:
        quantize_trunk(module, trunk_bits)
    return None


def _fill(
    module: CausalLM | RewardModel, tensors: dict[str, Tensor], where: Path,
    dtype: torch.dtype | None, trunk_bits: int = 0,
) -> None:
    """Puts checked tensors into a module that is on the meta device. The linear layers of its trunk
    are packed into `trunk_bits` one by one, so that the memory never holds more than one of them in
    full; 0: none is."""
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if dtype is None and len(kinds) > 1:
        raise UserError(where, f"mixes {' and '.join(kinds)}", "choose one dtype")
    dtype = dtype or getattr(torch, kinds[0])
    module.to(dtype)
    layers = quantize_trunk(module, trunk_bits) if trunk_bits else {}
    packed = {f"{name}.weight": name for name in layers}
    _check_memory(module, where)
    if module.config.family == "gpt2":
        tensors = from_gpt2(module.config, tensors)
    if packed:
        module.model.fingerprint = fingerprint_of({
            n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    # Copied out of the mapped file: its addresses are unaligned, and the last bit of a matrix
    # product depends on alignment, so the same weights from another file would round otherwise.
    rows = torch.contiguous_format
    as_asked = {}
    for name, stored in progress(tensors.items(), "load", unit=" tensors"):
        tensor = stored.to(dtype, copy=True, memory_format=rows)
        if name not in packed:
            as_asked[name] = tensor
            continue
        try:
            buffers = pack(tensor, trunk_bits)
        except ValueError as error:
            raise UserError(where, f"'{name}': {error}", "damaged weights?") from error
        as_asked |= {f"{packed[name]}.{n}": buffer for n, buffer in buffers.items()}
    module.load_state_dict(as_asked, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _check_memory(module: nn.Module, where: Path) -> None:
    """A file may claim more than it stores: its holes take no disk, but their copies memory."""
    needed = sum(t.nbytes for t in module.state_dict().values())
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
    embedding or None); names and shapes are right. Of an adapter, those of its base."""
    config, weights, adapter = read_config(folder), weights_of(folder), None
    tensors, stored = stored_tensors(weights, config), None
    head = take_head(tensors, config, weights)
    if weights is not folder:
        adapter = read_adapter(folder)
        check_role(adapter, reward)
        if reward:  # in the dtype of its base, with which it is loaded
            head = Head("score", adapter.head.to(next(iter(tensors.values()))), 0.0)
    if head is not None and head.name != VALUE_HEAD and not reward:
        raise UserError(weights, "is a reward model, not a language model",
                        "give the language model; ppo takes a reward model as its reward")
    if head is None and reward:
        raise _no_head(folder)
    with shapes_only():
        module: CausalLM | RewardModel = CausalLM(config)
        if reward:
            module = reward_model_of(module, head, folder)
    if reward:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = head.weight
    elif config.tied_embeddings:
        stored = tensors.pop("lm_head.weight", None)
    check_tensors(module, tensors, folder)
    if adapter is not None:
        check_fit(module, adapter)
    return module, tensors, stored


def _no_head(folder: Path) -> UserError:
    pickle = folder / "value_head.bin"
    if pickle.exists():
        do = f"save its tensors as {VALUE_FILE}: torch.load, then safetensors.torch.save_file"
        return UserError(pickle, "pickle files are not read", do)
    return UserError(folder, "has no 'score.weight': not a reward model",
                     "train one with `minirlhf reward`, or give a folder with a score head")


def load_pretrained(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, device: str | None = None,
    trunk_bits: int = 0,
) -> CausalLM:
    """A causal language model from a Hugging Face folder (or hub name).

    Args:
        folder: config.json and model.safetensors, single or sharded with an index; or an adapter of
            PEFT, which is merged into its base (`folders.resolve` says where that is looked for).
        dtype: of the parameters; None keeps the file's, of an adapter its base's: in bfloat16 much
            of what it adds is rounded away.
        device: None is the CPU.
        trunk_bits: 8 or 4 packs the trunk's linear layers, to be frozen under adapters, as in
            `quantized`; 0 does not.
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
    _load(lm, tensors, folder, dtype, trunk_bits)
    return lm.to(device or "cpu")


def load_reward_model(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, device: str | None = None,
    trunk_bits: int = 0,
) -> RewardModel:
    """A reward model saved by `save_pretrained`, as Hugging Face's …ForSequenceClassification, or
    with the head of TRL, LLaMA-Factory or OpenRLHF.

    Raises:
        UserError: as `load_pretrained`; also for a folder without a score head.
    """
    folder = resolve(folder)
    model, tensors, _ = _described(folder, reward=True)
    _load(model, tensors, folder, dtype, trunk_bits)
    return model.to(device or "cpu")


def load_value_head(model: ValueHeadModel, folder: str | os.PathLike) -> None:
    """Starts a critic from the value head that TRL or LLaMA-Factory left beside its policy; without
    one in the folder, nothing changes."""
    folder = weights_of(resolve(folder))
    config = read_config(folder)
    head = take_head(stored_tensors(folder, config), config, folder)
    if head is not None:
        with torch.no_grad():
            model.v_head.weight.copy_(head.weight)
            model.v_head.bias.fill_(head.bias)


def offload(model: CausalLM | RewardModel, folder: Path) -> None:
    """Frees the memory of a frozen model. It can be used within `in_memory` only, then.

    Args:
        folder: that it was loaded from; it is read from there again. A file that was written since
            is a UserError then.
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
    own = [folder / TENSORS] if isinstance(folder, AdapterFolder) else []
    for path in (*tensor_files(weights_of(folder)), *own):
        check_unchanged(path)
    _, tensors, _ = _described(folder, isinstance(model, RewardModel))
    bits = next((layer.bits for layer in quantized_layers(model).values()), 0)
    _load(model, tensors, folder, dtype, bits)
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
    if quantized_layers(model):
        raise ValueError("the trunk is quantised, and no tool reads these files: save its adapters")
    if isinstance(model, ValueHeadModel) and model.critic is not None:
        raise ValueError("the critic has a trunk of its own: save the policy, model.lm")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lm = model.lm if isinstance(model, ValueHeadModel) else model
    tensors = {n: t.detach().cpu() for n, t in lm.state_dict().items()}
    check_finite(folder, tensors)
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
            head = model.v_head.state_dict()
            head = {f"{VALUE_HEAD}.{n}": t.detach().cpu() for n, t in head.items()}
            save_file(head, folder / VALUE_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(folder, f"cannot be written ({error})", "disk full?", MACHINE) from error
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
