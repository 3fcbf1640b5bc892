"""Ours and a peer in turns, each in a process of its own: what the scripts beside this share."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import hardware


def flags_of(doc: str) -> argparse.ArgumentParser:
    """The flags that all of them have; `--child` is how a script calls itself for one program."""
    flags = argparse.ArgumentParser(description=doc.splitlines()[0])
    flags.add_argument("--model", required=True)
    flags.add_argument("--data", help="folder that prepare.py made")
    flags.add_argument("--bfloat16", action="store_true", help="also in bfloat16")
    flags.add_argument("--rounds", type=int, default=2)
    flags.add_argument("--out")
    flags.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    return flags


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


def compare(found: dict[str, list[dict]], peers: dict, machine: dict) -> list[dict]:
    """A row a program: seconds, peak memory, how many times as fast as the fastest peer.

    Args:
        found: of `take_turns`, lines of {"seconds": [...], "peak_bytes"}; ours also have the
            floating-point "operations" of each, whose rate over the machine's peak is the roofline.
    """
    rows = []
    for name, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"]]
        row = {"program": name, **spread(seconds),
               "peak_gb": max(run["peak_bytes"] for run in runs) / 1e9}  # fmt: skip
        if "operations" in runs[0]:
            peak = machine["bfloat16_gflops" if "bfloat16" in name else "float32_gflops"]
            work = sum(sum(run["operations"]) for run in runs)
            row["roofline"] = work / 1e9 / peak / sum(seconds)
        rows.append(row)
    best = [row["median"] for row in rows if row["program"] in peers]
    for row in rows:
        row["ratio"] = min(best) / row["median"] if best else None
    return rows


def show(rows: list[dict], machine: dict) -> None:
    """Prints the rows of `compare`."""
    print(hardware.show(machine))
    print(f"{'':<36}{'median s':>10}{'lowest':>9}{'highest':>9}{'peak GB':>9}{'ratio':>8}"
          f"{'roofline':>10}")  # fmt: skip
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        share = f"{row['roofline']:.0%}" if "roofline" in row else ""
        print(f"{row['program']:<36}{row['median']:>10.2f}{row['lowest']:>9.2f}"
              f"{row['highest']:>9.2f}{row['peak_gb']:>9.2f}{ratio:>8}{share:>10}")  # fmt: skip


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
