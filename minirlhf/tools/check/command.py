"""Data and model before a run: `minirlhf check FILE [FILE …] --model FOLDER`.

What a recipe refuses before it loads weights is refused here: a fault in a file or a row, in the
model's headers and shapes, in its tokenizer. Of a run's settings only those of the data are known.
What is printed is for the eye: how rows are read, how long they are, what stands there twice. A
line that begins with "warning:" names what a recipe accepts and few people mean.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from minirlhf import console
from minirlhf.batches.preferences import unread_end
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import OK, UserError, run
from minirlhf.files import atomic, folders
from minirlhf.files.sieve import RowPolicy
from minirlhf.models import pretrained
from minirlhf.models.heads import reads_whole
from minirlhf.models.stored_heads import VALUE_HEAD
from minirlhf.run import flags
from minirlhf.setup.common import check_base
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy_data import prompt_room
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.tools.check.facts import Model, facts_of, read_text, read_tokens
from minirlhf.tools.check.rows import KINDS, read_file, recipe_of
from minirlhf.tools.check.words import show, show_model
from minirlhf.tools.settings import CheckConfig

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig,
           "grpo": GRPOConfig, "distill": DistillConfig}


def check_model(config: CheckConfig, recipes: Iterable[str]) -> Model:
    """A folder's headers, shapes and tokenizer.

    Raises:
        UserError: why these recipes would refuse the folder.
    """
    folder = folders.resolve(config.model, base=config.base)  # with weights: headers are read
    check_base(config, folder)
    shape = pretrained.read_config(folder)
    is_reward = pretrained.stored_head(folder) not in (None, VALUE_HEAD)
    module = pretrained.without_weights(folder, is_reward)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if is_reward and (others := set(recipes) - {"reward"}):
        what = f"is a reward model, but {min(others)} trains a language model"
        raise UserError(folder, what, "give the language model as --model")
    tokenizer = load_tokenizer(folder)
    whole = reads_whole(shape.source, folder / "config.json")
    unread = unread_end(shape, tokenizer)
    return Model(folder, shape, tokenizer, is_reward, parameters, unread, whole)


def limits(config: CheckConfig, recipe: str, model: Model | None) -> tuple[int | None, str]:
    """(tokens of the longest row or, of prompts alone, prompt; what happens to longer ones)."""
    defaults = CONFIGS[recipe]
    overlong = config.overlong or defaults.overlong
    if recipe not in KINDS["prompts"].recipes:
        return config.max_length or defaults.max_length, overlong
    if overlong == "truncate_response":
        raise UserError("--overlong", f"is {overlong}", "prompts have no response to truncate")
    if model is None:
        return config.max_length, overlong
    ppo = PPOConfig(max_new_tokens=config.max_new_tokens, max_prompt_length=config.max_length)
    return prompt_room(ppo, [folders.resolve(config.model, False, config.base)]), overlong


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(CheckConfig, argv, "minirlhf check")
    auto = config.recipe == "auto"
    policy = RowPolicy.of(config)
    recipes = [recipe_of(path, policy) if auto else config.recipe for path in config.data]
    model = None if config.model is None else check_model(config, recipes)
    for recipe in recipes:
        limits(config, recipe, model)  # refuses before all rows are read
    if model is not None:
        print(show_model(model), end="\n\n")
    every, first, problems = [], None, []
    for path, recipe in zip(config.data, recipes, strict=True):
        file = read_file(path, recipe, policy, config.train_on)
        if model is None and not file.is_ids:
            read = read_text(file, policy)
        else:
            read = read_tokens(file, model, *limits(config, recipe, model), policy)
        every.append(facts_of(file, read, first))
        print(show(every[-1], read.report), end="\n\n")
        console.check()
        first = first or file
        problems += [read.problem] if read.problem else []
    if problems:
        raise problems[0]
    if config.json is not None:
        path = Path(config.json)
        path.touch(exist_ok=False)
        try:
            atomic.write_text(path, json.dumps({"files": every}, indent=1, allow_nan=False))
        except OSError:
            atomic.discard(path)
            raise
    kept, rows = (sum(facts[name] for facts in every) for name in ("kept", "rows"))
    print(f"ok: {kept:,} of {rows:,} rows can be used")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
