#!/usr/bin/env python3
"""Planned against measured memory: each recipe for two optimizer steps, each in a fresh process.

    python benchmarks/memory_plan.py --model real/SmolLM2-135M-Instruct --data real \
        --reward runs/reward/model --out benchmarks/results/memory_plan.json

Measured is the largest anonymous memory of the process (RssAnon, looked at every 10 ms) and the
pages of its libraries. VmHWM, the kernel's own record, is in the json too: it also holds the mapped
pages of safetensors files, which the system takes back when it needs them, so the plan leaves them
out. Each file of data is cut to as many rows as two steps read, so that the longest is among them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from minirlhf.setup.memory import gb
from minirlhf.tools.plan import RECIPES, without_files

PPO = "--steps 1 --epochs 1 --mini-batches 2 --sample-every 0 --reward {reward}"
# name -> (recipe, file, its rows, flags); one step of PPO with two mini-batches is two updates
RUNS = {
    "ppo": ("ppo", "prompts", 64, f"{PPO} --batch-size 64 --max-new-tokens 28"),
    "ppo, small": ("ppo", "prompts", 16, f"{PPO} --batch-size 16 --max-new-tokens 28"),
    "ppo, lora": (
        "ppo", "prompts", 16,
        f"{PPO} --batch-size 16 --max-new-tokens 28 --lora-rank 16",
    ),
    "ppo, lora, wide": (
        "ppo", "prompts", 32,
        f"{PPO} --batch-size 32 --max-new-tokens 28 --lora-rank 16 --micro-batch-size 16",
    ),
    "ppo, long": (
        "ppo", "prompts", 8,
        f"{PPO} --batch-size 8 --max-new-tokens 160 --micro-batch-size 4",
    ),
    "ppo, longer": (
        "ppo", "prompts", 4,
        f"{PPO} --batch-size 4 --max-new-tokens 320 --micro-batch-size 2",
    ),
    "reward": ("reward", "pairs_train", 16, "--steps 2 --batch-size 8"),
    "reward, wide": ("reward", "pairs_train", 32, "--steps 2 --batch-size 16"),
    "ppo, offloaded": (
        "ppo", "prompts", 16,
        f"{PPO} --batch-size 16 --max-new-tokens 28 --offload-frozen",
    ),
    "ppo, checkpointing": (
        "ppo", "prompts", 8,
        f"{PPO} --batch-size 8 --max-new-tokens 160 --micro-batch-size 4 --gradient-checkpointing",
    ),
    "reward, checkpointing": (
        "reward", "pairs_train", 32, "--steps 2 --batch-size 16 --gradient-checkpointing",
    ),
    "sft, checkpointing": (
        "sft", "sentences", 64, "--steps 2 --batch-size 32 --gradient-checkpointing",
    ),
    "sft": ("sft", "sentences", 16, "--steps 2 --batch-size 8"),
    "sft, wide": ("sft", "sentences", 64, "--steps 2 --batch-size 32"),
}


def status(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status; nothing once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def measure(words: list[str]) -> dict[str, int]:
    """Runs the command line; its largest RssAnon and VmHWM, and the last RssFile."""
    process = subprocess.Popen([sys.executable, "-m", "minirlhf", *words], stdout=subprocess.PIPE)
    seen = {"RssAnon": 0, "VmHWM": 0, "RssFile": 0}
    while process.poll() is None:
        if now := status(process.pid):
            seen |= {name: max(seen[name], now.get(name, 0)) for name in ("RssAnon", "VmHWM")}
            seen["RssFile"] = now.get("RssFile", 0) or seen["RssFile"]
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} left with {process.returncode}")
    return seen


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "reward", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="some of them")
    args = flags.parse_args()
    torch.use_deterministic_algorithms(True)  # as a run does: it imports 70 MB
    out = Path(args.out)
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    print(f"{'run':<22} {'planned':>8} {'measured':>8} {'ratio':>6}  peak")
    for name in args.only:
        recipe, kind, rows, words = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            source, data = Path(args.data) / f"movie_{kind}.jsonl", Path(folder) / "data.jsonl"
            with source.open(encoding="utf-8") as lines:
                data.write_text("".join(islice(lines, rows)), encoding="utf-8")
            line = words.format(reward=args.reward).split()
            line += ["--model", args.model, "--data", str(data)]
            config_class, plan_of = RECIPES[recipe]
            config = flags.parse(without_files(config_class), line, recipe)
            plan = plan_of(config, torch.float32, "cpu")
            seen = measure([recipe, *line, "--out", f"{folder}/run"])
        planned, measured = plan.total(plan.peak), seen["RssAnon"] + seen["RssFile"]
        results[name] = {
            "flags": words, "rows": rows, "planned": planned, "measured": measured,
            "ratio": round(planned / measured, 4), "peak": plan.peak, **seen,
        }
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        ratio = planned / measured
        print(f"{name:<22} {gb(planned):>8} {gb(measured):>8} {ratio:>6.3f}  {plan.peak}")


if __name__ == "__main__":
    main()
