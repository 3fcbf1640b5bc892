"""The source that was hashed is the source that runs, of a reward file and of its neighbours."""

import os
import py_compile
from hashlib import sha256
from pathlib import Path

import pytest

from minirlhf.errors import UserError
from minirlhf.rewards.load import load_function
from tests.rewards.test_function import BATCH


def score(value: float) -> str:
    return f"def f(completions):\n    return [{value}] * len(completions)\n"


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def planted(file: Path, text: str) -> None:
    """Beside the file the compiled code of another, which Python takes for the file's own."""
    file.write_text(text)
    py_compile.compile(str(file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def test_compiled_code_beside_the_files_is_not_run(tmp_path):
    file, neighbour = tmp_path / "reward.py", tmp_path / "planted_neighbour.py"
    planted(file, score(7.0))
    planted(neighbour, "VALUE = 7.0\n")
    text, ran = "from planted_neighbour import VALUE\n" + score(1.0) + "    # VALUE\n", {}
    file.write_text(text.replace("1.0", "VALUE"))
    neighbour.write_text("VALUE = 1.0\n")
    assert load_function(f"{file}:f", ran=ran)(BATCH).total.tolist() == [1.0] * 3
    assert ran == {str(file): digest(file.read_text()), str(neighbour): digest("VALUE = 1.0\n")}
    stamp = 1, 1  # of the same size and time as another: compiled code would pass for it
    os.utime(file, stamp)
    file.write_text(score(2.0))
    os.utime(file, stamp)
    assert load_function(f"{file}:f")(BATCH).total.tolist() == [2.0] * 3


def test_modules_of_its_folder_are_told_with_their_sums(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "rewards/own_package"
    inner.mkdir(parents=True)
    (tmp_path / "rewards/reward.py").write_text(
        "import json\nfrom own_package.inner import LIST\ndef f(completions):\n"
        "    import own_late\n    return LIST\n"
    )
    (inner / "__init__.py").write_text("")
    (inner / "inner.py").write_text("LIST = [1.0, 2.0, 3.0]\n")
    (tmp_path / "rewards/own_late.py").write_text("")
    ran = {}
    source = load_function("rewards/reward.py:f", ran=ran)
    assert sorted(ran) == ["rewards/own_package/__init__.py", "rewards/own_package/inner.py",
                           "rewards/reward.py"]
    assert ran["rewards/own_package/inner.py"] == digest("LIST = [1.0, 2.0, 3.0]\n")
    for _ in range(2):
        assert source(BATCH).total.tolist() == [1.0, 2.0, 3.0]
    late = "rewards/reward.py:f imports rewards/own_late.py only now: not among the run's inputs\n"
    assert capsys.readouterr().out == late
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_is_installed_in_its_folder_is_no_input(tmp_path, monkeypatch):
    place = tmp_path / "venv/lib/site-packages"
    place.mkdir(parents=True)
    (place / "own_installed.py").write_text("LIST = [1.0, 2.0, 3.0]\n")
    (tmp_path / "reward.py").write_text("from own_installed import LIST\n"
                                        "def f(completions):\n    return LIST\n")
    monkeypatch.syspath_prepend(str(place))
    ran = {}
    load_function(f"{tmp_path / 'reward.py'}:f", ran=ran)
    assert list(ran) == [str(tmp_path / "reward.py")]


def test_two_folders_with_a_module_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_twin.py").write_text("LIST = [1.0, 2.0, 3.0]\n")
        (tmp_path / name / "reward.py").write_text("from own_twin import LIST\n"
                                                   "def f(completions):\n    return LIST\n")
    load_function(f"{tmp_path}/a/reward.py:f")
    told = "b/own_twin.py: has the name of .*a/own_twin.py, which runs already: rename one of them"
    with pytest.raises(UserError, match=told):
        load_function(f"{tmp_path}/b/reward.py:f")


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def judge(text):
    return float(len(text))
def f(completions):
    context = multiprocessing.get_context({method!r})
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(judge, completions))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_functions_of_the_file_run_in_pools_of_processes(method, tmp_path):
    file = tmp_path / f"pooled_by_{method}.py"
    file.write_text(POOL.format(method=method))
    source = load_function(f"{file}:f")
    assert source(BATCH).total.tolist() == [len(text) for text in BATCH.completions]


def test_files_of_one_name_are_two_modules(tmp_path):
    """And what lies beside the second is not taken from the first."""
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(f"VALUE = {value}\n" + score(value))
    (tmp_path / "b" / "beside.py").write_text("from same_name import VALUE\n" + score(0).replace(
        "[0]", "[VALUE]"))
    first = load_function(f"{tmp_path / 'a' / 'same_name.py'}:f")
    for other in ("beside.py", "same_name.py"):
        source = load_function(f"{tmp_path / 'b' / other}:f")
        assert (first(BATCH).total[0], source(BATCH).total[0]) == (1.0, 2.0)
