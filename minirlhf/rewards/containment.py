"""What a user's code changes in this process, put back: it scores, and the run is not its own."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minirlhf import streams
from minirlhf.errors import printable


class Kept(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], object]


def _attribute(owner: object, name: str) -> Kept:
    return Kept(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _working_folder() -> str:
    with suppress(FileNotFoundError):  # removed under our feet
        return os.getcwd()
    return ""


def _handlers() -> dict[int, Any]:
    """Of the signals that Python can give back; of another thread none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {number: handler for number, handler in found.items() if handler is not None}


def _put_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


KEPT = {  # what it is called -> how it is read and put back
    "sys.stdout": _attribute(sys, "stdout"),
    "sys.stderr": _attribute(sys, "stderr"),
    "the gradient mode": Kept(torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": Kept(torch.get_default_dtype, torch.set_default_dtype),
    "the default device": Kept(
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "the number of threads": Kept(torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": Kept(
        lambda: (torch.are_deterministic_algorithms_enabled(),
                 torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1]),
    ),
    "the filling of new tensors":
        _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "the working folder": Kept(_working_folder, os.chdir),
    "signal handlers": Kept(_handlers, _put_handlers),
}


def _random_states() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, apple]


def _put_random_states(states: list[Any]) -> None:
    of_python, of_numpy, of_torch, of_cuda, of_apple = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if of_cuda is not None:
        torch.cuda.set_rng_state_all(of_cuda)
    if of_apple is not None:
        torch.mps.set_rng_state(of_apple)


def _seed(stream: str) -> None:
    seed = int(streams.key(0, stream)) & (2**63 - 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Container:
    """Of one user's code: each entering is one import or call of it.

    What it has changed of `KEPT` is put back, and told once. Random numbers that it draws are
    derived from what it is called for, as all of a run: a resumed run draws the same. They change
    none of the process.
    """

    def __init__(self, name: str):
        self.name, self.told = name, set()

    @contextmanager
    def entered(self, called_for: object = "") -> Iterator[None]:
        """Around one import or call.

        Args:
            called_for: what its random numbers depend on, beside its name, by its `repr`.
        """
        before, random_states = {n: kept.get() for n, kept in KEPT.items()}, _random_states()
        _seed(f"{os.path.basename(self.name)} {called_for!r}")  # wherever the file lies
        home = os.getpid()
        try:
            yield
        finally:
            if os.getpid() == home:  # a child has nobody to put it back for
                _put_random_states(random_states)
                self._put_back(before)

    def _put_back(self, before: dict[str, Any]) -> None:
        changed = [name for name, kept in KEPT.items() if kept.get() != before[name]]
        for name in changed:
            KEPT[name].put(before[name])
        if new := [name for name in changed if name not in self.told]:
            self.told.update(new)
            what = f"{printable(self.name)} changed {', '.join(new)}: put back"
            tqdm.write(what, file=sys.stdout)
