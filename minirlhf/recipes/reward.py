"""Reward model: a scalar score learned from preferences, pairs or ranked lists of them.

    pairs  -q log sigmoid(d) - (1 - q) log sigmoid(-d),   d = chosen - rejected - margin
    lists  sum_i (log sum_{j not before i} exp(s_j) - s_i), or the mean of the first over all pairs
    both   + c (2 mean score)^2

Several heads on the trunk are an ensemble, each trained on a bootstrap of its own. The same with
default settings on one page, for pairs: `minirlhf/lessons/reward.py`.

Run it as `minirlhf reward` or `python minirlhf/recipes/reward.py`, or loop over `reward(...)`. Left
out: classification heads of several labels, whose average is no reward.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches import preferences
from minirlhf.batches.preferences import Batch, Example, PairLoss, bootstrap_weights
from minirlhf.data.batching import total_steps, training_batches
from minirlhf.equations.preference import bradley_terry_loss
from minirlhf.errors import OK, run
from minirlhf.evaluation.card import card_files
from minirlhf.evaluation.report.page import write_report
from minirlhf.evaluation.reward import (
    Evaluation,
    pair_rows,
    pair_table,
    preference_metrics,
    score_moments,
)
from minirlhf.files import atomic
from minirlhf.models.dropout import dropout_of
from minirlhf.models.heads import RewardModel, normalize_scores
from minirlhf.models.lora import merged_copy
from minirlhf.models.parallel import accumulated, whole
from minirlhf.run import flags, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.common import base_name, use_of_adapter
from minirlhf.setup.reward import load_run, score_sets, write_reward_model
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.training import STEADY, TrainingRun

SHOWN = ("accuracy", "top1", "ties", "loss", "margin", "calibration_error")


def reward(
    state: TrainState, examples: list[Example], config: RewardConfig,
    pair_loss: PairLoss = bradley_terry_loss,
    collate: Callable[[list[Example]], Batch] | None = None,
) -> Iterator[Step]:
    """Trains state.model, a RewardModel; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        examples: N preference pairs, or N ranked lists.
        config: only its training settings are read.
        pair_loss: (chosen, rejected, margin, probability, label_smoothing) -> losses of P pairs.
        collate: examples -> the batch that the model reads, with its own loss; None: one with
            pair_loss and config.list_loss.
    Raises:
        UserError: a number is not finite (exit code 3); the step changed nothing.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one")
    if collate is not None and pair_loss is not bradley_terry_loss:
        raise ValueError("pair_loss and collate: give one, a batch of collate has its own loss")
    collate = collate or partial(
        preferences.collate, list_loss=config.list_loss, pair_loss=pair_loss
    )
    N, lengths = len(examples), preferences.row_lengths(examples)
    steps = total_steps(N, config.batch_size, config.epochs, config.steps)
    batches = training_batches(lengths, config.batch_size, config.seed, state.step)
    for rows in islice(batches, steps - state.step):
        watch, metrics = Stopwatch(), {}
        rate = optim.follow_schedule(state.optimizer, state.step, steps, config)
        batch = [examples[i] for i in rows.tolist()]
        weights = bootstrap_weights(config.seed, rows, state.model.heads)
        with optim.skip_nonfinite(state.optimizer, state.counters, config.skip_nonfinite):
            metrics = update_weights(state, batch, weights, config, collate)
            state.meters.update(metrics, len(rows))
        state.step += 1
        state.samples += len(rows)
        tokens_here = sum(map(preferences.count_tokens, batch))
        state.count("num_tokens", tokens_here)
        epoch = state.step / ceil(N / config.batch_size)
        metrics |= {"learning_rate": rate, "epoch": epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        clock = watch.clock("step_time", {"tok_per_s": tokens_here})
        yield Step(state.step, metrics, clock, [])


def update_weights(
    state: TrainState, examples: list[Example], weights: Tensor, config: RewardConfig,
    collate: Callable[[list[Example]], Batch],
) -> dict[str, float]:
    """One optimizer step on the mean loss over examples and heads, in micro-batches.

    Args:
        weights: (N, H) of each example for each head.
    Returns:
        loss, grad_norm before clipping, and `preference_metrics`.
    """
    model, where = state.model, f"step {state.step + 1}"
    total, device = 0.0, model.score.weight.device
    seen: list[Example] = []
    scores: list[Tensor] = []
    state.optimizer.zero_grad()
    parts = preferences.micro_batches(examples, config.micro_batch_tokens)
    for part in accumulated(model, parts):
        here = [examples[i] for i in part.tolist()]
        batch = collate(here)
        rows = preferences.text_numbers(examples, part.tolist())
        dropout = dropout_of(config.lora_dropout, config.seed, state.step, rows)
        tokens, lengths = batch.tokens.to(device), batch.lengths.to(device)
        each = model.head_scores(tokens, lengths, dropout)  # (M, H)
        losses = [
            batch.loss(head, config.label_smoothing, config.center_rewards_coefficient)
            for head in each.unbind(1)
        ]
        loss = torch.stack(losses, 1) * weights[part].to(each)  # (N, H)
        loss = loss.mean(1).sum() / len(examples)
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(e.where for e in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        total += value
        seen += here
        scores += batch.split(model.combine(each.detach()).cpu())
    metrics = {"loss": total} | preference_metrics(seen, scores)
    optim.check_finite(where, metrics)
    grad_norm = optim.clip_gradients(model, config.max_grad_norm, where)
    state.optimizer.step()
    optim.check_weights(state.optimizer, where)
    return metrics | {"grad_norm": grad_norm}


# ------------------------------------------------------------------------------- the command line


def evaluate_all(
    start: TrainingRun[Example], pair_loss: PairLoss
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix; tells the metrics and a table of pairs."""
    r, state, config = start.run, start.state, start.config
    results = score_sets(state.model, start.sets, config, pair_loss)
    for prefix, result in results.items():
        held_out = start.sets[prefix]
        rows = pair_rows(result, start.tokenizer, config.show_samples)
        if rows:
            r.display.samples(state.step, [pair_table(rows)], rows)
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        kind = preferences.kind_of(held_out)
        r.display.evaluation(prefix, f"{len(held_out):,} {kind}", result.metrics, SHOWN)
    return results


def finish(
    start: TrainingRun[Example], adapted: RewardModel, results: dict[str, Evaluation] | None,
    pair_loss: PairLoss,
) -> None:
    """Normalises the trained model, writes its folder or folders, and the card of what was held
    out.

    All of it is a function of the last checkpoint, so a run that is stopped here does it again.

    Args:
        adapted: the trained model, whole.
        results: of the last step, if this process made it.
    """
    config, r, sets = start.config, start.run, start.sets
    model = merged_copy(adapted) if config.lora_rank and config.merge else adapted
    facts = {"heads": model.heads, "lcb_coef": model.lcb_coef}
    facts |= r.provenance()
    if config.normalize != "none":
        over = [start.rows] if config.normalize == "train" else sets.values()
        mean, std = score_moments(model, over, config.micro_batch_tokens, "--normalize")
        normalize_scores(model, mean, std)
        facts["normalized"] = {"over": config.normalize, "mean": mean, "std": std}
        r.say(f"scores of {config.normalize} had mean {mean:.4f} and std {std:.4f}: normalised")
    if results is None or config.lora_rank or config.normalize != "none":  # not this model's
        results = score_sets(model, sets, config, pair_loss)
    by_name = {prefix.removesuffix("_"): result for prefix, result in results.items()}
    files = card_files(facts, by_name, start.tokenizer)

    def write(written: RewardModel, target: Path) -> None:
        write_reward_model(written, start.tokenizer, target, base_name(config), config.lora_dropout)
        for name, text in files.items():
            atomic.write_text(target / name, text)

    if config.lora_rank:  # the head is one, what normalises its scores is not
        adapted.reward_mean, adapted.reward_std = model.reward_mean, model.reward_std
        r.done("adapter", r.export(partial(write, adapted), "adapter"))
        for line in use_of_adapter(r.folder / "adapter", base_name(config), model.heads):
            r.say(f"  {line}")
    if config.merge:
        r.done("reward model", r.export(partial(write, model)))
    for name, text in files.items():
        r.write_file(name, text)
    write_report(r)


def main(argv: list[str] | None = None, pair_loss: PairLoss = bradley_terry_loss) -> int:
    """The command; pair_loss: as in `reward`, for a script of your own."""
    start = load_run(flags.parse(RewardConfig, argv, "minirlhf reward"))
    config, r, state, results = start.config, start.run, start.state, None
    with r:
        start.begin()
        for step in r.bar(reward(state, start.rows, config, pair_loss), state, start.steps):
            evaluating = start.is_due(step, config.eval_every)
            with r.report(state, step):
                extra = {name: step.metrics[name] for name in STEADY}
                if evaluating:
                    results = evaluate_all(start, pair_loss)
                    for prefix, result in results.items():
                        extra |= {prefix + name: v for name, v in result.metrics.items()}
                if evaluating or start.is_due(step, config.log_every):
                    r.log(state, extra, step.clock, ("loss", "accuracy", "margin", "grad_norm"))
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        with whole(state.model) as trained:
            finish(start, trained, results, pair_loss)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
