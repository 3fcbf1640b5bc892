"""From a reward source's score to the one that PPO learns from, in three steps: a rule for
truncated responses, division by the running spread of all scores so far, a bound.

Batches are not normalised one by one: that would tell the policy that the mean of any batch is
worth 0. Shapes: B responses.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

SCALINGS = ("none", "scale", "normalize")
MISSING_EOS = ("subtract", "replace", "ramp")
EndRule = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores, truncated, lengths (B,) -> (B,)


def subtract_missing_eos(
    scores: Tensor, truncated: Tensor, lengths: Tensor, penalty: float
) -> Tensor:
    """The score of a truncated response, minus a penalty (TRL 1.x).

    >>> from torch import tensor
    >>> truncated, lengths = tensor([True, False]), tensor([8, 3])
    >>> subtract_missing_eos(tensor([2.0, 2.0]), truncated, lengths, penalty=0.5)
    tensor([1.5000, 2.0000])
    """
    return torch.where(truncated, scores - penalty, scores)


def replace_missing_eos(
    scores: Tensor, truncated: Tensor, lengths: Tensor, penalty: float
) -> Tensor:
    """-penalty in place of a truncated response's score, since a reward model has not learned to
    score half a text. Huang et al. 2024 (arXiv:2403.17031), detail 23, the EOS trick.

    >>> from torch import tensor
    >>> truncated, lengths = tensor([True, False]), tensor([8, 3])
    >>> replace_missing_eos(tensor([2.0, 2.0]), truncated, lengths, penalty=1.0)
    tensor([-1.,  2.])
    """
    return torch.where(truncated, -penalty, scores)


def ramp_overlong(
    scores: Tensor, truncated: Tensor, lengths: Tensor, penalty: float, longest: int, buffer: int
) -> Tensor:
    """A penalty that grows over the last `buffer` tokens before the limit, so that a response that
    is a little too long costs less than one that never ends. DAPO (arXiv:2503.14476), eq. 13.

        score - penalty · clip((length - (longest - buffer)) / buffer, 0, 1)

    >>> from torch import tensor
    >>> truncated, lengths = tensor([False, False, True]), tensor([4, 7, 10])
    >>> ramp_overlong(torch.zeros(3), truncated, lengths, penalty=1.0, longest=10, buffer=4)
    tensor([ 0.0000, -0.2500, -1.0000])
    """
    excess = (lengths - (longest - buffer)) / buffer
    return scores - penalty * excess.clamp(0, 1)


def end_rule(how: str, penalty: float, longest: int, buffer: int) -> EndRule:
    """The rule that the setting `missing_eos` names."""
    if how == "ramp":
        return partial(ramp_overlong, penalty=penalty, longest=longest, buffer=buffer)
    rule = {"subtract": subtract_missing_eos, "replace": replace_missing_eos}[how]
    return partial(rule, penalty=penalty)


@dataclass
class RunningMoments:
    """Mean and standard deviation of all scores of a run so far, in float64, batch by batch.
    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm".

    >>> from torch import tensor
    >>> moments = RunningMoments()
    >>> moments.update(tensor([1.0, 3.0]))
    >>> moments.update(tensor([5.0]))
    >>> moments.mean, moments.std
    (3.0, 2.0)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, x: Tensor) -> None:
        x = x.double()
        count, mean = len(x), float(x.mean())
        total, step = self.count + count, mean - self.mean
        self.squares += float((x - mean).square().sum()) + step**2 * self.count * count / total
        self.mean += step * count / total
        self.count = total

    @property
    def std(self) -> float:
        """With Bessel's correction; 1 where there is no spread to measure yet."""
        if self.count < 2 or self.squares == 0:
            return 1.0
        return sqrt(self.squares / (self.count - 1))

    def as_list(self) -> list[float]:
        """What a checkpoint can hold; `RunningMoments(*saved)` is the inverse."""
        return list(astuple(self))


def scale_scores(scores: Tensor, how: str, clip: float | None, moments: RunningMoments) -> Tensor:
    """Scores in units of their running spread, then bounded, as in TRL 0.9.

    Args:
        scores: (B,).
        how: none; scale, score / std; normalize, (score - mean) / std.
        clip: the result lies in [-clip, clip]; None: no bound.
        moments: of all scores so far, including these.
    """
    if how == "normalize":
        scores = scores - moments.mean
    if how != "none":
        scores = scores / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)
