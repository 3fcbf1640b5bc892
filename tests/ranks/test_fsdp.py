"""FSDP2: two processes that hold half of every model each give the numbers of one.

As in test_same_numbers, in the same start of torchrun: some recipes, a run that goes on in other
ways than it began, and one in bfloat16, whose masters are the shards.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minirlhf.errors import UserError
from minirlhf.run.flags import parse
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.sft_settings import SFTConfig
from tests.ranks.test_same_numbers import DTYPES, RUNS, argv_of, check_alike, check_files, rows

FEW = ("sft", "lora")  # the critic goes other ways, below
FSDP = ("--parallel", "fsdp")
ON = ("--resume", "--allow-setting-change")


def leg(name: str, world: Path, step: int, out: Path, *more: str) -> list[str]:
    """A run until this step, and no step beyond."""
    argv = argv_of(name, world, out, "--schedule", "constant", *more)
    argv[argv.index("--steps") + 1] = str(step)
    return argv


def half(world: Path, step: int, out: Path, *more: str) -> list[str]:
    return leg("sft", world, step, out / "half", "--dtype", "bfloat16", *more)


def of_one(world: Path, here: Path) -> list[list[str]]:
    """Runs of one process; those in ways/ go on below."""
    return [leg("critic", world, 4, here / "one" / "whole"), leg("critic", world, 1, here / "ways"),
            half(world, 2, here / "one")]


def of_two(world: Path, here: Path) -> list[list[str]]:
    return [*(argv_of(name, world, here / "fsdp" / name, *FSDP) for name in FEW),
            leg("critic", world, 2, here / "ways", *ON, *FSDP),
            leg("critic", world, 3, here / "ways", *ON, "--parallel", "ddp"),
            half(world, 2, here / "two", *FSDP), half(world, 3, here / "one", *ON, *FSDP)]


@pytest.fixture(scope="module")
def made(runs, world, on_one):
    here = runs("float64")
    on_one(leg("critic", world, 4, here / "ways", *ON), half(world, 3, here / "two", *ON))
    return here


def last_commit(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", FEW)
def test_shards_give_the_numbers_of_whole_models(name, made):
    check_alike(made / "one" / name, made / "fsdp" / name, 1e-12)
    check_files(*(last_commit(made / place / name) for place in ("one", "fsdp")), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_recipe_gives_the_numbers_of_one_process(name, dtype, runs, every_shared):
    one, shared = runs(dtype) / "one" / name, every_shared(dtype) / "fsdp" / name
    check_alike(one, shared, DTYPES[dtype])


# ------------------------------------------------------------------------- files, and other ways on


def test_a_run_goes_on_with_shards_with_copies_and_with_one_process(made):
    """One process, two with shards, two with copies, one: as one that made all four steps."""
    check_alike(made / "one" / "whole", made / "ways", 1e-12)
    check_files(last_commit(made / "one" / "whole"), last_commit(made / "ways"), 1e-12)


def kinds(file: Path) -> dict[str, tuple]:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def test_shards_in_bfloat16_leave_the_files_of_one_process(made):
    """Weights in bfloat16; moments and masters, of what was updated, in float32."""
    one, two = (last_commit(made / place / "half") for place in ("one", "two"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert kinds(one / name) == kinds(two / name)
    found = kinds(two / "optimizer.safetensors")
    masters = {name for name in found if name.endswith(".master")}
    assert len(masters) == len(kinds(two / "model.safetensors"))
    assert {dtype for _, dtype in found.values()} == {torch.float32}
    weights = load_file(two / "model.safetensors")
    moments = load_file(two / "optimizer.safetensors")
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, moments[f"{name}.master"].bfloat16())


def test_a_run_in_bfloat16_goes_on_with_and_without_shards(made):
    """Each was made for two steps in one way, and for a third in the other."""
    logs = [rows(made / place / "half" / "metrics.jsonl") for place in ("one", "two")]
    for first, second in zip(*logs, strict=True):
        # a gradient is summed in float32 of parts that are rounded to 8 bits
        for metric in {"loss", "grad_norm", "entropy"} & first.keys():
            assert second[metric] == pytest.approx(first[metric], rel=0.01), metric
    assert [row["step"] for row in logs[0]] == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------- refusals


def asked(config: type, *words: str) -> object:
    needed = ["--model", "m", "--data", "d", "--out", "o"]
    needed += ["--reward", "r"] if config is PPOConfig else []
    return parse(config, [*needed, *words], "minirlhf")


@pytest.mark.parametrize(("config", "words", "says"), [
    (SFTConfig, [*FSDP, "--lora-rank", "2", "--trunk-bits", "4"], "trunk_bits: fsdp shards no"),
    (PPOConfig, [*FSDP, "--offload-frozen"], "offload_frozen: fsdp shards frozen models"),
    (SFTConfig, ["--offload-params"], "offload_params: goes with --parallel fsdp"),
])
def test_what_does_not_go_with_shards_is_refused(config, words, says):
    with pytest.raises(UserError, match=says):
        asked(config, *words)


def test_to_offload_from_a_cpu_is_refused(monkeypatch):
    from minirlhf.run import distributed

    for name, value in zip(distributed.VARIABLES, ("0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--offload-params: the device is a CPU"):
        distributed.start(asked(SFTConfig, *FSDP, "--offload-params", "--device", "cpu"))
