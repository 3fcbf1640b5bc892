"""What a film review is worth: the gold score of `minirlhf demo`, and a rater who knows it roughly.

RLHF on real text cannot be checked, because nobody knows the true reward. Here a formula,
`gold_score`, is the truth: the reward model sees only the rater's noisy comparisons, the policy
sees only the reward model, and the reader of the demo sees the gold score.

Any string can be judged, and a high score is earned only by writing well. A mood word praises only
a film of its genre ("hilarious" is no praise of a western), so the best answer depends on the
prompt; what follows "but" weighs more; a word counts once, so that repeating it only dilutes; and
what a policy might try instead (repeating, rambling, breaking off, word salad) costs.
"""

import re
from collections.abc import Sequence
from functools import cache
from math import log
from random import Random

from minirlhf.tools.demo.film_world import (
    ASPECTS,
    GENRE_OF_MOOD,
    GENRE_OF_WORD,
    GENRES,
    GRADES,
    NEGATORS,
    NEUTRAL,
    Writer,
    reviews,
    reviews_of_one_film,
)

INTENSIFIERS = frozenset({"very", "truly", "simply"})
HEDGES = frozenset({"rather", "fairly"})  # faint praise, faint blame
CLASSES = (  # words that can replace one another, so that a sample of the world shows all trigrams
    dict.fromkeys(NEUTRAL["adjective"], "<adjective>")
    | dict.fromkeys(NEUTRAL["noun"], "<noun>")
    | {subject.split()[-1]: "<subject>" for subject in NEUTRAL["subject"]}
    | {word: "<genre>" for word in GENRES if word != "adventure"}  # takes "an"
    | {mood: "<an mood>" if mood[0] in "aeiou" else "<a mood>" for mood in GENRE_OF_MOOD}
)


def _trigrams(text: str) -> list[tuple[str, str, str]]:
    """Three words or marks in a row, by class; before a full stop any word counts as the same."""
    tokens = [CLASSES.get(token, token) for token in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)]
    triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return [("" if b == "." else a, b, c) for a, b, c in triples]


@cache
def _known_trigrams() -> frozenset[tuple[str, str, str]]:
    return frozenset(trigram for text in reviews(20_000, 0) for trigram in _trigrams(text))


def fluency(text: str) -> float:
    """Share of the text's trigrams that the world's writer uses; 0 for a text without any."""
    found, known = _trigrams(text), _known_trigrams()
    return sum(trigram in known for trigram in found) / max(1, len(found))


def _clauses(text: str) -> list[tuple[float, list[str]]]:
    """(weight, words) of each clause. In "A, but B" and "although A, B" the reader remembers B."""
    clauses = []
    for sentence in re.split(r"[.!?]", text.lower()):
        concedes = sentence.lstrip().startswith("although ")
        halves = re.split("," if concedes else r"\bbut\b", sentence, maxsplit=1)
        for weight, half in zip((0.5, 1.5) if len(halves) == 2 else (1.0,), halves, strict=True):
            for clause in re.split(r"[,;:]|\band\b", half):
                clauses.append((weight, re.findall("[a-z]+", clause)))
    return clauses


def opinion(text: str) -> tuple[float, int]:
    """(weighted mean grade shrunk towards 0, number of aspects judged).

        mean = sum_i w_i g_i / (1 + sum_i w_i)

    over the judging words i; w_i is the weight of the clause; g_i is from GRADES, x -0.5 if one of
    the three words before it in its clause negates, x 1.5 if one intensifies, x 0.5 if one hedges.
    A mood has grade 2 in its genre, 0 in another, 1 where no genre is named. A word said again has
    grade 0 and still its weight, so that repetition dilutes; an intensifier works once.
    """
    clauses = _clauses(text)
    genres = [
        GENRE_OF_WORD[word] for _, words in clauses for word in words if word in GENRE_OF_WORD
    ]
    total, weights, said, aspects = 0.0, 1.0, set(), set()
    for weight, words in clauses:
        judged = False
        for i, word in enumerate(words):
            if word in GENRE_OF_MOOD:
                grade = (2.0 if genres[0] == GENRE_OF_MOOD[word] else 0.0) if genres else 1.0
            elif word in GRADES:
                grade = GRADES[word]
            else:
                continue
            before = set(words[max(0, i - 3) : i])
            grade *= -0.5 if before & NEGATORS else 1.0
            grade *= 1.5 if before & INTENSIFIERS - said else 0.5 if before & HEDGES else 1.0
            total += 0.0 if word in said else weight * grade
            weights += weight
            said |= {word} | before & INTENSIFIERS
            judged = True
        aspects |= ASPECTS.keys() & set(words) if judged else set()
    return total / weights, len(aspects)


def raw_score(text: str) -> float:
    """The gold score before standardising, in grades: opinion and coverage less five faults."""
    mean, aspects = opinion(text)
    words = re.findall("[a-z]+", text.lower())
    repeats = len(words) - 2 - len(set(zip(words, words[1:], words[2:], strict=False)))
    score = mean + 0.25 * min(aspects, 4)
    score -= min(3.0, 0.4 * max(0, repeats))  # word trigrams said before
    score -= 3.0 * (1.0 - fluency(text))  # unknown words, broken grammar
    score -= 0.0 if text.rstrip().endswith((".", "!", "?")) else 1.0  # breaks off
    score -= min(2.0, 0.1 * max(0, len(words) - 45))  # rambles
    return score


RAW_MEAN, RAW_STD = 0.6, 0.85  # of raw_score over the world's reviews


def gold_score(text: str) -> float:
    """The true reward of a text, finite for any string; over `reviews` mean 0 and std 1, about."""
    return (raw_score(text) - RAW_MEAN) / RAW_STD


def _spoil(rng: Random, opening: str, text: str) -> str:
    """One of four faults that a policy may fall into, so that the rater's comparisons show them."""
    sentences, words = re.findall(r"[^.]+\.", text[len(opening) :]), text[len(opening) :].split(" ")
    match rng.randrange(4):
        case 0:
            return text + sentences[-1] * rng.randint(1, 3)
        case 1:
            writer = Writer(rng, tone=rng.random())
            return " ".join([text, *(writer.aspects() for _ in range(rng.randint(2, 4)))])
        case 2:
            return opening + " ".join(words[: rng.randrange(2, len(words))])
    rng.shuffle(words)
    return opening + " " + " ".join(word for word in words if word)


def rate(a: str, b: str, rng: Random, noise: float = 0.55) -> dict:
    """One comparison of two whole texts by a rater of limited attention.

        gap = gold(a) - gold(b) + noise x Logistic(0, 1)

    The rater prefers a where gap > 0, so P(a preferred) = sigmoid((gold(a) - gold(b)) / noise), the
    model of Bradley and Terry (1952). The margin is |gap| in half steps, at most 3.

    Args:
        noise: in gold-score units, > 0.
    Returns:
        "chosen", "rejected" and "margin".
    Raises:
        ValueError: noise is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise is {noise}: give a positive number, in gold-score units")
    u = rng.uniform(1e-12, 1 - 1e-12)
    gap = gold_score(a) - gold_score(b) + noise * log(u / (1 - u))
    chosen, rejected = (a, b) if gap > 0 else (b, a)
    return {"chosen": chosen, "rejected": rejected, "margin": min(3.0, round(2 * abs(gap)) / 2)}


def preferences(n: int, seed: int, noise: float = 0.55, spoiled: float = 0.15) -> list[dict]:
    """n comparisons (see `rate`), each of two texts of the world with the same opening.

    Args:
        spoiled: probability that a text carries a fault that `reviews` never shows.
    """
    rng, rows = Random(f"preferences {seed}"), []
    for _ in range(n):
        opening, texts = reviews_of_one_film(rng, 2)
        a, b = (_spoil(rng, opening, t) if rng.random() < spoiled else t for t in texts)
        rows.append(rate(a, b, rng, noise))
    return rows


def best_accuracy(pairs: Sequence[dict]) -> float:
    """Accuracy of the gold score on these pairs, ties half: the best that the rater's noise allows.

    Its expectation is the mean of sigmoid(|gold(a) - gold(b)| / noise); no other score's is higher.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("no pairs: an accuracy needs at least one")
    gaps = [gold_score(pair["chosen"]) - gold_score(pair["rejected"]) for pair in pairs]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
