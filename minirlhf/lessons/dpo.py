"""DPO on one page: a policy learns which of two responses people prefer, without a reward model.

    python minirlhf/lessons/dpo.py MODEL DATA OUT [STEPS]

MODEL is a Hugging Face folder, the policy to begin with and its own reference; DATA a file of
preference pairs (prompt, chosen, rejected); OUT takes the trained model. This is `minirlhf dpo`
with default settings on a CPU, to the last bit of the weights.
"""

import sys
from itertools import islice
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf.batches.preferences import micro_batches, row_lengths
from minirlhf.batches.responses import collate_answers, ref_logprobs, response_stats, with_answers
from minirlhf.data.batching import training_batches
from minirlhf.data.examples import Pair, load_pairs
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.equations.dpo import dpo_loss
from minirlhf.errors import BAD_INPUT, run
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.transformer import CausalLM
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from minirlhf.setup.common import write_model

SEED = 0
BATCH_SIZE = 16  # pairs in an optimizer step
MICRO_BATCH_TOKENS = 4096  # most tokens, padding too, in one forward pass
LEARNING_RATE = 1e-6  # at the start; it falls linearly to 0
MAX_GRAD_NORM = 1.0
MAX_LENGTH = 1024  # tokens; longer pairs are left out
BETA = 0.1  # a larger one holds the policy nearer to the reference


def dpo(policy: CausalLM, ref: CausalLM, pairs: list[Pair], steps: int) -> None:
    """Makes chosen responses more likely than rejected ones, as measured from the reference."""
    optimizer = make_optimizer(policy, LEARNING_RATE)  # AdamW (arXiv:1711.05101)
    batches = training_batches(row_lengths(pairs), BATCH_SIZE, SEED)  # shuffled each epoch
    for step, rows in enumerate(islice(batches, steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, LEARNING_RATE, 0, "linear"))
        batch = [pairs[i] for i in rows.tolist()]
        total = 0.0
        optimizer.zero_grad()
        for part in micro_batches(batch, MICRO_BATCH_TOKENS):
            loss = summed_loss(policy, ref, [batch[i] for i in part.tolist()]) / len(batch)
            loss.backward()
            total += loss.item()
        clip_gradients(policy, MAX_GRAD_NORM, "dpo")
        optimizer.step()
        print(f"step {step + 1}  loss {total:.4f}")  # log 2 at step 1: the policy is the reference


def summed_loss(policy: CausalLM, ref: CausalLM, pairs: list[Pair]) -> torch.Tensor:
    """The sum over pairs of the negative log-probability that the chosen response y_c is preferred
    to the rejected one y_r, for the rewards that would make this policy the best one. Rafailov et
    al. 2023 (arXiv:2305.18290), eq. 7.

        reward(y) = beta (log policy(y) - log ref(y)),   log policy(y) a sum over tokens of y
        loss      = -log sigmoid(reward(y_c) - reward(y_r))

    Both models read the same batch, since log-probs depend on its shape in their last bits.
    """
    texts = collate_answers(pairs).texts  # N chosen texts, then N rejected ones
    chosen, rejected = response_stats(policy, texts).logprobs.chunk(2)  # (N,) nats each
    ref_chosen, ref_rejected = ref_logprobs(ref, texts).chunk(2)  # without gradient
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA).loss.sum()


def main(model: str, data: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer = load_tokenizer(model)
    pairs, report = load_pairs(data, tokenizer, MAX_LENGTH, overlong="drop", finish=with_answers)
    print(report)
    policy = load_pretrained(model, torch.float32)
    ref = load_pretrained(model, torch.float32).requires_grad_(False)
    Path(out).mkdir(parents=True)  # refused where it exists
    dpo(policy, ref, pairs, int(steps or ceil(len(pairs) / BATCH_SIZE)))  # or one epoch
    write_model(policy, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (3, 4) or not "".join(sys.argv[4:] or "1").isdecimal():
        print("usage: python dpo.py MODEL DATA OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
