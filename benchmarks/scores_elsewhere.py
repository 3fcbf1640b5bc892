#!/usr/bin/env python3
"""Scores of a reward model here and in transformers, on the same pairs of messages.

    python benchmarks/scores_elsewhere.py rows --pairs real/movie_pairs_eval.jsonl --out CHAT.jsonl
    python benchmarks/scores_elsewhere.py compare --model RUN/model --pairs CHAT.jsonl \
        --out FILE.json

The first makes dialogues of film pairs: those of sentences of up to 100 characters whose ratings
differ by half a point at least. The second scores them here and there, there as model cards do it:
AutoModelForSequenceClassification on what `apply_chat_template` writes, one row at a time. It
prints one table and writes one json: the share of pairs that each orders as the raters did, the
pairs that they order differently, and the largest difference of two scores.
"""

import argparse
import json

import torch
import transformers

from minirlhf import load_reward_model, load_tokenizer
from minirlhf.data.examples import load_pairs
from minirlhf.rewards.model import score_texts

ASKED = [{"role": "system", "content": "Film reviews."}, {"role": "user", "content": "Write one."}]


def write_rows(pairs: str, out: str, most: int) -> None:
    rows = []
    for line in open(pairs, encoding="utf-8"):
        pair = json.loads(line)
        sides = {side: pair[side] for side in ("chosen", "rejected")}
        if pair["margin"] >= 0.5 and max(map(len, sides.values())) <= 100:
            said = {s: [{"role": "assistant", "content": text}] for s, text in sides.items()}
            rows.append({"prompt": ASKED, **said})
    with open(out, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:most])


def scores_here(folder: str, pairs: str) -> list[tuple[float, float]]:
    tokenizer, model = load_tokenizer(folder), load_reward_model(folder, torch.float32)
    found, report = load_pairs(pairs, tokenizer, None, "error", whole=True)
    print(report)
    texts = [pair.prompt_ids + ids for pair in found for ids in pair.responses]
    scores = score_texts(model, texts).tolist()
    return list(zip(scores[::2], scores[1::2], strict=True))


@torch.no_grad()
def scores_there(folder: str, pairs: str) -> list[tuple[float, float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    ).eval()
    found = []
    for line in open(pairs, encoding="utf-8"):
        row, scores = json.loads(line), []
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(
                row["prompt"] + row[side], return_tensors="pt", return_dict=False
            )
            scores.append(model(ids).logits.item())
        found.append(tuple(scores))
    return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("what", choices=("rows", "compare"))
    for name in ("pairs", "out"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--model", help="reward model to compare")
    flags.add_argument("--count", type=int, default=300, help="most rows that are made")
    args = flags.parse_args()
    if args.what == "rows":
        write_rows(args.pairs, args.out, args.count)
        return
    here, there = (read(args.model, args.pairs) for read in (scores_here, scores_there))
    right = {name: [chosen > rejected for chosen, rejected in scores]
             for name, scores in (("here", here), ("transformers", there))}
    both = [abs(x - y) for a, b in zip(here, there, strict=True) for x, y in zip(a, b, strict=True)]
    result = {
        "pairs": len(here), "transformers_version": transformers.__version__,
        "accuracy": {name: sum(ordered) / len(ordered) for name, ordered in right.items()},
        "ordered_differently": sum(a != b for a, b in zip(*right.values(), strict=True)),
        "largest_difference": max(both),
        "score_range": [min(map(min, here)), max(map(max, here))],
    }
    print(f"\n{'':<14}accuracy on {len(here):,} pairs")
    for name, accuracy in result["accuracy"].items():
        print(f"{name:<14}{accuracy:.4f}")
    print(f"ordered differently: {result['ordered_differently']}; "
          f"largest difference of two scores: {result['largest_difference']:.1e}")
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
