"""The card of a reward model: numbers by hand, and a page that a stranger's text cannot break."""

import json
import math

import pytest
import torch

from minirlhf.evaluation.card import (
    Longer,
    accuracy_by,
    card_files,
    describe,
    escaped,
    longer_wins,
    worst_pairs,
)
from minirlhf.evaluation.reward import Evaluation, evaluate_preferences
from tests.tiny_reward import LISTS, PAIRS, pair, scored_by_last_token, tiny_model


def close(expected, **more):
    return pytest.approx(expected, rel=0, abs=1e-6, **more)


def test_accuracy_by_puts_as_many_pairs_in_each_bucket():
    values = torch.tensor([7, 1, 5, 3, 2, 8, 6, 4])
    right = values >= 4
    found = accuracy_by(values, right)
    assert [bucket[:4] for bucket in found] == [
        (1, 2, 2, 0.0), (3, 4, 2, 0.5), (5, 6, 2, 1.0), (7, 8, 2, 1.0),
    ]
    # half of n are right: 1/2 ± z / (2 sqrt(n + z²)) = 1/2 ± 1.959964 / (2 · sqrt 5.841459)
    assert found[1].accuracy_95 == close((0.094531, 0.905469))


def test_accuracy_by_keeps_equal_values_together():
    right = torch.tensor([True, False, True, True])
    zeros = accuracy_by(torch.zeros(4), right)
    assert [bucket[:4] for bucket in zeros] == [(0, 0, 4, 0.75)]
    # sorted 0 0 0 9: cuts at 0, 0 and 9
    assert [b[:4] for b in accuracy_by(torch.tensor([0, 9, 0, 0]), right)] == [
        (0, 0, 3, 1.0), (9, 9, 1, 0.0),
    ]
    assert accuracy_by(torch.tensor([3.0]), torch.tensor([True]))[0][:4] == (3, 3, 1, 1.0)


def test_longer_wins_by_hand():
    longer_by, gap = torch.tensor([2, 1, -3, -1, 0]), torch.tensor([0.5, -1.0, -2.0, 0.0, 9.0])
    # of 4 pairs of different lengths chosen is longer in 2; the longer one scores higher in the
    # first (chosen) and the third (rejected), and not in a tie
    assert longer_wins(longer_by, gap) == Longer(4, 0.5, 0.5)
    assert longer_wins(torch.zeros(2), torch.ones(2)) == Longer(0, None, None)


def test_worst_pairs_are_mistakes_only_the_most_confident_first():
    chosen, rejected = torch.tensor([1.0, 5, 2, 0, 3]), torch.tensor([2.0, 1, 6, 0, 4])
    assert worst_pairs(chosen, rejected) == [2, 0, 4]  # by 4, 1 and 1; the tie is no mistake
    assert worst_pairs(chosen, rejected, 1) == [2]


def by_last_token(examples) -> Evaluation:
    return evaluate_preferences(scored_by_last_token(tiny_model()), examples)


def test_describe_pairs_by_hand():
    # scores (5, 6) (8, 1) (4, 1) (1, 2) (7, 5), margins .5 0 1.5 .25 0
    card = describe(by_last_token(PAIRS), None)
    assert (card["pairs"], card["texts"], card["accuracy"]) == (5, 10, 0.6)
    # z² = 3.841459: (.6 + .384146 ± 1.959964 sqrt(.24 / 5 + .038415)) / 1.768292
    #   = (.984146 ± .576158) / 1.768292
    assert card["accuracy_95"] == close((0.230724, 0.882379))
    # sorted margins 0 0 .25 .5 1.5, cuts at elements 1, 2 and 3
    assert [(b["low"], b["pairs"], b["accuracy"]) for b in card["by_margin"]] == [
        (0.0, 2, 1.0), (0.25, 1, 0.0), (0.5, 2, 0.5),
    ]
    # answers of 3-1, 2-3, 1-7, 1-1 and 2-2 tokens: 2 -1 -6 0 0, cuts at -1, 0 and 0
    assert [(b["low"], b["pairs"], b["accuracy"]) for b in card["by_length_difference"]] == [
        (-6.0, 1, 1.0), (-1.0, 1, 1.0), (0.0, 3, 1 / 3),
    ]
    # the longer one is chosen in the first of three pairs; it never scores higher
    assert card["longer"] == {"pairs": 3, "in_data": close(1 / 3), "in_scores": 0.0}
    assert sum(row["pairs"] for row in card["calibration"]) == 5
    keys = ("where", "chosen_score", "rejected_score")
    worst = [tuple(row[key] for key in keys) for row in card["worst"]]
    assert worst == [("t:1", 5.0, 6.0), ("t:4", 1.0, 2.0)]
    assert card["worst"][0]["probability"] == close(1 / (1 + math.e))


def test_describe_correlates_each_text_once():
    # lengths 4, 2, 3 of LISTS[1:]: texts of 3 2 2 and 4 2 tokens score 2 8 6 and 7 6
    card = describe(by_last_token(LISTS[1:]), None)
    lengths, scores = [3, 2, 2, 4, 2], [2, 8, 6, 7, 6]
    mean = (13 / 5, 29 / 5)
    products = [(a - mean[0]) * (b - mean[1]) for a, b in zip(lengths, scores, strict=True)]
    spread = [sum((v - m) ** 2 for v in values)
              for values, m in ((lengths, mean[0]), (scores, mean[1]))]
    assert card["length_score_pearson"] == close(sum(products) / math.sqrt(math.prod(spread)))
    assert (card["pairs"], card["texts"], card["top1"]) == (3, 5, 0.5)


def hostile() -> Evaluation:
    where = "some/secret/folder/d|.jsonl:7"
    pairs = [pair([1], ["x"], ["y"], where=where)]
    metrics = evaluate_preferences(tiny_model(), PAIRS).metrics
    zero, one = torch.tensor([0.0]), torch.tensor([1.0])
    return Evaluation(metrics, pairs, zero, one, torch.cat((zero, one)), torch.tensor([2, 2]))


class Stranger:
    """A tokenizer all of whose texts want to run, to format, or to leave their cell."""

    def decode(self, ids):
        return "<script>alert(1)</script> | **bold** `x` [a](b)\n# title \x1b[31m" + "y" * 2000


def test_card_escapes_texts_and_names_no_folder():
    files = card_files({"heads": 1, "lcb_coef": 0.0}, {"eval": hostile()}, Stranger())
    page = files["card.md"]
    (line,) = [line for line in page.splitlines() if "alert" in line]
    assert "<script" not in page and "\x1b" not in page and "secret" not in "".join(files.values())
    assert line.startswith(r"| d\|\.jsonl:7 | &lt;script&gt;alert\(1\)&lt;/script&gt; \| \*\*bold")
    assert line.count(" | ") == 7 and len(line) < 900
    (row,) = json.loads(files["card.json"])["sets"]["eval"]["worst"]
    assert len(row["chosen"]) == 1000 and "\x1b" not in row["chosen"]


def test_escaped_leaves_letters_alone():
    assert escaped("Héllo, wörld? 1 & 2") == "Héllo, wörld? 1 &amp; 2"
    assert escaped("a\\|b") == r"a\\\|b"
    assert escaped("x" * 200) == "x" * 159 + "…"


def test_card_page_says_what_the_numbers_are():
    facts = {"heads": 3, "lcb_coef": 0.5, "normalized": {"over": "eval", "mean": 2.0, "std": 4.0},
             "data": [{"file": "pairs_a.jsonl", "sha256": "0123456789abcdef" * 4}],
             "settings": {"steps": 3, "schedule": "linear", "learning_rate": 3e-5, "seed": None}}
    result = by_last_token(PAIRS)
    files = card_files(facts, {"eval": result, "eval_x": by_last_token(LISTS)}, None)
    page = files["card.md"]
    for line in (
        "- heads: 3\n- lcb_coef: 0.5\n- normalized: over eval, mean 2, std 4",
        r"- data: file pairs\_a\.jsonl, sha256 0123456789abcdef",
        "- settings: steps 3, schedule linear, learning_rate 3e-05, seed none", "## eval",
        r"## eval\_x", "| accuracy | 0.6 |", "| accuracy, 95% interval | 0.2307 to 0.8824 |",
        "| top1 | 0.6667 |", "| -6 | -6 | 1 | 1 | 0.2065 to 1 |",
        "| low | high | pairs | confidence | accuracy |\n| --- | --- | --- | --- | --- |\n",
        "| 0.85 | 0.9 | 1 | 0.8808 | 1 |",
    ):
        assert line in page, line
    card = json.loads(files["card.json"])
    assert card["model"] == facts and card["sets"].keys() == {"eval", "eval_x"}
    assert card["sets"]["eval"]["calibration_error"] == result.metrics["calibration_error"]
    assert card_files(facts, {"eval": result}, None) == card_files(facts, {"eval": result}, None)


def test_card_of_a_model_without_mistakes_or_spread():
    pairs = [pair([1], [9], [2])]
    files = card_files({"heads": 1, "lcb_coef": 0.0}, {"eval": by_last_token(pairs)}, None)
    assert files["card.md"].endswith("Its most confident mistakes:\n\nnone\n")
    assert "| pairs | in data | in scores |\n| --- | --- | --- |\n| 0 | none |" in files["card.md"]
    assert "| length score pearson | none |" in files["card.md"]
    assert json.loads(files["card.json"])["sets"]["eval"]["length_score_pearson"] is None
