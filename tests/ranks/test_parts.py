"""What ranks do apart and share, by hand: `minirlhf/ranks.py` and `minirlhf/models/parallel.py`."""

import json
import os
import subprocess
import sys

import pytest

from minirlhf import ranks
from tests.ranks.test_same_numbers import ROOT
from tests.ranks.together import CHECKS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("together") / "found.json"
    made = subprocess.run(
        [sys.executable, "-m", "tests.ranks.together", str(file)], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    return json.loads(file.read_text()), made.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_together(name, found):
    assert not found[0][name], "\n".join(f"{at}: {what}" for at, what in found[0][name].items())


def test_they_say_nothing_else(found):
    """Torch among them, which warns where nothing was left out of a pass that might have been."""
    assert [line for line in found[1].splitlines() if "stopping at" not in line and line] == []


@pytest.mark.parametrize("count, rows, sizes", [
    (1, 3, [3]), (2, 1, [1, 0]), (2, 2, [1, 1]), (2, 7, [4, 3]), (3, 2, [1, 1, 0]),
    (3, 8, [3, 3, 2]), (4, 1, [1, 0, 0, 0]), (4, 9, [3, 2, 2, 2]), (4, 6, [2, 2, 1, 1]),
])
def test_shares_are_neighbours_and_even(count, rows, sizes, monkeypatch):
    monkeypatch.setattr(ranks._group, "count", count)
    shares = [ranks.share(rows, rank) for rank in range(count)]
    assert [part.stop - part.start for part in shares] == sizes
    assert [i for part in shares for i in range(rows)[part]] == list(range(rows))
