"""How far two next-token distributions lie apart, summed over the whole vocabulary.

All take the states of two models before the same tokens, and treat the other model as a constant.
As in logprobs.py logits are made piece by piece, here of some tokens and all words, and made again
in the backward pass. Shapes: N tokens, n of a piece, D hidden size, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf import shards
from minirlhf.models.logprobs import check_distribution, expectation, narrowed, slices, widened
from minirlhf.models.support import Support
from minirlhf.models.transformer import CausalLM

CHUNK = 128  # tokens whose logits are held at once
Cells = Tensor | tuple[Tensor, Tensor] | None  # indices of (n, V)


def token_kl(
    lm: CausalLM, hidden: Tensor, ref: CausalLM, ref_hidden: Tensor, temperature: float = 1.0,
    chunk: int = CHUNK, support: Support | None = None,
) -> Tensor:
    """KL(policy || ref) of the next token's distribution at each position: `token_divergence` with
    beta 1. Arguments, result and errors as there.

        kl = sum_v p_v (log p_v - log q_v),   p = softmax(W h / temperature), q the reference's
    """
    return token_divergence(lm, hidden, ref, ref_hidden, 1.0, temperature, chunk, support)


def token_divergence(
    lm: CausalLM, hidden: Tensor, ref: CausalLM, ref_hidden: Tensor, beta: float,
    temperature: float = 1.0, chunk: int = CHUNK, support: Support | None = None,
) -> Tensor:
    """Divergence of a policy p and a reference q at each position. Agarwal et al. 2024
    (arXiv:2306.13649), eq. 1 and its two limits, where q is the teacher and p the student:

        beta 1     KL(p || q) = sum_v p_v (log p_v - log q_v)            reverse: seeks a mode of q
        beta 0     KL(q || p)                                            forward: covers all of q
        between    beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

    What lies between is bounded, and falls to 0 with beta and with 1 - beta: divided by these it
    has KL(q || p) and KL(p || q) as its limits.

    Models of one family may have unembeddings of different length, padded behind the tokenizer's
    words (Qwen2.5 has 151,936 rows at 0.5B, 152,064 at 7B). p and q are then those of the words
    that both have, as if the longer one could not say the others.

    Args:
        lm, ref: whose unembeddings W (V, D) and (V', D') are used.
        hidden, ref_hidden: (…, D) and (…, D') states before the tokens; ref_hidden and the
            reference's unembedding are constants.
        temperature, support: as in `logprobs.token_logprobs`, of both distributions.
        chunk: positions whose logits are held at once.
    Returns:
        (…) nats, >= 0 up to rounding; float32 (float64 for a float64 model).
    Raises:
        ValueError: shapes that do not fit, a temperature of 0, beta outside 0 to 1.
    """
    if hidden.shape[:-1] != ref_hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden is {tuple(ref_hidden.shape)}, hidden is {tuple(hidden.shape)}: "
            "give the reference's state for each of the policy's"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: at least 0 and at most 1 is legal")
    check_distribution(temperature, support, hidden[..., 0].numel())
    states, ref_states = (x.reshape(-1, x.shape[-1]) for x in (hidden, ref_hidden.detach()))
    ref_weight = shards.whole(ref.unembedding.detach())
    weight, ref_weight = _words_of_both(lm.unembedding, ref_weight)
    apart = _Divergence.apply(states, weight, ref_states, ref_weight, beta, temperature, chunk,
                              support)
    return apart.view(hidden.shape[:-1])


def _words_of_both(weight: Tensor, ref_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) and (V', D') unembeddings, the longer one cut to the length of the other."""
    words = min(len(weight), len(ref_weight))
    # A slice of all would cost a copy of the gradient.
    return tuple(w if len(w) == words else w[:words] for w in (weight, ref_weight))


class _Divergence(torch.autograd.Function):
    """`token_divergence` of (N, D) states, with its derivative by hand.

        d divergence / dz_j = p_j (g_j - sum_v p_v g_v),   g_v = d divergence / dp_v, where

        beta 1     g_v = log p_v - log q_v      whose expectation is the divergence itself
        beta 0     g_v = -q_v / p_v             so that all of it is p_j - q_j
        between    g_v = (1 - beta) (log p_v - log m_v),   for the two terms with m's derivative
                   add up to -(1 - beta) (beta q_v + (1 - beta) p_v) / m_v, a constant
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, ref_states: Tensor, ref_weight: Tensor, beta: float,
        temperature: float, chunk: int, support: Support | None,
    ):
        ctx.beta, ctx.temperature, ctx.chunk, ctx.support = beta, temperature, chunk, support
        tensors = states, weight, ref_states, ref_weight
        ctx.save_for_backward(*tensors)
        apart = states.new_empty(len(states), dtype=widened(states.dtype))
        for at in slices(len(states), chunk):
            logp, logq, excluded = _logprobs(tensors, temperature, support, at)
            if beta == 1:
                apart[at] = expectation(logp.exp(), _ratio(logp, logq, excluded))
            elif beta == 0:
                apart[at] = expectation(logq.exp(), _ratio(logq, logp, excluded))
            else:
                logm = _mixture(logp, logq, beta)
                apart[at] = beta * expectation(logq.exp(), _ratio(logq, logm, excluded))
                apart[at] += (1 - beta) * expectation(logp.exp(), _ratio(logp, logm, excluded))
        return apart

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        states, weight = ctx.saved_tensors[:2]
        rows = weight.to(widened(states.dtype))
        grad_states = torch.zeros_like(states)
        grad_weight = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        for at in slices(len(states), ctx.chunk):
            logp, logq, excluded = _logprobs(
                ctx.saved_tensors, ctx.temperature, ctx.support, at
            )
            probs = logp.exp()
            if ctx.beta == 0:
                grad_logits = probs.sub_(logq.exp_())
            else:
                other = logq if ctx.beta == 1 else _mixture(logp, logq, ctx.beta)
                slope = _ratio(logp, other, excluded)
                slope -= expectation(probs, slope)[:, None]
                grad_logits = slope.mul_(probs).mul_(1 if ctx.beta == 1 else 1 - ctx.beta)
            grad_logits *= grad[at, None]
            grad_states[at] = (grad_logits @ rows / ctx.temperature).to(states.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, states[at].to(rows.dtype) / ctx.temperature)
        return grad_states, narrowed(grad_weight, weight), *[None] * 6


def _logprobs(
    tensors: Sequence[Tensor], temperature: float, support: Support | None, at: slice
) -> tuple[Tensor, Tensor, Cells]:
    """log p and log q of a slice of the tokens, (n, V) each, and the cells where neither has mass.

    Args:
        tensors: states and unembedding of the policy, then of the reference.
    """
    states, weight, ref_states, ref_weight = tensors
    excluded = None if support is None else support.excluded(at, slice(0, len(weight)))
    wide, both = widened(states.dtype), []
    for h, w in ((states, weight), (ref_states, ref_weight)):
        logits = F.linear(h[at].to(wide) / temperature, w.to(wide))
        if excluded is not None:
            logits[excluded] = -torch.inf
        both.append(logits.log_softmax(-1))
    return *both, excluded


def _ratio(log_first: Tensor, log_second: Tensor, excluded: Cells) -> Tensor:
    """(n, V) of log first - log second, 0 where neither has mass."""
    ratio = log_first - log_second
    if excluded is not None:
        ratio[excluded] = 0
    return ratio


def _mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """(n, V) log(beta q + (1 - beta) p)."""
    return torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
