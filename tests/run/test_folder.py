"""The folder of a run: who may write in it, what stands there, and what a signal does."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

import minirlhf
from minirlhf.errors import MACHINE, NON_FINITE, UserError
from minirlhf.files import atomic
from minirlhf.files.reading import read_text
from minirlhf.run.checkpoint import TrainState, commits
from minirlhf.run.folder import Run
from minirlhf.run.meters import Step
from minirlhf.run.optim import make_optimizer
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import as_dict, override, setting


@dataclass(frozen=True)
class Toy(RunSettings):
    """A recipe that counts."""

    data: str = setting("", metavar="FILE", data=True)
    seed: int = setting(0)
    keep: int = override(3)


def start(out, resume: bool = False, inputs: dict = MappingProxyType({}), **changes) -> Run:
    return Run(Toy(out=str(out), resume=resume, **changes), "toy", inputs)


def make_state() -> TrainState:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return TrainState(model, make_optimizer(model, 0.1))


def toy(state: TrainState, total: int):
    """Steps without any learning: the weights count."""
    while state.step < total:
        with torch.no_grad():
            state.model.weight += 1
        state.step += 1
        state.meters.update({"loss": state.step / 10})
        yield Step(state.step, {"loss": state.step / 10}, {"step_time": 0.5}, [])


def log(run: Run, state: TrainState, **extra) -> None:
    run.log(state, extra, {"rate": 1.5}, ("loss",))


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def done(tmp_path):
    """The folder of a run of 2 steps, logged and saved."""
    out, state = tmp_path / "run", make_state()
    with start(out) as run:
        run.restore(state)
        for _ in run.bar(toy(state, 2), state, 2):
            log(run, state)
            run.write_samples(state, [{"step": state.step, "text": "ü\n"}])
            run.save(state)
    return out


# ---- the folder ----------------------------------------------------------------------------------


def test_run_json_says_what_it_takes_to_do_the_run_again(tmp_path, monkeypatch):
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"abc")
    monkeypatch.setattr(sys, "argv", ["/some/where/minirlhf", "toy", "--data", "my file"])
    with start(tmp_path / "run", inputs={"data": [data]}):
        pass
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert facts.pop("versions") == {
        "minirlhf": minirlhf.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert facts == {
        "recipe": "toy",
        "settings": as_dict(Toy(out=str(tmp_path / "run"))),
        "inputs": {str(data): sha256},
        "named_by": {"data": [str(data)]},
        "command": "minirlhf toy --data 'my file'",
        "started_in": os.getcwd(),
    }


def test_a_folder_with_something_in_it_is_refused(done, tmp_path):
    with pytest.raises(UserError, match="run: is not empty: give another --out, or --resume"):
        start(done)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"other: is not empty: give another --out$"):
        start(other, resume=True)  # it is no run: nothing to go on from
    with pytest.raises(UserError, match=r"notes\.txt: is not a folder"):
        start(other / "notes.txt")


def test_an_empty_folder_and_one_of_a_start_cut_short_are_taken(tmp_path):
    for left in (".lock", ".tmp-run.json"):
        (tmp_path / left).write_text("", encoding="utf-8")
    with start(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_folder_is_named_without_steps_back_through_what_is_not_there(tmp_path):
    with start(tmp_path / "nothing" / ".." / "run") as run:
        run.restore(make_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_link_in_a_circle_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"--out: Symlink loop from .*: give another --out"):
        start(tmp_path / "loop")


def test_a_folder_that_was_filled_since_is_refused_on_entering(tmp_path):
    late = start(tmp_path / "run")
    with start(tmp_path / "run") as run:
        run.restore(state := make_state())
        state.step = 1
        run.save(state)
    with pytest.raises(UserError, match="is not empty"), late:
        pass
    with start(tmp_path / "run", resume=True):  # the refusal gave the lock back
        pass


HOLDER = """
import sys
from minirlhf.run.folder import Run
from minirlhf.run.resume import RunSettings
with Run(RunSettings(out=sys.argv[1]), "toy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout.readline() == "held\n"
        second = Run(RunSettings(out=str(out), resume=True), "toy")
        told = f"run: is in use by process {child.pid} on .* since .*: give another --out"
        with pytest.raises(UserError, match=told), second:
            pass
        child.kill()  # the dead hold no lock
        child.wait()
        with second:
            pass


def test_a_run_that_nobody_reads_stops_as_at_a_signal(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with start(tmp_path / "run") as run:
        assert not run.stopped
        run.say("step 1")
        assert run.stopped
        run.say("step 2")  # into nothing


# ---- restore -------------------------------------------------------------------------------------


def test_restore_cuts_the_logs_back_to_the_checkpoint(done, capsys):
    before = {name: (done / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    for name in before:
        with (done / name).open("ab") as file:
            file.write(b'{"step": 3}\n{"half a li')
    with start(done, resume=True) as run:
        run.restore(state := make_state())
        assert {name: (done / name).read_bytes() for name in before} == before
        for _ in run.bar(toy(state, 3), state, 3):
            log(run, state)
    assert capsys.readouterr().out.startswith("resumed from step-00000002\n")
    assert [row["step"] for row in metrics(done)] == [1, 2, 3]


def test_restore_passes_over_a_damaged_commit_and_says_why(done, capsys):
    (done / "checkpoints" / "step-00000002" / "state.json").unlink()
    with start(done, resume=True) as run:
        run.restore(state := make_state())
    told = "passed over step-00000002: state.json is missing\nresumed from step-00000001\n"
    assert state.step == 1 and capsys.readouterr().out == told
    assert [row["step"] for row in metrics(done)] == [1]


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(done):
    whole = (done / "samples.jsonl").read_bytes()
    (done / "samples.jsonl").write_bytes(b"")
    with (done / "metrics.jsonl").open("ab") as file:  # of a step that no checkpoint has
        file.write(b'{"step": 3}\n')
    before = snapshot(done)
    with (
        pytest.raises(UserError, match=r"samples\.jsonl: has 0 bytes, the checkpoint knows of"),
        start(done, resume=True, allow_setting_change=True, seed=1) as run,
    ):
        run.restore(make_state())
    assert snapshot(done) == before
    (done / "samples.jsonl").write_bytes(whole)
    with start(done, resume=True) as run:  # with the settings of the first start
        run.restore(make_state())


@pytest.mark.parametrize("lose", [
    lambda folder: folder.rename(folder.with_name("elsewhere")),
    lambda folder: (folder.rename(folder.with_name("elsewhere")), folder.symlink_to("unmounted")),
    lambda folder: [commit.rename(folder.parent / commit.name) for commit in commits(folder)],
])
def test_logs_are_not_emptied_because_checkpoints_cannot_be_found(done, lose):
    lose(done / "checkpoints")
    before = snapshot(done)
    told = r"checkpoints: holds no checkpoint, and metrics\.jsonl is not empty: put the checkpoints"
    with pytest.raises(UserError, match=told), start(done, resume=True) as run:
        run.restore(make_state())
    assert snapshot(done) == before


def test_checkpoints_may_lie_on_another_disk(done, tmp_path):
    (done / "checkpoints").rename(tmp_path / "disk")
    (done / "checkpoints").symlink_to(tmp_path / "disk")
    with start(done, resume=True) as run:
        run.restore(state := make_state())
        run.save(state)
    assert state.step == 2 and (done / "checkpoints").is_symlink()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "samples.jsonl"])
def test_nothing_is_written_through_a_link_or_into_a_pipe(done, tmp_path, name):
    (tmp_path / "victim").write_bytes(b"precious " * 1000)
    for make in (lambda path: path.symlink_to(tmp_path / "victim"),
                 lambda path: path.symlink_to("nowhere"), os.mkfifo):
        (done / name).unlink(missing_ok=True)
        make(done / name)
        with (
            pytest.raises(UserError, match=f"{name}: is no plain file: remove it"),
            start(done, resume=True) as run,
        ):
            run.restore(make_state())
    assert (tmp_path / "victim").read_bytes() == b"precious " * 1000
    assert not (done / "nowhere").exists()


def test_a_lock_that_no_run_made_is_left_alone(tmp_path):
    (tmp_path / ".lock").write_bytes(b"precious \xff")
    with pytest.raises(UserError, match=r"\.lock: is not the lock of a run"), start(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == b"precious \xff"


def test_a_run_goes_on_from_an_older_checkpoint(done, capsys):
    run_json = (done / "run.json").read_bytes()
    with (
        pytest.raises(UserError, match=r"step-00000007: is no checkpoint: there are: step-.*02"),
        start(done, resume=True, resume_from="step-00000007") as run,
    ):
        run.restore(make_state())
    assert (done / "run.json").read_bytes() == run_json
    with start(done, resume=True, resume_from="step-00000001") as run:
        run.restore(state := make_state())
    told = "removed step-00000002, which is later\nresumed from step-00000001\n"
    assert state.step == 1 and capsys.readouterr().out == told
    assert [commit.name for commit in commits(done / "checkpoints")] == [
        "step-00000000", "step-00000001"
    ]
    assert [row["step"] for row in metrics(done)] == [1]


def test_an_older_checkpoint_that_is_damaged_is_refused(done):
    (done / "checkpoints" / "step-00000001" / "state.json").unlink()
    before = snapshot(done)
    with (
        pytest.raises(UserError, match=r"no checkpoint is whole: step-00000001: state\.json is"),
        start(done, resume=True, resume_from="step-00000001") as run,
    ):
        run.restore(make_state())
    assert snapshot(done) == before


def test_resume_from_goes_with_resume():
    assert RunSettings(resume_from="step-00000001").check() == ["resume_from: goes with --resume"]


def test_a_resume_tells_of_another_choice_of_kernels(done, capsys, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with start(done, resume=True) as run:
        run.restore(make_state())
    told = "not bit for bit from here on: kernels was , is MKL_CBWR=COMPATIBLE\n"
    assert told in capsys.readouterr().out


def test_an_input_that_is_written_after_it_was_read_is_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n', encoding="utf-8")
    for change in (lambda file: file.write("{}"), lambda file: file.seek(0)):
        assert read_text(data)
        run = start(tmp_path / "run", inputs={"data": [data]})
        with data.open("a", encoding="utf-8") as file:
            change(file)
        os.utime(data, ns=(1, 1))  # of the same size, and the time set back
        with pytest.raises(UserError, match=r"rows\.jsonl: has changed since it was read"), run:
            pass
        assert not (tmp_path / "run" / "run.json").exists()
    assert read_text(data)
    with start(tmp_path / "run", inputs={"data": [data]}):
        data.write_text("", encoding="utf-8")  # what was read has its sum by now


@pytest.mark.parametrize("act", [
    lambda run, state: log(run, state),
    lambda run, state: run.save(state),
    lambda run, state: run.write_samples(state, [{}]),
    lambda run, state: run.export(write_files(a="1")),
    lambda run, state: run.write_file("notes.txt", ""),
])
@pytest.mark.parametrize("then", ["nothing", "another run"])
def test_nothing_is_written_where_another_folder_has_the_name(tmp_path, act, then):
    out, moved, other = tmp_path / "run", tmp_path / "moved", make_state()
    with start(out) as run:
        run.restore(state := make_state())
        out.rename(moved)
        before = snapshot(moved)
        if then == "another run":
            with start(out) as second:
                second.restore(other)
        there = snapshot(out)
        with pytest.raises(UserError, match="run: is no longer the folder of this run") as error:
            act(run, state)
        assert error.value.code == MACHINE
        assert snapshot(out) == there and snapshot(moved) == before


def test_restore_says_where_the_last_bits_may_differ(done, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with start(done, resume=True) as run:
        run.restore(make_state())
    assert "not bit for bit from here on: threads was 1, is 8\n" in capsys.readouterr().out


# ---- logs ----------------------------------------------------------------------------------------


def test_log_line_is_strict_json_with_the_clock_apart(tmp_path, capsys):
    state = make_state()
    with start(tmp_path) as run:
        run.restore(state)
        state.step = 3
        state.meters.update({"loss": 1.0, "a/b": 0.1})
        state.meters.update({"loss": 2.0})
        run.log(state, {"epoch": 0.5}, {"rate": 1.5}, ("loss", "b", "a/b", "epoch"))
        assert state.log_bytes["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    (row,) = metrics(tmp_path)
    clock = row.pop("clock")
    assert row == {"step": 3, "loss": 1.5, "a/b": 0.1, "epoch": 0.5}
    assert clock.pop("elapsed") >= 0 and clock.pop("peak_memory") > 0
    assert clock == {"rate": 1.5}
    assert state.meters.flush() == {}
    assert capsys.readouterr().out == (
        "  step       loss          b      epoch\n     3        1.5        0.1        0.5\n")


def test_log_without_columns_says_nothing(tmp_path, capsys):
    with start(tmp_path) as run:
        state = make_state()
        run.restore(state)
        run.log(state, {"eval_loss": 0.5}, {}, ())
    assert [row["eval_loss"] for row in metrics(tmp_path)] == [0.5]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_log_stops_at_a_number_that_is_not_finite(tmp_path, bad):
    state = make_state()
    with start(tmp_path) as run:
        run.restore(state)
        state.meters.update({"loss": bad})
        with pytest.raises(UserError, match=r"^step 0: loss: is (nan|-?inf)") as error:
            log(run, state)
    assert error.value.code == NON_FINITE
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_write_samples_adds_lines_that_keep_their_letters(done):
    text = (done / "samples.jsonl").read_text("utf-8")
    assert text == '{"step": 1, "text": "ü\\n"}\n{"step": 2, "text": "ü\\n"}\n'


def test_save_keeps_as_many_as_the_settings_say_and_the_length_of_the_logs(done):
    names = [c.name for c in commits(done / "checkpoints")]
    assert names == ["step-00000000", "step-00000001", "step-00000002"]
    saved = json.loads((done / "checkpoints" / names[-1] / "state.json").read_text("utf-8"))
    logs = ("metrics.jsonl", "samples.jsonl")
    assert saved["log_bytes"] == {name: (done / name).stat().st_size for name in logs}


def test_save_syncs_the_logs_before_the_commit(tmp_path, monkeypatch):
    state, order = make_state(), []
    with start(tmp_path) as run:
        run.restore(state)
        sync, commit = atomic.fsync, atomic.commit_folder
        monkeypatch.setattr(atomic, "fsync", lambda p: (order.append(p.name), sync(p)))
        monkeypatch.setattr(
            atomic, "commit_folder", lambda a, b: (order.append("commit"), commit(a, b))
        )
        state.step = 1
        run.save(state)
    assert order.index("metrics.jsonl") < order.index("commit") > order.index("samples.jsonl")


# ---- model/ --------------------------------------------------------------------------------------


def write_files(**files: str):
    def write(folder):
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    return write


def test_export_that_fails_leaves_the_old_model(done):
    def fail(folder):
        (folder / "a").write_text("half", encoding="utf-8")
        raise OSError("disk")

    with start(done, resume=True) as run:
        run.export(write_files(a="1"))
        with pytest.raises(OSError, match="disk"):
            run.export(fail)
    assert (done / "model" / "a").read_text("utf-8") == "1"
    with start(done, resume=True) as run:
        run.export(write_files(a="2"))
    assert (done / "model" / "a").read_text("utf-8") == "2"


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_before_the_first_step_lets_none_begin(tmp_path, capfd):
    state = make_state()
    with start(tmp_path) as run:
        run.restore(state)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(run.bar(toy(state, 9), state, 9)) == []
    assert state.step == 0


def test_a_second_signal_leaves_at_once(tmp_path, capfd, monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with start(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 128 + 15


# ---- what else a run tells -----------------------------------------------------------------------


def test_a_fault_of_ours_leaves_a_crash_json_and_the_checkpoint(tmp_path):
    state = make_state()
    with pytest.raises(ZeroDivisionError), start(tmp_path) as run:
        run.restore(state)
        for step in run.bar(toy(state, 9), state, 9):
            if step.number == 2:
                1 / 0  # noqa: B018
    crash = json.loads((tmp_path / "crash.json").read_text("utf-8"))
    assert crash["error"] == "ZeroDivisionError: division by zero"
    assert crash["after_step"] == 2 and crash["samples"] == 0
    assert "1 / 0" in "".join(crash["trace"])
    assert crash["settings"]["seed"] == 0
    assert [c.name for c in commits(tmp_path / "checkpoints")] == ["step-00000000"]


@pytest.mark.parametrize("error", [UserError("a", "b"), OSError("disk"), KeyboardInterrupt()])
def test_what_is_not_our_fault_leaves_none(tmp_path, error):
    with pytest.raises(type(error)), start(tmp_path):
        raise error
    assert not (tmp_path / "crash.json").exists()
