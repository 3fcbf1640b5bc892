"""The safetensors files of a model's folder: which of them count, and their tensors.

A file is believed for what it holds, not for its name: a header is checked before the library
allocates by it, a pickle is refused whatever it is called, and no link leads out of a model's
folder. What the tensors mean is not known here; only those that no computation needs are left out.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minirlhf.errors import UserError, printable
from minirlhf.files.folders import HARMLESS, file_inside
from minirlhf.files.foreign import CONVERT, no_model
from minirlhf.files.reading import disguise, note_read, read_json

JSON_CAP = 4 << 20  # bytes of config.json and of an index: each tensor takes about 100
HEADER_CAP, TENSOR_CAP = 16 << 20, 200_000  # bytes and tensors of one safetensors header
VALUE_FILE = "value_head.safetensors"  # what LLaMA-Factory puts beside the model's own files
# Where tensors come from that the architecture lacks, by a name among them.
ORIGINS = tuple((re.compile(pattern), origin) for pattern, origin in (
    (r"\blora_|\.base_layer\.|\bbase_model\.",
     "saved with adapters? merge them first (peft's merge_and_unload)"),
    (r"\.(qweight|qzeros|g_idx|scales|biases|SCB|absmax|quant_\w+|weight_(scale|packed)\w*)\b",
     "quantised? give the weights before that"),
    (r"(?m)^(transformer\.)?(_orig_mod|module|policy|value_model)\.",
     "saved from inside a wrapper? save the model itself"),
    (r"\b(tok_embeddings|feed_forward|wq)\.",
     "in the layout of Meta or Mistral? give the one of transformers"),
    (r"vision|visual|multi_modal", "a model that reads images? only text is read here"),
    (r"\b(v_head|score|classifier|regression_layer|(reward|rm|score)_head|qa_outputs)\.",
     "another kind of head? one linear layer is read, as models/README.md says"),
))
UNKNOWN = "incomplete download, or another model's config?"
PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")  # torch's zip, or a bare one: whatever the name
DATA_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,20})')


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of its index; a value head's last."""
    head = file_inside(folder, VALUE_FILE)
    return _model_files(folder) + ([head] if head.exists() else [])


def _model_files(folder: Path) -> list[Path]:
    single = file_inside(folder, "model.safetensors")
    if single.exists():  # before an index: that one may be left over from an earlier save
        return [single]
    index = file_inside(folder, "model.safetensors.index.json")
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
    do = "incomplete download? pickles are neither fetched nor read"
    lack = UserError(folder, "has no model.safetensors", do)
    raise no_model(folder, lack)


def _shard(index: Path, tensor: str, shard: object) -> Path:
    what = f"'{printable(tensor, 80)}' is in"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}\.safetensors", str(shard)):
        shown = printable(repr(shard), 80)
        raise UserError(index, f"{what} {shown}", "shards are plain file names")
    path = file_inside(index.parent, shard)
    if not path.is_file():
        raise UserError(index, f"{what} {printable(shard, 80)}, which is missing", "download it")
    return path


def _check_header(path: Path) -> None:
    """Refuses what is not a whole safetensors file, before the library allocates by its header."""
    if not path.is_file():
        raise UserError(path, "not a regular file", "give a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        if start[8:9] != b"{" and PICKLE.match(start):
            raise UserError(path, "pickle files are not read", CONVERT)
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
        raise UserError(path, what, disguise(start) or "download again")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    _check_header(path)
    note_read(path)
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


def read_metadata(path: Path) -> dict[str, str]:
    """What the header says beside its tensors."""
    with _opened(path) as opened:
        return opened.metadata() or {}


def likely_origin(unknown: Iterable[str]) -> str:
    """Advice for a folder with tensors of these names that its architecture lacks."""
    names = "\n".join(unknown)
    found = (origin for pattern, origin in ORIGINS if pattern.search(names))
    return next(found, UNKNOWN)


def tensor_names(files: list[Path]) -> set[str]:
    """The names of all tensors of these files, by their headers alone."""
    names: set[str] = set()
    for path in files:
        with _opened(path) as opened:
            names.update(opened.keys())
    return names
