"""A reward model on one page: a scalar score, learned from which of two responses people prefer.

    python minirlhf/lessons/reward.py MODEL DATA OUT [STEPS]

MODEL is a language model's Hugging Face folder, DATA a file of preference pairs (prompt, chosen,
rejected; margin and chosen_probability where there are any), OUT takes the reward model. This is
`minirlhf reward` with default settings on a CPU, to the last bit of the weights.
"""

import sys
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf import streams
from minirlhf.batches.preferences import (
    collate_pairs,
    micro_batches,
    row_lengths,
    unread_end,
    without_unread,
)
from minirlhf.data.batching import training_batches
from minirlhf.data.examples import Pair, load_pairs
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.equations.preference import bradley_terry_loss
from minirlhf.errors import BAD_INPUT, run
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import load_pretrained
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from minirlhf.setup.reward import write_reward_model

SEED = 0
BATCH_SIZE = 16  # pairs in an optimizer step
MICRO_BATCH_TOKENS = 4096  # most tokens, padding too, in one forward pass
LEARNING_RATE = 1e-5  # at the start; it falls linearly to 0
MAX_GRAD_NORM = 1.0
MAX_LENGTH = 1024  # tokens; longer pairs are left out


def train_reward_model(model: RewardModel, pairs: list[Pair], steps: int) -> None:
    """Minimises the Bradley-Terry loss. One epoch is usual: a second one overfits (Ouyang et al.
    2022, arXiv:2203.02155, app. C.2)."""
    optimizer = make_optimizer(model, LEARNING_RATE)  # AdamW (arXiv:1711.05101)
    batches = training_batches(row_lengths(pairs), BATCH_SIZE, SEED)
    for step, rows in enumerate(islice(batches, steps)):
        set_learning_rate(optimizer, learning_rate(step, steps, LEARNING_RATE, 0, "linear"))
        batch = [pairs[i] for i in rows.tolist()]
        total = 0.0
        optimizer.zero_grad()
        for part in micro_batches(batch, MICRO_BATCH_TOKENS):
            loss = summed_loss(model, [batch[i] for i in part.tolist()]) / len(batch)
            loss.backward()
            total += loss.item()
        clip_gradients(model, MAX_GRAD_NORM, "reward")
        optimizer.step()
        print(f"step {step + 1}  loss {total:.4f}")  # log 2 where all scores are equal


def summed_loss(model: RewardModel, pairs: list[Pair]) -> torch.Tensor:
    """The sum over pairs of the negative log-probability that the chosen response is preferred.
    Bradley and Terry 1952; the margin m: Touvron et al. 2023 (arXiv:2307.09288), eq. 2.

        loss = -log sigmoid(d),   d = r(chosen) - r(rejected) - m
        with a probability q that the label is right:   -q log sigmoid(d) - (1 - q) log sigmoid(-d)

    A text's score r is read at its last token, which alone has seen all of it.
    """
    batch = collate_pairs(pairs)  # N chosen texts, then N rejected ones: one pass scores them all
    chosen, rejected = model(batch.tokens, batch.lengths).chunk(2)  # (N,) each
    margin, probability = batch.margin, batch.chosen_probability  # m, q: 0 and 1 by default
    return bradley_terry_loss(chosen, rejected, margin, probability).sum()


def main(model: str, data: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer, lm = load_tokenizer(model), load_pretrained(model, torch.float32)
    # transformers reads a score at the last token that is no padding, of a dialogue behind all that
    # its chat template writes. A tokenizer without a token to spare pads with eos, so that the
    # token before eos is read: then train on texts without it.
    unread = unread_end(lm.config, tokenizer)
    finish = None if unread is None else partial(without_unread, unread=unread)
    pairs, report = load_pairs(
        data, tokenizer, MAX_LENGTH, overlong="drop", finish=finish, whole=True
    )
    print(report)
    reward_model = RewardModel(lm, unread)
    # The head from N(0, 1/(D + 1)): Stiennon et al. 2020 (arXiv:2009.01325).
    initialize_score(reward_model, streams.generator(SEED, "reward head"))
    Path(out).mkdir(parents=True)  # refused where it exists
    train_reward_model(reward_model, pairs, int(steps or ceil(len(pairs) / BATCH_SIZE)))
    write_reward_model(reward_model, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (3, 4) or not "".join(sys.argv[4:] or "1").isdecimal():
        print("usage: python reward.py MODEL DATA OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
