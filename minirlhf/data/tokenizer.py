"""The tokenizer of a Hugging Face folder: its vocabulary and its chat template, in and out."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minirlhf.data.chat_template import ChatTemplate, plain_template
from minirlhf.data.parts import Messages
from minirlhf.data.vocabulary import EOS, NAMES, PAD, Vocabulary, swap_names, unused_character
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import CODE_KEYS, file_inside
from minirlhf.files.kinds import no_model
from minirlhf.files.reading import read_json, read_text

FILE_CAP = 256 << 20  # bytes of tokenizer.json; the largest in use have about 35 MB
FAST = "PreTrainedTokenizerFast"
BATCH = 32  # dialogues that are rendered at once
OBJECT_CAP = 4 << 20  # bytes of the small files beside it
READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
        "generation_config.json", "chat_template.jinja")


class Dialogue(NamedTuple):
    """A prompt of messages and answers to it."""

    prompt: Messages
    responses: Sequence[Messages]
    resume: bool = False  # the answers go on in the prompt's last turn, the assistant's
    cut: bool = False  # the answers break off: nothing follows their own text


class Tokenizer(Vocabulary):
    """A vocabulary with the chat template of its folder.

    Attributes:
        chat_template: Jinja source, or None where `template_origin` is "plain fallback".
        template_origin: "chat_template.jinja", "tokenizer_config.json" or "plain fallback".
    """

    def __init__(
        self, folder: Path, source: str, config: dict, eos_ids: list[int], model: dict
    ):
        super().__init__(folder, source, config, eos_ids, model)
        own = file_inside(self.folder, "chat_template.jinja")
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
        self._template: ChatTemplate | None = None  # made on first use: plain text needs none

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
        (text,) = self._render([(messages, add_generation_prompt)])
        if isinstance(text, UserError):
            raise text
        return text

    def _render(self, chats: list[tuple[Messages, bool]]) -> list[str | UserError]:
        """`render_chat` of many dialogues, which takes less time than one by one; what one raises
        stands in the place of its text."""
        if self._template is None:
            source = self.chat_template or self._fallback()
            try:
                self._template = ChatTemplate(source, f"{self.folder} ({self.template_origin})")
            except UserError as error:
                return [error] * len(chats)
        # What a template writes behind the turn may look like the turn's own text, or the turn be
        # empty: a character that stands nowhere else shows where it ends.
        marks = []
        for messages, add in chats:
            is_open = add and messages and messages[-1].get("role") == "assistant"
            marks.append(unused_character(messages) if is_open else "")
        texts = self._template.render([
            (_marked(messages, mark, strip=True), add and not mark, self.special_tokens)
            for (messages, add), mark in zip(chats, marks, strict=True)
        ])
        return [
            self._left_open(text, messages[-1]["content"], mark)
            if mark and isinstance(text, str) else text
            for text, (messages, _), mark in zip(texts, chats, marks, strict=True)
        ]

    def _left_open(self, text: str, content: str, mark: str) -> str | UserError:
        """The text up to the mark behind the content of its last turn."""
        text, found, _ = text.rpartition(mark)
        if not found or not text.endswith(content.strip()):
            what = "the chat template changes the assistant turn that is to be continued"
            return UserError(self.folder, what)
        return text

    def _fallback(self) -> str:
        bos = "".join(self._backend.id_to_token(id) for id in self._prefix)
        return plain_template(bos, self._eos_text() or "")

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
        self, prompt: Messages, *responses: Messages, resume: bool = False, cut: bool = False,
        whole: bool = False,
    ) -> tuple[list[int], ...]:
        """(prompt ids, response ids, ...) of answers to one prompt, each encoded by itself.

        A response is what the template writes after the prompt with its generation prompt. It ends
        with the last of `eos_ids` in it: blanks that a template puts behind its end of turn are
        never generated, so they are no part of it.

        Args:
            resume: a prompt that ends with a turn of the assistant was continued, so a response is
                no turn of its own.
            cut: the responses break off, so they have no end of turn.
            whole: a response ends where the rendered text does, blanks behind its end of turn
                included: what reward models read, here and elsewhere.
        Raises:
            UserError: the rendered prompt is no prefix of the rendered dialogue.
        """
        (ids,) = self.encode_dialogues([Dialogue(prompt, responses, resume, cut)], whole)
        if isinstance(ids, UserError):
            raise ids
        return ids

    def encode_dialogues(
        self, dialogues: Sequence[Dialogue], whole: bool = False
    ) -> Iterator[tuple[list[int], ...] | UserError]:
        """`encode_dialogue` of many, in less time than one by one; what one raises stands in the
        place of its ids."""
        for start in range(0, len(dialogues), BATCH):
            yield from self._encode_batch(dialogues[start : start + BATCH], whole)

    def _encode_batch(
        self, dialogues: Sequence[Dialogue], whole: bool
    ) -> list[tuple[list[int], ...] | UserError]:
        swapped = [swap_names([d.prompt, *d.responses], self.special_text) for d in dialogues]
        chats: list[tuple[Messages, bool]] = []
        marks = [unused_character(turns) if d.cut else ""
                 for d, (turns, _) in zip(dialogues, swapped, strict=True)]
        for dialogue, (turns, _), mark in zip(dialogues, swapped, marks, strict=True):
            prompt, *responses = turns
            chats += [(prompt, True)]
            chats += [(_marked(_whole(prompt, answer, dialogue.resume), mark), False)
                      for answer in responses]
        texts, encoded = iter(self._render(chats)), []
        for (turns, names), mark in zip(swapped, marks, strict=True):
            rendered = list(islice(texts, len(turns)))  # the prompt, each whole dialogue
            try:
                encoded.append(self._encode_turns(rendered, names, mark, whole))
            except UserError as error:
                encoded.append(error)
        return encoded

    def _encode_turns(
        self, rendered: list[str | UserError], names: dict[str, str], mark: str, whole: bool
    ) -> tuple[list[int], ...]:
        for text in rendered:
            if isinstance(text, UserError):
                raise text
        head, *texts = rendered
        encoded = [self._encode_rendered(head, names)]
        for text in texts:
            if not text.startswith(head):
                what = "the chat template writes the prompt differently once an answer follows"
                raise UserError(self.folder, what, "change the template, or give strings")
            if mark and mark not in text:
                what = "the chat template leaves the end of an answer out"
                raise UserError(self.folder, what)
            text = text.rpartition(mark)[0] if mark else text
            ids = self._encode_rendered(text[len(head) :], names)
            ends = [i + 1 for i, id in enumerate(ids) if id in self.eos_ids]
            is_end = ends and not self.decode(ids[ends[-1] :], skip_special=False).strip()
            encoded.append(ids[: ends[-1]] if is_end and not whole else ids)
        return tuple(encoded)

    # -------------------------------------------------------------------------------------- export

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


def _name_for_version_4(config: dict) -> None:
    """Gives what transformers 5 names anew the names that version 4, too, reads."""
    if str(config.setdefault("tokenizer_class", FAST)).endswith("Backend"):
        config["tokenizer_class"] = FAST  # the same class; version 4 knows none of the others
    if isinstance(config.get("extra_special_tokens"), list):  # an object in version 4
        if more := config.pop("extra_special_tokens"):
            config["additional_special_tokens"] = more
    if named := config.pop("model_specific_special_tokens", None):
        config["extra_special_tokens"] = named


def _marked(messages: Messages, mark: str, strip: bool = False) -> Messages:
    """With the mark behind the content of the last turn, in the place of blanks there if they are
    to be stripped; as they are where it is ""."""
    if not mark:
        return messages
    content = messages[-1]["content"]
    content = (content.rstrip() if strip else content) + mark
    return [*messages[:-1], messages[-1] | {"content": content}]


def _whole(prompt: Messages, response: Messages, resume: bool) -> Messages:
    """Prompt and response; `resume` joins their turns where the prompt ends with the assistant."""
    if not (resume and prompt[-1]["role"] == "assistant"):
        return prompt + response
    content = prompt[-1]["content"].rstrip() + response[0]["content"]
    return [*prompt[:-1], prompt[-1] | {"content": content}, *response[1:]]


def tokenizer_files(folder: Path) -> list[str]:
    """The files that a folder's tokenizer is made of, its chat template and eos among them."""
    return [str(folder / name) for name in READ if (folder / name).exists()]


def _object(folder: Path, name: str) -> dict:
    """A JSON object from a file that may be absent."""
    path = file_inside(folder, name)
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
    path = file_inside(folder, "tokenizer.json")
    if not path.exists():
        lack = UserError(path, "no such file", "give a folder with a tokenizer.json")
        raise no_model(folder, lack)
    own = _object(folder, "tokenizer_config.json")
    own = {name: v for name, v in own.items() if v is not None or name in NAMES}
    # Its own first, in their order: what is written of it is then the same after each reading.
    more = _object(folder, "special_tokens_map.json")
    config = own | {name: value for name, value in more.items() if own.get(name) is None}
    model = _object(folder, "config.json")
    tokenizer = Tokenizer(folder, read_text(path, FILE_CAP), config, _model_eos(folder), model)
    rows = model.get("vocab_size")
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
