#!/usr/bin/env python3
"""PPO, GRPO and RLOO on one reward at equal numbers of samples: `pip install -e '.[plot]'`, then

    python benchmarks/algorithms.py demo --model minirlhf-demo/sft/model \
        --reward minirlhf-demo/reward/model --data minirlhf-demo/data/prompts.jsonl \
        --eval-data minirlhf-demo/data/prompts-held-out.jsonl --seeds 3 --folder runs/demo \
        --out benchmarks/results/algorithms

Each run samples 64 responses a step. At times it answers the same held-out prompts with the same
random keys; their mean score and KL go to OUT/demo.json. What is in --folder already is not run
again. Every json in OUT is drawn into OUT/curves.svg: score against samples, score against KL.
With `--adapters` PPO is compared with itself: all weights, LoRA, LoRA on a trunk of 4 bits.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

SAMPLES = 64  # responses a step
GROUP = "--batch-size 16 --samples-per-prompt 4"
PPO = f"ppo --batch-size {SAMPLES} --value-clip none --kl-coef 0.3"
ALGORITHMS = {  # how each has them by default or in the demo: the KL in the reward or the loss
    "PPO": PPO,
    "GRPO": f"grpo {GROUP} --kl-coef 0.2",
    "RLOO": f"grpo {GROUP} --advantage rloo --kl-in reward --kl-estimator k1 --kl-coef 0.3",
}
ADAPTERS = {"PPO": PPO, "PPO, LoRA": f"{PPO} --lora-rank 16",
            "PPO, LoRA on NF4": f"{PPO} --lora-rank 16 --trunk-bits 4"}
TENFOLD = 10  # the learning rate of adapters (Schulman et al. 2025, "LoRA Without Regret")
WORLDS = {  # settings of all runs, PPO's own, the learning rate of all weights
    "demo": ("--steps 32 --mini-batches 2 --epochs 2 --micro-batch-size 32 --max-new-tokens 48 "
             "--missing-eos-penalty 1 --eval-every 4", "--critic-learning-rate 9e-4", 3e-4),
    "real": ("--steps 16 --mini-batches 4 --epochs 1 --max-new-tokens 32 --schedule constant "
             "--warmup-steps 2 --missing-eos-penalty 1 --dtype bfloat16 --eval-every 4 "
             "--eval-prompts 64", "--adam-epsilon 1e-8", 6e-5),
}


def run(args: argparse.Namespace, algorithm: str, seed: int) -> list[dict]:
    """The evaluations of a run: samples so far, mean score, its standard error, KL in nats."""
    folder = Path(args.folder) / f"{algorithm.lower()}-{seed}"
    shared, ppo_only, rate = WORLDS[args.world]
    if not (folder / "model").exists():
        command = (ALGORITHMS | ADAPTERS)[algorithm]
        words = f"{command} {shared} {ppo_only if command.startswith(PPO) else ''}".split()
        words += ["--learning-rate", f"{rate * (TENFOLD if 'LoRA' in algorithm else 1):g}"]
        for name in ("model", "reward", "data", "eval-data"):
            words += [f"--{name}", getattr(args, name.replace("-", "_"))]
        words += ["--out", str(folder), "--seed", str(seed), "--sample-every", "0"]
        print(f"\n$ minirlhf {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "minirlhf", *words], check=True)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [
        {"samples": SAMPLES * line["step"], "score": line["eval/objective/scores"],
         "score_se": line["eval/objective/scores_se"], "kl": line["eval/objective/kl"]}
        for line in lines if "eval/objective/scores" in line
    ]


def draw(out: Path) -> None:
    """A row of two panels for each world; thin lines are seeds, thick ones their mean."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*.json"))}
    figure, rows = pyplot.subplots(len(found), 2, figsize=(9, 3.4 * len(found)), squeeze=False)
    for (world, runs), panels in zip(found.items(), rows, strict=True):
        for color, (algorithm, seeds) in enumerate(runs.items()):
            for panel, axis in zip(panels, ("samples", "kl"), strict=True):
                curves = [[[point[name] for point in points] for name in (axis, "score")]
                          for points in seeds.values()]
                for x, y in curves if len(curves) > 1 else []:
                    panel.plot(x, y, color=f"C{color}", linewidth=0.6, alpha=0.6)
                x, y = ([fmean(values) for values in zip(*lines, strict=True)]
                        for lines in zip(*curves, strict=True))
                panel.plot(x, y, color=f"C{color}", linewidth=2, label=algorithm)
        for panel, axis in zip(panels, ("sampled responses", "KL, nats a response"), strict=True):
            panel.set(xlabel=axis, title=f"{world}: score on held-out prompts")
            panel.grid(alpha=0.3)
        panels[0].legend()
    figure.tight_layout()
    figure.savefig(out / "curves.svg", metadata={"Date": None})


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("world", choices=WORLDS)
    for name in ("model", "reward", "data", "eval-data", "folder", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--adapters", action="store_true", help="PPO of all weights and of adapters")
    flags.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, ...")
    args = flags.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = {a: {seed: run(args, a, seed) for seed in range(args.seeds)}
             for a in (ADAPTERS if args.adapters else ALGORITHMS)}
    text = json.dumps(found, indent=1)
    (out / f"{args.world}.json").write_text(text + "\n", encoding="utf-8")
    draw(out)
    for algorithm, seeds in found.items():
        ends = [points[-1] for points in seeds.values()]
        told = "  ".join(f"{end['score']:.2f} (KL {end['kl']:.2f})" for end in ends)
        print(f"{algorithm:<18}{told}")


if __name__ == "__main__":
    main()
