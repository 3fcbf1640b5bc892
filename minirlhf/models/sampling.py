"""The distribution that a token is drawn from, and the draw.

Shapes: A rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf import streams
from minirlhf.models.support import Support


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens; the defaults draw from the model itself.

    The order is Hugging Face's: repetition penalty, minimum length, temperature, top-k, top-p,
    min-p.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens whose mass reaches p (arXiv:1904.09751)
    min_p: float = 0.0  # keep tokens at least this fraction of the best (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # of tokens already in the row (arXiv:1909.05858, sec. 4.1)
    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0  # no eos can be drawn before so many

    def __post_init__(self):
        legal = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"at least 0 and at most max_new_tokens, {self.max_new_tokens}",
            ),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "stop_strings": (
                not isinstance(self.stop_strings, str) and all(self.stop_strings),
                "a tuple of non-empty strings",
            ),
        }
        for name, (ok, rule) in legal.items():
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be {rule}")

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p leave out tokens of the model's own distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def narrows(self) -> bool:
        """Whether `Generation.support` is more than all tokens."""
        return self.temperature > 0 and (self.truncates or self.min_new_tokens > 0)


def sampling_distribution(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, banned: Tensor | None = None
) -> Tensor:
    """The distribution that is sampled, in log-probs (A, V) float32; -inf where it has no mass.

    Args:
        logits: (A, V).
        sampling: temperature 0 puts all mass on the first of the largest logits.
        seen: (A, V) bool, tokens already in the row; needed for a repetition penalty only.
        banned: ids that cannot be drawn: eos in a response that is still too short.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if banned is not None:
        logits = logits.index_fill(-1, banned, -torch.inf)
    if sampling.temperature == 0:
        none = torch.full_like(logits, -torch.inf)
        return none.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass  # of the tokens that are more probable
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, order, before >= sampling.top_p
        )
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0:
        logprobs = logits.log_softmax(-1)
        least = logprobs.max(-1, keepdim=True).values + torch.tensor(sampling.min_p).log()
        logits = logits.masked_fill(logprobs < least, -torch.inf)
    return logits.log_softmax(-1)


def left_of(distribution: Tensor, sampling: Sampling) -> Tensor:
    """(A,) how many tokens could be drawn from log-probs (A, V), where `support_of` asks for that
    on another device than the CPU; elsewhere 0."""
    if sampling.truncates and sampling.narrows and not distribution.is_cpu:
        return (distribution > -torch.inf).sum(1)
    return torch.zeros(len(distribution), dtype=torch.int64, device=distribution.device)


def support_of(
    distribution: Tensor, sampling: Sampling, banned: Tensor | None = None, left: int | None = None
) -> Support | None:
    """Which tokens could be drawn from log-probs (A, V); None: all of them, or greedily one.

    Args:
        banned: (M,) int64, the ids that all rows lack, ascending.
        left: sum of `left_of`, if known: a GPU's host need not wait then to know a size.
    """
    if not sampling.narrows:
        return None
    if not sampling.truncates:  # then an eos or a few are missing: they make the shorter list
        rows, device = len(distribution), distribution.device
        ids = torch.empty(0, device=device) if banned is None else banned
        counts = torch.full((rows,), len(ids), device=device)
        return Support(ids.int().repeat(rows), counts, banned=True)
    listed = distribution > -torch.inf
    # On a CPU, where nothing waits, the second takes longer.
    waits = left is None or distribution.is_cpu
    cells = listed.nonzero() if waits else torch.nonzero_static(listed, size=left)
    return Support(cells[:, 1].int(), listed.sum(1))


def draw(distribution: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    """Inverse-CDF sampling, one uniform a row: the first token whose cumulative mass exceeds it.

    Args:
        distribution: (A, V) log-probs.
        keys: (A,) int64, one a row.
        t: (A,) int64, how many tokens the row has already drawn.
    Returns:
        (A,) int64 ids, each with positive mass; of NaN any ids.
    """
    cumulative = distribution.exp().cumsum_(-1)
    total = cumulative[:, -1:].contiguous()  # rounding may leave it off 1: it scales the uniform
    u = streams.uniform(keys, t, cumulative.dtype)[:, None] * total
    drawn = torch.searchsorted(cumulative, u, right=True)  # right: u = 0 skips massless tokens
    last = torch.searchsorted(cumulative, total)  # first to reach the total: it has mass
    return torch.minimum(drawn, last)[:, 0].clamp(max=distribution.shape[-1] - 1)


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it: what reward functions see."""
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(found)] if found else text
