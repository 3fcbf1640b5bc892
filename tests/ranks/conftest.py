"""Runs of one process and of two that many tests look at: torchrun is started once for all."""

import json
from functools import cache
from pathlib import Path

import pytest

from minirlhf.errors import OK
from tests.ranks import worker
from tests.ranks.test_fsdp import of_one, of_two
from tests.ranks.test_same_numbers import RUNS, argv_of, make_folder, torchrun


def in_one(plan: Path, *argvs: list[str], float64: bool = True) -> None:
    """Runs of this process."""
    plan.write_text(json.dumps({"float64": float64, "runs": argvs}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEN", str(plan.with_suffix(".seen")))
        for module in (worker.grpo, worker.ppo, worker.training):  # which it changes
            patch.setattr(module, "choose_dtype", module.choose_dtype)
        worker.run(str(plan))
    assert json.loads(Path(f"{plan}.0").read_text()) == [OK] * len(argvs)


def in_two(plan: Path, *argvs: list[str], float64: bool = True) -> None:
    """Runs of two processes."""
    plan.write_text(json.dumps({"float64": float64, "runs": argvs}))
    done = torchrun(plan, SEEN=str(plan.with_suffix(".seen")))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "view tensor" not in done.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory):
    """dtype -> the folder of all runs, those of one process in one/, of two in two/, of two that
    share out models in fsdp/; in float64 those of test_fsdp too."""

    @cache
    def made(dtype: str) -> Path:
        here, wide = tmp_path_factory.mktemp(dtype), dtype == "float64"
        for count, run, more in (("one", in_one, of_one), ("two", in_two, of_two)):
            argvs = [argv_of(name, world, here / count / name) for name in RUNS]
            run(here / f"{count}.json", *argvs, *(more(world, here) if wide else ()), float64=wide)
        return here

    return made


@pytest.fixture(scope="session")
def every_shared(world, runs, tmp_path_factory):
    """dtype -> the folder with fsdp/ of every recipe."""

    @cache
    def made(dtype: str) -> Path:
        here = tmp_path_factory.mktemp(f"{dtype}-fsdp")
        argvs = [argv_of(n, world, here / "fsdp" / n, "--parallel", "fsdp") for n in RUNS]
        in_two(here / "fsdp.json", *argvs, float64=dtype == "float64")
        return here

    return made


@pytest.fixture(scope="session")
def on_one(tmp_path_factory):
    """Makes runs of this process."""
    return lambda *argvs: in_one(tmp_path_factory.mktemp("last") / "one.json", *argvs)
