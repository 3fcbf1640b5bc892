"""Dialogues -> ids, by a vocabulary and the text that a chat template makes of them."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

from minirlhf.data.arguments import NONE
from minirlhf.data.chat_template import MEND
from minirlhf.data.control import begun, marked, place_of, unused_character
from minirlhf.data.parts import Messages
from minirlhf.data.rendering import Chat, RenderingTokenizer
from minirlhf.errors import UserError

# What is counted, of rows.
PARTED = "the template writes the prompt otherwise once an answer follows: it ends where they part"
UNCALLED = "tool calls that the chat template does not write"
BATCH = 32  # dialogues that are rendered at once


class Dialogue(NamedTuple):
    """A prompt of messages and answers to it."""

    prompt: Messages
    responses: Sequence[Messages]
    resume: bool = False  # the answers go on in the prompt's last turn, the assistant's
    cut: bool = False  # the answers break off: nothing follows their own text
    arguments: Mapping[str, object] = NONE  # what else the template sees by name, as tools

class DialogueTokenizer(RenderingTokenizer):
    """What encodes dialogues, and tells the text of an answer from its ids."""

    _last_front: tuple[str, list[int]] = "", []

    def encode_chat(
        self, messages: Messages, arguments: Mapping[str, object] = NONE
    ) -> list[int]:
        """Ids of `render_chat`. The template's own special tokens control, those that stand in the
        messages and arguments do not.

        The template writes the beginning-of-text token itself where there is one: none is added.
        """
        (seen, *turns), swapped = self.as_text([dict(arguments), *messages])
        return self._encode_rendered(self.render_chat(turns, arguments=seen), swapped)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text that was rendered elsewhere: its names of special tokens are these tokens.

        Who wrote the text can forge them: for texts that only others can render.
        """
        return self._encode_rendered(text, {})

    def encode_dialogue(
        self, prompt: Messages, *responses: Messages, resume: bool = False, cut: bool = False,
        whole: bool = False, arguments: Mapping[str, object] = NONE,
    ) -> tuple[list[int], ...]:
        """(prompt ids, response ids, ...) of answers to one prompt, cut as in `encode_parts`.

        A response is what the template writes after the prompt with its generation prompt. It ends
        with the last of `eos_ids` in it: blanks that a template puts behind its end of turn are
        never generated, so they are no part of it.

        Args:
            resume: a prompt that ends with a turn of the assistant was continued, so a response is
                no turn of its own.
            cut: the responses break off, so they have no end of turn.
            whole: a response ends where the rendered text does, blanks behind its end of turn
                included: what reward models read, here and elsewhere.
            arguments: as in `render_chat`.
        Raises:
            UserError: the template refuses the messages, or leaves nothing of an answer.
        """
        dialogue = Dialogue(prompt, responses, resume, cut, arguments)
        (ids,) = self.encode_dialogues([dialogue], whole)
        if isinstance(ids, UserError):
            raise ids
        return ids

    def encode_dialogues(
        self, dialogues: Sequence[Dialogue], whole: bool = False,
        counts: Sequence[Counter[str]] | None = None,
    ) -> Iterator[tuple[list[int], ...] | UserError]:
        """`encode_dialogue` of many, in less time than one by one; what one raises stands in the
        place of its ids. `counts`, of each one, as in `encode_parts`."""
        counts = [Counter() for _ in dialogues] if counts is None else counts
        for start in range(0, len(dialogues), BATCH):
            batch = slice(start, start + BATCH)
            yield from self._encode_batch(dialogues[batch], whole, counts[batch])

    def _encode_batch(
        self, dialogues: Sequence[Dialogue], whole: bool, every: Sequence[Counter[str]]
    ) -> list[tuple[list[int], ...] | UserError]:
        swapped = [
            self.as_text([dict(d.arguments), d.prompt, *d.responses]) for d in dialogues
        ]
        marks = [unused_character(parts) if d.cut else ""
                 for d, (parts, _) in zip(dialogues, swapped, strict=True)]
        asked = [_chats_of(dialogue, parts, mark) for dialogue, (parts, _), mark
                 in zip(dialogues, swapped, marks, strict=True)]
        texts, encoded = iter(self._render([chat for chats in asked for chat in chats])), []
        for dialogue, (parts, names), mark, chats, counts in zip(
            dialogues, swapped, marks, asked, every, strict=True
        ):
            shown = list(islice(texts, len(chats)))
            rendered, bare = shown[: len(parts) - 1], shown[len(parts) - 1 :]
            try:
                head, *wholes = self._unfailed(rendered, mark)
                self._check_calls(parts[1:], rendered, bare, counts)
                turn = None
                if not all(text.startswith(head) for text in wholes):
                    turn, head = self._front(head, wholes, parts, dialogue.resume)
                    counts[PARTED] += 1
                encoded.append(self._encode_turns(turn, head, wholes, names, whole, counts))
            except UserError as error:
                encoded.append(error)
        return encoded

    def _check_calls(
        self, parts: list[Messages], rendered: list[str], bare: list[str | UserError],
        counts: Counter[str],
    ) -> None:
        """Counts a row whose tool calls the template does not write.

        Args:
            parts: the prompt, each answer; `rendered` as they are, `bare` without their calls,
                those that have some.
        Raises:
            UserError: they are all that an answer says.
        """
        without = iter(bare)
        lost = [part for part, text in zip(parts, rendered, strict=True)
                if _calls(part) and next(without) == text]
        for part in lost:
            if part is not parts[0] and not any((turn["content"] or "").strip() for turn in part):
                what = "the chat template does not write tool_calls, and an answer is nothing else"
                do = "take a model whose template does, or write them in the content"
                raise UserError(self.folder, what, do)
        counts[UNCALLED] += bool(lost)

    def _unfailed(self, rendered: list[str | UserError], mark: str) -> list[str]:
        """The prompt and each whole dialogue, up to the mark if there is one."""
        for text in rendered:
            if isinstance(text, UserError):
                raise text
        head, *texts = rendered
        if mark:
            if not all(mark in text for text in texts):
                what = "the chat template leaves the end of an answer out"
                raise UserError(self.folder, what, MEND)
            texts = [text.rpartition(mark)[0] for text in texts]
        return [head, *texts]

    def _front(
        self, head: str, wholes: list[str], parts: list, resume: bool
    ) -> tuple[str, str]:
        """(all up to the end of the prompt's last turn, what stands in front of all answers), where
        the latter is not the prompt with its generation prompt: the longest beginning that they
        share with it. Where they part before the end of the prompt's last turn, of which nothing is
        to be learned, all up to the answers.

        Args:
            parts: what the template sees by name, the prompt, each answer.
        Raises:
            UserError: nothing of an answer is left behind it.
        """
        seen, prompt, *answers = parts
        mark = unused_character(parts)
        last = max((at for at, turn in enumerate(prompt) if turn["role"] != "assistant"), default=0)
        asked = [*marked(prompt[: last + 1], mark, strip=True), *prompt[last + 1 :]]
        chats = [Chat(_whole(ask, reply, resume), False, seen) for ask, reply in (
            *((asked, answer) for answer in answers),
            *((prompt, begun(answer, mark)) for answer in answers),
        )]
        end_of_head, *found = map(place_of, self._render([Chat(asked, True, seen), *chats]),
                                  [head, *wholes, *wholes], [mark] * (1 + 2 * len(wholes)))
        shared, asks, fronts = _shared([head, *wholes]), [], []
        for whole, end, start in zip(wholes, found, found[len(wholes) :], strict=False):
            if end is None and start is None:
                what = "the chat template writes the prompt differently once an answer follows"
                raise UserError(self.folder, what, "change the template, or give strings")
            if start is None:
                place = shared
            elif end is None or shared < max(end, end_of_head or 0):
                place = start
            else:
                place = min(shared, start)
            place = max(place, end or 0)
            if not whole[place:].strip():
                what = "the chat template leaves nothing of an answer behind its prompt"
                raise UserError(self.folder, what, "change the template, or give strings")
            asks.append(whole[: end or 0])
            fronts.append(whole[:place])
        return tuple(texts[0][: _shared(texts)] for texts in (asks, fronts))

    def _encode_turns(
        self, asked: str | None, head: str, texts: list[str], names: dict[str, str], whole: bool,
        counts: Counter[str],
    ) -> tuple[list[int], ...]:
        """Ids of the prompt and of each answer behind it.

        Args:
            asked: how far the prompt must reach, where `head` may end inside a token.
        """
        encode = partial(self._encode_rendered, swapped=names)
        behind = [text[len(head) :] for text in texts]
        at = self._cut_of(head)
        front = self._ids_before(head[:at], names)  # once for all of them
        ids, *wholes = (front + encode(text[at:]) for text in (head, *texts))
        if asked is not None and (shared := _shared([ids, *wholes])) >= len(encode(asked)):
            ids = ids[:shared]
        prompt, *answers = self._cut(ids, wholes, behind, encode, counts)
        return prompt, *(answers if whole else map(self.to_its_end, answers))

    def _ids_before(self, text: str, names: dict[str, str]) -> list[int]:
        """Ids of a text that ends at `_cut_of` a longer one. Where it goes on with the last such
        text, as from turn to turn of a dialogue, only what is new is encoded."""
        if names:  # what stands for them may stand for others next time
            return self._encode_rendered(text, names)
        seen, ids = self._last_front
        is_cut = text.startswith(seen) and self._cutting and self._cutting.match(text, len(seen))
        if text != seen and not is_cut:
            seen, ids = "", []
        self._last_front = text, ids + self._encode_rendered(text[len(seen) :], names)
        return self._last_front[1]

    def _cut_of(self, text: str) -> int:
        """Where the last added token of a text begins: the library cuts a text there first, so the
        ids before it are the same whatever stands behind it. 0 where there is none."""
        ends = [m.start() for m in self._cutting.finditer(text)] if self._cutting else []
        return ends[-1] if ends else 0

    @cached_property
    def _cutting(self) -> re.Pattern | None:
        """Names of added tokens that are cut out of a text as it stands, the longest first; None
        where one may take a blank before it, ask for a word's end or begin inside another."""
        added = [token for token in self._backend.get_added_tokens_decoder().values()
                 if not token.normalized]
        names = sorted({token.content for token in added}, key=len, reverse=True)
        if any(token.lstrip or token.single_word for token in added):
            return None
        if any(other in name[1:] for name in names for other in names):
            return None
        return re.compile("|".join(map(re.escape, names))) if names else None

    def to_its_end(self, ids: list[int]) -> list[int]:
        """Without the blanks behind the last eos, if nothing else stands there."""
        ends = [i + 1 for i, id in enumerate(ids) if id in self.eos_ids]
        if ends and not self.decode(ids[ends[-1] :], skip_special=False).strip():
            return ids[: ends[-1]]
        return ids

    def answer_text(
        self, prompt: str | Messages, prompt_ids: Sequence[int], ids: Sequence[int]
    ) -> str:
        """A sampled response as the data has it, without special tokens: what a string goes on
        with, or the content of the assistant's turn, which a template may begin with a blank."""
        text = self.decode_after(prompt_ids, ids)
        if isinstance(prompt, str) or prompt[-1].get("role") == "assistant":
            return text
        return text.removeprefix(self._first_blank)

    def ids_of_answer(
        self, prompt: str | Messages, prompt_ids: Sequence[int], ids: Sequence[int], text: str
    ) -> list[int]:
        """The sampled ids of which a stop string left `text`, the beginning of `answer_text`;
        where it cut a token, what is left of this one is encoded."""
        for end in reversed(range(len(ids) + 1)):
            said = self.answer_text(prompt, prompt_ids, ids[:end])
            if text.startswith(said):
                break
        rest = self._continued(text[len(said) :], partial(self.encode, bos=False))
        return [*ids[:end], *rest]

    @cached_property
    def _first_blank(self) -> str:
        """The blanks that the template writes before an answer, if nothing else."""
        user = [{"role": "user", "content": "a"}]
        head, whole = self._render([
            Chat(user, True), Chat([*user, {"role": "assistant", "content": "b"}], False)
        ])
        if isinstance(head, UserError) or isinstance(whole, UserError):
            return ""
        blank, found, _ = whole.removeprefix(head).partition("b")
        return blank if whole.startswith(head) and found and not blank.strip() else ""


def _shared(rows: Sequence[Sequence]) -> int:
    """How many items are the same at the beginning of all rows."""
    return next((i for i, items in enumerate(zip(*rows, strict=False)) if len({*items}) > 1),
                min(map(len, rows)))


def _whole(prompt: Messages, response: Messages, resume: bool) -> Messages:
    """Prompt and response; `resume` joins their turns where the prompt ends with the assistant."""
    if not (resume and prompt[-1]["role"] == "assistant"):
        return prompt + response
    content = prompt[-1]["content"].rstrip() + response[0]["content"]
    return [*prompt[:-1], prompt[-1] | {"content": content}, *response[1:]]


def _calls(messages: Messages) -> bool:
    return any(turn.get("tool_calls") for turn in messages)


def _chats_of(dialogue: Dialogue, parts: list, mark: str) -> list[Chat]:
    """What is rendered of a dialogue: its prompt, and behind it each answer. Then those of them
    that have tool calls, without these.

    Args:
        parts: as in `DialogueTokenizer.as_text`: what the template sees by name, prompt, answers.
        mark: stands where an answer breaks off.
    """
    seen, prompt, *answers = parts
    bare = [[{key: value for key, value in turn.items() if key != "tool_calls"} for turn in part]
            for part in parts[1:]]

    def behind(answer: Messages) -> Chat:
        return Chat(marked(_whole(prompt, answer, dialogue.resume), mark), False, seen)

    chats = [Chat(prompt, True, seen), *map(behind, answers)]
    chats += [Chat(bare[0], True, seen)] if _calls(prompt) else []
    return chats + [
        behind(without) for without, answer in zip(bare[1:], answers, strict=True) if _calls(answer)
    ]
