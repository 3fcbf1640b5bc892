"""A checkpoint is everything, bit for bit, or it is refused with the reason."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minirlhf
from minirlhf.errors import MACHINE, NON_FINITE, UserError
from minirlhf.files import atomic
from minirlhf.run import checkpoint
from minirlhf.run.checkpoint import (
    TrainState,
    commits,
    load_checkpoint,
    newest_commit,
    save_checkpoint,
    verify,
)
from minirlhf.run.machine import environment, processor
from minirlhf.run.optim import make_optimizer

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def make_state(seed: int = 0, make=lambda model: make_optimizer(model, 0.1, 0.01)) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.register_buffer("running", torch.zeros(2))
    return TrainState(model, make(model))


def train(state: TrainState, steps: int = 1) -> None:
    """Steps whose data is a function of the step alone."""
    for _ in range(steps):
        rng = torch.Generator().manual_seed(state.step)
        loss = state.model(torch.randn(5, 3, generator=rng)).square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.model.running += loss.detach()
        state.step += 1
        state.samples += 5
        state.kl_coef = 0.1 + state.step / 3
        state.meters.update({"loss": float(loss.detach())}, 5)
        state.count("long rows", 2)
        state.log_bytes["metrics.jsonl"] = 10 * state.step


def contents(state: TrainState) -> dict:
    """Everything in a state, tensors as bytes: equal only where every bit is."""

    def raw(tensor):
        return tensor.dtype, tuple(tensor.shape), tensor.detach().numpy().tobytes()

    moments = {
        (name, key): raw(torch.as_tensor(value))
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    rest = {
        f.name: getattr(state, f.name)
        for f in dataclasses.fields(state)
        if f.name not in ("model", "optimizer")
    }
    weights = {name: raw(tensor) for name, tensor in state.model.state_dict().items()}
    return rest | {"meters": state.meters.as_dict(), "weights": weights, "moments": moments}


@pytest.fixture
def saved(tmp_path):
    """(a state after 3 steps, its folder with commits of steps 1, 2 and 3)."""
    state = make_state()
    for _ in range(3):
        train(state)
        save_checkpoint(state, tmp_path / "checkpoints", keep=3)
    return state, tmp_path / "checkpoints"


# ---- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_save_and_load_give_the_state_back_bit_for_bit(tmp_path, steps):
    state, other = make_state(), make_state(seed=1)
    train(state, steps)
    train(other, 1)  # has moments and an open window of its own, which must not survive
    commit = save_checkpoint(state, tmp_path)
    assert commit == tmp_path / f"step-{steps:08d}"
    assert sorted(p.name for p in commit.iterdir()) == FILES
    load_checkpoint(other, commit)
    assert contents(other) == contents(state)
    train(state, 2)
    train(other, 2)
    assert contents(other) == contents(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: torch.optim.Adam(reversed(list(model.parameters())), amsgrad=True),
        lambda model: torch.optim.Adagrad(model.parameters()),
    ],
    ids=["sgd", "adam in another order", "adagrad"],
)
def test_any_optimizer_survives(tmp_path, make):
    state, other = make_state(0, make), make_state(1, make)
    train(state, 2)
    load_checkpoint(other, save_checkpoint(state, tmp_path))
    train(state)
    train(other)
    assert contents(other) == contents(state)


def test_masters_of_a_model_in_half_precision_survive(tmp_path):
    def make(start: float) -> TrainState:
        layer = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.constant_(layer.weight, start)
        return TrainState(layer, make_optimizer(layer, 0.001, eps=0.0))

    def step(state: TrainState) -> None:
        state.model(torch.ones(1, 1).bfloat16()).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state, other = make(1.0), make(2.0)
    step(state)
    assert state.model.weight.item() == 1.0  # 0.999 has no bfloat16: only the master has moved
    load_checkpoint(other, save_checkpoint(state, tmp_path))
    step(other)
    assert other.model.weight.item() == 1 - 1 / 256  # 0.998: from 1.0 it would be 1.0 again
    assert other.optimizer.state[other.model.weight]["master"].item() == pytest.approx(0.998)


def test_the_restored_moments_are_no_window_into_the_file(saved):
    state, folder = saved
    other = make_state(1)
    load_checkpoint(other, folder / "step-00000003")
    shutil.rmtree(folder)
    train(state)
    train(other)
    assert contents(other) == contents(state)


OTHER_VALUES = {
    "step": 7, "samples": 8, "kl_coef": 0.1 + 0.2, "best": 1 / 3,
    "score_moments": [3, 0.1, 1 / 7], "health": {"told": [3, 0.1]},
    "baselines": {"eval/": [0.1 + 0.2, -1.5]}, "counters": {"a": 9},
    "log_bytes": {"metrics.jsonl": 10}, "unreported": {
        "number": 7, "metrics": {"loss": 0.1}, "clock": {}, "samples": []
    },
}


def test_every_field_of_the_state_survives_a_round_trip(tmp_path):
    """A field that is added must get a value here, and is then proved to be saved."""
    state, fresh = make_state(), make_state()
    fields = {f.name for f in dataclasses.fields(TrainState)} - {"model", "optimizer", "meters"}
    assert OTHER_VALUES.keys() == fields
    for name, value in OTHER_VALUES.items():
        assert getattr(state, name) != value
        setattr(state, name, value)
    state.meters.update({"loss": 0.3}, 3)
    load_checkpoint(fresh, save_checkpoint(state, tmp_path))
    assert {name: getattr(fresh, name) for name in fields} == OTHER_VALUES
    assert fresh.meters.as_dict() == {"loss": [0.3, 0.3 * 3, 3]}


def test_a_field_of_a_wider_state_is_saved_by_its_name(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Wider(TrainState):
        reward_mean: float = 0.0

    model = make_state().model
    state, fresh = (Wider(model, make_optimizer(model, 0.1)) for _ in range(2))
    state.reward_mean = 0.7
    with pytest.raises(ValueError, match=r"reward_mean is no field of `kinds\.KINDS`"):
        save_checkpoint(state, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(checkpoint.KINDS, "reward_mean", lambda value: type(value) is float)
    commit = save_checkpoint(state, tmp_path)
    load_checkpoint(fresh, commit)
    assert fresh.reward_mean == 0.7
    with pytest.raises(UserError, match=r"was saved by another version \(reward_mean\)"):
        load_checkpoint(make_state(), commit)
    (commit / "state.json").write_bytes(b"[]")
    edit_files({"state.json": {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}})(commit)
    before = contents(fresh)
    with pytest.raises(UserError, match=r"was saved by another version \(baselines, best, "):
        load_checkpoint(fresh, commit)
    assert contents(fresh) == before


OF_ANOTHER_KIND = {
    "step": [-1, 1.0, True, None, "7"],
    "samples": [-1, 8.0, True, None, "8"],
    "kl_coef": ["0.1", True, []],
    "best": ["0.1", True, {}],
    "score_moments": [None, [1, 2], [1, 2, "3"], [1, 2, True], {}],
    "baselines": [None, [0.5], {"eval/": 0.5}, {"eval/": ["0.5"]}, {"eval/": [True]}],
    "counters": [None, {"a": 1.5}, {"a": True}, []],
    "health": [None, [], {"told": 3}, {"told": ["3"]}, {"told": [True]}],
    "log_bytes": [
        None, [], *({"metrics.jsonl": n} for n in ("10", 1.5, True, -1, 1 << 63)),
        # names of other files, which a run that goes on would truncate
        *({name: 0} for name in ("/thesis.txt", "../thesis.txt", "run.json", "", ".")),
    ],
    "meters": [None, [], *({"loss": m} for m in (3, [1, 2], [1, 2, "3"], [1, 2, True]))],
    "unreported": [
        7, [], {}, {"number": 7},
        *(dict(number=7, metrics={}, clock={}, samples=[]) | other for other in (
            {"number": -1}, {"metrics": {"loss": "1"}}, {"clock": []}, {"samples": [1]},
        )),
    ],
}


def test_every_field_has_values_of_another_kind():
    assert OF_ANOTHER_KIND.keys() == checkpoint.KINDS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, values in OF_ANOTHER_KIND.items() for v in values]
)
def test_a_field_of_another_kind_is_refused_before_anything_is_restored(name, value, tmp_path):
    state = make_state()
    commit = save_checkpoint(state, tmp_path)
    numbers = json.loads((commit / "state.json").read_text()) | {name: value}
    raw = json.dumps(numbers).encode()
    (commit / "state.json").write_bytes(raw)
    sealed = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_files({"state.json": sealed})(commit)
    fresh = make_state()
    with torch.no_grad():
        next(fresh.model.parameters()).add_(1)
    before = contents(fresh)
    with pytest.raises(UserError, match=f"has a {name} of another kind"):
        load_checkpoint(fresh, commit)
    assert contents(fresh) == before


# ---- commits -------------------------------------------------------------------------------------


def test_save_refuses_to_keep_nothing(tmp_path):
    with pytest.raises(ValueError, match="keep is 0: at least the new commit must stay"):
        save_checkpoint(make_state(), tmp_path, keep=0)


def test_a_commit_that_was_put_aside_is_still_one(saved):
    """A save of the same step died between its two renames."""
    state, folder = saved
    (folder / "step-00000003").rename(folder / ".old-step-00000003")
    assert newest_commit(folder) == (folder / ".old-step-00000003", [])
    load_checkpoint(other := make_state(1), folder / ".old-step-00000003")
    assert contents(other) == contents(state)
    train(state)
    save_checkpoint(state, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_commit_goes_before_the_one_that_it_replaces(saved):
    _, folder = saved
    shutil.copytree(folder / "step-00000003", folder / ".old-step-00000003")
    names = ["step-00000002", ".old-step-00000003", "step-00000003"]
    assert [c.name for c in commits(folder)][1:] == names
    assert newest_commit(folder)[0].name == "step-00000003"


def test_save_counts_only_whole_commits_as_kept(saved, monkeypatch):
    state, folder = saved
    monkeypatch.setattr(checkpoint, "_known_whole", set())  # as in another process
    flip(folder / "step-00000003" / "model.safetensors")
    train(state)
    save_checkpoint(state, folder, keep=2)
    left = ["step-00000002", "step-00000003", "step-00000004"]
    assert [c.name for c in commits(folder)] == left
    train(state)
    save_checkpoint(state, folder, keep=2)
    assert [c.name for c in commits(folder)] == ["step-00000004", "step-00000005"]


def test_save_counts_only_commits_with_all_their_bytes(saved):
    state, folder = saved
    os.truncate(folder / "step-00000003" / "model.safetensors", 8)
    train(state)
    save_checkpoint(state, folder, keep=2)
    assert len(commits(folder)) == 3  # 2 and 4 are whole


def test_save_does_not_read_what_it_wrote(saved, monkeypatch):
    state, folder = saved
    read = []
    monkeypatch.setattr(atomic, "sha256", read.append)
    train(state)
    save_checkpoint(state, folder, keep=2)
    assert read == [] and len(commits(folder)) == 2


def test_save_before_a_damaged_commit_removes_that_and_keeps_the_good_ones(saved):
    _, folder = saved
    (folder / "step-00000003" / "state.json").unlink()
    state = make_state(1)
    load_checkpoint(state, folder / "step-00000001")
    shutil.rmtree(folder / "step-00000002")
    train(state)
    save_checkpoint(state, folder, keep=2)
    assert [c.name for c in commits(folder)] == ["step-00000001", "step-00000002"]


def test_save_refuses_a_folder_with_whole_later_commits(saved):
    _, folder = saved
    with pytest.raises(UserError, match=r"step-0000000\d: is later than step 0, which is to be"):
        save_checkpoint(make_state(1), folder)
    assert len(commits(folder)) == 3


def test_commits_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step-99999999", "step-100000000", "step-00000002", "step-7", "step-x", "other"):
        (tmp_path / name).mkdir()
    names = ["step-00000002", "step-99999999", "step-100000000"]
    assert [c.name for c in commits(tmp_path)] == names
    assert commits(tmp_path / "none") == []


def test_manifest_says_what_the_last_bits_depend_on(tmp_path, monkeypatch):
    for name in ("MKL_NUM_THREADS", "OPENBLAS_CORETYPE"):  # the first chooses no kernel
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    state, folder = make_state(), tmp_path
    save_checkpoint(state, folder)
    manifest = json.loads((folder / "step-00000000" / "manifest.json").read_text("utf-8"))
    expected = {
        "minirlhf": minirlhf.__version__, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "processes": 1, "device": "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(), "dtype": "float32",
        "kernels": "ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=4", "processor": processor(),
    }
    assert processor().strip()
    assert manifest["environment"] == environment(state.model) == expected


# ---- failures of a save --------------------------------------------------------------------------


def snapshot(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_save_refuses_to_begin_without_space(saved, monkeypatch):
    state, folder = saved
    before = snapshot(folder)
    # 21 weights (3 * 4 + 4 + 4 + 1), each with two moments, 2 of the buffer, 4 step counts: 69
    for free, enough in ((276, True), (275, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _, usage=usage: usage)
        if enough:
            save_checkpoint(state, folder, keep=3)
            continue
        with pytest.raises(UserError, match="275 bytes are free, 276 are needed") as error:
            save_checkpoint(state, folder, keep=3)
        assert error.value.code == MACHINE
    assert snapshot(folder) == before


def test_save_refuses_a_number_that_is_not_finite(saved):
    state, folder = saved
    before = snapshot(folder)
    state.meters.update({"loss": float("nan")})
    train(state)
    with pytest.raises(UserError, match=r"state.json: cannot be written") as error:
        save_checkpoint(state, folder)
    assert error.value.code == NON_FINITE
    assert snapshot(folder) == before


# ---- damage --------------------------------------------------------------------------------------


def sealed(manifest: object) -> str:
    """A manifest as someone who knows the format would forge it."""
    body = json.dumps(manifest, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{body},\n  "seal": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def edit_manifest(commit, edit) -> None:
    path = commit / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    del manifest["seal"]
    edit(manifest)
    path.write_text(sealed(manifest), encoding="utf-8")


def test_a_manifest_is_json_with_a_seal_over_all_before_it(saved):
    path = saved[1] / "step-00000003" / "manifest.json"
    text = path.read_text("utf-8")
    edit_manifest(path.parent, lambda manifest: None)
    assert path.read_text("utf-8") == text


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (
        lambda c: os.truncate(c / "optimizer.safetensors", 100),
        r"optimizer.safetensors has 100 bytes, not \d+",
    ),
    "bit": (lambda c: flip(c / "state.json"), "state.json does not match its sha256"),
    "bit of a weight": (
        lambda c: flip(c / "model.safetensors"),
        "model.safetensors does not match its sha256",
    ),
    "folder": (
        lambda c: ((c / "state.json").unlink(), (c / "state.json").mkdir()),
        "state.json is not a regular file",
    ),
    "link": (
        lambda c: ((c / "state.json").rename(c / "x"), (c / "state.json").symlink_to(c / "x")),
        "state.json is not a regular file",
    ),
    "pipe": (
        lambda c: ((c / "state.json").unlink(), os.mkfifo(c / "state.json")),
        "state.json is not a regular file",
    ),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: no such file"),
    "half a manifest": (
        lambda c: os.truncate(c / "manifest.json", 50),
        "manifest.json: not valid JSON",
    ),
    "a manifest that lacks its last byte": (
        lambda c: os.truncate(c / "manifest.json", (c / "manifest.json").stat().st_size - 1),
        "manifest.json does not match its seal",
    ),
    "a manifest written otherwise": (
        lambda c: (c / "manifest.json").write_text(
            json.dumps(json.loads((c / "manifest.json").read_text("utf-8"))), encoding="utf-8"
        ),
        "manifest.json does not match its seal",
    ),
}


def text(content: str):
    return lambda c: (c / "manifest.json").write_text(content, encoding="utf-8")


def edit(**changes: object):
    return lambda c: edit_manifest(c, lambda m: m.update(changes))


def edit_files(changes: dict):
    return lambda c: edit_manifest(c, lambda m: m["files"].update(changes))


NOT_OURS = "manifest.json is not as a save writes it"
SEAL_OF = {"bytes": 1, "sha256": "0" * 64}
HOSTILE = {
    "a list": (text("[1]"), "manifest.json is no JSON object"),
    "a list in lists": (text("[" * 100_000), "manifest.json: nested deeper than 64 levels"),
    "deep": (text('{"a":' * 65 + "1" + "}" * 65), "manifest.json: nested deeper than 64 levels"),
    "digits": (text(f'{{"format": {"9" * 5000}}}'), "manifest.json: an integer of thousands of"),
    "nan": (text('{"format": NaN}'), "manifest.json: NaN is not JSON"),
    "twice": (text('{"format": 2, "format": 2}'), "manifest.json: key 'format' stands twice"),
    "large": (text(" " * (1 << 21)), "manifest.json: larger than 1,048,576 bytes"),
    "not text": (
        lambda c: (c / "manifest.json").write_bytes(b'{"format": "\xff"}'),
        "manifest.json: not UTF-8 at byte 12",
    ),
    "pipe": (
        lambda c: ((c / "manifest.json").unlink(), os.mkfifo(c / "manifest.json")),
        "manifest.json: not a regular file",
    ),
    "later format": (edit(format=3), "manifest.json is of format 3, this version reads 2"),
    "a later format that seals otherwise": (
        text('{"format": 3}'), "manifest.json is of format 3, this version reads 2",
    ),
    "first format": (text('{"format": 1}'), "manifest.json is of format 1, this version reads 2"),
    "no format": (text("{}"), "manifest.json is of format None, this version reads 2"),
    "format for a terminal": (
        edit(format="\x1b[31m\n" * 30),
        r"manifest.json is of format (\\x1b\[31m\\n)+\S*…, this version reads 2",
    ),
    "no seal": (text('{"format": 2}'), "manifest.json does not match its seal"),
    "no step": (lambda c: edit_manifest(c, lambda m: m.pop("step")), NOT_OURS),
    "another key": (edit(more=1), NOT_OURS),
    "other step": (edit(step=4), "manifest.json is of step 4"),
    "step as text": (edit(step="3\n"), NOT_OURS),
    "an environment of another kind": (edit(environment=["torch"]), NOT_OURS),
    "unlisted": (lambda c: edit_manifest(c, lambda m: m["files"].pop("state.json")), NOT_OURS),
    "a list of files": (edit(files=FILES), NOT_OURS),
    "a path": (edit_files({"../../x": SEAL_OF}), NOT_OURS),
    "an absolute path": (edit_files({"/etc/x": SEAL_OF}), NOT_OURS),
    "dots": (edit_files({"..": SEAL_OF}), NOT_OURS),
    "no sizes": (edit_files({"state.json": 3}), NOT_OURS),
    "more of a file": (edit_files({"state.json": SEAL_OF | {"x": 1}}), NOT_OURS),
    "a huge size": (
        edit_files({"state.json": SEAL_OF | {"bytes": 10**4000}}),
        r"state.json has \d+ bytes, not 10{38}…$",
    ),
    "a size of another kind": (
        edit_files({"state.json": SEAL_OF | {"bytes": {"a": [1]}}}),
        r"state.json has \d+ bytes, not \{'a': \[1\]\}",
    ),
    "a hash of another kind": (
        lambda c: edit_manifest(c, lambda m: m["files"]["state.json"].update(sha256=[1])),
        "state.json does not match its sha256",
    ),
}


@pytest.mark.parametrize("do, told", (DAMAGES | HOSTILE).values(), ids=DAMAGES | HOSTILE)
def test_damage_is_named_passed_over_and_never_loaded(saved, do, told):
    state, folder = saved
    commit = folder / "step-00000003"
    assert verify(commit) is None
    do(commit)
    problem = verify(commit)
    assert re.match(told, problem), problem
    assert problem.isprintable() and len(problem) < 200  # one line
    assert newest_commit(folder) == (folder / "step-00000002", [f"step-00000003: {problem}"])
    before = contents(state)
    with pytest.raises(UserError, match=f"step-00000003: {told}".removesuffix("$")):
        load_checkpoint(state, commit)
    assert contents(state) == before


def test_every_flipped_bit_and_every_cut_is_found_and_named(saved):
    """1,000 bits and 200 lengths, spread over the files by size, and 50 of each at least."""
    commit = saved[1] / "step-00000003"
    rng = random.Random(0)
    whole = {name: (commit / name).read_bytes() for name in FILES}
    bits, cuts = Counter(FILES * 50), Counter(FILES * 50)
    bits.update(rng.choices(FILES, [len(whole[name]) for name in FILES], k=800))
    assert bits.total() == 1000 and cuts.total() == 200
    for name, data in whole.items():
        damaged = [data[: rng.randrange(len(data))] for _ in range(cuts[name])]
        for _ in range(bits[name]):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            damaged.append(bytes(flipped))
        for content in damaged:
            (commit / name).write_bytes(content)
            assert re.match(rf"{name}\b", verify(commit) or "whole"), content
        (commit / name).write_bytes(data)
    assert verify(commit) is None


def test_a_file_that_cannot_be_read_is_named(saved, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fail)
    told = "model.safetensors cannot be read (Input/output error)"
    assert verify(saved[1] / "step-00000003") == told


def test_a_copy_of_a_commit_may_be_called_anything(saved, tmp_path):
    state, folder = saved
    copy = shutil.copytree(folder / "step-00000003", tmp_path / "x")
    load_checkpoint(other := make_state(1), copy)
    assert contents(other) == contents(state)


def test_load_refuses_tensors_that_are_none(saved):
    """Whole by its manifest, but not what a save writes."""
    state, folder = saved
    commit, before = folder / "step-00000003", contents(state)
    (commit / "model.safetensors").write_bytes(b"\xff" * 100)
    digest = hashlib.sha256(b"\xff" * 100).hexdigest()
    edit_files({"model.safetensors": {"bytes": 100, "sha256": digest}})(commit)
    with pytest.raises(UserError, match=r"step-00000003: cannot be read \(.*header.*\): use an"):
        load_checkpoint(state, commit)
    assert contents(state) == before


def test_newest_commit_of_an_empty_folder_is_none(tmp_path):
    assert newest_commit(tmp_path) == newest_commit(tmp_path / "none") == (None, [])


def test_newest_commit_refuses_where_all_are_bad(saved):
    _, folder = saved
    for commit in commits(folder):
        (commit / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: step-00000003: state\.json is"):
        newest_commit(folder)


# ---- another model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),  # lacks the buffer
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
        make_state().model.double(),
    ],
    ids=["names", "shapes", "dtype"],
)
def test_load_refuses_the_weights_of_another_model(saved, model):
    state = TrainState(model, make_optimizer(model, 0.1))
    before = contents(state)
    with pytest.raises(UserError, match="holds the weights of another model: resume with the same"):
        load_checkpoint(state, saved[1] / "step-00000003")
    assert contents(state) == before


def test_load_refuses_moments_of_what_is_not_trained(saved):
    state = make_state(1)
    state.optimizer = make_optimizer(state.model[0], 0.1)
    before = contents(state)
    with pytest.raises(UserError, match=r"holds moments of '2\.(weight|bias)', which is not"):
        load_checkpoint(state, saved[1] / "step-00000003")
    assert contents(state) == before


def test_moments_are_saved_under_their_parameters_names(saved):
    moments = load_file(saved[1] / "step-00000003" / "optimizer.safetensors")
    parameters = ("0.weight", "0.bias", "2.weight", "2.bias")
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert moments.keys() == {f"{name}.{kind}" for name in parameters for kind in kinds}
    assert all(moments[f"{name}.step"] == 3 for name in parameters)
