"""What this machine can do at most, measured in the same run as what is compared to it."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

# (rows, inner, columns) of one product: of a block of the model, of its unembedding, and a square
SHAPES = ((1536, 576, 1536), (1536, 1536, 576), (1024, 576, 49152), (2048, 2048, 2048))


def best_of(work, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the best of a few large matrix products."""
    rates = []
    for rows, inner, columns in SHAPES:
        x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        rates.append(2e-9 * rows * inner * columns / best_of(lambda x=x, w=w: F.linear(x, w), 3))
    return max(rates)


def read_bandwidth() -> float:
    """GB/s of summing 1 GB."""
    x = torch.ones(1 << 28)
    return 4e-9 * x.numel() / best_of(x.sum, 3)


def describe() -> dict:
    """The CPU, torch's threads, and the peaks of float32 and bfloat16 products."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return {
        "cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32_gflops": round(matmul_peak(torch.float32), 1),
        "bfloat16_gflops": round(matmul_peak(torch.bfloat16), 1),
        "read_gb_per_s": round(read_bandwidth(), 1),
    }


def at_least(machine: dict) -> dict:
    """The machine with its peaks measured once more, if they are higher: what else runs on it
    lowers them now and then, and a share of a peak must not be flattered by that."""
    again = describe()
    peaks = ("float32_gflops", "bfloat16_gflops", "read_gb_per_s")
    return machine | {name: max(machine[name], again[name]) for name in peaks}


def resident_peak() -> int:
    """Most bytes that this process has held; ru_maxrss would know its parent's too."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(ln.split()[1]) for ln in text.splitlines() if ln.startswith("VmHWM")) * 1024


def show(machine: dict) -> str:
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads, torch "
        f"{machine['torch']}: float32 {machine['float32_gflops']:g} GFLOP/s, bfloat16 "
        f"{machine['bfloat16_gflops']:g} GFLOP/s, reads {machine['read_gb_per_s']:g} GB/s"
    )


def child(command: list[str], env: dict | None = None) -> list[dict]:
    """Runs a program to its end; the JSON lines that it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    print(*found, sep="\n", file=sys.stderr)  # so that a later failure loses nothing
    return [json.loads(line) for line in found]
