"""The files of `minirlhf demo`: what a user would bring, and what a noisy rater prefers."""

import json
from pathlib import Path
from random import Random

from minirlhf.files import atomic
from minirlhf.tools.demo import film_judge, film_world
from minirlhf.tools.settings import DemoConfig

MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.06,  # a narrow model learns sooner from larger weights than 0.02
}
HELD_OUT = 64  # prompts answered before and after
PAIRS, ANSWERS = 4400, 2800  # comparisons in all; responses of the model among what is compared


def write_rows(path: Path, rows: list[dict]) -> None:
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:  # splitlines would also split at U+2028 in a text
        return [json.loads(line) for line in lines]


def text_of(row: dict) -> str:
    return row["prompt"] + row["response"]


def write_world(config: DemoConfig) -> None:
    """The files that a user would bring: texts to imitate, prompts, the shape of a model."""
    data, seed, prompts = config.data, config.seed, config.scaled(ANSWERS // 2)
    data.mkdir(parents=True)
    write_rows(data / "reviews.jsonl", [{"text": t} for t in film_world.reviews(6000, seed)])
    openings = [{"prompt": p} for p in film_world.prompts(HELD_OUT + 2000, seed)]
    write_rows(data / "prompts-held-out.jsonl", openings[:HELD_OUT])
    write_rows(data / "prompts.jsonl", openings[HELD_OUT:])
    twice = [row for row in openings[HELD_OUT : HELD_OUT + prompts] for _ in range(2)]
    write_rows(data / "prompts-twice.jsonl", twice)
    atomic.write_json(data / "tiny-model.json", MODEL)


def write_preferences(config: DemoConfig) -> list[dict]:
    """What a noisy rater prefers among the model's own responses and texts of the world.

    Both are needed: the responses have the faults that a policy could exploit, the texts every
    word. The two texts of a pair begin with the same prompt, as DPO needs it. Returns the held-out
    pairs, a tenth of all.
    """
    data, pairs, rng = config.data, config.scaled(PAIRS), Random(config.seed)
    texts = [text_of(row) for row in read_rows(data / "answers.jsonl")]
    rated = [film_judge.rate(a, b, rng) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    rated += film_judge.preferences(pairs - len(rated), config.seed)
    rng.shuffle(rated)
    tenth = max(pairs // 10, 1)
    held_out = rated[:tenth]
    write_rows(data / "pairs-held-out.jsonl", held_out)
    write_rows(data / "pairs.jsonl", rated[tenth:])
    return held_out
