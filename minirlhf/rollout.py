"""What PPO learns from: sampled rows with what was known of them when they were sampled.

Shapes: B rows, T tokens of the longest, R tokens of the longest response, N tokens in all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import streams
from minirlhf.batching import cut_by_tokens, pad_right
from minirlhf.data import Prompt
from minirlhf.generation import Sampling, cut_at_stop, generate
from minirlhf.rewards import Completions, Scores
from minirlhf.support import RowSupport, stack_supports
from minirlhf.tokenizer import Tokenizer
from minirlhf.transformer import CausalLM


class Rollout(NamedTuple):
    """B rows, left-aligned, with one cell for each of at most R response tokens.

    Column t of a (B, R) tensor belongs to response token a_t and to the state before it. The
    fields that may be None are filled on the way: `passes.measure` and `ppo_update.assign_credit`.
    False cells between True ones are legal: tokens that another wrote, such as a tool's output.
    """

    rows: Tensor  # (B,) int64: which row of the iteration's batch this is
    tokens: Tensor  # (B, T) int64: prompt, response, padding
    prompt_lengths: Tensor  # (B,) int64, at least 1
    response_mask: Tensor  # (B, R) bool: tokens the policy chose, eos included
    scores: Tensor  # (B,) float32, reward units
    truncated: Tensor | None = None  # (B,) bool: cut by its length, not ended
    support: RowSupport | None = None  # what could be drawn; None: every token
    sampled_logprobs: Tensor | None = None  # (B, R) nats, as decoding computed them
    given_rewards: Tensor | None = None  # (B, R) float32, of single tokens, beside the score
    old_logprobs: Tensor | None = None  # (B, R) nats, likewise, by the training pass
    ref_logprobs: Tensor | None = None  # (B, R) nats, of the frozen reference
    full_kl: Tensor | None = None  # (B, R) nats, KL(policy || ref) over the vocabulary
    ref_states: Tensor | None = None  # (B, R, D) of the reference, where a loss needs its whole law
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
        """These rows (b,), cut to the longest of them."""
        T = int(self.lengths[rows].max())
        R = int(self.response_lengths[rows].max())

        def cut(name: str, x):
            if x is None:
                return None
            if name == "support":
                return x.select(rows, R)
            return x[rows] if x.dim() == 1 else x[rows, : T if name == "tokens" else R]

        return Rollout(*(cut(name, x) for name, x in self._asdict().items()))


class RolloutBuffer:
    """Rollouts, cut once into micro-batches of rows of like length.

    Old, reference and new log-probs of every epoch are computed on these same micro-batches, and a
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

    def add(self, rollout: Rollout) -> None:
        """Cuts B more rows into micro-batches.

        Raises:
            ValueError: a row without a response token, or without a prompt.
        """
        if not rollout.response_mask.any(1).all():
            raise ValueError("a row has no response token: eos counts as one")
        if not (rollout.prompt_lengths >= 1).all():
            raise ValueError("a row has no prompt token: start it with a BOS")
        parts = cut_by_tokens(rollout.lengths, self.micro_batch_size, self.micro_batch_tokens)
        self.micro_batches += [rollout.select(part) for part in parts]

    def update(self, function: Callable[[Rollout], Rollout]) -> None:
        """Replaces each micro-batch by the function's result, as to fill its fields."""
        self.micro_batches = [function(micro) for micro in self.micro_batches]

    def tokens(self, name: str) -> Tensor:
        """(N,) the field's values at all response tokens of the buffer, in its order."""
        return torch.cat([getattr(m, name)[m.response_mask] for m in self.micro_batches])

    def set_tokens(self, name: str, values: Tensor) -> None:
        """The inverse of `tokens`; cells outside the mask become 0."""
        sizes = [int(m.response_mask.sum()) for m in self.micro_batches]
        parts = iter(values.split(sizes))
        self.update(
            lambda micro: micro._replace(**{name: unpack(next(parts), micro.response_mask)})
        )

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
            raise ValueError(
                f"{count} mini-batches need as many micro-batches, there are "
                f"{len(self.micro_batches)}: lower micro_batch_size or mini_batches"
            )
        stream = f"mini-batches of iteration {iteration}"
        parts: list[list[Rollout]] = [[] for _ in range(count)]
        sizes = [0] * count
        for i in streams.permutation(seed, stream, epoch, len(self.micro_batches)).tolist():
            least = sizes.index(min(sizes))
            parts[least].append(self.micro_batches[i])
            sizes[least] += len(self.micro_batches[i].tokens)
        return parts


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """(N, …) values of the True cells, row by row -> (B, R, …) with 0 elsewhere."""
    cells = mask.view(*mask.shape, *[1] * (values.dim() - 1))
    shape = mask.shape + values.shape[1:]
    return values.new_zeros(shape).masked_scatter(cells.expand(shape), values)


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    """Names of the columns that any of them has."""
    return sorted({name for prompt in prompts for name in prompt.columns})


def sample(
    lm: CausalLM,
    prompts: list[Prompt],
    keys: Tensor,
    sampling: Sampling,
    tokenizer: Tokenizer,
    rows_at_once: int,
    columns: Sequence[str] | None = None,
) -> tuple[Completions, Rollout]:
    """Responses to the prompts: as text for reward sources, as tensors (scores 0) for learning.

    Args:
        keys: (B,) int64, one a prompt; a row's text depends on its prompt and key alone.
        rows_at_once: how many are sampled side by side.
        columns: that reward sources see, None in a row that lacks one: of all prompts, so that what
            is said of a row does not depend on its batch. None: those of these prompts.
    """
    responses, reasons, logprobs, supports = [], [], [], []
    for start in range(0, len(prompts), rows_at_once):
        part = slice(start, start + rows_at_once)
        ids = [p.ids for p in prompts[part]]
        made = generate(lm, ids, sampling, tokenizer.eos_ids, keys[part], tokenizer.decode)
        responses += made.responses()
        reasons += made.finish_reason
        logprobs.append(made.logprobs[made.response_mask])
        supports.append(made.support)
    names = columns_of(prompts) if columns is None else columns
    completions = Completions(
        prompts=[p.text for p in prompts],
        prompt_ids=[p.ids for p in prompts],
        # An eos may be an ordinary token to the tokenizer, and so have a text.
        completions=[
            cut_at_stop(tokenizer.decode(ids[:-1] if why == "eos" else ids), sampling.stop_strings)
            for ids, why in zip(responses, reasons, strict=True)
        ],
        response_ids=responses,
        finish_reasons=reasons,
        columns={name: [p.columns.get(name) for p in prompts] for name in names},
    )
    sizes = torch.tensor([len(ids) for ids in responses])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]  # (B, R)
    rollout = Rollout(
        rows=torch.arange(len(prompts)),
        tokens=pad_right([p.ids + ids for p, ids in zip(prompts, responses, strict=True)]),
        prompt_lengths=torch.tensor([len(p.ids) for p in prompts]),
        response_mask=mask,
        scores=torch.zeros(len(prompts)),
        truncated=torch.tensor([reason == "length" for reason in reasons]),
        support=None if supports[0] is None else stack_supports(supports),
        sampled_logprobs=unpack(torch.cat(logprobs), mask),
    )
    device = lm.unembedding.device
    return completions, Rollout(*(None if x is None else x.to(device) for x in rollout))


def with_scores(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout of B rows with what reward sources said of them."""
    device, given = rollout.tokens.device, None
    if scores.token_rewards is not None:
        given = torch.zeros(rollout.response_mask.shape)  # (B, R)
        for row, values in zip(given, scores.token_rewards, strict=True):
            row[: len(values)] = torch.tensor(values)
        given = given.to(device)
    return rollout._replace(scores=scores.total.to(device), given_rewards=given)


def replay_rows(completions: Completions, buffer: RolloutBuffer) -> list[dict]:
    """A measured rollout as JSON rows that hold everything PPO learned from, in batch order."""
    out: dict[int, dict] = {}
    fields = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
    for micro in buffer.micro_batches:
        for b, i in enumerate(micro.rows.tolist()):
            mask = micro.response_mask[b]
            out[i] = {
                "prompt": completions.prompts[i],
                "response": completions.completions[i],
                "finish_reason": completions.finish_reasons[i],
                "score": float(micro.scores[b]),
                "prompt_ids": completions.prompt_ids[i],
                "response_ids": completions.response_ids[i],
            } | {name: getattr(micro, name)[b][mask].tolist() for name in fields}
    return [out[i] for i in sorted(out)]
