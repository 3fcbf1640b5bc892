"""Sampling with a key-value cache. Rows differ in length, end each by itself, and draw each from
randomness of its own. The log-probs are those of the distribution that was sampled.

It knows ids, not text; only stop strings need a `decode` function.
Shapes: B rows, A rows still active, R longest response, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.console import progress
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.models.alignment import pad_right
from minirlhf.models.cache import KVCache
from minirlhf.models.compiled_decoding import StaticCache
from minirlhf.models.logprobs import widened
from minirlhf.models.sampling import (
    Sampling,
    draw,
    left_of,
    sampling_distribution,
    support_of,
)
from minirlhf.models.support import RowSupport, Support
from minirlhf.models.transformer import CausalLM


class DecodeStep(NamedTuple):
    """One token for each row that was still active."""

    rows: Tensor  # (A,) int64, their numbers in the batch
    tokens: Tensor  # (A,) int64
    logprobs: Tensor  # (A,) nats, of the distribution that was sampled
    finish_reasons: list[str | None]  # eos | stop | length for the rows that end here
    support: Support | None = None  # of these A positions; None: every token could be drawn


class Generation(NamedTuple):
    tokens: Tensor  # (B, T) int64: prompt, response, padding of 0s
    prompt_lengths: Tensor  # (B,) int64
    response_mask: Tensor  # (B, R) bool: tokens that were sampled, eos included
    logprobs: Tensor  # (B, R) nats, of the distribution that was sampled
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


@torch.no_grad()
def decode_steps(
    lm: CausalLM, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: Sequence[int],
    keys: Tensor, decode: Callable[[list[int], list[int]], str] | None = None,
) -> Iterator[DecodeStep]:
    """Yields one token a step for every row that has not ended; ended rows leave the batch.

    Args:
        lm: the model; its parameters decide dtype and device.
        prompts: B lists of ids, each at least one long (a BOS where the text is empty).
        sampling: how to draw.
        eos_ids: any of these ends its row; it is yielded first.
        keys: (B,) int64, one a row. A row's tokens depend on its prompt and key, not on its batch.
        decode: (ids, further ids) -> text of the further ones; needed for stop strings only.
    Raises:
        ValueError: an empty prompt, rows beyond the model's positions, keys of another shape.
        UserError: logits that are not finite (exit code 3).
        Stopped: a signal asked the run to stop.
    """
    _check(lm, prompts, sampling, keys, decode)
    device = lm.unembedding.device
    numbers = list(range(len(prompts)))  # of the active rows, here and on the device
    rows, keys = torch.tensor(numbers, device=device), keys.to(device)
    hidden, cache = _read_prompts(lm, prompts, sampling.max_new_tokens)
    seen = _tokens_seen(lm, prompts) if sampling.repetition_penalty != 1.0 else None
    eos = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=device)
    ends = _Ends(sampling, prompts, decode)
    for t in range(sampling.max_new_tokens):
        interrupt.check()
        logits = lm.logits(hidden[:, None])[:, 0]  # (A, V)
        banned = eos if t < sampling.min_new_tokens else None
        distribution = sampling_distribution(logits, sampling, seen, banned)
        drawn = draw(distribution, keys, torch.full((len(rows),), t, device=device))  # (A,)
        logprobs = distribution.gather(-1, drawn[:, None])[:, 0]
        # A greedy one is finite whatever the logits are; another may overflow where they do not. A
        # logit that is not finite makes all of its row's log-probs NaN, or is the largest.
        finite = torch.isfinite(logits.gather(-1, drawn[:, None])[:, 0] + logprobs)
        # All that is decided here of a step, at once: reading it makes a GPU's host wait.
        parts = drawn, torch.isin(drawn, eos), finite, left_of(distribution, sampling)
        ids, is_eos, is_finite, left = torch.stack([x.long() for x in parts]).tolist()
        if not all(is_finite):
            do = "the weights have diverged: lower the learning rate"
            what = "the model's logits are not finite"
            raise UserError(f"sampled token {t + 1}", what, do, NON_FINITE)
        reasons = ends.reasons(numbers, ids, is_eos, t + 1)
        support = support_of(distribution, sampling, banned, sum(left))
        yield DecodeStep(rows, drawn, logprobs, reasons, support)
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        if not kept:
            return
        if len(kept) < len(numbers):
            numbers, active = [numbers[i] for i in kept], cache.keep(kept)
            rows, keys, drawn = rows[active], keys[active], drawn[active]
            seen = None if seen is None else seen[active]
        if seen is not None:
            seen.scatter_(1, drawn[:, None], True)
        hidden = cache.read(lm, drawn)
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


def _read_prompts(
    lm: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Tensor, KVCache]:
    """(hidden state of each prompt's last token (B, D), what is cached of the prompts).

    Each prompt is read once, however many rows continue it.
    """
    device = lm.unembedding.device
    distinct = {tuple(prompt): None for prompt in prompts}
    place = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
    tokens = pad_right(list(distinct)).to(device)
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
    capacity = tokens.shape[1] + max_new_tokens
    cache = KVCache(lm.config, len(distinct), capacity, lm.unembedding)
    hidden = lm(tokens, cache)
    hidden = hidden[source, lengths[source] - 1]
    cache.hold(lengths)
    if len(distinct) < len(prompts):
        cache.repeat(source)
    return hidden, StaticCache(cache, lm.config) if lm.compiles_decoding else cache


def _tokens_seen(lm: CausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """(B, V) bool: the tokens of each prompt."""
    shape, device = (len(prompts), lm.config.vocab_size), lm.unembedding.device
    seen = torch.zeros(shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(device)


class _Ends:
    """Why rows end. It keeps the ids of each response, in which stop strings are looked for."""

    def __init__(self, sampling: Sampling, prompts: Sequence, decode: Callable | None):
        self.sampling, self.decode, self.prompts = sampling, decode, prompts
        self.responses: list[list[int]] = [[] for _ in prompts]

    def reasons(
        self, rows: list[int], drawn: list[int], is_eos: list[int], length: int
    ) -> list[str | None]:
        """eos | stop | length, or None, for each of the A rows.

        Args:
            length: tokens of each response, these included.
        """
        found: list[str | None] = []
        for row, token, ended in zip(rows, drawn, is_eos, strict=True):
            reason = "eos" if ended else None
            if reason is None and self.sampling.stop_strings:
                self.responses[row].append(token)
                reason = "stop" if self._stops(row) else None
            if reason is None and length == self.sampling.max_new_tokens:
                reason = "length"
            found.append(reason)
        return found

    def _stops(self, row: int) -> bool:
        """Whether the newest token completes a stop string, which begins in the last few tokens."""
        # A character may take four byte-level tokens, and some tokens decode to nothing.
        ids, stops = self.responses[row], self.sampling.stop_strings
        start = max(0, len(ids) - 4 * max(map(len, stops)) - 8)
        tail = self.decode([*self.prompts[row], *ids[:start]], ids[start:])
        return any(stop in tail for stop in stops)


def generate(
    lm: CausalLM, prompts: Sequence[Sequence[int]], sampling: Sampling, eos_ids: Sequence[int],
    keys: Tensor, decode: Callable[[list[int], list[int]], str] | None = None,
) -> Generation:
    """Collects `decode_steps` (same arguments, same errors) into left-aligned rows.

    No step is kept but written down: small tensors that stay, between the temporary ones that grow
    with the length, would leave holes in the heap that nothing fits into.
    """
    _check(lm, prompts, sampling, keys, decode)  # before tokens of such a size are made
    B, most, width = len(prompts), sampling.max_new_tokens, max(map(len, prompts))
    device = lm.unembedding.device
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    logprobs = torch.zeros(B, most, dtype=widened(lm.unembedding.dtype), device=device)
    tokens = torch.zeros(B, width + most, dtype=torch.int64, device=device)
    tokens[:, :width] = pad_right(prompts).to(device)
    reasons, lengths, active = ["length"] * B, [0] * B, list(range(B))
    supports: list[tuple[list[int], Support]] = []  # (rows, of their tokens), a step each
    steps = decode_steps(lm, prompts, sampling, eos_ids, keys, decode)
    for t, step in enumerate(progress(steps, "sample", most, " tokens a row")):
        logprobs[step.rows, t] = step.logprobs
        tokens[step.rows, prompt_lengths[step.rows] + t] = step.tokens
        if step.support is not None:
            supports.append((active, step.support))
        for row, reason in zip(active, step.finish_reasons, strict=True):
            reasons[row], lengths[row] = reason or reasons[row], t + 1
        ends = zip(active, step.finish_reasons, strict=True)
        active = [row for row, reason in ends if reason is None]
    R, longest = max(lengths), max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]  # (B, R)
    cells = tokens[:, :longest], prompt_lengths, mask, logprobs[:, :R]
    moved = (x.to(keys.device).contiguous() for x in cells)
    return Generation(*moved, reasons, _collect_support(supports, mask.to(keys.device)))


def _collect_support(
    supports: list[tuple[list[int], Support]], mask: Tensor
) -> RowSupport | None:
    """The supports of all steps, row by row, beside the mask (B, R); None where every token could
    be drawn."""
    if not supports:
        return None
    ids: list[list[Tensor]] = [[] for _ in mask]
    counts = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    for t, (rows, support) in enumerate(supports):
        here = support.counts.to(mask.device)
        counts[torch.tensor(rows, device=mask.device), t] = here
        parts = support.ids.to(mask.device).split(here.tolist())
        for row, part in zip(rows, parts, strict=True):
            ids[row].append(part)
    return RowSupport([torch.cat(row) for row in ids], counts, supports[0][1].banned)
