#!/usr/bin/env python3
"""What PPO changed: the same prompts and random keys, answered by the model before and after.

    python benchmarks/compare_policies.py --start MODEL --aligned RUN/model --reward RUN/model \
        --prompts real/movie_prompts.jsonl --out benchmarks/results/ppo.json

Prints one table and writes one json with the texts: the metrics of `evaluation.evaluate_policy` for
both, KL to the start; the gain in standard deviations of the starting policy's scores; and how
often the aligned answer scores higher than the start's, a tie counting half, with its 95% interval.
"""

import argparse
import json
from functools import partial
from statistics import stdev

import torch

from minirlhf import load_pretrained, load_reward_model, load_tokenizer
from minirlhf.batches.rollouts import measure
from minirlhf.data.examples import load_prompts
from minirlhf.evaluation.policy import evaluate_policy
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.sampling import Sampling
from minirlhf.rewards.model import model_reward


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("start", "aligned", "reward", "prompts", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--limit", type=int, default=256, help="prompts, from the file's end")
    flags.add_argument("--max-new-tokens", type=int, default=24)
    flags.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the KL")
    flags.add_argument("--stop", nargs="*", default=[], help="strings that end an answer")
    flags.add_argument("--seed", type=int, default=1)
    args = flags.parse_args()

    tokenizer = load_tokenizer(args.start)
    prompts, report = load_prompts(args.prompts, tokenizer, None, "error")
    print(report)
    prompts = prompts[-args.limit :]
    source = model_reward(load_reward_model(args.reward, torch.float32), tokenizer, 4096)
    start = load_pretrained(args.start, torch.float32)
    sampling = Sampling(args.max_new_tokens, args.temperature, stop_strings=tuple(args.stop))
    found = {}
    for name, lm in (("start", start), ("aligned", load_pretrained(args.aligned, torch.float32))):
        found[name] = evaluate_policy(
            lm, prompts, source, partial(measure, ValueHeadModel(lm), start,
            temperature=args.temperature), tokenizer, sampling, args.seed, micro_batch_size=16,
            baseline=found["start"].scores if found else None,
        )
    results = {name: evaluated.metrics for name, evaluated in found.items()}
    before, after = results["start"], results["aligned"]
    gain = after["objective/scores"] - before["objective/scores"]
    summary = {
        "gain_in_start_std": gain / stdev(found["start"].scores),
        "distinct_2_kept": after["distinct_2"] / before["distinct_2"],
        **{name: value for name, value in after.items() if name.startswith("win_rate")},
    }
    print(f"\n{'':<20}{'start':>10}{'aligned':>10}")
    for metric in before:
        print(f"{metric:<20}{before[metric]:>10.3f}{after[metric]:>10.3f}")
    print("\n" + "  ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    rows = [
        {"prompt": p.text, **{n: r.texts[i] for n, r in found.items()},
         **{f"{n}_score": r.scores[i] for n, r in found.items()}}
        for i, p in enumerate(prompts)
    ]
    names = ("limit", "max_new_tokens", "temperature", "stop", "seed")
    settings = {name: getattr(args, name) for name in names}
    with open(args.out, "w", encoding="utf-8") as file:
        out = {"settings": settings, "results": results, "summary": summary, "samples": rows}
        json.dump(out, file, indent=1, ensure_ascii=False)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
