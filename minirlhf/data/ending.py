"""What a chat template writes behind an answer, and texts that a policy ended, ended as it does.

Templates such as ChatML write a line end behind the end of turn. A policy stops at its eos before
that; a reward model reads its score behind it, where the rendered text ends, as other tools do.
"""

from collections.abc import Mapping
from contextlib import suppress

from minirlhf.data.arguments import NONE
from minirlhf.data.chat_template import MEND
from minirlhf.data.control import unused_character
from minirlhf.data.parts import Messages
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError


def ending(
    tokenizer: Tokenizer, prompt: Messages, arguments: Mapping[str, object] = NONE
) -> str:
    """What the template writes behind an answer to a prompt: its end of turn and what follows.

    Args:
        prompt: may end with a turn of the assistant, which the answer then goes on with.
        arguments: as in `Tokenizer.render_chat`.
    Raises:
        UserError: the template refuses the dialogue, or leaves the answer out.
    """
    mark = unused_character(prompt)
    if prompt[-1]["role"] == "assistant":
        dialogue = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + mark}]
    else:
        dialogue = [*prompt, {"role": "assistant", "content": mark}]
    _, found, end = tokenizer.render_chat(dialogue, False, arguments).rpartition(mark)
    if not found:
        raise UserError(tokenizer.folder, "the chat template leaves the answer out", MEND)
    return end


def tail_of(tokenizer: Tokenizer) -> str:
    """What stands behind the end of turn in `ending`, or all of it where that is no special token;
    "" where nothing does, or where the template refuses a question."""
    with suppress(UserError):
        end = ending(tokenizer, [{"role": "user", "content": "a"}])
        return tokenizer.special_text.split(end)[-1]
    return ""


def end_ids(
    tokenizer: Tokenizer, prompt: Messages, whole: bool, arguments: Mapping[str, object] = NONE
) -> list[int] | None:
    """Ids of what ends an answer to a prompt.

    Args:
        whole: as in `Tokenizer.encode_dialogue`; otherwise the template's last eos, one id.
    Returns:
        None where no special token begins the end: its ids then depend on the answer before it.
    Raises:
        UserError: as `ending`.
    """
    end = ending(tokenizer, prompt, arguments)
    ids = tokenizer.encode_marked(end)
    if not whole:
        return [id for id in ids if id in tokenizer.eos_ids][-1:] or [tokenizer.eos_ids[0]]
    return ids if tokenizer.special_text.match(end) else None


def closed(ids: list[int], end: list[int]) -> list[int]:
    """The ids with `end` behind them, of which they may have the first part already.

    >>> closed([5], [9, 7]), closed([5, 9], [9, 7]), closed([5, 9, 7], [9, 7])
    ([5, 9, 7], [5, 9, 7], [5, 9, 7])
    """
    there = next(n for n in range(len(end), -1, -1) if ids[len(ids) - n :] == end[:n])
    return ids + end[there:]


def completed(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> list[int]:
    """An answer in ids; of a dialogue and ended by an eos, with all that the template writes there.

    One without eos at its end was cut, or has all of it already: it stays as it is. A dialogue
    holds what the template writes between a question and its answer, a special token among it.
    """
    if not answer or answer[-1] not in tokenizer.eos_ids:
        return answer
    first, second = unused_character([]), "\uf8ff"
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    try:
        text = tokenizer.render_chat(turns, False)
    except UserError:  # no such dialogue can have been rendered
        return answer
    between, _, end = text.partition(first)[2].partition(second)
    seen, whole = (tokenizer.decode(ids, skip_special=False)
                   for ids in (tokenizer.encode_marked(between), prompt + answer))
    if not tokenizer.special_text.search(between) or seen.strip() not in whole:
        return answer
    return closed(answer[:-1], tokenizer.encode_marked(end))
