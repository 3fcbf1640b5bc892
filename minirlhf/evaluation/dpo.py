"""What DPO and its family tell of preferences: those of an optimizer step, or held-out ones.

Shapes: N examples, P pairs of them, M texts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.preferences import Example, as_pairs
from minirlhf.batches.responses import (
    Objective,
    Outcome,
    Reference,
    batches_of,
    response_stats,
)
from minirlhf.data.examples import Pair
from minirlhf.equations.preference import preference_accuracy
from minirlhf.models.transformer import CausalLM
from minirlhf.run import optim


class Ranked(NamedTuple):
    """Held-out pairs with their rewards, in the examples' order."""

    metrics: dict[str, float]
    pairs: list[Pair]  # P: the pairs themselves, or all of each ranked list
    chosen: Tensor  # (P,) rewards
    rejected: Tensor  # (P,)


def direct_metrics(outcomes: list[Outcome], objective: Objective) -> dict[str, float]:
    """TRL's numbers of the pairs of all these micro-batches, as means over them.

    Returns:
        rewards/chosen, rewards/rejected, rewards/margins; rewards/accuracies, strict; logps/chosen,
        logps/rejected: sums over a response's tokens, whatever the loss; entropy, a token; nll_loss
        where it is part of the loss.
    """
    told = Outcome(*map(torch.cat, zip(*outcomes, strict=True)))
    means = {
        "rewards/chosen": told.chosen_rewards, "rewards/rejected": told.rejected_rewards,
        "rewards/margins": told.chosen_rewards - told.rejected_rewards,
        "logps/chosen": told.chosen_logprobs, "logps/rejected": told.rejected_logprobs,
    }
    means |= {"nll_loss": told.nll} if objective.sft_coef else {}
    values = {name: float(x.double().mean()) for name, x in means.items()}
    accuracy = preference_accuracy(told.chosen_rewards, told.rejected_rewards).strict
    entropy = told.entropy.double().sum() / told.tokens.sum()
    return values | {"rewards/accuracies": accuracy, "entropy": float(entropy)}


@torch.no_grad()
def evaluate_direct(
    lm: CausalLM, examples: list[Example], ref: Reference | None, objective: Objective,
    micro_batch_tokens: int = 4096,
) -> Ranked:
    """The loss and `direct_metrics` of held-out pairs or ranked lists.

    Raises:
        UserError: a number is not finite (exit code 3).
    """
    outcomes, total, order = [], 0.0, []
    rewards: list[tuple[Tensor, Tensor]] = []
    for rows, batch in batches_of(examples, micro_batch_tokens):
        interrupt.check()
        policy = response_stats(lm, batch.texts)
        losses, told = batch.losses(policy, None if ref is None else ref(batch.texts), objective)
        total += float(losses.double().sum()) / len(examples)
        outcomes.append(told)
        order += rows
        sides = (x.cpu().split(batch.pairs) for x in (told.chosen_rewards, told.rejected_rewards))
        rewards += zip(*sides, strict=True)
    values = {"loss": total} | direct_metrics(outcomes, objective)
    optim.check_finite("evaluation", values)
    in_order = [rewards[at] for at in sorted(range(len(order)), key=order.__getitem__)]
    chosen, rejected = map(torch.cat, zip(*in_order, strict=True))
    return Ranked(values, [p for e in examples for p in as_pairs(e)], chosen, rejected)
