"""Model folders: found on this machine or fetched from the hub, and which of their files count.

Such a folder comes from somebody else. Neither pickles nor code of it are downloaded or read, no
key of it that names code is acted on, and no link leads out of it.
"""

import os
import re
from pathlib import Path

from minirlhf.errors import UserError

# What makes other tools import code, from the folder or from the hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation",
             "_attn_implementation_internal", "_experts_implementation",
             "_experts_implementation_internal")
# Tensors that old checkpoints carry and no computation needs.
HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
WEIGHTS = "*.safetensors"
DOWNLOADED = ["*.json", WEIGHTS, "*.jinja"]  # neither pickles nor code
# The same weights once more, in another layout; of folders, additional_chat_templates is read.
NOT_DOWNLOADED = ["consolidated*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]


def resolve(name: str | os.PathLike, weights: bool = True) -> Path:
    """The folder of this name, or else a download of the hub's model of this name (owner/name).

    Args:
        weights: whether a download brings them too.
    Raises:
        UserError: a file, no such folder, no huggingface_hub, or whatever the hub answers.
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
