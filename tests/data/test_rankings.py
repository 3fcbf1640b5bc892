"""Ranked lists: each kind of row -> responses best first and their ranks, and every refusal."""

from dataclasses import replace

import pytest

from minirlhf.data.examples import Pair
from minirlhf.data.rankings import Ranking, load_preferences, load_rankings
from minirlhf.errors import UserError
from minirlhf.files.sieve import LeftOut, RowPolicy
from tests.data.conftest import EOS, spell


def answers(ranking):
    return [[chr(i - 2 + ord("!")) for i in ids if i != EOS] for ids in ranking.responses]


LISTED = {"prompt": "p", "responses": ["a", "b", "c"]}
QUERY = {"query": [5], "sample0": [6], "sample1": [7, 8], "sample2": [9]}


@pytest.mark.parametrize(
    ("columns", "order", "ranks", "label"),
    [
        ({}, "abc", [1, 2, 3], "best first"),
        ({"ranks": [3, 1, 2]}, "bca", [1, 2, 3], "ranks"),
        ({"ranks": [1, 4, 1]}, "acb", [1, 1, 2], "ranks"),  # ties keep the file's order
        ({"scores": [0.5, -1, 2]}, "cab", [1, 2, 3], "scores"),
        ({"scores": [1, 1.0, 2]}, "cab", [1, 2, 2], "scores"),
        ({"best": 2}, "cab", [1, 2, 2], "best"),
        ({"choice": 0}, "abc", [1, 2, 2], "choice"),
    ],
)
def test_load_rankings_orders_responses(write, tokenizer, columns, order, ranks, label):
    path = write(LISTED | columns | {"source": "x"})
    (found,), report = load_rankings(path, tokenizer, 8, "drop")
    assert answers(found) == [[c] for c in order]
    assert all(ids[-1] == EOS for ids in found.responses)
    assert (found.prompt_ids, found.ranks) == (spell("p"), ranks)
    assert (found.where, found.columns) == (f"{path}:1", {"source": "x"})
    scores = columns.get("scores")
    assert found.scores == (scores and sorted(scores, reverse=True))
    assert report.detected == f"ranked lists (prompt, responses, {label})"


def test_load_rankings_of_completions(write, tokenizer):
    rows = [{"response": r, "score": s, "model": "m"} for r, s in (("a", 1), ("b", 3.5), ("c", 1))]
    (found,), report = load_rankings(
        write({"prompt": "p", "completions": rows}), tokenizer, 8, "drop"
    )
    assert answers(found) == [["b"], ["a"], ["c"]] and found.ranks == [1, 2, 2]
    assert found.scores == [3.5, 1.0, 1.0]
    assert report.detected == "ranked lists (prompt, completions of response and score)"


def test_load_rankings_of_token_ids_needs_no_tokenizer(write):
    path = write(QUERY | {"best": 1}, QUERY | {"best": 0, "extra": 3})
    found, report = load_rankings(path, None, None, "drop")
    assert found == [
        Ranking([5], [[7, 8], [6], [9]], [1, 2, 2], f"{path}:1", {}),
        Ranking([5], [[6], [7, 8], [9]], [1, 2, 2], f"{path}:2", {"extra": 3}),
    ]
    assert report.detected == "tokenised ranked lists (query, sample0 to sample2, best)"


def test_load_rankings_of_token_ids_have_a_column_of_another_name(write):
    path = write(QUERY | {"best": 1, "completions": ["x"]})
    (found,), _ = load_rankings(path, None, None, "drop")
    assert (found.ranks, found.scores) == ([1, 2, 2], None)
    assert found.columns == {"completions": ["x"]}


def test_load_rankings_of_messages(write, tokenizer):
    prompt = [{"role": "user", "content": "q"}]
    responses = [[{"role": "assistant", "content": c}] for c in "ab"]
    for mixed in ({}, {"prompt": "q"}, {"responses": ["a", "b"]}):
        row = {"prompt": prompt, "responses": responses, "best": 1} | mixed
        (found,), _ = load_rankings(write(row), tokenizer, None, "drop")
        assert found.prompt_ids == spell("user: q\nassistant:")
        assert found.responses == [[*spell(" b"), EOS], [*spell(" a"), EOS]]


def test_load_rankings_takes_lists_of_any_length(write, tokenizer):
    path = write(LISTED, LISTED | {"responses": ["d", "e"]}, LISTED | {"responses": [*"vwxyz"]})
    found, _ = load_rankings(path, tokenizer, 8, "drop")
    assert [len(f.responses) for f in found] == [3, 2, 5]
    assert answers(found[1]) == [["d"], ["e"]] and answers(found[2])[4] == ["z"]


def test_load_rankings_drops_and_counts_what_says_nothing(write, tokenizer):
    row = {"prompt": "p", "responses": ["a", "b", "a"]}
    path = write(
        row | {"ranks": [2, 2, 2]},  # all tie
        row | {"ranks": [1, 2, 3]},  # the same text is first and last
        row | {"ranks": [2, 1, 2]},  # the same text ties with itself
        {"prompt": "p", "responses": ["a", "long answer", "b"], "ranks": [1, 2, 3]},
    )
    found, report = load_rankings(path, tokenizer, 8, "drop")
    assert [f.where for f in found] == [f"{path}:3"]
    assert report.dropped == {
        "all responses tie": 1, "equal responses with different ranks": 1,
        "longer than max_length": 1,
    }
    assert (report.rows, report.kept) == (4, 1)


def test_load_rankings_cuts_responses_that_may_then_be_equal(write, tokenizer):
    row = {"prompt": "p", "responses": ["abc", "abd", "x"]}
    with pytest.raises(UserError, match=r"no row left of 1: dropped: 1 \(equal responses with"):
        load_rankings(write(row), tokenizer, 3, "truncate_response")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (LISTED | {"ranks": [1, 2]}, r"a.jsonl:1: 2 ranks, 3 responses: needs as many"),
        (LISTED | {"ranks": [0, 1, 2]}, r"ranks\[0\] is 0: needs an integer from 1"),
        (LISTED | {"ranks": [1, 1.5, 2]}, r"ranks\[1\] is 1.5: needs an integer from 1"),
        (LISTED | {"ranks": [1, True, 2]}, r"ranks\[1\] is true: needs a finite number"),
        (LISTED | {"ranks": "1 2 3"}, r"ranks is a string: needs a list of numbers"),
        (LISTED | {"scores": [1, "2", 3]}, r'scores\[1\] is "2": needs a finite number'),
        (LISTED | {"scores": [1, 10**400, 3]}, r"scores\[1\] is 1000.*: needs a finite number"),
        (LISTED | {"best": 3}, r"best is 3: needs an integer from 0 to 2: the index of the best"),
        (LISTED | {"choice": -1}, r"choice is -1: needs an integer from 0 to 2"),
        (LISTED | {"best": True}, r"best is true: needs an integer from 0 to 2"),
        (LISTED | {"best": 0, "ranks": [1, 2, 3]}, r"has ranks and best: keep the one that counts"),
        (LISTED | {"margin": 1.0}, r"has a column margin, which only pairs have"),
        (LISTED | {"chosen_probability": 1}, r"has a column chosen_probability, which only pairs"),
        (LISTED | {"responses": ["a"]}, r"1 responses: needs two or more"),
        (LISTED | {"responses": "ab"}, r"responses is a string: needs a list"),
        (LISTED | {"responses": ["a", " "]}, r"responses\[1\] is empty"),
        (LISTED | {"responses": ["a", 7]}, r"responses\[1\] is a number: needs a string"),
        (LISTED | {"prompt": " "}, r"prompt is empty"),
        ({"responses": ["a", "b"]}, r"columns of no known format: .*legal: prompt \(a string or"),
        ({"prompt": "p", "completions": ["a", "b"]}, r"completions\[0\] is a string: needs {resp"),
        ({"prompt": "p", "completions": [{"response": "a"}]},
         r"completions\[0\] is response: need"),
        ({"prompt": "p", "completions": [{"response": c, "score": None} for c in "ab"]},
         r"completions\[0\] is null: needs a finite number"),
        ({"prompt": "p", "best": 0, "completions": [{"response": c, "score": 1} for c in "ab"]},
         r"has completions and best: keep the one that counts"),
        (LISTED | {"scores": [1, 3e38, 0]}, r"scores\[1\] is 3e\+38: needs .* at most 1.7e\+38"),
        (QUERY | {"best": 3}, r"best is 3: needs an integer from 0 to 2"),
        (QUERY | {"best": 0, "sample1": [-1]}, r"sample1\[0\] is -1: a token id is an integer"),
    ],
)
def test_load_rankings_refuses(write, tokenizer, row, match):
    with pytest.raises(UserError, match=match):
        load_rankings(write(row), tokenizer, 8, "drop")


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (LISTED,
         r"a.jsonl:2: has none of ranks, scores, best, choice, unlike the first row: detec"),
        (LISTED | {"scores": [1, 2, 3]},
         r"a.jsonl:2: has scores, unlike the first row: detected: "),
        ({"prompt": "p", "ranks": [1]}, r"a.jsonl:2: responses is missing: needs a list"),
    ],
)
def test_load_rankings_refuses_a_row_of_another_kind(write, tokenizer, second, match):
    with pytest.raises(UserError, match=match):
        load_rankings(write(LISTED | {"ranks": [1, 2, 3]}, second), tokenizer, 8, "drop")


def test_load_rankings_refuses_responses_beside_completions(write, tokenizer):
    listed = {"prompt": "p", "completions": [{"response": c, "score": 1} for c in "ab"]}
    listed["completions"][0] = {"response": "a", "score": 2}
    path = write(listed, listed | {"responses": ["a", "b"]})
    with pytest.raises(UserError, match=r"a\.jsonl:2: has responses, unlike the first row"):
        load_rankings(path, tokenizer, 8, "drop")


def test_load_rankings_refuses_more_samples_than_the_first_row_has(write):
    path = write(QUERY | {"best": 0}, QUERY | {"best": 0, "sample3": [7]})
    with pytest.raises(UserError, match=r"a\.jsonl:2: has sample3, unlike the first row"):
        load_rankings(path, None, 8, "drop")


def test_load_rankings_refuses_ids_without_a_token(write, tokenizer):
    with pytest.raises(UserError, match=r"a.jsonl:1: token id 258: the tokenizer has the ids"):
        load_rankings(write(QUERY | {"sample1": [258], "best": 0}), tokenizer, 8, "drop")


def test_load_preferences_tells_pairs_from_lists(write, tokenizer):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    for row, kind in ((pair, Pair), (LISTED, Ranking), (pair | {"responses": 1}, Pair)):
        (found,), _ = load_preferences(write(row), tokenizer, 8, "drop")
        assert type(found) is kind
    renamed = {"prompt": "p", "answers": ["a", "b"]}
    names = RowPolicy(columns=("responses=answers",))
    (found,), _ = load_preferences(write(renamed), tokenizer, 8, "drop", names)
    assert answers(found) == [["a"], ["b"]]
    with pytest.raises(UserError, match=r"no known format: .* prompt with responses, best first"):
        load_preferences(write({"x": 1}), tokenizer, 8, "drop")


# ---- rows that are left out ----------------------------------------------------------------------


TIED = LISTED | {"ranks": [1, 1, 1]}
RANKED = LISTED | {"ranks": [1, 2, 3]}


def test_load_preferences_leaves_out_malformed_lists(write, tokenizer):
    # the first row is of no known kind, so the second one tells what the file is
    path = write({"x": 1}, RANKED, RANKED | {"ranks": [0, 1, 2]}, TIED, LISTED, RANKED)
    lists, report = load_preferences(path, tokenizer, 8, "drop", policy=RowPolicy("skip"))
    assert [each.where for each in lists] == [f"{path}:2", f"{path}:6"]
    assert [type(each) for each in lists] == [Ranking, Ranking]
    assert (report.rows, report.kept, report.dropped) == (6, 2, {"all responses tie": 1})
    assert report.dropped_rows == [LeftOut(f"{path}:4", "all responses tie")]
    where, reason, raw = zip(*report.rejected_rows, strict=True)
    assert where == (f"{path}:1", f"{path}:3", f"{path}:5")
    assert reason[0].startswith("columns of no known format: x (a number)")
    assert reason[1].startswith("ranks[0] is 0: needs an integer from 1, best; detected: ranked")
    assert reason[2].startswith("has none of ranks, scores, best, choice, unlike the first row")
    assert raw[0] == '{"x": 1}'


def test_load_preferences_refuses_too_many_lists_left_out(write, tokenizer):
    path = write(RANKED, TIED, {"x": 1}, RANKED)
    half, less = (RowPolicy("skip", max_drop=share) for share in (0.5, 0.49))
    assert len(load_preferences(path, tokenizer, 8, "drop", policy=half)[0]) == 2
    with pytest.raises(UserError, match=r"2 of 4 rows are left out, max_drop is 0.49: dropped: 1"):
        load_preferences(path, tokenizer, 8, "drop", policy=less)


def test_load_preferences_refuses_a_file_of_no_preferences(write, tokenizer):
    with pytest.raises(UserError, match=r"no row left of 2: rejected: 2 \(first: .*a.jsonl:1: "):
        load_preferences(write({"x": 1}, {}), tokenizer, 8, "drop", policy=RowPolicy("skip"))


def test_load_rankings_allows_an_empty_prompt_where_that_is_asked_for(write, tokenizer):
    policy = RowPolicy(allow_empty_prompt=True)
    (found,), _ = load_rankings(write(LISTED | {"prompt": ""}), tokenizer, 8, "drop", policy=policy)
    assert (found.prompt_ids, answers(found)) == ([], [["a"], ["b"], ["c"]])
    (found,), _ = load_rankings(write(QUERY | {"query": []}), tokenizer, 8, "drop", policy=policy)
    assert found.prompt_ids == []
    with pytest.raises(UserError, match=r"responses\[0\] is empty"):
        load_rankings(write(LISTED | {"responses": ["", "a"]}), tokenizer, 8, "drop", policy=policy)


def test_load_rankings_finishes_each_list(write, tokenizer):
    def finish(ranking):
        if len(ranking.responses) < 3:
            raise UserError(ranking.where, "is short")
        return replace(ranking, columns={"seen": True})

    short = LISTED | {"responses": ["a", "b"]}
    lists, report = load_rankings(
        write(LISTED, short), tokenizer, 8, "drop", policy=RowPolicy("skip"), finish=finish
    )
    assert [each.columns for each in lists] == [{"seen": True}]
    assert [row.reason for row in report.rejected_rows] == ["is short"]
