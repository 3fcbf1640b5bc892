"""Dialogues as text, by the chat templates of a model's folder."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.arguments import NONE
from minirlhf.data.chat_template import MEND, ChatTemplate, plain_template
from minirlhf.data.control import learned_control, marked, unused_character
from minirlhf.data.parts import Messages
from minirlhf.data.vocabulary import Vocabulary
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import file_inside
from minirlhf.files.reading import read_text

ADDITIONAL = "additional_chat_templates"  # folder of named ones
TOOLS = "tool_use"  # renders rows that have tools, where a folder has a template of this name
TEMPLATE_CAP = 4 << 20  # bytes of a template's file


class Chat(NamedTuple):
    """What is rendered."""

    messages: Messages
    add_generation_prompt: bool
    arguments: Mapping[str, object] = NONE


class RenderingTokenizer(Vocabulary):
    """A vocabulary with the chat templates of its folder.

    Attributes:
        chat_template: Jinja source, or None where `template_origin` is "plain fallback" or a folder
            names templates and none of them default.
        named_templates: name -> source of the others; tool_use renders where tools are given.
        template_origin: "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
            or "plain fallback".
    """

    def __init__(
        self, folder: Path, source: str, config: dict, eos_ids: list[int], model: dict
    ):
        super().__init__(folder, source, config, eos_ids, model)
        self.template_origin, named = _stored(self.folder, self._config.get("chat_template"))
        self.chat_template: str | None = named.pop("default", None) or None
        self.named_templates: dict[str, str] = named
        if not (self.chat_template or named):  # an empty one renders nothing
            self.template_origin = "plain fallback"
        self._templates: dict[str, ChatTemplate] = {}  # made on first use: plain text needs none
        found = learned_control(
            self._backend.get_added_tokens_decoder(), self.eos_ids,
            set(self.special_tokens.values()), self._written,
        )
        self._learn(*found)

    # ---------------------------------------------------------------------------------------- chat

    def _written(self) -> tuple[str, str]:
        """(what the templates write around turns that are not the assistant's, all that they
        write); of turns that they refuse, nothing."""
        mark = unused_character([])
        system, user, answer, tool = (
            {"role": role, "content": mark} for role in ("system", "user", "assistant", "tool")
        )
        dialogues = [([user, answer, tool], False), ([system, user], False), ([user], False),
                     ([system, user, answer, user], True), ([user, answer, user], True)]
        around, anywhere = [], []
        for arguments in self._kinds() if self.chat_template or self.named_templates else ():
            texts = self._render([Chat(*dialogue, arguments) for dialogue in dialogues])
            shown = [text if isinstance(text, str) else "" for text in texts]
            parts = shown[0].split(mark)
            around += [*shown[1:3], *(parts[2:] if len(parts) == 4 else [])]  # behind the answer
            anywhere += shown
        return "\n".join(around), "\n".join(anywhere)

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool = True,
        arguments: Mapping[str, object] = NONE,
    ) -> str:
        """Text of a dialogue by the chat template, or by a plain one where the model has none.

        Args:
            messages: [{"role": ..., "content": ...}, ...].
            add_generation_prompt: end where the assistant's answer begins. A last message that is
                already the assistant's is left open instead, to be continued.
            arguments: what else the template sees by name, as tools or enable_thinking.
        Raises:
            UserError: the template refuses the messages, or jinja2 is missing.
        """
        (text,) = self._render([Chat(messages, add_generation_prompt, arguments)])
        if isinstance(text, UserError):
            raise text
        return text

    def _kinds(self) -> list[Mapping[str, object]]:
        """What rows may give, of which each is rendered by another template."""
        return [NONE, *([{"tools": []}] if TOOLS in self.named_templates else [])]

    def _source_for(self, arguments: Mapping[str, object]) -> str:
        """The template that renders where these are given, chosen as transformers does.

        Raises:
            UserError: the folder names templates, but none for this.
        """
        if arguments.get("tools") is not None and TOOLS in self.named_templates:
            return self.named_templates[TOOLS]
        if self.chat_template is None and self.named_templates:
            names = ", ".join(printable(name, 40) for name in self.named_templates)
            what = f"has chat templates by the names {names}, and none by the name default"
            do = "name the one for rows without tools so"
            raise UserError(f"{self.folder} ({self.template_origin})", what, do)
        return self.chat_template or self.fallback()

    def _template(self, source: str) -> ChatTemplate:
        if source not in self._templates:
            where = f"{self.folder} ({self.template_origin})"
            self._templates[source] = ChatTemplate(source, where)
        return self._templates[source]

    def template_reads(self) -> set[str]:
        """Names that the chat template, or the one for tools, looks up."""
        found: set[str] = set()
        for arguments in self._kinds():
            with suppress(UserError):  # of a row that is to be rendered it is raised there
                found |= self._template(self._source_for(arguments)).reads
        return found

    def _render(self, chats: list[Chat]) -> list[str | UserError]:
        """`render_chat` of many dialogues, which takes less time than one by one; what one raises
        stands in the place of its text."""
        # What a template writes behind the turn may look like the turn's own text, or the turn be
        # empty: a character that stands nowhere else shows where it ends.
        marks = []
        for messages, add, arguments in chats:
            is_open = add and messages and messages[-1].get("role") == "assistant"
            marks.append(unused_character([*messages, dict(arguments)]) if is_open else "")
        texts = self._rendered([
            (marked(messages, mark, strip=True), add and not mark,
             {**self.special_tokens, **arguments})
            for (messages, add, arguments), mark in zip(chats, marks, strict=True)
        ])
        return [
            self._left_open(text, chat.messages[-1]["content"], mark)
            if mark and isinstance(text, str) else text
            for text, chat, mark in zip(texts, chats, marks, strict=True)
        ]

    def _rendered(self, asked: list[tuple[Messages, bool, dict]]) -> list[str | UserError]:
        """`ChatTemplate.render`, each by the template that is meant for it."""
        mine: dict[str, list[int]] = {}  # source -> which of them
        texts: dict[int, str | UserError] = {}
        for at, (*_, names) in enumerate(asked):
            try:
                mine.setdefault(self._source_for(names), []).append(at)
            except UserError as error:
                texts[at] = error
        for source, places in mine.items():
            try:
                found = self._template(source).render([asked[at] for at in places])
            except UserError as error:
                found = [error] * len(places)
            texts |= zip(places, found, strict=True)
        return [texts[at] for at in range(len(asked))]

    def _left_open(self, text: str, content: str, mark: str) -> str | UserError:
        """The text up to the mark behind the content of its last turn."""
        text, found, _ = text.rpartition(mark)
        if not found or not text.endswith(content.strip()):
            what = "the chat template changes the assistant turn that is to be continued"
            return UserError(self.folder, what, MEND)
        return text

    @property
    def has_template(self) -> bool:
        """Whether the folder has a chat template for plain turns, other than the plain one that
        stands in an export of a model without."""
        return self.chat_template not in (None, self.fallback())

    def fallback(self) -> str:
        """The plain template, which an export of a model without one has."""
        bos = "".join(self._backend.id_to_token(id) for id in self._prefix)
        return plain_template(bos, self._eos_text() or "")


def _stored(folder: Path, configured: object) -> tuple[str, dict[str, str]]:
    """(where a folder keeps its chat templates, name -> Jinja source of each), as transformers
    looks for them: files, and else what tokenizer_config.json has.

    Raises:
        UserError: that is no string and names no strings.
    """
    own = file_inside(folder, "chat_template.jinja")
    paths = {"default": own} if own.exists() else {}
    for path in sorted((folder / ADDITIONAL).glob("*.jinja")):
        paths[path.name.removesuffix(".jinja")] = file_inside(folder, f"{ADDITIONAL}/{path.name}")
    if paths:
        origin = own.name if own.exists() else ADDITIONAL
        return origin, {name: read_text(path, TEMPLATE_CAP) for name, path in paths.items()}
    origin, named = "tokenizer_config.json", configured
    if isinstance(configured, list):  # [{"name": ..., "template": ...}]
        pairs = [(one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None)
                 for one in configured]
        named = {name if isinstance(name, str) else "": source for name, source in pairs}
    elif not isinstance(configured, dict):
        named = {} if configured is None else {"default": configured}
    if "" in named or not all(isinstance(source, str) for source in named.values()):
        what = f"chat_template is {printable(repr(configured), 80)}"
        raise UserError(folder / origin, what, "a string, or a list of named ones")
    return origin, named
