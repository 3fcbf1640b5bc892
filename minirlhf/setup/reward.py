"""setup.reward."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minirlhf import streams
from minirlhf.batches.preferences import (
    LIST_LOSSES,
    NEED_SCORES,
    Example,
    collate,
    count_texts,
    count_tokens,
    row_lengths,
    without_eos,
)
from minirlhf.data.rankings import Ranking, load_preferences
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.evaluation.reward import (
    Evaluation,
    evaluate_preferences,
)
from minirlhf.files import folders
from minirlhf.files.sieve import Report, RowPolicy, column_problems
from minirlhf.models import pretrained, stored
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import name_eos
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.run import optim
from minirlhf.run.settings import setting
from minirlhf.setup import memory_plans
from minirlhf.setup.memory import Plan


@dataclass(frozen=True)
class RewardConfig:
    """Settings of a run; `reward` reads those from `epochs` to `center_rewards_coefficient`, but
    not the optimizer's `weight_decay` and `adam_epsilon`; and `seed`."""

    model: str = setting(
        "", "language model (or reward model) to start from", metavar="FOLDER", required=True
    )
    data: str = setting(
        "", "preference pairs or ranked lists: JSON lines, JSON, CSV or TSV, also .gz",
        metavar="FILE", required=True,
    )
    out: str = setting("", "folder of the run", metavar="DIR", required=True)
    eval_data: tuple[str, ...] = setting(
        (), "held-out pairs or lists, several as NAME=FILE", metavar="FILE"
    )
    eval_every: int = setting(0, "steps between evaluations; 0: at the end only", at_least=0)
    show_samples: int = setting(4, "held-out pairs shown with their scores; -1: all", at_least=-1)
    epochs: float = setting(1.0, "passes over the data", above=0, at_most=1e6)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = setting(16, "pairs or lists in an optimizer step", at_least=1)
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    learning_rate: float = setting(1e-5, "peak step size of AdamW", above=0)
    schedule: str = setting("linear", "decay of the learning rate", choices=optim.SCHEDULES)
    warmup_steps: int = setting(0, "steps until the peak learning rate", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's decay of matrices", at_least=0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float | None = setting(1.0, "gradient norm to clip at; none: off", above=0)
    skip_nonfinite: int = setting(
        0, "updates in a row that may be skipped where numbers are not finite", at_least=0
    )
    label_smoothing: float = setting(
        0.0, "probability that the label of a pair is wrong", at_least=0, below=0.5
    )
    list_loss: str = setting(
        "plackett-luce",
        "of a ranked list: of the whole order, or of all its pairs: plain, with the difference of "
        "their scores as margin, or with its sigmoid as the label's probability",
        choices=LIST_LOSSES,
    )
    center_rewards_coefficient: float = setting(
        0.0, "weight of (chosen + rejected)^2, which centres the scores; 0.01 is usual", at_least=0
    )
    heads: int = setting(1, "linear heads on the trunk, an ensemble", at_least=1, at_most=1024)
    lcb_coef: float = setting(
        0.0, "how far below their mean the heads' score lies, in their standard deviations",
        at_least=0,
    )
    normalize: str = setting(
        "none", "give the finished model's scores mean 0 and std 1 over this data, and store both",
        choices=("none", "eval", "train"),
    )
    lora_rank: int = setting(
        0, "train adapters of this rank and the head; 0: all", at_least=0, at_most=4096
    )
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    gradient_checkpointing: bool = setting(
        False, "less memory for a forward pass more in each update"
    )
    compile: bool = setting(
        False, "torch.compile for the passes over whole rows; needs a C++ compiler"
    )
    max_length: int = setting(1024, "tokens of the longest row", at_least=2)
    overlong: str = setting(
        "drop", "what happens to longer rows",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"),
    )
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or list them in rejected.jsonl and go on",
        choices=("error", "skip"),
    )
    fix_text: bool = setting(False, "replace halves of surrogate pairs by U+FFFD")
    allow_empty_prompt: bool = setting(False, "whether a prompt may be empty")
    max_drop: float = setting(
        1.0, "share of a file's rows that may be left out; 1: no limit", at_least=0, at_most=1
    )
    dtype: str = setting(
        "auto", "of weights and compute; auto: float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: the first CUDA GPU, else the CPU")
    seed: int = setting(0, "of data order and the new head")
    log_every: int = setting(10, "steps between lines of the log", at_least=1)
    save_every: int = setting(100, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")
    allow_data_change: bool = setting(False, "resume although data files have changed")
    allow_setting_change: bool = setting(
        False, "resume although settings or reward functions have changed"
    )

    def check(self) -> list[str]:
        problems = column_problems(self.columns)
        if self.lcb_coef and self.heads == 1:
            problems.append(f"lcb_coef: got {self.lcb_coef}, must be 0 for a single head")
        elif self.lcb_coef and not self.center_rewards_coefficient:
            # Pairs leave each head's zero open; without one their spread would measure that
            # (Eisenstein et al. 2023, arXiv:2312.09244, regularise for the same reason).
            do = "heads that share no zero cannot be compared: give --center-rewards-coefficient"
            problems.append(f"lcb_coef: got {self.lcb_coef}, {do} 0.01")
        if self.normalize == "eval" and not self.eval_data:
            problems.append("normalize: got 'eval', there is no eval_data: give it, or train")
        if self.eval_every and not self.eval_data:
            problems.append("eval_every: goes with --eval-data")
        return problems


# ------------------------------------------------------------------------------- the command line


def load(
    config: RewardConfig, path: str, tokenizer: Tokenizer, model: ModelConfig, before_eos: bool
) -> tuple[list[Example], Report]:
    """Examples of a file, its report printed; without eos for a model that is read before it."""
    examples, report = load_preferences(
        path, tokenizer, config.max_length, config.overlong, policy=RowPolicy.of(config),
        finish=partial(without_eos, eos_ids=tokenizer.eos_ids) if before_eos else None,
    )
    longest = int(row_lengths(examples).max())
    most = model.longest_row
    if longest > most:
        what = f"a row of {longest} tokens, the model reads {most}"
        raise UserError(path, what, f"give --max-length {most}")
    check_loss(config, path, examples)
    print(report)
    return examples, report


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


def memory_plan(
    config: RewardConfig, model: ModelConfig, examples: list[Example],
    sets: dict[str, list[Example]], dtype: torch.dtype, held: int,
) -> Plan:
    """What a run over these examples and held-out sets will hold; held: as in `reward_plan`."""
    every = [examples, *sets.values()]
    scored = every if config.normalize == "train" else every[1:]
    return memory_plans.reward_plan(
        config, model, max(int(row_lengths(rows).max()) for rows in every), dtype, held,
        max(map(len, scored), default=0), max(int(count_texts(rows).max()) for rows in every),
        memory_plans.heaviest(list(map(count_tokens, examples)), config.batch_size),
    )


def load_start(
    config: RewardConfig, before_eos: bool, device: str, dtype: torch.dtype
) -> RewardModel:
    """The reward model of --model, or its language model under new heads.

    Of one that was normalised the weights are kept, which hold the scale, and the mean is left out.
    """
    folder = folders.resolve(config.model)
    if stored.has_tensor(stored.tensor_files(folder), "score.weight"):
        model = pretrained.load_reward_model(folder, dtype)
        if model.heads != config.heads:
            what = f"is {config.heads}, the reward model {config.model} has {model.heads}"
            raise UserError("--heads", what, f"give --heads {model.heads}")
        if model.lcb_coef not in (0.0, config.lcb_coef):
            what = f"is {config.lcb_coef}, the reward model {config.model} has {model.lcb_coef}"
            raise UserError("--lcb-coef", what, f"give --lcb-coef {model.lcb_coef}")
        if model.reward_mean:
            print(f"{config.model} was normalised: its mean of {model.reward_mean:.4f} is left out")
        model.lcb_coef, model.reward_mean, model.reward_std = config.lcb_coef, 0.0, 1.0
    else:
        lm = pretrained.load_pretrained(folder, dtype)
        model = RewardModel(lm, heads=config.heads, lcb_coef=config.lcb_coef)
        first = streams.generator(config.seed, "reward head")  # of a model with one head, too
        others = (streams.generator(config.seed, "reward head", h) for h in range(1, config.heads))
        initialize_score(model, first, *others)
    model.read_before_eos = before_eos
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
    model.model.checkpointing = config.gradient_checkpointing
    model.to(device)
    if config.compile:
        compile_blocks(model)
    return model


def write_model(model: RewardModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder that transformers loads to the same scores: all its files name one pad token."""
    pad = None if model.read_before_eos else tokenizer.spare_pad_token()
    if pad is None:
        pad = tokenizer.eos_token()
    token, pad_id = pad or (None, None)
    # The folder has no generation_config.json, where others of them may have stood.
    name_eos(model.config, tokenizer.eos_ids)
    pretrained.save_pretrained(model, folder, pad_id)
    tokenizer.save(folder, token)


def score_sets(
    model: RewardModel, sets: dict[str, list[Example]], config: RewardConfig
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix."""
    collate_lists = partial(collate, list_loss=config.list_loss)
    return {
        prefix: evaluate_preferences(model, rows, config.micro_batch_tokens, collate=collate_lists)
        for prefix, rows in sets.items()
    }
