"""What torchrun starts: the runs of a plan, one after another, in the processes of one group.

The plan is a JSON file: {"float64": bool, "runs": [argv, …]}. Each rank writes its exit codes to
PLAN.rank, since a test cannot look into another process.
"""

import json
import os
import sys

import torch

from minirlhf.cli import main
from minirlhf.setup import grpo, ppo, training


def wide(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float64


def run(plan: str) -> None:
    with open(plan) as file:
        told = json.load(file)
    if told.get("float64"):
        for module in (grpo, ppo, training):
            module.choose_dtype = wide
    torch.set_num_threads(1)
    codes = [main(argv) for argv in told["runs"]]
    with open(f"{plan}.{os.environ.get('RANK', '0')}", "w") as file:
        json.dump(codes, file)


if __name__ == "__main__":
    run(sys.argv[1])
