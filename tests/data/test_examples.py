"""Rows -> examples. One token a byte, so each expected id list is spelled by hand."""

import json
import re

import pytest

from minirlhf.data.encoding import ENDED
from minirlhf.data.examples import Pair, Prompt, Text, load_pairs, load_prompts, load_texts
from minirlhf.data.parts import Useless
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report, RowPolicy
from tests.data.conftest import EOS, spell


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------- pairs


def ids(pair):
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def test_load_pairs_appends_eos_and_carries_columns(write, tokenizer):
    path = write({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2, "source": "x"})
    pairs, report = load_pairs(path, tokenizer, 8, "drop")
    assert pairs == [
        Pair(spell("p"), [*spell("c"), EOS], [*spell("r"), EOS], 2.0, f"{path}:1", {"source": "x"})
    ]
    detected = "preference pairs (prompt, chosen, rejected, margin)"
    assert report == Report(str(path), detected, 1, 1, notes=["not read: source"])


U, V, A, B = user("q"), user("s"), assistant("a"), assistant("b")
PAIR = {"chosen": "c", "rejected": "r"}
# The plain template writes "role: content" lines, eos behind an answer, "assistant:" at the end.
Q = spell("user: q\nassistant:")
TRANSCRIPT = "\n\nHuman: q\n\nAssistant: k\n\nHuman: s\n\nAssistant:"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"chosen": "c c", "rejected": "r"}, ([], spell("c c"), spell("r"))),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, (Q, spell(" a"), spell(" b"))),
        ({"chosen": [U, A], "rejected": [U, B]}, (Q, spell(" a"), spell(" b"))),
        # a prompt column beside whole dialogues is not what the template would write: ignored
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, (Q, spell(" a"), spell(" b"))),
        # where they are no dialogues but answers, it is what they answer
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, (Q, spell(" a"), spell(" b"))),
        ({"prompt": "q", "chosen": A, "rejected": B}, (Q, spell(" a"), spell(" b"))),
        ({"prompt": [U], "chosen": "a", "rejected": "b"}, (Q, spell(" a"), spell(" b"))),
        ({"prompt": "q", "chosen": [A], "rejected": "b"}, (Q, spell(" a"), spell(" b"))),
        ({"prompt": {"from": "human", "value": "q"}, "chosen": [{"from": "gpt", "value": "a"}],
          "rejected": {"from": "gpt", "value": "b"}}, (Q, spell(" a"), spell(" b"))),
        # one dialogue goes on where the other ends: both keep the turn that differs in what follows
        ({"chosen": [U, A], "rejected": [U, A, V, B]},
         (Q, spell(" a"), [*spell(" a"), EOS, *spell("\nuser: s\nassistant: b")])),
        # after the shared [q, a] the user speaks: the shared part ends before the answer instead
        ({"chosen": [U, A, V, A], "rejected": [U, A, user("t"), A]},
         (Q, [*spell(" a"), EOS, *spell("\nuser: s\nassistant: a")],
          [*spell(" a"), EOS, *spell("\nuser: t\nassistant: a")])),
        ({"chosen": TRANSCRIPT + " yes", "rejected": TRANSCRIPT + " yet"},
         (spell(TRANSCRIPT), spell(" yes"), spell(" yet"))),
    ],
)
def test_load_pairs_finds_the_prompt(write, tokenizer, row, expected):
    (pair,), _ = load_pairs(write(row), tokenizer, None, "drop")
    prompt, chosen, rejected = expected
    assert ids(pair) == (prompt, [*chosen, EOS], [*rejected, EOS])


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"input_ids_chosen": [5, 6, 1], "attention_mask_chosen": [1, 1, 0],
          "input_ids_rejected": [1, 7], "attention_mask_rejected": [0, 1]}, ([], [5, 6], [7])),
        ({"input_ids_chosen": [5], "input_ids_rejected": [7, 0]}, ([], [5], [7, 0])),
        ({"chosen_ids": [5], "rejected_ids": [7]}, ([], [5], [7])),
        ({"prompt_ids": [9], "chosen_ids": [5], "rejected_ids": [7]}, ([9], [5], [7])),
        ({"chosen_input_ids": [5], "rejected_input_ids": [7]}, ([], [5], [7])),
    ],
)
def test_load_pairs_takes_ids_as_they_are_without_a_tokenizer(write, row, expected):
    (pair,), report = load_pairs(write(row), None, 8, "drop")
    assert ids(pair) == expected and pair.columns == {}
    assert report.detected.startswith("tokenised preference pairs (")


def test_load_pairs_reads_the_margin_of_each_row(write, tokenizer):
    path = write(PAIR, *(PAIR | {"margin": margin} for margin in (1.5, None, -1)))
    pairs, report = load_pairs(path, tokenizer, 8, "drop")
    assert [pair.margin for pair in pairs] == [0.0, 1.5, 0.0, -1.0]
    assert report.detected == "preference pairs (chosen, rejected, margin)"
    assert report.notes == ["margin missing in 2 rows: they count as 0"]
    assert load_pairs(write(PAIR), tokenizer, 8, "drop")[1].notes == []


def test_load_pairs_reads_the_probability_of_each_row(write, tokenizer):
    path = write(PAIR, *(PAIR | {"chosen_probability": share} for share in (0.75, 0)))
    pairs, report = load_pairs(path, tokenizer, 8, "drop")
    assert [pair.chosen_probability for pair in pairs] == [1.0, 0.75, 0.0]
    assert [pair.columns for pair in pairs] == [{}, {}, {}]
    assert report.detected == "preference pairs (chosen, rejected, chosen_probability)"
    assert report.notes == [
        "chosen_probability missing in 1 rows: they count as 1",
        "chosen_probability below 1/2 in 1 rows: rejected leads",
    ]
    path = write(PAIR | {"chosen_probability": 0.75, "margin": 2})
    both, report = load_pairs(path, tokenizer, 8, "drop")
    assert report.detected == "preference pairs (chosen, rejected, margin, chosen_probability)"
    assert (both[0].margin, both[0].chosen_probability) == (2.0, 0.75)


NO_NUMBERS = ["1", True, [1], 10**400]
NO_LABELS = [("margin", each, "needs a finite number") for each in NO_NUMBERS]
NO_LABELS += [("chosen_probability", each, "needs a number from 0 to 1")
              for each in (*NO_NUMBERS, 1.5, -0.25)]


@pytest.mark.parametrize(("label", "value", "told"), NO_LABELS)
def test_load_pairs_refuses_a_label_that_is_none(write, tokenizer, label, value, told):
    path = write(PAIR, PAIR | {label: value})
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {label} is .*: {told}"):
        load_pairs(path, tokenizer, 8, "drop")


def test_load_pairs_keeps_the_labels_of_rows_that_share_a_line(tmp_path, tokenizer):
    path = tmp_path / "a.json"  # where names the line, so it does not tell these rows apart
    rows = [{"chosen": "c", "rejected": "r", "margin": m, "chosen_probability": m / 4}
            for m in (1, 2)]
    path.write_text(json.dumps(rows))
    pairs, _ = load_pairs(path, tokenizer, 8, "drop")
    assert [(pair.margin, pair.chosen_probability) for pair in pairs] == [(1.0, 0.25), (2.0, 0.5)]


def test_load_pairs_reads_numbers_out_of_a_text_table(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("chosen,rejected,margin\nc,r,1.5\nc,r,\n")
    pairs, _ = load_pairs(path, tokenizer, 8, "drop")
    assert [pair.margin for pair in pairs] == [1.5, 0.0]
    path.write_text("chosen,rejected,margin\nc,r,nan\n")
    with pytest.raises(UserError, match=r"a\.csv:2: margin is 'nan'"):
        load_pairs(path, tokenizer, 8, "drop")


JOIN = "not read, which 1 rows have: other tools make it part of the prompt"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"query": "why", "system": "be kind", "id": 7}],
         ["warning: query, system not read: if answers need it, --columns prompt=query",
          "not read: id"]),
        ([{"id": 7, "empty": "", "none": None}, {"id": 8, "lang": "en"}], ["not read: id, lang"]),
        ([{"prompt": "why", "question": "why"}], ["not read: question"]),
        ([{"prompt": "why", "input": "a"}, {"prompt": "why", "input": "", "history": [["a", "b"]]}],
         [f"warning: input {JOIN}", f"warning: history {JOIN}"]),
        ([{"prompt": "why"}], []),
    ],
)
def test_load_pairs_tells_of_columns_that_are_not_read(write, tokenizer, rows, told):
    pair = {"chosen": "good", "rejected": "bad"}
    _, report = load_pairs(write(*(pair | row for row in rows)), tokenizer, 64, "error")
    assert report.notes == told


def test_load_pairs_tells_of_no_other_prompt_where_dialogues_hold_it(write, tokenizer):
    ask = {"role": "user", "content": "why"}
    sides = {side: [ask, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pairs, report = load_pairs(write(sides | {"question": "why"}), tokenizer, 64, "error")
    assert pairs[0].prompt_ids and report.notes == ["not read: question"]


def test_load_prompts_tells_what_becomes_of_other_columns(write, tokenizer):
    path = write({"prompt": "p", "system": "s", "answer": 4})
    _, report = load_prompts(path, tokenizer, 8, "drop")
    assert report.notes == ["passed to reward functions: system, answer"]
    _, report = load_prompts(path, tokenizer, 8, "drop", others="not read")
    assert report.notes == [
        f"warning: system {JOIN}", "not read: answer",
    ]


def test_what_sample_writes_is_not_told_as_unread(write, tokenizer):
    row = {"prompt": "p", "response": "r", "finish_reason": "eos", "tokens": 2}
    assert load_texts(write(row), tokenizer, None, "drop")[1].notes == []
    ids = {"input_ids": [2, 3, 0], "prompt_length": 1, "tokenizer": tokenizer.fingerprint}
    assert load_texts(write(row | ids), tokenizer, None, "drop")[1].notes == []


@pytest.mark.parametrize("name", ["image", "images", "videos", "audios"])
def test_a_row_with_more_than_text_is_refused(write, tokenizer, name):
    path = write({"prompt": "p", name: None}, {"prompt": "p", name: ["a.png"]})
    with pytest.raises(UserError, match=rf"a\.jsonl:2: has {name}: only text is read"):
        load_prompts(path, tokenizer, 8, "drop")


def test_load_pairs_drops_equal_answers_and_counts_them(write, tokenizer):
    same, other = {"chosen": "c", "rejected": "c"}, {"chosen": "c", "rejected": "r"}
    pairs, report = load_pairs(write(same, other, same), tokenizer, 8, "drop")
    assert (len(pairs), report.rows, report.kept) == (1, 3, 1)
    assert report.dropped == {"chosen equals rejected": 2}


# ----------------------------------------------------------------------------------------- overlong


def fit(write, tokenizer, overlong, max_length, prompt="pppp", chosen="ccc", rejected="r"):
    # prompt 4, chosen 3 + eos, rejected 1 + eos: the longer text has 8 tokens
    short = {"prompt": "p", "chosen": "a", "rejected": "b"}  # 3 tokens: never cut here
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    pairs, report = load_pairs(write(short, row), tokenizer, max_length, overlong)
    assert report.rows == report.kept + sum(report.dropped.values()) == 2
    return [ids(pair) for pair in pairs[1:]], report


def test_overlong_leaves_a_row_of_exactly_max_length(write, tokenizer):
    for overlong in ("drop", "truncate_prompt_left", "truncate_response", "error"):
        (pair,), report = fit(write, tokenizer, overlong, 8)
        assert (len(pair[0]), report.truncated, report.dropped) == (4, 0, {})


def test_overlong_drop_counts(write, tokenizer):
    kept, report = fit(write, tokenizer, "drop", 7)
    assert (kept, report.dropped) == ([], {"longer than max_length": 1})


def test_overlong_truncate_prompt_left_keeps_answers_whole(write, tokenizer):
    (pair,), report = fit(write, tokenizer, "truncate_prompt_left", 6, prompt="abcd")
    assert pair == (spell("cd"), [*spell("ccc"), EOS], [*spell("r"), EOS])
    assert report.truncated == 1
    kept, report = fit(write, tokenizer, "truncate_prompt_left", 4)
    assert (kept, report.dropped) == ([], {"no room for the prompt within max_length": 1})


def test_overlong_truncate_response_cuts_without_eos(write, tokenizer):
    (pair,), report = fit(write, tokenizer, "truncate_response", 6)
    assert pair == (spell("pppp"), spell("cc"), [*spell("r"), EOS])  # a cut text has no end
    assert report.truncated == 1
    kept, report = fit(write, tokenizer, "truncate_response", 4)
    assert (kept, report.dropped) == ([], {"prompt alone fills max_length": 1})


def test_overlong_truncate_response_drops_answers_made_equal(write, tokenizer):
    kept, report = fit(write, tokenizer, "truncate_response", 6, chosen="xxa", rejected="xxb")
    assert (kept, report.truncated, report.dropped) == ([], 0, {"chosen equals rejected": 1})


def test_overlong_error_names_the_row(write, tokenizer):
    with pytest.raises(UserError, match=r"a\.jsonl:2: 8 tokens, max_length is 7"):
        fit(write, tokenizer, "error", 7)


def test_overlong_keeps_what_the_tokenizer_puts_in_front(write, folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(tokenizer, "_prefix", [1])
    prompts, _ = load_prompts(write({"prompt": "abcd"}), tokenizer, 3, "truncate_prompt_left")
    assert prompts[0].ids == [1, *spell("cd")]


def test_load_refuses_illegal_settings_and_an_empty_outcome(write, tokenizer):
    path = write({"chosen": "ccc", "rejected": "rrr"})
    with pytest.raises(UserError, match="overlong: is 'cut': legal: drop, truncate_prompt_left"):
        load_pairs(path, tokenizer, 8, "cut")
    with pytest.raises(UserError, match="max_length: is 0: needs at least 1"):
        load_pairs(path, tokenizer, 0, "drop")
    with pytest.raises(UserError, match=r"no row left of 1: dropped: 1 \(longer than max_length\)"):
        load_pairs(path, tokenizer, 3, "drop")
    with pytest.raises(UserError, match="prompts have no response"):
        load_prompts(path, tokenizer, 8, "truncate_response")
    with pytest.raises(UserError, match="holds text and there is no tokenizer"):
        load_pairs(path, None, 8, "drop")


# -------------------------------------------------------------------------------- prompts and texts


def test_load_prompts_of_strings_and_messages(write, tokenizer):
    path = write({"prompt": "p", "answer": 42})
    prompts, report = load_prompts(path, tokenizer, 8, "drop")
    assert prompts == [Prompt(spell("p"), "p", f"{path}:1", {"answer": 42})]  # no eos: it goes on
    assert report.detected == "prompts (prompt)"
    for key in ("prompt", "messages"):
        (prompt,), _ = load_prompts(write({key: [U]}), tokenizer, None, "drop")
        assert (prompt.ids, prompt.text, prompt.columns) == (Q, [U], {})
    (prompt,), _ = load_prompts(write({"prompt": [U, assistant("I")]}), tokenizer, None, "drop")
    assert prompt.ids == Q + spell(" I")


def test_load_prompts_of_ids_and_text_lines(write, tokenizer, tmp_path):
    for key in ("prompt_ids", "input_ids"):
        path = write({key: spell("hi")})
        assert load_prompts(path, tokenizer, 8, "drop")[0][0].text == "hi"
        (prompt,), _ = load_prompts(path, None, 8, "drop")
        assert (prompt.ids, prompt.text) == (spell("hi"), "")
    path = write({"input_ids": [9, *spell("hi")], "attention_mask": [0, 1, 1]})
    (prompt,), _ = load_prompts(path, tokenizer, 8, "drop")
    assert (prompt.ids, prompt.columns) == (spell("hi"), {})
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    prompts, _ = load_prompts(tmp_path / "a.txt", tokenizer, 8, "drop")
    assert [(p.text, p.where[-2:]) for p in prompts] == [("one", ":1"), ("two", ":3")]


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"text": "ab"}, "", "ab"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "response": "c"}, "p", "c"),
        ({"prompt": [U], "completion": [A]}, "user: q\nassistant:", " a"),
        ({"messages": [U, A]}, "user: q\nassistant:", " a"),
        ({"prompt": "q", "completion": [A]}, "user: q\nassistant:", " a"),
        ({"prompt": [U], "response": "a"}, "user: q\nassistant:", " a"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         "user: q\nassistant:", " a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None},
                                                    {"type": "text", "text": "?"}]}, A]},
         "user: q?\nassistant:", " a"),
    ],
)
def test_load_texts_marks_where_the_loss_starts(write, tokenizer, row, prompt, answer):
    path = write(row | {"extra": 1})
    texts, _ = load_texts(path, tokenizer, None, "drop")
    expected = [*spell(prompt), *spell(answer), EOS]
    assert texts == [Text(expected, len(spell(prompt)), f"{path}:1", {"extra": 1})]


def test_the_text_of_a_prompt_that_was_cut_is_what_is_left(write, tokenizer):
    path = write({"prompt": "abcdef"}, {"prompt": "xy"})
    prompts, report = load_prompts(path, tokenizer, 3, "truncate_prompt_left")
    assert [(p.ids, p.text) for p in prompts] == [(spell("def"), "def"), (spell("xy"), "xy")]
    assert report.truncated == 1


CALL = {"type": "function", "function": {"name": "heat", "arguments": {"place": "Oslo"}}}
CALLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments.place }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"from": "function_call",
         "value": '{"name": "heat", "arguments": {"place": "Oslo"}}'},
    ],
)
def test_a_tool_call_is_an_answer_without_text(write, folder, turn):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CALLS
    pair = {"prompt": [U], "chosen": [turn], "rejected": [A]}
    (pair,), _ = load_pairs(write(pair), tokenizer, None, "drop")
    # by the template: "[user]q[assistant]", and behind it the name and the place
    expected = (spell("[user]q[assistant]"), [*spell("heat Oslo"), EOS], [*spell("a"), EOS])
    assert ids(pair) == expected
    seen = {"from": "observation", "value": "9"}
    rows = write({"messages": [U, turn, seen, A]}, {"messages": [U, turn]})
    texts, _ = load_texts(rows, tokenizer, None, "drop", train_on="last")
    assert [text.prompt_length for text in texts] == [
        len("[user]q[assistant]heat Oslo[tool]9[assistant]"), len("[user]q[assistant]")
    ]


def test_tool_calls_that_the_template_does_not_write_are_counted_or_refused(write, folder):
    """An answer that is nothing else would be an empty turn, which a policy learns to write."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CALLS.replace("m.tool_calls %}", "m.tool_calls and false %}")
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    seen, told = {"role": "tool", "content": "9"}, "tool calls that the chat template does not "
    said = turn | {"content": "Wait."}
    path = write({"messages": [U, turn, seen, A]}, {"messages": [U, A]}, {"messages": [U, said]})
    texts, report = load_texts(path, tokenizer, None, "drop", train_on="last")
    assert f"{told}write, in 2 rows" in report.notes and len(texts) == 3
    _, report = load_prompts(write({"prompt": [U, turn, seen]}), tokenizer, None, "drop")
    assert f"{told}write, in 1 rows" in report.notes
    pair = {"prompt": [U], "chosen": [A], "rejected": [turn]}
    for load, row in ((load_texts, {"messages": [U, turn]}), (load_pairs, pair)):
        with pytest.raises(UserError, match="and an answer is nothing else: take a mo") as caught:
            load(path := write(row), tokenizer, None, "drop")
        assert caught.value.where == f"{path}:1"
    tokenizer.chat_template = CALLS  # which does
    _, report = load_texts(write({"messages": [U, turn, seen, A]}), tokenizer, None, "drop")
    assert not report.notes


def test_a_message_lacks_what_is_null(write, tokenizer):
    turn = U | {"tool_calls": None, "name": None}
    (prompt,), _ = load_prompts(write({"messages": [turn]}), tokenizer, None, "drop")
    assert prompt.text == [U]


def test_a_malformed_first_row_does_not_tell_the_kind(write, tokenizer):
    path = write({"chosen": [], "rejected": []}, PAIR, PAIR)
    pairs, report = load_pairs(path, tokenizer, 8, "drop", policy=RowPolicy(bad_rows="skip"))
    assert (len(pairs), len(report.rejected_rows)) == (2, 1)


def test_what_cannot_be_spelled_is_the_fault_of_its_row(write, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer._control |= {spell("#")[0]}  # an eos that is a plain letter
    tokenizer.special_text = re.compile("#")
    path = write({"text": "a"}, {"text": "b#"})
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*cannot spell '#' as plain text"):
        load_texts(path, tokenizer, 8, "drop", policy=RowPolicy(spelled=True))
    policy = RowPolicy(bad_rows="skip", spelled=True)
    texts, _ = load_texts(path, tokenizer, 8, "drop", policy=policy)
    assert [text.where[-2:] for text in texts] == [":1"]


def test_load_texts_takes_ids_as_they_are(write):
    rows = ({"input_ids": [5, 6, 7], "prompt_length": 2}, {"input_ids": [5, 6]})
    texts, _ = load_texts(write(*rows), None, 8, "drop")
    assert [(text.ids, text.prompt_length) for text in texts] == [([5, 6, 7], 2), ([5, 6], 0)]


def test_a_finish_reason_says_nothing_of_preferences(write, tokenizer):
    (pair,), _ = load_pairs(write(PAIR | {"finish_reason": "length"}), tokenizer, None, "drop")
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == EOS


def test_what_sampling_cut_has_no_end(write, tokenizer):
    row = {"prompt": "p", "response": "a"}
    rows = [row | {"finish_reason": reason} for reason in ("length", "eos")]
    dialogues = [row | {"prompt": [U], "response": [A]} for row in rows]
    for some in (rows, dialogues):
        cut, whole = load_texts(write(*some), tokenizer, None, "drop")[0]
        assert cut.ids == whole.ids[:-1] and whole.ids[-1] == EOS and EOS not in cut.ids[-1:]


def test_whole_answers_end_as_the_template_does_and_strings_with_eos(write, tokenizer):
    """The plain template ends an answer with eos and a line end; transformers reads both."""
    end, tail = [*spell(" b"), EOS], spell("\n")
    sides = {"chosen": [U, B], "rejected": [U, A]}
    for row, whole, expected in (
        (sides, True, end + tail), (sides, False, end),
        ({"prompt": "q", "chosen": " b", "rejected": " a"}, True, end),
    ):
        (pair,), _ = load_pairs(write(row), tokenizer, None, "drop", whole=whole)
        assert pair.chosen_ids == expected
    row = {"prompt": [U], "response": [B]}
    rows = [row | {"finish_reason": reason} for reason in ("length", "eos")]
    cut, text = load_texts(write(*rows), tokenizer, None, "drop", whole=True)[0]
    assert cut.ids[cut.prompt_length :] == spell(" b")
    assert text.ids[text.prompt_length :] == end + tail
    lists = {"prompt": [U], "responses": [[B], [A]]}
    (ranking,), _ = load_preferences(write(lists), tokenizer, None, "drop", whole=True)
    assert ranking.responses[0] == end + tail


def test_whole_answers_need_no_eos(write, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_ids = ()
    sides = {"chosen": [U, B], "rejected": [U, A]}
    (pair,), _ = load_pairs(write(sides), tokenizer, None, "drop", whole=True)
    assert pair.chosen_ids == spell(" b\n")
    for row, whole in ((sides, False), ({"prompt": "q", "chosen": "b", "rejected": "a"}, True)):
        with pytest.raises(UserError, match="names no eos token"):
            load_pairs(write(row), tokenizer, None, "drop", whole=whole)


def test_texts_do_not_get_a_second_eos(write, folder, tokenizer):
    (text,), _ = load_texts(write({"messages": [U, A]}), tokenizer, None, "drop")
    assert text.ids.count(EOS) == 1  # the answer's own end of turn
    (text,), report = load_texts(write({"text": "a<|endoftext|> \n"}), tokenizer, None, "drop")
    assert text.ids == [*spell("a"), EOS]
    assert report.notes == [f"{ENDED}, in 1 rows"]


# --------------------------------------------------------------------------------------- refusals

DIALOGUES = {"chosen": [U, A], "rejected": [U, B]}
SPOKEN = {"chosen": TRANSCRIPT + "a", "rejected": TRANSCRIPT + "b"}
IDS = {"chosen_ids": [1], "rejected_ids": [2]}


@pytest.mark.parametrize(
    "load, first, second, what",
    [
        (load_pairs, PAIR, {"chosen": "c"},
         "rejected is missing: needs a string; keys present: chosen;"),
        (load_pairs, PAIR, {"chosen": 1, "rejected": "r"}, "chosen is a number: needs a string"),
        (load_pairs, PAIR, {"chosen": " ", "rejected": "r"}, "chosen is empty: remove the row"),
        (load_pairs, PAIR, PAIR | {"prompt": "p"}, "has a column prompt, unlike the first row"),
        (load_pairs, PAIR, DIALOGUES,
         "chosen is a list: needs a string.*detected: preference pairs"),
        (load_pairs, DIALOGUES, PAIR, "chosen is a string: needs a list of messages"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": []}, "chosen is empty"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": ["x"]},
         r"chosen\[0\] is a string: needs {role"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": [U, {"role": "assistant"}]},
         r"chosen\[1\]: content is missing"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": [U | {"role": 1}]},
         r"chosen\[0\]: role is a number"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": [U]}, "chosen ends with role 'user'"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": [V, A]},
         "chosen and rejected share no turns"),
        (load_pairs, DIALOGUES, DIALOGUES | {"chosen": [U, assistant("")]},
         "last message is empty"),
        (load_pairs, SPOKEN, PAIR, "share no"),
        (load_pairs, SPOKEN, SPOKEN | {"rejected": TRANSCRIPT}, "rejected has an empty answer"),
        (load_pairs, IDS, IDS | {"chosen_ids": [-1]},
         r"chosen_ids\[0\] is -1: a token id is an integer from 0"),
        (load_pairs, IDS, IDS | {"chosen_ids": "1"}, "chosen_ids is a string: needs a list"),
        (load_pairs, IDS, IDS | {"chosen_ids": [True]}, r"chosen_ids\[0\] is true: a token id"),
        (load_pairs, IDS, IDS | {"chosen_ids": []}, "chosen_ids is empty"),
        (load_pairs, IDS, IDS | {"chosen_ids": [258]},
         "token id 258: the tokenizer has the ids 0 to 257"),
        (load_pairs, {"input_ids_chosen": [1], "input_ids_rejected": [2]},
         {"input_ids_chosen": [1, 3], "input_ids_rejected": [2], "attention_mask_chosen": [1]},
         "attention_mask_chosen has 1 numbers, input_ids_chosen has 2: they must be as many"),
        (load_texts, {"input_ids": [1], "attention_mask": [1]},
         {"input_ids": [1], "attention_mask": [2]}, r"attention_mask\[0\] is 2: needs 0 or 1"),
        (load_texts, {"input_ids": [1], "attention_mask": [1]},
         {"input_ids": [1], "attention_mask": 1}, "attention_mask is a number: needs a list"),
        (load_prompts, {"prompt": "p"}, {"question": "p"},
         "prompt is missing.*keys present: question"),
        (load_prompts, {"prompt": "p"}, {"prompt": ""}, "prompt is empty"),
        (load_texts, {"text": "t"}, {"text": "\n"}, "text is empty"),
        (load_texts, {"messages": [U, A]}, {"messages": [U]},
         "messages has 1 of them, the last one of role 'user': needs at least two"),
        (load_texts, {"input_ids": [1]}, {"input_ids": [1], "labels": [-100]},
         "has labels, which is not read here: leave it out, and give prompt_length"),
        (load_texts, {"input_ids": [1]}, {"input_ids": [1], "prompt_length": 1},
         "prompt_length is 1: needs an integer from 0 to 0"),
    ],
)
def test_load_refuses_a_row_by_file_and_line(write, tokenizer, load, first, second, what):
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + what):
        load(write(first, second), tokenizer, None, "drop")


@pytest.mark.parametrize("load", [load_pairs, load_prompts, load_texts])
def test_load_refuses_columns_of_no_known_format(write, tokenizer, load):
    what = r"a\.jsonl:1: columns of no known format: question \(a string\): legal: .*; other"
    with pytest.raises(UserError, match=what):
        load(write({"question": "x"}), tokenizer, 8, "drop")


def test_load_refuses_a_tokenizer_without_eos(write, folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    bare = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="names no eos token, which every text ends with"):
        load_texts(write({"text": "t"}), bare, 8, "drop")
    assert load_prompts(write({"prompt": "t"}), bare, 8, "drop")[0][0].ids == spell("t")


def test_load_names_the_row_that_a_chat_template_refuses(write, folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*chat template failed: no system turn"):
        load_prompts(write({"messages": [U]}), tokenizer, 8, "drop")


def test_report_prints_one_block():
    report = Report("a.jsonl", "texts (text)", 20_000, 19_990, {"longer than max_length": 10}, 3)
    report.notes += ["margin missing in 2 rows: they count as 0", "warning: system not read"]
    assert str(report).splitlines() == [
        "a.jsonl: detected texts (text) · 20,000 rows · kept 19,990",
        "  dropped:  10 (longer than max_length)", "  truncated: 3 to max_length",
        "  note:     margin missing in 2 rows: they count as 0", "  warning: system not read",
    ]


@pytest.mark.parametrize("wrong", [{"margin": "x"}, {"chosen_probability": 1.5}])
def test_load_pairs_leaves_out_a_row_with_a_bad_label(write, tokenizer, wrong):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write(pair, pair | wrong, pair | {"margin": 2, "chosen_probability": 0.25})
    pairs, report = load_pairs(path, tokenizer, 8, "drop", policy=RowPolicy("skip"))
    assert [(p.margin, p.chosen_probability) for p in pairs] == [(0.0, 1.0), (2.0, 0.25)]
    ((where, reason, _),) = report.rejected_rows
    assert where == f"{path}:2"
    assert reason.startswith(f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}: needs a ")


# -------------------------------------------------------------------------------- texts as turns

CHAT = RowPolicy(chat=True)
ASIDE = "\n\nHuman: q\n\nAssistant: k\n\nHuman: s\n\nAssistant:"


@pytest.mark.parametrize(
    "load, row, expected",
    [
        (load_texts, {"prompt": "q", "completion": "a"}, {"prompt": [U], "completion": [A]}),
        (load_prompts, {"prompt": "q"}, {"prompt": [U]}),
        (load_prompts, {"text": "q"}, {"prompt": [U]}),
        (load_pairs, {"prompt": "q", **PAIR},
         {"prompt": [U], "chosen": [assistant("c")], "rejected": [assistant("r")]}),
        (load_pairs, {"chosen": f"{ASIDE} yes", "rejected": f"{ASIDE} yet"},
         {"prompt": [U, assistant("k"), V], "chosen": [assistant("yes")],
          "rejected": [assistant("yet")]}),
        (load_pairs,
         {"chosen": f"{ASIDE} yes\n\nHuman: q\n\nAssistant: a", "rejected": f"{ASIDE} r"},
         {"prompt": [U, assistant("k"), V], "chosen": [assistant("yes"), U, A],
          "rejected": [assistant("r")]}),
        (load_prompts, {"prompt": ASIDE}, {"prompt": [U, assistant("k"), V]}),
    ],
)
def test_chat_makes_turns_of_texts(write, tokenizer, load, row, expected):
    (found,), report = load(write(row), tokenizer, None, "drop", policy=CHAT)
    (right,), _ = load(write(expected), tokenizer, None, "drop")
    assert found == right
    assert report.detected.endswith(", as turns") and not report.notes


@pytest.mark.parametrize(
    "load, row", [(load_texts, {"messages": [U, A]}), (load_texts, {"input_ids": [5, 6]}),
                  (load_pairs, {"chosen_ids": [5], "rejected_ids": [6]})],
)
def test_chat_says_where_it_changes_nothing(write, tokenizer, load, row):
    path = write(row)
    (found,), report = load(path, tokenizer, None, "drop", policy=CHAT)
    assert [found] == load(path, tokenizer, None, "drop")[0]
    assert report.detected.endswith(", which --chat does not change")


@pytest.mark.parametrize("load, row", [(load_texts, {"text": "t"}), (load_pairs, PAIR)])
def test_chat_refuses_whole_texts(write, tokenizer, load, row):
    with pytest.raises(UserError, match=r"a\.jsonl:1: a whole text is no turn of a dialogue: give"):
        load(write(row), tokenizer, None, "drop", policy=CHAT)
    row = {"prompt": ASIDE, "chosen": " a\n\nHuman: q", "rejected": " b"}
    with pytest.raises(UserError, match=r"a\.jsonl:1: a transcript ends with a turn of the Human"):
        load_pairs(write(row), tokenizer, None, "drop", policy=CHAT)


@pytest.mark.parametrize(
    "row, bare",
    [
        ({"prompt": "q", "completion": "a"}, True),
        ({"prompt": [U], "completion": [A]}, False),
        ({"text": "q"}, False),
        ({"prompt": "q", "response": "a", "finish_reason": "eos"}, False),  # of `minirlhf sample`
    ],
)
def test_prompts_that_go_round_a_chat_template_are_told_once(write, folder, row, bare, tmp_path):
    tokenizer = load_tokenizer(folder)
    told = "warning: texts, read without the model's chat template: --chat makes turns of them"
    assert told not in load_texts(write(row), tokenizer, None, "drop")[1].notes  # it has none
    tokenizer.save(tmp_path / "export")  # which has the plain one
    again = load_tokenizer(tmp_path / "export")
    assert again.template_origin == "tokenizer_config.json"
    assert told not in load_texts(write(row), again, None, "drop")[1].notes
    tokenizer.chat_template, tokenizer.template_origin = CALLS, "chat_template.jinja"
    report = load_texts(write(row, row), tokenizer, None, "drop")[1]
    assert report.notes.count(told) == bare


def test_a_row_that_finish_has_no_use_for_is_dropped_and_counted(write, tokenizer):
    def finish(prompt):
        if prompt.text == "b":
            raise Useless("no room")
        return prompt

    rows = [{"prompt": text} for text in "abcb"]
    kept, report = load_prompts(write(*rows), tokenizer, None, "drop", finish=finish)
    assert [prompt.text for prompt in kept] == ["a", "c"]
    assert (report.kept, report.dropped) == (2, {"no room": 2})
    assert [row.where[-2:] for row in report.dropped_rows] == [":2", ":4"]


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "c"}, {"messages": [U, A]}])
def test_a_bar_shows_rows_being_tokenised_where_someone_looks_on(
    write, tokenizer, row, monkeypatch, capsys
):
    path = write(row, row)
    load_texts(path, tokenizer, None, "drop")
    assert not capsys.readouterr().err
    monkeypatch.setattr("minirlhf.data.encoding.DELAY", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_texts(path, tokenizer, None, "drop")
    assert "tokenise a.jsonl" in capsys.readouterr().err
