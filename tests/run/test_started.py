"""A folder in which a run was started and made no step, and one in which it made one."""

import json

import pytest

from minirlhf.errors import UserError
from minirlhf.run.checkpoint import commits
from minirlhf.run.started import forget_start, made_no_step
from tests.run.test_folder import log, make_state, metrics, start, toy


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was evaluated, sampled from and saved at step 0, then crashed."""
    out, state = tmp_path / "run", make_state()
    with pytest.raises(ZeroDivisionError), start(out, seed=1) as run:
        run.restore(state)
        state.meters.update({"loss": 1.0})
        log(run, state)
        run.write_samples(state, [{"step": 0, "text": "a"}])
        raise ZeroDivisionError
    assert (out / "crash.json").exists()
    return out


def test_a_run_that_made_no_step_is_started_again_in_its_folder(begun, capsys):
    (begun / "tokenizer").mkdir()  # of other settings
    state = make_state()
    with start(begun, seed=2) as run:
        assert commits(begun / "checkpoints") == [] and not (begun / "tokenizer").exists()
        run.restore(state)
    assert "no step was made here before: begins anew" in capsys.readouterr().out
    assert json.loads((begun / "run.json").read_text("utf-8"))["settings"]["seed"] == 2
    assert metrics(begun) == [] and not (begun / "crash.json").exists()
    assert [commit.name for commit in commits(begun / "checkpoints")] == ["step-00000000"]


def test_it_may_also_go_on(begun):
    with start(begun, seed=1, resume=True) as run:
        run.restore(state := make_state())
    assert state.step == 0 and metrics(begun) == []  # what its checkpoint of step 0 knows


@pytest.mark.parametrize("what", ["a step", "half a line", "model", "no run.json", "a link"])
def test_a_folder_that_holds_more_is_not_touched(begun, what):
    if what == "a step":
        with (begun / "samples.jsonl").open("a") as file:
            file.write('{"step": 1}\n')
    elif what == "half a line":
        with (begun / "metrics.jsonl").open("a") as file:
            file.write('{"st')
    elif what == "model":
        (begun / "model").mkdir()
    elif what == "no run.json":
        (begun / "run.json").unlink()
    else:
        (begun / "checkpoints").rename(begun.parent / "kept")
        (begun / "checkpoints").symlink_to(begun.parent / "kept")
    before = sorted(begun.rglob("*"))
    assert not made_no_step(begun)
    with pytest.raises(UserError, match="is not empty: give another --out, or --resume"):
        start(begun)
    assert sorted(begun.rglob("*")) == before


def test_a_later_checkpoint_is_a_step(tmp_path):
    with start(tmp_path / "run") as run:
        run.restore(state := make_state())
        next(iter(toy(state, 1)))
        run.save(state)
    assert not made_no_step(tmp_path / "run")


def test_an_empty_folder_has_no_start(tmp_path):
    assert made_no_step(tmp_path) and not forget_start(tmp_path)


def test_without_checkpoints_a_killed_run_begins_again(tmp_path, capsys):
    out = tmp_path / "run"
    with start(out, save_every=None) as run:
        run.restore(state := make_state())
        assert not (out / "checkpoints").exists()
        next(iter(toy(state, 1)))
        log(run, state)  # and then it is killed
    with pytest.raises(UserError, match="is not empty"):
        start(out, save_every=None)
    capsys.readouterr()
    with start(out, resume=True) as run:  # whatever this start is to keep
        run.restore(state := make_state())
        assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
        assert state.step == 0 and metrics(out) == []
        next(iter(toy(state, 1)))
        log(run, state)
        run.save(state)  # as at a signal
    with start(out, save_every=None, resume=True) as run:
        run.restore(state := make_state())
    assert state.step == 1 and len(metrics(out)) == 1


def test_a_run_that_kept_no_checkpoint_and_ended_is_not_begun_again(tmp_path):
    out = tmp_path / "run"
    with start(out, save_every=None) as run:
        run.restore(state := make_state())
        next(iter(toy(state, 1)))
        log(run, state)
        run.export(lambda folder: (folder / "a").write_text("model"))
    told = "run: has ended, and kept no checkpoint to go on from .*: give another --out"
    with pytest.raises(UserError, match=told), start(out, save_every=None, resume=True) as run:
        run.restore(make_state())
    assert len(metrics(out)) == 1


def test_lost_checkpoints_are_missed_whatever_this_start_keeps(tmp_path):
    out = tmp_path / "run"
    with start(out) as run:
        run.restore(state := make_state())
        next(iter(toy(state, 1)))
        log(run, state)
        run.save(state)
    (out / "checkpoints").rename(tmp_path / "lost")
    told = "holds no checkpoint, and metrics.jsonl is not empty"
    with pytest.raises(UserError, match=told), start(out, save_every=None, resume=True) as run:
        run.restore(make_state())
