"""What recipes do alike around their loops, and what those share that pass over rows by epochs.

A recipe reads, loads and ends by these functions; its loop is its own, in its `main`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn

from minirlhf.data.batching import total_steps
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError
from minirlhf.evaluation.report.page import write_report
from minirlhf.files import folders
from minirlhf.files.sieve import Report
from minirlhf.models import parallel
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.lora import has_lora, merged_copy
from minirlhf.models.transformer import CausalLM
from minirlhf.run import distributed, optim
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.dry_run import DryRun
from minirlhf.run.folder import Run
from minirlhf.run.machine import choose_dtype
from minirlhf.run.meters import Step
from minirlhf.setup import longest
from minirlhf.setup.common import (
    base_name,
    named_files,
    use_of_adapter,
    write_adapter,
    write_model,
)
from minirlhf.setup.groups import TrainingSettings
from minirlhf.setup.roles import trunk_facts, with_adapters

T = TypeVar("T")
STEADY = ("learning_rate", "epoch", "num_tokens", "skipped_updates")  # logged, but not averaged


@dataclass
class TrainingRun(Generic[T]):
    """A run that is ready to begin: checked, loaded, and nothing written yet."""

    config: TrainingSettings  # of a dry run its own
    run: Run
    state: TrainState
    rows: list[T]
    sets: dict[str, list[T]]  # metric prefix -> held-out rows
    tokenizer: Tokenizer
    reports: list[Report]  # of the data files
    facts: dict[str, object]  # what is told before it costs anything
    steps: int

    def begin(self) -> None:
        """Tells what is about to happen, and goes on from the newest checkpoint."""
        self.run.display.facts(self.facts)
        self.run.restore(self.state)
        self.run.list_left_out(self.reports)

    def is_due(self, step: Step, every: int | None) -> bool:
        """Whether it is time for what happens every so many steps (0: never) and at the end; of
        None it is never."""
        if every is None:
            return False
        return step.number == self.steps or (every > 0 and step.number % every == 0)

    def finish(self, what: str, lm: CausalLM) -> None:
        """Exports the language model that was trained: its adapters, and merged into its weights
        unless that is not asked for."""
        self.export(lm, "adapter", "model")
        folder = self.run.folder
        if self.config.lora_rank:
            self.run.done("adapter", folder / "adapter")
            for line in use_of_adapter(folder / "adapter", base_name(self.config)):
                self.run.say(f"  {line}")
        if self.config.merge:
            self.run.done(what, folder / "model")
        write_report(self.run)

    def export(self, lm: CausalLM, adapter: str, merged: str) -> None:
        """Writes adapters and model into folders of these names; the model goes on learning."""
        with parallel.whole(lm, on_first=True) as lm:
            if self.config.lora_rank:
                self.run.export(partial(write_adapter, lm, self.tokenizer, self.config), adapter)
            if self.config.merge:
                plain = merged_copy(lm) if self.config.lora_rank else lm
                self.run.export(partial(write_model, plain, self.tokenizer), merged)


def check_tokenizer(
    where: str, folder: Path, tokenizer: Tokenizer, whose: str = "the policy"
) -> None:
    """Refuses a second model that does not read the ids of the model that is trained.

    Args:
        where: what names it on the command line.
        folder: its own.
        tokenizer: of the model that is trained; `whose` it is.
    """
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(where, f"has another tokenizer than {whose}",
                        "give a model that reads the same ids")


# ------------------------------------------------------------------ recipes that pass over the data


class Rows(NamedTuple, Generic[T]):
    """What the files of such a recipe hold."""

    train: list[T]
    sets: dict[str, list[T]]  # metric prefix -> held-out rows
    reports: list[Report]
    tokens: list[int]  # of each training row


def open_run(
    config: TrainingSettings, recipe: str, **inputs: list[str]
) -> tuple[Run, str, torch.dtype]:
    """The run's folder, refused before anything is loaded and written to once all is; its device
    and dtype.

    Args:
        inputs: setting -> files that it names, beside those of data.
    """
    device, dtype = distributed.start(config), choose_dtype(config.dtype)
    files = {"data": [config.data], "eval_data": list(named_files(config.eval_data).values())}
    return (DryRun if config.dry_run else Run)(config, recipe, files | inputs), device, dtype


def read_rows(
    r: Run, config: TrainingSettings, read: Callable[[str], tuple[list[T], Report]],
    measure: Callable[[list[T]], longest.Sizes], most: int,
) -> tuple[TrainingSettings, Rows[T]]:
    """All rows of all files, each file's report printed; of a dry run its longest and its config.

    Args:
        read: file -> its rows and their report.
        measure: rows -> their sizes.
        most: tokens that the model reads in a row.
    """
    sets, reports = {}, []
    for prefix, file in ({"": config.data} | named_files(config.eval_data)).items():
        sets[prefix], report = read(file)
        tokens = int(measure(sets[prefix]).longest.max())
        if tokens > most:
            what = f"a row of {tokens} tokens, the model reads {most}"
            raise UserError(file, what, f"give --max-length {most}")
        r.display.report(report)
        reports.append(report)
    rows = sets.pop("")
    if isinstance(r, DryRun):
        config, rows, sets = longest.of_training(r, config, rows, sets, measure)
    return config, Rows(rows, sets, reports, measure(rows).tokens.tolist())


def ready(
    config: TrainingSettings, r: Run, model: nn.Module, tokenizer: Tokenizer, rows: Rows[T],
    kind: str, facts: dict[str, object], device: str,
) -> TrainingRun[T]:
    """The run of a model that is loaded: with adapters where they are asked for, and an optimizer.

    Args:
        model: has its trunk as `.model`.
        kind: what the rows are, for the facts.
    """
    if config.lora_rank and not has_lora(model):
        with_adapters(config, model)
    model.model.checkpointing = config.gradient_checkpointing
    model.to(device)
    if config.compile:
        compile_blocks(model)
    parallel.wrap(model, config.parallel, offload=config.offload_params)
    optimizer = optim.make_optimizer(
        model, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    count = len(rows.train)
    steps = total_steps(count, config.batch_size, config.epochs, config.steps)
    told = {}
    if config.lora_rank:
        told = trunk_facts(config, folders.resolve(config.model, False, config.base))
    facts = {
        "examples": count, "epochs": f"{steps / ceil(count / config.batch_size):.2f}",
        f"{kind} a step": config.batch_size, "steps": steps,
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learning rate": f"{config.learning_rate:g}",
        **told, **facts, "seed": config.seed,
    }
    state = TrainState(model, optimizer)
    return TrainingRun(
        config, r, state, rows.train, rows.sets, tokenizer, rows.reports, facts, steps
    )
