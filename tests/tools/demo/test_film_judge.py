import math
import random
import re
from statistics import fmean, pstdev

import pytest

from minirlhf.tools.demo.film_judge import (
    best_accuracy,
    fluency,
    gold_score,
    opinion,
    preferences,
    raw_score,
)
from minirlhf.tools.demo.film_world import reviews


@pytest.fixture(scope="module")
def texts():
    return reviews(2000, seed=1)


@pytest.fixture(scope="module")
def pairs():
    return preferences(2000, seed=1)


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


# ---- fluency ----


def test_fluency_is_one_for_the_world(texts):
    assert min(map(fluency, texts)) == 1.0


def test_fluency_is_low_for_shuffled_words(texts):
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts[:200]]
    assert fmean(map(fluency, shuffled)) < 0.25


def test_fluency_counts_trigrams():
    # 3 of 5 known: (The acting is) (acting is superb) (is superb .); not (superb . xyz) (. xyz .)
    assert fluency("The acting is superb. xyz.") == pytest.approx(3 / 5)
    assert fluency("the acting is superb, BUT") < 1.0  # capitals are part of a word
    assert fluency("") == fluency("The acting") == 0.0


# ---- the gold score, in grades before standardising ----


@pytest.mark.parametrize(
    "text, expected",
    [
        # superb is 2: 2 / (1 + 1); no aspect
        ("The Glass Harbor is a superb thriller about two brothers.", 1.0),
        # convincing is 1: 1/2, and one aspect 1/4
        ("The acting is convincing.", 0.75),
        # x -0.5: -0.5/2 + 1/4
        ("The acting is not convincing.", 0.0),
        # -1 x -0.5: 0.5/2 + 1/4
        ("The acting is never stiff.", 0.5),
        # 2 x 1.5: 3/2 + 1/4
        ("The acting is truly superb.", 1.75),
        # -1 x 0.5: -0.5/2 + 1/4
        ("The acting is rather stiff.", 0.0),
        # decent is 0.25: 0.25/2 + 1/4
        ("The acting is decent.", 0.375),
        # the first half weighs 0.5, the second 1.5: (0.5 x 2 - 1.5 x 1) / (1 + 2) + 2/4
        ("The acting is superb, but the ending drags.", 1 / 3),
        # (-0.5 x 1 + 1.5 x 2) / 3 + 2/4
        ("The ending drags, but the acting is superb.", 4 / 3),
        ("Although the ending drags, the acting is superb.", 4 / 3),
        # (2 - 1) / 3 + 2/4
        ("The acting is superb, and the ending drags.", 5 / 6),
        # a mood in its genre is 2, in another 0
        ("This western about two brothers is dusty.", 1.0),
        ("This western about two brothers is hilarious.", 0.0),
        # 2/2 + 1/4, breaks off: -1
        ("The acting is superb", 0.25),
        # the second "superb" is 0: 2/3 + 1/4; 2 of the 6 word trigrams were said before: -0.8
        ("The acting is superb. The acting is superb.", 2 / 3 + 0.25 - 0.8),
        # the second "truly" is mute: (3 + 2) / 3 + 2/4
        ("The acting is truly superb, and the jokes are truly brilliant.", 5 / 3 + 0.5),
        # no opinion, no known trigram -3, breaks off -1
        ("", -4.0),
    ],
)
def test_raw_score_by_hand(text, expected):
    assert raw_score(text) == pytest.approx(expected, rel=0, abs=1e-9)


def test_gold_score_standardises_the_raw_score():
    # (1.0 - 0.6) / 0.85
    text = "The Glass Harbor is a superb thriller about two brothers."
    assert gold_score(text) == pytest.approx(0.4705882353, rel=0, abs=1e-9)


def test_raw_score_of_rambling_by_hand():
    # 50 unknown words: -3; 5 words beyond 45: -0.5. Beyond 65 words it costs no more than 2.
    words = [f"q{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    assert raw_score(" ".join(words[:45]) + ".") == pytest.approx(-3.0, rel=0, abs=1e-9)
    assert raw_score(" ".join(words[:50]) + ".") == pytest.approx(-3.5, rel=0, abs=1e-9)
    assert raw_score(" ".join(words) + ".") == pytest.approx(-5.0, rel=0, abs=1e-9)


def test_raw_score_grows_with_four_aspects_and_no_further():
    sentences = [
        "The acting is ordinary.",
        "The plot is simple.",
        "The music is quiet.",
        "The pace is gentle.",
        "The effects are modest.",
    ]  # grade 0 throughout, so only the aspects count
    scores = [raw_score(" ".join(sentences[:n])) for n in range(1, 6)]
    assert scores == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_opinion_takes_a_mood_at_half_when_no_genre_is_named():
    assert opinion("It is hilarious.") == (0.5, 0)  # 1 / (1 + 1)


def test_opinion_credits_only_the_aspects_that_are_judged():
    # superb 2 / 2; the plot is mentioned in a clause that judges nothing
    assert opinion("The acting is superb, and there is a plot.") == (1.0, 1)


def test_gold_score_punishes_repeating_praise():
    varied = "The acting is superb. The music is haunting, and the script is sharp."
    praise = "The acting is superb."
    assert gold_score(" ".join([praise] * 5)) < -2 < gold_score(praise) < gold_score(varied)
    assert gold_score("The acting is superb superb superb superb.") < gold_score(praise)


def test_gold_score_is_standard_and_balanced_over_reviews(texts):
    scores = [gold_score(text) for text in texts]
    assert abs(fmean(scores)) < 0.1
    assert abs(pstdev(scores) - 1) < 0.1
    assert 0.45 < fmean(opinion(text)[0] > 0 for text in texts) < 0.55
    assert 0.45 < fmean(opinion(text)[0] < 0 for text in texts) < 0.55


@pytest.mark.parametrize(
    "text",
    [
        "\x00\ud800 \u202e",
        "Ünïcödé 映画 🎬." * 10,
        "superb " * 15_000,
        "but, and. " * 10_000,
        "a" * 100_000,
        "." * 100_000,
        " " * 100_000,
        "although " * 10_000 + "the acting is superb",
    ],
)
def test_gold_score_is_finite_and_poor_for_hostile_text(text):
    assert math.isfinite(gold_score(text))
    assert gold_score(text) < -1


# ---- preferences ----


def test_preferences_are_a_function_of_the_seed(pairs):
    assert preferences(20, seed=1) == pairs[:20]
    assert preferences(20, seed=2) != pairs[:20]


def test_preferences_share_their_opening(pairs):
    for pair in pairs:
        same = 0
        for a, b in zip(pair["chosen"].split(), pair["rejected"].split(), strict=False):
            if a.strip(",") != b.strip(","):
                break
            same += 1
        assert same >= 4  # "Paper Fox is a", "As a western, Paper Fox"


def test_preferences_margins_are_half_steps_that_follow_the_gold_gap(pairs):
    assert {pair["margin"] for pair in pairs} == {0, 0.5, 1, 1.5, 2, 2.5, 3}
    easy = [pair for pair in pairs if pair["margin"] == 3]
    close = [pair for pair in pairs if pair["margin"] == 0]
    assert best_accuracy(easy) > 0.98
    assert 0.4 < best_accuracy(close) < 0.75


def test_preferences_without_noise_or_faults_follow_the_gold_score():
    for pair in preferences(200, seed=3, noise=1e-9, spoiled=0):
        gap = gold_score(pair["chosen"]) - gold_score(pair["rejected"])
        assert gap >= -1e-6
        assert abs(pair["margin"] - min(gap, 3)) <= 0.25 + 1e-6
        assert fluency(pair["chosen"]) == fluency(pair["rejected"]) == 1.0


def test_preferences_show_each_fault():
    texts = [
        pair[side]
        for pair in preferences(300, seed=4, spoiled=1)
        for side in ("chosen", "rejected")
    ]
    assert any(not text.endswith(".") for text in texts)  # breaks off
    assert any(len(words_of(text)) > 50 for text in texts)  # rambles
    assert any(fluency(text) < 0.5 for text in texts)  # word salad
    sentences = [text.split(". ") for text in texts]
    assert any(len(set(parts)) < len(parts) for parts in sentences)  # repeats


def test_best_accuracy_is_what_the_noise_allows(pairs):
    gaps = [abs(gold_score(pair["chosen"]) - gold_score(pair["rejected"])) for pair in pairs]
    expected = fmean(1 / (1 + math.exp(-gap / 0.55)) for gap in gaps)
    # 2000 coin tosses of probability 0.85: standard error 0.008
    assert best_accuracy(pairs) == pytest.approx(expected, rel=0, abs=0.025)
    assert 0.82 < best_accuracy(pairs) < 0.88


def test_best_accuracy_counts_ties_half():
    good, bad = "The acting is superb.", "The acting is awful."
    rows = [(good, bad), (good, bad), (bad, good), (good, good)]  # right, right, wrong, tie
    assert best_accuracy([{"chosen": a, "rejected": b} for a, b in rows]) == 2.5 / 4


def test_preferences_refuse_noise_that_is_not_positive():
    for noise in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"noise is .*give a positive number"):
            preferences(1, seed=0, noise=noise)


def test_best_accuracy_refuses_no_pairs():
    with pytest.raises(ValueError, match="at least one"):
        best_accuracy([])
