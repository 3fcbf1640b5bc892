"""A rank that is killed, stopped, asked to stop, or fails: the others end, say why in one line, and
`--resume` goes on to the bytes of a run of as many ranks that nothing disturbed.

Each scenario is a run of PPO in two ranks, broken as `tests/ranks/faulty.py` says, and its resume.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from minirlhf.errors import BAD_INPUT, BUG, DISTRIBUTED, MACHINE, NON_FINITE, OK, STOPPED
from minirlhf.errors import REWARD_SERVICE as SERVICE
from tests.ranks.faulty import ALL
from tests.ranks.test_same_numbers import ROOT, make_folder
from tests.tiny_folders import leftovers, timeless

RUN = ["ppo", "--steps", "3", "--batch-size", "3", "--mini-batches", "1", "--epochs", "1",
       "--max-new-tokens", "3", "--micro-batch-size", "2", "--log-every", "1", "--save-every", "1",
       "--eval-every", "2", "--sample-every", "2", "--learning-rate", "1e-3",
       "--rank-timeout", "30"]
GO_ON = "the run stops: start it again with --resume: it goes on from the last checkpoint"
GONE = "rank {} is gone during {}"
ALONE = "rank {} failed during {}: {}"
FAULT = "ValueError: a fault of this rank"
FULL = "model.safetensors: No space left on device"
MEMORY = "out of memory: DefaultCPUAllocator: can't allocate memory: "
SERVER = "http://127.0.0.1:9/score"  # nobody listens there
RAISES = """
def letters(completions, **columns):
    raise ValueError("no such letter")
"""


class Case(NamedTuple):
    phase: str | None
    rank: int
    call: int
    how: str
    codes: tuple[int, int]
    line: str  # the one of stderr, without `error: `
    by: int  # the rank that says it
    words: tuple[str, ...] = ()  # of the command line besides


KILLED, ENDED = -9, DISTRIBUTED
CASES = {
    # ------------------------------------------------------------- killed, in each part of a run
    "killed in loading": Case("loading", 1, 1, "SIGKILL", (ENDED, KILLED), "the start", 0),
    "killed in sampling": Case("sampling", 1, 2, "SIGKILL", (ENDED, KILLED), "the start", 0),
    "killed in scoring": Case("scoring", 1, 3, "SIGKILL", (ENDED, KILLED), "the start", 0),
    "killed in update": Case("update", 1, 2, "SIGKILL", (ENDED, KILLED), "step 2", 0),
    "killed in last update": Case("update", 1, 3, "SIGKILL", (ENDED, KILLED), "step 3", 0),
    "killed in evaluation": Case("evaluation", 1, 2, "SIGKILL", (ENDED, KILLED), "step 2", 0),
    "killed in report": Case("report", 1, 2, "SIGKILL", (ENDED, KILLED), "step 1", 0),
    "killed in checkpoint": Case("checkpoint", 1, 3, "SIGKILL", (ENDED, KILLED), "step 2", 0),
    "killed, of shared weights": Case("update", 1, 2, "SIGKILL", (ENDED, KILLED), "step 2", 0,
                                      ("--parallel", "fsdp")),
    "killed in export": Case("export", 1, 1, "SIGKILL", (ENDED, KILLED), "the end", 0),
    "first killed in update": Case("update", 0, 2, "SIGKILL", (KILLED, ENDED), "", 1),
    "first killed in writing": Case("write", 0, 5, "SIGKILL", (KILLED, ENDED), "", 1),
    # ------------------------------------------------------------------------------------ stopped
    "stopped in sampling": Case("sampling", 1, 2, "SIGSTOP", (ENDED, ENDED), "", 0),
    "stopped in update": Case("update", 1, 2, "SIGSTOP", (ENDED, ENDED), "", 0),
    "first stopped in update": Case("update", 0, 2, "SIGSTOP", (ENDED, ENDED), "", 1),
    # ----------------------------------------------------------------------------------- by itself
    "fault in sampling": Case("sampling", 1, 2, "fault", (ENDED, BUG),
                              "rank 1: failed during the start: " + FAULT, 0),
    "fault in update": Case("update", 1, 2, "fault", (ENDED, BUG),
                            ALONE.format(1, "step 2", FAULT), 0),
    "first fault in update": Case("update", 0, 2, "fault", (BUG, ENDED),
                                  ALONE.format(0, "step 2", FAULT), 1),
    "memory in sampling": Case("sampling", 1, 2, "memory", (MACHINE, MACHINE), MEMORY, 0),
    "memory in update": Case("update", 1, 2, "memory", (ENDED, MACHINE),
                             ALONE.format(1, "step 2", MEMORY), 0),
    "nan in update": Case("update", 1, 2, "nan", (ENDED, NON_FINITE),
                          ALONE.format(1, "step 2", "step 2: grad_norm: is nan"), 0),
    "disk in checkpoint": Case("write", 0, 5, "disk", (MACHINE, MACHINE), FULL, 0),
    "disk in export": Case("fill", 0, 1, "disk", (MACHINE, MACHINE), FULL, 0),
    # --------------------------------------------------------------------------------------- alike
    "fault of all": Case("update", ALL, 2, "fault", (BUG, BUG), "", 0),
    "service": Case(None, 0, 0, "", (SERVICE, SERVICE), SERVER, 0,
                    ("--reward", SERVER, "--reward-retries", "0")),
    "function": Case(None, 0, 0, "", (BAD_INPUT, BAD_INPUT), "raises.py:3", 0,
                     ("--reward", "raises.py:letters")),
    "loss": Case(None, 0, 0, "", (NON_FINITE, NON_FINITE), "step 2: grad_norm", 0,
                 ("--weight-decay", "1e38")),
    "verbose": Case(None, 0, 0, "", (OK, OK), "", 0, ("--verbose",)),
    # ------------------------------------------------------------------------------------- signals
    "TERM in update": Case("update", 1, 2, "SIGTERM", (STOPPED, STOPPED), "", 0),
    "USR1 in update": Case("update", 1, 2, "SIGUSR1", (STOPPED, STOPPED), "", 0),
    "INT in sampling": Case("sampling", 1, 2, "SIGINT", (STOPPED, STOPPED), "", 0),
    "USR1 in evaluation": Case("evaluation", 1, 2, "SIGUSR1", (STOPPED, STOPPED), "", 0),
    "first TERM in update": Case("update", 0, 2, "SIGTERM", (STOPPED, STOPPED), "", 0),
    "twice in update": Case("update", 1, 2, "twice", (ENDED, 143), "step 2", 0),
}
QUICK = ("killed in update", "TERM in update")  # not resumed here
SLOW = ("killed in sampling", "killed, of shared weights", "fault in update", "disk in checkpoint",
        "function", "loss", "first TERM in update")
TIERS = dict.fromkeys(CASES, "long") | dict.fromkeys(SLOW, "slow") | dict.fromkeys(QUICK, "")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("world"))
    (folder / "raises.py").write_text(RAISES)
    return folder


def argv_of(world: Path, out: Path, words: tuple[str, ...] = ()) -> list[str]:
    here = {name: str(world / name) for name in ("lm", "rm", "prompts.jsonl", "raises.py:letters")}
    reward = () if "--reward" in words else ("--reward", here["rm"])
    named = ["--model", here["lm"], "--data", here["prompts.jsonl"], "--eval-data",
             here["prompts.jsonl"], "--out", str(out), *reward]
    return [*RUN, *named, *(here.get(word, word) for word in words)]


def serve(folder: Path, plans: list[dict]) -> dict[str, list[dict]]:
    for plan in plans:
        plan["said"] = str(folder / plan["name"].replace(" ", "-"))
    (folder / "plans.json").write_text(json.dumps(plans))
    server = subprocess.run(
        [sys.executable, "-m", "tests.ranks.faulty", str(folder / "plans.json")], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200,
    )
    assert server.returncode == 0, server.stderr
    return json.loads((folder / "plans.json.done").read_text())


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The folder of all runs of some cases, and what became of each and of its resume."""

    @cache
    def made(names: tuple[str, ...]) -> tuple[Path, dict[str, list[dict]]]:
        here = tmp_path_factory.mktemp("runs")
        whole = {"name": "whole", "argv": argv_of(world, here / "out-whole")}
        plans = [] if names == QUICK else [whole]
        for name in names:
            case = CASES[name]
            argv = argv_of(world, here / f"out-{name}", case.words)
            if case.how == "SIGSTOP":  # found by time alone
                argv[argv.index("--rank-timeout") + 1] = "3"
            fault = {"phase": case.phase, "rank": case.rank, "call": case.call, "how": case.how}
            plans.append({"name": name, "argv": argv, **fault})
            if not case.words and names != QUICK:
                plans.append({"name": f"{name}, resumed", "argv": [*argv, "--resume"]})
        return here, serve(here, plans)

    return made


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[getattr(pytest.mark, tier)] if tier else [])
    for name, tier in TIERS.items()
])
def test_the_others_end_and_a_resume_goes_on(name, runs):
    quick, codes = name in QUICK, CASES[name].codes  # each group by one server
    group = [n for n in CASES if TIERS[n] == TIERS[name] and CASES[n].codes == codes]
    here, done = runs(QUICK if quick else tuple(group))
    case, (first, second) = CASES[name], done[name]
    said = [first["said"], second["said"]]
    assert (first["code"], second["code"]) == case.codes, said
    assert not first["orphans"]
    telling = said[case.by : case.by + 1] if first["woken"] or second["woken"] else said
    lines = [line for text in telling for line in text.splitlines() if line.startswith("error: ")]
    asked = [line for text in said for line in text.splitlines() if line.startswith("stopping")]
    if case.codes == (STOPPED, STOPPED):
        assert (len(asked), lines) == (1, []), said
    elif case.codes == (OK, OK):
        assert done["whole"][1]["said"] == "" and not lines
        assert all("detected prompts" in text and "policy loss" in text for text in said)
    elif case.rank == ALL:  # rank 0 shows where it was
        assert [text.count(FAULT) for text in said] == [1, 0] and not lines, said
    else:
        assert not asked
        (line,) = lines
        assert line in said[case.by] and case.line in line
    if KILLED in case.codes:
        assert f"rank {case.rank}" in line and line.endswith(GO_ON)
    if case.how == "SIGSTOP":
        assert re.search(rf"rank {case.rank} silent for 3 s during (the start|step 2)", line)
    whole = here / "out-whole"
    if f"{name}, resumed" in done:
        assert [rank["code"] for rank in done[f"{name}, resumed"]] == [OK, OK]
        out = here / f"out-{name}"
        assert timeless(out) == timeless(whole) and not leftovers(out)
        for file in ("samples.jsonl", "model/model.safetensors",
                     "checkpoints/step-00000003/optimizer.safetensors"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), file
