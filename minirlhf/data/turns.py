"""Dialogues of which several turns are learned: each turn of the assistant is encoded as the answer
to all that stands before it, and must stand so in the whole dialogue, too.

A policy answers a turn as the template renders it at the end of a dialogue. Some templates write a
turn otherwise once others follow (Qwen3 drops its thoughts): what is learned there would not be
what is sampled, so such a row is refused.
"""

from collections.abc import Sequence
from itertools import pairwise

from minirlhf.data.dialogues import Dialogue
from minirlhf.data.parts import Messages, Parts, Useless, wrong_value
from minirlhf.errors import UserError
from minirlhf.files.rows import Row

LEARNED = ("weight", "train", "loss")  # of a message, in OpenAI's form, axolotl's and ms-swift's
Gaps = tuple[tuple[int, int], ...]  # (first, behind the last) token that is not learned


def is_learned(turn: dict) -> bool:
    """Whether a turn is the assistant's, and nothing in it says otherwise."""
    return turn["role"] == "assistant" and all(turn.get(name) != 0 for name in LEARNED)


def learned_parts(row: Row, parts: Parts, train_on: str) -> Parts:
    """(prompt, answer) of a dialogue, cut so that the answer begins and ends with a learned turn.

    Args:
        parts: those of a format; a dialogue that is one column has its last turn as the answer.
        train_on: "all": every turn of the assistant, of a completion those in it; "last": the last
            turn; "completion": all that stands behind the prompt, whoever says it.
    Raises:
        UserError: a turn's weight (or train, or loss) is neither 0 nor 1.
        Useless: no turn is to be learned.
    """
    prompt, answer = parts
    turns = prompt + answer
    for number, turn in enumerate(turns):
        for name in LEARNED:
            if turn.get(name) not in (None, 0, 1):
                raise wrong_value(row, f"{name} of turn {number + 1}", turn[name], "needs 0 or 1")
    if train_on == "last":
        prompt, answer = turns[:-1], turns[-1:]
    learned = [at for at in range(len(prompt), len(turns)) if is_learned(turns[at])]
    if not learned:
        raise Useless("no turn is to be learned")
    if train_on == "all":
        prompt, answer = turns[: learned[0]], turns[learned[0] : learned[-1] + 1]
    return prompt, answer


def whole_dialogue(parts: Parts) -> Parts:
    """A dialogue of one column, cut before the first answer that something stands before."""
    turns = parts[0] + parts[1]
    first = next(at for at in range(1, len(turns)) if turns[at]["role"] == "assistant")
    return turns[:first], turns[first:]


def unfold(dialogue: Dialogue) -> list[Dialogue]:
    """A dialogue for each learned turn of its answer, which is that turn."""
    prompt, (answer,) = dialogue.prompt, dialogue.responses
    if len(answer) == 1:
        return [dialogue]
    turns: Messages = prompt + answer
    return [
        dialogue._replace(prompt=turns[:at], responses=[turns[at : at + 1]])
        for at in range(len(prompt), len(turns)) if is_learned(turns[at])
    ]


def fold(
    row: Row, found: Sequence[tuple[list[int], ...] | UserError]
) -> tuple[tuple[list[int], list[int]] | UserError, Gaps]:
    """(ids of the prompt and of all behind it, or what is wrong; what of the latter is no target).

    Args:
        found: ids of each dialogue of `unfold`.
    """
    if error := next((ids for ids in found if isinstance(ids, UserError)), None):
        return error, ()
    (head, _), (*_, last) = found[0], found
    whole, spans = last[0] + last[1], []
    for number, (prompt, answer) in enumerate(found):
        end = len(prompt) + len(answer)
        if whole[:end] != prompt + answer:
            what = f"the chat template writes answer {number + 1} otherwise once turns follow it"
            return UserError(row.where, what, "--train-on last learns the last turn only"), ()
        spans.append((len(prompt) - len(head), end - len(head)))
    gaps = tuple((end, start) for (_, end), (start, _) in pairwise(spans))
    return (head, whole[len(head) :]), gaps
