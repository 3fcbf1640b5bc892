"""What a GRPO run looks at, refuses and tells before it costs anything, and the policy it loads."""

from dataclasses import replace
from functools import cache, partial
from math import ceil

import torch

from minirlhf.batches.rollouts import measure_lm
from minirlhf.models import parallel, pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.transformer import CausalLM
from minirlhf.run import distributed, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.dry_run import DryRun
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_dtype, make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy import (
    PolicyRun,
    Start,
    check_sampler,
    load_rewards,
    look,
    offload_frozen,
    own_frozen,
)
from minirlhf.setup.roles import load_reference, load_trained, trunk_facts


def run_facts(config: GRPOConfig, prompts: int, policy: CausalLM) -> dict[str, object]:
    """What is about to happen, before it costs anything."""
    rows, G = config.rollout_rows, config.samples_per_prompt
    per_step = ceil(rows / config.mini_batches)
    accumulated = ceil(per_step / config.micro_batch_size)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    again = f", drawn again up to {config.resample} times where scores agree"
    reference = config.ref or "the policy at step 0; their KL must be 0 there"
    return {
        "prompts": prompts,
        "epochs over prompts": f"{config.steps * config.batch_size / prompts:.2f}",
        "rows in a forward pass": f"at most {config.micro_batch_size}, "
        f"{config.micro_batch_tokens:,} tokens",
        "rows in an optimizer step": f"about {per_step}, {accumulated} or more forward passes",
        "rows in a rollout": f"{rows}: {config.batch_size} prompts, {G} responses to each"
        + (again if config.resample else ""),
        "optimisation": f"{config.epochs} epochs of {config.mini_batches} mini-batches a rollout",
        "steps": config.steps,
        "trainable parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "learning rate": f"{config.learning_rate:g}, {config.schedule}, "
        f"{config.warmup_steps} warm-up steps",
        "advantage": config.advantage,
        "loss": f"{config.policy_loss}, ratio {low:g} to {high:g}, mean by {config.loss_mean}"
        + (", of responses that were not cut" if config.mask_truncated else ""),
        "kl_coef": f"{config.kl_coef:g}, {config.kl_estimator} in the {config.kl_in}"
        if config.kl_coef else "0",
        "reference": reference if config.refers else "none: kl_coef is 0",
    }


def load_run(config: GRPOConfig) -> PolicyRun:
    """Refuses all that can be refused, the cheapest first, then loads the models."""
    device, dtype = distributed.start(config), choose_dtype(config.dtype)
    check_sampler(config, device)
    start = look(config, refers=config.refers)
    tokenizer, data = start.tokenizer, start.data
    # Refused here, before anything is loaded; written to only once all is.
    r = (DryRun if config.dry_run else Run)(config, "grpo", start.inputs)
    if config.dry_run:
        config, tokenizer, data = longest.of_prompts(r, config, tokenizer, data)
        config = replace(config, mask_truncated=False)  # in a dry run the limit cuts all responses
    make_deterministic(device)
    of_machine = announce_memory(config, start, dtype, device)
    loaded = cache(partial(load_trained, config, start.folder, dtype, device))
    rewards = load_rewards(config, r, start, loaded, tokenizer, data, dtype, device)
    policy = loaded()
    policy.model.checkpointing = config.gradient_checkpointing
    ref, frozen = None, rewards.models
    if config.refers:
        ref = load_reference(config, policy, start.folder, start.ref_folder, dtype, device)
        frozen = [*frozen, (ref, start.ref_folder)]
    offload_frozen(config, policy, frozen)
    if config.compile:
        compile_blocks(policy, *(model for model, _ in frozen))
    parallel.wrap(policy, config.parallel, offload=config.offload_params)
    for model, _ in frozen:
        parallel.wrap_frozen(model, config.parallel, config.offload_params)
    optimizer = optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    facts = run_facts(config, len(data.prompts), policy) | of_machine | {"seed": config.seed}
    measure = partial(measure_lm, policy, ref, temperature=config.temperature)
    return PolicyRun(
        config, r, TrainState(policy, optimizer), data.prompts, data.sets, tokenizer, data.reports,
        facts | rewards.facts, config.steps, policy, rewards.source, ref, measure,
    )


def announce_memory(
    config: GRPOConfig, start: Start, dtype: torch.dtype, device: str
) -> dict[str, str]:
    """What the run tells of its machine; errors as `memory.announce`."""
    frozen = [pretrained.read_config(folder) for folder in own_frozen(config, start)]
    policy = pretrained.read_config(start.folder)
    estimate = memory.of_policy("grpo", config, policy, frozen, start.data.longest_prompt, dtype)
    shared = trunk_facts(config, start.folder, start.ref_folder, start.scorers)
    return shared | memory.announce(config, estimate, (*start.lms, *start.scorers), dtype, device)
