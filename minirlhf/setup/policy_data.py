"""What PPO and GRPO read beside their models: prompts, and prompts that are held out."""

from collections.abc import Callable
from typing import NamedTuple

from minirlhf.data.examples import Prompt, Text, load_prompts
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.rewards.load import check_answers
from minirlhf.rewards.parse import parse_source
from minirlhf.setup.common import named_files
from minirlhf.setup.policy_settings import PolicyInputSettings


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


def read_prompts(
    config: PolicyInputSettings, tokenizer: Tokenizer, room: int, fits: Callable[[Prompt], Prompt]
) -> Data:
    """All rows of all files of prompts, each file's report printed.

    Args:
        room: most tokens of a prompt.
        fits: gives a prompt back, or raises where it is of no use.
    """
    policy = RowPolicy.of(config)
    answers = check_answers([parse_source(source) for source in config.reward])
    finish = fits if answers is None else lambda prompt: fits(answers(prompt))
    files = {"": config.data, **named_files(config.eval_data, "/")}
    sets, reports = {}, []
    for prefix, file in files.items():
        rows, report = load_prompts(file, tokenizer, room, config.overlong, policy, finish)
        print(report)
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
