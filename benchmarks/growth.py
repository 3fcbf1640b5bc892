#!/usr/bin/env python3
"""How time and memory grow with the response length, the batch, the vocabulary and the layers.

    python benchmarks/growth.py --threads 1 --out benchmarks/results/growth.json
    python benchmarks/growth.py --plot benchmarks/results --out benchmarks/results/growth.json

The second line draws one SVG an axis from that json (`pip install -e '.[plot]'`).

Operations on a small random model: one PPO update (`ppo_step`, one epoch, one optimizer step) on a
rollout, one step of a reward model on pairs, and `generate` with rows that all go on to the full
length, or that end one after another, at random, half-way on average. One quantity grows, the
others stay at their base. Each point is a process of its own. Memory is the kernel's record of the
largest resident size (VmHWM), which is reset before the operation, less the size at that moment:
model, moments and libraries are not in it, gradients are. Time is the CPU time of the process, the
least of several calls: what other processes take of the machine is not in it.

The exponent p of `cost ~ n^p` is the slope between neighbours in the log-log plot, and the fitted
one of the upper half of an axis; up to LINEAR growth counts as linear. Attention is known not to
be: a token attends to all before it. So each operation is timed again with every attention
replaced by a sum of its arguments: what grows faster than linear there has no such excuse.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

AXES = {
    "length": (64, 128, 256, 512, 1024, 2048),  # response tokens
    "batch": (1, 4, 16, 64, 256),  # rows, or pairs
    "vocabulary": (1_000, 5_000, 20_000, 50_000, 150_000),
    "layers": (1, 2, 4, 8, 16),
}
BASE = {"length": 128, "batch": 8, "vocabulary": 1_000, "layers": 2}
PROMPT = 16  # tokens
LINEAR = 1.1
OPERATIONS = ("ppo update", "reward step", "generation", "generation, rows end")


# --------------------------------------------------------------------------- one point, in a child


Act = Callable[[], object]
Make = Callable[[int, int], Act]  # rows, response tokens -> what is measured


def ready(operation: str, shape: dict[str, int]) -> tuple[Act, Act]:
    """The operation in its size, and in a small one, for what every size imports and allocates."""
    import torch

    from minirlhf import CausalLM
    from minirlhf.models.families import config_from_hf
    from minirlhf.models.transformer import initialize

    config = config_from_hf({
        "model_type": "llama", "vocab_size": shape["vocabulary"], "hidden_size": 128,
        "intermediate_size": 384, "num_hidden_layers": shape["layers"], "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    })
    lm = initialize(CausalLM(config), torch.Generator().manual_seed(0))
    if operation == "ppo update":
        make = ppo_update(lm)
    elif operation == "reward step":
        make = reward_step(lm)
    else:
        make = generation(lm, rows_end=operation.endswith("end"))
    return make(shape["batch"], shape["length"]), make(1, 16)


def tokens_of(lm, rows: int, length: int):
    """(rows, PROMPT + length) random ids."""
    import torch

    rng = torch.Generator().manual_seed(1)
    return torch.randint(lm.config.vocab_size, (rows, PROMPT + length), generator=rng)


def ppo_update(lm) -> Make:
    """One `ppo_step` on a rollout whose responses are all of one length."""
    import torch

    from minirlhf import PPOConfig, Rollout, RolloutBuffer, ValueHeadModel, ppo_step
    from minirlhf.run.optim import make_optimizer

    policy = ValueHeadModel(lm)
    optimizer = make_optimizer(policy, 1e-6)

    def make(B: int, R: int) -> Act:
        # About what the policy says: the ratios are near 1, as they are in a run.
        logprobs = torch.full((B, R), -math.log(lm.config.vocab_size))
        rollout = Rollout(
            rows=torch.arange(B), tokens=tokens_of(lm, B, R),
            prompt_lengths=torch.full((B,), PROMPT),
            response_mask=torch.ones(B, R, dtype=torch.bool),
            scores=torch.arange(B) / B, truncated=torch.ones(B, dtype=torch.bool),
            old_logprobs=logprobs, ref_logprobs=logprobs,
            old_values=torch.zeros(B, R), last_values=torch.zeros(B),
        )
        config = PPOConfig(
            model="", data="", reward=("none",), out="", batch_size=B, max_new_tokens=R, epochs=1
        )

        def act() -> None:
            buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
            buffer.add(rollout)
            ppo_step(policy, optimizer, buffer, config)

        return act

    return make


def reward_step(lm) -> Make:
    """One step of `reward` on pairs."""
    import torch

    from minirlhf import RewardConfig, RewardModel, TrainState
    from minirlhf.data.examples import Pair
    from minirlhf.models.heads import initialize_score
    from minirlhf.recipes.reward import reward
    from minirlhf.run.optim import make_optimizer

    model = initialize_score(RewardModel(lm), torch.Generator().manual_seed(2))
    optimizer = make_optimizer(model, 1e-6)

    def make(rows: int, length: int) -> Act:
        texts = tokens_of(lm, 2 * rows, length).tolist()
        pairs = [
            Pair(a[:PROMPT], a[PROMPT:], b[PROMPT:], 0.0, f"row {i}", {})
            for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
        ]
        config = RewardConfig(model="", data="", out="", steps=1, batch_size=rows)
        return lambda: next(reward(TrainState(model, optimizer), pairs, config))

    return make


def generation(lm, rows_end: bool) -> Make:
    """`generate`, to the full length or with rows that end on the way."""
    import torch

    from minirlhf import Sampling, generate, streams

    def make(rows: int, length: int) -> Act:
        # The law is nearly uniform: 2 V / length ends of V tokens give length / 2 on average.
        ends = tuple(range(round(2 * lm.config.vocab_size / length))) if rows_end else ()
        prompts = tokens_of(lm, rows, 0).tolist()
        keys = streams.key(0, "growth", torch.arange(rows))
        return lambda: generate(lm, prompts, Sampling(max_new_tokens=length), ends, keys)

    return make


def sum_for_attention(q, k, v, *_: object, **__: object):
    """As cheap as attention cannot be; q alone while decoding, where k and v are the whole past."""
    return q + k + v if q.shape == v.shape else q


def resident(name: str) -> int:
    """Bytes by the names of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(ln.split()[1]) for ln in text.splitlines() if ln.startswith(name)) * 1024


def seconds_of(act: Act, budget: float) -> list[float]:
    """Of calls until the budget is spent; 3 at least, 7 at most."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 7):
        started = time.process_time()
        act()
        times.append(time.process_time() - started)
    return times


def child(operation: str, shape: dict[str, int], threads: int, budget: float) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    act, smallest = ready(operation, shape)
    smallest()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    act()
    peak = resident("VmHWM") - before
    found = {"peak": peak, "seconds": seconds_of(act, budget)}
    torch.nn.functional.scaled_dot_product_attention = sum_for_attention
    found["without"] = seconds_of(act, budget)
    print(json.dumps(found))


# ----------------------------------------------------------------------------------- all the points


def measure(operation: str, shape: dict[str, int], threads: int, budget: float) -> dict:
    words = [json.dumps(shape), str(threads), str(budget)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", operation, *words],
        env=env, capture_output=True, text=True,
    )
    if done.returncode:
        raise SystemExit(f"{operation} {shape} left with {done.returncode}: {done.stderr}")
    found = json.loads(done.stdout)
    times = {name: min(found[name]) for name in ("seconds", "without")}
    return times | {"peak": found["peak"], "calls": len(found["seconds"])}


def slopes(sizes: list[int], costs: list[float]) -> list[float | None]:
    """d log cost / d log size between neighbours; None for the first, and where a cost is 0."""
    return [None] + [
        math.log(b / a) / math.log(n / m) if a > 0 and b > 0 else None
        for (m, a), (n, b) in pairwise(zip(sizes, costs, strict=True))
    ]


def exponent(sizes: list[int], costs: list[float]) -> float | None:
    """Least-squares slope of the log-log plot over the upper half of the sizes, at least two."""
    half = len(sizes) // 2
    points = [(n, c) for n, c in zip(sizes, costs, strict=True) if c > 0][-max(2, half) :]
    if len(points) < 2:
        return None
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def verdict(fitted: dict[str, float | None], costs: dict[str, list[float]]) -> str:
    """Attention is to blame where it takes a tenth of the largest size, and the rest is linear."""

    def linear(name: str) -> bool:
        return fitted[name] is None or fitted[name] <= LINEAR

    blame = linear("without") and costs["without"][-1] < 0.9 * costs["seconds"][-1]
    time_is = "linear" if linear("seconds") else "attention" if blame else "NOT LINEAR"
    return f"time {time_is}, memory {'linear' if linear('peak') else 'NOT LINEAR'}"


def summarise(rows: list[dict]) -> list[dict]:
    """Adds to each axis and operation its slopes, exponents and a verdict."""
    table = []
    for axis in AXES:
        for operation in OPERATIONS:
            points = [r for r in rows if r["axis"] == axis and r["operation"] == operation]
            if not points:
                continue
            sizes = [p["size"] for p in points]
            costs = {name: [p[name] for p in points] for name in ("seconds", "without", "peak")}
            fitted = {name: exponent(sizes, values) for name, values in costs.items()}
            table.append({
                "axis": axis, "operation": operation, "sizes": sizes, **costs,
                "slopes": {name: slopes(sizes, values) for name, values in costs.items()},
                "exponents": fitted, "verdict": verdict(fitted, costs),
            })
    return table


def show(table: list[dict]) -> None:
    def slope(value: float | None) -> str:
        return f"{'':>6}" if value is None else f"{value:>6.2f}"

    for entry in table:
        print(f"\n{entry['axis']}: {entry['operation']}")
        print(f"{'size':>9}{'seconds':>10}{'slope':>6}{'no attention':>14}{'slope':>6}"
              f"{'MB':>9}{'slope':>6}")
        for i, size in enumerate(entry["sizes"]):
            of = entry["slopes"]
            print(f"{size:>9,}{entry['seconds'][i]:>10.4f}{slope(of['seconds'][i])}"
                  f"{entry['without'][i]:>14.4f}{slope(of['without'][i])}"
                  f"{entry['peak'][i] / 1e6:>9.1f}{slope(of['peak'][i])}")
        fitted = entry["exponents"]
        print(f"{'upper half':>19}{slope(fitted['seconds'])}{slope(fitted['without']):>20}"
              f"{slope(fitted['peak']):>15}   {entry['verdict']}")


def draw(table: list[dict], folder: Path) -> None:
    """growth_AXIS.svg: seconds and MB, log-log, a line an operation, dotted without attention."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same numbers give the same file
    folder.mkdir(parents=True, exist_ok=True)
    for axis in dict.fromkeys(entry["axis"] for entry in table):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2))
        for number, entry in enumerate(e for e in table if e["axis"] == axis):
            sizes, colour = entry["sizes"], f"C{number}"
            left.loglog(sizes, entry["seconds"], colour, marker=".", label=entry["operation"])
            left.loglog(sizes, entry["without"], colour, linestyle=":", linewidth=0.9)
            right.loglog(sizes, [max(p, 1) / 1e6 for p in entry["peak"]], colour, marker=".")
        left.set_title("seconds (dotted: without attention)", fontsize=9)
        right.set_title("MB above the model", fontsize=9)
        left.legend(fontsize=7)
        for panel in (left, right):
            panel.set_xlabel(axis)
            panel.grid(alpha=0.3)
        figure.tight_layout()
        target = folder / f"growth_{axis}.svg"
        figure.savefig(target, metadata={"Date": None})
        pyplot.close(figure)
        print(f"written to {target}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", required=True, help="the json; with --plot it is read")
    flags.add_argument("--plot", metavar="FOLDER", help="only draw what was measured")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    flags.add_argument("--operations", nargs="*", choices=OPERATIONS, default=list(OPERATIONS))
    flags.add_argument("--largest", type=float, default=math.inf, help="leave out larger sizes")
    flags.add_argument("--budget", type=float, default=2.0, help="seconds at a point, twice")
    args = flags.parse_args()
    out = Path(args.out)
    if args.plot:
        draw(json.loads(out.read_text(encoding="utf-8"))["table"], Path(args.plot))
        return
    rows: list[dict] = []
    settings = {"threads": args.threads, "base": BASE, "prompt": PROMPT, "linear": LINEAR}
    for axis in args.axes:
        for operation in args.operations:
            for size in (n for n in AXES[axis] if n <= args.largest):
                found = measure(operation, BASE | {axis: size}, args.threads, args.budget)
                rows.append({"axis": axis, "operation": operation, "size": size, **found})
                text = json.dumps({"settings": settings, "table": summarise(rows)}, indent=1)
                out.write_text(text + "\n", encoding="utf-8")
    show(summarise(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        operation, shape, threads, budget = sys.argv[2:]
        child(operation, json.loads(shape), int(threads), float(budget))
    else:
        main()
