"""Text <-> ids, by a Hugging Face tokenizer folder.

Text that comes from data is only ever text: "<|im_end|>" in a user's message is spelled out in
ordinary tokens, and no row of a data set can end a turn or forge a role.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from minirlhf.data.chat_template import (
    compile_template,
    plain_template,
    swap_names,
    unused_character,
)
from minirlhf.data.formats import Messages
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import CODE_KEYS, inside
from minirlhf.files.reading import read_json, read_text, strict_json

EOS, PAD = "<|endoftext|>", "<|pad|>"  # of tokenizers that are trained here
SPARE = (EOS, PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>",
         "<unk>", "[UNK]")
FILE_CAP = 256 << 20  # bytes of tokenizer.json; the largest in use have about 35 MB
NAMES_CAP = 1 << 17  # characters of all special tokens together, which become one pattern
OBJECT_CAP = 4 << 20  # bytes of the small files beside it
BATCH = 4096  # texts that the library encodes at once: it keeps much more of them than ids
READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
        "generation_config.json", "chat_template.jinja")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@contextmanager
def _muted() -> Iterator[None]:
    """Without the process's stderr: Rust writes pages about a panic before Python hears of it."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class Tokenizer:
    """A tokenizer.json with the names and the chat template that its folder gives.

    Attributes:
        vocab_size: largest id + 1, added tokens included.
        eos_ids: ids that end a text; the first is the one that is appended to texts. May be empty.
        bos_id: id of the beginning-of-text token, or None.
        unknown_id: id of the piece that stands for what has no other, or None.
        special_text: finds the names of all special tokens, eos among them, in a text.
        chat_template: Jinja source, or None where `template_origin` is "plain fallback".
        template_origin: "chat_template.jinja", "tokenizer_config.json" or "plain fallback".
        fingerprint: sha256 of tokenizer.json, hex.
    """

    def __init__(self, folder: Path, source: str, config: dict, eos_ids: list[int]):
        self.folder = folder
        self._source, self._config = source.encode(), config
        self.fingerprint = hashlib.sha256(self._source).hexdigest()
        path = folder / "tokenizer.json"
        parsed = strict_json(source, path)
        with _muted():
            self._backend = self._guard(tokenizers.Tokenizer.from_str, source)
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(path, "no tokens", "give a trained tokenizer")
        self.vocab_size = max(vocab.values()) + 1
        self._set_names(eos_ids)
        self._set_specials(parsed)
        self._set_template()

    def _guard(self, function: Callable, *arguments: object) -> object:
        """Calls into the library, whose panics are BaseExceptions that know no file."""
        try:
            return function(*arguments)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # a signal, for one
            path = self.folder / "tokenizer.json"
            raise UserError(
                path, f"refused by the tokenizers library: {printable(error)}"
            ) from None

    def _set_names(self, eos_ids: list[int]) -> None:
        """bos and eos by name; `eos_ids` are those that the model's own configuration adds."""
        where = self.folder / "tokenizer_config.json"
        self.special_tokens = {}  # name -> text, what chat templates may use
        for name in NAMES:
            value = self._config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if value is None:
                continue
            if not isinstance(value, str):
                raise UserError(where, f"{name} is {printable(value)}", "a string or an object")
            self.special_tokens[name] = value
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        self.bos_id: int | None = None if bos is None else self._backend.token_to_id(bos)
        named = [] if eos is None else [self._backend.token_to_id(eos)]
        if named == [None]:
            raise UserError(where, f"eos_token {printable(eos)!r} is not in tokenizer.json")
        for id in eos_ids:
            if not 0 <= id < self.vocab_size:
                legal = f"tokenizer.json has the ids 0 to {self.vocab_size - 1}"
                raise UserError(self.folder, f"eos_token_id is {id}", legal)
        self.eos_ids = tuple(dict.fromkeys(named + eos_ids))

    def _set_specials(self, parsed: dict) -> None:
        """Which ids control a text, which texts name them, and which ids go before a text."""
        added = self._backend.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        special |= {id: self._backend.id_to_token(id) for id in self.eos_ids}
        texts = sorted(filter(None, special.values()), key=len, reverse=True)
        if (length := sum(map(len, texts))) > NAMES_CAP:
            path, legal = self.folder / "tokenizer.json", f"at most {NAMES_CAP:,}"
            raise UserError(path, f"special tokens of {length:,} characters", legal)
        self.special_text = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        # The model's own "unknown" piece comes out of ordinary text, so it controls nothing.
        model = parsed["model"]
        unknown, vocab = model.get("unk_token"), model.get("vocab")
        self.unknown_id: int | None = model.get("unk_id")  # of Unigram, by its place
        if isinstance(vocab, dict):
            self.unknown_id = vocab.get(unknown)
        elif self.unknown_id is not None:
            unknown = vocab[self.unknown_id][0]
        self._control = {id for id, text in special.items() if text != unknown}
        self._spare = {text: id for id, text in special.items() if text}
        self._prefix: list[int] = []
        for probe in ("a", "A", "0", " "):
            with _muted():
                encoding = self._guard(self._backend.encode, probe)
            if 0 in (mask := encoding.special_tokens_mask):
                self._prefix = encoding.ids[: mask.index(0)]
                break
        if nameless := [id for id in self._prefix if self._backend.id_to_token(id) is None]:
            what = f"puts the id {nameless[0]} before a text, which is no token's"
            raise UserError(self.folder / "tokenizer.json", what)

    def _set_template(self) -> None:
        own = inside(self.folder, "chat_template.jinja")
        configured = self._config.get("chat_template")
        if isinstance(configured, list):  # [{"name": ..., "template": ...}]
            named = [t for t in configured if isinstance(t, dict) and t.get("name") == "default"]
            configured = named[0].get("template") if named else None
        self.chat_template: str | None = None
        if own.exists():
            self.template_origin = own.name
            self.chat_template = read_text(own, OBJECT_CAP)
        elif configured is not None:
            self.template_origin = "tokenizer_config.json"
            if not isinstance(configured, str):
                where = self.folder / self.template_origin
                what = f"chat_template is {printable(repr(configured), 80)}"
                raise UserError(where, what, "a string, or a list of named ones")
            self.chat_template = configured
        if not self.chat_template:  # an empty one renders nothing
            self.template_origin, self.chat_template = "plain fallback", None
        self._render: Callable | None = None  # compiled on first use: plain text needs no jinja2

    # ---------------------------------------------------------------------------------- plain text

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text; names of special tokens inside it are spelled out, eos is never added.

        Args:
            text: any text that has a UTF-8 form.
            bos: put in front what the tokenizer.json itself puts in front (often nothing).
        Raises:
            UserError: the tokenizer can spell a special token's name in no other way.
        """
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        prefix = self._prefix if bos else []
        return [prefix + ids for ids in self._plain(texts)]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        self._backend.encode_special_tokens = True
        encode, rows = self._backend.encode_batch_fast, []
        for start in range(0, len(texts), BATCH):
            batch = self._guard(encode, list(texts[start : start + BATCH]), False, False)
            rows += [encoding.ids for encoding in batch]
        for row, text in enumerate(texts):
            if not self._control.isdisjoint(rows[row]):
                rows[row] = self._spelled(text)
        return rows

    def _spelled(self, text: str) -> list[int]:
        """For vocabularies with special names as ordinary pieces: cuts each after one letter."""
        cuts = [match.start() + 1 for match in self.special_text.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = self._guard(self._backend.encode_batch_fast, pieces, False, False)
        ids = [id for part in parts for id in part.ids]
        if not self._control.isdisjoint(ids):
            token = self._backend.id_to_token(next(id for id in ids if id in self._control))
            raise UserError(self.folder, f"cannot spell {printable(token)!r} as plain text")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; ids without a token (padded vocabularies) give no text."""
        return self._guard(self._backend.decode, list(ids), skip_special)

    # ---------------------------------------------------------------------------------------- chat

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """Text of a dialogue by the chat template, or by a plain one where the model has none.

        Args:
            messages: [{"role": ..., "content": ...}, ...].
            add_generation_prompt: end where the assistant's answer begins. A last message that is
                already the assistant's is left open instead, to be continued.
        Raises:
            UserError: the template refuses the messages, or jinja2 is missing.
        """
        if self._render is None:
            source = self.chat_template or self._fallback()
            self._render = compile_template(source, f"{self.folder} ({self.template_origin})")
        if not (add_generation_prompt and messages and messages[-1].get("role") == "assistant"):
            return self._render(messages, add_generation_prompt, self.special_tokens)
        # What a template writes behind the turn may look like the turn's own text, or the turn be
        # empty: a character that stands nowhere else shows where it ends.
        content = messages[-1]["content"].rstrip()
        mark = unused_character(messages)
        turns = [*messages[:-1], messages[-1] | {"content": content + mark}]
        text, found, _ = self._render(turns, False, self.special_tokens).rpartition(mark)
        if not found or not text.endswith(content.lstrip()):
            what = "the chat template changes the assistant turn that is to be continued"
            raise UserError(self.folder, what)
        return text

    def _fallback(self) -> str:
        bos = "".join(self._backend.id_to_token(id) for id in self._prefix)
        return plain_template(bos, self._eos_text() or "")

    def _eos_text(self) -> str | None:
        return self._backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    def encode_chat(self, messages: Messages) -> list[int]:
        """Ids of `render_chat`. The template's own special tokens control, the messages' do not.

        The template writes the beginning-of-text token itself where there is one: none is added.
        """
        messages, swapped = swap_names(messages, self.special_text)
        return self._encode_rendered(self.render_chat(messages), swapped)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text that was rendered elsewhere: its names of special tokens are these tokens.

        Who wrote the text can forge them: for texts that only others can render.
        """
        return self._encode_rendered(text, {})

    def encode_dialogue(
        self, prompt: Messages, *responses: Messages, resume: bool = False
    ) -> tuple[list[int], ...]:
        """(prompt ids, response ids, ...) of answers to one prompt, each encoded by itself.

        A response is what the template writes after the prompt with its generation prompt. It ends
        with the last of `eos_ids` in it: blanks that a template puts behind its end of turn are
        never generated, so they are no part of it.

        Args:
            resume: a prompt that ends with a turn of the assistant was continued, so a response is
                no turn of its own.
        Raises:
            UserError: the rendered prompt is no prefix of the rendered dialogue.
        """
        turns, swapped = swap_names([prompt, *responses], self.special_text)
        head = self.render_chat(turns[0])
        encoded = [self._encode_rendered(head, swapped)]
        for response in turns[1:]:
            dialogue = turns[0] + response
            if resume and turns[0][-1]["role"] == "assistant":
                content = turns[0][-1]["content"].rstrip() + response[0]["content"]
                goes_on = turns[0][-1] | {"content": content}
                dialogue = [*turns[0][:-1], goes_on, *response[1:]]
            whole = self.render_chat(dialogue, add_generation_prompt=False)
            if not whole.startswith(head):
                what = "the chat template writes the prompt differently once an answer follows"
                raise UserError(self.folder, what, "change the template, or give strings")
            ids = self._encode_rendered(whole[len(head) :], swapped)
            ends = [i + 1 for i, id in enumerate(ids) if id in self.eos_ids]
            if ends and not self.decode(ids[ends[-1] :], skip_special=False).strip():
                ids = ids[: ends[-1]]
            encoded.append(ids)
        return tuple(encoded)

    def _encode_rendered(self, text: str, swapped: dict[str, str]) -> list[int]:
        """Ids of a rendered text; stretches that hold swapped names are encoded as plain text."""
        self._backend.encode_special_tokens = False
        encoding = self._guard(self._backend.encode, text, None, False, False)
        if not any(mark in text for mark in swapped):
            return encoding.ids
        ids, out, start, begun = encoding.ids, [], 0, 0
        controls = [i for i, id in enumerate(ids) if id in self._control]
        for i in [*controls, len(ids)]:
            first, last = encoding.token_to_chars(i) if i < len(ids) else (len(text), len(text))
            words, stretch = text[start:first], ids[begun:i]
            if any(mark in words for mark in swapped):
                for mark, name in swapped.items():
                    words = words.replace(mark, name)
                stretch = self._plain([words])[0]
            out += [*stretch, *ids[i : i + 1]]
            start, begun = last, i + 1
        return out

    # -------------------------------------------------------------------------------------- export

    def spare_pad_token(self) -> tuple[str, int] | None:
        """A special token that is free to pad with: neither eos nor bos. None where there is none.

        A reward model's folder names it, since other tools read the score before the padding.
        """
        for token in (self.special_tokens.get("pad_token"), *SPARE):
            id = self._spare.get(token)
            if id is not None and id not in self.eos_ids and id != self.bos_id:
                return token, id
        return None

    def eos_token(self) -> tuple[str, int] | None:
        """The first eos as the vocabulary spells it, and its id; None where there is none."""
        text = self._eos_text()
        return None if text is None else (text, self.eos_ids[0])

    def check_stops(self, strings: Sequence[str]) -> None:
        """Raises UserError where a stop string names a token that no text shows."""
        for string in strings:
            if self.special_text.search(string):
                what = f"{printable(string, 80)!r} names a special token, which no text shows"
                do = "an eos ends a response by itself: make it one in generation_config.json"
                raise UserError("--stop", what, do)

    def files(self, pad_token: str | None = None) -> dict[str, bytes]:
        """File name -> content of the folder that `save` writes."""
        config = {name: v for name, v in self._config.items() if name not in CODE_KEYS}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if eos := self._eos_text():
            config.setdefault("eos_token", eos)
        if pad_token is not None:
            if self._backend.token_to_id(pad_token) is None:
                raise ValueError(f"pad_token {pad_token!r} is no token: use spare_pad_token()")
            config["pad_token"] = pad_token
        made = {"tokenizer.json": self._source}
        if self.template_origin == "chat_template.jinja":
            made["chat_template.jinja"] = self.chat_template.encode()
        elif self.chat_template is None:
            config["chat_template"] = self._fallback()
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


def tokenizer_files(folder: Path) -> list[str]:
    """The files that a folder's tokenizer is made of, its chat template and eos among them."""
    return [str(folder / name) for name in READ if (folder / name).exists()]


def _object(folder: Path, name: str) -> dict:
    """A JSON object from a file that may be absent."""
    path = inside(folder, name)
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
    """Tokenizer of a Hugging Face folder: tokenizer.json, and what its other files say about it.

    Raises:
        UserError: no tokenizer.json; a file of the folder is broken; more ids, added tokens
            included, than config.json gives the model embeddings.
    """
    folder = Path(folder)
    path = inside(folder, "tokenizer.json")
    if not path.exists():
        raise UserError(path, "no such file", "give a folder with a tokenizer.json")
    own = {n: v for n, v in _object(folder, "tokenizer_config.json").items() if v is not None}
    # Its own first, in their order: what is written of it is then the same after each reading.
    more = _object(folder, "special_tokens_map.json")
    config = own | {name: value for name, value in more.items() if name not in own}
    tokenizer = Tokenizer(folder, read_text(path, FILE_CAP), config, _model_eos(folder))
    rows = _object(folder, "config.json").get("vocab_size")
    if type(rows) is int and rows < tokenizer.vocab_size:  # any other type is read_config's to tell
        legal = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        raise UserError(f"{folder / 'config.json'}: vocab_size", f"is {printable(rows)}", legal)
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
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=bytes_.alphabet(),
            show_progress=False,
        ),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return load_tokenizer(folder)
