"""One pair of preferences: the loss of a reward model, or of DPO and its family."""

import torch
from torch import Tensor

from minirlhf.equations.dpo import DPOLoss
from minirlhf.equations.preference import bradley_terry_loss
from minirlhf.errors import UserError
from minirlhf.setup.dpo import objective_of
from minirlhf.setup.dpo_settings import DPOConfig, beta_of, sft_coef_of
from minirlhf.tools.explain.page import Column, Page
from minirlhf.tools.explain.record import Record
from minirlhf.tools.explain.rollouts import last_turn

SIDES = ("chosen", "rejected")


def introduce(page: Page, record: Record, name: str, settings: str) -> None:
    row = record.row
    where = page.tell("the demo's model") if record.example else record.where
    page.say("{name}: pair {sample} of 0 to {last}, {where}", name=name, sample=record.at,
             last=len(record.rows) - 1, where=where)
    if record.example:
        page.say("No run was given: this is a model of the demo's shape, after a few steps in "
                 "memory; nothing was written.")
    else:
        page.say("A held-out pair, as the evaluation at this step recorded it.")
    page.blank()
    for part in ("prompt", *SIDES):
        page.text(part, last_turn(row.get(part, "")))
    page.text("settings", settings)
    page.blank()


def vector(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


# ---------------------------------------------------------------------------------- reward models


def explain_reward(record: Record, page: Page) -> None:
    """Adds to the page the scores of record.row and the loss of the pair."""
    config, row, num, term = record.config, record.row, page.number, page.term
    chosen, rejected, margin = (float(row[n]) for n in ("chosen_score", "rejected_score", "margin"))
    e, c = config.label_smoothing, config.center_rewards_coefficient
    introduce(page, record, page.tell("reward model"),
              f"label_smoothing {e:g}  center_rewards_coefficient {c:g}")
    page.table(list(SIDES), [Column("score", [chosen, rejected])], None, first="response")
    page.blank()
    difference = chosen - rejected - margin
    probability = float(torch.sigmoid(vector(difference)))
    loss = float(bradley_terry_loss(vector(chosen), vector(rejected), margin, 1.0, e))
    page.equation("difference", "chosen - rejected - margin",
                  f"{num(chosen)} - {term(rejected)} - {term(margin)}", difference)
    page.equation("sigmoid(difference)", "1 / (1 + exp(-difference))",
                  f"1 / (1 + exp(-{term(difference)}))", probability)
    name = "pair loss" if c else "loss"
    if e:
        page.equation(
            name, "-(1 - e) log sigmoid(difference) - e log sigmoid(-difference)",
            f"-{1 - e:g} * log({num(probability)}) - {e:g} * log({num(1 - probability)})", loss)
    else:
        page.equation(name, "-log sigmoid(difference)", f"-log({num(probability)})", loss)
    if c:
        page.equation("loss", "pair loss + c (chosen + rejected)^2",
                      f"{num(loss)} + {c:g} * ({num(chosen)} + {term(rejected)})^2",
                      loss + c * (chosen + rejected) ** 2)
    page.blank()
    page.say("Its gradient: the chosen score is pushed up and the rejected one down by the same, "
             "{push} in size; 0 where the model is sure and right.",
             push=num((1 - e) * (1 - probability) - e * probability))
    page.say("A step takes the mean of such losses over its pairs. The label counts as certain; a "
             "row's own probability is not recorded.")
    if config.heads > 1:
        page.say("The scores are those of {heads} heads together; each has a loss of its own in "
                 "training.", heads=config.heads)


# --------------------------------------------------------------------------------- the DPO family


def explain_dpo(record: Record, page: Page) -> None:
    """Adds to the page the log-probs of record.row, where they are known, and its loss."""
    config, row = record.config, record.row
    if config.loss == "kto":
        raise UserError(record.where, "is of a run with --loss kto", "explain shows pairs")
    rewards = [float(row["chosen_score"]), float(row["rejected_score"])]
    beta = beta_of(config)
    introduce(page, record, "DPO" if config.loss == "sigmoid" else config.loss, _settings(config))
    tell_logprobs(page, record, beta, rewards)
    margin = rewards[0] - rewards[1]
    page.equation("margin", "reward(chosen) - reward(rejected)",
                  f"{page.number(rewards[0])} - {page.term(rewards[1])}", margin)
    loss = float(loss_of(config, beta, rewards).loss)
    if config.loss != "hinge" and config.loss != "ipo":
        page.equation("sigmoid(margin)", "1 / (1 + exp(-margin))",
                      f"1 / (1 + exp(-{page.term(margin)}))", float(torch.sigmoid(vector(margin))))
    page.equation("loss", *_formula(page, config, beta, margin), loss)
    page.blank()
    if (coef := sft_coef_of(config)) or config.loss == "orpo":
        page.say("In training its weight is {weight}, and {coef} times the SFT loss of the chosen "
                 "response, a mean over its tokens, is added.",
                 weight=f"{objective_of(config).weight:g}", coef=f"{coef:g}")
    page.say("A step takes the mean of such losses over its pairs.")


def tell_logprobs(page: Page, record: Record, beta: float, rewards: list[float]) -> None:
    config, known = record.config, record.row.get("logprobs") if record.example else None
    columns = []
    if known is not None:
        page.say("Log-probs of the whole responses, in nats: sums over their tokens.")
        columns = [Column("log policy", known[:2]), Column("log ref", known[2:]),
                   Column("log ratio", [known[0] - known[2], known[1] - known[3]])]
    elif config.loss not in ("simpo", "orpo"):
        page.say("A record holds the rewards of a pair, not its log-probs; log ratio is log policy "
                 "- log ref, the reward over beta.")
        columns = [Column("log ratio", [reward / beta for reward in rewards])]
    page.table(list(SIDES), [*columns, Column("reward", rewards)], None, first="response")
    page.blank()
    if columns:
        for side, ratio, reward in zip(SIDES, columns[-1].values, rewards, strict=True):
            numbers = page.term(ratio)
            if known is not None:
                a, b = known[SIDES.index(side)], known[SIDES.index(side) + 2]
                numbers = f"({page.number(a)} - {page.term(b)})"
            page.equation(f"reward({side})", "beta (log policy - log ref)",
                          f"{beta:g} * {numbers}", reward)


def loss_of(config: DPOConfig, beta: float, rewards: list[float]) -> DPOLoss:
    """The run's loss of the pair, from its rewards alone: each loss of the family is a function of
    them, so the reference may as well be 0."""
    zero = vector(0.0)
    if config.loss == "orpo":  # rewards are log odds; of l they are l - log(1 - exp l)
        sides = [torch.nn.functional.logsigmoid(vector(reward)) for reward in rewards]
    else:
        sides = [vector(reward / beta) for reward in rewards]
    return objective_of(config).pair_loss(*sides, zero, zero)


def _settings(config: DPOConfig) -> str:
    told = f"loss {config.loss}  beta {beta_of(config):g}"
    if config.label_smoothing:
        told += f"  label_smoothing {config.label_smoothing:g}"
    return told + (f"  simpo_gamma {config.simpo_gamma:g}" if config.loss == "simpo" else "")


def _formula(page: Page, config: DPOConfig, beta: float, margin: float) -> tuple[str, str]:
    """The loss as a formula of the margin, and the same in numbers."""
    e, m = config.label_smoothing, page.term(margin)
    p, q = (page.number(float(torch.sigmoid(vector(x)))) for x in (margin, -margin))
    match config.loss:
        case "robust":
            return ("(-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e)",
                    f"(-{1 - e:g} * log({p}) + {e:g} * log({q})) / {1 - 2 * e:g}")
        case "ipo":
            return ("(margin / beta - 1 / (2 beta))^2",
                    f"({m} / {beta:g} - 1 / (2 * {beta:g}))^2")
        case "hinge":
            return "max(0, 1 - margin)", f"max(0, 1 - {m})"
        case "simpo":
            return ("-log sigmoid(margin - gamma)",
                    f"-log(1 / (1 + exp(-({page.number(margin)} - {config.simpo_gamma:g}))))")
    if e:
        return ("-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)",
                f"-{1 - e:g} * log({p}) - {e:g} * log({q})")
    return "-log sigmoid(margin)", f"-log({p})"
