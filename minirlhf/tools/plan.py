"""What a run would hold in memory, without running it: `minirlhf plan ppo --model FOLDER …`.

The flags are the recipe's own. --model is enough, and of its folder config.json; with --data, which
needs the tokenizer too, rows are as long as the data's, otherwise as long as they may be.
"""

import sys
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass
from typing import NamedTuple

import torch

from minirlhf import config as settings
from minirlhf import memory, presets, pretrained, reward_sources
from minirlhf.data import load_prompts, load_texts
from minirlhf.errors import OK, UserError, run
from minirlhf.hf_config import config_from_hf
from minirlhf.machine import (
    choose_device,
    choose_dtype,
    free_memory,
    make_deterministic,
    process_bytes,
)
from minirlhf.memory import Plan
from minirlhf.ppo_config import PPOConfig
from minirlhf.ppo_start import prompt_room, read_texts
from minirlhf.preferences import count_texts, count_tokens, row_lengths
from minirlhf.rankings import load_preferences
from minirlhf.recipes.reward import RewardConfig
from minirlhf.recipes.sft import SFTConfig, with_target
from minirlhf.recipes.sft import count_tokens as count_text_tokens
from minirlhf.rows import read_json
from minirlhf.run import named_files
from minirlhf.sieve import RowPolicy
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.transformer import ModelConfig


def plan_ppo(config: PPOConfig, dtype: torch.dtype, device: str) -> Plan:
    models = memory.ppo_models(config)
    folder = pretrained.resolve(config.model, weights=False)
    names = filter(None, (config.ref, config.critic))
    others = [pretrained.resolve(name, weights=False) for name in names]
    tokenizer = load_tokenizer(folder) if config.data or config.ptx_data else None
    for spec in map(reward_sources.parse, config.reward):
        if spec.kind == "model" and tokenizer is not None:
            place = pretrained.resolve(spec.place, weights=False)
            others += [] if reward_sources.reencoded(place, tokenizer) else [place]
    room, longest_text = prompt_room(config, (folder, *others)), 0
    if config.ptx_data:
        texts, _ = read_texts(config, tokenizer, pretrained.read_config(folder).longest_row)
        longest_text = max(len(text.ids) for text in texts)
    if config.data:
        files, longest = (config.data, *named_files(config.eval_data, "/").values()), 0
        for file in files:
            prompts, report = load_prompts(
                file, tokenizer, room, config.overlong, policy=RowPolicy.of(config)
            )
            print(report)
            longest = max(longest, *(len(prompt.ids) for prompt in prompts))
        room = longest
    elif config.max_prompt_length is None:
        raise UserError("--data", "not given, so prompts may be of any length",
                        "give it, or --max-prompt-length")  # fmt: skip
    held = process_bytes(device)
    return memory.ppo_plan(config, models, room, dtype, held, longest_text)


class Rows(NamedTuple):
    """Data files in a few numbers."""

    longest: int  # tokens, of all files
    held_out: int  # rows of the largest file of --eval-data


def measure(
    config: RewardConfig | SFTConfig, most: int, lengths: Callable[[str], list[int]] | None
) -> Rows:
    """Lengths of --data and --eval-data; those that max_length allows where none can be told.

    Args:
        most: tokens that the model reads.
        lengths: file -> tokens of each of its rows; None without a tokenizer.
    """
    if not config.data or lengths is None:
        return Rows(min(config.max_length, most), 0)
    train, *held_out = (lengths(f) for f in (config.data, *named_files(config.eval_data).values()))
    longest = max(max(found) for found in (train, *held_out))
    return Rows(longest, max(map(len, held_out), default=0))


def plan_reward(config: RewardConfig, dtype: torch.dtype, device: str) -> Plan:
    folder = pretrained.resolve(config.model, weights=False)
    model, texts = pretrained.read_config(folder), [2]
    tokens: list[list[int]] = []  # of each example, file by file

    def lengths(path: str) -> list[int]:
        tokenizer = load_tokenizer(folder)
        examples, report = load_preferences(
            path, tokenizer, config.max_length, config.overlong, policy=RowPolicy.of(config)
        )
        print(report)
        texts.append(int(count_texts(examples).max()))
        tokens.append(list(map(count_tokens, examples)))
        return row_lengths(examples).tolist()

    longest, held_out = measure(config, model.longest_row, lengths)
    if config.normalize == "train" and tokens:  # which are scored, too
        held_out = max(held_out, len(tokens[0]))
    heaviest = memory.heaviest(tokens[0], config.batch_size) if tokens else None
    return memory.reward_plan(
        config, model, longest, dtype, process_bytes(device), held_out, max(texts), heaviest
    )


def sft_model(config: SFTConfig) -> tuple[ModelConfig, Tokenizer | None]:
    """The architecture, and the tokenizer unless one would be trained: it may then be as large as
    --vocab-size allows."""
    if config.model is not None:
        folder = pretrained.resolve(config.model, weights=False)
        return pretrained.read_config(folder), load_tokenizer(folder) if config.data else None
    tokenizer = (
        load_tokenizer(pretrained.resolve(config.tokenizer, weights=False))
        if config.tokenizer
        else None
    )
    values = read_json(config.init_config)
    if isinstance(values, dict):
        if "num_attention_heads" in values:
            values = {"num_key_value_heads": values["num_attention_heads"], **values}
        size = tokenizer.vocab_size if tokenizer else config.vocab_size
        values = {"vocab_size": size, **values}
    return config_from_hf(values, config.init_config), tokenizer


def plan_sft(config: SFTConfig, dtype: torch.dtype, device: str) -> Plan:
    model, tokenizer = sft_model(config)
    tokens: list[list[int]] = []  # of each text, file by file

    def lengths(path: str) -> list[int]:
        texts, report = load_texts(
            path, tokenizer, config.max_length, config.overlong,
            policy=RowPolicy.of(config), finish=with_target,
        )  # fmt: skip
        print(report)
        tokens.append(count_text_tokens(texts)[0].tolist())
        return tokens[-1]

    longest, held_out = measure(config, model.longest_row, lengths if tokenizer else None)
    heaviest = memory.heaviest(tokens[0], config.batch_size) if tokens else None
    return memory.sft_plan(
        config, model, longest, dtype, process_bytes(device), held_out, heaviest
    )


RECIPES = {
    "ppo": (PPOConfig, plan_ppo),
    "reward": (RewardConfig, plan_reward),
    "sft": (SFTConfig, plan_sft),
}
USAGE = """usage: minirlhf plan RECIPE --model FOLDER [the recipe's settings]

Prints what a run would hold in memory, a line a part; leaves with 4 where it does not fit.
RECIPE is ppo, reward or sft; minirlhf plan RECIPE --help lists the settings."""


def without_files(config_class: type) -> type:
    """The same settings, of which only the model has to be given."""
    rules = [
        (f.name, f.type, field(default=f.default, kw_only=True,
                               metadata={**f.metadata, "required": False}))
        for f in fields(config_class)
        if f.metadata["required"] and f.name != "model"
    ]  # fmt: skip
    return make_dataclass(config_class.__name__, rules, bases=(config_class,), frozen=True)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    recipe = words[0] if words else "--help"
    if recipe in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(OK)
    if recipe not in RECIPES:
        kind = "unknown flag" if recipe.startswith("-") else "no such recipe"
        advice = settings.nearest(recipe, ("--help",) if recipe.startswith("-") else RECIPES)
        raise UserError(recipe, kind, f"{advice}; give a recipe first: {', '.join(RECIPES)}")
    config_class, plan_of = RECIPES[recipe]
    config = settings.parse(
        without_files(config_class), words[1:], f"minirlhf plan {recipe}",
        "Print what a run would hold in memory.", presets.PPO if recipe == "ppo" else {},
    )  # fmt: skip
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    make_deterministic(device)  # as a run does: it imports 70 MB
    plan = plan_of(config, dtype, device)
    print(plan)
    print(memory.verdict(plan, free_memory(device)))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
