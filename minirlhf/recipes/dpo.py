"""DPO and its family: a policy learns preferences itself, without a reward model or sampling.

    margin = beta (log policy(y_c) - log ref(y_c) - log policy(y_r) + log ref(y_r))
    loss   = -log sigmoid(margin)

of a pair of responses y_c, chosen, and y_r, rejected, to one prompt. --loss names another loss of
the family (`equations/dpo.py`); a ranked list counts as the mean of its pairs; kto reads single
responses, each liked or not. The same with default settings on one page: `minirlhf/lessons/dpo.py`.

Run it as `minirlhf dpo` or `python minirlhf/recipes/dpo.py`, or loop over `dpo(...)`. Left out:
sampling new pairs while the policy learns; `minirlhf sample` and `score` make them beforehand.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from math import ceil
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

from minirlhf import interrupt
from minirlhf.batches.preferences import count_tokens, kind_of, row_lengths, text_numbers
from minirlhf.batches.responses import (
    Example,
    KTOObjective,
    Objective,
    Outcome,
    Reference,
    batches_of,
    mismatched_ratios,
    response_stats,
)
from minirlhf.data.batching import total_steps, training_batches
from minirlhf.errors import OK, run
from minirlhf.evaluation import invariants
from minirlhf.evaluation.alarms import DPO_RULES, check_alarms
from minirlhf.evaluation.dpo import direct_metrics, direct_rows, direct_table, evaluate_direct
from minirlhf.models.dropout import dropout_of
from minirlhf.models.parallel import accumulated
from minirlhf.run import flags, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.dpo import DPORun, load_run, objective_of
from minirlhf.setup.dpo_settings import NO_REFERENCE, DPOConfig
from minirlhf.setup.training import STEADY

CONSOLE = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected",
           "kl")


def dpo(
    state: TrainState, examples: list[Example], ref: Reference | None, config: DPOConfig,
    objective: Objective | None = None,
) -> Iterator[Step]:
    """Trains state.model, a CausalLM; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        examples: N preference pairs, N ranked lists, or of KTO N single responses.
        ref: texts of a micro-batch -> (M,) log-probs of the frozen reference, as
            `partial(ref_logprobs, model)`; None where the loss has no reference.
        config: only its training settings are read.
        objective: a loss of your own; None: that of config.loss.
    Raises:
        UserError: a number is not finite (exit code 3); the step changed nothing. The policy at
            step 0 is not its own reference although config.ref is None (code 1).
    """
    if not examples:
        raise ValueError("examples is empty: give at least one")
    if ref is None and objective is None and config.loss not in NO_REFERENCE:
        raise ValueError(f"ref is None: give one, the loss {config.loss} is relative to it")
    objective = objective or objective_of(config)
    N, per_epoch = len(examples), ceil(len(examples) / config.batch_size)
    steps = total_steps(N, config.batch_size, config.epochs, config.steps)
    lengths = row_lengths(examples)
    longest = int(lengths.max())
    batches = training_batches(lengths, config.batch_size, config.seed, state.step)
    for rows in islice(batches, steps - state.step):
        watch, metrics = Stopwatch(), {}
        rate = optim.follow_schedule(state.optimizer, state.step, steps, config)
        batch = [examples[i] for i in rows.tolist()]
        with optim.skip_nonfinite(state.optimizer, state.counters, config.skip_nonfinite):
            if isinstance(objective, KTOObjective):  # the KL of the whole step, before its losses
                ratios = mismatched_ratios(
                    state.model, batch, ref, longest, config.micro_batch_tokens
                )
                objective = objective._replace(kl=ratios)
            metrics, counts = update_weights(state, batch, ref, config, objective)
            for name, value in metrics.items():
                state.meters.update({name: value}, counts.get(name, len(rows)))
        state.step += 1
        state.samples += len(rows)
        tokens_here = sum(map(count_tokens, batch))
        state.count("num_tokens", tokens_here)
        metrics |= {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        clock = watch.clock("step_time", {"tok_per_s": tokens_here})
        yield Step(state.step, metrics, clock, [])


def update_weights(
    state: TrainState, examples: list[Example], ref: Reference | None, config: DPOConfig,
    objective: Objective,
) -> tuple[dict[str, float], dict[str, int]]:
    """One optimizer step on the mean loss over examples, in micro-batches.

    Returns:
        loss, grad_norm before clipping, and `direct_metrics`; how many each of these is a mean of.
    """
    lm, where = state.model, f"step {state.step + 1}"
    total, outcomes = 0.0, list[Outcome]()
    state.optimizer.zero_grad()
    for rows, batch in accumulated(lm, batches_of(examples, config.micro_batch_tokens)):
        ref_logprobs = None if ref is None else ref(batch.texts)  # (M,)
        numbers = text_numbers(examples, rows)
        dropout = dropout_of(config.lora_dropout, config.seed, state.step, numbers)
        policy = response_stats(lm, batch.texts, dropout)
        losses, told = batch.losses(policy, ref_logprobs, objective)
        loss = losses.sum() / len(examples)
        value = float(loss.detach())
        here = ", ".join(examples[i].where for i in rows[:8])
        optim.check_finite(f"{where} ({here})", {"loss": value})
        if state.step == 0 and ref is not None and config.ref is None and dropout is None:
            gap = policy.logprobs.detach() - ref_logprobs.to(policy.logprobs)
            gap = gap / policy.tokens
            invariants.check_start(gap, "rewards/margins")
        loss.backward()
        interrupt.check()
        total += value
        outcomes.append(told)
    values, counts = direct_metrics(outcomes, objective)
    metrics = {"loss": total} | values
    optim.check_finite(where, metrics)
    grad_norm = optim.clip_gradients(lm, config.max_grad_norm, where)
    state.optimizer.step()
    optim.check_weights(state.optimizer, where)
    return metrics | {"grad_norm": grad_norm}, counts


# ------------------------------------------------------------------------------------- evaluation


def evaluate_all(start: DPORun) -> dict[str, float]:
    """Every held-out set; tells its numbers and a table of rows; the metrics under prefixes."""
    r, state, config, metrics = start.run, start.state, start.config, {}
    for prefix, examples in start.sets.items():
        result = evaluate_direct(state.model, examples, start.ref, objective_of(config),
                                 config.micro_batch_tokens)
        rows = direct_rows(result, start.tokenizer, config.show_samples)
        if rows:
            r.display.samples(state.step, [direct_table(rows)], rows)
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        metrics |= {prefix + name: value for name, value in result.metrics.items()}
        held_out = f"{len(examples):,} {kind_of(examples)}"
        r.display.evaluation(prefix, held_out, result.metrics, CONSOLE)
    return metrics


def main(argv: list[str] | None = None) -> int:
    start = load_run(flags.parse(DPOConfig, argv, "minirlhf dpo"))
    config, r, state = start.config, start.run, start.state
    with r:
        start.begin()
        start.prepare_reference()
        for step in r.bar(dpo(state, start.rows, start.ref, config), state, start.steps):
            evaluating = start.is_due(step, config.eval_every)
            with r.report(state, step):
                if start.ref is not None:
                    notes, state.health = check_alarms(
                        state.health, step.number, step.metrics, DPO_RULES
                    )
                    for note in notes:
                        r.display.note(str(note))
                extra = {name: step.metrics[name] for name in STEADY}
                extra |= evaluate_all(start) if evaluating else {}
                if evaluating or start.is_due(step, config.log_every):
                    r.log(state, extra, step.clock, CONSOLE)
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        start.finish("policy", state.model)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
