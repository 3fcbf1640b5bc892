"""Hugging Face folders in and out: config.json, safetensors (single or sharded), scalar heads.

Reading is strict both ways: a missing, extra or mis-shaped tensor is an error that names it.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.errors import MACHINE, UserError
from minirlhf.heads import RewardModel, ValueHeadModel
from minirlhf.hf_config import config_from_hf, config_to_hf
from minirlhf.lora import has_lora
from minirlhf.rows import read_json
from minirlhf.transformer import CausalLM, ModelConfig

# Tensors that old checkpoints carry and no computation needs.
HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]  # neither pickles nor code
VALUE_HEAD = {"weight": "v_head.summary.weight", "bias": "v_head.summary.bias"}  # TRL's names


def resolve(name: str | os.PathLike) -> Path:
    """The local folder, or a download of a hub name; a folder that is there asks no network."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(name, "is a file", "give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(name, "no such folder", "give a model folder or a hub name (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            name, "no such folder", "for a hub name: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's own errors, and those of whatever carries its requests
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            name,
            f"neither a local folder nor to be had from the hub ({reason})",
            "check the path, or the name and the network",
        ) from error


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(folder, "has no config.json", "give a Hugging Face model folder")
    return config_from_hf(read_json(path), path)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of its index."""
    single = folder / "model.safetensors"
    if single.is_file():  # before an index: that one may be left over from an earlier save
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = read_json(index)
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict):
            raise UserError(index, "has no weight_map", "incomplete download?")
        files = []
        for tensor, shard in shards.items():
            if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", str(shard)):
                raise UserError(index, f"'{tensor}' is in {shard!r}", "shards are plain file names")
            if not (folder / shard).is_file():
                raise UserError(index, f"'{tensor}' is in {shard}, which is missing", "download it")
            files.append(folder / shard)
        return list(dict.fromkeys(files))
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise UserError(
            folder / pickles[0], "pickle files are not read", "convert the model to safetensors"
        )
    raise UserError(folder, "has no model.safetensors", "incomplete download?")


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of these files; a name that stands twice is an error."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    if name in tensors:
                        raise UserError(path, f"'{name}' stands in two shards", "bad export?")
                    tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                path, f"not a whole safetensors file ({error})", "download again"
            ) from error
    return {name: tensor for name, tensor in tensors.items() if not HARMLESS.search(name)}


def has_tensor(files: list[Path], name: str) -> bool:
    """Whether one of these files holds a tensor, by their headers alone."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                if name in opened.keys():
                    return True
        except SafetensorError as error:
            raise UserError(
                path, f"not a whole safetensors file ({error})", "download again"
            ) from error
    return False


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
    }  # fmt: skip
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


def _stored(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder under the names that transformers gives them today."""
    tensors = read_tensors(tensor_files(folder))
    if config.family != "gpt2":
        return tensors
    # The first GPT-2 files were saved from the bare trunk, without its name before each tensor.
    named = ("transformer.", "lm_head.", "score.")
    return {n if n.startswith(named) else f"transformer.{n}": t for n, t in tensors.items()}


def _fill(
    module: CausalLM | RewardModel,
    tensors: dict[str, Tensor],
    where: Path,
    dtype: torch.dtype | None,
) -> None:
    """Moves the tensors into a module built on the meta device; names and shapes must agree."""
    gpt2 = module.config.family == "gpt2"
    wanted = module.state_dict()
    wanted = to_gpt2(module.config, wanted) if gpt2 else wanted  # the names a reader finds in files
    problems = [f"lacks '{n}'" for n in wanted if n not in tensors]
    problems += [f"has '{n}', which this architecture lacks" for n in tensors if n not in wanted]
    problems += [
        f"'{n}' is {tuple(tensors[n].shape)}, config.json asks for {tuple(wanted[n].shape)}"
        for n in wanted
        if n in tensors and tensors[n].shape != wanted[n].shape
    ]
    problems += [f"'{n}' is {t.dtype}" for n, t in tensors.items() if not t.is_floating_point()]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            where, "; ".join(problems[:5]) + more, "incomplete download, or another model's config?"
        )
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if dtype is None and len(kinds) > 1:
        raise UserError(where, f"mixes {' and '.join(kinds)}", "choose one dtype")
    tensors = from_gpt2(module.config, tensors) if gpt2 else tensors
    # Copied out of the mapped file: its addresses are unaligned, and the last bit of a matrix
    # product depends on alignment, so a model read from another file would differ by rounding.
    rows = torch.contiguous_format
    as_asked = {
        n: t.to(dtype or t.dtype, copy=True, memory_format=rows) for n, t in tensors.items()
    }
    module.load_state_dict(as_asked, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


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
    config = read_config(folder)
    tensors = _stored(folder, config)
    if "score.weight" in tensors:
        raise UserError(folder, "is a reward model, not a language model", "give it as --reward")
    if config.tied_embeddings and "lm_head.weight" in tensors:
        stored = tensors.pop("lm_head.weight")
        gpt2 = config.family == "gpt2"
        embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
        if not torch.equal(stored, tensors.get(embedding, stored)):
            raise UserError(
                folder,
                "'lm_head.weight' differs from the embedding it is tied to",
                "set tie_word_embeddings to false in config.json",
            )
    with torch.device("meta"):
        lm = CausalLM(config)
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
    config = read_config(folder)
    tensors = _stored(folder, config)
    if "score.weight" not in tensors:
        raise UserError(
            folder,
            "has no 'score.weight': not a reward model",
            "train one with `minirlhf reward`, or give a folder with a score head",
        )
    if tensors["score.weight"].shape[:1] != (1,):
        raise UserError(
            folder,
            f"'score.weight' is {tuple(tensors['score.weight'].shape)}",
            "a reward model has one output: shape (1, hidden_size)",
        )
    with torch.device("meta"):
        model = RewardModel(CausalLM(config), bool(config.source.get("read_before_eos", False)))
    _fill(model, tensors, folder, dtype)
    return model.to(device or "cpu")


def save_pretrained(
    model: CausalLM | ValueHeadModel | RewardModel,
    folder: str | os.PathLike,
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
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if isinstance(model, RewardModel):
        base = re.sub(r"(ForCausalLM|LMHeadModel)$", "", config["architectures"][0])
        config["architectures"] = [base + "ForSequenceClassification"]
        config |= {
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
            "problem_type": "regression",  # else vLLM puts a sigmoid on the score
            "read_before_eos": model.read_before_eos,
        }  # fmt: skip
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
