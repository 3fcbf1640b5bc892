"""Runs of several ranks that break at a chosen place of a chosen rank, and what became of them.

As a script it is a fork server, as `tests/kill_harness.py`: it has imported torch and not computed
yet, and forks the ranks of each run that is asked for, so that a run starts in milliseconds. They
find each other by MASTER_PORT, as torchrun's do; rank 0 holds their store.

A plan: {"name", "argv", "count": 2, "phase", "rank", "call": 1, "how"}; without a phase nothing
breaks. Of each rank comes back {"code", "said", "woken"}.
"""

import atexit
import errno
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from functools import wraps
from pathlib import Path

import torch

from minirlhf.cli import OF_RANKS, VERBS, main
from minirlhf.run import watch

PHASES = {  # what every rank calls there
    "loading": "minirlhf.setup.ppo:load_policy",
    "sampling": "minirlhf.batches.collect:generate",
    "scoring": "minirlhf.rewards.model:score_texts",
    "update": "minirlhf.run.optim:clip_gradients",
    "evaluation": "minirlhf.recipes.ppo:evaluate_sets",
    "report": "minirlhf.run.folder:Run.log",
    "checkpoint": "minirlhf.run.folder:Run.save",
    "write": "minirlhf.files.atomic:write_tensors",
    "fill": "minirlhf.files.atomic:write_folder",
    "export": "minirlhf.run.folder:Run.export",
}
ALL = -1  # ranks
LIMIT = 60.0  # seconds until what still lives has hung


def breaks(how: str, arguments: tuple) -> None:
    """Does to this process what is to be survived."""
    match how:
        case "fault":
            raise ValueError("a fault of this rank")
        case "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
        case "nan":
            trained = [p for p in arguments[0].parameters() if p.grad is not None]
            trained[0].grad.fill_(float("nan"))
        case "twice":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def break_at(phase: str, call: int, how: str) -> None:
    """Lets the call of this number, of what happens in a phase, break."""
    module, _, path = PHASES[phase].partition(":")
    owner, calls = importlib.import_module(module), 0
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @wraps(function)
    def broken(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            breaks(how, args)
        return function(*args, **kwargs)

    setattr(owner, name, broken)


def be_rank(plan: dict, number: int, count: int, port: int) -> None:
    os.setsid()
    told = os.open(f"{plan['said']}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        torch.set_num_threads(1)
        watch.GRACE = 2.0
        if plan.get("phase") and plan["rank"] in (number, ALL):
            break_at(plan["phase"], plan.get("call", 1), plan["how"])
        code = main(plan["argv"])
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.last_value = error  # as Python itself does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code or 0)


def free_port() -> int:
    with socket.socket() as asks:
        asks.bind(("127.0.0.1", 0))
        return asks.getsockname()[1]


def run(plan: dict) -> list[dict]:
    """Forks the ranks, and waits for them. One that only stands still is woken at the end."""
    count, port, ranks = plan.get("count", 2), free_port(), []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            be_rank(plan, number, count, port)
        ranks.append(pid)
    codes, woken, until = {}, set(), time.monotonic() + LIMIT
    while len(codes) < count and time.monotonic() < until:
        for pid in ranks:
            if pid in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                woken.add(pid)
            elif ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if woken and len(codes) + len(woken) >= count:
            for pid in woken - codes.keys():
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    for pid in ranks:
        if pid not in codes:  # it hung
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    left = orphans(set(ranks))
    return [{"code": codes.get(pid), "said": Path(f"{plan['said']}.{number}").read_text(),
             "woken": pid in woken, "orphans": left} for number, pid in enumerate(ranks)]


def orphans(sessions: set[int]) -> list[str]:
    """What still lives of these sessions, a second after their leaders have ended."""
    until = time.monotonic() + 1.0
    while True:
        left = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                head, _, rest = stat.read_text().rpartition(")")
                if int(rest.split()[3]) in sessions and rest.split()[0] != "Z":
                    left.append(head)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


def serve(place: str) -> None:
    """Runs the plans of PLACE, one after another; writes what became of them to PLACE.done."""
    importlib.import_module("torch._dynamo")  # as DDP does: once, and not in each rank
    for verb in OF_RANKS:
        importlib.import_module(VERBS[verb].module)
    with open(place) as file:
        plans = json.load(file)
    done = {plan["name"]: run(plan) for plan in plans}
    with open(f"{place}.done", "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    serve(sys.argv[1])
