"""One sample of GRPO or a relative: from the scores of its group to a loss for each token.

Shapes: B rows of the step, G of a group, R tokens of the longest response, n of the sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.credit import OF_GROUPS
from minirlhf.equations.advantages import token_rewards
from minirlhf.equations.critic_free import rewards_to_go
from minirlhf.equations.kl import ESTIMATORS
from minirlhf.equations.masking import masked_mean, masked_standardize, masked_sum
from minirlhf.equations.policy import Surrogate, with_mask
from minirlhf.errors import printable
from minirlhf.recipes.grpo import loss_of
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.tools.explain.page import Column, Page
from minirlhf.tools.explain.record import Record, token_texts
from minirlhf.tools.explain.rollouts import (
    FORMULAS,
    Rows,
    check_agrees,
    introduce,
    kl_numbers,
    penalty,
    rows_of,
    worked_token,
    write_surrogate,
)

STD_EPS = 1e-4  # what group_advantages adds to a std


class Credit(NamedTuple):
    kl: Tensor | None  # (B,) nats a response, where its penalty is in the reward
    scores: Tensor  # (B,) that are compared: the score, less the penalty
    to_go: Tensor | None  # (B, R) rewards of each token and those after it, of reinforce++
    advantages: Tensor  # (B, R)


class Losses(NamedTuple):
    """(1, n) each."""

    new: Tensor
    old: Tensor
    ref: Tensor | None
    advantages: Tensor
    surrogate: Surrogate
    kl: Tensor | None  # kl_coef times the KL; None where it is no loss
    total: Tensor


def explain(record: Record, page: Page, most: int | None, token: int | None) -> None:
    """Adds to the page all that became of record.row."""
    config, rows, at, n = record.config, rows_of(record), record.at, len(record.row["response_ids"])
    credit = assign(record, rows)
    old, advantages = rows.old[at : at + 1, :n], credit.advantages[at : at + 1, :n]
    new = old
    if record.update is not None:
        new = torch.tensor([record.update.logprobs], dtype=torch.float64)
    surrogate = with_mask(loss_of(config))(new, old, advantages, torch.ones(1, n).bool())
    ref = None if rows.ref is None else rows.ref[at : at + 1, :n]
    kl, total = None, surrogate.loss
    if config.kl_in == "loss" and config.kl_coef and ref is not None:
        kl = config.kl_coef * ESTIMATORS[config.kl_estimator](new, ref)
        total = total + kl
    losses = Losses(new, old, ref, advantages, surrogate, kl, total)
    introduce(page, record, "GRPO" if config.advantage == "grpo" else config.advantage,
              [_settings(config)])
    tell_group(page, record, rows, credit)
    tell_update(page, record, losses, most)
    write_update(page, record, losses, worked_token(token, surrogate, n))


def assign(record: Record, rows: Rows) -> Credit:
    """What `batches.credit.assign_group_credit` made of the rows."""
    config, mask, kl, to_go = record.config, rows.mask, None, None
    per_token = penalty(record, rows) if config.kl_coef else None
    if config.advantage == "reinforce++":
        paid = torch.zeros_like(rows.old) if per_token is None else per_token
        rewards = token_rewards(rows.scores, paid, mask, config.kl_coef)
        if any(".py:" in source for source in config.reward) and rows.rewards is not None:
            rewards = rows.rewards  # with rewards of single tokens
        check_agrees(record, "rewards", rewards, rows.rewards)
        to_go, scores = rewards_to_go(rewards, mask), rows.scores
        advantages = masked_standardize(to_go, mask)
    else:
        kl = None if per_token is None else masked_sum(per_token, mask, dim=1)
        scores = rows.scores if kl is None else rows.scores - config.kl_coef * kl
        of_rows = OF_GROUPS[config.advantage](scores, config.samples_per_prompt)
        advantages = torch.where(mask, of_rows[:, None], 0)
    if config.rollout_bits:
        advantages = rows.advantages  # weighed for the rounding of the policy that sampled
    check_agrees(record, "advantages", advantages, rows.advantages)
    return Credit(kl, scores, to_go, advantages)


def _settings(config: GRPOConfig) -> str:
    names = ("advantage", "samples_per_prompt", "kl_coef", "policy_loss", "clip_low", "clip_high",
             "dual_clip", "loss_mean")
    values = {name: getattr(config, name) for name in names}
    return "  ".join(f"{name} {value}" for name, value in values.items() if value is not None)


# ----------------------------------------------------------------------------------------- credit


def tell_group(page: Page, record: Record, rows: Rows, credit: Credit) -> None:
    """The scores of the sample's group, and its advantage in numbers."""
    config, at, num, term = record.config, record.at, page.number, page.term
    if credit.to_go is not None:
        tell_tokens(page, record, rows, credit)
        return
    G = config.samples_per_prompt
    first = at - at % G
    group = slice(first, first + G)
    page.say("The group: {count} responses to the prompt.", count=G)
    texts = [printable(row.get("response", ""), 60) for row in record.rows[group]]
    columns = [Column("score", rows.scores[group].tolist(), float(rows.scores[group].sum()))]
    if credit.kl is not None:
        columns.append(Column("KL", credit.kl[group].tolist()))
        columns.append(Column("S", credit.scores[group].tolist(),
                              float(credit.scores[group].sum())))
    columns.append(Column("advantage", credit.advantages[group, 0].tolist()))
    page.table(texts, columns, None, first="response")
    page.blank()
    page.say("Response {t} of the group in numbers.", t=at - first)
    S = credit.scores[group]
    mine, mean = float(credit.scores[at]), float(S.mean())
    if credit.kl is not None:
        page.equation("S", "score - kl_coef KL",
                      f"{num(float(rows.scores[at]))} - {config.kl_coef:g} * "
                      f"{term(float(credit.kl[at]))}", mine)
    added = " + ".join([num(float(S[0])), *(term(x) for x in S[1:].tolist())])
    if config.advantage == "rloo":
        others = (float(S.sum()) - mine) / (G - 1)
        page.equation("advantage", "S - mean of the others", f"{num(mine)} - {term(others)}",
                      float(credit.advantages[at, 0]))
        return page.blank()
    page.equation("mean", "", f"({added}) / {G}", mean)
    of_row = mine - mean
    formula, numbers = "S - mean", f"{num(mine)} - {term(mean)}"
    if config.advantage != "dr_grpo":
        spread, of = (S, G) if config.advantage == "grpo" else (credit.scores, len(credit.scores))
        std = float(spread.std())
        page.equation("std", f"sqrt(sum (S - mean)^2 / ({of} - 1))", "", std)
        formula, numbers = f"({formula}) / (std + {STD_EPS:g})", \
            f"({numbers}) / ({num(std)} + {STD_EPS:g})"
        of_row /= std + STD_EPS
    page.equation("advantage", formula, numbers, of_row)
    page.say("Each token of a response has its advantage.")
    page.blank()


def tell_tokens(page: Page, record: Record, rows: Rows, credit: Credit) -> None:
    """The advantages of reinforce++, of the sample's last token in numbers."""
    at, last, mask = record.at, len(record.row["response_ids"]) - 1, rows.mask
    mean = float(masked_mean(credit.to_go, mask))
    std = float((masked_mean((credit.to_go - mean).square(), mask) + 1e-8).sqrt())
    mine = float(credit.to_go[at, last])
    page.say("A token earns its reward and those after it. Mean and std are over all {tokens} "
             "tokens of the step; of the last token:", tokens=int(mask.sum()))
    page.equation("advantage", "(to go - mean) / std",
                  f"({page.number(mine)} - {page.term(mean)}) / {page.number(std)}",
                  float(masked_standardize(credit.to_go, mask)[at, last]))
    page.blank()


# ----------------------------------------------------------------------------------------- update


def tell_update(page: Page, record: Record, losses: Losses, most: int | None) -> None:
    if record.update is None:
        page.say("The first update: the policy is the one that sampled, so every ratio is 1; a "
                 "record holds no later log-probs.")
    else:
        page.say("The second update: the policy has learned from this step once; new is the "
                 "token's log-prob under it.")

    def column(title: str, x: Tensor, summed: bool = True) -> Column:
        return Column(title, x[0].tolist(), float(x.sum()) if summed else None)

    columns = [column("old", losses.old), column("new", losses.new)]
    columns += [] if losses.ref is None else [column("ref", losses.ref)]
    columns.append(column("ratio", losses.surrogate.ratio, summed=False))
    if record.config.advantage == "reinforce++":  # else it is that of the response
        columns.append(column("advantage", losses.advantages, summed=False))
    clipped = losses.surrogate.clipped[0].tolist()
    columns.append(Column("clipped", [page.tell("yes") if c else "" for c in clipped]))
    columns.append(column("policy loss", losses.surrogate.loss))
    columns += [] if losses.kl is None else [column("KL loss", losses.kl)]
    page.table(token_texts(record), [*columns, column("loss", losses.total)], most)
    page.blank()


def write_update(page: Page, record: Record, losses: Losses, t: int) -> None:
    """The equations of the losses at token t, in numbers, and the sample's whole loss."""
    config, n, term, num = record.config, losses.new.shape[1], page.term, page.number
    page.say("Token {t} of these in numbers.", t=t)
    new, old, advantage = (float(x[0, t]) for x in (losses.new, losses.old, losses.advantages))
    loss = float(losses.surrogate.loss[0, t])
    if config.policy_loss == "clip":
        write_surrogate(page, config, new, old, advantage, losses.surrogate, t)
    else:
        write_other(page, config, losses, t)
    parts, numbers = ["policy loss"], [num(loss)]
    if losses.kl is not None:
        kl = kl_numbers(page, config.kl_estimator, new, float(losses.ref[0, t]))
        page.equation("KL loss", f"kl_coef ({FORMULAS[config.kl_estimator]})",
                      f"{config.kl_coef:g} * ({kl})", float(losses.kl[0, t]))
        parts.append("KL loss")
        numbers.append(term(float(losses.kl[0, t])))
    page.equation("loss", " + ".join(parts), " + ".join(numbers), float(losses.total[0, t]))
    page.blank()
    total = float(losses.total.sum())
    over = config.max_new_tokens if config.loss_mean == "fixed" else n
    page.say("loss of the sample = {total} / {n} tokens = {mean}", total=num(total), n=over,
             mean=num(total / over))
    page.say({
        "token": "A step divides the sums of all its samples by all their tokens, so that each "
                 "token weighs the same.",
        "sequence": "A step takes the mean of these over its samples, so that each response weighs "
                    "the same.",
        "fixed": "The divisor is max_new_tokens, whatever the length; a step takes the mean over "
                 "its samples.",
    }[config.loss_mean])
    if config.mask_truncated and record.row.get("finish_reason") == "length":
        page.say("The length limit cut this response: it takes no part in the loss "
                 "(mask_truncated).")
    if config.entropy_coef:
        page.say("Left out, since a record does not hold it: what reads the whole vocabulary, the "
                 "entropy and the full KL as a loss.")


def write_other(page: Page, config: GRPOConfig, losses: Losses, t: int) -> None:
    """The policy losses of GSPO and CISPO."""
    num, term, ratio = page.number, page.term, float(losses.surrogate.ratio[0, t])
    advantage, loss = float(losses.advantages[0, t]), float(losses.surrogate.loss[0, t])
    low, high = max(1 - config.clip_low, 0), 1 + config.clip_high
    bounded = min(max(ratio, low), high)
    if config.policy_loss == "gspo":
        mean = float((losses.new - losses.old).mean())
        page.equation("ratio", "exp(mean over tokens of new - old)", f"exp({num(mean)})", ratio)
        page.equation("policy loss", "-min(ratio advantage, clip(ratio) advantage)",
                      f"-min({num(ratio)} * {term(advantage)}, {num(bounded)} * "
                      f"{term(advantage)})", loss)
        return
    new, old = float(losses.new[0, t]), float(losses.old[0, t])
    page.equation("ratio", "exp(new - old)", f"exp({num(new)} - {term(old)})", ratio)
    page.equation("policy loss", "-clip(ratio) advantage new",
                  f"-{num(bounded)} * {term(advantage)} * {term(new)}", loss)
