"""Where a run computes, how much memory its process holds, and how much the machine still has."""

import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import minirlhf
from minirlhf import ranks, shards
from minirlhf.errors import UserError, printable

# Variables by which the libraries under torch are told which kernels to take, or how to round.
CHOOSES = re.compile(
    r"(MKL_(?!NUM_THREADS)|ONEDNN_|DNNL_|ATEN_CPU_CAPABILITY|OPENBLAS_CORETYPE|NVIDIA_TF32|CUBLAS_)"
)
DEVICES = "auto, cuda, cuda:N, mps (Apple GPUs) or cpu"
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class Machine(NamedTuple):
    free: int  # bytes
    limit: str  # what sets the limit


def choose_device(name: str) -> str:
    """`auto` is the first GPU of NVIDIA or AMD, or else Apple's, or else the CPU."""
    if name == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        return "cuda" if torch.cuda.is_available() else apple
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        what = f"{name!r} cannot be used (it is neither cpu nor a GPU)"
        raise UserError("--device", what, f"use {DEVICES}")
    try:
        if name == "mps" and not torch.backends.mps.is_built():  # of which torch says a page
            raise RuntimeError("this torch is built without Metal, which Apple GPUs need")
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = printable(str(error).splitlines()[0], 100)
        raise UserError("--device", f"{name!r} cannot be used ({reason})", "use cpu") from error
    return name


def choose_dtype(name: str) -> torch.dtype:
    """Dtype of weights and passes; `auto` is float32, which is exact everywhere."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def make_deterministic(device: str) -> None:
    """Makes every run on a CPU give the same bits. On a GPU torch would refuse the cumsum of
    sampling, and cuBLAS wants a workspace setting; of Apple's it promises nothing.

    It imports 70 MB, which the optimizer would import anyway: called late, so that a refusal need
    not wait for it, and before `process_bytes`, so that the estimate counts it.
    """
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", (PROC / "cpuinfo").read_text(), re.M)
    except OSError:
        names = None
    return names[1] if names else platform.processor() or platform.machine()


def environment(model: nn.Module) -> dict[str, object]:
    """What else the last bit of a sum depends on."""
    weight = next(model.parameters())
    on_gpu = weight.device.type == "cuda"
    return {
        "minirlhf": minirlhf.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),  # that share a pass, each row read beside others
        "device": torch.cuda.get_device_name(weight.device) if on_gpu else weight.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),  # by which MKL and oneDNN choose their kernels
        "kernels": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if CHOOSES.match(k)),
        "dtype": str(shards.stored_dtype(weight)).removeprefix("torch."),
    }


def process_bytes(device: str = "cpu", proc: Path = PROC) -> int:
    """Resident bytes of this process; 0 for a GPU, whose free memory has them taken off already.

    An Apple GPU shares the memory of the CPU, but has a limit of its own in it."""
    if device != "cpu":
        return 0
    status = proc / "self/status"
    if not status.exists():  # the largest so far, in KiB on Linux and in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _kilobytes(status.read_text(encoding="utf-8"), "VmRSS")


def peak_bytes(device: str = "cpu") -> int:
    """Most memory held so far: resident by this process, or taken by torch on a GPU.

    Of an Apple GPU no such number is kept. What Metal holds for the process is near it, since torch
    keeps what is freed for the next tensors."""
    if torch.device(device).type == "mps":
        return torch.mps.driver_allocated_memory()
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kilobytes(text: str, name: str) -> int:
    """Bytes of a line such as `MemAvailable:  1234 kB`."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no line {name!r}: not a file of /proc?")
    return int(found[1]) * 1024


def cgroup_free(groups: str, root: Path) -> int | None:
    """Bytes until the first limit of this process's control groups; None where there is none.

    Usage counts the cache of files, of which the inactive part is given back when memory is short.

    Args:
        groups: text of /proc/self/cgroup: `0::/path` is version 2, `N:memory:/path` version 1.
        root: where they are mounted.
    """
    least = None
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if (number, controllers) == ("0", ""):
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            top = root / "memory"
        else:
            continue
        # Inside a container the path may be the host's: what is mounted is then the top alone.
        parts = Path(path).parts[1:]
        for folder in [top.joinpath(*parts[:n]) for n in range(len(parts) + 1)]:
            if (folder / names[0]).is_file() and (folder / names[1]).is_file():
                limit, used = ((folder / n).read_text().strip() for n in names[:2])
                if limit != "max":
                    stat = folder / "memory.stat"
                    text = stat.read_text() if stat.is_file() else ""
                    cache = re.search(rf"^{names[2]} (\d+)$", text, re.MULTILINE)
                    free = int(limit) - int(used) + (int(cache[1]) if cache else 0)
                    least = free if least is None else min(least, free)
    return least


def free_memory(device: str = "cpu", proc: Path = PROC, groups: Path = CGROUPS) -> Machine:
    """What this process may still take, and which limit says so.

    Of a CPU: the least of what the system can give without swapping, what is left of the control
    groups' limits, and what is left of the address space (`ulimit -v`). Of an Apple GPU: what Metal
    recommends to take at most, less what it holds for this process.
    """
    if torch.device(device).type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Machine(free, device)
    if device != "cpu":
        return Machine(torch.cuda.mem_get_info(device)[0], device)
    found = []
    if (proc / "meminfo").exists():
        text = (proc / "meminfo").read_text(encoding="utf-8")
        found.append(Machine(_kilobytes(text, "MemAvailable"), "MemAvailable"))
    else:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found.append(Machine(size, "physical memory"))
    if (proc / "self/cgroup").exists():
        free = cgroup_free((proc / "self/cgroup").read_text(encoding="utf-8"), groups)
        found += [] if free is None else [Machine(free, "the cgroup's limit")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        status = (proc / "self/status").read_text(encoding="utf-8")
        found.append(Machine(limit - _kilobytes(status, "VmSize"), "ulimit -v"))
    return min(found)
