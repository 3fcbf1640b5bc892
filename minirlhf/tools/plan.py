"""What a run would hold in memory, without running it: `minirlhf plan ppo --model FOLDER …`.

The flags are the recipe's own. --model is enough, and of its folder config.json: rows are then as
long as they may be. With --data, which needs the tokenizer too, the recipe's own functions read
them, so what a run would refuse of data is refused here.
"""

import sys
from dataclasses import field, fields, make_dataclass

import torch

from minirlhf.batches.preferences import reads_before_eos
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import OK, UserError, run
from minirlhf.files import folders
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.run import flags
from minirlhf.run.machine import (
    choose_device,
    choose_dtype,
    free_memory,
    make_deterministic,
    process_bytes,
)
from minirlhf.run.settings import nearest
from minirlhf.setup import memory, memory_plans
from minirlhf.setup import reward as setup_reward
from minirlhf.setup import sft as setup_sft
from minirlhf.setup.common import named_files
from minirlhf.setup.memory import Plan
from minirlhf.setup.ppo import look, prompt_room, read_texts
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig


def plan_ppo(config: PPOConfig, dtype: torch.dtype, device: str) -> Plan:
    if config.data:
        data = look(config, weights=False).data
        longest, longest_text = data.longest_prompt, data.longest_text
    else:
        longest, longest_text = lengths_without_data(config)
    models, held = memory_plans.ppo_models(config), process_bytes(device)
    return memory_plans.ppo_plan(config, models, longest, dtype, held, longest_text)


def lengths_without_data(config: PPOConfig) -> tuple[int, int]:
    """Tokens of the longest prompt that may be, and of the longest text that is mixed in."""
    names = filter(None, (config.model, config.ref, config.critic))
    places = [folders.resolve(name, weights=False) for name in names]
    room = prompt_room(config, places)
    if config.max_prompt_length is None:
        raise UserError("--data", "not given, so prompts may be of any length",
                        "give it, or --max-prompt-length")
    if config.ptx_data is None:
        return room, 0
    most = pretrained.read_config(places[0]).longest_row
    texts, _ = read_texts(config, load_tokenizer(places[0]), most)
    return room, max(len(text.ids) for text in texts)


def plan_reward(config: RewardConfig, dtype: torch.dtype, device: str) -> Plan:
    folder = folders.resolve(config.model, weights=False)
    model = pretrained.read_config(folder)
    if not config.data:
        longest = min(config.max_length, model.longest_row)
        return memory_plans.reward_plan(config, model, longest, dtype, process_bytes(device))
    tokenizer = load_tokenizer(folder)
    before_eos = reads_before_eos(model, tokenizer)
    sets = {
        prefix: setup_reward.load(config, file, tokenizer, model, before_eos)[0]
        for prefix, file in files_of(config).items()
    }
    examples = sets.pop("")
    return setup_reward.memory_plan(config, model, examples, sets, dtype, process_bytes(device))


def plan_sft(config: SFTConfig, dtype: torch.dtype, device: str) -> Plan:
    if not config.data:
        model = sft_model(config)
        longest = min(config.max_length, model.longest_row)
        return memory_plans.sft_plan(config, model, longest, dtype, process_bytes(device))
    tokenizer = setup_sft.choose_tokenizer(config)
    model = setup_sft.choose_config(config, tokenizer)
    sets = {
        prefix: setup_sft.load(config, file, tokenizer, model.longest_row)[0]
        for prefix, file in files_of(config).items()
    }
    texts = sets.pop("")
    return setup_sft.memory_plan(config, model, texts, sets, dtype, process_bytes(device))


def sft_model(config: SFTConfig) -> ModelConfig:
    """The architecture without data; a tokenizer that a run would train on them is taken to be as
    large as it may be."""
    if config.model is not None:
        return pretrained.read_config(folders.resolve(config.model, weights=False))
    if config.tokenizer is not None:
        return setup_sft.choose_config(config, setup_sft.choose_tokenizer(config))
    return setup_sft.new_config(config.init_config, config.vocab_size)


def files_of(config: RewardConfig | SFTConfig) -> dict[str, str]:
    """Metric prefix -> file of data; "" for training."""
    return {"": config.data, **named_files(config.eval_data)}


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
    ]
    return make_dataclass(config_class.__name__, rules, bases=(config_class,), frozen=True)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    recipe = words[0] if words else "--help"
    if recipe in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(OK)
    if recipe not in RECIPES:
        kind = "unknown flag" if recipe.startswith("-") else "no such recipe"
        advice = nearest(recipe, ("--help",) if recipe.startswith("-") else RECIPES)
        raise UserError(recipe, kind, f"{advice}; give a recipe first: {', '.join(RECIPES)}")
    config_class, plan_of = RECIPES[recipe]
    config = flags.parse(
        without_files(config_class), words[1:], f"minirlhf plan {recipe}"
    )
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    make_deterministic(device)  # as a run does: it imports 70 MB
    plan = plan_of(config, dtype, device)
    print(plan)
    print(memory.verdict(plan, free_memory(device)))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
