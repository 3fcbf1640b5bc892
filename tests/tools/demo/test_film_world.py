import re
from itertools import pairwise
from statistics import fmean

import pytest

from minirlhf.tools.demo import film_world
from minirlhf.tools.demo.film_judge import opinion
from minirlhf.tools.demo.film_world import prompts, reviews


@pytest.fixture(scope="module")
def texts():
    return reviews(2000, seed=1)


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def test_reviews_are_a_function_of_the_seed():
    assert reviews(20, seed=3) == reviews(20, seed=3)
    assert reviews(20, seed=3) == reviews(40, seed=3)[:20]
    assert not set(reviews(20, seed=3)) & set(reviews(20, seed=4))


def test_reviews_hardly_ever_repeat_and_use_a_small_vocabulary(texts):
    assert len(set(texts)) == len(texts)
    assert 250 <= len({word for text in texts for word in words_of(text)}) <= 400


def test_reviews_are_two_or_three_sentences_of_a_readable_length(texts):
    for text in texts:
        assert re.fullmatch(r"([A-Z][A-Za-z, ]+\.)( [A-Z][A-Za-z, ]+\.){1,2}", text), text
        assert 10 <= len(words_of(text)) <= 45
    assert 20 < fmean(len(words_of(text)) for text in texts) < 30


def test_reviews_have_the_right_articles(texts):
    assert not [text for text in texts if re.search(r"\b[Aa] [aeiouAEIOU]", text)]
    assert not [text for text in texts if re.search(r"\b[Aa]n [^aeiou]", text)]
    # words whose first letter misleads about their first sound
    assert not [text for text in texts if re.search(r"\b[Aa]n? (hon|hour|heir|uni|use|one)", text)]


def test_reviews_do_not_repeat_themselves(texts):
    def repeats(text):
        words = words_of(text)
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        return len(trigrams) - len(set(trigrams))

    assert sum(repeats(text) > 0 for text in texts) < 0.01 * len(texts)
    assert not [text for text in texts if any(a == b for a, b in pairwise(words_of(text)))]


def test_prompts_are_distinct_short_openings_without_a_judgement():
    found = prompts(500, seed=2)
    assert found == prompts(500, seed=2)
    assert len(set(found)) == 500
    for prompt in found:
        assert 3 <= len(prompt.split()) <= 9
        assert prompt == prompt.strip() and prompt[-1].isalpha()
        assert opinion(prompt) == (0.0, 0)


def test_prompts_are_cut_from_reviews(texts):
    # the four words after a title are the template's own, so 2000 reviews begin in every way
    def shape(text):
        names = "|".join(film_world.NEUTRAL["adjective"] + film_world.NEUTRAL["noun"])
        return tuple(re.sub(rf"\b({names})\b", "*", text).split()[:3])

    assert {shape(prompt) for prompt in prompts(200, seed=5)} <= {shape(text) for text in texts}


def test_prompts_repeat_only_when_the_world_is_exhausted(monkeypatch):
    monkeypatch.setitem(film_world.NEUTRAL, "title", ["Paper Fox", "Iron Wolf"])
    monkeypatch.setattr(film_world, "OPENINGS", {"Everybody likes <title>": ["."]})
    found = prompts(5, seed=0)
    assert len(found) == 5
    assert set(found) == {"Everybody likes Paper Fox", "Everybody likes Iron Wolf"}


def test_titles_and_subjects_hold_no_judging_word():
    for slot in ("adjective", "noun", "subject", "when", "person", "friend", "price", "fact"):
        assert opinion(". ".join(film_world.NEUTRAL[slot])) == (0.0, 0), slot
