#!/usr/bin/env python3
"""One PPO update, sampling to the last optimizer step, beside TRL's: seconds and peak memory.

    python benchmarks/ppo_update.py --model real/SmolLM2-135M-Instruct --data real \
        --trl096 VENV/bin/python --trl112 VENV/bin/python --trl112-path DIR \
        --out benchmarks/results/ppo_update.json

16 prompts of 32 tokens, 64 tokens sampled after each, scored by a reward model of the same size,
penalised against a frozen reference; 2 epochs of 2 mini-batches, all weights trained. Ours is the
recipe's own generator; "lean" passes one row at once and offloads the frozen models.
`peers/README.md` says how to make the peers' environments; a peer without one is left out. Each
program runs in a process of its own, in turns, `--rounds` times; the first update of each process
is not counted.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import hardware
from side_by_side import (
    compare,
    flags_of,
    long_prompts,
    read_flags,
    several,
    show,
    take_turns,
    write,
)

HERE = Path(__file__).parent
ROWS, PROMPT, NEW, EPOCHS, MINI_BATCHES = 16, 32, 64, 2, 2


def operations(config) -> float:
    """Floating-point operations of an update: 2 a weight and token forward, 4 backward.

    Sampling reads each token once; then the reward model, the policy and the reference see the
    whole rows, and each epoch passes forward and backward. Attention's own products are counted;
    what is computed twice to save memory is not.
    """
    D, E, L = config.hidden_size, config.head_dim, config.num_layers
    heads, groups = config.num_heads, config.num_kv_heads
    block = D * E * (2 * heads + 2 * groups) + 3 * D * config.intermediate_size
    rows = ROWS * (PROMPT + NEW)
    attention = L * 2 * heads * E * (PROMPT + NEW) / 2  # multiply-adds a token, half masked
    trunk = rows * (L * block + attention)
    unembedding = ROWS * NEW * config.vocab_size * D
    passes = 4 * trunk + 3 * unembedding  # sample, score, policy, reference
    return 2 * (passes + 3 * EPOCHS * (trunk + unembedding))


def ours(args: argparse.Namespace) -> None:
    """The recipe's generator, one JSON line."""

    from minirlhf import (
        PPOConfig,
        TrainState,
        ValueHeadModel,
        load_pretrained,
        load_reward_model,
        load_tokenizer,
        ppo,
    )
    from minirlhf.data.examples import Prompt
    from minirlhf.models.compiling import compile_blocks
    from minirlhf.models.pretrained import offload
    from minirlhf.rewards.model import model_reward
    from minirlhf.run.machine import choose_dtype, make_deterministic
    from minirlhf.run.optim import make_optimizer

    make_deterministic("cpu")  # as the recipe does
    config = PPOConfig(
        model=args.model, data=args.prompts, reward=("model",), out="run", steps=args.updates,
        batch_size=ROWS, max_new_tokens=NEW, min_new_tokens=NEW, epochs=EPOCHS,
        mini_batches=MINI_BATCHES, micro_batch_size=args.micro_batch_size, learning_rate=1e-6,
        dtype=args.dtype,
    )
    dtype = choose_dtype(args.dtype)
    load = partial(load_pretrained, args.model, dtype)
    tokenizer, scorer = load_tokenizer(args.model), load_reward_model(args.reward, dtype)
    policy, ref = ValueHeadModel(load()), load()
    for frozen in (scorer, ref):
        frozen.requires_grad_(False)
    ids = json.loads(Path(args.prompts).read_text(encoding="utf-8"))
    prompts = [Prompt(row, tokenizer.decode(row), f"row {i}", {}) for i, row in enumerate(ids)]
    state = TrainState(policy, make_optimizer(policy, config.learning_rate))
    reward = model_reward(scorer, tokenizer, config.micro_batch_tokens)
    if args.offload_frozen:
        offload(scorer, Path(args.reward))
        offload(ref, Path(args.model))
    if args.compile:
        compile_blocks(policy, ref, scorer)
    run = ppo(state, prompts, reward, ref, tokenizer, config)
    clocks = [step.clock for step in run][1:]
    phases = {name: [clock[name] for clock in clocks] for name in clocks[0] if "time/" in name}
    peak = hardware.resident_peak()
    done = {"seconds": phases.pop("time/step"), "phases": phases, "peak_bytes": peak}
    print(json.dumps(done | {"operations": [operations(policy.lm.config)] * len(clocks)}))


def write_reward_model(model: str, folder: Path) -> Path:
    """A reward model with a random head, whose scores are as good as any to time."""
    import torch

    from minirlhf import RewardModel, load_pretrained, load_tokenizer, save_pretrained
    from minirlhf.models.heads import initialize_score

    scorer = RewardModel(load_pretrained(model))
    save_pretrained(initialize_score(scorer, torch.Generator().manual_seed(0)), folder)
    load_tokenizer(model).save(folder)
    return folder


def commands(args: argparse.Namespace, prompts: Path, reward: Path) -> tuple[dict, dict]:
    """(ours, peers): name -> (command, environment)."""
    shared = ["--model", args.model, "--prompts", str(prompts), "--updates", str(args.updates)]
    mine = [sys.executable, __file__, "--child", *shared, "--reward", str(reward)]
    lean = [*mine, "--micro-batch-size", str(args.lean_rows), "--offload-frozen"]
    ours = {"minirlhf, float32": (mine, None), "minirlhf, float32, lean": (lean, None)}
    if args.bfloat16:
        ours["minirlhf, bfloat16"] = ([*mine, "--dtype", "bfloat16"], None)
    if args.compile:
        for name in [name for name in ours if "lean" not in name and "bfloat16" not in name]:
            ours[f"{name}, compiled"] = ([*ours[name][0], "--compile"], None)
    peers = {}
    for engine, python in (("trl096", args.trl096), ("trl112", args.trl112)):
        if python is None:
            print(f"{engine}: left out, give --{engine} PYTHON", file=sys.stderr)
            continue
        path = {"PYTHONPATH": args.trl112_path or ""} if engine == "trl112" else {}
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | path
        script = [python, str(HERE / "peers/trl_ppo.py"), "--engine", engine, *shared]
        for dtype in ("float32", "bfloat16") if args.bfloat16 else ("float32",):
            peers[f"{engine}, {dtype}"] = ([*script, "--dtype", dtype], env)
    return ours, peers


def main() -> None:
    flags = flags_of(__doc__)
    flags.add_argument("--trl096", metavar="PYTHON")
    flags.add_argument("--trl112", metavar="PYTHON")
    flags.add_argument("--trl112-path", metavar="DIR")
    flags.add_argument("--compile", action="store_true", help="also compiled")
    flags.add_argument("--updates", type=several, default=4)
    flags.add_argument("--lean-rows", type=int, default=1, help="rows that lean passes at once")
    flags.add_argument("--prompts", help=argparse.SUPPRESS)
    flags.add_argument("--reward", help=argparse.SUPPRESS)
    flags.add_argument("--micro-batch-size", type=int, default=8, help=argparse.SUPPRESS)
    flags.add_argument("--offload-frozen", action="store_true", help=argparse.SUPPRESS)
    args = read_flags(flags)
    if args.child:
        return ours(args)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prompts = long_prompts(
            args.model, f"{args.data}/movie_sentences.jsonl", PROMPT, ROWS * args.updates,
            Path(folder) / "prompts.json",
        )
        reward = write_reward_model(args.model, Path(folder) / "reward")
        mine, peers = commands(args, prompts, reward)
        found, machine = take_turns(mine, peers, args.rounds)
    table = compare(found, peers, machine)
    show(table, machine)
    print(f"{time.perf_counter() - started:.0f} s in all")
    settings = {
        "rows": ROWS, "prompt": PROMPT, "new_tokens": NEW, "epochs": EPOCHS,
        "mini_batches": MINI_BATCHES, "updates": args.updates, "rounds": args.rounds,
    }
    if args.out:
        write(args.out, machine, settings, table)


if __name__ == "__main__":
    main()
