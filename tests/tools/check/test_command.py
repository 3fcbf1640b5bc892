"""`minirlhf check`: what a person sees, and what it refuses before a weight is read."""

import gzip

import pytest
import torch
from safetensors.torch import load_file, save_file

from minirlhf.data.tokenizer import train_tokenizer
from tests.tiny_folders import change_json
from tests.tools.check.conftest import GPT2, LLAMA, TEXTS, save_model
from tests.tools.check.test_facts import IDS, LISTS, PAIRS

# ---- what a person sees --------------------------------------------------------------------------


def test_check_shows_rows_with_boundary_and_last_tokens(write, lm, look):
    rows = [{"prompt": "it was", "response": " good\n"}]
    rows += [{"prompt": "so:", "response": f" over {'and over ' * 30}"}]
    code, out, err = look(write(rows), "--model", lm, "--max-length", 48,
                          "--overlong", "truncate_response")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert "    prompt    it was>>>" in lines
    ids = lines[lines.index("    response  >>> good\\n<|endoftext|>") + 1]
    assert ids.endswith(" '<|endoftext|>':0")
    assert "  rows.jsonl:2 (longest)" in lines
    assert "  truncated: 1 to max_length" in lines
    assert "  longer than max_length 48: 1 (50.0%); overlong: truncate_response" in lines
    assert lines[-1] == "ok: 2 of 2 rows can be used"


def test_check_shows_facts_of_pairs(write, look):
    _, out, _ = look(write(PAIRS))
    lines = out.splitlines()
    assert lines[0].startswith("rows.jsonl: detected preference pairs (")
    assert "  dropped:  1 (chosen equals rejected)" in lines
    assert "  prompts:  3 different ones" in lines
    assert ("  the longer answer wins 75.0% of 4 pairs (equally long: 0 more); "
            "chosen - rejected: +2.8") in lines
    assert "  margins: min -2, median 1, max 1, missing 2" in lines
    what = "a pair that stands there both ways round"
    assert "  warning: 1 row: the same row as one before (first: rows.jsonl:2)" in lines
    assert f"  warning: 3 rows: {what} (first: rows.jsonl:1)" in lines
    assert lines[-1] == "ok: 4 of 5 rows can be used"


def test_check_shows_facts_of_lists(write, lm, look):
    _, out, _ = look(write(LISTS), "--model", lm)
    lines = out.splitlines()
    assert "  dropped:  1 (all responses tie)" in lines
    assert "  dropped:  1 (equal responses with different ranks)" in lines
    assert "    rank 1    >>> good<|endoftext|>" in lines
    assert "  lists:    2 to 3 responses, median 2.5; pairs of equal rank: 2" in lines
    assert any(line.startswith("  the longer answer wins ") for line in lines)
    assert lines[-1] == "ok: 4 of 6 rows can be used"


def test_check_shows_bars_in_proportion(write, look):
    _, out, _ = look(write([{"text": "a"}] * 24 + [{"text": "bb"}] * 12 + [{"text": "cccc"}]))
    bars = [line.split() for line in out.splitlines() if line.startswith("    ")][1:]
    expected = [["1", "#" * 12, "24"], ["2", "#" * 6, "12"], ["3", "0"], ["4", "#", "1"]]
    assert bars == expected


def test_check_escapes_what_a_file_says(write, lm, look):
    text = "\x1b[31mred\x00 \u202e\r\n\u009b tail"
    row = {"prompt": text, "chosen": text + "a", "rejected": text + "b"}
    code, out, err = look(write([row, row], "p\x1b[2J.jsonl"), "--model", lm)
    assert (code, err) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "\\x1b[31mred\\x00 \\u202e\\r\\n" in out


def test_check_takes_files_with_or_without_their_flag(tmp_path, write, look):
    write(PAIRS, "1.jsonl")
    data = b"prompt,chosen,rejected\nso:,b \xe2\x82\xac,c\n"
    (tmp_path / "2.csv.gz").write_bytes(gzip.compress(data))
    code, out, err = look("1.jsonl", "2.csv.gz")
    assert (code, out, err) == look("--data", "1.jsonl", "2.csv.gz")
    assert code == 0
    assert out.splitlines()[-1] == "ok: 5 of 6 rows can be used"


@pytest.mark.parametrize(
    ("row", "words", "reason"),
    [
        ({"prompt": "so:", "chosen": " a", "rejected": ""}, [], "rejected is empty: "),
        ({**LISTS[0], "ranks": [1, 2]}, [], "2 ranks, 3 responses"),
        ({"prompt": "so:", "chosen": " a", "rejected": ""}, ["--model", "lm"], "rejected is em"),
    ],
)
def test_check_leaves_out_malformed_rows(write, lm, look, facts_of, row, words, reason):
    good = LISTS[0] if "ranks" in row else {"prompt": "so:", "chosen": " b", "rejected": " a"}
    path = write([good, row])
    (facts,) = facts_of(path, "--bad-rows", "skip", *words)
    assert (facts["kept"], len(facts["rejected_rows"])) == (1, 1)
    _, out, _ = look(path, "--bad-rows", "skip", *words)
    assert f"  rejected: 1 (first: rows.jsonl:2: {reason}" in out


# ---- models that it reads ------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "shown"), [(PAIRS, "    chosen    >>>good\n"),
                                             (LISTS[:4], "    rank 1    >>> good\n")])
def test_check_reads_for_a_reward_model_that_reads_before_eos(tmp_path, write, rm, look, rows,
                                                              shown):
    change_json(tmp_path / "rm/config.json", read_before_eos=True)
    code, out, _ = look(write(rows), "--model", rm)
    assert code == 0
    assert "llama reward model" in out
    assert shown in out
    assert "no eos" not in out


def test_check_reads_gpt2_weights_under_their_older_names(tmp_path, write, look):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "gpt2")
    folder = save_model(tmp_path / "gpt2", GPT2, tokenizer.vocab_size)
    tensors = load_file(tmp_path / "gpt2/model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, tmp_path / "gpt2/model.safetensors")
    code, out, _ = look(write(PAIRS), "--model", folder)
    assert code == 0
    # 280 x 16 and 48 x 16 embeddings, 3,280 in the block, 32 in the last norm
    assert "gpt2 language model, 8,560 parameters" in out


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words", "error"),
    [
        ([{"prompt": "a", "chosen": "b"}], "", "rows.jsonl:1: columns of no known format: prompt"),
        ([{"a\x1b": 1}], "", "rows.jsonl:1: columns of no known format: a\\x1b ("),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": ""}], "",
         "rows.jsonl:2: rejected is empty: "),
        ([{"chosen": "a", "rejected": "b", "margin": "x"}], "", "rows.jsonl:1: margin is 'x'"),
        ([{"chosen": "a", "rejected": "a"}], "", "rows.jsonl: no row left of 1: dropped: 1 (ch"),
        ([{"prompt": "a"}], "--overlong truncate_response", "--overlong: is truncate_resp"),
        ([{"text": "a"}], "--json no/such/facts.json", "--json: no/such is no folder"),
        ([{"text": "a"}], "--json rows.jsonl", "--json: rows.jsonl is there already"),
        ([{"text": "a"}], "--recipe pop", "--recipe: got 'pop', must be one of auto, reward"),
        ([{"text": "a"}], "--model no-such-folder", "no-such-folder: no such folder"),
        ([], "", "rows.jsonl: no rows"),
        ([{"prompt": "a", "responses": "b"}], "", "rows.jsonl:1: responses is a string: needs a l"),
        ([{"prompt": "a", "responses": ["b"]}], "", "rows.jsonl:1: 1 responses: needs two or more"),
        ([LISTS[0], {**LISTS[0], "ranks": [1, 2]}], "", "rows.jsonl:2: 2 ranks, 3 responses"),
        ([{**LISTS[0], "margin": "x"}], "", "rows.jsonl:1: has a column margin, which only pairs"),
        ([LISTS[0], {"chosen": "a", "rejected": "b"}], "", "rows.jsonl:2: has none of ranks, sc"),
        ([LISTS[4]], "", "rows.jsonl: no row left of 1: dropped: 1 (all responses tie)"),
    ],
)
def test_check_refuses(write, look, rows, words, error):
    code, out, err = look(write(rows), *words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {error}")
    assert err.count("\n") == 1


def test_check_refuses_to_run_without_data(look):
    code, _, err = look("--model", "folder")
    assert (code, err) == (2, "error: --data: required, but not given: minirlhf check FILE\n")


def test_check_shows_the_facts_before_it_refuses_a_long_row(tmp_path, write, lm, look):
    facts = tmp_path / "facts.json"
    code, out, err = look(write(IDS), "--model", lm, "--max-length", 5, "--overlong", "error",
                          "--json", facts)
    assert code == 2
    assert "longer than max_length 5: 1 (33.3%); overlong: error" in out
    assert err.startswith("error: rows.jsonl:1: 6 tokens, max_length is 5")
    assert "ok:" not in out
    assert not facts.exists()


@pytest.mark.parametrize(("tokens", "code"), [(48, 0), (49, 2)])
def test_check_refuses_rows_beyond_the_positions(write, lm, look, tokens, code):
    path = write([{"input_ids": [5] * (tokens - 1) + [0]}])
    got, out, err = look(path, "--model", lm)
    assert got == code
    error = f"error: {path}: a row of 49 tokens, the model reads 48: give --max-length 48\n"
    assert err == (error if code else "")
    assert f"longer than positions 48: {1 if code else 0} " in out


def test_check_refuses_prompts_without_room_for_the_answer(write, lm, look):
    code, _, err = look(write([{"prompt": "a"}]), "--model", lm, "--max-new-tokens", 48)
    assert code == 2
    assert "--max-new-tokens: 48 fill the model's context" in err


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("norm", None, "lm: lacks 'model.norm.weight': incomplete download"),
        ("norm", torch.zeros(3), "'model.norm.weight' is (3,), config.json asks for (16,)"),
        ("other", torch.zeros(3), "lm: has 'model.other.weight', which this architecture lacks"),
    ],
)
def test_check_refuses_weights_that_do_not_fit(tmp_path, write, lm, look, name, tensor, error):
    tensors = load_file(tmp_path / "lm/model.safetensors") | {f"model.{name}.weight": tensor}
    whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(whole, tmp_path / "lm/model.safetensors")
    code, _, err = look(write([{"text": "a"}]), "--model", lm)
    assert code == 2 and error in err


@pytest.mark.parametrize(("missing", "code"), [(0, 0), (1, 2)])
def test_check_refuses_a_tokenizer_with_more_ids_than_the_model(
    tmp_path, write, look, missing, code
):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "lm")
    rows = tokenizer.vocab_size - missing
    folder = save_model(tmp_path / "lm", LLAMA, rows)
    got, _, err = look(write([{"text": "a"}]), "--model", folder)
    assert got == code
    assert (f"vocab_size: is {rows}" in err) == bool(code)


def test_check_refuses_a_reward_model_as_a_language_model(write, rm, look):
    code, _, err = look(write([{"prompt": "a"}]), "--model", rm)
    assert code == 2
    assert "rm: is a reward model, but ppo trains a language model" in err
