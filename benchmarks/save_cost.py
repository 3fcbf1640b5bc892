#!/usr/bin/env python3
"""What hashing adds to a save, and what verifying a commit takes.

    python benchmarks/save_cost.py --megabytes 1600 --folder /somewhere/on/the/disk \
        --out benchmarks/results/save_cost.json

A save is a whole `save_checkpoint` of weights and two moments of a model that has not been trained:
the same writes, renames and fsyncs, once with the sha256 that goes into the manifest and once with
none, in turns, in an order that alternates. A commit is verified from the page cache, and after the
system was asked to forget its files. Prints one table and writes one json; times are medians.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from minirlhf import TrainState, save_checkpoint
from minirlhf.files import atomic
from minirlhf.run.checkpoint import verify


def make_state(megabytes: int) -> TrainState:
    """A third weights, two thirds moments, in tensors of 16 MB at most."""
    rows = [min(4_000_000, left) for left in range(megabytes * 1_000_000 // 12, 0, -4_000_000)]
    rng = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList(torch.randn(n, generator=rng) for n in rows)
    optimizer = torch.optim.Adam(model)
    for parameter in model:
        moments = {name: torch.randn_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0)} | moments
    return TrainState(model, optimizer)


@contextmanager
def without_hashing():
    """sha256 that does nothing; the manifest then lies, which only a reader would notice."""
    nothing = SimpleNamespace(update=lambda data: None, hexdigest=lambda: "0" * 64)
    atomic.hashlib = SimpleNamespace(sha256=lambda: nothing)
    try:
        yield
    finally:
        atomic.hashlib = hashlib


def seconds(act: Callable[[], object]) -> float:
    os.sync()  # what others have left to write is not ours to pay for
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def forget(commit: Path) -> None:
    """Asks the system to drop the files' pages."""
    for path in commit.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--megabytes", type=int, default=400, help="of weights and moments")
    flags.add_argument("--repeats", type=int, default=5, help="of each")
    flags.add_argument("--folder", default=None, help="where to write; default: the temporary one")
    flags.add_argument("--out", required=True)
    args = flags.parse_args()

    state = make_state(args.megabytes)
    times = {name: [] for name in ("without hashing", "with hashing", "verify", "verify, cold")}
    for repeat in range(args.repeats):
        kinds = ["without hashing", "with hashing"]
        for kind in kinds if repeat % 2 == 0 else kinds[::-1]:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                if kind == "without hashing":
                    with without_hashing():
                        times[kind].append(seconds(lambda f=folder: save_checkpoint(state, f)))
                    continue
                times[kind].append(seconds(lambda f=folder: save_checkpoint(state, f)))
                commit = Path(folder) / "step-00000000"
                size = sum(path.stat().st_size for path in commit.iterdir())
                times["verify"].append(seconds(lambda c=commit: verify(c)))
                forget(commit)
                times["verify, cold"].append(seconds(lambda c=commit: verify(c)))
                assert verify(commit) is None
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = medians["with hashing"] / medians["without hashing"] - 1
    print(f"{size / 1e9:.2f} GB, median of {args.repeats}\n")
    print(f"{'':<18}{'seconds':>9}{'s per GB':>10}{'lowest':>9}{'highest':>9}")
    for name, median in medians.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name:<18}{median:>9.3f}{median / size * 1e9:>10.3f}{low:>9.3f}{high:>9.3f}")
    print(f"\nhashing adds {added:.1%}")
    with open(args.out, "w", encoding="utf-8") as file:
        out = {
            "bytes": size,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": times,
            "medians": medians,
            "added_by_hashing": added,
        }
        json.dump(out, file, indent=1)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
