"""What torchrun starts in tests of faults: a run that breaks at a chosen place of a chosen rank.

The plan is a JSON file: {"argv": […], "phase": …, "rank": 0 or 1, "step": 1, "how": …}. Each rank
writes the code that it ended with to PLAN.rank, where it lives to say so.
"""

import errno
import importlib
import json
import os
import signal
import sys
import time
from functools import wraps

import torch

from minirlhf.cli import main

PHASES = {  # what every rank calls there
    "sampling": "minirlhf.batches.collect:generate",
    "scoring": "minirlhf.rewards.model:score_texts",
    "update": "minirlhf.run.optim:clip_gradients",
    "evaluation": "minirlhf.recipes.ppo:evaluate_sets",
    "report": "minirlhf.run.folder:Run.log",
    "checkpoint": "minirlhf.run.folder:Run.save",
    "write": "minirlhf.files.atomic:write_tensors",
    "export": "minirlhf.run.folder:Run.export",
    "starting": "minirlhf.setup.training:read_rows",
}


def breaks(how: str) -> None:
    """Does to this process what is to be survived."""
    match how:
        case "exception":
            raise ValueError("a fault of this rank")
        case "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
        case "exit":
            os._exit(9)
        case "twice":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        case "launcher":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)  # until it has passed it on
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def break_at(phase: str, step: int, how: str) -> None:
    """Lets the call number `step` of what happens in a phase break."""
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
        if calls == step:
            if how == "nan":
                return function(args[0], args[1], *args[2:]) * float("nan")
            breaks(how)
        return function(*args, **kwargs)

    setattr(owner, name, broken)


def run(plan: str) -> int:
    with open(plan) as file:
        told = json.load(file)
    torch.set_num_threads(1)
    if told.get("rank") == int(os.environ.get("RANK", "0")):
        break_at(told["phase"], told["step"], told["how"])
    code = main(told["argv"])
    with open(f"{plan}.{os.environ.get('RANK', '0')}", "w") as file:
        json.dump(code, file)
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
