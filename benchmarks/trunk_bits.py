#!/usr/bin/env python3
"""PPO with adapters on a trunk of 32, 8 and 4 bits: memory, time, and what rounding costs.

    OMP_NUM_THREADS=1 python benchmarks/trunk_bits.py --model real/SmolLM2-135M-Instruct \
        --data real --out benchmarks/results/trunk_bits.json

Steps of the command line, `--lora-rank 16` with 16 prompts of film sentences, 64 tokens sampled
after each, 2 epochs of 2 mini-batches, a reward that counts words; policy, reference and critic lie
on one trunk. Each run is a process of its own; its first step is not counted. Peaks are VmHWM less
that of a process that imports the same and does nothing. CPU seconds are those of the whole run.
`nats` is how far the packed model's next-token distributions are from the full one's, and the mean
loss of both on film sentences.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import hardware

FLAGS = "--batch-size 16 --micro-batch-size 8 --max-new-tokens 64 --min-new-tokens 64 --epochs 2 " \
    "--mini-batches 2 --sample-every 0 --lora-rank 16 --learning-rate 1e-4 --log-every 1"
IDLE = "import minirlhf.recipes.ppo; print(open('/proc/self/status').read())"
REWARD = "def words(completions):\n    return [len(text.split()) / 10 for text in completions]\n"


def run(words: list[str]) -> tuple[int, float]:
    """(peak bytes, CPU seconds) of a command."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} left with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def ppo(args: argparse.Namespace, bits: int, folder: Path) -> dict:
    with open(f"{args.data}/movie_prompts.jsonl", encoding="utf-8") as lines:
        (folder / "prompts.jsonl").write_text("".join(islice(lines, 16 * args.steps)), "utf-8")
    (folder / "reward.py").write_text(REWARD, "utf-8")
    out = folder / f"bits-{bits}"
    peak, cpu = run([
        "-m", "minirlhf", "ppo", "--model", args.model, "--data", str(folder / "prompts.jsonl"),
        "--reward", f"{folder / 'reward.py'}:words", "--out", str(out), "--trunk-bits", str(bits),
        "--steps", str(args.steps), *FLAGS.split(),
    ])
    lines = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
    clocks = [line["clock"] for line in lines if "time/step" in line["clock"]][1:]
    phases = [key for key in clocks[0] if key.startswith("time/")]
    return {"peak_bytes": peak, "cpu_seconds": cpu} | {
        key.removeprefix("time/"): statistics.median(clock[key] for clock in clocks)
        for key in phases
    }


def distance(args: argparse.Namespace, bits: int) -> dict:
    """What packing costs in nats a token, on 64 film sentences; bits 0: of the copy in int8 that
    `--rollout-bits 8` samples from."""
    import torch

    from minirlhf import load_pretrained, load_tokenizer
    from minirlhf.models.int8 import Int8LM
    from minirlhf.models.quantized import quantized_layers

    full = load_pretrained(args.model, torch.float32)
    packed = load_pretrained(args.model, torch.float32, trunk_bits=bits) if bits else Int8LM(full)
    tokenizer, kl, losses = load_tokenizer(args.model), [], []
    with open(f"{args.data}/movie_sentences.jsonl", encoding="utf-8") as file, torch.no_grad():
        for line in islice(file, 64):
            ids = torch.tensor([tokenizer.encode(json.loads(line)["text"])])
            p, q = (lm.logits(lm(ids)).log_softmax(-1)[0, :-1] for lm in (full, packed))
            kl.append((p.exp() * (p - q)).sum(-1))
            chosen = ids[0, 1:, None]
            losses.append(torch.cat((-p.gather(-1, chosen), -q.gather(-1, chosen)), 1))
    before, after = torch.cat(losses).mean(0).tolist()
    found = {"kl": torch.cat(kl).mean().item(), "loss_full": before, "loss": after}
    if not bits:
        return {f"int8_copy_{name}": value for name, value in found.items()}
    layers = quantized_layers(packed).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    return found | {"bytes_a_weight": held / weights}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--steps", type=int, default=3)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        idle, _ = run(["-c", IDLE])
        rows = [{"bits": bits or 32, **ppo(args, bits, Path(folder)), **distance(args, bits)}
                for bits in (0, 8, 4)]
    for row in rows:
        row["peak_bytes"] -= idle
        print(json.dumps(row))
    settings = {"flags": FLAGS, "steps": args.steps, "idle_bytes": idle}
    record = {"machine": hardware.describe(), "settings": settings, "rows": rows}
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
