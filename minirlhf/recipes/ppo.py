"""PPO for language models: sample, score, credit, optimise.

Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022 (arXiv:2203.02155): the reward of a
response is its score minus a per-token KL penalty to a frozen reference; advantages by GAE; the
clipped objective of Schulman et al. 2017 (arXiv:1707.06347). Read `ppo` first, then `ppo_step`.

What is left out: several processes, and models that share layers with their reference.
Run it as `minirlhf ppo`, `python -m minirlhf.recipes.ppo`, or loop over `ppo(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf import config as settings
from minirlhf import (
    health,
    interrupt,
    memory,
    optim,
    presets,
    pretrained,
    reward_sources,
    streams,
)
from minirlhf.advantages import gae, token_rewards
from minirlhf.checkpoint import TrainState
from minirlhf.data import Prompt
from minirlhf.errors import BUG, OK, STOPPED, NonFinite, UserError, printable, run
from minirlhf.evaluation import evaluate_policy, evaluate_sets, keep_best
from minirlhf.heads import RewardModel, ValueHeadModel
from minirlhf.kl import ESTIMATORS, AdaptiveKL, kl_k1, kl_k3
from minirlhf.lora import merge_lora, merged_copy
from minirlhf.losses import clipped_value_loss
from minirlhf.machine import free_memory, process_bytes
from minirlhf.masking import masked_rescale, masked_standardize, masked_sum
from minirlhf.meters import Step
from minirlhf.metrics import rename_to_trl09
from minirlhf.passes import TokenPass, kl_to_ref, measure, policy_pass
from minirlhf.ppo_config import PPOConfig
from minirlhf.ppo_start import (
    check_models,
    check_reencoded,
    load_policy,
    prompt_room,
    read_data,
    run_facts,
)
from minirlhf.reward_sources import load_reward
from minirlhf.rewards import Completions, RewardSource, Scores, as_scores
from minirlhf.rollout import Rollout, RolloutBuffer, next_rows, replay_rows, sample, with_scores
from minirlhf.rollout_stats import rollout_statistics, score_statistics, text_statistics
from minirlhf.run import Run, write_model
from minirlhf.scores import RunningMoments, scale_scores
from minirlhf.texts import TextMix
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.transformer import CausalLM

RATIO_TOLERANCE = 1e-4  # both are exactly 0 on a CPU; a GPU's kernels may differ in the last bit
KL_TOLERANCE = 1e-4  # nats a token
EVENTS = ("skipped_updates", "skipped_ratio", "early_stops")  # counted since the start


class PPOStats(NamedTuple):
    """Of one `ppo_step`; token means over the rollout's response tokens, all epochs alike."""

    policy_loss: float
    value_loss: float
    kl_loss: float  # kl_coef times the KL where it is a loss; else 0
    ptx_loss: float  # of the texts that are mixed in, before its weight; 0 without
    loss: float  # all of them with their weights
    approxkl: float  # mean of (new - old logprob)^2 / 2, nats
    policykl: float  # mean of old - new logprob, nats
    clipfrac: float  # share of tokens whose policy gradient was clipped
    value_clipfrac: float
    vpred: float  # value during the updates
    value_error: float  # mean of (value - return)^2
    entropy: float  # nats a token
    ratio: float
    ratio_var: float
    grad_norm: float  # mean over optimizer steps, before clipping
    critic_grad_norm: float  # of a critic with a trunk of its own; else 0: it is in grad_norm
    explained_variance: float  # 1 - var(returns - old values) / var(returns)
    non_score_reward: float  # mean over rows of the summed KL penalty, <= 0 on average
    first_ratio_gap: float  # largest |ratio - 1| before the first optimizer step; 0 if exact
    epochs: int  # passes made; fewer than asked for where the KL ended them


def assign_credit(buffer: RolloutBuffer, config: PPOConfig, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE)."""

    def pay(micro: Rollout) -> Rollout:
        kl, scores = penalised_kl(micro, config), micro.scores
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
    # Both once over the whole rollout: no mini-batch split can change them.
    if config.whiten_rewards:
        rescale(buffer, "rewards", masked_rescale)
    buffer.update(credit)
    if config.whiten_advantages:
        rescale(buffer, "advantages", masked_standardize)


def penalised_kl(micro: Rollout, config: PPOConfig) -> Tensor:
    """(b, R) nats: what each token of a measured rollout pays for in its reward."""
    if config.kl_in == "loss":
        return torch.zeros_like(micro.old_logprobs)
    if config.kl_estimator == "full":
        return micro.full_kl
    return ESTIMATORS[config.kl_estimator](micro.old_logprobs, micro.ref_logprobs)


def rescale(
    buffer: RolloutBuffer, name: str, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    flat = buffer.tokens(name)
    buffer.set_tokens(name, function(flat, torch.ones_like(flat, dtype=torch.bool)))


class Seen(NamedTuple):
    """What one mini-batch showed on its way to an optimizer step."""

    sums: dict[str, Tensor]  # over its response tokens
    tokens: int
    largest_gap: Tensor  # () largest |ratio - 1|
    ptx_loss: float
    grad_norm: float  # before clipping
    critic_grad_norm: float

    @property
    def ratio(self) -> float:
        return 1 + float(self.sums["gap"]) / self.tokens


class Update(NamedTuple):
    """What all mini-batches of one `ppo_step` share."""

    policy: ValueHeadModel
    ref: CausalLM | None
    config: PPOConfig
    kl_coef: float
    mix: TextMix | None
    learns_policy: bool  # False while the critic warms up
    where: str  # for messages


def accumulate(update: Update, mini_batch: list[Rollout], number: int, begun: bool) -> Seen:
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
        total = config.vf_coef * value.loss
        total = total + (of_policy if update.learns_policy else of_policy.detach())
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
        }  # fmt: skip
        sums = {k: sums.get(k, 0) + masked_sum(x.detach(), mask) for k, x in seen.items()}
    for micro, loss in zip(mini_batch, torch.stack(losses).tolist(), strict=True):
        rows = ", ".join(map(str, micro.rows.tolist()[:8]))
        optim.check_finite(f"{update.where} (rollout rows {rows})", {"loss": loss})
    mixes = update.mix is not None and update.learns_policy
    ptx_loss = update.mix.backward(policy.lm, number) if mixes else 0.0
    optim.check_finite(update.where, {"ptx_loss": ptx_loss})
    return Seen(sums, tokens, torch.stack(gaps).max(), ptx_loss, *clip_gradients(update))


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
    if not update.learns_policy:
        policy.lm.zero_grad()  # what a value head sent into the trunk
    if policy.critic is None:
        return optim.clip_gradients(policy, most, update.where), 0.0
    critic = nn.ModuleList([policy.critic, policy.v_head])
    return tuple(optim.clip_gradients(part, most, update.where) for part in (policy.lm, critic))


def ppo_step(
    policy: ValueHeadModel,
    optimizer: torch.optim.Optimizer,
    rollout: RolloutBuffer,
    config: PPOConfig,
    iteration: int = 0,
    kl_coef: float | None = None,
    counters: dict[str, int] | None = None,
    ref: CausalLM | None = None,
    mix: TextMix | None = None,
) -> PPOStats:
    """GAE and the clipped-PPO update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure`); rewards, advantages and returns are filled here.
        iteration: decides, with config.seed, the order of the mini-batches.
        kl_coef: None is config.kl_coef.
        counters: where updates that were not made and early stops are counted.
        ref: needed where the full KL is a loss, unless the policy has adapters.
        mix: texts whose loss is added to each update.
    Raises:
        NonFinite: a loss or gradient is not finite, before it is applied: more of them in a row
            than config.skip_nonfinite, or all of the rollout's.
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    counters = {} if counters is None else counters
    assign_credit(rollout, config, kl_coef)
    learns_policy = iteration >= config.critic_warmup_steps
    update = Update(policy, ref, config, kl_coef, mix, learns_policy, f"step {iteration + 1}")
    tried: list[Seen | None] = []
    for epoch in range(config.epochs):
        parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
        for i, mini_batch in enumerate(parts):
            number = (iteration * config.epochs + epoch) * config.mini_batches + i
            # From the first update on, a signal waits until the iteration is finished.
            work = partial(accumulate, update, mini_batch, number, begun=bool(tried))
            seen = optim.update_or_skip(
                optimizer, work, counters, config.skip_nonfinite, partial(near, config)
            )
            tried.append(seen)
        if moved_too_far(tried[-len(parts) :], config.early_stop_kl):
            counters["early_stops"] = counters.get("early_stops", 0) + 1
            break
    seen = [seen for seen in tried if seen is not None]
    if not seen:
        what = f"all {len(tried)} updates were skipped"
        raise NonFinite(update.where, what, "lower learning_rate")
    return summarise_updates(seen, rollout, config, kl_coef, epoch + 1)


def near(config: PPOConfig, seen: Seen) -> bool:
    """Whether a mini-batch's policy is near enough to the one that sampled to learn from it."""
    return config.max_ratio is None or seen.ratio <= config.max_ratio


def moved_too_far(epoch: list[Seen | None], limit: float | None) -> bool:
    """Whether an epoch's mean KL (k3) from the policy that sampled to the new one is above it."""
    seen = [seen for seen in epoch if seen is not None]
    if limit is None or not seen:
        return False
    return float(sum(s.sums["moved"] for s in seen)) / sum(s.tokens for s in seen) > limit


def summarise_updates(
    updates: list[Seen], rollout: RolloutBuffer, config: PPOConfig, kl_coef: float, epochs: int
) -> PPOStats:
    """Token means over all updates, and what the rollout itself says."""
    total = sum(seen.tokens for seen in updates)
    mean = {k: float(sum(seen.sums[k] for seen in updates)) / total for k in updates[0].sums}
    gap, gap_sq = mean.pop("gap"), mean.pop("gap_sq")  # squares around 1 keep small variances
    mean.pop("moved")
    ptx_loss = sum(seen.ptx_loss for seen in updates) / len(updates)
    mean["loss"] += config.ptx_coef * ptx_loss
    returns, old_values = rollout.tokens("returns"), rollout.tokens("old_values")
    spread = float(returns.var(correction=0))
    unexplained = float((returns - old_values).var(correction=0))
    kl = sum(
        float(masked_sum(penalised_kl(micro, config), micro.response_mask))
        for micro in rollout.micro_batches
    )
    return PPOStats(
        **mean, ptx_loss=ptx_loss, ratio=1 + gap, ratio_var=max(gap_sq - gap**2, 0.0),
        grad_norm=sum(seen.grad_norm for seen in updates) / len(updates),
        critic_grad_norm=sum(seen.critic_grad_norm for seen in updates) / len(updates),
        explained_variance=1 - unexplained / spread if spread > 0 else 0.0,
        non_score_reward=-kl_coef * kl / len(rollout),
        first_ratio_gap=float(updates[0].largest_gap), epochs=epochs,
    )  # fmt: skip


def ppo(
    state: TrainState,
    prompts: list[Prompt],
    reward: RewardSource,
    ref: CausalLM | None,
    tokenizer: Tokenizer,
    config: PPOConfig,
    mix: TextMix | None = None,
    offload: Callable[[], AbstractContextManager] = nullcontext,
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
        offload: a context around each update, in which frozen models may leave memory.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); the KL at step 0
            is not 0 although the reference is the policy, or the first ratio is not 1 (code 1).
    """
    settings.validate(config)
    policy, B = state.model, config.batch_size
    if state.kl_coef is None:
        state.kl_coef = config.kl_coef
    full_kl = config.kl_estimator == "full"
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
            policy.lm, batch, keys, config.sampling, tokenizer, config.rollout_batch_size
        )
        clock["time/rollout"] = time.perf_counter() - started

        # Score: the rule for cut responses, then the scale of all scores so far.
        given = as_scores(reward(completions), completions, f"step {iteration + 1}")
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
                full_kl and config.kl_in == "loss")  # fmt: skip
        clock["time/measure"] = time.perf_counter() - started - sum(clock.values())
        kl = kl_k1(buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs"))
        check_start(iteration, kl, config)

        # Learn: credit and several epochs of mini-batches.
        kl_coef = state.kl_coef
        with offload():
            stats = ppo_step(
                policy, state.optimizer, buffer, config, iteration, kl_coef, state.counters, ref,
                mix,
            )  # fmt: skip
        check_ratio(iteration, stats.first_ratio_gap)
        sequence_kl = float(kl.sum()) / B
        if config.kl_target is not None:
            controller = AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon)
            controller.update(sequence_kl, B)
            state.kl_coef = controller.coef

        state.step += 1
        state.samples += B
        state.score_moments = moments.as_list()
        metrics = summarise(stats, completions, given, scores, buffer, sequence_kl, tokenizer)
        state.meters.update(metrics, B)
        steady = {"lr": rate, "episode": state.samples, "objective/kl_coef": kl_coef,
                  "epoch": state.samples / len(prompts)}  # fmt: skip
        steady |= {event: state.counters.get(event, 0) for event in EVENTS}
        seconds = time.perf_counter() - started
        clock["time/update"] = seconds - sum(clock.values())
        sampled = int(rollout.response_mask.sum())
        clock |= {"time/step": seconds, "eps": B / seconds, "tok_per_s": sampled / seconds}
        replay = replay_rows(completions, buffer) if config.save_rollouts else []
        replay = [{"step": state.step, "kind": "rollout"} | row for row in replay]
        yield Step(state.step, metrics | steady, clock, replay)


def check_start(iteration: int, kl: Tensor, config: PPOConfig) -> None:
    """At step 0 the policy is its own reference, so every log-ratio must be 0."""
    gap = float(kl.abs().max())
    if iteration == 0 and config.ref is None and not gap <= KL_TOLERANCE:
        raise UserError(
            "step 1: objective/kl", f"a token's KL is {gap:.3g} nats before any training",
            "the reference is not the starting policy; name another one with --ref, "
            "which turns this check off", BUG,
        )  # fmt: skip


def check_ratio(iteration: int, gap: float) -> None:
    """Before the first update of an iteration the policy is the one that sampled."""
    if not gap <= RATIO_TOLERANCE:
        raise UserError(
            f"step {iteration + 1}: val/ratio",
            f"the first ratio is off 1 by {gap:.3g}",
            "training and measuring passes differ: is something random or stateful in the model?",
            BUG,
        )


def summarise(
    stats: PPOStats, completions: Completions, given: Scores, scores: Tensor,
    buffer: RolloutBuffer, sequence_kl: float, tokenizer: Tokenizer,
) -> dict[str, float]:  # fmt: skip
    """TRL's metric names, with the numbers that the names promise: see `minirlhf.metrics`.

    Args:
        given: what the reward sources said.
        scores: (B,) under the rule for cut responses, before they were scaled.
    """
    by_token = given.sums - given.total  # (B,)
    scores = scores + by_token
    scaled = torch.cat([micro.scores for micro in buffer.micro_batches]).cpu()
    learned = scaled + by_token[torch.cat([m.rows for m in buffer.micro_batches]).cpu()]
    responses, tokens = completions.response_ids, len(buffer.tokens("rewards"))
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    return given.metrics() | {
        **rollout_statistics(buffer),
        **score_statistics(given.sums, scores),
        **text_statistics(responses, completions.finish_reasons, scores),
        "objective/non_score_reward_per_token": stats.non_score_reward * len(buffer) / tokens,
        "objective/kl": sequence_kl,
        "objective/non_score_reward": stats.non_score_reward,
        "objective/learned_scores": float(learned.mean()),
        "objective/learned_scores_std": float(learned.std(correction=0)),
        "objective/rlhf_reward": float(learned.mean()) + stats.non_score_reward,
        "objective/entropy": -float(buffer.row_sums("old_logprobs").mean()),
        "policy/approxkl_avg": stats.approxkl,
        "policy/policykl_avg": stats.policykl,
        "policy/clipfrac_avg": stats.clipfrac,
        "policy/entropy_avg": stats.entropy,
        "loss/policy_avg": stats.policy_loss,
        "loss/value_avg": stats.value_loss,
        "loss/kl_avg": stats.kl_loss,
        "loss/ptx_avg": stats.ptx_loss,
        "loss/total_avg": stats.loss,
        "val/clipfrac_avg": stats.value_clipfrac,
        "val/vpred_avg": stats.vpred,
        "val/error_avg": stats.value_error,
        "val/ratio": stats.ratio,
        "val/ratio_var": stats.ratio_var,
        "grad_norm": stats.grad_norm,
        "critic_grad_norm": stats.critic_grad_norm,
        "policy/epochs": float(stats.epochs),
        "health/explained_variance": stats.explained_variance,
        "health/unknown_tokens": float(unknown),
    }


def sample_table(
    state: TrainState, prompts: list[Prompt], reward: RewardSource, tokenizer: Tokenizer,
    config: PPOConfig,
) -> list[dict]:  # fmt: skip
    """The same prompts with the same random keys at every call: what changes is the policy."""
    fixed = prompts[: config.sample_prompts]
    keys = streams.key(config.seed, "sample table", torch.arange(len(fixed)))
    completions, _ = sample(
        state.model.lm, fixed, keys, config.sampling, tokenizer, config.rollout_batch_size
    )
    where = f"samples at step {state.step}"
    scores = as_scores(reward(completions), completions, where).sums.tolist()
    return [
        {"step": state.step, "kind": "sample", "prompt": prompt, "response": text,
         "finish_reason": reason, "score": value}
        for prompt, text, reason, value in zip(
            completions.prompts, completions.completions, completions.finish_reasons, scores,
            strict=True)
    ]  # fmt: skip


def show_samples(r: Run, state: TrainState, rows: list[dict]) -> None:
    """The table on the console and in samples.jsonl."""
    r.say(f"  samples at step {state.step}")
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        shown = f"{printable(prompt, 60)} | {printable(row['response'], 160)}"
        r.say(f"  {row['score']:>8.3f}  {shown}")
    r.write_samples(state, rows)


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        PPOConfig, argv, "minirlhf ppo", "Align a language model with PPO against a reward.",
        presets.PPO,
    )  # fmt: skip
    device, dtype = optim.choose_device(config.device), optim.choose_dtype(config.dtype)
    folder = pretrained.resolve(config.model)
    ref_folder = folder if config.ref is None else pretrained.resolve(config.ref)
    tokenizer = load_tokenizer(folder)
    critic = [] if config.critic is None else [pretrained.resolve(config.critic)]
    specs = [reward_sources.parse(source) for source in config.reward]
    places = [reward_sources.locate(spec) for spec in specs]
    scorers = [place for place in places if place is not None and place.is_dir()]
    check_models(config, (folder, ref_folder), critic, scorers, tokenizer)
    same = [place for place in scorers if not reward_sources.reencoded(place, tokenizer)]
    room = prompt_room(config, (folder, ref_folder, *critic, *same))
    data = read_data(config, tokenizer, room, pretrained.read_config(folder).longest_row)
    check_reencoded(config, [place for place in scorers if place not in same], data)
    prompts, sets, texts = data.prompts, data.sets, data.texts
    inputs = [*data.files, *(str(place) for place in places if place), str(ref_folder)]
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(config.out, "ppo", settings.as_dict(config), config.resume, inputs)
    # Late: it imports 70 MB, which the optimizer would import anyway. A refusal need not wait for
    # it, and the plan counts it. On a GPU torch refuses the cumsum of sampling, and cuBLAS without
    # a workspace setting.
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    models, held = memory.ppo_models(config), process_bytes(device)
    plan = memory.ppo_plan(
        config, models, data.longest_prompt, dtype, held, data.longest_text
    )
    print(plan)
    fits = memory.verdict(plan, free_memory(device))
    frozen: list[tuple[CausalLM | RewardModel, Path]] = []
    reward = load_reward(
        config, tokenizer, dtype, device, config.micro_batch_tokens, data.columns,
        r.folder / "rewards.jsonl", frozen,
    )  # fmt: skip
    policy = load_policy(config, folder, device, dtype)
    ref = None
    if config.ref is not None or not config.lora_rank:
        ref = pretrained.load_pretrained(ref_folder, dtype, device)
        ref.requires_grad_(False)
        frozen.append((ref, ref_folder))
    offload = partial(pretrained.offloaded, frozen if config.offload_frozen else ())
    optimizer = optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon,
        critic=policy.value_parameters(), critic_lr_scale=config.critic_lr_scale,
    )  # fmt: skip
    state = TrainState(policy, optimizer, kl_coef=config.kl_coef)
    sizes = config.ptx_batch_size, config.micro_batch_tokens
    mix = TextMix(texts, config.ptx_coef, *sizes, config.seed) if texts else None
    evaluate = partial(
        evaluate_policy, policy.lm, reward=reward, tokenizer=tokenizer, sampling=config.sampling,
        measure=partial(measure, policy, ref, temperature=config.temperature), seed=config.seed,
        # no more than a training step, so that the memory plan holds
        rows_at_once=min(config.rollout_batch_size, config.batch_size),
        micro_batch_size=config.micro_batch_size, micro_batch_tokens=config.micro_batch_tokens,
    )  # fmt: skip

    def export_best() -> None:
        lm = merged_copy(policy.lm) if config.lora_rank else policy.lm
        r.export(lambda target: write_model(lm, tokenizer, target), "best")

    if config.metric_names == "trl-0.9":
        r.rename = rename_to_trl09
    with r:
        r.list_left_out(data.reports)
        r.facts(
            run_facts(config, len(prompts), policy, fits, device, dtype)
            | reward_sources.facts(specs, tokenizer)
        )
        r.restore(state)
        if sets and not state.baselines:
            found = evaluate_sets(r, state, sets, evaluate)
            r.log(state, found, {}, ())
            if config.keep_best:
                keep_best(r, state, found, export_best)
        # where the first step was stopped, the table before it is there
        if config.sample_every and state.step == 0 and not state.log_bytes["samples.jsonl"]:
            show_samples(r, state, sample_table(state, prompts, reward, tokenizer, config))
        for step in r.bar(
            ppo(state, prompts, reward, ref, tokenizer, config, mix, offload), state, config.steps
        ):
            last = step.number == config.steps
            with r.report(state, step):
                alarms, state.health = health.check(state.health, step.number, step.metrics)
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
                        "policy/clipfrac_avg", "response_length"))  # fmt: skip
                if found and config.keep_best:
                    keep_best(r, state, found, export_best)
                if config.sample_every and (last or step.number % config.sample_every == 0):
                    show_samples(r, state, sample_table(state, prompts, reward, tokenizer, config))
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
