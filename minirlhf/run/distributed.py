"""The processes of one run: started by torchrun, joined here, and parted where they end.

    torchrun --nproc-per-node 2 -m minirlhf ppo …

`start` joins them by torch.distributed: gloo on CPUs, nccl on CUDA. From then on `run/watch.py`
looks after them.
"""

import atexit
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar

import torch

from minirlhf import console, errors, ranks
from minirlhf.errors import DISTRIBUTED, UserError, printable
from minirlhf.run.machine import choose_device
from minirlhf.run.watch import DONE, Watch

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # of torch's collectives: a reward service may take its time
COME = timedelta(seconds=30)  # the longest wait for a launcher that does not answer
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StartSettings(Protocol):
    """The settings that `start` reads."""

    device: str
    dtype: str
    parallel: str | None
    offload_params: bool
    rank_timeout: float
    verbose: bool


def start(config: StartSettings) -> str:
    """Joins the processes that torchrun started, if it did; returns the device of this one.

    Raises:
        UserError: a device that is not there; --parallel without torchrun; what does not go with
            several processes; processes that do not find each other (exit code 6).
    """
    if config.parallel and "RANK" not in os.environ:
        do = "start it by torchrun --nproc-per-node 2 -m minirlhf …"
        raise UserError("--parallel", f"is {config.parallel}, and this is a single process", do)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        device = choose_device(config.device)
        _check_kind(config, device, 1)
        return device
    if config.dtype == "bfloat16" and config.parallel != "fsdp":  # gradients are of float32
        do = "give --parallel fsdp, leave out --dtype bfloat16, or start one process"
        raise UserError("--dtype", "is bfloat16, and DistributedDataParallel would round sums", do)
    if ranks.count() > 1:  # a second run of the same process
        _check_kind(config, ranks.device(), ranks.count())
        return ranks.device()
    number, count = _place()
    if number > 0 and not config.verbose:
        console.mute()
    device = _device_of(config.device)
    _check_kind(config, device, count)
    _join(number, count, device, config.rank_timeout)
    ranks.join(number, count, device)
    return device


def _place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    do = "start it by torchrun, which sets it"
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise UserError(missing[0], "is not set, and WORLD_SIZE is", do)
    told = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    for name, text in zip(("RANK", "WORLD_SIZE", "MASTER_PORT"), told, strict=True):
        if not text.isdecimal():
            raise UserError(name, f"is {printable(text, 40)}, and no number", do)
    number, count, port = map(int, told)
    if number >= count or port >= 2**16:
        what = f"is {port}" if port >= 2**16 else f"is {number}, and there are {count} processes"
        raise UserError("MASTER_PORT" if port >= 2**16 else "RANK", what, do)
    return number, count


def _check_kind(config: StartSettings, device: str, count: int) -> None:
    if config.offload_params and (count == 1 or torch.device(device).type == "cpu"):
        what = "there is one process" if count == 1 else "the device is a CPU, where all is already"
        raise UserError("--offload-params", what, "leave it out: fsdp on GPUs has use for it")


def _device_of(name: str) -> str:
    """That of this process: of CUDA devices each takes one."""
    if name.startswith("cuda:"):
        what = f"is {name}, and torchrun started several processes"
        raise UserError("--device", what, "give cuda: each takes a device of its own")
    device = choose_device(name)
    if device != "cuda":
        return device
    here, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= there:
        what = f"there are {there}, and this is process {here + 1} of the machine"
        raise UserError("--device", what, f"give torchrun --nproc-per-node {there}")
    torch.cuda.set_device(here)
    return f"cuda:{here}"


def _join(number: int, count: int, device: str, timeout: float) -> None:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    limit, where = timedelta(seconds=timeout), "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
    store = None
    try:
        wait = min(limit, COME)
        store, number, count = _within(wait, lambda: next(rendezvous("env://", timeout=wait)))
        store.set_timeout(limit)
        store.set(f"come/{number}", "")
        store.wait([f"come/{rank}" for rank in range(count)], limit)
        watch = Watch(dist.PrefixStore("watch", store.clone()), number, count, timeout)
        watch.start()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE,
            store=dist.PrefixStore("minirlhf", store), rank=number, world_size=count,
        )
    except (RuntimeError, ValueError) as error:
        raise _not_found(where, store, count, timeout, error) from None
    errors.heard_by(watch.hear)
    atexit.register(_part, watch)


def _part(watch: Watch) -> None:
    watch.part()
    if watch.word == DONE:  # else another one might be waited for
        torch.distributed.destroy_process_group()


def _within(limit: timedelta, function: Callable[[], T]) -> T:
    """What a function returns or raises, which may wait for ever: of whoever has taken a port,
    torch awaits an answer without end."""
    made = []

    def call() -> None:
        try:
            made.append((function(), None))
        except Exception as error:
            made.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit.total_seconds() + 1.0)
    result, error = made[0] if made else (None, RuntimeError("no answer in time"))
    if error is not None:
        raise error
    return result


def _not_found(
    where: str, store: "torch.distributed.Store | None", count: int, timeout: float,
    error: Exception,
) -> UserError:
    try:
        late = [r for r in range(count) if store is not None and not store.check([f"come/{r}"])]
    except RuntimeError:
        late = []
    if late:
        what = f"rank {', '.join(map(str, late))} of {count} did not come within {timeout:g} s"
        return UserError(where, what, "look at its own words", DISTRIBUTED)
    what = f"the processes do not find each other ({printable(error, 160)})"
    return UserError(where, what, "start all of them, on a free --master-port", DISTRIBUTED)
