"""`minirlhf check` of ranked lists: all that it tells of pairs, of all pairs in them."""

import json

import pytest

from minirlhf.cli import main
from minirlhf.data.tokenizer import train_tokenizer
from tests.tools.check.test_command import LLAMA, TEXTS, save_model, warned, write_lines

LISTS = [
    {"prompt": "it was", "responses": [" bad", " good", " so so"], "ranks": [2, 1, 2]},
    {"prompt": "a film", "responses": [" bad", " good", " good"], "ranks": [3, 1, 1]},
    {"prompt": "so:\n", "responses": ["over and over", "bad"], "ranks": [1, 2]},
    {"prompt": "a film", "responses": [" bad", " good"], "ranks": [1, 2]},
    {"prompt": "we left", "responses": [" it", " now"], "ranks": [1, 1]},
    {"prompt": "we left", "responses": [" it", " it", " now"], "ranks": [1, 2, 3]},
]
IDS = [
    {"query": [5, 6], "sample0": [7, 0], "sample1": [8, 9, 9, 0], "sample2": [9, 0], "best": 1},
    {"query": [5], "sample0": [7, 0], "sample1": [8, 0], "sample2": [9, 9, 0], "best": 0},
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(TEXTS, 280, folder)
    return save_model(folder, LLAMA, tokenizer.vocab_size)


@pytest.fixture
def check(tmp_path, capsys):
    """check(rows, words) -> (facts of the file, stdout), of a command that must succeed."""

    def command(rows: list[dict], *words: object) -> tuple[dict, str]:
        path, facts = write_lines(tmp_path / "lists.jsonl", rows), tmp_path / "facts.json"
        assert main(["check", path, "--json", str(facts), *map(str, words)]) == 0
        told = capsys.readouterr()
        assert told.err == ""
        found = json.loads(facts.read_text("utf-8"))["files"][0]
        facts.unlink()
        return found, told.out.replace(str(tmp_path) + "/", "")

    return command


def test_check_counts_what_is_wrong_with_lists(check, tmp_path):
    facts, _ = check(LISTS)
    assert (facts["recipe"], facts["rows"], facts["kept"]) == ("reward", 6, 4)
    assert facts["detected"] == "ranked lists (prompt, responses, ranks)"
    assert facts["dropped"] == {"all responses tie": 1, "equal responses with different ranks": 1}
    assert [row["where"][-2:] for row in facts["dropped_rows"]] == [":5", ":6"]
    path = tmp_path / "lists.jsonl"
    assert warned(facts) == [  # rows 2 and 4 prefer " good" and " bad" to each other
        ("a pair that stands there both ways round", 2, f"{path}:2"),
        ("a list with the same response twice", 2, f"{path}:2"),
    ]


def test_check_counts_all_pairs_of_different_rank(check):
    facts, _ = check(LISTS)
    # characters, best - worse; row 1: 5-4, 5-6; row 2: 5-4 twice; row 3: 13-3; row 4: 4-5
    assert facts["pairs"] == {
        "longer_wins": 4, "of_pairs": 6, "same_length": 0,
        "chosen_longer_by": pytest.approx((1 - 1 + 1 + 1 + 10 - 1) / 6),
        "margins": {"missing": 0},
    }
    # of 3, 3, 2 and 2 responses; in row 1 " bad" and " so so" tie, in row 2 both " good"
    assert facts["lists"] == {"responses": {"min": 2, "median": 2.5, "max": 3}, "tied_pairs": 2}


def test_check_measures_the_best_and_the_others(check):
    facts, _ = check(LISTS)
    sides = facts["lengths"]["sides"]
    assert list(sides) == ["prompt", "best", "others"]
    # best: 5 | 5 5 | 13 | 4; others: 4 6 | 4 | 3 | 5
    assert sides["best"] == {"min": 4, "median": 5.0, "p95": 13, "max": 13}
    assert sides["others"] == {"min": 3, "median": 4.0, "p95": 6, "max": 6}


@pytest.mark.parametrize("with_model", [False, True])
def test_check_measures_ids_of_lists_in_tokens(check, lm, with_model):
    facts, _ = check(IDS, *(("--model", lm) if with_model else ()))
    assert facts["unit"] == "tokens" and facts["warnings"] == []
    assert facts["lengths"]["sides"]["best"] == {"min": 2, "median": 3.0, "p95": 4, "max": 4}
    # 4-2, 4-2 | 2-2, 2-3
    assert [facts["pairs"][n] for n in ("longer_wins", "of_pairs", "same_length")] == [2, 3, 1]
    assert facts["lists"]["tied_pairs"] == 2


def test_check_counts_lists_beyond_the_limit(check, lm):
    # tokens of prompt and longest response: 2 + 4, 1 + 3
    words = ("--model", lm, "--max-length", 5)
    facts, _ = check(IDS, *words)
    assert facts["limits"]["max_length"] == {"tokens": 5, "rows_beyond": 1}
    assert (facts["kept"], facts["dropped"]) == (1, {"longer than max_length": 1})
    facts, _ = check(IDS, *words, "--overlong", "truncate_response")
    assert (facts["kept"], facts["cut"]) == (2, 1)


def test_check_shows_each_response_best_first_with_its_rank(check, lm):
    facts, out = check(LISTS[:4], "--model", lm)
    (sample,) = (sample for sample in facts["samples"] if "first" in sample["why"])
    assert [(side["side"], side["text"]) for side in sample["sides"]] == [
        ("prompt", "it was"), ("rank 1", " good<|endoftext|>"),
        ("rank 2", " bad<|endoftext|>"), ("rank 2", " so so<|endoftext|>"),
    ]
    lines = out.splitlines()
    assert "    rank 1    >>> good<|endoftext|>" in lines
    assert "  lists:    2 to 3 responses, median 2.5; pairs of equal rank: 2" in lines
    assert any(line.startswith("  the longer answer wins ") for line in lines)
    assert lines[-1] == "ok: 4 of 4 rows can be used"


def test_check_shows_what_lists_are_dropped_for(check):
    _, out = check(LISTS)
    lines = out.splitlines()
    assert "  dropped:  1 (all responses tie)" in lines
    assert "  dropped:  1 (equal responses with different ranks)" in lines
    assert lines[-1] == "ok: 4 of 6 rows can be used"


@pytest.mark.parametrize(("longer", "warns"), [(7, True), (6, False)])
def test_check_warns_where_the_longer_responses_win(check, longer, warns):
    """10 lists of 3 are 30 pairs; 7 lists are 21 of them, more than 2 in 3."""
    rows = [
        {"prompt": f"{i}", "responses": [" aaa", " aa", " a"][:: 1 if i < longer else -1]}
        for i in range(10)
    ]
    what = "the longer answer wins: a reward model may learn length alone"
    assert warned(check(rows)[0]) == ([(what, longer, None)] if warns else [])


def test_check_finds_what_files_of_lists_share(tmp_path, capsys):
    first = write_lines(tmp_path / "1.jsonl", LISTS[:2])
    held = [{"prompt": "it was", "responses": [" so so", " good", " bad"], "scores": [0, 9, 1]}]
    held += [{"prompt": "it was", "responses": [" good", " bad", " so so"]}]  # LISTS[0], in order
    held += [{"prompt": "a film", "responses": [" x", " y"]}]
    rows = [{key: row[key] for key in ("prompt", "responses")} for row in held[1:]]
    second = write_lines(tmp_path / "2.jsonl", rows)
    third = write_lines(tmp_path / "3.jsonl", held[:1])
    assert main(["check", first, second, third, "--json", str(tmp_path / "facts.json")]) == 0
    capsys.readouterr()
    _, *facts = json.loads((tmp_path / "facts.json").read_text("utf-8"))["files"]
    assert [row["shared"] for row in facts] == [
        {"with": first, "rows": 1, "prompts_or_answers": 2},  # best first, they read alike
        {"with": first, "rows": 1, "prompts_or_answers": 1},
    ]


def test_check_takes_lists_for_the_model_that_reads_before_eos(check, tmp_path, lm):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "rm")
    folder = save_model(tmp_path / "rm", LLAMA, tokenizer.vocab_size, reward=True)
    config = json.loads((tmp_path / "rm/config.json").read_text())
    (tmp_path / "rm/config.json").write_text(json.dumps({**config, "read_before_eos": True}))
    _, out = check(LISTS[:4], "--model", folder)
    assert "    rank 1    >>> good\n" in out
    assert "no eos" not in out


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "responses": "b"}], "lists.jsonl:1: responses is a string: needs a list"),
        ([{"prompt": "a", "responses": ["b"]}], "lists.jsonl:1: 1 responses: needs two or more"),
        ([LISTS[0], {**LISTS[0], "ranks": [1, 2]}], "lists.jsonl:2: 2 ranks, 3 responses"),
        ([{**LISTS[0], "margin": "x"}], "lists.jsonl:1: has a column margin, which only pairs"),
        ([LISTS[0], {"chosen": "a", "rejected": "b"}], "lists.jsonl:2: has none of ranks, scores"),
        ([LISTS[4]], "lists.jsonl: no row left of 1: dropped: 1 (all responses tie)"),
    ],
)
def test_check_refuses_lists(rows, told, tmp_path, capsys):
    path = write_lines(tmp_path / "lists.jsonl", rows)
    assert main(["check", path]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_check_leaves_out_malformed_lists(check):
    facts, out = check([LISTS[0], {**LISTS[0], "ranks": [1, 2]}], "--bad-rows", "skip")
    assert (facts["kept"], len(facts["rejected_rows"])) == (1, 1)
    assert "  rejected: 1 (first: lists.jsonl:2: 2 ranks, 3 responses" in out
