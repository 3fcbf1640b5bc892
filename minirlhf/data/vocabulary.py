"""Text <-> ids, by a tokenizer.json and the names that its folder gives to tokens."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import tokenizers

from minirlhf.data.control import swap_names
from minirlhf.data.library import check_parts, one_line
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import strict_json

EOS, PAD = "<|endoftext|>", "<|pad|>"  # of tokenizers that are trained here
SPARE = (EOS, PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>",
         "<unk>", "[UNK]")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What transformers' classes call their tokens where a folder's files do not say, and the class of
# a model whose files name none.
CLASS_NAMES = {
    "GPT2Tokenizer": {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS},
    "Qwen2Tokenizer": {"eos_token": EOS, "unk_token": EOS, "pad_token": EOS},
    "GPTNeoXTokenizer": {
        "bos_token": EOS, "eos_token": EOS, "unk_token": EOS, "pad_token": "<|padding|>",
    },
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}
CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
NAMES_CAP = 1 << 17  # characters of all special tokens together, which become one pattern
BATCH = 4096  # texts that the library encodes at once: it keeps much more of them than ids
CONTEXT = 8  # tokens before a text that its decoding looks at: a character has four at most
CROSSED = "a token crosses the end of the prompt: what follows is encoded by itself"  # of rows


class Vocabulary:
    """Ids, and which of them control a text.

    Attributes:
        vocab_size: largest id + 1, added tokens included.
        eos_ids: ids that end a text; the first is the one that is appended to texts. May be empty.
        bos_id: id of the beginning-of-text token, or None.
        unknown_id: id of the piece that stands for what has no other, or None.
        special_tokens: names, as bos_token, -> the tokens' texts: the folder's own, else those of
            transformers' class that the vocabulary has, else for eos that of the first id.
        special_text: finds the names of all control tokens in a text: special ones, eos, and those
            that the chat template writes around turns.
        thoughts: names of special tokens, such as <think>, that an answer may hold as tokens.
        fingerprint: sha256 of tokenizer.json, hex.

    Args:
        source: the text of tokenizer.json.
        config: what the folder's other files say about it; a token's name may be None: it has none.
        eos_ids: those that the model's own configuration adds.
        model: the model's own configuration, which may tell the class.
    Raises:
        UserError: whatever of it cannot be used, by file.
    """

    def __init__(
        self, folder: Path, source: str, config: dict, eos_ids: list[int], model: dict
    ):
        self.folder = folder
        self._source, self._config = source.encode(), config
        self.fingerprint = hashlib.sha256(self._source).hexdigest()
        path = folder / "tokenizer.json"
        parsed = strict_json(source, path)
        check_parts(parsed, path)
        with one_line():
            self._backend = self._guard(tokenizers.Tokenizer.from_str, source)
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(path, "no tokens", "give a trained tokenizer")
        self.vocab_size = max(vocab.values()) + 1
        self._set_names(eos_ids, self._class_names(model))
        self._set_specials(parsed)

    def _guard(self, function: Callable, *arguments: object) -> object:
        """Calls into the library, whose panics are BaseExceptions that know no file."""
        try:
            return function(*arguments)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise  # a signal, for one
            path = self.folder / "tokenizer.json"
            raise UserError(
                path, f"refused by the tokenizers library: {printable(error)}",
                "pip install --upgrade tokenizers, or download the file again",
            ) from None

    def _class_names(self, model: dict) -> dict[str, str]:
        """What the class that transformers reads the folder with calls tokens of the vocabulary."""
        family = str(model.get("model_type"))
        own = str(self._config.get("tokenizer_class") or model.get("tokenizer_class") or "")
        own = own.removesuffix("Fast")
        if not own or family == "qwen2":  # of which no other class is believed
            own = CLASSES.get(family, "")
        if family == "mistral" or (own == "LlamaTokenizer" and b'"ByteLevel"' in self._source):
            return {}  # as of the class that serves all
        names = CLASS_NAMES.get(own, {}).items()
        return {n: text for n, text in names if self._backend.token_to_id(text) is not None}

    def _set_names(self, eos_ids: list[int], defaults: dict[str, str]) -> None:
        """bos and eos by name; `eos_ids` are those that the model's own configuration adds."""
        where = self.folder / "tokenizer_config.json"
        self.special_tokens = {}  # name -> text, what chat templates may use
        for name in NAMES:
            value = self._config.get(name, defaults.get(name))
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
            what = f"eos_token {printable(eos)!r} is not in tokenizer.json"
            raise UserError(where, what, "name a token that is")
        for id in eos_ids:
            if not 0 <= id < self.vocab_size:
                legal = f"tokenizer.json has the ids 0 to {self.vocab_size - 1}"
                raise UserError(self.folder, f"eos_token_id is {id}", legal)
        self.eos_ids = tuple(dict.fromkeys(named + eos_ids))
        if eos is None and (text := self._eos_text()):  # what is written here names it, too
            self.special_tokens["eos_token"] = text

    def _set_specials(self, parsed: dict) -> None:
        """Which ids control a text, which texts name them, and which ids go before a text."""
        added = self._backend.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        special |= {id: self._backend.id_to_token(id) for id in self.eos_ids}
        texts = list(filter(None, special.values()))
        if (length := sum(map(len, texts))) > NAMES_CAP:
            path, legal = self.folder / "tokenizer.json", f"at most {NAMES_CAP:,}"
            raise UserError(path, f"special tokens of {length:,} characters", legal)
        # The model's own "unknown" piece comes out of ordinary text, so it controls nothing.
        model = parsed["model"]
        unknown, vocab = model.get("unk_token"), model.get("vocab")
        self.unknown_id: int | None = model.get("unk_id")  # of Unigram, by its place
        if isinstance(vocab, dict):
            self.unknown_id = vocab.get(unknown)
        elif self.unknown_id is not None:
            unknown = vocab[self.unknown_id][0]
        self._control: set[int] = set()
        self._skipped = {id for id, token in added.items() if token.special}  # by decode
        self._unknown, self._shown, self.thoughts = unknown, set(), frozenset()
        self._names: set[str] = set()
        self._add_control(special)
        ids = {*self.eos_ids, self.bos_id} - {None}
        self._ends = [self._backend.id_to_token(id) or "" for id in ids]
        self._normalizes = self._backend.normalizer is not None and any(
            token.normalized for token in added.values()
        )
        self._spare = {text: id for id, text in special.items() if text}
        self._prefix: list[int] = []
        for probe in ("a", "A", "0", " "):
            with one_line():
                encoding = self._guard(self._backend.encode, probe)
            if 0 in (mask := encoding.special_tokens_mask):
                self._prefix = encoding.ids[: mask.index(0)]
                break
        # Whether what stands behind a control token begins as a text does: Llama 2 puts a blank in
        # front of both, Mistral's later tokenizers of a text only.
        one = [token.content for token in added.values() if token.special][:1]
        (alone,), named = self._tokens(["a"]), self._tokens([name + "a" for name in one], True)
        self._begins_anew = all(ids[1:] == alone for ids in named)
        if nameless := [id for id in self._prefix if self._backend.id_to_token(id) is None]:
            what = f"puts the id {nameless[0]} before a text, which is no token's"
            raise UserError(self.folder / "tokenizer.json", what, "mend its post_processor")

    def _add_control(self, named: dict[int, str]) -> None:
        """Makes control tokens of these ids; None where a token has no name."""
        self._control |= {id for id, text in named.items() if text != self._unknown}
        self._names |= set(filter(None, named.values()))
        names = sorted(self._names, key=len, reverse=True)
        self.special_text = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _learn(self, plain: dict[int, str], thoughts: dict[int, str]) -> None:
        """What `learned_control` says."""
        self._add_control(plain)
        self._skipped -= thoughts.keys()
        self.thoughts = frozenset(thoughts.values())
        self._shown = {*plain.values(), *thoughts.values()}

    def as_text(self, messages: list) -> tuple[list, dict[str, str]]:
        """`swap_names` of this vocabulary, after its normaliser where that makes names of text."""
        if self._normalizes:
            messages = self._normalized(messages)
        return swap_names(messages, self.special_text, self.thoughts, self._ends)

    def _normalized(self, value: object) -> object:
        if isinstance(value, str):
            shown, found = self._backend.normalizer.normalize_str(value), self.special_text.findall
            return value if len(found(shown)) == len(found(value)) else shown
        if isinstance(value, dict):
            return {key: self._normalized(child) for key, child in value.items()}
        return [self._normalized(child) for child in value] if isinstance(value, list) else value

    def control_name(self, text: str, answer: bool = False) -> str | None:
        """The first name of a control token in a text, which an answer's thoughts are not."""
        spared = {self._unknown, *(self.thoughts if answer else ())}
        found = (match[0] for match in self.special_text.finditer(text))
        return next((name for name in found if name not in spared), None)

    def without_end(self, text: str) -> tuple[str, int | None]:
        """(the text before the name of an eos at its end, blanks behind it or not; that eos)."""
        shown = text.rstrip()
        for id in self.eos_ids:
            name = self._backend.id_to_token(id)
            if name and name.strip() and shown.endswith(name):
                return shown[: -len(name)], id
        return text, None

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
        rows = self._tokens(texts)
        for row, text in enumerate(texts):
            if not self._control.isdisjoint(rows[row]):
                rows[row] = self._spelled(text)
        return [self._prefix + ids for ids in rows] if bos else rows

    def encode_parts(
        self, rows: Sequence[Sequence[str]], counts: Counter[str] | None = None,
        rendered: bool = False,
    ) -> list[tuple[list[int], ...]]:
        """(prompt ids, response ids, ...) of each (prompt, response, ...), as `encode` makes them.

        Joined they are the ids of the whole text, wherever these begin with the prompt's. Where a
        token crosses the boundary, the response is encoded by itself: that response alone, so that
        the others and the prompt, which all share, are what they would be without it.

        Args:
            counts: CROSSED is added to it for each row with such a response.
            rendered: names of special tokens are these tokens, and nothing is put in front. Else
                they are text, but for the thoughts of a response.
        """
        counts = Counter() if counts is None else counts
        encode_all = partial(self._tokens, named=True) if rendered else self.encode_batch
        heads = encode_all([prompt for prompt, *_ in rows])
        whole = iter(encode_all([row[0] + text for row in rows for text in row[1:]]))
        found = []
        for head, (prompt, *texts) in zip(heads, rows, strict=True):
            wholes = list(islice(whole, len(texts)))
            encode = partial(_only, encode_all)
            if not rendered and any(name in text for name in self.thoughts for text in texts):
                encode, (prompt, *texts) = self._thoughtful(prompt, texts)
                head, wholes = encode(prompt), [encode(prompt + text) for text in texts]
            found.append(self._cut(head, wholes, texts, encode, counts))
        return found

    def _thoughtful(
        self, prompt: str, texts: Sequence[str]
    ) -> tuple[Callable[[str], list[int]], list[str]]:
        """(what encodes them, the texts) with their thoughts as tokens, other names as text."""
        turns = [{"role": "assistant", "content": text} for text in texts]
        turns, names = self.as_text([{"role": "user", "content": prompt}, *turns])
        return (
            lambda text: self._prefix + self._encode_rendered(text, names),
            [turn["content"] for turn in turns],
        )

    def _cut(
        self, head: list[int], wholes: list[list[int]], texts: Sequence[str],
        encode: Callable[[str], list[int]], counts: Counter[str],
    ) -> tuple[list[int], ...]:
        """(head, what each whole has beyond it, or the ids of the text that stands there)."""
        cut = [ids[len(head) :] if ids[: len(head)] == head else None for ids in wholes]
        counts[CROSSED] += None in cut
        return head, *(
            self._continued(text, encode) if ids is None else ids
            for ids, text in zip(cut, texts, strict=True)
        )

    def _continued(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a text that is not the beginning of one: without the blank that some tokenizers
        put there. Where a line end before it makes no difference, nothing stands in its place."""
        before, ids = encode("\n"), encode("\n" + text)
        if ids[: len(before)] != before:
            before, ids = encode(""), encode(text)
        return ids[len(before) :]

    def _tokens(self, texts: Sequence[str], named: bool = False) -> list[list[int]]:
        """Ids by the library; names of special tokens are these tokens where they are `named`."""
        self._backend.encode_special_tokens = not named
        encode, rows = self._backend.encode_batch_fast, []
        for start in range(0, len(texts), BATCH):
            with one_line():
                batch = self._guard(encode, list(texts[start : start + BATCH]), False, False)
            rows += [encoding.ids for encoding in batch]
        return rows

    def _spelled(self, text: str) -> list[int]:
        """For vocabularies with special names as ordinary pieces: cuts each after one letter."""
        cuts = [match.start() + 1 for match in self.special_text.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        plain = lambda piece: self._tokens([piece])[0]  # noqa: E731
        ids = plain(pieces[0]) + [id for p in pieces[1:] for id in self._continued(p, plain)]
        if not self._control.isdisjoint(ids):
            token = self._backend.id_to_token(next(id for id in ids if id in self._control))
            raise UserError(self.folder, f"cannot spell {printable(token)!r} as plain text")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; ids without a token (padded vocabularies) give no text. Thoughts are shown
        whatever is skipped."""
        ids = [id for id in ids if not (skip_special and id in self._skipped)]
        return self._guard(self._backend.decode, ids, False)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of ids behind others, without special tokens: the decoders of some tokenizers take
        the first blank away, which is not theirs where it stands inside a text.

        >>> # decode([▁a, ▁b]) is "a b", decode([▁b]) is "b", decode_after([▁a], [▁b]) is " b"
        """
        context = [] if before == self._prefix else list(before[-CONTEXT:])
        for at in reversed(range(len(context))):
            if context[at] in self._control:
                context = context[at + self._begins_anew :]
                break
        ids = [id for id in ids if id not in self._skipped]
        head, text = self.decode(context, False), self.decode([*context, *ids], False)
        return text[len(head) :] if text.startswith(head) else self.decode(ids)

    def _encode_rendered(self, text: str, swapped: dict[str, str]) -> list[int]:
        """Ids of a rendered text; stretches that hold swapped names are encoded as plain text."""
        if not any(mark in text for mark in swapped):
            return self._tokens([text], True)[0]
        self._backend.encode_special_tokens = False
        with one_line():
            encoding = self._guard(self._backend.encode, text, None, False, False)
        ids, out, start, begun = encoding.ids, [], 0, 0
        controls = [i for i, id in enumerate(ids) if id in self._control]
        for i in [*controls, len(ids)]:
            first, last = encoding.token_to_chars(i) if i < len(ids) else (len(text), len(text))
            words, stretch = text[start:first], ids[begun:i]
            if any(mark in words for mark in swapped):
                for mark, name in swapped.items():
                    words = words.replace(mark, name)
                if start == 0 or self._begins_anew:
                    stretch = self.encode(words, bos=False)
                else:
                    stretch = self._continued(words, partial(self.encode, bos=False))
            out += [*stretch, *ids[i : i + 1]]
            start, begun = last, i + 1
        return out

    def spare_pad_token(self) -> tuple[str, int] | None:
        """A special token that is free to pad with: neither eos nor bos. None where there is none.

        A reward model's folder names it, since other tools read the score before the padding.
        """
        for token in (self.special_tokens.get("pad_token"), *SPARE):
            id = self._spare.get(token)
            if id is not None and id not in self.eos_ids and id != self.bos_id:
                return token, id
        return None

    def _eos_text(self) -> str | None:
        return self._backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    def eos_token(self) -> tuple[str, int] | None:
        """The first eos as the vocabulary spells it, and its id; None where there is none."""
        text = self._eos_text()
        return None if text is None else (text, self.eos_ids[0])

    def check_stops(self, strings: Sequence[str]) -> None:
        """Raises UserError where a stop string names a token that no text shows."""
        for string in strings:
            if any(m[0] not in self._shown for m in self.special_text.finditer(string)):
                what = f"{printable(string, 80)!r} names a special token, which no text shows"
                do = "an eos ends a response by itself: make it one in generation_config.json"
                raise UserError("stop strings", what, do)


def _only(encode_all: Callable[[list[str]], list[list[int]]], text: str) -> list[int]:
    return encode_all([text])[0]
