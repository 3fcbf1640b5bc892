"""Two machines rehearsed on one: network namespaces with addresses of their own, joined by a cable
that can be cut. Needs the rights to make them; skipped elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.cli import main
from minirlhf.errors import DISTRIBUTED, OK
from tests.ranks.test_same_numbers import ROOT, make_folder
from tests.tiny_folders import leftovers, timeless

pytestmark = pytest.mark.long
ADDRESSES = ("10.77.0.1", "10.77.0.2")
REWARD = """
import os
import time

def letters(completions, **columns):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return [text.count("e") - 0.25 * len(text) for text in completions]
"""


class Machines:
    """Two of them, each with one end of the cable, named by the process that made them."""

    def __init__(self):
        self.names = [f"mini{os.getpid()}{letter}" for letter in "ab"]

    def make(self) -> None:
        ip = self.ip
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.names
        ip("link", "add", a, "type", "veth", "peer", "name", b)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def cable(self, is_up: bool) -> None:
        self.ip("-n", self.names[1], "link", "set", self.names[1], "up" if is_up else "down")

    def start(self, plan: Path, said: Path, port: int) -> list[subprocess.Popen]:
        """A torchrun on each; what they say comes to SAID.0 and SAID.1."""
        launched = []
        for number, name in enumerate(self.names):
            variables = {"GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1"}
            if not number:
                variables["SLOW"] = "0.3"
            torchrun = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
                "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{port}",
                "--rdzv-conf", f"is_host={1 - number}", "--rdzv-id", "two", "--local-addr",
                ADDRESSES[number], "-m", "tests.ranks.worker", str(plan),
            ]
            with open(f"{said}.{number}", "w") as file:
                launched.append(subprocess.Popen(
                    ["ip", "netns", "exec", name, *torchrun], cwd=ROOT, stdout=file, stderr=file,
                    env={**os.environ, **variables}, start_new_session=True,
                ))
        return launched

    def remove(self) -> None:
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines()
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
        yield made
    finally:
        made.remove()


def processes(name: str) -> set[int]:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return {int(pid) for pid in listed.stdout.split()}


def come_to_pass(what: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (true := what()) and time.monotonic() < until:
        time.sleep(0.05)
    return true


def test_two_machines_and_a_cable_that_is_cut(machines, tmp_path):
    world = make_folder(tmp_path)
    (world / "reward.py").write_text(REWARD)

    def argv(out: str) -> list[str]:
        return [
            "ppo", "--model", str(world / "lm"), "--data", str(world / "prompts.jsonl"),
            "--reward", f"{world / 'reward.py'}:letters", "--steps", "12", "--batch-size", "3",
            "--mini-batches", "1", "--epochs", "1", "--max-new-tokens", "3", "--micro-batch-size",
            "2", "--log-every", "1", "--save-every", "1", "--sample-every", "0", "--adam-epsilon",
            "1e-3", "--rank-timeout", "4", "--quiet", "--out", str(tmp_path / out),
        ]

    def plan(*runs: list[str]) -> Path:
        place = tmp_path / f"plan{len(list(tmp_path.glob('plan*')))}.json"
        place.write_text(json.dumps({"runs": runs}))
        return place

    assert main(argv("one")) == OK
    launched = machines.start(plan(argv("two")), tmp_path / "first", 29511)
    log = tmp_path / "two" / "metrics.jsonl"
    assert come_to_pass(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, 120)
    machines.cable(False)
    # The second machine's torchrun is still there: it goes on asking the first one's for minutes.
    left = [set(), {launched[1].pid}]
    assert come_to_pass(lambda: [processes(name) - {launched[0].pid} for name in machines.names]
                        == left, 30.0)
    launched[1].kill()
    for process in launched:
        process.wait()
    for number in range(2):
        said = Path(f"{tmp_path / 'first'}.{number}").read_text()
        (line,) = (x for x in said.splitlines() if x.startswith("error: "))
        assert line.startswith(f"error: rank {1 - number} silent for 4 s during step ")
    assert f"exitcode  : {DISTRIBUTED} " in Path(f"{tmp_path / 'first'}.0").read_text()
    machines.cable(True)
    again = plan([*argv("two"), "--resume"])
    for process in machines.start(again, tmp_path / "second", 29512):
        assert process.wait(timeout=120) == 0
    for rank in range(2):
        assert json.loads(Path(f"{again}.{rank}").read_text()) == [OK]
    one, two = tmp_path / "one", tmp_path / "two"
    for first, second in zip(timeless(one), timeless(two), strict=True):
        assert second == pytest.approx(first, rel=1e-6, abs=1e-6)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)
    assert not leftovers(two)
