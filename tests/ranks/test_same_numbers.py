"""Two processes give the numbers of one: every recipe, on rows that two do not divide evenly.

Losses, gradient norms, all other metrics and the final weights, in float64 up to 1e-12 and in
float32 up to 1e-6 of each number. The runs of two processes are made by torchrun, all in one start.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import OK
from tests.bad_inputs import SHAPE
from tests.tiny_folders import save_lm, save_scorer, write_lines

ROOT = Path(__file__).parents[2]
REWARD = """
import os

def letters(completions, **columns):
    with open(os.environ["SEEN"], "a") as file:
        file.write(f"{len(completions)}\\n")
    return [text.count("e") - 0.25 * len(text) for text in completions]
"""
SAMPLING = ["--max-new-tokens", "5", "--micro-batch-size", "2", "--sample-every", "2"]
RUNS = {  # 7 and 5 rows on 2 ranks; the last batch of an epoch is ragged
    "sft": ["sft", "--data", "texts.jsonl", "--batch-size", "3", "--eval-data", "texts.jsonl",
            "--micro-batch-tokens", "40"],  # three steps: 3, 3 and 1 rows
    "reward": ["reward", "--data", "pairs.jsonl", "--batch-size", "5", "--eval-data",
               "pairs.jsonl", "--micro-batch-tokens", "60", "--normalize", "train"],
    "lists": ["reward", "--data", "lists.jsonl", "--batch-size", "2", "--heads", "2"],
    "dpo": ["dpo", "--data", "pairs.jsonl", "--batch-size", "5", "--eval-data", "pairs.jsonl",
            "--micro-batch-tokens", "60"],
    "kto": ["dpo", "--loss", "kto", "--data", "liked.jsonl", "--batch-size", "3", "--ref", "other"],
    "lora": ["dpo", "--data", "pairs.jsonl", "--batch-size", "5", "--lora-rank", "2",
             "--lora-dropout", "0.3"],
    "ppo": ["ppo", "--data", "prompts.jsonl", "--reward", "reward.py:letters", "--reward", "rm",
            "--batch-size", "5", "--mini-batches", "2", "--epochs", "2", *SAMPLING,
            "--score-scaling", "normalize", "--kl-target", "0.5", "--kl-horizon", "40",
            "--whiten-rewards", "--ptx-data", "texts.jsonl", "--ptx-coef", "0.5",
            "--ptx-batch-size", "3", "--critic-warmup-steps", "1", "--eval-data", "prompts.jsonl"],
    "critic": ["ppo", "--data", "prompts.jsonl", "--reward", "rm", "--critic", "rm",
               "--batch-size", "5", *SAMPLING, "--kl-in", "loss", "--kl-estimator", "full",
               "--top-k", "30"],
    "grpo": ["grpo", "--data", "prompts.jsonl", "--reward", "reward.py:letters", "--batch-size",
             "3", "--samples-per-prompt", "3", "--mini-batches", "2", "--loss-mean", "sequence",
             "--resample", "1", *SAMPLING, "--entropy-coef", "0.01"],
    "distill": ["distill", "--data", "prompts.jsonl", "--teacher", "other", "--batch-size", "5",
                "--gkd-beta", "0.5", *SAMPLING],
}
NAMED = ("--data", "--eval-data", "--reward", "--teacher", "--ref", "--critic", "--ptx-data")
DTYPES = {"float32": 1e-6, "float64": 1e-12}
BOTH = [pytest.param("float32", marks=pytest.mark.slow), "float64"]


def make_folder(folder: Path) -> Path:
    for name in ("lm", "other", "rm"):
        train_tokenizer([], 258, folder / name)
    save_lm(folder / "lm", SHAPE, vocab_size=258)
    save_lm(folder / "other", SHAPE, 1, vocab_size=258)
    save_scorer(folder / "rm", SHAPE, 2, vocab_size=258)
    (folder / "reward.py").write_text(REWARD)
    prompts = ["It", "It was", "One of", "I", "The whole of it", "No", "Once more"]
    answers = [" good", " was fine", " a", " bad it was", " so so", " e", " see the tree"]
    both = list(zip(prompts, answers, reversed(answers), strict=True))
    write_lines(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write_lines(folder / "texts.jsonl", [{"prompt": p, "response": a} for p, a, _ in both])
    pairs = [{"prompt": p, "chosen": a, "rejected": b + "!"} for p, a, b in both]
    write_lines(folder / "pairs.jsonl", pairs)
    lists = [{"prompt": p, "responses": [a, b + "!", "x"][: 2 + i % 2]}
             for i, (p, a, b) in enumerate(both)]
    write_lines(folder / "lists.jsonl", lists)
    liked = [{"prompt": p, "completion": a, "label": i % 3 > 0} for i, (p, a, _) in enumerate(both)]
    write_lines(folder / "liked.jsonl", liked)
    return folder


def argv_of(name: str, folder: Path, out: Path, *more: str) -> list[str]:
    recipe, *words = RUNS[name]
    for i, word in enumerate(words):
        if words[i - 1] in NAMED:
            words[i] = str(folder / word)
    steps = "3" if name == "sft" else "2"
    shared = ["--model", str(folder / "lm"), "--steps", steps, "--log-every", "1", "--save-every",
              "1", "--learning-rate", "1e-4", "--adam-epsilon", "1e-3", "--quiet"]
    return [recipe, *shared, *words, "--out", str(out), *more]


def torchrun(plan: Path, count: int = 2, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), "-m", "tests.ranks.worker", str(plan)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_alike(one: Path, two: Path, most: float) -> None:
    """Logs and weights of two runs."""
    logs = [rows(out / "metrics.jsonl") for out in (one, two)]
    assert len(logs[0]) == len(logs[1]) >= 2
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for metric in first.keys() - {"clock"}:
            assert second[metric] == pytest.approx(first[metric], rel=most, abs=most), metric
    check_files(one / "model", two / "model", most)


def check_files(one: Path, two: Path, most: float) -> None:
    """Every tensor of two folders."""
    files = {path.name for path in one.glob("*.safetensors")}
    assert files == {path.name for path in two.glob("*.safetensors")} != set()
    for name in files:
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for tensor, value in ours.items():
            torch.testing.assert_close(theirs[tensor], value, rtol=most, atol=most)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", BOTH)
def test_two_processes_give_the_numbers_of_one(name, dtype, runs):
    here, most = runs(dtype), DTYPES[dtype]
    one, two = here / "one" / name, here / "two" / name
    check_alike(one, two, most)
    samples = [rows(out / "samples.jsonl") for out in (one, two)]
    texts = [[row.get("response") for row in of] for of in samples]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", BOTH)
def test_a_function_is_called_once_for_each_row(dtype, runs):
    """By rank 0 alone: as often, and with as many rows, as with one process."""
    ours, theirs = ((runs(dtype) / f"{count}.seen").read_text() for count in ("one", "two"))
    assert ours == theirs and ours


@pytest.mark.parametrize("dtype", BOTH)
def test_all_ranks_end_alike(dtype, runs):
    for rank in range(2):
        codes = json.loads((runs(dtype) / f"two.json.{rank}").read_text())
        assert set(codes) == {OK} and len(codes) >= len(RUNS)
