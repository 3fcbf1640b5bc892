"""`minirlhf check`: what it counts and measures, and what it warns of."""

import json

import pytest
import tokenizers

from minirlhf.tools.check.facts import length_facts, pair_facts
from minirlhf.tools.check.rows import SeenRow, recipe_of
from tests.tiny_folders import change_json
from tests.tools.check.conftest import LLAMA, save_model, warned

PAIRS = [
    {"prompt": "it was ", "chosen": "good", "rejected": "bad", "margin": 1.0},
    {"prompt": "it was ", "chosen": "good", "rejected": "bad", "margin": 1.0},
    {"prompt": "it was ", "chosen": "bad", "rejected": "good", "margin": -2},
    {"prompt": "a film", "chosen": "same", "rejected": "same"},
    {"prompt": "so:\n", "chosen": "over and over", "rejected": "bad"},
]
IDS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 0], "rejected_ids": [9, 0]},
    {"prompt_ids": [5], "chosen_ids": [7, 0], "rejected_ids": [8, 9, 0]},
    {"prompt_ids": [5], "chosen_ids": [8, 0], "rejected_ids": [9, 0]},
]
LISTS = [
    {"prompt": "it was", "responses": [" bad", " good", " so so"], "ranks": [2, 1, 2]},
    {"prompt": "a film", "responses": [" bad", " good", " good"], "ranks": [3, 1, 1]},
    {"prompt": "so:\n", "responses": ["over and over", "bad"], "ranks": [1, 2]},
    {"prompt": "a film", "responses": [" bad", " good"], "ranks": [1, 2]},
    {"prompt": "we left", "responses": [" it", " now"], "ranks": [1, 1]},
    {"prompt": "we left", "responses": [" it", " it", " now"], "ranks": [1, 2, 3]},
]
LIST_IDS = [
    {"query": [5, 6], "sample0": [7, 0], "sample1": [8, 9, 9, 0], "sample2": [9, 0], "best": 1},
    {"query": [5], "sample0": [7, 0], "sample1": [8, 0], "sample2": [9, 9, 0], "best": 0},
]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


# ---- which recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ({"chosen": "a", "rejected": "b"}, "reward"),
        ({"prompt": "a", "chosen": "b"}, "reward"),  # where the lack of rejected is told
        ({"chosen_ids": [1], "rejected_ids": [2]}, "reward"),
        ({"prompt": "a", "responses": ["b", "c"]}, "reward"),
        ({"prompt": "a", "responses": "b"}, "reward"),  # where the lack of a list is told
        ({"prompt": "a", "completions": [{"response": "b"}]}, "reward"),
        ({"query": [1], "sample0": [2], "sample1": [3], "best": 0}, "reward"),
        ({"prompt": "a", "completion": "b"}, "sft"),
        ({"text": "a"}, "sft"),
        ({"input_ids": [1]}, "sft"),
        ({"messages": TURNS}, "sft"),
        ({"messages": TURNS[:1]}, "ppo"),
        ({"messages": TURNS[1:]}, "ppo"),
        ({"prompt": "a", "answer": "b"}, "ppo"),
        ({"prompt_ids": [1]}, "ppo"),
    ],
)
def test_recipe_of_reads_the_columns(write, row, recipe):
    assert recipe_of(write([row])) == recipe


@pytest.mark.parametrize(
    ("rows", "detected"),
    [
        (PAIRS, "preference pairs (prompt, chosen, rejected"),
        (LISTS, "ranked lists (prompt, responses, ranks)"),
        ([{"prompt": "it was", "completion": " good", "label": i == 1} for i in range(3)],
         "prompts with answers (prompt, completion), each with label"),
    ],
)
def test_check_reads_pairs_lists_and_single_answers_for_dpo(write, facts_of, lm, rows, detected):
    for words in ([], ["--model", lm]):
        (facts,) = facts_of(write(rows), "--recipe", "dpo", *words)
        assert facts["recipe"] == "dpo" and facts["detected"].startswith(detected)
        assert facts["kept"] > 1
        assert ("pairs" in facts) is ("label" not in rows[0])
    if "label" in rows[0]:
        assert "1 answers were liked, 2 were not" in facts["notes"]


def test_check_takes_the_recipe_that_is_given(write, facts_of):
    path = write([{"text": "a"}])
    assert [facts_of(path, *words)[0]["detected"] for words in ([], ["--recipe", "ppo"])] == [
        "texts (text)", "prompts (text)"
    ]


# ---- counts and lengths --------------------------------------------------------------------------


def test_facts_of_pairs_in_characters(write, facts_of):
    (facts,) = facts_of(write(PAIRS))
    assert (facts["recipe"], facts["rows"], facts["kept"]) == ("reward", 5, 4)
    assert facts["dropped"] == {"chosen equals rejected": 1}
    assert facts["different_prompts"] == 3
    assert facts["unit"] == "characters"  # of rows 1, 2, 3 and 5: row 4 is dropped
    assert facts["lengths"]["parts"]["chosen"] == {"min": 3, "median": 4.0, "p95": 13, "max": 13}
    assert facts["pairs"] == {
        "longer_wins": 3, "of_pairs": 4, "same_length": 0,
        "chosen_longer_by": 2.75,  # (1 + 1 - 1 + 10) / 4
        "margins": {"min": -2.0, "median": 1.0, "max": 1.0, "missing": 2},
    }
    assert warned(facts) == [
        ("the same row as one before", 1, 2),
        ("a pair that stands there both ways round", 3, 1),
        ("a negative margin: the rejected answer should win", 1, 3),
        ("a blank ends the prompt", 3, 1),
        ("no blank between prompt and answer", 1, 4),
    ]


def test_facts_of_lists_are_of_all_their_pairs_of_different_rank(write, facts_of):
    (facts,) = facts_of(write(LISTS))
    assert (facts["recipe"], facts["rows"], facts["kept"]) == ("reward", 6, 4)
    assert facts["detected"] == "ranked lists (prompt, responses, ranks)"
    assert facts["dropped"] == {"all responses tie": 1, "equal responses with different ranks": 1}
    assert [row["where"] for row in facts["dropped_rows"]] == ["rows.jsonl:5", "rows.jsonl:6"]
    # characters, best - worse; row 1: 5-4, 5-6; row 2: 5-4 twice; row 3: 13-3; row 4: 4-5
    assert facts["pairs"] == {
        "longer_wins": 4, "of_pairs": 6, "same_length": 0,
        "chosen_longer_by": pytest.approx((1 - 1 + 1 + 1 + 10 - 1) / 6),
        "margins": {"missing": 0},
    }
    # of 3, 3, 2 and 2 responses; in row 1 " bad" and " so so" tie, in row 2 both " good"
    assert facts["lists"] == {"responses": {"min": 2, "median": 2.5, "max": 3}, "tied_pairs": 2}
    parts = facts["lengths"]["parts"]
    assert list(parts) == ["prompt", "best", "others"]
    # best: 5 | 5 5 | 13 | 4; others: 4 6 | 4 | 3 | 5
    assert parts["best"] == {"min": 4, "median": 5.0, "p95": 13, "max": 13}
    assert parts["others"] == {"min": 3, "median": 4.0, "p95": 6, "max": 6}
    assert warned(facts) == [  # rows 2 and 4 prefer " good" and " bad" to each other
        ("a pair that stands there both ways round", 2, 2),
        ("a list with the same response twice", 2, 2),
    ]


@pytest.mark.parametrize("with_model", [False, True])
def test_facts_of_ids_are_in_tokens_with_and_without_a_model(write, lm, facts_of, with_model):
    words = ("--model", lm) if with_model else ()
    (pairs,), (lists,) = (facts_of(write(rows), *words) for rows in (IDS, LIST_IDS))
    assert (pairs["unit"], lists["unit"]) == ("tokens", "tokens")
    assert pairs["lengths"]["parts"]["prompt"] == {"min": 1, "median": 1.0, "p95": 2, "max": 2}
    assert pairs["lengths"]["parts"]["chosen"] == {"min": 2, "median": 2.0, "p95": 4, "max": 4}
    assert lists["lengths"]["parts"]["best"] == {"min": 2, "median": 3.0, "p95": 4, "max": 4}
    compared = [[facts["pairs"][name] for name in ("longer_wins", "of_pairs", "same_length")]
                for facts in (pairs, lists)]
    assert compared == [[1, 2, 1], [2, 3, 1]]  # of the lists: 4-2, 4-2 | 2-2, 2-3
    assert lists["lists"]["tied_pairs"] == 2
    assert pairs["warnings"] == lists["warnings"] == []


@pytest.mark.parametrize(
    ("rows", "words", "beyond", "kept", "cut"),
    [  # pairs of 6, 4 and 3 tokens; lists whose longest response makes 6 and 4
        (IDS, [3], 2, 1, 0),
        (IDS, [4, "--overlong", "truncate_response"], 1, 3, 1),
        (IDS, [6], 0, 3, 0),
        (LIST_IDS, [5], 1, 1, 0),
        (LIST_IDS, [5, "--overlong", "truncate_response"], 1, 2, 1),
    ],
)
def test_check_counts_rows_beyond_the_limits(write, lm, facts_of, rows, words, beyond, kept, cut):
    (facts,) = facts_of(write(rows), "--model", lm, "--max-length", *words)
    assert facts["limits"]["max_length"] == {"tokens": words[0], "rows_beyond": beyond}
    assert facts["limits"]["positions"] == {"tokens": 48, "rows_beyond": 0}
    dropped = len(rows) - kept
    assert facts["dropped"] == ({"longer than max_length": dropped} if dropped else {})
    assert (facts["kept"], facts["truncated"]) == (kept, cut)


@pytest.mark.parametrize(("words", "most", "beyond"), [([], 8, 1), (["--max-length", 3], 3, 2)])
def test_check_gives_prompts_the_room_before_the_new_tokens(
    write, lm, facts_of, words, most, beyond
):
    path = write([{"prompt_ids": [5] * n} for n in (3, 8, 9)])
    settings = (path, "--model", lm, "--overlong", "drop", "--max-new-tokens", 40)
    (facts,) = facts_of(*settings, *words)  # 48 positions
    assert facts["limits"]["max_length"] == {"tokens": most, "rows_beyond": beyond}
    assert facts["kept"] == 3 - beyond


def test_check_finds_what_files_share(write, facts_of):
    train = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    train += [{"prompt": "d", "chosen": "e", "rejected": "f"}]
    held = [train[1], {"prompt": "a", "chosen": "x", "rejected": "y"}]
    held += [{"prompt": "g", "chosen": "b", "rejected": "c"}]  # a prompt of its own
    alone, shared = facts_of("--data", write(train, "1.jsonl"), write(held, "2.jsonl"))
    assert "shared" not in alone
    assert shared["shared"] == {"with": "1.jsonl", "rows": 1, "prompts_or_answers": 2}
    assert ("also in 1.jsonl", 1, 1) in warned(shared)
    assert ("prompt or answer also in 1.jsonl", 2, 1) in warned(shared)


def test_check_finds_shared_answers_of_pairs_without_prompts(write, facts_of):
    first = write([{"chosen": "a", "rejected": "b"}], "1.jsonl")
    held = [{"chosen": "c", "rejected": "a"}, {"chosen": "c", "rejected": "d"}]
    _, shared = facts_of(first, write(held, "2.jsonl"))
    assert (shared["shared"]["rows"], shared["shared"]["prompts_or_answers"]) == (0, 1)


def test_check_compares_lists_best_first(write, facts_of):
    in_order = [{"prompt": "it was", "responses": [" good", " bad", " so so"]},  # LISTS[0]
                {"prompt": "a film", "responses": [" x", " y"]}]
    scored = [{"prompt": "it was", "responses": [" so so", " good", " bad"], "scores": [0, 9, 1]}]
    files = [(LISTS[:2], "1.jsonl"), (in_order, "2.jsonl"), (scored, "3.jsonl")]
    _, *facts = facts_of(*(write(rows, name) for rows, name in files))
    assert [row["shared"] for row in facts] == [
        {"with": "1.jsonl", "rows": 1, "prompts_or_answers": 2},
        {"with": "1.jsonl", "rows": 1, "prompts_or_answers": 1},
    ]


def rows_of(*lengths: int) -> list[SeenRow]:
    """Rows with nothing but a prompt of so many tokens."""
    return [SeenRow("", [[5] * length], []) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "bins", "counts"),
    [
        ([3, 4, 4, 6], ["3", "4", "5", "6"], [1, 2, 0, 1]),
        ([0] + [7] * 9, ["0-1", "2-3", "4-5", "6-7"], [1, 0, 0, 9]),  # bins of 1: no tail
        ([10] * 50 + [33] * 48 + [500, 900],  # p95 is 33, so bins are 5 wide
         ["10-14", "15-19", "20-24", "25-29", "30-34", "35-39", "40-44", "45+"],
         [50, 0, 0, 0, 48, 0, 0, 2]),
    ],
)
def test_length_facts_makes_round_bins_with_an_open_tail(lengths, bins, counts):
    facts = length_facts(("prompt",), rows_of(*lengths))
    assert (facts["bins"], facts["counts"]) == (bins, {"prompt": counts})


def test_pair_facts_of_equally_long_answers():
    rows = [SeenRow("", [[5], [5] * n, [6] * n], [1, 2]) for n in (2, 3)]
    facts = pair_facts(rows, [None, None])
    assert (facts["of_pairs"], facts["same_length"], facts["margins"]) == (0, 2, {"missing": 2})


# ---- warnings ------------------------------------------------------------------------------------


def pairs_of(count: int, longer: int) -> list[dict]:
    return [{"chosen": f"{i} aa", "rejected": f"{i} a"} if i < longer else
            {"chosen": f"{i} b", "rejected": f"{i} bb"} for i in range(count)]


def lists_of(count: int, longer: int) -> list[dict]:
    """Of 3 responses, which are 3 pairs."""
    return [{"prompt": f"{i}", "responses": [" aaa", " aa", " a"][:: 1 if i < longer else -1]}
            for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "longer"),  # more than 2 of 3 pairs, of 30 or more
    [(pairs_of(30, 21), 21), (pairs_of(30, 20), None), (pairs_of(29, 29), None),
     (lists_of(10, 7), 7), (lists_of(10, 6), None)],
)
def test_check_warns_where_the_longer_answer_wins(write, facts_of, rows, longer):
    (facts,) = facts_of(write(rows))
    what = "the longer answer wins: length alone may be learned"
    assert warned(facts) == ([(what, longer, 1)] if longer else [])


EACH = "{% for m in messages %}{{ m.content }}|{% endfor %}"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "so \ufffd", "response": " no"}, "U+FFFD"),
        ({"prompt": "so ", "response": "no"}, "a blank ends the prompt"),
        ({"prompt": "so?", "response": "no"}, "no blank between prompt and answer"),
        ({"input_ids": [5, 6, 7]}, "no eos at the end: nothing there teaches to stop"),
        ({"input_ids": [1, 1, 7, 0]}, "the beginning-of-text token twice"),
        ({"input_ids": [1, 7, 1, 8, 0], "prompt_length": 2}, "the beginning-of-text token twice"),
        ({"messages": [{"role": "user", "content": " "}, TURNS[1]]}, "a turn without text"),
        ({"prompt": "so?\n", "response": "no"}, None),
        ({"prompt": "so?", "response": " no"}, None),
        ({"prompt": "\u597d", "response": "\u597d"}, None),  # a script without blanks
        ({"input_ids": [1, 7, 8, 1, 0]}, None),
        ({"messages": TURNS}, None),
    ],
)
def test_check_warns_of_an_odd_row_alone(tmp_path, write, lm, facts_of, row, what):
    template = EACH if "messages" in row else "{{ messages | length }}<|endoftext|>"
    change_json(tmp_path / "lm/tokenizer_config.json", bos_token="<|pad|>", chat_template=template)
    (facts,) = facts_of(write([row]), "--model", lm)
    assert warned(facts) == ([(what, 1, 1)] if what else [])


def test_check_warns_where_the_model_has_no_chat_template(write, lm, facts_of):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a film", "bad")]
    (facts,) = facts_of(write(rows), "--model", lm, "--max-new-tokens", 4)
    assert warned(facts) == [("written by a plain template", 2, 1)]


def test_check_counts_unknown_tokens(tmp_path, write, facts_of):
    words = {"[UNK]": 0, "[EOS]": 1, "a": 2, "film": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[EOS]", "[UNK]"])
    folder = save_model(tmp_path / "words", {**LLAMA, "eos_token_id": 1}, 4)
    backend.save(str(tmp_path / "words/tokenizer.json"))
    path = write([{"text": "a film"}, {"text": "what a what"}])
    (facts,) = facts_of(path, "--model", folder)  # a film [EOS], [UNK] a [UNK] [EOS]
    (warning,) = facts["warnings"]
    assert warning == {"what": "unknown tokens, 28.57% of all tokens", "rows": 1,
                       "first": f"{path}:2"}


def test_facts_are_json_without_surprises(write, lm, facts_of):
    (facts,) = facts_of(write(LISTS[:4]), "--model", lm)
    assert json.loads(json.dumps(facts)) == facts
    (first,) = (sample for sample in facts["samples"] if "first" in sample["why"])
    assert [(part["part"], part["text"]) for part in first["parts"]] == [
        ("prompt", "it was"), ("rank 1", " good<|endoftext|>"),
        ("rank 2", " bad<|endoftext|>"), ("rank 2", " so so<|endoftext|>"),
    ]
