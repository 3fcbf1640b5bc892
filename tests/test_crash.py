"""A save that is killed, loses power or meets a broken disk at any of its file operations.

Every scene is a folder, what is done to it, and what may be read from it afterwards: the old state
or the new one, bit for bit. `crash_model` says what a power loss may leave.
"""

import copy
import errno
import functools
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from minirlhf import errors
from minirlhf.files import atomic
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.run.checkpoint import TrainState, load_checkpoint, newest_commit, save_checkpoint
from minirlhf.run.folder import Run
from minirlhf.run.optim import make_optimizer
from minirlhf.run.resume import RunSettings
from tests.crash_model import (
    PAGE,
    Disk,
    Operation,
    Tree,
    put_back,
    read_tree,
    record,
    watching,
    write_tree,
)
from tests.run.test_checkpoint import contents
from tests.tiny_folders import random_lm
from tests.tiny_reward import TINY

DISKS_WANTED = 2000  # different ones after a power loss, over all scenes


def make_state(step: int, best: float | None = None) -> TrainState:
    """A state of a model whose files are longer than a page; `best` tells two of one step apart."""
    torch.manual_seed(0)
    model = nn.Linear(30, 40)  # 1,240 numbers of 4 bytes: two pages, its moments three
    state = TrainState(model, make_optimizer(model, 0.1), best=best)
    for _ in range(step):
        model(torch.ones(1, 30)).square().mean().backward()
        state.optimizer.step()
        state.step += 1
    return state


state_at = functools.cache(make_state)  # saved, never changed


@functools.cache
def known(step: int, best: float | None = None) -> dict:
    return contents(state_at(step, best))


@functools.cache
def reader() -> TrainState:
    return make_state(1)


def read_newest(root: Path) -> dict | None:
    """What a resumed run would start from; None: from the beginning."""
    commit, _ = newest_commit(root / "checkpoints")
    if commit is None:
        return None
    load_checkpoint(reader(), commit)
    return contents(reader())


class Scene(NamedTuple):
    act: Callable[[], object]
    read: Callable[[Path], object]
    allowed: list  # what may be read, the oldest first; once the act has returned: the last
    again: Callable[[], object]  # what a process does that comes after a dead one


def save(root: Path, *state: float, keep: int = 2) -> None:
    save_checkpoint(state_at(*state), root / "checkpoints", keep)


def saving(root: Path, old: dict | None, *state: float) -> Scene:
    act = functools.partial(save, root, *state)
    return Scene(act, read_newest, [old, known(*state)], functools.partial(save, root, 4))


def save_and_prune(root: Path) -> Scene:
    """After two commits, among what dead processes left."""
    save(root, 1)
    save(root, 2)
    for left in (".tmp-step-00000009", ".trash-step-00000000"):
        write_tree(root / "checkpoints" / left, (("state.json", b"half"),))
    return saving(root, known(2), 3)


def save_again(root: Path) -> Scene:
    """The same step, of which something has changed."""
    save(root, 1)
    save(root, 2)
    return saving(root, known(2), 2, 0.5)


def save_over_damage(root: Path) -> Scene:
    """The same step and a later one, both damaged."""
    for step in (1, 2, 3):
        save(root, step, keep=3)
        if step > 1:
            os.truncate(root / "checkpoints" / f"step-0000000{step}" / "model.safetensors", 4096)
    return saving(root, known(1), 2)


def save_first(root: Path) -> Scene:
    return saving(root, None, 0)


def export_again(root: Path) -> Scene:
    """model/ over a model/ with other files."""
    old, new = ((("a", b"old"), ("b", b"1" * 5000)), (("a", b"new" * 2000),))
    write_tree(root / "model", old)

    def act():
        atomic.sweep(root)
        atomic.make_folder(root / ".tmp-model")
        atomic.write_text(root / ".tmp-model" / "a", "new" * 2000)
        atomic.commit_folder(root / ".tmp-model", root / "model")

    def read(where: Path):
        atomic.sweep(where)  # as every run does first
        return read_tree(where / "model")

    return Scene(act, read, [old, new], act)


def export_an_adapter_again(root: Path) -> Scene:
    """adapter/ over that of an earlier step: config, tensors, tokenizer."""
    trees = []
    for up in (1.0, 2.0):
        lm = add_lora(random_lm(TINY, vocab_size=5), 1, 1.0, targets=("q_proj",))
        lm.model.layers[0].self_attn.q_proj.lora_B.data.fill_(up)

        def act(lm=lm):
            atomic.sweep(root)
            write = functools.partial(save_adapter, lm, base_name="base")
            atomic.write_folder(lambda folder: write(folder=folder), root / "adapter")

        act()
        trees.append(read_tree(root / "adapter"))

    def read(where: Path):
        atomic.sweep(where)
        return read_tree(where / "adapter")

    put_back(root, ())
    write_tree(root / "adapter", trees[0])
    return Scene(act, read, trees, act)


def replace_a_file(root: Path) -> Scene:
    (root / "run.json").write_bytes(b'"old"\n')

    def act():
        atomic.write_json(root / ".tmp-run.json", "new" * 2000)
        atomic.replace_file(root / ".tmp-run.json", root / "run.json")

    def read(where: Path):
        return (where / "run.json").read_bytes()

    def again():
        atomic.sweep(root)
        act()

    return Scene(act, read, [b'"old"\n', b'"' + b"new" * 2000 + b'"\n'], again)


def resume_and_export(root: Path) -> Scene:
    """A run with its logs, of which a commit knows no more than what is there."""
    saved = []

    def go_on(resume: bool, *steps: int) -> None:
        with Run(RunSettings(out=str(root), resume=resume), "toy") as run:
            run.restore(state := make_state(0))
            for state.step in steps:
                state.meters.update({"loss": 0.5})
                run.log(state, {}, {}, ())
                run.write_samples(state, [{"text": "x" * PAGE}])
                run.save(state)
                saved.append(copy.deepcopy(contents(state)))
            run.export(lambda folder: atomic.write_text(folder / "a", f"model of {steps[-1]}"))

    def read(where: Path):
        atomic.sweep(where)
        assert (where / "model" / "a").read_bytes() in (b"model of 1", b"model of 3")
        found = read_newest(where)
        for name, length in found["log_bytes"].items():  # to the byte, as far as the commit knows
            whole = (root / name).read_bytes()
            assert (where / name).read_bytes()[:length] == whole[:length] and len(whole) >= length
        return found

    go_on(False, 1)
    return Scene(lambda: go_on(True, 2, 3), read, saved, lambda: None)


SAVES = (save_and_prune, save_again, save_over_damage, save_first)
SCENES = (*SAVES, export_again, replace_a_file)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


# ---- kill ----------------------------------------------------------------------------------------


def kill_at(moment: int, torn: bool, act: Callable[[], object]) -> int:
    """Lets a child act that dies by SIGKILL before an operation, or in the middle of that write."""
    passed = iter(range(moment))

    def before(operation: Operation) -> None:
        if next(passed, None) is None:
            if torn:
                with operation.path.open("ab") as file:
                    file.write(operation.data[: len(operation.data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with watching(before):
                act()
        finally:
            os._exit(1)  # it lived, which is the failure
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    "make", [*SCENES, export_an_adapter_again], ids=lambda make: make.__name__
)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(make, root):
    scene = make(root)
    before = read_tree(root)
    operations = record(scene.act)
    seen = []
    for moment, operation in enumerate(operations):
        for torn in {False, operation.kind == "write"}:
            put_back(root, before)
            assert kill_at(moment, torn, scene.act) == -signal.SIGKILL
            seen.append(scene.allowed.index(scene.read(root)))
            scene.again()  # goes through, and nothing of the dead is left
            assert not list(root.rglob(".*"))
            assert make not in SAVES or read_newest(root) == known(4)
    assert seen[0] == 0
    assert seen == sorted(seen)  # once the new state is there it stays


# ---- power loss ----------------------------------------------------------------------------------


def after_power_loss(root: Path, act: Callable[[], object]) -> tuple[set[Tree], set[Tree]]:
    """Disks that may be left (at any moment, once the act has returned)."""
    rng, disk = random.Random(0), Disk(root)
    ever = set()
    for operation in record(act):
        ever.update(disk.after_power_loss(rng))
        disk.play(operation)
    last = set(disk.after_power_loss(rng))
    without_lock = [names for names in read_tree(root) if names[0] != ".lock"]
    assert [names for names in disk.now() if names[0] != ".lock"] == without_lock  # none unseen
    return ever | last, last


def test_a_power_loss_at_any_moment_leaves_the_old_or_the_new(root, tmp_path):
    counted = {}
    for make in (*SCENES, resume_and_export):
        put_back(root, ())
        scene = make(root)
        ever, last = after_power_loss(root, scene.act)
        for disk in ever:
            put_back(tmp_path / "left", disk)
            found = scene.read(tmp_path / "left")
            assert found in (scene.allowed[-1:] if disk in last else scene.allowed), make.__name__
        counted[make.__name__] = len(ever)
    print("\ndisks after a power loss:", counted, "in all", sum(counted.values()))
    assert sum(counted.values()) >= DISKS_WANTED


def test_a_power_loss_after_a_kill_leaves_the_old_or_the_new(root, tmp_path):
    """The second process must not trust names that the first could not sync."""
    scene = save_again(root)
    before = read_tree(root)
    operations = record(scene.act)
    allowed = [*scene.allowed, known(4)]
    left = set()
    for moment in range(len(operations)):
        put_back(root, before)
        rng, disk = random.Random(moment), Disk(root)
        for operation in operations[:moment]:
            disk.play(operation)
        put_back(root, disk.now())
        for operation in record(scene.again):
            left.update(disk.after_power_loss(rng, enumerable=0, drawn=1))
            disk.play(operation)
    for tree in left:
        put_back(tmp_path / "left", tree)
        assert scene.read(tmp_path / "left") in allowed


# ---- errors of the disk --------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)


def failing(moment: int, number: int, for_good: bool) -> Callable[[Operation], None]:
    """Fails one operation, or that and all after it, as Python reports it."""
    made = itertools.count()

    def before(operation: Operation) -> None:
        now = next(made)
        if now == moment or (for_good and now > moment):
            unnamed = operation.kind in ("write", "fsync", "truncate")  # these know a number only
            name = () if unnamed else (str(operation.path),)
            raise OSError(number, os.strerror(number), *name)

    return before


def fail_at_each(root: Path, scene: Scene, trials: Callable[[int], list], capsys) -> Iterator:
    """(operation, whether all after it failed too) once it has failed and was told in one line."""
    before = read_tree(root)
    operations = record(scene.act)
    for moment, operation in enumerate(operations):
        for number, for_good in trials(moment):
            put_back(root, before)
            with watching(failing(moment, number, for_good)):
                assert errors.run(scene.act) == errors.MACHINE
            told = f"error: {operation.path}: {os.strerror(number)}\n"
            assert capsys.readouterr().err == told
            yield operation, for_good


def one_each(moment: int) -> list[tuple[int, bool]]:
    return [(ERRORS[moment % len(ERRORS)], bool(moment % 2))]


def every_one(moment: int) -> list[tuple[int, bool]]:
    return [*((number, False) for number in ERRORS), (errno.EROFS, True)]


def test_a_disk_error_at_any_operation_of_a_save_is_told_and_leaves_the_old_commit(root, capsys):
    scene = save_and_prune(root)
    old = read_tree(root / "checkpoints" / "step-00000002")
    for operation, for_good in fail_at_each(root, scene, every_one, capsys):
        assert scene.read(root) in scene.allowed
        assert read_tree(root / "checkpoints" / "step-00000002") == old, operation
        assert for_good or not (root / "checkpoints" / ".tmp-step-00000003").exists()


def test_a_disk_error_in_pruning_is_told_and_leaves_the_new_commit(root, capsys):
    scene, seen = save_and_prune(root), []
    for operation, _ in fail_at_each(root, scene, one_each, capsys):
        if ".trash-step-00000001" in (operation.path.name, operation.path.parent.name):
            assert scene.read(root) == known(3)
            seen.append(operation.kind)
    assert seen == ["unlink"] * 4 + ["rmdir"]


@pytest.mark.parametrize(
    "make", (save_again, save_over_damage, export_again, replace_a_file), ids=lambda m: m.__name__
)
def test_a_disk_error_in_a_replacement_leaves_the_old_or_the_new(make, root, capsys):
    scene = make(root)
    for operation, for_good in fail_at_each(root, scene, one_each, capsys):
        if not for_good:  # the old one has its name back, for those who know no other
            names = {path.name for path in root.glob("*")} | {p.name for p in root.glob("*/step-*")}
            assert names & {"step-00000002", "model", "run.json"}, operation
        assert scene.read(root) in scene.allowed, operation


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("moment", range(2))  # opening it, writing
def test_a_disk_error_in_a_log_is_told_and_leaves_its_lines(root, capsys, number, moment):
    log = root / "metrics.jsonl"
    atomic.append_line(log, "a")
    with watching(failing(moment, number, for_good=True)):
        assert errors.run(lambda: atomic.append_line(log, "b")) == errors.MACHINE
    assert capsys.readouterr().err == f"error: {log}: {os.strerror(number)}\n"
    assert log.read_bytes() == b"a\n"
