"""vocab.json and merges.txt are read as transformers reads them."""

import json

import pytest

from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError

TEXTS = [
    "The house, it's  where we'll be!\n\n  Yes: 1234.", " a",
    "\u00e9 e\u0301 \uff46 \U0001f600\t\r\nx",
    "named <|endoftext|> and <|im_end|> inside",
]
ADDED = ("<|im_start|>", "<|im_end|>")  # behind the vocabulary


@pytest.fixture
def older(tmp_path):
    """Writes a folder as slow tokenizers are saved."""

    def write(kind: str, newer: bool = True):
        train_tokenizer(["the house where it is, we will be there"] * 9, 300, tmp_path / "made")
        model = json.loads((tmp_path / "made" / "tokenizer.json").read_text("utf-8"))["model"]
        folder = tmp_path / "older"
        folder.mkdir(exist_ok=True)
        vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
        vocab.pop("<|pad|>", None)
        vocab = {text: id for id, text in enumerate(sorted(vocab, key=vocab.get))}
        added = {name: len(vocab) + i for i, name in enumerate(ADDED)}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        config = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "add_prefix_space": False}
        if newer:
            named = {"<|endoftext|>": vocab["<|endoftext|>"]} | added
            config["added_tokens_decoder"] = {
                str(id): {"content": name, "special": True, "lstrip": False, "rstrip": False,
                          "normalized": False, "single_word": False}
                for name, id in named.items()
            }
        else:
            (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
            config["additional_special_tokens"] = list(ADDED)
        for name, value in (("vocab", vocab), ("tokenizer_config", config)):
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
        return folder

    return write


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_an_older_folder_is_read_as_transformers_reads_it(older, kind, newer, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = older(kind, newer)
    ours, peer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, bos=False)
        named = peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == named
        marked = peer(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_marked(text) == marked
        assert ours.decode(ids) == peer.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.eos_ids == (peer.eos_token_id,)
    ours.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_an_older_folder_that_does_not_fit_is_refused(older):
    for name, content, told in (
        ("merges.txt", "#version: 0.2\nt h\nthe\n", r"merges\.txt:3: is 'the': needs two tokens"),
        ("merges.txt", "zz yy\n", r"merges\.txt: does not fit vocab.json: .*zz"),
        ("vocab.json", "[]", r"vocab\.json: is no vocabulary"),
        ("vocab.json", '{"a": -1}', r"vocab\.json: is no vocabulary"),
    ):
        folder = older("GPT2Tokenizer")
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            load_tokenizer(folder)
    folder = older("GPT2Tokenizer", newer=False)
    (folder / "added_tokens.json").write_text('{"<|x|>": 5000}', encoding="utf-8")
    with pytest.raises(UserError, match=r"would be [0-9]+, not 5000: the added tokens leave"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=r"and vocab\.json is of CTRLTokenizer"):
        load_tokenizer(older("CTRLTokenizer"))
