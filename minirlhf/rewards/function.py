"""A Python function as a reward source: what it is given, and its call.

It is called once a batch and by name, as TRL calls reward functions. A function that asks for
`queries` is of OpenRLHF's form, one that asks for `solution_str` of verl's, which is called once a
response. returned.py reads what it returns. Shapes: B responses.
"""

import asyncio
import copy
import functools
import inspect
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minirlhf import interrupt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.rewards.containment import Container
from minirlhf.rewards.returned import listed, of_rows, read
from minirlhf.rewards.source import Completions, RewardSource, Scores

OFFERED = ("prompts", "completions", "completion_ids", "finish_reasons")  # beside the columns
OTHERS = ("queries", "solution_str", "solution_strs", "extra_info", "extra_infos")  # where asked
# What other tools call a column, and the column that it is taken from where none has that name.
COLUMN_OF = {"labels": "label", "data_sources": "data_source", "ground_truths": "ground_truth",
             "extra_infos": "extra_info"}
LACKING = {
    "labels": "give each prompt a column label, or labels a default",
    **dict.fromkeys(("trainer_state", "log_extra", "log_metric", "environments"),
                    "is TRL's trainer's, and not given here: give it a default"),
    **dict.fromkeys(("prompt", "completion"),
                    "the function is called once for all responses: ask for prompts, completions"),
}


def function_reward(
    function: Callable, name: str, columns: Mapping[str, set[str]] | None = None,
    tokenizer: Tokenizer | None = None, container: Container | None = None,
) -> RewardSource:
    """Scores of `function(prompts=…, completions=…, <every column>=…)`, one item a response.

    An item is a finite number, None where the function does not apply, or a list of numbers: one
    reward for each of the response's ids. The function gets the names that its signature has, or
    all of them if it takes **keywords. It may be async, or a class that is made without arguments.

    Args:
        name: what errors call it.
        columns: of each file of prompts, where it begins (file:line) -> its columns. A column that
            the function needs and a file lacks is then an error at once, not when the first
            responses are scored; and a row without that column has None there, in any batch.
        tokenizer: the policy's; needed by a function that asks for `queries`.
        container: in which its file was imported.
    Raises:
        UserError: it needs a column that the data lacks; when called, it fails or returns anything
            else.
    """
    container = container or Container(name)
    if inspect.isclass(function) and any("__call__" in vars(kind) for kind in function.__mro__):
        function = _made(function, name, container)
    asks = _asks(function, name)
    columns = columns or {}
    for where, there in columns.items():
        also = {n for n in asks.known if _column_of(n, there)}.union(OTHERS).difference(there)
        asks.check([*sorted(there), *OFFERED], also, where, f"{name} ")
    every = set().union(*columns.values())
    needed_columns = {_column_of(n, every) for n in asks.needed} - {None}
    if "queries" in asks.known - every and tokenizer is None:
        raise UserError(name, "asks for queries, whole texts", "give function_reward a tokenizer")

    def score(batch: Completions) -> Scores:
        nothing = [None] * len(batch.completions)
        there = dict.fromkeys(sorted(needed_columns), nothing) | batch.columns
        per_row = "solution_str" in asks.known and "solution_str" not in there
        offered = _offered(asks.known, there, batch, tokenizer, per_row)
        given = {k: v for k, v in offered.items() if asks.takes_all or k in asks.known}
        asks.check(offered, (), name)
        given = copy.deepcopy(given)  # what the function changes is its own

        def call() -> object:
            if not per_row:
                return _call(function, asks.first, given)
            rows = zip(*given.values(), strict=True)
            items = (dict(zip(given, row, strict=True)) for row in rows)
            return [_call(function, asks.first, item) for item in items]

        do = f"it was given {', '.join(given)}"
        with interrupt.outside(), container.entered([batch.prompt_ids, batch.response_ids]):
            returned = _returned(function, call, name, do)
            if per_row:
                returned = of_rows(returned, name)
            with failures(name, do):  # a generator runs as it is read
                returned = listed(returned, len(batch.completions))
        return read(returned, batch, name)

    return score


# --------------------------------------------------------------------------------- what it is given


def _made(kind: type, name: str, container: Container) -> Callable:
    do = "a class is made without arguments"
    with interrupt.outside(), container.entered(), failures(name, do):
        return kind()


class Asks(NamedTuple):
    """What a function's signature asks for."""

    known: set[str]  # names of its parameters
    needed: set[str]  # those without a default
    first: list[str]  # those that are given by position, in order
    takes_all: bool  # it has **keywords

    def check(
        self, offered: Iterable[str], also: Iterable[str], where: str, who: str = ""
    ) -> None:
        """Refuses a function that needs what there is not, or takes nothing of what there is.

        Args:
            also: what there is beside `offered`, where it is asked for.
        """
        there = {*offered, *also}
        if missing := sorted(self.needed - there):
            hints = [hint for name in missing if (hint := LACKING.get(name))]
            what = f"{who}needs {', '.join(missing)}, which no prompt has"
            raise UserError(where, what, hints[0] if hints else f"there are {', '.join(offered)}")
        if not (self.takes_all or self.known & there):
            what = f"{who}asks for no completions"
            raise UserError(where, what, f"there are {', '.join(offered)}")


def _asks(function: Callable, name: str) -> Asks:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        do = "wrap it: def f(completions): ..."
        raise UserError(name, f"has no signature to read: {printable(error)}", do) from error
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Asks(
        {p.name for p in named}, {p.name for p in named if p.default is p.empty},
        [p.name for p in named if p.kind is p.POSITIONAL_ONLY],
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _offered(
    known: set[str], there: dict[str, list], batch: Completions, tokenizer: Tokenizer | None,
    per_row: bool,
) -> dict[str, list]:
    """All that a function may be given, one item a response: `there`, the columns, and the rest."""
    made = {}  # only where it is asked for, and no column has the name
    for name in sorted(known - there.keys()):
        if name == "queries":
            both = zip(batch.prompt_ids, batch.response_ids, strict=True)
            made[name] = [_text(tokenizer, [*prompt, *response]) for prompt, response in both]
        elif name in ("solution_str", "solution_strs"):
            made[name] = batch.completions
        elif column := _column_of(name, there):
            values = there[column]
            made[name] = list(map(_truth, values)) if column == "reward_model" else values
        elif name in ("extra_info", "extra_infos"):
            made[name] = [None] * len(batch.completions)
    if per_row:
        return there | made
    whole = "queries" in made
    return there | made | {
        "prompts": [_text(tokenizer, ids) for ids in batch.prompt_ids] if whole else batch.prompts,
        "completions": _as_trl(batch), "completion_ids": batch.response_ids,
        "finish_reasons": batch.finish_reasons,
    }


def _column_of(name: str, columns: Iterable[str]) -> str | None:
    """The column that a parameter takes its values from."""
    also = COLUMN_OF.get(name, name)
    nested = ["reward_model"] if also == "ground_truth" else []  # of verl's files
    return next((column for column in (name, also, *nested) if column in columns), None)


def _truth(value: object) -> object:
    """Of verl's column reward_model; None in a row without that column."""
    if value is not None and not (isinstance(value, dict) and "ground_truth" in value):
        do = "give the prompts a column ground_truth"
        raise UserError(f"reward_model {printable(value, 80)}", "has no ground_truth", do)
    return value and value["ground_truth"]


def _as_trl(batch: Completions) -> list[str | list[dict[str, str]]]:
    """Completions as TRL gives them: messages where the prompt is a conversation."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(batch.prompts, batch.completions, strict=True)
    ]


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


# ----------------------------------------------------------------------------------------- the call


def _call(function: Callable, first: list[str], given: dict[str, object]) -> object:
    """Calls by name; `first` are the parameters that can only be given by position."""
    by_place = [given[name] for name in first if name in given]
    return function(*by_place, **{k: v for k, v in given.items() if k not in first})


def _returned(function: Callable, call: Callable[[], object], name: str, do: str) -> object:
    """What the call returns; an async function runs on the loop, to its end."""
    if not _is_async(function):
        with failures(name, do):
            returned = call()
        if not _awaits(returned):
            return returned
        call = lambda: returned  # noqa: E731
    task = asyncio.run_coroutine_threadsafe(_finished(call, name, do), _loop())
    try:
        return task.result()
    finally:
        task.cancel()  # where a stop ended the wait; a task that ignores it is left behind


def _is_async(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _awaits(returned: object) -> bool:
    items = returned if isinstance(returned, list) else [returned]
    return any(map(inspect.isawaitable, items))


async def _finished(call: Callable[[], object], name: str, do: str) -> object:
    """What the call returns, awaited; of a list all that are in it, side by side."""
    asyncio.current_task().add_done_callback(lambda task: task.cancelled() or task.exception())

    async def value(item: object) -> object:
        return await item if inspect.isawaitable(item) else item

    with failures(name, do):
        returned = await value(call())
        return await asyncio.gather(*map(value, returned)) if _awaits(returned) else returned


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that what a function keeps open stays usable. It turns on a thread
    of its own: a signal, which comes to the main thread, need not wait for it."""
    loop = asyncio.new_event_loop()

    def turn() -> None:
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # a task's; who awaits it has it too
                loop.run_forever()

    threading.Thread(target=turn, name="async reward functions", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_loop.cache_clear)  # threads are not forked


@contextmanager
def failures(name: str, do: str) -> Iterator[None]:
    """Around a user's code: whatever it raises, exit() too, becomes one line with its place."""
    home = os.getpid()
    try:
        yield
    except BaseException as error:
        if interrupt.requested() or os.getpid() != home:  # the stop, or what became of it; a child
            raise
        if isinstance(error, KeyboardInterrupt) and not interrupt.listens():
            raise
        text = f"{type(error).__name__}: {printable(error)}".removesuffix(": ")
        raise UserError(_failed_at(error) or name, f"{name} raised {text}", do) from error


def _failed_at(error: BaseException) -> str:
    """file:line in the user's file, not in a library that it calls; "" if there is none."""
    if isinstance(error, SyntaxError) and Path(str(error.filename)).is_file():
        return f"{Path(error.filename).name}:{error.lineno}"
    ours = f"{Path(__file__).parent}{os.sep}", "<frozen"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(ours)]
    same_file = [f for f in theirs if f.filename == theirs[0].filename]
    return f"{Path(same_file[-1].filename).name}:{same_file[-1].lineno}" if same_file else ""
