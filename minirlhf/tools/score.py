"""Scores of texts, preference pairs or ranked lists: `minirlhf score --model FOLDER --data FILE`.

The columns of a file say which of them it holds; the output of `minirlhf sample` is texts. One JSON
line a row goes to --out or to stdout, a summary and everything else to stderr.
"""

import sys
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from minirlhf.batches.preferences import (
    Example,
    collate,
    count_texts,
    kind_of,
    texts_of,
    without_unread,
)
from minirlhf.data.encoding import read_part
from minirlhf.data.examples import Pair, Text, load_texts
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import NON_FINITE, OK, UserError, run
from minirlhf.evaluation.reward import calibration_error, ordered_scores, preference_metrics
from minirlhf.files import folders
from minirlhf.files.sieve import RowPolicy
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, reads_whole
from minirlhf.recipes.reward import SHOWN
from minirlhf.rewards.model import score_texts, scores_read
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.setup.common import check_base
from minirlhf.tools.check.rows import recipe_of
from minirlhf.tools.sample import json_lines
from minirlhf.tools.settings import ScoreConfig


def text_rows(
    model: RewardModel, texts: list[Text], micro_batch_tokens: int
) -> tuple[list[dict], str]:
    """({where, score} of each text, summary in a line)."""
    rows = [read_part(text.ids, model.unread) or text.ids for text in texts]
    scores = score_texts(model, rows, micro_batch_tokens)
    found = [{"where": text.where, "score": score}
             for text, score in zip(texts, scores.tolist(), strict=True)]
    check_finite(found)
    std, mean = torch.std_mean(scores, correction=0)
    return found, f"{len(texts):,} texts  mean {mean:.4f}  std {std:.4f}"


def preference_rows(
    model: RewardModel, examples: list[Example], micro_batch_tokens: int
) -> tuple[list[dict], str]:
    """({where, chosen_score, rejected_score} of each pair or {where, scores, ranks} of each ranked
    list, summary in a line).

    The summary of lists has the metrics that the reward recipe shows of held-out lists; the loss is
    that of the whole order.
    """
    if model.unread is not None:
        examples = [without_unread(example, model.unread) for example in examples]
    texts = [text for example in examples for text in texts_of(example)]
    flat = score_texts(model, texts, micro_batch_tokens)
    scores = list(flat.split(count_texts(examples).tolist()))
    rows = [_preference_row(example, each) for example, each in zip(examples, scores, strict=True)]
    check_finite(rows)
    metrics, names = preference_metrics(examples, scores), ("accuracy", "ties", "margin")
    if not isinstance(examples[0], Pair):
        losses = [collate([one]).loss(each) for one, each in zip(examples, scores, strict=True)]
        metrics["loss"] = float(torch.cat(losses).mean())
        metrics["calibration_error"] = calibration_error(*ordered_scores(examples, scores))
        names = SHOWN
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
    return rows, f"{len(examples):,} {kind_of(examples)}  {shown}"


def _preference_row(example: Example, scores: Tensor) -> dict:
    values = scores.tolist()
    if isinstance(example, Pair):
        return {"where": example.where, "chosen_score": values[0], "rejected_score": values[1]}
    return {"where": example.where, "scores": values, "ranks": example.ranks}


def check_finite(rows: list[dict]) -> None:
    """Refuses rows in which a score is not finite."""
    for row in rows:
        found = {name: value for name, value in row.items() if name.endswith("score")}
        found |= {f"scores[{i}]": value for i, value in enumerate(row.get("scores", ()))}
        for name, value in found.items():
            if not isfinite(value):
                what = f"{name} is {value}"
                raise UserError(row["where"], what, "the weights of --model diverged", NON_FINITE)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(ScoreConfig, argv, "minirlhf score")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder = folders.resolve(config.model, base=config.base)
    check_base(config, folder)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    positions = model_config.longest_row
    most = positions if config.max_length is None else config.max_length
    if most > positions:
        legal = f"the model has {positions} positions"
        raise UserError("--max-length", f"is {most}", legal)
    policy = RowPolicy.of(config)
    preferences = recipe_of(config.data, policy) == "reward"
    read, make = partial(load_texts, imitated=False), text_rows
    if preferences:
        read, make = load_preferences, preference_rows
    whole = reads_whole(model_config.source, folder / "config.json")
    examples, report = read(
        config.data, tokenizer, most, config.overlong, policy=policy, whole=whole
    )
    print(report, file=sys.stderr)
    for line in pretrained.remarks([folder], dtype):
        print(f"warning: {line}", file=sys.stderr)
    model = pretrained.load_reward_model(folder, dtype, device)
    print(f"scores read: {scores_read(model, tokenizer)}", file=sys.stderr)
    rows, summary = make(model, examples, config.micro_batch_tokens)
    write = json_lines(config.out)
    for row in rows:
        write(row)
    print(summary, file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
