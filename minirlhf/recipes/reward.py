"""Reward model: a scalar score learned from preferences (Bradley-Terry with margin).

    loss = -log sigmoid(chosen - rejected - margin) + c (chosen + rejected)^2

What is left out: classification heads of several labels, whose average is no reward.
Run it as `minirlhf reward`, `python -m minirlhf.recipes.reward`, or loop over `reward(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import interrupt, memory, optim, pretrained, streams
from minirlhf.checkpoint import TrainState
from minirlhf.config import setting
from minirlhf.data import Pair, load_pairs
from minirlhf.errors import OK, STOPPED, UserError, printable, run
from minirlhf.generation import pad_right
from minirlhf.heads import RewardModel, initialize_score
from minirlhf.lora import add_lora, merge_lora
from minirlhf.losses import bradley_terry_loss, preference_accuracy
from minirlhf.machine import free_memory, process_bytes
from minirlhf.meters import Step
from minirlhf.run import Run, named_files
from minirlhf.sieve import Report, RowPolicy
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.transformer import ModelConfig


@dataclass(frozen=True)
class RewardConfig:
    """Settings of a run; `reward` reads those from `epochs` to `center_rewards_coefficient`."""

    model: str = setting(
        "", "language model (or reward model) to start from", metavar="FOLDER", required=True
    )
    data: str = setting(
        "", "preference pairs: JSON lines, JSON or CSV, also .gz", metavar="FILE", required=True
    )
    out: str = setting("", "folder of the run", metavar="DIR", required=True)
    eval_data: tuple[str, ...] = setting((), "held-out pairs, several as NAME=FILE", metavar="FILE")
    eval_every: int = setting(0, "steps between evaluations; 0: at the end only", at_least=0)
    show_samples: int = setting(4, "held-out pairs shown with their scores; -1: all", at_least=-1)
    epochs: float = setting(1.0, "passes over the data", above=0)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = setting(16, "pairs in an optimizer step", at_least=1)
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
    center_rewards_coefficient: float = setting(
        0.0, "weight of (chosen + rejected)^2, which centres the scores; 0.01 is usual", at_least=0
    )
    lora_rank: int = setting(
        0, "train adapters of this rank and the head; 0: all", at_least=0, at_most=4096
    )
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    gradient_checkpointing: bool = setting(
        False, "less memory for a forward pass more in each update"
    )
    max_length: int = setting(1024, "tokens of the longest row", at_least=2)
    overlong: str = setting(
        "drop", "what happens to longer rows",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"),
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
    dtype: str = setting("auto", "of weights and compute", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    seed: int = setting(0, "of data order and the new head")
    log_every: int = setting(10, "steps between lines of the log", at_least=1)
    save_every: int = setting(100, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")
    allow_data_change: bool = setting(False, "resume although data files have changed")


class PairBatch(NamedTuple):
    tokens: Tensor  # (2N, T) int64: N chosen rows, then N rejected rows
    lengths: Tensor  # (2N,)
    margin: Tensor  # (N,) float32


def collate_pairs(pairs: list[Pair]) -> PairBatch:
    """Both sides in one batch, so that one forward pass scores them alike."""
    rows = [p.prompt_ids + p.chosen_ids for p in pairs]
    rows += [p.prompt_ids + p.rejected_ids for p in pairs]
    lengths = torch.tensor([len(row) for row in rows])
    return PairBatch(pad_right(rows), lengths, torch.tensor([p.margin for p in pairs]))


def pair_lengths(pairs: list[Pair]) -> Tensor:
    """(N,) tokens of the longer side of each pair."""
    longer = [max(len(p.chosen_ids), len(p.rejected_ids)) + len(p.prompt_ids) for p in pairs]
    return torch.tensor(longer)


def count_tokens(pair: Pair) -> int:
    """Tokens of both sides, the prompt in each."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def pair_scores(model: RewardModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected side, (N,) each."""
    device = model.score.weight.device
    scores = model(batch.tokens.to(device), batch.lengths.to(device))  # (2N,)
    return scores.chunk(2)


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """Bradley-Terry loss, and what holds the scores' free constant near 0. (N,) each -> (N,)."""
    loss = bradley_terry_loss(chosen, rejected, margin)
    return loss + center * (chosen + rejected).square() if center else loss  # 0 x inf is nan


def score_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """What the scores of N pairs, (N,) each, say without their margins.

    Returns:
        accuracy (strict), accuracy_half (a tie counts half), ties: fractions of N; margin and
        margin_std: mean and population standard deviation of chosen - rejected; min_reward,
        mean_reward, max_reward: over both sides.
    """
    accuracy = preference_accuracy(chosen, rejected)
    both, margin = torch.cat((chosen, rejected)).double(), chosen.double() - rejected.double()
    values = {
        "margin": margin.mean(), "margin_std": margin.std(correction=0),
        "min_reward": both.min(), "mean_reward": both.mean(), "max_reward": both.max(),
    }  # fmt: skip
    values = {name: float(value) for name, value in values.items()}
    strict, ties, half = accuracy
    return {"accuracy": strict, "accuracy_half": half, "ties": ties} | values


def total_steps(config: RewardConfig, pairs: int) -> int:
    """Optimizer steps of the whole run: the exact horizon of the learning rate."""
    exact = config.epochs * ceil(pairs / config.batch_size)
    return config.steps or ceil(round(exact, 6))  # 1.1 * 10 is 11.000000000000002


def accumulate(
    model: RewardModel,
    pairs: list[Pair],
    config: RewardConfig,
    collate: Callable[[list[Pair]], PairBatch],
    where: str,
) -> dict[str, float]:
    """Gradient of the mean loss over the pairs of a batch, in micro-batches.

    Returns:
        loss, grad_norm before clipping, and `score_metrics`.
    """
    total, scores = 0.0, []
    for part in optim.cut_by_tokens(
        pair_lengths(pairs), len(pairs), config.micro_batch_tokens // 2
    ):
        here = [pairs[i] for i in part.tolist()]
        batch = collate(here)
        chosen, rejected = pair_scores(model, batch)
        margin = batch.margin.to(chosen)
        loss = pair_loss(chosen, rejected, margin, config.center_rewards_coefficient)
        loss = loss.sum() / len(pairs)
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(p.where for p in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        total += value
        scores.append(torch.stack((chosen, rejected)).detach())
    metrics = {"loss": total} | score_metrics(*torch.cat(scores, 1))
    optim.check_finite(where, metrics)
    return metrics | {"grad_norm": optim.clip_gradients(model, config.max_grad_norm, where)}


def reward(
    state: TrainState,
    pairs: list[Pair],
    config: RewardConfig,
    collate: Callable[[list[Pair]], PairBatch] = collate_pairs,
) -> Iterator[Step]:
    """Trains state.model, a RewardModel; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        pairs: N preference pairs.
        config: only its training settings are read.
        collate: pairs -> PairBatch.
    Raises:
        UserError: a number is not finite (exit code 3); the step changed nothing.
    """
    if not pairs:
        raise ValueError("pairs is empty: give at least one")
    model, N = state.model, len(pairs)
    lengths, per_epoch = pair_lengths(pairs), ceil(N / config.batch_size)
    steps = total_steps(config, N)
    epoch_of, batches = -1, []
    while state.step < steps:
        started = time.perf_counter()
        epoch, position = divmod(state.step, per_epoch)
        if epoch != epoch_of:
            batches = optim.epoch_batches(lengths, config.batch_size, config.seed, epoch)
            epoch_of = epoch
        rows = batches[position]
        rate = optim.learning_rate(
            state.step, steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)
        batch, where = [pairs[i] for i in rows.tolist()], f"step {state.step + 1}"
        metrics = optim.update_or_skip(
            state.optimizer, partial(accumulate, model, batch, config, collate, where),
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


# ------------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    chosen: Tensor  # (N,) scores
    rejected: Tensor  # (N,)


def calibration_error(chosen: Tensor, rejected: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(chosen) = sigmoid(chosen - rejected). Guo et al. 2017
    (arXiv:1706.04599), eq. 3.

        sum_b |sum_{i in b} (right_i - confidence_i)| / N,   confidence = max(P, 1 - P)

    Bins are of equal width on [1/2, 1]; right is 1 where the chosen side scores higher, 1/2 at a
    tie. 0 says that of the pairs told apart with confidence 0.9, 9 in 10 are told apart rightly.

    Args:
        chosen, rejected: (N,) scores.
    """
    probability = torch.sigmoid(chosen.double() - rejected.double())
    confidence = torch.maximum(probability, 1 - probability)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    index = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)  # (N,)
    gaps = probability.new_zeros(bins).index_add(0, index, right - confidence)
    return float(gaps.abs().sum()) / len(chosen)


@torch.no_grad()
def evaluate(
    model: RewardModel,
    pairs: list[Pair],
    micro_batch_tokens: int = 4096,
    metrics: Callable[[Tensor, Tensor, list[Pair]], dict[str, float]] | None = None,
    collate: Callable[[list[Pair]], PairBatch] = collate_pairs,
) -> Evaluation:
    """Scores held-out pairs once.

    Args:
        metrics: more of them, a function of (chosen scores (N,), rejected scores (N,), pairs).
        collate: pairs -> PairBatch, as in training.
    Returns:
        loss (Bradley-Terry with the margins), those of `score_metrics`, calibration_error; and the
        scores in the pairs' order.
    Raises:
        UserError: a score is not finite (exit code 3).
    """
    chosen, rejected = torch.zeros(2, len(pairs))
    margin = torch.zeros(len(pairs))
    for part in optim.cut_by_tokens(pair_lengths(pairs), len(pairs), micro_batch_tokens // 2):
        interrupt.check()
        batch = collate([pairs[i] for i in part.tolist()])
        chosen[part], rejected[part] = (side.float().cpu() for side in pair_scores(model, batch))
        margin[part] = batch.margin.float()
    values = {"loss": float(bradley_terry_loss(chosen, rejected, margin).mean())}
    values |= score_metrics(chosen, rejected)
    optim.check_finite("evaluation", values)
    values["calibration_error"] = calibration_error(chosen, rejected)
    if metrics is not None:
        values |= metrics(chosen, rejected, pairs)
    return Evaluation(values, chosen, rejected)


def sample_rows(
    pairs: list[Pair], result: Evaluation, tokenizer: Tokenizer | None, count: int
) -> list[dict]:
    """The first `count` pairs (-1: all) with both scores and P(chosen > rejected).

    Without a tokenizer the texts are their ids.
    """
    rows = []
    for i, pair in enumerate(pairs[: len(pairs) if count < 0 else count]):
        ids = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
        texts = {name: tokenizer.decode(v) if tokenizer else v for name, v in ids.items()}
        chosen, rejected = float(result.chosen[i]), float(result.rejected[i])
        rows.append(texts | {
            "chosen_score": chosen, "rejected_score": rejected, "margin": pair.margin,
            "probability": float(torch.sigmoid(result.chosen[i] - result.rejected[i])),
            "chosen_tokens": len(pair.prompt_ids) + len(pair.chosen_ids),
            "rejected_tokens": len(pair.prompt_ids) + len(pair.rejected_ids),
        })  # fmt: skip
    return rows


def sample_table(rows: list[dict]) -> str:
    """`sample_rows` for a console; the answers only, since both have the same prompt."""
    lines = [f"  {'chosen':<36}  {'rejected':<36}  {'scores':>15}  margin  P(chosen)  tokens"]
    for row in rows:
        chosen, rejected = (printable(row[side], 36) for side in ("chosen", "rejected"))
        scores = f"{row['chosen_score']:>7.3f} {row['rejected_score']:>7.3f}"
        sizes = f"{row['chosen_tokens']}/{row['rejected_tokens']}"
        lines.append(
            f"  {chosen:<36}  {rejected:<36}  {scores}  {row['margin']:>6.3g}  "
            f"{row['probability']:>9.3f}  {sizes}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------- the command line


def load(
    config: RewardConfig, path: str, tokenizer: Tokenizer, model: ModelConfig, before_eos: bool
) -> tuple[list[Pair], Report]:
    """Pairs of a file, without eos for a model that is read before it; its report, printed."""
    pairs, report = load_pairs(
        path, tokenizer, config.max_length, config.overlong, policy=RowPolicy.of(config),
        finish=partial(without_eos, eos_ids=tokenizer.eos_ids) if before_eos else None,
    )  # fmt: skip
    longest = int(pair_lengths(pairs).max())
    most = model.longest_row
    if longest > most:
        what = f"a row of {longest} tokens, the model reads {most}"
        raise UserError(path, what, f"give --max-length {most}")
    print(report)
    return pairs, report


def without_eos(pair: Pair, eos_ids: tuple[int, ...]) -> Pair:
    sides = pair.chosen_ids, pair.rejected_ids
    chosen, rejected = (ids[:-1] if ids[-1] in eos_ids else ids for ids in sides)
    if not (pair.prompt_ids or (chosen and rejected)):
        raise UserError(pair.where, "a text of nothing but eos", "remove the row")
    return replace(pair, chosen_ids=chosen, rejected_ids=rejected)


def load_start(
    config: RewardConfig, before_eos: bool, device: str, dtype: torch.dtype
) -> RewardModel:
    """The reward model of --model, or its language model under a new head."""
    folder = pretrained.resolve(config.model)
    if pretrained.has_tensor(pretrained.tensor_files(folder), "score.weight"):
        model = pretrained.load_reward_model(folder, dtype)
    else:
        model = RewardModel(pretrained.load_pretrained(folder, dtype))
        initialize_score(model, streams.generator(config.seed, "reward head"))
    model.read_before_eos = before_eos
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
    model.model.checkpointing = config.gradient_checkpointing
    return model.to(device)


def write_model(model: RewardModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder that transformers loads to the same scores: all its files name one pad token."""
    pad = None if model.read_before_eos else tokenizer.spare_pad_token()
    if pad is None and tokenizer.eos_ids:
        eos = tokenizer.eos_ids[0]
        pad = tokenizer.decode([eos], skip_special=False), eos
    token, pad_id = pad or (None, None)
    pretrained.save_pretrained(model, folder, pad_id)
    tokenizer.save(folder, token)


def evaluate_all(
    r: Run,
    state: TrainState,
    sets: dict[str, list[Pair]],
    config: RewardConfig,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Every held-out set, with its table of pairs; the metrics under their prefixes."""
    metrics = {}
    for prefix, held_out in sets.items():
        result = evaluate(state.model, held_out, config.micro_batch_tokens)
        rows = sample_rows(held_out, result, tokenizer, config.show_samples)
        if rows:
            r.say(sample_table(rows))
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        metrics |= {prefix + name: value for name, value in result.metrics.items()}
        shown = ("accuracy", "ties", "loss", "margin", "calibration_error")
        numbers = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in shown)
        r.say(f"  {prefix.rstrip('_')}: {len(held_out):,} pairs  {numbers}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        RewardConfig, argv, "minirlhf reward", "Train a reward model on preference pairs."
    )
    device, dtype = optim.choose_device(config.device), optim.choose_dtype(config.dtype)
    torch.use_deterministic_algorithms(device == "cpu")  # cuBLAS refuses it without a setting
    torch.utils.deterministic.fill_uninitialized_memory = False
    files = {"": config.data} | named_files(config.eval_data)
    r = Run(config.out, "reward", settings.as_dict(config), config.resume, files.values())
    folder = pretrained.resolve(config.model)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    # Without a token to spare other tools pad with eos, and then read the score before it.
    before_eos = bool(model_config.source.get("read_before_eos"))
    before_eos = before_eos or tokenizer.spare_pad_token() is None
    read = {
        prefix: load(config, file, tokenizer, model_config, before_eos)
        for prefix, file in files.items()
    }
    sets = {prefix: rows for prefix, (rows, _) in read.items()}
    longest = max(int(pair_lengths(rows).max()) for rows in sets.values())
    pairs = sets.pop("")
    plan = memory.reward_plan(
        config, model_config, longest, dtype, process_bytes(device),
        max(map(len, sets.values()), default=0),
    )  # fmt: skip
    print(plan)
    fits = memory.verdict(plan, free_memory(device))
    model = load_start(config, before_eos, device, dtype)
    optimizer = optim.make_optimizer(
        model, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    state, steps = TrainState(model, optimizer), total_steps(config, len(pairs))
    with r:
        r.list_left_out(report for _, report in read.values())
        r.facts({
            "examples": len(pairs), "epochs": f"{steps * config.batch_size / len(pairs):.2f}",
            "pairs a step": config.batch_size, "steps": steps,
            "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory": fits, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        })  # fmt: skip
        r.restore(state)
        for step in r.bar(reward(state, pairs, config), state, steps):
            last = step.number == steps
            steady = ("learning_rate", "epoch", "num_tokens", "skipped_updates")
            extra = {name: step.metrics[name] for name in steady}
            evaluating = last or (config.eval_every and step.number % config.eval_every == 0)
            with r.report(state, step):
                if evaluating:
                    extra |= evaluate_all(r, state, sets, config, tokenizer)
                if evaluating or step.number % config.log_every == 0:
                    r.log(state, extra, step.clock, ("loss", "accuracy", "margin", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        if config.lora_rank:
            merge_lora(model)
        written = r.export(lambda target: write_model(model, tokenizer, target))
        print(f"reward model in {written}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
