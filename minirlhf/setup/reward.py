"""What a reward model's run reads, refuses and loads, and how its model is written."""

from functools import partial
from pathlib import Path

import torch

from minirlhf import streams
from minirlhf.batches.preferences import (
    NEED_SCORES,
    Example,
    PairLoss,
    collate,
    kind_of,
    unread_end,
    without_unread,
)
from minirlhf.data.rankings import Ranking, load_preferences
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.errors import UserError
from minirlhf.evaluation.reward import Evaluation, evaluate_preferences
from minirlhf.files import folders
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models import pretrained
from minirlhf.models.families import name_eos
from minirlhf.models.heads import RewardModel, initialize_score, reads_whole
from minirlhf.models.lora import has_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.rewards.model import scores_read
from minirlhf.run.display import Display
from minirlhf.run.machine import make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.common import check_base
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.roles import load_trained, load_trained_scorer
from minirlhf.setup.training import TrainingRun, open_run, read_rows, ready


def check_loss(config: RewardConfig, path: str, examples: list[Example]) -> None:
    """Raises UserError where a setting of the loss means nothing for a file's examples."""
    lists = isinstance(examples[0], Ranking)
    if lists and config.list_loss in NEED_SCORES and examples[0].scores is None:
        what = f"is {config.list_loss}, but {path} has no scores of the responses"
        raise UserError("--list-loss", what, "give it a column scores, or choose another loss")
    if path != config.data:
        return
    if not lists and config.list_loss != "plackett-luce":
        what = f"is {config.list_loss}, but {path} holds pairs"
        raise UserError("--list-loss", what, "leave it out")
    if lists and config.label_smoothing and config.list_loss == "plackett-luce":
        what = f"is {config.label_smoothing}, but {path} holds ranked lists"
        do = "only the label of a pair can be smoothed: leave it out, or give --list-loss pairs"
        raise UserError("--label-smoothing", what, do)


def load_start(config: RewardConfig, unread: int | None, dtype: torch.dtype) -> RewardModel:
    """The reward model of --model, or its language model under new heads.

    Of one that normalises its scores the weights are kept, and the mean and deviation left out.
    """
    folder = folders.resolve(config.model, base=config.base)
    if pretrained.stored_head(folder) is not None:
        model = load_trained_scorer(config, folder, dtype)
        if model.heads != config.heads:
            what = f"is {config.heads}, the reward model {config.model} has {model.heads}"
            raise UserError("--heads", what, f"give --heads {model.heads}")
        if model.lcb_coef not in (0.0, config.lcb_coef):
            what = f"is {config.lcb_coef}, the reward model {config.model} has {model.lcb_coef}"
            raise UserError("--lcb-coef", what, f"give --lcb-coef {model.lcb_coef}")
        mean, std = model.reward_mean, model.reward_std
        if (mean, std) != (0.0, 1.0):
            Display(config).note(
                f"{config.model} normalises its scores by a mean of {mean:.4f} and a deviation of "
                f"{std:.4f}: both are left out")
        model.lcb_coef, model.reward_mean, model.reward_std = config.lcb_coef, 0.0, 1.0
    else:
        lm = load_trained(config, folder, dtype)
        model = RewardModel(lm, heads=config.heads, lcb_coef=config.lcb_coef)
        first = streams.generator(config.seed, "reward head")  # of a model with one head, too
        others = (streams.generator(config.seed, "reward head", h) for h in range(1, config.heads))
        initialize_score(model, first, *others)
    model.unread = unread
    return model


def write_reward_model(
    model: RewardModel, tokenizer: Tokenizer, folder: Path, base: str = "", dropout: float = 0.0
) -> None:
    """A folder that transformers, or of adapters peft, loads to the same scores: all its files name
    one pad token.

    Args:
        base: name of the model that adapters go on.
        dropout: that they were trained with.
    """
    pad = None if model.unread is not None else tokenizer.spare_pad_token()
    if pad is None:
        pad = tokenizer.eos_token()
    token, pad_id = pad or (None, None)
    # The folder has no generation_config.json, where others of them may have stood.
    name_eos(model.config, tokenizer.eos_ids)
    if has_lora(model):
        save_adapter(model, folder, base, dropout, pad_id)
    else:
        pretrained.save_pretrained(model, folder, pad_id)
    tokenizer.save(folder, token)


def score_sets(
    model: RewardModel, sets: dict[str, list[Example]], config: RewardConfig, pair_loss: PairLoss
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix."""
    collate_lists = partial(collate, list_loss=config.list_loss, pair_loss=pair_loss)
    return {
        prefix: evaluate_preferences(model, rows, config.micro_batch_tokens, collate=collate_lists)
        for prefix, rows in sets.items()
    }


def load_run(config: RewardConfig) -> TrainingRun[Example]:
    """Refuses all that can be refused, the cheapest first, then loads the model."""
    r, device, dtype = open_run(config, "reward")
    folder = folders.resolve(config.model, base=config.base)
    check_base(config, folder)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    r.inputs["model"] = tokenizer_files(folder)
    unread = unread_end(model_config, tokenizer)
    finish = None if unread is None else partial(without_unread, unread=unread)
    whole = reads_whole(model_config.source, folder / "config.json")

    def read(file: str) -> tuple[list[Example], Report]:
        examples, report = load_preferences(file, tokenizer, config.max_length, config.overlong,
                                            RowPolicy.of(config), finish, whole)
        check_loss(config, file, examples)
        return examples, report

    config, rows = read_rows(r, config, read, longest.of_preferences, model_config.longest_row)
    make_deterministic(device)
    estimate = memory.of_training("reward", config, model_config, rows.tokens, dtype, False)
    facts = memory.announce(config, estimate, [folder], dtype, device)
    model = load_start(config, unread, dtype)
    facts = {"scores read": scores_read(model, tokenizer)} | facts
    return ready(config, r, model, tokenizer, rows, kind_of(rows.train), facts, device)
