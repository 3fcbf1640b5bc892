"""What fits each field of a checkpoint's state.json.

A checkpoint is input: its seal proves that it is whole, not that it is ours. Whatever fits here can
be restored without stopping half-way, and no other file than a log of the run is ever truncated.
"""

import sys
from collections.abc import Callable

from minirlhf.run.meters import Step

LOGS = ("metrics.jsonl", "samples.jsonl")  # of a run, beside its checkpoints


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # and no bool, which is an int, too


def _are_numbers(value: object) -> bool:
    """A list of numbers, each within what a float holds."""
    return isinstance(value, list) and all(
        type(part) in (int, float) and abs(part) <= sys.float_info.max for part in value
    )


def _each(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _are_values(value: object) -> bool:
    return _each(lambda one: _are_numbers([one]))(value)


def _is_step(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(Step._fields)
        and _is_count(value["number"])
        and _are_values(value["metrics"])
        and _are_values(value["clock"])
        and isinstance(value["samples"], list)
        and all(isinstance(row, dict) for row in value["samples"])
    )


KINDS: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "samples": _is_count,
    "kl_coef": lambda value: value is None or _are_numbers([value]),
    "score_moments": lambda value: _are_numbers(value) and len(value) in (0, 3),
    "best": lambda value: value is None or _are_numbers([value]),
    "baselines": _each(_are_numbers),
    "counters": _each(_is_count),
    "health": _each(_are_numbers),
    "meters": _each(lambda value: _are_numbers(value) and len(value) == 3),
    "log_bytes": lambda value: _each(_is_count)(value) and value.keys() <= set(LOGS),
    "unreported": lambda value: value is None or _is_step(value),
}
