"""RLHF end to end in two minutes, offline: `minirlhf demo`.

A tiny model learns to write reviews of a small world of films (film_world.py), a reward model
learns from noisy simulated preferences (film_judge.py), and PPO aligns the first with the second;
--algorithm grpo does it without a critic, --algorithm dpo without a reward model. Because the
world's gold score is known, the end shows what no real run can: whether the gain in learned reward
is real. The runs are the recipes themselves, each with its command printed.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minirlhf.errors import OK, UserError, run
from minirlhf.files import atomic
from minirlhf.recipes import dpo, grpo, ppo, reward, sft
from minirlhf.run import flags
from minirlhf.tools import sample
from minirlhf.tools.demo import film_data, film_judge, outcome
from minirlhf.tools.settings import DemoConfig


def command(title: str, main: Callable[[list[str]], int], *argv: object) -> None:
    """Prints a command and runs it."""
    words = [main.__module__.rpartition(".")[2], *map(str, argv)]
    print(f"\n{title}\n$ minirlhf {shlex.join(words)}", flush=True)
    code = main(words[1:])
    if code != OK:
        do = "the demo starts anew in another --out, or once its folder is removed"
        raise UserError(f"minirlhf {words[0]}", "was stopped", do, code)


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


def answer_twice(config: DemoConfig) -> list[dict]:
    """The pairs that a reward model or DPO learns from; returns the held-out ones."""
    command(
        "It answers prompts twice, and a noisy rater compares the two.", sample.main,
        "--model", config.folder / "sft" / "model", "--data", config.data / "prompts-twice.jsonl",
        "--out", config.data / "answers.jsonl", "--max-new-tokens", 48, "--batch-size", 256,
        "--seed", config.seed,
    )
    return film_data.write_preferences(config)


def tell_accuracy(folder: Path, name: str, held_out: list[dict]) -> None:
    accuracy = film_data.read_rows(folder / "metrics.jsonl")[-1][name]
    best = film_judge.best_accuracy(held_out)
    print(f"held-out accuracy {accuracy:.3f}; the rater's noise allows {best:.3f}")


def run_reward(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    held_out = answer_twice(config)
    command(
        "2. A reward model learns which of two reviews a noisy rater preferred.", reward.main,
        "--model", out / "sft" / "model", "--data", data / "pairs.jsonl",
        "--eval-data", data / "pairs-held-out.jsonl", "--out", out / "reward",
        "--steps", steps(160), "--batch-size", 32, "--learning-rate", 1e-3,
        "--warmup-steps", steps(10), "--log-every", steps(32), "--show-samples", 3,
        "--save-every", 1000, "--center-rewards-coefficient", 0.01, "--seed", config.seed,
    )
    tell_accuracy(out / "reward", "eval_accuracy", held_out)


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


def run_grpo(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    command(
        "3. GRPO: write what the reward model likes best of several responses to one prompt.",
        grpo.main, "--model", out / "sft" / "model", "--data", data / "prompts.jsonl",
        "--reward", out / "reward" / "model", "--out", out / "grpo", "--steps", steps(32),
        "--batch-size", 16, "--samples-per-prompt", 4, "--mini-batches", 2,
        "--micro-batch-size", 32, "--epochs", 2, "--max-new-tokens", 48,
        "--learning-rate", 3e-4, "--kl-coef", 0.2, "--missing-eos-penalty", 1,
        "--sample-every", 0, "--save-rollouts",
        "--log-every", steps(4), "--save-every", 1000, "--seed", config.seed,
    )


def run_dpo(config: DemoConfig) -> None:
    out, data, steps = config.folder, config.data, config.scaled
    held_out = answer_twice(config)
    command(
        "2. DPO: make likelier what the rater preferred, without a reward model.", dpo.main,
        "--model", out / "sft" / "model", "--data", data / "pairs.jsonl",
        "--eval-data", data / "pairs-held-out.jsonl", "--out", out / "dpo", "--steps", steps(120),
        "--batch-size", 32, "--learning-rate", 3e-4, "--log-every", steps(15), "--show-samples", 3,
        "--save-every", 1000, "--seed", config.seed,
    )
    tell_accuracy(out / "dpo", "eval_rewards/accuracies", held_out)


RUNS = {"ppo": (run_reward, run_ppo), "grpo": (run_reward, run_grpo), "dpo": (run_dpo,)}


def answer_held_out(config: DemoConfig) -> None:
    for name, recipe in (("before", "sft"), ("after", config.algorithm)):
        command(
            f"Held-out prompts, {name}:", sample.main, "--model", config.folder / recipe / "model",
            "--data", config.data / "prompts-held-out.jsonl",
            "--out", config.folder / f"{name}.jsonl", "--max-new-tokens", 48,
            "--seed", config.seed,
        )


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(DemoConfig, argv, "minirlhf demo")
    algorithm, out, started = config.algorithm, config.folder, time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is there already", "remove it, or give another --out")
    film_data.write_world(config)
    run_sft(config)
    for part in RUNS[algorithm]:
        part(config)
    curves = outcome.curves_of(out / algorithm)
    outcome.show_curves(curves)
    atomic.write_text(out / "curve.svg", outcome.picture(algorithm, curves))
    answer_held_out(config)
    outcome.compare(out / "before.jsonl", out / "after.jsonl")
    print(f"\nThis took {time.perf_counter() - started:.0f} s. To look further:")
    run = out / algorithm
    print(f"  minirlhf chat {run} --heat {'kl' if algorithm == 'dpo' else 'reward'}")
    print(f"  minirlhf explain {algorithm} {run}")
    if (out / "reward").exists():
        print(f"  minirlhf score --model {out}/reward/model --data {out}/after.jsonl")
    print(f"  {run}/report.html, in a browser: the run on one page, token by token")
    shown = "rewards and accuracy" if algorithm == "dpo" else "rewards and KL"
    print(f"  {out}/curve.svg, in a browser: {shown} over the steps")
    print(f"  minirlhf {algorithm} --help")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
