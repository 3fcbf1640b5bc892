"""What reward functions return, read: every form becomes `Scores`. Shapes: B responses."""

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from numbers import Real

import torch

from minirlhf.errors import NON_FINITE, UserError, printable
from minirlhf.rewards.source import LARGEST, Completions, Scores, add


def of_rows(rows: list, name: str) -> object:
    """verl's: a number each, or a dict each with a score, whose other numbers are logged."""
    if not any(isinstance(row, Mapping) for row in rows):
        return rows
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "score" not in row:
            what = f"gave response {i} {printable(row, 80)}"
            raise UserError(name, what, "a dict must have a score, and all be dicts or none")
    others = dict.fromkeys(key for row in rows for key in row if key != "score")
    logs = {key: [row.get(key) for row in rows] for key in others}
    numbers = {key: values for key, values in logs.items()
               if all(v is None or isinstance(_plain(v), Real) for v in values)}
    return {"rewards": [row["score"] for row in rows], "extra_logs": numbers}


def listed(returned: object, count: int) -> object:
    """A list where one item a response is given, a dict of such; else what was returned.

    A tensor or an array (B, 1) gives B numbers; an iterator is read up to one item too many. It
    runs the function's code where that returned a generator.
    """
    if isinstance(returned, Mapping):
        return {key: listed(value, count) for key, value in returned.items()}
    if hasattr(returned, "tolist"):  # of a tensor or an array without dimensions a number
        items = returned.tolist()
        is_column = len(shape := getattr(returned, "shape", ())) == 2 and shape[1] == 1
        return [row[0] for row in items] if is_column else items
    if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Set):
        return list(islice(returned, count + 1) if isinstance(returned, Iterator) else returned)
    return returned


def read(returned: object, batch: Completions, name: str) -> Scores:
    """Scores of what a function returned, as `listed` gives it: one item a response; a dict of
    named rewards, which are summed; or OpenRLHF's dict of rewards, scores and extra_logs."""
    if not isinstance(returned, Mapping):
        return _of_items(returned, batch, name)
    if "rewards" not in returned:
        if not returned:
            raise UserError(name, "returned an empty dict", "return rewards under their names")
        named = [(str(key), 1.0, _of_items(items, batch, f"{name}: {printable(key)}"))
                 for key, items in returned.items()]
        found = add(named, batch)
        none = torch.stack([part.isnan() for part in found.parts.values()]).all(0)  # (B,)
        return found._replace(parts={name: found.sums.masked_fill(none, math.nan)},
                              logged=found.parts)
    if others := sorted(map(str, returned.keys() - {"rewards", "scores", "extra_logs"})):
        do = "return rewards, scores and extra_logs, or rewards to be summed under other names"
        raise UserError(name, f"returned rewards and {', '.join(others)}", do)
    logs = {**returned.get("extra_logs", {})}
    if "scores" in returned:
        logs = {"scores": returned["scores"]} | logs
    logged = {}
    for key, items in logs.items():
        items = [items] * len(batch.completions) if isinstance(items, Real) else items
        (logged[str(key)],) = _of_items(items, batch, f"{name}: {printable(key)}").parts.values()
    return _of_items(returned["rewards"], batch, name)._replace(logged=logged)


def _of_items(items: object, batch: Completions, name: str) -> Scores:
    """Scores of B numbers, Nones or rows of numbers."""
    count = len(batch.completions)
    if not isinstance(items, list) or len(items) != count:
        shape = f"{len(items)} of them" if isinstance(items, list) else type(items).__name__
        raise UserError(name, f"returned {shape}", f"return one number for each of the {count}")
    total, part = [0.0] * count, [math.nan] * count
    tokens = [[0.0] * len(ids) for ids in batch.response_ids]
    dense = False
    for i, item in enumerate(map(_plain, items)):
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


def _plain(value: object) -> object:
    """An item without its library's type: a number of a tensor or an array of one, else a list."""
    if hasattr(value, "tolist"):
        is_one = tuple(getattr(value, "shape", ())) == (1,)
        value = value.tolist()
        return value[0] if is_one else value
    return list(value) if isinstance(value, tuple) else value


def _number(value: object, name: str, what: str) -> float:
    legal = "return finite numbers"
    value = _plain(value)
    if not isinstance(value, Real):
        raise UserError(name, f"{what} is {printable(value)!r}", f"{legal}, or None for no score")
    if not abs(value) <= LARGEST:
        raise UserError(name, f"{what} is {printable(value)}", legal, NON_FINITE)
    return float(value)
