"""Reward model: a scalar score learned from preferences, pairs or ranked lists of them.

    pairs  -q log sigmoid(d) - (1 - q) log sigmoid(-d),   d = chosen - rejected - margin
    lists  sum_i (log sum_{j not before i} exp(s_j) - s_i), or the mean of the first over all pairs
    both   + c (2 mean score)^2

Several heads on the trunk are an ensemble, each trained on a bootstrap of its own. What is left
out: classification heads of several labels, whose average is no reward.
Run it as `minirlhf reward`, `python -m minirlhf.recipes.reward`, or loop over `reward(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.batches.preferences import (
    Batch,
    Example,
    bootstrap_weights,
    count_tokens,
    kind_of,
    micro_batches,
    reads_before_eos,
    row_lengths,
)
from minirlhf.batches.preferences import (
    collate as collate_examples,
)
from minirlhf.data.batching import epoch_batches, total_steps
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.errors import OK, STOPPED, run
from minirlhf.evaluation.card import card_files
from minirlhf.evaluation.reward import (
    Evaluation,
    pair_rows,
    pair_table,
    preference_metrics,
    score_moments,
)
from minirlhf.files import atomic, folders
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, normalize_scores
from minirlhf.models.lora import merge_lora
from minirlhf.run import flags, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.run.meters import Step
from minirlhf.setup import memory_plans
from minirlhf.setup.common import named_files
from minirlhf.setup.reward import (
    RewardConfig,
    load,
    load_start,
    memory_plan,
    score_sets,
    write_model,
)

SHOWN = ("accuracy", "top1", "ties", "loss", "margin", "calibration_error")


def accumulate(
    model: RewardModel,
    examples: list[Example],
    weights: Tensor,
    config: RewardConfig,
    collate: Callable[[list[Example]], Batch],
    where: str,
) -> dict[str, float]:
    """Gradient of the mean loss over the examples of a step and the heads, in micro-batches.

    Args:
        weights: (N, H) of each example for each head.
    Returns:
        loss, grad_norm before clipping, and `preference_metrics`.
    """
    total, device = 0.0, model.score.weight.device
    seen: list[Example] = []
    scores: list[Tensor] = []
    for part in micro_batches(examples, config.micro_batch_tokens):
        here = [examples[i] for i in part.tolist()]
        batch = collate(here)
        each = model.head_scores(batch.tokens.to(device), batch.lengths.to(device))  # (M, H)
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
        scores += batch.split(model.combine(each.detach()))
    metrics = {"loss": total} | preference_metrics(seen, scores)
    optim.check_finite(where, metrics)
    return metrics | {"grad_norm": optim.clip_gradients(model, config.max_grad_norm, where)}


def reward(
    state: TrainState,
    examples: list[Example],
    config: RewardConfig,
    collate: Callable[[list[Example]], Batch] | None = None,
) -> Iterator[Step]:
    """Trains state.model, a RewardModel; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        examples: N preference pairs, or N ranked lists.
        config: only its training settings are read.
        collate: examples -> the batch that knows their loss; None: those of config.list_loss.
    Raises:
        UserError: a number is not finite (exit code 3); the step changed nothing.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one")
    model, N = state.model, len(examples)
    collate = collate or partial(collate_examples, list_loss=config.list_loss)
    lengths, per_epoch = row_lengths(examples), ceil(N / config.batch_size)
    steps = total_steps(N, config.batch_size, config.epochs, config.steps)
    epoch_of, batches = -1, []
    while state.step < steps:
        started = time.perf_counter()
        epoch, position = divmod(state.step, per_epoch)
        if epoch != epoch_of:
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
            epoch_of = epoch
        rows = batches[position]
        rate = optim.learning_rate(
            state.step, steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)
        batch, where = [examples[i] for i in rows.tolist()], f"step {state.step + 1}"
        weights = bootstrap_weights(config.seed, rows, model.heads)
        metrics = optim.update_or_skip(
            state.optimizer, partial(accumulate, model, batch, weights, config, collate, where),
            state.counters, config.skip_nonfinite,
        )
        state.step += 1
        state.samples += len(rows)
        tokens_here = sum(map(count_tokens, batch))
        state.count("num_tokens", tokens_here)
        if metrics is not None:
            state.meters.update(metrics, len(rows))
        metrics = (metrics or {}) | {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        seconds = time.perf_counter() - started
        clock = {"step_time": seconds, "tok_per_s": tokens_here / seconds}
        yield Step(state.step, metrics, clock, [])


def evaluate_all(
    r: Run,
    state: TrainState,
    sets: dict[str, list[Example]],
    config: RewardConfig,
    tokenizer: Tokenizer,
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix; tells the metrics and a table of pairs."""
    results = score_sets(state.model, sets, config)
    for prefix, result in results.items():
        held_out = sets[prefix]
        rows = pair_rows(result, tokenizer, config.show_samples)
        if rows:
            r.say(pair_table(rows))
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        shown = [n for n in SHOWN if n in result.metrics]
        numbers = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in shown)
        r.say(f"  {prefix.removesuffix('_')}: {len(held_out):,} {kind_of(held_out)}  {numbers}")
    return results


def finish(
    r: Run,
    model: RewardModel,
    train: list[Example],
    sets: dict[str, list[Example]],
    config: RewardConfig,
    tokenizer: Tokenizer,
    results: dict[str, Evaluation] | None,
) -> None:
    """Normalises the trained model, writes its folder, and the card of what was held out.

    All of it is a function of the last checkpoint, so a run that is stopped here does it again.

    Args:
        results: of the last step, if this process made it.
    """
    if config.lora_rank:
        merge_lora(model)
    facts = {"heads": model.heads, "lcb_coef": model.lcb_coef}
    facts |= r.provenance()
    if config.normalize != "none":
        over = [train] if config.normalize == "train" else sets.values()
        mean, std = score_moments(model, over, config.micro_batch_tokens, "--normalize")
        normalize_scores(model, mean, std)
        facts["normalized"] = {"over": config.normalize, "mean": mean, "std": std}
        print(f"scores of {config.normalize} had mean {mean:.4f} and std {std:.4f}: normalised")
    if results is None or config.lora_rank or config.normalize != "none":  # not this model's
        results = score_sets(model, sets, config)
    by_name = {prefix.removesuffix("_"): result for prefix, result in results.items()}
    files = card_files(facts, by_name, tokenizer)

    def write(target: Path) -> None:
        write_model(model, tokenizer, target)
        for name, text in files.items():
            atomic.write_text(target / name, text)

    folder = r.export(write)
    for name, text in files.items():
        r.write_file(name, text)
    print(f"reward model in {folder}")


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(RewardConfig, argv, "minirlhf reward")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    files = {"": config.data} | named_files(config.eval_data)
    held_out = [file for name, file in files.items() if name]
    r = Run(config, "reward", {"data": [config.data], "eval_data": held_out})
    folder = folders.resolve(config.model)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    r.inputs["model"] = tokenizer_files(folder)
    before_eos = reads_before_eos(model_config, tokenizer)
    read = {
        prefix: load(config, file, tokenizer, model_config, before_eos)
        for prefix, file in files.items()
    }
    sets = {prefix: rows for prefix, (rows, _) in read.items()}
    examples = sets.pop("")
    make_deterministic(device)
    plan = memory_plan(config, model_config, examples, sets, dtype, process_bytes(device))
    fits = memory_plans.announce(plan, [folder], dtype, device)
    model = load_start(config, before_eos, device, dtype)
    optimizer = optim.make_optimizer(
        model, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    state = TrainState(model, optimizer)
    steps = total_steps(len(examples), config.batch_size, config.epochs, config.steps)
    results = None
    with r:
        r.list_left_out(report for _, report in read.values())
        r.facts({
            "examples": len(examples),
            "epochs": f"{steps / ceil(len(examples) / config.batch_size):.2f}",
            f"{kind_of(examples)} a step": config.batch_size, "steps": steps,
            "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory": fits, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        })
        r.restore(state)
        for step in r.bar(reward(state, examples, config), state, steps):
            last = step.number == steps
            steady = ("learning_rate", "epoch", "num_tokens", "skipped_updates")
            extra = {name: step.metrics[name] for name in steady}
            evaluating = last or (config.eval_every and step.number % config.eval_every == 0)
            with r.report(state, step):
                if evaluating:
                    results = evaluate_all(r, state, sets, config, tokenizer)
                    for prefix, result in results.items():
                        extra |= {prefix + name: v for name, v in result.metrics.items()}
                if evaluating or step.number % config.log_every == 0:
                    r.log(state, extra, step.clock, ("loss", "accuracy", "margin", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        finish(r, model, examples, sets, config, tokenizer, results)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
