#!/usr/bin/env python3
"""One optimizer step of a reward model on 16 pairs, beside TRL's RewardTrainer.

    python benchmarks/reward_step.py --model real/SmolLM2-135M-Instruct --data real \
        --trl VENV/bin/python --out benchmarks/results/reward_step.json

Film sentences of about 26 tokens a side, all weights trained. Ours is the recipe's own generator;
both draw their batches from the same file. `peers/README.md` says how to make the peer's
environment; without one it is left out. Each program runs in a process of its own, in turns,
`--rounds` times; the first step of each process is not counted.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import hardware
from side_by_side import spread, take_turns, write

HERE = Path(__file__).parent
ROWS = 16


def ours(args: argparse.Namespace) -> None:
    """The recipe's generator, one JSON line."""
    import torch

    from minirlhf import RewardConfig, RewardModel, TrainState, load_pretrained, load_tokenizer
    from minirlhf import reward as train
    from minirlhf.compiling import compile_blocks
    from minirlhf.data import load_pairs
    from minirlhf.heads import initialize_score
    from minirlhf.optim import choose_dtype, make_optimizer
    from minirlhf.transformer import CausalLM

    torch.use_deterministic_algorithms(True)  # as the recipe does
    torch.utils.deterministic.fill_uninitialized_memory = False
    lm: CausalLM = load_pretrained(args.model, choose_dtype(args.dtype))
    model = initialize_score(RewardModel(lm), torch.Generator().manual_seed(0))
    pairs, _ = load_pairs(args.pairs, load_tokenizer(args.model), 128, "drop")
    config = RewardConfig(
        model=args.model, data=args.pairs, out="run", steps=args.steps, batch_size=ROWS,
        learning_rate=1e-6,
    )  # fmt: skip
    if args.compile:
        compile_blocks(model)
    state = TrainState(model, make_optimizer(model, config.learning_rate))
    before, seconds, tokens = 0, [], []
    for step in train(state, pairs, config):
        seconds.append(step.clock["step_time"])
        tokens.append(step.metrics["num_tokens"] - before)
        before = step.metrics["num_tokens"]
    c = lm.config
    block = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    block += 3 * c.hidden_size * c.intermediate_size
    operations = [6 * c.num_layers * block * count for count in tokens[1:]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds[1:], "operations": operations, "peak_bytes": peak}))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True)
    flags.add_argument("--data", help="folder that prepare.py made")
    flags.add_argument("--trl", metavar="PYTHON")
    flags.add_argument("--bfloat16", action="store_true", help="also in bfloat16")
    flags.add_argument("--compile", action="store_true", help="also compiled")
    flags.add_argument("--steps", type=int, default=6)
    flags.add_argument("--rounds", type=int, default=2)
    flags.add_argument("--out")
    flags.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--pairs", help=argparse.SUPPRESS)
    flags.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        return ours(args)
    pairs = f"{args.data}/movie_pairs_train.jsonl"
    shared = ["--model", args.model, "--pairs", pairs, "--steps", str(args.steps)]
    mine, peers = {}, {}
    for dtype in ("float32", "bfloat16") if args.bfloat16 else ("float32",):
        command = [sys.executable, __file__, "--child", *shared, "--dtype", dtype]
        mine[f"minirlhf, {dtype}"] = (command, None)
        if args.compile:
            mine[f"minirlhf, {dtype}, compiled"] = ([*command, "--compile"], None)
        if args.trl:
            script = [args.trl, str(HERE / "peers/trl_reward.py")]
            peers[f"TRL, {dtype}"] = ([*script, *shared, "--dtype", dtype], None)
    if not peers:
        print("TRL: left out, give --trl PYTHON", file=sys.stderr)
    machine = hardware.describe()
    found = take_turns(mine, peers, args.rounds)
    table = []
    for name, runs in found.items():
        row = {"program": name, **spread([s for run in runs for s in run["seconds"]]),
               "peak_gb": max(run["peak_bytes"] for run in runs) / 1e9}  # fmt: skip
        if "operations" in runs[0]:
            peak = machine["bfloat16_gflops" if "bfloat16" in name else "float32_gflops"]
            work = sum(sum(run["operations"]) for run in runs)
            row["roofline"] = work / 1e9 / peak / sum(sum(run["seconds"]) for run in runs)
        table.append(row)
    best = [row["median"] for row in table if row["program"] in peers]
    print(hardware.show(machine))
    print(f"{'':<32}{'median s':>10}{'lowest':>9}{'highest':>9}{'peak GB':>9}{'ratio':>8}"
          f"{'roofline':>10}")  # fmt: skip
    for row in table:
        row["ratio"] = min(best) / row["median"] if best else None
        ratio = f"{row['ratio']:.2f}" if best else ""
        share = f"{row['roofline']:.0%}" if "roofline" in row else ""
        print(f"{row['program']:<32}{row['median']:>10.2f}{row['lowest']:>9.2f}"
              f"{row['highest']:>9.2f}{row['peak_gb']:>9.2f}{ratio:>8}{share:>10}")  # fmt: skip
    settings = {"rows": ROWS, "steps": args.steps, "rounds": args.rounds}
    if args.out:
        write(args.out, machine, settings, table)


if __name__ == "__main__":
    main()
