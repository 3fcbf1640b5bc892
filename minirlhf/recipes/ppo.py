"""PPO for language models: sample, score, measure, learn.

Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022 (arXiv:2203.02155): the reward of a
response is its score minus a per-token KL penalty to a frozen reference; advantages by GAE; the
clipped objective of Schulman et al. 2017 (arXiv:1707.06347). `ppo` is the loop, `ppo_step` the
update on one rollout, `update_weights` one optimizer step; `lessons/ppo.py` is the same on a page.

Run it as `minirlhf ppo` or `python minirlhf/recipes/ppo.py`, or loop over `ppo(...)`. Left out:
models that share layers with their reference.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch import Tensor

from minirlhf import interrupt, streams
from minirlhf.batches.collect import columns_of, replay_rows, sample, with_scores
from minirlhf.batches.credit import assign_credit, reward_kl
from minirlhf.batches.demonstrations import TextMix
from minirlhf.batches.rollouts import (
    Rollout,
    RolloutBuffer,
    kl_to_ref,
    measure,
    policy_pass,
)
from minirlhf.console import progress
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.kl import AdaptiveKL, kl_k1
from minirlhf.equations.masking import masked_sum
from minirlhf.equations.policy import (
    PolicyLoss,
    Surrogate,
    clipped_surrogate,
    clipped_value_loss,
    with_mask,
)
from minirlhf.equations.scores import EndRule, RunningMoments, scale_scores
from minirlhf.errors import OK, NonFinite, run
from minirlhf.evaluation import invariants
from minirlhf.evaluation.alarms import check_alarms
from minirlhf.evaluation.policy import evaluate_sets, keep_best
from minirlhf.evaluation.rollout import summarise
from minirlhf.evaluation.samples import show_samples
from minirlhf.evaluation.updates import (
    MiniBatchStats,
    PPOStats,
    TokenLosses,
    moved_too_far,
    summarise_updates,
)
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.parallel import accumulated, whole
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, RewardSource, Scores, as_scores
from minirlhf.run import flags, optim, settings
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.policy import rule_for_truncated, sampler_of, sampling_of
from minirlhf.setup.ppo import PPORun, load_run
from minirlhf.setup.ppo_settings import PPOConfig

EVENTS = ("skipped_updates", "skipped_ratio", "early_stops")  # counted since the start
CONSOLE = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
           "policy/clipfrac_avg", "response_length")


def ppo(
    state: TrainState, prompts: list[Prompt], reward: RewardSource, ref: CausalLM,
    tokenizer: Tokenizer, config: PPOConfig, mix: TextMix | None = None,
    policy_loss: PolicyLoss | None = None, end_rule: EndRule | None = None,
) -> Iterator[Step]:
    """Aligns state.model, a ValueHeadModel; yields after each iteration.

    Args:
        state: may come from a checkpoint; the run goes on at its step.
        prompts: N of them, in any order; they are shuffled anew each time all are used up.
        reward: completions -> (B,) scores, or `Scores`.
        ref: the frozen reference; of a policy with adapters `lora.base_of` it.
        tokenizer: of the policy; decodes what reward sources see.
        config: only its training settings are read.
        mix: texts whose loss is added to each update; config.ptx_data is not read here.
        policy_loss: (logprobs, old_logprobs, advantages), (b, R) each, of one micro-batch ->
            Surrogate, of which only the cells under the response mask count; it is given the mask
            too, where it has a parameter response_mask. None: the clipped surrogate with config's
            clips.
        end_rule: (scores, truncated, lengths), (B,) each -> scores (B,) of responses that may be
            truncated; None: config.missing_eos.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); the KL at step 0
            is not 0 although the reference is the policy, or the first ratio is not 1 (code 1).
    """
    settings.validate(config)
    policy = state.model
    if state.kl_coef is None or config.kl_target is None:
        state.kl_coef = config.kl_coef
    while state.step < config.steps:
        watch, where, kl_coef = Stopwatch(), f"step {state.step + 1}", state.kl_coef
        rate = optim.follow_schedule(state.optimizer, state.step, config.steps, config)
        completions, rollout = sample_rollout(state, prompts, tokenizer, config)
        watch.lap("time/rollout")
        given = as_scores(reward(completions), completions, where)
        scores, moments, rollout = score_rollout(state, rollout, given, config, end_rule, where)
        watch.lap("time/score")
        buffer, sequence_kl = measure_rollout(policy, ref, rollout, config, state.step)
        watch.lap("time/measure")
        stats = ppo_step(policy, state.optimizer, buffer, config, state.step, kl_coef,
                         state.counters, ref, mix, policy_loss)
        invariants.check_ratio(where, stats.first_ratio_gap)
        metrics = summarise(stats, completions, given, scores, buffer, sequence_kl, tokenizer,
                            config.bootstrap_truncated)
        advance(state, sequence_kl, moments, config)
        state.meters.update(metrics, config.batch_size)
        metrics |= {"lr": rate, "episode": state.samples, "objective/kl_coef": kl_coef,
                    "epoch": state.samples / len(prompts)}
        metrics |= {event: state.counters.get(event, 0) for event in EVENTS}
        watch.lap("time/update")
        tokens = int(rollout.response_mask.sum())
        clock = watch.clock("time/step", {"eps": config.batch_size, "tok_per_s": tokens})
        replay = replay_rows(completions, buffer) if config.save_rollouts else []
        del buffer, rollout  # or they would lie beside the next step's
        rows = [{"step": state.step, "kind": "rollout"} | row for row in replay]
        yield Step(state.step, metrics, clock, rows)


def sample_rollout(
    state: TrainState, prompts: list[Prompt], tokenizer: Tokenizer, config: PPOConfig
) -> tuple[Completions, Rollout]:
    """B responses. A text depends on the seed, the iteration, its prompt and its place in the
    batch, not on which rows are sampled side by side."""
    B, seed = config.batch_size, config.seed
    rows = next_rows(state.samples, B, len(prompts), seed)
    keys = streams.key(seed, "rollout", state.step, rows, torch.arange(B))
    batch = [prompts[i] for i in rows.tolist()]
    with whole(state.model.lm) as lm:
        return sample(sampler_of(lm, config), batch, keys, sampling_of(config), tokenizer,
                      config.rollout_batch_size, columns_of(prompts))


def score_rollout(
    state: TrainState, rollout: Rollout, given: Scores, config: PPOConfig,
    end_rule: EndRule | None, where: str,
) -> tuple[Tensor, RunningMoments, Rollout]:
    """The rule for truncated responses, then the scale of all scores so far.

    Returns:
        scores (B,) under the rule, before they are scaled; the moments of all scores, these among
        them; the rollout with its scaled scores.
    """
    invariants.check_token_rewards(given, {
        "score_scaling": config.score_scaling != "none",
        "score_clip": config.score_clip is not None,
        "missing_eos replace": config.missing_eos == "replace",
    }, where)
    end_rule = end_rule or rule_for_truncated(config)
    scores = end_rule(given.total, rollout.truncated.cpu(), rollout.response_lengths.cpu())
    moments = RunningMoments(*state.score_moments)
    moments.update(scores)
    scaled = scale_scores(scores, config.score_scaling, config.score_clip, moments)
    return scores, moments, with_scores(rollout, given._replace(total=scaled))


def measure_rollout(
    policy: ValueHeadModel, ref: CausalLM, rollout: Rollout, config: PPOConfig, iteration: int
) -> tuple[RolloutBuffer, float]:
    """Cuts the rollout once into micro-batches, and passes them through policy and reference.

    Returns:
        The measured rollout; its KL (k1), nats a response.
    """
    buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
    buffer.add(rollout)
    full = config.kl_estimator == "full"
    measure(policy, ref, buffer, config.temperature, full_kl=full and config.kl_in == "reward",
            keep_ref_states=full and config.kl_in == "loss")
    kl = kl_k1(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs"))  # (N,)
    if iteration == 0 and config.ref is None:
        invariants.check_start(kl)
    return buffer, float(kl.sum()) / config.batch_size


def advance(
    state: TrainState, sequence_kl: float, moments: RunningMoments, config: PPOConfig
) -> None:
    """What an iteration leaves to those after it, beside the weights."""
    # A policy that waits for its critic has no KL to steer by.
    if config.kl_target is not None and state.step >= config.critic_warmup_steps:
        controller = AdaptiveKL(state.kl_coef, config.kl_target, config.kl_horizon)
        controller.update(sequence_kl, config.batch_size)
        state.kl_coef = controller.coef
    state.step += 1
    state.samples += config.batch_size
    state.score_moments = moments.as_list()


# ------------------------------------------------------------------------ the update on one rollout


class Update(NamedTuple):
    """What all optimizer steps of one `ppo_step` share."""

    policy: ValueHeadModel
    optimizer: torch.optim.Optimizer
    config: PPOConfig
    policy_loss: Callable[..., Surrogate]  # of (b, R) log-probs, old ones, advantages and the mask
    kl_coef: float
    counters: dict[str, int]
    ref: CausalLM | None
    mix: TextMix | None  # None while the critic warms up: then the policy is frozen
    where: str  # for messages


def ppo_step(
    policy: ValueHeadModel, optimizer: torch.optim.Optimizer, rollout: RolloutBuffer,
    config: PPOConfig, iteration: int | None = None, kl_coef: float | None = None,
    counters: dict[str, int] | None = None, ref: CausalLM | None = None,
    mix: TextMix | None = None, policy_loss: PolicyLoss | None = None,
) -> PPOStats:
    """GAE and the clipped-PPO update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure`); rewards, advantages and returns are filled here.
        iteration: 0, 1, … of the run. Decides, with config.seed, the order of the mini-batches and
            which texts of `mix` come, and whether the critic still warms up. None is 0.
        kl_coef: None is config.kl_coef.
        counters: where updates that were not made and early stops are counted.
        ref: needed where the full KL is a loss.
        mix: texts whose loss is added to each update.
        policy_loss: as in `ppo`.
    Raises:
        ValueError: there is no ref, or no iteration, where one is needed.
        NonFinite: more losses or gradients in a row are not finite than config.skip_nonfinite, or
            all of the rollout's; none of these was applied.
    """
    check_step(config, iteration, ref)
    iteration = iteration or 0
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    counters = {} if counters is None else counters
    assign_credit(rollout, config, kl_coef)
    learns_policy = iteration >= config.critic_warmup_steps
    update = Update(
        policy, optimizer, config, with_mask(policy_loss or clipped_loss(config)), kl_coef,
        counters, ref, mix if learns_policy else None, f"step {iteration + 1}",
    )
    made: list[MiniBatchStats] = []
    with nullcontext() if learns_policy else optim.frozen(policy.lm):
        for epoch in range(config.epochs):
            before = len(made)
            parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
            for i, mini_batch in enumerate(progress(parts, "update", unit=" mini-batches")):
                number = (iteration * config.epochs + epoch) * config.mini_batches + i
                # From the first update on, a signal waits until the iteration is finished.
                may_stop = epoch == i == 0
                with optim.skip_nonfinite(optimizer, counters, config.skip_nonfinite):
                    made.append(update_weights(update, mini_batch, number, may_stop))
            last = epoch + 1 == config.epochs  # none is left to end
            if not last and moved_too_far(made[before:], config.early_stop_kl):
                counters["early_stops"] = counters.get("early_stops", 0) + 1
                break
    if not made:
        what = f"all {(epoch + 1) * config.mini_batches} updates were skipped"
        raise NonFinite(update.where, what, "lower learning_rate")
    ptx_coef = 0.0 if mix is None else mix.coef
    return summarise_updates(made, rollout, reward_kl(config), kl_coef, epoch + 1, ptx_coef)


def check_step(config: PPOConfig, iteration: int | None, ref: CausalLM | None) -> None:
    """Refuses a `ppo_step` that lacks what its settings need."""
    if ref is None and config.kl_in == "loss" and config.kl_estimator == "full":
        raise ValueError("ref is None: a full KL in the loss needs it")
    if iteration is None and config.critic_warmup_steps:
        raise ValueError("iteration is None: critic_warmup_steps needs it, give 0, 1, …")


def update_weights(
    update: Update, mini_batch: list[Rollout], number: int, may_stop: bool
) -> MiniBatchStats:
    """One optimizer step: gradients of a mini-batch, added up over its micro-batches.

    Args:
        number: of this update among all of the run.
        may_stop: whether a signal may still end it.
    """
    policy, config, where = update.policy, update.config, update.where
    stats = MiniBatchStats(mini_batch)
    update.optimizer.zero_grad()
    for micro in accumulated(policy, mini_batch):
        losses = token_losses(update, micro)
        # Every token of the optimizer step weighs the same, however the step is split.
        loss = masked_sum(losses.total, micro.response_mask) / stats.tokens
        loss.backward()
        stats.add(micro, losses, loss)
        if may_stop:
            interrupt.check()
    stats.check_finite(where)
    if update.mix is not None:
        stats.ptx_loss = update.mix.backward(policy.lm, number)
        optim.check_finite(where, {"ptx_loss": stats.ptx_loss})
    norms = [optim.clip_gradients(m, config.max_grad_norm, where) for m in policy.gradient_groups()]
    stats.grad_norm, stats.critic_grad_norm = (*norms, 0.0)[:2]
    if config.max_ratio is None or stats.ratio <= config.max_ratio:
        update.optimizer.step()
        optim.check_weights(update.optimizer, where)
    else:
        update.counters["skipped_ratio"] = update.counters.get("skipped_ratio", 0) + 1
    return stats


def token_losses(update: Update, micro: Rollout) -> TokenLosses:
    """The loss of each response token, unreduced: (b, R)."""
    config = update.config
    full = config.kl_in == "loss" and config.kl_estimator == "full"
    new = policy_pass(update.policy, micro, config.temperature, *([update.ref] if full else []))
    surrogate = update.policy_loss(new.logprobs, micro.old_logprobs, micro.advantages,
                                   micro.response_mask)
    invariants.check_policy_loss(surrogate, new.logprobs)
    value = clipped_value_loss(new.values, micro.old_values, micro.returns, config.value_clip)
    kl_loss = torch.zeros_like(micro.old_logprobs)  # where the KL is in the reward
    if config.kl_in == "loss":
        kl_loss = update.kl_coef * kl_to_ref(config.kl_estimator, new, micro)
    of_policy = surrogate.loss + kl_loss
    if config.entropy_coef:  # its gradient costs as much as that of the log-probs
        of_policy = of_policy - config.entropy_coef * new.entropy
    return TokenLosses(config.vf_coef * value.loss + of_policy, surrogate, value, kl_loss, new)


def clipped_loss(config: PPOConfig) -> PolicyLoss:
    """The clipped surrogate with the config's clips."""
    return partial(clipped_surrogate, clip_low=config.clip_low, clip_high=config.clip_high,
                   dual_clip=config.dual_clip)


# ------------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None, policy_loss: PolicyLoss | None = None) -> int:
    """The command; policy_loss: as in `ppo`, for a script of your own."""
    start = load_run(flags.parse(PPOConfig, argv, "minirlhf ppo"))
    config, r, state, sets = start.config, start.run, start.state, start.sets
    with r:
        start.begin()
        if sets and not state.baselines:
            found = evaluate_sets(r, state, sets, start.evaluate)
            r.log(state, found, {}, ())
            if config.keep_best:
                keep_best(r, state, found, start.export_best)
        # where a signal stopped the first step, the table before it is there
        if config.sample_every and state.step == 0 and not state.log_bytes["samples.jsonl"]:
            show_samples(r, state, start.sample_table())
        steps = ppo(state, start.rows, start.reward, start.ref, start.tokenizer, config, start.mix,
                    policy_loss)
        for step in r.bar(steps, state, start.steps):
            with r.report(state, step):
                report_step(start, step)
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        start.finish("aligned model", state.model.lm)
    return OK


def report_step(start: PPORun, step: Step) -> None:
    """Alarms, held-out evaluation, a line of the log, the best policy so far, the samples."""
    config, r, state = start.config, start.run, start.state
    alarms, state.health = check_alarms(state.health, step.number, step.metrics)
    for alarm in alarms:
        r.display.note(str(alarm))
    r.write_samples(state, step.samples)
    evaluating = start.sets and start.is_due(step, config.eval_every)
    found = evaluate_sets(r, state, start.sets, start.evaluate) if evaluating else {}
    if found or start.is_due(step, config.log_every):
        names = "lr", "episode", "objective/kl_coef", "epoch", *EVENTS
        r.log(state, {name: step.metrics[name] for name in names} | found, step.clock, CONSOLE)
    if found and config.keep_best:
        keep_best(r, state, found, start.export_best)
    if config.sample_every and start.is_due(step, config.sample_every):
        show_samples(r, state, start.sample_table())


if __name__ == "__main__":
    sys.exit(run(main))
