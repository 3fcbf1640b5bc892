"""What PPO learns from: sampled rows, and the forward passes that measure them.

Measuring and training use the same function on the same micro-batches, so the first ratio is 1.
Shapes: B rows, b of a micro-batch, T tokens of the longest, R tokens of the longest response, N
response tokens in all, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt, streams
from minirlhf.console import progress
from minirlhf.data.batching import cut_by_tokens
from minirlhf.equations.kl import ESTIMATORS
from minirlhf.models.alignment import check_known, response_states, response_tokens, unpack
from minirlhf.models.divergence import token_kl
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.logprobs import token_logprobs
from minirlhf.models.parallel import over_ranks
from minirlhf.models.pretrained import in_memory
from minirlhf.models.support import RowSupport
from minirlhf.models.transformer import CausalLM


class Rollout(NamedTuple):
    """B rows, left-aligned, with one cell for each of at most R response tokens.

    Column t of a (B, R) tensor belongs to response token a_t and to the state before it. The
    fields that may be None are filled on the way, by `measure` and `credit.assign_credit`.
    False cells between True ones are legal: tokens that another wrote, such as a tool's output.
    """

    rows: Tensor  # (B,) int64: which row of the iteration's batch this is
    tokens: Tensor  # (B, T) int64: prompt, response, padding
    prompt_lengths: Tensor  # (B,) int64, at least 1
    response_mask: Tensor  # (B, R) bool: tokens the policy chose, eos included
    scores: Tensor  # (B,) float32, reward units
    truncated: Tensor | None = None  # (B,) bool: ended by the length limit, by no eos
    support: RowSupport | None = None  # what could be drawn; None: every token
    sampled_logprobs: Tensor | None = None  # (B, R) nats, as decoding computed them
    given_rewards: Tensor | None = None  # (B, R) float32, of single tokens, beside the score
    old_logprobs: Tensor | None = None  # (B, R) nats, by the pass that trains: the ratio uses these
    ref_logprobs: Tensor | None = None  # (B, R) nats, of the frozen reference
    weights: Tensor | None = None  # (B, R) of the policy loss, where another policy sampled
    full_kl: Tensor | None = None  # (B, R) nats, KL(policy || ref) over the vocabulary
    ref_states: Tensor | None = None  # (B, R, D) of the reference, for a full KL as a loss
    old_values: Tensor | None = None  # (B, R)
    last_values: Tensor | None = None  # (B,) value of the state after the last token
    rewards: Tensor | None = None  # (B, R), KL penalty and score
    advantages: Tensor | None = None  # (B, R)
    returns: Tensor | None = None  # (B, R)

    @property
    def response_lengths(self) -> Tensor:
        """(B,) cells of each response, up to its last True one."""
        R = self.response_mask.shape[1]
        ends = torch.arange(1, R + 1, device=self.response_mask.device)
        return (self.response_mask * ends).amax(1)

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens of each row."""
        return self.prompt_lengths + self.response_lengths

    def select(self, rows: Tensor) -> "Rollout":
        """These rows (b,), as wide as the longest of them."""
        T = int(self.lengths[rows].max())
        R = int(self.response_lengths[rows].max())

        def part(name: str, x):
            if x is None:
                return None
            if name == "support":
                return x.select(rows, R)
            return x[rows] if x.dim() == 1 else x[rows, : T if name == "tokens" else R]

        return Rollout(*(part(name, x) for name, x in self._asdict().items()))


class RolloutBuffer:
    """Rollouts, split once into micro-batches of rows of like length.

    Old and reference log-probs, and the new ones of every epoch, are computed on these, and a
    mini-batch is a seeded set of whole ones. So the first ratio is exactly 1 in any dtype: in
    bfloat16 the same row in another batch shape differs by a quarter of the clip range.

    Args:
        micro_batch_size: most rows in one.
        micro_batch_tokens: most cells, rows times longest row; a longer single row stands alone.
    """

    def __init__(self, micro_batch_size: int, micro_batch_tokens: int):
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.micro_batches: list[Rollout] = []

    def __len__(self) -> int:
        return sum(len(micro.tokens) for micro in self.micro_batches)

    def add(self, rollout: Rollout, group_size: int = 1) -> None:
        """Cuts B more rows into micro-batches.

        Args:
            group_size: so many rows each, which begin with the same prompt, stay neighbours: then
                its tokens are computed once for as many of them as a micro-batch takes.
        Raises:
            ValueError: a row without a response token, or without a prompt.
        """
        if not rollout.response_mask.any(1).all():
            raise ValueError("a row has no response token: eos counts as one")
        if not (rollout.prompt_lengths >= 1).all():
            raise ValueError("a row has no prompt token: start it with a BOS")
        longest = rollout.lengths.view(-1, group_size).amax(1).repeat_interleave(group_size)
        parts = cut_by_tokens(longest, self.micro_batch_size, self.micro_batch_tokens)
        self.micro_batches += [rollout.select(part) for part in parts]

    def map(self, function: Callable[[Rollout], Rollout]) -> None:
        """Replaces each micro-batch by the function's result, as to fill its fields."""
        parts = progress(self.micro_batches, "measure", unit=" micro-batches")
        self.micro_batches = [function(micro) for micro in parts]

    def renew(self, old: Sequence[Rollout], new: Sequence[Rollout]) -> None:
        """Puts each of `new` in the place of the micro-batch of `old` that it was made of."""
        made = {id(micro): later for micro, later in zip(old, new, strict=True)}
        self.map(lambda micro: made[id(micro)])

    def flat(self, name: str) -> Tensor:
        """(N,) the field's values at all response tokens of the buffer, in its order."""
        return torch.cat([getattr(m, name)[m.response_mask] for m in self.micro_batches])

    def set_flat(self, name: str, values: Tensor) -> None:
        """The inverse of `flat`; cells outside the mask become 0."""
        sizes = [int(m.response_mask.sum()) for m in self.micro_batches]
        parts = iter(values.split(sizes))
        self.map(
            lambda micro: micro._replace(**{name: unpack(next(parts), micro.response_mask)})
        )

    def over_all(self, name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replaces a field by function(its values (N,), an all-True mask (N,)), over all rows: a
        mean or spread of the whole rollout, which no split into mini-batches can change."""
        values = self.flat(name)
        self.set_flat(name, function(values, torch.ones_like(values, dtype=torch.bool)))

    def row_sums(self, name: str) -> Tensor:
        """(B,) sums over each row's response tokens of a (B, R) field, in the buffer's order."""
        sums = [getattr(m, name).where(m.response_mask, 0).sum(1) for m in self.micro_batches]
        return torch.cat(sums)

    def minibatches(self, count: int, seed: int, iteration: int, epoch: int) -> list[list[Rollout]]:
        """`count` mini-batches which together hold every micro-batch once, shuffled.

        Each next micro-batch goes to the mini-batch with the fewest rows, so that they differ by
        at most one micro-batch.

        Raises:
            ValueError: there are fewer micro-batches than that.
        """
        if count > len(self.micro_batches):
            there = f"there are {len(self.micro_batches)}: lower micro_batch_size or mini_batches"
            raise ValueError(f"{count} mini-batches need as many micro-batches, {there}")
        stream = f"mini-batches of iteration {iteration}"
        parts: list[list[Rollout]] = [[] for _ in range(count)]
        sizes = [0] * count
        for i in streams.permutation(seed, stream, epoch, len(self.micro_batches)).tolist():
            least = sizes.index(min(sizes))
            parts[least].append(self.micro_batches[i])
            sizes[least] += len(self.micro_batches[i].tokens)
        return parts


# ---------------------------------------------------------------------------------- forward passes


KL_ESTIMATORS = (*ESTIMATORS, "full")


class TokenPass(NamedTuple):
    logprobs: Tensor  # (b, R) nats, of the distribution that is sampled from; 0 outside the mask
    entropy: Tensor  # (b, R) nats, likewise
    values: Tensor | None = None  # (b, R); None where the critic is not read
    last_values: Tensor | None = None  # (b,) of the state after the last token
    full_kl: Tensor | None = None  # (b, R) nats, KL(policy || ref), where it was asked for
    states: Tensor | None = None  # (b, R, D) before the response tokens, where they are kept


@over_ranks
def policy_pass(
    policy: ValueHeadModel, micro: Rollout, temperature: float, ref: CausalLM | None = None
) -> TokenPass:
    """One forward pass of policy and critic.

    Args:
        ref: fill full_kl, the KL over the whole vocabulary; from its unembedding and
            micro.ref_states.
    """
    hidden, values = policy(micro.tokens, micro.lengths)
    response = response_pass(policy.lm, hidden, micro, temperature, ref)
    at_tokens = response_states(values, micro.prompt_lengths, micro.response_mask.shape[1])
    last = response_states(values, micro.lengths, 1)[:, 0]
    return response._replace(values=at_tokens, last_values=last)


def lm_states(lm: CausalLM, micro: Rollout) -> Tensor:
    """(N, D) states before the response tokens, row by row, of one forward pass."""
    hidden, mask = lm(micro.tokens, lengths=micro.lengths), micro.response_mask
    return response_states(hidden, micro.prompt_lengths, mask.shape[1])[mask]


@over_ranks
def lm_pass(
    lm: CausalLM, micro: Rollout, temperature: float, keep_states: bool = False
) -> TokenPass:
    """One forward pass of a language model: of a policy without critic, or of the reference."""
    hidden = lm(micro.tokens, lengths=micro.lengths)
    passed = response_pass(lm, hidden, micro, temperature)
    if not keep_states:
        return passed
    states = response_states(hidden, micro.prompt_lengths, micro.response_mask.shape[1])
    return passed._replace(states=states.where(micro.response_mask[..., None], 0))


def ref_pass(
    ref: CausalLM, micro: Rollout, temperature: float, keep_states: bool = False
) -> TokenPass:
    """One forward pass of the reference."""
    check_known(micro.tokens, ref.config.vocab_size, "the reference")
    return lm_pass(ref, micro, temperature, *([keep_states] if keep_states else []))


def response_pass(
    lm: CausalLM, hidden: Tensor, micro: Rollout, temperature: float, ref: CausalLM | None = None
) -> TokenPass:
    """Log-probs and entropies of the response tokens, from the hidden states; logits are computed
    for these tokens only, over the support that was sampled from. With `ref` the full KL too."""
    mask = micro.response_mask
    states = response_states(hidden, micro.prompt_lengths, mask.shape[1])[mask]  # (N, D)
    targets = response_tokens(micro.tokens, micro.prompt_lengths, mask.shape[1])[mask]  # (N,)
    support = None if micro.support is None else micro.support.flat(mask)
    stats = token_logprobs(lm, states, targets, temperature, support=support)
    logprobs, entropy = unpack(stats.logprobs, mask), unpack(stats.entropy, mask)
    if ref is None:
        return TokenPass(logprobs, entropy)
    kl = token_kl(lm, states, ref, micro.ref_states[mask], temperature, support=support)
    return TokenPass(logprobs, entropy, full_kl=unpack(kl, mask))


def kl_to_ref(estimator: str, now: TokenPass, micro: Rollout) -> Tensor:
    """(b, R) nats a token, of the policy to the reference; 0 outside the mask.

    Args:
        estimator: one of KL_ESTIMATORS; "full" is that of the pass.
    """
    if estimator == "full":
        return now.full_kl
    kl = ESTIMATORS[estimator](now.logprobs, micro.ref_logprobs)
    return torch.where(micro.response_mask, kl, 0)


@torch.no_grad()
def measure(
    policy: ValueHeadModel, ref: CausalLM, buffer: RolloutBuffer, temperature: float,
    full_kl: bool = False, keep_ref_states: bool = False,
) -> None:
    """Fills old_logprobs, old_values, last_values and ref_logprobs, on the micro-batches of the
    training passes.

    Args:
        ref: the frozen reference; of a policy with adapters `lora.base_of` it.
        full_kl: fill full_kl, the KL over the whole vocabulary, too.
        keep_ref_states: fill ref_states, for a full KL in the loss.
    Raises:
        UserError: a token was sampled that the reference or the critic does not have.
    """

    def fill(micro: Rollout) -> Rollout:
        interrupt.check()
        if policy.critic is not None:
            check_known(micro.tokens, policy.critic.config.vocab_size, "the critic")
        of_ref = ref_pass(ref, micro, temperature, full_kl or keep_ref_states)
        micro = micro._replace(ref_logprobs=of_ref.logprobs, ref_states=of_ref.states)
        old = policy_pass(policy, micro, temperature, *([ref] if full_kl else []))
        micro = micro._replace(
            old_logprobs=old.logprobs, old_values=old.values, last_values=old.last_values,
            full_kl=old.full_kl,
        )
        return micro if keep_ref_states else micro._replace(ref_states=None)

    with in_memory(ref):
        buffer.map(fill)


@torch.no_grad()
def measure_lm(
    policy: CausalLM, ref: CausalLM | None, buffer: RolloutBuffer, temperature: float,
    old: bool = True,
) -> None:
    """As `measure`, of a policy without critic: fills old_logprobs unless `old` is False, and
    ref_logprobs if there is a reference."""

    def fill(micro: Rollout) -> Rollout:
        interrupt.check()
        of_old = lm_pass(policy, micro, temperature).logprobs if old else None
        of_ref = None if ref is None else ref_pass(ref, micro, temperature).logprobs
        return micro._replace(old_logprobs=of_old, ref_logprobs=of_ref)

    with in_memory(*([] if ref is None else [ref])):
        buffer.map(fill)


def penalised_kl(micro: Rollout, estimator: str | None) -> Tensor:
    """(b, R) nats a token: the KL penalty in the rewards of a measured rollout.

    Args:
        estimator: one of KL_ESTIMATORS; None where the penalty is a loss, and no part of rewards.
    """
    if estimator is None:
        return micro.scores.new_zeros(micro.response_mask.shape)
    if estimator == "full":
        return micro.full_kl
    return ESTIMATORS[estimator](micro.old_logprobs, micro.ref_logprobs)
