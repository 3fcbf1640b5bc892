"""What no file of the package may do, and what no command does: run what it reads, or reach out.

The first half is read from the syntax trees, so it holds for code that no test runs; the second
half watches every command at work.
"""

import ast
import importlib
import io
import tempfile
from pathlib import Path

import pytest

from minirlhf import cli
from tests.bad_inputs import make_world
from tests.tiny_folders import change_json, write_lines
from tests.watched import run_cases

ROOT = Path(__file__).parents[1]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "minirlhf").rglob("*.py"))
}

# Modules that unpickle or run code that they are given.
MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml",
    "ctypes", "code", "codeop", "runpy", "imp",
}
PROCESSES = {"subprocess", "multiprocessing", "pty"}
STARTS_PROCESSES = {  # why it may
    "minirlhf/data/chat_template.py": "a stranger's template runs where it can be ended",
    "minirlhf/rewards/verifiers.py": "a pattern searches in a model's text where it can be ended",
}
# Calls that do, by the end of their dotted name.
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub", "numpy.load", "np.load",
    "serialization.load", "checkpoint.load", "os.system", "os.popen", "os.startfile", "os.fork",
    "os.execv", "os.execve", "os.execvp", "os.execl", "os.execlp", "os.spawnv", "os.spawnl",
    "os.posix_spawn", "os.posix_spawnp", "builtins.eval", "builtins.exec",
}
OBJECTS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
IMPORTLIB = {  # why it may import by name
    "minirlhf/__init__.py": "public names are imported when they are asked for",
    "minirlhf/cli.py": "a verb's module, by the table of verbs",
    "minirlhf/rewards/user_code.py": "the user's own file of --reward file.py:f, which is trusted",
    "minirlhf/console.py": "asks whether ipywidgets is installed",
    "minirlhf/run/trackers.py": "asks whether a tracker's package is installed",
}
SWALLOWED = {  # why every exception may end there
    "minirlhf/run/trackers.py": "whatever a tracker raises ends the tracker, not the run",
    "minirlhf/errors.py": "where other processes hear of a fault first, it is raised again",
    "minirlhf/ranks.py": "whatever one process raises, all raise",
    "minirlhf/run/distributed.py": "what a thread raised is raised by who waits for it",
}


# ---- rules: what is wrong with a node, or None ---------------------------------------------------


def imported(node: ast.AST) -> set[str]:
    """Every dotted name, from its top, that an import statement brings in."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


PLAIN = {f"yaml.{name}" for name in (  # of PyYAML what makes no object but plain values
    "SafeLoader", "YAMLError", "compose", "events", "nodes", "parse")}


def runs_what_it_reads(node: ast.AST) -> bool:
    names = imported(node) - PLAIN
    if any(name.split(".")[0] in MODULES or name in CALLS for name in names):
        return True
    if isinstance(node, ast.Attribute):
        dotted = ast.unparse(node)
        return any(dotted == name or dotted.endswith(f".{name}") for name in CALLS)
    if isinstance(node, ast.keyword):
        return node.arg in ("allow_pickle", "weights_only", "shell", "trust_remote_code")
    # read, not set: a setting may be called `compile`
    reads = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    return reads and node.id in BUILTINS


def starts_processes(node: ast.AST) -> bool:
    return any(name.split(".")[0] in PROCESSES for name in imported(node))


def sends_objects(node: ast.AST) -> bool:
    """torch.distributed pickles whatever is not a tensor: all_gather_object and its like."""
    name = getattr(node, "attr", getattr(node, "id", ""))
    return name in OBJECTS or any(part.split(".")[-1] in OBJECTS for part in imported(node))


def imports_by_name(node: ast.AST) -> bool:
    return any(name.split(".")[0] in ("importlib", "pkgutil") for name in imported(node))


def swallows(node: ast.AST) -> bool:
    """A handler of every exception that does not end in a raise, or has another way out; one that
    names none at all, whatever it does."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    if node.type is None:
        return True
    caught = getattr(node.type, "elts", [node.type])
    broad = any(ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
    ways_out = ast.Return | ast.Continue | ast.Break | ast.Yield
    leaves = any(isinstance(part, ways_out) for part in ast.walk(node))
    return broad and (leaves or not isinstance(node.body[-1], ast.Raise))


def suppresses(node: ast.AST) -> bool:
    """contextlib.suppress of every exception is a bare except in other words."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")):
        return False
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in node.args)


def takes_an_id_for_false(node: ast.AST) -> bool:
    """Token id 0 is a token: `pad_id or eos_id` would lose it."""

    def name(value: ast.expr) -> str:
        match value:
            case (
                ast.Name(id=name)
                | ast.Attribute(attr=name)
                | ast.Subscript(slice=ast.Constant(value=name))
                | ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=name), *_])
            ):
                return str(name)
        return ""

    is_or = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)
    return is_or and any(name(value).endswith("_id") for value in node.values)


def asserts(node: ast.AST) -> bool:
    """`python -O` leaves assertions out, and who gives bad input deserves a sentence."""
    return isinstance(node, ast.Assert)


RULES = {  # rule -> what it must see
    runs_what_it_reads: (
        "import pickle", "import torch, marshal", "from pickle import loads", "import yaml.reader",
        "from torch import load",
        "torch.load(path)", "torch.save(x, path)", "x = torch.load", "a.torch.jit.load(f)",
        "numpy.load(path, allow_pickle=True)", "np.load(path)", "eval(text)", "exec(text)",
        "compile(text, '', 'exec')", "__import__(text)", "os.system(text)", "os.popen(text)",
        "run(text, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.distributed.checkpoint.load(x)", "builtins.eval(x)", "from os import system",
        "f = eval",
    ),
    sends_objects: (
        "dist.all_gather_object(out, x)", "torch.distributed.broadcast_object_list(x)",
        "from torch.distributed import gather_object", "scatter = dist.scatter_object_list",
    ),
    swallows: (
        "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    print('x')",
        "try:\n    f()\nexcept (OSError, Exception) as e:\n    x = e",
        "try:\n    f()\nexcept BaseException:\n    if x:\n        raise",
        "def g():\n  try:\n    f()\n  except Exception:\n    if x:\n        return 1\n    raise",
    ),
    suppresses: ("with suppress(Exception):\n    f()", "contextlib.suppress(OSError, Exception)"),
    takes_an_id_for_false: (
        "pad_id or eos_id", "a = None or config.pad_id", "raw['pad_token_id'] or 0",
        "raw.get('pad_token_id') or 0", "pad_token_id or 5",
    ),
    asserts: ("assert x > 0, 'steps must be positive'", "assert isinstance(path, str)"),
}
LEGAL = """
import json, torch.nn as nn
from torch.distributed import all_reduce
model.eval(); re.compile(x); torch.compile(f); checkpoint.load_checkpoint(s, f); load_file(path)
pad_id is None or eos_id == 0; pad_id and x; names or ids; is_object(x); this_object = 1
try:
    f()
except OSError:
    pass
except Exception as error:
    clean_up()
    raise UserError(path, str(error)) from None
with suppress(FileNotFoundError):
    g()
raise ValueError("no")
"""


def breaches(rule) -> list[str]:
    """'file:line' of every node that breaks a rule."""
    return [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if rule(node)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_no_file(rule):
    may = SWALLOWED if rule is swallows else ()
    assert not [place for place in breaches(rule) if place.rpartition(":")[0] not in may]


@pytest.mark.parametrize("rule", RULES)
def test_rule_sees_what_it_forbids_and_nothing_else(rule):
    for code in RULES[rule]:
        assert any(map(rule, ast.walk(ast.parse(code)))), code
    for node in ast.walk(ast.parse(LEGAL)):
        assert not rule(node), ast.unparse(node)


def test_processes_are_started_only_where_it_is_said_why():
    assert {place.rpartition(":")[0] for place in breaches(starts_processes)} == set(
        STARTS_PROCESSES
    )
    for code in ("from subprocess import run", "import multiprocessing.pool as p", "import pty"):
        assert starts_processes(ast.parse(code).body[0])
    for place, call, worker in (
        ("data/chat_template.py", "Popen", "template_worker.__file__"),
        ("rewards/verifiers.py", "run", "worker"),
    ):
        tree = TREES[f"minirlhf/{place}"]
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith("subprocess.")]
        assert [ast.unparse(use.func) for use in uses] == [f"subprocess.{call}"]
        command = ast.unparse(uses[0].args[0])
        assert command.startswith(f"[sys.executable, '-I', '-S', {worker}, ")


def test_modules_are_imported_by_name_only_where_it_is_said_why():
    assert {place.rpartition(":")[0] for place in breaches(imports_by_name)} == set(IMPORTLIB)
    assert imports_by_name(ast.parse("import importlib.util").body[0])
    assert imports_by_name(ast.parse("from importlib import import_module").body[0])


# ---- the commands at work ------------------------------------------------------------------------

ROW = {"prompt": "The film", "chosen": " was good.", "rejected": " was bad.", "response": " was."}
COMMANDS = {
    "sft": "sft --model lm --data rows.jsonl --eval-data rows.jsonl --out sft --steps 1",
    "sft, new": "sft --init-config shape.json --data rows.jsonl --out new --steps 1",
    "sft, adapters": "sft --model lm --data rows.jsonl --out lora --steps 1 --lora-rank 2",
    "export": "export lora --merge --out merged",
    "reward": "reward --model lm --data rows.jsonl --eval-data rows.jsonl --out rm1 --steps 1",
    "ppo": "ppo --model lm --data rows.jsonl --reward rm --out ppo --steps 1 --batch-size 2 "
    "--micro-batch-size 2 --max-new-tokens 4 --sample-every 1 --save-rollouts",
    "ppo, resumed": "ppo --model lm --data rows.jsonl --reward rm --out ppo --steps 1 "
    "--batch-size 2 --micro-batch-size 2 --max-new-tokens 4 --sample-every 1 --save-rollouts "
    "--resume",
    "explain": "explain ppo ppo",
    "ppo, own reward": "ppo --model lm --data rows.jsonl --reward reward.py:length --out own "
    "--steps 1 --batch-size 2 --micro-batch-size 2 --max-new-tokens 4",
    "grpo": "grpo --model lm --data rows.jsonl --reward rm --out grpo --steps 1 --batch-size 1 "
    "--samples-per-prompt 4 --mini-batches 1 --micro-batch-size 2 --max-new-tokens 4",
    "dpo": "dpo --model lm --data rows.jsonl --eval-data rows.jsonl --out dpo --steps 1",
    "distill": "distill --model lm --teacher sft/model --data rows.jsonl --out distill "
    "--steps 1 --batch-size 2 --max-new-tokens 4",
    "best-of": "best-of --model lm --data rows.jsonl --reward length:2 --samples 16 --threshold 0 "
    "--max-new-tokens 32 --stop a e i o --out best.jsonl",
    "check": "check --model lm --data rows.jsonl --recipe reward",
    "report": "report ppo sft rm1 --out report.html",
    "dry run": "reward --model lm --data rows.jsonl --out dry/run --dry-run",
    "rerun": "rerun sft --out again",
    "sample": "sample --model lm --data rows.jsonl --max-new-tokens 4 --out sampled.jsonl",
    "chat": "chat ppo --max-new-tokens 4 --heat advantage --reward rm",
    "score": "score --model rm --data rows.jsonl --out scored.jsonl",
    "selftest": "selftest --device cpu",
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working folder with a language model, a reward model, data and a file of rewards."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_world(folder)
    write_lines(Path("rows.jsonl"), [ROW, ROW])
    change_json(Path("shape.json"), vocab_size=300)
    # What they import is not what they do; the last is torch's, once it is to be deterministic.
    for module in (*(verb.module for verb in cli.VERBS.values()), "torch._inductor"):
        importlib.import_module(module)
    return folder


def run(words: str) -> None:
    code = cli.main(words.split())
    if code:
        raise AssertionError(f"exit code {code}")


def test_no_command_reaches_out(world, monkeypatch):
    monkeypatch.setattr("tests.watched.SECONDS", 60)  # it is not their speed that is looked at
    monkeypatch.setattr("tests.watched.MEMORY", 1 << 40)
    commands = list(COMMANDS.items())
    monkeypatch.setattr("sys.stdin", io.StringIO("The film\n/save said.jsonl\n"))  # of chat
    found = run_cases(
        range(len(commands)),
        lambda i: (commands[i][0], lambda: run(commands[i][1])),
        world.parent, may_write=True,
    )
    # The file of --reward is the user's own, and trusted: nothing else is run that is no library's.
    own = {f.what for f in found if f.name == "ppo, own reward"}
    assert own == {f"{event} '{world / 'reward.py'}'" for event in ("compile", "exec")}
    assert [f for f in found if f.name != "ppo, own reward"] == []
    for made in ("sft/model", "new/model", "lora/model", "rm1/model", "ppo/model", "own/model",
                 "grpo/model", "dpo/model", "distill/model", "merged"):
        assert (world / made / "model.safetensors").exists()
    assert (world / "said.jsonl").exists()
    assert (world / "sampled.jsonl").exists() and (world / "scored.jsonl").exists()


NO_FILES = {"demo", "metrics", "coming-from", "tasks", "completion", "learn"}
TO_BE_REACHED = {"serve"}  # tests/test_serve.py says by whom


def test_every_verb_that_reads_files_is_watched():
    watched = {words.split()[0] for words in COMMANDS.values()}
    assert watched >= set(cli.VERBS) - NO_FILES - TO_BE_REACHED
