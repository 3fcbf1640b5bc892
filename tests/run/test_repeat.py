"""The settings that run.json keeps, for another run: what is kept, and where paths lie."""

import json
from pathlib import Path

import pytest

from minirlhf.errors import UserError
from minirlhf.run.flags import parse
from minirlhf.run.repeat import read_run, seen_from, started_in
from minirlhf.run.settings import as_dict
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig

REQUIRED = "--model lm --data d.jsonl --reward 0.5*r.py:f math --out runs/a".split()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a model, data and a reward."""
    monkeypatch.chdir(tmp_path)
    Path("lm").mkdir()
    for name in ("d.jsonl", "r.py", "e.jsonl"):
        Path(name).touch()
    return tmp_path


def record(run: Path, words: list[str], config_class=PPOConfig, **facts) -> str:
    """Writes the run.json of a run with this command line; its path."""
    run.mkdir(parents=True)
    kept = as_dict(parse(config_class, words, "minirlhf"))
    facts = {"recipe": "ppo", "settings": kept, **facts}
    (run / "run.json").write_text(json.dumps(facts))
    return str(run / "run.json")


def test_a_run_json_is_a_config_file_of_its_recipe(home):
    words = [*REQUIRED, "--kl-coef", "0.3", "--lora-rank", "4", "--eval-data", "x=e.jsonl"]
    file, first = record(Path("runs/a"), words), parse(PPOConfig, words, "minirlhf ppo")
    again = parse(PPOConfig, ["--config", file, "--out", "runs/a"], "minirlhf ppo")
    assert again == first
    assert again.learning_rate == 3e-5  # ten times 3e-6, of adapters
    other = parse(PPOConfig, ["--config", file, "--out", "b", "--kl-coef", "1"], "minirlhf ppo")
    assert (other.kl_coef, other.out) == (1.0, "b")


def test_a_rate_that_was_given_is_no_default(home):
    """3e-6 is the default without adapters: with them it was asked for."""
    file = record(Path("runs/a"), [*REQUIRED, "--lora-rank", "4", "--learning-rate", "3e-6"])
    again = parse(PPOConfig, ["--config", file, "--out", "b"], "minirlhf ppo")
    assert again.learning_rate == 3e-6


def test_a_default_that_a_run_had_beats_a_preset(home):
    file = record(Path("runs/a"), REQUIRED)
    words = ["--preset", "instructgpt", "--config", file, "--out", "b"]
    assert parse(PPOConfig, words, "minirlhf ppo").batch_size == 64  # there 512


def test_what_was_of_its_place_is_not_repeated(home):
    file = record(Path("runs/a"), [*REQUIRED, "--resume", "--allow-data-change"])
    with pytest.raises(UserError, match=r"^--out: required, but not given$"):
        parse(PPOConfig, ["--config", file], "minirlhf ppo")
    again = parse(PPOConfig, ["--config", file, "--out", "b"], "minirlhf ppo")
    assert not (again.resume or again.allow_data_change)


def test_what_another_recipe_has_not_is_told(home):
    told = []
    file = record(Path("runs/a"), [*REQUIRED, "--steps", "7", "--critic", "rm"])
    again = parse(GRPOConfig, ["--config", file, "--out", "b"], "minirlhf grpo", told.append)
    assert (again.steps, again.reward) == (7, ("0.5*r.py:f", "math"))
    assert len(told) == 1 and told[0].startswith(f"note: {file}: no settings here: critic, train_c")
    assert " and " in told[0]


def test_paths_are_those_of_the_folder_of_the_run(home, tmp_path, monkeypatch):
    file = record(Path("runs/a"), [*REQUIRED, "--eval-data", "x=e.jsonl"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = parse(PPOConfig, ["--config", f"../{file}", "--out", "b"], "minirlhf ppo")
    assert again.model == str(home / "lm") and again.data == str(home / "d.jsonl")
    assert again.reward == (f"0.5*{home}/r.py:f", "math")
    assert again.eval_data == (f"x={home}/e.jsonl",) and again.out == "b"


def test_started_in_follows_a_run_that_was_moved_with_its_files(tmp_path):
    run = tmp_path / "moved" / "runs" / "a"
    facts = {"settings": {"out": "runs/a"}, "started_in": "/gone"}
    assert started_in(run, facts) == tmp_path / "moved"
    assert started_in(run, facts | {"settings": {"out": "runs/b"}}) == Path("/gone")
    assert started_in(run, {"settings": {"out": str(run)}, "started_in": "/x"}) == Path("/x")
    assert started_in(run, {"settings": {"out": "../runs/a"}}) is None


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("d.jsonl", "@/d.jsonl"),
        ("x=d.jsonl", "x=@/d.jsonl"),
        ("0.5*r.py:f", "0.5*@/r.py:f"),
        ("r.py:f", "@/r.py:f"),
        ("-1*lm", "-1*@/lm"),
        ("math", "math"),
        ("owner/name", "owner/name"),
        ("http://h:1/p", "http://h:1/p"),
        ("format:^a*b=c$", "format:^a*b=c$"),
        ("format:" + "a" * 5000, "format:" + "a" * 5000),  # longer than a path can be
        ("0.5*" + "a" * 300, "0.5*" + "a" * 300),
        ("a\0b", "a\0b"),
        ("", ""),
        ("/r.py:f", "/r.py:f"),
    ],
)
def test_seen_from_finds_the_path_in_a_place(home, place, seen):
    assert seen_from(home, place) == seen.replace("@", str(home))


@pytest.mark.parametrize("text", ["[]", "{}", '{"recipe": 1, "settings": {}}'])
def test_read_run_refuses_what_is_of_no_run(tmp_path, text):
    with pytest.raises(UserError, match=r"holds no run\.json: give the folder of a run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: is not of a run"):
        read_run(tmp_path)
