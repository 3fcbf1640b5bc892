"""Columns and colours of answers, as a terminal shows them."""

import io
import random
import re

import pytest

from minirlhf.data.pieces import Piece
from minirlhf.run.terminal import harmless, width, wrap
from minirlhf.tools.chat import conversation
from minirlhf.tools.chat.command import main
from minirlhf.tools.chat.screen import Columns, Told, columns_for, painted
from tests.tools.chat.conftest import Terminal


def screen(written: str) -> list[str]:
    """Lines that a terminal shows of text with carriage returns and moves up."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|[\r\n]|[^\r\n\x1b]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif part == "\r":  # what follows is as wide as what it overwrites
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_lines_are_cut_at_blanks_and_a_line_that_another_follows_is_final():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab  \n奖e\u0301") for _ in range(rng.randint(0, 40)))
        room = rng.randint(2, 9)
        spans = wrap(text, room)
        assert all(width(text[slice(*span)]) <= room for span in spans)
        kept = "".join(text[slice(*span)] for span in spans)
        assert re.sub(r"\s", "", kept) == re.sub(r"\s", "", text)
        for size in range(len(text)):
            before = wrap(text[:size], room)
            assert before[:-1] == spans[: len(before) - 1]


@pytest.mark.parametrize(("text", "shown"), [
    ("a\x1b[2Jb", "a\\x1b[2Jb"), ("a\r\nb\x07", "a\\r\nb\\x07"), ("\ta\x9b", "    a\\x9b"),
    ("奖\u3000励 👩\u200d🚀", "奖\u3000励 👩\u200d🚀"), ("a\u202eb", "a\\u202eb"),
])
def test_text_of_a_model_does_nothing_to_a_terminal(text, shown):
    assert harmless(text) == shown


def test_answers_grow_side_by_side():
    out = io.StringIO()
    columns = Columns(out, 2, 6)
    for at, text in [(0, "so "), (1, "奖励模"), (0, "it was"), (1, "型\nb")]:
        columns.add(at, text)
    assert screen(out.getvalue()) == ["so it  │ 奖励模", "was    │ 型"]  # b comes with was's end
    columns.end(0)
    columns.end(1)
    assert screen(out.getvalue()) == ["so it  │ 奖励模", "was    │ 型", "       │ b", ""]
    told = [Told("kl", "x", [Piece(0, 1, "so it was")], [1.0]), None]
    columns.color(told)
    assert screen(out.getvalue()) == ["so it  │ 奖励模", "was    │ 型", "       │ b", ""]


def test_answers_stand_side_by_side_where_there_is_room():
    # two answers of 36 columns, three between them, and one that stays free
    assert (columns_for(2, 76), columns_for(2, 75), columns_for(1, 20)) == (36, None, 19)


def test_each_piece_has_its_colour_and_each_line_its_width():
    told = Told("kl", "x", [Piece(0, 1, "奖 a"), Piece(1, 2, "b\x1b")], [-2.0, 1.0])
    blue, half = "\x1b[30;48;2;103;169;207m", "\x1b[30;48;2;247;196;176m"
    # the ends are -2 and 2; 1 is half of the way to red: 255 - 0.5 (255 - 138) = 196.5
    assert list(painted(told, 9)) == [f"{blue}奖 a\x1b[0m{half}b\\x1b\x1b[0m"]
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in painted(told, 5)] == [
        "奖   ", "ab\\x1", "b    "]
    assert told.legend(True).startswith(f"kl {blue} -2.00 \x1b[0m")
    assert told.legend(False) == "kl (x)  奖␣a:-2.00  b\\x1b:+1.00"


def test_values_are_coloured_by_their_distance_from_their_mean():
    told = Told("value", "x", [Piece(0, 1, "a"), Piece(1, 2, "b")], [4.0, 5.0], 4.5)
    assert told.colors() == [(103, 169, 207), (239, 138, 98)] and told.reach == 0.5
    assert Told("kl", "x", [Piece(0, 1, "a")], [0.0]).colors() == [(255, 255, 255)]


@pytest.fixture
def terminal(monkeypatch, files):
    """terminal(lines, words) -> what is written on one of 80 columns and 24 lines."""

    def run(text: str, *words: str, columns: int = 80) -> str:
        for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
        out = Terminal()
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        monkeypatch.setattr("sys.stdout", out)
        assert main([*map(str, words)]) == 0
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


def test_colours_come_once_the_answer_has_ended_and_not_where_they_are_not_wanted(
    says, terminal, monkeypatch
):
    words = [says("so 奖"), "--temperature", "0", "--heat", "logprob"]
    shown = terminal("a\n", *words)
    assert "\x1b[30;48;2;" in shown
    lines = screen(shown)
    assert lines[0] == "so 奖<|endoftext|>" and lines[1].startswith("logprob  ")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = terminal("a\n", *words)
    assert "\x1b" not in plain and plain.startswith("so 奖\nlogprob (log pi, nats)  ")
    assert "奖:" in plain


def test_two_models_side_by_side_have_their_notes_below(says, terminal):
    words = [says("so"), says("bad"), "--temperature", "0", "--reward", "length:3"]
    lines = screen(terminal("a\n", *words))
    assert [re.split(" +│ ", line) for line in lines[:2]] == [["says0", "says1"], ["so", "bad"]]
    assert [line.split(" ")[:2] for line in lines[2:4]] == [["says0:", "score"],
                                                            ["says1:", "score"]]
    assert terminal("a\n", *words, columns=60).startswith("says0:\nso\nscore ")


def test_an_answer_that_stopped_keeps_the_others(says, terminal, monkeypatch):
    """Ctrl-C is for both; what each has said by then is shown and kept."""
    real = conversation.shown

    def shown(speaker, answer, keys):
        for at, part in enumerate(real(speaker, answer, keys)):
            if at == 1 and speaker.name == "says1":
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(conversation, "shown", shown)
    lines = screen(terminal("a\n", says("so"), says("so bad"), "--temperature", "0"))
    assert "bad" not in lines[1] and "says1: (stopped)" in lines
