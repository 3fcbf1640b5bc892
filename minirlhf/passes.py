"""Forward passes over rollout rows: log-prob, entropy and value at each response token.

Measuring and training use the same function on the same micro-batches, so the first ratio is 1.
Shapes: b rows of a micro-batch, T tokens, R response tokens, N of them in all, D hidden size.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.errors import UserError
from minirlhf.heads import ValueHeadModel, response_states
from minirlhf.kl import ESTIMATORS
from minirlhf.logprobs import token_kl, token_logprobs
from minirlhf.lora import adapters_off
from minirlhf.pretrained import in_memory
from minirlhf.rollout import Rollout, RolloutBuffer, unpack
from minirlhf.transformer import CausalLM

KL_ESTIMATORS = (*ESTIMATORS, "full")


class TokenPass(NamedTuple):
    logprobs: Tensor  # (b, R) nats, of the law that is sampled; 0 outside the mask
    entropy: Tensor  # (b, R) nats, likewise
    values: Tensor  # (b, R)
    last_values: Tensor | None = None  # (b,) of the state after the last token
    states: Tensor | None = None  # (N, D) before the response tokens, row by row


class LawPass(NamedTuple):
    logprobs: Tensor  # (b, R) nats
    entropy: Tensor  # (b, R) nats
    states: Tensor  # (N, D)


def policy_pass(policy: ValueHeadModel, micro: Rollout, temperature: float) -> TokenPass:
    """One forward pass of policy and critic."""
    hidden, values = policy(micro.tokens, micro.lengths)
    law = response_law(policy.lm, hidden, micro, temperature)
    at_tokens = response_states(values, micro.prompt_lengths, micro.response_mask.shape[1])
    last = response_states(values, micro.lengths, 1)[:, 0]
    return TokenPass(law.logprobs, law.entropy, at_tokens, last, law.states)


def response_law(lm: CausalLM, hidden: Tensor, micro: Rollout, temperature: float) -> LawPass:
    """What a model says of the response tokens, given its hidden states; only their logits are
    computed, on the support that was sampled."""
    mask = micro.response_mask
    states = response_states(hidden, micro.prompt_lengths, mask.shape[1])[mask]  # (N, D)
    targets = response_states(micro.tokens, micro.prompt_lengths + 1, mask.shape[1])[mask]  # (N,)
    support = None if micro.support is None else micro.support.flat(mask)
    stats = token_logprobs(lm, states, targets, temperature, support=support)
    return LawPass(unpack(stats.logprobs, mask), unpack(stats.entropy, mask), states)


def kl_to_ref(
    estimator: str, policy: CausalLM, now: TokenPass | LawPass, ref: CausalLM | None,
    micro: Rollout, temperature: float,
) -> Tensor:  # fmt: skip
    """(b, R) nats a token, of the policy to the reference; 0 outside the mask.

    Args:
        estimator: one of KL_ESTIMATORS; "full" needs micro.ref_states and ref's unembedding.
        ref: None where the policy has adapters: they leave the unembedding as it is.
    """
    mask = micro.response_mask
    if estimator != "full":
        return torch.where(mask, ESTIMATORS[estimator](now.logprobs, micro.ref_logprobs), 0)
    support = None if micro.support is None else micro.support.flat(mask)
    kl = token_kl(
        policy, now.states, ref or policy, micro.ref_states[mask], temperature, support=support
    )
    return unpack(kl, mask)


def check_known(tokens: Tensor, words: int, who: str) -> None:
    """A policy whose vocabulary is padded further than another model's may draw what it lacks."""
    if int(tokens.max()) >= words:
        what = f"token {int(tokens.max())} was sampled, {who} has {words:,}"
        raise UserError("vocabulary", what, "take models of one size of vocabulary")


@torch.no_grad()
def measure(
    policy: ValueHeadModel, ref: CausalLM | None, buffer: RolloutBuffer, temperature: float,
    full_kl: bool = False, keep_ref_states: bool = False,
) -> None:  # fmt: skip
    """Fills old_logprobs, old_values, last_values and ref_logprobs, on the micro-batches of the
    training passes; full_kl and ref_states where they are asked for.

    ref None: the policy's own base under its adapters.
    """

    def fill(micro: Rollout) -> Rollout:
        interrupt.check()
        if ref is not None:
            check_known(micro.tokens, ref.config.vocab_size, "the reference")
        if policy.critic is not None:
            check_known(micro.tokens, policy.critic.config.vocab_size, "the critic")
        old = policy_pass(policy, micro, temperature)
        frozen = policy.lm if ref is None else ref
        with adapters_off(policy) if ref is None else nullcontext():
            hidden = frozen(micro.tokens, lengths=micro.lengths)
            law = response_law(frozen, hidden, micro, temperature)
        micro = micro._replace(
            old_logprobs=old.logprobs, old_values=old.values, last_values=old.last_values,
            ref_logprobs=law.logprobs,
        )  # fmt: skip
        if full_kl or keep_ref_states:
            micro = micro._replace(ref_states=unpack(law.states, micro.response_mask))
        if full_kl:
            kl = kl_to_ref("full", policy.lm, old, frozen, micro, temperature)
            micro = micro._replace(full_kl=kl)
        return micro if keep_ref_states else micro._replace(ref_states=None)

    with nullcontext() if ref is None else in_memory(ref):
        buffer.update(fill)
