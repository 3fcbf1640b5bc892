"""Trackers are sent what the log says, once, and no failure of theirs ends a run."""

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from minirlhf.errors import Stopped, UserError
from minirlhf.run import trackers
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.meters import Step
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import validate
from minirlhf.run.trackers import ID_FILE, names_of, next_step


def state_of_nothing() -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return TrainState(model, torch.optim.AdamW(model.parameters()))


def run_to(out, last: int, save: int, track: str, stop_at: int | None = None, **settings) -> list:
    """Logs a loss of step / 10 for each step to `last`, and saves at one of them; what was said."""
    config, said = RunSettings(out=str(out), track=(track,), **settings), []
    with Run(config, "toy") as run:
        run.display.note = said.append
        run.trackers.warn = said.append
        run.restore(state := state_of_nothing())
        while state.step < last:
            state.step += 1
            with run.report(state, Step(state.step, {}, {}, [])):
                run.log(state, {"loss": state.step / 10}, {"step_time": 0.5}, ())
                if state.step == stop_at:
                    raise Stopped
            if state.step == save:
                run.save(state)
    return said


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")  # of its imports
def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    run_to(tmp_path / "run", last=3, save=2, track="tensorboard")
    run_to(tmp_path / "run", last=4, save=4, track="tensorboard", resume=True)
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["loss"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert found["clock/step_time"] == [(step, 0.5) for step in (1, 2, 3, 4)]
    assert {"clock/elapsed", "clock/peak_memory"} < found.keys() and "step" not in found


class Fake:
    """A module whose init(…) gives a run that keeps what it is sent."""

    def __init__(self, fails_at: int | None = None):
        self.begun, self.rows, self.finished, self.fails_at = [], [], 0, fails_at

    def log(self, step, metrics):
        if step == self.fails_at:
            raise OSError("no network\nand much more")
        self.rows.append((step, metrics["loss"]))


def fake(name: str, monkeypatch, fails_at: int | None = None) -> Fake:
    """wandb or trackio, with as many arguments as these have."""
    kept, module = Fake(fails_at), ModuleType(name)

    class WandbRun:
        def log(self, data, step=None, commit=None):
            kept.log(step, data)

        def finish(self, exit_code=None, quiet=None):
            kept.finished += 1

    class TrackioRun:
        def log(self, metrics, step=None):
            kept.log(step, metrics)

        def finish(self):
            kept.finished += 1

    def wandb_init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
        config=None, *, group=None, job_type=None, mode=None, force=None, reinit=None,
        resume=None, resume_from=None, fork_from=None, save_code=None, settings=None,
    ):
        kept.begun.append({"project": project, "name": name, "id": id, "resume": resume,
                           "dir": dir, "config": config})
        return WandbRun()

    def trackio_init(
        project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
        bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
        auto_log_gpu=None,
    ):
        kept.begun.append({"project": project, "name": name, "resume": resume, "config": config})
        return TrackioRun()

    module.init = {"wandb": wandb_init, "trackio": trackio_init}[name]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers, "find_spec", lambda _: object())
    return kept


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_the_same_run_after_a_resume_and_has_each_step_once(
    name, tmp_path, monkeypatch
):
    kept = fake(name, monkeypatch)
    run_to(tmp_path / "run", last=3, save=2, track=name)
    run_to(tmp_path / "run", last=4, save=4, track=name, resume=True)
    assert kept.rows == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)] and kept.finished == 2
    first, second = kept.begun
    assert first["project"] == "minirlhf" and first["resume"] == "allow"
    assert first["config"]["out"] == str(tmp_path / "run")
    assert {k: v for k, v in first.items() if k != "config"} == {
        k: v for k, v in second.items() if k != "config"}
    own = json.loads((tmp_path / "run" / ID_FILE).read_text())["id"]
    assert first["id" if name == "wandb" else "name"].endswith(own)


def test_a_line_that_a_signal_takes_back_is_not_sent(tmp_path, monkeypatch):
    kept = fake("wandb", monkeypatch)
    run_to(tmp_path / "run", last=2, save=1, track="wandb", stop_at=2)
    assert kept.rows == [(1, 0.1)]


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path, monkeypatch):
    kept, other = fake("wandb", monkeypatch, fails_at=2), fake("trackio", monkeypatch)
    said = run_to(tmp_path / "run", last=4, save=4, track="wandb,trackio")
    assert said == ["wandb failed, and is told no more: no network"]
    assert [step for step, _ in kept.rows] == [1] and len(other.rows) == 4
    assert next_step(tmp_path / "run" / "metrics.jsonl") == 5


def test_a_tracker_that_cannot_begin_is_told_of_once(tmp_path, monkeypatch):
    fake("wandb", monkeypatch)
    sys.modules["wandb"].init = lambda **_: 1 / 0
    said = run_to(tmp_path / "run", last=2, save=2, track="wandb")
    assert said == ["wandb failed, and is told no more: division by zero"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_refused_before_anything_is_made(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    told = rf"^--track {name}: is not installed: pip install {name}, or leave it out$"
    with pytest.raises(UserError, match=told):
        Run(RunSettings(out=str(tmp_path / "run"), track=(name,)), "toy")
    assert not (tmp_path / "run").exists()


def test_names_may_stand_between_commas_and_must_be_known():
    assert names_of(("wandb,tensorboard", "wandb")) == ["wandb", "tensorboard"]
    with pytest.raises(UserError, match="track: got 'mlflow', must be of tensorboard, wandb, tr"):
        validate(RunSettings(out="o", track=("wandb,mlflow",)))


def test_the_next_step_is_that_behind_the_last_whole_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert next_step(log) == 0
    log.write_text('{"step": 0}\n{"step": 7, "loss": 1}\n{"step": 9, "lo')
    assert next_step(log) == 8
