"""Ours and a peer in turns, each in a process of its own: what the scripts beside this share."""

import json
import statistics
import sys
from pathlib import Path

import hardware


def take_turns(ours: dict, peers: dict, rounds: int) -> dict[str, list[dict]]:
    """Name -> the JSON lines of all its rounds.

    Args:
        ours, peers: name -> (command, environment or None). A machine drifts, so all of them run
            once a round, and rounds follow each other.
    """
    found: dict[str, list[dict]] = {}
    for number in range(rounds):
        for name, (command, env) in {**ours, **peers}.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            found.setdefault(name, []).extend(hardware.child(command, env))
    return found


def spread(seconds: list[float]) -> dict:
    return {
        "median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds),
        "count": len(seconds),
    }  # fmt: skip


def long_prompts(model: str, sentences: str, tokens: int, count: int, target: Path) -> Path:
    """Writes the first `tokens` ids of so many film sentences that are long enough."""
    from minirlhf import load_tokenizer

    tokenizer = load_tokenizer(model)
    with open(sentences, encoding="utf-8") as file:
        ids = [tokenizer.encode(json.loads(line)["text"]) for line in file]
    ids = [row[:tokens] for row in ids if len(row) >= tokens][:count]
    if len(ids) < count:
        raise SystemExit(f"{sentences}: {len(ids)} rows of {tokens} tokens, needs {count}")
    target.write_text(json.dumps(ids), encoding="utf-8")
    return target


def write(path: str, machine: dict, settings: dict, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "settings": settings, "rows": rows}, file, indent=1)
