"""Preferences as a policy learns them: whole responses with their log-probs, in pairs or single.

A batch holds the texts of N examples, pairs or ranked lists, each text once, so that one forward
pass reads them alike. A list counts as all its pairs of different rank, which share its weight:
they are too alike to be examples of their own (Ouyang et al. 2022, arXiv:2203.02155, sec. 3.5).

A row's log-probs differ in their last bits with the shape of its batch. So the reference is passed
on the very micro-batches on which the policy is trained: where both have the same weights, each
log-ratio is exactly 0.

KTO compares single responses with how far the policy is from the reference on responses that do not
belong to their prompts; `mismatched` makes these of a batch.

Shapes: N examples, M texts of all of them, P pairs, R response tokens of the longest.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.demonstrations import TextBatch, collate_texts, first_target, target_stats
from minirlhf.batches.preferences import micro_batches, ordered
from minirlhf.data.examples import Pair, Text
from minirlhf.data.rankings import Ranking
from minirlhf.data.unpaired import Unpaired
from minirlhf.equations.dpo import DPOLoss, kto_loss
from minirlhf.errors import UserError
from minirlhf.models.alignment import unpack
from minirlhf.models.dropout import Dropout
from minirlhf.models.transformer import CausalLM

Example = Pair | Ranking | Unpaired
# (P,) log-probs of chosen and rejected under the policy, then under the reference -> their losses
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], DPOLoss]
Reference = Callable[[TextBatch], Tensor]  # texts of a micro-batch -> (M,) log-probs


class Responses(NamedTuple):
    """M responses under one model."""

    logprobs: Tensor  # (M,) nats, summed over a response's tokens
    tokens: Tensor  # (M,) of each response, its eos included
    entropy: Tensor  # (M,) nats, summed likewise, without gradient


def with_answers(example: Example) -> Example:
    """The example itself; one with a response that has no token to learn is refused."""
    for text in texts_of(example):
        if len(text.ids) <= first_target(text):
            raise UserError(example.where, "has a response without tokens", "remove the row")
    return example


def texts_of(example: Example) -> list[Text]:
    """Each response behind its prompt, the best one first."""
    prompt, where = example.prompt_ids, example.where
    return [Text(prompt + ids, len(prompt), where, {}) for ids in example.responses]


def response_stats(lm: CausalLM, texts: TextBatch, dropout: Dropout | None = None) -> Responses:
    """Log-probs of M responses; no logits of other tokens are made."""
    mask = texts.target_mask.to(lm.unembedding.device)  # (M, R)
    stats = target_stats(lm, texts, dropout)
    entropy = unpack(stats.entropy.detach(), mask).sum(1)
    return Responses(unpack(stats.logprobs, mask).sum(1), mask.sum(1), entropy)


# -------------------------------------------------------------------------------------- reference


@torch.no_grad()
def ref_logprobs(ref: CausalLM, texts: TextBatch) -> Tensor:
    """(M,) nats, of each response under a frozen model."""
    return response_stats(ref, texts).logprobs


# ---------------------------------------------------------------------------------------- batches


class PairObjective(NamedTuple):
    """What is minimised: the mean over examples of the mean of `pair_loss` over their pairs."""

    pair_loss: PairLoss
    of_means: bool = False  # pair_loss is given means over a response's tokens, not sums
    weight: float = 1.0  # of pair_loss
    sft_coef: float = 0.0  # weight of -mean log policy(token) of the chosen response


class KTOObjective(NamedTuple):
    """What is minimised: the mean over single responses of `kto_loss`."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sft_coef: float = 0.0  # weight of -mean log policy(token) of a desirable response
    kl: Tensor | None = None  # (N,) nats, of the whole step: see `mismatched`


Objective = PairObjective | KTOObjective


class Outcome(NamedTuple):
    """What is told of P pairs, without gradient; or of single responses, of which the desirable
    ones stand as chosen and the others as rejected."""

    chosen_rewards: Tensor  # (P,)
    rejected_rewards: Tensor  # (P,)
    chosen_logprobs: Tensor  # (P,) nats, summed over a response's tokens
    rejected_logprobs: Tensor  # (P,)
    nll: Tensor  # (P,) nats a token of the chosen response
    entropy: Tensor  # (M,) nats, summed over a response's tokens
    tokens: Tensor  # (M,)
    kl: Tensor  # (1,) nats, what KTO's rewards are compared with; (0,) of pairs


class PairsBatch(NamedTuple):
    texts: TextBatch  # M of them
    chosen: Tensor  # (P,) which of them
    rejected: Tensor  # (P,)
    share: Tensor  # (P,) of each pair in its example
    pairs: list[int]  # N, pairs of each example

    def sizes(self) -> tuple[list[int], list[int]]:
        """How many chosen and how many rejected rewards each example has in its outcome."""
        return self.pairs, self.pairs

    def losses(
        self, policy: Responses, ref: Tensor | None, objective: PairObjective
    ) -> tuple[Tensor, Outcome]:
        """The loss of each pair times its share, (P,): their sum is that of the N examples.

        Args:
            ref: (M,) log-probs under the reference; None where the objective has none.
        """
        chosen, rejected = (index.to(policy.logprobs.device) for index in self[1:3])
        means = policy.logprobs / policy.tokens
        ours = means if objective.of_means else policy.logprobs
        theirs = torch.zeros_like(ours) if ref is None else ref.to(ours)
        theirs = theirs / policy.tokens if objective.of_means else theirs
        sides = [x.gather(0, side) for x in (ours, theirs) for side in (chosen, rejected)]
        found = objective.pair_loss(*sides)
        nll = -means.gather(0, chosen)
        loss = objective.weight * found.loss
        if objective.sft_coef:
            loss = loss + objective.sft_coef * nll
        sums = policy.logprobs.detach()
        told = Outcome(
            found.chosen_rewards, found.rejected_rewards, sums.gather(0, chosen),
            sums.gather(0, rejected), nll.detach(), policy.entropy, policy.tokens, sums[:0],
        )
        return loss * self.share.to(loss), told


class UnpairedBatch(NamedTuple):
    texts: TextBatch  # N of them
    desirable: Tensor  # (N,) bool

    def sizes(self) -> tuple[list[int], list[int]]:
        """How many chosen and how many rejected rewards each example has in its outcome."""
        return self.desirable.int().tolist(), (~self.desirable).int().tolist()

    def losses(
        self, policy: Responses, ref: Tensor, objective: KTOObjective
    ) -> tuple[Tensor, Outcome]:
        """(N,) losses; arguments as in `PairsBatch`, objective.kl of the whole step."""
        good = self.desirable.to(policy.logprobs.device)
        found = kto_loss(
            policy.logprobs, ref.to(policy.logprobs), good, objective.kl, objective.beta,
            objective.desirable_weight, objective.undesirable_weight,
        )
        loss, nll = found.loss, -policy.logprobs / policy.tokens
        if objective.sft_coef:
            loss = loss + objective.sft_coef * torch.where(good, nll, 0)
        sums, rewards = policy.logprobs.detach(), found.rewards
        return loss, Outcome(
            rewards[good], rewards[~good], sums[good], sums[~good], nll.detach()[good],
            policy.entropy, policy.tokens, found.kl[None],
        )


def collate_answers(examples: list[Example]) -> PairsBatch | UnpairedBatch:
    """Of pairs the N chosen texts, then the N rejected ones; of lists each one's texts in turn."""
    N = len(examples)
    if isinstance(examples[0], Unpaired):
        texts = collate_texts([text for example in examples for text in texts_of(example)])
        return UnpairedBatch(texts, torch.tensor([example.desirable for example in examples]))
    if isinstance(examples[0], Pair):
        both = [texts_of(pair) for pair in examples]
        texts = collate_texts([text for side in zip(*both, strict=True) for text in side])
        index = torch.arange(2 * N)
        return PairsBatch(texts, index[:N], index[N:], torch.ones(N), [1] * N)
    texts, chosen, rejected, share, pairs = [], [], [], [], []
    for example in examples:
        compared = ordered(example.ranks)
        chosen += [len(texts) + i for i, _ in compared]
        rejected += [len(texts) + j for _, j in compared]
        share += [1 / len(compared)] * len(compared)
        pairs.append(len(compared))
        texts += texts_of(example)
    index = (torch.tensor(side) for side in (chosen, rejected))
    return PairsBatch(collate_texts(texts), *index, torch.tensor(share, dtype=torch.float64), pairs)


def batches_of(
    examples: list[Example], max_tokens: int
) -> Iterator[tuple[list[int], PairsBatch | UnpairedBatch]]:
    """Examples in micro-batches, and which of them each one holds: in training, in evaluation and
    where the reference is passed alone they are the same."""
    for part in micro_batches(examples, max_tokens):
        rows = part.tolist()
        yield rows, collate_answers([examples[i] for i in rows])


# ---------------------------------------------------------------------------------- the KL of KTO


def mismatched(examples: list[Unpaired], longest: int) -> list[Unpaired]:
    """The responses of a batch, each under the next prompt of the batch that is another one.

    Their log-ratios estimate how far the policy is from the reference whatever it is asked: a
    response to its own prompt would tell of its label as well. Ethayarajh et al. 2024
    (arXiv:2402.01306), sec. 4.2. The batch is that of the whole optimizer step. A prompt with which
    the row would be longer than `longest` is passed over; where none is left, the response keeps
    its own.

    Args:
        longest: tokens of the longest row that the models read, as that of the data.
    """
    if len({tuple(example.prompt_ids) for example in examples}) == 1:
        return examples  # without a search of N² steps
    found, N = [], len(examples)
    for at, example in enumerate(examples):
        room = longest - len(example.response_ids)
        others = (examples[(at + step) % N].prompt_ids for step in range(1, N))
        fits = (ids for ids in others if ids != example.prompt_ids and 0 < len(ids) <= room)
        found.append(replace(example, prompt_ids=next(fits, example.prompt_ids)))
    return found


@torch.no_grad()
def mismatched_ratios(
    lm: CausalLM, examples: list[Unpaired], ref: Reference, longest: int, max_tokens: int
) -> Tensor:
    """(N,) nats: log policy - log reference of each `mismatched` response of an optimizer step."""
    others = mismatched(examples, longest)
    ratios = []
    for _, batch in batches_of(others, max_tokens):
        interrupt.check()
        policy = response_stats(lm, batch.texts).logprobs
        ratios.append(policy - ref(batch.texts).to(policy))
    return torch.cat(ratios)
