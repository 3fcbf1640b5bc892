"""The tokenizer of a Hugging Face folder: its vocabulary and its chat template, in and out."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from minirlhf.data.dialogues import DialogueTokenizer
from minirlhf.data.merges import FILES as MERGED
from minirlhf.data.merges import has_merges, tokenizer_json
from minirlhf.data.rendering import ADDITIONAL
from minirlhf.data.vocabulary import EOS, NAMES, PAD
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import CODE_KEYS, file_inside, file_of, resolve, weights_of
from minirlhf.files.foreign import no_model
from minirlhf.files.reading import read_json, read_text

FILE_CAP = 256 << 20  # bytes of tokenizer.json; the largest in use have about 35 MB
FAST = "PreTrainedTokenizerFast"
OBJECT_CAP = 4 << 20  # bytes of the small files beside it
OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")  # files of it
MADE = "AutoTokenizer.from_pretrained, then save_pretrained"
OF_MODEL = ("config.json", "generation_config.json")  # of an adapter its base has them, at least
READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *OF_MODEL,
        "chat_template.jinja", *MERGED)


class Tokenizer(DialogueTokenizer):
    """What a folder's files say of text, in and out."""

    def files(self, pad_token: str | None = None) -> dict[str, bytes]:
        """File name -> content of the folder that `save` writes."""
        config = {name: v for name, v in self._config.items() if name not in CODE_KEYS}
        _name_for_version_4(config)
        config |= {n: v for n, v in self.special_tokens.items() if config.get(n) is None}
        if pad_token is not None:
            if self._backend.token_to_id(pad_token) is None:
                raise ValueError(f"pad_token {pad_token!r} is no token: use spare_pad_token()")
            config["pad_token"] = pad_token
        made = {"tokenizer.json": self._source}
        named = self.named_templates
        if named:  # in this form older versions of transformers find them, too
            named = {"default": self.chat_template, **named} if self.chat_template else named
            config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
        elif self.template_origin == "chat_template.jinja":
            made["chat_template.jinja"] = self.chat_template.encode()
        elif self.chat_template is None:
            config["chat_template"] = self.fallback()
        tokens = {name: config[name] for name in NAMES if config.get(name) is not None}
        for name, value in (("tokenizer_config", config), ("special_tokens_map", tokens)):
            made[f"{name}.json"] = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        return made

    def save(self, folder: str | Path, pad_token: str | None = None) -> None:
        """Writes the tokenizer: tokenizer.json byte for byte, so that tools that know it by its
        hash still do, and the chat template that was used here, the plain fallback included.

        Args:
            pad_token: a token's name, written into both configuration files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(pad_token).items():
            (folder / name).write_bytes(content)


def _name_for_version_4(config: dict) -> None:
    """Gives what transformers 5 names anew the names that version 4, too, reads."""
    if str(config.setdefault("tokenizer_class", FAST)).endswith("Backend"):
        config["tokenizer_class"] = FAST  # the same class; version 4 knows none of the others
    if isinstance(config.get("extra_special_tokens"), list):  # an object in version 4
        if more := config.pop("extra_special_tokens"):
            config["additional_special_tokens"] = more
    if named := config.pop("model_specific_special_tokens", None):
        config["extra_special_tokens"] = named


def tokenizer_files(folder: Path) -> list[str]:
    """The files that a folder's tokenizer is made of, its chat template and eos among them."""
    place = _place(folder)
    named = (str(path.relative_to(place)) for path in (place / ADDITIONAL).glob("*.jinja"))
    own = [place / name for name in (*READ, *sorted(named)) if name not in OF_MODEL]
    return [str(path) for path in (*own, *(file_of(folder, n) for n in OF_MODEL)) if path.exists()]


def _place(folder: Path) -> Path:
    """The folder itself, or an adapter's base where the adapter has no tokenizer."""
    has = (folder / "tokenizer.json").exists() or has_merges(folder)
    return folder if has else weights_of(folder)


def _object(folder: Path, name: str) -> dict:
    """A JSON object from a file that may be absent."""
    path = file_of(folder, name)
    if not path.exists():
        return {}
    value = read_json(path, OBJECT_CAP)
    if not isinstance(value, dict):
        raise UserError(path, f"is a {type(value).__name__}", "a JSON object")
    return value


def _model_eos(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: null, a number or a list."""
    for name in ("generation_config.json", "config.json"):
        value = _object(folder, name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id) is int for id in ids):
            what = f"eos_token_id is {printable(value)}"
            raise UserError(folder / name, what, "an integer or several")
        return ids
    return []


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Tokenizer of a Hugging Face folder: tokenizer.json (or vocab.json and merges.txt), and what
    its other files say about it.

    Raises:
        UserError: neither is there; a file of the folder is broken; more ids, added tokens
            included, than config.json gives the model embeddings.
    """
    given = resolve(folder) if os.path.isdir(folder) else Path(folder)
    folder = _place(given)
    path = file_inside(folder, "tokenizer.json")
    if not (path.exists() or has_merges(folder)):
        do = "give a folder with a tokenizer.json"
        if others := [name for name in OTHERS if (folder / name).is_file()]:
            do = f"transformers makes one of {', '.join(others)}: {MADE}"
        raise no_model(folder, UserError(path, "no such file", do))
    own = _object(folder, "tokenizer_config.json")
    own = {name: v for name, v in own.items() if v is not None or name in NAMES}
    # Its own first, in their order: what is written of it is then the same after each reading.
    # Where both name a token, transformers believes the newer of the two ways of writing them.
    more, newer = _object(folder, "special_tokens_map.json"), "added_tokens_decoder" in own
    config = own | {n: v for n, v in more.items() if not (newer and own.get(n)) and v is not None}
    model = _object(weights_of(given), "config.json")
    if path.exists():
        source = read_text(path, FILE_CAP)
    else:
        source = tokenizer_json(folder, config, model)
    tokenizer = Tokenizer(folder, source, config, _model_eos(given), model)
    rows = model.get("vocab_size")
    if type(rows) is int and rows < tokenizer.vocab_size:  # any other type is read_config's to tell
        legal = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        where = f"{weights_of(given) / 'config.json'}: vocab_size"
        raise UserError(where, f"is {printable(rows)}", legal)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """A byte-level BPE of `texts` (Sennrich et al. 2016, arXiv:1508.07909), saved in `folder`.

    Any text has ids, since all 256 bytes are tokens; two more are "<|endoftext|>" and "<|pad|>".

    Raises:
        ValueError: vocab_size is less than 258.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}: 256 bytes and 2 special tokens need 258")
    bytes_ = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = bytes_(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=bytes_.alphabet(),
            show_progress=False,
        ),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": FAST, "eos_token": EOS, "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return load_tokenizer(folder)
