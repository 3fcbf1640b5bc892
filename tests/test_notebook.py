"""A notebook: bars show in a kernel, and the pages' Python runs in a real one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import minirlhf
from minirlhf import console
from tests import pages
from tests.test_readme import FRONT, shorter


@pytest.mark.parametrize(("shell", "shown"), [
    (None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True),
], ids=["no IPython", "IPython in a terminal", "a kernel"])
def test_bars_show_in_a_kernel(shell, shown, monkeypatch, capsys):
    module = ModuleType("IPython")
    module.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert not sys.stderr.isatty() and console.has_bars() == shown
    bars = console.bar_kind()
    with bars(total=2, disable=not console.has_bars()) as bar:
        bar.update()
    assert ("1/2" in capsys.readouterr().err) == shown


def test_a_widget_is_taken_only_where_there_are_widgets(monkeypatch):
    import tqdm
    import tqdm.auto

    monkeypatch.setattr(console, "in_notebook", lambda: True)
    for there, kind in ((None, tqdm.tqdm), (object(), tqdm.auto.tqdm)):
        monkeypatch.setattr(console, "find_spec", lambda _, found=there: found)
        assert console.bar_kind() is kind


def test_who_writes_a_loop_finds_data_and_rewards_by_name():
    names = {"load_prompts", "load_pairs", "load_texts", "function_reward"}
    assert names <= set(minirlhf.__all__) and all(callable(getattr(minirlhf, n)) for n in names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_the_front_pages_python_runs_in_a_kernel(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pages.make_world(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(pages.ROOT))
    codes = [shorter(code, 2) for code in pages.blocks(FRONT, "python")]
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    cells.append(nbformat.v4.new_code_cell("from minirlhf import console; console.has_bars()"))
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert book.cells[-1].outputs[-1].data["text/plain"] == "True"
