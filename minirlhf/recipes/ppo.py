"""PPO for language models: sample, score, credit, optimise.

Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022 (arXiv:2203.02155): the reward of a
response is its score minus a per-token KL penalty to a frozen reference; advantages by GAE; the
clipped objective of Schulman et al. 2017 (arXiv:1707.06347). Read `ppo` here, then `ppo_step` in
ppo_update.py.

What is left out: several processes, and models that share layers with their reference.
Run it as `minirlhf ppo`, `python -m minirlhf.recipes.ppo`, or loop over `ppo(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf import interrupt, streams
from minirlhf.batches.collect import columns_of, replay_rows, sample, with_scores
from minirlhf.batches.demonstrations import TextMix
from minirlhf.batches.rollouts import (
    Rollout,
    RolloutBuffer,
    TokenPass,
    kl_to_ref,
    measure,
    penalised_kl,
    policy_pass,
)
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.kl import AdaptiveKL, kl_k1, kl_k3
from minirlhf.equations.masking import masked_rescale, masked_standardize, masked_sum
from minirlhf.equations.policy import clipped_value_loss
from minirlhf.equations.scores import RunningMoments, scale_scores
from minirlhf.errors import BUG, OK, STOPPED, NonFinite, UserError, run
from minirlhf.evaluation.alarms import check_alarms
from minirlhf.evaluation.policy import evaluate_policy, evaluate_sets, keep_best
from minirlhf.evaluation.rollout import MiniBatchStats, PPOStats, summarise, summarise_updates
from minirlhf.evaluation.samples import sample_table, show_samples
from minirlhf.models import pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.lora import has_lora, merge_lora, merged_copy
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards import parse
from minirlhf.rewards.parse import load_reward
from minirlhf.rewards.source import RewardSource, Scores, as_scores
from minirlhf.run import flags, optim, settings
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.run.meters import Step
from minirlhf.setup import memory_plans, presets
from minirlhf.setup.common import write_model
from minirlhf.setup.ppo import load_policy, look, run_facts
from minirlhf.setup.ppo_settings import PPOConfig

# Both are exactly 0 on a CPU without --compile. A GPU's kernels, and graphs with and without a
# gradient, may differ in the last bit.
RATIO_TOLERANCE = 1e-4
KL_TOLERANCE = 1e-4  # nats a token
EVENTS = ("skipped_updates", "skipped_ratio", "early_stops")  # counted since the start


def ppo(
    state: TrainState,
    prompts: list[Prompt],
    reward: RewardSource,
    ref: CausalLM | None,
    tokenizer: Tokenizer,
    config: PPOConfig,
    mix: TextMix | None = None,
) -> Iterator[Step]:
    """Aligns state.model, a ValueHeadModel; yields after each iteration.

    Args:
        state: may come from a checkpoint; the run goes on at its step.
        prompts: N of them, in any order; they are shuffled anew each time all are used up.
        reward: completions -> (B,) scores, or `Scores`.
        ref: the frozen reference; None where the policy has adapters: its base.
        tokenizer: of the policy; decodes what reward sources see.
        config: only its training settings are read.
        mix: texts whose loss is added to each update; config.ptx_data is not read here.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); the KL at step 0
            is not 0 although the reference is the policy, or the first ratio is not 1 (code 1).
    """
    settings.validate(config)
    policy, B = state.model, config.batch_size
    if state.kl_coef is None or config.kl_target is None:
        state.kl_coef = config.kl_coef
    full_kl = config.kl_estimator == "full"
    columns = columns_of(prompts)
    while state.step < config.steps:
        iteration, clock = state.step, {}
        started = time.perf_counter()
        rate = optim.learning_rate(
            iteration, config.steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)

        # Sample: a text depends on the seed, the iteration, its prompt and its place in the batch,
        # not on which rows are sampled side by side.
        rows = next_rows(state.samples, B, len(prompts), config.seed)
        keys = streams.key(config.seed, "rollout", iteration, rows, torch.arange(B))
        batch = [prompts[i] for i in rows.tolist()]
        completions, rollout = sample(
            policy.lm, batch, keys, config.sampling, tokenizer, config.rollout_batch_size, columns
        )
        clock["time/rollout"] = time.perf_counter() - started

        # Score: the rule for cut responses, then the scale of all scores so far.
        given = as_scores(reward(completions), completions, f"step {iteration + 1}")
        check_token_rewards(given, config, f"step {iteration + 1}")
        cut, lengths = rollout.truncated.cpu(), rollout.response_lengths.cpu()
        scores = config.end_rule(given.total, cut, lengths)
        moments = RunningMoments(*state.score_moments)
        moments.update(scores)
        scaled = scale_scores(scores, config.score_scaling, config.score_clip, moments)
        rollout = with_scores(rollout, given._replace(total=scaled))
        clock["time/score"] = time.perf_counter() - started - clock["time/rollout"]

        # Measure: cut once into micro-batches, and pass them through policy and reference.
        buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
        buffer.add(rollout)
        measure(policy, ref, buffer, config.temperature, full_kl and config.kl_in == "reward",
                full_kl and config.kl_in == "loss")
        clock["time/measure"] = time.perf_counter() - started - sum(clock.values())
        kl = kl_k1(buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs"))
        check_start(iteration, kl, config)

        # Learn: credit and several epochs of mini-batches.
        kl_coef = state.kl_coef
        stats = ppo_step(
            policy, state.optimizer, buffer, config, iteration, kl_coef, state.counters, ref, mix
        )
        check_ratio(iteration, stats.first_ratio_gap)
        sequence_kl = float(kl.sum()) / B
        # A policy that waits for its critic has no KL to steer by.
        if config.kl_target is not None and iteration >= config.critic_warmup_steps:
            controller = AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon)
            controller.update(sequence_kl, B)
            state.kl_coef = controller.coef

        state.step += 1
        state.samples += B
        state.score_moments = moments.as_list()
        metrics = summarise(
            stats, completions, given, scores, buffer, sequence_kl, tokenizer,
            config.bootstrap_truncated,
        )
        state.meters.update(metrics, B)
        steady = {"lr": rate, "episode": state.samples, "objective/kl_coef": kl_coef,
                  "epoch": state.samples / len(prompts)}
        steady |= {event: state.counters.get(event, 0) for event in EVENTS}
        seconds = time.perf_counter() - started
        clock["time/update"] = seconds - sum(clock.values())
        sampled = int(rollout.response_mask.sum())
        clock |= {"time/step": seconds, "eps": B / seconds, "tok_per_s": sampled / seconds}
        replay = replay_rows(completions, buffer) if config.save_rollouts else []
        replay = [{"step": state.step, "kind": "rollout"} | row for row in replay]
        del buffer, rollout, kl  # or they would lie beside the next step's
        yield Step(state.step, metrics | steady, clock, replay)


def check_token_rewards(given: Scores, config: PPOConfig, where: str) -> None:
    """Settings that change a response's one score know nothing of rewards of its tokens."""
    changes = {
        "score_scaling": config.score_scaling != "none",
        "score_clip": config.score_clip is not None,
        "missing_eos replace": config.missing_eos == "replace",
    }
    for name, on in changes.items():
        if on and given.token_rewards is not None:
            what = f"changes the score of a response, and a source rewards tokens ({where})"
            raise UserError(name, what, "leave it out, or return one number a response")


def check_start(iteration: int, kl: Tensor, config: PPOConfig) -> None:
    """At step 0 the policy is its own reference, so every log-ratio must be 0."""
    gap = float(kl.abs().max())
    if iteration == 0 and config.ref is None and not gap <= KL_TOLERANCE:
        raise UserError(
            "step 1: objective/kl", f"a token's KL is {gap:.3g} nats before any training",
            "the reference is not the starting policy; name another one with --ref, "
            "which turns this check off", BUG,
        )


def check_ratio(iteration: int, gap: float) -> None:
    """Before the first update of an iteration the policy is the one that sampled."""
    if not gap <= RATIO_TOLERANCE:
        raise UserError(
            f"step {iteration + 1}: val/ratio",
            f"the first ratio is off 1 by {gap:.3g}",
            "training and measuring passes differ: is something random or stateful in the model?",
            BUG,
        )


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(PPOConfig, argv, "minirlhf ppo", presets.PPO)
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder, ref_folder, critic, scorers, specs, tokenizer, data, inputs = look(config)
    prompts, sets, texts = data.prompts, data.sets, data.texts
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(config, "ppo", inputs)
    make_deterministic(device)
    models, held = memory_plans.ppo_models(config), process_bytes(device)
    longest = data.longest_prompt
    plan = memory_plans.ppo_plan(config, models, longest, dtype, held, data.longest_text)
    fits = memory_plans.announce(plan, (folder, ref_folder, *critic, *scorers), dtype, device)
    frozen: list[tuple[RewardModel, Path]] = []
    reward = load_reward(
        config, tokenizer, dtype, device, config.micro_batch_tokens, data.columns,
        r.folder / "rewards.jsonl", frozen,
    )
    if config.offload_frozen:
        for model, place in frozen:
            pretrained.offload(model, place)
    policy = load_policy(config, folder, device, dtype)
    ref = None
    if config.ref is not None or not config.lora_rank:
        ref = pretrained.load_pretrained(ref_folder, dtype, device)
        ref.requires_grad_(False)
        if config.offload_frozen:
            pretrained.offload(ref, ref_folder)
    if config.compile:
        compile_blocks(policy, *filter(None, (ref,)), *(model for model, _ in frozen))
    optimizer = optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon,
        critic=policy.value_parameters(), critic_lr_scale=config.critic_lr_scale,
    )
    state = TrainState(policy, optimizer, kl_coef=config.kl_coef)
    sizes = config.ptx_batch_size, config.micro_batch_tokens
    mix = TextMix(texts, config.ptx_coef, *sizes, config.seed) if texts else None
    evaluate = partial(
        evaluate_policy, policy.lm, reward=reward, tokenizer=tokenizer, sampling=config.sampling,
        measure=partial(measure, policy, ref, temperature=config.temperature), seed=config.seed,
        # no more than a training step, so that the memory plan holds
        rows_at_once=min(config.rollout_batch_size, config.batch_size),
        micro_batch_size=config.micro_batch_size, micro_batch_tokens=config.micro_batch_tokens,
    )

    table = partial(
        sample_table, state, prompts, reward, tokenizer, config.sampling, config.sample_prompts,
        min(config.rollout_batch_size, config.batch_size), config.seed,
    )

    def export_best() -> None:
        lm = merged_copy(policy.lm) if config.lora_rank else policy.lm
        r.export(lambda target: write_model(lm, tokenizer, target), "best")

    with r:
        r.list_left_out(data.reports)
        r.facts(
            run_facts(config, len(prompts), policy, fits, device, dtype)
            | parse.facts(specs, tokenizer)
        )
        r.restore(state)
        if sets and not state.baselines:
            found = evaluate_sets(r, state, sets, evaluate)
            r.log(state, found, {}, ())
            if config.keep_best:
                keep_best(r, state, found, export_best)
        # where the first step was stopped, the table before it is there
        if config.sample_every and state.step == 0 and not state.log_bytes["samples.jsonl"]:
            show_samples(r, state, table())
        for step in r.bar(
            ppo(state, prompts, reward, ref, tokenizer, config, mix), state, config.steps
        ):
            last = step.number == config.steps
            with r.report(state, step):
                alarms, state.health = check_alarms(state.health, step.number, step.metrics)
                for alarm in alarms:
                    r.say(str(alarm))
                r.write_samples(state, step.samples)
                every = config.eval_every
                evaluating = sets and (last or (every and step.number % every == 0))
                found = evaluate_sets(r, state, sets, evaluate) if evaluating else {}
                if found or last or step.number % config.log_every == 0:
                    names = "lr", "episode", "objective/kl_coef", "epoch", *EVENTS
                    r.log(state, {name: step.metrics[name] for name in names} | found, step.clock, (
                        "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
                        "policy/clipfrac_avg", "response_length"))
                if found and config.keep_best:
                    keep_best(r, state, found, export_best)
                if config.sample_every and (last or step.number % config.sample_every == 0):
                    show_samples(r, state, table())
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        if config.lora_rank:
            merge_lora(policy)
        model = r.export(lambda target: write_model(policy.lm, tokenizer, target))
        print(f"aligned model in {model}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))


def assign_credit(buffer: RolloutBuffer, config: PPOConfig, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE)."""

    def pay(micro: Rollout) -> Rollout:
        kl, scores = penalised_kl(micro, config.reward_kl), micro.scores
        if config.bootstrap_truncated:
            scores = torch.where(micro.truncated, 0, scores)
        rewards = token_rewards(scores, kl, micro.response_mask, kl_coef)
        return micro._replace(
            rewards=rewards if micro.given_rewards is None else rewards + micro.given_rewards
        )

    def credit(micro: Rollout) -> Rollout:
        end = torch.where(micro.truncated, micro.last_values, 0) if bootstraps else None
        mask = micro.response_mask
        out = gae(micro.rewards, micro.old_values, mask, config.gamma, config.lam, end)
        return micro._replace(advantages=out.advantages, returns=out.returns)

    bootstraps = config.bootstrap_truncated
    buffer.update(pay)
    # Each is whitened over the whole rollout, so that no mini-batch split can change it.
    if config.whiten_rewards:
        rescale(buffer, "rewards", masked_rescale)
    buffer.update(credit)
    if config.whiten_advantages:
        rescale(buffer, "advantages", masked_standardize)


def rescale(
    buffer: RolloutBuffer, name: str, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    flat = buffer.tokens(name)
    buffer.set_tokens(name, function(flat, torch.ones_like(flat, dtype=torch.bool)))


class Update(NamedTuple):
    """What all mini-batches of one `ppo_step` share."""

    policy: ValueHeadModel
    ref: CausalLM | None
    config: PPOConfig
    kl_coef: float
    mix: TextMix | None
    learns_policy: bool  # False while the critic warms up: then the policy is frozen
    where: str  # for messages


def accumulate(
    update: Update, mini_batch: list[Rollout], number: int, begun: bool
) -> MiniBatchStats:
    """Gradient of one mini-batch's loss, in its micro-batches.

    Args:
        number: of this update among all of the run.
        begun: whether it is too late to stop.
    """
    policy, config = update.policy, update.config
    # Every token of the optimizer step weighs the same, however it is cut.
    tokens = sum(int(micro.response_mask.sum()) for micro in mini_batch)
    sums: dict[str, Tensor] = {}
    losses, gaps = [], []
    for micro in mini_batch:
        mask = micro.response_mask
        new = policy_pass(policy, micro, config.temperature)
        surrogate = config.policy_loss(new.logprobs, micro.old_logprobs, micro.advantages)
        value = clipped_value_loss(new.values, micro.old_values, micro.returns, config.value_clip)
        kl_loss = loss_of_kl(update, new, micro)
        of_policy = surrogate.loss + kl_loss
        if config.entropy_coef:  # its gradient costs as much as that of the log-probs
            of_policy = of_policy - config.entropy_coef * new.entropy
        total = config.vf_coef * value.loss + of_policy
        loss = masked_sum(total, mask) / tokens
        loss.backward()
        if not begun:
            interrupt.check()
        losses.append(loss.detach())
        gap = surrogate.ratio - 1
        gaps.append(gap[mask].abs().max())
        log_ratio = new.logprobs.detach() - micro.old_logprobs
        seen = {
            "policy_loss": surrogate.loss, "value_loss": value.loss, "kl_loss": kl_loss,
            "loss": total, "approxkl": log_ratio.square() / 2, "policykl": -log_ratio,
            "clipfrac": surrogate.clipped, "entropy": new.entropy,
            "value_clipfrac": value.clipped, "vpred": new.values,
            "value_error": (new.values - micro.returns).square(),
            "gap": gap, "gap_sq": gap.square(), "moved": kl_k3(micro.old_logprobs, new.logprobs),
        }
        sums = {k: sums.get(k, 0) + masked_sum(x.detach(), mask) for k, x in seen.items()}
    for micro, loss in zip(mini_batch, torch.stack(losses).tolist(), strict=True):
        rows = ", ".join(map(str, micro.rows.tolist()[:8]))
        optim.check_finite(f"{update.where} (rollout rows {rows})", {"loss": loss})
    mixes = update.mix is not None and update.learns_policy
    ptx_loss = update.mix.backward(policy.lm, number) if mixes else 0.0
    optim.check_finite(update.where, {"ptx_loss": ptx_loss})
    return MiniBatchStats(sums, tokens, torch.stack(gaps).max(), ptx_loss, *clip_gradients(update))


def loss_of_kl(update: Update, new: TokenPass, micro: Rollout) -> Tensor:
    """(b, R) KL to the reference as a loss, weighted; zeros where it is in the reward."""
    config = update.config
    if config.kl_in == "reward":
        return torch.zeros_like(micro.old_logprobs)
    policy, ref = update.policy.lm, update.ref
    kl = kl_to_ref(config.kl_estimator, policy, new, ref, micro, config.temperature)
    return update.kl_coef * kl


def clip_gradients(update: Update) -> tuple[float, float]:
    """Norms before clipping; a critic with a trunk of its own is another model, with its own."""
    policy, most = update.policy, update.config.max_grad_norm
    if policy.critic is None:
        return optim.clip_gradients(policy, most, update.where), 0.0
    critic = nn.ModuleList([policy.critic, policy.v_head])
    return tuple(optim.clip_gradients(part, most, update.where) for part in (policy.lm, critic))


def ppo_step(
    policy: ValueHeadModel,
    optimizer: torch.optim.Optimizer,
    rollout: RolloutBuffer,
    config: PPOConfig,
    iteration: int | None = None,
    kl_coef: float | None = None,
    counters: dict[str, int] | None = None,
    ref: CausalLM | None = None,
    mix: TextMix | None = None,
) -> PPOStats:
    """GAE and the clipped-PPO update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure`); rewards, advantages and returns are filled here.
        iteration: 0, 1, … of the run. Decides, with config.seed, the order of the mini-batches and
            which texts of `mix` come, and whether the critic still warms up. None is 0.
        kl_coef: None is config.kl_coef.
        counters: where updates that were not made and early stops are counted.
        ref: needed where the full KL is a loss, unless the policy has adapters.
        mix: texts whose loss is added to each update.
    Raises:
        ValueError: there is no ref, or no iteration, where one is needed.
        NonFinite: a loss or gradient is not finite, before it is applied: more of them in a row
            than config.skip_nonfinite, or all of the rollout's.
    """
    if ref is None and config.kl_in == "loss" and config.kl_estimator == "full":
        if not has_lora(policy):
            raise ValueError("ref is None: a full KL in the loss needs it, or a policy's adapters")
    if iteration is None and config.critic_warmup_steps:
        raise ValueError("iteration is None: critic_warmup_steps needs it, give 0, 1, …")
    iteration = iteration or 0
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    counters = {} if counters is None else counters
    assign_credit(rollout, config, kl_coef)
    learns_policy = iteration >= config.critic_warmup_steps
    update = Update(policy, ref, config, kl_coef, mix, learns_policy, f"step {iteration + 1}")
    tried: list[MiniBatchStats | None] = []
    with nullcontext() if learns_policy else frozen(policy.lm):
        for epoch in range(config.epochs):
            parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
            for i, mini_batch in enumerate(parts):
                number = (iteration * config.epochs + epoch) * config.mini_batches + i
                # From the first update on, a signal waits until the iteration is finished.
                work = partial(accumulate, update, mini_batch, number, begun=bool(tried))
                wanted = partial(within_max_ratio, config)
                seen = optim.update_or_skip(
                    optimizer, work, counters, config.skip_nonfinite, wanted
                )
                tried.append(seen)
            last = epoch + 1 == config.epochs  # none is left to end
            if not last and moved_too_far(tried[-len(parts) :], config.early_stop_kl):
                counters["early_stops"] = counters.get("early_stops", 0) + 1
                break
    seen = [seen for seen in tried if seen is not None]
    if not seen:
        what = f"all {len(tried)} updates were skipped"
        raise NonFinite(update.where, what, "lower learning_rate")
    ptx_coef = 0.0 if mix is None else mix.coef
    return summarise_updates(seen, rollout, config.reward_kl, kl_coef, epoch + 1, ptx_coef)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient is computed for its weights, and no pass keeps what one would need."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def within_max_ratio(config: PPOConfig, seen: MiniBatchStats) -> bool:
    """Whether a mini-batch's policy is near enough to the one that sampled to learn from it."""
    return config.max_ratio is None or seen.ratio <= config.max_ratio


def moved_too_far(epoch: list[MiniBatchStats | None], limit: float | None) -> bool:
    """Whether an epoch's mean KL (k3) from the policy that sampled to the new one is above it."""
    seen = [seen for seen in epoch if seen is not None]
    if limit is None or not seen:
        return False
    return float(sum(s.sums["moved"] for s in seen)) / sum(s.tokens for s in seen) > limit
