"""Exit codes, and one line for each."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from minirlhf.errors import (
    BAD_INPUT,
    INTERRUPTED,
    MACHINE,
    NON_FINITE,
    OK,
    NonFinite,
    UserError,
    printable,
    run,
)


def test_a_reader_that_leaves_is_no_fault():
    code = "import sys\nfrom minirlhf.errors import run\nsys.exit(run(lambda: print('x' * 10**6)))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def raising(error: BaseException):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a:1", "got b", "use c"), BAD_INPUT, "error: a:1: got b: use c"),
        (UserError("a", "x\n\x1b[31my"), BAD_INPUT, r"error: a: x\n\x1b[31my"),
        (NonFinite("step 1: loss", "is nan"), NON_FINITE, "error: step 1: loss: is nan"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), MACHINE,
         "error: f: No space left on device"),
        (OSError("odd"), MACHINE, "error: the operating system: odd"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), MACHINE,  # not of our stdout
         "error: the operating system: Broken pipe"),
        (KeyboardInterrupt(), INTERRUPTED, "error: interrupted"),
        (MemoryError(), MACHINE, "error: out of memory: no memory is left: give smaller"
         " batches; training goes on with --resume --gradient-checkpointing"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto"),
         MACHINE, "error: out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory:"
         " you tried: give smaller batches; training goes on with "
         "--resume --gradient-checkpointing"),
        (torch.OutOfMemoryError("CUDA out of memory"), MACHINE, "error: out of memory: CUDA out of "
         "memory: give smaller batches; training goes on with "
         "--resume --gradient-checkpointing"),
        (RuntimeError("can't start new thread"), MACHINE, "error: no thread can be started: raise "
         "the limit (ulimit -u, or pids.max of a container)"),
        (ImportError("libtorch.so: failed to map segment from shared object"), MACHINE,
         "error: a library cannot be loaded: libtorch.so: failed to map segment from shared object"
         ": is there memory, and is it installed as a whole?"),
    ],
)
def test_run_turns_an_error_into_one_line_and_its_code(error, code, line, capsys):
    assert run(raising(error)) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_run_prints_what_a_terminal_cannot_show():
    code = "import sys; from minirlhf.errors import run; sys.exit(run(lambda: print('5 € …')))"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (OK, b"5 \\u20ac \\u2026\n", b"")


def test_run_is_told_of_a_memory_that_is_really_out(capsys):
    assert run(lambda: torch.empty(1 << 60)) == MACHINE
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_run_tells_of_a_working_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    """Libraries would end the process in their own words."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(raising(AssertionError("was run"))) == MACHINE
    told = "error: the working folder: was removed while this shell is in it: cd to another\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [
    RuntimeError("shapes"), ValueError("x"), KeyError("k"), ImportError("cannot import name 'x'"),
])
def test_run_hides_no_fault_of_ours(error):
    with pytest.raises(type(error)):
        run(raising(error))


def test_run_gives_a_programs_own_code():
    assert run(lambda: None) == OK == run(lambda: 0)
    assert run(lambda: 7) == 7


def test_printable_is_one_short_line():
    assert printable("a\tb\u202e\x00") == "a\\tb\\u202e\\x00"
    assert printable("é😀") == "é😀"
    assert printable("x" * 300, 10) == "xxxxxxxxx…"
