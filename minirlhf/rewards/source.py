"""What a reward source is, the sum of several, and a Python function as one.

A reward source is any function `source(completions) -> (B,) Tensor | Scores`. Shapes: B responses.
"""

import copy
import inspect
import math
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.errors import NON_FINITE, NonFinite, UserError, printable

KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
OFFERED = ("prompts", "completions", "completion_ids", "finish_reasons")  # beside the columns
LARGEST = torch.finfo(torch.float32).max


class Completions(NamedTuple):
    """B sampled responses, as reward sources see them."""

    prompts: list  # str, or list of messages, as in the data
    prompt_ids: list[list[int]]
    completions: list[str]  # without eos and without the stop string that ended it
    response_ids: list[list[int]]  # as sampled, eos or stop string included
    finish_reasons: list[str]  # eos | stop | length
    columns: dict[str, list]  # every other column of the prompts' file


class Scores(NamedTuple):
    """What a reward source gives B responses.

    A response that is rewarded token by token has a total of 0; its part holds the sum of its
    token rewards.
    """

    total: Tensor  # (B,) float32, what PPO learns from
    parts: dict[str, Tensor]  # name -> (B,) of each source, before its weight; NaN: not applicable
    token_rewards: list[list[float]] | None = None  # B rows, one number a response token

    @property
    def sums(self) -> Tensor:
        """(B,) float32, all reward of a response: its total and its token rewards."""
        if self.token_rewards is None:
            return self.total
        return self.total + torch.tensor([math.fsum(row) for row in self.token_rewards])

    def metrics(self) -> dict[str, float]:
        """rewards/NAME/mean and /std (population) of each part, over the rows that have one."""
        out = {}
        for name, part in self.parts.items():
            there = part[~part.isnan()].double()
            if len(there):
                out[f"rewards/{name}/mean"] = float(there.mean())
                out[f"rewards/{name}/std"] = float(there.std(correction=0))
        return out


RewardSource = Callable[[Completions], Tensor | Scores]


def as_scores(
    result: Tensor | Scores, batch: Completions, where: str, name: str = "reward",
    partial: bool = False,
) -> Scores:
    """What a source returned, checked and on the CPU; a plain tensor becomes the part `name`.

    Args:
        where: stands before the error of a number that is not finite.
        partial: whether there may be responses to which no part applies.
    Raises:
        ValueError: shapes that are not those of the batch.
        NonFinite: a total, or a token's reward, is not finite.
        UserError: no part applies to a response.
    """
    if isinstance(result, Tensor):
        result = Scores(result, {name: result})
    B = len(batch.completions)
    for values in (result.total, *result.parts.values()):
        if values.shape != (B,):
            raise ValueError(f"reward gave {tuple(values.shape)}: give one score each, {B}")
    tokens = result.token_rewards
    if tokens is not None and [len(r) for r in tokens] != [len(r) for r in batch.response_ids]:
        raise ValueError("token_rewards: give one number for each id of each of the responses")
    total = result.total.float().cpu()
    parts = {name: part.float().cpu() for name, part in result.parts.items()}
    for i, value in enumerate(total.tolist()):
        for number in (value, *(tokens[i] if tokens else ())):
            if not math.isfinite(number):
                raise NonFinite(f"{where}, response {i}: score", f"is {number}")
    if parts and not partial:
        applies = ~torch.stack([part.isnan() for part in parts.values()]).all(0)  # (B,)
        _check_applied(applies, list(parts), batch)
    return Scores(total, parts, tokens)


def _check_applied(applies: Tensor, names: list[str], batch: Completions) -> None:
    if not applies.all():
        i = int((~applies).nonzero()[0])
        what = f"none applies to response {i}: {printable(repr(batch.completions[i]), 80)}"
        raise UserError(f"reward {', '.join(names)}", what,
                        "one that counts must give every row a number")


def combine(sources: list[tuple[str, float, RewardSource]]) -> RewardSource:
    """The weighted sum of several sources, each a part under its name.

        total = sum_k weight_k score_k,   over the sources that apply to the response

    Args:
        sources: (name, weight, source); a source of weight 0 is logged and not learned from.
    Returns:
        A source whose Scores have one part a source, before its weight. Called, it raises what the
        sources raise, and UserError for a response that no source applies to.
    Raises:
        ValueError: no source, a name twice, weights that are not finite or all 0.
    """
    names = [name for name, _, _ in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"names of reward sources must differ: {', '.join(names)}")
    if not all(math.isfinite(weight) for _, weight, _ in sources):
        raise ValueError("weights of reward sources must be finite")
    if not any(weight for _, weight, _ in sources):
        raise ValueError("give a reward source with a weight that is not 0")

    def score(batch: Completions) -> Scores:
        total, parts = torch.zeros(len(batch.completions)), {}
        learns = torch.zeros(len(total), dtype=torch.bool)  # (B,) rows that a source applies to
        tokens = None
        for name, weight, source in sources:
            result = as_scores(source(batch), batch, f"reward {name}", name, partial=True)
            if len(result.parts) != 1:
                raise ValueError(f"{name} has {len(result.parts)} parts: combine single sources")
            (part,) = result.parts.values()
            parts[name] = part
            learns |= ~part.isnan() & (weight != 0)
            total += weight * result.total
            if weight and result.token_rewards is not None:
                tokens = tokens or [[0.0] * len(ids) for ids in batch.response_ids]
                for row, more in zip(tokens, result.token_rewards, strict=True):
                    row[:] = [old + weight * new for old, new in zip(row, more, strict=True)]
        _check_applied(learns, names, batch)
        return Scores(total, parts, tokens)

    return score


def function_reward(
    function: Callable, name: str, columns: Mapping[str, set[str]] | None = None
) -> RewardSource:
    """Scores of `function(prompts=…, completions=…, <every column>=…)`, one item a response.

    An item is a finite number, None where the function does not apply, or a list of numbers: one
    reward for each of the response's ids. The function gets the keywords that its signature names,
    or all of them if it takes **keywords.

    Args:
        name: what errors call it.
        columns: of each file of prompts, where it begins (file:line) -> its columns. A column that
            the function needs and a file lacks is then an error at once, not when the first
            responses are scored; and a row without that column has None there, in any batch.
    Raises:
        UserError: it needs a column that the data lacks; when called, it fails or returns anything
            else.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in KEYWORDS}

    columns = columns or {}
    for where, there in columns.items():
        _check_offered(needed, [*sorted(there), *OFFERED], where, f"{name} ")
    needed_columns = needed & set().union(*columns.values())

    def score(batch: Completions) -> Scores:
        offered = {
            **{column: [None] * len(batch.completions) for column in sorted(needed_columns)},
            **batch.columns,
            "prompts": batch.prompts, "completions": batch.completions,
            "completion_ids": batch.response_ids, "finish_reasons": batch.finish_reasons,
        }
        given = {k: v for k, v in offered.items() if takes_all or k in known}
        _check_offered(needed, offered, name)
        try:
            with interrupt.outside():
                items = function(**copy.deepcopy(given))  # what it changes is its own
        except (Exception, SystemExit) as error:  # exit() would end the run without a word
            what = f"{name} raised {type(error).__name__}: {printable(error)}"
            do = f"it was given {', '.join(given)}"
            raise UserError(failed_at(error) or name, what, do) from error
        return _of_items(items, batch, name)

    return score


def _check_offered(needed: set[str], offered: Iterable[str], where: str, who: str = "") -> None:
    if missing := sorted(needed - set(offered)):
        what = f"{who}needs {', '.join(missing)}, which no prompt has"
        raise UserError(where, what, f"there are {', '.join(offered)}")


def failed_at(error: BaseException) -> str:
    """file:line in the user's file, not in a library that it calls; "" if there is none."""
    if isinstance(error, SyntaxError) and Path(str(error.filename)).is_file():
        return f"{Path(error.filename).name}:{error.lineno}"
    ours = f"{Path(__file__).parent}{os.sep}", "<frozen"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(ours)]
    same_file = [f for f in theirs if f.filename == theirs[0].filename]
    return f"{Path(same_file[-1].filename).name}:{same_file[-1].lineno}" if same_file else ""


def _of_items(items: object, batch: Completions, name: str) -> Scores:
    """Scores of what a function returned: B numbers, Nones or rows of numbers."""
    found, count = _listed(items), len(batch.completions)
    if not isinstance(found, list) or len(found) != count:
        shape = f"{len(found)} of them" if isinstance(found, list) else type(items).__name__
        raise UserError(name, f"returned {shape}", f"return one number for each of the {count}")
    total, part = [0.0] * count, [math.nan] * count
    tokens = [[0.0] * len(ids) for ids in batch.response_ids]
    dense = False
    for i, item in enumerate(map(_listed, found)):
        if isinstance(item, list):
            if len(item) != len(tokens[i]):
                what = f"score {i} is {printable(item, 80)}: {len(item)} numbers"
                raise UserError(name, what, f"the response has {len(tokens[i])} ids; return one "
                                "number, or one for each id")
            where = f"score {i}, token"
            tokens[i] = [_number(value, name, f"{where} {t}") for t, value in enumerate(item)]
            part[i], dense = math.fsum(tokens[i]), True
        elif item is not None:
            total[i] = part[i] = _number(item, name, f"score {i}")
    return Scores(torch.tensor(total), {name: torch.tensor(part)}, tokens if dense else None)


def _listed(value: object) -> object:
    """A list where the value is a list, tuple, tensor or array, otherwise the value."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, tuple) else value


def _number(value: object, name: str, what: str) -> float:
    legal = "return finite numbers"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(name, f"{what} is {printable(value)!r}", f"{legal}, or None for no score")
    if not abs(value) <= LARGEST:
        raise UserError(name, f"{what} is {printable(value)}", legal, NON_FINITE)
    return float(value)
