"""Sampling a rollout: responses as text for reward sources, as tensors for learning."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minirlhf import ranks
from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.models.alignment import pad_right, unpack
from minirlhf.models.generation import generate
from minirlhf.models.parallel import whole
from minirlhf.models.sampling import Sampling, before_stop
from minirlhf.models.support import RowSupport
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, Scores

FINISH_REASONS = ("eos", "stop", "length")


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    """Names of the columns that any of them has."""
    return sorted({name for prompt in prompts for name in prompt.columns})


def sample(
    lm: CausalLM, prompts: list[Prompt], keys: Tensor, sampling: Sampling, tokenizer: Tokenizer,
    rows_at_once: int, columns: Sequence[str] | None = None,
) -> tuple[Completions, Rollout]:
    """Responses to the prompts: as text for reward sources, as tensors (scores 0) for learning.

    Args:
        keys: (B,) int64, one a prompt; a row's text depends on its prompt and key alone.
        rows_at_once: how many are sampled side by side.
        columns: that reward sources see, None in a row that lacks one: of all prompts, so that what
            is said of a row does not depend on its batch. None: those of these prompts.
    """
    mine = ranks.share(len(prompts))
    with whole(lm) as writer:
        parts = ranks.gather_tensors(
            partial(_draw, writer, prompts[mine], keys[mine], sampling, tokenizer, rows_at_once)
        )
    drawn = {name: torch.cat([part[name] for part in parts if part]) for name in parts[0]}
    sizes = drawn["lengths"]
    responses = [ids.tolist() for ids in drawn["tokens"].split(sizes.tolist())]
    reasons = [FINISH_REASONS[i] for i in drawn["reasons"].tolist()]
    names = columns_of(prompts) if columns is None else columns
    completions = Completions(
        prompts=[p.text for p in prompts],
        prompt_ids=[p.ids for p in prompts],
        # An eos may be an ordinary token to the tokenizer, and so have a text.
        completions=[
            before_stop(
                tokenizer.answer_text(p.text, p.ids, ids[:-1] if why == "eos" else ids),
                sampling.stop_strings,
            )
            for p, ids, why in zip(prompts, responses, reasons, strict=True)
        ],
        response_ids=responses,
        finish_reasons=reasons,
        columns={name: [p.columns.get(name) for p in prompts] for name in names},
    )
    mask = torch.arange(int(sizes.max())) < sizes[:, None]  # (B, R)
    rollout = Rollout(
        rows=torch.arange(len(prompts)),
        tokens=pad_right([p.ids + ids for p, ids in zip(prompts, responses, strict=True)]),
        prompt_lengths=torch.tensor([len(p.ids) for p in prompts]),
        response_mask=mask,
        scores=torch.zeros(len(prompts)),
        truncated=torch.tensor([reason == "length" for reason in reasons]),
        support=_support_of(drawn, mask),
        sampled_logprobs=unpack(drawn["logprobs"], mask),
    )
    device = lm.unembedding.device
    return completions, Rollout(*(None if x is None else x.to(device) for x in rollout))


def _draw(
    lm: CausalLM, prompts: list[Prompt], keys: Tensor, sampling: Sampling, tokenizer: Tokenizer,
    rows_at_once: int,
) -> dict[str, Tensor]:
    """The responses of some rows, one after another: tokens (n,), logprobs (n,), and of each row
    its length and reason (b,); with a support its ids (M,) and their counts at each token (n,)."""
    drawn: dict[str, list[Tensor]] = {}
    for start in range(0, len(prompts), rows_at_once):
        part = slice(start, start + rows_at_once)
        ids = [p.ids for p in prompts[part]]
        made = generate(lm, ids, sampling, tokenizer.eos_ids, keys[part], tokenizer.decode_after)
        mask = made.response_mask
        found = {
            "tokens": torch.tensor([i for row in made.responses() for i in row]),
            "logprobs": made.logprobs[mask], "lengths": mask.sum(1),
            "reasons": torch.tensor([FINISH_REASONS.index(why) for why in made.finish_reason]),
        }
        if made.support is not None:
            found |= {"support": torch.cat(list(made.support.rows)),
                      "counts": made.support.counts[mask],
                      "banned": torch.tensor([made.support.banned])}
        for name, x in found.items():
            drawn.setdefault(name, []).append(x)
    return {name: torch.cat(parts) for name, parts in drawn.items()}


def _support_of(drawn: dict[str, Tensor], mask: Tensor) -> RowSupport | None:
    """The supports of all rows, if not every token could be drawn; mask: (B, R)."""
    if "support" not in drawn:
        return None
    counts = unpack(drawn["counts"], mask)
    rows = drawn["support"].split(counts.sum(1).tolist())
    return RowSupport(rows, counts, bool(drawn["banned"][0]))


def with_scores(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout of B rows with what reward sources said of them."""
    device, given = rollout.tokens.device, None
    if scores.token_rewards is not None:
        given = torch.zeros(rollout.response_mask.shape)  # (B, R)
        for row, values in zip(given, scores.token_rewards, strict=True):
            row[: len(values)] = torch.tensor(values)
        given = given.to(device)
    return rollout._replace(scores=scores.total.to(device), given_rewards=given)


def gather(parts: Sequence[tuple[Completions, Sequence[int]]]) -> Completions:
    """Some rows of several batches, one after another.

    Args:
        parts: each batch, with the numbers of its rows.
    """
    *lists, _ = Completions._fields
    names = parts[0][0].columns
    return Completions(
        *([getattr(batch, name)[i] for batch, rows in parts for i in rows] for name in lists),
        {name: [batch.columns[name][i] for batch, rows in parts for i in rows] for name in names},
    )


def replay_rows(completions: Completions, buffer: RolloutBuffer) -> list[dict]:
    """A measured rollout as JSON rows that hold all that was learned from, in batch order."""
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
            } | {name: x[b][mask].tolist() for name in fields
                 if (x := getattr(micro, name)) is not None}
    return [out[i] for i in sorted(out)]
