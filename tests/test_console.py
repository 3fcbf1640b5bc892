"""No closed, full or vanished stdout or stderr ends a command, or a run without saving."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from tqdm import tqdm

from minirlhf import console
from minirlhf.cli import main
from minirlhf.errors import BAD_INPUT, MACHINE, OK, STOPPED, UserError, run
from minirlhf.files import atomic
from minirlhf.run.display import Display
from minirlhf.tools.sample import json_lines
from tests.kill_harness import RECIPES, command, make_world

# ---- streams that cannot be written --------------------------------------------------------------


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_terminal() -> int:
    """EIO, as after a connection was lost."""
    master, terminal = os.openpty()
    os.close(master)
    return terminal


def closed_descriptor() -> int:
    """One that somebody closes under Python's feet."""
    return os.open(os.devnull, os.O_WRONLY)


WAYS = {  # name -> (how it is made, what errors say of it)
    "closed pipe": (closed_pipe, "Broken pipe"),
    "full disk": (full_disk, "No space left on device"),
    "terminal that is gone": (gone_terminal, "Input/output error"),
    "closed descriptor": (closed_descriptor, "Bad file descriptor"),
    "closed object": (None, "is closed"),
    "None": (None, "is closed"),
}
OFTEN = ("closed pipe", "full disk", "terminal that is gone", "None")


@pytest.fixture
def broken(monkeypatch):
    """Puts a stream that cannot be written in the place of sys.stdout or sys.stderr."""
    made = []

    def put(stream: str, way: str) -> None:
        value = None
        if way == "closed object":
            value = io.StringIO()
            value.close()
        elif way != "None":
            value = open(WAYS[way][0](), "w", encoding="utf-8")
            made.append(value)
            if way == "closed descriptor":
                os.close(value.fileno())
        monkeypatch.setattr(sys, stream, value)

    yield put
    for value in made:
        close(value)


def close(file: io.TextIOWrapper) -> None:
    with suppress(OSError):
        file.close()


def speak() -> int:
    print("a result")
    print("a word", file=sys.stderr)
    print("another", flush=True)
    tqdm.write("above a bar", file=sys.stdout)
    list(tqdm(range(2), file=sys.stderr))
    return 7


@pytest.mark.parametrize("way", WAYS)
def test_words_that_nobody_reads_change_no_result(way, broken, capsys):
    broken("stderr", way)
    assert run(speak) == 7
    assert capsys.readouterr().out == "a result\nanother\nabove a bar\n"  # and no word


@pytest.mark.parametrize("way", WAYS)
def test_an_error_that_nobody_reads_is_still_its_exit_code(way, broken, capsys):
    def refuse():
        raise UserError("a", "b")

    broken("stderr", way)
    assert run(refuse) == BAD_INPUT
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("way", WAYS)
def test_a_result_that_cannot_be_written_is_an_error(way, broken, capsys):
    broken("stdout", way)
    reader_left = way == "closed pipe"
    assert run(speak) == (OK if reader_left else MACHINE)
    told = capsys.readouterr().err
    assert told.startswith("a word\n") and "Traceback" not in told
    assert told.endswith("\n" if reader_left else f"error: stdout: {WAYS[way][1]}\n")


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_not_made_for_a_stdout_that_is_lost(way, broken, capsys):
    made = []

    def rows():
        write = json_lines(None)
        for i in range(100):
            made.append(i)
            write({"i": i})

    broken("stdout", way)
    assert run(rows) == (OK if way == "closed pipe" else MACHINE)
    assert made == [0]


def test_help_that_cannot_be_written_is_an_error(broken, capsys):
    broken("stdout", "full disk")
    assert main(["ppo", "--help"]) == MACHINE
    assert capsys.readouterr().err == "error: stdout: No space left on device\n"


def test_nothing_is_lost_where_nothing_was_said(broken, capsys):
    broken("stdout", "None")
    assert run(lambda: OK) == OK
    assert capsys.readouterr().err == ""


def test_both_streams_are_as_before_afterwards(capsys):
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    assert (sys.stdout, sys.stderr) == before
    with console.speaking(), console.speaking():  # a run in a command
        assert sys.stdout.inner is before[0]
    assert (sys.stdout, sys.stderr) == before


def test_an_object_that_takes_no_such_text_says_so(monkeypatch):
    class Odd(io.StringIO):
        def write(self, text):
            raise ValueError("odd")

    monkeypatch.setattr(sys, "stdout", Odd())
    with pytest.raises(ValueError, match="odd"):
        run(lambda: print("x"))


CLOSED = """
import os, sys
from minirlhf.errors import run
def program():
    with open(sys.argv[1], "w") as file:
        file.write("{}")
        os.write(1, b"what a library says")
        os.write(2, b"what a library says")
        print("a word", file=sys.stderr)
    return 3
sys.exit(run(program))
"""


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_no_file_of_ours_takes_the_number_of_a_closed_stream(numbers, tmp_path):
    def close() -> None:
        for number in numbers:
            os.close(number)

    done = subprocess.run([sys.executable, "-c", CLOSED, tmp_path / "f"], preexec_fn=close,
                          capture_output=True, text=True)
    assert (tmp_path / "f").read_text() == "{}"
    assert done.returncode == 3
    assert done.stdout == ("" if 1 in numbers else "what a library says")
    assert done.stderr == ("" if 2 in numbers else "what a library saysa word\n")


# ---- verbs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


TOOLS = {  # whose result is on stdout
    "check": "{world}/prompts.jsonl --model {world}/model --max-new-tokens 8",
    "sample": "--model {world}/model --data {world}/prompts.jsonl --limit 3 --max-new-tokens 2",
    "metrics": "--recipe ppo --json",
    "coming-from": "trl",
}


@pytest.mark.parametrize("way", OFTEN)
@pytest.mark.parametrize("verb", TOOLS)
def test_a_tool_is_worth_its_result_and_not_its_words(verb, way, world, broken, capsys):
    argv = [verb, *TOOLS[verb].format(world=world).split()]
    assert main(argv) == OK
    result = capsys.readouterr().out
    broken("stderr", way)
    assert main(argv) == OK
    assert capsys.readouterr().out == result
    broken("stdout", way)
    assert main(argv) == (OK if way == "closed pipe" else MACHINE)  # with no word, and no error


# ---- runs ----------------------------------------------------------------------------------------


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", OFTEN)
def test_a_run_whose_words_are_lost_stops_and_saves_or_goes_on(way, world, tmp_path, broken,
                                                               capsys, monkeypatch):
    """Where stdout was closed from the start, nobody wanted to read: it goes on."""
    out = tmp_path / "run"
    argv = command("sft", world, out)
    with monkeypatch.context():
        broken("stdout", way)
        code = main(argv)
    told = capsys.readouterr().err
    if way == "None":
        assert (code, told) == (OK, "")
    else:
        assert (code, told) == (STOPPED, f"stdout: {WAYS[way][1]}: stopped\n")
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000000"]
    assert not (out / "crash.json").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_at_a_terminal_that_goes_saves_its_last_whole_step(recipe, world, tmp_path, broken,
                                                                 monkeypatch):
    """Both streams go after a step; the bar is drawn. The resumed run is the unbroken one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(recipe, world, whole)) == OK
    master, terminal = os.openpty()
    monkeypatch.setattr(sys, "stdout", open(terminal, "w"))
    monkeypatch.setattr(sys, "stderr", open(os.dup(terminal), "w"))
    assert sys.stderr.isatty()
    real = Display.step

    def step(self: Display, *told: object) -> None:
        nonlocal master
        if master is not None:
            os.close(master)
            master = None
        real(self, *told)

    monkeypatch.setattr(Display, "step", step)
    code = main(command(recipe, world, cut))
    for stream in (sys.stdout, sys.stderr):
        close(stream)
    monkeypatch.undo()
    assert code == STOPPED and 0 < len(steps(cut)) < len(steps(whole))
    assert main(command(recipe, world, cut, resume=True)) == OK
    name = "model/model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


# ---- machines that lack something else -----------------------------------------------------------


def test_a_run_without_threads_is_one_line_and_can_be_resumed(world, tmp_path, capsys, monkeypatch):
    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    out = tmp_path / "run"
    with monkeypatch.context() as limits:
        limits.setattr(threading.Thread, "start", refused)
        limits.setattr(atomic, "SMALL", 1)  # bytes from which on a file is hashed in a thread
        assert main(command("sft", world, out)) == MACHINE
    told = capsys.readouterr().err
    assert told == ("error: no thread can be started: raise the limit (ulimit -u, or pids.max of a "
                    "container)\n")
    assert main(command("sft", world, out, resume=True)) == OK


@pytest.mark.parametrize("verb", ["sample", "check"])
def test_a_disk_that_fills_under_a_tool_is_named_and_keeps_whole_lines(verb, world, tmp_path,
                                                                       capsys, monkeypatch):
    real, left, out = os.write, 100, tmp_path / "out.jsonl"

    def write(handle: int, data: bytes) -> int:
        nonlocal left
        if not os.path.samefile(f"/dev/fd/{handle}", out):
            return real(handle, data)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = bytes(data[:left])
        left -= len(data)
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    flag = {"sample": "--out", "check": "--json"}[verb]
    argv = [verb, *TOOLS[verb].format(world=world).split(), flag, str(out)]
    assert main(argv) == MACHINE and not left
    told = capsys.readouterr().err
    assert told.endswith(f"error: {out}: No space left on device\n")
    if verb == "sample":
        (line,) = out.read_text().splitlines(keepends=True)
        assert json.loads(line)["prompt"] == "It was" and line.endswith("\n")
    else:
        assert not out.exists()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("below", ["file/run", "file", "/proc/none/run", "/dev/null/run"])
def test_an_out_that_cannot_be_is_one_line_and_leaves_nothing(recipe, below, world, tmp_path,
                                                              capsys):
    (tmp_path / "file").write_text("precious")
    assert main(command(recipe, world, tmp_path / below)) in (BAD_INPUT, MACHINE)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: "), told
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"
