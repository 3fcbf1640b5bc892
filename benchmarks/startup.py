#!/usr/bin/env python3
"""How long one waits: for help, for a refusal, and from the command to the first training step.

    OMP_NUM_THREADS=1 python benchmarks/startup.py --folder SCRATCH \
        --out benchmarks/results/startup.json

Each command is started anew, from files that the system has read before; times are medians, in
seconds since the process was asked for, with the CPU time beside, which a busy machine changes
less. Of a run the parts are told too: `torch` is Python and the import of torch, `modules` that of
the verb, `optimizer` what the first optimizer of a process makes torch import (its compiler,
torch._dynamo), `set-up` all else that a run reads, checks, loads and writes before its loop, `step`
the first training step. The demo first writes the files it learns from; the recipes train a model
of that size, on as many rows. `python, torch, AdamW` is what no training in PyTorch can start
without.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TARGETS = {"minirlhf --help": 0.3, "minirlhf ppo --help": 0.5, "demo": 5.0}  # seconds
PARTS = ("torch", "modules", "optimizer", "set-up", "step")
FLOOR = "import torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"


def child(verb: str, argv: list[str]) -> None:
    """Runs a verb up to its first training step; prints when each part ended, and leaves."""
    import torch

    ends = {"torch": time.time()}
    from minirlhf.cli import VERBS
    from minirlhf.run.folder import Run

    main = importlib.import_module(VERBS[verb].module).main
    ends["modules"] = time.time()
    importing, use = 0.0, torch.use_deterministic_algorithms

    def timed(mode: bool) -> None:
        """A recipe's first call into the compiler, whose import the optimizer would wait for."""
        nonlocal importing
        started = time.time()
        use(mode)
        importing += time.time() - started

    def bar(run: Run, steps, state, total: int) -> None:
        """Instead of `Run.bar`: the first step, and out."""
        ends["optimizer"], ends["set-up"] = ends["modules"] + importing, time.time()
        next(iter(steps))
        ends["step"] = time.time()
        print("\n" + json.dumps(ends), flush=True)
        os._exit(0)

    torch.use_deterministic_algorithms, Run.bar = timed, bar
    sys.exit(main(argv) or "left without a training step")


class Done(NamedTuple):
    stdout: str
    started: float  # seconds since the epoch
    seconds: dict[str, float]  # `all` of the clock, `cpu` of the processor


def finish(words: list[str], code: int = 0) -> Done:
    """Runs a command to its end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(words, capture_output=True, text=True)
    seconds, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(words)} left with {done.returncode}: {done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.stdout, started, {"all": seconds, "cpu": cpu})


def parts_of_start(verb: str, argv: list[str]) -> dict[str, float]:
    """Seconds of each part of a run's start, and of all of it."""
    done = finish([sys.executable, __file__, "--child", verb, *argv])
    ends = json.loads(done.stdout.splitlines()[-1])
    found, last = {}, done.started
    for part in PARTS:
        found[part], last = ends[part] - last, ends[part]
    return found | {"all": last - done.started, "cpu": done.seconds["cpu"]}


def prepare(folder: Path, rows: int) -> dict[str, list[str]]:
    """The demo's files and two models of two steps; verb -> its flags, without --out."""
    from minirlhf.tools.demo import film_data, film_judge
    from minirlhf.tools.settings import DemoConfig

    data = folder / "data"
    if not data.exists():
        film_data.write_world(DemoConfig(out=str(folder)))
        film_data.write_rows(data / "pairs.jsonl", film_judge.preferences(rows, 0))
    minirlhf, steps = [sys.executable, "-m", "minirlhf"], ["--steps", "2"]
    sft = ["--init-config", f"{data}/tiny-model.json", "--vocab-size", "1024",
           "--data", f"{data}/reviews.jsonl", "--batch-size", "48"]
    if not (folder / "sft/model").exists():
        finish([*minirlhf, "sft", *sft, *steps, "--out", f"{folder}/sft"])
    model = ["--model", f"{folder}/sft/model"]
    reward = [*model, "--data", f"{data}/pairs.jsonl", "--batch-size", "32"]
    if not (folder / "reward/model").exists():
        finish([*minirlhf, "reward", *reward, *steps, "--out", f"{folder}/reward"])
    ppo = [*model, "--data", f"{data}/prompts.jsonl", "--reward", f"{folder}/reward/model",
           "--batch-size", "64", "--max-new-tokens", "48", "--sample-every", "0"]
    return {"demo": [], "sft": sft, "reward": reward, "ppo": ppo}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--folder", required=True, help="for data, models and runs")
    flags.add_argument("--out", required=True)
    flags.add_argument("--repeats", type=int, default=5)
    args = flags.parse_args()
    folder = Path(args.folder)
    commands = prepare(folder, rows=4400)
    python = [sys.executable, "-m", "minirlhf"]
    refused = ["ppo", "--out", f"{folder}/refused", *commands["ppo"]]
    refused[refused.index("--data") + 1] = f"{folder}/no-such-file.jsonl"
    sampling = ["sample", "--model", f"{folder}/sft/model", "--prompt", "The"]
    waits = {
        "minirlhf --help": ([*python, "--help"], 0),
        "minirlhf ppo --help": ([*python, "ppo", "--help"], 0),
        "ppo, refused": ([*python, *refused], 2),
        "sample": ([*python, *sampling], 0),
        "python, torch": ([sys.executable, "-c", "import torch"], 0),
        "python, torch, AdamW": ([sys.executable, "-c", FLOOR], 0),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in (*waits, *commands)}
    for _ in range(args.repeats + 1):
        for name, (words, code) in waits.items():
            times[name].append(finish(words, code).seconds)
        for verb, argv in commands.items():
            out = f"{folder}/runs/{verb}-{time.time_ns()}"
            times[verb].append(parts_of_start(verb, [*argv, "--out", out]))
    table = {}
    for name, (_, *found) in times.items():  # before the first, not all was in the page cache
        medians = {part: statistics.median(f[part] for f in found) for part in found[0]}
        alls = [f["all"] for f in found]
        table[name] = {
            "median": medians, "lowest": min(alls), "highest": max(alls),
            "target": TARGETS.get(name),
        }
    print(f"{'':<22}{'seconds':>9}{'lowest':>9}{'highest':>9}{'cpu':>9}"
          + "".join(f"{part:>11}" for part in PARTS))
    for name, row in table.items():
        parts = "".join(f"{row['median'][p]:>11.2f}" for p in PARTS if p in row["median"])
        print(f"{name:<22}{row['median']['all']:>9.2f}{row['lowest']:>9.2f}{row['highest']:>9.2f}"
              f"{row['median']['cpu']:>9.2f}" + parts
              + (f"   target {row['target']}" if row["target"] else ""))
    settings = {"repeats": args.repeats, "threads": os.environ.get("OMP_NUM_THREADS")}
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump({"settings": settings, "rows": table}, file, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    main()
