"""What DPO and its family tell of preferences: those of an optimizer step, or held-out ones.

Shapes: N examples, P pairs of them, M texts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.preferences import as_pairs, row_lengths
from minirlhf.batches.responses import (
    Example,
    KTOObjective,
    Objective,
    Outcome,
    Reference,
    batches_of,
    mismatched_ratios,
    response_stats,
)
from minirlhf.console import progress
from minirlhf.data.examples import Pair
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.data.unpaired import Unpaired
from minirlhf.equations.preference import preference_accuracy
from minirlhf.errors import printable
from minirlhf.evaluation.reward import pair_rows, pair_table
from minirlhf.models.transformer import CausalLM
from minirlhf.run import optim


class Ranked(NamedTuple):
    """Held-out pairs with their rewards, in the examples' order."""

    metrics: dict[str, float]
    pairs: list[Pair]  # P: the pairs themselves, or all of each ranked list
    chosen: Tensor  # (P,) rewards
    rejected: Tensor  # (P,)


class Judged(NamedTuple):
    """Held-out single responses with their rewards."""

    metrics: dict[str, float]
    examples: list[Unpaired]  # N
    rewards: list[float]


def direct_metrics(
    outcomes: list[Outcome], objective: Objective
) -> tuple[dict[str, float], dict[str, int]]:
    """TRL's numbers of all these micro-batches, as means, and over how many responses, pairs or
    tokens each mean is. Of single responses those that are desirable stand as chosen; a number of a
    kind that there is none of is left out.

    Returns:
        rewards/chosen, rewards/rejected, rewards/margins; rewards/accuracies of pairs, strict;
        logps/chosen, logps/rejected: sums over a response's tokens, whatever the loss; entropy, a
        token; nll_loss where it is part of the loss; kl of single responses.
    """
    told = Outcome(*map(torch.cat, zip(*outcomes, strict=True)))
    single = isinstance(objective, KTOObjective)
    over = {
        "rewards/chosen": told.chosen_rewards, "rewards/rejected": told.rejected_rewards,
        "logps/chosen": told.chosen_logprobs, "logps/rejected": told.rejected_logprobs,
        "nll_loss": told.nll if objective.sft_coef else told.nll[:0],
    }
    over = {name: x.cpu().double() for name, x in over.items() if len(x)}
    values = {name: float(x.mean()) for name, x in over.items()}
    counts = {name: len(x) for name, x in over.items()}
    tokens = int(told.tokens.sum())
    values["entropy"], counts["entropy"] = float(told.entropy.cpu().double().sum()) / tokens, tokens
    if {"rewards/chosen", "rewards/rejected"} <= values.keys():
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        counts["rewards/margins"] = len(told.tokens) if single else len(told.chosen_rewards)
    if single:
        values["kl"], counts["kl"] = float(told.kl[0]), len(told.tokens)
    else:
        accuracy = preference_accuracy(told.chosen_rewards, told.rejected_rewards).strict
        values["rewards/accuracies"] = accuracy
        counts["rewards/accuracies"] = len(told.chosen_rewards)
    return values, counts


@torch.no_grad()
def evaluate_direct(
    lm: CausalLM, examples: list[Example], ref: Reference | None, objective: Objective,
    micro_batch_tokens: int = 4096,
) -> Ranked | Judged:
    """The loss and `direct_metrics` of held-out pairs, ranked lists or single responses; KTO's
    mismatched responses are those of the whole set.

    Raises:
        UserError: a number is not finite (exit code 3).
    """
    outcomes, total, order = [], 0.0, []
    parts: list[tuple[Tensor, Tensor]] = []  # rewards of each example
    if isinstance(objective, KTOObjective):
        longest = int(row_lengths(examples).max())
        ratios = mismatched_ratios(lm, examples, ref, longest, micro_batch_tokens)
        objective = objective._replace(kl=ratios)
    batches = batches_of(examples, micro_batch_tokens)
    for rows, batch in progress(batches, "evaluate", unit=" micro-batches"):
        interrupt.check()
        policy = response_stats(lm, batch.texts)
        losses, told = batch.losses(policy, None if ref is None else ref(batch.texts), objective)
        total += float(losses.cpu().double().sum()) / len(examples)
        outcomes.append(told)
        order += rows
        sizes = zip(*batch.sizes(), strict=True)
        chosen, rejected = told.chosen_rewards.cpu(), told.rejected_rewards.cpu()
        for n, m in sizes:
            parts.append((chosen[:n], rejected[:m]))
            chosen, rejected = chosen[n:], rejected[m:]
    values = {"loss": total} | direct_metrics(outcomes, objective)[0]
    optim.check_finite("evaluation", values)
    parts = [parts[at] for at in sorted(range(len(order)), key=order.__getitem__)]
    if isinstance(objective, KTOObjective):
        return Judged(values, examples, [float(torch.cat(both)) for both in parts])
    chosen, rejected = map(torch.cat, zip(*parts, strict=True))
    return Ranked(values, [p for e in examples for p in as_pairs(e)], chosen, rejected)


# ------------------------------------------------------------------------------ rows to look at


def direct_rows(result: Ranked | Judged, tokenizer: Tokenizer, count: int) -> list[dict]:
    """The first `count` pairs or responses (-1: all) with their rewards."""
    if isinstance(result, Ranked):
        return pair_rows(result, tokenizer, count)
    shown = len(result.examples) if count < 0 else count
    return [
        {"prompt": tokenizer.decode(e.prompt_ids), "response": tokenizer.decode(e.response_ids),
         "desirable": e.desirable, "reward": reward,
         "tokens": len(e.prompt_ids) + len(e.response_ids)}
        for e, reward in zip(result.examples[:shown], result.rewards[:shown], strict=True)
    ]


def direct_table(rows: list[dict]) -> str:
    """`direct_rows` for a console."""
    if "chosen" in rows[0]:
        return pair_table(rows)
    lines = [f"  {'response':<76}  desirable   reward  tokens"]
    for row in rows:
        liked = "yes" if row["desirable"] else "no"
        lines.append(f"  {printable(row['response'], 76):<76}  {liked:<9}  {row['reward']:>7.3f}  "
                     f"{row['tokens']:>6}")
    return "\n".join(lines)
