"""Sampling with a key-value cache: rows of different lengths, each with its own stop and its own
randomness, and the log-probs of the law that was actually sampled.

It knows ids, not text; only stop strings need a `decode` function.
Shapes: B rows, A rows still active, R longest response, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt, streams
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.models.alignment import pad_right
from minirlhf.models.cache import KVCache
from minirlhf.models.logprobs import widened
from minirlhf.models.support import RowSupport, Support
from minirlhf.models.transformer import CausalLM


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
        """Whether some tokens of the model's own law cannot be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def narrows(self) -> bool:
        """Whether `Generation.support` is more than all tokens."""
        return self.temperature > 0 and (self.truncates or self.min_new_tokens > 0)


class DecodeStep(NamedTuple):
    """One token for each row that was still active."""

    rows: Tensor  # (A,) int64, their numbers in the batch
    tokens: Tensor  # (A,) int64
    logprobs: Tensor  # (A,) nats, under the law sampled
    finish_reasons: list[str | None]  # eos | stop | length for the rows that end here
    support: Support | None = None  # of these A positions; None: every token could be drawn


class Generation(NamedTuple):
    tokens: Tensor  # (B, T) int64: prompt, response, padding of 0s
    prompt_lengths: Tensor  # (B,) int64
    response_mask: Tensor  # (B, R) bool: tokens that were sampled, eos included
    logprobs: Tensor  # (B, R) nats, of the law sampled, temperature and truncation included
    finish_reason: list[str]  # (B,) eos | stop | length
    support: RowSupport | None = None  # of the response tokens; None: every token could be drawn

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens of each row."""
        return self.prompt_lengths + self.response_mask.sum(1)

    def responses(self) -> list[list[int]]:
        """The sampled ids of each row."""
        starts, ends = self.prompt_lengths.tolist(), self.lengths.tolist()
        return [r[s:e].tolist() for r, s, e in zip(self.tokens, starts, ends, strict=True)]


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it: what reward functions see."""
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(found)] if found else text


def sampling_law(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, banned: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the law that is sampled, (A, V) float32; -inf where it has no mass.

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
        law = torch.full_like(logits, -torch.inf)
        return law.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
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


def support_of(law: Tensor, sampling: Sampling) -> Support | None:
    """Which tokens an (A, V) law left to be drawn; where it took only a few away, which it took."""
    if not sampling.narrows:
        return None
    banned = not sampling.truncates
    listed = (law > -torch.inf) != banned
    return Support(listed.nonzero()[:, 1].int(), listed.sum(1), banned)


def draw(law: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    """Inverse-CDF sampling, one uniform a row: the first token whose cumulative mass exceeds it.

    Args:
        law: (A, V) log-probabilities.
        keys: (A,) int64, one a row.
        t: (A,) int64, how many tokens the row has already drawn.
    Returns:
        (A,) int64 ids, each with positive mass.
    """
    cumulative = law.exp().cumsum(-1)
    total = cumulative[:, -1:].contiguous()  # rounding may leave it off 1: it scales the uniform
    u = streams.uniform(keys, t)[:, None].to(cumulative) * total
    drawn = torch.searchsorted(cumulative, u, right=True)  # right: u = 0 skips massless tokens
    last = torch.searchsorted(cumulative, total)  # first to reach the total: it has mass
    return torch.minimum(drawn, last)[:, 0]


@torch.no_grad()
def decode_steps(
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    keys: Tensor,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[DecodeStep]:
    """Yields one token a step for every row that has not ended; ended rows leave the batch.

    Args:
        lm: the model; its parameters decide dtype and device.
        prompts: B lists of ids, each at least one long (a BOS where the text is empty).
        sampling: how to draw.
        eos_ids: any of these ends its row; it is yielded first.
        keys: (B,) int64, one a row. A row's tokens depend on its prompt and key, not on its batch.
        decode: ids -> text; needed for stop strings only.
    Raises:
        ValueError: an empty prompt, rows beyond the model's positions, keys of another shape.
        UserError: logits that are not finite (exit code 3).
        Stopped: a signal asked the run to stop.
    """
    _check(lm, prompts, sampling, keys, decode)
    device = lm.unembedding.device
    rows = torch.arange(len(prompts), device=device)
    keys = keys.to(device)
    # Each prompt is read once, however many rows continue it.
    distinct = {tuple(prompt): None for prompt in prompts}
    place = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    tokens = pad_right(list(distinct)).to(device)
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
    capacity = tokens.shape[1] + sampling.max_new_tokens
    cache = KVCache(lm.config, len(distinct), capacity, lm.unembedding)
    hidden = lm(tokens, cache)
    hidden = hidden[source, lengths[source] - 1]  # (A, D)
    cache.hold(lengths)
    if len(distinct) < len(prompts):
        cache.repeat(source)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), lm.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
    texts: list[list[int]] = [[] for _ in prompts]  # ids of each response, for stop strings
    for t in range(sampling.max_new_tokens):
        interrupt.check()
        logits = lm.logits(hidden[:, None])[:, 0]
        law = sampling_law(logits, sampling, seen, ends if t < sampling.min_new_tokens else None)
        # A greedy law is finite whatever the logits are; another may overflow where they do not.
        if not torch.isfinite(logits.amax(-1) + law.amax(-1)).all():
            raise UserError(
                f"sampled token {t + 1}",
                "the model's logits are not finite",
                "the weights have diverged: lower the learning rate",
                NON_FINITE,
            )
        drawn = draw(law, keys, torch.tensor(t, device=device).expand(len(rows)))  # (A,)
        logprobs = law.gather(-1, drawn[:, None])[:, 0]
        told = torch.stack((rows, drawn, torch.isin(drawn, ends).long())).tolist()
        reasons: list[str | None] = []
        for row, token, is_eos in zip(*told, strict=True):
            reason = "eos" if is_eos else None
            if reason is None and sampling.stop_strings:
                texts[row].append(token)
                reason = "stop" if _stops(texts[row], sampling.stop_strings, decode) else None
            if reason is None and t + 1 == sampling.max_new_tokens:
                reason = "length"
            reasons.append(reason)
        yield DecodeStep(rows, drawn, logprobs, reasons, support_of(law, sampling))
        going = torch.tensor([i for i, r in enumerate(reasons) if r is None], device=device)
        if len(going) == 0:
            return
        if len(going) < len(rows):
            rows, keys, drawn = rows[going], keys[going], drawn[going]
            cache.keep(going)
            seen = None if seen is None else seen[going]
        if seen is not None:
            seen[torch.arange(len(rows), device=device), drawn] = True
        hidden = lm(drawn[:, None], cache)[:, 0]
        cache.grow()


def _check(lm, prompts, sampling, keys, decode) -> None:
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty: start it with a BOS, or leave it out")
    if keys.shape != (len(prompts),) or keys.dtype != torch.int64:
        raise ValueError(
            f"keys is {tuple(keys.shape)} {keys.dtype}: give one int64 a prompt, ({len(prompts)},)"
        )
    longest = max(len(p) for p in prompts)
    # The last token is sampled, not read: it needs no position of its own.
    if longest + sampling.max_new_tokens - 1 > lm.config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the "
            f"model's {lm.config.max_positions} positions: shorten one of them"
        )
    lm.model.check_length(longest + sampling.max_new_tokens - 1)
    if sampling.stop_strings and decode is None:
        raise ValueError("stop_strings need decode=: a function from ids to text")


def _stops(ids: list[int], stop_strings: Sequence[str], decode: Callable[[list[int]], str]) -> bool:
    """Whether the newest token completes a stop string: then it begins in the last few tokens."""
    # A character may take four byte-level tokens, and some tokens decode to nothing.
    tail = decode(ids[-(4 * max(map(len, stop_strings)) + 8) :])
    return any(stop in tail for stop in stop_strings)


def generate(
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    keys: Tensor,
    decode: Callable[[list[int]], str] | None = None,
) -> Generation:
    """Collects `decode_steps` (same arguments, same errors) into left-aligned rows.

    No step is kept but written down: small tensors that stay, between the temporary ones that grow
    with the length, would leave holes in the heap that nothing fits into.
    """
    _check(lm, prompts, sampling, keys, decode)  # before tokens of such a size are made
    B, most, width = len(prompts), sampling.max_new_tokens, max(map(len, prompts))
    device, R = keys.device, 0
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.zeros(B, most, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, most, dtype=widened(lm.unembedding.dtype), device=device)
    tokens = torch.zeros(B, width + most, dtype=torch.int64, device=device)
    tokens[:, :width] = pad_right(prompts).to(device)
    reasons = ["length"] * B
    supports: list[tuple[Tensor, Support]] = []  # (rows, of their tokens), a step each
    for t, step in enumerate(decode_steps(lm, prompts, sampling, eos_ids, keys, decode)):
        R, rows = t + 1, step.rows.to(device)
        mask[rows, t] = True
        logprobs[rows, t] = step.logprobs.to(device)
        tokens[rows, prompt_lengths[rows] + t] = step.tokens.to(device)
        for row, reason in zip(rows.tolist(), step.finish_reasons, strict=True):
            reasons[row] = reason or reasons[row]
        if step.support is not None:
            supports.append((rows, step.support))
    mask, logprobs = mask[:, :R].contiguous(), logprobs[:, :R].contiguous()
    longest = int((prompt_lengths + mask.sum(1)).max())
    tokens, support = tokens[:, :longest].contiguous(), _collect_support(supports, mask)
    return Generation(tokens, prompt_lengths, mask, logprobs, reasons, support)


def _collect_support(supports: list[tuple[Tensor, Support]], mask: Tensor) -> RowSupport | None:
    """The supports of all steps, row by row; None where every token could be drawn."""
    if not supports:
        return None
    ids: list[list[Tensor]] = [[] for _ in mask]
    counts = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    for t, (rows, support) in enumerate(supports):
        counts[rows, t] = support.counts.to(mask.device)
        parts = support.ids.split(support.counts.tolist())
        for row, part in zip(rows.tolist(), parts, strict=True):
            ids[row].append(part)
    return RowSupport([torch.cat(row) for row in ids], counts, supports[0][1].banned)
