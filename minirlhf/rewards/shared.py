"""A reward source that rank 0 alone asks: once for each response, however many ranks there are."""

import torch
from torch import Tensor

from minirlhf import ranks
from minirlhf.rewards.source import Completions, RewardSource, Scores


def asked_once(source: RewardSource | None) -> RewardSource:
    """What all ranks call alike, and all get the scores of; of one process the source itself.

    Args:
        source: None on ranks that never load it.
    """
    if ranks.count() == 1:
        return source

    def score(batch: Completions) -> Tensor | Scores:
        told = ranks.from_first(lambda: _as_json(source(batch)))
        return _scores(told) if isinstance(told, dict) else torch.tensor(told)

    return score


def _as_json(scores: Tensor | Scores) -> dict | list:
    if isinstance(scores, Tensor):
        return scores.tolist()
    parts, logged = ({name: x.tolist() for name, x in of.items()}
                     for of in (scores.parts, scores.logged))
    return {"total": scores.total.tolist(), "parts": parts,
            "token_rewards": scores.token_rewards, "logged": logged}


def _scores(told: dict) -> Scores:
    parts, logged = ({name: torch.tensor(x) for name, x in told[of].items()}
                     for of in ("parts", "logged"))
    return Scores(torch.tensor(told["total"]), parts, told["token_rewards"], logged)
