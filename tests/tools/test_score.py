"""`minirlhf score`: scores of texts, pairs and ranked lists, the same however they were batched."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minirlhf.cli import main
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.models.pretrained import load_reward_model, save_pretrained
from minirlhf.recipes.reward import SHOWN
from minirlhf.rewards.model import score_texts
from tests.tools.conftest import KINDS, TEXTS, command_of, lines_of, peer_score, write_lines


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
    expected = pytest.approx(peer_score(files["BEFORE"], ids), abs=1e-5)
    assert pairs[0]["chosen_score"] == expected
    lists = lines_of(capsys, "score", "--model", files["BEFORE"], "--data", files["LISTS"])
    assert lists[0]["scores"][0] == expected


def test_score_does_not_depend_on_the_batch(files):
    model = load_reward_model(files["RM"], torch.float64)
    tokenizer = load_tokenizer(files["RM"])
    rows = [tokenizer.encode(text) for text in TEXTS]
    whole = score_texts(model, rows)
    torch.testing.assert_close(score_texts(model, rows, 1), whole, rtol=0, atol=1e-6)


def test_score_summary_is_mean_and_population_std(files, capsys, monkeypatch):
    from minirlhf.tools import score

    monkeypatch.setattr(score, "score_texts", lambda *_: torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert main(["score", "--model", files["RM"], "--data", files["TEXTS"]]) == 0
    assert capsys.readouterr().err.endswith("4 texts  mean 2.0000  std 1.0000\n")


def test_score_of_pairs_gives_both_sides_and_the_accuracy(files, capsys):
    tokenizer = load_tokenizer(files["RM"])
    assert main(["score", "--model", files["RM"], "--data", files["PAIRS"]]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    # the third pair has two equal answers: dropped, and the report says so
    assert [row["where"].rpartition(":")[2] for row in rows] == ["1", "2", "4"]
    assert "dropped:  1 (chosen equals rejected)" in shown.err
    texts = [("it was ", "good", "bad"), ("a film ", "that we saw", "we left"),
             ("so ", "bad", "over and over")]
    right = 0
    for row, (prompt, *responses) in zip(rows, texts, strict=True):
        expected = [
            peer_score(files["RM"], [*tokenizer.encode(prompt), *tokenizer.encode(response), 0])
            for response in responses
        ]
        got = [row["chosen_score"], row["rejected_score"]]
        assert got == pytest.approx(expected, abs=1e-5)
        right += expected[0] > expected[1]
    assert f"3 pairs  accuracy {right / 3:.4f}  ties 0.0000  margin " in shown.err


def test_score_of_a_constant_model_is_all_ties(files, capsys, tmp_path):
    model = load_reward_model(files["RM"])
    torch.nn.init.zeros_(model.score.weight)
    save_pretrained(model, tmp_path, 1)
    load_tokenizer(files["RM"]).save(tmp_path)
    assert main(["score", "--model", str(tmp_path), "--data", files["PAIRS"]]) == 0
    summary = capsys.readouterr().err.splitlines()[-1]
    assert summary == "3 pairs  accuracy 0.0000  ties 1.0000  margin 0.0000"


def test_score_of_lists_is_of_each_response_best_first(files, capsys):
    tokenizer = load_tokenizer(files["RM"])
    assert main(["score", "--model", files["RM"], "--data", files["LISTS"]]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [list(row) for row in rows] == [["where", "scores", "ranks"]] * 2
    assert "dropped:  1 (all responses tie)" in shown.err
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


def test_score_of_lists_shows_what_the_recipe_evaluates(files, capsys):
    assert main(["score", "--model", files["RM"], "--data", files["LISTS"]]) == 0
    model, tokenizer = load_reward_model(files["RM"]), load_tokenizer(files["RM"])
    lists, _ = load_preferences(files["LISTS"], tokenizer, 48, "error")
    metrics = evaluate_preferences(model, lists).metrics
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN)
    assert capsys.readouterr().err.endswith(f"2 lists  {shown}\n")


def test_score_reads_what_sample_wrote(files, capsys, tmp_path):
    out = tmp_path / "samples.jsonl"
    words = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], "--max-new-tokens", 5]
    assert lines_of(capsys, *words, "--out", out) == []
    samples = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {row["finish_reason"] for row in samples} == {"length"}
    samples[0]["finish_reason"] = "eos"
    scored = lines_of(capsys, "score", "--model", files["RM"],
                      "--data", write_lines(tmp_path / "s.jsonl", *samples))
    tokenizer = load_tokenizer(files["RM"])
    for row, line, end in zip(samples, scored, ([0], [], [], [], [], []), strict=True):
        # only a text that ended by itself has an eos to read its score at
        ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["response"]) + end
        assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)


def test_score_reads_a_response_that_ended_at_once(files, capsys, tmp_path):
    row = {"prompt": "a film", "response": "", "finish_reason": "eos", "tokens": 1}
    path = write_lines(tmp_path / "s.jsonl", row)
    (line,) = lines_of(capsys, "score", "--model", files["RM"], "--data", path)
    ids = [*load_tokenizer(files["RM"]).encode("a film"), 0]
    assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)
    for reason in (None, "content_filter"):  # of another tool: then it is a fault
        path = write_lines(tmp_path / "t.jsonl", row | {"finish_reason": reason})
        assert main(["score", "--model", files["RM"], "--data", str(path)]) == 2
        assert "response is empty" in capsys.readouterr().err


def test_score_reads_the_ids_of_prompts_that_were_ids(files, capsys, tmp_path):
    tokenizer = load_tokenizer(files["RM"])
    ids = [[0, *tokenizer.encode("a film")], tokenizer.encode("it was")]  # eos in front
    data = write_lines(tmp_path / "p.jsonl", *[{"prompt_ids": each} for each in ids])
    words = ["sample", "--model", files["LM"], "--data", data, "--max-new-tokens", 5]
    samples = lines_of(capsys, *words)
    assert [row["input_ids"][: row["prompt_length"]] for row in samples] == ids
    assert [len(row["input_ids"]) - row["prompt_length"] for row in samples] == [5, 5]
    scored = lines_of(capsys, "score", "--model", files["RM"],
                      "--data", write_lines(tmp_path / "s.jsonl", *samples))
    for row, line in zip(samples, scored, strict=True):
        assert line["score"] == pytest.approx(peer_score(files["RM"], row["input_ids"]), abs=1e-5)


def test_score_reads_a_turn_that_was_continued(files, capsys, tmp_path):
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I say "}]
    row = {"prompt": prompt, "response": [{"role": "assistant", "content": " no"}],
           "finish_reason": "eos"}
    path = write_lines(tmp_path / "s.jsonl", row)
    (line,) = lines_of(capsys, "score", "--model", files["RM"], "--data", path)
    tokenizer = load_tokenizer(files["RM"])
    ids = [*tokenizer.encode_chat(prompt), *tokenizer.encode(" no", bos=False), 0]
    ids += tokenizer.encode("\n")  # which the plain template writes behind the eos
    assert line["score"] == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)


@pytest.mark.parametrize(
    ("data", "match"),
    [("TEXTS", "texts.jsonl:1: score is nan"), ("PAIRS", "1: chosen_score is nan"),
     ("LISTS", "lists.jsonl:1: scores[0] is nan")],
)
def test_score_stops_at_a_score_that_is_not_finite(data, match, files, capsys, tmp_path):
    weights = shutil.copytree(files["RM"], tmp_path / "rm") / "model.safetensors"
    tensors = load_file(weights)  # as another tool may have left them
    save_file(tensors | {"score.weight": tensors["score.weight"] * float("nan")}, weights)
    out = tmp_path / "scores.jsonl"
    words = ["--model", str(tmp_path / "rm"), "--data", files[data], "--out", str(out)]
    assert main(["score", *words]) == 3
    assert match in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["pairs", "lists", "score"])
def test_score_takes_empty_prompts_where_that_is_asked_for(kind, files, capsys, tmp_path):
    row = {**KINDS[kind], "prompt": ""} if kind != "score" else {"prompt": "", "response": "film"}
    path = write_lines(tmp_path / "d.jsonl", row)
    assert main(command_of(kind, files, path)) == 2
    assert "d.jsonl:1: prompt is empty" in capsys.readouterr().err
    (found,) = lines_of(capsys, *command_of(kind, files, path), "--allow-empty-prompt")
    score = {"pairs": lambda: found["chosen_score"], "lists": lambda: found["scores"][0],
             "score": lambda: found["score"]}[kind]()
    ids = [*load_tokenizer(files["RM"]).encode("film"), 0]
    assert score == pytest.approx(peer_score(files["RM"], ids), abs=1e-5)
