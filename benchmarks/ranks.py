#!/usr/bin/env python3
"""Steps of a reward model, DPO and PPO by one process and by several, on the same rows.

    python benchmarks/ranks.py --model real/SmolLM2-135M-Instruct --data real \
        --reward runs/reward/model --out benchmarks/results/ranks.json

Each line of the table is the recipe's own command: alone with one thread and with as many as there
are cores, and under torchrun with one thread a process, as replicas (ddp) and in shards (fsdp). The
rows of a step are the same in all of them, and so are its numbers. A step of the reward model or of
DPO reads 16 pairs, one of PPO samples 16 responses of 28 tokens and makes 4 updates on them. All
commands run in turns, `--rounds` times; the first step of each is not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import hardware
from side_by_side import flags_of, read_flags, several, write

RECIPES = {
    "reward": ["reward", "--data", "movie_pairs_train.jsonl"],
    "dpo": ["dpo", "--data", "movie_pairs_train.jsonl", "--no-cache-ref"],
    "ppo": ["ppo", "--data", "movie_prompts.jsonl", "--max-new-tokens", "28", "--epochs", "1",
            "--mini-batches", "4", "--micro-batch-size", "4"],
}
SHARED = ["--batch-size", "16", "--log-every", "1", "--save-every", "none", "--quiet"]
CLOCK = {"reward": "step_time", "dpo": "step_time", "ppo": "time/step"}


def programs(ranks: int) -> dict[str, tuple[int, int, list[str]]]:
    """name -> (processes, threads of each, flags)."""
    return {
        "1 process, 1 thread": (1, 1, []),
        f"1 process, {ranks} threads": (1, ranks, []),
        f"{ranks} processes, ddp": (ranks, 1, ["--parallel", "ddp"]),
        f"{ranks} processes, fsdp": (ranks, 1, ["--parallel", "fsdp"]),
    }


def measure(args, recipe: str, program: tuple[int, int, list[str]]) -> list[tuple[float, float]]:
    """(seconds, tokens) of each counted step of one command, as its log says."""
    count, threads, flags = program
    words = [str(Path(args.data) / w) if w.endswith(".jsonl") else w for w in RECIPES[recipe]]
    words += ["--reward", args.reward] if recipe == "ppo" else []
    start = [sys.executable, "-m"]
    if count > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(
            [*start, "minirlhf", *words, "--model", args.model, "--steps", str(args.steps),
             "--out", str(out), *SHARED, *flags],
            check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clocks = [json.loads(line)["clock"] for line in lines]
    steps = [(c[CLOCK[recipe]], c["tok_per_s"]) for c in clocks if CLOCK[recipe] in c]
    return [(seconds, seconds * rate) for seconds, rate in steps[1:]]


def main() -> None:
    flags = flags_of(__doc__)
    flags.add_argument("--reward", required=True, help="a reward model's folder, for PPO")
    flags.add_argument("--steps", type=several, default=3)
    flags.add_argument("--ranks", type=several, default=2)
    flags.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = read_flags(flags)
    machine, rows, chosen = hardware.describe(), [], programs(args.ranks)
    for recipe in args.recipes:
        found: dict[str, list] = {name: [] for name in chosen}
        for number in range(args.rounds):
            for name in list(chosen) if number % 2 == 0 else reversed(chosen):
                print(f"{recipe}, round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
                found[name] += measure(args, recipe, chosen[name])
                print(found[name], file=sys.stderr)  # so that a later failure loses nothing
        rates = {n: sum(t for _, t in s) / sum(s for s, _ in s) for n, s in found.items()}
        first = next(iter(rates.values()))
        rows += [{"recipe": recipe, "program": name, "tokens_per_s": rate, "ratio": rate / first,
                  "seconds": statistics.median([s for s, _ in found[name]]),
                  "steps": len(found[name])} for name, rate in rates.items()]
    print(hardware.show(machine))
    print(f"{'':<8}{'':<26}{'tokens/s':>10}{'ratio':>8}{'median s':>10}")
    for row in rows:
        print(f"{row['recipe']:<8}{row['program']:<26}{row['tokens_per_s']:>10.1f}"
              f"{row['ratio']:>8.2f}{row['seconds']:>10.2f}")
    if args.out:
        settings = {"rounds": args.rounds, "steps": args.steps, "ranks": args.ranks}
        write(args.out, machine, settings, rows)


if __name__ == "__main__":
    main()
