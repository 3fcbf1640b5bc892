#!/usr/bin/env python3
"""Peak memory of dry runs and estimates beside that of the runs that they stand for.

    python benchmarks/dry_run.py --model real/SmolLM2-135M-Instruct --data real \
        --reward runs/reward/model --out benchmarks/results/dry_run.json

Each recipe runs twice on the first rows of its file, each time in a fresh process: as it is, and
with --dry-run. Peaks are the largest resident sizes as the kernel records them (VmHWM); the
estimate is the fact "memory" that the run prints before it loads its models.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

PPO = "--steps 3 --batch-size 8 --micro-batch-size 4 --max-new-tokens 28 --epochs 1 " \
    "--mini-batches 2 --sample-every 0 --reward {reward}"
# name -> (recipe, file, its rows, flags)
RUNS = {
    "ppo": ("ppo", "prompts", 24, PPO),
    "ppo, lora": ("ppo", "prompts", 24, f"{PPO} --lora-rank 16"),
    "ppo, offloaded": ("ppo", "prompts", 24, f"{PPO} --offload-frozen"),
    "ppo, stops": ("ppo", "prompts", 24, f"{PPO} --stop . ! ?"),
    "reward": ("reward", "pairs_train", 64, "--batch-size 8"),
    "reward, lora": ("reward", "pairs_train", 64, "--batch-size 8 --lora-rank 16"),
    "sft": ("sft", "sentences", 128, "--batch-size 16"),
    "sft, lora": ("sft", "sentences", 128, "--batch-size 16 --lora-rank 16"),
    "sft, checkpointing": ("sft", "sentences", 128, "--batch-size 32 --gradient-checkpointing"),
}


def measure(words: list[str]) -> tuple[float, float, str]:
    """(peak GB, seconds, what is printed) of a command line."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, "-m", "minirlhf", *words], stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        printed.seek(0)
        text = printed.read()
    if status:
        raise SystemExit(f"{' '.join(words)} left with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024 / 1e9, seconds, text


def compare(recipe: str, source: Path, rows: int, words: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with source.open(encoding="utf-8") as lines:
            data.write_text("".join(islice(lines, rows)), encoding="utf-8")
        words = [recipe, *words, "--data", str(data), "--out", f"{folder}/run"]
        dry, dry_seconds, text = measure([*words, "--dry-run"])
        left = sorted(path.name for path in Path(folder).iterdir())
        if left != ["data.jsonl"]:
            raise SystemExit(f"a dry run left {', '.join(left)}")
        run, seconds, _ = measure(words)
    estimate = float(re.search(r"memory +about ([0-9.]+) GB", text)[1])
    told = float(re.search(r"peak memory +([0-9.]+) GB", text)[1])
    return {
        "run": round(run, 3), "dry_run": round(dry, 3), "told": told, "estimate": estimate,
        "dry_run_to_run": round(dry / run, 4), "estimate_to_run": round(estimate / run, 4),
        "seconds": round(seconds, 1), "dry_run_seconds": round(dry_seconds, 1),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "reward", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="some of them")
    args = flags.parse_args()
    out = Path(args.out)
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    print("| run | its peak, GB | dry run | ratio | estimate | ratio |\n|---|---|---|---|---|---|")
    for name in args.only:
        recipe, kind, rows, words = RUNS[name]
        line = [word.format(reward=args.reward) for word in words.split()]
        found = compare(recipe, Path(args.data) / f"movie_{kind}.jsonl", rows,
                        [*line, "--model", args.model])
        results[name] = {"recipe": recipe, "flags": words, "rows": rows} | found
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"| {name} | {found['run']:.2f} | {found['dry_run']:.2f} | "
              f"{found['dry_run_to_run']:.3f} | {found['estimate']:.1f} | "
              f"{found['estimate_to_run']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
