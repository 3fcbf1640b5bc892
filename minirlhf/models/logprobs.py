"""Log-probs of given tokens and their entropy, without ever holding all logits.

What is computed is no more than `plain_token_logprobs` below. But the logits of a batch, (N, V),
are its largest tensor by far, and all that is needed of them is two numbers a token. So
`token_logprobs` makes them in tiles, and makes them again in the backward pass.

Shapes: N tokens, D hidden size, V vocabulary; n and v are those of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf.models.support import Support
from minirlhf.models.transformer import CausalLM

LOWEST = -1e30  # nats; below any logit, and finite


class Tile(NamedTuple):
    """How many logits are held at once: 8 MB in float32, which stay in a CPU's cache between the
    passes over them."""

    tokens: int = 512
    words: int = 4096


TILE = Tile()


class TokenStats(NamedTuple):
    logprobs: Tensor  # (…), nats
    entropy: Tensor  # (…), nats, of the whole distribution at that position
    greedy: Tensor  # (…) bool, whether no token is likelier than the target


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype heads compute in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def plain_token_logprobs(
    lm: CausalLM, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> TokenStats:
    """`token_logprobs` to the letter, for who reads it and for tests: it holds all logits."""
    wide = widened(hidden.dtype)
    logits = F.linear(hidden.to(wide), lm.unembedding.to(wide)) / temperature  # (…, V)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = logprobs.gather(-1, targets[..., None])[..., 0]
    return TokenStats(chosen, entropy, chosen >= logprobs.amax(-1))


def token_logprobs(
    lm: CausalLM, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
    support: Support | None = None, tile: Tile = TILE,
) -> TokenStats:
    """Log-prob of each target and entropy of its distribution, from float32 logits.

        logprob = log softmax(W h / temperature)[target],   the softmax over `support`

    Neither pass holds more logits than a tile, and the backward pass computes them again. Float32
    because bf16 logits alone are off by up to 0.07 nats, a third of PPO's clip range.

    Args:
        lm: whose unembedding W (V, D) is used.
        hidden: (…, D) states before the targets.
        targets: (…) int64 ids.
        temperature: > 0; that of sampling, so that ratios compare what was sampled.
        support: of the positions in their order, where not every token could be drawn; a target
            outside it has log-prob -inf.
        tile: how many logits are held at once.
    Returns:
        TokenStats(logprobs, entropy, greedy), each (…); the first two float32 (float64 for a
        float64 model), and with gradient.
    Raises:
        ValueError: shapes that do not fit, a temperature of 0, an id beyond the vocabulary.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets is {tuple(targets.shape)}, hidden is {tuple(hidden.shape)}: "
            "give one target for each state, targets (…) beside hidden (…, D)"
        )
    check_distribution(temperature, support, targets.numel())
    states, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(lm.unembedding)):
        raise ValueError(
            f"targets lie in {ids.min()}..{ids.max()}: the model has the ids "
            f"0..{len(lm.unembedding) - 1}"
        )
    stats = _TokenLogprobs.apply(states, lm.unembedding, ids, temperature, support, tile)
    return TokenStats(*(x.view(targets.shape) for x in stats))


def check_distribution(temperature: float, support: Support | None, positions: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: must be above 0")
    if support is not None and len(support.counts) != positions:
        raise ValueError(f"support is of {len(support.counts)} positions, there are {positions}")


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """(n,) sum_v probs_v values_v of (n, V) each, without a third tensor of that size."""
    return torch.bmm(probs[:, None], values[:, :, None])[:, 0, 0]


class Piece(NamedTuple):
    """A tile's worth of logits."""

    at: slice  # of the N tokens: n
    words: slice  # of the V words: v
    logits: Tensor  # (n, v) over temperature; -inf for what could not be drawn
    states: Tensor  # (n, D) over temperature
    rows: Tensor  # (v, D) of the unembedding
    excluded: Tensor | tuple[Tensor, Tensor] | None  # where they are -inf

    def column(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each of the (N,) ids of these tokens is among these words, (n,) bool, and its
        column if so, (n, 1)."""
        local = ids[self.at] - self.words.start
        here = (local >= 0) & (local < self.logits.shape[1])
        return here, torch.where(here, local, 0)[:, None]


def _pieces(
    states: Tensor, weight: Tensor, temperature: float, support: Support | None, tile: Tile
) -> Iterator[Piece]:
    """All logits, each once: words in the inner loop, float32 at least.

    It is the state that is divided: as exact, and V / D times less work.
    """
    wide = widened(states.dtype)
    for at in slices(len(states), tile.tokens):
        divided = states[at].to(wide) / temperature
        for words in slices(len(weight), tile.words):
            rows = weight[words].to(wide)
            logits, excluded = F.linear(divided, rows), None
            if support is not None:
                excluded = support.excluded(at, words)
                logits[excluded] = -torch.inf
            yield Piece(at, words, logits, divided, rows, excluded)


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` of (N, D) states and (N,) ids, with its derivative by hand.

    Forward, a piece with the words w has a largest logit m, a mass s and a moment e about m:

        s = sum_w exp(z_w - m),   e = sum_w exp(z_w - m) (z_w - m)

    and from those of all pieces, with M = max m and S = sum exp(m - M) s,

        log sum_v exp z_v = M + log S,
        entropy = log S - sum exp(m - M) (e + (m - M) s) / S

    Backward, with z = W h / temperature, p = softmax(z) and H its entropy:

        d logprob / dz_j = [j = target] - p_j,    dH / dz_j = -p_j (log p_j + H)

    Outside a support p is 0, and so is everything that p multiplies. Most is done in place: the
    logits are so large that each pass over them costs time beside the matrix product.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, ids: Tensor, temperature: float,
        support: Support | None, tile: Tile,
    ):
        N, parts = len(ids), -(-len(weight) // tile.words)
        wide = widened(states.dtype)
        top, mass, moment = (states.new_empty(parts, N, dtype=wide) for _ in range(3))
        target = states.new_zeros(N, dtype=wide)  # logits
        for piece in _pieces(states, weight, temperature, support, tile):
            part, at, logits = piece.words.start // tile.words, piece.at, piece.logits
            here, column = piece.column(ids)
            target[at] = torch.where(here, logits.gather(-1, column)[:, 0], target[at])
            # A piece may hold nothing that could be drawn.
            top[part, at] = logits.amax(-1).clamp_(min=LOWEST)
            logits -= top[part, at, None]
            weights = logits.exp()
            mass[part, at] = weights.sum(-1)
            if piece.excluded is not None:
                logits[piece.excluded] = 0  # 0 x inf is NaN
            moment[part, at] = expectation(weights, logits)
        best = top.amax(0)
        share = (top - best).exp()
        total = (share * mass).sum(0)
        entropy = total.log() - (share * (moment + (top - best) * mass)).sum(0) / total
        normalizer = best + total.log()
        ctx.save_for_backward(states, weight, ids, normalizer, entropy)
        ctx.temperature, ctx.support, ctx.tile = temperature, support, tile
        ctx.set_materialize_grads(False)
        greedy = target >= best
        ctx.mark_non_differentiable(greedy)
        return (target - best) - total.log(), entropy, greedy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None):
        states, weight, ids, normalizer, entropy = ctx.saved_tensors
        wide = widened(states.dtype)
        grad_states = torch.zeros_like(states, dtype=wide)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for piece in _pieces(states, weight, ctx.temperature, ctx.support, ctx.tile):
            at, logprobs = piece.at, piece.logits
            logprobs -= normalizer[at, None]
            if grad_entropy is None:
                grad_logits = logprobs.exp_().mul_(-grad_logprobs[at, None])
            else:
                probs = logprobs.exp()
                if piece.excluded is not None:
                    logprobs[piece.excluded] = 0
                factor = logprobs.add_(entropy[at, None]).mul_(-grad_entropy[at, None])
                if grad_logprobs is not None:
                    factor -= grad_logprobs[at, None]
                grad_logits = probs.mul_(factor)
            if grad_logprobs is not None:
                here, column = piece.column(ids)
                grad_logits.scatter_add_(-1, column, (grad_logprobs[at] * here)[:, None])
            grad_states[at].addmm_(grad_logits, piece.rows, alpha=1 / ctx.temperature)
            if grad_weight is not None:
                grad_weight[piece.words].addmm_(grad_logits.T, piece.states)
        return grad_states.to(states.dtype), narrowed(grad_weight, weight), *[None] * 4


def narrowed(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(weight.dtype)


def slices(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
