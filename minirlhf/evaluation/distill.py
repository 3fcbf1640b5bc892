"""How far a student lies from its teacher, on its own responses to held-out prompts.

Every evaluation of a run answers the same prompts with the same random keys, so that what changes
between two of them is the student.

Shapes: B prompts, one response each, N response tokens of a micro-batch.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minirlhf import interrupt, streams
from minirlhf.batches.collect import sample
from minirlhf.batches.distillation import divergence_pass
from minirlhf.batches.rollouts import RolloutBuffer
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.evaluation.policy import distinct
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions
from minirlhf.run.optim import check_finite


class PassSizes(Protocol):
    """How many rows are sampled, and read, side by side."""

    rollout_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int


class Compared(NamedTuple):
    """Responses of the student, and how far the teacher is at their tokens."""

    completions: Completions
    kl: Tensor  # (B,) nats a response, KL(student || teacher) summed over its tokens
    forward_kl: Tensor  # (B,) likewise, KL(teacher || student)
    tokens: Tensor  # (B,) of each response


@torch.no_grad()
def compare(
    student: CausalLM, teacher: CausalLM, prompts: list[Prompt], keys: Tensor, sampling: Sampling,
    tokenizer: Tokenizer, sizes: PassSizes,
) -> Compared:
    """Samples a response to each of B prompts, and measures both divergences at its tokens.

    Args:
        keys: (B,) int64, one a prompt.
    """
    completions, rollout = sample(
        student, prompts, keys, sampling, tokenizer, sizes.rollout_batch_size, columns=()
    )
    buffer = RolloutBuffer(sizes.micro_batch_size, sizes.micro_batch_tokens)
    buffer.add(rollout)
    both = torch.zeros(2, len(prompts), dtype=torch.float64)  # reverse, forward
    for micro in buffer.micro_batches:
        interrupt.check()
        cells = divergence_pass(student, teacher, micro, sampling.temperature, 1.0, 0.0)
        both[:, micro.rows.cpu()] = cells.cpu().double().sum(1).T
    return Compared(completions, *both, rollout.response_mask.sum(1).cpu())


def evaluate_student(
    student: CausalLM, teacher: CausalLM, prompts: list[Prompt], sampling: Sampling,
    tokenizer: Tokenizer, sizes: PassSizes, seed: int,
) -> dict[str, float]:
    """Answers B held-out prompts once; a pure function of its arguments.

    Args:
        seed: of the keys, one for each place among the prompts, the same at every evaluation.
    Returns:
        kl, KL(student || teacher), and forward_kl, KL(teacher || student): nats a token, all tokens
        weighed alike; response_length: tokens; eos_rate: share that ended before the limit;
        distinct_2, as of other policies.
    Raises:
        UserError: a divergence is not finite (exit code 3).
        Stopped: a signal asked the run to stop.
    """
    keys = streams.key(seed, "evaluation", torch.arange(len(prompts)))  # (B,)
    found = compare(student, teacher, prompts, keys, sampling, tokenizer, sizes)
    tokens, reasons = int(found.tokens.sum()), found.completions.finish_reasons
    metrics = {
        "kl": float(found.kl.sum()) / tokens,
        "forward_kl": float(found.forward_kl.sum()) / tokens,
        "response_length": tokens / len(prompts),
        "eos_rate": 1 - reasons.count("length") / len(prompts),
        "distinct_2": distinct(found.completions.completions, 2),
    }
    check_finite("evaluation", metrics)
    return metrics


def student_table(
    student: CausalLM, teacher: CausalLM, step: int, prompts: list[Prompt], sampling: Sampling,
    tokenizer: Tokenizer, sizes: PassSizes, seed: int,
) -> list[dict]:
    """Responses to these prompts, each with its KL(student || teacher) in nats a token; at every
    call only the student differs."""
    keys = streams.key(seed, "sample table", torch.arange(len(prompts)))
    found = compare(student, teacher, prompts, keys, sampling, tokenizer, sizes)
    made, kls = found.completions, (found.kl / found.tokens).tolist()
    return [
        {"step": step, "kind": "sample", "prompt": prompt, "response": text,
         "finish_reason": reason, "kl": kl}
        for prompt, text, reason, kl in zip(
            made.prompts, made.completions, made.finish_reasons, kls, strict=True)
    ]
