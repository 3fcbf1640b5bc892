#!/usr/bin/env python3
"""One optimizer step of a reward model on 16 pairs, beside TRL's RewardTrainer.

    python benchmarks/reward_step.py --model real/SmolLM2-135M-Instruct --data real \
        --trl VENV/bin/python --out benchmarks/results/reward_step.json

Film sentences of about 26 tokens a side, all weights trained. Ours is the recipe's own generator.
Both draw their batches from the same 4,096 pairs, ours of like length, as the recipe does; so they
are compared by tokens a second, padding not counted. `peers/README.md` says how to make the peer's
environment; without one it is left out. Each program runs in a process of its own, in turns,
`--rounds` times; the first step of each process is not counted.
"""

import argparse
import json
import sys
from pathlib import Path

import hardware
from side_by_side import compare, flags_of, read_flags, several, show, take_turns, write

HERE = Path(__file__).parent
ROWS, PAIRS = 16, 4096


def ours(args: argparse.Namespace) -> None:
    """The recipe's generator, one JSON line."""
    import torch

    from minirlhf import RewardConfig, RewardModel, TrainState, load_pretrained, load_tokenizer
    from minirlhf import reward as train
    from minirlhf.data.examples import load_pairs
    from minirlhf.models.compiling import compile_blocks
    from minirlhf.models.heads import initialize_score
    from minirlhf.models.transformer import CausalLM
    from minirlhf.run.machine import choose_dtype, make_deterministic
    from minirlhf.run.optim import make_optimizer

    make_deterministic("cpu")  # as the recipe does
    lm: CausalLM = load_pretrained(args.model, choose_dtype(args.dtype))
    model = initialize_score(RewardModel(lm), torch.Generator().manual_seed(0))
    pairs, _ = load_pairs(args.pairs, load_tokenizer(args.model), 128, "drop")
    pairs = pairs[:PAIRS]
    config = RewardConfig(
        model=args.model, data=args.pairs, out="run", steps=args.steps, batch_size=ROWS,
        learning_rate=1e-6,
    )
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
    peak = hardware.resident_peak()
    print(json.dumps({
        "seconds": seconds[1:], "tokens": tokens[1:], "operations": operations, "peak_bytes": peak,
    }))


def main() -> None:
    flags = flags_of(__doc__)
    flags.add_argument("--trl", metavar="PYTHON")
    flags.add_argument("--compile", action="store_true", help="also compiled")
    flags.add_argument("--steps", type=several, default=6)
    flags.add_argument("--pairs", help=argparse.SUPPRESS)
    args = read_flags(flags)
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
    found, machine = take_turns(mine, peers, args.rounds)
    table = compare(found, peers, machine)
    show(table, machine)
    settings = {"rows": ROWS, "steps": args.steps, "rounds": args.rounds}
    if args.out:
        write(args.out, machine, settings, table)


if __name__ == "__main__":
    main()
