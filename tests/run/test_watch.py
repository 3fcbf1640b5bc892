"""What looks after other ranks: silence, a store that stands still, notes of those that left."""

import signal
import time

import pytest
from torch.distributed import HashStore

from minirlhf import interrupt, ranks
from minirlhf.run.watch import DONE, GRACE, Watch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float, *watches: Watch) -> None:
        for watch in watches:
            watch.judged += seconds  # as if it had judged meanwhile
        now[0] += seconds

    return passes


@pytest.fixture
def pair(clock):
    store = HashStore()
    return [Watch(store, number, 2, timeout=10.0) for number in range(2)]


def test_one_that_beats_is_alive(pair, clock):
    first, second = pair
    for _ in range(30):
        second.look(), first.look()
        clock(1.0, first)
        assert first.verdict() is None
    clock(10.5, first)
    first.look()
    assert first.verdict() == f"rank 1 silent for 10 s during {ranks.place()}"


def test_a_store_that_does_not_answer_is_the_silence_of_the_others(pair, clock):
    first, second = pair
    second.look(), first.look()
    clock(10.5, first)  # `look` waits in its socket
    assert first.verdict() is not None


def test_one_that_was_stopped_itself_begins_to_count_anew(pair, clock):
    """A machine that slept: all of them wake, and each saw nothing meanwhile."""
    first, second = pair
    second.look(), first.look()
    clock(3600.0)
    assert first.verdict() is None
    clock(10.5, first)
    assert first.verdict() is not None


def test_one_that_failed_is_left_alone_for_its_grace(pair, clock):
    first, second = pair
    second.word = "step 3: disk full"
    second.look(), first.look()
    assert first.verdict() is None  # this one may meet the same error by itself
    clock(GRACE + 0.1, first)
    assert first.verdict() == "rank 1 failed during step 3: disk full"


def test_one_that_is_done_is_not_missed(pair, clock):
    first, second = pair
    second.word = DONE
    second.look(), first.look()
    clock(3600.0, first)
    assert first.verdict() is None and first.staying() == []


def test_a_collective_that_failed_makes_it_suspect(pair, clock):
    first, second = pair
    second.look(), first.look()
    first.suspects = True
    clock(2.0, first)
    assert first.verdict() is None
    clock(1.1, first)
    assert first.verdict() == f"rank 1 is gone during {ranks.place()}"


def test_a_signal_shortens_a_long_patience(clock):
    """Torchrun kills what is left 30 s after it has asked it to stop."""
    watch = Watch(HashStore(), 0, 2, timeout=600.0)
    clock(10.5, watch)
    assert watch.verdict() is None
    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
        assert watch.verdict() == f"rank 1 silent for 10 s during {ranks.place()}"
