"""Nothing that changes during a run hides from its checkpoint.

At each save of a run every number that its recipe can reach is read: in the locals of `main` and of
the generator, in the attributes of what they hold, in closures, in globals of the package. A copy
of the folder is then resumed. What was loaded must equal what was saved, and after one more step
the resumed run must equal the one that went on; a number that does not is state that was lost.
"""

import gc
import hashlib
import importlib
import inspect
import itertools
import operator
import random
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.meters import Step
from minirlhf.run.resume import RunSettings
from tests.kill_harness import KTO, LISTS, RECIPES, command, make_world, remains, wrong_with

# Paths of numbers that may differ, and why.
OUTSIDE = "|".join(
    (
        r"\b(started|seconds|clock|watch|log_bytes\['metrics\.jsonl'\])",  # time, and its digits
        r"\b(argv|resume)\b",  # whether the run was told to resume
        r"^main: start\.facts\['memory'\]",  # of the process and the machine, measured
        r"^begin: self\b",  # what main holds as `start`, where the run is restored
        r"^main: r\.display\b",  # what was told, and how long ago the heading of its table was
        r"^main: r\.before\b",  # settings of the last start, to tell what has changed
        r"^main: (results|found)\b",  # of the last evaluation, which a resumed run makes anew
        r"^minirlhf\.run\.checkpoint\['_known_whole'\]",  # what was verified
        r"^minirlhf\.files\.reading\['_seen'\]",  # what files were, to tell of a later change
        r"^minirlhf\.ranks\['_group'\]\.where",  # how far the run is, for messages
        r"\b_held\b",  # locks that a fork must not keep, by their places in memory
    )
)
DERIVED = "|".join(
    (
        r"^main: start\.ref\b",  # prepared between the restore and the first step
        r"\.grad$",  # cleared before the first backward pass of a step
        r"\.rotary\.(cos|sin)$",  # a function of the config, made when it is first asked for
        r"param_groups\[\d+\]\['lr'\]$",  # a function of the step, set before each update
    )
)

# ---- all numbers that can be reached -------------------------------------------------------------


def is_ours(thing: object) -> bool:
    """Of the package, of these tests, or of a user's reward file: elsewhere is no state of ours."""
    module = getattr(thing, "__module__", None) or ""
    ours = ("minirlhf", "reward", "user_reward", __name__.split(".")[0])
    return module.split(".")[0].rstrip("_0123456789") in ours


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def value_of(thing: object) -> str | None:
    """A number, or what holds nothing but numbers, as text that is equal for equal bits."""
    if thing is None or isinstance(thing, (int, float, complex, str, bytes, Path)):
        return repr(thing)
    if isinstance(thing, Tensor):
        cells = thing.detach().reshape(-1).view(torch.uint8)
        data = b"" if thing.is_meta else cells.cpu().numpy().tobytes()
        return f"{thing.dtype} {tuple(thing.shape)} {digest(data)}"
    if isinstance(thing, np.ndarray):
        return f"{thing.dtype} {thing.shape} {digest(thing.tobytes())}"
    if isinstance(thing, torch.Generator):
        return value_of(thing.get_state())
    if isinstance(thing, random.Random):
        return repr(thing.getstate())
    return None


def parts_of(thing: object) -> Iterator[tuple[str, object]]:
    """What a thing holds, under the names that lead there."""
    if isinstance(thing, Tensor):
        yield ".grad", thing.grad if thing.is_leaf else None
    elif isinstance(thing, Audit):
        return  # what was read before is no part of the run
    elif isinstance(thing, dict):
        names = (
            f"[{k!r}]" if isinstance(k, (str, int)) else f"[#{i}]" for i, k in enumerate(thing)
        )
        yield from zip(names, thing.values(), strict=True)
    elif hasattr(thing, "_fields"):
        yield from ((f".{name}", getattr(thing, name)) for name in thing._fields)
    elif isinstance(thing, (list, tuple)):
        yield from ((f"[{i}]", part) for i, part in enumerate(thing))
    elif isinstance(thing, (set, frozenset)):
        yield "{}", sorted(map(repr, thing))
    elif isinstance(thing, types.FunctionType):
        if is_ours(thing):
            closed = inspect.getclosurevars(thing).nonlocals
            yield from ((f" {name}", part) for name, part in closed.items())
            yield ".__defaults__", thing.__defaults__
            used = {n: thing.__globals__[n] for n in thing.__code__.co_names
                    if n in thing.__globals__}
            yield from ((f" {name}", used[name]) for name in sorted(used))
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
        yield ".__func__", thing.__func__
    elif isinstance(thing, partial):
        yield "()", (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.GeneratorType):
        yield from ((f" {n}", v) for n, v in inspect.getgeneratorlocals(thing).items())
        yield from on_stack(thing)
    elif hasattr(thing, "__next__"):
        yield ".position", operator.length_hint(thing, -1)
        yield ".next", repr(thing) if isinstance(thing, itertools.count) else None
        yield from on_stack(thing)
    elif isinstance(thing, type):
        if is_ours(thing):
            yield from ((f".{name}", part) for name, part in vars(thing).items())
    elif isinstance(thing, torch.optim.Optimizer):
        groups = [group["params"] for group in thing.param_groups]
        # in the order of its parameters: that of the dictionary means nothing
        yield ".state", [thing.state.get(p) for params in groups for p in params]
        yield from ((f".{n}", part) for n, part in vars(thing).items() if n != "state")
    elif not isinstance(thing, types.ModuleType):
        yield ".__class__", type(thing)
        yield from ((f".{name}", part) for name, part in getattr(thing, "__dict__", {}).items())
        for name in getattr(type(thing), "__slots__", ()):
            yield f".{name}", getattr(thing, name, None)


def on_stack(thing: object) -> Iterator[tuple[str, object]]:
    """Iterators that a loop draws from: no name leads to them."""
    found = [part for part in gc.get_referents(thing) if hasattr(part, "__next__")]
    yield from ((f" loop {i}", part) for i, part in enumerate(found))


def numbers(roots: dict[str, object]) -> dict[str, str]:
    """Path -> value of everything that can be reached; of several ways the shortest."""
    found, seen = {}, {}
    todo = list(roots.items())
    for path, thing in todo:  # which grows
        value = value_of(thing)
        if value is not None:
            found[path] = value
        if isinstance(thing, Tensor) or (value is None and id(thing) not in seen):
            seen[id(thing)] = thing  # kept, or its id could become another's
            todo += [(path + name, part) for name, part in parts_of(thing)]
    return found


# ---- the audit -----------------------------------------------------------------------------------


class EnoughError(Exception):
    """The resumed run has come as far as it is looked at."""


class Audit:
    """Runs main(argv) and its resumed copies, and names the numbers that were lost."""

    def __init__(self, main: Callable, argv: list[str], patch: pytest.MonkeyPatch):
        self.main, self.argv, self.out = main, argv, Path(argv[argv.index("--out") + 1])
        self.saved, self.drawn = {}, set()  # step -> what can be reached; states of global rngs
        self.bar, self.restore, self.save = Run.bar, Run.restore, Run.save
        for name in ("bar", "restore", "save"):
            # functions, to be bound as the methods that they stand for
            method = getattr(self, f"_{name}")
            patch.setattr(Run, name, lambda *rest, method=method: method(*rest))

    def lost(self) -> list[str]:
        """Paths that differ between the run that went on and those that were resumed."""
        self.resumed = False
        self.main(self.argv)
        steps = sorted(self.saved)
        assert len(steps) > 3, "give a run with more saves"
        assert len(self.drawn) == 1, "global random numbers are drawn, which no resume restores"
        self.resumed, lost = True, set()
        for step, following in itertools.pairwise(steps):
            shutil.rmtree(self.out)
            shutil.copytree(self._copy(step), self.out)
            with pytest.raises(EnoughError):
                self.main([*self.argv, "--resume"])
            at_start, _ = self.saved[step]
            lost |= {p for p in differing(at_start, self.loaded) if not re.search(DERIVED, p)}
            lost |= differing(self.saved[following][1], self.now)
        return sorted(lost)

    def _copy(self, step: int) -> Path:
        return self.out.with_name(f"{self.out.name}-at-{step}")

    def _roots(self) -> dict[str, object]:
        """Locals of main and of ours through which it got here, and the globals of the package."""
        roots, frame = {}, sys._getframe()
        while frame.f_code is not self.main.__code__:
            frame = frame.f_back
            if frame.f_code is self.main.__code__ or in_package(frame.f_globals["__name__"]):
                here = frame.f_code.co_name
                roots |= {f"{here}: {name}": part for name, part in frame.f_locals.items()}
        package = {n: dict(vars(m)) for n, m in sorted(sys.modules.items()) if in_package(n)}
        # Without what may differ: else it could be the shortest way to what may not.
        return {n: part for n, part in (roots | package).items() if not re.search(OUTSIDE, n)}

    def _bar(self, run: Run, steps: Iterator[Step], *rest: object) -> Iterator[Step]:
        self.recipe = steps
        return self.bar(run, steps, *rest)

    def _restore(self, run: Run, state: TrainState) -> None:
        self.recipe, self.at_start = None, self._roots().keys()
        self.restore(run, state)
        self.loaded = numbers(self._roots())

    def _save(self, run: Run, state: TrainState) -> None:
        self.save(run, state)
        roots = self._roots()
        self.now = numbers(roots | {"recipe": self.recipe})
        if self.resumed:
            raise EnoughError
        # The names that there are when a run is resumed, alone: others would be shorter ways.
        at_start = numbers({name: part for name, part in roots.items() if name in self.at_start})
        self.saved[state.step] = at_start, self.now
        globally = (value_of(torch.get_rng_state()), random.getstate(), np.random.get_state())
        self.drawn.add(repr(globally))
        shutil.copytree(self.out, self._copy(state.step))


def in_package(module: str) -> bool:
    return module.split(".")[0] == "minirlhf"


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    paths = {p for p in one.keys() | other.keys() if one.get(p) != other.get(p)}
    return {path for path in paths if not re.search(OUTSIDE, path)}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe_main(recipe: str) -> Callable:
    return importlib.import_module(f"minirlhf.recipes.{recipe}").main


@pytest.mark.parametrize(
    ("recipe", "changes"), [*((r, {}) for r in RECIPES), ("reward", LISTS), ("dpo", KTO)]
)
def test_recipe_hides_no_number_from_its_checkpoint(recipe, changes, world, tmp_path, monkeypatch):
    argv = command(recipe, world, tmp_path / "run", **changes)[1:]
    audit = Audit(recipe_main(recipe), argv, monkeypatch)
    assert audit.lost() == []
    # what it looked at: weights, moments, meters, what the generator holds, the run, the package
    _, seen = audit.saved[1]
    for path in (
        "main: state.step", "main: state.meters.meters['loss", "main: r.folder", "main: config.",
        "main: state.optimizer.state[0]['exp_avg']", ("recipe ", "main: steps "),
        "minirlhf.run.folder['LOGS']",
    ):
        assert any(name.startswith(path) for name in seen), path


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_derived_has_no_effect(recipe, world, tmp_path, monkeypatch):
    runs = [command(recipe, world, tmp_path / name)[1:] for name in ("clean", "poisoned")]
    recipe_main(recipe)(runs[0])
    save = Run.save

    def poison(run, state):
        save(run, state)
        for group in state.optimizer.param_groups:
            group["lr"] = float("nan")
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))

    monkeypatch.setattr(Run, "save", poison)
    recipe_main(recipe)(runs[1])
    assert wrong_with(tmp_path / "poisoned", remains(tmp_path / "clean")) == []


# ---- the audit can fail --------------------------------------------------------------------------


class Keeper:
    """Holds a number in each place where one can hide."""

    total = 0

    def __init__(self):
        self.calls, self.cache, self.previous = 0, {}, None
        self.rng = torch.Generator().manual_seed(0)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(()), persistent=False)


def hide_in_attribute(keeper: Keeper, state: TrainState) -> None:
    keeper.calls += 1


def hide_in_dict(keeper: Keeper, state: TrainState) -> None:
    keeper.cache.setdefault("sizes", []).append(state.step / 2)


def hide_in_generator_object(keeper: Keeper, state: TrainState) -> None:
    torch.rand(1, generator=keeper.rng)


def hide_in_class(keeper: Keeper, state: TrainState) -> None:
    Keeper.total += 1


def hide_in_buffer(keeper: Keeper, state: TrainState) -> None:
    state.model.average += 1


def hide_what_the_next_step_replaces(keeper: Keeper, state: TrainState) -> None:
    keeper.previous = float(state.step)


def hide_nothing(keeper: Keeper, state: TrainState) -> None:
    pass


def toy_steps(state: TrainState, hide: Callable, iterates: bool, counts: bool) -> Iterator[Step]:
    hidden, keeper = 0, hide.keywords["keeper"]
    for _ in range(9) if iterates else itertools.repeat(None):
        if state.step == 4:
            return
        state.optimizer.zero_grad()
        state.model.weight.sum().backward()
        state.optimizer.step()
        state.step += 1
        hidden += counts
        hide(state=state)
        yield Step(state.step, {}, {}, [keeper])


def toy(hide: Callable, iterates: bool = False, counts: bool = False) -> Callable:
    """main of a recipe that keeps a number where no checkpoint looks."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += hide is None

    def main(argv: list[str]) -> None:
        model, keeper = Toy(), Keeper()
        state = TrainState(model, torch.optim.AdamW(model.parameters()))
        into = partial(hide or hide_nothing, keeper=keeper)
        told = count
        with Run(RunSettings(out=argv[1], resume="--resume" in argv), "toy") as r:
            r.restore(state)
            for _ in r.bar(toy_steps(state, into, iterates, counts), state, 4):
                told()
                r.save(state)

    return main


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        pytest.param((hide_in_attribute,), "keeper.calls", id="attribute"),
        pytest.param((hide_in_generator_object,), "keeper.rng", id="rng"),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in {
            "dict": ((hide_in_dict,), "keeper.cache['sizes'][0]"),
            "class": ((hide_in_class,), "Keeper.total|__class__.total"),
            "buffer": ((hide_in_buffer,), "_buffers['average']"),
            "replaced": ((hide_what_the_next_step_replaces,), "keeper.previous"),
            "loop": ((hide_nothing, True), "loop 0.position"),
            "local": ((hide_nothing, False, True), "recipe hidden"),
            "closure": ((None,), "calls"),
        }.items()),
    ],
)
def test_audit_names_what_a_recipe_hides(arguments, path, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeper, "total", 0)
    lost = Audit(toy(*arguments), ["--out", str(tmp_path / "run")], monkeypatch).lost()
    assert any(name.endswith(tuple(path.split("|"))) for name in lost), lost


def test_audit_finds_nothing_where_nothing_hides(tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path / "run")]
    assert Audit(toy(hide_nothing), argv, monkeypatch).lost() == []


def test_audit_refuses_global_random_numbers(tmp_path, monkeypatch):
    def draw(keeper: Keeper, state: TrainState) -> None:
        torch.rand(1)

    audit = Audit(toy(draw), ["--out", str(tmp_path / "run")], monkeypatch)
    with pytest.raises(AssertionError, match="global random numbers"):
        audit.lost()
