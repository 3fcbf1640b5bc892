"""Tokens as people see them, in a tokenizer of one token a byte."""

import pytest

from minirlhf.data.pieces import Piece, pieces
from minirlhf.data.tokenizer import load_tokenizer
from tests.data.conftest import EOS, spell
from tests.data.spm import save


def test_each_letter_is_a_piece_and_control_tokens_have_names(tokenizer):
    name = tokenizer.decode([EOS], skip_special=False)
    assert pieces(tokenizer, spell("x"), [*spell("a b"), EOS]) == [
        Piece(0, 1, "a"), Piece(1, 2, " "), Piece(2, 3, "b"), Piece(3, 4, name)
    ]
    assert pieces(tokenizer, [], []) == []


@pytest.mark.parametrize(("text", "sizes"), [("é奖🎬", [2, 3, 4]), ("a👩‍🚀", [1, 4, 3, 4])])
def test_bytes_of_one_character_are_one_piece(tokenizer, text, sizes):
    """UTF-8 writes é in 2 bytes, 奖 in 3, an emoji in 4 and the joiner U+200D in 3."""
    found = pieces(tokenizer, [], tokenizer.encode(text, bos=False))
    assert "".join(piece.text for piece in found) == text
    assert [piece.end - piece.start for piece in found] == sizes


def test_a_character_without_its_end_is_shown_as_broken(tokenizer):
    ids = [*spell("a"), *tokenizer.encode("奖", bos=False)[:2]]
    assert pieces(tokenizer, [], ids) == [Piece(0, 1, "a"), Piece(1, 3, "\ufffd")]


def test_bytes_that_never_become_a_character_end_after_eight(tokenizer):
    lead = tokenizer.encode("奖", bos=False)[0]
    found = pieces(tokenizer, [], 10 * [lead] + spell("a"))
    assert found[0][:2] == (0, 8)
    assert found[-1].end == 11


@pytest.mark.parametrize("kind", ["prepend", "always", "bytes-blank"])
def test_a_blank_inside_a_text_is_kept(tmp_path, kind):
    """Decoders of these take the first blank of a text away, which is not theirs here."""
    tokenizer = load_tokenizer(save(tmp_path, kind))
    ids = tokenizer.encode("hello there water", bos=False)
    found = pieces(tokenizer, ids[:3], ids[3:])
    assert "".join(piece.text for piece in found) == tokenizer.decode_after(ids[:3], ids[3:])
    assert [piece.start for piece in found] == [0, *(piece.end for piece in found)][:-1]
