"""What a folder is that is no model: a checkpoint, the weights of another library."""

import re
from pathlib import Path

from minirlhf.errors import UserError, printable
from minirlhf.files.folders import ADAPTER, MERGE

WHOLE = "give a Hugging Face folder, with config.json and model.safetensors"
CONVERT = "convert the model to safetensors: transformers' from_pretrained, then save_pretrained"
# What a name in the folder tells, and what to do.
FOREIGN = (
    (r"optimizer\.safetensors|step-\d{8,}", "holds checkpoints of a run",
     "give the run's folder model or best; to go on with the run, give it --resume"),
    (r".*\.gguf", "holds GGUF weights, which are not read",
     "give the Hugging Face folder that they were made from"),
    (r"consolidated.*|params\.json", "is in the layout of Meta or Mistral, which is not read",
     "give the model in the layout of transformers"),
    (r"tf_model.*\.h5|flax_model.*\.msgpack|.*\.onnx|.*\.ckpt.*|model\.nemo|weights\.npz",
     "holds weights of another library, which are not read", WHOLE),
    (r"zero_to_fp32\.py|global_step\d+", "is a checkpoint of DeepSpeed",
     "run its zero_to_fp32.py with --safe_serialization, and give the result with its config.json"),
    (r"pytorch_model_fsdp_\d+|.*\.distcp|.*_rank_\d+\.pt", "is a checkpoint in shards of FSDP",
     "merge them first, as `accelerate merge-weights` does"),
    (r"model-\d+-of-\d+\.safetensors", "holds shards without model.safetensors.index.json",
     "download that, too"),
)
STATE = r"(training_args|optimizer|scheduler|scaler|rng_state\w*|value_head)\.\w+"  # no weights
PICKLES = (".bin", ".pt", ".pth")


def no_model(folder: Path, lack: UserError) -> UserError:
    """Why a folder is not read as a model: `lack`, or what the folder is instead."""
    if not folder.is_dir():
        return lack
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return UserError(folder, "is an empty folder", WHOLE)
    if found := [name for name in names if re.fullmatch(r"adapter_model\..*", name)]:
        do = f"download that, too, or {MERGE}"
        return UserError(folder, f"holds an adapter ({found[0]}) without {ADAPTER}", do)
    if "config.json" in names and {"model.safetensors", "model.safetensors.index.json"} & {*names}:
        return lack
    for pattern, what, do in FOREIGN:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return UserError(folder, f"{what} ({printable(found[0], 80)})", do)
    for name in names:
        if Path(name).suffix in PICKLES and not re.fullmatch(STATE, name):
            return UserError(folder / name, "pickle files are not read", CONVERT)
    if inner := _models_inside(folder):
        given = f"give {printable(inner[0])}"
        more = f", or another of its {len(inner)}" if len(inner) > 1 else ""
        return UserError(folder, "holds models, and is none itself", given + more)
    if "run.json" in names:
        return UserError(folder, "is a run that has not ended", "go on with --resume, or write the "
                         f"model of its checkpoint: minirlhf export {printable(folder)} --merge")
    return lack


def _models_inside(folder: Path) -> list[Path]:
    """Folders in it that hold a model or an adapter: a run's own first, then the latest."""
    found = {
        path.parent for name in ("config.json", ADAPTER)
        for level in ("*", "snapshots/*") for path in folder.glob(f"{level}/{name}")
    }

    def order(path: Path) -> tuple:
        return path.name != "model", [-int(n) for n in re.findall(r"\d+", path.name)], path.name

    return sorted(found, key=order)
