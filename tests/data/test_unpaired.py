"""Single answers with a label: how their rows are read and refused."""

import pytest

from minirlhf.data.unpaired import holds_unpaired, load_unpaired
from minirlhf.errors import UserError
from minirlhf.files.sieve import RowPolicy
from tests.tiny_folders import write_lines

PROMPT = [{"role": "user", "content": "How was it?"}]
ANSWER = [{"role": "assistant", "content": "Good."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer([], 258, folder := tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(folder)


def read(path: str, tokenizer, **more):
    return load_unpaired(path, tokenizer, 64, "drop", **more)


@pytest.mark.parametrize(
    ("row", "detected"),
    [
        ({"prompt": "It was", "completion": " good.", "label": True},
         "prompts with answers (prompt, completion), each with label"),
        ({"prompt": "It was", "response": " good.", "kto_tag": True},
         "prompts with answers (prompt, response), each with kto_tag"),
        ({"prompt": PROMPT, "completion": ANSWER, "label": True},
         "prompts with answers, in messages (prompt, completion), each with label"),
        ({"messages": PROMPT + ANSWER, "label": True},
         "dialogues (messages), each with label"),
        ({"instruction": "How was it?", "input": "", "output": "Good.", "kto_tag": True},
         "alpaca (instruction, output), read as prompts with answers"),
        ({"text": "It was good.", "label": True}, "texts (text), each with label"),
    ],
)
def test_each_kind_of_row_with_a_label_is_read(row, detected, tokenizer, tmp_path):
    label = "label" if "label" in row else "kto_tag"
    path = write_lines(tmp_path / "d.jsonl", [row | {"by": "me"}, row | {label: False}])
    assert holds_unpaired(path)
    rows, report = read(path, tokenizer)
    assert [e.desirable for e in rows] == [True, False]
    assert rows[0].prompt_ids == rows[1].prompt_ids and rows[0].responses == rows[1].responses
    assert rows[0].response_ids[-1] in tokenizer.eos_ids
    assert tokenizer.decode(rows[0].response_ids).strip().endswith("ood.")
    assert (rows[0].where, rows[0].columns["by"]) == (f"{path}:1", "me")
    assert report.detected.startswith(detected)
    assert "1 answers were liked, 1 were not" in report.notes


def test_a_table_spells_its_labels(tokenizer, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,label\na, b,True\na, c,false\n", encoding="utf-8")
    assert [e.desirable for e in read(path, tokenizer)[0]] == [True, False]


ROW = {"prompt": "It was", "completion": " good.", "label": True}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "It was", "completion": " good."}],
         r"d\.jsonl:1: has no label: needs one of label, kto_tag: true where the answer was liked"),
        ([ROW | {"kto_tag": True}], r"d\.jsonl:1: has label and kto_tag: needs one of"),
        ([ROW, ROW | {"label": 1}], r"d\.jsonl:2: label is 1: needs true or false"),
        ([ROW, {k: v for k, v in ROW.items() if k != "label"}], r"d\.jsonl:2: label is "),
        ([{"chosen": "a", "rejected": "b"}], r"d\.jsonl:1: has no label"),
        ([{"prompt": "a", "label": True}], r"d\.jsonl:1: columns of no known format"),
    ],
)
def test_a_malformed_row_is_refused_by_its_line(rows, told, tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match=told):
        read(path, tokenizer)
    if len(rows) == 2:
        kept, report = read(path, tokenizer, policy=RowPolicy("skip"))
        assert len(kept) == len(report.rejected_rows) == 1


def test_pairs_are_no_single_answers(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"chosen": "a", "rejected": "b", "label": True}])
    assert not holds_unpaired(path)
