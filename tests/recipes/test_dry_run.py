"""`--dry-run` on every recipe: it measures, and leaves neither a file nor a trace in later runs."""

import os
import re
import signal
from importlib import import_module
from pathlib import Path

import pytest

from minirlhf import interrupt
from minirlhf.cli import VERBS, main
from minirlhf.errors import BAD_INPUT, NON_FINITE, OK, REWARD_SERVICE, STOPPED
from minirlhf.run import dry_run
from tests.kill_harness import KTO, LISTS, OWN, RECIPES, command, make_world

MODULES = {recipe: import_module(VERBS[recipe].module) for recipe in RECIPES}
CASES = {
    "sft": ("sft", {}),
    "sft, lora": ("sft", {"lora_rank": 2}),
    "reward": ("reward", {}),
    "reward, lists": ("reward", LISTS),
    "sft, 4 bits": ("sft", {"lora_rank": 2, "trunk_bits": 4}),
    "reward, lora": ("reward", {"lora_rank": 2, "normalize": "train"}),
    "dpo": ("dpo", {}),
    "dpo, lists": ("dpo", LISTS),
    "dpo, lora": ("dpo", {"lora_rank": 2}),
    "dpo, kto": ("dpo", KTO),
    "ppo": ("ppo", {}),
    "ppo, lora": ("ppo", {"lora_rank": 2}),
    "ppo, 8 bits": ("ppo", {"lora_rank": 2, "trunk_bits": 8}),
    "ppo, stops": ("ppo", {"stop": "!", "critic_warmup_steps": 2}),
    "distill": ("distill", {}),
    "distill, lora": ("distill", {"lora_rank": 2, "steps": 3}),
    "ppo, offloaded": ("ppo", {"offload_frozen": True}),
    "grpo": ("grpo", {}),
    "grpo, lora": ("grpo", {"lora_rank": 2}),
    "grpo, no reference": ("grpo", {"kl_coef": 0, "stop": "!"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def out(world, tmp_path):
    """--out two folders below one that exists; afterwards nothing stands there."""
    yield tmp_path / "runs" / "here"
    assert list(tmp_path.iterdir()) == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_dry_run_tells_peak_and_time_and_leaves_no_file(case, world, out, capsys):
    recipe, changes = CASES[case]
    before = files_of(world)
    assert main(command(recipe, world, out, dry_run=True, **changes)) == OK
    told = capsys.readouterr()
    assert re.search(
        r"\ndry run: 2 of 3 steps, on the longest rows\n"
        r"  peak memory     [0-9.]+ GB\n"
        r"  seconds a step  [0-9.]+\n"
        r"  the whole run   about \d+ s, saves not counted\n$",
        told.out,
    ), told.out
    assert "; --dry-run measures it" in told.out
    assert " in " not in told.out.splitlines()[-4]  # no model is said to be anywhere
    assert files_of(world) == before


def test_dry_run_of_ppo_samples_responses_of_the_greatest_length(world, out, capsys):
    """In the run all but the first character ends a response."""
    letters = " ".join(map(chr, range(34, 127))).split()
    argv = [*command("ppo", world, out, max_new_tokens=8, dry_run=True), "--stop", *letters]
    assert main(argv) == OK
    heading, row = re.findall(r"^ +(?:step|\d+) .*", capsys.readouterr().out, re.MULTILINE)[-2:]
    assert heading.split()[-1] == "tokens"
    lengths = [row.split()[-1]]
    assert lengths == ["8"]  # log_every is 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_after_a_dry_run_is_the_same_run(recipe, world, tmp_path):
    for name in ("with", "without"):
        out = tmp_path / name / "run"
        if name == "with":
            assert main(command(recipe, world, out, dry_run=True)) == OK
        assert main(command(recipe, world, out)) == OK
    folders = [tmp_path / name / "run" for name in ("with", "without")]
    one, other = (files_of(folder / "model") for folder in folders)
    assert one and one == other
    names = [{*files_of(folder)} for folder in folders]
    assert names[0] == names[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_may_have_the_folder_of_a_run_and_leaves_it_alone(recipe, world, tmp_path):
    out = tmp_path / "run"
    assert main(command(recipe, world, out, steps=1)) == OK
    before = files_of(tmp_path)
    assert main(command(recipe, world, out, dry_run=True)) == OK
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_goes_without_resume(recipe, world, out, capsys):
    assert main(command(recipe, world, out, dry_run=True, resume=True)) == BAD_INPUT
    assert capsys.readouterr().err == (
        "error: --dry-run: goes without --resume: leave out --resume: a dry run starts from the "
        "models and may have the same --out\n"
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_refuses_what_a_run_refuses(recipe, world, out, capsys):
    assert main(command(recipe, world, out, dry_run=True, model=world / "gone")) == BAD_INPUT
    assert "gone" in capsys.readouterr().err
    assert main(command(recipe, world, out, dry_run=True, columns="prompt=gone")) == BAD_INPUT
    for place in (world / "reward.py", world / "reward.py" / "run", world / "model" / "run"):
        assert main(command(recipe, world, place, dry_run=True)) == BAD_INPUT
        assert "give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_leaves_no_file_where_numbers_are_not_finite(recipe, world, out):
    assert main(command(recipe, world, out, dry_run=True, learning_rate=1e30)) == NON_FINITE


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_leaves_no_file_after_a_fault(recipe, world, out, monkeypatch):
    def fault(*arguments: object) -> None:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(dry_run.DryRun, "export", fault)
    with pytest.raises(ZeroDivisionError, match="of a test"):
        main(command(recipe, world, out, dry_run=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_leaves_no_file_after_a_signal(recipe, world, out, monkeypatch, capsys):
    train = getattr(MODULES[recipe], recipe)

    def stopped(*arguments: object):
        for step in train(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(MODULES[recipe], recipe, stopped)
    assert main(command(recipe, world, out, dry_run=True)) == STOPPED
    assert "dry run:" not in capsys.readouterr().out
    assert not interrupt.requested()


def test_dry_run_of_a_service_that_fails_says_of_no_step_that_it_is_saved(world, out, capsys):
    argv = command("ppo", world, out, dry_run=True, reward_retries=0)
    argv[argv.index("--reward") + 1] = "http://127.0.0.1:9/"  # the port that discards
    assert main(argv) == REWARD_SERVICE
    assert "saved" not in capsys.readouterr().err


def test_the_cases_cover_every_recipe():
    assert {recipe for recipe, _ in CASES.values()} == set(RECIPES) == set(OWN)
