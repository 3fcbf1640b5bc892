#!/usr/bin/env python3
"""A second judge of what compare_policies.py wrote: linear in words, and not what was trained on.

    python benchmarks/judge.py --ratings real/movie_sentences.jsonl \
        --pairs real/movie_pairs_eval.jsonl --texts benchmarks/results/dpo/comparison.json

Ridge regression of the raters' means on the words and pairs of neighbouring words of the training
sentences. Prints how many held-out pairs it orders as the raters did, each policy's mean, and how
often one is above another on the same prompt. Writes the same into --texts, under "judge".
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch.nn.functional import embedding_bag

from minirlhf.equations.intervals import win_rate

RIDGE = 1.0


def read_rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def features(text: str) -> set:
    """Words and pairs of neighbours, each once; of marks only ! and ?."""
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    return {*words, *pairwise(words)}


def fit(rows: list[dict]) -> Callable[[str], float]:
    """The judge: the sum of a text's weights over the root of their number, plus a constant."""
    counts = Counter(feature for row in rows for feature in sorted(features(row["text"]), key=str))
    numbers = {f: i for i, f in enumerate(f for f, count in counts.items() if count > 1)}

    def known(text: str) -> list[int]:
        return sorted(numbers[f] for f in features(text) if f in numbers) or [len(numbers)]

    bags = [known(row["text"]) for row in rows]
    flat = torch.tensor([i for bag in bags for i in bag])
    sizes = torch.tensor([len(bag) for bag in bags])
    starts, ratings = sizes.cumsum(0) - sizes, torch.tensor([row["rating"] for row in rows])
    weights = torch.zeros(len(numbers) + 1, 1, requires_grad=True)  # the last: nothing is known
    constant = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, constant], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        sums = embedding_bag(flat, weights, starts, mode="sum")[:, 0]
        errors = sums / sizes.sqrt() + constant - ratings
        loss = (errors.square().sum() + RIDGE * weights.square().sum()) / len(rows)
        loss.backward()
        return loss

    optimizer.step(closure)
    learned, base = weights.detach()[:, 0], float(constant.detach())
    return lambda text: base + float(learned[known(text)].sum()) / len(known(text)) ** 0.5


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ratings", "pairs", "texts"):
        flags.add_argument(f"--{name}", required=True)
    args = flags.parse_args()
    judge = fit(read_rows(args.ratings))
    pairs = read_rows(args.pairs)
    right = [judge(pair["chosen"]) > judge(pair["rejected"]) for pair in pairs]
    told = {"held_out_accuracy": fmean(right)}
    compared = json.loads(Path(args.texts).read_text("utf-8"))
    scores = {
        name: [judge(row["prompt"] + row[name]) for row in compared["samples"]]
        for name in compared["results"]
    }
    told |= {name: {"score": fmean(values)} for name, values in scores.items()}
    for one, other in combinations(scores, 2):
        told[f"{other} above {one}"] = win_rate(scores[other], scores[one])._asdict()
    for name, value in told.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        print(f"{name:<20}" + "  ".join(f"{number:.3f}" for number in numbers))
    text = json.dumps(compared | {"judge": told}, indent=1, ensure_ascii=False)
    Path(args.texts).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
