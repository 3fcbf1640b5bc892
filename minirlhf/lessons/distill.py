"""On-policy distillation on one page: a student learns from a teacher where it stands itself.

    python minirlhf/lessons/distill.py MODEL TEACHER DATA OUT [STEPS]

MODEL is the student's Hugging Face folder, TEACHER that of a larger or better model with the same
tokenizer, DATA a file of prompts, OUT takes the trained student. This is `minirlhf distill` with
default settings on a CPU, to the last bit of the weights.

SFT on a teacher's texts (lessons/sft.py) shows the student only where the teacher goes; once it has
erred it stands where nobody taught it. Here the student writes, and the teacher says at each of its
tokens how likely every word would have been. That is a score of all V words at every token, where
PPO (lessons/ppo.py) has one number for a whole response.

Shapes: B prompts of a step, b rows of a micro-batch, N response tokens in all rows of it, D and D'
hidden sizes, V vocabulary.
"""

import sys
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf import streams
from minirlhf.batches.collect import sample
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, lm_states
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt, load_prompts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import BAD_INPUT, UserError, run
from minirlhf.models.divergence import token_divergence
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from minirlhf.setup.common import write_model

SEED = 0
BATCH_SIZE = 32  # B, prompts of a step, one response each
MAX_NEW_TOKENS = 64
TEMPERATURE = 1.0  # of sampling and of both distributions
BETA = 1.0  # KL(student || teacher); 0 is KL(teacher || student)
MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS = 8, 4096  # most rows, most tokens (padding too) in a pass
LEARNING_RATE = 1e-5  # at the start; it falls linearly to 0
MAX_GRAD_NORM = 1.0


def distill(
    student: CausalLM, teacher: CausalLM, prompts: list[Prompt], tokenizer: Tokenizer, steps: int
) -> None:
    """Brings the student near to the teacher wherever the student itself goes. Agarwal et al. 2024
    (arXiv:2306.13649), algorithm 1 with all data from the student (lambda 1)."""
    optimizer = make_optimizer(student, LEARNING_RATE)  # AdamW (arXiv:1711.05101)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, steps, LEARNING_RATE, 0, "linear"))

        # Sample. The responses are what both models read below; no gradient passes through them.
        rows = next_rows(step * BATCH_SIZE, BATCH_SIZE, len(prompts), SEED)
        keys = streams.key(SEED, "rollout", step, rows, torch.arange(BATCH_SIZE))
        _, rollout = sample(
            student, [prompts[i] for i in rows.tolist()], keys,
            Sampling(MAX_NEW_TOKENS, TEMPERATURE), tokenizer, rows_at_once=256, columns=(),
        )

        # Learn. Each response token weighs the same, whichever response it stands in.
        buffer = RolloutBuffer(MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS)
        buffer.add(rollout)
        tokens, total = int(rollout.response_mask.sum()), 0.0
        optimizer.zero_grad()
        for micro in buffer.micro_batches:
            loss = divergences(student, teacher, micro).sum() / tokens
            loss.backward()
            total += loss.item()
        clip_gradients(student, MAX_GRAD_NORM, f"step {step + 1}")
        optimizer.step()
        print(f"step {step + 1}  KL(student || teacher) {total:.4f} nats per token")


def divergences(student: CausalLM, teacher: CausalLM, micro: Rollout) -> torch.Tensor:
    """(N,) nats, how far the two distributions of each next token lie apart.

        KL(p || q) = sum over words v of p_v (log p_v - log q_v),   p the student's, q the teacher's

    It is exact: all V words count, not only the one that was sampled. In this direction a student
    that is too small for all that the teacher might say gives up some of it; in the other
    (BETA = 0) it would have to cover everything, and say too what the teacher never would.
    """
    states = lm_states(student, micro)  # (N, D), before each response token
    with torch.no_grad():
        teacher_states = lm_states(teacher, micro)  # (N, D')
    return token_divergence(student, states, teacher, teacher_states, BETA, TEMPERATURE)


def main(model: str, teacher: str, data: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer = load_tokenizer(model)
    if load_tokenizer(teacher).fingerprint != tokenizer.fingerprint:
        raise UserError(teacher, "has another tokenizer than the student")
    lms = [load_pretrained(folder, torch.float32) for folder in (model, teacher)]
    max_prompt_length = min(lm.config.longest_row for lm in lms) - MAX_NEW_TOKENS
    if max_prompt_length < 1:
        raise UserError(model, f"reads too few tokens for {MAX_NEW_TOKENS} new ones")
    prompts, report = load_prompts(data, tokenizer, max_prompt_length, overlong="error")
    print(report)
    Path(out).mkdir(parents=True)  # refused where it exists
    student, frozen = lms[0], lms[1].requires_grad_(False)
    distill(student, frozen, prompts, tokenizer, int(steps or ceil(len(prompts) / BATCH_SIZE)))
    write_model(student, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (4, 5) or not "".join(sys.argv[5:] or "1").isdecimal():
        print("usage: python distill.py MODEL TEACHER DATA OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
