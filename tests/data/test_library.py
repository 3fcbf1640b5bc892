"""What a hostile tokenizer.json may cost, and that a panic of its library is one line."""

import json
import os

import pytest

from minirlhf.data.library import check_parts, one_line
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError


def edited(folder, **parts) -> None:
    train_tokenizer([], 258, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | parts), encoding="utf-8")


def replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


@pytest.mark.parametrize(
    ("part", "times"),
    [
        ({"normalizers": [replace("a", "aa")] * 11}, "2,048"),  # 2^11
        ({"normalizers": [replace("ab", "ababab")] * 7}, "2,187"),  # 3^7
        ({"normalizers": [{"normalizers": [replace("a", "ä")] * 6}] * 2}, "4,096"),  # 2 bytes, 2^12
        (replace("a", "a" * 1025), "1,025"),
        ({"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 1024}, "1,025"),
        ({"normalizers": [{"type": "Prepend", "prepend": "a" * 32}] * 2 + [replace("a", "aa")]},
         "2,178"),  # 33^2 x 2
    ],
)
@pytest.mark.parametrize("name", ["normalizer", "decoder"])
def test_a_text_that_would_grow_too_much_is_refused_before_it_is_loaded(
    tmp_path, name, part, times
):
    if name == "decoder":
        part = json.loads(json.dumps(part).replace("normalizers", "decoders"))
    edited(tmp_path, **{name: {"type": "Sequence"} | part})
    told = rf"tokenizer\.json: {name} may lengthen a text {times} times: at most 1,024 times"
    with pytest.raises(UserError, match=told):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("part", [
    None, {"type": "NFKC"}, replace(" ", "\u2581"), replace("a", "a" * 1024), replace("aa", "a"),
    {"normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")]},
    {"normalizers": [replace("a", "aa")] * 10},
])
def test_what_is_in_use_may_grow(tmp_path, part):
    check_parts({"normalizer": part}, tmp_path)


def test_long_expressions_and_chance_are_refused(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "[" + r"\p{L}" * 2000 + "]"},
             "behavior": "Isolated", "invert": False}
    edited(tmp_path / "a", pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    told = "pre_tokenizer has a regular expression of 10,002 characters: at most 8,192"
    with pytest.raises(UserError, match=told):
        load_tokenizer(tmp_path / "a")
    train_tokenizer([], 258, tmp_path / "b")
    path = tmp_path / "b" / "tokenizer.json"
    made = json.loads(path.read_text("utf-8"))
    for share in (0.1, 1):
        made["model"]["dropout"] = share
        path.write_text(json.dumps(made), encoding="utf-8")
        told = rf"model\.dropout is {share}: a text has other ids each time: set it to null"
        with pytest.raises(UserError, match=told):
            load_tokenizer(tmp_path / "b")
    made["model"]["dropout"] = 0.0
    path.write_text(json.dumps(made), encoding="utf-8")
    load_tokenizer(tmp_path / "b")


def test_a_panic_is_one_line_and_what_others_wrote_is_kept(tmp_path, capfd):
    # A pattern whose search of 40 letters the library gives up, in a panic
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
             "invert": False}
    edited(tmp_path, pre_tokenizer=split)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: refused by the tokenizers lib.*: Onig"):
        tokenizer.encode("a" * 40 + "!")
    assert capfd.readouterr().err == ""
    with one_line():
        os.write(2, b"a word of another thread\n")
    assert capfd.readouterr().err == "a word of another thread\n"


def test_words_of_others_that_nobody_reads_are_no_error(capfd):
    kept, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        with one_line():
            written = os.write(2, b"a word of another thread\n")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(full)
    assert written == 25  # it was taken, and what could not be passed on raised nothing
