"""Ranks as torchrun starts and ends them: when one ends it sends SIGTERM to the others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minirlhf.errors import OK
from tests.ranks import worker
from tests.ranks.test_faults import argv_of
from tests.ranks.test_same_numbers import ROOT, make_folder, torchrun
from tests.tiny_folders import leftovers, timeless

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SLOW = """
import os
import time

def slowly(completions, **columns):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("world"))
    (folder / "slow.py").write_text(SLOW)
    return folder


def command(world: Path, out: Path, *more: str) -> list[str]:
    argv = argv_of(world, out, ("--reward", f"{world / 'slow.py'}:slowly"))
    argv[argv.index("--steps") + 1] = "8"
    return [*argv, *more]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What two ranks make that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    plan = out.with_suffix(".json")
    plan.write_text(json.dumps({"runs": [command(world, out)]}))
    assert torchrun(plan).returncode == 0
    return out


def ranks_of(launcher: int) -> list[int]:
    """The processes that it started, in order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()]


def disturbed(world: Path, out: Path, disturb) -> tuple[int, str, list[int]]:
    """Does something to (launcher, ranks) in the midst of a run; its code, its words, what lives of
    it when it has ended."""
    launched = subprocess.Popen(
        [*COMMAND, "--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m",
         "minirlhf", *command(world, out)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLOW": "0.5"},
    )
    log = out / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert launched.poll() is None, launched.stdout.read()
        time.sleep(0.05)
    ranks = ranks_of(launched.pid)
    assert len(ranks) == 2
    disturb(launched.pid, ranks)
    said, _ = launched.communicate(timeout=90)  # all that write there have ended
    return launched.returncode, said, [pid for pid in ranks if lives(pid)]


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def told(said: str) -> tuple[list[str], int]:
    lines = said.splitlines()
    return [x for x in lines if x.startswith("error: ")], sum("stopping at" in x for x in lines)


DISTURBANCES = {
    "a rank is killed": (lambda _, ranks: os.kill(ranks[1], signal.SIGKILL), "rank 1 is gone"),
    "the first is killed": (lambda _, ranks: os.kill(ranks[0], signal.SIGKILL), "rank 0 is gone"),
    "the launcher is killed": (lambda torchrun, _: os.kill(torchrun, signal.SIGKILL),
                               "rank 0 or its launcher, at "),
    "a rank is asked to stop": (lambda _, ranks: os.kill(ranks[1], signal.SIGUSR1), None),
    "the launcher is asked to stop": (lambda torchrun, _: os.kill(torchrun, signal.SIGTERM), None),
    "notice by Slurm": (lambda torchrun, _: os.kill(torchrun, signal.SIGUSR1), None),
    "Ctrl-C": (lambda torchrun, _: os.kill(torchrun, signal.SIGINT), None),
}


@pytest.mark.long
@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_run_is_disturbed_and_goes_on(name, world, whole, tmp_path):
    disturb, why = DISTURBANCES[name]
    out = tmp_path / "out"
    code, said, left = disturbed(world, out, disturb)
    errors, asked = told(said)
    assert code != 0 and not left, said
    if why is None:
        assert (errors, asked) == ([], 1), said
    else:
        assert len(errors) == 1 and errors[0].startswith(f"error: {why}"), said
        assert asked == 0 and "during step " in errors[0], said
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"runs": [command(world, out, "--resume")]}))
    again = torchrun(plan)
    assert again.returncode == 0, again.stderr
    assert timeless(out) == timeless(whole) and not leftovers(out)
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.long
def test_a_busy_port_of_the_launcher(world, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        made = subprocess.run(
            [*COMMAND, "--master-addr", "127.0.0.1", "--master-port", port, "-m", "minirlhf",
             *command(world, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
            timeout=60,
        )
    assert made.returncode != 0 and "EADDRINUSE" in made.stderr  # torchrun's own words
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_wrong_word_is_told_once(world, tmp_path):
    made = subprocess.run(
        [*COMMAND, "--standalone", "-m", "minirlhf",
         *command(world, tmp_path / "out", "--stepz", "3")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )
    errors, _ = told(made.stderr)
    assert len(errors) == 1 and "--stepz" in errors[0]


@pytest.mark.slow
def test_one_two_and_one_process_give_the_numbers_of_one(world, tmp_path, monkeypatch):
    """In float64; checkpoints hold full tensors, whoever made them."""
    for module in (worker.grpo, worker.ppo, worker.training):  # which a run changes
        monkeypatch.setattr(module, "choose_dtype", module.choose_dtype)
    more = ("--adam-epsilon", "1e-3", "--schedule", "constant", "--allow-setting-change")
    plans = {name: tmp_path / f"{name}.json" for name in ("one", "first", "second", "third")}
    for name, plan in plans.items():
        argv = command(world, tmp_path / ("one" if name == "one" else "mixed"), *more)
        argv[argv.index("--steps") + 1] = {"first": "2", "second": "4"}.get(name, "6")
        argv += ["--resume"] if name in ("second", "third") else []
        plan.write_text(json.dumps({"float64": True, "runs": [argv]}))
    worker.run(str(plans["one"]))
    worker.run(str(plans["first"]))
    assert torchrun(plans["second"]).returncode == 0
    worker.run(str(plans["third"]))
    codes = [json.loads(Path(f"{plan}.0").read_text()) for plan in plans.values()]
    assert codes == [[OK]] * 4
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    assert len(timeless(one)) == len(timeless(mixed))
    for first, second in zip(timeless(one), timeless(mixed), strict=True):
        assert second == pytest.approx(first, rel=1e-12, abs=1e-12)
    ours, theirs = (load_file(out / "model/model.safetensors") for out in (one, mixed))
    for name, value in ours.items():
        assert abs(value - theirs[name]).max() < 1e-12
