"""The processes of one run: started by torchrun, joined here, and watched until they end.

    torchrun --nproc-per-node 2 -m minirlhf ppo …

`start` joins them by torch.distributed: gloo on CPUs, nccl on CUDA. A process may be killed,
stopped or cut off, and a collective would then wait for it for ever. So each gives a sign of life
every second in the store of torchrun's launcher, and looks for those of the others: where one is
missing for `rank_timeout` seconds, or one has failed by itself, the others end with exit code 6.
Nothing is lost by that: rank 0 alone writes, and all that it writes is whole or not there.
"""

import atexit
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Protocol

import torch

from minirlhf import console, errors, ranks
from minirlhf.errors import DISTRIBUTED, UserError, printable
from minirlhf.run.machine import choose_device

BEAT = 1.0  # seconds between two signs of life
GRACE = 3.0  # in which all ranks may end with the same error, each by itself
PATIENCE = timedelta(days=7)  # of torch's collectives: a reward service may take its time
DONE = "done"


class StartSettings(Protocol):
    """The settings that `start` reads."""

    device: str
    dtype: str
    parallel: str | None
    rank_timeout: float
    verbose: bool


def start(config: StartSettings) -> str:
    """Joins the processes that torchrun started, if it did; returns the device of this one.

    Raises:
        UserError: a device that is not there; --parallel without torchrun; processes that do not
            find each other (exit code 6).
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel and "RANK" not in os.environ:
        do = "start it by torchrun --nproc-per-node 2 -m minirlhf …"
        raise UserError("--parallel", f"is {config.parallel}, and this is a single process", do)
    if count == 1:
        return choose_device(config.device)
    if ranks.count() > 1:  # a second run of the same process
        return ranks.device()
    if config.dtype == "bfloat16":  # its gradients are added up in float32
        do = "leave out --dtype bfloat16, or start one process"
        raise UserError("--dtype", "is bfloat16, and DistributedDataParallel would round sums", do)
    number = int(os.environ["RANK"])
    if number > 0 and not config.verbose:
        console.mute()
    device = _device_of(config.device)
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=config.rank_timeout)
    try:
        store, number, count = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        watch = Watch(store.clone(), number, count, config.rank_timeout)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("minirlhf", store), rank=number, world_size=count,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        where = "{MASTER_ADDR}:{MASTER_PORT}".format_map({"MASTER_ADDR": "", **os.environ})
        what = f"the processes do not find each other ({printable(error, 160)})"
        raise UserError(where, what, "give torchrun another --master-port", DISTRIBUTED) from None
    ranks.join(number, count, device)
    watch.start()
    errors.explained_by(watch.explain)
    atexit.register(watch.leave)
    return device


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


class Watch(threading.Thread):
    """Looks for the other ranks, and ends this process where one of them is gone.

    Args:
        store: that all ranks read and write; a connection of its own.
        timeout: seconds.
    """

    def __init__(self, store: "torch.distributed.Store", number: int, count: int, timeout: float):
        super().__init__(daemon=True, name="watch")
        self.store, self.number, self.timeout = store, number, timeout
        self.others = [rank for rank in range(count) if rank != number]
        self.beats = 0
        self.seen = {rank: (b"", time.monotonic()) for rank in self.others}  # and when it changed
        self.gone: dict[int, tuple[str, float]] = {}  # why, and since when
        self.every, self.ended = min(BEAT, timeout / 5), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(self.every):
            try:
                self.look()
            except (RuntimeError, OSError):  # the launcher is gone, and with it the others
                self.end(f"the launcher is lost during {ranks.place()}")
            if (verdict := self.verdict()) is not None:
                self.end(verdict)

    def look(self) -> None:
        """Gives a sign of life, and reads those of the others."""
        self.beats += 1
        self.store.set(f"beat/{self.number}", str(self.beats))
        now = time.monotonic()
        for rank in self.others:
            if rank not in self.gone and self.store.check([f"left/{rank}"]):
                self.gone[rank] = self.store.get(f"left/{rank}").decode(), now
            if self.store.check([f"beat/{rank}"]):
                beat = self.store.get(f"beat/{rank}")
                if beat != self.seen[rank][0]:
                    self.seen[rank] = beat, now

    def verdict(self) -> str | None:
        """Why this process must end; None while nothing is known against any of the others."""
        now = time.monotonic()
        for rank, (why, since) in self.gone.items():
            if why != DONE and now - since > GRACE:
                return f"rank {rank} failed during {why}"
        for rank in self.silent(self.timeout):
            return f"rank {rank} silent for {self.timeout:g} s during {ranks.place()}"
        return None

    def silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in self.seen.items()
                if rank not in self.gone and now - since > seconds]

    def end(self, why: str) -> None:
        """Leaves at once: the main thread may wait in a collective for ever."""
        lower = [rank for rank in self.others if rank < self.number]
        silent = set(self.silent(3 * self.every)) | self.gone.keys()
        if not set(lower) - silent:  # the first of those that are left says it
            os.write(2, f"error: {ranks.lost(why, 'the run stops')}\n".encode())
        os._exit(DISTRIBUTED)

    def explain(self, error: BaseException) -> UserError | None:
        """What an error of a collective comes from, if a rank is gone; None of other errors."""
        until = time.monotonic() + GRACE + 3 * self.every
        of_collective = any(word in str(error).lower() for word in ("gloo", "nccl", "connection"))
        while of_collective and time.monotonic() < until:
            time.sleep(self.every)
            for rank, (why, _) in self.gone.items():
                if why != DONE:
                    return ranks.lost(f"rank {rank}", f"failed during {why}")
            for rank in self.silent(3 * self.every):
                return ranks.lost(f"rank {rank}", f"is gone during {ranks.place()}")
        if of_collective:
            what = f"was lost during {ranks.place()} ({printable(error, 120)})"
            return ranks.lost("a rank", what)
        return None

    def leave(self) -> None:
        """Tells the others how this process ended."""
        self.ended.set()
        why = errors.told() or str(getattr(sys, "last_value", ""))
        text = f"{ranks.place()}: {why}" if why else DONE
        try:
            self.store.set(f"left/{self.number}", text)
        except (RuntimeError, OSError):
            pass  # nobody is left who could read it
