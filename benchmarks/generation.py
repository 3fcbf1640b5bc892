#!/usr/bin/env python3
"""Sampling 64 tokens after 32, beside transformers' generate(): new tokens a second.

    python benchmarks/generation.py --model real/SmolLM2-135M-Instruct --data real \
        --transformers VENV/bin/python --out benchmarks/results/generation.json

Batches of 1, 16 and 64 rows, drawn from the model's own law at temperature 1, no row ends early.
`peers/README.md` says how to make the peer's environment; without one it is left out. Each program
runs in a process of its own, in turns, `--rounds` times; a first batch of each size is not counted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import hardware
from side_by_side import flags_of, long_prompts, read_flags, several, spread, take_turns, write

HERE = Path(__file__).parent
BATCH_SIZES, PROMPT, NEW = (1, 16, 64), 32, 64


def ours(args: argparse.Namespace) -> None:
    """`generate`, one JSON line for each batch size."""
    import torch

    from minirlhf import Sampling, generate, load_pretrained
    from minirlhf.models.int8 import Int8LM
    from minirlhf.run.machine import choose_dtype, make_deterministic

    make_deterministic("cpu")  # as the recipe does
    lm = load_pretrained(args.model, choose_dtype(args.dtype))
    lm = Int8LM(lm) if args.int8 else lm
    ids = json.loads(Path(args.prompts).read_text(encoding="utf-8"))
    for rows in BATCH_SIZES:
        seconds, cpu = [], []
        for _ in range(args.repeats + 1):
            started, used = time.perf_counter(), time.process_time()
            made = generate(lm, ids[:rows], Sampling(NEW), (), torch.arange(rows))
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        assert int(made.response_mask.sum()) == rows * NEW
        print(json.dumps({"rows": rows, "seconds": seconds[1:], "cpu": cpu[1:]}), flush=True)


def main() -> None:
    flags = flags_of(__doc__)
    flags.add_argument("--transformers", metavar="PYTHON")
    flags.add_argument("--int8", action="store_true", help="also from the copy of --rollout-bits 8")
    flags.add_argument("--repeats", type=several, default=3)
    flags.add_argument("--prompts", help=argparse.SUPPRESS)
    args = read_flags(flags)
    if args.child:
        return ours(args)
    with tempfile.TemporaryDirectory() as folder:
        prompts = long_prompts(
            args.model, f"{args.data}/movie_sentences.jsonl", PROMPT, max(BATCH_SIZES),
            Path(folder) / "prompts.json",
        )
        shared = ["--model", args.model, "--prompts", str(prompts), "--repeats", str(args.repeats)]
        mine, peers = {}, {}
        for dtype in ("float32", "bfloat16") if args.bfloat16 else ("float32",):
            command = [sys.executable, __file__, "--child", *shared, "--dtype", dtype]
            mine[f"minirlhf, {dtype}"] = (command, None)
            if args.transformers:
                script = [args.transformers, str(HERE / "peers/hf_generate.py")]
                peers[f"transformers, {dtype}"] = ([*script, *shared, "--dtype", dtype], None)
        if args.int8:
            command = [sys.executable, __file__, "--child", *shared, "--int8"]
            mine["minirlhf, int8"] = (command, None)
        if not peers:
            print("transformers: left out, give --transformers PYTHON", file=sys.stderr)
        found, machine = take_turns(mine, peers, args.rounds)
    table = []
    for rows in BATCH_SIZES:
        for name, lines in found.items():
            seconds = [s for line in lines if line["rows"] == rows for s in line["seconds"]]
            rate = rows * NEW / statistics.median(seconds)
            row = {"program": name, "rows": rows, "tokens_per_s": rate, **spread(seconds)}
            if name in mine:
                cpu = [s for line in lines if line["rows"] == rows for s in line["cpu"]]
                row["cpu"] = statistics.median(cpu)
            table.append(row)
    print(hardware.show(machine))
    print(f"{'':<28}{'rows':>6}{'tokens/s':>10}{'median s':>10}{'lowest':>9}{'highest':>9}"
          f"{'ratio':>8}")
    for row in table:
        rates = [other["tokens_per_s"] for other in table
                 if other["rows"] == row["rows"] and other["program"] in peers]
        row["ratio"] = row["tokens_per_s"] / max(rates) if rates else None
        ratio = f"{row['ratio']:.2f}" if rates else ""
        print(f"{row['program']:<28}{row['rows']:>6}{row['tokens_per_s']:>10.1f}"
              f"{row['median']:>10.2f}{row['lowest']:>9.2f}{row['highest']:>9.2f}{ratio:>8}")
    settings = {"prompt": PROMPT, "new_tokens": NEW, "repeats": args.repeats, "rounds": args.rounds}
    if args.out:
        write(args.out, machine, settings, table)


if __name__ == "__main__":
    main()
