"""The journal of replies: whole lines, one score a key, and any damage told."""

import json

import pytest

from minirlhf.errors import UserError
from minirlhf.rewards.journal import Journal

LINE = json.dumps({"key": "a" * 64, "score": 1.5}) + "\n"


@pytest.mark.parametrize("torn", ["{", LINE[:-1], LINE[:20], "\0\0\0", '{"key": "é'.encode()[:-1]])
def test_a_last_line_that_was_cut_short_is_cut_off(torn, tmp_path):
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(LINE.encode() + (torn if isinstance(torn, bytes) else torn.encode()))
    journal = Journal(path)
    assert journal.scores == {"a" * 64: 1.5}
    assert path.read_text() == LINE
    journal.add({"b": 2.0, "c": -1.0})
    assert Journal(path).scores == {"a" * 64: 1.5, "b": 2.0, "c": -1.0}


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "\0\0", "[1]", '{"key": "b"}', '{"key": "b", "score": 1.0, "more": 1}',
        '{"key": 1, "score": 1.0}', LINE.strip(), '{"key": "b", "score": null}',
        '{"key": "b", "score": 1}', '{"key": "b", "score": NaN}', '{"key": "b", "score": 1e400}',
        "\udcff",
    ],
)
def test_any_other_damage_of_the_journal_is_an_error(line, tmp_path):
    path = tmp_path / "rewards.jsonl"
    text = f"{LINE}{line}\n{LINE.replace('a', 'c')}"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        _ = Journal(path).scores
    told = "is no reply of a service, or stands here twice: put the file back as it was"
    assert str(caught.value) == f"{path}:2: {told}"


def test_a_journal_without_a_file_keeps_replies_in_memory():
    journal = Journal()
    journal.add({"a": 1.0})
    assert journal.scores == {"a": 1.0}


def test_scores_are_those_of_the_journal_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2  # 0.30000000000000004
    Journal(tmp_path / "j").add({"a": value})
    assert Journal(tmp_path / "j").scores["a"] == value
