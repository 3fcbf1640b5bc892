"""A tokenizer.json of the files that stood in its place: vocab.json and merges.txt.

Byte-level BPE (Radford et al. 2019, "Language models are unsupervised multitask learners") of the
two kinds in use, GPT-2's and Qwen2's, as transformers makes it.
"""

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from minirlhf.data.library import one_line
from minirlhf.data.vocabulary import CLASS_NAMES
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import file_inside
from minirlhf.files.reading import read_json, read_text

FILES = ("vocab.json", "merges.txt", "added_tokens.json")
FAMILIES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
QWEN2 = (  # how Qwen2 cuts texts into words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_merges(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES[:2])


def tokenizer_json(folder: Path, config: dict, model: dict) -> str:
    """The text of a tokenizer.json.

    Args:
        config: what the folder's other files say of its tokens.
        model: its config.json.
    Raises:
        UserError: a file is broken, or of another kind of tokenizer.
    """
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    kind = kind or FAMILIES.get(str(model.get("model_type")), "")
    if kind not in FAMILIES.values():
        what = f"has no tokenizer.json, and vocab.json is of {printable(kind, 40) or 'no class'}"
        do = "transformers makes one: AutoTokenizer.from_pretrained, then save_pretrained"
        raise UserError(folder, what, do)
    space = bool(config.get("add_prefix_space", False))
    with one_line():
        try:
            made = tokenizers.Tokenizer(models.BPE(_vocab(folder), _merges(folder)))
        except UserError:
            raise
        except Exception as error:  # a merge of what is no token
            what = f"does not fit vocab.json: {printable(error)}"
            do = "take both from one tokenizer"
            raise UserError(folder / "merges.txt", what, do) from None
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if kind == "Qwen2Tokenizer":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
        ])
    for id, token in _added(folder, config):
        made.add_tokens([token])
        if made.token_to_id(token.content) != id:
            got = made.token_to_id(token.content)
            what = f"{printable(token.content, 40)!r} would be {got}, not {id}"
            raise UserError(folder, what, "the added tokens leave no gap behind the vocabulary")
    names = CLASS_NAMES[kind] | {n: v for n, v in config.items() if n.endswith("_token") and v}
    more = config.get("additional_special_tokens") or []
    texts = [v.get("content") if isinstance(v, dict) else v for v in (*names.values(), *more)]
    made.add_special_tokens([
        AddedToken(text, special=True) for text in dict.fromkeys(texts) if isinstance(text, str)
    ])
    return made.to_str()


def _vocab(folder: Path) -> dict[str, int]:
    vocab = read_json(file_inside(folder, "vocab.json"))
    if not isinstance(vocab, dict) or not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise UserError(folder / "vocab.json", "is no vocabulary", "an object of text -> id")
    return vocab


def _merges(folder: Path) -> list[tuple[str, str]]:
    path, merges = file_inside(folder, "merges.txt"), []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise UserError(f"{path}:{number}", f"is {printable(line, 40)!r}", "needs two tokens")
        merges.append((pair[0], pair[1]))
    return merges


def _added(folder: Path, config: dict) -> list[tuple[int, AddedToken]]:
    """Added tokens by their ids, as the newer or the older way of writing tells them."""
    told, path = config.get("added_tokens_decoder"), folder / "added_tokens.json"
    found: dict[int, AddedToken] = {}
    if isinstance(told, dict):
        for id, token in told.items():
            fits = isinstance(token, dict) and isinstance(token.get("content"), str)
            if not (id.isascii() and id.isdigit() and len(id) < 10 and fits):
                what = f"added_tokens_decoder has {printable(id, 40)!r}"
                raise UserError(folder / "tokenizer_config.json", what, "id -> {content: text}")
            flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
            kept = {name: bool(token[name]) for name in flags if name in token}
            found[int(id)] = AddedToken(token["content"], **kept)
    elif path.exists():
        values = read_json(file_inside(folder, path.name))
        if not isinstance(values, dict) or not all(type(id) is int for id in values.values()):
            raise UserError(path, "is no list of tokens", "an object of text -> id")
        found = {id: AddedToken(text, special=False) for text, id in values.items()}
    return sorted(found.items())
