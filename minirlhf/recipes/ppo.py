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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import (
    health,
    optim,
    plans,
    presets,
    pretrained,
    reward_sources,
    streams,
)
from minirlhf.batching import next_rows
from minirlhf.checkpoint import TrainState
from minirlhf.compiling import compile_blocks
from minirlhf.data import Prompt
from minirlhf.errors import BUG, OK, STOPPED, UserError, run
from minirlhf.evaluation import evaluate_policy, evaluate_sets, keep_best
from minirlhf.heads import RewardModel
from minirlhf.kl import AdaptiveKL, kl_k1
from minirlhf.lora import merge_lora, merged_copy
from minirlhf.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.meters import Step
from minirlhf.metrics import rename_to_trl09
from minirlhf.passes import measure
from minirlhf.ppo_config import PPOConfig
from minirlhf.ppo_report import sample_table, show_samples, summarise
from minirlhf.ppo_start import load_policy, look, run_facts
from minirlhf.ppo_update import ppo_step
from minirlhf.reward_sources import load_reward
from minirlhf.rewards import RewardSource, Scores, as_scores
from minirlhf.rollout import RolloutBuffer, columns_of, replay_rows, sample, with_scores
from minirlhf.run import Run, write_model
from minirlhf.scores import RunningMoments, scale_scores
from minirlhf.texts import TextMix
from minirlhf.tokenizer import Tokenizer
from minirlhf.transformer import CausalLM

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
                full_kl and config.kl_in == "loss")  # fmt: skip
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
            stats, completions, given, scores, buffer, sequence_kl, tokenizer, config
        )
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


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        PPOConfig, argv, "minirlhf ppo", "Align a language model with PPO against a reward.",
        presets.PPO,
    )  # fmt: skip
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder, ref_folder, critic, scorers, specs, tokenizer, data, inputs = look(config)
    prompts, sets, texts = data.prompts, data.sets, data.texts
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(
        config.out, "ppo", settings.as_dict(config), config.resume, inputs, config.of_the_start
    )
    make_deterministic(device)
    models, held = plans.ppo_models(config), process_bytes(device)
    plan = plans.ppo_plan(config, models, data.longest_prompt, dtype, held, data.longest_text)
    fits = plans.announce(plan, (folder, ref_folder, *critic, *scorers), dtype, device)
    frozen: list[tuple[RewardModel, Path]] = []
    reward = load_reward(
        config, tokenizer, dtype, device, config.micro_batch_tokens, data.columns,
        r.folder / "rewards.jsonl", frozen,
    )  # fmt: skip
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
            ppo(state, prompts, reward, ref, tokenizer, config, mix), state, config.steps
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
