"""A small world of film reviews: what the model of `minirlhf demo` learns to write.

The words are in film_world.toml. A review is an opening and what follows it: one judgement after
another, each praise, blame or neither, most of them of one mind, and a verdict that they add up to.
film_judge.py grades what is written here and by the model.
"""

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

# ---- the words -----------------------------------------------------------------------------------

_WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
GRADES = {word: float(g) for g, words in _WORDS["grades"].items() for word in words.split()}
NEGATORS = frozenset({"not", "never"})


def _by_sign(phrases: Iterable[str]) -> dict[int, list[str]]:
    """The phrases by what they say: 1 praise, 0 neither, -1 blame."""
    groups = {1: [], 0: [], -1: []}
    for phrase in phrases:
        words = re.findall("[a-z]+", phrase)
        grade = sum(GRADES.get(word, 0.0) for word in words)
        grade *= -1 if NEGATORS & set(words) else 1
        groups[(grade >= 1) - (grade <= -1)].append(phrase)
    return groups


def _split(phrases: str) -> list[str]:
    return phrases.split("; ") if phrases else []


GENRES = {genre: (plural, moods) for genre, (plural, *moods) in _WORDS["genres"].items()}
GENRE_OF_MOOD = {mood: genre for genre, (_, moods) in GENRES.items() for mood in moods}
GENRE_OF_WORD = {word: genre for genre, (plural, _) in GENRES.items() for word in (genre, plural)}
ASPECTS = {  # aspect: (how its sentence begins, adjectives by sign, verbs by sign)
    aspect: (begins, _by_sign(_split(adjectives)), _by_sign(_split(verbs)))
    for aspect, (begins, adjectives, verbs) in _WORDS["aspects"].items()
}
JUDGING = {slot: _by_sign(_split(phrases)) for slot, phrases in _WORDS["judging"].items()}
NEUTRAL = {slot: _split(phrases) for slot, phrases in _WORDS["neutral"].items()}
OPENINGS = _WORDS["openings"]

# ---- the writer ----------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


@dataclass
class Writer:
    """Writes one review: draws words, and remembers what it has said so as not to repeat it."""

    rng: Random
    genre: str = ""
    article: str = ""  # where the opening ends in "a" or "an": the next word must fit
    said: set[str] = field(default_factory=set)
    tone: float = 0.5  # probability that a judgement is praise rather than blame
    sign: int = 0  # of the judgement being written: 1 praise, 0 neither, -1 blame
    balance: int = 0  # sum of the signs so far: the verdict follows from it

    def fresh(self, options: Sequence[str]) -> str:
        """One of the options, one not said before in this review if there is any."""
        word = self.rng.choice([o for o in options if o not in self.said] or options)
        self.said.add(word)
        return word

    def draw_sign(self) -> None:
        neither = self.rng.random() < 0.15
        self.sign = 0 if neither else 1 if self.rng.random() < self.tone else -1
        self.balance += self.sign

    def fill(self, template: str) -> str:
        """Replaces each <slot>, from left to right, by words drawn for it."""
        while slot := re.search(r"<(\w+)>", template):
            template = template[: slot.start()] + self.slot(slot[1]) + template[slot.end() :]
        return template

    def slot(self, name: str) -> str:
        match name:
            case "genre" | "genres":
                self.genre = self.genre or self.rng.choice(list(GENRES))
                return self.genre if name == "genre" else GENRES[self.genre][0]
            case "join":  # a friendly opening disagrees with blame
                return "but" if self.sign < 0 else "and"
            case "film":
                return self.film()
            case "judged":
                return self.degree(self.film())
        if name in JUDGING:
            return self.fresh(JUDGING[name][self.sign])
        return self.fresh(NEUTRAL[name])

    def film(self) -> str:
        """An adjective for the whole film, or a mood: praise takes one of its genre."""
        options = JUDGING["film"][self.sign]
        if self.genre and self.sign >= 0 and self.rng.random() < 0.4:
            own = self.sign > 0
            options = [m for m, genre in GENRE_OF_MOOD.items() if (genre == self.genre) == own]
        if self.article:
            fits = [o for o in options if (o[0] in "aeiou") == (self.article == "an")]
            options = fits or ["plain" if self.article == "a" else "ordinary"]
        return self.fresh(options)

    def degree(self, adjective: str) -> str:
        """The adjective, sometimes after an adverb that suits it: nothing is "very superb"."""
        grade = abs(GRADES.get(adjective, 1.0))
        if grade < 1 or self.rng.random() < 0.65:
            return adjective
        adverbs = ("very", "truly", "rather", "fairly") if grade == 1 else ("truly", "simply")
        return f"{self.fresh(adverbs)} {adjective}"

    def clause(self) -> str:
        """One aspect, judged: "the acting is superb", "the ending drags"."""
        self.draw_sign()
        begins, adjectives, verbs = ASPECTS[self.fresh(list(ASPECTS))]
        form = self.rng.random()
        if form < 0.25 and verbs[self.sign]:
            return f"{begins.rsplit(' ', 1)[0]} {self.fresh(verbs[self.sign])}"
        if form < 0.35 and self.sign:
            mild = [word for word in adjectives[-self.sign] if abs(GRADES[word]) == 1]
            return f"{begins} {'never' if self.sign > 0 else 'not'} {self.fresh(mild)}"
        first = self.fresh(adjectives[self.sign])
        if form < 0.5 and (more := [a for a in adjectives[self.sign] if a not in self.said]):
            return f"{begins} {first} and {self.fresh(more)}"
        return f"{begins} {self.degree(first)}"

    def aspects(self) -> str:
        """One or two clauses; "but" and "although" join only what disagrees."""
        first, first_sign = self.clause(), self.sign
        if self.rng.random() < 0.25:
            return _sentence(first)
        second = self.clause()
        if self.sign == first_sign:
            return _sentence(f"{first}, and {second}")
        if self.sign == -first_sign and self.rng.random() < 0.4:
            return _sentence(f"although {first}, {second}")
        return _sentence(f"{first}, but {second}")

    def closing(self) -> str:
        """The verdict that the judgements so far add up to, or a fact that judges nothing."""
        self.sign = (self.balance > 0) - (self.balance < 0)
        form = self.rng.random()
        plural, moods = GENRES.get(self.genre, ("", ()))
        if form < 0.3 and moods and self.sign and self.said.isdisjoint(moods):
            one, two = self.rng.sample(moods, 2)
            mood = f"{one} and {two}" if self.sign > 0 else f"never {one}"
            return f"It is {mood}, as {plural} should be."
        return self.fill("<fact>" if form < 0.45 else "<verdict>")

    def rest(self, follow_ups: Sequence[str]) -> str:
        """All that follows the opening: the end of its sentence, and one or two sentences more."""
        self.tone = self.rng.betavariate(0.5, 0.5)  # most reviewers have made up their minds
        if self.rng.random() > 0.15:
            self.sign = self.balance = 1 if self.tone > 0.5 else -1
        text = f"{self.fill(self.rng.choice(follow_ups))} {self.aspects()}"
        form = self.rng.random()
        if form < 0.25:
            return f"{text} {self.aspects()}"
        return f"{text} {self.closing()}" if form < 0.9 else text


def _articles(text: str) -> str:
    """ "a" becomes "an" before a vowel; the word lists hold no "hour" and no "unique"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def reviews_of_one_film(rng: Random, n: int) -> tuple[str, list[str]]:
    """An opening, and n independent reviews that begin with it."""
    template = rng.choice(list(OPENINGS))
    opener = Writer(rng)
    opening = _articles(opener.fill(template))
    article = opening.split()[-1] if template.endswith((" a", " an")) else ""
    texts = []
    for _ in range(n):
        writer = Writer(rng, opener.genre, article, set(opener.said))
        texts.append(opening + _articles(writer.rest(OPENINGS[template])))
    return opening, texts


def reviews(n: int, seed: int) -> list[str]:
    """n reviews of two or three sentences: what the base model learns to write."""
    rng = Random(f"reviews {seed}")
    return [text for _ in range(n) for text in reviews_of_one_film(rng, 1)[1]]


def prompts(n: int, seed: int) -> list[str]:
    """n openings to continue, without a final space; distinct as long as the world has new ones.

    For a held-out set, split one call: two seeds may share some openings.
    """
    rng, distinct = Random(f"prompts {seed}"), {}
    for _ in range(20 * n):
        if len(distinct) == n:
            break
        distinct[reviews_of_one_film(rng, 0)[0]] = None
    more = n - len(distinct)
    return list(distinct) + [reviews_of_one_film(rng, 0)[0] for _ in range(more)]
