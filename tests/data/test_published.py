"""Rows of public data sets -> prompts and answers. Expected texts are read off the rows by eye; the
plain template writes "role: content" lines, eos behind an answer, "assistant:" at the end."""

import json

import pytest

from minirlhf.data.examples import load_pairs, load_prompts, load_texts
from minirlhf.data.rankings import load_preferences
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from tests.data.conftest import EOS, spell


def said(who, text):
    return {"from": who, "value": text}


def role(who, text):
    return {"role": who, "content": text}


ALPACA = {"instruction": "q", "input": "i", "output": "a"}
Q, QI = "user: q\nassistant:", "user: q\ni\nassistant:"
TEXTS = [  # row, prompt, answer, how the file is told
    ({"conversations": [said("system", "s"), said("human", "q"), said("gpt", "a")]},
     "system: s\n" + Q, " a", "sharegpt (conversations), read as dialogues (messages), loss on"),
    ({"conversations": [said("human", "q"), said("gpt", "a")], "system": "s"},
     "system: s\n" + Q, " a", "sharegpt (conversations)"),
    ({"conversations": [role("user", "q"), role("assistant", "a")], "system": ""},
     Q, " a", "sharegpt (conversations)"),
    ({"conversations": [said("user", "q"), said("observation", "o"), said("assistant", "a")]},
     "user: q\ntool: o\nassistant:", " a", "sharegpt (conversations)"),
    ({"messages": [role("user", "q"), role("assistant", "a")], "system": "s"},
     "system: s\n" + Q, " a", "dialogues with a system column (messages, system)"),
    ({"messages": [role("system", "t"), role("user", "q"), role("assistant", "a")], "system": "s"},
     "system: t\n" + Q, " a", "dialogues with a system column (messages, system)"),
    (ALPACA, QI, " a", "alpaca (instruction, output), read as prompts with answers, in messages ("),
    (ALPACA | {"input": ""}, Q, " a", "alpaca (instruction, output)"),
    (ALPACA | {"input": None, "text": "Below is an instruction"}, Q, " a", "alpaca ("),
    (ALPACA | {"instruction": ""}, "user: i\nassistant:", " a", "alpaca ("),
    (ALPACA | {"system": "s", "history": [["p", "b"]]},
     "system: s\nuser: p\nassistant: b\0\nuser: q\ni\nassistant:", " a", "alpaca ("),
    (ALPACA | {"history": '[["p", "b"]]', "system": ""},
     "user: p\nassistant: b\0\nuser: q\ni\nassistant:", " a", "alpaca ("),
    ({"instruction": "q", "context": "i", "response": "a"}, QI, " a", "dolly (instruction, respon"),
]


def ids(text):
    """Ids of a text in which \\0 stands for eos."""
    first, *rest = (spell(part) for part in text.split("\0"))
    return first + [id for part in rest for id in (EOS, *part)]


@pytest.mark.parametrize(("row", "prompt", "answer", "told"), TEXTS)
def test_load_texts_of_a_published_row(write, tokenizer, row, prompt, answer, told):
    (text,), report = load_texts(write(row), tokenizer, None, "drop")
    assert text.ids == [*ids(prompt + answer), EOS]
    assert text.prompt_length == len(ids(prompt))
    assert report.detected.startswith(told)


def test_load_prompts_of_published_rows(write, tokenizer):
    """Answers that the file has beside them are passed on."""
    (prompt,), report = load_prompts(write(ALPACA), tokenizer, None, "drop")
    assert prompt.text == [role("user", "q\ni")] and prompt.ids == ids(QI)
    assert prompt.columns == {"completion": [role("assistant", "a")]}
    assert report.notes == ["passed to reward functions: completion"]


HELPSTEER = {"context": [role("user", "q")], "response1": "a", "response2": "b"}
PKU = {"prompt": "q", "response_0": "a", "response_1": "b"}
WEBGPT = {"question": {"id": "x", "full_text": "q"}, "answer_0": "a", "answer_1": "b"}
ARENA = {f"conversation_{x}": [role("user", "q"), role("assistant", x)] for x in "ab"}
KAGGLE = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
WON = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
TLDR = {"info": {"post": "q"}, "summaries": [{"text": " a", "policy": "x"}, {"text": " b"}]}
TALK = [said("human", "q")]
CHOICE = {"chosen": "b", "rejected": "a"}
PAIRS = [  # row that prefers b, prompt, how the file is told
    ({"conversations": TALK, "chosen": said("gpt", "b"), "rejected": said("gpt", "a")}, Q,
     "sharegpt pairs (conversations, chosen, rejected), read as preference pairs of messages (pro"),
    ({"conversations": TALK, "chosen": role("assistant", "b"), "rejected": role("assistant", "a"),
      "system": "s"}, "system: s\n" + Q, "sharegpt pairs ("),
    ({"chosen_conversations": [*TALK, said("gpt", "b")],
      "rejected_conversations": [*TALK, said("gpt", "a")]}, Q,
     "torchtune pairs (chosen_conversations, rejected_conversations), read as preference dialogue"),
    (CHOICE | {"instruction": "q", "input": "i"}, QI, "alpaca pairs (instruction, chosen, reject"),
    (CHOICE | {"instruction": "q", "input": "", "system": "s"}, "system: s\n" + Q, "alpaca pairs"),
    (CHOICE | {"question": "q", "system": ""}, Q, "questions with pairs (question, chosen, rejec"),
    (CHOICE | {"question": "q", "system": "s"}, "system: s\n" + Q, "questions with pairs ("),
    (HELPSTEER | {"overall_preference": 1}, Q, "HelpSteer3 (context, response1, response2, over"),
    (HELPSTEER | {"overall_preference": -3, "response1": "b", "response2": "a"}, Q, "HelpSteer3 ("),
    (PKU | {"better_response_id": 1, "safer_response_id": 0}, Q, "PKU-SafeRLHF (prompt, response_"),
    ({"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 1}, Q, "SHP (history, hum"),
    (WEBGPT | {"score_0": -0.5, "score_1": 0.5}, Q, "WebGPT (question, answer_0, answer_1, score"),
    (WEBGPT | {"question": "q", "score_0": -1, "score_1": 1}, Q, "WebGPT (question, answer_0"),
    (ARENA | {"winner": "model_b"}, Q, "LMArena (conversation_a, conversation_b, winner), read as"),
    (KAGGLE | WON | {"winner_model_b": 1}, Q, "LMArena (prompt, response_a, response_b, winner_mo"),
    (PKU | {"response_a": "a", "response_b": "b", "winner": "model_b"}, Q, "LMArena (prompt, resp"),
]


def pair_ids(pair):
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


@pytest.mark.parametrize(("row", "prompt", "told"), PAIRS)
def test_load_pairs_of_a_published_row(write, tokenizer, row, prompt, told):
    (pair,), report = load_pairs(write(row), tokenizer, None, "drop")
    assert pair_ids(pair) == (ids(prompt), [*spell(" b"), EOS], [*spell(" a"), EOS])
    assert report.detected.startswith(told)


@pytest.mark.parametrize(
    ("info", "prompt"),
    [
        ({"post": "q", "title": "t", "subreddit": "s"},
         "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: q\n\nTL;DR:"),
        ({"post": "q", "title": "t", "subreddit": "r/s", "id": "x", "article": None},
         "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: q\n\nTL;DR:"),
        ({"post": "q", "title": "t"}, "TITLE: t\n\nPOST: q\n\nTL;DR:"),
        ({"article": "q", "post": None, "title": None}, "Article:\n\nq\n\nTL;DR:"),
    ],
)
def test_load_pairs_of_tldr_continue_a_text(write, tokenizer, info, prompt):
    (pair,), report = load_pairs(
        write(TLDR | {"info": info, "choice": 1}), tokenizer, None, "drop"
    )
    assert pair_ids(pair) == (spell(prompt), [*spell(" b"), EOS], [*spell(" a"), EOS])
    assert report.detected == (
        "TL;DR comparisons (info, summaries, choice), "
        "read as preference pairs (prompt, chosen, rejected)"
    )


def test_load_pairs_of_several_turns_in_lists(write, tokenizer):
    row = {"prompt": '["q", "s"]', "response_a": '["a", "b"]', "response_b": '["a", "c"]'}
    (pair,), _ = load_pairs(write(row | WON | {"winner_model_a": 1}), tokenizer, None, "drop")
    assert pair_ids(pair) == (
        ids("user: q\nassistant: a\0\nuser: s\nassistant:"),
        [*spell(" b"), EOS], [*spell(" c"), EOS],
    )


def test_load_pairs_of_a_text_table(tmp_path, tokenizer):
    """In CSV all is text: labels are spelled, dialogues are JSON."""
    path = tmp_path / "a.csv"
    path.write_text(
        "prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '"[""q""]","[""b""]","[""a""]",1,0,0\n"[""q""]","[""b""]","[""a""]",0,0,1\n'
    )
    (pair,), report = load_pairs(path, tokenizer, None, "drop")
    assert pair_ids(pair) == (ids(Q), [*spell(" b"), EOS], [*spell(" a"), EOS])
    assert report.dropped == {"a tie": 1}
    talk = json.dumps(HELPSTEER["context"]).replace('"', '""')
    path.write_text(f'context,response1,response2,overall_preference\n"{talk}",a,b,2\n')
    (pair,), report = load_pairs(path, tokenizer, None, "drop")
    assert pair_ids(pair) == (ids(Q), [*spell(" b"), EOS], [*spell(" a"), EOS])
    assert report.notes == ["messages in texts, as JSON: context"]


ULTRA = {"instruction": "q", "completions": [
    {"response": r, "model": "m", "overall_score": s, "fine-grained_score": 9 - s}
    for r, s in (("a", 6), ("b", 8.5), ("c", 6))
]}
NECTAR = {"prompt": "\n\nHuman: p\n\nAssistant: b\n\nHuman: q\n\nAssistant: ", "answers": [
    {"answer": r, "model": "m", "rank": k} for r, k in (("a", 2.0), ("b", 1.0), ("c", 3))
]}


def test_load_rankings_of_ultrafeedback(write, tokenizer):
    (found,), report = load_preferences(write(ULTRA), tokenizer, None, "drop")
    assert found.prompt_ids == ids(Q)
    assert found.responses == [[*spell(f" {x}"), EOS] for x in "bac"]
    assert (found.ranks, found.scores) == ([1, 2, 2], [8.5, 6.0, 6.0])
    assert report.detected == (
        "UltraFeedback by overall_score (instruction, completions), "
        "read as ranked lists (prompt, responses, scores)"
    )
    fine = [{k: v for k, v in one.items() if k != "overall_score"} for one in ULTRA["completions"]]
    (found,), report = load_preferences(
        write(ULTRA | {"completions": fine}), tokenizer, None, "drop"
    )
    assert found.ranks == [1, 1, 2] and found.responses[2] == [*spell(" b"), EOS]
    assert report.detected.startswith("UltraFeedback by fine-grained_score (")


def test_load_rankings_of_nectar(write, tokenizer):
    (found,), report = load_preferences(write(NECTAR), tokenizer, None, "drop")
    assert found.prompt_ids == ids("user: p\nassistant: b\0\nuser: q\nassistant:")
    assert found.responses == [[*spell(f" {x}"), EOS] for x in "bac"]
    assert found.ranks == [1, 2, 3]
    assert report.detected.startswith("Nectar (prompt, answers), read as ranked lists (")


def test_answers_of_another_kind_are_no_nectar(write, tokenizer):
    """A reward function may compare with any of several right answers."""
    row = {"prompt": "p", "answers": ["4", "four"]}
    (prompt,), _ = load_prompts(write(row), tokenizer, None, "drop")
    assert (prompt.text, prompt.columns) == ("p", {"answers": ["4", "four"]})


TIE, EMPTY = "a tie", "an empty answer"
USELESS = [  # row, why it is dropped
    (HELPSTEER | {"overall_preference": 0}, TIE),
    (HELPSTEER | {"overall_preference": 2, "response1": " "}, EMPTY),
    (WEBGPT | {"score_0": 0, "score_1": 0.0}, TIE),
    (WEBGPT | {"score_0": 1, "score_1": -1, "answer_1": ""}, EMPTY),
    *((ARENA | {"winner": winner}, TIE) for winner in ("tie", "tie (bothbad)", "both_bad")),
    (ARENA | {"winner": "model_a", "conversation_b": [role("user", "q"), role("assistant", "")]},
     EMPTY),
    (KAGGLE | WON | {"winner_tie": 1}, TIE),
    (KAGGLE | WON | {"winner_model_a": 1, "response_a": "[null]"}, EMPTY),
    (PKU | {"better_response_id": 0, "response_1": None}, EMPTY),
    (TLDR | {"choice": 0, "summaries": [{"text": " a"}, {"text": ""}]}, EMPTY),
    (CHOICE | {"instruction": "q", "rejected": ""}, EMPTY),
    (CHOICE | {"question": "q", "chosen": "\n"}, EMPTY),
    (ULTRA | {"completions": []}, "fewer than two answers"),
    (ULTRA | {"completions": ULTRA["completions"][:1]}, "fewer than two answers"),
    (NECTAR | {"answers": [NECTAR["answers"][0], NECTAR["answers"][1] | {"answer": ""}]}, EMPTY),
]
RIGHT = {
    "overall_preference": HELPSTEER | {"overall_preference": 1},
    "score_0": WEBGPT | {"score_0": 1, "score_1": -1},
    "conversation_a": ARENA | {"winner": "model_a"},
    "winner_tie": KAGGLE | WON | {"winner_model_a": 1},
    "better_response_id": PKU | {"better_response_id": 0}, "summaries": TLDR | {"choice": 0},
    "instruction": CHOICE | {"instruction": "q"}, "question": CHOICE | {"question": "q"},
    "completions": ULTRA, "answers": NECTAR,
}


@pytest.mark.parametrize(("row", "why"), USELESS)
def test_a_row_that_says_nothing_is_dropped_and_counted(write, tokenizer, row, why):
    (right,) = (v for k, v in list(RIGHT.items())[::-1] if k in row and v.keys() <= row.keys())
    kept, report = load_preferences(write(row, right, row), tokenizer, None, "drop")
    assert (report.rows, len(kept), report.dropped) == (3, 1, {why: 2})
    assert [out.where[-2:] for out in report.dropped_rows] == [":1", ":3"]
    with pytest.raises(UserError, match=rf"a\.jsonl: no row left of 1: dropped: 1 \({why}\)"):
        load_preferences(write(row), tokenizer, None, "drop")


@pytest.mark.parametrize(("row", "why"), USELESS)
def test_a_prompt_is_not_lost_where_its_answers_say_nothing(write, tokenizer, row, why):
    if {"conversation_a", "response_a"} & row.keys():
        return  # of whole dialogues, which are no prompts
    prompts, report = load_prompts(write(row, row), tokenizer, None, "drop")
    asked = "POST: q\n\nTL;DR:" if "info" in row else [role("user", "q")]
    assert [prompt.text[-len(asked) :] for prompt in prompts] == [asked] * 2 and not report.dropped
    assert {"chosen", "responses"}.isdisjoint(prompts[0].columns)


@pytest.mark.parametrize(
    ("row", "words", "told"),
    [
        (ALPACA, ("prompt=instruction", "completion=output"), "input beside the columns named: read"
         " as alpaca, where it is part of the prompt"),
        (ALPACA | {"input": None, "history": [["p", "b"]]},
         ("prompt=instruction", "response=output"), "input, history beside the columns named"),
        ({"instruction": "q", "context": "i", "response": "a"},
         ("prompt=instruction", "completion=response"), "context beside the columns named: read as "
         "dolly, where"),
    ],
)
def test_columns_that_a_published_prompt_has_beside_those_named_are_joined(
    write, tokenizer, row, words, told
):
    (text,), report = load_texts(write(row), tokenizer, None, "drop", RowPolicy(columns=words))
    (same,), _ = load_texts(write(row), tokenizer, None, "drop")
    assert text == same and told in report.notes[0]
    (prompt,), _ = load_prompts(write(row), tokenizer, None, "drop", RowPolicy(columns=words[:1]))
    assert prompt.ids == same.ids[: same.prompt_length]


def test_columns_are_taken_as_they_are_named_where_that_loses_nothing_or_means_another(
    write, tokenizer
):
    words = "prompt=instruction", "completion=output"
    (text,), report = load_texts(
        write({"instruction": "q", "output": "a"}), tokenizer, None, "drop",
        RowPolicy(columns=words),
    )
    assert (text.ids, report.notes) == ([*spell("qa"), EOS], [])
    row = CHOICE | {"instruction": "q", "input": "i"}  # the other one is preferred
    words = "prompt=instruction", "chosen=rejected", "rejected=chosen"
    (pair,), report = load_pairs(write(row), tokenizer, None, "drop", RowPolicy(columns=words))
    assert (pair.chosen_ids, pair.rejected_ids) == ([*spell("a"), EOS], [*spell("b"), EOS])
    assert "warning: input not read, which 1 rows have" in report.notes[0]


@pytest.mark.parametrize(
    ("header", "cells", "told"),
    [
        ("prompt,responses", 'q,"[""a"", ""b""]"', "responses is a string: needs a list, which no"),
        ("input_ids", '"[1, 2]"', "input_ids is a string: needs a list of token ids, which no tab"),
        ("chosen_ids,rejected_ids", '[1],"[1, 2]"', "chosen_ids is a string: needs a list of tok"),
        ("prompt,completions", 'q,"[{""response"": ""a"", ""score"": 1}]"', "no table has lists"),
    ],
)
def test_lists_in_a_cell_of_a_table_are_refused_with_a_way_out(tmp_path, tokenizer, header, cells,
                                                               told):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n{cells}\n")
    load = load_texts if header == "input_ids" else load_preferences
    with pytest.raises(UserError, match="write the file as JSON lines") as caught:
        load(path, tokenizer, None, "drop")
    assert told in str(caught.value) and caught.value.where == f"{path}:2"


WRONG = [  # row, change, what is told of it
    (HELPSTEER | {"overall_preference": 1}, {"overall_preference": 4},
     "overall_preference is 4: needs a number from -3 to 3; detected: HelpSteer3 (context, resp"),
    (HELPSTEER | {"overall_preference": 1}, {"overall_preference": None},
     "overall_preference is null: needs a number"),
    (HELPSTEER | {"overall_preference": 1}, {"response1": 3}, "response1 is a number: needs a st"),
    (HELPSTEER | {"overall_preference": 1}, {"context": "q"}, "context is a string: needs a list"),
    (PKU | {"better_response_id": 0}, {"better_response_id": 2}, "better_response_id is 2: needs "),
    (PKU | {"better_response_id": 0}, {"better_response_id": True},
     "better_response_id is true: needs 0 or 1"),
    (PKU | {"better_response_id": 0}, {"prompt": ""}, "prompt is empty: remove the row or fill it"),
    (WEBGPT | {"score_0": 1, "score_1": -1}, {"question": {}},
     "question's full_text is null: needs a string"),
    (WEBGPT | {"score_0": 1, "score_1": -1}, {"score_1": "x"}, "score_1 is 'x': needs a number"),
    (ARENA | {"winner": "model_a"}, {"winner": "model_c"},
     'winner is "model_c": legal: model_a, model_b, tie, tie (bothbad), both_bad'),
    (ARENA | {"winner": "model_a"}, {"winner": ["model_a"]}, 'winner is ["model_a"]: legal: model'),
    (ARENA | {"winner": "model_a"}, {"conversation_b": []}, "conversation_b is empty: remove"),
    (KAGGLE | WON | {"winner_model_a": 1}, {"winner_model_b": 1},
     "winner_model_a and winner_model_b are both 1: one of them wins, or none"),
    (KAGGLE | WON | {"winner_model_a": 1}, {"response_b": '["b", "c"]'},
     "response_b has 2 texts, prompt has 1: they must be as many"),
    (KAGGLE | WON | {"winner_model_a": 1}, {"response_b": '["b"'},
     "response_b: not valid JSON at column 5"),
    (KAGGLE | WON | {"winner_model_a": 1}, {"prompt": "[7]"}, "prompt is a number: needs a string"),
    (TLDR | {"choice": 0}, {"choice": 2}, "choice is 2: needs 0 or 1"),
    (TLDR | {"choice": 0}, {"info": "q"}, "info is a string: needs an object with post and title"),
    (TLDR | {"choice": 0}, {"info": {"title": "t"}}, "info has title: needs post, or article"),
    (TLDR | {"choice": 0}, {"summaries": TLDR["summaries"][:1]}, "summaries is a list: needs two"),
    (TLDR | {"choice": 0}, {"summaries": [3, 4]}, "summaries[0] is a number: needs a string"),
    (CHOICE | {"instruction": "q"}, {"instruction": ""}, "instruction is empty: remove the row or"),
    (CHOICE | {"instruction": "q"}, {"instruction": 1}, "instruction is a number: needs a string"),
    (CHOICE | {"instruction": "q"}, {"history": [["a"]]}, "history[0] is a list: needs [user's te"),
    (CHOICE | {"instruction": "q"}, {"history": [["a", 1]]}, "history[0] is a number: needs a str"),
    (CHOICE | {"instruction": "q"}, {"history": {"a": "b"}}, "history[0] is an object: needs [us"),
    (CHOICE | {"instruction": "q"}, {"system": ["s"]}, "system is a list: needs a string"),
    (ULTRA, {"completions": [{"response": "a"}]}, "completions[0] is response: needs {response: ."),
    (ULTRA, {"completions": 3}, "completions is a number: needs a list"),
    (ULTRA, {"completions": [one | {"overall_score": "N/A"} for one in ULTRA["completions"]]},
     'scores[0] is "N/A": needs a finite number'),
    (NECTAR, {"prompt": "Why?"}, "prompt ends with no turn of a Human: like '"),
    (NECTAR, {"prompt": "x\n\nHuman: Why?"}, "prompt ends with no turn of a Human: like '"),
    (NECTAR, {"answers": [one | {"rank": 1.5} for one in NECTAR["answers"]]},
     "ranks[0] is 1.5: needs an integer from 1, best"),
]


@pytest.mark.parametrize(("right", "change", "told"), WRONG)
def test_a_wrong_row_is_refused_by_its_line(write, tokenizer, right, change, told):
    path = write(right, right | change)
    with pytest.raises(UserError) as refused:
        load_preferences(path, tokenizer, None, "drop")
    line = str(refused.value)
    assert line.startswith(f"{path}:2: {told}") and "detected: " in line
    kept, report = load_preferences(path, tokenizer, None, "drop", policy=RowPolicy("skip"))
    assert (len(kept), len(report.rejected_rows)) == (1, 1)


@pytest.mark.parametrize("key", ["response1", "overall_preference", "context"])
def test_a_row_without_a_column_of_the_shape_is_refused(write, tokenizer, key):
    right = HELPSTEER | {"overall_preference": 1}
    path = write(right, {k: v for k, v in right.items() if k != key})
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {key} is missing: needs what the first row"):
        load_pairs(path, tokenizer, None, "drop")


def test_a_published_row_behind_others_is_refused(write, tokenizer):
    path = write({"prompt": "p", "chosen": "c", "rejected": "r"}, PKU | {"better_response_id": 0})
    with pytest.raises(UserError, match=r"a\.jsonl:2: chosen is missing: needs a string"):
        load_pairs(path, tokenizer, None, "drop")


# ---- answers that are not to be learned, or of which one stands in a row -------------------------


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "a"},
        {"prompt": [role("user", "p")], "completion": [role("assistant", "a")]},
        {"conversations": [said("human", "q"), said("gpt", "a")]},
        ALPACA,
    ],
)
def test_answers_that_were_not_liked_are_not_imitated(write, tokenizer, row, name):
    path = write(row | {name: True}, row | {name: False}, row | {name: True})
    told = rf"a\.jsonl:2: {name} is false: an answer that was not liked: keep the rows whose {name}"
    with pytest.raises(UserError, match=told):
        load_texts(path, tokenizer, None, "drop")
    texts, report = load_texts(path, tokenizer, None, "drop", policy=RowPolicy("skip"))
    assert [text.where[-1] for text in texts] == ["1", "3"] and texts[0].columns == {}
    assert report.detected.endswith(f", those whose {name} is true") and not report.notes
    texts, report = load_texts(path, tokenizer, None, "drop", imitated=False)  # to be scored
    assert len(texts) == 3 and report.notes == [f"not read: {name}"]


def test_a_label_of_another_kind_says_nothing_of_liking(write, tokenizer, tmp_path):
    texts, report = load_texts(
        write({"prompt": "p", "completion": "a", "label": 0}), tokenizer, None, "drop"
    )
    assert len(texts) == 1 and report.notes == ["not read: label"]
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\np,a,True\np,b,False\n")
    with pytest.raises(UserError, match=r"a\.csv:3: label is false"):
        load_texts(path, tokenizer, None, "drop")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p", "completion": "a", "label": True}, "one answer a row, with label, where "),
        ({"prompt": "p", "response": "a", "helpfulness": 4, "correctness": 3},
         "one answer a row, with helpfulness, correctness, where two are compared: make rows of "),
        ({"prompt": "p", "response": "a"}, "one answer a row, where two are compared: make rows"),
    ],
)
def test_load_pairs_refuses_single_answers_by_name(write, tokenizer, row, told):
    with pytest.raises(UserError, match=rf"a\.jsonl:1: {told}"):
        load_pairs(write(row), tokenizer, None, "drop")


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}]
)
def test_a_last_turn_that_is_not_to_be_learned_is_dropped(write, tokenizer, mark):
    ask, answer = role("user", "q"), role("assistant", "a")
    learned = {name: 1 for name in mark}
    path = write(
        {"messages": [ask, answer, ask, answer | mark]}, {"messages": [ask, answer | learned]},
        {"messages": [ask, answer | mark, ask, answer]},
    )
    texts, report = load_texts(path, tokenizer, None, "drop", train_on="last")
    assert [text.where[-1] for text in texts] == ["2", "3"]
    assert report.dropped == {"no turn is to be learned": 1}
    assert len(load_texts(path, tokenizer, None, "drop", imitated=False)[0]) == 3
    path = write({"messages": [ask, answer]}, {"messages": [ask, answer | {"weight": 0.5}]})
    with pytest.raises(UserError, match=r":2: weight of turn 2 is 0.5: needs 0 or 1"):
        load_texts(path, tokenizer, None, "drop")


# ---- messages in a text --------------------------------------------------------------------------

TURNS = [role("user", "it's q"), role("assistant", "a")]


@pytest.mark.parametrize("key", ["chosen_conversations", "chosen", "messages", "text"])
def test_messages_in_json_text_are_read(write, tokenizer, key):
    other = key.replace("chosen", "rejected")
    row = {key: json.dumps(TURNS)}
    if other != key:
        row[other] = json.dumps([TURNS[0], role("assistant", "b")])
    load = load_texts if other == key else load_pairs
    (found,), report = load(write(row), tokenizer, None, "drop")
    parsed = {name: json.loads(text) for name, text in row.items()}
    (expected,), _ = load(write(parsed), tokenizer, None, "drop")
    assert found == expected
    assert report.notes == [f"messages in texts, as JSON: {', '.join(row)}"]


@pytest.mark.parametrize(
    "text",
    [
        repr(TURNS),
        repr(TURNS).replace("}, {", "}\n {"),  # numpy's
        f"array({TURNS!r}, dtype=object)",
        repr(TURNS[1]),
        repr([said("human", "q"), said("gpt", "a")]),
        json.dumps(TURNS)[:-1],
    ],
)
@pytest.mark.parametrize("load", [load_pairs, load_texts, load_prompts])
def test_messages_in_another_text_are_refused(write, tokenizer, load, text):
    right = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c"}
    for key in right:
        with pytest.raises(UserError, match=rf"a\.jsonl:2: {key} has messages in a text that is"):
            load(write(right, right | {key: text}), tokenizer, None, "drop")


@pytest.mark.parametrize(
    "text",
    ['[{"name": "heat", "arguments": {}}]', '{"value": 3}', "[{'a': 1}]", '["role", "content"]',
     "{'role': 'admin'}", "[1, 2]", "[{"],
)
def test_other_structures_stay_text(write, tokenizer, text):
    (found,), report = load_texts(
        write({"prompt": "p", "completion": text}), tokenizer, None, "drop"
    )
    assert found.ids == [*spell("p" + text), EOS] and not report.notes
