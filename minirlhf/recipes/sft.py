"""Supervised fine-tuning of a model on demonstrations, or the training of a tiny one from nothing.

    loss = -(sum over target tokens of log pi(token | those before it)) / (number of target tokens)

With a prompt the targets are the answer's tokens, of a dialogue those of each turn of the assistant
(`--train-on`), of a plain text all that have a predecessor. The same with default settings on one
page: `minirlhf/lessons/sft.py`.

Run it as `minirlhf sft` or `python minirlhf/recipes/sft.py`, or loop over `sft(...)`. Left out:
packing several texts into one row, which would let them see each other.
"""

import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf import interrupt, ranks
from minirlhf.batches.demonstrations import collate_texts, count_tokens, target_stats
from minirlhf.console import progress
from minirlhf.data.batching import cut_by_tokens, total_steps, training_batches
from minirlhf.data.examples import Text
from minirlhf.errors import OK, run
from minirlhf.models.dropout import dropout_of
from minirlhf.models.parallel import accumulated
from minirlhf.models.transformer import CausalLM
from minirlhf.run import flags, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.sft import keep_tokenizer, load_run
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.setup.training import STEADY, TrainingRun

PER_TOKEN = ("loss", "entropy", "mean_token_accuracy")  # means over target tokens


def sft(state: TrainState, texts: list[Text], config: SFTConfig) -> Iterator[Step]:
    """Trains state.model, a CausalLM; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        texts: N demonstrations.
        config: only its training settings are read.
    Raises:
        UserError: a text of one token; a number is not finite (exit code 3), the step then changed
            nothing.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one")
    lengths, counts = count_tokens(texts)
    per_epoch = math.ceil(len(texts) / config.batch_size)
    steps = total_steps(len(texts), config.batch_size, config.epochs, config.steps)
    batches = training_batches(lengths, config.batch_size, config.seed, state.step)
    for rows in islice(batches, steps - state.step):
        watch, metrics = Stopwatch(), {}
        rate = optim.follow_schedule(state.optimizer, state.step, steps, config)
        batch = [texts[i] for i in rows.tolist()]
        with optim.skip_nonfinite(state.optimizer, state.counters, config.skip_nonfinite):
            metrics = update_weights(state, batch, config)
            tokens = {name: metrics[name] for name in PER_TOKEN}
            state.meters.update(tokens, int(counts[rows].sum()))
            state.meters.update({"grad_norm": metrics["grad_norm"]})
        state.step += 1
        state.samples += len(rows)
        tokens_here = int(lengths[rows].sum())
        state.count("num_tokens", tokens_here)
        metrics |= {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        clock = watch.clock("step_time", {"tok_per_s": tokens_here})
        yield Step(state.step, metrics, clock, [])


def update_weights(state: TrainState, batch: list[Text], config: SFTConfig) -> dict[str, float]:
    """One optimizer step on the mean loss over the targets of a batch, in micro-batches.

    Returns:
        loss and entropy, nats a target; mean_token_accuracy; grad_norm, before clipping.
    """
    lm, where = state.model, f"step {state.step + 1}"
    lengths, counts = count_tokens(batch)
    sums, count = dict.fromkeys(PER_TOKEN, 0.0), int(counts.sum())  # whatever the micro-batches
    state.optimizer.zero_grad()
    parts = cut_by_tokens(lengths, len(batch), config.micro_batch_tokens)
    for part in accumulated(lm, parts):
        here = [batch[i] for i in part.tolist()]
        dropout = dropout_of(config.lora_dropout, config.seed, state.step, part)
        stats = target_stats(lm, collate_texts(here), dropout)
        loss = -stats.logprobs.sum() / count
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(t.where for t in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        sums["loss"] += value
        sums["entropy"] += float(stats.entropy.detach().sum()) / count
        sums["mean_token_accuracy"] += int(stats.greedy.sum()) / count
    grad_norm = optim.clip_gradients(lm, config.max_grad_norm, where)
    state.optimizer.step()
    optim.check_weights(state.optimizer, where)
    return sums | {"grad_norm": grad_norm}


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(lm: CausalLM, texts: list[Text], micro_batch_tokens: int = 4096) -> dict[str, float]:
    """loss and entropy, nats a target token over all texts, perplexity = exp(loss), and
    mean_token_accuracy."""
    lengths, counts = count_tokens(texts)
    sums = torch.zeros(3, dtype=torch.float64)
    parts = list(cut_by_tokens(lengths, len(texts), micro_batch_tokens))
    for part in progress(parts, "evaluate", unit=" micro-batches"):
        interrupt.check()
        stats = target_stats(lm, collate_texts([texts[i] for i in part.tolist()]))
        sums += torch.stack((-stats.logprobs.sum(), stats.entropy.sum(), stats.greedy.sum())).cpu()
    loss, entropy, accuracy = (sums / counts.sum()).tolist()
    return {"loss": loss, "perplexity": math.exp(loss), "entropy": entropy,
            "mean_token_accuracy": accuracy}


def evaluate_all(start: TrainingRun[Text]) -> dict[str, float]:
    """Every held-out set; the metrics under their prefixes."""
    metrics = {}
    for prefix, texts in start.sets.items():
        values = evaluate(start.state.model, texts, start.config.micro_batch_tokens)
        metrics |= {prefix + name: value for name, value in values.items()}
        start.run.display.evaluation(prefix, f"{len(texts):,} texts", values, values)
    return metrics


def main(argv: list[str] | None = None) -> int:
    start = load_run(flags.parse(SFTConfig, argv, "minirlhf sft"))
    config, r, state = start.config, start.run, start.state
    with r:
        if config.model is None and config.tokenizer is None:
            ranks.from_first(lambda: keep_tokenizer(start.tokenizer, r.folder))
        start.begin()
        # where a signal stopped the first step, the evaluation before it is there
        if start.sets and state.step == 0 and not state.log_bytes["metrics.jsonl"]:
            r.log(state, evaluate_all(start), {}, ())
        for step in r.bar(sft(state, start.rows, config), state, start.steps):
            evaluating = start.is_due(step, config.eval_every)
            with r.report(state, step):
                extra = {name: step.metrics[name] for name in STEADY}
                extra |= evaluate_all(start) if evaluating else {}
                if evaluating or start.is_due(step, config.log_every):
                    r.log(state, extra, step.clock, (*PER_TOKEN, "grad_norm"))
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        start.finish("language model", state.model)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
