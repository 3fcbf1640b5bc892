"""A step's rows as tensors, and the parts of a page that PPO and GRPO share.

Everything is computed anew in float64, from the log-probs, values and scores of the record, by the
functions that train; what the record holds of it besides must agree, or nothing is shown.

Shapes: B rows of the step, R tokens of the longest response.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.credit import reward_kl
from minirlhf.equations.kl import ESTIMATORS
from minirlhf.equations.policy import Surrogate
from minirlhf.errors import UserError
from minirlhf.tools.explain.page import Page
from minirlhf.tools.explain.record import Record

CLOSE = 1e-3  # of what a record holds in float32, times its size where it is above 1
FORMULAS = {"k1": "log pi - log ref", "k2": "(log pi - log ref)^2 / 2",
            "k3": "exp(-d) - 1 + d, d = log pi - log ref", "abs": "|log pi - log ref|"}


class Rows(NamedTuple):
    """All rows of the step, (B, R) each; what the record lacks is None."""

    mask: Tensor  # bool
    scores: Tensor  # (B,)
    truncated: Tensor  # (B,) bool
    old: Tensor  # log-probs, nats
    ref: Tensor | None
    values: Tensor | None
    rewards: Tensor | None
    advantages: Tensor
    returns: Tensor | None


def rows_of(record: Record) -> Rows:
    rows = record.rows
    sizes = torch.tensor([len(row["response_ids"]) for row in rows])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]  # (B, R)

    def padded(name: str) -> Tensor | None:
        if name not in rows[0]:
            return None
        out = torch.zeros(mask.shape, dtype=torch.float64)
        flat = torch.tensor([x for row in rows for x in row[name]], dtype=torch.float64)
        return out.masked_scatter(mask, flat)

    names = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    truncated = torch.tensor([row.get("finish_reason") == "length" for row in rows])
    return Rows(mask, scores, truncated, *map(padded, names))


def penalty(record: Record, rows: Rows) -> Tensor | None:
    """(B, R) nats: the KL in the rewards; None where it is a loss, or no row holds it."""
    estimator = reward_kl(record.config)
    if estimator in (None, "full") or rows.ref is None:
        return None
    return ESTIMATORS[estimator](rows.old, rows.ref)


def check_agrees(record: Record, what: str, computed: Tensor, recorded: Tensor | None) -> None:
    """Refuses to explain numbers by settings that they were not made with."""
    if recorded is None:
        return
    gap = (computed - recorded).abs() / recorded.abs().clamp(min=1)
    if float(gap.max()) > CLOSE:
        why = f"{what} do not follow from the settings in run.json"
        do = "were settings changed when the run went on? explain another step"
        raise UserError(record.where, why, do)


def introduce(page: Page, record: Record, name: str, more: Sequence[str] = ()) -> None:
    """Whose sample it is, its texts and its score."""
    row, ids = record.row, record.row["response_ids"]
    page.say("{name}: sample {sample} of 0 to {last}, {where}", name=name, sample=record.at,
             last=len(record.rows) - 1, where=_where(page, record))
    if record.example:
        page.say("No run was given: this is a model of the demo's shape, after a few steps in "
                 "memory; nothing was written.")
    page.blank()
    page.text("prompt", last_turn(row.get("prompt", "")))
    page.text("response", row.get("response", ""))
    ends = {"eos": "it ended by itself", "length": "the length limit cut it",
            "stop": "a stop string ended it"}
    end = ends.get(row.get("finish_reason"), ends["eos"])
    told = page.number(row["score"]), page.tell("{count} tokens", count=len(ids)), page.tell(end)
    page.text("score", ", ".join(told))
    for line in more:
        page.text("settings", line)
    page.blank()


def last_turn(prompt: object) -> object:
    """What a prompt of messages ends with; a text as it is."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return prompt[-1].get("content", "")
    return prompt


def _where(page: Page, record: Record) -> str:
    return page.tell("the demo's model") if record.example else record.where


def worked_token(asked: int | None, surrogate: Surrogate, tokens: int) -> int:
    """The token whose arithmetic is shown: before the last the first that is clipped, or the one
    of the largest loss.

    Raises:
        UserError: the sample has no such token.
    """
    if asked is not None:
        if asked >= tokens:
            raise UserError("--token", f"got {asked}", f"the sample has 0 to {tokens - 1}")
        return asked
    before = slice(0, max(tokens - 1, 1))
    if (clipped := surrogate.clipped[0, before]).any():
        return int(clipped.int().argmax())
    return int(surrogate.loss[0, before].abs().argmax())


def kl_numbers(page: Page, estimator: str, logprob: float, ref: float) -> str:
    """A formula of FORMULAS in numbers."""
    d = f"{page.number(logprob)} - {page.term(ref)}"
    of_d = page.term(logprob - ref)
    return {"k1": d, "k2": f"({d})^2 / 2", "k3": f"exp(-{of_d}) - 1 + {of_d}",
            "abs": f"|{d}|"}[estimator]


def write_surrogate(
    page: Page, config: object, new: float, old: float, advantage: float, surrogate: Surrogate,
    t: int,
) -> None:
    """The ratio and the clipped policy loss of PPO at token t."""
    ratio, term, num = float(surrogate.ratio[0, t]), page.term, page.number
    page.equation("ratio", "exp(new - old)", f"exp({num(new)} - {term(old)})", ratio)
    low, high = max(1 - config.clip_low, 0), 1 + config.clip_high
    bounded = min(max(ratio, low), high)
    formula = "-min(ratio advantage, clip(ratio) advantage)"
    numbers = f"-min({num(ratio)} * {term(advantage)}, {num(bounded)} * {term(advantage)})"
    if config.dual_clip is not None and advantage < 0:
        formula = f"min({formula}, -dual_clip advantage)"
        numbers = f"min({numbers}, -{config.dual_clip:g} * {term(advantage)})"
    page.equation("policy loss", formula, numbers, float(surrogate.loss[0, t]))
