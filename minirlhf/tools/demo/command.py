"""RLHF end to end in two minutes, offline: `minirlhf demo`.

A tiny model learns to write reviews of a small world of films (film_world.py), a reward model
learns from noisy simulated preferences (film_judge.py), and PPO aligns the first with the second.
Because the world's gold score is known, the end shows what no real run can: whether the gain in
learned reward is real. The three runs are the recipes themselves, each with its command printed.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

from minirlhf.errors import OK, UserError, run
from minirlhf.files import atomic
from minirlhf.recipes import ppo, reward, sft
from minirlhf.run import flags
from minirlhf.tools import curve, sample
from minirlhf.tools.demo import film_judge, film_world
from minirlhf.tools.settings import DemoConfig

MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.06,  # a narrow model learns sooner from larger weights than 0.02
}
PAIRS, ANSWERS = 4400, 2800  # comparisons in all; responses of the model among what is compared
HELD_OUT = 64  # prompts answered before and after
SHOWN = 5  # of them, as text


def write_rows(path: Path, rows: list[dict]) -> None:
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(row: dict) -> str:
    return row["prompt"] + row["response"]


def command(title: str, main: Callable[[list[str]], int], *argv: object) -> None:
    """Prints a command and runs it."""
    words = [main.__module__.rpartition(".")[2], *map(str, argv)]
    print(f"\n{title}\n$ minirlhf {shlex.join(words)}", flush=True)
    code = main(words[1:])
    if code != OK:
        do = "the demo starts anew in another --out, or once its folder is removed"
        raise UserError(f"minirlhf {words[0]}", "was stopped", do, code)


# ---- the data ------------------------------------------------------------------------------------


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

    Both are needed: the responses have the faults that PPO could exploit, the texts every word.
    Returns the held-out pairs, a tenth of all.
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


# ---- the runs ------------------------------------------------------------------------------------


def run_sft(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    command(
        "1. A model learns to write film reviews, good and bad alike.", sft.main,
        "--init-config", data / "tiny-model.json", "--vocab-size", 1024,
        "--data", data / "reviews.jsonl", "--out", out / "sft", "--steps", steps(200),
        "--batch-size", 48, "--learning-rate", 4e-3, "--warmup-steps", steps(20),
        "--log-every", steps(50), "--save-every", 1000, "--seed", config.seed,
    )


def run_reward(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    command(
        "It answers prompts twice, and a noisy rater compares the two.", sample.main,
        "--model", out / "sft" / "model", "--data", data / "prompts-twice.jsonl",
        "--out", data / "answers.jsonl", "--max-new-tokens", 48, "--batch-size", 256,
        "--seed", config.seed,
    )
    held_out = write_preferences(config)
    command(
        "2. A reward model learns which of two reviews a noisy rater preferred.", reward.main,
        "--model", out / "sft" / "model", "--data", data / "pairs.jsonl",
        "--eval-data", data / "pairs-held-out.jsonl", "--out", out / "reward",
        "--steps", steps(160), "--batch-size", 32, "--learning-rate", 1e-3,
        "--warmup-steps", steps(10), "--log-every", steps(32), "--show-samples", 3,
        "--save-every", 1000, "--center-rewards-coefficient", 0.01, "--seed", config.seed,
    )
    accuracy = read_rows(out / "reward" / "metrics.jsonl")[-1]["eval_accuracy"]
    best = film_judge.best_accuracy(held_out)
    print(f"held-out accuracy {accuracy:.3f}; the rater's noise allows {best:.3f}")


def run_ppo(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    command(
        "3. PPO: write what the reward model likes, without leaving the first model far behind.",
        ppo.main, "--model", out / "sft" / "model", "--data", data / "prompts.jsonl",
        "--reward", out / "reward" / "model", "--out", out / "ppo", "--steps", steps(32),
        "--batch-size", 64, "--mini-batches", 2, "--micro-batch-size", 32, "--epochs", 2,
        "--max-new-tokens", 48, "--learning-rate", 3e-4, "--kl-coef", 0.3, "--value-clip", "none",
        "--critic-learning-rate", 9e-4, "--missing-eos-penalty", 1, "--sample-every", 0,
        "--save-rollouts",
        "--log-every", steps(4), "--save-every", 1000, "--seed", config.seed,
    )


def answer_held_out(config: DemoConfig) -> None:
    for name, recipe in (("before", "sft"), ("after", "ppo")):
        command(
            f"Held-out prompts, {name}:", sample.main, "--model", config.folder / recipe / "model",
            "--data", config.data / "prompts-held-out.jsonl",
            "--out", config.folder / f"{name}.jsonl", "--max-new-tokens", 48,
            "--seed", config.seed,
        )


# ---- what came of it -----------------------------------------------------------------------------


class Progress(NamedTuple):
    """Means over the PPO steps since the line of the log before."""

    step: int  # the last of them
    learned: float  # reward
    gold: float  # reward, in standard deviations of the world's reviews
    kl: float  # nats a response
    tokens: float  # of a response


def progress(folder: Path) -> list[Progress]:
    """One a line of a PPO run's log."""
    gold: dict[int, list[float]] = {}
    for row in read_rows(folder / "samples.jsonl"):
        if row["kind"] == "rollout":
            gold.setdefault(row["step"], []).append(film_judge.gold_score(text_of(row)))
    found, last = [], 0
    for line in read_rows(folder / "metrics.jsonl"):
        steps, last = range(last + 1, line["step"] + 1), line["step"]
        mean = fmean(score for step in steps for score in gold[step])
        found.append(Progress(last, line["objective/scores"], mean, line["objective/kl"],
                              line["response_length"]))
    return found


def show_progress(rows: list[Progress]) -> None:
    print(f"\n{'step':>6}{'learned reward':>16}{'gold reward':>13}{'KL, nats':>10}{'tokens':>8}")
    for row in rows:
        print(f"{row.step:>6}{row.learned:>16.2f}{row.gold:>13.2f}{row.kl:>10.2f}"
              f"{row.tokens:>8.1f}")


def picture(rows: list[Progress]) -> str:
    """The rewards and the KL over the steps, as SVG."""
    columns = Progress(*zip(*rows, strict=True))
    rewards = {"learned": columns.learned, "gold": columns.gold}
    return curve.draw("PPO step", columns.step, [
        curve.Panel("reward of the sampled reviews", rewards),
        curve.Panel("KL to the first model, nats a response", {"KL": columns.kl}),
    ])


def compare(before: Path, after: Path) -> None:
    """The same held-out prompts, answered by both models."""
    answers = {"before": read_rows(before), "after": read_rows(after)}
    for rows in zip(*[answers[name][:SHOWN] for name in answers], strict=True):
        print(f"\n{rows[0]['prompt']} …")
        for name, row in zip(answers, rows, strict=True):
            gold = film_judge.gold_score(text_of(row))
            print(f"  {name:<6} (gold {gold:>5.2f}) …{row['response']}")
    print(f"\nOn {HELD_OUT} held-out prompts:")
    print(f"{'':<8}{'gold reward':>12}{'fluency':>9}{'different answers':>19}")
    for name, rows in answers.items():
        texts = [text_of(row) for row in rows]
        gold = fmean(map(film_judge.gold_score, texts))
        fluency = fmean(map(film_judge.fluency, texts))
        different = len({row["response"] for row in rows})
        print(f"{name:<8}{gold:>12.2f}{fluency:>9.0%}{different:>19}")


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(DemoConfig, argv, "minirlhf demo")
    out, started = config.folder, time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is there already", "remove it, or give another --out")
    write_world(config)
    run_sft(config)
    run_reward(config)
    run_ppo(config)
    rows = progress(out / "ppo")
    show_progress(rows)
    atomic.write_text(out / "curve.svg", picture(rows))
    answer_held_out(config)
    compare(out / "before.jsonl", out / "after.jsonl")
    print(f"\nThis took {time.perf_counter() - started:.0f} s. To look further:")
    print(f"  minirlhf sample --model {out}/ppo/model --prompt 'The Glass Harbor is a'")
    print(f"  minirlhf score --model {out}/reward/model --data {out}/after.jsonl")
    print(f"  less {out}/ppo/samples.jsonl {out}/ppo/metrics.jsonl")
    print(f"  {out}/curve.svg, in a browser: rewards and KL over the steps")
    print("  minirlhf ppo --help")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
