"""Malformed rows under a policy: left out or mended, counted, and the rest read as ever."""

import gzip
import json
from dataclasses import replace

import pytest

from minirlhf.data.examples import Pair, load_pairs, load_prompts, load_texts, split_rows
from minirlhf.data.formats import text_format
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from minirlhf.files.rows import read_rows
from minirlhf.files.sieve import LeftOut, OfEveryRow, RowPolicy, Sieve
from minirlhf.setup.ppo_settings import PPOConfig
from tests.data.conftest import EOS

SKIP, FIX, EMPTY = (RowPolicy(bad_rows="skip"), RowPolicy(fix_text=True),
                    RowPolicy(allow_empty_prompt=True))


def write(folder, text, name="a.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(folder, *rows):
    """A file of rows, each as it stands or to be written as JSON."""
    text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return write(folder, "".join(f"{line}\n" for line in text))


def where(rejected):
    """Line numbers."""
    return [int(row.where.rpartition(":")[2]) for row in rejected]


# ---- the policy ----------------------------------------------------------------------------------


def test_policy_of_a_config_is_of_its_settings():
    config = PPOConfig(bad_rows="skip", fix_text=True, allow_empty_prompt=True, max_drop=0.5)
    assert RowPolicy.of(config) == RowPolicy("skip", True, True, 0.5)
    assert RowPolicy.of(PPOConfig()) == RowPolicy() == RowPolicy("error", False, False, 1.0)
    assert RowPolicy.of(PPOConfig(chat=True)).chat


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (UserError("a.jsonl:3", "is bad", "mend it"),
         "a.jsonl:3: is bad: mend it; --bad-rows skip leaves such rows out"),
        (UserError("a.jsonl:3", "is bad"),
         "a.jsonl:3: is bad: --bad-rows skip leaves such rows out"),
        (OfEveryRow("a.jsonl:1", "columns of no kind", "mend it"),
         "a.jsonl:1: columns of no kind: mend it"),  # no row would be left
    ],
)
def test_reject_raises_the_fault_and_the_way_out_where_bad_rows_are_errors(fault, told):
    with pytest.raises(UserError) as caught:
        Sieve().reject(fault, "{")
    assert str(caught.value) == told


def test_reject_keeps_where_why_and_the_text_escaped_and_capped():
    sieve = Sieve(SKIP)
    sieve.reject(UserError("b.jsonl:12", "is bad", "mend it"), "\x1b[31m\n" + "x" * 300)
    sieve.reject(UserError("b.jsonl:9", "is worse"), "{")
    first, second = sieve.rejected
    assert first[:2] == ("b.jsonl:12", "is bad: mend it")
    # \x1b and \n are 4 and 2 characters, [31m are 4; the last one stands for what was cut off
    assert first.raw == "\\x1b[31m\\n" + "x" * (200 - 4 - 2 - 4 - 1) + "…"
    assert second == LeftOut("b.jsonl:9", "is worse", "{")
    assert sieve.in_order() == [second, first]  # by number: as text 12 is before 9
    sieve.reject(UserError("b.jsonl:9 (row 20)", "is bad"), "{")
    sieve.reject(UserError("b.jsonl:9 (row 3)", "is bad"), "{")
    assert [row.where[8:] for row in sieve.in_order()] == ["9", "9 (row 3)", "9 (row 20)", "12"]


# ---- mending -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mended", "count"),
    [
        (r'"\ud83d"', r'"\ufffd"', 1),
        (r'"\uDE00x"', r'"\ufffdx"', 1),
        (r'"\ud83d\ude00"', r'"\ud83d\ude00"', 0),  # a whole pair
        (r'"\ude00\ud83d"', r'"\ufffd\ufffd"', 2),  # the halves the wrong way round
        (r'"\ud83d\ud83d\ude00"', r'"\ufffd\ud83d\ude00"', 1),
        (r'"\ud83d\n\ude00"', r'"\ufffd\n\ufffd"', 2),
        (r'"\\ud83d"', r'"\\ud83d"', 0),  # a backslash and five letters
        (r'"\\\ud83d"', r'"\\\ufffd"', 1),
        (r'"\ud7ff\ue000"', r'"\ud7ff\ue000"', 0),  # the neighbours of the surrogates
        ('"\\ud83', '"\\ud83', 0),
    ],
)
def test_mend_replaces_halves_of_surrogate_pairs_only(text, mended, count):
    sieve = Sieve(FIX)
    assert (sieve.mend(text), sieve.mended) == (mended, count)
    assert Sieve().mend(text) == text


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_fix_text_replaces_and_counts(tmp_path, tokenizer, ending):
    rows = ['{"text": "a\\ud83d"}', '{"text": "\\ude00\\ud83d", "\\udc00": 1}', '{"text": "b"}']
    text = "[" + ",\n".join(rows) + "]" if ending == "json" else "\n".join(rows)
    path = write(tmp_path, text, f"a.{ending}")
    with pytest.raises(UserError, match=r":1: half of a surrogate pair \(\\ud83d\) in a string"):
        load_texts(path, tokenizer, None, "drop")
    texts, report = load_texts(path, tokenizer, None, "drop", policy=FIX)
    assert [tokenizer.decode(text.ids) for text in texts] == ["a\ufffd", "\ufffd\ufffd", "b"]
    assert texts[1].columns == {"\ufffd": 1}
    assert report.notes == ["not read: \ufffd", "4 halves of surrogate pairs became U+FFFD"]
    assert "  note:     4 halves of surrogate pairs became U+FFFD" in str(report)


def test_fix_text_still_refuses_keys_that_become_one(tmp_path, tokenizer):
    path = lines(tmp_path, '{"text": "a", "\\udc00": 1, "\\udc01": 2}')
    with pytest.raises(UserError, match=r"a\.jsonl:1: key '\ufffd' stands twice in one object"):
        load_texts(path, tokenizer, None, "drop", policy=FIX)


# ---- leaving out ---------------------------------------------------------------------------------

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
DIRTY = (
    GOOD,
    '{"prompt": "p", "chosen": ',  # 2
    GOOD | {"chosen": 7},  # 3
    GOOD | {"rejected": "c"},  # 4: equal
    GOOD | {"prompt": "p" * 9},  # 5: too long
    "",  # 6: blank, no row
    '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": NaN}',  # 7
    GOOD | {"chosen": " "},  # 8
    GOOD | {"margin": "x"},  # 9
    '["p", "c", "r"]',  # 10
    {"chosen": "c", "rejected": "r"},  # 11: no prompt
    GOOD,
)


def test_skip_leaves_out_what_is_malformed_and_the_counts_add_up(tmp_path, tokenizer):
    path = lines(tmp_path, *DIRTY)
    pairs, report = load_pairs(path, tokenizer, 8, "drop", policy=SKIP)
    assert [pair.where for pair in pairs] == [f"{path}:1", f"{path}:12"]
    assert where(report.rejected_rows) == [2, 3, 7, 8, 9, 10, 11]
    assert where(report.dropped_rows) == [4, 5]
    assert report.dropped == {"chosen equals rejected": 1, "longer than max_length": 1}
    assert (report.rows, report.kept) == (11, 2) and 11 == 2 + 2 + 7  # all but the blank line
    told = {int(row.where.rpartition(":")[2]): row for row in report.rejected_rows}
    assert told[2].raw == DIRTY[1]
    assert told[2].reason.startswith("not valid JSON at column 2")
    assert told[7].reason == "NaN is not JSON"
    assert told[8].reason.startswith("chosen is empty: remove the row or fill it in; detected: ")
    assert told[9].reason == "margin is 'x': needs a finite number, or no margin"
    assert told[11].raw == '{"chosen": "c", "rejected": "r"}'
    shown = str(report).splitlines()
    assert shown[0].endswith("· 11 rows · kept 2")
    assert shown[1:3] == ["  dropped:  1 (chosen equals rejected)",
                          "  dropped:  1 (longer than max_length)"]
    assert shown[3].startswith(f"  rejected: 7 (first: {path}:2: not valid JSON at column 2")


def test_skip_reads_the_other_rows_as_if_they_stood_alone(tmp_path, tokenizer):
    pairs, _ = load_pairs(lines(tmp_path, *DIRTY), tokenizer, 8, "drop", policy=SKIP)
    alone, _ = load_pairs(lines(tmp_path, GOOD, GOOD), tokenizer, 8, "drop")
    assert [replace(pair, where="") for pair in pairs] == [replace(p, where="") for p in alone]


def test_skip_takes_faults_that_only_tokens_show(tmp_path, folder, tokenizer):
    ids = ({"input_ids": [1, 2]}, {"input_ids": [1, 258]}, {"input_ids": [1]})

    def two(text):
        if len(text.ids) < 2:
            raise UserError(text.where, "too short")
        return text

    texts, report = load_texts(
        lines(tmp_path, *ids), tokenizer, None, "drop", policy=SKIP, finish=two
    )
    assert [text.ids for text in texts] == [[1, 2]]
    assert [row[1] for row in report.rejected_rows] == [
        "token id 258: the tokenizer has the ids 0 to 257", "too short",
    ]
    with pytest.raises(UserError, match=r":3: too short"):
        load_texts(lines(tmp_path, ids[0], ids[0], ids[2]), tokenizer, None, "drop", finish=two)
    other = load_tokenizer(folder)
    other.chat_template = (
        "{% if messages[0]['role'] == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    turns = [{"messages": [{"role": role, "content": "hi"}]} for role in ("user", "x")]
    prompts, report = load_prompts(lines(tmp_path, *turns), other, None, "drop", policy=SKIP)
    assert (len(prompts), where(report.rejected_rows)) == (1, [2])
    assert "no x" in report.rejected_rows[0].reason


def test_skip_is_no_leave_to_drop_rows_that_are_too_long(tmp_path, tokenizer):
    path = lines(tmp_path, {"text": "a"}, {"text": "abc"})
    with pytest.raises(UserError, match=r"a\.jsonl:2: 4 tokens, max_length is 3"):
        load_texts(path, tokenizer, 3, "error", policy=SKIP)


@pytest.mark.parametrize(
    ("name", "content", "kept", "rejected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 1, [(2, '{"text": "\\xff"}')]),
        ("a.jsonl", '{"text": "a"}\n[\n]\n', 1, [(2, "["), (3, "]")]),
        ("a.txt", b"a\n\xff\nb\n", 2, [(2, "\\xff")]),
        ("a.json", '[{"text": "a"},\n3,\n{"text": "b"}]', 2, [(2, "3")]),
        ("a.json", '{"text": "a"}\n{"text": }\n', 1, [(2, '{"text": }')]),
        ("a.csv", "text,b\na,1\nb\nc,2,3\nd,4\n", 2, [(3, "b"), (4, "c,2,3")]),
        ("a.csv", 'text,b\n"a\nb",1\n"c\nd"\ne,2\n', 2, [(4, "c\\nd")]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\nx\n', mtime=0), 1, [(2, "x")]),
    ],
)
def test_every_format_skips_a_row_and_reads_the_next(
    tmp_path, tokenizer, name, content, kept, rejected
):
    path = write(tmp_path, content, name)
    texts, report = load_texts(path, tokenizer, None, "drop", policy=SKIP)
    assert len(texts) == report.kept == kept
    shown = [(*where([row]), row.raw) for row in report.rejected_rows]
    assert shown == rejected
    assert report.rows == kept + len(rejected)
    with pytest.raises(UserError, match=f"{name}:{rejected[0][0]}: "):
        list(split_rows(path, text_format, Sieve()))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '[{"text": "a"}, {"text": ]', ":1: not valid JSON at column 26"),
        ("a.json", '[{"text": "a"}', ":1: not valid JSON: rows in"),
        ("a.json", b'[{"text": "\xff"}]', ": not UTF-8 at byte 11"),
        ("a.csv", 'text,b\na,"1\nb,2\n', ":4: not valid CSV|:3: not valid CSV"),
        ("a.csv", b"text,b\na,1\n\xff,2\n", ":3: not UTF-8"),
        ("a.csv", "text,text\na,1\n", ":1: column names must be"),
        ("a.jsonl", b'{"text": "a"}\n' + b"x" * ((16 << 20) + 1), ":2: a line of more than"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], ": damaged gzip file"),
    ],
)
def test_skip_refuses_what_hides_where_the_next_row_begins(tmp_path, name, content, told):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=told):
        list(read_rows(path, Sieve(SKIP)))


# ---- how much may be left out --------------------------------------------------------------------


def test_max_drop_is_the_largest_share_that_may_be_left_out(tmp_path, tokenizer):
    path = lines(tmp_path, *DIRTY)  # 9 of 11 rows are left out
    load_pairs(path, tokenizer, 8, "drop", policy=RowPolicy("skip", max_drop=9 / 11))
    told = (r"a\.jsonl: 9 of 11 rows are left out, max_drop is 0\.81: dropped: 1 \(chosen equals "
            r"rejected\); dropped: 1 \(longer than max_length\); rejected: 7 \(first: .*:2: not "
            r"valid JSON.*\); mend the rows, or raise max_drop$")
    with pytest.raises(UserError, match=told):
        load_pairs(path, tokenizer, 8, "drop", policy=RowPolicy("skip", max_drop=0.81))


def test_max_drop_0_is_met_by_a_file_of_which_nothing_is_left_out(tmp_path, tokenizer):
    none = RowPolicy(max_drop=0.0)
    load_texts(lines(tmp_path, {"text": "a"}), tokenizer, None, "drop", policy=none)
    path = lines(tmp_path, *[{"text": "a"}] * 9, {"text": "abcdef"})
    with pytest.raises(UserError, match=r"1 of 10 rows are left out, max_drop is 0: dropped: 1 \("):
        load_texts(path, tokenizer, 4, "drop", policy=none)
    load_texts(path, tokenizer, 4, "truncate_response", policy=none)  # cut is not left out


# ---- empty prompts -------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": ""}, {"role": "assistant", "content": "a"}
OTHER = ANSWER | {"content": "b"}
A, B = 66, 67  # "a" and "b" of a tokenizer of bytes: 2 + 97 - 33


@pytest.mark.parametrize(
    ("load", "row", "expected"),
    [
        (load_pairs, {"prompt": "", "chosen": "a", "rejected": "b"}, ([], [A, EOS], [B, EOS])),
        (load_pairs, {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}, ([], [5], [6])),
        (load_texts, {"prompt": "", "completion": "a"}, ([A, EOS], 0)),
    ],
)
def test_allow_empty_prompt_lets_an_answer_stand_alone(tmp_path, tokenizer, load, row, expected):
    path = lines(tmp_path, row)
    with pytest.raises(UserError, match=r"a\.jsonl:1: prompt(_ids)? is empty: remove the row"):
        load(path, tokenizer, None, "drop")
    (made,), _ = load(path, tokenizer, None, "drop", policy=EMPTY)
    if isinstance(made, Pair):
        assert (made.prompt_ids, made.chosen_ids, made.rejected_ids) == expected
    else:
        assert (made.ids, made.prompt_length) == expected


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_pairs, {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}),
        (load_texts, {"prompt": [USER], "completion": [ANSWER]}),
        (load_prompts, {"prompt": [USER]}),
        (load_prompts, {"messages": [USER]}),
    ],
)
def test_allow_empty_prompt_takes_a_turn_without_text(tmp_path, tokenizer, load, row):
    path = lines(tmp_path, row)
    with pytest.raises(UserError, match=r"a\.jsonl:1: \w+: the last message is empty"):
        load(path, tokenizer, None, "drop")
    assert len(load(path, tokenizer, None, "drop", policy=EMPTY)[0]) == 1


def test_allow_empty_prompt_samples_from_beginning_of_text_or_not_at_all(
    tmp_path, folder, tokenizer, monkeypatch
):
    path = lines(tmp_path, {"prompt": "a"}, {"prompt": ""})
    with pytest.raises(UserError, match=r"a\.jsonl:2: prompt is empty"):
        load_prompts(path, tokenizer, None, "drop")
    told = r"a\.jsonl:2: a text without any token: the tokenizer puts no beginning-of-text there"
    with pytest.raises(UserError, match=told):
        load_prompts(path, tokenizer, None, "drop", policy=EMPTY)
    begins = load_tokenizer(folder)
    monkeypatch.setattr(begins, "_prefix", [1])
    prompts, _ = load_prompts(path, begins, None, "drop", policy=EMPTY)
    assert [(prompt.ids, prompt.text) for prompt in prompts] == [([1, A], "a"), ([1], "")]
    for bad in ({"prompt_ids": []}, {"prompt": []}):
        with pytest.raises(UserError, match=r"a\.jsonl:1: prompt(_ids)? is empty"):
            load_prompts(lines(tmp_path, bad), begins, None, "drop", policy=EMPTY)


def test_allow_empty_prompt_does_not_allow_an_empty_answer(tmp_path, tokenizer):
    for load, row in (
        (load_pairs, {"prompt": "", "chosen": "a", "rejected": ""}),
        (load_texts, {"prompt": "", "completion": ""}),
        (load_texts, {"text": ""}),
    ):
        with pytest.raises(UserError, match=r"a\.jsonl:1: \w+ is empty"):
            load(lines(tmp_path, row), tokenizer, None, "drop", policy=EMPTY)
