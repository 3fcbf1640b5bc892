"""Reward model: a scalar score learned from preferences (Bradley-Terry with margin).

    loss = -log sigmoid(score(chosen) - score(rejected) - margin)

What is left out: classification heads of several labels, whose average is no reward.
Run it as `minirlhf reward`, `python -m minirlhf.recipes.reward`, or loop over `reward(...)`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import optim, pretrained, streams
from minirlhf.checkpoint import TrainState
from minirlhf.config import setting
from minirlhf.data import Pair, load_pairs
from minirlhf.errors import OK, STOPPED, UserError, printable, run
from minirlhf.generation import pad_right
from minirlhf.heads import RewardModel, initialize_score
from minirlhf.lora import add_lora, merge_lora
from minirlhf.losses import bradley_terry_loss, preference_accuracy
from minirlhf.meters import Step
from minirlhf.run import Run
from minirlhf.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class RewardConfig:
    model: str = setting(help="language model (or reward model) to start from", metavar="FOLDER")
    data: str = setting(help="preference pairs: JSON lines, JSON or CSV, also .gz", metavar="FILE")
    out: str = setting(help="folder of the run", metavar="DIR")
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
    center_rewards_coefficient: float = setting(
        0.0, "weight of (chosen + rejected)^2, which centres the scores; 0.01 is usual", at_least=0
    )
    lora_rank: int = setting(0, "train adapters of this rank and the head; 0: all", at_least=0)
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    max_length: int = setting(1024, "tokens of the longest row", at_least=2)
    overlong: str = setting(
        "drop", "what happens to longer rows",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"),
    )  # fmt: skip
    dtype: str = setting("auto", "of weights and compute", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    seed: int = setting(0, "of data order and the new head")
    log_every: int = setting(10, "steps between lines of the log", at_least=1)
    save_every: int = setting(100, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")


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


def pair_scores(model: RewardModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected side, (N,) each."""
    device = model.score.weight.device
    scores = model(batch.tokens.to(device), batch.lengths.to(device))  # (2N,)
    return scores.chunk(2)


def total_steps(config: RewardConfig, pairs: int) -> int:
    """Optimizer steps of the whole run: the exact horizon of the learning rate."""
    return config.steps or ceil(config.epochs * ceil(pairs / config.batch_size))


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
    """
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
        where = f"step {state.step + 1}"
        sums = {"loss": 0.0, "accuracy": 0.0, "ties": 0.0, "margin": 0.0, "mean_reward": 0.0}
        for part in optim.cut_by_tokens(lengths[rows], len(rows), config.micro_batch_tokens // 2):
            batch = collate([pairs[i] for i in rows[part].tolist()])
            chosen, rejected = pair_scores(model, batch)
            loss = bradley_terry_loss(chosen, rejected, batch.margin.to(chosen))  # (n,)
            if config.center_rewards_coefficient:
                loss = loss + config.center_rewards_coefficient * (chosen + rejected).square()
            (loss.sum() / len(rows)).backward()
            chosen, rejected = chosen.detach(), rejected.detach()
            accuracy, share = preference_accuracy(chosen, rejected), len(part) / len(rows)
            sums["loss"] += float(loss.detach().sum()) / len(rows)
            sums["accuracy"] += float(accuracy.strict) * share
            sums["ties"] += float(accuracy.ties) * share
            sums["margin"] += float((chosen - rejected).mean()) * share
            sums["mean_reward"] += float((chosen + rejected).mean()) / 2 * share
        optim.check_finite(where, loss=sums["loss"])
        sums["grad_norm"] = optim.clip_gradients(model, config.max_grad_norm, where)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.samples += len(rows)
        state.meters.update(sums, len(rows))
        metrics = sums | {"learning_rate": rate, "epoch": state.step / per_epoch}
        yield Step(state.step, metrics, {"step_time": time.perf_counter() - started}, [])


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    chosen: Tensor  # (N,) scores
    rejected: Tensor  # (N,)


@torch.no_grad()
def evaluate(
    model: RewardModel,
    pairs: list[Pair],
    micro_batch_tokens: int = 4096,
    metrics: Callable[[Tensor, Tensor, list[Pair]], dict[str, float]] | None = None,
) -> Evaluation:
    """Scores held-out pairs once.

    Args:
        metrics: more of them, a function of (chosen scores (N,), rejected scores (N,), pairs).
    Returns:
        loss (with the margins), accuracy (strict), accuracy_half (a tie counts half), ties, margin
        (mean difference of the scores), min/mean/max_reward; and the scores in the pairs' order.
    """
    chosen, rejected = torch.zeros(2, len(pairs))
    for part in optim.cut_by_tokens(pair_lengths(pairs), len(pairs), micro_batch_tokens // 2):
        c, r = pair_scores(model, collate_pairs([pairs[i] for i in part.tolist()]))
        chosen[part], rejected[part] = c.cpu().float(), r.cpu().float()
    margin = torch.tensor([p.margin for p in pairs])
    accuracy, both = preference_accuracy(chosen, rejected), torch.cat((chosen, rejected))
    values = {
        "loss": bradley_terry_loss(chosen, rejected, margin).mean(),
        "accuracy": accuracy.strict, "accuracy_half": accuracy.half, "ties": accuracy.ties,
        "margin": (chosen - rejected).mean(),
        "min_reward": both.min(), "mean_reward": both.mean(), "max_reward": both.max(),
    }  # fmt: skip
    values = {name: float(value) for name, value in values.items()}
    return Evaluation(
        values | (metrics(chosen, rejected, pairs) if metrics else {}), chosen, rejected
    )


def sample_rows(pairs: list[Pair], result: Evaluation, tokenizer: Tokenizer | None, count: int):
    """The first `count` pairs (-1: all) with both scores and P(chosen > rejected)."""
    rows = []
    for i, pair in enumerate(pairs[: len(pairs) if count < 0 else count]):
        ids = {
            "chosen": pair.prompt_ids + pair.chosen_ids,
            "rejected": pair.prompt_ids + pair.rejected_ids,
        }
        texts = {k: tokenizer.decode(v) if tokenizer else v for k, v in ids.items()}
        c, r = float(result.chosen[i]), float(result.rejected[i])
        probability = float(torch.sigmoid(result.chosen[i] - result.rejected[i]))
        rows.append(
            texts | {"chosen_score": c, "rejected_score": r, "probability": probability,
                     "margin": pair.margin}
        )  # fmt: skip
    return rows


def print_samples(rows: list[dict]) -> None:
    print(f"  {'chosen':<44}  {'rejected':<44}  {'scores':>15}  P(chosen)")
    for row in rows:
        chosen, rejected = (printable(row[side], 44) for side in ("chosen", "rejected"))
        scores = f"{row['chosen_score']:>7.3f} {row['rejected_score']:>7.3f}"
        print(f"  {chosen:<44}  {rejected:<44}  {scores}  {row['probability']:.3f}")


def named_files(entries: tuple[str, ...]) -> dict[str, str]:
    """`FILE` or `NAME=FILE`, several -> {metric prefix: file}."""
    out = {}
    for entry in entries:
        name, _, file = entry.rpartition("=") if not Path(entry).exists() else ("", "", entry)
        prefix = f"eval_{name}_" if name else "eval_"
        if prefix in out:
            raise UserError("--eval-data", f"two sets are called {name or 'eval'!r}",
                            "name each: --eval-data short=a.jsonl long=b.jsonl")  # fmt: skip
        out[prefix] = file
    return out


def evaluate_all(r: Run, state: TrainState, sets: dict[str, list[Pair]], config, tokenizer) -> dict:
    """Every held-out set, with its table of pairs; the metrics under their prefixes."""
    metrics = {}
    for prefix, held_out in sets.items():
        result = evaluate(state.model, held_out, config.micro_batch_tokens)
        rows = sample_rows(held_out, result, tokenizer, config.show_samples)
        if rows:
            print_samples(rows)
            r.write_samples(state, [{"step": state.step, "set": prefix} | row for row in rows])
        metrics |= {prefix + name: value for name, value in result.metrics.items()}
        print(
            f"  {prefix.rstrip('_')}: {len(held_out):,} pairs  "
            + "  ".join(
                f"{n} {result.metrics[n]:.4f}" for n in ("accuracy", "ties", "loss", "margin")
            )
        )
    return metrics


def load_start(config: RewardConfig, device: str, dtype: torch.dtype) -> RewardModel:
    """The reward model of --model, or its language model under a new head."""
    files = pretrained.tensor_files(pretrained.resolve(config.model))
    if pretrained.has_tensor(files, "score.weight"):
        return pretrained.load_reward_model(config.model, dtype, device)
    lm = pretrained.load_pretrained(config.model, dtype)
    model = RewardModel(lm)
    return initialize_score(model, streams.generator(config.seed, "reward head")).to(device)


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        RewardConfig, argv, "minirlhf reward", "Train a reward model on preference pairs."
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device, dtype = optim.choose_device(config.device), optim.choose_dtype(config.dtype)
    folder = pretrained.resolve(config.model)
    pretrained.read_config(folder)
    tokenizer = load_tokenizer(folder)
    pad = tokenizer.spare_pad_token()
    pairs, report = load_pairs(config.data, tokenizer, config.max_length, config.overlong)
    print(report)
    sets = {}
    for prefix, file in named_files(config.eval_data).items():
        sets[prefix], report = load_pairs(file, tokenizer, config.max_length, config.overlong)
        print(report)
    with Run(config.out, "reward", settings.as_dict(config), config.resume) as r:
        model = load_start(config, device, dtype)
        if config.lora_rank:
            add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
        optimizer = optim.make_optimizer(
            model, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
        )
        state, steps = TrainState(model, optimizer), total_steps(config, len(pairs))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        r.facts({
            "examples": len(pairs), "epochs": f"{steps * config.batch_size / len(pairs):.2f}",
            "pairs a step": config.batch_size, "steps": steps, "trainable parameters": trainable,
            "device": device, "dtype": str(dtype).removeprefix("torch."), "seed": config.seed,
        })  # fmt: skip
        r.restore(state)
        for step in r.bar(reward(state, pairs, config), state, steps):
            last = step.number == steps
            extra = {k: step.metrics[k] for k in ("learning_rate", "epoch")}
            if last or (config.eval_every and step.number % config.eval_every == 0):
                extra |= evaluate_all(r, state, sets, config, tokenizer)
            if last or step.number % config.log_every == 0 or len(extra) > 2:
                r.log(state, extra, step.clock, ("loss", "accuracy", "margin", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        if config.lora_rank:
            merge_lora(model)

        def write(folder: Path) -> None:
            pretrained.save_pretrained(
                model, folder, tokenizer.eos_ids[0] if pad is None else pad[1]
            )
            tokenizer.save(folder, None if pad is None else pad[0])

        print(f"reward model in {r.export(write)}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
