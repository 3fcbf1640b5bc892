"""A look at data before anything is spent on it: `minirlhf check FILE [FILE …] --model FOLDER`.

What a recipe refuses before it loads weights is refused here: files, the model's headers and
shapes, its tokenizer, every row; of a run's settings only those of the data are known. The rest is
for the eye: how rows are read, how long they are, what stands there twice. Lines that begin with
"warning:" are worth a thought.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from minirlhf.batches.preferences import reads_before_eos
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import OK, UserError, run
from minirlhf.files import folders
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models import pretrained, stored
from minirlhf.run import flags
from minirlhf.setup.ppo import prompt_room
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.tools.check.facts import (
    length_facts,
    lengths_of,
    list_facts,
    measure_text,
    measure_tokens,
    pair_facts,
)
from minirlhf.tools.check.rows import RECIPES, Model, Raw, read_raw, recipe_of
from minirlhf.tools.check.warn import length_bias, overlap, plain_template, raw_warnings
from minirlhf.tools.check.words import show, show_model
from minirlhf.tools.settings import CheckConfig

# -------------------------------------------------------------------------------------- the inputs


def check_weights(folder: Path) -> tuple[bool, int]:
    """(whether a folder holds a reward model, its parameters), from the headers of its files.

    Raises:
        UserError: a file that is not whole; a tensor that is missing, unknown or mis-shaped.
    """
    is_reward = stored.has_tensor(stored.tensor_files(folder), "score.weight")
    module = pretrained.describe(folder, is_reward)
    return is_reward, sum(parameter.numel() for parameter in module.parameters())


def check_model(name: str, recipes: Iterable[str]) -> Model:
    """A folder's headers, shapes and tokenizer, or why these recipes would refuse it."""
    folder = folders.resolve(name)  # with the weights, whose headers are read
    config = pretrained.read_config(folder)
    is_reward, parameters = check_weights(folder)
    if is_reward and (others := set(recipes) - {"reward"}):
        what = f"is a reward model, but {min(others)} trains a language model"
        raise UserError(folder, what, "give the language model as --model")
    tokenizer = load_tokenizer(folder)
    before_eos = reads_before_eos(config, tokenizer)
    return Model(config, tokenizer, is_reward, parameters, before_eos)


def limits(config: CheckConfig, recipe: str, model: Model | None) -> tuple[int | None, str]:
    """(tokens of the longest row or, for ppo, prompt; what happens to longer ones)."""
    defaults = RECIPES[recipe].config
    overlong = config.overlong or defaults.overlong
    if recipe != "ppo":
        return config.max_length or defaults.max_length, overlong
    if overlong == "truncate_response":
        raise UserError("--overlong", f"is {overlong}", "prompts have no response to cut")
    if model is None:
        return config.max_length, overlong
    ppo = PPOConfig(max_new_tokens=config.max_new_tokens, max_prompt_length=config.max_length)
    return prompt_room(ppo, [folders.resolve(config.model, weights=False)]), overlong


def look(
    raw: Raw, first: Raw | None, model: Model | None, config: CheckConfig
) -> tuple[dict, Report, UserError | None]:
    """(all facts of a file as JSON can hold them, its report, what the recipe would refuse)."""
    if model is None and not raw.is_ids:
        seen = measure_text(raw, RowPolicy.of(config))
    else:
        most, overlong = limits(config, raw.recipe, model)
        seen = measure_tokens(raw, model, most, overlong, RowPolicy.of(config))
    facts = {
        "recipe": raw.recipe, **asdict(seen.report), "unit": seen.unit,
        "dropped_rows": [row._asdict() for row in seen.report.dropped_rows],
        "rejected_rows": [row._asdict() for row in seen.report.rejected_rows],
        "different_prompts": len({key[0] for key in raw.keys if key[0] is not None}),
        "lengths": length_facts(lengths_of(raw.sides, seen.sizes)),
        "limits": seen.limits, "samples": seen.samples,
    }
    warnings = raw_warnings(raw, model) + seen.warnings
    if raw.recipe == "reward":
        facts["pairs"] = pair_facts(seen.sizes, raw.margins)
        warnings += length_bias(seen.sizes)
    if raw.lists:
        facts["lists"] = list_facts(seen.sizes)
    warnings += plain_template(raw, model)
    if first is not None:
        facts["shared"], more = overlap(raw, first)
        warnings += more
    return facts | {"warnings": warnings}, seen.report, seen.problem


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    argv = ["--data", *files, *argv[len(files) :]] if files else argv
    config = flags.parse(CheckConfig, argv, "minirlhf check")
    auto = config.recipe == "auto"
    policy = RowPolicy.of(config)
    recipes = [recipe_of(path, policy) if auto else config.recipe for path in config.data]
    model = None if config.model is None else check_model(config.model, recipes)
    for recipe in recipes:
        limits(config, recipe, model)  # refuses before all rows are read
    if model is not None:
        print(show_model(model), end="\n\n")
    every, first, problems = [], None, []
    for path, recipe in zip(config.data, recipes, strict=True):
        raw = read_raw(path, recipe, policy)
        facts, report, problem = look(raw, first, model, config)
        print(show(facts, report), end="\n\n")
        first = first or raw
        every.append(facts)
        problems += [problem] if problem else []
    if problems:
        raise problems[0]
    if config.json is not None:
        with open(config.json, "x", encoding="utf-8") as file:
            json.dump({"files": every}, file, indent=1, allow_nan=False)
    kept, rows = (sum(facts[name] for facts in every) for name in ("kept", "rows"))
    print(f"ok: {kept:,} of {rows:,} rows can be used")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
