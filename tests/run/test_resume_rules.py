"""What may differ between two starts of a run: settings, data, reward sources, frozen models."""

import json
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.optim import make_optimizer
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import resume_rules, setting


@dataclass(frozen=True)
class Toy(RunSettings):
    """A recipe that counts."""

    model: str | None = setting(None, metavar="FOLDER", resume="fixed")
    data: str = setting("", metavar="FILE", data=True)
    eval_data: tuple[str, ...] = setting((), metavar="FILE", data=True)
    reward: tuple[str, ...] = setting((), metavar="SOURCE")
    seed: int = setting(0)
    stop: tuple[str, ...] = setting(("a", "b"))


@dataclass(frozen=True)
class Remembering(Toy):
    """Another, whose state holds what came of the held-out data and the reward at the start."""

    eval_data: tuple[str, ...] = setting((), metavar="FILE", data=True, resume="fixed")
    reward: tuple[str, ...] = setting((), metavar="SOURCE", resume="start")
    other: int = setting(0, resume="start")

    def remembers(self, name: str) -> bool:
        return name == "reward"


@dataclass(frozen=True)
class Newer(Toy):
    """What a later version made of it."""

    newest: int = setting(1)


def start(
    out, resume: bool = False, inputs: dict = MappingProxyType({}), recipe: str = "toy",
    config: type = Toy, **changes,
) -> Run:
    return Run(config(out=str(out), resume=resume, **changes), recipe, inputs)


def restore(run: Run) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    run.restore(TrainState(model, make_optimizer(model, 0.1)))


def facts_of(out) -> dict:
    return json.loads((out / "run.json").read_text("utf-8"))


@pytest.fixture
def done(tmp_path):
    """The folder of a run that was started once."""
    with start(tmp_path / "run") as run:
        restore(run)
    return tmp_path / "run"


# ---- settings ------------------------------------------------------------------------------------


def test_resume_rules_take_start_apart_by_what_is_remembered():
    rules = resume_rules(Remembering())
    assert (rules["reward"], rules["other"], rules["seed"]) == ("fixed", "ask", "ask")
    assert (rules["model"], rules["eval_data"], rules["log_every"]) == ("fixed", "fixed", "free")


def test_resume_refuses_changed_settings_and_names_old_and_new(done):
    told = r"run\.json: seed was 0, is 1; stop was \['a', 'b'\], is \['a', 'c'\]: resume with"
    with pytest.raises(UserError, match=told):
        start(done, resume=True, seed=1, stop=("a", "c"))


def test_resume_refuses_a_run_of_an_older_version_that_had_fewer_settings(done):
    told = r"run\.json: has no setting newest: an older minirlhf began the run: let that one finish"
    with pytest.raises(UserError, match=told):
        start(done, resume=True, config=Newer)


def test_resume_goes_on_with_changed_settings_where_that_is_allowed_and_says_so(done, capsys):
    changes = {"seed": 1, "newest": 2, "log_every": 7, "allow_setting_change": True}
    with start(done, resume=True, config=Newer, **changes) as run:
        restore(run)
    printed = capsys.readouterr().out
    for told in ("seed was 0, is 1", "log_every was 10, is 7", "newest did not exist, is 2"):
        assert f"changed: {told}\n" in printed
    facts = facts_of(done)
    changes = [{"setting": "seed", "was": 0, "is": 1}, {"setting": "newest", "was": None, "is": 2}]
    assert facts["setting_changes"] == changes and facts["settings"]["seed"] == 1
    assert run.provenance()["changes"] == changes
    with start(
        done, resume=True, config=Newer, seed=1, newest=2
    ) as run:  # the run's settings from now on
        restore(run)
    with pytest.raises(UserError, match="seed was 1, is 0"):
        start(done, resume=True, config=Newer, newest=2)
    with start(done, resume=True, config=Newer, newest=2, allow_setting_change=True) as run:
        restore(run)
    last = {"setting": "seed", "was": 1, "is": 0}
    assert facts_of(done)["setting_changes"] == [*changes, last]


@pytest.mark.parametrize(("config", "name"), [(Toy, "model"), (Remembering, "reward")])
def test_what_a_checkpoint_is_of_never_changes(config, name, tmp_path):
    one, other = ("a", "b") if name == "model" else (("a",), ("b",))
    with start(tmp_path / "run", config=config, **{name: one}) as run:
        restore(run)
    changes = {name: other, "seed": 1, "allow_setting_change": True}
    with pytest.raises(UserError) as caught:
        start(tmp_path / "run", resume=True, config=config, **changes)
    told = "model was 'a', is 'b'" if name == "model" else "reward was ['a'], is ['b']"
    assert caught.value.what == told
    assert caught.value.do == "resume with the settings of the first start"


def test_resume_prints_the_free_settings_that_changed_even_if_the_folder_was_moved(
    done, tmp_path, capsys
):
    done.rename(tmp_path / "moved")
    with start(tmp_path / "moved", resume=True, keep=5, log_every=2) as run:
        restore(run)
    out = capsys.readouterr().out
    assert "changed: log_every was 10, is 2\nchanged: keep was 2, is 5\n" in out
    assert "changed: resume" not in out and "changed: out" not in out


def test_resume_prints_nothing_where_nothing_changed(done, capsys):
    with start(done, resume=True) as run:
        restore(run)
    assert "changed" not in capsys.readouterr().out


# ---- inputs --------------------------------------------------------------------------------------

A, B = (  # sha256 of "1" and of "2"
    "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
    "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35",
)


def check_refused(match: str, *arguments, **changes) -> None:
    with pytest.raises(UserError, match=match), start(*arguments, **changes):
        pass


def test_resume_goes_on_with_changed_data_where_that_is_allowed_and_says_so(tmp_path, capsys):
    data, held_out, out = tmp_path / "d.jsonl", tmp_path / "e.jsonl", tmp_path / "run"
    for path in (data, held_out):
        path.write_text("1", encoding="utf-8")
    inputs = {"data": [data], "eval_data": [held_out]}
    with start(out, inputs=inputs) as run:
        restore(run)
    for path in (data, held_out):
        path.write_text("2", encoding="utf-8")
        told = f"{path.name}: has changed since the run began: give another --out, or --allow-data-"
        check_refused(told, out, True, inputs)
        before = (out / "run.json").read_bytes()
        with start(out, True, inputs, allow_data_change=True) as run:
            restore(run)
        printed = capsys.readouterr().out
        assert f"changed: {path}: sha256 was {A[:12]}, is {B[:12]}\n" in printed
        assert (out / "run.json").read_bytes() != before
        with start(out, True, inputs) as run:  # from now on that is the run's data
            restore(run)
        assert "changed" not in capsys.readouterr().out
    facts = facts_of(out)
    assert facts["inputs"] == {str(data): B, str(held_out): B}
    assert facts["named_by"] == {"data": [str(data)], "eval_data": [str(held_out)]}
    changes = [{"file": str(path), "was": A, "is": B} for path in (data, held_out)]
    assert facts["data_changes"] == changes
    data.write_text("1", encoding="utf-8")
    check_refused("has changed", out, True, inputs)


def test_allow_data_change_is_no_leave_to_change_anything_else(tmp_path):
    source, out = tmp_path / "reward.py", tmp_path / "run"
    source.write_text("1", encoding="utf-8")
    with start(out, inputs={"model": [source]}) as run:
        restore(run)
    source.write_text("2", encoding="utf-8")
    leave = {"allow_data_change": True, "allow_setting_change": True}
    told = r"reward\.py: has changed since the run.*--out$"
    check_refused(told, out, True, {"model": [source]}, **leave)


def test_provenance_names_data_by_what_it_was_and_is(tmp_path):
    old, new, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "run"
    for path, text in ((old, "1"), (new, "2")):
        path.write_text(text, encoding="utf-8")
    with start(out, inputs={"data": [old]}, data=str(old)) as run:
        restore(run)
    leave = {"allow_data_change": True, "allow_setting_change": True}
    with start(out, True, {"data": [new]}, data=str(new), **leave) as run:
        pass
    found = run.provenance()
    assert found["data"] == [{"file": "b.jsonl", "sha256": B}, {"file": "a.jsonl", "sha256": A}]
    assert found["settings"] == {"seed": 0, "stop": ["a", "b"]}  # no place, nothing that is free


@pytest.mark.parametrize("folder", [False, True])
def test_allow_setting_change_is_leave_to_mend_a_reward_source(folder, tmp_path):
    source, out = tmp_path / ("model" if folder else "reward.py"), tmp_path / "run"
    if folder:
        source.mkdir()
    file = source / "config.json" if folder else source
    file.write_text("1", encoding="utf-8")
    named = {"reward": (f"0.5*{source}",)}
    for config in (Toy, Remembering):
        with start(
            out / config.__name__, inputs={"reward": [source]}, config=config, **named
        ) as run:
            restore(run)
    file.write_text("2", encoding="utf-8")
    again = True, {"reward": [source]}
    told = "has changed since the run began: give another --out, or --allow-setting-change"
    check_refused(told, out / "Toy", *again, **named)
    allowed = named | {"allow_setting_change": True}
    told = r"has changed since the run began: give another --out$"
    check_refused(told, out / "Remembering", *again, config=Remembering, **allowed)
    with start(out / "Toy", *again, **allowed) as run:
        restore(run)
    other = tmp_path / "other.py"
    other.write_text("3", encoding="utf-8")
    with start(
        out / "Toy", True, {"reward": [other]}, **allowed | {"reward": (str(other),)}
    ) as run:
        restore(run)
    changed = [change["file"] for change in facts_of(out / "Toy")["data_changes"]]
    assert changed == [str(file), str(other), str(file)]


def test_held_out_data_that_a_state_remembers_may_not_change(tmp_path):
    data, out = tmp_path / "e.jsonl", tmp_path / "run"
    data.write_text("1", encoding="utf-8")
    inputs, allowed = {"eval_data": [data]}, {"config": Remembering, "allow_data_change": True}
    with start(out, inputs=inputs, **allowed) as run:
        restore(run)
    data.write_text("2", encoding="utf-8")
    told = r"has changed since the run began: give another --out$"
    check_refused(told, out, True, inputs, **allowed)


def test_resume_takes_inputs_that_an_older_version_kept_no_sum_of(tmp_path):
    data, tokenizer, out = tmp_path / "d.jsonl", tmp_path / "tokenizer.json", tmp_path / "run"
    data.write_text("1", encoding="utf-8")
    tokenizer.write_text("{}", encoding="utf-8")
    with start(out, inputs={"data": [data]}) as run:
        restore(run)
    inputs = {"data": [data], "model": [tokenizer]}
    with start(out, True, inputs) as run:
        restore(run)
    assert len(run.record.inputs) == 2
    tokenizer.write_text("[]", encoding="utf-8")
    check_refused(r"tokenizer\.json: has changed since the run began", out, True, inputs)


def test_resume_refuses_a_frozen_model_that_changed(tmp_path):
    model, out = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "README.md").write_text("a", encoding="utf-8")
    with start(out, inputs={"model": [model]}) as run:
        restore(run)
    (model / "README.md").write_text("b", encoding="utf-8")  # no number depends on it
    with start(out, True, {"model": [model]}) as run:
        restore(run)
    told = r"model\.safetensors: has changed since the run began"
    (model / "model.safetensors").write_bytes(b"Weights")
    check_refused(told, out, True, {"model": [model]})
    (model / "model.safetensors").unlink()
    check_refused(told, out, True, {"model": [model]})


def test_a_run_is_not_written_into_a_folder_that_it_reads(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(UserError, match=r"is --model .*model or lies in it: give another --out"):
        start(model / "run", model=str(model))
    with pytest.raises(UserError, match=r"is --reward .*model or lies in it: give another --out"):
        start(model, inputs={"reward": [model]})
