"""Model folders: found on this machine or fetched from the hub, and which of their files count.

Such a folder comes from somebody else. Neither pickles nor code of it are downloaded or read, no
key of it that names code is acted on, and no link leads out of it.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_json

# What makes other tools import code, from the folder or from the hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation",
             "_attn_implementation_internal", "_experts_implementation",
             "_experts_implementation_internal")
# Tensors that old checkpoints carry and no computation needs.
HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
RUN = "run.json"  # of the folder that a run writes in
ADAPTER, ADAPTER_CAP = "adapter_config.json", 1 << 20  # of PEFT; bytes
MERGE = "merge it into its model first (peft's merge_and_unload), and give the result"
WEIGHTS = "*.safetensors"
DOWNLOADED = ["*.json", WEIGHTS, "*.jinja"]  # neither pickles nor code
# The same weights once more, in another layout; of folders, additional_chat_templates is read.
NOT_DOWNLOADED = ["consolidated*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]


class AdapterFolder(type(Path())):
    """The folder of an adapter; `base` is the one of the model that it was trained on, and
    `base_name` that folder or the hub's name of it."""

    base: Path | None = None
    base_name: str = ""


def weights_of(folder: Path) -> Path:
    """The folder with the weights: of an adapter its base's."""
    return folder.base if isinstance(folder, AdapterFolder) else folder


def file_of(folder: Path, name: str) -> Path:
    """A file of a folder, or the one of an adapter's base where the adapter has none."""
    path = file_inside(folder, name)
    return path if path.exists() else file_inside(weights_of(folder), name)


def resolve(
    name: str | os.PathLike, weights: bool = True, base: str | os.PathLike | None = None
) -> Path:
    """The folder of this name, or else a download of the hub's model of this name (owner/name).

    Args:
        weights: whether a download brings them too.
        base: of an adapter, in place of the one that its adapter_config.json names.
    Raises:
        UserError: a file, no such folder, no huggingface_hub, or whatever the hub answers; an
            adapter whose base is not found.
    """
    if isinstance(name, AdapterFolder) and name.base is not None and base is None:
        return name
    folder = find(name, weights)
    if not (folder / ADAPTER).exists():
        return folder
    adapter, values = AdapterFolder(folder), read_adapter_config(folder)
    if base is None:
        adapter.base, adapter.base_name = _base(folder, values, weights)
    else:
        adapter.base = find(base, weights)
        adapter.base_name = name_of(base, adapter.base)
    if (adapter.base / ADAPTER).exists():
        raise UserError(folder, f"its base {printable(adapter.base)} is an adapter itself",
                        "merge that into its own base first: minirlhf export --merge")
    return adapter


def read_adapter_config(folder: Path) -> dict:
    """The adapter_config.json of an adapter, of a kind that is read."""
    path = file_inside(folder, ADAPTER)
    values = read_json(path, ADAPTER_CAP)
    kind = values.get("peft_type", "peft") if isinstance(values, dict) else "peft"
    if kind != "LORA":
        shown = printable(kind, 40)
        raise UserError(folder, f"holds an adapter ({shown}), which is not read", MERGE)
    return values


def name_of(given: str | os.PathLike, found: Path) -> str:
    """What others call the folder that was found for a name: the name, but of a run its model."""
    return str(found) if found.parent == Path(given) else str(given)


def _base(folder: Path, values: dict, weights: bool) -> tuple[Path, str]:
    """(folder, name) of what an adapter was trained on: the folder that its file names, seen from
    the adapter's own folder, from the working directory or from a folder around the adapter's; or a
    hub name."""
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(name, str) or not 0 < len(name) < 1024 or not name.isprintable():
        what = f"is {printable(repr(name), 80)}"
        where = f"{folder / ADAPTER}: base_model_name_or_path"
        raise UserError(where, what, "name the base with --base")
    places = [folder / name, Path(name), *(place / name for place in folder.resolve().parents)]
    if found := [model_of_run(place) for place in places if os.path.isdir(place)]:
        return found[0], str(found[0])
    if revision not in (None, "main"):
        what = f"is of revision {printable(repr(revision), 80)} of {printable(name)}"
        raise UserError(folder, what, "download that, and give its folder with --base")
    try:
        return find(name, weights), name
    except UserError as error:
        raise UserError(folder, f"its base {printable(name)}: {error.what}",
                        "give the base's folder with --base") from error


def find(name: str | os.PathLike, weights: bool = True) -> Path:
    """As `resolve`, without looking for a base."""
    folder = Path(name)
    if os.path.isdir(folder):  # pathlib fails at a name that is too long
        return model_of_run(folder)
    if os.path.exists(folder):
        raise UserError(name, "is a file", "give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(name, "no such folder", "give a model folder or a hub name (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        do = "for a hub name: pip install huggingface_hub"
        raise UserError(name, "no such folder", do) from None
    patterns = [pattern for pattern in DOWNLOADED if weights or pattern != WEIGHTS]
    try:
        return Path(snapshot_download(
            str(name), allow_patterns=patterns, ignore_patterns=NOT_DOWNLOADED
        ))
    except Exception as error:  # the hub's own errors, and those of whatever carries its requests
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"neither a local folder nor to be had from the hub ({reason})"
        raise UserError(name, what, "check the path, or the name and the network") from error


def model_of_run(folder: Path) -> Path:
    """Of a run's folder what it made: its model/, or its adapter/ where that is all; any other
    folder itself, and that of a run that has made neither."""
    if (folder / RUN).is_file() and not (folder / "config.json").exists():
        for made in (folder / "model", folder / "adapter"):
            if made.is_dir():
                _tell_of_run(made)
                return made
    return folder


@cache
def _tell_of_run(made: Path) -> None:
    print(f"note: {printable(made.parent)} is a run: {made.name}/ of it is read", file=sys.stderr)


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file of a model's folder, which no link may lead out of.

    Otherwise a folder from elsewhere could show a file of this machine as its own, and have it
    copied into what is exported. Legal are the links of the hub's cache: it keeps a model's files
    in blobs/ beside the folder of links, or those of all models in one blobs/, by their hash.

    Raises:
        UserError: the file is a link that leads elsewhere.
    """
    own, path = folder.resolve(), folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links in a circle; Python 3.13 leaves them to the reader
        real = path / name
    legal = [(own / name).parent]
    if own.parent.name == "snapshots":
        legal.append(own.parents[1] / "blobs")
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            legal.append(own.parents[1].parent / "blobs" / real.name[:2])
    if real.parent not in legal:
        raise UserError(path, "is a link to a file outside its folder", "copy the file to here")
    return path
