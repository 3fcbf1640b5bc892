"""Scores of texts or of preference pairs: `minirlhf score --model FOLDER --data FILE`.

Which of the two a file holds is told by its columns; the output of `minirlhf sample` is texts. One
JSON line a row goes to stdout or to --out, a summary and all else to stderr.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf import config as settings
from minirlhf import optim, pretrained
from minirlhf.config import setting
from minirlhf.data import Pair, Text, load_pairs, load_texts
from minirlhf.errors import NON_FINITE, OK, UserError, run
from minirlhf.formats import pair_format
from minirlhf.generation import pad_right
from minirlhf.heads import RewardModel
from minirlhf.preferences import score_metrics, without_eos
from minirlhf.rows import read_rows
from minirlhf.tokenizer import load_tokenizer
from minirlhf.tools.sample import check_new, json_lines


@dataclass(frozen=True)
class ScoreConfig:
    model: str = setting(help="reward model", metavar="FOLDER")
    data: str = setting(help="pairs, texts, or prompts with answers, also .gz", metavar="FILE")
    out: str | None = setting(None, "new file for the lines; none: stdout", metavar="FILE")
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    max_length: int | None = setting(
        None, "tokens of the longest row; none: what the model has room for", at_least=2
    )
    overlong: str = setting(
        "error", "what happens to longer rows",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"),
    )  # fmt: skip
    dtype: str = setting("auto", "of weights and compute", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")

    def check(self) -> list[str]:
        return check_new(self.out)


def holds_pairs(path: str) -> bool:
    """Whether a file's first row is a preference pair."""
    try:
        pair_format(next(read_rows(path)))
    except UserError:
        return False
    return True


@torch.no_grad()
def score_texts(
    model: RewardModel, rows: list[list[int]], micro_batch_tokens: int = 4096
) -> Tensor:
    """(N,) float32 scores of N texts, in their order, on the CPU."""
    device, lengths = model.score.weight.device, torch.tensor([len(row) for row in rows])
    scores = torch.zeros(len(rows))
    for part in optim.cut_by_tokens(lengths, len(rows), micro_batch_tokens):
        tokens = pad_right([rows[i] for i in part.tolist()])
        scores[part] = model(tokens.to(device), lengths[part].to(device)).cpu().float()
    return scores


def text_rows(
    model: RewardModel, texts: list[Text], eos_ids: Sequence[int], micro_batch_tokens: int
) -> tuple[list[dict], str]:
    """One {where, score} a text, and the summary.

    Texts that sampling cut by length have no end, so they are scored without eos, as in training.
    """
    rows = []
    for text in texts:
        open_end = model.read_before_eos or text.columns.get("finish_reason") == "length"
        ends = open_end and len(text.ids) > 1 and text.ids[-1] in eos_ids
        rows.append(text.ids[:-1] if ends else text.ids)
    scores = score_texts(model, rows, micro_batch_tokens)
    std, mean = torch.std_mean(scores, correction=0)
    summary = f"{len(texts):,} texts  mean {mean:.4f}  std {std:.4f}"
    pairs = zip(texts, scores.tolist(), strict=True)
    return [{"where": text.where, "score": score} for text, score in pairs], summary


def pair_rows(
    model: RewardModel, pairs: list[Pair], eos_ids: Sequence[int], micro_batch_tokens: int
) -> tuple[list[dict], str]:
    """One {where, chosen_score, rejected_score} a pair, and the summary."""
    if model.read_before_eos:
        pairs = [without_eos(pair, eos_ids) for pair in pairs]
    sides = [p.prompt_ids + p.chosen_ids for p in pairs]
    sides += [p.prompt_ids + p.rejected_ids for p in pairs]
    chosen, rejected = score_texts(model, sides, micro_batch_tokens).chunk(2)
    metrics = score_metrics(chosen, rejected)
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("accuracy", "ties", "margin"))
    scores = zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    rows = [{"where": p.where, "chosen_score": c, "rejected_score": r} for p, c, r in scores]
    return rows, f"{len(pairs):,} pairs  {shown}"


def check_finite(rows: list[dict]) -> None:
    for row in rows:
        for name, value in row.items():
            if name != "where" and not -float("inf") < value < float("inf"):
                what = f"{name} is {value}"
                raise UserError(row["where"], what, "the weights of --model diverged", NON_FINITE)


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        ScoreConfig, argv, "minirlhf score", "Score texts or preference pairs with a reward model."
    )
    device, dtype = optim.choose_device(config.device), optim.choose_dtype(config.dtype)
    folder = pretrained.resolve(config.model)
    tokenizer, positions = load_tokenizer(folder), pretrained.read_config(folder).longest_row
    most = positions if config.max_length is None else config.max_length
    if most > positions:
        legal = f"the model has {positions} positions"
        raise UserError("--max-length", f"is {most}", legal)
    read, make = (load_pairs, pair_rows) if holds_pairs(config.data) else (load_texts, text_rows)
    examples, report = read(config.data, tokenizer, most, config.overlong)
    print(report, file=sys.stderr)
    model = pretrained.load_reward_model(folder, dtype, device)
    rows, summary = make(model, examples, tokenizer.eos_ids, config.micro_batch_tokens)
    check_finite(rows)
    with json_lines(config.out) as write:
        for row in rows:
            write(row)
    print(summary, file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
