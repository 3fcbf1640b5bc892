"""Children of this process that may only read, and what they did besides.

A child has a limit of CPU time and of memory for each case, and an audit hook that tells of every
event by which data could reach out: code from data, processes, sockets, pickles, other files. A
case is right if it returns or raises a UserError of one line.
"""

import collections
import dataclasses
import faulthandler
import json
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import minirlhf
from minirlhf.data import chat_template, template_worker
from minirlhf.errors import UserError

SECONDS, MEMORY = 2, 256 << 20  # of CPU time, and of growth, that one case may take
ADDRESSES = 16 << 30  # bytes of address space: what asks for terabytes is refused, not killed
FINISHED = 77  # exit code of a child that came to its end
BATCH = 250  # cases in one child
AGAIN = "grew, but not alone"  # a case that is tried once more, in a child of its own
LINE = 2000  # characters of the longest message
REACHING_OUT = (
    "pickle.", "subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "os.spawn", "os.startfile", "os.kill", "pty.", "ctypes.", "urllib.", "http.", "ftplib.",
    "smtplib.", "webbrowser.",
)
CHANGING = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.putenv", "shutil.",
)
TEMPLATES = ("<template>", "<unknown>")  # what jinja2 calls the code that it compiles
PACKAGE = str(Path(minirlhf.__file__).parent) + os.sep
LIBRARIES = (
    PACKAGE, *{str(Path(folder).resolve()) + os.sep for folder in sysconfig.get_paths().values()}
)
WRITERS = (collections.__file__, dataclasses.__file__, typing.__file__)  # of methods and hints

Make = Callable[[int], tuple[str, Callable[[], object]]]


class Finding(NamedTuple):
    case: int
    name: str
    what: str


def breach(event: str, args: tuple, caller: str, root: str, may_write: bool) -> str | None:
    """What is wrong with an audit event that a file's code caused, or None."""
    if concerns_renderer(event, args):
        return None
    if event.startswith(REACHING_OUT) or (event.startswith(CHANGING) and not may_write):
        return f"{event} {args!r}"[:200]
    if event in ("exec", "compile"):
        name = args[0].co_filename if event == "exec" else args[1]
        name = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
        legal = name in TEMPLATES or caller in WRITERS or name.startswith(("<frozen ", *LIBRARIES))
        return None if legal else f"{event} {name!r}"
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(args[0]))
        legal = os.fsdecode(args[0]) in TEMPLATES  # for the line of a syntax error; no such file
        legal = legal or path.startswith((*LIBRARIES, root, "/dev/null", "/proc/", "/sys/"))
        return None if legal else f"open {path!r}"
    return None


def concerns_renderer(event: str, args: tuple) -> bool:
    """Starting and ending the process that renders chat templates, in isolation and by this name
    alone, is legal: it is there so that a template of a stranger can be ended."""
    if event == "subprocess.Popen":
        return args[1][:4] == [sys.executable, "-I", "-S", template_worker.__file__]
    process = chat_template._renderer.process
    return event == "os.kill" and process is not None and args[0] == process.pid


def watch(root: Path, tell: Callable[[str], None], may_write: bool = False) -> None:
    """Tells of every breach from here to the end of this process."""
    legal = str(root.resolve())

    def hook(event: str, args: tuple) -> None:
        runs = event in ("compile", "exec")  # asked only then: to ask is an event itself
        caller = sys._getframe(1).f_code.co_filename if runs else ""
        if told := breach(event, args, caller, legal, may_write):
            tell(told)

    sys.addaudithook(hook)


def _try_case(open_it: Callable[[], object]) -> str | None:
    try:
        open_it()
    except UserError as error:
        told = str(error)
        if len(told.splitlines()) != 1 or len(told) > LINE:  # what prints it escapes the rest
            return f"a message of {len(told)} characters: {told[:300]!r}"
    except BaseException as error:
        places = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__)]
        file, line = ([p for p in places if p[0].startswith(PACKAGE)] or places)[-1]
        place = f"{Path(file).name}:{line}"
        return f"{type(error).__name__} at {place}: {str(error)[:200]!r}"
    return None


def _peak() -> int:
    """Most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(cases: Iterable[int], make: Make, root: Path, may_write: bool, report: int) -> None:
    """Writes a line before each case and one for each finding; a death names its case."""
    said = []
    watch(root, said.append, may_write)
    start = _peak()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    for number, case in enumerate(cases):
        name, open_it = make(case)
        os.write(report, json.dumps([case, name, None]).encode() + b"\n")
        said.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)  # for what waits and does not work
        told = _try_case(open_it)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak() - start
        if grown > MEMORY:
            said.append(f"took {grown >> 20} MiB" if number == 0 else AGAIN)
        for what in [*said, *([told] if told else [])][:5]:
            os.write(report, json.dumps([case, name, what]).encode() + b"\n")
        if grown > MEMORY // 2:
            return  # the next case begins in a small child again


def run_cases(
    cases: Iterable[int], make: Make, root: Path, may_write: bool = False
) -> list[Finding]:
    """Findings of all cases, in children of some hundred cases each.

    Args:
        make: case -> (its name, what is to be tried); called in the child.
        root: the only folder, beside the libraries, in which files may be opened.
        may_write: files and folders may be made, renamed and removed.
    """
    left, findings = list(cases), []
    while left:
        findings += _run_batch(left, make, root, may_write)
    return findings


def _run_batch(left: list[int], make: Make, root: Path, may_write: bool) -> list[Finding]:
    """Runs the first of `left` in a child and takes those that were tried off the list."""
    with tempfile.TemporaryFile() as report:
        with warnings.catch_warnings():  # the threads that Python 3.12 warns of hold no lock here
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                for number in (signal.SIGPROF, signal.SIGALRM):
                    signal.signal(number, signal.SIG_DFL)  # ends even what never comes back
                faulthandler.disable()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's own account of a panic
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                _child(left[:BATCH], make, root, may_write, report.fileno())
                os._exit(FINISHED)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        lines = [json.loads(line) for line in report]
    findings = [Finding(*line) for line in lines if line[2] not in (None, AGAIN)]
    tried = [case for case, _, what in lines if what is None]
    tried = tried[: len(tried) - any(what == AGAIN for _, _, what in lines)]
    if os.waitstatus_to_exitcode(status) != FINISHED:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"died of {signal.Signals(number).name}" if number else "left without a word"
        findings.append(Finding(*(lines[-1][:2] if lines else (left[0], "?")), how))
    del left[: max(len(tried), 1)]
    return findings
