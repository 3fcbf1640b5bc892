"""A small world of film reviews whose quality is known: what `minirlhf demo` learns in.

RLHF on real text cannot be checked, because nobody knows the true reward. Here a grammar writes the
texts and a formula, `gold_score`, reads them, so a run can be graded: the reward model sees only
noisy comparisons, the policy sees only the reward model, and the reader sees the gold score.

Three parts, in this order: the words; the writer (`reviews`, `prompts`); the judge (`fluency`,
`gold_score`, and `preferences`, a rater whose opinion is the gold score plus noise). The judge
reads any string, and there are things to get wrong. A mood word praises only a film of its genre
("hilarious" is no praise of a western), so the best answer depends on the prompt; what follows
"but" weighs more; a word counts once, so that repeating it only dilutes; and whatever a policy may
try instead of writing well (repeating, rambling, breaking off, word salad) costs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import log
from random import Random

# ---- the words -------------------------------------------------------------------------------

# Every judging word and its grade. Grade 0 is still a judgement: it says that nothing stands out.
GRADES = {
    word: grade
    for grade, words in {
        2.0: "superb brilliant wonderful magnificent masterful stunning unforgettable perfect "
        "haunting loved adored delighted delight shines sparkles lingers gem treasure triumph",
        1.0: "charming clever stylish inventive natural convincing fresh original lovely elegant "
        "graceful satisfying sharp rich confident works surprises land enjoyed liked impressed "
        "smiling please pleasure treat recommend worth",
        0.25: "decent fine passable",
        0.0: "ordinary familiar simple plain quiet modest steady gentle curiosity neither",
        -1.0: "dull messy shallow clumsy tired wooden stiff muddled thin predictable loud cheap "
        "rushed weak shaky shabby slow uneven lazy flat drags grates stumbles fails bored yawned "
        "disappointed annoyed regretted asleep bore disappoint mess chore letdown",
        -2.0: "awful dreadful hopeless painful lifeless hated cheated collapses sleepwalks "
        "disaster waste",
    }.items()
    for word in words.split()
}
NEGATORS = frozenset({"not", "never"})  # grade x -0.5
INTENSIFIERS = frozenset({"very", "truly", "simply"})  # grade x 1.5
HEDGES = frozenset({"rather", "fairly"})  # grade x 0.5: faint praise, faint blame

# Genre: its plural, and the two moods that praise a film of this genre and no other.
GENRES = {
    "thriller": ("thrillers", ("tense", "gripping")),
    "comedy": ("comedies", ("hilarious", "witty")),
    "drama": ("dramas", ("moving", "heartfelt")),
    "western": ("westerns", ("rugged", "dusty")),
    "musical": ("musicals", ("lively", "catchy")),
    "mystery": ("mysteries", ("puzzling", "intriguing")),
    "romance": ("romances", ("tender", "passionate")),
    "documentary": ("documentaries", ("informative", "thorough")),
    "fantasy": ("fantasies", ("magical", "dreamlike")),
    "adventure": ("adventures", ("daring", "thrilling")),
}
GENRE_OF_MOOD = {mood: genre for genre, (_, moods) in GENRES.items() for mood in moods}
GENRE_OF_WORD = {word: genre for genre, (plural, _) in GENRES.items() for word in (genre, plural)}

# Aspect: how a sentence begins / adjectives that suit it / predicates that do without "is".
ASPECTS = {
    "acting": "the acting is/superb;natural;convincing;decent;ordinary;wooden;stiff;awful/",
    "plot": "the plot is/clever;fresh;original;simple;familiar;muddled;thin;hopeless"
    "/surprises until the last scene;collapses halfway",
    "music": "the music is/haunting;lovely;elegant;wonderful;quiet;familiar;loud;awful;cheap"
    "/lingers for days;grates on the ear",
    "ending": "the ending is/perfect;unforgettable;satisfying;simple;passable;rushed;weak;"
    "predictable;dreadful/works;drags",
    "camera": "the camera work is/stunning;graceful;elegant;inventive;steady;plain;shaky;clumsy;"
    "dull/",
    "dialogue": "the dialogue is/sharp;natural;clever;brilliant;plain;ordinary;clumsy;stiff;"
    "dreadful/sparkles;fails",
    "jokes": "the jokes are/sharp;fresh;brilliant;clever;familiar;gentle;tired;cheap;painful"
    "/land;fall flat",
    "costumes": "the costumes are/stunning;elegant;stylish;simple;modest;cheap;shabby/",
    "effects": "the effects are/stunning;inventive;convincing;modest;plain;cheap;awful/",
    "pace": "the pace is/perfect;confident;graceful;steady;gentle;slow;uneven;painful/",
    "actor": "the lead actor is/magnificent;convincing;charming;superb;decent;fine;wooden;dull;"
    "hopeless/shines;sleepwalks",
    "script": "the script is/sharp;original;clever;masterful;simple;decent;lazy;muddled;shallow"
    "/sparkles;stumbles",
    "characters": "the characters are/rich;charming;unforgettable;familiar;ordinary;shallow;thin;"
    "lifeless/",
}
JUDGING = {  # slots whose filling judges; GRADES decides which of them praise and which blame
    "film": "charming;clever;stylish;inventive;brilliant;superb;wonderful;magnificent;quiet;modest;"
    "decent;ordinary;plain;familiar;dull;messy;shallow;clumsy;tired;uneven;awful;dreadful;lifeless",
    "feeling": "delighted;impressed;never bored;neither pleased nor upset;disappointed;bored;"
    "annoyed;not impressed",
    "reaction": "loved every minute of it;adored it;enjoyed most of it;am still smiling;"
    "found it ordinary;found it passable;hated every minute of it;felt cheated;"
    "nearly fell asleep;yawned a lot;regretted it at once",
    "effect": "will delight you;will please you;will not disappoint you;is worth <price>;"
    "is fine for a rainy evening;is a curiosity;will bore you;will disappoint you;"
    "will not please you",
    "thing": "gem;treasure;triumph;delight;pleasure;treat;curiosity;mess;bore;chore;letdown;"
    "disaster;waste of time",
    "worth": "I would recommend it to <friend>.;It is worth <price>.;"
    "You could do worse.;It is passable with enough popcorn.;"
    "I would never recommend it to <friend>.;It is not worth <price>.",
}
FREE = {  # slots that are filled whatever the judgement
    "title": "The <adjective> <noun>;<adjective> <noun>",
    "adjective": "Glass;Paper;Silver;Crimson;Hidden;Golden;Broken;Iron;Velvet;Winter;Midnight;Salt;"
    "Marble;Copper;Amber;Northern;Scarlet;Hollow;Thunder;Emerald",
    "noun": "Harbor;Fox;Orchard;Lantern;Bridge;Crown;River;Mirror;Letter;Castle;Garden;Compass;"
    "Sparrow;Engine;Island;Window;Violin;Tower;Carnival;Wolf",
    "subject": "two brothers;a lost dog;a young painter;an old sailor;three thieves;"
    "a village priest;a retired spy;twin sisters;a lonely king;a traveling circus;a bank robbery;"
    "a long winter;a jealous cook;a runaway train;a family of bakers;a forgotten war",
    "when": "last night;on Sunday;with my sister;on a train;at home",
    "person": "brother;sister;mother;neighbor;teacher",
    "friend": "anyone;a friend;my mother;the whole family",
    "price": "the money;the ticket;your evening",
    "fact": "It was filmed in Norway.;It was filmed in Japan.;It is based on a true story.;"
    "It is based on an old novel.;It runs for two hours.;It runs for three hours.",
    "verdict": "In the end it is a <thing>.;A <thing> from start to finish.;<worth>;"
    "For me it was a <thing>.;I would call it a <thing>.;On the whole it is a <thing>.;<worth>",
}
# An opening, and what may follow it. No opening judges, so the score depends on what follows.
OPENINGS = {
    "<title> is a": " <film> <genre> about <subject>.",
    "<title> is an": " <film> <genre> about <subject>.",
    "<title> is a <genre> about": " <subject>, <join> it is <judged>.; <subject>.",
    "<title> tells the story of": " <subject> in a <film> way.; <subject>, <join> it <effect>.",
    "I watched <title> <when> and": " <reaction>.; was <feeling>.",
    "My <person> took me to <title>": ", <join> I was <feeling>.;, <join> I <reaction>.",
    "As a <genre>, <title>": " is <judged>.; <effect>.",
    "This <genre> about <subject>": " is <judged>.; is a <thing>.; <effect>.",
    "If you like <genres>, <title>": " <effect>.; is a <thing>.",
    "Everybody is talking about <title>": ", <join> it is <judged>.;, <join> I was <feeling>.",
}


# ---- the writer ------------------------------------------------------------------------------


@cache
def _signed(phrases: str) -> dict[int, list[str]]:
    """The phrases (";" between them) by what they say: 1 praise, 0 neither, -1 blame."""
    groups = {1: [], 0: [], -1: []}
    for phrase in filter(None, phrases.split(";")):
        words = re.findall("[a-z]+", phrase)
        grade = sum(GRADES.get(word, 0.0) for word in words)
        grade *= -1 if NEGATORS & set(words) else 1
        groups[(grade >= 1) - (grade <= -1)].append(phrase)
    return groups


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
        """One of the options, not said before in this review if there is such a one."""
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
            return self.fresh(_signed(JUDGING[name])[self.sign])
        return self.fresh(FREE[name].split(";"))

    def film(self) -> str:
        """An adjective for the whole film; sometimes a mood, the wrong one where it says little."""
        options = _signed(JUDGING["film"])[self.sign]
        if self.genre and self.sign >= 0 and self.rng.random() < 0.4:
            own = self.sign > 0
            options = [m for m, genre in GENRE_OF_MOOD.items() if (genre == self.genre) == own]
        if self.article:
            fits = [o for o in options if (o[0] in "aeiou") == (self.article == "an")]
            options = fits or ["plain" if self.article == "a" else "ordinary"]
        return self.fresh(options)

    def degree(self, adjective: str) -> str:
        """Sometimes with an adverb that English allows: nothing is "very superb"."""
        grade = abs(GRADES.get(adjective, 1.0))
        if grade < 1 or self.rng.random() < 0.65:
            return adjective
        adverbs = ("very", "truly", "rather", "fairly") if grade == 1 else ("truly", "simply")
        return f"{self.fresh(adverbs)} {adjective}"

    def clause(self) -> str:
        """One aspect, judged: "the acting is superb", "the ending drags"."""
        self.draw_sign()
        head, adjectives, predicates = ASPECTS[self.fresh(list(ASPECTS))].split("/")
        pools, form = _signed(adjectives), self.rng.random()
        if form < 0.25 and (others := _signed(predicates)[self.sign]):
            return f"{head.rsplit(' ', 1)[0]} {self.fresh(others)}"
        if form < 0.35 and self.sign:
            mild = [word for word in pools[-self.sign] if abs(GRADES[word]) == 1]
            return f"{head} {'never' if self.sign > 0 else 'not'} {self.fresh(mild)}"
        first = self.fresh(pools[self.sign])
        if form < 0.5 and (more := [word for word in pools[self.sign] if word not in self.said]):
            return f"{head} {first} and {self.fresh(more)}"
        return f"{head} {self.degree(first)}"

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

    def rest(self, follow_ups: str) -> str:
        """All that follows the opening: the end of its sentence, and one or two sentences more."""
        self.tone = self.rng.betavariate(0.5, 0.5)  # most reviewers have made up their minds
        if self.rng.random() > 0.15:
            self.sign = self.balance = 1 if self.tone > 0.5 else -1
        text = f"{self.fill(self.rng.choice(follow_ups.split(';')))} {self.aspects()}"
        form = self.rng.random()
        if form < 0.25:
            return f"{text} {self.aspects()}"
        return f"{text} {self.closing()}" if form < 0.9 else text


def _articles(text: str) -> str:
    """ "a" becomes "an" before a vowel; the word lists hold no "hour" and no "unique"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _write(rng: Random, count: int) -> tuple[str, list[str]]:
    """An opening, and `count` independent reviews that begin with it."""
    template = rng.choice(list(OPENINGS))
    opener = Writer(rng)
    opening = _articles(opener.fill(template))
    article = opening.split()[-1] if template.endswith((" a", " an")) else ""
    texts = []
    for _ in range(count):
        writer = Writer(rng, opener.genre, article, set(opener.said))
        texts.append(opening + _articles(writer.rest(OPENINGS[template])))
    return opening, texts


def reviews(n: int, seed: int) -> list[str]:
    """n reviews of two or three sentences: what the base model learns to write."""
    rng = Random(f"reviews {seed}")
    return [text for _ in range(n) for text in _write(rng, 1)[1]]


def prompts(n: int, seed: int) -> list[str]:
    """n openings to continue, without a final space; distinct as long as the world has new ones.

    For a held-out set, split one call: two seeds may share some openings.
    """
    rng, distinct = Random(f"prompts {seed}"), {}
    for _ in range(20 * n):
        if len(distinct) == n:
            break
        distinct[_write(rng, 0)[0]] = None
    return list(distinct) + [_write(rng, 0)[0] for _ in range(n - len(distinct))]


# ---- the judge -------------------------------------------------------------------------------

CLASSES = (  # words that can stand in for one another: one class, so a modest sample shows it all
    dict.fromkeys(FREE["adjective"].split(";"), "<adjective>")
    | dict.fromkeys(FREE["noun"].split(";"), "<noun>")
    | {subject.split()[-1]: "<subject>" for subject in FREE["subject"].split(";")}
    | {word: "<genre>" for word in GENRES if word != "adventure"}  # takes "an"
    | {mood: "<an mood>" if mood[0] in "aeiou" else "<a mood>" for mood in GENRE_OF_MOOD}
)


def _trigrams(text: str) -> list[tuple[str, str, str]]:
    """Of words and marks, capitals kept, by class; across a full stop, any word may stand first."""
    tokens = [CLASSES.get(token, token) for token in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)]
    triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return [("" if b == "." else a, b, c) for a, b, c in triples]


@cache
def _known_trigrams() -> frozenset[tuple[str, str, str]]:
    return frozenset(trigram for text in reviews(20_000, 0) for trigram in _trigrams(text))


def fluency(text: str) -> float:
    """Share of the text's trigrams (words and marks) that the world writes; under three: 0."""
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

    over the judging words i; w_i from the clause; g_i from GRADES, x -0.5 if one of the three words
    before it in its clause negates, x 1.5 if one intensifies, x 0.5 if one hedges. A mood has grade
    2 in its genre, 0 in another, 1 where no genre is named. Words and intensifiers work once: said
    again, a word has grade 0 and still its weight, so repetition dilutes.
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
    """What a text is truly worth; about mean 0, std 1 over `reviews`, and finite for any string."""
    return (raw_score(text) - RAW_MEAN) / RAW_STD


def _spoil(rng: Random, opening: str, text: str) -> str:
    """One of four faults that a policy may fall into, so that the raters have seen them."""
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
    law of Bradley and Terry (1952). The margin is |gap| in half steps, at most 3; 0 is a near tie.

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
    """n comparisons (see `rate`) of two texts of this world with one opening.

    Args:
        spoiled: probability that a text carries a fault that `reviews` never shows.
    """
    rng, rows = Random(f"preferences {seed}"), []
    for _ in range(n):
        opening, texts = _write(rng, 2)
        a, b = (_spoil(rng, opening, t) if rng.random() < spoiled else t for t in texts)
        rows.append(rate(a, b, rng, noise))
    return rows


def best_accuracy(pairs: Sequence[dict]) -> float:
    """Accuracy on these pairs of choosing by the gold score, ties half: the best the noise allows.

    Its expectation, the mean of sigmoid(|gold(a) - gold(b)| / noise), is above any other rule's.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("no pairs: an accuracy needs at least one")
    gaps = [gold_score(pair["chosen"]) - gold_score(pair["rejected"]) for pair in pairs]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
