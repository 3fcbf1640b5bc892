"""Data sets as they were published: a row of each shape, turned into the columns of formats.py.

The columns of a file's first row tell its shape. Questions become the turns of a user and answers
those of an assistant: a model's chat template renders them, or the plain one where it has none.
Only a post of TL;DR is a text that its summary continues.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from minirlhf.data import answers as say
from minirlhf.data import questions as ask
from minirlhf.data.parts import Useless, hh_turns, wrong_column
from minirlhf.errors import UserError
from minirlhf.files.rows import Row


class Shape(NamedTuple):
    """One published shape.

    Args:
        name: as the user is told.
        needs: columns that tell it and become others.
        asks: a row -> our columns of its prompt and their values; raises UserError where it is not
            of this shape.
        says: a row -> those of its answers; raises Useless, too, where they say nothing.
        reads: columns that it takes, too, where they are there.
        unless: columns of a row that is read as it stands.
        fits: whether the first row's values are this shape's.
    """

    name: str
    needs: tuple[str, ...]
    asks: Callable[[Row], dict]
    says: Callable[[Row], dict]
    reads: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True

    @property
    def told(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})"


def shape_of(row: Row) -> Shape | None:
    """The shape that a file has whose first row this is; None where it needs no turning."""
    for shape in SHAPES:
        there = row.columns.keys()
        if there >= {*shape.needs} and not there & {*shape.unless} and shape.fits(row):
            return shape
    return None


def reshape(row: Row, shape: Shape | None, asking: bool = False) -> Row:
    """The row with our columns in the place of the shape's.

    Args:
        asking: its prompt is all that is needed, whatever its answers say.
    Raises:
        UserError: it is not of this shape.
        Useless: it is, but tells no answer from another.
    """
    if shape is None:
        return row
    try:
        for name in shape.needs:
            if name not in row.columns:
                raise wrong_column(row, name, "needs what the first row has")
        made = shape.asks(row)
        with suppress(*([Useless] if asking else [])):
            made |= shape.says(row)
    except UserError as error:
        do = f"{error.do}; " if error.do else ""
        raise UserError(error.where, error.what, f"{do}detected: {shape.told}") from None
    taken = {*shape.needs, *shape.reads}
    return replace(row, columns={k: v for k, v in row.columns.items() if k not in taken} | made)


def _holds(key: str, *names: str) -> Callable[[Row], bool]:
    """Whether a column is a list of objects, of which the first, if any, has these names."""

    def fits(row: Row) -> bool:
        listed = row.columns[key]
        if not isinstance(listed, list):
            return False
        first = listed[0] if listed else dict.fromkeys(names)
        return isinstance(first, dict) and {*names} <= first.keys()

    return fits


def _has_texts(row: Row) -> bool:
    """Whether chosen is an answer rather than a dialogue."""
    chosen = row.columns["chosen"]
    return isinstance(chosen, str) and not hh_turns(chosen)


def _has_a_system(row: Row) -> bool:
    return isinstance(row.columns["system"], str | None)


SIDES = ("chosen", "rejected")
ALPACA = ("input", "system", "history")
ARENA = ("prompt", "response_a", "response_b")
OURS = ("prompt", "messages")

SHAPES = (
    Shape("sharegpt pairs", ("conversations", *SIDES),
          partial(ask.dialogue, key="conversations", name="prompt"), say.sides, ("system",), OURS),
    Shape("torchtune pairs", tuple(f"{side}_conversations" for side in SIDES),
          ask.nothing, say.conversations),
    Shape("sharegpt", ("conversations",),
          partial(ask.dialogue, key="conversations"), say.nothing, ("system",), ("messages",)),
    Shape("dialogues with a system column", ("messages", "system"),
          partial(ask.dialogue, key="messages"), say.nothing, fits=_has_a_system),
    Shape("alpaca pairs", ("instruction", *SIDES), ask.instruction, say.texts, ALPACA, OURS,
          _has_texts),
    *(Shape(f"UltraFeedback by {score}", ("instruction", "completions"), ask.instruction,
            partial(say.ultrafeedback, score=score), ALPACA, OURS,
            _holds("completions", "response", score))
      for score in ("overall_score", "fine-grained_score", "score")),
    Shape("alpaca", ("instruction", "output"), ask.instruction,
          partial(say.completion, key="output"), ALPACA, OURS),
    Shape("dolly", ("instruction", "response"), partial(ask.instruction, more="context"),
          partial(say.completion, key="response"), ("context",), OURS),
    Shape("questions with pairs", ("question", *SIDES), ask.question, say.texts, ("system",), OURS,
          _has_texts),
    Shape("HelpSteer3", ("context", "response1", "response2", "overall_preference"),
          ask.context, say.helpsteer3),
    Shape("PKU-SafeRLHF", ("prompt", "response_0", "response_1", "better_response_id"),
          partial(ask.asked, key="prompt"), say.safe_rlhf),
    Shape("SHP", ("history", "human_ref_A", "human_ref_B", "labels"),
          partial(ask.asked, key="history"), say.shp),
    Shape("WebGPT", ("question", "answer_0", "answer_1", "score_0", "score_1"),
          ask.full_question, say.webgpt),
    Shape("LMArena", ("conversation_a", "conversation_b", "winner"), ask.nothing, say.arena),
    Shape("LMArena", (*ARENA, "winner"), ask.nothing, partial(say.arena_texts, which=say.winner)),
    Shape("LMArena", (*ARENA, "winner_model_a", "winner_model_b"), ask.nothing,
          partial(say.arena_texts, which=say.flagged), ("winner_tie",)),
    Shape("TL;DR comparisons", ("info", "summaries", "choice"), ask.post, say.summaries),
    Shape("Nectar", ("prompt", "answers"), ask.transcript, say.nectar, (), ("responses",),
          _holds("answers", "answer", "rank")),
)
