"""The language-model loss of texts: which tokens count, and their log-probs.

Shapes: B texts, T tokens of the longest, R targets of the text with most, n targets in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.batching import cut_by_tokens, next_rows
from minirlhf.data.examples import Text
from minirlhf.errors import UserError
from minirlhf.models.alignment import pad_right, response_states, unpack
from minirlhf.models.dropout import Dropout
from minirlhf.models.logprobs import TokenStats, token_logprobs
from minirlhf.models.parallel import accumulated, over_ranks
from minirlhf.models.transformer import CausalLM


class TextBatch(NamedTuple):
    tokens: Tensor  # (B, T) int64
    starts: Tensor  # (B,) index of the first target, at least 1
    targets: Tensor  # (B, R) int64
    target_mask: Tensor  # (B, R) bool; False behind a text's end, and in its gaps
    lengths: Tensor  # (B,) tokens of each text


def first_target(text: Text) -> int:
    """Index of the first token that counts: nothing stands before token 0 that could predict it."""
    return max(text.prompt_length, 1)


def collate_texts(texts: list[Text]) -> TextBatch:
    starts = torch.tensor([first_target(text) for text in texts])
    targets = [text.ids[first_target(text) :] for text in texts]
    counts = torch.tensor([len(ids) for ids in targets])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    for row, text in zip(mask, texts, strict=True):
        for first, end in text.gaps:
            row[text.prompt_length + first - first_target(text) :][: end - first] = False
    lengths = torch.tensor([len(text.ids) for text in texts])
    return TextBatch(
        pad_right([text.ids for text in texts]), starts, pad_right(targets), mask, lengths
    )


def with_target(text: Text) -> Text:
    """The text itself; one without a target is refused."""
    if not count_targets(text):
        raise UserError(text.where, "has no token after the first", "remove the row")
    return text


def count_targets(text: Text) -> int:
    return len(text.ids) - first_target(text) - sum(end - first for first, end in text.gaps)


def count_tokens(texts: list[Text]) -> tuple[Tensor, Tensor]:
    """Tokens of each text and targets among them, (N,) each; a text without a target is refused."""
    texts = list(map(with_target, texts))
    lengths = torch.tensor([len(text.ids) for text in texts])
    return lengths, torch.tensor(list(map(count_targets, texts)))


def target_stats(
    lm: CausalLM, batch: TextBatch, dropout: Dropout | None = None
) -> TokenStats:
    """Log-probs and entropies of the targets of all rows, (n,) each; no logits of other tokens."""
    batch = TextBatch(*(x.to(lm.unembedding.device) for x in batch))
    return TokenStats(*(x[batch.target_mask] for x in text_pass(lm, batch, dropout)))


@over_ranks
def text_pass(lm: CausalLM, batch: TextBatch, dropout: Dropout | None) -> TokenStats:
    """One forward pass: log-probs and entropies of the targets, (B, R) each, 0 elsewhere."""
    tokens, starts, targets, mask, lengths = batch
    hidden = lm(tokens, lengths=lengths, dropout=dropout)
    states = response_states(hidden, starts, targets.shape[1])  # (B, R, D)
    return TokenStats(*(unpack(x, mask) for x in token_logprobs(lm, states[mask], targets[mask])))


class TextMix(NamedTuple):
    """The language-model loss of texts, mixed into each update of a policy, so that it does not
    forget them. Ouyang et al. 2022 (arXiv:2203.02155), eq. 2, PPO-ptx."""

    texts: list[Text]
    coef: float  # weight of the loss, which is a mean over target tokens
    batch_size: int  # texts an update
    micro_batch_tokens: int
    seed: int  # of their order

    def backward(self, lm: CausalLM, update: int) -> float:
        """Adds the weighted loss's gradient over the texts of the update-th update (from 0).

        Returns:
            The loss before its weight, nats a target.
        """
        first, total = update * self.batch_size, len(self.texts)
        rows = next_rows(first, self.batch_size, total, self.seed, "text order")
        batch = [self.texts[i] for i in rows.tolist()]
        lengths, counts = count_tokens(batch)
        summed = 0.0
        parts = cut_by_tokens(lengths, len(batch), self.micro_batch_tokens)
        for part in accumulated(lm, parts):
            stats = target_stats(lm, collate_texts([batch[i] for i in part.tolist()]))
            loss = -stats.logprobs.sum() / int(counts.sum())
            (self.coef * loss).backward()
            summed += float(loss.detach())
        return summed
