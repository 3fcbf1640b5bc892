"""`--columns`: every column under another name, every verb, and what is refused of a file."""

import pytest

from minirlhf.data.examples import load_pairs, load_prompts, load_texts
from minirlhf.data.rankings import load_preferences
from minirlhf.data.unpaired import load_unpaired
from minirlhf.errors import UserError
from minirlhf.files.rows import read_rows
from minirlhf.files.sieve import COLUMNS, RowPolicy, Sieve, column_names, column_problems
from tests import bad_inputs, test_left_out
from tests.bad_inputs import COMMANDS, PAIR, PROMPT, TEXT, json_lines, words

world, run = bad_inputs.world, test_left_out.run
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LIST = {"prompt": "p", "responses": ["a", "b"]}
ROWS = [  # who reads it, a row of each kind
    (load_texts, {"text": "a"}),
    (load_texts, {"prompt": "p", "completion": "a"}),
    (load_texts, {"prompt": "p", "response": "a"}),
    (load_texts, {"messages": [U, A]}),
    (load_texts, {"messages": [U, A], "tools": [{}], "chat_template_kwargs": {"x": 1}}),
    (load_texts, {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "prompt_length": 1}),
    (load_prompts, {"prompt": "p"}),
    (load_prompts, {"prompt_ids": [5, 6]}),
    (load_preferences, {"chosen": "a", "rejected": "b", "margin": 2, "chosen_probability": 0.75}),
    (load_preferences, {"prompt_ids": [5], "chosen_ids": [6, 7], "chosen_mask": [0, 1],
                        "rejected_ids": [8, 9], "rejected_mask": [1, 0]}),
    (load_preferences, LIST),
    (load_preferences, LIST | {"ranks": [2, 1]}),
    (load_preferences, LIST | {"scores": [1, 2]}),
    (load_preferences, LIST | {"best": 1}),
    (load_preferences, LIST | {"choice": 1}),
    (load_preferences, {"prompt": "p", "completions": [{"response": "a", "score": 1},
                                                       {"response": "b", "score": 2}]}),
    (load_prompts, {"prompt": "p", "answer": 42}),
    (load_unpaired, {"prompt": "p", "completion": "a", "label": False}),
]


@pytest.mark.parametrize(("load", "row"), ROWS, ids=[", ".join(row) for _, row in ROWS])
def test_a_row_is_the_same_under_other_names(load, row, write, tokenizer):
    expected, report = load(write({"other": 1} | row), tokenizer, 40, "drop")
    theirs = {"other": 1} | {f"their {name}": value for name, value in row.items()}
    policy = RowPolicy(columns=tuple(f"{name}=their {name}" for name in row))
    found, told = load(write(theirs), tokenizer, 40, "drop", policy=policy)
    assert found == expected and str(told) == str(report)


def test_every_name_that_may_be_given_is_read():
    assert set(COLUMNS) == {name for _, row in ROWS for name in row}


def test_a_word_the_wrong_way_round_is_told():
    (told,) = column_problems(["question=prompt"])
    assert told.endswith(": our name comes first: prompt=question")


def test_two_columns_may_change_places(write, tokenizer):
    policy = RowPolicy(columns=("chosen=rejected", "rejected=chosen"))
    path = write({"chosen": "c", "rejected": "r", "margin": 1})
    (found,), _ = load_pairs(path, tokenizer, 40, "drop", policy=policy)
    (plain,), _ = load_pairs(path, tokenizer, 40, "drop")
    assert (found.chosen_ids, found.rejected_ids) == (plain.rejected_ids, plain.chosen_ids)
    assert found.margin == 1


def test_a_column_that_has_the_name_already_gives_way(write):
    sieve = Sieve(RowPolicy(columns=("chosen=good",)))
    (row,) = read_rows(write({"good": "c", "chosen": "old", "x": 1}), sieve)
    assert row.columns == {"chosen": "c", "x": 1}


def test_a_row_without_the_column_is_broken(write, tokenizer):
    path = write({"x": "a"}, {"y": "b"}, {"x": "c"})
    told = r"a\.jsonl:2: no column 'x' to take as text: keys present: y"
    with pytest.raises(UserError, match=told):
        load_texts(path, tokenizer, 40, "drop", policy=RowPolicy(columns=("text=x",)))
    policy = RowPolicy("skip", columns=("text=x",))
    texts, report = load_texts(path, tokenizer, 40, "drop", policy=policy)
    assert len(texts) == 2 and [row.where for row in report.rejected_rows] == [f"{path}:2"]


def test_a_policy_refuses_words_that_cannot_be_meant():
    with pytest.raises(UserError, match=r"RowPolicy: columns: no 'txt' is read: the nearest is t"):
        RowPolicy(columns=("txt=a",))
    assert column_problems(["text=a", "prompt=b=c"]) == []
    assert column_names(["text=a", "prompt=b=c"]) == {"text": "a", "prompt": "b=c"}


VERBS = {"sft": TEXT, "new": TEXT, "reward": PAIR, "dpo": PAIR, "ppo": PROMPT, "grpo": PROMPT,
         "distill": PROMPT, "sample": PROMPT, "score": PAIR}


@pytest.mark.parametrize("verb", [*COMMANDS, "check"])
def test_every_verb_takes_other_names(verb, run, tmp_path):
    row = VERBS.get(verb, PAIR)
    names = [f"{name}=their_{name}" for name in row]
    theirs = {f"their_{name}": value for name, value in row.items()}
    (tmp_path / "d.jsonl").write_text(json_lines(theirs, theirs))
    if verb in COMMANDS:
        argv = words(verb, data="d.jsonl")
    else:
        argv = [verb, "d.jsonl", "--model", "lm"]
    code, _, told = run(argv)
    assert code == 2 and told.startswith("error: d.jsonl:1: columns of no known format: their_")
    assert "other names: --columns prompt=question" in told
    code, _, told = run([*argv, "--columns", *names])
    assert code == 0, told
