"""What came of a demo: the curves of its last run, and held-out prompts before and after it."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean

from minirlhf.tools import curve
from minirlhf.tools.demo import film_judge
from minirlhf.tools.demo.film_data import HELD_OUT, read_rows, text_of

SHOWN = 5  # held-out prompts, as text
SAMPLED = "gold reward"  # not in the log: of what was sampled
LOGGED = {  # title of a column: name in metrics.jsonl
    "ppo": {"step": "step", "learned reward": "objective/scores", SAMPLED: "",
            "KL, nats": "objective/kl", "tokens": "response_length"},
    "grpo": {"step": "step", "learned reward": "reward", SAMPLED: "",
             "KL, nats": "objective/kl", "tokens": "completions/mean_length"},
    "dpo": {"step": "step", "accuracy": "rewards/accuracies", "margin": "rewards/margins",
            "chosen": "rewards/chosen", "rejected": "rewards/rejected"},
}
DIGITS = {"step": 0, "tokens": 1}  # after the point; of other columns 2

Curves = dict[str, list[float]]  # title of a column -> its means since the line of the log before


def curves_of(folder: Path) -> Curves:
    """Of a run's log.

    DPO samples nothing. It passes over the pairs once and measures each before it learns from it:
    its curves are those of pairs not seen before.
    """
    lines = read_rows(folder / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    return {
        title: gold_means(folder, steps) if title == SAMPLED else [line[name] for line in lines]
        for title, name in LOGGED[folder.name].items()
    }


def gold_means(folder: Path, steps: list[int]) -> list[float]:
    """Mean gold reward, in standard deviations of the world's reviews, up to each of the steps."""
    gold: dict[int, list[float]] = {}
    for row in read_rows(folder / "samples.jsonl"):
        if row["kind"] == "rollout":
            gold.setdefault(row["step"], []).append(film_judge.gold_score(text_of(row)))
    spans = [range(last + 1, step + 1) for last, step in pairwise([0, *steps])]
    return [fmean(score for step in span for score in gold[step]) for span in spans]


def show_curves(curves: Curves) -> None:
    """As a table."""
    print("\n" + "".join(f"{title:>{len(title) + 2}}" for title in curves))
    for row in zip(*curves.values(), strict=True):
        cells = zip(curves, row, strict=True)
        print("".join(f"{x:>{len(title) + 2}.{DIGITS.get(title, 2)}f}" for title, x in cells))


def picture(algorithm: str, curves: Curves) -> str:
    """The same as SVG."""
    if algorithm == "dpo":
        panels = [
            curve.Panel("share of pairs ordered as the rater did", {"pairs": curves["accuracy"]}),
            curve.Panel("reward of the responses: beta · log(policy / first model)",
                        {name: curves[name] for name in ("chosen", "rejected")}),
        ]
    else:
        rewards = {name: curves[f"{name} reward"] for name in ("learned", "gold")}
        panels = [
            curve.Panel("reward of the sampled reviews", rewards),
            curve.Panel("KL to the first model, nats a response", {"KL": curves["KL, nats"]}),
        ]
    return curve.draw(f"{algorithm.upper()} step", curves["step"], panels)


def compare(before: Path, after: Path) -> None:
    """The same held-out prompts, answered by both models."""
    answers = {"before": read_rows(before), "after": read_rows(after)}
    for rows in zip(*[answers[name][:SHOWN] for name in answers], strict=True):
        print(f"\n{rows[0]['prompt']} …")
        for name, row in zip(answers, rows, strict=True):
            gold = film_judge.gold_score(text_of(row))
            print(f"  {name:<6} (gold {gold:>5.2f}) …{row['response']}")
    print(f"\nOn {HELD_OUT} held-out prompts:")
    print(f"{'':<8}{'gold reward':>12}{'fluency':>9}{'different answers':>19}")
    for name, rows in answers.items():
        texts = [text_of(row) for row in rows]
        gold = fmean(map(film_judge.gold_score, texts))
        fluency = fmean(map(film_judge.fluency, texts))
        different = len({row["response"] for row in rows})
        print(f"{name:<8}{gold:>12.2f}{fluency:>9.0%}{different:>19}")
