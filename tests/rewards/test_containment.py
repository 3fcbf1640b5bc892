"""What a reward function changes in the process is put back, and told once."""

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch

from minirlhf.rewards.containment import KEPT
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.load import load_function
from tests.rewards.test_function import BATCH

CHANGES = {  # what it is called -> a statement that changes it
    "sys.stdout": "sys.stdout = open(os.devnull, 'w')",
    "sys.stderr": "sys.stderr = sys.stdout",
    "the gradient mode": "torch.set_grad_enabled(False)",
    "the default dtype": "torch.set_default_dtype(torch.float64)",
    "the default device": "torch.set_default_device('meta')",
    "the number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "the filling of new tensors": "torch.utils.deterministic.fill_uninitialized_memory ^= True",
    "the working folder": "os.chdir('/')",
    "signal handlers": "signal.signal(signal.SIGALRM, print)",
}
IMPORTS = "import os, random, signal, sys\nimport numpy as np\nimport torch\n"


def test_every_kept_state_is_tried():
    assert CHANGES.keys() == KEPT.keys()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("at", ["import", "call", "failed call"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_function_changes_is_put_back_and_told_once(name, at, tmp_path, capsys):
    file = tmp_path / "reward.py"
    change = CHANGES[name]
    body = {"import": "return [1.0, 2.0, 3.0]", "call": f"{change}; return [1.0, 2.0, 3.0]",
            "failed call": f"{change}; raise KeyError"}[at]
    first = change if at == "import" else ""
    file.write_text(f"{IMPORTS}{first}\ndef f(completions):\n    {body}\n")
    before = KEPT[name].get()
    source = load_function(f"{file}:f")
    for _ in range(2):
        try:
            source(BATCH)
        except Exception:
            assert at == "failed call"
    assert KEPT[name].get() == before
    told = f"{file}:f changed {name}: put back\n"
    assert capsys.readouterr().out == told


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_numbers_of_a_function_depend_on_what_it_scores_alone(tmp_path, capsys):
    """As in a run that is resumed: the file is imported anew, and other calls came before."""
    (tmp_path / "r.py").write_text(IMPORTS + """
def draw():
    return [random.random(), np.random.rand(), torch.rand(()).item()]
at_import = draw()
def f(completions): return draw()
def g(completions): return draw()
def h(completions): return at_import
""")
    other = BATCH._replace(response_ids=[[9], *BATCH.response_ids[1:]])

    def source(name: str):
        return load_function(f"{tmp_path / 'r.py'}:{name}")

    def scores(name: str, batch=BATCH) -> list[float]:
        return source(name)(batch).total.tolist()

    first = source("f")
    unbroken = [first(batch).total.tolist() for batch in (BATCH, other, BATCH)]
    assert scores("f", other) == unbroken[1] and scores("f") == unbroken[0] == unbroken[2]
    assert scores("h") == scores("h", other)
    assert len({*unbroken[0], *unbroken[1], *scores("g"), *scores("h")}) == 12


def test_random_numbers_of_a_function_are_none_of_the_run_s(capsys):
    def f(completions):
        random.seed(1)
        draw()
        return [0.0, 0.0, 0.0]

    drawn = []
    for between in (lambda: None, lambda: function_reward(f, "f")(BATCH)):
        random.seed(7)
        np.random.seed(8)
        torch.manual_seed(9)
        first = draw()
        between()
        drawn.append((first, draw()))
    assert drawn[0] == drawn[1]
    assert capsys.readouterr().out == ""


def test_handlers_of_another_thread_are_left_alone():
    import threading

    found = []
    source = function_reward(lambda completions: [1.0, 2.0, 3.0], "f")
    thread = threading.Thread(target=lambda: found.append(source(BATCH).total.tolist()))
    thread.start()
    thread.join()
    assert found == [[1.0, 2.0, 3.0]]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and os.getcwd() and sys.stdout
