"""Which kind of data a file holds, told by the columns of its first row.

A row's parts are (prompt or None, response, ...), each as parts.py reads it. README.md shows a row
of each kind.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from minirlhf.data.parts import (
    LARGEST,
    REMOVE,
    Messages,
    Part,
    has_list,
    ids_part,
    is_chat,
    messages_part,
    optional_number,
    part_kind,
    string_part,
    turns_part,
    wrong_value,
)
from minirlhf.data.turns import learned_parts, whole_dialogue
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row
from minirlhf.files.sieve import OfEveryRow

ANSWER = "\n\nAssistant:"  # how Anthropic's HH transcripts (arXiv:2204.05862) begin an answer
LOSS_MASKS = ("labels", "completion_mask", "assistant_masks")  # of tokenised texts elsewhere
LIKED = ("label", "kto_tag")  # true: the answer was liked (Ethayarajh et al. 2024, KTO)
LOSS_ON = {"all": ", loss on each turn of the assistant", "last": ", loss on the last turn only",
           "completion": ", loss on all of the answer"}
GRADES = (*LIKED, "score", "rating", "helpfulness", "correctness", "reward")
# (prompt or None, chosen, its mask, rejected, its mask): TRL's collator, TRL 1.x, LLaMA-Factory
PAIR_LABELS = {"margin": 0.0, "chosen_probability": 1.0}  # optional columns, and what none means
ID_PAIRS = (
    ("prompt_ids", "input_ids_chosen", "attention_mask_chosen",
     "input_ids_rejected", "attention_mask_rejected"),
    ("prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"),
    ("prompt_input_ids", "chosen_input_ids", "chosen_attention_mask",
     "rejected_input_ids", "rejected_attention_mask"),
)


class Format(NamedTuple):
    """One kind of file.

    Args:
        detected: the kind in words, with its columns, as the user is told.
        used: columns that are read; all others are carried through.
        parts: the parts of a row; raises UserError where a row is not of this kind.
        absent: columns that would make the row another kind.
    """

    detected: str
    used: tuple[str, ...]
    parts: Callable[[Row], tuple[Part | None, ...]]
    absent: tuple[str, ...] = ()

    def split(self, row: Row) -> tuple[Part | None, ...]:
        """Parts of a row, or an error that says what the file was taken for."""
        try:
            for name in self.absent:
                if name in row.columns:
                    raise UserError(row.where, f"has a column {name}, unlike the first row")
            return self.parts(row)
        except UserError as error:
            do = f"{error.do}; " if error.do else ""
            raise UserError(error.where, error.what, f"{do}detected: {self.detected}") from None


# -------------------------------------------------------------------------------- columns of a row


def pair_labels(row: Row) -> tuple[float | None, float | None]:
    """(a pair's margin in reward units, the probability that chosen is the better answer); None
    where the row has none.

    Raises:
        UserError: a margin that is no finite float32, a probability that is not from 0 to 1.
    """
    finite = "needs a finite number, or no margin"
    share = "needs a number from 0 to 1, or no chosen_probability"
    by = optional_number(row, "margin", -LARGEST, LARGEST, finite)
    return by, optional_number(row, "chosen_probability", 0.0, 1.0, share)


def unknown_columns(row: Row, legal: str) -> UserError:
    """The error for a first row that is of no known kind."""
    keys = ", ".join(
        f"{printable(name, 40)} ({json_kind(value)})" for name, value in row.columns.items()
    )
    do = f"legal: {legal}; other names: --columns prompt=question"
    if any(has_list(row, name) for name in row.columns):
        do += "; no table has lists: write the file as JSON lines"
    return OfEveryRow(row.where, f"columns of no known format: {keys}", do)


# ------------------------------------------------------------------------------------------- pairs


def _transcripts(row: Row) -> tuple[str, str, str]:
    """Splits two HH transcripts behind the last answer mark of what they share."""
    chosen, rejected = string_part(row, "chosen"), string_part(row, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((at for at, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    cut = chosen.rfind(ANSWER, 0, shared) + len(ANSWER)
    if cut < len(ANSWER):
        raise UserError(row.where, f"chosen and rejected share no {printable(ANSWER)!r}")
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[cut:].strip():
            raise UserError(row.where, f"{key} has an empty answer", REMOVE)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _dialogues(row: Row) -> tuple[Messages, Messages, Messages]:
    """Splits two dialogues behind the turns that they share, where the assistant speaks next."""
    chosen, rejected = messages_part(row, "chosen"), messages_part(row, "rejected")
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            got = printable(turns[-1]["role"], 40)
            raise UserError(row.where, f"{key} ends with role {got!r}", "needs 'assistant'")
    shared, most = 0, min(len(chosen), len(rejected)) - 1  # each side keeps a turn of its own
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if not shared:
        do = "both need the same turns up to an answer of the assistant"
        raise UserError(row.where, "chosen and rejected share no turns", do)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _answers(row: Row, key: str) -> bool:
    """Whether messages begin with an answer, so that they are no whole dialogue."""
    return messages_part(row, key)[0]["role"] == "assistant"


def was_sampled(row: Row) -> bool:
    """Whether `minirlhf sample` wrote the row. Then its response may be empty or truncated, and
    continues the prompt's last turn where that is the assistant's."""
    columns = row.columns
    return "response" in columns and columns.get("finish_reason") in ("eos", "stop", "length")


def _columns(
    read: Callable[[Row, str, bool], Part], keys: tuple[str, ...], empty_prompt: bool = False
) -> Callable[[Row], tuple[Part, ...]]:
    """Reads each of these columns of a row by string_part or messages_part."""

    def may_be_empty(row: Row, key: str) -> bool:
        return empty_prompt if key == "prompt" else key == "response" and was_sampled(row)

    return lambda row: tuple(read(row, key, may_be_empty(row, key)) for key in keys)


def _id_pairs(columns: dict, empty_prompt: bool) -> Format | None:
    fits = (names for names in ID_PAIRS if names[1] in columns or names[3] in columns)
    if (names := next(fits, None)) is None:
        return None
    prompt, chosen, chosen_mask, rejected, rejected_mask = names
    given = prompt in columns

    def parts(row: Row) -> tuple[list[int] | None, ...]:
        head = ids_part(row, prompt, may_be_empty=empty_prompt) if given else None
        return head, ids_part(row, chosen, chosen_mask), ids_part(row, rejected, rejected_mask)

    shown = ", ".join((*((prompt,) if given else ()), chosen, rejected))
    absent = () if given else (prompt,)
    return _pairs(f"tokenised preference pairs ({shown})", names, parts, absent)


def _pairs(detected: str, used: tuple[str, ...], parts: Callable, absent: tuple = ()) -> Format:
    return Format(detected, (*used, *PAIR_LABELS), parts, absent)


def pair_format(row: Row, empty_prompt: bool = False) -> Format:
    """The kind of preference file that starts with this row; parts (prompt, chosen, rejected).

    Args:
        empty_prompt: whether a prompt may be empty, here and in the two functions below.
    """
    columns = row.columns
    if found := _id_pairs(columns, empty_prompt):
        return found
    both = ("chosen", "rejected")
    three = ("prompt", *both)
    kinds = [part_kind(columns[key]) if key in columns else None for key in three]
    match kinds:
        case ["text", "text", "text"]:
            detected = "preference pairs (prompt, chosen, rejected)"
            return _pairs(detected, three, _columns(string_part, three, empty_prompt))
        case ["messages", "messages", "messages"]:
            detected = "preference pairs of messages (prompt, chosen, rejected)"
            return _pairs(detected, three, _columns(messages_part, three, empty_prompt))
        case [None, "messages", "messages"]:
            detected = "preference dialogues (chosen, rejected), the shared turns as prompt"
            return _pairs(detected, both, _dialogues, absent=("prompt",))
        case ["text", "messages", "messages"] if not _answers(row, "chosen"):
            detected = "preference dialogues (chosen, rejected), the shared turns as prompt"
            return _pairs(f"{detected}, column prompt ignored", three, _dialogues)
        case [None, "text", "text"] if all(ANSWER in columns[key] for key in both):
            detected = "preference transcripts (chosen, rejected), split at the last shared answer"
            return _pairs(detected, both, _transcripts, absent=("prompt",))
        case [None, "text", "text"]:
            whole = _columns(string_part, both)
            detected = "preference pairs (chosen, rejected)"
            return _pairs(detected, both, lambda row: (None, *whole(row)), absent=("prompt",))
        case [prompt, *_] if prompt is not None and {*kinds} == {"text", "messages"}:
            detected = "preference pairs of strings and messages (prompt, chosen, rejected)"
            return _pairs(detected, three, _columns(turns_part, three, empty_prompt))
    if "completion" in columns or "response" in columns:
        labels = [name for name in GRADES if name in columns]
        told = f", with {', '.join(labels)}" if labels else ""
        do = "make rows of one prompt with chosen and rejected, or with responses and scores"
        do += "; dpo --loss kto learns from a label" if {*labels} & {*LIKED} else ""
        raise OfEveryRow(row.where, f"one answer a row{told}, where two are compared", do)
    legal = "chosen and rejected with or without prompt, as strings or messages, or ids in "
    ids = " | ".join(f"{pair[1]}, {pair[3]}" for pair in ID_PAIRS)
    raise unknown_columns(row, f"{legal}{ids} | prompt with responses, best first")


# ------------------------------------------------------------------------------- prompts and texts


def _column(key: str, read: Callable[[Row, str], Part], detected: str) -> Format:
    return Format(f"{detected} ({key})", (key,), lambda row: (read(row, key),))


def prompt_format(row: Row, empty_prompt: bool = False) -> Format:
    """The kind of prompt file that starts with this row; parts (prompt,).

    Ids are never empty: what goes before a text is among them already.
    """
    if "prompt_ids" in row.columns:
        return _column("prompt_ids", ids_part, "tokenised prompts")
    if "input_ids" in row.columns:
        used = ("input_ids", "attention_mask", "prompt_length")
        return Format("tokenised prompts (input_ids)", used, _prompt_of_ids)
    turns = "prompts of messages, a last turn of the assistant is continued"
    for key in ("prompt", "messages", "text"):
        match part_kind(row.columns.get(key)):
            case "text":
                return _column(key, partial(string_part, may_be_empty=empty_prompt), "prompts")
            case "messages":
                return _column(key, partial(messages_part, may_be_empty=empty_prompt), turns)
    legal = "prompt (a string or messages) | messages | text | prompt_ids | input_ids"
    raise unknown_columns(row, legal)


def _prompt_of_ids(row: Row) -> tuple[list[int]]:
    """All ids, or those before the answer in a row that `minirlhf sample` wrote."""
    ids = ids_part(row, "input_ids", "attention_mask")
    return (ids[: _prompt_length(row, len(ids), 1, len(ids))],)


def _prompt_length(row: Row, default: int, least: int, most: int) -> int:
    length = row.columns.get("prompt_length", default)
    if type(length) is not int or not least <= length <= most:
        raise wrong_value(row, "prompt_length", length, f"needs an integer from {least} to {most}")
    return length


def _last_answer(row: Row, key: str) -> tuple[Messages, Messages]:
    turns = messages_part(row, key)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        what = f"{key} has {len(turns)} of them, the last one of role {turns[-1]['role']!r}"
        do = "needs at least two, the last of role 'assistant'"
        raise UserError(row.where, what, do)
    return turns[:-1], turns[-1:]


def _tokenised(row: Row) -> tuple[list[int] | None, list[int]]:
    ids = ids_part(row, "input_ids", "attention_mask")
    for name in LOSS_MASKS:
        if name in row.columns:
            what = f"has {name}, which is not read here"
            do = "leave it out, and give prompt_length: how many ids stand before the loss"
            raise UserError(row.where, what, do)
    length = _prompt_length(row, 0, 0, len(ids) - 1)
    return (ids[:length], ids[length:]) if length else (None, ids)


def truth(row: Row, name: str) -> bool | None:
    """A column's true or false, which a table of text spells; None where it is neither."""
    value = row.columns.get(name)
    if not row.typed and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def text_format(row: Row, empty_prompt: bool = False) -> Format:
    """The kind of file of texts that starts with this row; parts (prompt or None, response)."""
    columns = row.columns
    if "input_ids" in columns:
        used = ("input_ids", "attention_mask", "prompt_length")
        named = ", ".join(name for name in used if name in columns)
        return Format(f"tokenised texts ({named})", used, _tokenised)
    for answer in ("completion", "response"):
        keys = ("prompt", answer)
        match [part_kind(columns.get(key)) for key in keys]:
            case ["text", "text"]:
                read, told = string_part, ""
            case ["messages", "messages"]:
                read, told = messages_part, ", in messages"
            case ["text", "messages"] | ["messages", "text"]:
                read, told = turns_part, ", in strings and messages"
            case _:
                continue
        detected = f"prompts with answers{told} ({', '.join(keys)})"
        return Format(detected, keys, _columns(read, keys, empty_prompt))
    for key in ("messages", "text"):  # a table may have the latter's as JSON
        if part_kind(columns.get(key)) == "messages":
            detected = f"dialogues ({key})"
            return Format(detected, (key,), partial(_last_answer, key=key))
    if isinstance(columns.get("text"), str):
        return Format("texts (text)", ("text",), lambda row: (None, string_part(row, "text")))
    raise unknown_columns(row, "text | prompt with completion or response | messages | input_ids")


def imitated_format(row: Row, empty_prompt: bool = False, train_on: str = "all") -> Format:
    """`text_format` of texts to learn from: a row with an answer that people did not like is an
    error, and one without a turn that is to be learned useless.

    Args:
        train_on: as in `turns.learned_parts`.
    """
    form = text_format(row, empty_prompt)
    if form.detected.startswith(("texts", "tokenised texts")):
        return form
    liked = [name for name in LIKED if truth(row, name) is not None]

    def parts(row: Row) -> tuple[Part | None, ...]:
        for name in liked:
            if not truth(row, name):
                what = f"{name} is false: an answer that was not liked"
                do = f"keep the rows whose {name} is true; dpo --loss kto learns from all"
                raise UserError(row.where, what, do)
        found = form.parts(row)
        if not is_chat(found[-1]):
            return found
        is_whole = form.used in (("messages",), ("text",)) and train_on == "all"
        return learned_parts(row, whole_dialogue(found) if is_whole else found, train_on)

    is_spoken = any(part_kind(row.columns.get(name)) == "messages" for name in form.used)
    told = LOSS_ON[train_on] if is_spoken else ""
    told += f", those whose {liked[0]} is true" if liked else ""
    return Format(form.detected + told, (*form.used, *liked), parts, form.absent)
