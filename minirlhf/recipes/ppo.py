"""PPO for language models: sample, score, credit, optimise.

Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022 (arXiv:2203.02155): the reward of a
response is its score minus a per-token KL penalty to a frozen reference; advantages by GAE; the
clipped objective of Schulman et al. 2017 (arXiv:1707.06347). Read `ppo` first, then `ppo_step`.

What is left out: truncated sampling (top-k, top-p, min-p), for the reason in `PPOConfig.check`.
Run it as `minirlhf ppo`, `python -m minirlhf.recipes.ppo`, or loop over `ppo(...)`.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import health, interrupt, memory, optim, presets, pretrained, streams
from minirlhf.advantages import gae, token_rewards
from minirlhf.checkpoint import TrainState
from minirlhf.config import setting
from minirlhf.data import Prompt, load_prompts
from minirlhf.errors import BUG, OK, STOPPED, NonFinite, UserError, printable, run
from minirlhf.generation import Sampling
from minirlhf.heads import (
    ValueHeadModel,
    critic_from_reward_model,
    response_states,
    token_logprobs,
)
from minirlhf.kl import AdaptiveKL, kl_k1
from minirlhf.lora import adapters_off, add_lora, merge_lora
from minirlhf.losses import clipped_surrogate, clipped_value_loss
from minirlhf.machine import free_memory, process_bytes
from minirlhf.masking import masked_standardize, masked_sum
from minirlhf.meters import Step
from minirlhf.rewards import Completions, RewardSource, load_reward, locate
from minirlhf.rollout import Rollout, RolloutBuffer, prompt_rows, replay_rows, sample, unpack
from minirlhf.rollout_stats import rollout_statistics, score_statistics, text_statistics
from minirlhf.run import Run, write_model
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.transformer import CausalLM

RATIO_TOLERANCE = 1e-4  # both are exactly 0 on a CPU; a GPU's kernels may differ in the last bit
KL_TOLERANCE = 1e-4  # nats a token


@dataclass(frozen=True)
class PPOConfig:
    model: str = setting("", "language model to align", metavar="FOLDER", required=True)
    data: str = setting(
        "", "prompts: JSON lines, JSON or CSV, also .gz", metavar="FILE", required=True
    )
    reward: str = setting(
        "", "reward-model folder, or file.py:function", metavar="SOURCE", required=True
    )
    out: str = setting("", "folder of the run", metavar="DIR", required=True)
    ref: str | None = setting(None, "reference; none: the policy at step 0", metavar="FOLDER")
    critic: str | None = setting(
        None, "reward model to start a critic of its own from; none: a head on the policy's trunk",
        metavar="FOLDER",
    )  # fmt: skip
    train_critic: bool = setting(True, "whether a critic of its own learns")
    # rollout
    steps: int = setting(100, "iterations of sampling and optimising", at_least=1)
    batch_size: int = setting(64, "prompts sampled in an iteration", at_least=1)
    max_new_tokens: int = setting(64, "tokens of the longest response", at_least=1)
    temperature: float = setting(1.0, "of sampling, and of every log-prob; above 0", at_least=0)
    top_k: int = setting(0, "truncated sampling: only 0 (off) for now", at_least=0)
    top_p: float = setting(1.0, "truncated sampling: only 1 (off) for now", above=0, at_most=1)
    min_p: float = setting(0.0, "truncated sampling: only 0 (off) for now", at_least=0, at_most=1)
    stop: tuple[str, ...] = setting((), "strings that end a response", metavar="TEXT")
    rollout_batch_size: int = setting(256, "rows sampled side by side", at_least=1)
    max_prompt_length: int | None = setting(None, "tokens of the longest prompt", at_least=1)
    overlong: str = setting(
        "error", "what happens to longer prompts", choices=("error", "drop", "truncate_prompt_left")
    )
    # reward
    kl_coef: float = setting(0.05, "weight of the KL penalty, per nat", at_least=0)
    kl_target: float | None = setting(None, "nats a response to steer kl_coef to", above=0)
    kl_horizon: float = setting(10_000.0, "episodes over which kl_coef adapts", above=0)
    missing_eos_penalty: float = setting(0.0, "taken off the score of a cut response", at_least=0)
    gamma: float = setting(1.0, "discount", above=0, at_most=1)
    lam: float = setting(0.95, "GAE's lambda", at_least=0, at_most=1)
    # optimisation
    epochs: int = setting(4, "passes over each rollout", at_least=1)
    mini_batches: int = setting(1, "optimizer steps in a pass", at_least=1)
    micro_batch_size: int = setting(8, "most rows in one forward pass", at_least=1)
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    clip_low: float = setting(0.2, "policy ratio clipped below 1 minus this", at_least=0, at_most=1)
    clip_high: float = setting(0.2, "policy ratio clipped above 1 plus this", at_least=0)
    value_clip: float | None = setting(0.2, "value change clipped at this; none: off", above=0)
    vf_coef: float = setting(0.1, "weight of the value loss", at_least=0)
    whiten_advantages: bool = setting(True, "advantages to mean 0, std 1 over the rollout")
    learning_rate: float = setting(3e-6, "peak step size of AdamW", above=0)
    value_head_lr_scale: float = setting(
        10.0, "learning rate of a value head that starts from zero, as a multiple", above=0
    )
    schedule: str = setting("linear", "decay of the learning rate", choices=optim.SCHEDULES)
    warmup_steps: int = setting(0, "iterations until the peak learning rate", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's decay of matrices", at_least=0)
    adam_epsilon: float = setting(1e-5, "AdamW's epsilon", above=0)
    max_grad_norm: float | None = setting(1.0, "gradient norm to clip at; none: off", above=0)
    skip_nonfinite: int = setting(
        0, "updates in a row that may be skipped where numbers are not finite", at_least=0
    )
    lora_rank: int = setting(
        0, "train adapters of this rank; 0: all weights", at_least=0, at_most=4096
    )
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    # run
    dtype: str = setting("auto", "of weights and compute", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    seed: int = setting(0, "of prompt order, sampling and mini-batches")
    sample_every: int = setting(10, "steps between tables of samples; 0: none", at_least=0)
    sample_prompts: int = setting(4, "fixed prompts in the table", at_least=1)
    save_rollouts: bool = setting(False, "all rollouts into samples.jsonl, ids and rewards too")
    log_every: int = setting(1, "steps between lines of the log", at_least=1)
    save_every: int = setting(20, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")

    def check(self) -> list[str]:
        problems = []
        if self.top_k > 0 or self.top_p < 1 or self.min_p > 0:
            problems.append(
                "top_k, top_p, min_p: truncated sampling draws from another law than the one in "
                "the ratio and the KL, so both would lose their meaning; use temperature"
            )
        if self.temperature == 0:
            problems.append(
                "temperature 0: greedy sampling explores nothing, and its law has no finite "
                "log-probs to learn from; use one above 0"
            )
        rows, micro, minis = self.batch_size, self.micro_batch_size, self.mini_batches
        if micro * minis > rows:
            legal = [f"batch_size {micro * minis}"]
            legal += [f"micro_batch_size {rows // minis}"] if minis <= rows else []
            legal += [f"mini_batches {rows // micro}"] if micro <= rows else []
            problems.append(
                f"batch_size {rows} is less than {minis} mini_batches of micro_batch_size {micro}: "
                f"use {' or '.join(legal)}"
            )
        if self.critic is None and not self.train_critic:
            problems.append("no-train-critic: goes with --critic, a value head has to learn")
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append("kl_target: kl_coef is 0, which no factor can move; use one above 0")
        if self.kl_target is not None and rows >= 5 * self.kl_horizon:
            problems.append(
                f"kl_horizon {self.kl_horizon:g} is too short for batch_size {rows}: kl_coef could "
                f"fall to 0 in one step; use more than {rows / 5:g}"
            )
        return problems

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, stop_strings=self.stop)


class PPOStats(NamedTuple):
    """Of one `ppo_step`; token means over the rollout's response tokens, all epochs alike."""

    policy_loss: float
    value_loss: float
    loss: float  # policy_loss + vf_coef * value_loss
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
    explained_variance: float  # 1 - var(returns - old values) / var(returns)
    non_score_reward: float  # mean over rows of the summed KL penalty, <= 0 on average
    first_ratio_gap: float  # largest |ratio - 1| before the first optimizer step; 0 if exact


class TokenPass(NamedTuple):
    logprobs: Tensor  # (b, R) nats, at the sampling temperature; 0 outside the mask
    entropy: Tensor  # (b, R) nats
    values: Tensor  # (b, R)


def policy_pass(policy: ValueHeadModel, micro: Rollout, temperature: float) -> TokenPass:
    """One forward pass: log-prob, entropy and value at each response token."""
    hidden, values = policy(micro.tokens, micro.lengths)
    logprobs, entropy = response_logprobs(policy.lm, hidden, micro, temperature)
    R = micro.response_mask.shape[1]
    return TokenPass(logprobs, entropy, response_states(values, micro.prompt_lengths, R))


def response_logprobs(
    lm: CausalLM, hidden: Tensor, micro: Rollout, temperature: float
) -> tuple[Tensor, Tensor]:
    """(b, R) log-probs and entropies of the response tokens; only their logits are computed."""
    mask = micro.response_mask
    states = response_states(hidden, micro.prompt_lengths, mask.shape[1])  # (b, R, D)
    targets = response_states(micro.tokens, micro.prompt_lengths + 1, mask.shape[1])  # (b, R)
    stats = token_logprobs(lm, states[mask], targets[mask], temperature)
    return unpack(stats.logprobs, mask), unpack(stats.entropy, mask)


@torch.no_grad()
def measure(
    policy: ValueHeadModel, ref: CausalLM | None, buffer: RolloutBuffer, temperature: float
):
    """Fills old_logprobs, old_values and ref_logprobs, on the micro-batches of the training passes.

    ref None: the policy's own base under its adapters.
    """

    def fill(micro: Rollout) -> Rollout:
        interrupt.check()
        old = policy_pass(policy, micro, temperature)
        with adapters_off(policy) if ref is None else nullcontext():
            frozen = policy.lm if ref is None else ref
            states = frozen(micro.tokens, lengths=micro.lengths)
            ref_logprobs, _ = response_logprobs(frozen, states, micro, temperature)
        return micro._replace(
            old_logprobs=old.logprobs, old_values=old.values, ref_logprobs=ref_logprobs
        )

    buffer.update(fill)


def assign_credit(buffer: RolloutBuffer, config: PPOConfig, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE)."""

    def fill(micro: Rollout) -> Rollout:
        kl = kl_k1(micro.old_logprobs, micro.ref_logprobs)
        rewards = token_rewards(micro.scores, kl, micro.response_mask, kl_coef)
        credit = gae(rewards, micro.old_values, micro.response_mask, config.gamma, config.lam)
        return micro._replace(rewards=rewards, advantages=credit.advantages, returns=credit.returns)

    buffer.update(fill)
    if config.whiten_advantages:  # once, over the whole rollout: no mini-batch split can change it
        flat = buffer.tokens("advantages")
        buffer.set_tokens("advantages", masked_standardize(flat, torch.ones_like(flat).bool()))


class Seen(NamedTuple):
    """What one mini-batch showed on its way to an optimizer step."""

    sums: dict[str, Tensor]  # over its response tokens
    tokens: int
    largest_gap: Tensor  # () largest |ratio - 1|
    grad_norm: float  # before clipping


def accumulate(
    policy: ValueHeadModel, mini_batch: list[Rollout], config: PPOConfig, where: str, begun: bool
) -> Seen:
    """Gradient of one mini-batch's loss, in its micro-batches; `begun`: too late to stop."""
    # Every token of the optimizer step weighs the same, however it is cut.
    tokens = sum(int(micro.response_mask.sum()) for micro in mini_batch)
    sums: dict[str, Tensor] = {}
    losses, gaps = [], []
    for micro in mini_batch:
        mask = micro.response_mask
        new = policy_pass(policy, micro, config.temperature)
        surrogate = clipped_surrogate(
            new.logprobs, micro.old_logprobs, micro.advantages, config.clip_low, config.clip_high
        )
        value = clipped_value_loss(new.values, micro.old_values, micro.returns, config.value_clip)
        loss = masked_sum(surrogate.loss + config.vf_coef * value.loss, mask) / tokens
        loss.backward()
        if not begun:
            interrupt.check()
        losses.append(loss.detach())
        gap = surrogate.ratio - 1
        gaps.append(gap[mask].abs().max())
        log_ratio = new.logprobs.detach() - micro.old_logprobs
        seen = {
            "policy_loss": surrogate.loss, "value_loss": value.loss,
            "approxkl": log_ratio.square() / 2, "policykl": -log_ratio,
            "clipfrac": surrogate.clipped, "entropy": new.entropy,
            "value_clipfrac": value.clipped, "vpred": new.values,
            "value_error": (new.values - micro.returns).square(),
            "gap": gap, "gap_sq": gap.square(),
        }  # fmt: skip
        sums = {k: sums.get(k, 0) + masked_sum(x.detach(), mask) for k, x in seen.items()}
    for micro, loss in zip(mini_batch, torch.stack(losses).tolist(), strict=True):
        rows = ", ".join(map(str, micro.rows.tolist()[:8]))
        optim.check_finite(f"{where} (rollout rows {rows})", {"loss": loss})
    grad_norm = optim.clip_gradients(policy, config.max_grad_norm, where)
    return Seen(sums, tokens, torch.stack(gaps).max(), grad_norm)


def ppo_step(
    policy: ValueHeadModel,
    optimizer: torch.optim.Optimizer,
    rollout: RolloutBuffer,
    config: PPOConfig,
    iteration: int = 0,
    kl_coef: float | None = None,
    counters: dict[str, int] | None = None,
) -> PPOStats:
    """GAE and the clipped-PPO update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure`); rewards, advantages and returns are filled here.
        iteration: decides, with config.seed, the order of the mini-batches.
        kl_coef: None is config.kl_coef.
        counters: where skipped updates are counted.
    Raises:
        NonFinite: a loss or gradient is not finite, before it is applied: more of them in a row
            than config.skip_nonfinite, or all of the rollout's.
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    counters = {} if counters is None else counters
    assign_credit(rollout, config, kl_coef)
    where, tried = f"step {iteration + 1}", []
    for epoch in range(config.epochs):
        parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
        for mini_batch in parts:
            # From the first update on, a signal waits until the iteration is finished.
            work = partial(accumulate, policy, mini_batch, config, where, begun=bool(tried))
            tried.append(optim.update_or_skip(optimizer, work, counters, config.skip_nonfinite))
    updates = [seen for seen in tried if seen is not None]
    if not updates:
        raise NonFinite(where, f"all {len(tried)} updates were skipped", "lower learning_rate")
    return summarise_updates(updates, rollout, config, kl_coef)


def summarise_updates(
    updates: list[Seen], rollout: RolloutBuffer, config: PPOConfig, kl_coef: float
) -> PPOStats:
    """Token means over all updates, and what the rollout itself says."""
    total = sum(seen.tokens for seen in updates)
    mean = {k: float(sum(seen.sums[k] for seen in updates)) / total for k in updates[0].sums}
    gap, gap_sq = mean.pop("gap"), mean.pop("gap_sq")  # squares around 1 keep small variances
    returns, old_values = rollout.tokens("returns"), rollout.tokens("old_values")
    spread = float(returns.var(correction=0))
    unexplained = float((returns - old_values).var(correction=0))
    kl = kl_k1(rollout.tokens("old_logprobs"), rollout.tokens("ref_logprobs"))
    return PPOStats(
        **mean, loss=mean["policy_loss"] + config.vf_coef * mean["value_loss"],
        ratio=1 + gap, ratio_var=max(gap_sq - gap**2, 0.0),
        grad_norm=sum(seen.grad_norm for seen in updates) / len(updates),
        explained_variance=1 - unexplained / spread if spread > 0 else 0.0,
        non_score_reward=-kl_coef * float(kl.sum()) / len(rollout),
        first_ratio_gap=float(updates[0].largest_gap),
    )  # fmt: skip


def score(reward: RewardSource, completions: Completions, where: str) -> Tensor:
    """(B,) float32 scores as the source gives them, on the CPU."""
    scores = reward(completions).float().cpu()
    B = len(completions.response_ids)
    if scores.shape != (B,):
        raise ValueError(f"reward gave {tuple(scores.shape)}: give one score each, {B}")
    for i, value in enumerate(scores.tolist()):
        optim.check_finite(f"{where}, response {i}", {"score": value})
    return scores


def penalised(scores: Tensor, completions: Completions, config: PPOConfig) -> Tensor:
    """(B,) scores as PPO uses them."""
    cut = torch.tensor([reason == "length" for reason in completions.finish_reasons])  # (B,)
    return scores - config.missing_eos_penalty * cut


def ppo(
    state: TrainState,
    prompts: list[Prompt],
    reward: RewardSource,
    ref: CausalLM | None,
    tokenizer: Tokenizer,
    config: PPOConfig,
) -> Iterator[Step]:
    """Aligns state.model, a ValueHeadModel; yields after each iteration.

    Args:
        state: may come from a checkpoint; the run goes on at its step.
        prompts: N of them, in any order; they are shuffled anew each time all are used up.
        reward: completions -> (B,) scores.
        ref: the frozen reference; None where the policy has adapters: its base.
        tokenizer: of the policy; decodes what reward sources see.
        config: only its training settings are read.
    Raises:
        UserError: an illegal setting; numbers that are not finite (exit code 3); the KL at step 0
            is not 0 although the reference is the policy, or the first ratio is not 1 (code 1).
    """
    settings.validate(config)
    policy, B = state.model, config.batch_size
    if state.kl_coef is None:
        state.kl_coef = config.kl_coef
    while state.step < config.steps:
        iteration, clock = state.step, {}
        started = time.perf_counter()
        rate = optim.learning_rate(
            iteration, config.steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)

        # Sample: a text depends on the seed, the iteration, its prompt and its place in the batch,
        # not on which rows are sampled side by side.
        rows = prompt_rows(state.samples, B, len(prompts), config.seed)
        keys = streams.key(config.seed, "rollout", iteration, rows, torch.arange(B))
        batch = [prompts[i] for i in rows.tolist()]
        completions, rollout = sample(
            policy.lm, batch, keys, config.sampling, tokenizer, config.rollout_batch_size
        )
        clock["time/rollout"] = time.perf_counter() - started
        raw = score(reward, completions, f"step {iteration + 1}")
        scores = penalised(raw, completions, config)
        rollout = rollout._replace(scores=scores.to(rollout.tokens.device))
        clock["time/score"] = time.perf_counter() - started - clock["time/rollout"]

        # Measure: cut once into micro-batches, and pass them through policy and reference.
        buffer = RolloutBuffer(config.micro_batch_size, config.micro_batch_tokens)
        buffer.add(rollout)
        measure(policy, ref, buffer, config.temperature)
        clock["time/measure"] = time.perf_counter() - started - sum(clock.values())
        kl = kl_k1(buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs"))
        check_start(iteration, kl, config)

        # Learn: credit and several epochs of mini-batches.
        kl_coef = state.kl_coef
        stats = ppo_step(
            policy, state.optimizer, buffer, config, iteration, kl_coef, state.counters
        )
        check_ratio(iteration, stats.first_ratio_gap)
        sequence_kl = float(kl.sum()) / B
        if config.kl_target is not None:
            controller = AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon)
            controller.update(sequence_kl, B)
            state.kl_coef = controller.coef

        state.step += 1
        state.samples += B
        metrics = summarise(stats, completions, raw, scores, buffer, sequence_kl, tokenizer)
        state.meters.update(metrics, B)
        steady = {"lr": rate, "episode": state.samples, "objective/kl_coef": kl_coef,
                  "epoch": state.samples / len(prompts),
                  "skipped_updates": state.counters.get("skipped_updates", 0)}  # fmt: skip
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
    stats: PPOStats, completions: Completions, raw: Tensor, scores: Tensor,
    buffer: RolloutBuffer, sequence_kl: float, tokenizer: Tokenizer,
) -> dict[str, float]:  # fmt: skip
    """TRL's metric names, with the numbers that the names promise: see `minirlhf.metrics`."""
    responses, tokens = completions.response_ids, len(buffer.tokens("rewards"))
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    return {
        **rollout_statistics(buffer),
        **score_statistics(raw, scores),
        **text_statistics(responses, completions.finish_reasons, scores),
        "objective/kl": sequence_kl,
        "objective/non_score_reward": stats.non_score_reward,
        "objective/non_score_reward_per_token": stats.non_score_reward * len(buffer) / tokens,
        "objective/rlhf_reward": float(scores.mean()) + stats.non_score_reward,
        "objective/entropy": -float(buffer.row_sums("old_logprobs").mean()),
        "policy/approxkl_avg": stats.approxkl,
        "policy/policykl_avg": stats.policykl,
        "policy/clipfrac_avg": stats.clipfrac,
        "policy/entropy_avg": stats.entropy,
        "loss/policy_avg": stats.policy_loss,
        "loss/value_avg": stats.value_loss,
        "loss/total_avg": stats.loss,
        "val/clipfrac_avg": stats.value_clipfrac,
        "val/vpred_avg": stats.vpred,
        "val/error_avg": stats.value_error,
        "val/ratio": stats.ratio,
        "val/ratio_var": stats.ratio_var,
        "grad_norm": stats.grad_norm,
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
    raw = score(reward, completions, f"samples at step {state.step}")
    scores = penalised(raw, completions, config).tolist()
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


def run_facts(
    config: PPOConfig, prompts: int, policy: ValueHeadModel, fits: str, device, dtype
) -> dict:
    """What is about to happen, before it costs anything."""
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    per_step = ceil(config.batch_size / config.mini_batches)
    accumulated = ceil(per_step / config.micro_batch_size)
    adapting = config.kl_target and f"adapting to {config.kl_target:g} nats a response"
    low, high = 1 - config.clip_low, 1 + config.clip_high
    return {
        "prompts": prompts,
        "epochs over prompts": f"{config.steps * config.batch_size / prompts:.2f}",
        "rows in a forward pass": f"at most {config.micro_batch_size}, "
        f"{config.micro_batch_tokens:,} tokens",
        "rows in an optimizer step": f"about {per_step}, {accumulated} or more forward passes",
        "rows in a rollout": config.batch_size,
        "optimisation": f"{config.epochs} epochs of {config.mini_batches} mini-batches a rollout",
        "steps": config.steps,
        "trainable parameters": trainable,
        "learning rate": f"{config.learning_rate:g}, {config.schedule}, "
        f"{config.warmup_steps} warm-up steps",
        "kl_coef": f"{config.kl_coef:g}, {adapting or 'fixed'}",
        "gamma, lambda": f"{config.gamma:g}, {config.lam:g}",
        "clip": f"ratio {low:g} to {high:g}, value {config.value_clip}",
        "critic": config.critic or "a value head on the policy's trunk, starting from zero",
        "reference": config.ref or "the policy at step 0; their KL must be 0 there",
        "memory": fits,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": config.seed,
    }


def prompt_room(config: PPOConfig, folders: Sequence[Path]) -> int:
    """Most tokens of a prompt: all these models read it with the whole response."""
    models = [pretrained.read_config(folder) for folder in folders]
    most = min(model.longest_row for model in models)
    if config.max_new_tokens >= most:
        raise UserError("--max-new-tokens", f"{config.max_new_tokens} fill the model's context",
                        f"use less than {most}")  # fmt: skip
    room = most - config.max_new_tokens
    return min(config.max_prompt_length or room, room)


def check_models(
    config: PPOConfig, lms: Sequence[Path], critics: Sequence[Path], scorers: Sequence[Path],
    tokenizer: Tokenizer,
) -> None:  # fmt: skip
    """What can be known of the models before any weight is read.

    Args:
        lms: policy and reference.
        critics, scorers: reward models, none or one of each.
    """
    for flag, name, folders in (
        ("--ref", config.ref, lms[1:]),
        ("--critic", config.critic, critics),
    ):
        for folder in folders:
            if name and load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
                raise UserError(f"{flag} {name}", "has another tokenizer than the policy",
                                "give a model that reads the same ids")  # fmt: skip
    for lm in lms:
        pretrained.describe(lm)
    for reward_model in (*critics, *scorers):
        pretrained.describe(reward_model, reward=True)


def load_policy(config: PPOConfig, folder: Path, device: str, dtype: torch.dtype) -> ValueHeadModel:
    """The model to align with its critic."""
    lm = pretrained.load_pretrained(folder, dtype, device)
    if config.critic is None:
        return ValueHeadModel(lm)
    critic = pretrained.load_reward_model(config.critic, dtype, device)
    return critic_from_reward_model(lm, critic, config.train_critic)


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        PPOConfig, argv, "minirlhf ppo", "Align a language model with PPO against a reward.",
        presets.PPO,
    )  # fmt: skip
    device, dtype = optim.choose_device(config.device), optim.choose_dtype(config.dtype)
    # On a GPU torch refuses the cumsum of sampling, and cuBLAS without a workspace setting.
    torch.use_deterministic_algorithms(device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    folder = pretrained.resolve(config.model)
    ref_folder = folder if config.ref is None else pretrained.resolve(config.ref)
    tokenizer = load_tokenizer(folder)
    critic = [] if config.critic is None else [pretrained.resolve(config.critic)]
    source = locate(config.reward)
    scorer = [source] if source.is_dir() else []
    check_models(config, (folder, ref_folder), critic, scorer, tokenizer)
    room = prompt_room(config, (folder, ref_folder, *critic, *scorer))
    prompts, report = load_prompts(config.data, tokenizer, room, config.overlong)
    print(report)
    inputs = [config.data, str(source), str(ref_folder)]
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(config.out, "ppo", settings.as_dict(config), config.resume, inputs)
    longest = max(len(prompt.ids) for prompt in prompts)
    models, held = memory.ppo_models(config), process_bytes(device)
    plan = memory.ppo_plan(config, models, longest, dtype, held)
    print(plan)
    fits = memory.verdict(plan, free_memory(device))
    columns = {name for prompt in prompts for name in prompt.columns}
    reward = load_reward(
        config.reward, tokenizer, dtype, device, config.micro_batch_tokens, columns
    )
    policy = load_policy(config, folder, device, dtype)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, config.seed)
    ref = None
    if config.ref is not None or not config.lora_rank:
        ref = pretrained.load_pretrained(ref_folder, dtype, device)
        ref.requires_grad_(False)
    optimizer = optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon,
        head=policy.v_head, head_lr_scale=1.0 if config.critic else config.value_head_lr_scale,
    )  # fmt: skip
    state = TrainState(policy, optimizer, kl_coef=config.kl_coef)
    with r:
        r.facts(run_facts(config, len(prompts), policy, fits, device, dtype))
        r.restore(state)
        if config.sample_every and state.step == 0:
            show_samples(r, state, sample_table(state, prompts, reward, tokenizer, config))
        for step in r.bar(ppo(state, prompts, reward, ref, tokenizer, config), state, config.steps):
            last = step.number == config.steps
            with r.report(state, step):
                alarms, state.health = health.check(state.health, step.number, step.metrics)
                for alarm in alarms:
                    r.say(str(alarm))
                r.write_samples(state, step.samples)
                if last or step.number % config.log_every == 0:
                    names = "lr", "episode", "objective/kl_coef", "epoch", "skipped_updates"
                    r.log(state, {name: step.metrics[name] for name in names}, step.clock, (
                        "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
                        "policy/clipfrac_avg", "response_length"))  # fmt: skip
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
