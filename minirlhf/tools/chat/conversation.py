"""A conversation with one model or two: everyone's answer to a message, and the commands."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minirlhf import streams
from minirlhf.errors import BAD_INPUT, REWARD_SERVICE, UserError, printable
from minirlhf.rewards.source import RewardSource, as_scores
from minirlhf.run import terminal
from minirlhf.run.settings import nearest
from minirlhf.tools.chat.answer import STOPPED, Answer, Speaker
from minirlhf.tools.chat.heat import Gauge
from minirlhf.tools.chat.keyboard import say, unseen
from minirlhf.tools.chat.screen import GAP, Columns, Told, columns_for
from minirlhf.tools.settings import temperature_problems

COMMANDS = {
    "/reset": "forget what was said, and begin anew",
    "/system TEXT": "what the model is told before all turns; without TEXT nothing",
    "/temperature X": "0: always the most probable token; higher: more at random",
    "/save FILE": "write what was said as JSON lines, which minirlhf sft reads",
    "/help": "show these lines",
    "/quit": "leave, as Ctrl-D does",
}
WORDS = [command.split()[0] for command in COMMANDS]


@dataclass
class Member:
    """A model of the conversation, with what scores and measures its answers."""

    speaker: Speaker
    gauge: Gauge | None
    reward: RewardSource | None


@dataclass
class Conversation:
    """Everyone's answers to what is typed.

    Args:
        seed: of the randomness; the models share it, message by message.
    """

    members: list[Member]
    seed: int
    turn: int = 0

    def hear(self, line: str) -> bool:
        """Takes a line; returns whether the conversation goes on."""
        if line.startswith("/"):
            word, _, rest = line.strip().partition(" ")
            return self.command(word, rest.strip())
        if line.strip():
            self.reply(line)
        return True

    # ----------------------------------------------------------------------------------- answers

    def reply(self, text: str) -> None:
        """Answers a message; where one of the models cannot, none does, and it is taken back."""
        try:
            answers = [member.speaker.hear(text) for member in self.members]
        except UserError as error:
            say(f"error: {printable(error, 500)}")
            return
        self.turn += 1
        keys = streams.key(self.seed, "chat", self.turn, torch.arange(1))
        pairs, room = list(zip(self.members, answers, strict=True)), terminal.columns()
        each = None if room is None else columns_for(len(pairs), room)
        colored = self.members[0].gauge is not None and terminal.has_color()
        if each is not None and (len(pairs) > 1 or colored) and os.environ.get("TERM") != "dumb":
            self.side_by_side(pairs, keys, each, colored)
            return
        for member, answer in pairs:
            if len(pairs) > 1:
                say(f"{member.speaker.name}:")
            with suppress(KeyboardInterrupt), unseen():
                for part in shown(member.speaker, answer, keys):
                    print(part, end="", flush=True)
            say()
            notes, told = finish(member, answer)
            for line in [*notes, *([told.legend(False)] if told else [])]:
                say(line)

    def side_by_side(
        self, pairs: list[tuple[Member, Answer]], keys: torch.Tensor, each: int, colored: bool
    ) -> None:
        columns, several = Columns(sys.stdout, len(pairs), each), len(pairs) > 1
        if several:
            say(GAP.join(terminal.fit(member.speaker.name, each) for member, _ in pairs))
        speaking = {at: shown(m.speaker, a, keys) for at, (m, a) in enumerate(pairs)}
        with suppress(KeyboardInterrupt), unseen():
            while speaking:
                for at in list(speaking):
                    part = next(speaking[at], None)
                    if part is None:
                        del speaking[at]
                        columns.end(at)
                    else:
                        columns.add(at, part)
        for at in speaking:
            columns.end(at)
        ended = [finish(member, answer) for member, answer in pairs]
        if colored and any(told for _, told in ended):
            columns.color([told for _, told in ended])
        for (member, _), (notes, told) in zip(pairs, ended, strict=True):
            legend = [told.legend(colored)] if told else []
            for line in [*notes, *legend]:
                say(f"{member.speaker.name}: {line}" if several else line)

    # ---------------------------------------------------------------------------------- commands

    def command(self, word: str, rest: str) -> bool:
        speakers = [member.speaker for member in self.members]
        if word == "/quit":
            return False
        if word == "/reset":
            for speaker in speakers:
                speaker.reset()
            say("(begun anew)")
        elif word == "/help":
            for command, what in COMMANDS.items():
                say(f"{command:<16}{what}")
        elif word == "/system":
            self.set_system(speakers, rest)
        elif word == "/temperature":
            set_temperature(speakers, rest)
        elif word == "/save":
            save(speakers, rest)
        else:
            advice = nearest(word, WORDS, "/help lists them")
            say(f"error: {printable(word, 40)}: no such command: {advice}; a message that begins "
                "with / has a blank before it")
        return True

    def set_system(self, speakers: list[Speaker], text: str) -> None:
        if not all(speaker.is_chat for speaker in speakers):
            say("error: /system: a model without chat template has no system turn")
            return
        before = [speaker.system for speaker in speakers]
        try:
            for speaker in speakers:
                speaker.system = text
                speaker.hear("a")  # the template may refuse it
        except UserError as error:
            for speaker, system in zip(speakers, before, strict=True):
                speaker.system = system
            say(f"error: /system: {printable(error, 500)}")
            return
        say("(the system turn is set)" if text else "(no system turn)")


def finish(member: Member, answer: Answer) -> tuple[list[str], Told | None]:
    """(what is told after an answer: why it broke off, its score; the number of each piece)."""
    if not answer.ids:
        return ["(stopped before the first token: the message is taken back)"], None
    member.speaker.keep(answer)
    why, told = why_ended(member.speaker, answer), None
    notes = [f"({why})"] if why else []
    try:
        if member.reward is not None:
            given = member.reward(answer.completions)
            answer.scores = as_scores(given, answer.completions, "answer")
            notes.append(score_line(answer))
        if member.gauge is not None:
            told = measured(member.gauge, member.speaker, answer)
    except UserError as error:
        if error.code not in (BAD_INPUT, REWARD_SERVICE):
            raise
        notes.append(f"error: {printable(error, 500)}")
    except KeyboardInterrupt:
        notes.append("(stopped: no numbers)")
    return notes, told


def shown(speaker: Speaker, answer: Answer, keys: torch.Tensor) -> Iterator[str]:
    """The parts of an answer for a terminal; of a chat without blanks before it."""
    begun = not speaker.is_chat
    for part in speaker.speak(answer, keys):
        part = part if begun else part.lstrip()
        begun = begun or bool(part)
        if part:
            yield terminal.harmless(part)


def why_ended(speaker: Speaker, answer: Answer) -> str:
    """Why an answer is not a whole one; "" of one that is."""
    if answer.reason == STOPPED:
        return "stopped"
    if answer.reason != "length":
        return "" if answer.text.strip() else "an empty answer"
    if answer.limit < speaker.sampling.max_new_tokens:
        full = f"cut: the context of {speaker.positions:,} tokens is full"
        return f"{full}: /reset begins anew" if speaker.is_chat else full
    return f"cut after {answer.limit:,} tokens: --max-new-tokens"


def score_line(answer: Answer) -> str:
    parts = {name: float(x[0]) for name, x in answer.scores.parts.items()}
    each = ", ".join(f"{printable(name, 60)} {x:.3f}" for name, x in parts.items())
    return f"score {float(answer.scores.sums[0]):.3f}" + (f" ({each})" if len(parts) > 1 else "")


def measured(gauge: Gauge, speaker: Speaker, answer: Answer) -> Told:
    pieces = speaker.pieces(answer)
    numbers = gauge.read(answer.completions, answer.scores, pieces)
    centre = sum(numbers) / len(numbers) if gauge.kind == "value" else 0.0
    return Told(gauge.kind, gauge.about, pieces, numbers, centre)


def set_temperature(speakers: list[Speaker], text: str) -> None:
    try:
        value = float(text)
        problems = temperature_problems(value)
        if problems or not 0 <= value < float("inf"):
            raise ValueError
    except ValueError:
        say(f"error: /temperature {printable(text, 40)}: 0, or a number from 0.0001 on")
        return
    for speaker in speakers:
        speaker.sampling = replace(speaker.sampling, temperature=value)
    say(f"(temperature {value:g})")


def save(speakers: list[Speaker], name: str) -> None:
    rows = [row for speaker in speakers for row in speaker.rows()]
    if not rows or not name:
        say("error: /save: " + ("give a new file, as in /save talk.jsonl" if rows else
                                "nothing was said yet"))
        return
    try:
        with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except (OSError, ValueError) as error:
        say(f"error: /save {printable(name)}: {printable(getattr(error, 'strerror', error))}")
        return
    say(f"(saved in {printable(name)})")
