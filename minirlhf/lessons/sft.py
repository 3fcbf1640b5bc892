"""Supervised fine-tuning on one page: a language model learns to answer as demonstrations do.

    python minirlhf/lessons/sft.py MODEL DATA OUT [STEPS]

MODEL is a Hugging Face folder, DATA a file of texts or of prompts with responses, OUT takes the
trained model. This is `minirlhf sft` with default settings on a CPU, to the last bit of the
weights.
"""

import sys
from itertools import islice
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf.batches.demonstrations import collate_texts, count_tokens, target_stats
from minirlhf.data.batching import cut_by_tokens, training_batches
from minirlhf.data.examples import Text, load_texts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import BAD_INPUT, run
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.transformer import CausalLM
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from minirlhf.setup.common import write_model

SEED = 0
BATCH_SIZE = 16  # texts in an optimizer step
MICRO_BATCH_TOKENS = 4096  # most tokens, padding too, in one forward pass
LEARNING_RATE = 2e-5  # at the start; it falls linearly to 0
MAX_GRAD_NORM = 1.0
MAX_LENGTH = 1024  # tokens; longer texts are left out


def sft(lm: CausalLM, texts: list[Text], steps: int) -> None:
    """Maximises the likelihood of the target tokens: those of the response, its eos too, or all but
    the first of a text without prompt."""
    optimizer = make_optimizer(lm, LEARNING_RATE)  # AdamW (arXiv:1711.05101)
    batches = training_batches(count_tokens(texts)[0], BATCH_SIZE, SEED)  # shuffled each epoch
    for step, rows in enumerate(islice(batches, steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, LEARNING_RATE, 0, "linear"))
        batch = [texts[i] for i in rows.tolist()]
        lengths, targets = count_tokens(batch)
        total = 0.0
        optimizer.zero_grad()
        for part in cut_by_tokens(lengths, len(batch), MICRO_BATCH_TOKENS):
            loss = sft_loss(lm, [batch[i] for i in part.tolist()], int(targets.sum()))
            loss.backward()
            total += loss.item()
        clip_gradients(lm, MAX_GRAD_NORM, "sft")
        optimizer.step()
        print(f"step {step + 1}  loss {total:.4f} nats a target token")


def sft_loss(lm: CausalLM, texts: list[Text], targets: int) -> torch.Tensor:
    """The micro-batch's share of the mean loss over all targets of the optimizer step, so that no
    split into micro-batches changes the gradient. SFT of Ouyang et al. 2022 (arXiv:2203.02155).

        loss = -(sum over target tokens of log pi(token | the tokens before it)) / targets
    """
    logprobs = target_stats(lm, collate_texts(texts)).logprobs  # (n,) nats
    return -logprobs.sum() / targets


def main(model: str, data: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer, lm = load_tokenizer(model), load_pretrained(model, torch.float32)
    texts, report = load_texts(data, tokenizer, MAX_LENGTH, overlong="drop")
    print(report)
    Path(out).mkdir(parents=True)  # refused where it exists
    sft(lm, texts, int(steps or ceil(len(texts) / BATCH_SIZE)))  # or one epoch
    write_model(lm, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (3, 4) or not "".join(sys.argv[4:] or "1").isdecimal():
        print("usage: python sft.py MODEL DATA OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
