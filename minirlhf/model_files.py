"""The files of a model's folder: where they are, which of them count, and their tensors.

A file is believed for what it holds, not for its name: a header is checked before the library
allocates by it, a pickle is refused whatever it is called, and no link leads out of a model's
folder. What the tensors mean is not known here; only those that no computation needs are left out.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minirlhf.errors import UserError, printable
from minirlhf.rows import read_json

# Tensors that old checkpoints carry and no computation needs.
HARMLESS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
WEIGHTS = "*.safetensors"
DOWNLOADED = ["*.json", WEIGHTS, "*.jinja"]  # neither pickles nor code
NOT_DOWNLOADED = ["consolidated*", "*/*"]  # the same weights once more, in another layout
JSON_CAP = 4 << 20  # bytes of config.json and of an index: each tensor takes about 100
HEADER_CAP, TENSOR_CAP = 16 << 20, 200_000  # bytes and tensors of one safetensors header
PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")  # torch's zip, or a bare one: whatever the name
DATA_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,20})')


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


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of its index."""
    single = inside(folder, "model.safetensors")
    if single.exists():  # before an index: that one may be left over from an earlier save
        return [single]
    index = inside(folder, "model.safetensors.index.json")
    if index.exists():
        values = read_json(index, JSON_CAP)
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise UserError(index, "has no weight_map", "incomplete download?")
        files: dict[str, Path] = {}
        for tensor, shard in shards.items():
            if not isinstance(shard, str) or shard not in files:
                files[shard] = _shard(index, tensor, shard)
        return list(files.values())
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise _is_pickle(folder / pickles[0])
    raise UserError(folder, "has no model.safetensors", "incomplete download?")


def _shard(index: Path, tensor: str, shard: object) -> Path:
    what = f"'{printable(tensor, 80)}' is in"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}\.safetensors", str(shard)):
        shown = printable(repr(shard), 80)
        raise UserError(index, f"{what} {shown}", "shards are plain file names")
    path = inside(index.parent, shard)
    if not path.is_file():
        raise UserError(index, f"{what} {printable(shard, 80)}, which is missing", "download it")
    return path


def _is_pickle(path: Path) -> UserError:
    return UserError(path, "pickle files are not read", "convert the model to safetensors")


def _check_header(path: Path) -> None:
    """Refuses what is not a whole safetensors file, before the library allocates by its header."""
    if not path.is_file():
        raise UserError(path, "not a regular file", "give a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{" and PICKLE.match(start):
            raise _is_pickle(path)
        length = int.from_bytes(start[:8], "little")
        missing = 8 + length - size
        if length > HEADER_CAP and missing <= 0:
            legal = f"at most {HEADER_CAP:,} are read"
            raise UserError(path, f"a safetensors header of {length:,} bytes", legal)
        header = start[8:] + file.read(min(length, HEADER_CAP))
    if header.count(b'"dtype"') > TENSOR_CAP:
        raise UserError(path, f"a safetensors header of more than {TENSOR_CAP:,} tensors")
    if missing <= 0:
        missing += max(map(int, DATA_END.findall(header)), default=0)
    if missing > 0 or size < 8:
        what = f"not a whole safetensors file: {missing:,} bytes shorter than its header says"
        raise UserError(path, what, "download again")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        what = f"not a whole safetensors file ({printable(error)})"
        raise UserError(path, what, "download again") from error


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of these files but the HARMLESS; a name that stands twice is an error."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as opened:
            for name in opened.keys():
                if name in tensors:
                    what = f"'{printable(name, 80)}' stands in two shards"
                    raise UserError(path, what, "bad export?")
                tensors[name] = opened.get_tensor(name)
    return {name: tensor for name, tensor in tensors.items() if not HARMLESS.search(name)}


def has_tensor(files: list[Path], name: str) -> bool:
    """Whether one of these files holds a tensor, by their headers alone."""
    for path in files:
        with _opened(path) as opened:
            if name in opened.keys():
                return True
    return False
