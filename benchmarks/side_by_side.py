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


def read_flags(flags: argparse.ArgumentParser) -> argparse.Namespace:
    args = flags.parse_args()
    if not (args.child or args.data):
        flags.error("--data is needed: python benchmarks/prepare.py DIR makes it")
    return args


def several(text: str) -> int:
    """A count of things of which the first is not measured."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: the first is not counted, so 2 or more")
    return int(text)


def take_turns(ours: dict, peers: dict, rounds: int) -> tuple[dict[str, list[dict]], dict]:
    """(name -> the JSON lines of all its rounds, the machine).

    Args:
        ours, peers: name -> (command, environment or None). A machine drifts, so all of them run
            once a round, every other round in the opposite order, and its peaks are the highest of
            those measured before, between and after the rounds.
    """
    programs = {**ours, **peers}
    found: dict[str, list[dict]] = {name: [] for name in programs}
    machine = hardware.describe()
    for number in range(rounds):
        for name in list(programs) if number % 2 == 0 else reversed(programs):
            command, env = programs[name]
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            found[name].extend(hardware.child(command, env))
        machine = hardware.at_least(machine)
    return found, machine


def spread(seconds: list[float]) -> dict:
    return {
        "median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds),
        "count": len(seconds),
    }


def compare(found: dict[str, list[dict]], peers: dict, machine: dict) -> list[dict]:
    """A row a program: seconds, peak memory, how many times as fast as the fastest peer.

    Args:
        found: of `take_turns`, lines of {"seconds": [...], "peak_bytes"}. Where the work of a step
            varies there are its "tokens" too, and programs are compared by tokens a second, else by
            their medians. Ours also have the floating-point "operations" of each step, whose rate
            over the machine's peak is the roofline, and the seconds of its "phases".
    """
    rows = []
    for name, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"]]
        row = {"program": name, **spread(seconds),
               "peak_gb": max(run["peak_bytes"] for run in runs) / 1e9}
        row["rate"] = 1 / row["median"]
        if "tokens" in runs[0]:
            row["rate"] = sum(sum(run["tokens"]) for run in runs) / sum(seconds)
            row["tokens_per_s"] = row["rate"]
        if "operations" in runs[0]:
            peak = machine["bfloat16_gflops" if "bfloat16" in name else "float32_gflops"]
            work = sum(sum(run["operations"]) for run in runs)
            row["roofline"] = work / 1e9 / peak / sum(seconds)
        if "phases" in runs[0]:
            row["phases"] = {
                name.removeprefix("time/"): statistics.median(
                    [s for run in runs for s in run["phases"][name]])
                for name in runs[0]["phases"]
            }
        rows.append(row)
    best = [row["rate"] for row in rows if row["program"] in peers]
    for row in rows:
        rate = row.pop("rate")
        row["ratio"] = rate / max(best) if best else None
    return rows


def show(rows: list[dict], machine: dict) -> None:
    """Prints the rows of `compare`."""
    print(hardware.show(machine))
    print(f"{'':<30}{'median s':>10}{'lowest':>9}{'highest':>9}{'peak GB':>9}{'tokens/s':>10}"
          f"{'ratio':>8}{'roofline':>10}")
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        tokens = f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else ""
        share = f"{row['roofline']:.0%}" if "roofline" in row else ""
        print(f"{row['program']:<30}{row['median']:>10.2f}{row['lowest']:>9.2f}"
              f"{row['highest']:>9.2f}{row['peak_gb']:>9.2f}{tokens:>10}{ratio:>8}"
              f"{share:>10}")


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
