"""What a PPO run looks at, refuses and tells before it costs anything, and the policy it loads."""

from dataclasses import dataclass
from functools import cache, partial
from math import ceil

import torch

from minirlhf.batches.demonstrations import TextMix, with_target
from minirlhf.batches.rollouts import measure
from minirlhf.data.examples import load_texts
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from minirlhf.models import parallel, pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.heads import ValueHeadModel, critic_from_reward_model
from minirlhf.models.lora import has_lora
from minirlhf.run import distributed, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.display import Display
from minirlhf.run.dry_run import DryRun
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_dtype, make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.policy import (
    PolicyRun,
    Start,
    check_sampler,
    load_rewards,
    look,
    offload_frozen,
    own_frozen,
    own_trunks,
)
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.roles import load_reference, load_scorer, load_trained, trunk_facts


def look_for_ppo(config: PPOConfig) -> Start:
    """As `policy.look`, with what PPO has besides: a critic, texts that are mixed in."""
    start = look(config, config.critic)
    words = [pretrained.read_config(lm).vocab_size for lm in start.lms]
    if config.kl_estimator == "full" and len(set(words)) > 1:
        what = f"has {words[1]:,} tokens, the policy {words[0]:,}"
        raise UserError(f"--ref {config.ref}", what, "use another --kl-estimator than full")
    start.inputs["ptx_data"] = []
    if config.ptx_data is None:
        return start
    texts, report = load_texts(
        config.ptx_data, start.tokenizer, pretrained.read_config(start.folder).longest_row,
        config.overlong, policy=RowPolicy.of(config), finish=with_target,
    )
    Display(config).report(report)
    start.inputs["ptx_data"].append(config.ptx_data)
    reports = [*start.data.reports, report]
    return start._replace(data=start.data._replace(texts=texts, reports=reports))


def load_policy(
    config: PPOConfig, start: Start, dtype: torch.dtype, device: str
) -> ValueHeadModel:
    """The model to align with its critic: a head on its states, or a model of its own.

    Beside a policy with adapters, such a critic is trained by its own or, without, its head alone.
    """
    lm = load_trained(config, start.folder, dtype, device)
    if config.critic is None:
        policy = ValueHeadModel(lm)
        pretrained.load_value_head(policy, start.folder)
    else:
        scorer = load_scorer(config, lm, start.folder, start.critic[0], dtype, device,
                             trainable=config.train_critic)
        policy = critic_from_reward_model(lm, scorer)
        policy.v_head.requires_grad_(config.train_critic)
    for trunk in filter(None, (policy.lm.model, policy.critic)):
        trunk.checkpointing = config.gradient_checkpointing
    return policy


def run_facts(config: PPOConfig, prompts: int, policy: ValueHeadModel) -> dict[str, object]:
    """What is about to happen, before it costs anything."""
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    per_step = ceil(config.batch_size / config.mini_batches)
    accumulated = ceil(per_step / config.micro_batch_size)
    adapting = config.kl_target and f"adapting to {config.kl_target:g} nats a response"
    adapts = policy.critic is not None and has_lora(policy.critic)
    head_alone = config.lora_rank and config.train_critic and not adapts
    begins = "as it stands in its folder" if policy.v_head.weight.any() else "starting from zero"
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
        "critic": config.critic + (", its head alone: it has no adapters" if head_alone else "")
        if config.critic
        else f"a value head on the policy's trunk, {begins}",
        "reference": config.ref or "the policy at step 0; their KL must be 0 there",
    }


@dataclass
class PPORun(PolicyRun):
    """A run of PPO that is ready to begin."""

    mix: TextMix | None


def load_run(config: PPOConfig) -> PPORun:
    """Refuses all that can be refused, the cheapest first, then loads the models."""
    device, dtype = distributed.start(config), choose_dtype(config.dtype)
    check_sampler(config, device)
    start = look_for_ppo(config)
    tokenizer, data = start.tokenizer, start.data
    # Refused here, before anything is loaded; written to only once all is.
    r = (DryRun if config.dry_run else Run)(config, "ppo", start.inputs)
    if config.dry_run:
        config, tokenizer, data = longest.of_ppo(r, config, tokenizer, data)
    make_deterministic(device)
    of_machine = announce_memory(config, start, dtype, device)
    loaded = cache(partial(load_policy, config, start, dtype, device))
    rewards = load_rewards(
        config, r, start, lambda: loaded().lm, tokenizer, data, dtype, device)
    policy = loaded()
    ref = load_reference(config, policy.lm, start.folder, start.ref_folder, dtype, device)
    frozen = [*rewards.models, (ref, start.ref_folder)]
    offload_frozen(config, policy, frozen)
    if config.compile:
        compile_blocks(policy, *(model for model, _ in frozen))
    in_parts = bool(data.texts) or config.critic_warmup_steps > 0
    parallel.wrap(policy, config.parallel, in_parts, config.offload_params)
    for model, _ in frozen:
        parallel.wrap_frozen(model, config.parallel, config.offload_params)
    state = TrainState(policy, ppo_optimizer(policy, config), kl_coef=config.kl_coef)
    sizes = config.ptx_batch_size, config.micro_batch_tokens
    mix = TextMix(data.texts, config.ptx_coef, *sizes, config.seed) if data.texts else None
    facts = run_facts(config, len(data.prompts), policy) | of_machine | {"seed": config.seed}
    return PPORun(
        config, r, state, data.prompts, data.sets, tokenizer, data.reports, facts | rewards.facts,
        config.steps, policy.lm, rewards.source, ref,
        partial(measure, policy, ref, temperature=config.temperature), mix,
    )


def announce_memory(
    config: PPOConfig, start: Start, dtype: torch.dtype, device: str
) -> dict[str, str]:
    """What the run tells of its machine; errors as `memory.announce`."""
    read, data = pretrained.read_config, start.data
    critics = [read(folder) for folder in own_trunks(config, start, start.critic)]
    estimate = memory.of_ppo(
        config, read(start.folder), critics[0] if critics else None,
        [read(folder) for folder in own_frozen(config, start)], data.longest_prompt,
        data.longest_text, dtype, shared_critic=bool(start.critic) and not critics,
    )
    folders = start.folder, start.ref_folder, *start.critic, *start.scorers
    shared = trunk_facts(config, start.folder, start.ref_folder, start.scorers, start.critic)
    return shared | memory.announce(config, estimate, folders, dtype, device)


def ppo_optimizer(policy: ValueHeadModel, config: PPOConfig) -> torch.optim.AdamW:
    """AdamW, with the critic's own rate: a head that starts from zero learns ten times as fast as
    the weights of the policy, which is the rate of adapters."""
    if config.critic_learning_rate is not None:
        scale = config.critic_learning_rate / config.learning_rate
    else:
        scale = 1.0 if config.critic or config.lora_rank else 10.0
    return optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon,
        critic=policy.value_parameters(), critic_lr_scale=scale,
    )
