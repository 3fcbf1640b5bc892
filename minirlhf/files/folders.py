"""files.folders."""

import os
import re
from pathlib import Path

from minirlhf.errors import UserError

# Tensors that old checkpoints carry and no computation needs.
HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
WEIGHTS = "*.safetensors"
DOWNLOADED = ["*.json", WEIGHTS, "*.jinja"]  # neither pickles nor code
NOT_DOWNLOADED = ["consolidated*", "*/*"]  # the same weights once more, in another layout


def resolve(name: str | os.PathLike, weights: bool = True) -> Path:
    """The local folder, or a download of a hub name; a folder that is there asks no network.

    Args:
        weights: whether a download fetches them too.
    """
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
        wanted = [p for p in DOWNLOADED if weights or p != WEIGHTS]
        return Path(
            snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=NOT_DOWNLOADED)
        )
    except Exception as error:  # the hub's own errors, and those of whatever carries its requests
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            name,
            f"neither a local folder nor to be had from the hub ({reason})",
            "check the path, or the name and the network",
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a model's folder, which may be a link within that folder only.

    A folder from elsewhere could else show files of this machine as its own, and have them copied
    into whatever is exported. The hub's cache keeps files in blobs/, beside the folders of links,
    or once for all models in blobs/ of the whole cache, by their hash.

    Raises:
        UserError: the name is a link that leads elsewhere.
    """
    home, path = folder.resolve(), folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links in a circle; Python 3.13 leaves them to the reader
        real = path / name
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            homes.append(home.parents[1].parent / "blobs" / real.name[:2])
    if real.parent not in homes:
        raise UserError(path, "is a link to a file outside its folder", "copy the file to here")
    return path

# What makes other tools import code, from the folder or from the hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation",
             "_attn_implementation_internal", "_experts_implementation",
             "_experts_implementation_internal")
