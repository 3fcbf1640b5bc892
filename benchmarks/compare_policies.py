#!/usr/bin/env python3
"""What PPO changed: the same prompts and random keys, answered by the model before and after.

    python benchmarks/compare_policies.py --start MODEL --aligned RUN/model --reward RUN/model \
        --prompts real/movie_prompts.jsonl --out benchmarks/results/ppo.json

Prints one table and writes one json with the texts: mean score, its gain in standard deviations of
the starting policy's scores, KL of the aligned policy to the start (nats a response, k1 on its own
samples), distinct-1 and distinct-2 (different words and word pairs over all of them), length, the
share that ended by itself, and how often the aligned answer scores higher than the start's.
"""

import argparse
import json

import torch

from minirlhf import load_pretrained, load_reward_model, load_tokenizer, streams
from minirlhf.data import load_prompts
from minirlhf.generation import Sampling
from minirlhf.heads import ValueHeadModel
from minirlhf.kl import kl_k1
from minirlhf.recipes.ppo import measure
from minirlhf.reward_model import model_reward
from minirlhf.rollout import RolloutBuffer, sample


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts."""
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


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
    keys = streams.key(args.seed, "comparison", torch.arange(len(prompts)))
    sampling = Sampling(args.max_new_tokens, args.temperature, stop_strings=tuple(args.stop))
    results, scores, texts = {}, {}, {}
    for name, lm in (("start", start), ("aligned", load_pretrained(args.aligned, torch.float32))):
        completions, rollout = sample(lm, prompts, keys, sampling, tokenizer, 64)
        scores[name], texts[name] = source(completions), completions.completions
        buffer = RolloutBuffer(16, 4096)
        buffer.add(rollout)
        measure(ValueHeadModel(lm), start, buffer, args.temperature)
        kl = kl_k1(buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs"))
        results[name] = {
            "score": float(scores[name].mean()),
            "score_std": float(scores[name].std()),
            "kl": float(kl.sum()) / len(prompts),
            "distinct_1": distinct(texts[name], 1),
            "distinct_2": distinct(texts[name], 2),
            "tokens": sum(map(len, completions.response_ids)) / len(prompts),
            "ended": 1 - completions.finish_reasons.count("length") / len(prompts),
        }
    before, after = results["start"], results["aligned"]
    summary = {
        "gain_in_start_std": (after["score"] - before["score"]) / before["score_std"],
        "distinct_2_kept": after["distinct_2"] / before["distinct_2"],
        "win_rate": float((scores["aligned"] > scores["start"]).float().mean()),
    }
    print(f"\n{'':<12}{'start':>10}{'aligned':>10}")
    for metric in before:
        print(f"{metric:<12}{before[metric]:>10.3f}{after[metric]:>10.3f}")
    print("\n" + "  ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    rows = [
        {"prompt": p.text, **{n: texts[n][i] for n in texts},
         **{f"{n}_score": float(scores[n][i]) for n in scores}}
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    names = ("limit", "max_new_tokens", "temperature", "stop", "seed")
    settings = {name: getattr(args, name) for name in names}
    with open(args.out, "w", encoding="utf-8") as file:
        out = {"settings": settings, "results": results, "summary": summary, "samples": rows}
        json.dump(out, file, indent=1, ensure_ascii=False)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
