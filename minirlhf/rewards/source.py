"""What a reward source is, and the sum of several.

A reward source is any function `source(completions) -> (B,) Tensor | Scores`. Shapes: B responses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.arguments import ARGUMENTS, template_arguments
from minirlhf.errors import NonFinite, UserError, printable

LARGEST = torch.finfo(torch.float32).max


class Completions(NamedTuple):
    """B sampled responses, as reward sources see them."""

    prompts: list  # str, or list of messages, as in the data
    prompt_ids: list[list[int]]
    completions: list[str]  # without eos and without the stop string that ended it
    response_ids: list[list[int]]  # as sampled, eos or stop string included
    finish_reasons: list[str]  # eos | stop | length
    columns: dict[str, list]  # every other column of the prompts' file

    def arguments(self, i: int) -> dict[str, object]:
        """What a chat template sees beside the messages of response i."""
        if isinstance(self.prompts[i], str):
            return {}
        told = {name: self.columns[name][i] for name in ARGUMENTS if name in self.columns}
        return template_arguments(told, f"response {i}")


class Scores(NamedTuple):
    """What a reward source gives B responses.

    A response that is rewarded token by token has a total of 0; its part holds the sum of its
    token rewards.
    """

    total: Tensor  # (B,) float32, what PPO learns from
    parts: dict[str, Tensor]  # name -> (B,) of each source, before its weight; NaN: not applicable
    token_rewards: list[list[float]] | None = None  # B rows, one number a response token
    logged: Mapping[str, Tensor] = MappingProxyType({})  # name -> (B,), beside the parts; NaN: none

    @property
    def sums(self) -> Tensor:
        """(B,) float32, all reward of a response: its total and its token rewards."""
        if self.token_rewards is None:
            return self.total
        return self.total + torch.tensor([math.fsum(row) for row in self.token_rewards])

    def metrics(self) -> dict[str, float]:
        """rewards/NAME/mean and /std (population) of each part and of what is logged beside them,
        over the rows that have one."""
        out = {}
        for name, part in {**self.parts, **self.logged}.items():
            there = part[~part.isnan()].double()
            if len(there):
                out[f"rewards/{name}/mean"] = float(there.mean())
                out[f"rewards/{name}/std"] = float(there.std(correction=0))
        return out


def joined_scores(batches: Sequence[Scores]) -> Scores:
    """Of several batches, one after another: all reward of each response, and its parts; a part
    that a batch lacks is NaN there."""

    def columns(field: str) -> dict[str, Tensor]:
        names = dict.fromkeys(name for batch in batches for name in getattr(batch, field))
        nan = [torch.full_like(batch.total, math.nan) for batch in batches]
        of = [getattr(batch, field) for batch in batches]
        return {n: torch.cat([o.get(n, x) for o, x in zip(of, nan, strict=True)]) for n in names}

    total = torch.cat([batch.sums for batch in batches])
    return Scores(total, columns("parts"), None, columns("logged"))


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
    return Scores(total, parts, tokens, result.logged)


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
        found = [
            (name, weight, as_scores(source(batch), batch, f"reward {name}", name, partial=True))
            for name, weight, source in sources
        ]
        scores = add(found, batch)
        counts = [~scores.parts[name].isnan() for name, weight, _ in sources if weight]
        _check_applied(torch.stack(counts).any(0), names, batch)
        return scores

    return score


def add(found: list[tuple[str, float, Scores]], batch: Completions) -> Scores:
    """The weighted sum of Scores of one part each, which becomes the part of the name.

    Args:
        found: (name, weight, scores).
    """
    total, parts, logged = torch.zeros(len(batch.completions)), {}, {}
    tokens = None
    for name, weight, scores in found:
        if len(scores.parts) != 1:
            raise ValueError(f"{name} has {len(scores.parts)} parts: combine single sources")
        (parts[name],) = scores.parts.values()
        logged |= {f"{name}/{key}": values for key, values in scores.logged.items()}
        total += weight * scores.total
        if weight and scores.token_rewards is not None:
            tokens = tokens or [[0.0] * len(ids) for ids in batch.response_ids]
            for row, more in zip(tokens, scores.token_rewards, strict=True):
                row[:] = [old + weight * new for old, new in zip(row, more, strict=True)]
    return Scores(total, parts, tokens, logged)
