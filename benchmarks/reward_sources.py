#!/usr/bin/env python3
"""The same short PPO run with each kind of reward source: a folder, a function, a service.

    python benchmarks/reward_sources.py --model MODEL --reward RUN/model --prompts FILE \
        --folder SCRATCH --out benchmarks/results/reward_sources.json

All three score with the same reward model, so the runs must agree: the function loads the folder by
itself, the service is `minirlhf serve`. Prints one table and writes one json: mean score and KL of
each step, seconds of scoring, and the largest difference to the run with the folder.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

FUNCTION = """
import torch
from minirlhf import load_reward_model, load_tokenizer
from minirlhf.models.alignment import pad_right

model, tokenizer = load_reward_model({folder!r}, torch.float32), load_tokenizer({folder!r})


def score(prompts, completions, finish_reasons):
    ends = [[] if reason == "length" else [tokenizer.eos_ids[0]] for reason in finish_reasons]
    rows = [tokenizer.encode(p) + tokenizer.encode(c, bos=False) + end
            for p, c, end in zip(prompts, completions, ends, strict=True)]
    with torch.no_grad():
        return model(pad_right(rows), torch.tensor([len(row) for row in rows])).tolist()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, seconds: float = 120) -> None:
    for _ in range(int(seconds * 5)):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"nothing answers on port {port}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "reward", "prompts", "folder", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--steps", type=int, default=2)
    flags.add_argument("--batch-size", type=int, default=16)
    args = flags.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.py").write_text(FUNCTION.format(folder=args.reward), encoding="utf-8")
    port = free_port()
    minirlhf = [sys.executable, "-m", "minirlhf"]
    serving = subprocess.Popen([*minirlhf, "serve", "--model", args.reward, "--port", str(port)])
    try:
        wait_for(port)
        sources = {
            "folder": args.reward,
            "function": f"{folder / 'source.py'}:score",
            "service": f"http://127.0.0.1:{port}/score",
        }
        runs = {}
        for name, source in sources.items():
            command = [
                *minirlhf, "ppo", "--model", args.model, "--data", args.prompts, "--reward", source,
                "--out", str(folder / name), "--steps", str(args.steps),
                "--batch-size", str(args.batch_size), "--max-new-tokens", "28",
                "--stop", ".", "!", "?", "--learning-rate", "6e-5", "--epochs", "1",
                "--mini-batches", "2", "--sample-every", "0", "--save-every", "1000",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
            runs[name] = [json.loads(line) for line in lines]
    finally:
        serving.terminate()
        serving.wait()
    table = []
    for name, rows in runs.items():
        for row, first in zip(rows, runs["folder"], strict=True):
            table.append({
                "source": name, "step": row["step"], "scores": row["objective/scores"],
                "kl": row["objective/kl"], "seconds": row["clock"]["time/score"],
                "gap": abs(row["objective/scores"] - first["objective/scores"]),
            })
    print(f"{'source':<10}{'step':>5}{'scores':>12}{'kl':>12}{'gap':>10}{'seconds':>9}")
    for row in table:
        print(f"{row['source']:<10}{row['step']:>5}{row['scores']:>12.6f}{row['kl']:>12.6f}"
              f"{row['gap']:>10.1e}{row['seconds']:>9.2f}")
    settings = {"steps": args.steps, "batch_size": args.batch_size}
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump({"settings": settings, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()
