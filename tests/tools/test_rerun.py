"""A run is repeated: the same numbers, from wherever, and with what is changed."""

import json
from pathlib import Path

import pytest

from minirlhf.cli import main
from tests.tools.conftest import TEXTS, write_lines


def rows(folder: Path) -> list[dict]:
    """What metrics.jsonl says, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "clock"} for line in lines]


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """It leaves the command that does the same."""
    monkeypatch.setattr("sys.argv", ["minirlhf"])


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """The folder of runs/a, of which all paths are relative."""
    home = tmp_path_factory.mktemp("rerun")
    write_lines(home / "texts.jsonl", *({"text": text} for text in TEXTS))
    (home / "lm").symlink_to(files["LM"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = "--steps 2 --batch-size 2 --log-every 1 --learning-rate 1e-2 --save-every none"
        assert main(["sft", "--model", "lm", "--data", "texts.jsonl", "--out", "runs/a",
                     *words.split()]) == 0
    assert not (home / "runs/a/checkpoints").exists()
    return home / "runs"


def test_a_run_is_repeated_from_another_folder_to_the_same_numbers(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("a-2", "a-3"):  # the first that is not there
        assert main(["rerun", str(runs / "a")]) == 0
        assert rows(runs / name) == rows(runs / "a")
        weights = [runs / n / "model/model.safetensors" for n in ("a", name)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    out = capsys.readouterr().out
    assert f"sft as in {runs / 'a'}, into {runs / 'a-2'}\n" in out and "warning" not in out
    monkeypatch.chdir(tmp_path)
    assert main(["rerun", str(runs / "a-2"), "--out", "mine"]) == 0  # of one that was repeated
    assert rows(tmp_path / "mine") == rows(runs / "a")


def test_set_changes_settings_and_its_paths_are_of_here(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "own.jsonl", *({"text": text} for text in TEXTS[:2]))
    words = ["--set", "steps=1", "data=own.jsonl", "gradient-checkpointing=true", "merge=on",
             "eval_data=x=own.jsonl", "eval_data=y=own.jsonl", "--out", "b"]
    assert main(["rerun", str(runs / "a"), *words]) == 0
    kept = json.loads(Path(tmp_path, "b/run.json").read_text("utf-8"))["settings"]
    own = str(tmp_path / "own.jsonl")
    assert (kept["steps"], kept["data"], kept["learning_rate"]) == (1, own, 1e-2)
    assert kept["gradient_checkpointing"] and kept["eval_data"] == [f"x={own}", f"y={own}"]
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("odd", [
    {"named_by": 3}, {"inputs": []}, {"named_by": {"data": 3, "model": [[1], None]}},
    {"inputs": {"a\0b": 1}, "named_by": {"data": ["a\0b"]}}, {"versions": 3}, {"started_in": 5},
    {"versions": {"torch": "\x1b[31m"}},
])
def test_an_odd_run_json_is_no_fault_of_ours(runs, tmp_path, odd, monkeypatch, capsys):
    facts = json.loads((runs / "a/run.json").read_text("utf-8")) | odd
    (tmp_path / "odd").mkdir()
    facts["settings"] |= {"out": "odd", "steps": 0, "lr": [1]}
    (tmp_path / "odd/run.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)
    assert main(["rerun", "odd"]) == 2
    told = capsys.readouterr()
    assert "steps: got 0, must be a whole number >= 1" in told.err and "\x1b" not in told.out


def test_what_has_changed_is_one_line(runs, monkeypatch, capsys):
    facts = json.loads((runs / "a/run.json").read_text("utf-8"))
    facts["inputs"]["texts.jsonl"] = "0" * 64
    facts["versions"]["torch"] = "1.0"
    (runs / "old").mkdir(exist_ok=True)
    (runs / "old/run.json").write_text(json.dumps(facts))
    monkeypatch.chdir(runs)
    assert main(["rerun", "old", "--set", "steps=1"]) == 0
    out = capsys.readouterr().out
    assert "warning: changed since that run: texts.jsonl\n" in out
    assert "note: numbers may differ in their last digits: torch was 1.0, is " in out
    assert rows(runs / "old-2")[0]["step"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere: holds no run.json: give the folder of a run"),
        ([], "--run: required, but not given"),
        (["a", "--out", "a"], "--out: a is there already: give another"),
        (["a", "--set", "steps"], "set: got 'steps', must be KEY=VALUE"),
        (["a", "--set", "stepz=1"], "--stepz: unknown flag: the nearest is --steps"),
        (["a", "--set", "steps=0"], "--steps: got 0, must be a whole number >= 1"),
        (["a", "--set", "steps=1", "steps=2"], "--steps: given twice"),
        (["a", "--set", "merge=maybe"], "--set merge: got 'maybe': true or false"),
        (["strange"], "strange/run.json: is of a run of dance, which is no verb here: use the min"),
    ],
)
def test_rerun_refuses_what_it_cannot_repeat(runs, words, told, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    Path("strange").mkdir(exist_ok=True)
    Path("strange/run.json").write_text('{"recipe": "dance", "settings": {}}')
    before = sorted(runs.iterdir())
    assert main(["rerun", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert sorted(runs.iterdir()) == before
