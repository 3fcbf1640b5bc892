"""A signal ends a run where all that has begun can be dropped, and never inside an update."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nan

from minirlhf import interrupt
from minirlhf.batches import rollouts as passes_module
from minirlhf.data.examples import Pair, Text
from minirlhf.errors import NonFinite, Stopped, UserError
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.models import generation
from minirlhf.models.generation import generate
from minirlhf.models.heads import RewardModel
from minirlhf.models.sampling import Sampling
from minirlhf.recipes import dpo as dpo_recipe
from minirlhf.recipes import grpo as grpo_recipe
from minirlhf.recipes import ppo as ppo_recipe
from minirlhf.recipes import reward as reward_recipe
from minirlhf.recipes import sft as sft_recipe
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.source import Completions
from minirlhf.run import optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.meters import Step
from minirlhf.run.resume import RunSettings
from minirlhf.setup import reward, sft
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from tests import tiny_dpo
from tests.evaluation.test_policy import evaluated
from tests.tiny_ppo import (
    PROMPTS,
    Letters,
    config_of,
    parameters,
    state_of,
    steps_from,
    tiny_lm,
    tiny_policy,
)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- the flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
)
def test_check_raises_once_a_signal_has_come(number, capfd):
    before = signal.getsignal(number)
    with interrupt.listening():
        interrupt.check()
        assert not interrupt.requested()
        os.kill(os.getpid(), number)
        assert interrupt.requested()
        with pytest.raises(Stopped):
            interrupt.check()
    assert not interrupt.requested()
    assert signal.getsignal(number) is before
    assert "once more to leave at once" in capfd.readouterr().err


def test_a_closed_terminal_is_no_signal_for_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_taken_where_nobody_reads_what_it_says(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    with interrupt.listening():
        monkeypatch.setattr(os, "write", gone)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested()


def test_listening_forgets_an_earlier_signal(capfd):
    with interrupt.listening():
        stop()
    with interrupt.listening():
        interrupt.check()


def test_outside_is_left_where_it_stands_though_every_exception_is_caught(capfd):
    with interrupt.listening(), pytest.raises(Stopped):
        try:
            with interrupt.outside():
                stop()
                raise AssertionError("went on")
        except Exception:
            raise AssertionError("swallowed") from None


def test_outside_is_not_entered_after_a_signal(capfd):
    with interrupt.listening():
        with interrupt.outside():
            pass
        stop()  # which waits for the next look
        assert interrupt.requested()
        with pytest.raises(Stopped), interrupt.outside():
            raise AssertionError("went in")


# ---- where it is looked at -----------------------------------------------------------------------

TEXTS = [Text([1, 2, 3], 0, f"a:{i}", {}) for i in range(4)]
PAIRS = [Pair([1], [2], [3], 0.0, f"a:{i}", {}) for i in range(4)]


def completions() -> Completions:
    return Completions(["a"], [[1]], ["b"], [[2]], ["length"], {})


def scorer() -> RewardModel:
    return RewardModel(tiny_lm())


@pytest.mark.parametrize(
    "work",
    [
        lambda: generate(tiny_lm(), [[1]], Sampling(3), [], torch.tensor([7])),
        lambda: model_reward(scorer(), Letters(), 64)(completions()),
        lambda: function_reward(lambda completions: [1.0], "f")(completions()),
        lambda: evaluate_preferences(scorer(), PAIRS),
        lambda: sft_recipe.evaluate(tiny_lm(), TEXTS),
        lambda: evaluated(),
    ],
    ids=["sampling", "reward model", "reward function", "reward evaluation", "sft evaluation",
         "policy evaluation"],
)
def test_work_ends_at_a_signal(work, capfd):
    work()
    with interrupt.listening():
        stop()
        with pytest.raises(Stopped):
            work()


def test_sampling_ends_between_two_tokens(monkeypatch, capfd):
    drawn = []

    def draw(law, keys, t):
        drawn.append(int(t[0]))
        if len(drawn) == 2:
            stop()
        return torch.zeros(len(keys), dtype=torch.int64)

    monkeypatch.setattr(generation, "draw", draw)
    with interrupt.listening(), pytest.raises(Stopped):
        generate(tiny_lm(), [[1]], Sampling(9), [], torch.tensor([7]))
    assert drawn == [0, 1]


def test_a_reward_function_that_sleeps_is_left_at_once(capfd):
    def sleeper(completions):
        stop()
        time.sleep(60)

    with interrupt.listening(), pytest.raises(Stopped):
        function_reward(sleeper, "sleeper")(completions())


@pytest.mark.parametrize("caught", [ZeroDivisionError, asyncio.CancelledError, BaseException])
def test_an_async_reward_function_that_ignores_its_end_is_left_at_once(caught, capfd, recwarn):
    """It goes on in its thread, which ends with the process; what it says there is not heard."""
    async def sleeper(completions):
        stop()
        while True:
            try:
                await asyncio.sleep(60)
            except caught:
                continue

    began = time.monotonic()
    with interrupt.listening(), pytest.raises(Stopped):
        function_reward(sleeper, "sleeper")(completions())
    assert time.monotonic() - began < 2
    assert not recwarn.list and "await" not in capfd.readouterr().err


@pytest.mark.parametrize("catches", [Exception, BaseException])
@pytest.mark.parametrize("then", ["score", "error"])
def test_a_stop_that_a_reward_function_swallows_still_stops(catches, then, capfd):
    def f(completions):
        try:
            stop()
            time.sleep(1)
        except catches:
            if then == "error":
                raise RuntimeError from None
        return [0.0]  # made up

    with interrupt.listening(), pytest.raises(Stopped):
        function_reward(f, "f")(completions())


def test_a_function_may_be_left_by_ctrl_c_where_no_run_listens():
    def f(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        function_reward(f, "f")(completions())
    told = r"test_interrupt.py:\d+: f raised KeyboardInterrupt: it was given"
    with interrupt.listening(), pytest.raises(UserError, match=told):  # it was no signal
        function_reward(f, "f")(completions())


# ---- processes that a reward function forks ------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """Exit status of a child that does this; what it returns is no way out for it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_forked_child_and_does_not_stop_the_run(number, capfd):
    """With the handlers of before the run: Python's own of SIGINT raises KeyboardInterrupt."""
    def f(completions):
        expected = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 99}[number]
        assert forked(lambda: os.kill(os.getpid(), number) or time.sleep(60)) == expected
        return [1.0]

    with interrupt.listening():
        function_reward(f, "f")(completions())
        assert not interrupt.requested() and interrupt.listens()
    assert "stopping" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("way", "code", "told"),
    [
        (lambda: None, 1, "forked returned; it ends"),
        (lambda: 1 / 0, 1, "forked raised ZeroDivisionError: division by zero; it ends"),
        (lambda: sys.exit(7), 7, ""), (lambda: sys.exit(0), 0, ""), (lambda: sys.exit("no"), 1, ""),
        (lambda: os._exit(5), 5, ""),
    ],
)
def test_a_forked_child_that_comes_back_ends(way, code, told, capfd):
    home, children = os.getpid(), []

    def f(completions):
        children.append(os.fork())
        if not children[-1]:
            way()
        return [1.0]

    try:
        function_reward(f, "f")(completions())
    finally:
        if os.getpid() != home:
            os._exit(99)  # it went on as the run
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == code
    assert told in (err := capfd.readouterr().err) and bool(told) is bool(err)


def test_a_child_does_not_hold_the_folder(tmp_path):
    (reading, writing), (ready, forked) = os.pipe(), os.pipe()
    with toy_run(tmp_path):
        if not (child := os.fork()):
            os.close(writing)
            os.write(forked, b".")
            os.read(reading, 1)  # lives on until the test has looked
            os._exit(0)
        os.read(ready, 1)  # what a child does first is done
    with toy_run(tmp_path, resume=True), pytest.raises(UserError, match="is in use by process"):
        toy_run(tmp_path, resume=True).__enter__()
    os.close(writing)
    os.waitpid(child, 0)
    for handle in (reading, ready, forked):
        os.close(handle)


def test_a_started_program_has_no_file_of_the_run(tmp_path):
    look = "import os; print(*[os.path.realpath(f'/dev/fd/{n}') for n in os.listdir('/dev/fd')])"
    with toy_run(tmp_path):
        handles = subprocess.run([sys.executable, "-c", look], close_fds=False, check=True,
                                 stdout=subprocess.PIPE, text=True).stdout
    assert str(tmp_path) not in handles and handles


class Case(NamedTuple):
    """A recipe on a tiny model: what computes a pass of it is `owner.name`."""

    model: torch.nn.Module
    rows: list
    steps: Callable
    config: type
    owner: object
    name: str

    def state(self) -> TrainState:
        return TrainState(self.model, optim.make_optimizer(self.model, 0.1))


def sft_case() -> Case:
    return Case(tiny_lm(), TEXTS, sft_recipe.sft, sft.SFTConfig, sft_recipe, "target_stats")


def reward_case() -> Case:
    model = scorer()
    torch.nn.init.ones_(model.score.weight)
    steps, config = reward_recipe.reward, reward.RewardConfig
    return Case(model, PAIRS, steps, config, RewardModel, "head_scores")


def dpo_case() -> Case:
    def steps(state, rows, config):
        return dpo_recipe.dpo(state, rows, tiny_dpo.reference(tiny_dpo.tiny_lm()), config)

    lm, config = tiny_dpo.tiny_lm(), DPOConfig
    return Case(lm, PAIRS, steps, config, dpo_recipe, "response_stats")


each_case = pytest.mark.parametrize(
    "make", [sft_case, reward_case, dpo_case], ids=["sft", "reward", "dpo"]
)


@each_case
def test_a_signal_before_the_update_drops_the_step(make, capfd, monkeypatch):
    case, fresh, passes = make(), make(), []
    config = case.config(batch_size=4, micro_batch_tokens=4)
    state, before, real = case.state(), parameters(case.model), getattr(case.owner, case.name)

    def counted(*arguments):
        passes.append(1)
        if len(passes) == 2:
            stop()
        return real(*arguments)

    monkeypatch.setattr(case.owner, case.name, counted)
    with interrupt.listening(), pytest.raises(Stopped):
        next(case.steps(state, case.rows, config))
    assert len(passes) == 2  # of four micro-batches
    assert torch.equal(parameters(case.model), before)
    assert (state.step, state.samples, state.counters) == (0, 0, {})
    assert state.meters.as_dict() == {}
    # The pass that was dropped left no gradient that could leak into the next one.
    monkeypatch.undo()
    again, other = (
        next(case.steps(s, case.rows, config)).metrics for s in (state, fresh.state())
    )
    assert again == other


@pytest.mark.parametrize("at", range(1, 5))
def test_ppo_drops_the_rollout_before_its_first_update_and_finishes_after_it(
    at, monkeypatch, capfd
):
    """Two micro-batches are measured, then two epochs of two updates follow; the signal comes in
    the `at`-th pass: 1 and 2 measure, 3 is before the first update, 4 after it."""
    config = config_of(epochs=2, mini_batches=2, micro_batch_size=2, batch_size=4, steps=2)
    state, passes, real = state_of(tiny_policy(), config), [], passes_module.policy_pass
    before = parameters(state.model)

    def counted(*arguments):
        passes.append(1)
        if len(passes) == at:
            stop()
        return real(*arguments)

    monkeypatch.setattr(ppo_recipe, "policy_pass", counted)
    monkeypatch.setattr(passes_module, "policy_pass", counted)
    loop, done = steps_from(state, config), int(at == 4)
    with interrupt.listening():
        if done:
            assert next(loop).number == 1
        with pytest.raises(Stopped):  # after a whole step the next one does not begin
            next(loop)
    assert len(passes) == 2 + 4 if done else at <= len(passes) <= 3
    assert (state.step, state.samples, state.counters) == (done, 4 * done, {})
    assert torch.equal(parameters(state.model), before) is not bool(done)


def ids_added(completions) -> torch.Tensor:
    return torch.tensor([float(sum(ids)) for ids in completions.response_ids])


@pytest.mark.parametrize("at", range(1, 5))
def test_grpo_drops_the_rollout_before_its_first_update_and_finishes_after_it(
    at, monkeypatch, capfd
):
    """As PPO: two micro-batches are measured, by the policy and its reference, then two epochs of
    two updates follow; the signal comes in the policy's `at`-th pass of these six."""
    config = GRPOConfig(batch_size=2, samples_per_prompt=2, epochs=2, mini_batches=2, steps=2,
                        micro_batch_size=2, max_new_tokens=6, learning_rate=1e-2)
    lm, passes, real = tiny_lm(), [], passes_module.lm_pass
    state, before = TrainState(lm, optim.make_optimizer(lm, 1e-2)), parameters(lm)

    def counted(model, *arguments):
        passes.append(1) if model is lm else None
        if model is lm and len(passes) == at:
            stop()
        return real(model, *arguments)

    monkeypatch.setattr(grpo_recipe, "lm_pass", counted)
    monkeypatch.setattr(passes_module, "lm_pass", counted)
    loop = grpo_recipe.grpo(state, PROMPTS, ids_added, tiny_lm(), Letters(), config)
    done = int(at == 4)
    with interrupt.listening():
        if done:
            assert next(loop).number == 1
        with pytest.raises(Stopped):
            next(loop)
    assert len(passes) == 2 + 4 if done else at <= len(passes) <= 3
    assert (state.step, state.samples, state.counters == {}) == (done, 2 * done, not done)
    assert torch.equal(parameters(lm), before) is not bool(done)


# ---- the report of a step ------------------------------------------------------------------------


def toy_run(out, resume=False) -> Run:
    return Run(RunSettings(out=str(out), resume=resume), "toy")


def toy_state() -> TrainState:
    model = torch.nn.Linear(2, 1)
    return TrainState(model, optim.make_optimizer(model, 0.1))


def trained(state: TrainState, total: int):
    while state.step < total:
        state.step += 1
        state.meters.update({"loss": state.step / 8})
        yield Step(state.step, {"loss": state.step / 8}, {"step_time": 0.5}, [{"a": state.step}])


def report(r: Run, state: TrainState, step: Step, signal_at: int | None = None) -> None:
    with r.report(state, step):
        state.best = step.metrics["loss"]
        state.health = {**state.health, f"step {step.number}": [state.best]}
        r.write_samples(state, step.samples)
        r.log(state, {"twice": 2 * step.metrics["loss"]}, step.clock, ("loss",))
        if step.number == signal_at:
            stop()
        interrupt.check()
        r.write_samples(state, [{"end": step.number}])
    r.save(state)


def logs(out) -> tuple[list, str]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) | {"clock": 0} for line in lines], (out / "samples.jsonl").read_text(
        "utf-8"
    )


def reported(out, total: int, signal_at: int | None = None, resume: bool = False):
    """(state, numbers of the steps that were reported) of a run of so many steps."""
    state, numbers = toy_state(), []
    with toy_run(out, resume) as r:
        r.restore(state)
        for step in r.bar(trained(state, total), state, total):
            numbers.append(step.number)
            report(r, state, step, signal_at)
        assert r.stopped is (signal_at is not None)
    return state, numbers


def test_a_report_that_a_signal_cuts_short_is_written_by_the_resumed_run(tmp_path, capfd):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    reported(whole, 3)
    state, _ = reported(out, 3, signal_at=2)
    # nothing of step 2 is left in the logs, and the open window has its number again
    assert state.step == 2 and [line["step"] for line in logs(out)[0]] == [1]
    assert logs(out)[1] == '{"a": 1}\n{"end": 1}\n'
    assert state.meters.as_dict() == {"loss": [0.25, 0.25, 1]}
    assert (state.best, state.health) == (0.125, {"step 1": [0.125]})
    assert state.unreported == {
        "number": 2, "metrics": {"loss": 0.25}, "clock": {"step_time": 0.5}, "samples": [{"a": 2}],
    }
    state, numbers = reported(out, 3, resume=True)
    assert numbers == [2, 3] and state.unreported is None
    assert list(state.health) == ["step 1", "step 2", "step 3"]
    assert logs(out) == logs(whole)


def test_the_last_report_too_is_written_by_the_resumed_run(tmp_path, capfd):
    reported(tmp_path, 1, signal_at=1)
    capfd.readouterr()
    assert reported(tmp_path, 1, resume=True)[1] == [1]
    assert "no steps left" not in capfd.readouterr().out


# ---- updates that are skipped --------------------------------------------------------------------


def test_skip_nonfinite_counts_up_to_its_patience():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer, counters = torch.optim.SGD([weight], lr=0.5), {}

    def good():
        with optim.skip_nonfinite(optimizer, counters, 2):
            weight.sum().backward()  # gradient 1: a step of -0.5
            optimizer.step()

    def bad():
        with optim.skip_nonfinite(optimizer, counters, 2):
            (weight * nan).sum().backward()
            raise NonFinite("here", "is nan")

    bad()
    bad()
    assert counters == {"skipped_updates": 2, "skipped_in_a_row": 2}
    assert weight.item() == 1.0 and weight.grad is None
    good()
    assert counters == {"skipped_updates": 2}
    assert weight.item() == 0.5 and weight.grad is None
    bad()
    bad()
    with pytest.raises(NonFinite, match="here: is nan"):
        bad()
    assert counters == {"skipped_updates": 4, "skipped_in_a_row": 2}
    assert weight.item() == 0.5


@each_case
def test_a_step_starts_from_no_gradient(make):
    """Whatever a pass that was dropped half-way has left in the parameters."""
    weights = []
    for left in (False, True):
        case = make()
        if left:
            for parameter in case.model.parameters():
                parameter.grad = torch.full_like(parameter, 100.0)
        next(case.steps(case.state(), case.rows, case.config(batch_size=2, epochs=1.0)))
        weights.append(parameters(case.model))
    assert torch.equal(*weights)


@each_case
def test_a_step_without_finite_numbers_is_skipped_and_told(make, monkeypatch):
    case, calls = make(), []
    state, before, real = case.state(), parameters(case.model), getattr(case.owner, case.name)

    def poisoned(*arguments):
        calls.append(1)
        out = real(*arguments)
        if len(calls) > 1:
            return out
        return out._replace(logprobs=out.logprobs * nan) if hasattr(out, "logprobs") else out * nan

    monkeypatch.setattr(case.owner, case.name, poisoned)
    loop = case.steps(state, case.rows, case.config(batch_size=2, epochs=1.0, skip_nonfinite=1))
    first = next(loop)
    assert torch.equal(parameters(case.model), before)
    assert first.metrics["skipped_updates"] == 1 and "loss" not in first.metrics
    assert state.meters.as_dict() == {} and state.samples == 2
    second = next(loop)
    assert second.metrics["skipped_updates"] == 1 and "loss" in second.metrics
    assert not torch.equal(parameters(case.model), before)
    assert next(loop, None) is None
