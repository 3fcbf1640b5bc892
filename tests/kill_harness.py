"""Kills runs at chosen instants, resumes them, and reads what they leave.

As a script it is a fork server: a process that has imported torch but never computed, has one
thread, and forks a child for each run that is asked for. So a run starts in milliseconds, in a
process as fresh as that of a command line, whatever other tests have done to this one.
"""

import gc
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from minirlhf.cli import VERBS

TESTS = Path(__file__).parent
# One core for every library's pool; a pool of two that waits for work must not burn the core.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
# All that tests take one by one; what a new one does here stands in OWN.
RECIPES = [name for name, verb in VERBS.items() if ".recipes." in verb.module]
EVENTS = ("file", "forward", "update")
OF_FILES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


class Kill(NamedTuple):
    """An instant: seconds after the start, or before the n-th event of a kind, n from 1 on.

    file: before an operation on a file of the run. forward: before a module computes: while
    sampling, measuring, training, evaluating. update: before a backward pass, and before and
    after a step of the optimizer.
    """

    what: str  # "seconds" or one of EVENTS
    at: float


class Exit(NamedTuple):
    """How a run ended. What follows `seconds` is empty where it was killed."""

    code: int  # -9 where it was killed
    seconds: float
    counts: dict[str, int]  # events of each kind
    files: list[str]  # the operation and the file of each event of the kind "file"
    threads: int  # of the operating system's, when it ended
    imported: list[str]


# ---- the server ----------------------------------------------------------------------------------


def watch(folder: str, kill: Kill | None) -> tuple[dict[str, int], list[str]]:
    """Counts the events of this process, and kills it before the one that is asked for.

    Returns:
        the counts, and the operation and file of each event of the kind "file"; both still grow.
    """
    from torch import Tensor
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim import optimizer

    counts, files = dict.fromkeys(EVENTS, 0), []

    def happens(event: str) -> None:
        counts[event] += 1
        if kill == (event, counts[event]):
            os.kill(os.getpid(), signal.SIGKILL)

    def of_file(operation: str, arguments: tuple) -> None:
        if operation not in OF_FILES:
            return
        path = str(arguments[0])
        # rmtree names what it removes relative to a folder that it holds open
        relative = operation in ("os.remove", "os.rmdir") and not os.path.isabs(path)
        if path.startswith(folder) or relative:
            files.append(f"{operation} {path.removeprefix(folder)}")
            happens("file")

    def before(function: Callable, tell: Callable[..., None]) -> Callable:
        def told(*arguments: object, **named: object) -> object:
            tell(*arguments)
            return function(*arguments, **named)

        return told

    def fsync(handle: int) -> None:
        files.append("fsync")
        happens("file")

    sys.addaudithook(of_file)
    os.fsync = before(os.fsync, fsync)
    Tensor.backward = before(Tensor.backward, lambda *_: happens("update"))
    optimizer.register_optimizer_step_pre_hook(lambda *_: happens("update"))
    optimizer.register_optimizer_step_post_hook(lambda *_: happens("update"))
    register_module_forward_pre_hook(lambda *_: happens("forward"))
    return counts, files


def child(request: dict, report: int) -> NoReturn:
    """Runs a command line in this process, tells of it, and ends the process."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        import torch

        from minirlhf import cli

        torch.set_num_threads(request["threads"])
        loaded, kill = set(sys.modules), request["kill"] and Kill(*request["kill"])
        counts, files = watch(request["argv"][request["argv"].index("--out") + 1], kill)
        code = cli.main(request["argv"])
        tasks = Path("/proc/self/task")
        told = {
            "counts": counts, "files": files,
            "threads": len(list(tasks.iterdir())) if tasks.exists() else 0,
            "imported": sorted(n for n in set(sys.modules) - loaded if n.startswith("torch.")),
        }
        with os.fdopen(report, "w") as pipe:
            json.dump(told, pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def trial(request: dict) -> Exit:
    """Forks a child for the request; kills it where that is to happen after some seconds."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    gc.freeze()  # a child's collector would look at all of torch, and copy it
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(request, writer)
    os.close(writer)
    what, at = request["kill"] or ("", 0)
    # Readable when the child has something to tell, or has ended.
    if not select.select([reader], [], [], at if what == "seconds" else None)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    nothing = {"counts": {}, "files": [], "threads": 0, "imported": []}
    return Exit(code, time.perf_counter() - started, **(json.loads(told) if told else nothing))


def serve() -> None:
    for module in ("minirlhf.cli", *(f"minirlhf.recipes.{recipe}" for recipe in RECIPES)):
        importlib.import_module(module)
    for line in sys.stdin:
        ended = trial(json.loads(line))
        for name in ended.imported:  # once here, instead of in every child
            importlib.import_module(name)
        print(json.dumps(ended), flush=True)


# ---- its client ----------------------------------------------------------------------------------


class Server:
    """The server's process; use as a context manager."""

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, argv: list[str], kill: Kill | None = None, threads: int = 1) -> Exit:
        """Runs `minirlhf ARGV`; what it prints is added to the log beside its --out."""
        request = {"argv": argv, "log": str(log_of(argv)), "kill": kill, "threads": threads}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Exit(*json.loads(self.process.stdout.readline()))


def run_command_line(argv: list[str], seconds: float | None = None) -> int:
    """`python -m minirlhf ARGV` as a user starts it, killed after some seconds; the exit code."""
    with log_of(argv).open("ab") as log:
        command = [sys.executable, "-m", "minirlhf", *argv]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    return os.environ | ENVIRONMENT | {"PYTHONPATH": path}


def out_of(argv: list[str]) -> Path:
    return Path(argv[argv.index("--out") + 1])


def log_of(argv: list[str]) -> Path:
    return out_of(argv).with_suffix(".log")


# ---- tiny runs -----------------------------------------------------------------------------------

SHAPE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 48, "eos_token_id": 0,
}
REWARD = """
import random
import numpy as np
import torch

def draw():  # too little to change which response is the best
    return (random.random() + np.random.rand() + torch.rand(()).item()) / 1000

AT_IMPORT = draw()

def letters(completions, bonus):
    drawn = AT_IMPORT + draw()
    return [drawn + sum(ord(c) % 7 for c in t) + b for t, b in zip(completions, bonus, strict=True)]

def parity(completions, bonus):  # so that the two responses to a prompt often agree
    return [sum(map(ord, t)) % 2 + b for t, b in zip(completions, bonus, strict=True)]
"""
WORDS = ("good", "bad", "long", "dull", "fine", "a film", "warm", "odd")
ROWS = {
    "texts": [{"prompt": "It was", "completion": f" {word}."} for word in WORDS],
    "pairs": [
        {
            "prompt": "It was",
            "chosen": f" {a}.",
            "rejected": f" {b}!",
            "margin": i / 4,
            "chosen_probability": 1 - i / 20,
        }
        for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    ],
    "lists": [
        {"prompt": "It was", "responses": [f" {word}." for word in WORDS[i:]], "best": i % 2}
        for i in range(6)
    ],
    "prompts": [{"prompt": "It was" + "!" * i, "bonus": i / 8} for i in range(5)],
    "liked": [
        {"prompt": "It was" + "!" * (i % 3), "completion": f" {word}.", "label": i % 3 > 0}
        for i, word in enumerate(WORDS)
    ],
}
# A row that is no JSON and one that is too long, for rejected.jsonl and dropped.jsonl.
LEFT_OUT = {"texts": "{\n" + json.dumps({"prompt": "It was", "completion": "!" * 40}) + "\n"}
ALL = {
    "steps": 3, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "save_every": 1, "keep": 2,
}
# What can be lost is on: accumulation, evaluation, tables of samples, an adapting kl_coef, running
# score moments, early stops, lines of the log over two steps, whose open windows are then part of a
# save. An epoch has 2 steps. A reward model is an ensemble that is normalised, and writes a card.
OWN = {
    "sft": {
        "data": "texts", "eval_data": "few_texts", "eval_every": 2, "micro_batch_tokens": 30,
        "bad_rows": "skip", "max_length": 40,
    },
    "reward": {
        "data": "pairs", "eval_data": "few_pairs", "eval_every": 2, "micro_batch_tokens": 60,
        "show_samples": 2, "label_smoothing": 0.1, "heads": 2, "lcb_coef": 0.5,
        "center_rewards_coefficient": 0.01, "normalize": "eval",
    },
    "dpo": {
        "data": "pairs", "eval_data": "few_pairs", "eval_every": 2, "micro_batch_tokens": 60,
        "show_samples": 2, "label_smoothing": 0.1, "sft_coef": 0.5,
    },
    "ppo": {
        "data": "prompts", "epochs": 2, "mini_batches": 2, "micro_batch_size": 2,
        "max_new_tokens": 3, "kl_target": 0.1, "kl_horizon": 50, "sample_every": 2,
        "sample_prompts": 2, "early_stop_kl": 1e-3, "score_scaling": "normalize", "top_p": 0.9,
        "eval_data": "few_prompts", "eval_every": 2, "keep_best": True,
        "seed": 2,
    },
    "grpo": {
        "data": "prompts", "samples_per_prompt": 2, "resample": 2, "epochs": 2, "mini_batches": 2,
        "micro_batch_size": 2, "max_new_tokens": 3, "sample_every": 2, "sample_prompts": 2,
        "early_stop_kl": 1e-4, "top_p": 0.9, "eval_data": "few_prompts", "eval_every": 2,
        "keep_best": True, "seed": 2,
    },
    "distill": {
        "data": "prompts", "teacher": "teacher", "gkd_beta": 0.5, "micro_batch_size": 2,
        "max_new_tokens": 3, "top_p": 0.9, "sample_every": 2, "sample_prompts": 2,
        "eval_data": "few_prompts", "eval_every": 2, "seed": 2,
    },
}


def make_world(folder: Path, vocabulary: int = 258) -> Path:
    """Fills a folder with a tiny model, its tokenizer, a teacher of it that is padded further, data
    for each recipe, a reward."""
    from minirlhf.data.tokenizer import train_tokenizer
    from tests.tiny_folders import save_lm

    train_tokenizer([], 258, folder / "model")
    save_lm(folder / "model", SHAPE, vocab_size=vocabulary)
    train_tokenizer([], 258, folder / "teacher")
    save_lm(folder / "teacher", SHAPE | {"hidden_size": 8}, 1, vocab_size=vocabulary + 2)
    held_out = {f"few_{name}": ROWS[name][:3] for name in ROWS}
    for name, rows in (ROWS | held_out).items():
        text = "".join(json.dumps(row) + "\n" for row in rows) + LEFT_OUT.get(name, "")
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


def command(recipe: str, world: Path, out: Path, **changes: object) -> list[str]:
    """The words after `minirlhf` of a run of 3 steps."""
    settings = {"model": world / "model", "out": out, **ALL, **OWN[recipe], **changes}
    for name in ("data", "eval_data"):
        if name in settings:
            settings[name] = world / f"{settings[name]}.jsonl"
    if "teacher" in settings:
        settings["teacher"] = world / settings["teacher"]
    if function := {"ppo": "letters", "grpo": "parity"}.get(recipe):
        settings["reward"] = f"{world / 'reward.py'}:{function}"
    words = [recipe]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}" if value is False else f"--{flag}"]
        words += [] if isinstance(value, bool) else [str(value)]
    return words


LISTS = {"data": "lists", "eval_data": "few_lists", "label_smoothing": 0.0}  # instead of pairs
KTO = {"data": "liked", "eval_data": "few_liked", "label_smoothing": 0.0, "loss": "kto",
       "desirable_weight": 1.5}


# ---- what a run leaves ---------------------------------------------------------------------------


def remains(out: Path) -> dict[str, bytes]:
    """All that no kill may change: logs without their clock, the model, the last commit."""
    left = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    left["metrics.jsonl"] = re.sub(rb', "clock": \{[^{}]*\}', b"", left["metrics.jsonl"])
    last = max((out / "checkpoints").glob("step-*"))
    left |= {path.name: path.read_bytes() for path in out.glob("card.*")}
    exported = (p for name in ("model", "best") for p in (out / name).glob("*"))
    for path in (*exported, *last.glob("*.safetensors"), last / "state.json"):
        left[str(path.relative_to(out))] = path.read_bytes()
    numbers = json.loads((last / "state.json").read_text("utf-8"))
    del numbers["log_bytes"]["metrics.jsonl"]  # the clock's digits are among them
    left[str((last / "state.json").relative_to(out))] = json.dumps(numbers).encode()
    return left


def wrong_with(out: Path, expected: dict[str, bytes]) -> list[str]:
    """Names of files that differ from those expected, are missing, or should not be there."""
    found = remains(out)
    differing = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
    unswept = sorted(out.rglob(".*-*"))  # .tmp-…, .trash-… and the like
    return sorted(differing) + [str(path.relative_to(out)) for path in unswept]


if __name__ == "__main__":
    serve()
