"""A model that answers: its history, and an answer piece by piece as it is decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from minirlhf.data.parts import Messages
from minirlhf.data.pieces import Piece, each_piece, pieces
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.models.generation import decode_steps
from minirlhf.models.sampling import Sampling, before_stop
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, Scores

STOPPED = "stopped"  # the reason of an answer that Ctrl-C ended


@dataclass
class Answer:
    """What a model says to a prompt, while it says it.

    Attributes:
        ids: sampled so far, eos or stop string included.
        reason: eos, stop or length, as in generation; or STOPPED.
        text: as the history has it, once it has ended.
    """

    prompt: str | Messages
    prompt_ids: list[int]
    limit: int  # tokens
    ids: list[int] = field(default_factory=list)
    reason: str = STOPPED
    text: str = ""
    scores: Scores | None = None

    @property
    def completions(self) -> Completions:
        """As reward sources see it; what was stopped is scored as what the length limit ended."""
        reason = "length" if self.reason == STOPPED else self.reason
        return Completions([self.prompt], [self.prompt_ids], [self.text], [self.ids], [reason], {})


@dataclass
class Speaker:
    """A model and what was said to it.

    Attributes:
        turns: the messages so far; of a model without template nothing is kept.
        is_chat: whether messages go through the chat template; else each is a text to complete.
        positions: tokens of the longest row that the model reads.
    """

    name: str
    folder: Path
    lm: CausalLM
    tokenizer: Tokenizer
    sampling: Sampling
    is_chat: bool
    arguments: dict[str, object]  # what the chat template sees beside the messages
    system: str = ""
    turns: Messages = field(default_factory=list)
    said: list[Answer] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return self.lm.config.longest_row

    def hear(self, text: str) -> Answer:
        """The answer that is to be given to a message.

        Raises:
            UserError: no room is left for one, or the template refuses the messages.
        """
        if self.is_chat:
            first = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*first, *self.turns, {"role": "user", "content": text}]
            ids = self.tokenizer.encode_chat(prompt, self.arguments)
        else:
            prompt, ids = text, self.tokenizer.encode(text)
        if not ids:
            raise UserError("message", "has no token", "type something")
        room = self.positions - len(ids) + 1  # the last token is sampled, not read
        if room < 1:
            whole = "the conversation" if self.is_chat else "the text"
            do = "/reset begins anew" if self.turns else "give a shorter one"
            what = f"{whole} has {len(ids):,} tokens and {self.name} reads {self.positions:,}"
            raise UserError("context full", what, do)
        return Answer(prompt, ids, min(room, self.sampling.max_new_tokens))

    def speak(self, answer: Answer, keys: Tensor) -> Iterator[str]:
        """Yields what is to be shown next, token by token: characters that several tokens share
        once whole, and what may become a stop string once it does not.

        Args:
            keys: (1,) int64, of the randomness.
        """
        stops, text, shown = self.sampling.stop_strings, "", 0
        for piece in each_piece(self.tokenizer, answer.prompt_ids, self._sampled(answer, keys)):
            text += piece.text
            end = len(before_stop(text, stops)) if answer.reason == "stop" else len(text)
            if answer.reason == STOPPED:  # it goes on
                end -= begun(text, stops)
            if end > shown:
                yield text[shown:end]
                shown = end
        if answer.reason != "stop" and shown < len(text):
            yield text[shown:]

    def _sampled(self, answer: Answer, keys: Tensor) -> Iterator[int]:
        """The tokens that are text: all but the eos."""
        sampling = replace(self.sampling, max_new_tokens=answer.limit)
        eos, decode = self.tokenizer.eos_ids, self.tokenizer.decode_after
        for step in decode_steps(self.lm, [answer.prompt_ids], sampling, eos, keys, decode):
            token = int(step.tokens[0])
            answer.ids.append(token)
            answer.reason = step.finish_reasons[0] or STOPPED
            if answer.reason != "eos":
                yield token

    def keep(self, answer: Answer) -> None:
        """Ends an answer that has a token, whether or not it was stopped, and remembers it."""
        ids = answer.ids[:-1] if answer.reason == "eos" else answer.ids
        text = self.tokenizer.answer_text(answer.prompt, answer.prompt_ids, ids)
        answer.text = before_stop(text, self.sampling.stop_strings)
        self.said.append(answer)
        if self.is_chat:
            self.turns += [answer.prompt[-1], {"role": "assistant", "content": answer.text}]

    def pieces(self, answer: Answer) -> list[Piece]:
        return pieces(self.tokenizer, answer.prompt_ids, answer.ids)

    def reset(self) -> None:
        self.turns, self.said = [], []

    def rows(self) -> list[dict]:
        """What was said, as `minirlhf sft` reads it."""
        scores = [answer.scores and float(answer.scores.sums[0]) for answer in self.said]
        scored = any(score is not None for score in scores)
        if not self.is_chat:
            return [
                {"prompt": answer.prompt, "completion": answer.text, "model": self.name}
                | ({"score": score} if scored else {})
                for answer, score in zip(self.said, scores, strict=True)
            ]
        if not self.turns:
            return []
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = {"messages": [*system, *self.turns], "model": self.name}
        return [row | ({"answer_scores": scores} if scored else {})]


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at a text's end may be the beginning of a stop string.

    >>> begun("so\\nUs", ["\\nUser:", "x"]), begun("so", ["\\nUser:"])
    (3, 0)
    """
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)
