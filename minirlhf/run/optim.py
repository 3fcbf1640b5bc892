"""The optimizer, the learning rate as a function of the step, and gradient clipping."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minirlhf import ranks, shards
from minirlhf.errors import NON_FINITE, NonFinite, UserError

SCHEDULES = ("constant", "linear", "cosine")
PIECE = 1 << 16  # numbers whose squares are added up at once
HEADS = ("score", "v_head")  # of a reward model, of a policy's critic


class ScheduleSettings(Protocol):
    learning_rate: float
    warmup_steps: int
    schedule: str


class MasterAdamW(torch.optim.AdamW):
    """AdamW for a model in half precision: masters, moments and gradients are float32.

    A bfloat16 weight has 8 bits, so that an update below 1/512 of it would be lost, as most are.
    Here the parameters are a working copy for the passes, made once a step from the masters; the
    gradients of micro-batches are added up in float32 (Micikevicius et al. 2017, arXiv:1710.03740,
    sec. 3.1). A master is part of its parameter's state, and so of every checkpoint.
    """

    def __init__(self, groups: list[dict], lr: float, eps: float):
        super().__init__(groups, lr=lr, eps=eps, fused=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:  # a policy whose critic is warming up
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    master = parameter.float()
                    self.state[parameter] = {
                        "step": torch.zeros((), device=master.device), "master": master,
                        "exp_avg": torch.zeros_like(master),
                        "exp_avg_sq": torch.zeros_like(master),
                    }
            states = [self.state[p] for p in parameters]
            masters, *moments, steps = (
                [state[name] for state in states]
                for name in ("master", "exp_avg", "exp_avg_sq", "step")
            )
            (beta1, beta2), names = group["betas"], ("lr", "weight_decay", "eps")
            adamw(
                masters, [p.grad for p in parameters], *moments, [], steps, fused=True,
                amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
                **{name: group[name] for name in names},
            )
            torch._foreach_copy_(parameters, masters)


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    critic: Iterable[nn.Parameter] = (),
    critic_lr_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over all trainable parameters; only the trunk's matrices decay, and
    the betas are torch's, 0.9 and 0.999. A model in half precision gets float32 masters.

    Args:
        critic: parameters that learn at critic_lr_scale times the rate, as a value head that starts
            from zero on a trunk that is trained already.
    """
    trainable, of_critic = [p for p in model.parameters() if p.requires_grad], set(critic)
    heads = {getattr(model, name).weight for name in HEADS if hasattr(model, name)}
    groups = []
    for part, scale in ((False, 1.0), (True, critic_lr_scale)):
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [
                p for p in trainable
                if (p in of_critic) == part and (p.dim() >= 2 and p not in heads) == matrices
            ]
            groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale})
    groups = [group for group in groups if group["params"]]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in trainable):
        return MasterAdamW(groups, learning_rate, eps)
    return torch.optim.AdamW(groups, lr=learning_rate, eps=eps, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of step 0, 1, … steps - 1; a pure function, so there is no scheduler to save.

    It rises linearly over `warmup` steps, the first of which is already above 0; from there on it
    is constant, or falls linearly or as half a cosine to be 0 exactly where step `steps` would be
    (with fewer steps than `warmup` it only rises).

    Raises:
        ValueError: a step outside 0 … steps, or an unknown schedule.
    """
    if not 0 <= step <= steps:
        raise ValueError(f"step {step} lies outside the schedule's 0 to {steps}: give more steps")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}: use {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)  # 0 … 1
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]
    return peak * factor


def follow_schedule(
    optimizer: torch.optim.Optimizer, step: int, steps: int, config: ScheduleSettings
) -> float:
    """Sets the rate of step 0, 1, … steps - 1, and returns it."""
    rate = learning_rate(step, steps, config.learning_rate, config.warmup_steps, config.schedule)
    set_learning_rate(optimizer, rate)
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """`rate` for every group, scaled where a group names its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def clip_gradients(model: nn.Module, max_norm: float | None, where: str) -> float:
    """Scales the gradient to a global 2-norm of at most max_norm; returns the norm before.

    Raises:
        NonFinite: the norm is not finite; the parameters are untouched.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = total_norm([p.grad for p in parameters])
    value = float(norm)
    check_finite(where, {"grad_norm": value})
    if max_norm is not None and value > max_norm:  # times 1 would be a pass over all of it
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


def total_norm(gradients: list[Tensor]) -> Tensor:
    """() the 2-norm of all of them together.

    In float32 torch adds up the squares of a tensor one after another, which of 28 million numbers
    loses 0.0016 of the norm. In pieces it loses 0.0000003, for a third more time.
    """
    pieces = [piece for g in gradients for piece in shards.here(g).flatten().split(PIECE)]
    norm = torch.nn.utils.get_total_norm(pieces)
    if gradients and shards.is_part(gradients[0]):
        (squares,) = ranks.gather_rows([norm.square()[None]], ranks.count())
        norm = squares.sum().sqrt()
    return norm


def check_finite(where: str, metrics: dict[str, float]) -> None:
    """Stops the run (exit code 3) at a number that is not finite, naming it."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            do = "nothing was updated; lower learning_rate, or look at the batch"
            raise NonFinite(f"{where}: {name}", f"is {value}", do)


@torch.no_grad()
def check_weights(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Stops the run where a step left a weight or a moment that is not finite, before it counts.

    A finite gradient can do that: its square, or the learning rate, may have no float32. Such a
    step is not skipped, since nothing remembers what stood there before.

    Raises:
        UserError: exit code 3.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    # A mean of finite gradients is finite; a mean of their squares need not be. A sum takes a tenth
    # of the time of a largest value, and is as finite.
    squares = [state["exp_avg_sq"] for state in optimizer.state.values()]
    for name, tensors in (("weights", weights), ("squared gradients", squares)):
        total = float(shards.whole(sum(tensor.sum() for tensor in tensors)))
        if not math.isfinite(total):
            what = f"the sum of all {name} is {total} after the update"
            do = "the last checkpoint stands; lower learning_rate, or raise adam_epsilon"
            raise UserError(where, what, do, NON_FINITE)


@contextmanager
def skip_nonfinite(
    optimizer: torch.optim.Optimizer, counters: dict[str, int], patience: int
) -> Iterator[None]:
    """Around one update: leaves it out where its numbers are not finite, and drops its gradients.

    Args:
        counters: where skips are counted, as `skipped_updates` and `skipped_in_a_row`.
        patience: how many updates in a row may be skipped.
    Raises:
        NonFinite: one more than that; the parameters are untouched.
    """
    try:
        yield
        counters.pop("skipped_in_a_row", None)
    except NonFinite:
        in_a_row = counters.get("skipped_in_a_row", 0) + 1
        if in_a_row > patience:
            raise
        counters["skipped_in_a_row"] = in_a_row
        counters["skipped_updates"] = counters.get("skipped_updates", 0) + 1
    finally:
        optimizer.zero_grad()  # gradients need not be held while others use the memory


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient is computed for its weights, and no pass keeps what one would need."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
