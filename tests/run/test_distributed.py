"""Processes that do not find each other, or not their device: an error in time, not a wait."""

import socket
import time
from types import SimpleNamespace

import pytest
import torch

from minirlhf.errors import BAD_INPUT, DISTRIBUTED, UserError
from minirlhf.run import distributed

CONFIG = SimpleNamespace(device="cpu", dtype="float32", parallel=None, offload_params=False,
                         rank_timeout=1.0, verbose=True)


@pytest.fixture
def busy():
    """A port on which somebody else listens, who says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield str(other.getsockname()[1])


def refused(monkeypatch, config=CONFIG, **variables: str | None) -> UserError:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500", **variables}
    for name, value in told.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        distributed.start(config)
    return caught.value


@pytest.mark.parametrize("variables, words", [
    ({"RANK": None}, "RANK: is not set, and WORLD_SIZE is: start it by torchrun"),
    ({"MASTER_PORT": None}, "MASTER_PORT: is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE: is two, and no number"),
    ({"RANK": "2"}, "RANK: is 2, and there are 2 processes"),
    ({"RANK": "-1"}, "RANK: is -1, and no number"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT: is 70000"),
])
def test_variables_that_torchrun_would_set(variables, words, monkeypatch):
    error = refused(monkeypatch, **variables)
    assert words in str(error) and error.code == BAD_INPUT


@pytest.mark.parametrize("number", ["0", "1"])
def test_a_busy_port(number, busy, monkeypatch):
    """Rank 0 cannot listen on it; rank 1 gets no answer there."""
    before = time.monotonic()
    error = refused(monkeypatch, RANK=number, MASTER_PORT=busy)
    assert error.code == DISTRIBUTED and error.where == f"127.0.0.1:{busy}"
    assert time.monotonic() - before < 30


def test_one_that_never_comes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    error = refused(monkeypatch, MASTER_PORT=port)
    assert error.code == DISTRIBUTED and "the processes do not find each other" in str(error)


def test_a_process_without_a_device(monkeypatch):
    monkeypatch.setattr(distributed, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    error = refused(monkeypatch, RANK="1", LOCAL_RANK="1")
    assert str(error) == ("--device: there are 1, and this is process 2 of the machine: "
                          "give torchrun --nproc-per-node 1")
