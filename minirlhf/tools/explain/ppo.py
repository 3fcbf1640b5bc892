"""One sample of PPO: from its score to a reward, an advantage and a loss for each token.

Shapes: B rows of the step, R tokens of the longest response, n tokens of the sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.credit import reward_kl
from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.kl import ESTIMATORS
from minirlhf.equations.masking import masked_mean, masked_rescale, masked_standardize
from minirlhf.equations.policy import Surrogate, ValueLoss, clipped_surrogate, clipped_value_loss
from minirlhf.errors import UserError
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.tools.explain.page import Column, Page
from minirlhf.tools.explain.record import Record, token_texts
from minirlhf.tools.explain.rollouts import (
    CLOSE,
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


class Credit(NamedTuple):
    """(B, R) each, in float64; None where the record does not hold what it is made of."""

    kl_coef: float
    scores: Tensor  # (B,) that the last tokens were paid
    kl: Tensor | None
    given: Tensor | None  # rewards of single tokens from the reward function
    rewards: Tensor  # after whitening, where that is on
    end: Tensor  # (B,) value of the state after the last token, 0 where that is terminal
    deltas: Tensor
    plain: Tensor  # GAE's advantages
    returns: Tensor
    advantages: Tensor  # standardized and weighed, where that is on


def explain(record: Record, page: Page, most: int | None, token: int | None) -> None:
    """Adds to the page all that became of record.row."""
    config, rows, at, n = record.config, rows_of(record), record.at, len(record.row["response_ids"])
    if rows.values is None or rows.returns is None or rows.ref is None:
        raise UserError(record.where, "has rows without values or returns", "is it a run of ppo?")
    credit = assign(record, rows)

    def mine(x: Tensor) -> Tensor:  # (B, R) -> (1, n)
        return x[at : at + 1, :n]

    old, values = mine(rows.old), mine(rows.values)
    new, new_values = old, values
    if record.update is not None:
        new = torch.tensor([record.update.logprobs], dtype=torch.float64)
        new_values = torch.tensor([record.update.values], dtype=torch.float64)
    advantages, returns = mine(credit.advantages), mine(credit.returns)
    surrogate = clipped_surrogate(
        new, old, advantages, config.clip_low, config.clip_high, config.dual_clip
    )
    value = clipped_value_loss(new_values, values, returns, config.value_clip)
    kl_loss = torch.zeros_like(new)
    if config.kl_in == "loss" and config.kl_estimator != "full":
        kl_loss = credit.kl_coef * ESTIMATORS[config.kl_estimator](new, mine(rows.ref))
    loss = surrogate.loss + config.vf_coef * value.loss + kl_loss
    chosen = worked_token(token, surrogate, n)
    introduce(page, record, "PPO", [_settings(config, credit)])
    tell_credit(page, record, rows, credit, most)
    write_credit(page, record, rows, credit, chosen)
    tell_update(page, record, new, new_values, credit, surrogate, value, kl_loss, loss, most)
    write_update(page, record, new, new_values, rows, credit, surrogate, value, kl_loss, loss,
                 chosen)


def assign(record: Record, rows: Rows) -> Credit:
    """What `batches.credit.assign_credit` made of the rows, step by step."""
    config, mask = record.config, rows.mask
    kl_coef, kl = coefficient(config, rows), penalty(record, rows)
    scores = rows.scores
    if config.bootstrap_truncated:
        scores = torch.where(rows.truncated, 0, scores)
    paid = torch.zeros_like(rows.old) if kl is None else kl
    rewards, given = token_rewards(scores, paid, mask, kl_coef), None
    if config.kl_estimator == "full" and reward_kl(config) and not config.whiten_rewards:
        rewards = rows.rewards  # the KL over the vocabulary is recorded in them alone
        kl = (token_rewards(scores, paid, mask, 0.0) - rewards) / kl_coef if kl_coef else None
    elif config.whiten_rewards:
        rewards = masked_rescale(rewards, mask)
    elif any(".py:" in source for source in config.reward):
        given = rows.rewards - rewards
        given = None if given.abs().max() < CLOSE else given
        rewards = rewards if given is None else rows.rewards
    check_agrees(record, "rewards", rewards, rows.rewards)
    end = torch.zeros_like(rows.scores)
    if config.bootstrap_truncated and config.gamma:
        last = mask.sum(1, keepdim=True) - 1
        ends = (rows.returns - rewards).gather(1, last)[:, 0] / config.gamma
        end = torch.where(rows.truncated, ends, end)
    plain, returns = gae(rewards, rows.values, mask, config.gamma, config.lam, end)
    deltas = gae(rewards, rows.values, mask, config.gamma, 0.0, end).advantages
    check_agrees(record, "returns", returns, rows.returns)
    advantages = masked_standardize(plain, mask) if config.whiten_advantages else plain
    if config.rollout_bits:
        advantages = rows.advantages  # weighed for the rounding of the policy that sampled
    check_agrees(record, "advantages", advantages, rows.advantages)
    return Credit(kl_coef, scores, kl, given, rewards, end, deltas, plain, returns, advantages)


def coefficient(config: PPOConfig, rows: Rows) -> float:
    """The step's kl_coef: where it adapts, what the largest penalty was divided by."""
    if config.kl_target is None or config.kl_estimator == "full" or reward_kl(config) is None:
        return config.kl_coef
    kl = ESTIMATORS[config.kl_estimator](rows.old, rows.ref)
    before_last = rows.mask.clone()
    before_last[torch.arange(len(kl)), rows.mask.sum(1) - 1] = False
    largest = torch.where(before_last, kl.abs(), 0).flatten().argmax()
    penalty = float(rows.rewards.flatten()[largest])
    return -penalty / float(kl.flatten()[largest]) if penalty else config.kl_coef


def _settings(config: PPOConfig, credit: Credit) -> str:
    names = {"kl_coef": credit.kl_coef, "gamma": config.gamma, "lam": config.lam,
             "clip_low": config.clip_low, "clip_high": config.clip_high,
             "dual_clip": config.dual_clip, "vf_coef": config.vf_coef,
             "value_clip": config.value_clip}
    return "  ".join(f"{name} {value:g}" for name, value in names.items() if value is not None)


# --------------------------------------------------------------------------------------- credit


def tell_credit(
    page: Page, record: Record, rows: Rows, credit: Credit, most: int | None
) -> None:
    page.say("What each token earned. old and ref: its log-prob under the policy that sampled and "
             "under the reference.")

    def column(title: str, x: Tensor, summed: bool = True) -> Column:
        cells = x[record.at][: len(record.row["response_ids"])]
        return Column(title, cells.tolist(), float(cells.sum()) if summed else None)

    columns = [column("old", rows.old), column("ref", rows.ref)]
    columns += [] if credit.kl is None else [column("KL", credit.kl)]
    columns += [] if credit.given is None else [column("given", credit.given)]
    columns += [
        column("reward", credit.rewards), column("V", rows.values, summed=False),
        column("delta", credit.deltas), column("A", credit.plain),
        column("return", credit.returns, summed=False),
    ]
    page.table(token_texts(record), columns, most)
    page.blank()


def write_credit(page: Page, record: Record, rows: Rows, credit: Credit, t: int) -> None:
    """The equations of credit at token t, in numbers."""
    config, at, n, term, num = record.config, record.at, len(record.row["response_ids"]), \
        page.term, page.number
    page.say("Token {t} of these in numbers; V' and A' are those of the token after it.", t=t)

    def of(x: Tensor, place: int = t) -> float:
        return float(x[at, place])

    if credit.kl is not None and config.kl_estimator != "full":
        formula = FORMULAS[config.kl_estimator].replace("pi", "old")
        page.equation("KL", formula, kl_numbers(page, config.kl_estimator, of(rows.old),
                                                 of(rows.ref)), of(credit.kl))
    for place in sorted({t, n - 1}):
        write_reward(page, record, credit, place)
    last = t == n - 1
    after = float(credit.end[at]) if last else of(rows.values, t + 1)
    later = 0.0 if last else of(credit.plain, t + 1)
    gamma, lam = f"{config.gamma:g}", f"{config.lam:g}"
    page.equation(
        "delta", "reward + gamma V' - V",
        f"{num(of(credit.rewards))} + {gamma} * {term(after)} - {term(of(rows.values))}",
        of(credit.deltas))
    page.equation("A", "delta + gamma lam A'",
                  f"{num(of(credit.deltas))} + {gamma} * {lam} * {term(later)}", of(credit.plain))
    page.equation("return", "A + V", f"{num(of(credit.plain))} + {term(of(rows.values))}",
                  of(credit.returns))
    page.blank()


def write_reward(page: Page, record: Record, credit: Credit, place: int) -> None:
    config, at, last = record.config, record.at, place == len(record.row["response_ids"]) - 1
    stood_in = config.bootstrap_truncated and record.row.get("finish_reason") == "length"
    if config.whiten_rewards:
        page.say("  reward: scaled to a spread of 1 over all tokens of the step (whiten_rewards)")
        return
    names, numbers = [], []
    if credit.kl is not None:
        names.append("-kl_coef KL")
        numbers.append(f"-{credit.kl_coef:g} * {page.term(float(credit.kl[at, place]))}")
    if credit.given is not None:
        names.append("given")
        numbers.append(page.term(float(credit.given[at, place])))
    if last and not stood_in:  # else V' pays in place of the score
        names.append("score")
        numbers.append(page.term(float(credit.scores[at])))
    page.equation(f"reward[{place}]", " + ".join(names or ["0"]), " + ".join(numbers),
                  float(credit.rewards[at, place]))


# --------------------------------------------------------------------------------------- update


def tell_update(
    page: Page, record: Record, new: Tensor, new_values: Tensor, credit: Credit,
    surrogate: Surrogate, value: ValueLoss, kl_loss: Tensor, loss: Tensor, most: int | None,
) -> None:
    """The table of the losses; (1, n) each."""
    config, n = record.config, new.shape[1]
    if record.update is None:
        page.say("The first update: the policy is the one that sampled, so every ratio is 1; a "
                 "record holds no later log-probs.")
    else:
        page.say("The second update: the policy has learned from this step once; new is the "
                 "token's log-prob under it.")
    if config.critic_warmup_steps and record.row["step"] <= config.critic_warmup_steps:
        page.say("The policy waited for its critic in this step: of the losses the value's alone "
                 "moved weights.")

    def column(title: str, x: Tensor, summed: bool = True) -> Column:
        return Column(title, x[0].tolist(), float(x.sum()) if summed else None)

    clipped = [page.tell("yes") if c else "" for c in surrogate.clipped[0].tolist()]
    advantages = credit.advantages[record.at : record.at + 1, :n]
    columns = [column("new", new, summed=False)]
    columns += [] if record.update is None else [column("V", new_values, summed=False)]
    columns += [
        column("ratio", surrogate.ratio, summed=False), column("advantage", advantages),
        Column("clipped", clipped), column("policy loss", surrogate.loss),
        column("value loss", value.loss),
    ]
    columns += [column("KL loss", kl_loss)] if config.kl_in == "loss" else []
    page.table(token_texts(record), [*columns, column("loss", loss)], most)
    page.blank()


def write_update(
    page: Page, record: Record, new: Tensor, new_values: Tensor, rows: Rows, credit: Credit,
    surrogate: Surrogate, value: ValueLoss, kl_loss: Tensor, loss: Tensor, t: int,
) -> None:
    """The equations of the losses at token t, in numbers, and the sample's whole loss."""
    config, at, n, term, num = record.config, record.at, new.shape[1], page.term, page.number
    page.say("Token {t} of these in numbers.", t=t)
    write_advantage(page, record, rows, credit, t)
    write_surrogate(page, config, float(new[0, t]), float(rows.old[at, t]),
                    float(credit.advantages[at, t]), surrogate, t)
    now, old = float(new_values[0, t]), float(rows.values[at, t])
    goal, clip = float(credit.returns[at, t]), config.value_clip
    if clip is None:
        formula, numbers = "1/2 (V - return)^2", f"1/2 ({num(now)} - {term(goal)})^2"
    else:
        bounded = min(max(now, old - clip), old + clip)
        formula = "1/2 max((V - return)^2, (clip(V, V_old -+ value_clip) - return)^2)"
        numbers = (f"1/2 max(({num(now)} - {term(goal)})^2, "
                   f"({num(bounded)} - {term(goal)})^2)")
    page.equation("value loss", formula, numbers, float(value.loss[0, t]))
    parts = ["policy loss", "vf_coef value loss"]
    numbers = [num(float(surrogate.loss[0, t])),
               f"{config.vf_coef:g} * {term(float(value.loss[0, t]))}"]
    if config.kl_in == "loss" and config.kl_estimator != "full":
        kl = kl_numbers(page, config.kl_estimator, float(new[0, t]), float(rows.ref[at, t]))
        page.equation("KL loss", f"kl_coef ({FORMULAS[config.kl_estimator]})",
                      f"{credit.kl_coef:g} * ({kl})", float(kl_loss[0, t]))
        parts.append("KL loss")
        numbers.append(term(float(kl_loss[0, t])))
    page.equation("loss", " + ".join(parts), " + ".join(numbers), float(loss[0, t]))
    total = float(loss.sum())
    page.blank()
    page.say("loss of the sample = {total} / {n} tokens = {mean}", total=num(total), n=n,
             mean=num(total / n))
    page.say("A step divides the sums of all its samples by all their tokens, so that each token "
             "weighs the same.")
    if config.entropy_coef or (config.kl_in == "loss" and config.kl_estimator == "full"):
        page.say("Left out, since a record does not hold it: what reads the whole vocabulary, the "
                 "entropy and the full KL as a loss.")


def write_advantage(page: Page, record: Record, rows: Rows, credit: Credit, t: int) -> None:
    config, plain, at = record.config, credit.plain, record.at
    if config.whiten_advantages:
        mean = float(masked_mean(plain, rows.mask))
        std = float((masked_mean((plain - mean).square(), rows.mask) + 1e-8).sqrt())
        scaled = float(masked_standardize(plain, rows.mask)[at, t])
        page.say("Mean and std of A are over all {tokens} tokens of the step.",
                 tokens=int(rows.mask.sum()))
        page.equation("advantage", "(A - mean) / std",
                      f"({page.number(float(plain[at, t]))} - {page.term(mean)}) / "
                      f"{page.number(std)}", scaled)
    if config.rollout_bits:
        page.say("The advantage in the table is weighed for the rounding of the policy that "
                 "sampled (rollout_bits).")
