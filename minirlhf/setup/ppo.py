"""What a PPO run looks at, refuses and tells before it costs anything, and the policy it loads."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf.batches.demonstrations import with_target
from minirlhf.data.examples import Prompt, Text, load_prompts, load_texts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.errors import UserError
from minirlhf.files.folders import resolve
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models import pretrained
from minirlhf.models.heads import ValueHeadModel, critic_from_reward_model
from minirlhf.models.lora import add_lora
from minirlhf.rewards import parse
from minirlhf.rewards.parse import Spec
from minirlhf.setup.common import named_files
from minirlhf.setup.ppo_settings import PPOConfig

# ------------------------------------------------------------------------------------------ a run


def held_out(prompts: list[Prompt], most: int | None, file: str) -> list[Prompt]:
    """The first prompts of a held-out file.

    Raises:
        UserError: there are fewer than 2.
    """
    if len(prompts) < 2:
        what = f"{len(prompts)} prompt to evaluate on"
        raise UserError(file, what, "give 2 or more: a standard error needs them")
    return prompts[:most]


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
    tokenizer: Tokenizer, weights: bool,
) -> None:
    """What can be known of the models before any weight is read.

    Args:
        lms: policy and reference.
        critics, scorers: reward models, none or one of the first.
        weights: as in `look`.
    """
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
    for lm in lms if weights else ():
        pretrained.describe(lm)
    words = [pretrained.read_config(lm).vocab_size for lm in lms]
    if config.kl_estimator == "full" and len(set(words)) > 1:
        what = f"has {words[1]:,} tokens, the policy {words[0]:,}"
        raise UserError(f"--ref {config.ref}", what, "use another --kl-estimator than full")
    for reward_model in (*critics, *scorers) if weights else ():
        pretrained.describe(reward_model, reward=True)


class Data(NamedTuple):
    """What a run reads beside its models."""

    prompts: list[Prompt]
    sets: dict[str, list[Prompt]]  # metric prefix -> held-out prompts
    texts: list[Text]  # mixed into the updates; none without ptx_data
    files: dict[str, list[str]]  # setting -> files that it names
    reports: list[Report]

    @property
    def every_prompt(self) -> list[Prompt]:
        """Of training and evaluation."""
        return [prompt for prompts in (self.prompts, *self.sets.values()) for prompt in prompts]

    @property
    def longest_prompt(self) -> int:
        """Tokens, over training and evaluation."""
        return max(len(prompt.ids) for prompt in self.every_prompt)

    @property
    def columns(self) -> dict[str, set[str]]:
        """file:line of the first prompt of each file -> columns that any of its prompts has."""
        return {
            prompts[0].where: {name for prompt in prompts for name in prompt.columns}
            for prompts in (self.prompts, *self.sets.values())
        }

    @property
    def longest_text(self) -> int:
        """Tokens; 0 without texts."""
        return max((len(text.ids) for text in self.texts), default=0)


def read_data(config: PPOConfig, tokenizer: Tokenizer, room: int, longest_row: int) -> Data:
    """All rows of all files, each file's report printed.

    Args:
        room: most tokens of a prompt.
        longest_row: most tokens of a text.
    """
    policy = RowPolicy.of(config)
    files = {"": config.data, **named_files(config.eval_data, "/")}
    sets, texts, reports = {}, [], []
    for prefix, file in files.items():
        rows, report = load_prompts(file, tokenizer, room, config.overlong, policy=policy)
        print(report)
        sets[prefix] = held_out(rows, config.eval_prompts, file) if prefix else rows
        reports.append(report)
    if config.ptx_data is not None:
        texts, report = read_texts(config, tokenizer, longest_row)
        reports.append(report)
    held_out_files = [file for prefix, file in files.items() if prefix]
    names = {"data": [config.data], "eval_data": held_out_files,
             "ptx_data": [config.ptx_data] if config.ptx_data else []}
    return Data(sets.pop(""), sets, texts, names, reports)


def read_texts(
    config: PPOConfig, tokenizer: Tokenizer, longest_row: int
) -> tuple[list[Text], Report]:
    """Those that are mixed into the updates; the file's report is printed."""
    texts, report = load_texts(
        config.ptx_data, tokenizer, longest_row, config.overlong, policy=RowPolicy.of(config),
        finish=with_target,
    )
    print(report)
    return texts, report


def check_reencoded(config: PPOConfig, scorers: Sequence[Path], data: Data) -> None:
    """Whether reward models that re-encode texts have room for every prompt and its response.

    How many tokens a response has in such a model's vocabulary is not known before it is sampled:
    room is asked for as many as the policy may sample.

    Args:
        scorers: reward models with another tokenizer than the policy's.
    """
    new = config.max_new_tokens
    for folder in scorers:
        tokenizer, most = load_tokenizer(folder), pretrained.read_config(folder).longest_row
        prompts = data.every_prompt
        for prompt in prompts:
            text = prompt.text
            encode = tokenizer.encode if isinstance(text, str) else tokenizer.encode_chat
            try:
                ids = encode(text)
            except UserError as error:
                raise UserError(prompt.where, str(error)) from None
            if len(ids) + new > most:
                what = f"{len(ids)} tokens once --reward {folder} re-encodes them, and {new} new"
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


def look(config: PPOConfig, weights: bool = True) -> Start:
    """What a run starts from; refuses all that can be refused before anything is loaded, the
    cheapest first.

    Args:
        weights: False for a plan, which asks for no weights, so that their headers are not read.
    """
    folder = resolve(config.model, weights)
    ref_folder = folder if config.ref is None else resolve(config.ref, weights)
    tokenizer = load_tokenizer(folder)
    tokenizer.check_stops(config.stop)
    critic = [] if config.critic is None else [resolve(config.critic, weights)]
    specs = [parse.parse_source(source) for source in config.reward]
    places = [parse.locate(spec, weights) for spec in specs]
    scorers = [place for place in places if place is not None and place.is_dir()]
    check_models(config, (folder, ref_folder), critic, scorers, tokenizer, weights)
    others = [place for place in scorers if parse.reencoded(place, tokenizer)]
    same = [place for place in scorers if place not in others]
    room = prompt_room(config, (folder, ref_folder, *critic, *same))
    data = read_data(config, tokenizer, room, pretrained.read_config(folder).longest_row)
    check_reencoded(config, others, data)
    inputs = {**data.files, "reward": [place for place in places if place], "ref": [ref_folder],
              "model": tokenizer_files(folder)}
    return Start(folder, ref_folder, critic, scorers, specs, tokenizer, data, inputs)


def load_policy(config: PPOConfig, folder: Path, device: str, dtype: torch.dtype) -> ValueHeadModel:
    """The model to align with its critic, and with adapters if they are asked for."""
    lm = pretrained.load_pretrained(folder, dtype, device)
    if config.critic is None:
        policy = ValueHeadModel(lm)
    else:
        critic = pretrained.load_reward_model(config.critic, dtype, device)
        policy = critic_from_reward_model(lm, critic, config.train_critic)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, config.seed)
        policy.v_head.requires_grad_(config.critic is None or config.train_critic)
    for trunk in filter(None, (policy.lm.model, policy.critic)):
        trunk.checkpointing = config.gradient_checkpointing
    return policy


def run_facts(
    config: PPOConfig, prompts: int, policy: ValueHeadModel, fits: str, device, dtype
) -> dict:
    """What is about to happen, before it costs anything."""
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    per_step = ceil(config.batch_size / config.mini_batches)
    accumulated = ceil(per_step / config.micro_batch_size)
    adapting = config.kl_target and f"adapting to {config.kl_target:g} nats a response"
    adapts = config.lora_rank and config.train_critic
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
        else "a value head on the policy's trunk, starting from zero",
        "reference": config.ref or "the policy at step 0; their KL must be 0 there",
        "memory": fits,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": config.seed,
    }
