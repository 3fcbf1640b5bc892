"""Every loss against finite differences, in float64: `minirlhf learn --gradcheck`.

autograd's gradient g of a loss L is right where, for small h, each of its components is

    g_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2)

A loss with a kink (a clip, a hinge, a maximum) has no gradient at it, and one side's slope would be
taken for the other's. So the points below lie beside the kinks, on either side, and each is tested:
where the slopes to the left and to the right differ, the point is refused, not called a wrong
gradient. Of CISPO only clipped tokens are compared: elsewhere its weight is a constant by
definition, which finite differences cannot know.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, tensor

from minirlhf.equations import critic_free, dpo, kl, policy, preference
from minirlhf.models.divergence import token_divergence
from minirlhf.models.logprobs import token_logprobs

STEP = 1e-6  # h
TOLERANCE = 1e-6  # of a difference, times the gradient's size where that is above 1
KINK = 1e-3  # by how much the slopes to either side may differ

f64 = partial(tensor, dtype=torch.float64)


class Loss(NamedTuple):
    """A loss as a function of what carries its gradient."""

    name: str
    function: Callable[..., Tensor]  # of `inputs`; unreduced
    inputs: tuple[Tensor, ...]  # float64


class Result(NamedTuple):
    name: str
    numbers: int  # components of the gradient that were compared
    difference: float  # the largest
    ok: bool


class Unembedding(NamedTuple):
    """The part of a language model that turns a state into logits."""

    unembedding: Tensor  # (V, D)


def losses() -> list[Loss]:
    """Every loss of the package, with the points at which it is compared."""
    return [*of_preferences(), *of_pairs_and_reference(), *of_policies(), *of_vocabularies()]


def of_preferences() -> list[Loss]:
    chosen, rejected = f64([0.3, -1.2, 2.0]), f64([0.5, 0.4, -1.0])
    bradley_terry = preference.bradley_terry_loss
    soft = f64([0.2, 1.0, 0.7])
    ranks, mask = tensor([[2, 1, 3], [1, 1, 2]]), tensor([[True] * 3, [True, True, False]])
    scores = f64([[0.4, -0.3, 1.1], [0.2, 0.6, 5.0]])
    return [
        Loss("bradley_terry_loss", bradley_terry, (chosen, rejected)),
        Loss("bradley_terry_loss, margin", partial(bradley_terry, margin=1.5), (chosen, rejected)),
        Loss("bradley_terry_loss, unsure labels", partial(
            bradley_terry, chosen_probability=soft, label_smoothing=0.1), (chosen, rejected)),
        Loss("plackett_luce_loss",
             lambda s: preference.plackett_luce_loss(s, ranks, mask), (scores,)),
    ]


def of_pairs_and_reference() -> list[Loss]:
    """The DPO family. Hinge margins: 0.5 and 1.8, on both sides of its kink at 1."""
    chosen, rejected = f64([-4.0, -7.5]), f64([-6.0, -8.0])
    ref = f64([-5.0, -9.1]), f64([-6.5, -7.0])  # log ratios 1 and 1.6, 0.5 and -1

    def against(function: Callable, **numbers: float) -> Callable[..., Tensor]:
        return lambda c, r: function(c, r, *ref, **numbers).loss

    means = f64([-0.4, -1.3]), f64([-0.9, -0.7])
    liked, theirs = tensor([True, False]), f64([-4.4, -7.0])
    return [
        Loss("dpo_loss", against(dpo.dpo_loss, beta=0.7), (chosen, rejected)),
        Loss("dpo_loss, smoothed", against(dpo.dpo_loss, beta=0.7, label_smoothing=0.2),
             (chosen, rejected)),
        Loss("robust_dpo_loss", against(dpo.robust_dpo_loss, beta=0.7, label_smoothing=0.2),
             (chosen, rejected)),
        Loss("ipo_loss", against(dpo.ipo_loss, beta=0.7), (chosen, rejected)),
        Loss("hinge_dpo_loss", against(dpo.hinge_dpo_loss, beta=0.7), (chosen, rejected)),
        Loss("simpo_loss", lambda c, r: dpo.simpo_loss(c, r, 2.0, 0.5).loss, means),
        Loss("orpo_loss", lambda c, r: dpo.orpo_loss(c, r).loss, means),
        Loss("kto_loss",
             lambda p: dpo.kto_loss(p, theirs, liked, 0.3, 0.7, 1.0, 1.3).loss, (chosen,)),
    ]


def of_policies() -> list[Loss]:
    """Ratios of 0.5, 0.9, 1.1 and 1.5 with both signs of advantages: inside the clips of 0.2 and
    beyond each of them; one of 4 beyond the dual clip of 3. Of the two responses one is clipped
    where ratios are those of responses, 1.24 and 0.79."""
    old = f64([[-1.0, -2.0, -0.7, -1.5, -2.2]]).repeat(2, 1)
    new = old + f64([0.5, 0.9, 1.1, 1.5, 4.0]).log()
    advantages = f64([[1.3], [-0.8]]).expand(2, 5).contiguous()
    mask = tensor([[True] * 5, [True] * 3 + [False] * 2])
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    far = old + f64([0.5, 0.7, 1.3, 1.5, 4.0]).log()
    values = f64([[0.3, 1.4, -0.9, 2.0]])
    old_values, returns = f64([[0.1, 0.9, -0.2, 1.9]]), f64([[1.0, 0.2, -1.5, 2.6]])

    def surrogate(function: Callable, **more: object) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, old, advantages, **clips, **more).loss

    def value(clip: float | None) -> Callable[[Tensor], Tensor]:
        return lambda x: policy.clipped_value_loss(x, old_values, returns, clip).loss

    estimators = [Loss(f.__name__, lambda x, f=f: f(x, old), (new,))
                  for f in (kl.kl_k1, kl.kl_k2, kl.kl_k3, kl.kl_abs)]
    return [
        Loss("clipped_surrogate", surrogate(policy.clipped_surrogate), (new,)),
        Loss("clipped_surrogate, dual clip",
             surrogate(policy.clipped_surrogate, dual_clip=3.0), (new,)),
        Loss("sequence_surrogate", lambda x: critic_free.sequence_surrogate(
            x, old, advantages, mask, clip_low=0.1, clip_high=0.5).loss, (new,)),
        Loss("cispo_loss", surrogate(critic_free.cispo_loss), (far,)),
        Loss("clipped_value_loss", value(0.3), (values,)),
        Loss("clipped_value_loss, no clip", value(None), (values,)),
        *estimators,
    ]


def of_vocabularies() -> list[Loss]:
    """Backward passes written by hand: of states and of unembeddings, two tokens and four words."""
    hidden, weight = f64([[0.2, -0.5, 1.0], [1.2, 0.3, -0.4]]), torch.linspace(-1, 1, 12).double()
    weight = weight.view(4, 3)
    ref_hidden, ref = hidden.flip(1), Unembedding(weight.flip(0) * 0.6)
    targets = tensor([2, 0])

    def divergence(beta: float) -> Callable[..., Tensor]:
        return lambda h, w: token_divergence(Unembedding(w), h, ref, ref_hidden, beta, 0.8)

    def stats(name: str) -> Callable[..., Tensor]:
        return lambda h, w: getattr(token_logprobs(Unembedding(w), h, targets, 0.8), name)

    return [
        Loss("token_divergence, reverse KL", divergence(1.0), (hidden, weight)),
        Loss("token_divergence, forward KL", divergence(0.0), (hidden, weight)),
        Loss("token_divergence, beta 0.3", divergence(0.3), (hidden, weight)),
        Loss("token_logprobs (SFT)", stats("logprobs"), (hidden, weight)),
        Loss("token_logprobs, entropy", stats("entropy"), (hidden, weight)),
    ]


def compare(loss: Loss) -> Result:
    """The loss's gradient beside finite differences, and what torch's own gradcheck says of it.

    Raises:
        ValueError: a point lies on a kink.
    """
    inputs = tuple(x.clone().requires_grad_(True) for x in loss.inputs)
    weights = torch.linspace(0.5, 1.5, loss.function(*loss.inputs).numel(), dtype=torch.float64)

    def total(*x: Tensor) -> Tensor:  # of unequal weights, so that errors cannot cancel
        return (loss.function(*x).flatten() * weights).sum()

    gradients = torch.autograd.grad(total(*inputs), inputs, materialize_grads=True)
    difference, numbers, here = 0.0, 0, float(total(*loss.inputs))
    for i, gradient in enumerate(gradients):
        for at in range(gradient.numel()):
            up, down = (float(total(*moved(loss.inputs, i, at, sign * STEP))) for sign in (1, -1))
            right, left = (up - here) / STEP, (here - down) / STEP
            if abs(right - left) > KINK:
                raise ValueError(f"{loss.name}: number {at} of input {i} lies on a kink")
            found = float(gradient.flatten()[at])
            difference = max(difference, abs(found - (right + left) / 2) / max(abs(found), 1.0))
            numbers += 1
    agrees = torch.autograd.gradcheck(total, inputs, raise_exception=False,
                                      check_undefined_grad=False)
    return Result(loss.name, numbers, difference, agrees and difference <= TOLERANCE)


def moved(inputs: tuple[Tensor, ...], i: int, at: int, by: float) -> list[Tensor]:
    """The inputs with one number changed."""
    out = [x.clone() for x in inputs]
    out[i].view(-1)[at] += by
    return out


def table(results: list[Result]) -> str:
    lines = [f"{'loss':<36}  numbers  largest difference  ok"]
    for result in results:
        told = "yes" if result.ok else "NO"
        lines.append(f"{result.name:<36}  {result.numbers:>7}  {result.difference:>18.1e}  {told}")
    return "\n".join(lines)
