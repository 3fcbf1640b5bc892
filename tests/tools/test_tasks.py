"""`minirlhf tasks`: problems with exact answers, the same everywhere, none in both files."""

import hashlib
import json
import re
from collections import Counter
from itertools import islice

import pytest

from minirlhf.cli import main
from minirlhf.data.formats import prompt_format
from minirlhf.errors import UserError
from minirlhf.files import atomic
from minirlhf.files.rows import Row
from minirlhf.rewards.verifiers import exact_reward, math_reward
from minirlhf.tools.settings import TASKS, TasksConfig
from minirlhf.tools.tasks import WORDS, arithmetic, distinct_numbers, formatted, pair, rows, words
from tests.tiny_folders import read_lines


def made(kind: str, **settings) -> list[dict]:
    return list(rows(TasksConfig(kind=kind, out="o", **settings)))


def test_pair_counts_each_two_numbers_once():
    assert [pair(i) for i in range(6)] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert pair(10**16 * (10**16 + 1) // 2 - 1) == (10**16 - 1, 10**16 - 1)  # past float's digits


def test_problems_of_arithmetic():
    # pairs 3 and 4 are (2, 0) and (2, 1); a sum of an odd number has the smaller number first
    say = "What is {}? Answer with the number alone.".format
    add, subtract, multiply = (arithmetic(name, 1) for name in TASKS["arithmetic"])
    assert [add.make(i) for i in (3, 4)] == [(say("0 + 2"), "2"), (say("2 + 1"), "3")]
    assert subtract.make(4) == (say("2 - 1"), "1")
    assert multiply.make(42) == (say("4 * 2"), "8")
    # 10 numbers: 10 * 11 / 2 pairs; of two digits 100 * 101 / 2, and 100 * 10 products
    assert [task.count for task in (add, subtract, multiply)] == [55, 55, 100]
    assert [arithmetic(n, 2).count for n in TASKS["arithmetic"]] == [5050, 5050, 1000]


def test_problems_of_words():
    # number 0 takes the first word that is left, again and again
    assert WORDS[:3] == ["anchor", "apple", "basket"] and len(set(WORDS)) == len(WORDS)
    count = len(WORDS) * (len(WORDS) - 1) * (len(WORDS) - 2)
    tasks = {name: words(name, 3) for name in TASKS["words"]}
    assert {name: task.count for name, task in tasks.items()} == {
        "sort": count, "reverse": count, "last": count, "count": 5 * count,
    }
    shown = "anchor, apple, basket"
    assert tasks["sort"].make(0)[1] == shown and shown in tasks["sort"].make(0)[0]
    # number 1 takes the second word, then the first two of those that are left
    assert "apple, anchor, basket" in tasks["sort"].make(1)[0]
    assert tasks["sort"].make(1)[1] == shown
    assert tasks["reverse"].make(0)[1] == "basket, apple, anchor"
    assert tasks["last"].make(0)[1] == "ret"
    # the vowels take turns: a in anchor apple basket, e in them
    assert [tasks["count"].make(i)[1] for i in (0, 1)] == ["3", "2"]
    assert 'letter "e" appear in these words: anchor, apple' in tasks["count"].make(1)[0]


def test_problems_of_format():
    forms = {name: formatted(name, 1).make(4) for name in TASKS["format"]}  # 2 + 1
    assert {name: answer for name, (_, answer) in forms.items()} == {
        "tags": "<answer>3</answer>", "boxed": r"\boxed{3}", "json": '{"answer": 3}',
        "sentence": "The answer is 3.",
    }
    told = "What is 2 + 1? Answer in exactly this form: <answer>NUMBER</answer>"
    assert forms["tags"][0] == told


def test_distinct_numbers_are_each_of_them_once():
    found = list(distinct_numbers(0, "add", 3000))
    assert sorted(found) == list(range(3000)) and found != sorted(found)
    assert list(islice(distinct_numbers(0, "add", 3000), 9)) == found[:9]
    for other in (distinct_numbers(1, "add", 3000), distinct_numbers(0, "sort", 3000)):
        assert list(islice(other, 9)) != found[:9]


@pytest.mark.parametrize("kind", TASKS)
def test_rows_are_distinct_take_turns_and_do_not_depend_on_how_many(kind):
    found = made(kind, n=300, held_out=60)
    assert len(found) == len({row["prompt"][0]["content"] for row in found}) == 360
    size = len(TASKS[kind])
    assert Counter(row["task"] for row in found[: 12 * size]) == dict.fromkeys(TASKS[kind], 12)
    assert made(kind, n=100, held_out=60) == found[:160]
    assert made(kind, n=100, held_out=60, seed=1)[:20] != found[:20]
    only = made(kind, n=20, held_out=5, only=TASKS[kind][:1])
    assert {row["task"] for row in only} == {TASKS[kind][0]}
    form = prompt_format(Row("f:1", found[0]))
    assert form.used == ("prompt",) and "messages" in form.detected


def test_no_sum_is_there_twice_with_its_numbers_in_another_order():
    found = made("arithmetic", digits=1, only=("add",), n=45, held_out=10)  # all 55
    pairs = [re.findall("[0-9]+", row["prompt"][0]["content"]) for row in found]
    assert len({frozenset(Counter(pair).items()) for pair in pairs}) == 55
    assert len({a > b for a, b in pairs if a != b}) == 2  # neither number is always the larger one


def test_rules_accept_every_answer():
    for kind, many in (("arithmetic", 1), ("format", 1), ("words", 0)):
        found = made(kind, n=40, held_out=8)
        answers = [row["answer"] for row in found]
        assert exact_reward(answers, answers) == [1] * 48
        if many:
            assert math_reward(answers, answers) == [1] * 48
    counts = [row["answer"] for row in made("words", n=9, held_out=1, only=("count",))]
    assert math_reward(counts, counts) == [1] * 10


def test_the_files_are_the_same_everywhere(tmp_path, capsys):
    assert main(["tasks", "arithmetic", "--n", "50", "--out", str(tmp_path / "t")]) == 0
    shown = capsys.readouterr().out
    assert "t/train.jsonl: 50 problems, as {" in shown and "t/eval.jsonl: 200 problems" in shown
    train, held_out = (read_lines(tmp_path / "t" / f"{n}.jsonl") for n in ("train", "eval"))
    assert (len(train), len(held_out)) == (50, 200) and not [r for r in train if r in held_out]
    assert list(train[0]) == ["prompt", "answer", "task"]
    for row in train + held_out:  # by another way: Python computes what is asked
        asked = re.fullmatch(r"What is ([0-9 +*-]+)\? Answer .*", row["prompt"][0]["content"])[1]
        assert str(eval(asked)) == row["answer"]
    digest = hashlib.sha256((tmp_path / "t" / "train.jsonl").read_bytes()).hexdigest()
    first = "26b44e99d9d20a3c55e1446c5f9e778b22dee6242a7655e39100204b93f09013"
    assert digest == first  # another makes results not comparable
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    words = ["tasks", "words", "--n", "5", "--held-out", "2", "--out", str(tmp_path / "t")]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "commit_folder", full)
        assert main(words) == 4
    assert not (tmp_path / "t").exists()
    assert main(words) == 0  # what was left beside it is in nobody's way
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert main(words) == 2
    assert "t is there already: give another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "words", "only": ("add",)}, "only: words has no add; it has sort, reverse, last"),
        ({"kind": "words", "only": ("sort", "sort")}, "only: a task stands twice"),
        ({"kind": "words", "digits": 2}, "digits: is for arithmetic and format"),
        ({"kind": "format", "words": 2}, "words: is for words"),
        ({"kind": "format", "out": "no/where"}, "--out: no is no folder"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = TasksConfig(**{"out": "o"} | settings).check()
    assert problem.startswith(told)


def test_more_problems_than_there_are_is_refused():
    told = (r"--n 46 and --held-out 10: add has 55 distinct problems, its share is 56: lower them, "
            r"or raise --digits")
    with pytest.raises(UserError, match=told):
        made("arithmetic", digits=1, only=("add",), n=46, held_out=10)
    with pytest.raises(UserError, match=r"sort has [0-9,]+ distinct .* or raise --words"):
        made("words", words=2, n=10**6)


def test_difficulty_changes_the_problems():
    two, three = (made("arithmetic", n=1, digits=d)[0]["prompt"] for d in (2, 3))
    assert two != three and made("arithmetic", n=1)[0]["prompt"] == two
    lists = [made("words", n=1, words=w)[0]["prompt"][0]["content"].count(",") for w in (2, 3, 8)]
    assert lists == [2, 3, 8]  # between the words, and one in the instruction
    assert json.dumps(made("words", n=1, words=3)) == json.dumps(made("words", n=1))
