"""What looks after the other processes of a run, and ends this one where one of them is gone.

A process may be killed, stopped or cut off, and a collective would then wait for it for ever. So
each gives a sign of life every second in the store of torchrun's launcher, and looks for those of
the others: where one is missing for `--rank-timeout` seconds, or one has failed by itself, the
others end with exit code 6. Nothing is lost by that: rank 0 alone writes, and all that it writes is
whole or not there.
"""

import os
import signal
import sys
import threading
import time

import torch

from minirlhf import errors, interrupt, ranks
from minirlhf.errors import BUG, DISTRIBUTED

BEAT = 1.0  # seconds between two signs of life
MISSED = 3  # of them are enough where something else says that a process is gone
GRACE = 3.0  # in which all ranks may end with the same error, each by itself
DONE = "done"


class Watch:
    """Two threads: one talks with the store, which may take for ever; the other one judges.

    Args:
        store: that all ranks read and write; a connection of its own.
        timeout: seconds.
    """

    def __init__(self, store: "torch.distributed.Store", number: int, count: int, timeout: float):
        self.store, self.number, self.timeout = store, number, timeout
        self.others = [rank for rank in range(count) if rank != number]
        self.every, self.beats, self.judged = min(BEAT, timeout / 5), 0, time.monotonic()
        self.seen = {rank: (b"", time.monotonic()) for rank in self.others}  # and when it changed
        self.left: dict[int, tuple[str, float]] = {}  # why, and since when
        self.word = ""  # why this one leaves, once it does
        self.suspects = False  # a collective has failed
        self.speaks, self.ends, self.parted = (threading.Event() for _ in range(3))
        self.ending = threading.Lock()

    def start(self) -> None:
        for name in ("talk", "judge"):
            threading.Thread(target=getattr(self, name), daemon=True, name=f"watch-{name}").start()

    # ------------------------------------------------------------------ the thread that talks

    def talk(self) -> None:
        try:
            while not self.parted.is_set():
                self.look()
                if self.ends.is_set() and not self.staying():
                    self.parted.set()
                if self.speaks.wait(self.every):  # the others wait for its word
                    time.sleep(0.05)
        except (RuntimeError, OSError):  # the store is gone, and with it who held it
            if not self.word:
                at = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
                why = f"rank 0 or its launcher, at {at}, is gone during {ranks.place()}"
                of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                heir = self.number == 1 and not of_launcher  # where rank 0 held the store itself
                self.end(why, heir or os.environ.get("LOCAL_RANK", "0") == "0")
            self.parted.set()

    def look(self) -> None:
        """Gives a sign of life, and reads those of the others."""
        self.beats += 1
        self.store.set(f"beat/{self.number}", str(self.beats))
        if self.word:
            self.store.set(f"left/{self.number}", self.word)
        for rank in self.others:
            if rank not in self.left and self.store.check([f"left/{rank}"]):
                self.left[rank] = self.store.get(f"left/{rank}").decode(), time.monotonic()
            if self.store.check([f"beat/{rank}"]):
                beat = self.store.get(f"beat/{rank}")
                if beat != self.seen[rank][0]:
                    self.seen[rank] = beat, time.monotonic()

    # ------------------------------------------------------------------ the thread that judges

    def judge(self) -> None:
        while not self.ends.wait(self.every):
            if (verdict := self.verdict()) is not None:
                self.end(verdict)

    def verdict(self) -> str | None:
        """Why this process must end; None while nothing is known against any of the others."""
        now, before, self.judged = time.monotonic(), self.judged, time.monotonic()
        if now - before > MISSED * self.every:  # it was stopped itself: nothing was seen meanwhile
            self.seen = {rank: (beat, now) for rank, (beat, _) in self.seen.items()}
        for rank, (why, since) in list(self.left.items()):
            if why != DONE and (now - since > GRACE or self.suspects):
                return f"rank {rank} failed during {why}"
        # Where torchrun asks to stop because one has died, it kills the others after 30 s.
        limit = min(self.timeout, 10.0) if interrupt.asked() else self.timeout
        for rank in self.silent(MISSED * self.every if self.suspects else limit):
            how = "is gone" if self.suspects else f"silent for {limit:g} s"
            return f"rank {rank} {how} during {ranks.place()}"
        return None

    def silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in self.seen.items()
                if rank not in self.left and now - since > seconds]

    def staying(self) -> list[int]:
        """The others that neither have left nor are gone."""
        silent = self.silent(MISSED * self.every)
        return [rank for rank in self.others if rank not in self.left and rank not in silent]

    def end(self, why: str, says_it: bool | None = None) -> None:
        """Leaves at once: the main thread may wait in a collective for ever."""
        self.ending.acquire()  # and never given back
        if says_it is None:  # the first that is left does
            says_it = min(self.staying(), default=self.number) >= self.number
        if says_it:
            os.write(2, f"error: {ranks.lost(why, 'the run stops')}\n".encode())
        os._exit(DISTRIBUTED)

    # ------------------------------------------------------------------ the main thread

    def hear(self, error: BaseException) -> None:
        """Waits whether a fault is that of another process, which then ends this one."""
        if self.word:
            return
        if any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            self.suspects = True
            time.sleep(GRACE + (MISSED + 1) * self.every)
        self.word = f"{ranks.place()}: {errors.named(error)}"
        self.speaks.set()
        until = time.monotonic() + GRACE
        while self.number > 0 and time.monotonic() < until:
            time.sleep(self.every / 5)
            if self.left.get(0, ("",))[0] == self.word:  # all have it, and rank 0 tells it
                raise SystemExit(BUG)

    def part(self) -> None:
        """Tells the others how this process ends, and waits until they have ended or are gone:
        where one ends before, torchrun would end them in the midst of their last words."""
        why = errors.told() or str(getattr(sys, "last_value", ""))
        self.word = self.word or (f"{ranks.place()}: {why}" if why else DONE)
        self.speaks.set()
        self.ends.set()
        self.parted.wait(self.timeout)
        for number in interrupt.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
