"""Where a prompt ends and its answer begins, in ids and back in text. transformers says what the
ids of a whole text are."""

import json
from collections import Counter

import pytest

from minirlhf.data.dialogues import PARTED, Dialogue
from minirlhf.data.examples import load_pairs, load_texts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.data.vocabulary import CROSSED
from minirlhf.errors import UserError
from tests.data import spm
from tests.tiny_folders import write_lines

transformers = pytest.importorskip("transformers")

ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}" \
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}" \
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}" \
    "{% endif %}{% endfor %}"
TEMPLATES = {"zephyr": ZEPHYR, "inst": INST}


def both(folder, kind, template=None, **tokens):
    """(ours, transformers') tokenizer of a kind."""
    spm.save(folder, kind, template, **tokens)
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("kind", spm.KINDS)
def test_the_ids_of_prompt_and_answer_are_those_of_the_whole_text(kind, tmp_path):
    ours, theirs = both(tmp_path, kind)
    rows = [("say hello to", " the water", "\nover there", ".", "é\n  x"), ("", "over", " over"),
            ("user:\n", "over there", " over"), ("the film. ", "¡"), ("a", "")]
    counts = Counter()
    for (prompt, *answers), ids in zip(rows, ours.encode_parts(rows, counts), strict=True):
        assert ids[0] == theirs(prompt)["input_ids"]
        for text, answer in zip(answers, ids[1:], strict=True):
            assert ids[0] + answer == theirs(prompt + text)["input_ids"], (prompt, text)
            if prompt:  # else some kinds write "over" and " over" alike
                assert ours.answer_text(prompt, ids[0], answer) == text
    assert not +counts


@pytest.mark.parametrize("kind", spm.KINDS)
def test_an_answer_is_encoded_by_itself_where_a_token_crosses_the_boundary(kind, tmp_path):
    # "wa" + "ter" is one token in "water", and so is a blank with the word behind it.
    ours, theirs = both(tmp_path, kind)
    rows, counts = [("say the wa", "ter", "."), ("say hello ", "to the water")], Counter()
    found = ours.encode_parts(rows, counts)
    assert counts == {CROSSED: 2}
    for (prompt, *answers), (head, *ids) in zip(rows, found, strict=True):
        assert head == theirs(prompt)["input_ids"]
        assert head + ids[0] != theirs(prompt + answers[0])["input_ids"]
        # No blank has come between them, neither on the way in nor on the way back.
        assert [ours.answer_text(prompt, head, answer) for answer in ids] == answers
        if kind != "bytes-blank":  # transformers' own reading of that kind begins with a blank
            whole = theirs.decode(head + ids[0], skip_special_tokens=True,
                                  clean_up_tokenization_spaces=False)
            assert whole == prompt + answers[0]
    head, _, dot = found[0]
    assert head + dot == theirs("say the wa.")["input_ids"]  # as if the other were not there


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", spm.KINDS)
def test_the_ids_of_a_dialogue_are_those_of_its_rendered_text(kind, name, tmp_path):
    ours, theirs = both(tmp_path, kind, TEMPLATES[name])
    for said in ("over there", "Hello!", "  x", "é"):
        turns = chat("where is the film", "a film.", "say hello", said)
        prompt, answer = ours.encode_dialogue(turns[:3], turns[3:], whole=True)
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert prompt + answer == ids
        assert prompt == theirs.apply_chat_template(
            turns[:3], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        _, answer = ours.encode_dialogue(turns[:3], turns[3:])  # to its eos
        assert ours.answer_text(turns[:3], prompt, answer) == said
        # An answer that goes on with a turn has its blank, which is not the template's.
        opened = [*turns[:3], {"role": "assistant", "content": "say"}]
        ids = ours.encode_dialogue(opened, chat("", " hello")[1:], resume=True)
        assert ours.answer_text(opened, ids[0], ids[1]) == " hello"


def test_a_long_prompt_is_encoded_once_for_all_its_answers(tmp_path, monkeypatch):
    ours, _ = both(tmp_path, "bytes", ZEPHYR)
    read, tokens = [], ours._tokens
    monkeypatch.setattr(ours, "_tokens", lambda texts, *named: read.extend(texts) or tokens(
        texts, *named))
    turns = chat("say hello " * 300)
    ours.encode_dialogue(turns, *(chat("", text)[1:] for text in ("over", "there", "film")))
    assert sum(text.count("hello") for text in read) == 300


def test_a_dialogue_that_begins_as_the_one_before_it_is_encoded_by_itself(tmp_path):
    """What is kept of the one before ends where a token was cut out; here "say" is one token."""
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    ours, theirs = both(tmp_path, "bytes", template)
    said = [chat("sa", "over"), chat("say hello", "over"), chat("say hello", "over", "a", "film"),
            chat("say hello", "over", "a film", "film")]
    for turns in (*said, *said[::-1]):
        ids = ours.encode_dialogue(turns[:-1], turns[-1:], whole=True)
        assert [*ids[0], *ids[1]] == theirs.apply_chat_template(turns, return_dict=False)


@pytest.mark.parametrize(
    "odd", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
)
@pytest.mark.parametrize("kind", ["prepend", "first", "bytes"])
def test_tokens_that_look_around_them_cut_a_dialogue_as_in_the_whole_text(kind, odd, tmp_path):
    """They may take the blank beside them, or be none behind a letter."""
    spm.save(tmp_path, kind, "{% for m in messages %}{{ m['content'] + ' </s>\\n' }}{% endfor %}")
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    parsed["added_tokens"][2] |= odd
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = chat("where is the film", "a film.", "say hello", "over there")
    prompt, answer = ours.encode_dialogue(turns[:3], turns[3:], whole=True)
    assert prompt + answer == theirs.apply_chat_template(turns, return_dict=False)


@pytest.mark.parametrize("kind", spm.KINDS)
def test_text_beside_the_name_of_a_control_token_has_the_ids_of_its_place(kind, tmp_path):
    ours, _ = both(tmp_path / "ours", kind, INST)
    _, theirs = both(tmp_path / "theirs", kind)
    parsed = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] != "</s>"]
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(parsed))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "theirs" / "tokenizer.json")
    )
    turns = chat("say </s> hello", "over there")
    prompt, answer = ours.encode_dialogue(turns[:1], turns[1:])
    text = "<s>[INST] say </s> hello [/INST] over there"  # of which </s> is no token to them
    assert prompt + answer == [*theirs(text, add_special_tokens=False)["input_ids"], 2]


def test_decoding_behind_a_control_token_gives_the_blank_of_the_text(tmp_path):
    for kind in ("prepend", "first"):
        ours, theirs = both(tmp_path / kind, kind, more=["[/INST]"])
        for text in ("over", " over"):
            ids = theirs("<s>say[/INST]" + text, add_special_tokens=False)["input_ids"]
            at = ids.index(3) + 1
            assert ours.decode_after(ids[:at], ids[at:]) == text


def test_sampled_ids_are_kept_up_to_a_stop_string(tmp_path):
    ours, _ = both(tmp_path, "prepend", INST)
    for prompt in ("say", chat("say")):
        if isinstance(prompt, str):
            (parts,) = ours.encode_parts([(prompt, " hello to the water.")])
        else:
            parts = ours.encode_dialogue(prompt, chat("", "hello to the water.")[1:])
        text = ours.answer_text(prompt, *parts)
        for end in range(len(text)):
            kept = ours.ids_of_answer(prompt, *parts, text[:end])
            assert ours.answer_text(prompt, parts[0], kept) == text[:end]
        own = [id for id in parts[1] if id != 2]
        assert ours.ids_of_answer(prompt, parts[0], own, text) == own


def test_reports_count_rows_whose_boundary_a_token_crosses(tmp_path):
    ours, theirs = both(tmp_path / "model", "prepend")
    row = {"prompt": "say the wa", "chosen": "ter", "rejected": " film"}
    rows = write_lines(tmp_path / "rows.jsonl", [row, row | {"prompt": "say the"}])
    pairs, report = load_pairs(rows, ours, None, "drop")
    assert report.notes == [f"{CROSSED}, in 1 rows"]
    assert pairs[1].prompt_ids + pairs[1].chosen_ids[:-1] == theirs("say theter")["input_ids"]


def test_sampled_rows_are_read_back_as_the_ids_they_were(tmp_path):
    ours, theirs = both(tmp_path / "model", "prepend", INST)
    rows = [
        {"prompt": "say hello", "response": " to the water", "finish_reason": "eos"},
        {"prompt": chat("say"), "response": chat("", "hello")[1:], "finish_reason": "eos"},
    ]
    wholes = [theirs("say hello to the water")["input_ids"] + [2],
              theirs("<s>[INST] say [/INST] hello</s>", add_special_tokens=False)["input_ids"]]
    for row, whole in zip(rows, wholes, strict=True):
        (text,), _ = load_texts(write_lines(tmp_path / "r.jsonl", [row]), ours, None, "drop")
        assert text.ids == whole


# ---- templates that write the prompt otherwise once an answer follows ----------------------------

# DeepSeek-R1's distilled models open a thought for the answer, and drop it from one that is there.
USER = "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
R1 = "{% for m in messages %}" + USER + \
    "{% else %}{{ m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
# Mistral's later ones write the system's text into the user's last turn, if nothing follows it.
LATE = "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}" \
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}" \
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and sys %}" \
    "{{ sys + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}{% else %}" \
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
TRIMMED = LATE.replace("' ' + m['content']", "' ' + m['content'][1:]")  # drops what stands before
NAMES = {"more": ["[INST]", "[/INST]"], "plain": ["<think>", "</think>"]}


@pytest.mark.parametrize("template, before, contents, prompt, answers", [
    (R1, None, ["say", "<think>hm</think>\n\nover"], "[INST] say[/INST]", ["\n\nover"]),
    (R1, None, ["say", "over"], "[INST] say[/INST]", ["over"]),
    (R1, None, ["say", "<b>", "</think><b>"], "[INST] say[/INST]", ["<b>", "<b>"]),
    (R1, None, ["say", "<think>\n</think>over", "<think>"], "[INST] say[/INST]",
     ["over", "<think>"]),
    (LATE, "be", ["say", "over", "there"], "[INST] say[/INST]", [" over", " there"]),
    # The system's text begins as the user's; the blank and "over" are two tokens.
    (LATE, "say hello", ["say", "over"], "[INST] say[/INST] ", ["over"]),
    # The mark before the answer is lost: its text begins where the user's ends.
    (TRIMMED, "be", ["say", "x over"], "[INST] say", ["[/INST]  over"]),
])
def test_a_prompt_ends_where_the_template_parts(
    template, before, contents, prompt, answers, tmp_path
):
    ours, theirs = both(tmp_path, "bytes", template, **NAMES)
    system = [{"role": "system", "content": before}] if before else []
    turns, counts = chat(*contents[:2]), Counter()
    replies = [[{"role": "assistant", "content": text}] for text in contents[1:]]
    (ids,) = ours.encode_dialogues([Dialogue(system + turns[:1], replies)], counts=[counts])
    assert [theirs.decode(part) for part in ids] == [prompt, *(f"{a}</s>" for a in answers)]
    assert +counts == {PARTED: 1}
    for reply, answer in zip(replies, ids[1:], strict=True):
        whole = theirs.apply_chat_template(
            system + turns[:1] + reply, tokenize=True, return_dict=False
        )
        assert ids[0] + answer == whole


def test_an_answer_of_which_a_template_leaves_nothing_is_refused(tmp_path):
    ours, _ = both(tmp_path / "model", "bytes", R1.replace("+ eos_token", ""), **NAMES)
    rows = [{"messages": chat("say", "over")}, {"messages": chat("say", "<think>hm</think>")}]
    with pytest.raises(UserError, match=r"r.jsonl:2: .*leaves nothing of an answer"):
        load_texts(write_lines(tmp_path / "r.jsonl", rows), ours, None, "drop")
    _, report = load_texts(write_lines(tmp_path / "r.jsonl", rows[:1]), ours, None, "drop")
    assert report.notes == [f"{PARTED}, in 1 rows"]
