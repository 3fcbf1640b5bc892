"""Reward model: a scalar score learned from preferences, pairs or ranked lists of them.

    pairs  -q log sigmoid(d) - (1 - q) log sigmoid(-d),   d = chosen - rejected - margin
    lists  sum_i (log sum_{j not before i} exp(s_j) - s_i), or the mean of the first over all pairs
    both   + c (2 mean score)^2

Several heads on the trunk are an ensemble, each trained on a bootstrap of its own. What is left
out: classification heads of several labels, whose average is no reward.
Run it as `minirlhf reward`, `python -m minirlhf.recipes.reward`, or loop over `reward(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import fsio, interrupt, model_files, optim, plans, pretrained, streams
from minirlhf.batching import epoch_batches, total_steps
from minirlhf.checkpoint import TrainState
from minirlhf.columns import column_problems
from minirlhf.compiling import compile_blocks
from minirlhf.config import setting
from minirlhf.errors import OK, STOPPED, UserError, run
from minirlhf.heads import RewardModel, initialize_score, normalize_scores
from minirlhf.hf_config import name_eos
from minirlhf.lora import add_lora, merge_lora
from minirlhf.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.memory import Plan
from minirlhf.meters import Step
from minirlhf.preferences import (
    LIST_LOSSES,
    NEED_SCORES,
    Batch,
    Example,
    bootstrap_weights,
    collate,
    count_texts,
    count_tokens,
    kind_of,
    micro_batches,
    preference_metrics,
    reads_before_eos,
    row_lengths,
    without_eos,
)
from minirlhf.rankings import Ranking, load_preferences
from minirlhf.reward_card import card_files
from minirlhf.reward_eval import Evaluation, evaluate, sample_rows, sample_table, score_moments
from minirlhf.run import PLACE, Run, named_files
from minirlhf.sieve import Report, RowPolicy
from minirlhf.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.transformer import ModelConfig

SHOWN = ("accuracy", "top1", "ties", "loss", "margin", "calibration_error")


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
    )  # fmt: skip
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
    )  # fmt: skip
    normalize: str = setting(
        "none", "give the finished model's scores mean 0 and std 1 over this data, and store both",
        choices=("none", "eval", "train"),
    )  # fmt: skip
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
    )  # fmt: skip
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )  # fmt: skip
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or list them in rejected.jsonl and go on",
        choices=("error", "skip"),
    )  # fmt: skip
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


def collate_as(config: RewardConfig) -> Callable[[list[Example]], Batch]:
    """Examples -> the batch whose loss is the run's."""
    return partial(collate, list_loss=config.list_loss)


def accumulate(
    model: RewardModel,
    examples: list[Example],
    weights: Tensor,
    config: RewardConfig,
    collate: Callable[[list[Example]], Batch],
    where: str,
) -> dict[str, float]:
    """Gradient of the mean loss over the examples of a step and the heads, in micro-batches.

    Args:
        weights: (N, H) of each example for each head.
    Returns:
        loss, grad_norm before clipping, and `preference_metrics`.
    """
    total, device = 0.0, model.score.weight.device
    seen: list[Example] = []
    scores: list[Tensor] = []
    for part in micro_batches(examples, config.micro_batch_tokens):
        here = [examples[i] for i in part.tolist()]
        batch = collate(here)
        each = model.head_scores(batch.tokens.to(device), batch.lengths.to(device))  # (M, H)
        losses = [
            batch.loss(head, config.label_smoothing, config.center_rewards_coefficient)
            for head in each.unbind(1)
        ]
        loss = torch.stack(losses, 1) * weights[part].to(each)  # (N, H)
        loss = loss.mean(1).sum() / len(examples)
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(e.where for e in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        total += value
        seen += here
        scores += batch.split(model.combine(each.detach()))
    metrics = {"loss": total} | preference_metrics(seen, scores)
    optim.check_finite(where, metrics)
    return metrics | {"grad_norm": optim.clip_gradients(model, config.max_grad_norm, where)}


def reward(
    state: TrainState,
    examples: list[Example],
    config: RewardConfig,
    collate: Callable[[list[Example]], Batch] | None = None,
) -> Iterator[Step]:
    """Trains state.model, a RewardModel; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        examples: N preference pairs, or N ranked lists.
        config: only its training settings are read.
        collate: examples -> the batch that knows their loss; None: `collate_as`.
    Raises:
        UserError: a number is not finite (exit code 3); the step changed nothing.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one")
    model, N = state.model, len(examples)
    collate = collate or collate_as(config)
    lengths, per_epoch = row_lengths(examples), ceil(N / config.batch_size)
    steps = total_steps(N, config.batch_size, config.epochs, config.steps)
    epoch_of, batches = -1, []
    while state.step < steps:
        started = time.perf_counter()
        epoch, position = divmod(state.step, per_epoch)
        if epoch != epoch_of:
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
            epoch_of = epoch
        rows = batches[position]
        rate = optim.learning_rate(
            state.step, steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)
        batch, where = [examples[i] for i in rows.tolist()], f"step {state.step + 1}"
        weights = bootstrap_weights(config.seed, rows, model.heads)
        metrics = optim.update_or_skip(
            state.optimizer, partial(accumulate, model, batch, weights, config, collate, where),
            state.counters, config.skip_nonfinite,
        )  # fmt: skip
        state.step += 1
        state.samples += len(rows)
        tokens_here = sum(map(count_tokens, batch))
        state.count("num_tokens", tokens_here)
        if metrics is not None:
            state.meters.update(metrics, len(rows))
        metrics = (metrics or {}) | {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        seconds = time.perf_counter() - started
        clock = {"step_time": seconds, "tok_per_s": tokens_here / seconds}
        yield Step(state.step, metrics, clock, [])


# ------------------------------------------------------------------------------- the command line


def load(
    config: RewardConfig, path: str, tokenizer: Tokenizer, model: ModelConfig, before_eos: bool
) -> tuple[list[Example], Report]:
    """Examples of a file, its report printed; without eos for a model that is read before it."""
    examples, report = load_preferences(
        path, tokenizer, config.max_length, config.overlong, policy=RowPolicy.of(config),
        finish=partial(without_eos, eos_ids=tokenizer.eos_ids) if before_eos else None,
    )  # fmt: skip
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
) -> Plan:  # fmt: skip
    """What a run over these examples and held-out sets will hold; held: as in `reward_plan`."""
    every = [examples, *sets.values()]
    scored = every if config.normalize == "train" else every[1:]
    return plans.reward_plan(
        config, model, max(int(row_lengths(rows).max()) for rows in every), dtype, held,
        max(map(len, scored), default=0), max(int(count_texts(rows).max()) for rows in every),
        plans.heaviest(list(map(count_tokens, examples)), config.batch_size),
    )  # fmt: skip


def load_start(
    config: RewardConfig, before_eos: bool, device: str, dtype: torch.dtype
) -> RewardModel:
    """The reward model of --model, or its language model under new heads.

    Of one that was normalised the weights are kept, which hold the scale, and the mean is left out.
    """
    folder = model_files.resolve(config.model)
    if model_files.has_tensor(model_files.tensor_files(folder), "score.weight"):
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


def evaluate_all(
    r: Run,
    state: TrainState,
    sets: dict[str, list[Example]],
    config: RewardConfig,
    tokenizer: Tokenizer,
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix; tells the metrics and a table of pairs."""
    results = score_sets(state.model, sets, config)
    for prefix, result in results.items():
        held_out = sets[prefix]
        rows = sample_rows(result, tokenizer, config.show_samples)
        if rows:
            r.say(sample_table(rows))
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        shown = [n for n in SHOWN if n in result.metrics]
        numbers = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in shown)
        r.say(f"  {prefix.removesuffix('_')}: {len(held_out):,} {kind_of(held_out)}  {numbers}")
    return results


def score_sets(
    model: RewardModel, sets: dict[str, list[Example]], config: RewardConfig
) -> dict[str, Evaluation]:
    """Every held-out set by its prefix."""
    return {
        prefix: evaluate(model, rows, config.micro_batch_tokens, collate=collate_as(config))
        for prefix, rows in sets.items()
    }


def finish(
    r: Run,
    model: RewardModel,
    train: list[Example],
    sets: dict[str, list[Example]],
    config: RewardConfig,
    tokenizer: Tokenizer,
    results: dict[str, Evaluation] | None,
) -> None:
    """Normalises the trained model, writes its folder, and the card of what was held out.

    All of it is a function of the last checkpoint, so a run that is stopped here does it again.

    Args:
        results: of the last step, if this process made it.
    """
    if config.lora_rank:
        merge_lora(model)
    facts = {"heads": model.heads, "lcb_coef": model.lcb_coef}
    facts |= r.provenance(("model", "data", "eval_data"))
    if config.normalize != "none":
        over = [train] if config.normalize == "train" else sets.values()
        mean, std = score_moments(model, over, config.micro_batch_tokens, "--normalize")
        normalize_scores(model, mean, std)
        facts["normalized"] = {"over": config.normalize, "mean": mean, "std": std}
        print(f"scores of {config.normalize} had mean {mean:.4f} and std {std:.4f}: normalised")
    if results is None or config.lora_rank or config.normalize != "none":  # not this model's
        results = score_sets(model, sets, config)
    by_name = {prefix.removesuffix("_"): result for prefix, result in results.items()}
    files = card_files(facts, by_name, tokenizer)

    def write(target: Path) -> None:
        write_model(model, tokenizer, target)
        for name, text in files.items():
            fsio.write_text(target / name, text)

    folder = r.export(write)
    for name, text in files.items():
        r.write_file(name, text)
    print(f"reward model in {folder}")


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        RewardConfig, argv, "minirlhf reward", "Train a reward model on pairs or ranked lists."
    )
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    files = {"": config.data} | named_files(config.eval_data)
    told = settings.as_dict(config)
    r = Run(config.out, "reward", told, config.resume, files.values(), PLACE)
    folder = model_files.resolve(config.model)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    r.inputs += tokenizer_files(folder)
    before_eos = reads_before_eos(model_config, tokenizer)
    read = {
        prefix: load(config, file, tokenizer, model_config, before_eos)
        for prefix, file in files.items()
    }
    sets = {prefix: rows for prefix, (rows, _) in read.items()}
    examples = sets.pop("")
    make_deterministic(device)
    plan = memory_plan(config, model_config, examples, sets, dtype, process_bytes(device))
    fits = plans.announce(plan, [folder], dtype, device)
    model = load_start(config, before_eos, device, dtype)
    optimizer = optim.make_optimizer(
        model, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    state = TrainState(model, optimizer)
    steps = total_steps(len(examples), config.batch_size, config.epochs, config.steps)
    results = None
    with r:
        r.list_left_out(report for _, report in read.values())
        r.facts({
            "examples": len(examples),
            "epochs": f"{steps / ceil(len(examples) / config.batch_size):.2f}",
            f"{kind_of(examples)} a step": config.batch_size, "steps": steps,
            "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory": fits, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        })  # fmt: skip
        r.restore(state)
        for step in r.bar(reward(state, examples, config), state, steps):
            last = step.number == steps
            steady = ("learning_rate", "epoch", "num_tokens", "skipped_updates")
            extra = {name: step.metrics[name] for name in steady}
            evaluating = last or (config.eval_every and step.number % config.eval_every == 0)
            with r.report(state, step):
                if evaluating:
                    results = evaluate_all(r, state, sets, config, tokenizer)
                    for prefix, result in results.items():
                        extra |= {prefix + name: v for name, v in result.metrics.items()}
                if evaluating or step.number % config.log_every == 0:
                    r.log(state, extra, step.clock, ("loss", "accuracy", "margin", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        finish(r, model, examples, sets, config, tokenizer, results)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
