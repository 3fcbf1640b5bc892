"""On-policy distillation: a student learns from a teacher at each token that the student writes.

    loss = sum over response tokens t of D(teacher(. | s_t), student(. | s_t)) / response tokens

The student answers prompts; student and teacher then read these responses, and D compares their
whole distributions of the next token: by default the reverse KL(student || teacher), by --gkd-beta
the forward one or a mix. No gradient passes through sampling. Agarwal et al. 2024
(arXiv:2306.13649), sec. 3. The same with default settings on one page: `lessons/distill.py`.

Run it as `minirlhf distill` or `python minirlhf/recipes/distill.py`, or loop over `distill(...)`.
Left out: responses of the teacher or of the data (`minirlhf sft` learns from these), a reward
beside the teacher.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf import interrupt, streams
from minirlhf.batches.collect import sample
from minirlhf.batches.distillation import divergence_pass
from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.data.batching import next_rows, total_steps
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import OK, run
from minirlhf.evaluation.distill import evaluate_student, student_table
from minirlhf.evaluation.groups import length_statistics
from minirlhf.evaluation.samples import show_samples
from minirlhf.models.parallel import accumulated
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions
from minirlhf.run import flags, optim, settings
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.distill import DistillRun, load_run
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.policy import sampling_of
from minirlhf.setup.training import STEADY

CONSOLE = ("loss", "grad_norm", "completions/mean_length", "completions/clipped_ratio")


def distill(
    state: TrainState, prompts: list[Prompt], teacher: CausalLM, tokenizer: Tokenizer,
    config: DistillConfig,
) -> Iterator[Step]:
    """Trains state.model, a CausalLM, the student; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; the run goes on at its step.
        prompts: N of them, in any order; they are shuffled anew each time all are used up.
        teacher: frozen; of the same tokenizer, its vocabulary may be padded further or less.
        tokenizer: of both.
        config: only its training settings are read.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); a token was
            sampled that the teacher does not have.
    """
    settings.validate(config)
    steps = total_steps(len(prompts), config.batch_size, config.epochs, config.steps)
    while state.step < steps:
        watch = Stopwatch()
        rate = optim.follow_schedule(state.optimizer, state.step, steps, config)
        completions, rollout = sample_responses(state, prompts, tokenizer, config)
        watch.lap("time/rollout")
        metrics = response_metrics(completions, tokenizer)
        with optim.skip_nonfinite(state.optimizer, state.counters, config.skip_nonfinite):
            metrics |= update_weights(state, rollout, teacher, config)
        state.meters.update(metrics, config.batch_size)
        state.step += 1
        state.samples += config.batch_size
        state.count("num_tokens", int(rollout.lengths.sum()))
        metrics |= {"learning_rate": rate, "epoch": state.samples / len(prompts)}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        watch.lap("time/update")
        clock = watch.clock("step_time", {"tok_per_s": int(rollout.response_mask.sum())})
        yield Step(state.step, metrics, clock, [])


def sample_responses(
    state: TrainState, prompts: list[Prompt], tokenizer: Tokenizer, config: DistillConfig
) -> tuple[Completions, Rollout]:
    """B responses of the student. A text depends on the seed, the step, its prompt and its place in
    the batch, not on which rows are sampled side by side."""
    B, seed = config.batch_size, config.seed
    rows = next_rows(state.samples, B, len(prompts), seed)
    keys = streams.key(seed, "rollout", state.step, rows, torch.arange(B))
    batch = [prompts[i] for i in rows.tolist()]
    return sample(state.model, batch, keys, sampling_of(config), tokenizer,
                  config.rollout_batch_size, columns=())


def update_weights(
    state: TrainState, rollout: Rollout, teacher: CausalLM, config: DistillConfig
) -> dict[str, float]:
    """One optimizer step on a rollout, in micro-batches.

    Returns:
        loss, nats a token where it is a KL; grad_norm before clipping.
    """
    student, where, total = state.model, f"step {state.step + 1}", 0.0
    buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
    buffer.add(rollout)
    tokens = int(rollout.response_mask.sum())
    state.optimizer.zero_grad()
    for micro in accumulated(student, buffer.micro_batches):
        cells = divergence_pass(student, teacher, micro, config.temperature, config.gkd_beta)
        apart = cells[..., 0][micro.response_mask]  # (N,)
        # Every token of the optimizer step weighs the same, however the step is split.
        loss = apart.sum() / tokens
        value = float(loss.detach())
        optim.check_finite(where, {"loss": value})
        loss.backward()
        interrupt.check()
        total += value
    grad_norm = optim.clip_gradients(student, config.max_grad_norm, where)
    state.optimizer.step()
    optim.check_weights(state.optimizer, where)
    return {"loss": total, "grad_norm": grad_norm}


def response_metrics(completions: Completions, tokenizer: Tokenizer) -> dict[str, float]:
    """Lengths of the responses, and how many of their ids are no token of the tokenizer."""
    responses = completions.response_ids
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    lengths = length_statistics([len(ids) for ids in responses], completions.finish_reasons)
    return lengths | {"health/unknown_tokens": float(unknown)}


# ------------------------------------------------------------------------------- the command line


def evaluate_sets(start: DistillRun) -> dict[str, float]:
    """Every held-out set, one line of the console each; the metrics under their prefixes.

    The first call of a run, before any training, finds the KL that later ones are told beside.
    """
    r, state, config, metrics, kls = start.run, start.state, start.config, {}, {}
    for prefix, prompts in start.sets.items():
        found = evaluate_student(
            state.model, start.teacher, prompts, sampling_of(config), start.tokenizer, config,
            config.seed,
        )
        metrics |= {prefix + name: value for name, value in found.items()}
        kls[prefix] = [found["kl"], found["forward_kl"]]
        then = {}  # state.baselines is of the student at step 0
        if state.step:
            names = "KL at step 0", "forward KL at step 0"
            then = dict(zip(names, state.baselines[prefix], strict=True))
        told = "kl", "forward_kl", *then
        r.display.evaluation(prefix, f"{len(prompts):,} prompts", found | then, told)
    if state.step == 0:
        state.baselines = kls
    return metrics


def tell_samples(start: DistillRun) -> None:
    """The table of samples, on the console and in samples.jsonl."""
    config, state = start.config, start.state
    rows = student_table(
        state.model, start.teacher, state.step, start.rows[: config.sample_prompts],
        sampling_of(config), start.tokenizer, config, config.seed,
    )
    show_samples(start.run, state, rows, "kl")


def main(argv: list[str] | None = None) -> int:
    start = load_run(flags.parse(DistillConfig, argv, "minirlhf distill"))
    config, r, state = start.config, start.run, start.state
    with r:
        start.begin()
        if start.sets and not state.baselines:
            r.log(state, evaluate_sets(start), {}, ())
        # where a signal stopped the first step, the table before it is there
        if config.sample_every and state.step == 0 and not state.log_bytes["samples.jsonl"]:
            tell_samples(start)
        steps = distill(state, start.rows, start.teacher, start.tokenizer, config)
        for step in r.bar(steps, state, start.steps):
            with r.report(state, step):
                report_step(start, step)
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        start.finish("student", state.model)
    return OK


def report_step(start: DistillRun, step: Step) -> None:
    """Held-out evaluation, a line of the log, the samples."""
    config, r, state = start.config, start.run, start.state
    evaluating = start.sets and start.is_due(step, config.eval_every)
    found = evaluate_sets(start) if evaluating else {}
    if found or start.is_due(step, config.log_every):
        r.log(state, {name: step.metrics[name] for name in STEADY} | found, step.clock, CONSOLE)
    if config.sample_every and start.is_due(step, config.sample_every):
        tell_samples(start)


if __name__ == "__main__":
    sys.exit(run(main))
