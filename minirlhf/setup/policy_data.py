"""What is read beside the models of a policy: prompts, and prompts that are held out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minirlhf.data.examples import PASSED, Prompt, Text, load_prompts
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models import pretrained
from minirlhf.run.display import Display
from minirlhf.setup.common import named_files
from minirlhf.setup.policy_settings import PromptInputSettings, PromptSettings


class Data(NamedTuple):
    """What a run reads beside its models."""

    prompts: list[Prompt]
    sets: dict[str, list[Prompt]]  # metric prefix -> held-out prompts
    texts: list[Text]  # mixed into the updates; none without ptx_data, which PPO reads
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


def prompt_room(config: PromptInputSettings, folders: Sequence[Path]) -> int:
    """Most tokens of a prompt: all these models read it with the whole response.

    Args:
        config: has RolloutSettings too.
    """
    models = [pretrained.read_config(folder) for folder in folders]
    most = min(model.longest_row for model in models)
    if config.max_new_tokens >= most:
        raise UserError("--max-new-tokens", f"{config.max_new_tokens} fill the model's context",
                        f"use less than {most}")
    room = most - config.max_new_tokens
    return min(config.max_prompt_length or room, room)


def longer_prompts(config: PromptSettings, room: int) -> str:
    """What lets prompts be longer than this room, in words."""
    own = config.max_prompt_length == room
    return f"; or {'raise --max-prompt-length' if own else 'lower --max-new-tokens'}"


def read_prompts(
    config: PromptInputSettings, tokenizer: Tokenizer, room: int,
    finish: Callable[[Prompt], Prompt] | None = None, others: str = PASSED,
) -> Data:
    """All rows of all files of prompts, each file's report printed.

    Args:
        room: most tokens of a prompt.
        finish: gives a prompt back, or raises where it is of no use.
        others: what becomes of columns that are no part of a prompt.
    """
    policy = RowPolicy.of(config)
    files = {"": config.data, **named_files(config.eval_data, "/")}
    sets, reports, display = {}, [], Display(config)
    for prefix, file in files.items():
        rows, report = load_prompts(
            file, tokenizer, room, config.overlong, policy, finish, others,
            longer_prompts(config, room),
        )
        display.report(report)
        sets[prefix] = held_out(rows, config.eval_prompts, file) if prefix else rows
        reports.append(report)
    held_out_files = [file for prefix, file in files.items() if prefix]
    names = {"data": [config.data], "eval_data": held_out_files}
    return Data(sets.pop(""), sets, [], names, reports)


def held_out(prompts: list[Prompt], most: int | None, file: str) -> list[Prompt]:
    """The first prompts of a held-out file.

    Raises:
        UserError: there are fewer than 2.
    """
    if len(prompts) < 2:
        what = f"{len(prompts)} prompt to evaluate on"
        raise UserError(file, what, "give 2 or more: a standard error needs them")
    return prompts[:most]
