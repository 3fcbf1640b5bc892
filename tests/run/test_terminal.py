"""Colours and widths of a terminal, and what is told in another language."""

import io

import pytest

from minirlhf.run import language, terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def usual(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")


def test_a_terminal_has_colors_unless_somebody_minds(usual, monkeypatch):
    assert terminal.has_color(Terminal())
    assert not terminal.has_color(io.StringIO())  # a file or a pipe
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.has_color(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: it must not be empty
    assert terminal.has_color(Terminal())


def test_only_a_terminal_has_columns(usual):
    assert terminal.columns(Terminal()) == 70
    assert terminal.columns(io.StringIO()) is None


def test_heat_goes_halfway_and_stops_at_its_ends():
    # halfway from 255 to 239, 138, 98: 247, 196.5 (to even: 196), 176.5 (to even: 176)
    assert terminal.heat(0.5) == (247, 196, 176)
    assert terminal.heat(7.0) == terminal.heat(1.0)
    assert terminal.heat(-7.0) == (103, 169, 207)
    assert terminal.on_background("a", (1, 2, 3)) == "\x1b[30;48;2;1;2;3ma\x1b[0m"


@pytest.mark.parametrize(("text", "room", "shown"), [
    ("abc", 3, "abc"), ("abcd", 3, "ab…"), ("奖励", 4, "奖励"), ("奖励", 3, "奖…"),
    ("🎬🎬", 3, "🎬…"), ("", 2, "  "), ("奖励", 2, "… "), ("ab", 0, ""),
])
def test_fit_takes_exactly_its_room(text, room, shown):
    assert terminal.fit(text, room) == shown
    assert terminal.width(shown) == room


def test_a_sentence_is_told_in_its_language():
    assert language.tell("step {step}", step=3) == "step 3"
    assert language.tell("step {step}", "zh", step=3) == "第 3 步"
    with pytest.raises(KeyError, match="never said"):
        language.tell("never said", "zh")


def test_translations_keep_the_places_of_values():
    for sentence, told in language.translations("zh").items():
        places = [sorted(text.split("{")[1:]) for text in (sentence, told)]
        names = [[part.split("}")[0] for part in parts] for parts in places]
        assert sorted(names[0]) == sorted(names[1]), sentence


@pytest.mark.parametrize(("texts", "shown"), [
    (["a fine film", "a poor film"], ["a fine film ", "a poor film "]),  # both fit into 12
    (["It was a fine film.", "It was a film."], ["… fine film.", "… film.     "]),
    (["It was a fine film", "It was"], ["… was a fin…", "… was       "]),  # one begins the other
    (["Unlike from here on", "Other words at once"], ["Unlike from…", "Other words…"]),
    (["一部很好看的电影呀", "一部很糟的电影"], ["一部很好看… ", "一部很糟的… "]),
    (["今天晚上的电影很好看", "今天晚上的电影不好看"],
     ["… 很好看    ", "… 不好看    "]),  # no blank to begin at
])
def test_texts_are_shown_from_the_word_in_which_they_differ(texts, shown):
    assert terminal.differing(texts, 12) == shown
    assert [terminal.width(text) for text in shown] == [12, 12] or "…" in shown[0]
