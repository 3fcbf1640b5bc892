"""What must hold in a PPO step: a run that breaks one of these would learn from wrong numbers."""

from torch import Tensor

from minirlhf.equations.policy import Surrogate
from minirlhf.errors import BUG, UserError
from minirlhf.rewards.source import Scores

# What is checked is exactly 0 on a CPU without --compile. A GPU's kernels, and compiled graphs with
# and without a gradient, may differ in the last bit: that much is let pass.
RATIO_TOLERANCE = 1e-4
KL_TOLERANCE = 1e-4  # nats a token


def check_policy_loss(found: object, logprobs: Tensor) -> None:
    """What a policy loss must return for a micro-batch; logprobs: (b, R).

    Raises:
        ValueError: it returned something else.
    """
    if not isinstance(found, Surrogate):
        raise ValueError(f"policy_loss gave {type(found).__name__}: return a Surrogate")
    for name, x in found._asdict().items():
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if shape != tuple(logprobs.shape):
            legal = f"one number per token, {tuple(logprobs.shape)}, is needed"
            raise ValueError(f"policy_loss gave a {name} that is {shape}: {legal}, unreduced")
    if logprobs.requires_grad and not found.loss.requires_grad:
        raise ValueError("policy_loss gave a loss without gradient: detach no log-prob in it")


def check_token_rewards(given: Scores, changes: dict[str, bool], where: str) -> None:
    """Settings that change a response's one score know nothing of rewards of its tokens.

    Args:
        changes: setting -> whether it changes the score.
    """
    for name, on in changes.items():
        if on and given.token_rewards is not None:
            what = f"changes the score of a response, and a source rewards tokens ({where})"
            raise UserError(name, what, "leave it out, or return one number a response")


def check_start(kl: Tensor, name: str = "objective/kl") -> None:
    """At step 0 the policy is its own reference, so every log-ratio must be 0.

    Args:
        kl: (N,) nats a token.
        name: of the metric that would be wrong.
    """
    gap = float(kl.abs().max())
    if not gap <= KL_TOLERANCE:
        raise UserError(
            f"step 1: {name}", f"a token's KL is {gap:.3g} nats before any training",
            "the reference is not the starting policy; name another one with --ref, "
            "which turns this check off", BUG,
        )


def check_ratio(where: str, gap: float) -> None:
    """Before the first update of an iteration the policy is the one that sampled."""
    if not gap <= RATIO_TOLERANCE:
        raise UserError(
            f"{where}: val/ratio", f"the first ratio is off 1 by {gap:.3g}",
            "training and measuring passes differ: is something random or stateful in the model?",
            BUG,
        )
