"""Reference log-probs that are computed once and kept, so that the reference can leave memory.

They are found by content: the weights of the reference, and all ids of the micro-batch. A row's
log-probs differ in their last bits with the shape of its batch, so what is kept are the
micro-batches of every step to come, which the seed decides, and not the rows. Then a policy learns
the same bits from kept log-probs as from those that are computed at each step.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.demonstrations import TextBatch
from minirlhf.batches.responses import Reference
from minirlhf.rewards.journal import Journal
from minirlhf.run import optim


class KeptReference:
    """A reference whose log-probs are looked up; call it as one.

    Args:
        path: `reference.jsonl`, which is added to as log-probs come; read when first asked.
        model: names the reference's weights and the format of its numbers.
    """

    def __init__(self, path: Path, model: str):
        self.journal = Journal(path, "log-prob of the reference")
        self.model = model

    def __call__(self, texts: TextBatch) -> Tensor:
        """(M,) nats, float64, which holds each number to its last bit."""
        scores = self.journal.scores
        return torch.tensor([scores[key] for key in self.keys(texts)], dtype=torch.float64)

    def keys(self, texts: TextBatch) -> list[str]:
        """One of each row; all of them know the whole micro-batch."""
        content = hashlib.sha256(self.model.encode())
        for tensor in (texts.tokens, texts.starts, texts.target_mask):
            content.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return [f"{content.hexdigest()}:{row}" for row in range(len(texts.tokens))]

    def missing(self, batches: Iterable[TextBatch]) -> Iterator[TextBatch]:
        """Those that are not known whole."""
        for texts in batches:
            if not all(key in self.journal.scores for key in self.keys(texts)):
                yield texts

    def add(self, texts: TextBatch, ref: Reference) -> None:
        """Computes a micro-batch and keeps it; on disk before it is used.

        Raises:
            UserError: a log-prob is not finite (exit code 3).
        """
        interrupt.check()
        found = dict(zip(self.keys(texts), ref(texts).tolist(), strict=True))
        for value in found.values():
            optim.check_finite("the reference", {"log-prob of a response": value})
        known = self.journal.scores  # some of its rows may be, after a kill
        self.journal.add({key: value for key, value in found.items() if key not in known})
