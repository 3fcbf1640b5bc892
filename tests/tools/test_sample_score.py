"""`minirlhf sample` and `minirlhf score`: JSON lines, the same however they were batched."""

import io
import json
import shutil
import sys

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.examples import Prompt, load_prompts
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import load_reward_model, save_pretrained
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.recipes.reward import SHOWN
from minirlhf.rewards.model import score_texts
from minirlhf.tools.sample import json_lines, sample

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}
PROMPTS = ["a film", "the film that we saw", "so", "it was a good film and", "bad", "we left when"]
TEXTS = ["a good film", "bad", "we left before it was over", "it was good"]
LISTS = [{"prompt": "it was ", "responses": ["bad", "good", "over"], "ranks": [3, 1, 2]},
         {"prompt": "so ", "responses": ["bad", "good"], "ranks": [1, 1]},
         {"prompt": "a film ", "responses": ["that", "we left", "so"], "ranks": [1, 2, 2]}]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_reward_model(folder, tokenizer, read_before_eos=False) -> str:
    lm = initialize(CausalLM(config_of(tokenizer)), torch.Generator().manual_seed(1))
    model = RewardModel(lm, read_before_eos)
    save_pretrained(initialize_score(model, torch.Generator().manual_seed(2)), folder, 1)
    tokenizer.save(folder)
    return str(folder)


def config_of(tokenizer):
    return config_from_hf({**TINY, "vocab_size": tokenizer.vocab_size})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> path: a language model, two reward models with the same weights, and data."""
    made = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer(PROMPTS + TEXTS, 280, made / "lm")
    lm = initialize(CausalLM(config_of(tokenizer)), torch.Generator().manual_seed(0))
    save_pretrained(lm, made / "lm")
    pairs = [{"prompt": "it was ", "chosen": "good", "rejected": "bad"},
             {"prompt": "a film ", "chosen": "that we saw", "rejected": "we left"},
             {"prompt": "a film ", "chosen": "same", "rejected": "same"},
             {"prompt": "so ", "chosen": "bad", "rejected": "over and over"}]
    chat = [{"prompt": [{"role": "user", "content": "a film"}]}]
    return {
        "LM": str(made / "lm"),
        "RM": save_reward_model(made / "rm", tokenizer),
        "BEFORE": save_reward_model(made / "before", tokenizer, read_before_eos=True),
        "PROMPTS": write_lines(made / "prompts.jsonl", [{"prompt": p, "id": 7} for p in PROMPTS]),
        "CHAT": write_lines(made / "chat.jsonl", chat),
        "TEXTS": write_lines(made / "texts.jsonl", [{"text": text} for text in TEXTS]),
        "PAIRS": write_lines(made / "pairs.jsonl", pairs),
        "LISTS": write_lines(made / "lists.jsonl", LISTS),
    }


def lines_of(capsys, *words) -> list[dict]:
    """The rows on stdout of a command that must succeed."""
    assert main(list(map(str, words))) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- sample --------------------------------------------------------------------------------------


def test_sample_row_does_not_depend_on_the_batch(files, capsys):
    command = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--batch-size", 16)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(list(row) == ["prompt", "response", "finish_reason", "tokens"] for row in rows)
    for size in (1, 4):
        assert lines_of(capsys, *command, "--batch-size", size) == rows
    assert lines_of(capsys, *command, "--limit", 2) == rows[:2]


def test_sample_draws_anew_for_each_row_and_seed(files, capsys, tmp_path):
    same = write_lines(tmp_path / "same.jsonl", [{"prompt": "a film"}] * 3)
    command = ["sample", "--model", files["LM"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--data", same)
    others = lines_of(capsys, *command, "--data", same, "--seed", 1)
    assert len({row["response"] for row in rows + others}) == 6
    assert lines_of(capsys, *command, "--prompt", "a film") == rows[:1]


def test_sample_draws_several_responses_of_each_prompt(files, capsys, tmp_path):
    command = ["sample", "--model", files["LM"], "--max-new-tokens", 16]
    rows = lines_of(capsys, *command, "--data", files["PROMPTS"], "--samples", 3, "--limit", 2)
    assert [row["prompt"] for row in rows] == 3 * PROMPTS[:1] + 3 * PROMPTS[1:2]
    assert len({row["response"] for row in rows}) == 6
    # as if each prompt stood in the file three times, in any batch
    thrice = write_lines(tmp_path / "thrice.jsonl", [{"prompt": row["prompt"]} for row in rows])
    assert lines_of(capsys, *command, "--data", thrice, "--batch-size", 2) == rows


def test_rows_are_json_whatever_the_terminal_can_show(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    with json_lines(None) as write:
        write({"prompt": "caf\u00e9 \U0001f600"})
    stream.seek(0)
    assert json.loads(stream.read()) == {"prompt": "caf\u00e9 \U0001f600"}


def test_sample_takes_every_text_for_a_prompt(files, capsys):
    (row,) = lines_of(
        capsys, "sample", "--model", files["LM"], "--prompt", "none", "--max-new-tokens", 1
    )
    assert row["prompt"] == "none"


def test_sample_greedy_equals_transformers(files, capsys):
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(files["LM"], dtype=torch.float32)
    tokenizer = load_tokenizer(files["LM"])
    command = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 12]
    for row in lines_of(capsys, *command, "--temperature", 0):
        tokens = torch.tensor([tokenizer.encode(row["prompt"])])
        out = peer.eval().generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False
        )
        response = out[0, tokens.shape[1] :].tolist()
        assert row["response"] == tokenizer.decode(response)
        assert row["tokens"] == len(response)
        assert row["finish_reason"] == ("eos" if response[-1] == 0 else "length")


def lm_that_says(files, text: str) -> CausalLM:
    """Whatever came before, its most probable next token is the next of a cycle: text, eos."""
    tokenizer = load_tokenizer(files["LM"])
    ids = [*tokenizer.encode(text), 0]
    assert len(set(ids)) == len(ids) <= 8
    lm = CausalLM(config_of(tokenizer))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        lm.model.norm.weight.fill_(1.0)
        channel = {id: i for i, id in enumerate(ids)}  # each token of the cycle has its own
        for now, then in zip([ids[-1], *ids], ids, strict=False):
            lm.model.embed_tokens.weight[now, channel[now]] = 1.0
            lm.lm_head.weight[then, channel[now]] = 1.0
    return lm


def test_sample_counts_the_eos_and_leaves_it_out_of_the_text(files):
    tokenizer = load_tokenizer(files["LM"])
    prompts = [Prompt([0], "", "p:1", {})]
    lm = lm_that_says(files, "good film")
    said = len(tokenizer.encode("good film"))
    rows = list(sample(lm, tokenizer, prompts, Sampling(30, temperature=0)))
    row = {"prompt": "", "response": "good film", "finish_reason": "eos", "tokens": said + 1}
    ids = {"input_ids": [0, *tokenizer.encode("good film"), 0], "prompt_length": 1,
           "tokenizer": tokenizer.fingerprint}
    assert rows == [row | ids]  # the prompt's ids are not those of its text


def test_sample_cuts_before_a_stop_string(files):
    tokenizer = load_tokenizer(files["LM"])
    prompts = [Prompt([0], "", "p:1", {})]
    sampling = Sampling(30, temperature=0, stop_strings=(" fil",))
    (row,) = sample(lm_that_says(files, "good film"), tokenizer, prompts, sampling)
    assert (row["response"], row["finish_reason"]) == ("good", "stop")


def test_sample_answers_messages_with_a_message(files, capsys):
    pytest.importorskip("jinja2")
    command = ["sample", "--model", files["LM"], "--data", files["CHAT"], "--max-new-tokens", 8]
    (row,) = lines_of(capsys, *command)
    assert row["prompt"] == [{"role": "user", "content": "a film"}]
    (message,) = row["response"]
    assert message["role"] == "assistant" and isinstance(message["content"], str)


def test_sample_stopped_by_hand_keeps_what_it_wrote(files, capsys, monkeypatch):
    from minirlhf.tools import sample as module

    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*given)

    generate = module.generate
    monkeypatch.setattr(module, "generate", interrupted)
    words = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--batch-size", "2"]
    assert main([*words, "--max-new-tokens", "8"]) == 75
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert told.err.endswith("stopped after 2 of 6 rows\n")


# ---- score ---------------------------------------------------------------------------------------


def peer_score(folder: str, ids: list[int]) -> float:
    """transformers' score of one unpadded text."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    with torch.no_grad():
        return float(model.eval()(torch.tensor([ids])).logits[0, 0])


def test_score_of_texts_is_read_at_their_eos(files, capsys):
    tokenizer = load_tokenizer(files["RM"])
    rows = lines_of(capsys, "score", "--model", files["RM"], "--data", files["TEXTS"])
    assert [row["where"] for row in rows] == [f"{files['TEXTS']}:{i}" for i in (1, 2, 3, 4)]
    for row, text in zip(rows, TEXTS, strict=True):
        expected = peer_score(files["RM"], [*tokenizer.encode(text), 0])
        assert row["score"] == pytest.approx(expected, abs=1e-5)


def test_score_is_read_before_eos_where_the_model_was_trained_so(files, capsys):
    tokenizer = load_tokenizer(files["BEFORE"])
    rows = lines_of(capsys, "score", "--model", files["BEFORE"], "--data", files["TEXTS"])
    for row, text in zip(rows, TEXTS, strict=True):
        expected = peer_score(files["BEFORE"], tokenizer.encode(text))
        assert row["score"] == pytest.approx(expected, abs=1e-5)
    pairs = lines_of(capsys, "score", "--model", files["BEFORE"], "--data", files["PAIRS"])
    ids = tokenizer.encode("it was ") + tokenizer.encode("good")
    assert pairs[0]["chosen_score"] == pytest.approx(peer_score(files["BEFORE"], ids), abs=1e-5)


def test_score_does_not_depend_on_the_batch(files):
    model, tokenizer = load_reward_model(files["RM"]), load_tokenizer(files["RM"])
    rows = [tokenizer.encode(text) for text in TEXTS]
    whole = score_texts(model, rows)
    torch.testing.assert_close(score_texts(model, rows, 1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("verb", "model", "data", "more"),
    [("score", "RM", "TEXTS", []), ("sample", "LM", "PROMPTS", ["--max-new-tokens", "2"])],
)
def test_weights_that_are_rounded_are_told(verb, model, data, more, files, capsys):
    words = [verb, "--model", files[model], "--data", files[data], *more]
    warning = f"warning: {files[model]}: weights are rounded to bfloat16"
    for dtype, told in (("bfloat16", True), ("float32", False)):
        assert main([*words, "--dtype", dtype]) == 0
        assert (warning in capsys.readouterr().err) == told


def test_score_summary_is_mean_and_population_std(files, capsys, monkeypatch):
    from minirlhf.tools import score

    monkeypatch.setattr(score, "score_texts", lambda *_: torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert main(["score", "--model", files["RM"], "--data", files["TEXTS"]]) == 0
    assert capsys.readouterr().err.endswith("4 texts  mean 2.0000  std 1.0000\n")


def test_score_of_pairs_gives_both_sides_and_the_accuracy(files, capsys):
    tokenizer = load_tokenizer(files["RM"])
    assert main(["score", "--model", files["RM"], "--data", files["PAIRS"]]) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    # the third pair has two equal answers: dropped, and the report says so
    assert [row["where"].rpartition(":")[2] for row in rows] == ["1", "2", "4"]
    assert "dropped:  1 (chosen equals rejected)" in told.err
    texts = [("it was ", "good", "bad"), ("a film ", "that we saw", "we left"),
             ("so ", "bad", "over and over")]
    right = 0
    for row, (prompt, *sides) in zip(rows, texts, strict=True):
        expected = [
            peer_score(files["RM"], [*tokenizer.encode(prompt), *tokenizer.encode(side), 0])
            for side in sides
        ]
        got = [row["chosen_score"], row["rejected_score"]]
        assert got == pytest.approx(expected, abs=1e-5)
        right += expected[0] > expected[1]
    assert f"3 pairs  accuracy {right / 3:.4f}  ties 0.0000  margin " in told.err


def test_score_of_a_constant_model_is_all_ties(files, capsys, tmp_path):
    model = load_reward_model(files["RM"])
    torch.nn.init.zeros_(model.score.weight)
    save_pretrained(model, tmp_path, 1)
    load_tokenizer(files["RM"]).save(tmp_path)
    assert main(["score", "--model", str(tmp_path), "--data", files["PAIRS"]]) == 0
    told = capsys.readouterr().err
    assert told.endswith("3 pairs  accuracy 0.0000  ties 1.0000  margin 0.0000\n")


def test_score_of_lists_is_of_each_response_best_first(files, capsys):
    tokenizer = load_tokenizer(files["RM"])
    assert main(["score", "--model", files["RM"], "--data", files["LISTS"]]) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [list(row) for row in rows] == [["where", "scores", "ranks"]] * 2
    assert "dropped:  1 (all responses tie)" in told.err
    texts = [("1", [1, 2, 3], "it was ", "good", "over", "bad"),
             ("3", [1, 2, 2], "a film ", "that", "we left", "so")]
    for row, (line, ranks, prompt, *responses) in zip(rows, texts, strict=True):
        assert (row["where"], row["ranks"]) == (f"{files['LISTS']}:{line}", ranks)
        expected = [
            peer_score(files["RM"], [*tokenizer.encode(prompt), *tokenizer.encode(text), 0])
            for text in responses
        ]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)


def test_score_summary_of_lists_by_hand(files, capsys, monkeypatch):
    from minirlhf.tools import score

    # 1 > 2 > 3 got 2, 0, 1: pairs 2-0 and 2-1 right, 0-1 wrong; 1 > 2 = 2 got 0, 0, 1: 0-0, 0-1.
    # Of five pairs two are right, one ties, margins are 2, 1, -1, 0, -1; the first list's best is
    # on top. Losses: -log e^2/(e^2 + 1 + e) - log 1/(1 + e) = 0.40761 + 1.31326, and of the
    # second, whose others tie, -log 1/(1 + 1 + e) = 1.55144.
    monkeypatch.setattr(
        score, "score_texts", lambda *_: torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    )
    assert main(["score", "--model", files["RM"], "--data", files["LISTS"]]) == 0
    # confidence sigmoid |margin|: .8808 right, .7311 right, .7311 wrong twice, .5 half right; so
    # (.1192 + |1 - 3 x .7311| + 0) / 5
    assert capsys.readouterr().err.endswith(
        "2 lists  accuracy 0.4000  top1 0.5000  ties 0.2000  loss 1.6362  margin 0.2000  "
        "calibration_error 0.2625\n"
    )


def test_score_tells_of_lists_what_the_recipe_evaluates(files, capsys):
    assert main(["score", "--model", files["RM"], "--data", files["LISTS"]]) == 0
    model, tokenizer = load_reward_model(files["RM"]), load_tokenizer(files["RM"])
    lists, _ = load_preferences(files["LISTS"], tokenizer, 48, "error")
    metrics = evaluate_preferences(model, lists).metrics
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN)
    assert capsys.readouterr().err.endswith(f"2 lists  {shown}\n")


def test_score_of_lists_is_read_before_eos_where_the_model_was_trained_so(files, capsys):
    tokenizer = load_tokenizer(files["BEFORE"])
    row, _ = lines_of(capsys, "score", "--model", files["BEFORE"], "--data", files["LISTS"])
    ids = tokenizer.encode("it was ") + tokenizer.encode("good")
    assert row["scores"][0] == pytest.approx(peer_score(files["BEFORE"], ids), abs=1e-5)


def test_score_reads_what_sample_wrote(files, capsys, tmp_path):
    out = tmp_path / "samples.jsonl"
    words = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 5]
    assert lines_of(capsys, *words, "--out", out) == []
    samples = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {row["finish_reason"] for row in samples} == {"length"}
    samples[0]["finish_reason"] = "eos"
    scored = lines_of(capsys, "score", "--model", files["RM"],
                      "--data", write_lines(tmp_path / "s.jsonl", samples))
    tokenizer = load_tokenizer(files["RM"])
    for row, line, end in zip(samples, scored, ([0], [], [], [], [], []), strict=True):
        # only a text that ended by itself has an eos to read its score at
        ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["response"]) + end
        assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)


def test_score_reads_a_response_that_ended_at_once(files, capsys, tmp_path):
    row = {"prompt": "a film", "response": "", "finish_reason": "eos", "tokens": 1}
    path = write_lines(tmp_path / "s.jsonl", [row])
    (line,) = lines_of(capsys, "score", "--model", files["RM"], "--data", path)
    ids = [*load_tokenizer(files["RM"]).encode("a film"), 0]
    assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)
    for reason in (None, "content_filter"):  # of another tool: then it is a fault
        path = write_lines(tmp_path / "t.jsonl", [row | {"finish_reason": reason}])
        assert main(["score", "--model", files["RM"], "--data", str(path)]) == 2
        assert "response is empty" in capsys.readouterr().err


def test_score_reads_the_ids_of_prompts_that_were_ids(files, capsys, tmp_path):
    tokenizer = load_tokenizer(files["RM"])
    ids = [[0, *tokenizer.encode("a film")], tokenizer.encode("it was")]  # eos in front
    data = write_lines(tmp_path / "p.jsonl", [{"prompt_ids": each} for each in ids])
    words = ["sample", "--model", files["LM"], "--data", data, "--max-new-tokens", 5]
    samples = lines_of(capsys, *words)
    assert [row["input_ids"][: row["prompt_length"]] for row in samples] == ids
    assert [len(row["input_ids"]) - row["prompt_length"] for row in samples] == [5, 5]
    scored = lines_of(capsys, "score", "--model", files["RM"],
                      "--data", write_lines(tmp_path / "s.jsonl", samples))
    for row, line in zip(samples, scored, strict=True):
        assert line["score"] == pytest.approx(peer_score(files["RM"], row["input_ids"]), abs=1e-5)


def test_ids_that_sample_wrote_are_read_by_their_own_tokenizer_only(files, capsys, tmp_path):
    row = {"prompt": "a film", "response": "so", "finish_reason": "eos", "input_ids": [300, 5],
           "prompt_length": 1, "tokenizer": "another"}
    path = write_lines(tmp_path / "s.jsonl", [row])
    sample = ("sample", "--model", files["LM"], "--max-new-tokens", "4")
    for words in (("score", "--model", files["RM"]), sample):
        assert main([*words, "--data", str(path)]) == 2
        told = "s.jsonl:1: holds ids of another tokenizer: leave out its input_ids and prompt_leng"
        assert told in capsys.readouterr().err


def test_a_prompt_of_ids_ends_where_its_answer_begins(files, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "prompt_length": 2}, {"input_ids": [8, 9]}]
    tokenizer = load_tokenizer(files["LM"])
    prompts, _ = load_prompts(write_lines(tmp_path / "p.jsonl", rows), tokenizer, 9, "error")
    assert [prompt.ids for prompt in prompts] == [[5, 6], [8, 9]]
    for wrong in (0, 4, "2"):
        path = write_lines(tmp_path / "q.jsonl", [rows[0] | {"prompt_length": wrong}])
        with pytest.raises(UserError, match=r"prompt_length is .*: needs an integer from 1 to 3"):
            load_prompts(path, tokenizer, 9, "error")


def test_a_stop_string_that_no_text_shows_is_refused(files, capsys):
    words = ["sample", "--model", files["LM"], "--prompt", "a", "--stop", "a<|endoftext|>"]
    assert main(list(map(str, words))) == 2
    assert "stop strings: 'a<|endoftext|>' names a special token" in capsys.readouterr().err


def test_score_reads_a_turn_that_was_continued(files, capsys, tmp_path):
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I say "}]
    row = {"prompt": prompt, "response": [{"role": "assistant", "content": " no"}],
           "finish_reason": "eos"}
    path = write_lines(tmp_path / "s.jsonl", [row])
    (line,) = lines_of(capsys, "score", "--model", files["RM"], "--data", path)
    tokenizer = load_tokenizer(files["RM"])
    ids = [*tokenizer.encode_chat(prompt), *tokenizer.encode(" no", bos=False), 0]
    assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)


@pytest.mark.parametrize(
    ("data", "match"),
    [("TEXTS", "texts.jsonl:1: score is nan"), ("PAIRS", "1: chosen_score is nan"),
     ("LISTS", "lists.jsonl:1: scores[0] is nan")],
)
def test_score_stops_at_a_score_that_is_not_finite(data, match, files, capsys, tmp_path):
    model = load_reward_model(files["RM"])
    torch.nn.init.constant_(model.score.weight, float("nan"))
    save_pretrained(model, tmp_path / "rm", 1)
    load_tokenizer(files["RM"]).save(tmp_path / "rm")
    out = tmp_path / "scores.jsonl"
    words = ["--model", str(tmp_path / "rm"), "--data", files[data], "--out", str(out)]
    assert main(["score", *words]) == 3
    assert match in capsys.readouterr().err
    assert not out.exists()


# ---- rows that are not as they should be ---------------------------------------------------------

KINDS = {
    "sample": {"prompt": "a film"},
    "score": {"text": "a film"},
    "pairs": {"prompt": "a ", "chosen": "film", "rejected": "bad"},
    "lists": {"prompt": "a ", "responses": ["film", "bad"]},
}


def command_of(kind: str, files: dict, path: str) -> list[str]:
    if kind == "sample":
        return ["sample", "--model", files["LM"], "--max-new-tokens", "4", "--data", path]
    return ["score", "--model", files["RM"], "--data", path]


def write_text(path, *lines) -> str:
    lines = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_rows_are_left_out_and_told_where_asked_for(kind, files, capsys, tmp_path):
    row = KINDS[kind]
    path = write_text(tmp_path / "d.jsonl", "{,", row, {"x": 1}, row)  # the second tells the kind
    command = command_of(kind, files, path)
    assert main(command) == 2
    assert "d.jsonl:1: not valid JSON at column 2" in capsys.readouterr().err
    assert main([*command, "--bad-rows", "skip"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert f"rejected: 2 (first: {path}:1: not valid JSON at column 2" in told.err
    assert "4 rows · kept 2" in told.err


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_not_left_out_beyond_max_drop(kind, files, capsys, tmp_path):
    path = write_text(tmp_path / "d.jsonl", "{,", KINDS[kind], KINDS[kind], KINDS[kind])
    command = [*command_of(kind, files, path), "--bad-rows", "skip", "--max-drop"]
    assert main([*command, "0.25"]) == 0
    capsys.readouterr()
    assert main([*command, "0.2"]) == 2
    told = capsys.readouterr()
    assert "1 of 4 rows are left out, max_drop is 0.2" in told.err and told.out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_surrogate_pairs_are_mended_where_asked_for(kind, files, capsys, tmp_path):
    broken = json.dumps(KINDS[kind]).replace("film", r"film\ud800")
    whole = json.dumps(KINDS[kind]).replace("film", r"film\ufffd")
    command = command_of(kind, files, write_text(tmp_path / "d.jsonl", broken))
    assert main(command) == 2
    assert "half of a surrogate pair" in capsys.readouterr().err
    mended = lines_of(capsys, *command, "--fix-text")
    write_text(tmp_path / "d.jsonl", whole)
    assert lines_of(capsys, *command) == mended


@pytest.mark.parametrize("kind", ["pairs", "lists", "score"])
def test_score_takes_empty_prompts_where_that_is_asked_for(kind, files, capsys, tmp_path):
    row = {**KINDS[kind], "prompt": ""} if kind != "score" else {"prompt": "", "response": "film"}
    path = write_text(tmp_path / "d.jsonl", row)
    assert main(command_of(kind, files, path)) == 2
    assert "d.jsonl:1: prompt is empty" in capsys.readouterr().err
    (found,) = lines_of(capsys, *command_of(kind, files, path), "--allow-empty-prompt")
    score = {"pairs": lambda: found["chosen_score"], "lists": lambda: found["scores"][0],
             "score": lambda: found["score"]}[kind]()
    ids = [*load_tokenizer(files["RM"]).encode("film"), 0]
    assert score == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)


def test_sample_takes_empty_prompts_where_something_stands_before_them(files, capsys, tmp_path):
    shutil.copytree(files["LM"], tmp_path / "bos")
    tokenizer = json.loads((tmp_path / "bos/tokenizer.json").read_text("utf-8"))
    name = "<|endoftext|>"  # of id 0, which then begins texts too
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    (tmp_path / "bos/tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_text(tmp_path / "d.jsonl", {"prompt": ""})
    for folder, words, told in (
        (files["LM"], [], "d.jsonl:1: prompt is empty"),
        (files["LM"], ["--allow-empty-prompt"], "d.jsonl:1: a text without any token: the token"),
        (tmp_path / "bos", [], "d.jsonl:1: prompt is empty"),
    ):
        assert main([*command_of("sample", {"LM": str(folder)}, path), *words]) == 2
        assert told in capsys.readouterr().err
    command = command_of("sample", {"LM": str(tmp_path / "bos")}, path)
    (row,) = lines_of(capsys, *command, "--allow-empty-prompt")
    assert row["prompt"] == "" and row["tokens"] >= 1


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("sample --model LM", "give exactly one of --data and --prompt"),
        ("sample --model LM --data PROMPTS --prompt x", "give exactly one of --data and --prompt"),
        ("sample --model LM --prompt x --stop=", "stop: got an empty string"),
        ("sample --model LM --prompt x --out PROMPTS", "prompts.jsonl is there already"),
        ("sample --model LM --prompt x --samples 0", "--samples: got 0, must be"),
        ("sample --model LM --prompt x --samples 2 --temperature 0",
         "--samples 2 with temperature 0: they would all be one"),
        ("sample --model LM --prompt x --top-p 0", "--top-p: got 0.0, must be"),
        ("sample --model LM --prompt x --max-new-tokens 49",
         "--max-new-tokens: is 49: the model has 48 positions"),
        ("sample --model LM --prompt=", "--prompt: has 0 tokens: must have 1 to 33"),
        ("sample --model LM --data PROMPTS --max-length 34",
         "--max-length: is 34, the model has room for 33 before the new tokens"),
        ("sample --model LM --data PROMPTS --max-length 1", "prompts.jsonl:1: 2 tokens, max_"),
        ("sample --model RM --prompt x", "is a reward model, not a language model"),
        ("sample --model PROMPTS --prompt x", "is a file: give the folder"),
        ("score --model LM --data TEXTS", "has no 'score.weight': not a reward model"),
        ("score --model RM --data TEXTS --max-length 49", "--max-length: is 49: the model has 48"),
        ("score --model RM --data TEXTS --max-length 2", "texts.jsonl:1: "),
        ("score --model RM --data TEXTS --out PAIRS", "pairs.jsonl is there already"),
        ("score --model RM --data PROMPTS",
         "columns of no known format: prompt (a string), id (a number)"),
        ("score --model RM --data none.jsonl", "none.jsonl: no such file"),
        ("score --model RM --data LISTS --max-length 2", "lists.jsonl:1: "),
    ],
)
def test_main_refuses(words, match, files, tmp_path, capsys):
    verb, *rest = [files.get(word, word) for word in words.split()]
    if verb == "sample" and "--max-new-tokens" not in rest:
        rest += ["--max-new-tokens", "16"]
    out = [] if "--out" in rest else ["--out", str(tmp_path / "out.jsonl")]
    assert main([verb, *rest, *out]) == 2
    told = capsys.readouterr()
    assert match in told.err.splitlines()[-1] and told.err.count("error: ") == 1
    assert told.out == "" and not (tmp_path / "out.jsonl").exists()
