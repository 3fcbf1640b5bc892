"""A lesson does to the weights what its recipe does with default settings, byte for byte."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minirlhf
from minirlhf import streams
from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import load_pretrained
from minirlhf.setup.reward import write_reward_model
from tests.kill_harness import RECIPES, SHAPE
from tests.tiny_folders import save_lm, write_lines

PACKAGE = Path(minirlhf.__file__).parent
WORDS = ["film", "plot", "scene", "hero", "song", "was", "is", "dull", "fine", "odd", "and", "a"]
REWARD = """
def short(completions, finish_reasons, mood):
    bonus = [0.5 if reason == "eos" else 0.0 for reason in finish_reasons]
    return [b + m - len(text) / 64 for text, b, m in zip(completions, bonus, mood)]


def tokens(completion_ids):
    return [[i % 5 - 2 for i in ids] for ids in completion_ids]
"""


def sentence(i: int, n: int) -> str:
    order = streams.permutation(7, "words", i, len(WORDS)).tolist()
    return " ".join(WORDS[k] for k in order[:n]).capitalize() + "."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, more rows than a batch of each recipe, a reward function and a model."""
    folder = tmp_path_factory.mktemp("world")
    train_tokenizer([sentence(i, 9) for i in range(20)], 300, folder / "model")
    size = load_tokenizer(folder / "model").vocab_size
    save_lm(folder / "model", SHAPE, vocab_size=size, max_position_embeddings=128)
    judge = RewardModel(load_pretrained(folder / "model"))
    write_reward_model(initialize_score(judge, torch.Generator().manual_seed(1)),
                load_tokenizer(folder / "model"), folder / "judge")
    rows = {
        "sft": [{"prompt": sentence(i, 3), "response": sentence(i + 50, 2 + i % 5)}
                for i in range(37)] + [{"prompt": "Long.", "response": "x " * 2000}],
        "reward": [{"prompt": sentence(i, 3), "chosen": sentence(i, 2 + i % 4),
                    "rejected": sentence(i + 50, 4), "margin": i % 3 / 4} for i in range(37)],
        "ppo": [{"prompt": sentence(i, 1 + i % 7), "mood": i / 10} for i in range(90)],
        "grpo": [{"prompt": sentence(i, 1 + i % 7), "mood": i / 10} for i in range(13)],
    }
    rows["dpo"], rows["distill"] = rows["reward"], rows["ppo"]
    train_tokenizer([sentence(i, 9) for i in range(20)], 300, folder / "teacher")
    save_lm(folder / "teacher", SHAPE, 1, vocab_size=size + 3, max_position_embeddings=128)
    for name, data in rows.items():
        write_lines(folder / f"{name}.jsonl", data)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


CASES = [  # recipe, steps (None: the default of both), reward
    ("sft", None, None),
    ("sft", 4, None),
    ("reward", None, None),
    ("reward", 5, None),
    ("dpo", None, None),
    ("dpo", 5, None),
    ("ppo", 2, "reward.py:short"),
    ("ppo", 1, "judge"),
    ("ppo", 1, "reward.py:tokens"),
    ("grpo", 2, "reward.py:short"),
    ("grpo", 1, "judge"),
    ("grpo", 1, "reward.py:tokens"),
    ("distill", 2, None),
    ("distill", None, None),
]


@pytest.mark.parametrize(("recipe", "steps", "reward"), CASES)
def test_lesson_trains_the_weights_of_its_recipe(recipe, steps, reward, world, tmp_path, capsys):
    model, data = str(world / "model"), str(world / f"{recipe}.jsonl")
    teacher = [str(world / "teacher")] if recipe == "distill" else []
    source = [] if reward is None else [str(world / reward)]
    flags = ["--reward", *source] if source else []
    flags += ["--teacher", *teacher] if teacher else []
    flags += [] if steps is None else ["--steps", str(steps)]
    out = tmp_path / "recipe"
    assert main([recipe, "--model", model, "--data", data, "--out", str(out), *flags]) == OK

    lesson = runpy.run_path(str(PACKAGE / "lessons" / f"{recipe}.py"), run_name="lesson")
    given = [] if steps is None else [str(steps)]
    with pytest.raises(FileExistsError):  # before it trains for nothing
        lesson["main"](model, *teacher, data, *source, str(tmp_path), *given)
    lesson["main"](model, *teacher, data, *source, str(tmp_path / "lesson"), *given)

    trained = (tmp_path / "lesson" / "model.safetensors").read_bytes()
    assert trained == (out / "model" / "model.safetensors").read_bytes()
    assert trained != (world / "model" / "model.safetensors").read_bytes()
    ours = {path.name for path in (tmp_path / "lesson").iterdir()}
    cards = {"card.md", "card.json"}  # of a reward model's run
    assert ours == {path.name for path in (out / "model").iterdir()} - cards
    assert "step 1 " in capsys.readouterr().out


def test_every_recipe_has_its_lesson_and_its_case():
    for wing in ("recipes", "lessons"):
        assert {p.stem for p in (PACKAGE / wing).glob("*.py")} == {*RECIPES, "__init__"}
    assert {recipe for recipe, _, _ in CASES} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_lesson_is_a_page(recipe):
    text = (PACKAGE / "lessons" / f"{recipe}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    lines = [line.strip() for line in text.splitlines()]
    step, clear = lines.index("optimizer.step()"), lines.index("optimizer.zero_grad()")
    assert lines[step - 1].startswith("clip_gradients(")
    assert any(line.endswith("backward()") for line in lines[clear:step]) and step - clear <= 6


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The package alone, as a clone that is not installed."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(PACKAGE, folder / "minirlhf", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("file", [
    pytest.param(f"{wing}/{recipe}.py", marks=[] if recipe == "ppo" else pytest.mark.slow)
    for wing in ("lessons", "recipes") for recipe in RECIPES
])
def test_a_file_runs_by_its_path_from_a_bare_clone(file, clone, tmp_path):
    """Python puts the folder of the script first on the path, which does not hold the package."""
    path = clone / "minirlhf" / file
    code = (
        "import runpy, sys; sys.path[0] = sys.argv[2]\n"  # as `python FILE` sets it
        "runpy.run_path(sys.argv[1], run_name='script')\n"
        "import minirlhf; print(minirlhf.__file__)"
    )
    command = [sys.executable, "-c", code, str(path), str(path.parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clone / "minirlhf" / "__init__.py")


@pytest.mark.parametrize("words", [["minirlhf/lessons/ppo.py"], ["-m", "minirlhf.lessons.ppo"]])
def test_a_lesson_says_what_it_takes_and_what_is_wrong(words, clone, tmp_path):
    def python(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, *words, *arguments], cwd=clone, capture_output=True,
                              text=True)
        return done.returncode, done.stdout, done.stderr

    usage = BAD_INPUT, "", "usage: python ppo.py MODEL DATA REWARD OUT [STEPS]\n"
    assert python() == python("m", "d", "r", "o", "ten") == usage
    code, out, error = python("no-such", "d.jsonl", "r.py:f", str(tmp_path / "out"))
    assert code == BAD_INPUT and not out and not (tmp_path / "out").exists()
    assert error.startswith("error: no-such/tokenizer.json: no such file")
    assert error.count("\n") == 1
