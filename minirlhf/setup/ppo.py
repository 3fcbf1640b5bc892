"""What a PPO run looks at, refuses and tells before it costs anything, and the policy it loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf.batches.demonstrations import TextMix
from minirlhf.batches.rollouts import measure
from minirlhf.data.ending import tail_of
from minirlhf.data.examples import Prompt, encoded_text
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.equations.scores import EndRule, end_rule
from minirlhf.errors import UserError
from minirlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from minirlhf.evaluation.samples import sample_table
from minirlhf.files.folders import resolve
from minirlhf.models import pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.heads import (
    RewardModel,
    ValueHeadModel,
    critic_from_reward_model,
    reads_whole,
)
from minirlhf.models.lora import add_lora, merged_copy
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards import load, parse
from minirlhf.rewards.model import scores_read
from minirlhf.rewards.parse import Spec
from minirlhf.rewards.source import RewardSource
from minirlhf.run import optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.dry_run import DryRun
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_device, choose_dtype, make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.common import write_model
from minirlhf.setup.ppo_data import Data, read_data
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.training import TrainingRun, load_reference


def prompt_room(config: PPOConfig, folders: Sequence[Path]) -> int:
    """Most tokens of a prompt: all these models read it with the whole response."""
    models = [pretrained.read_config(folder) for folder in folders]
    most = min(model.longest_row for model in models)
    if config.max_new_tokens >= most:
        raise UserError("--max-new-tokens", f"{config.max_new_tokens} fill the model's context",
                        f"use less than {most}")
    room = most - config.max_new_tokens
    return min(config.max_prompt_length or room, room)


def check_models(
    config: PPOConfig, lms: Sequence[Path], critics: Sequence[Path], scorers: Sequence[Path],
    tokenizer: Tokenizer,
) -> None:
    """What can be known of the models before any weight is read.

    Args:
        lms: policy and reference.
        critics, scorers: reward models, none or one of the first.
    """
    for lm in lms:
        pretrained.without_weights(lm)
    for flag, name, folders in (
        ("--ref", config.ref, lms[1:]),
        ("--critic", config.critic, critics),
    ):
        for folder in folders:
            if name and load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
                raise UserError(f"{flag} {name}", "has another tokenizer than the policy",
                                "give a model that reads the same ids")
    if not tokenizer.eos_ids and not config.stop:
        what = "names no eos token, so that no response could end"
        do = "set eos_token in tokenizer_config.json, or give --stop"
        raise UserError(tokenizer.folder, what, do)
    words = [pretrained.read_config(lm).vocab_size for lm in lms]
    if config.kl_estimator == "full" and len(set(words)) > 1:
        what = f"has {words[1]:,} tokens, the policy {words[0]:,}"
        raise UserError(f"--ref {config.ref}", what, "use another --kl-estimator than full")
    for reward_model in (*critics, *scorers):
        pretrained.without_weights(reward_model, reward=True)


def check_scorers(
    config: PPOConfig, scorers: Sequence[Path], policy: Tokenizer, data: Data
) -> None:
    """Whether reward models have room for every prompt, its response and what stands behind it.

    How many tokens a response has once it is re-encoded is not known before it is sampled: room is
    asked for as many as the policy may sample, and for the tail of the template where messages are
    read to the end of their text.

    Args:
        policy: its tokenizer; a reward model with another one re-encodes texts.
    """
    for folder in scorers:
        tokenizer, model = load_tokenizer(folder), pretrained.read_config(folder)
        again, most = tokenizer.fingerprint != policy.fingerprint, model.longest_row
        if config.rendered and again:
            what = f"the names of tokens are the policy's, --reward {folder} has another tokenizer"
            raise UserError("--rendered", what, "give prompts as messages, which it renders itself")
        whole = reads_whole(model.source, folder / "config.json")
        chats = any(not isinstance(prompt.text, str) for prompt in data.every_prompt)
        tail = tail_of(tokenizer) if chats and whole else ""
        for prompt in data.every_prompt:
            is_text, new = isinstance(prompt.text, str), config.max_new_tokens
            try:
                ids = encoded_text(tokenizer, prompt) if again else prompt.ids
            except UserError as error:
                raise UserError(prompt.where, str(error)) from None
            behind = 0 if is_text else len(tokenizer.encode_marked(tail))
            if len(ids) + new + behind > most:
                what = f"{len(ids)} tokens as --reward {folder} reads them, {new} new"
                what += f" and {behind} behind these" if behind else ""
                do = f"it reads {most}: lower max_prompt_length or max_new_tokens"
                raise UserError(prompt.where, what, do)


class Start(NamedTuple):
    """All that a run starts from: found, checked and, of its data, read. No weight is loaded."""

    folder: Path  # of the policy
    ref_folder: Path  # the policy's where no --ref is given
    critic: list[Path]  # none or one
    scorers: list[Path]  # the reward models of --reward
    specs: list[Spec]  # of --reward
    tokenizer: Tokenizer
    data: Data
    inputs: dict[str, list]  # setting -> files and folders that it names


def look(config: PPOConfig) -> Start:
    """What a run starts from; refuses all that can be refused before anything is loaded, the
    cheapest first."""
    folder = resolve(config.model)
    ref_folder = folder if config.ref is None else resolve(config.ref)
    tokenizer = load_tokenizer(folder)
    tokenizer.check_stops(config.stop)
    critic = [] if config.critic is None else [resolve(config.critic)]
    specs = [parse.parse_source(source) for source in config.reward]
    places = [parse.locate(spec) for spec in specs]
    scorers = [place for place in places if place is not None and place.is_dir()]
    check_models(config, (folder, ref_folder), critic, scorers, tokenizer)
    same = [place for place in scorers if not load.reencoded(place, tokenizer)]
    room = prompt_room(config, (folder, ref_folder, *critic, *same))
    data = read_data(config, tokenizer, room, pretrained.read_config(folder).longest_row)
    check_scorers(config, scorers, tokenizer, data)
    inputs = {**data.files, "reward": [place for place in places if place], "ref": [ref_folder],
              "model": tokenizer_files(folder)}
    return Start(folder, ref_folder, critic, scorers, specs, tokenizer, data, inputs)


def load_policy(config: PPOConfig, folder: Path, device: str, dtype: torch.dtype) -> ValueHeadModel:
    """The model to align with its critic, and with adapters if they are asked for."""
    lm = pretrained.load_pretrained(folder, dtype, device)
    if config.critic is None:
        policy = ValueHeadModel(lm)
        pretrained.load_value_head(policy, folder)
    else:
        critic = pretrained.load_reward_model(config.critic, dtype, device)
        policy = critic_from_reward_model(lm, critic, config.train_critic)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, config.seed)
        policy.v_head.requires_grad_(config.critic is None or config.train_critic)
    for trunk in filter(None, (policy.lm.model, policy.critic)):
        trunk.checkpointing = config.gradient_checkpointing
    return policy


def run_facts(config: PPOConfig, prompts: int, policy: ValueHeadModel) -> dict[str, object]:
    """What is about to happen, before it costs anything."""
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    per_step = ceil(config.batch_size / config.mini_batches)
    accumulated = ceil(per_step / config.micro_batch_size)
    adapting = config.kl_target and f"adapting to {config.kl_target:g} nats a response"
    adapts = config.lora_rank and config.train_critic
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
        "critic": config.critic + (", its head alone: adapters leave its trunk" if adapts else "")
        if config.critic
        else f"a value head on the policy's trunk, {begins}",
        "reference": config.ref or "the policy at step 0; their KL must be 0 there",
    }


@dataclass
class PPORun(TrainingRun[Prompt]):
    """A run of PPO that is ready to begin; its rows are prompts."""

    reward: RewardSource
    ref: CausalLM | None  # None where the policy has adapters: its base
    mix: TextMix | None
    evaluate: Callable[..., PolicyEvaluation]  # (prompts=, baseline=)
    sample_table: Callable[[], list[dict]]
    export_best: Callable[[], None]


def load_run(config: PPOConfig) -> PPORun:
    """Refuses all that can be refused, the cheapest first, then loads the models."""
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    start = look(config)
    tokenizer, data = start.tokenizer, start.data
    # Refused here, before anything is loaded; written to only once all is.
    r = (DryRun if config.dry_run else Run)(config, "ppo", start.inputs)
    if config.dry_run:
        config, tokenizer, data = longest.of_ppo(r, config, tokenizer, data)
    make_deterministic(device)
    of_machine = announce_memory(config, start, dtype, device)
    reward_models: list[tuple[RewardModel, Path]] = []
    reward = load.load_reward(
        config, tokenizer, dtype, device, config.micro_batch_tokens, data.columns,
        r.folder / "rewards.jsonl", reward_models, r.sums,
    )
    r.inputs["reward"] += r.sums.keys() - set(map(str, r.inputs["reward"]))
    policy = load_policy(config, start.folder, device, dtype)
    ref = load_reference(config, start.ref_folder, device, dtype)
    frozen = reward_models + ([] if ref is None else [(ref, start.ref_folder)])
    if config.offload_frozen:
        for model, folder in frozen:
            pretrained.offload(model, folder)
    if config.compile:
        compile_blocks(policy, *(model for model, _ in frozen))
    state = TrainState(policy, ppo_optimizer(policy, config), kl_coef=config.kl_coef)
    sizes = config.ptx_batch_size, config.micro_batch_tokens
    mix = TextMix(data.texts, config.ptx_coef, *sizes, config.seed) if data.texts else None
    # no more rows than in a training step, so that no evaluation takes more memory than one
    abreast = min(config.rollout_batch_size, config.batch_size)
    evaluate = partial(
        evaluate_policy, policy.lm, reward=reward, tokenizer=tokenizer,
        sampling=sampling_of(config), seed=config.seed, rows_at_once=abreast,
        measure=partial(measure, policy, ref, temperature=config.temperature),
        micro_batch_size=config.micro_batch_size, micro_batch_tokens=config.micro_batch_tokens,
    )
    table = partial(
        sample_table, state, data.prompts, reward, tokenizer, sampling_of(config),
        config.sample_prompts, abreast, config.seed,
    )

    def export_best() -> None:
        lm = merged_copy(policy.lm) if config.lora_rank else policy.lm
        r.export(lambda target: write_model(lm, tokenizer, target), "best")

    facts = run_facts(config, len(data.prompts), policy) | of_machine | {"seed": config.seed}
    facts |= load.facts(start.specs, tokenizer, [prompt.text for prompt in data.every_prompt])
    for model, place in reward_models:
        key = "scores read" if len(reward_models) == 1 else f"scores read by {place.name}"
        facts[key] = scores_read(model, load_tokenizer(place))
    return PPORun(config, r, state, data.prompts, data.sets, tokenizer, data.reports, facts,
                  config.steps, reward, ref, mix, evaluate, table, export_best)


def announce_memory(
    config: PPOConfig, start: Start, dtype: torch.dtype, device: str
) -> dict[str, str]:
    """What the run tells of its machine; errors as `memory.announce`."""
    read, data = pretrained.read_config, start.data
    own = config.ref is None and config.lora_rank  # the policy is its own reference
    frozen = [read(folder) for folder in (*start.scorers, *([] if own else [start.ref_folder]))]
    critic = read(start.critic[0]) if start.critic else None
    estimate = memory.of_ppo(config, read(start.folder), critic, frozen, data.longest_prompt,
                             data.longest_text, dtype)
    folders = start.folder, start.ref_folder, *start.critic, *start.scorers
    return memory.announce(estimate, folders, dtype, device)


def sampling_of(config: PPOConfig) -> Sampling:
    """How responses are drawn."""
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p,
        stop_strings=config.stop, min_new_tokens=config.min_new_tokens,
    )


def rule_for_truncated(config: PPOConfig) -> EndRule:
    """What becomes of the score of a response that the length limit ended."""
    return end_rule(config.missing_eos, config.missing_eos_penalty, config.max_new_tokens,
                    config.missing_eos_buffer)


def ppo_optimizer(policy: ValueHeadModel, config: PPOConfig) -> torch.optim.AdamW:
    """AdamW, with the critic's own rate: a head that starts from zero learns ten times as fast."""
    if config.critic_learning_rate is not None:
        scale = config.critic_learning_rate / config.learning_rate
    else:
        scale = 1.0 if config.critic else 10.0
    return optim.make_optimizer(
        policy, config.learning_rate, config.weight_decay, eps=config.adam_epsilon,
        critic=policy.value_parameters(), critic_lr_scale=scale,
    )
