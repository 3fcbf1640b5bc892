"""The longest rows that a run meets, which a dry run makes its steps of.

Data order is a function of the seed, so all batches of a run are known before it starts. The
heaviest is the one whose largest micro-batch holds most tokens: on it the passes keep most.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minirlhf.batches.collect import columns_of
from minirlhf.batches.demonstrations import count_tokens as text_tokens
from minirlhf.batches.preferences import Example, count_texts, count_tokens, row_lengths
from minirlhf.data.batching import cut_by_tokens, next_rows, total_steps, training_batches
from minirlhf.data.examples import Prompt, Text
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.run.dry_run import STEPS, DryRun
from minirlhf.setup.policy_data import Data
from minirlhf.setup.policy_settings import PromptInputSettings
from minirlhf.setup.ppo_settings import PPOConfig

T = TypeVar("T")
SCANNED = 10_000  # batches that are looked at; more of them hold hardly longer rows


class Sizes(NamedTuple):
    """Of N rows of data."""

    longest: Tensor  # (N,) tokens of a row's longest text
    texts: Tensor  # (N,) texts of a row
    tokens: Tensor  # (N,) tokens of all of them


def of_texts(texts: list[Text]) -> Sizes:
    """Of demonstrations: each row is one text."""
    tokens = text_tokens(texts)[0]
    return Sizes(tokens, torch.ones_like(tokens), tokens)


def of_preferences(examples: list[Example]) -> Sizes:
    """Of pairs or ranked lists, whose texts stay in one micro-batch."""
    tokens = torch.tensor([count_tokens(example) for example in examples])
    return Sizes(row_lengths(examples), count_texts(examples), tokens)


def heaviest(
    batches: Iterable[Tensor], cut: Callable[[Tensor], list[Tensor]], tokens: Tensor
) -> tuple[Tensor, float]:
    """The heaviest batch, and how many of it hold as many tokens as all batches together.

    Args:
        batches: (B,) rows of each.
        cut: rows -> index tensors that cut them into micro-batches.
        tokens: (N,) of each row.
    """
    best, most, total = torch.empty(0, dtype=torch.int64), (-1, 0), 0
    for rows in batches:
        here = tokens[rows]
        weight = max(int(here[part].sum()) for part in cut(rows)), int(here.sum())
        total += weight[1]
        if weight > most:
            best, most = rows, weight
    return best, total / most[1]


def of_training(
    r: DryRun, config, rows: list[T], sets: dict[str, list[T]], measure: Callable[[list[T]], Sizes]
) -> tuple[object, list[T], dict[str, list[T]]]:
    """Config, rows and held-out sets for the dry run of a recipe that reads its data by epochs.

    Args:
        config: has batch_size, micro_batch_tokens, epochs, steps, eval_every and seed.
        measure: rows -> their sizes.
    """
    sizes = measure(rows)
    r.steps = total_steps(len(rows), config.batch_size, config.epochs, config.steps)
    batches = training_batches(sizes.longest, config.batch_size, config.seed)
    batches = islice(batches, min(r.steps, SCANNED))
    chosen, times = heaviest(batches, partial(cut, sizes, config.micro_batch_tokens), sizes.tokens)
    r.work = times * r.steps / min(r.steps, SCANNED)
    held_out = {}
    for prefix, others in sets.items():
        sizes = measure(others)
        parts = cut(sizes, config.micro_batch_tokens, torch.arange(len(others)))
        part, times = heaviest(parts, whole, sizes.tokens)
        held_out[prefix] = [others[i] for i in part.tolist()]
        r.evaluations = max(r.evaluations, times * evaluations(r.steps, config.eval_every))
    config = replace(config, steps=min(r.steps, STEPS))
    return config, [rows[i] for i in chosen.tolist()], held_out


def cut(sizes: Sizes, most: int, rows: Tensor) -> list[Tensor]:
    return cut_by_tokens(sizes.longest[rows], len(rows), most, sizes.texts[rows])


def whole(rows: Tensor) -> list[Tensor]:
    """A batch that is one micro-batch."""
    return [torch.arange(len(rows))]


def evaluations(steps: int, every: int) -> int:
    """How often a run of so many steps evaluates, its end included."""
    return 1 + ((steps - 1) // every if every else 0)


def of_prompts(
    r: DryRun, config: PromptInputSettings, tokenizer: Tokenizer, data: Data
) -> tuple[PromptInputSettings, Tokenizer, Data]:
    """Config, tokenizer and data for a dry run in which no response ends early.

    Args:
        config: has RolloutSettings and PassSettings too, and its number of steps.
    """
    prompts_a_step, samples = config.batch_size, config.rollout_rows // config.batch_size
    r.steps, scanned = config.steps, min(config.steps, SCANNED)
    names = columns_of(data.every_prompt)

    def longest_of(
        prompts: list[Prompt], batches: Iterable[Tensor], samples: int
    ) -> tuple[list[Prompt], float]:
        tokens = torch.tensor([len(p.ids) for p in prompts]) + config.max_new_tokens

        def cut(rows: Tensor) -> list[Tensor]:
            each = rows.repeat_interleave(samples)
            parts = cut_by_tokens(tokens[each], config.micro_batch_size, config.micro_batch_tokens)
            return [part // samples for part in parts]  # places among the rows

        rows, times = heaviest(batches, cut, tokens)
        chosen = [prompts[i] for i in rows.tolist()]
        # Reward functions may ask for a column that only other rows have.
        columns = [{name: p.columns.get(name) for name in names} for p in chosen]
        return [replace(p, columns=c) for p, c in zip(chosen, columns, strict=True)], times

    order = next_rows(0, scanned * prompts_a_step, len(data.prompts), config.seed)
    prompts, times = longest_of(data.prompts, order.split(prompts_a_step), samples)
    r.work = times * config.steps / scanned
    sets = {}
    for prefix, others in data.sets.items():
        abreast = min(config.rollout_batch_size, config.rollout_rows)
        found, times = longest_of(others, torch.arange(len(others)).split(abreast), 1)
        sets[prefix] = found if len(found) > 1 else found * 2  # a standard error needs two
        count = 1 + evaluations(config.steps, config.eval_every)  # and one before step 1
        r.evaluations = max(r.evaluations, times * count)
    endless = copy(tokenizer)
    endless.eos_ids = ()  # then no response ends before max_new_tokens
    config = replace(config, steps=min(r.steps, STEPS), stop=())
    return config, endless, data._replace(prompts=prompts, sets=sets)


def of_ppo(
    r: DryRun, config: PPOConfig, tokenizer: Tokenizer, data: Data
) -> tuple[PPOConfig, Tokenizer, Data]:
    """As `of_prompts`; the policy learns from the first step on."""
    texts = longest_texts(config, data.texts)
    config, tokenizer, data = of_prompts(r, config, tokenizer, data)
    return replace(config, critic_warmup_steps=0), tokenizer, data._replace(texts=texts)


def longest_texts(config: PPOConfig, texts: list[Text]) -> list[Text]:
    """Those of the heaviest update; none where none are mixed in."""
    if not texts:
        return []
    tokens = torch.tensor([len(text.ids) for text in texts])
    updates = min(config.steps * config.epochs * config.mini_batches, SCANNED)
    size = config.ptx_batch_size
    order = next_rows(0, updates * size, len(texts), config.seed, "text order")

    def cut(rows: Tensor) -> list[Tensor]:
        return cut_by_tokens(tokens[rows], len(rows), config.micro_batch_tokens)

    rows, _ = heaviest(order.split(size), cut, tokens)
    return [texts[i] for i in rows.tolist()]
