"""GRPO and its relatives: several responses to a prompt are compared, and no critic is needed.

Shao et al. 2024 (arXiv:2402.03300), sec. 4.1: the advantage of a response is its score relative to
the other responses to its prompt; the loss is PPO's, without a value loss, and the KL to the
reference is a part of it. By settings Dr. GRPO, RLOO, REINFORCE++, GSPO, CISPO and DAPO:
`equations/critic_free.py` names the papers. `grpo` is the loop, `grpo_step` the update on one
rollout, `update_weights` one optimizer step; `lessons/grpo.py` is the same on a page.

Run it as `minirlhf grpo` or `python minirlhf/recipes/grpo.py`, or loop over `grpo(...)`.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch import Tensor

from minirlhf import interrupt, streams
from minirlhf.batches.collect import columns_of, replay_rows, sample, with_scores
from minirlhf.batches.credit import assign_group_credit, reward_kl
from minirlhf.batches.groups import Drawn, draw_groups
from minirlhf.batches.rollouts import (
    Rollout,
    RolloutBuffer,
    TokenPass,
    kl_to_ref,
    lm_pass,
    measure_lm,
)
from minirlhf.console import progress
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.critic_free import cispo_loss, sequence_surrogate
from minirlhf.equations.kl import kl_k1
from minirlhf.equations.masking import masked_mean, masked_sum
from minirlhf.equations.policy import PolicyLoss, Surrogate, clipped_surrogate, with_mask
from minirlhf.equations.scores import EndRule
from minirlhf.errors import OK, NonFinite, run
from minirlhf.evaluation import invariants
from minirlhf.evaluation.alarms import check_alarms
from minirlhf.evaluation.groups import (
    NO_UPDATES,
    GRPOStats,
    reward_statistics,
    summarise_group_updates,
    summarise_groups,
)
from minirlhf.evaluation.policy import evaluate_sets, keep_best
from minirlhf.evaluation.samples import show_samples
from minirlhf.evaluation.updates import MiniBatchStats, TokenLosses, moved_too_far
from minirlhf.models.parallel import accumulated, whole
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, RewardSource, Scores, as_scores
from minirlhf.run import flags, optim, settings
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.meters import Step, Stopwatch
from minirlhf.setup.grpo import load_run
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy import PolicyRun, rule_for_truncated, sampler_of, sampling_of

EVENTS = ("flat_groups", "resampled_prompts", "masked_responses", "num_tokens", "skipped_updates",
          "skipped_truncated", "skipped_ratio", "early_stops")  # counted since the start
STEADY = ("learning_rate", "epoch", *EVENTS)  # logged, but not averaged
CONSOLE = ("reward", "reward_std", "kl", "loss", "entropy", "clip_ratio/region_mean",
           "completions/mean_length")


def grpo(
    state: TrainState, prompts: list[Prompt], reward: RewardSource, ref: CausalLM | None,
    tokenizer: Tokenizer, config: GRPOConfig, policy_loss: PolicyLoss | None = None,
    end_rule: EndRule | None = None,
) -> Iterator[Step]:
    """Aligns state.model, a CausalLM; yields after each iteration.

    Args:
        state: may come from a checkpoint; the run goes on at its step.
        prompts: N of them, in any order; they are shuffled anew each time all are used up.
        reward: completions -> (B,) scores, or `Scores`. The config.samples_per_prompt responses to
            a prompt lie next to each other.
        ref: the frozen reference, of a policy with adapters `lora.base_of` it; None where
            config.kl_coef is 0.
        tokenizer: of the policy; decodes what reward sources see.
        config: only its training settings are read.
        policy_loss: (logprobs, old_logprobs, advantages), (b, R) each, of one micro-batch ->
            Surrogate, of which only the cells under the response mask count; it is given the mask
            too, where it has a parameter response_mask. None: that of config.policy_loss.
        end_rule: (scores, truncated, lengths), (B,) each -> scores (B,) of responses that may be
            truncated; None: config.missing_eos.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); the KL at step 0
            is not 0 although the reference is the policy, or the first ratio is not 1 (code 1).
    """
    settings.validate(config)
    policy = state.model
    while state.step < config.steps:
        watch, where = Stopwatch(), f"step {state.step + 1}"
        rate = optim.follow_schedule(state.optimizer, state.step, config.steps, config)
        buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
        drawn = draw_groups(
            buffer, config.batch_size, config.samples_per_prompt, config.resample,
            partial(sample_groups, state, prompts, tokenizer, config),
            partial(score_groups, reward, config, end_rule, where), watch.lap,
        )
        measure_rollout(policy, ref, buffer, config, state.step)
        watch.lap("time/measure")
        assign_group_credit(buffer, drawn.scores, config)
        stats = grpo_step(policy, state.optimizer, buffer, config, state.step, state.counters,
                          policy_loss)
        invariants.check_ratio(where, stats.first_ratio_gap)
        metrics = reward_statistics(drawn.given, drawn.all_scores, config.samples_per_prompt)
        metrics |= summarise_groups(stats, drawn.completions, drawn.scores, buffer, tokenizer)
        advance(state, drawn, buffer, config)
        state.meters.update(metrics, config.rollout_rows)
        metrics |= {"learning_rate": rate, "epoch": state.samples / len(prompts)}
        metrics |= {event: state.counters.get(event, 0) for event in EVENTS}
        watch.lap("time/update")
        clock = watch.clock("step_time", {"tok_per_s": drawn.sampled})
        replay = replay_rows(drawn.completions, buffer) if config.save_rollouts else []
        del buffer, drawn  # or they would lie beside the next step's
        rows = [{"step": state.step, "kind": "rollout"} | row for row in replay]
        yield Step(state.step, metrics, clock, rows)


# --------------------------------------------------------------------------------------- a rollout


def sample_groups(
    state: TrainState, prompts: list[Prompt], tokenizer: Tokenizer, config: GRPOConfig,
    start: int, count: int,
) -> tuple[Completions, Rollout]:
    """Responses to `count` prompts, those of a prompt adjacent; the prompt itself is read once.

    A text depends on the seed, the iteration, its prompt and its place among all rows that the
    iteration draws, not on which rows are sampled side by side.

    Args:
        start: prompts that the iteration has drawn already.
    """
    G, seed = config.samples_per_prompt, config.seed
    rows = next_rows(state.samples + start, count, len(prompts), seed).repeat_interleave(G)
    places = torch.arange(start * G, (start + count) * G)
    keys = streams.key(seed, "rollout", state.step, rows, places)
    batch = [prompts[i] for i in rows.tolist()]
    with whole(state.model) as lm:
        return sample(sampler_of(lm, config), batch, keys, sampling_of(config), tokenizer,
                      config.rollout_batch_size, columns_of(prompts))


def score_groups(
    reward: RewardSource, config: GRPOConfig, end_rule: EndRule | None, where: str,
    completions: Completions, rollout: Rollout,
) -> tuple[Scores, Tensor, Rollout]:
    """What the sources say of M responses; all reward of each (M,) under the rule for truncated
    ones; the rollout with that."""
    given = as_scores(reward(completions), completions, where)
    replaces = {"missing_eos replace": config.missing_eos == "replace"}
    invariants.check_token_rewards(given, replaces, where)
    end_rule = end_rule or rule_for_truncated(config)
    total = end_rule(given.total, rollout.truncated.cpu(), rollout.response_lengths.cpu())
    scores = given._replace(total=total)
    return given, scores.sums, with_scores(rollout, scores)


def measure_rollout(
    policy: CausalLM, ref: CausalLM | None, buffer: RolloutBuffer, config: GRPOConfig,
    iteration: int,
) -> None:
    """Passes a rollout through the policy and, where there is one, its reference.

    A single update sees the policy as it was when it sampled: the log-probs of its own pass are the
    old ones, so that one pass is spared unless the KL or a token's weight is needed before.
    """
    if ref is None and config.kl_coef:
        raise ValueError(f"ref is None, kl_coef is {config.kl_coef}: give the reference, or 0")
    starts = iteration == 0 and ref is not None and config.ref is None
    rewarded = config.kl_coef > 0 and reward_kl(config) is not None
    single = config.epochs * config.mini_batches == 1 and anything_learned(buffer, config)
    old = starts or rewarded or config.rollout_bits > 0 or not single
    measure_lm(policy, ref, buffer, config.temperature, old)
    if starts:
        invariants.check_start(kl_k1(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs")))


def advance(state: TrainState, drawn: Drawn, buffer: RolloutBuffer, config: GRPOConfig) -> None:
    """What an iteration leaves to those after it, beside the weights."""
    state.step += 1
    state.samples += drawn.prompts
    state.count("num_tokens", drawn.tokens)
    state.count("flat_groups", drawn.flat)
    state.count("resampled_prompts", drawn.prompts - config.batch_size)
    if config.mask_truncated:
        cut = sum(int(micro.truncated.sum()) for micro in buffer.micro_batches)
        state.count("masked_responses", cut)


# ------------------------------------------------------------------------ the update on one rollout


class Update(NamedTuple):
    """What all optimizer steps of one `grpo_step` share."""

    policy: CausalLM
    optimizer: torch.optim.Optimizer
    config: GRPOConfig
    policy_loss: Callable[..., Surrogate]  # of (b, R) log-probs, old ones, advantages and the mask
    counters: dict[str, int]
    where: str  # for messages


def grpo_step(
    policy: CausalLM, optimizer: torch.optim.Optimizer, rollout: RolloutBuffer, config: GRPOConfig,
    iteration: int = 0, counters: dict[str, int] | None = None,
    policy_loss: PolicyLoss | None = None,
) -> GRPOStats:
    """The update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure_lm`), with its advantages (see `assign_group_credit`). If it
            has no old_logprobs yet, which is legal for a single update, it gets those of its pass.
        iteration: 0, 1, … of the run; decides, with config.seed, the order of the mini-batches.
        counters: where updates that were not made and early stops are counted.
        policy_loss: as in `grpo`.
    Raises:
        ValueError: there are no old_logprobs, and several updates to make.
        NonFinite: more losses or gradients in a row are not finite than config.skip_nonfinite, or
            all of the rollout's; none of these was applied.
    """
    counters = {} if counters is None else counters
    if not anything_learned(rollout, config):
        counters["skipped_truncated"] = counters.get("skipped_truncated", 0) + config.mini_batches
        return NO_UPDATES
    measured = rollout.micro_batches[0].old_logprobs is not None
    if not measured and config.epochs * config.mini_batches > 1:
        raise ValueError("the rollout has no old_logprobs: measure it, or make one update of it")
    update = Update(policy, optimizer, config, with_mask(policy_loss or loss_of(config)), counters,
                    f"step {iteration + 1}")
    made: list[MiniBatchStats] = []
    for epoch in range(config.epochs):
        before = len(made)
        parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
        for i, mini_batch in enumerate(progress(parts, "update", unit=" mini-batches")):
            # From the first update on, a signal waits until the iteration is finished.
            may_stop = epoch == i == 0
            masks = [learned_tokens(micro, config) for micro in mini_batch]
            if not any(mask.any() for mask in masks):
                counters["skipped_truncated"] = counters.get("skipped_truncated", 0) + 1
                continue
            with optim.skip_nonfinite(optimizer, counters, config.skip_nonfinite):
                made.append(update_weights(update, mini_batch, masks, may_stop))
        last = epoch + 1 == config.epochs  # none is left to end
        if not last and moved_too_far(made[before:], config.early_stop_kl):
            counters["early_stops"] = counters.get("early_stops", 0) + 1
            break
    if not made:
        what = f"all {(epoch + 1) * config.mini_batches} updates were skipped"
        raise NonFinite(update.where, what, "lower learning_rate")
    if not measured:
        rollout.renew(mini_batch, made[0].passed)
    return summarise_group_updates(made, epoch + 1)


def anything_learned(rollout: RolloutBuffer, config: GRPOConfig) -> bool:
    return any(bool(learned_tokens(micro, config).any()) for micro in rollout.micro_batches)


def learned_tokens(micro: Rollout, config: GRPOConfig) -> Tensor:
    """(b, R) bool: the response tokens that have a part in the loss."""
    mask = micro.response_mask
    return mask & ~micro.truncated[:, None] if config.mask_truncated else mask


def update_weights(
    update: Update, mini_batch: list[Rollout], masks: list[Tensor], may_stop: bool
) -> MiniBatchStats:
    """One optimizer step: gradients of a mini-batch, added up over its micro-batches.

    Args:
        masks: (b, R) bool of each micro-batch, the tokens that have a part in the loss.
        may_stop: whether a signal may still end it.
    """
    policy, config, where = update.policy, update.config, update.where
    stats = MiniBatchStats(mini_batch, masks)
    update.optimizer.zero_grad()
    for micro, mask in accumulated(policy, zip(mini_batch, masks, strict=True)):
        new = lm_pass(policy, micro, config.temperature)
        if micro.old_logprobs is None:
            micro = micro._replace(old_logprobs=new.logprobs.detach())
        losses = token_losses(update, micro, new)
        # The share of these rows in the loss of the step, however it is split.
        if config.loss_mean == "token":
            loss = masked_sum(losses.total, mask) / stats.tokens
        elif config.loss_mean == "sequence":
            loss = masked_mean(losses.total, mask, dim=1).sum() / stats.rows
        else:
            loss = masked_sum(losses.total, mask) / (stats.rows * config.max_new_tokens)
        loss.backward()
        stats.add(micro, losses, loss)
        if may_stop:
            interrupt.check()
    stats.check_finite(where)
    stats.grad_norm = optim.clip_gradients(policy, config.max_grad_norm, where)
    if config.max_ratio is None or stats.ratio <= config.max_ratio:
        update.optimizer.step()
        optim.check_weights(update.optimizer, where)
    else:
        update.counters["skipped_ratio"] = update.counters.get("skipped_ratio", 0) + 1
    return stats


def token_losses(update: Update, micro: Rollout, new: TokenPass) -> TokenLosses:
    """The loss of each response token, unreduced: (b, R); new: of the pass that is trained."""
    config = update.config
    surrogate = update.policy_loss(new.logprobs, micro.old_logprobs, micro.advantages,
                                   micro.response_mask)
    invariants.check_policy_loss(surrogate, new.logprobs)
    kl_loss = torch.zeros_like(micro.old_logprobs)  # where the KL is in the reward, or nowhere
    if config.kl_in == "loss" and config.kl_coef:
        kl_loss = config.kl_coef * kl_to_ref(config.kl_estimator, new, micro)
    total = surrogate.loss + kl_loss
    if config.entropy_coef:  # its gradient costs as much as that of the log-probs
        total = total - config.entropy_coef * new.entropy
    return TokenLosses(total, surrogate, None, kl_loss, new)


def loss_of(config: GRPOConfig) -> PolicyLoss:
    """The policy loss that the config names, with its clips."""
    low, high = config.clip_low, config.clip_high
    if config.policy_loss == "cispo":
        return partial(cispo_loss, clip_low=low, clip_high=high)
    clipped = sequence_surrogate if config.policy_loss == "gspo" else clipped_surrogate
    return partial(clipped, clip_low=low, clip_high=high, dual_clip=config.dual_clip)


# ------------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None, policy_loss: PolicyLoss | None = None) -> int:
    """The command; policy_loss: as in `grpo`, for a script of your own."""
    start = load_run(flags.parse(GRPOConfig, argv, "minirlhf grpo"))
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
        steps = grpo(state, start.rows, start.reward, start.ref, start.tokenizer, config,
                     policy_loss)
        for step in r.bar(steps, state, start.steps):
            with r.report(state, step):
                report_step(start, step)
            if start.is_due(step, config.save_every):
                r.save(state)
        if r.stopped:
            return r.stop(state)
        start.finish("aligned model", state.model)
    return OK


def report_step(start: PolicyRun, step: Step) -> None:
    """Alarms, held-out evaluation, a line of the log, the best policy so far, the samples."""
    config, r, state = start.config, start.run, start.state
    alarms, state.health = check_alarms(state.health, step.number, step.metrics)
    for alarm in alarms:
        r.display.note(str(alarm))
    r.write_samples(state, step.samples)
    evaluating = start.sets and start.is_due(step, config.eval_every)
    found = evaluate_sets(r, state, start.sets, start.evaluate) if evaluating else {}
    if found or start.is_due(step, config.log_every):
        r.log(state, {name: step.metrics[name] for name in STEADY} | found, step.clock, CONSOLE)
    if found and config.keep_best:
        keep_best(r, state, found, start.export_best)
    if config.sample_every and start.is_due(step, config.sample_every):
        show_samples(r, state, start.sample_table())


if __name__ == "__main__":
    sys.exit(run(main))
