"""Supervised fine-tuning of a model on demonstrations, or the training of a tiny one from nothing.

    loss = -(sum over target tokens of log pi(token | those before it)) / (number of target tokens)

With a prompt the targets are the answer's tokens, without one all that have a predecessor.
What is left out: packing several texts into one row, which would let them see each other.
Run it as `minirlhf sft`, `python -m minirlhf.recipes.sft`, or loop over `sft(...)`.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from minirlhf import interrupt
from minirlhf.batches.demonstrations import collate_texts, count_tokens, target_stats
from minirlhf.data.batching import cut_by_tokens, epoch_batches, total_steps
from minirlhf.data.examples import Text
from minirlhf.data.tokenizer import tokenizer_files
from minirlhf.errors import OK, STOPPED, run
from minirlhf.files import folders
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.lora import merge_lora
from minirlhf.models.transformer import CausalLM
from minirlhf.run import flags, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.run.meters import Step
from minirlhf.setup import memory_plans
from minirlhf.setup.common import named_files, write_model
from minirlhf.setup.sft import (
    choose_config,
    choose_tokenizer,
    keep_tokenizer,
    load,
    load_start,
    memory_plan,
)
from minirlhf.setup.sft_settings import SFTConfig


def accumulate(lm: CausalLM, batch: list[Text], config: SFTConfig, where: str) -> dict[str, float]:
    """Gradient of the mean loss over the targets of the whole batch, in micro-batches.

    Returns:
        loss and entropy, nats a target; grad_norm, before clipping.
    """
    lengths, counts = count_tokens(batch)
    sums, count = {"loss": 0.0, "entropy": 0.0}, int(counts.sum())  # no cut changes the count
    for part in cut_by_tokens(lengths, len(batch), config.micro_batch_tokens):
        here = [batch[i] for i in part.tolist()]
        stats = target_stats(lm, collate_texts(here))
        loss = -stats.logprobs.sum() / count
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(t.where for t in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        sums["loss"] += value
        sums["entropy"] += float(stats.entropy.detach().sum()) / count
    return sums | {"grad_norm": optim.clip_gradients(lm, config.max_grad_norm, where)}


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
    lm, N = state.model, len(texts)
    lengths, counts = count_tokens(texts)
    per_epoch = ceil(N / config.batch_size)
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
        batch, where = [texts[i] for i in rows.tolist()], f"step {state.step + 1}"
        metrics = optim.update_or_skip(
            state.optimizer, partial(accumulate, lm, batch, config, where),
            state.counters, config.skip_nonfinite,
        )
        state.step += 1
        state.samples += len(rows)
        tokens_here = int(lengths[rows].sum())
        state.count("num_tokens", tokens_here)
        if metrics is not None:
            tokens = {name: metrics[name] for name in ("loss", "entropy")}
            state.meters.update(tokens, int(counts[rows].sum()))
            state.meters.update({"grad_norm": metrics["grad_norm"]})
        metrics = (metrics or {}) | {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        seconds = time.perf_counter() - started
        clock = {"step_time": seconds, "tok_per_s": tokens_here / seconds}
        yield Step(state.step, metrics, clock, [])


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(lm: CausalLM, texts: list[Text], micro_batch_tokens: int = 4096) -> dict[str, float]:
    """loss and entropy, nats a target token over all texts, and perplexity = exp(loss)."""
    lengths, counts = count_tokens(texts)
    sums = torch.zeros(2, dtype=torch.float64)
    for part in cut_by_tokens(lengths, len(texts), micro_batch_tokens):
        interrupt.check()
        stats = target_stats(lm, collate_texts([texts[i] for i in part.tolist()]))
        sums += torch.stack((-stats.logprobs.sum(), stats.entropy.sum())).cpu()
    loss, entropy = sums / counts.sum()
    return {"loss": float(loss), "perplexity": float(loss.exp()), "entropy": float(entropy)}


def evaluate_all(
    r: Run, state: TrainState, sets: dict[str, list[Text]], config: SFTConfig
) -> dict[str, float]:
    """Every held-out set; the metrics under their prefixes."""
    metrics = {}
    for prefix, texts in sets.items():
        values = evaluate(state.model, texts, config.micro_batch_tokens)
        metrics |= {prefix + name: value for name, value in values.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        r.say(f"  {prefix.rstrip('_')}: {len(texts):,} texts  {shown}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(SFTConfig, argv, "minirlhf sft")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    files = {"": config.data} | named_files(config.eval_data)
    inputs = {"data": [config.data], "eval_data": [f for name, f in files.items() if name],
              "init_config": filter(None, [config.init_config])}
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(config, "sft", inputs)
    tokenizer = choose_tokenizer(config)
    if source := config.model or config.tokenizer:
        r.inputs["tokenizer"] = tokenizer_files(folders.resolve(source, weights=False))
    model_config = choose_config(config, tokenizer)
    most = model_config.longest_row
    read = {prefix: load(config, file, tokenizer, most) for prefix, file in files.items()}
    sets = {prefix: rows for prefix, (rows, _) in read.items()}
    texts = sets.pop("")
    make_deterministic(device)
    plan = memory_plan(config, model_config, texts, sets, dtype, process_bytes(device))
    start = [folders.resolve(config.model)] if config.model else []
    fits = memory_plans.announce(plan, start, dtype, device)
    lm = load_start(config, model_config, tokenizer, dtype).to(device)
    if config.compile:
        compile_blocks(lm)
    optimizer = optim.make_optimizer(
        lm, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    state = TrainState(lm, optimizer)
    steps = total_steps(len(texts), config.batch_size, config.epochs, config.steps)
    lengths, counts = count_tokens(texts)
    with r:
        if config.model is None and config.tokenizer is None:
            keep_tokenizer(tokenizer, r.folder)
        r.list_left_out(report for _, report in read.values())
        r.facts({
            "examples": len(texts), "tokens": int(lengths.sum()), "targets": int(counts.sum()),
            "epochs": f"{steps / ceil(len(texts) / config.batch_size):.2f}",
            "texts a step": config.batch_size, "steps": steps,
            "trainable parameters": sum(p.numel() for p in lm.parameters() if p.requires_grad),
            "memory": fits, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        })
        r.restore(state)
        for step in r.bar(sft(state, texts, config), state, steps):
            last = step.number == steps
            steady = ("learning_rate", "epoch", "num_tokens", "skipped_updates")
            extra = {name: step.metrics[name] for name in steady}
            evaluating = last or (config.eval_every and step.number % config.eval_every == 0)
            with r.report(state, step):
                if evaluating:
                    extra |= evaluate_all(r, state, sets, config)
                if evaluating or step.number % config.log_every == 0:
                    r.log(state, extra, step.clock, ("loss", "entropy", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        if config.lora_rank:
            merge_lora(lm)
        written = r.export(lambda target: write_model(lm, tokenizer, target))
        print(f"language model in {written}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
