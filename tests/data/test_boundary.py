"""Where a prompt ends and its answer begins, in ids and back in text. transformers says what the
ids of a whole text are."""

import json
from collections import Counter

import pytest

from minirlhf.data.examples import load_pairs, load_texts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.data.vocabulary import CROSSED
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
    assert not counts


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
