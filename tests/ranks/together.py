"""Checks that several ranks make together, each in a process of its own.

    python -m tests.ranks.together FILE

forks 1 to 4 ranks in turn, which make the checks of COUNT in lockstep, and writes what went wrong
to FILE: {check: {"COUNT/RANK": traceback}}.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, tensor

from minirlhf import interrupt, ranks, shards
from minirlhf.errors import BAD_INPUT, DISTRIBUTED, MACHINE, NonFinite, Stopped, UserError
from minirlhf.models import parallel

CHECKS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}


def together(*counts: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[check.__name__] = check, counts
        return check

    return add


def raised(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


# ------------------------------------------------------------------------------ minirlhf/ranks.py


@together(2, 3, 4)
def rows_come_back_in_order_whatever_their_kind():
    for rows in (1, 2, 3, 5, 9):
        here = ranks.share(rows)
        numbers = torch.arange(rows)
        whole = [numbers - 2, numbers.float() / 3, numbers % 2 == 0, numbers.double().exp(),
                 numbers.bfloat16() / 7, numbers[:, None, None] * torch.ones(1, 2, 3)]
        whole[1][0] = float("nan")
        for expected, found in zip(
            whole, ranks.gather_rows([x[here] for x in whole], rows), strict=True
        ):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@together(1, 3)
def each_has_the_results_of_all_in_order():
    me = ranks.number()
    expected = [b"\0\xff" * rank for rank in range(ranks.count())]  # of rank 0 nothing
    assert ranks.each(lambda: expected[me]) == expected
    parts = ranks.gather_tensors(lambda: {"a": torch.full((me,), me), "b": tensor(0.5 * me)})
    for rank, part in enumerate(parts):
        assert part["a"].tolist() == [rank] * rank and float(part["b"]) == 0.5 * rank


@together(1, 3)
def the_first_alone_is_asked():
    asked = []
    found = ranks.from_first(lambda: asked.append(1) or {"name": [1.5, None, "é"]})
    assert found == {"name": [1.5, None, "é"]}
    assert len(asked) == (ranks.number() == 0)


def fail_on(rank: int, error: BaseException) -> BaseException:
    """What this rank meets where another one raises this in a part of its own."""
    def part() -> bytes:
        if ranks.number() == rank:
            raise error
        return b""

    return raised(lambda: ranks.each(part))


@together(2, 3)
def an_error_of_one_is_that_of_all():
    met = fail_on(1, UserError("data.jsonl:7", "is odd", "mend it"))
    assert type(met) is UserError
    assert (str(met), met.code) == ("data.jsonl:7: is odd: mend it", BAD_INPUT)
    assert type(fail_on(1, NonFinite("step 3: loss", "is nan"))) is NonFinite
    full = fail_on(0, OSError(28, "No space left on device", "model/x"))
    assert type(full) is (OSError if ranks.number() == 0 else UserError)
    if ranks.number():
        assert (str(full), full.code) == ("model/x: No space left on device", MACHINE)
    ranks.at("step 4")
    fault = fail_on(1, ValueError("oh\nno"))
    if ranks.number() == 1:
        assert type(fault) is ValueError
    else:
        told = "rank 1: failed during step 4: ValueError: oh\\nno"
        assert str(fault).startswith(told) and fault.code == DISTRIBUTED
    assert not ranks.alone()  # none is left inside its part


@together(2)
def a_stop_of_one_is_that_of_all():
    with interrupt.listening():
        if ranks.number() == 1:
            signal.raise_signal(signal.SIGUSR1)
        assert not interrupt.requested()  # nobody else knows it
        interrupt.check()
        ranks.gather_rows([torch.zeros(1)], 2)
        assert interrupt.requested() and type(raised(interrupt.check)) is Stopped
    with interrupt.listening():
        if ranks.number() == 1:
            signal.raise_signal(signal.SIGTERM)
        assert type(raised(lambda: ranks.each(lambda: interrupt.check() or b""))) is Stopped
        assert interrupt.requested()


# --------------------------------------------------------------------- minirlhf/models/parallel.py


class Two(nn.Module):
    """x (B, 2) -> Out(x w, x v), both (B,)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(tensor([0.3, -1.2], dtype=torch.float64))
        self.v = nn.Parameter(tensor([0.7, 0.4], dtype=torch.float64))


class Out(NamedTuple):
    w: Tensor
    v: Tensor | None


def pass_of(model: Two, x: Tensor, both: bool = True) -> Out:
    return Out(x @ model.w, x @ model.v if both else None)


def loss_of(out: Out) -> Tensor:
    """No sum over rows: each row's part depends on all others."""
    loss = out.w.std(correction=0) * out.w.exp().max()
    return loss if out.v is None else loss + (out.w.softmax(0) * out.v).sum() ** 2


def rows_of(B: int) -> Tensor:
    return torch.linspace(-1, 2, 2 * B, dtype=torch.float64).sin().view(B, 2)


def gradients(model: Two) -> list[list[float]]:
    return [None if p.grad is None else p.grad.tolist() for p in (model.w, model.v)]


def close(found: list, expected: list) -> bool:
    return torch.allclose(tensor(found).double(), tensor(expected).double(), rtol=0, atol=1e-12)


@together(1, 2, 3, 4)
def a_loss_over_rows_of_all_has_the_gradient_of_one_process():
    for B in (1, 2, 3, 5, 7):
        plain, model, x = Two(), Two(), rows_of(B)
        loss = loss_of(pass_of(plain, x))
        loss.backward()
        parallel.wrap(model)
        shared = loss_of(parallel.over_ranks(pass_of)(model, x))
        shared.backward()
        assert abs(float((shared - loss).detach())) < 1e-12
        assert close(gradients(model), gradients(plain))


@together(2, 3)
def a_part_of_the_model_may_be_left_out():
    x = rows_of(4)
    for both in ((True,), (True, False), (False, False)):  # micro-batches of one update
        plain, model = Two(), Two()
        for of in both:
            loss_of(pass_of(plain, x, of)).backward()
        parallel.wrap(model, in_parts=True)
        for of in parallel.accumulated(model, both):
            loss_of(parallel.over_ranks(pass_of)(model, x, of)).backward()
        assert close(gradients(model)[0], gradients(plain)[0])
        of_v = model.v.grad if model.v.grad is not None else torch.zeros(2)
        assert close(of_v.tolist(), [0, 0] if plain.v.grad is None else plain.v.grad.tolist())


@together(2)
def micro_batches_are_summed_once_and_the_reduced_sum_is_that_of_one_process():
    """5 and 3 rows; only the backward pass of the last micro-batch speaks to the other rank."""
    plain, model, x = Two(), Two(), rows_of(8)
    for part in x.split([5, 3]):
        loss_of(pass_of(plain, part)).backward()
    parallel.wrap(model)
    seen = []
    for part in parallel.accumulated(model, x.split([5, 3])):
        loss_of(parallel.over_ranks(pass_of)(model, part)).backward()
        seen.append(ranks.gather_tensors(lambda: {"w": model.w.grad.clone()}))
    before, after = ([part["w"] for part in of] for of in seen)
    assert not torch.equal(*before)  # each has its own rows'
    assert torch.equal(*after) and close(gradients(model), gradients(plain))


@together(2, 3)
def a_model_that_is_shared_out_is_held_in_parts_and_gathered_whole():
    """Each rank holds ceil(2 / N) of two numbers, or what is left, of weight and gradient."""
    plain, model, x = Two(), Two(), rows_of(5)
    loss_of(pass_of(plain, x)).backward()
    parallel.wrap(model, "fsdp")
    loss_of(parallel.over_ranks(pass_of)(model, x)).backward()
    mine = max(0, min(-(-2 // ranks.count()), 2 - ranks.number() * -(-2 // ranks.count())))
    for ours, part in zip(plain.parameters(), model.parameters(), strict=True):
        assert len(part.to_local()) == len(part.grad.to_local()) == mine
        assert close(shards.whole(part.grad).tolist(), ours.grad.tolist())
    with parallel.whole(model) as gathered:
        assert gathered is not model
        for ours, there in zip(plain.parameters(), gathered.parameters(), strict=True):
            assert torch.equal(there, ours)
    with parallel.whole(model, on_first=True) as gathered:  # to be written
        assert [p.is_meta for p in gathered.parameters()] == [not ranks.is_first()] * 2
    for ours, part in zip(plain.parameters(), model.parameters(), strict=True):
        assert len(part.to_local()) == mine
        assert torch.equal(shards.part_of(ours.detach(), part).to_local(), part.to_local())


@together(2)
def a_call_past_the_wrapper_reduces_nothing():
    """As in a public PPO, whose update calls `.module`: each rank then learns from its own rows."""
    from torch.nn.parallel import DistributedDataParallel

    class Plain(Two):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + x @ self.v

    x = rows_of(6)
    plain = Plain()
    plain(x).square().mean().backward()
    found = {}
    for past in (True, False):
        model = DistributedDataParallel(Plain())
        called = model.module if past else model
        called(x[ranks.share(6)]).square().mean().backward()
        every = ranks.gather_tensors(lambda m=model: {"w": m.module.w.grad})
        found[past] = [part["w"] for part in every]
    assert not torch.allclose(*found[True])  # the ranks' weights part from here on
    assert torch.equal(*found[False]) and close(found[False][0].tolist(), plain.w.grad.tolist())


@together(2)
def a_model_that_is_not_wrapped_is_refused_where_it_learns():
    model, x = Two(), rows_of(4)
    error = raised(lambda: parallel.over_ranks(pass_of)(model, x))
    assert type(error) is ValueError and "call wrap" in str(error)
    with torch.no_grad():
        whole = parallel.over_ranks(pass_of)(model, x)
    assert torch.equal(whole.w, x @ model.w) and torch.equal(whole.v, x @ model.v)


# ------------------------------------------------------------------------------------- the script


def make(count: int, number: int, folder: Path) -> None:
    if count > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store{count}"), count),
                                rank=number, world_size=count, timeout=timedelta(seconds=60))
        ranks.join(number, count, "cpu")
    torch.set_num_threads(1)
    faults = {}
    for name, (check, counts) in CHECKS.items():
        if count in counts:
            try:
                check()
            except BaseException:
                faults[name] = traceback.format_exc()
    (folder / f"{count}.{number}").write_text(json.dumps(faults))


def serve(file: str) -> None:
    importlib.import_module("torch._dynamo")  # as DDP does: once, and not in each rank
    found = {name: {} for name in CHECKS}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 3, 4):
            children = []
            for number in range(count):
                if (pid := os.fork()) == 0:
                    with suppress(BaseException):
                        make(count, number, Path(folder))
                    os._exit(0)
                children.append(pid)
            for pid in children:
                os.waitpid(pid, 0)
            for number in range(count):
                told = Path(folder) / f"{count}.{number}"
                faults = json.loads(told.read_text()) if told.exists() else dict.fromkeys(
                    CHECKS, "the rank died")
                for name, fault in faults.items():
                    found[name][f"{count}/{number}"] = fault
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    serve(sys.argv[1])
