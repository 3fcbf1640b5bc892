#!/usr/bin/env python3
"""What alignment changed: the same prompts and random keys, answered by models before and after.

    python benchmarks/compare_policies.py --start MODEL --aligned RUN/model --reward RUN/model \
        --prompts real/movie_prompts.jsonl --out benchmarks/results/ppo.json

Prints one table and writes one json with the texts: the metrics of `evaluation.evaluate_policy` for
all, KL to the start; the gain in standard deviations of the starting policy's scores; and how often
the aligned answer scores higher than the start's, a tie counting half, with its 95% interval.
Several aligned models are named, --aligned DPO=RUN/model PPO=RUN/model, and compared two by two.
"""

import argparse
import json
from functools import partial
from itertools import combinations
from statistics import stdev

from minirlhf import load_pretrained, load_reward_model, load_tokenizer
from minirlhf.batches.rollouts import measure
from minirlhf.data.examples import load_prompts
from minirlhf.equations.intervals import win_rate
from minirlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.sampling import Sampling
from minirlhf.rewards.model import model_reward
from minirlhf.run.machine import choose_dtype


def named(words: list[str]) -> dict[str, str]:
    """Name -> folder; a single folder needs no name."""
    if len(words) == 1 and "=" not in words[0]:
        return {"aligned": words[0]}
    pairs = dict(word.partition("=")[::2] for word in words)
    if len(pairs) < len(words) or "start" in pairs or not all(pairs.values()):
        raise SystemExit("give several --aligned as NAME=FOLDER, each name once, none start")
    return pairs


def gain(start: PolicyEvaluation, after: PolicyEvaluation) -> dict[str, float]:
    """What an aligned policy won and lost."""
    more = after.metrics["objective/scores"] - start.metrics["objective/scores"]
    return {
        "gain_in_start_std": more / stdev(start.scores),
        "distinct_2_kept": after.metrics["distinct_2"] / start.metrics["distinct_2"],
        **{name: value for name, value in after.metrics.items() if name.startswith("win_rate")},
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("start", "reward", "prompts", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--aligned", required=True, nargs="+", help="a folder, or NAME=FOLDER ...")
    flags.add_argument("--limit", type=int, default=256, help="prompts, from the file's end")
    flags.add_argument("--max-new-tokens", type=int, default=24)
    flags.add_argument("--temperature", type=float, default=1.0, help="of sampling and of the KL")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--stop", nargs="*", default=[], help="strings that end an answer")
    flags.add_argument("--seed", type=int, default=1)
    args = flags.parse_args()

    dtype = choose_dtype(args.dtype)
    tokenizer = load_tokenizer(args.start)
    prompts, report = load_prompts(args.prompts, tokenizer, None, "error")
    print(report)
    prompts = prompts[-args.limit :]
    source = model_reward(load_reward_model(args.reward, dtype), tokenizer, 4096)
    start = load_pretrained(args.start, dtype)
    sampling = Sampling(args.max_new_tokens, args.temperature, stop_strings=tuple(args.stop))
    found = {}
    for name, folder in {"start": args.start, **named(args.aligned)}.items():
        lm = start if name == "start" else load_pretrained(folder, dtype)
        print(f"{name}: {folder}", flush=True)
        found[name] = evaluate_policy(
            lm, prompts, source, partial(measure, ValueHeadModel(lm), start,
            temperature=args.temperature), tokenizer, sampling, args.seed, micro_batch_size=16,
            baseline=found["start"].scores if found else None,
        )
    results = {name: evaluated.metrics for name, evaluated in found.items()}
    summary = {name: gain(found["start"], after) for name, after in found.items()}
    del summary["start"]
    print(f"\n{'':<20}" + "".join(f"{name:>10}" for name in found))
    for metric in results["start"]:
        print(f"{metric:<20}" + "".join(f"{one[metric]:>10.3f}" for one in results.values()))
    for name, values in summary.items():
        print(f"\n{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    for one, other in combinations(list(summary), 2):
        rate = win_rate(found[one].scores, found[other].scores)
        summary[f"{one} above {other}"] = rate._asdict()
        print(f"{one} above {other}: {rate.rate:.3f} ({rate.low:.3f} to {rate.high:.3f})")
    rows = [
        {"prompt": p.text, **{n: r.texts[i] for n, r in found.items()},
         **{f"{n}_score": r.scores[i] for n, r in found.items()}}
        for i, p in enumerate(prompts)
    ]
    names = ("limit", "max_new_tokens", "temperature", "stop", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    with open(args.out, "w", encoding="utf-8") as file:
        out = {"settings": settings, "results": results, "summary": summary, "samples": rows}
        json.dump(out, file, indent=1, ensure_ascii=False)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
