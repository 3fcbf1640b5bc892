"""The command line: verbs, exit codes, and that asking for help does not wait for torch."""

import os
import socket
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest

import minirlhf
from minirlhf import cli, console
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import BAD_INPUT, MACHINE, UserError
from tests.bad_inputs import SHAPE
from tests.kill_harness import RECIPES
from tests.tiny_folders import save_lm, save_scorer

ROOT = Path(__file__).parents[1]


def python(*words: str) -> subprocess.CompletedProcess:
    """Runs Python on this tree, installed or not."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def verb(monkeypatch):
    """Puts a verb `try` into the table, whose main is the given function."""

    def put(main):
        module = types.ModuleType("tried")
        module.main = main
        monkeypatch.setitem(sys.modules, "tried", module)
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("tried", "", "tries"))

    return put


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_main_lists_the_verbs(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert f"  {name:<13}{verb.what}\n" in out


def test_main_tells_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minirlhf {minirlhf.__version__}\n"


def test_main_hands_the_rest_of_the_line_to_the_verb(verb):
    seen = []

    def main(argv):
        seen.append(argv)
        return 75

    verb(main)
    assert cli.main(["try", "--model", "m"]) == 75
    assert seen == [["--model", "m"]]


def test_main_reads_the_process_command_line_by_default(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["minirlhf", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("minirlhf ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--steps", "got 0", "must be >= 1"), BAD_INPUT, "--steps: got 0: must be >= 1"),
        (OSError(28, "No space left on device", "/out"), MACHINE, "/out: No space left on device"),
    ],
)
def test_main_turns_an_error_into_one_line_and_its_exit_code(error, code, line, verb, capsys):
    def main(argv):
        raise error

    verb(main)
    assert cli.main(["try"]) == code
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["pop"]])
def test_main_does_not_import_torch_without_a_verb(argv):
    code = f"from minirlhf import cli; cli.main({argv!r})"
    assert python("-c", code + "; import sys; sys.exit('torch' in sys.modules)").returncode == 0


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.settings])
@pytest.mark.parametrize("word", ["--help", "--modle"])
def test_neither_help_nor_a_bad_flag_waits_for_torch(verb, word):
    code = f"""
import sys
from minirlhf import cli, console
try:
    code = cli.main([{verb!r}, {word!r}])
except SystemExit as left:
    code = left.code
sys.exit("torch is there" if "torch" in sys.modules else code)
"""
    done = python("-c", code)
    assert done.returncode == (0 if word == "--help" else BAD_INPUT), done.stderr


def test_what_trains_nothing_does_not_wait_for_the_compiler_that_torch_imports(tmp_path):
    lm, scorer = tmp_path / "lm", tmp_path / "rm"
    for folder, save in ((lm, save_lm), (scorer, save_scorer)):
        train_tokenizer([], 258, folder)
        save(folder, SHAPE)
    data = f"--data {tmp_path}/none.jsonl --out {tmp_path}/run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        lines = [
            f"sft --model {lm} {data}", f"reward --model {lm} {data}",
            f"ppo --model {lm} --reward {scorer} {data} --max-new-tokens 8",
            f"score --model {scorer} {data}",
            f"serve --model {scorer} --port {taken.getsockname()[1]}",
            f"sample --model {lm} --prompt The --max-new-tokens 2 --out {tmp_path}/answers.jsonl",
        ]
        code = f"""
import sys, torch
from minirlhf import cli, console
codes = [cli.main(line.split()) for line in {lines!r}]
print(codes, "torch._dynamo" in sys.modules, torch.get_deterministic_debug_mode(), file=sys.stderr)
"""
        done = python("-c", code)
    told = done.stderr.splitlines()
    assert [line.endswith("none.jsonl: no such file") for line in told[:4]] == [True] * 4, told
    assert "Address already in use" in told[4]
    # `serve` alone came so far as to ask for determinism: 2 is "error".
    assert told[-1] == f"{[BAD_INPUT] * 5 + [0]} False 2"


def test_python_dash_m_is_the_command_line():
    done = python("-m", "minirlhf", "pop")
    assert done.returncode == BAD_INPUT
    assert done.stderr.startswith("error: minirlhf pop: no such verb: the nearest is ppo; verbs: ")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minirlhf {verb} ")


@pytest.mark.parametrize("columns", [80, 50])
@pytest.mark.parametrize("verb", [*cli.VERBS, ""])
def test_help_fits_the_terminal(verb, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for flag in ("--help", "--help-all"):
        if flag == "--help" or verb in ("sft", "ppo", "sample"):
            with suppress(SystemExit):
                cli.main([verb, flag] if verb else [flag])
    told = capsys.readouterr().out.splitlines()
    room = 80 if verb == "coming-from" else columns  # a text that is read as it is
    assert [line for line in told if len(line) > room] == [] and len(told) > 3


def test_the_verbs_stand_under_their_headings():
    told = cli.usage()
    for heading, names in cli.GROUPS.items():
        part = told.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in part.splitlines()] == [
            name for name in names if name in cli.VERBS]
    assert "\nmore:" not in told  # each verb has its place in cli.GROUPS


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_refuses_an_unknown_flag(verb, capsys):
    assert cli.main([verb, "--modle", "m"]) == BAD_INPUT
    told = capsys.readouterr().err
    has = cli.VERBS[verb].settings and "model" in cli.VERBS[verb].config().__dataclass_fields__
    advice = "the nearest is --model" if has else ""
    assert told.startswith(f"error: --modle: unknown flag: {advice}")
    assert has or "nearest" not in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("verb", RECIPES)
def test_a_recipe_run_by_its_path_is_its_verb(verb):
    by_path = python(f"minirlhf/recipes/{verb}.py", "--help")
    assert by_path.returncode == 0, by_path.stderr
    assert by_path.stdout.startswith(f"usage: minirlhf {verb} ")


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in cli.VERBS if name not in RECIPES])
def test_torchrun_starts_recipes_only(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([name]) == BAD_INPUT
    wanted = f"torchrun: starts several processes, and {name} is one: start it as minirlhf {name}"
    assert capsys.readouterr().err == f"error: {wanted}\n"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_tells_what_is_wrong_with_the_words(name, rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert cli.main([name, "--modell", "x"]) == BAD_INPUT
    assert ("--modell" in capsys.readouterr().err) == (rank == 0)
    assert not console.muted()
