#!/usr/bin/env python3
"""One optimizer step of supervised fine-tuning, a reward model, DPO or GRPO, beside TRL's trainer.

    python benchmarks/train_step.py --recipe reward --model real/SmolLM2-135M-Instruct --data real \
        --trl VENV/bin/python --out benchmarks/results/reward_step.json

Film sentences of about 26 tokens, 16 of them or 16 pairs. All weights are trained, or adapters of
`--lora-rank` on all linear layers, those of peft there. Ours is the recipe's own generator. Both
draw their batches from the same 4,096 rows, ours of like length, as the recipe does; so they are
compared by tokens a second, padding not counted. A step of GRPO is a rollout and one update on it,
TRL's default: 8 problems of `minirlhf tasks arithmetic`, 4 responses of 64 tokens to each, a KL to
a frozen reference in the loss; its tokens are those that are sampled. `peers/README.md` says how to
make the peer's environment; without one it is left out. Each program runs in a process of its own,
in turns, `--rounds` times; the first step of each process is not counted.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import hardware
from side_by_side import compare, flags_of, read_flags, several, show, take_turns, write

HERE = Path(__file__).parent
BATCH, ROWS, LONGEST = 16, 4096, 128
PROMPTS, SAMPLES, NEW_TOKENS = 8, 4, 64  # of GRPO
RECIPES = {"sft": "sentences", "reward": "pairs_train", "dpo": "pairs_train", "grpo": None}


def write_rows(recipe: str, data: str, target: Path) -> None:
    """The rows that both read; for DPO the sentences go on from one prompt."""
    if recipe == "grpo":
        from minirlhf.tools.settings import TasksConfig
        from minirlhf.tools.tasks import rows

        problems = rows(TasksConfig(kind="arithmetic", n=1024, held_out=0, out="tasks"))
        target.write_text("".join(json.dumps(row) + "\n" for row in problems), encoding="utf-8")
        return
    with open(f"{data}/movie_{RECIPES[recipe]}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(ROWS), strict=False)]
    kept = ("text",) if recipe == "sft" else ("chosen", "rejected")
    rows = [{name: row[name] for name in kept} for row in rows]
    if recipe == "dpo":
        rows = [{"prompt": "A film review:"} | {k: f" {v}" for k, v in row.items()} for row in rows]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def operations_of(recipe: str, frozen: bool, c, tokens: int, prompt: int) -> float:
    """Floating-point operations of a step: 6 a weight and token, of a forward pass and a backward
    one of twice its work, or of the same work where weights are frozen (the adapters' own are not
    counted); 2 more of a reference, and 2 of sampling.

    Args:
        frozen: whether only adapters are trained.
        c: the model's config.
        tokens: that are learned from, with prompts; of GRPO those that are sampled.
        prompt: tokens that each text of DPO begins with, or of all prompts of GRPO, each once,
            whose states are not unembedded.
    """
    block = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    block += 3 * c.hidden_size * c.intermediate_size
    words = 0 if recipe == "reward" else c.vocab_size
    learned = tokens if recipe == "grpo" else tokens - 2 * BATCH * prompt
    read = tokens + prompt if recipe == "grpo" else tokens
    weights = c.num_layers * block * read + c.hidden_size * words * learned
    return ({"dpo": 8, "grpo": 10}.get(recipe, 6) - 2 * frozen) * weights


def ours(args: argparse.Namespace) -> None:
    """The recipe's generator, one JSON line."""
    from minirlhf import TrainState, load_pretrained, load_tokenizer
    from minirlhf.models.compiling import compile_blocks
    from minirlhf.models.lora import add_lora
    from minirlhf.models.transformer import CausalLM
    from minirlhf.run.machine import choose_dtype, make_deterministic
    from minirlhf.run.optim import make_optimizer

    make_deterministic("cpu")  # as the recipe does
    tokenizer, dtype = load_tokenizer(args.model), choose_dtype(args.dtype)
    lm: CausalLM = load_pretrained(args.model, dtype)
    values = {"model": args.model, "data": args.rows, "out": "run", "steps": args.steps,
              "batch_size": BATCH, "learning_rate": 1e-6}
    model = lm
    match args.recipe:
        case "sft":
            from minirlhf import SFTConfig, sft
            from minirlhf.batches.demonstrations import with_target
            from minirlhf.data.examples import load_texts

            rows, _ = load_texts(args.rows, tokenizer, LONGEST, "drop", finish=with_target)
            config = SFTConfig(**values)
            train = partial(sft, texts=rows, config=config)
        case "reward":
            import torch

            from minirlhf import RewardConfig, RewardModel, reward
            from minirlhf.data.examples import load_pairs
            from minirlhf.models.heads import initialize_score

            rows, _ = load_pairs(args.rows, tokenizer, LONGEST, "drop")
            config = RewardConfig(**values)
            model = initialize_score(RewardModel(lm), torch.Generator().manual_seed(0))
            train = partial(reward, examples=rows, config=config)
        case "dpo":
            from minirlhf import DPOConfig, dpo
            from minirlhf.batches.responses import ref_logprobs, with_answers
            from minirlhf.data.examples import load_pairs

            rows, _ = load_pairs(args.rows, tokenizer, LONGEST, "drop", finish=with_answers)
            config = DPOConfig(**values)
            frozen = load_pretrained(args.model, dtype).requires_grad_(False)
            train = partial(dpo, examples=rows, ref=partial(ref_logprobs, frozen), config=config)
        case "grpo":
            from minirlhf import GRPOConfig, grpo
            from minirlhf.data.examples import load_prompts

            rows, _ = load_prompts(args.rows, tokenizer, LONGEST, "drop")
            values |= {"batch_size": PROMPTS, "samples_per_prompt": SAMPLES, "mini_batches": 1,
                       "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS,
                       "micro_batch_size": PROMPTS * SAMPLES}  # all at once, as the peer
            config = GRPOConfig(**values, reward=("brevity",), kl_coef=0.04, kl_estimator="k3")
            frozen = load_pretrained(args.model, dtype).requires_grad_(False)
            train = partial(grpo, prompts=rows, reward=brevity, ref=frozen, tokenizer=tokenizer,
                            config=config)
    if args.lora_rank:
        add_lora(model, args.lora_rank, 32.0)
    if args.compile:
        compile_blocks(model, *([frozen] if args.recipe in ("dpo", "grpo") else []))
    state = TrainState(model, make_optimizer(model, config.learning_rate))
    before, seconds, tokens, clocks = 0, [], [], []
    for step in train(state):
        seconds.append(step.clock["step_time"])
        tokens.append(step.metrics["num_tokens"] - before)
        before = step.metrics["num_tokens"]
        clocks.append(step.clock)
    prompts = [len(rows[0].prompt_ids) if args.recipe == "dpo" else 0] * len(tokens)
    if args.recipe == "grpo":
        sampled = PROMPTS * SAMPLES * NEW_TOKENS
        prompts = [(n - sampled) // SAMPLES for n in tokens]
        tokens = [sampled] * len(tokens)
    adapts = bool(args.lora_rank)
    operations = [operations_of(args.recipe, adapts, lm.config, *of) for of in
                  zip(tokens, prompts, strict=True)]
    print(json.dumps({
        "seconds": seconds[1:], "tokens": tokens[1:], "operations": operations[1:],
        "peak_bytes": hardware.resident_peak(),
        "phases": {name: [clock[name] for clock in clocks[1:]]
                   for name in clocks[0] if name.startswith("time/")},
    }))


def brevity(completions):
    """(B,) scores that reward short texts, as the peer's."""
    import torch

    return torch.tensor([-len(text) / 100 for text in completions.completions])


def main() -> None:
    flags = flags_of(__doc__)
    flags.add_argument("--recipe", choices=RECIPES, required=True)
    flags.add_argument("--trl", metavar="PYTHON")
    flags.add_argument("--compile", action="store_true", help="also compiled")
    flags.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank")
    flags.add_argument("--steps", type=several, default=6)
    flags.add_argument("--rows", help=argparse.SUPPRESS)
    args = read_flags(flags)
    if args.child:
        return ours(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(args.recipe, args.data, rows)
        shared = ["--recipe", args.recipe, "--model", args.model, "--rows", str(rows),
                  "--steps", str(args.steps), "--lora-rank", str(args.lora_rank)]
        mine, peers = {}, {}
        for dtype in ("float32", "bfloat16") if args.bfloat16 else ("float32",):
            command = [sys.executable, __file__, "--child", *shared, "--dtype", dtype]
            mine[f"minirlhf, {dtype}"] = (command, None)
            if args.compile:
                mine[f"minirlhf, {dtype}, compiled"] = ([*command, "--compile"], None)
            if args.trl:
                script = [args.trl, str(HERE / "peers/trl_step.py")]
                if args.recipe == "grpo":
                    script += ["--batch-size", str(PROMPTS), "--samples", str(SAMPLES),
                               "--new-tokens", str(NEW_TOKENS)]
                peers[f"TRL, {dtype}"] = ([*script, *shared, "--dtype", dtype], None)
        if not peers:
            print("TRL: left out, give --trl PYTHON", file=sys.stderr)
        found, machine = take_turns(mine, peers, args.rounds)
    table = compare(found, peers, machine)
    show(table, machine)
    rows = PROMPTS * SAMPLES if args.recipe == "grpo" else BATCH
    settings = {"recipe": args.recipe, "lora_rank": args.lora_rank, "rows": rows,
                "steps": args.steps, "rounds": args.rounds}
    if args.out:
        write(args.out, machine, settings, table)


if __name__ == "__main__":
    main()
