"""Each exercise is true: its line stands where it says, its test fails once the line is changed,
its code prints what it says, its commands are commands."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from minirlhf.cli import VERBS, main
from minirlhf.run import flags
from minirlhf.tools.learn.command import exercises, page
from tests.equations import test_advantages

ROOT = Path(__file__).parents[3]
NUMBERS = range(1, 13)
CHANGED = [n for n in NUMBERS if "change" in exercises()[n - 1]]


def outcome(folder: Path, *tests: str) -> tuple[int, str]:
    """Exit code and output of tests in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def copied(folder: Path, change: dict | None) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("minirlhf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if change is not None:
        path = folder / change["file"]
        text = path.read_text("utf-8")
        path.write_text(text.replace(change["line"], change["becomes"]), "utf-8")
    return folder


def test_the_first_exercise_breaks_the_test_that_it_names(monkeypatch):
    """As the slow ones do it, but without a process of its own."""
    change, name = (exercises()[0][key] for key in ("change", "test"))
    test = getattr(test_advantages, name.partition("::")[2])
    (cases,) = (mark.args[1] for mark in test.pytestmark)
    module = types.ModuleType("changed")
    text = (ROOT / change["file"]).read_text("utf-8")
    exec(text.replace(change["line"], change["becomes"]), module.__dict__)
    for case in cases:
        test(*case)
    monkeypatch.setattr(test_advantages, "gae", module.gae)
    with pytest.raises(AssertionError):
        test(*cases[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", CHANGED)
def test_each_change_breaks_the_test_that_it_names(number, tmp_path):
    each = exercises()[number - 1]
    code, told = outcome(copied(tmp_path, each["change"]), each["test"])
    assert code == 1 and re.search(r"\d+ failed|FAILED", told), told  # 1: a test failed


@pytest.mark.slow
def test_the_named_tests_pass_without_a_change(tmp_path):
    named = {exercises()[number - 1]["test"] for number in CHANGED}
    code, told = outcome(copied(tmp_path, None), *named)
    assert code == 0, told


@pytest.mark.parametrize("number", CHANGED)
def test_the_line_of_a_change_stands_in_its_file_once(number):
    change = exercises()[number - 1]["change"]
    lines = (ROOT / change["file"]).read_text("utf-8").splitlines()
    assert [line.strip() for line in lines].count(change["line"]) == 1
    assert "\n".join(lines).count(change["line"]) == 1
    at = [line.strip() for line in lines].index(change["line"]) + 1
    assert f"in {change['file']}:{at}\n" in page(number)


@pytest.mark.parametrize("number", CHANGED)
def test_the_test_of_a_change_exists(number):
    file, _, name = exercises()[number - 1]["test"].partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("number", NUMBERS)
def test_code_prints_what_its_exercise_says(number):
    each = exercises()[number - 1]
    assert ("code" in each) == ("prints" in each)
    if "code" in each:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(each["code"], {})
        assert said.getvalue().strip() == each["prints"].strip()


@pytest.mark.parametrize("number", NUMBERS)
def test_commands_of_an_exercise_are_commands(number):
    for command in exercises()[number - 1].get("commands", ()):
        program, verb, *words = shlex.split(command)
        assert program == "minirlhf"
        flags.parse(VERBS[verb].config(), words, f"minirlhf {verb}")


def test_there_are_twelve_each_with_something_to_do(capsys):
    assert main(["learn"]) == 0
    listed = capsys.readouterr().out
    assert len(exercises()) == 12
    for number, each in enumerate(exercises(), start=1):
        assert f"{number:>3}  {each['title']}\n" in listed
        assert {"title", "do", "look", "expect", "why"} <= each.keys()
        assert {"change", "commands", "code"} & each.keys()


def test_a_number_shows_its_exercise(capsys):
    assert main(["learn", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Exercise 3: {exercises()[2]['title']}\n")
    for part in ("Do:", "Look at:", "Expect:", "Why, once you have tried:", "    0.1308\n"):
        assert part in shown


@pytest.mark.parametrize(("words", "line"), [
    ("learn 13", "--exercise: got 13, must be a whole number >= 1 and <= 12 or none"),
    ("learn one", "--exercise: got 'one', must be"),
    ("learn 3 --gradcheck", "gradcheck: goes without an exercise"),
])
def test_what_is_no_exercise_is_refused(words, line, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
