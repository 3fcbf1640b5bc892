"""Preferences as a reward model reads them: batches of pairs or ranked lists, with their losses.

An example is a `Pair` or a `Ranking`: a prompt and its responses, best first, with their ranks. A
batch holds the texts of N examples and has two methods: `loss`, from the scores of its texts to the
loss of each example, and `split`, from these scores to those of each example. So the loops that
train and evaluate are the same for pairs and lists.

Shapes: N examples, M texts of all of them, K responses of the longest list, P pairs, H heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minirlhf import streams
from minirlhf.data.batching import cut_by_tokens
from minirlhf.data.encoding import read_part
from minirlhf.data.examples import Pair
from minirlhf.data.rankings import Ranking
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.data.unpaired import Unpaired
from minirlhf.equations.masking import check_same_shape
from minirlhf.equations.preference import (
    bradley_terry_loss,
    plackett_luce_loss,
)
from minirlhf.errors import UserError
from minirlhf.models.alignment import pad_right
from minirlhf.models.config import ModelConfig

Example = Pair | Ranking
E = TypeVar("E", Pair, Ranking, Unpaired)
# chosen scores (P,), rejected (P,), margin (P,), probability (P,), label smoothing -> (P,)
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
LIST_LOSSES = ("plackett-luce", "pairs", "margins", "probabilities")
NEED_SCORES = ("margins", "probabilities")


# -------------------------------------------------------------------------------- examples as texts


def texts_of(example: Example) -> list[list[int]]:
    """Ids of each whole text, the best one first."""
    return [example.prompt_ids + response for response in example.responses]


def row_lengths(examples: list[E]) -> Tensor:
    """(N,) tokens of the longest text of each example."""
    return torch.tensor(
        [len(e.prompt_ids) + max(len(response) for response in e.responses) for e in examples]
    )


def kind_of(examples: list[E]) -> str:
    """What they are, in a word."""
    return {Pair: "pairs", Ranking: "lists", Unpaired: "responses"}[type(examples[0])]


def count_texts(examples: list[E]) -> Tensor:
    """(N,) texts of each example."""
    return torch.tensor([len(example.ranks) for example in examples])


def count_tokens(example: Example) -> int:
    """Tokens of all its texts, the prompt in each."""
    return sum(map(len, texts_of(example)))


def micro_batches(examples: list[E], max_tokens: int) -> list[Tensor]:
    """Index tensors that split examples into forward passes; the texts of each stay together."""
    counts = count_texts(examples)
    return cut_by_tokens(row_lengths(examples), len(examples), max_tokens, counts)


def text_numbers(examples: list[E], rows: list[int]) -> Tensor:
    """(M,) int64: which of the texts of all examples the rows of some examples' batch are."""
    counts = count_texts(examples)
    last = counts.cumsum(0)
    each = [torch.arange(last[i] - counts[i], last[i]) for i in rows]
    if isinstance(examples[0], Pair):  # all chosen texts lie before the rejected ones
        return torch.stack(each, 1).flatten()
    return torch.cat(each)


def unread_end(model: ModelConfig, tokenizer: Tokenizer) -> int | None:
    """The id that a reward model trained here does not read at the end of a text, or None: without
    a token to spare other tools pad with eos, and read the score before it."""
    before_eos = model.source.get("read_before_eos") or tokenizer.spare_pad_token() is None
    return tokenizer.eos_ids[0] if before_eos and tokenizer.eos_ids else None


def without_unread(example: E, unread: int) -> E:
    """The example without these ids at the end of its texts, for a model that reads before them."""
    stripped = [read_part(ids, unread) for ids in example.responses]
    if not (example.prompt_ids or all(stripped)):
        raise UserError(example.where, "a text of nothing but eos", "remove the row")
    if isinstance(example, Pair):
        return replace(example, chosen_ids=stripped[0], rejected_ids=stripped[1])
    return replace(example, responses=stripped)


def as_pairs(example: Example) -> list[Pair]:
    """All its pairs of responses of different rank, the better one chosen; their margin is the
    difference of the list's own scores, where it has any."""
    if isinstance(example, Pair):
        return [example]
    prompt, responses = example.prompt_ids, example.responses
    scores = example.scores or [0.0] * len(responses)
    return [
        Pair(prompt, responses[i], responses[j], scores[i] - scores[j], example.where,
             example.columns)
        for i, j in ordered(example.ranks)
    ]


def ordered(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Indices (better, worse) of all responses of different rank."""
    ranked = list(enumerate(ranks))
    return [(i, j) for i, rank in ranked for j, other in ranked if rank < other]


# ------------------------------------------------------------------------------- batches and losses


class PairBatch(NamedTuple):
    tokens: Tensor  # (2N, T) int64: N chosen rows, then N rejected rows
    lengths: Tensor  # (2N,)
    margin: Tensor  # (N,) float32
    chosen_probability: Tensor  # (N,) float32
    pair_loss: PairLoss = bradley_terry_loss

    def split(self, scores: Tensor) -> list[Tensor]:
        """(2N,) -> a (2,) for each pair, chosen first."""
        return list(torch.stack(scores.chunk(2), 1))

    def loss(self, scores: Tensor, label_smoothing: float = 0.0, center: float = 0.0) -> Tensor:
        """(2N,) scores -> (N,) losses."""
        chosen, rejected = scores.chunk(2)
        loss = loss_of_pairs(
            self.pair_loss, chosen, rejected, self.margin, self.chosen_probability, label_smoothing
        )
        return loss + center * (chosen + rejected).square() if center else loss  # 0 x inf is nan


class RankingBatch(NamedTuple):
    tokens: Tensor  # (M, T) int64, the texts of a list next to each other
    lengths: Tensor  # (M,)
    ranks: Tensor  # (N, K) int64
    mask: Tensor  # (N, K) bool, True = a response

    def split(self, scores: Tensor) -> list[Tensor]:
        """(M,) -> a (K,) for each list, without padding."""
        return list(scores.split(self.mask.sum(1).tolist()))

    def loss(self, scores: Tensor, label_smoothing: float = 0.0, center: float = 0.0) -> Tensor:
        """(M,) scores -> (N,) losses; of two responses what a pair's are.

        Raises:
            ValueError: label_smoothing is not 0: which of a list's orders is the flipped one?
        """
        if label_smoothing:
            raise ValueError(f"label_smoothing is {label_smoothing}: only pairs have a label")
        mask = self.mask.to(scores.device)
        table = torch.zeros_like(mask, dtype=scores.dtype).masked_scatter(mask, scores)  # (N, K)
        loss = plackett_luce_loss(table, self.ranks.to(scores.device), mask)
        return loss + centering(self.split(scores), center) if center else loss


class RankedPairsBatch(NamedTuple):
    """Lists as all their pairs, each text in the batch once. Ouyang et al. 2022
    (arXiv:2203.02155), eq. 1: pairs of one list are too alike to be examples of their own.
    """

    tokens: Tensor  # (M, T) int64, the texts of a list next to each other
    lengths: Tensor  # (M,)
    counts: list[int]  # N, texts of each list
    pairs: list[int]  # N, pairs of each list, at least one
    better: Tensor  # (P,) which of the M texts, the pairs of a list next to each other
    worse: Tensor  # (P,)
    margin: Tensor  # (P,) float32
    chosen_probability: Tensor  # (P,) float32
    pair_loss: PairLoss = bradley_terry_loss

    def split(self, scores: Tensor) -> list[Tensor]:
        """(M,) -> a (K,) for each list, without padding."""
        return list(scores.split(self.counts))

    def loss(self, scores: Tensor, label_smoothing: float = 0.0, center: float = 0.0) -> Tensor:
        """(M,) scores -> (N,) means over a list's pairs; of two responses what a pair's are."""
        better = scores.gather(0, self.better.to(scores.device))
        worse = scores.gather(0, self.worse.to(scores.device))
        losses = loss_of_pairs(
            self.pair_loss, better, worse, self.margin, self.chosen_probability, label_smoothing
        )
        loss = torch.stack([each.mean() for each in losses.split(self.pairs)])
        return loss + centering(self.split(scores), center) if center else loss


Batch = PairBatch | RankingBatch | RankedPairsBatch


def loss_of_pairs(
    pair_loss: PairLoss, chosen: Tensor, rejected: Tensor, margin: Tensor, probability: Tensor,
    label_smoothing: float,
) -> Tensor:
    """(P,) losses; refuses a pair_loss that gives anything else."""
    loss = pair_loss(chosen, rejected, margin.to(chosen), probability.to(chosen), label_smoothing)
    check_same_shape(chosen=chosen, pair_loss=loss)
    return loss


def centering(scores: list[Tensor], coefficient: float) -> Tensor:
    """(N,) coefficient (2 mean score)^2 of each list, of two texts what a pair's is."""
    return coefficient * (2 * torch.stack([each.mean() for each in scores])).square()


def collate_pairs(pairs: list[Pair], pair_loss: PairLoss = bradley_terry_loss) -> PairBatch:
    """Both sides in one batch, so that one forward pass scores them alike."""
    rows = [p.prompt_ids + p.chosen_ids for p in pairs]
    rows += [p.prompt_ids + p.rejected_ids for p in pairs]
    lengths = torch.tensor([len(row) for row in rows])
    margin = torch.tensor([p.margin for p in pairs])
    probability = torch.tensor([p.chosen_probability for p in pairs])
    return PairBatch(pad_right(rows), lengths, margin, probability, pair_loss)


def collate_rankings(
    rankings: list[Ranking], loss: str = "plackett-luce", pair_loss: PairLoss = bradley_terry_loss
) -> RankingBatch | RankedPairsBatch:
    """All responses in one batch, so that one forward pass scores them alike.

    Args:
        loss: what the batch's loss is, one of `LIST_LOSSES`.
            plackett-luce: the likelihood of the whole order (`plackett_luce_loss`).
            pairs: Bradley-Terry's of each pair of different rank.
            margins: the same, with the difference of the list's own scores as margin.
            probabilities: Bradley-Terry's of each pair, ties too, whose label is the probability
                sigmoid(difference of the list's own scores).
            Not all responses of a list may tie; such lists are dropped when they are read.
        pair_loss: of each pair, in the place of Bradley-Terry's.
    Raises:
        ValueError: margins or probabilities of a list without scores; a pair_loss where the loss
            is of the whole order.
    """
    rows = [text for ranking in rankings for text in texts_of(ranking)]
    tokens, lengths = pad_right(rows), torch.tensor([len(row) for row in rows])
    counts = count_texts(rankings)
    if loss == "plackett-luce":
        if pair_loss is not bradley_terry_loss:
            raise ValueError("pair_loss: plackett-luce is no loss of pairs; use list_loss pairs")
        ranks = pad_right([ranking.ranks for ranking in rankings])
        mask = torch.arange(ranks.shape[1]) < counts[:, None]
        return RankingBatch(tokens, lengths, ranks, mask)
    pairs, better, worse, gaps, start = [], [], [], [], 0
    for ranking in rankings:
        if loss in NEED_SCORES and ranking.scores is None:
            raise ValueError(f"{ranking.where} has no scores: {loss} needs them")
        # Of responses that tie a probability says something too: 1/2.
        places = range(len(ranking.ranks)) if loss == "probabilities" else ranking.ranks
        compared = ordered(places)
        pairs.append(len(compared))
        better += [start + i for i, _ in compared]
        worse += [start + j for _, j in compared]
        own = ranking.scores if loss in NEED_SCORES else [0.0] * len(ranking.ranks)
        gaps += [own[i] - own[j] for i, j in compared]
        start += len(ranking.ranks)
    gap = torch.tensor(gaps)
    margin = gap if loss == "margins" else torch.zeros_like(gap)
    probability = torch.sigmoid(gap) if loss == "probabilities" else torch.ones_like(gap)
    better, worse = torch.tensor(better), torch.tensor(worse)
    return RankedPairsBatch(
        tokens, lengths, counts.tolist(), pairs, better, worse, margin, probability, pair_loss
    )


def collate(
    examples: list[E], list_loss: str = "plackett-luce", pair_loss: PairLoss = bradley_terry_loss
) -> Batch:
    """The batch of whichever kind the examples are; the losses as in `collate_rankings`."""
    if isinstance(examples[0], Pair):
        return collate_pairs(examples, pair_loss)
    return collate_rankings(examples, list_loss, pair_loss)


def bootstrap_weights(seed: int, rows: Tensor, heads: int) -> Tensor:
    """How often each head meets each example: Poisson(1), independent of all others.

    Sampling N of N examples with replacement gives each a Binomial(N, 1/N) count, whose limit this
    is (Oza and Russell 2001, "Online bagging and boosting"); heads on one trunk that each see a
    bootstrap of their own: Osband et al. 2016 (arXiv:1602.04621). The mean is 1, so the expected
    loss is that of the data. A single head meets each example once.

    Args:
        rows: (N,) index of each example in the data; the weight is a function of it and the seed.
    Returns:
        (N, H) float64.
    """
    if heads == 1:
        return torch.ones(len(rows), 1, dtype=torch.float64)
    keys = streams.key(seed, "bootstrap", rows[:, None], torch.arange(heads))  # (N, H)
    below = torch.tensor([math.exp(-1) / math.factorial(n) for n in range(20)]).double().cumsum(0)
    return torch.searchsorted(below, streams.uniform(keys, 0), right=True).double()
