"""Runs that are killed, at any instant, go on to the bytes of a run that nothing interrupted."""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.kill_harness import (
    EVENTS,
    LISTS,
    RECIPES,
    Exit,
    Kill,
    Server,
    command,
    log_of,
    make_world,
    out_of,
    remains,
    run_command_line,
    wrong_with,
)

NEVER = 1000  # steps between saves: only the first and the last are committed
WIDE = 2100  # ids; with them a matrix is large enough for torch to share it between threads


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that is possible: a process that dies takes nothing written with it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def world(folder) -> Path:
    return make_world(folder / "world")


@pytest.fixture(scope="module")
def wide_world(folder) -> Path:
    return make_world(folder / "wide", WIDE)


@pytest.fixture(scope="module")
def whole(folder, world, server) -> Callable[[str, int], tuple[Path, Exit]]:
    """whole(recipe, save_every) -> the folder of an uninterrupted run, and how it ended."""

    @cache
    def of(recipe: str, save_every: int) -> tuple[Path, Exit]:
        out = folder / f"{recipe}-{save_every}"
        ended = server.run(command(recipe, world, out, save_every=save_every))
        assert ended.code == 0, log_of(command(recipe, world, out)).read_text("utf-8")
        return out, ended

    return of


def resumed(server: Server, argv: list[str], kills: list[Kill], threads: int = 1) -> str:
    """Starts the run, kills it at each instant, and lets it end; what it printed in all."""
    words, again = argv, [*argv, *(["--resume"] if "--resume" not in argv else [])]
    for kill in kills:
        assert server.run(words, kill, threads).code == -9, f"{kill} came too late"
        words = again
    ended = server.run(words, None, threads)
    printed = log_of(argv).read_text("utf-8")
    assert ended.code == 0, f"after {kills}:\n{printed}"
    return printed


def draw(rng: random.Random, measured: Exit) -> Kill:
    """An instant of a run: of the time that it took, or of its events of a kind."""
    what = rng.choice(("seconds", *EVENTS))
    if what == "seconds":
        return Kill(what, rng.uniform(0, measured.seconds))
    return Kill(what, rng.randint(1, measured.counts[what]))


def first_event(measured: Exit, operation: str, name: str) -> int:
    """Number of the first file event that does this to a file of such a name."""
    events = enumerate(measured.files, start=1)
    return next(i for i, event in events if event.startswith(operation) and name in event)


# ---- the same command gives the same bytes -------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_command_twice_gives_the_same_bytes(recipe, folder, world, whole, server):
    out, _ = whole(recipe, NEVER)
    argv = command(recipe, world, folder / f"{recipe}-again", save_every=NEVER)
    assert server.run(argv).code == 0
    assert wrong_with(out_of(argv), remains(out)) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_saving_changes_no_byte(recipe, whole):
    expected = remains(whole(recipe, NEVER)[0])
    for save_every in (1, 2):
        assert wrong_with(whole(recipe, save_every)[0], expected) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_remains_hold_every_kind_of_file(recipe, whole):
    left = remains(whole(recipe, NEVER)[0])
    last = "checkpoints/step-00000003"
    wanted = {
        "metrics.jsonl", "samples.jsonl", "model/model.safetensors", "model/config.json",
        "model/tokenizer.json", f"{last}/model.safetensors", f"{last}/optimizer.safetensors",
        f"{last}/state.json",
    }
    if recipe == "ppo":
        wanted |= {"best/model.safetensors", "best/config.json", "best/tokenizer.json"}
    assert wanted <= left.keys()
    assert b"clock" not in left["metrics.jsonl"]
    assert [line[:9] for line in left["metrics.jsonl"].splitlines()][-1] == b'{"step": '
    assert (left["samples.jsonl"] == b"") is (recipe == "sft")
    listed = {name for name in ("rejected.jsonl", "dropped.jsonl") if left.get(name)}
    assert len(listed) == (2 if recipe == "sft" else 0)


def test_wrong_with_names_what_differs_is_missing_or_was_left(whole, folder):
    out = whole("sft", NEVER)[0]
    expected = remains(out)
    spoiled = shutil.copytree(out, folder / "spoiled")
    (spoiled / "model" / "config.json").unlink()
    (spoiled / "samples.jsonl").write_text("{}\n", encoding="utf-8")
    (spoiled / "checkpoints" / ".tmp-step-00000003").mkdir()
    (spoiled / ".trash-model").mkdir()
    left = [".trash-model", "checkpoints/.tmp-step-00000003"]
    assert wrong_with(spoiled, expected) == ["model/config.json", "samples.jsonl", *left]


# ---- kills ---------------------------------------------------------------------------------------


def differences_after_kills(
    server, world, folder, whole, recipe: str, save_every: int, count: int
) -> list[str]:
    """Kills `count` runs once each; what differs at their ends from the run that was left alone."""
    expected = remains(whole(recipe, NEVER)[0])
    measured = whole(recipe, save_every)[1]
    rng, found = random.Random(f"{recipe} {save_every} {count}"), []
    for number in range(count):
        out = folder / f"{recipe}-{save_every}-{number}-of-{count}"
        argv, kill = command(recipe, world, out, save_every=save_every), draw(rng, measured)
        while (code := server.run(argv, kill).code) != -9:  # the clock ran slower than this run
            assert (code, kill.what) == (0, "seconds"), log_of(argv).read_text("utf-8")
            kill = Kill(kill.what, kill.at / 2)
            shutil.rmtree(out)
        printed = resumed(server, [*argv, "--resume"], [])
        found += [f"{file} after {kill}:\n{printed}" for file in wrong_with(out, expected)]
        shutil.rmtree(out)
    return found


@pytest.mark.parametrize("count", [
    10, pytest.param(25, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.long),
])
@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_at_any_instant_goes_on_to_the_same_bytes(
    recipe, save_every, count, server, world, folder, whole
):
    found = differences_after_kills(server, world, folder, whole, recipe, save_every, count)
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_twenty_times_goes_on_to_the_same_bytes(recipe, server, world, folder, whole):
    steps, rng, killed = 8, random.Random(recipe), 0
    alone = command(recipe, world, folder / f"{recipe}-twenty-alone", steps=steps)
    assert server.run(alone).code == 0
    argv, measured = (
        command(recipe, world, folder / f"{recipe}-twenty", steps=steps),
        whole(recipe, 1)[1],
    )
    words = argv
    while killed < 20:
        what = rng.choice(EVENTS)
        # within about a step, or the first few would end the run; its last lives may have too few
        kill = Kill(what, rng.randint(1, measured.counts[what] // 3))
        ended = server.run(words, kill)
        killed += ended.code == -9
        assert ended.code in (-9, 0), log_of(argv).read_text("utf-8")
        words = [*argv, "--resume"]
    resumed(server, words, [])
    assert wrong_with(out_of(argv), remains(out_of(alone))) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_command_line_killed_at_any_time_goes_on_to_the_same_bytes(
    recipe, world, folder, whole, server
):
    expected, rng = remains(whole(recipe, NEVER)[0]), random.Random(recipe)
    started = time.perf_counter()
    assert run_command_line(command(recipe, world, folder / f"{recipe}-timed")) == 0
    took = time.perf_counter() - started
    for number in range(10):
        argv = command(recipe, world, folder / f"{recipe}-line-{number}")
        delay = rng.uniform(0, took)
        while (code := run_command_line(argv, delay)) != -9:
            assert code == 0, log_of(argv).read_text("utf-8")
            delay /= 2
            shutil.rmtree(out_of(argv))
        assert run_command_line([*argv, "--resume"]) == 0, log_of(argv).read_text("utf-8")
        assert wrong_with(out_of(argv), expected) == [], f"after {delay} s"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_before_its_first_commit_starts_at_0_and_says_so(
    recipe, server, world, folder, whole
):
    measured = whole(recipe, 1)[1]
    begins = first_event(measured, "os.mkdir", "step-00000000") + 1
    commits = first_event(measured, "os.rename", "step-00000000")
    argv = command(recipe, world, folder / f"{recipe}-before")
    for at in (1, begins, commits):
        printed = resumed(server, argv, [Kill("file", at)])
        assert "no checkpoint yet: starting at step 0" in printed
        assert "resumed from" not in printed
        assert wrong_with(out_of(argv), remains(whole(recipe, NEVER)[0])) == []
        shutil.rmtree(out_of(argv))


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_a_run_killed_at_an_epochs_end_goes_on_with_the_next(recipe, server, world, folder, whole):
    # 8 rows, 4 a step: the commit of step 2 is the end of an epoch, and the next file operation
    # comes after it
    at = first_event(whole(recipe, 1)[1], "os.rename", "step-00000002") + 1
    argv = command(recipe, world, folder / f"{recipe}-epoch")
    printed = resumed(server, argv, [Kill("file", at)])
    assert "resumed from step-00000002" in printed
    assert wrong_with(out_of(argv), remains(whole(recipe, NEVER)[0])) == []


@pytest.mark.parametrize("place", ["forward", "model", "card.json", "card.md"])
def test_a_reward_run_killed_while_it_is_finished_is_finished_again(
    place, server, world, folder, whole
):
    """Normalised, exported, described: the last scoring, and the renames of what is written."""
    out, measured = whole("reward", NEVER)
    assert {"card.json", "card.md", "model/card.json", "model/card.md"} <= remains(out).keys()
    if place == "forward":
        kill = Kill("forward", measured.counts["forward"])
    elif place == "model":
        kill = Kill("file", first_event(measured, "os.rename", "-model"))
    else:
        at = [i for i, name in enumerate(measured.files, 1) if f".tmp-{place}" in name]
        kill = Kill("file", at[0])
    argv = command("reward", world, folder / f"reward-finish-{place}", save_every=NEVER)
    resumed(server, argv, [kill])
    assert wrong_with(out_of(argv), remains(out)) == []


def test_a_run_on_lists_killed_anywhere_leaves_the_same(server, world, folder):
    argv = command("reward", world, folder / "lists", **LISTS)
    measured, expected = server.run(argv), remains(out_of(argv))
    assert measured.code == 0
    for what, at in (("update", 4), ("forward", measured.counts["forward"] // 2), ("file", 40)):
        argv = command("reward", world, folder / f"lists-{what}", **LISTS)
        resumed(server, argv, [Kill(what, at)])
        assert wrong_with(out_of(argv), expected) == []


@pytest.mark.parametrize(("recipe", "changes"), [
    ("ppo", {"trunk_bits": 4, "rollout_bits": 8}), ("reward", {"trunk_bits": 8}),
])
def test_a_run_in_few_bits_killed_anywhere_leaves_the_same(
    recipe, changes, server, world, folder
):
    changes = {"lora_rank": 2, **changes}
    argv = command(recipe, world, folder / f"{recipe}-bits", **changes)
    measured, expected = server.run(argv), remains(out_of(argv))
    assert measured.code == 0, log_of(argv).read_text("utf-8")
    for what, at in (("update", 4), ("forward", measured.counts["forward"] // 2), ("file", 40)):
        argv = command(recipe, world, folder / f"{recipe}-bits-{what}", **changes)
        resumed(server, argv, [Kill(what, at)])
        assert wrong_with(out_of(argv), expected) == []


def test_a_run_killed_while_it_removes_a_commit_leaves_nothing_of_it(server, world, folder, whole):
    # past the rename that takes its name away, and past the first of its files
    at = first_event(whole("sft", 1)[1], "os.rename", "/checkpoints/step-") + 3
    argv = command("sft", world, folder / "sft-prune")
    assert server.run(argv, Kill("file", at)).code == -9
    assert len(list(out_of(argv).rglob(".trash-*"))) == 1
    resumed(server, [*argv, "--resume"], [])
    assert wrong_with(out_of(argv), remains(whole("sft", NEVER)[0])) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_a_finished_run_has_nothing_to_do_and_changes_nothing(
    recipe, server, folder, whole, world
):
    out, _ = whole(recipe, NEVER)
    argv = [*command(recipe, world, folder / f"{recipe}-finished", save_every=NEVER), "--resume"]
    shutil.copytree(out, out_of(argv))
    ended = server.run(argv)
    assert ended.code == 0
    printed = log_of(argv).read_text("utf-8")
    assert "resumed from step-00000003" in printed and "no steps left to do" in printed
    assert wrong_with(out_of(argv), remains(out)) == []
    assert ended.counts["update"] == 0
    # and that again, killed where the old model is put aside, and where the new one takes its name
    for name in ("/model", "-model"):
        resumed(server, argv, [Kill("file", first_event(ended, "os.rename", name))])
        assert wrong_with(out_of(argv), remains(out)) == []


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_a_place_that_is_counted_by_steps_keeps_its_batches(recipe, server, folder, whole, world):
    out = folder / f"{recipe}-rebatched"
    shutil.copytree(whole(recipe, NEVER)[0], out)
    for name, value in (("batch_size", 2), ("seed", 9), ("max_length", 41)):
        argv = command(recipe, world, out, save_every=NEVER, **{name: value})
        assert server.run([*argv, "--resume", "--allow-setting-change"]).code == 2
        told = log_of(argv).read_text("utf-8").splitlines()[-1]
        assert f"{name} was" in told
        assert told.endswith("resume with the settings of the first start")


# ---- two threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_threads_give_the_same_bytes_killed_or_not(recipe, server, wide_world, folder, whole):
    runs = [command(recipe, wide_world, folder / f"{recipe}-threads-{n}") for n in (1, 2)]
    first, second = (server.run(argv, None, 2) for argv in runs)
    assert first.code == second.code == 0
    alone = whole(recipe, NEVER)[1].threads  # 0 where the system does not tell
    assert first.threads > alone or alone == 0
    expected, rng = remains(out_of(runs[0])), random.Random(recipe)
    assert wrong_with(out_of(runs[1]), expected) == []
    for number in range(5):
        argv = command(recipe, wide_world, folder / f"{recipe}-killed-{number}")
        what = EVENTS[number % 3]
        kill = Kill(what, rng.randint(1, first.counts[what]))
        resumed(server, argv, [kill], 2)
        assert wrong_with(out_of(argv), expected) == [], f"after {kill}"
        shutil.rmtree(out_of(argv))
