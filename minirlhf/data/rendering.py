"""Dialogues as text, by the chat templates of a model's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.arguments import NONE
from minirlhf.data.chat_template import ChatTemplate, plain_template
from minirlhf.data.control import learned_control, marked, unused_character
from minirlhf.data.parts import Messages
from minirlhf.data.vocabulary import Vocabulary
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import file_inside
from minirlhf.files.reading import read_text

TEMPLATE_CAP = 4 << 20  # bytes of a template's file


class Chat(NamedTuple):
    """What is rendered."""

    messages: Messages
    add_generation_prompt: bool
    arguments: Mapping[str, object] = NONE


class RenderingTokenizer(Vocabulary):
    """A vocabulary with the chat template of its folder.

    Attributes:
        chat_template: Jinja source, or None where `template_origin` is "plain fallback".
        tool_template: the one named tool_use, which renders where tools are given, or None.
        template_origin: "chat_template.jinja", "tokenizer_config.json" or "plain fallback".
    """

    def __init__(
        self, folder: Path, source: str, config: dict, eos_ids: list[int], model: dict
    ):
        super().__init__(folder, source, config, eos_ids, model)
        own = file_inside(self.folder, "chat_template.jinja")
        configured = self._config.get("chat_template")
        tools = None
        if isinstance(configured, list):  # [{"name": ..., "template": ...}]
            named = {str(t.get("name")): t.get("template") for t in configured if type(t) is dict}
            configured, tools = named.get("default"), named.get("tool_use")
        self.chat_template: str | None = None
        self.tool_template = tools if isinstance(tools, str) and not own.exists() else None
        if own.exists():
            self.template_origin = own.name
            self.chat_template = read_text(own, TEMPLATE_CAP)
        elif configured is not None:
            self.template_origin = "tokenizer_config.json"
            if not isinstance(configured, str):
                where = self.folder / self.template_origin
                what = f"chat_template is {printable(repr(configured), 80)}"
                raise UserError(where, what, "a string, or a list of named ones")
            self.chat_template = configured
        if not self.chat_template:  # an empty one renders nothing
            self.template_origin, self.chat_template = "plain fallback", None
        self._templates: dict[str, ChatTemplate] = {}  # made on first use: plain text needs none
        found = learned_control(
            self._backend.get_added_tokens_decoder(), self.eos_ids,
            set(self.special_tokens.values()), self._written,
        )
        self._learn(*found)

    # ---------------------------------------------------------------------------------------- chat

    def _written(self) -> tuple[str, str]:
        """(what the template writes around turns that are not the assistant's, all that it writes);
        of turns that it refuses, nothing."""
        if self.chat_template is None:
            return "", ""
        mark = unused_character([])
        system, user, answer, tool = (
            {"role": role, "content": mark} for role in ("system", "user", "assistant", "tool")
        )
        shown = [text if isinstance(text, str) else "" for text in self._render([
            Chat([system, user], False), Chat([user], False), Chat([user, answer, tool], False),
            Chat([system, user, answer, user], True), Chat([user, answer, user], True),
        ])]
        parts = shown[2].split(mark)
        behind = parts[2:] if len(parts) == 4 else []  # of the answer
        return "\n".join([*shown[:2], *behind]), "\n".join(shown)

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

    def _sources(self) -> list[str]:
        """The template, and the one for tools if there is one."""
        return [self.chat_template or self.fallback(), *filter(None, [self.tool_template])]

    def _template(self, source: str) -> ChatTemplate:
        if source not in self._templates:
            where = f"{self.folder} ({self.template_origin})"
            self._templates[source] = ChatTemplate(source, where)
        return self._templates[source]

    def template_reads(self) -> set[str]:
        """Names that the chat template, or the one for tools, looks up."""
        return {name for source in self._sources() for name in self._template(source).reads}

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
        plain, *for_tools = self._sources()
        chosen = [for_tools[0] if for_tools and names.get("tools") is not None else plain
                  for *_, names in asked]
        texts = {}
        for source in dict.fromkeys(chosen):
            mine = [i for i, other in enumerate(chosen) if other is source]
            try:
                found = self._template(source).render([asked[i] for i in mine])
            except UserError as error:
                found = [error] * len(mine)
            texts |= zip(mine, found, strict=True)
        return [texts[i] for i in range(len(asked))]

    def _left_open(self, text: str, content: str, mark: str) -> str | UserError:
        """The text up to the mark behind the content of its last turn."""
        text, found, _ = text.rpartition(mark)
        if not found or not text.endswith(content.strip()):
            what = "the chat template changes the assistant turn that is to be continued"
            return UserError(self.folder, what)
        return text

    def fallback(self) -> str:
        """The plain template, which an export of a model without one has."""
        bos = "".join(self._backend.id_to_token(id) for id in self._prefix)
        return plain_template(bos, self._eos_text() or "")
