"""`minirlhf check`: what it tells of data, and what it refuses before a weight is read."""

import gzip
import json

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.errors import run
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import save_pretrained
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.tools.check import command as command_module
from minirlhf.tools.check.command import main
from minirlhf.tools.check.facts import length_facts, pair_facts
from minirlhf.tools.check.rows import Sizes, recipe_of

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48, "tie_word_embeddings": True,
    "eos_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48,
    "eos_token_id": 0,
}
TEXTS = ["it was a good film", "we left before it was over", "so: bad"]
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


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_model(folder, values, vocab_size, reward=False) -> str:
    rng = torch.Generator().manual_seed(0)
    lm = initialize(CausalLM(config_from_hf({**values, "vocab_size": vocab_size})), rng)
    save_pretrained(initialize_score(RewardModel(lm), rng) if reward else lm, folder)
    return str(folder)


@pytest.fixture
def lm(tmp_path):
    """The folder of a language model."""
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "lm")
    return save_model(tmp_path / "lm", LLAMA, tokenizer.vocab_size)


@pytest.fixture
def look(capsys):
    """look(words) -> (exit code, stdout, stderr)."""

    def command(*words: object) -> tuple[int, str, str]:
        code = run(lambda: main([str(word) for word in words]))
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def facts_of(tmp_path, look):
    """facts_of(words) -> facts of each file, of a command that must succeed."""

    def command(*words: object) -> list[dict]:
        code, _, err = look(*words, "--json", tmp_path / "facts.json")
        assert (code, err) == (0, "")
        text = (tmp_path / "facts.json").read_text("utf-8")
        (tmp_path / "facts.json").unlink()
        return json.loads(text)["files"]

    return command


def warned(facts: dict) -> list[tuple]:
    return [(w["what"].split(",")[0], w["rows"], w["first"]) for w in facts["warnings"]]


# ---- facts ---------------------------------------------------------------------------------------


def test_check_counts_what_is_wrong_with_pairs(tmp_path, facts_of):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    (facts,) = facts_of(path)
    assert (facts["recipe"], facts["rows"], facts["kept"]) == ("reward", 5, 4)
    assert facts["dropped"] == {"chosen equals rejected": 1}
    assert facts["different_prompts"] == 3
    assert warned(facts) == [
        ("the same row as one before", 1, f"{path}:2"),
        ("a pair that stands there both ways round", 3, f"{path}:1"),
        ("a negative margin: the rejected answer should win", 1, f"{path}:3"),
        ("a blank ends the prompt", 3, f"{path}:1"),
        ("no blank between prompt and answer", 1, f"{path}:4"),
    ]


def test_check_measures_characters_without_a_model(tmp_path, facts_of):
    (facts,) = facts_of(write_lines(tmp_path / "pairs.jsonl", PAIRS))
    assert facts["unit"] == "characters"  # of rows 1, 2, 3 and 5: row 4 is dropped
    assert facts["lengths"]["sides"]["chosen"] == {"min": 3, "median": 4.0, "p95": 13, "max": 13}
    assert facts["pairs"] == {
        "longer_wins": 3, "of_pairs": 4, "same_length": 0,
        "chosen_longer_by": 2.75,  # (1 + 1 - 1 + 10) / 4
        "margins": {"min": -2.0, "median": 1.0, "max": 1.0, "missing": 2},
    }


def test_check_measures_ids_in_tokens_with_and_without_a_model(tmp_path, lm, facts_of):
    path = write_lines(tmp_path / "ids.jsonl", IDS)
    for words in ([], ["--model", lm]):
        (facts,) = facts_of(path, *words)
        assert facts["unit"] == "tokens"
        sides = facts["lengths"]["sides"]
        assert sides["prompt"] == {"min": 1, "median": 1.0, "p95": 2, "max": 2}
        assert sides["chosen"] == {"min": 2, "median": 2.0, "p95": 4, "max": 4}
        pairs = facts["pairs"]
        assert (pairs["longer_wins"], pairs["of_pairs"], pairs["same_length"]) == (1, 2, 1)
        assert facts["warnings"] == []


def test_check_counts_rows_beyond_the_limits(tmp_path, lm, facts_of):
    path = write_lines(tmp_path / "ids.jsonl", IDS)  # rows of 6, 4 and 3 tokens
    common = (path, "--model", lm, "--max-length")
    (facts,) = facts_of(*common, 3)
    assert facts["limits"]["max_length"] == {"tokens": 3, "rows_beyond": 2}
    assert facts["limits"]["positions"] == {"tokens": 48, "rows_beyond": 0}
    assert (facts["kept"], facts["dropped"]) == (1, {"longer than max_length": 2})
    (facts,) = facts_of(*common, 4, "--overlong", "truncate_response")
    assert facts["limits"]["max_length"]["rows_beyond"] == facts["cut"] == 1
    assert facts["kept"] == 3
    (facts,) = facts_of(*common, 6)
    assert (facts["kept"], facts["limits"]["max_length"]["rows_beyond"]) == (3, 0)


def test_check_gives_prompts_the_room_before_the_new_tokens(tmp_path, lm, facts_of):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt_ids": [5] * n} for n in (3, 8, 9)])
    settings = (path, "--model", lm, "--overlong", "drop", "--max-new-tokens", 40)
    (facts,) = facts_of(*settings)  # 48 positions
    assert facts["limits"]["max_length"] == {"tokens": 8, "rows_beyond": 1}
    assert facts["kept"] == 2
    (facts,) = facts_of(*settings, "--max-length", 3)
    assert facts["limits"]["max_length"] == {"tokens": 3, "rows_beyond": 2}


def test_check_finds_what_files_share(tmp_path, facts_of):
    train = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    train += [{"prompt": "d", "chosen": "e", "rejected": "f"}]
    held = [train[1], {"prompt": "a", "chosen": "x", "rejected": "y"}]
    held += [{"prompt": "g", "chosen": "b", "rejected": "c"}]  # a prompt of its own
    first, second = (
        write_lines(tmp_path / "1.jsonl", train),
        write_lines(tmp_path / "2.jsonl", held),
    )
    alone, shared = facts_of("--data", first, second)
    assert "shared" not in alone
    assert shared["shared"] == {"with": first, "rows": 1, "prompts_or_answers": 2}
    assert (f"also in {first}", 1, f"{second}:1") in warned(shared)
    assert (f"prompt or answer also in {first}", 2, f"{second}:1") in warned(shared)


def test_check_finds_shared_answers_of_pairs_without_prompts(tmp_path, facts_of):
    first = write_lines(tmp_path / "1.jsonl", [{"chosen": "a", "rejected": "b"}])
    held = [{"chosen": "c", "rejected": "a"}, {"chosen": "c", "rejected": "d"}]
    _, shared = facts_of(first, write_lines(tmp_path / "2.jsonl", held))
    assert (shared["shared"]["rows"], shared["shared"]["prompts_or_answers"]) == (0, 1)


def test_length_facts_makes_round_bins_with_an_open_tail():
    few = length_facts({"prompt": np.array([3, 4, 4, 6])})
    assert (few["bins"], few["counts"]) == (["3", "4", "5", "6"], {"prompt": [1, 2, 0, 1]})
    wider = length_facts({"prompt": np.array([0] + [7] * 9)})  # 8 bins of 1 would leave no tail
    assert wider["bins"] == ["0-1", "2-3", "4-5", "6-7"]
    lengths = np.array([10] * 50 + [33] * 48 + [500, 900])  # p95 is 33, so bins are 5 wide
    tail = length_facts({"chosen": lengths, "rejected": np.array([12])})
    assert tail["bins"] == ["10-14", "15-19", "20-24", "25-29", "30-34", "35-39", "40-44", "45+"]
    assert tail["counts"]["chosen"] == [50, 0, 0, 0, 48, 0, 0, 2]
    assert tail["counts"]["rejected"] == [1, 0, 0, 0, 0, 0, 0, 0]


def test_pair_facts_of_equally_long_answers():
    facts = pair_facts([Sizes(1, [2, 2], [1, 2]), Sizes(1, [3, 3], [1, 2])], [None, None])
    assert (facts["of_pairs"], facts["same_length"], facts["margins"]) == (0, 2, {"missing": 2})


@pytest.mark.parametrize(("pairs", "longer", "warns"), [(30, 21, True), (30, 20, False),
                                                        (29, 29, False)])
def test_check_warns_where_the_longer_answer_wins(tmp_path, facts_of, pairs, longer, warns):
    rows = [
        {"chosen": f"{i} aa", "rejected": f"{i} a"} if i < longer else
        {"chosen": f"{i} b", "rejected": f"{i} bb"}
        for i in range(pairs)
    ]
    (facts,) = facts_of(write_lines(tmp_path / "pairs.jsonl", rows))
    what = "the longer answer wins: a reward model may learn length alone"
    assert warned(facts) == ([(what, longer, None)] if warns else [])


# ---- warnings about tokens and text --------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "say <|endoftext|>", "response": " no"}, "a control token's name"),
        ({"prompt": "so \ufffd", "response": " no"}, "U+FFFD"),
        ({"prompt": "so ", "response": "no"}, "a blank ends the prompt"),
        ({"prompt": "so?", "response": "no"}, "no blank between prompt and answer"),
        ({"input_ids": [5, 6, 7]}, "no eos at the end: nothing there teaches to stop"),
        ({"input_ids": [1, 1, 7, 0]}, "the beginning-of-text token twice"),
        ({"input_ids": [1, 7, 1, 8, 0], "prompt_length": 2}, "the beginning-of-text token twice"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]},
         "a turn without text"),
    ],
)
def test_check_warns_of_an_odd_row(tmp_path, lm, facts_of, row, what):
    config = json.loads((tmp_path / "lm/tokenizer_config.json").read_text())
    config |= {"bos_token": "<|pad|>", "chat_template": "{{ messages | length }}<|endoftext|>"}
    if "messages" in row:
        config["chat_template"] = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    (tmp_path / "lm/tokenizer_config.json").write_text(json.dumps(config))
    path = write_lines(tmp_path / "texts.jsonl", [row])
    (facts,) = facts_of(path, "--model", lm)
    assert warned(facts) == [(what, 1, f"{path}:1")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "so?\n", "response": "no"},
        {"prompt": "so?", "response": " no"},
        {"prompt": "\u597d", "response": "\u597d"},  # a script without blanks
        {"input_ids": [1, 7, 8, 1, 0]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_check_does_not_warn_of_a_plain_row(tmp_path, lm, facts_of, row):
    config = json.loads((tmp_path / "lm/tokenizer_config.json").read_text())
    config |= {"bos_token": "<|pad|>"}
    config["chat_template"] = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    (tmp_path / "lm/tokenizer_config.json").write_text(json.dumps(config))
    (facts,) = facts_of(write_lines(tmp_path / "texts.jsonl", [row]), "--model", lm)
    assert facts["warnings"] == []


def test_check_warns_where_the_model_has_no_chat_template(tmp_path, lm, facts_of):
    rows = [{"prompt": [{"role": "user", "content": "a film"}]}] * 2
    rows[1] = {"prompt": [{"role": "user", "content": "bad"}]}
    path = write_lines(tmp_path / "chat.jsonl", rows)
    settings = ("--model", lm, "--max-new-tokens", 4)
    (facts,) = facts_of(path, *settings)
    assert warned(facts) == [("written by a plain template", 2, f"{path}:1")]


def test_check_counts_unknown_tokens(tmp_path, facts_of):
    words = {"[UNK]": 0, "[EOS]": 1, "a": 2, "film": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[EOS]", "[UNK]"])
    folder = save_model(tmp_path / "words", {**LLAMA, "eos_token_id": 1}, 4)
    backend.save(str(tmp_path / "words/tokenizer.json"))
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a film"}, {"text": "what a what"}])
    (facts,) = facts_of(path, "--model", folder)  # a film [EOS], [UNK] a [UNK] [EOS]
    (warning,) = facts["warnings"]
    assert warning == {"what": "unknown tokens, 28.57% of all tokens", "rows": 1,
                       "first": f"{path}:2"}


# ---- what a person sees --------------------------------------------------------------------------


def test_check_shows_rows_with_boundary_and_last_tokens(tmp_path, lm, look):
    rows = [{"prompt": "it was", "response": " good\n"}]
    rows += [{"prompt": "so:", "response": f" over {'and over ' * 30}"}]
    code, out, err = look(write_lines(tmp_path / "texts.jsonl", rows), "--model", lm,
                          "--max-length", 48, "--overlong", "truncate_response")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert "    prompt    it was>>>" in lines
    assert "    response  >>> good\\n<|endoftext|>" in lines
    ids = lines[lines.index("    response  >>> good\\n<|endoftext|>") + 1]
    assert ids.endswith(" '<|endoftext|>':0")
    assert f"{tmp_path / 'texts.jsonl'}:2 (longest)" in out
    assert "  cut:      1 to max_length" in lines
    assert "  longer than max_length 48: 1 (50.0%); overlong: truncate_response" in lines
    assert lines[-1] == "ok: 2 of 2 rows can be used"


def test_check_shows_facts_of_pairs(tmp_path, look):
    path = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    _, out, _ = look(path)
    lines = out.splitlines()
    assert lines[0] == path
    assert "  dropped:  1 (chosen equals rejected)" in lines
    assert "  prompts:  3 different ones" in lines
    assert ("  the longer answer wins 75.0% of 4 pairs (equally long: 0 more); "
            "chosen - rejected: +2.8") in lines
    assert "  margins: min -2, median 1, max 1, missing 2" in lines
    assert f"  warning: 1 row: the same row as one before (first: {path}:2)" in lines
    assert f"  warning: 3 rows: a pair that stands there both ways round (first: {path}:1)" in lines
    assert lines[-1] == "ok: 4 of 5 rows can be used"


def test_check_shows_bars_in_proportion(tmp_path, look):
    rows = [{"text": "a"}] * 24 + [{"text": "bb"}] * 12 + [{"text": "cccc"}]
    _, out, _ = look(write_lines(tmp_path / "texts.jsonl", rows))
    bars = [line.split() for line in out.splitlines() if line.startswith("    ")][1:]
    expected = [["1", "#" * 12, "24"], ["2", "#" * 6, "12"], ["3", "0"], ["4", "#", "1"]]
    assert bars == expected


def test_check_escapes_what_a_file_says(tmp_path, lm, look):
    text = "\x1b[31mred\x00 \u202e\r\n\u009b tail"
    row = {"prompt": text, "chosen": text + "a", "rejected": text + "b"}
    path = write_lines(tmp_path / "p\x1b[2J.jsonl", [row, row])
    code, out, err = look(path, "--model", lm)
    assert (code, err) == (0, "")
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "\\x1b[31mred\\x00 \\u202e\\r\\n" in out


def test_check_takes_files_with_or_without_their_flag(tmp_path, look):
    first = write_lines(tmp_path / "1.jsonl", PAIRS)
    second = tmp_path / "2.csv.gz"
    second.write_bytes(gzip.compress(b"prompt,chosen,rejected\nso:,b \xe2\x82\xac,c\n"))
    assert look(first, second) == look("--data", first, second)
    code, out, _ = look(first, second)
    assert code == 0
    assert out.splitlines()[-1] == "ok: 5 of 6 rows can be used"


def test_check_runs_for_a_reward_model_that_reads_before_eos(tmp_path, look):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "rm")
    folder = save_model(tmp_path / "rm", LLAMA, tokenizer.vocab_size, reward=True)
    config = json.loads((tmp_path / "rm/config.json").read_text())
    (tmp_path / "rm/config.json").write_text(json.dumps({**config, "read_before_eos": True}))
    code, out, _ = look(write_lines(tmp_path / "p.jsonl", PAIRS), "--model", folder)
    assert code == 0
    assert "llama reward model" in out
    assert "    chosen    >>>good\n" in out
    assert "no eos" not in out


def test_check_reads_gpt2_weights_under_their_older_names(tmp_path, look):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "gpt2")
    folder = save_model(tmp_path / "gpt2", GPT2, tokenizer.vocab_size)
    tensors = load_file(tmp_path / "gpt2/model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, tmp_path / "gpt2/model.safetensors")
    code, out, _ = look(write_lines(tmp_path / "p.jsonl", PAIRS), "--model", folder)
    assert code == 0
    # 280 x 16 and 48 x 16 embeddings, 3,280 in the block, 32 in the last norm
    assert "gpt2 language model, 8,560 parameters" in out


# ---- which recipe a file is for ------------------------------------------------------------------

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


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
def test_recipe_of_tells_by_the_columns(tmp_path, row, recipe):
    assert recipe_of(write_lines(tmp_path / "rows.jsonl", [row])) == recipe


def test_check_takes_the_recipe_that_is_given(tmp_path, facts_of):
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    assert [facts_of(path, *words)[0]["detected"] for words in ([], ["--recipe", "ppo"])] == [
        "texts (text)", "prompts (text)"
    ]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words", "told"),
    [
        ([{"prompt": "a", "chosen": "b"}], [], "rows.jsonl:1: columns of no known format: prompt"),
        ([{"a\x1b": 1}], [], "rows.jsonl:1: columns of no known format: a\\x1b ("),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": ""}], [],
         "rows.jsonl:2: rejected is empty: "),
        ([{"chosen": "a", "rejected": "b", "margin": "x"}], [], "rows.jsonl:1: margin is 'x'"),
        ([{"chosen": "a", "rejected": "a"}], [], "rows.jsonl: no row left of 1: dropped: 1 (ch"),
        ([{"prompt": "a"}], ["--overlong", "truncate_response"], "--overlong: is truncate_resp"),
        ([{"text": "a"}], ["--json", "no/such/facts.json"], "--json: no/such is no folder"),
        ([{"text": "a"}], ["--recipe", "dpo"], "--recipe: got 'dpo', must be one of auto, reward"),
        ([{"text": "a"}], ["--model", "no-such-folder"], "no-such-folder: no such folder"),
        ([], [], "rows.jsonl: no rows"),
    ],
)
def test_check_refuses(tmp_path, monkeypatch, look, rows, words, told):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", rows)
    code, out, err = look("rows.jsonl", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


def test_check_refuses_to_run_without_data(look):
    code, _, err = look("--model", "folder")
    assert (code, err) == (2, "error: --data: required, but not given\n")


def test_check_refuses_to_write_over_a_file(tmp_path, look):
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    code, _, err = look(path, "--json", path)
    assert code == 2
    assert f"{path} is there already" in err


def test_check_shows_the_facts_before_it_refuses_a_long_row(tmp_path, lm, look):
    path = write_lines(tmp_path / "ids.jsonl", IDS)
    facts = tmp_path / "facts.json"
    code, out, err = look(path, "--model", lm, "--max-length", 5, "--overlong", "error",
                          "--json", facts)
    assert code == 2
    assert "longer than max_length 5: 1 (33.3%); overlong: error" in out
    assert err.startswith(f"error: {path}:1: 6 tokens, max_length is 5")
    assert "ok:" not in out
    assert not facts.exists()


@pytest.mark.parametrize(("tokens", "code"), [(48, 0), (49, 2)])
def test_check_refuses_rows_beyond_the_positions(tmp_path, lm, look, tokens, code):
    path = write_lines(tmp_path / "ids.jsonl", [{"input_ids": [5] * (tokens - 1) + [0]}])
    got, out, err = look(path, "--model", lm)
    assert got == code
    told = f"error: {path}: a row of 49 tokens, the model reads 48: give --max-length 48\n"
    assert err == (told if code else "")
    assert f"longer than positions 48: {1 if code else 0} " in out


def test_check_refuses_prompts_without_room_for_the_answer(tmp_path, lm, look):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    code, _, err = look(path, "--model", lm, "--max-new-tokens", 48)
    assert code == 2
    assert "--max-new-tokens: 48 fill the model's context" in err


def damage_missing(tensors):
    del tensors["model.norm.weight"]


def damage_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(3)


def damage_extra(tensors):
    tensors["model.other"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_missing, r"lm: lacks 'model.norm.weight': incomplete download"),
        (damage_shape, r"'model.norm.weight' is \(3,\), config.json asks for \(16,\)"),
        (damage_extra, r"lm: has 'model.other', which this architecture lacks"),
    ],
)
def test_check_refuses_weights_that_do_not_fit(tmp_path, lm, damage, told):
    tensors = load_file(tmp_path / "lm/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "lm/model.safetensors")
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    with pytest.raises(command_module.UserError, match=told):
        main([path, "--model", lm])


def test_check_refuses_a_tokenizer_with_more_ids_than_the_model(tmp_path, look):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "lm")
    path = write_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    for rows, code in ((tokenizer.vocab_size, 0), (tokenizer.vocab_size - 1, 2)):
        folder = save_model(tmp_path / "lm", LLAMA, rows)
        got, _, err = look(path, "--model", folder)
        assert got == code
    assert f"vocab_size: is {rows}" in err


def test_check_refuses_a_reward_model_as_a_language_model(tmp_path, look):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "rm")
    folder = save_model(tmp_path / "rm", LLAMA, tokenizer.vocab_size, reward=True)
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    code, _, err = look(path, "--model", folder)
    assert code == 2
    assert "rm: is a reward model, but ppo trains a language model" in err
