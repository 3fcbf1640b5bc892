"""A tiny reward model, five pairs and three ranked lists, for the tests of reward training."""

import torch

from minirlhf.data.examples import Pair
from minirlhf.data.rankings import Ranking
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.run.checkpoint import TrainState
from minirlhf.setup.reward_settings import RewardConfig
from tests.tiny_folders import random_lm

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48,
}
V = 11


def pair(prompt, chosen, rejected, margin=0.0, where="t:1", **columns) -> Pair:
    return Pair(prompt, chosen, rejected, margin, where, columns)


PAIRS = [
    pair([1, 2], [3, 4, 5], [6], 0.5, "t:1"),
    pair([], [7, 8], [9, 10, 1], 0.0, "t:2"),
    pair([3], [4], [5, 6, 7, 8, 9, 10, 1], 1.5, "t:3"),
    pair([2, 2, 2], [1], [2], 0.25, "t:4"),
    pair([9], [8, 7], [6, 5], 0.0, "t:5"),
]


def ranking(prompt, responses, ranks=None, where="t:1", scores=None, **columns) -> Ranking:
    ranks = ranks or [*range(1, len(responses) + 1)]
    return Ranking(prompt, responses, ranks, where, columns, scores)


LISTS = [
    ranking([1], [[9], [7, 5], [3], [4, 2]], where="t:1"),  # last ids 9 5 3 2: in order
    ranking([2], [[1, 2], [8], [6]], [1, 2, 2], where="t:2"),  # 2, then 8 and 6: the best is last
    ranking([], [[3, 4, 5, 7], [4, 6]], where="t:3"),  # 7 6
]


def tiny_model(dtype=torch.float64, heads=1, lcb_coef=0.0) -> RewardModel:
    model = RewardModel(random_lm(TINY, vocab_size=V), heads=heads, lcb_coef=lcb_coef)
    return initialize_score(model, *[torch.Generator().manual_seed(1)] * heads).to(dtype)


def config_of(**changes) -> RewardConfig:
    return RewardConfig(**{"batch_size": 2, "learning_rate": 0.01, **changes})


def state_of(model: RewardModel) -> TrainState:
    return TrainState(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0))


def weights(model) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


def scored_by_last_token(model: RewardModel) -> RewardModel:
    """A stand-in whose score is the id of a row's last token, so that scores can be read off."""

    def last_ids(tokens, lengths, dropout=None):
        ids = tokens.gather(1, lengths[:, None] - 1)[:, 0]
        return ids[:, None] + 0 * model.score.weight.sum()  # with a gradient, of 0

    model.head_scores = last_ids
    return model
