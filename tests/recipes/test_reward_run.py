"""Reward training as a command: a run that is the same however it is cut, read by other tools."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minirlhf.batches.preferences import LIST_LOSSES, unread_end, without_unread
from minirlhf.cli import main
from minirlhf.data.examples import load_pairs
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import STOPPED
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.files import atomic
from minirlhf.models.heads import RewardModel
from minirlhf.models.pretrained import load_pretrained, load_reward_model
from minirlhf.rewards.load import load_reward
from minirlhf.rewards.source import Completions
from minirlhf.run.folder import Run
from minirlhf.setup import reward as setup
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward import load_run, load_start, write_reward_model
from minirlhf.setup.reward_settings import RewardConfig
from tests.conftest import make_peer
from tests.tiny_folders import read_lines, save_lm, timeless, write_lines
from tests.tiny_reward import TINY

WORDS = ("good", "bad", "long", "dull", "fine", "warm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a tiny language model with its tokenizer, training pairs, held-out pairs)."""
    folder = tmp_path_factory.mktemp("base")
    texts = [f"the film was {a} and {b}." for a in WORDS for b in WORDS]
    tokenizer = train_tokenizer(texts, 290, folder)
    save_lm(folder, TINY, vocab_size=tokenizer.vocab_size, eos_token_id=0)
    rows = [
        {"prompt": "the film was", "chosen": f" {a} and good.", "rejected": f" {b}.",
         "margin": i / 4, "rating": i}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    ]
    return folder, write_lines(folder / "d.jsonl", rows), write_lines(folder / "e.jsonl", rows[:3])


def run_reward(base, out, *words, model=None) -> int:
    given = ["--model", model or base[0], "--out", out, *words]
    if "--data" not in words:
        given += ["--data", base[1]]
    return main(["reward", *map(str, given)])


STEPS = ("--steps", 6, "--save-every", 2, "--log-every", 1, "--batch-size", 2,
         "--learning-rate", 0.01)
EVALUATED = (*STEPS, "--eval-every", 3)  # goes with --eval-data


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of an uninterrupted run of 6 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sets = ("--eval-data", f"seen={base[1]}", base[2])
    assert run_reward(base, out, *EVALUATED, *sets, "--show-samples", -1) == 0
    return out


def test_main_writes_what_it_says(base, whole):
    names = sorted(p.name for p in whole.iterdir() if p.name != ".lock")
    assert names == [
        "card.json", "card.md", "checkpoints", "metrics.jsonl", "model", "report.html",
        "run.json", "samples.jsonl",
    ]
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000004", "step-00000006",
    ]
    facts = json.loads((whole / "run.json").read_text("utf-8"))
    assert facts["recipe"] == "reward" and facts["settings"]["steps"] == 6
    tokenizer = {str(p) for p in base[0].iterdir() if p.suffix == ".json" and "index" not in p.name}
    assert set(facts["inputs"]) == {*base[1:], *tokenizer}
    lines = read_lines(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    of_training = {
        "step", "clock", "loss", "accuracy", "accuracy_half", "ties", "margin", "margin_std",
        "min_reward", "mean_reward", "max_reward", "grad_norm", "learning_rate", "epoch",
        "num_tokens", "skipped_updates",
    }
    assert lines[0].keys() == of_training
    held_out = {"loss", "accuracy", "ties", "calibration_error"}
    wanted = {prefix + name for prefix in ("eval_", "eval_seen_") for name in held_out}
    assert all((wanted <= line.keys()) == (line["step"] in (3, 6)) for line in lines)
    assert lines[-1]["epoch"] == 2.0


def test_main_evaluates_once_after_the_last_step(base, tmp_path, monkeypatch):
    seen = []

    def counted(model, examples, *rest, **named):
        seen.append(len(examples))
        return evaluate_preferences(model, examples, *rest, **named)

    monkeypatch.setattr(setup, "evaluate_preferences", counted)
    out, words = tmp_path / "run", (*EVALUATED, "--eval-data", base[2])
    assert run_reward(base, out, *words) == 0 and len(seen) == 2  # after steps 3 and 6
    card = json.loads((out / "card.json").read_text("utf-8"))
    shutil.rmtree(out / "model")
    assert run_reward(base, out, *words, "--resume") == 0 and len(seen) == 3
    assert json.loads((out / "card.json").read_text("utf-8")) == card


def test_main_evaluates_the_model_that_it_writes(base, whole):
    last = read_lines(whole / "metrics.jsonl")[-1]
    pairs, _ = load_pairs(base[2], load_tokenizer(whole / "model"), 64, "error")
    again = evaluate_preferences(load_reward_model(whole / "model"), pairs).metrics
    # another batching of nothing: the same rows in the same order
    assert {f"eval_{name}": value for name, value in again.items()}.items() <= last.items()


def test_main_shows_all_samples(whole):
    rows = read_lines(whole / "samples.jsonl")
    assert [(row["step"], row["set"]) for row in rows] == (
        [(3, "eval_seen_")] * 6 + [(3, "eval_")] * 3 + [(6, "eval_seen_")] * 6 + [(6, "eval_")] * 3
    )
    assert rows[0]["prompt"] == "the film was" and rows[0]["chosen"] == " good and good."
    assert rows[0]["rejected"] == " bad." and rows[1]["margin"] == 0.25


def test_a_run_with_adapters_killed_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch):
    words = (*EVALUATED, "--lora-rank", 2, "--eval-data", base[2])
    assert run_reward(base, tmp_path / "whole", *words) == 0
    log, out = Run.log, tmp_path / "killed"

    def die(run, state, *rest):
        log(run, state, *rest)
        if state.step == 3:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Run, "log", die)
    with pytest.raises(RuntimeError, match="power cut"):
        run_reward(base, out, *words)
    monkeypatch.undo()
    assert not (out / "model").exists()
    assert run_reward(base, out, *words, "--resume") == 0
    assert json.dumps(timeless(out)) == json.dumps(timeless(tmp_path / "whole"))
    for name in ("samples.jsonl", "model/model.safetensors", "model/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_saves_and_exits_75_and_resume_ends_the_run(base, tmp_path, monkeypatch):
    save, out = Run.save, tmp_path / "run"

    def stop_at_2(run, state):
        save(run, state)
        if state.step == 2 and not run.stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", stop_at_2)
    assert run_reward(base, out, *STEPS) == STOPPED == 75
    monkeypatch.undo()
    assert not (out / "model").exists()
    assert run_reward(base, out, *STEPS, "--resume") == 0
    assert [line["step"] for line in timeless(out)] == [1, 2, 3, 4, 5, 6]


def test_lora_trains_the_head_and_adapters_and_writes_a_merged_model(base, tmp_path):
    out = tmp_path / "run"
    config = RewardConfig(model=str(base[0]), data=base[1], out=str(out), lora_rank=2)
    model = load_run(config).state.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"}) and len(trained) > 1
    head = model.score.weight.detach().clone()
    assert run_reward(base, out, *STEPS, "--lora-rank", 2) == 0
    before, after = load_pretrained(base[0]).state_dict(), load_reward_model(out / "model")
    after = after.state_dict()
    assert not any("lora" in name for name in after)
    assert not torch.equal(after["score.weight"], head)
    changed = {n for n, t in before.items() if n in after and not torch.equal(t, after[n])}
    assert changed and all("_proj" in name for name in changed)


def transformers_scores(folder, texts: list[str]) -> torch.Tensor:
    """As other tools do it: their tokenizer pads, their model finds the last token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (len(texts), 1)
    return logits[:, 0]


def our_scores(base, folder) -> torch.Tensor:
    tokenizer = load_tokenizer(folder)
    pairs, _ = load_pairs(base[1], tokenizer, 64, "error")
    model = load_reward_model(folder)
    if model.unread is not None:
        pairs = [without_unread(p, model.unread) for p in pairs]
    result = evaluate_preferences(model, pairs)
    return torch.stack((result.chosen, result.rejected), 1).flatten()


def whole_texts(base, end: str) -> list[str]:
    rows = read_lines(Path(base[1]))
    return [row["prompt"] + row[side] + end for row in rows for side in ("chosen", "rejected")]


def test_model_scores_alike_in_transformers(base, whole):
    theirs = transformers_scores(whole / "model", whole_texts(base, "<|endoftext|>"))
    torch.testing.assert_close(our_scores(base, whole / "model"), theirs, rtol=0, atol=1e-5)


def test_model_without_a_spare_pad_token_is_read_before_eos_as_transformers_does(base, tmp_path):
    folder = tmp_path / "gpt2"
    tokenizer = load_tokenizer(base[0])
    peer = make_peer("gpt2", "CausalLM", vocab_size=tokenizer.vocab_size, eos_token_id=0)
    peer.save_pretrained(folder)
    tokenizer.save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        values = json.loads(path.read_text("utf-8"))
        values.pop("pad_token", None)
        for token in values.get("added_tokens", []):  # an ordinary word now
            token["special"] = token["content"] == "<|endoftext|>"
        path.write_text(json.dumps(values), encoding="utf-8")
    assert load_tokenizer(folder).spare_pad_token() is None
    out = tmp_path / "run"
    assert run_reward(base, out, *EVALUATED, "--eval-data", base[2], model=folder) == 0
    assert load_reward_model(out / "model").unread == 0
    theirs = transformers_scores(out / "model", whole_texts(base, "<|endoftext|>"))
    ours = our_scores(base, out / "model")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # what was trained is what is read: the run's own evaluation saw the same scores
    last = read_lines(out / "metrics.jsonl")[-1]
    seen = ours.view(-1, 2)[:3]
    assert last["eval_margin"] == pytest.approx(float((seen[:, 0] - seen[:, 1]).mean()), abs=1e-6)


def test_a_reward_model_is_trained_further(base, whole, tmp_path):
    out = tmp_path / "run"
    words = ("--steps", 1, "--learning-rate", 1e-9, "--eval-data", base[2])
    assert run_reward(base, out, *words, model=whole / "model") == 0
    before, after = (load_reward_model(f / "model").score.weight for f in (whole, out))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-7)  # not drawn anew


def test_a_reward_model_of_llama_factory_is_trained_further(base, tmp_path, capsys):
    folder = shutil.copytree(base[0], tmp_path / "peer")
    size = load_pretrained(folder).config.hidden_size
    head = {"v_head.summary.weight": torch.rand(1, size), "v_head.summary.bias": torch.ones(1)}
    save_file(head, folder / "value_head.safetensors")
    config = RewardConfig(model=str(folder), data="d", out="o")
    model = load_start(config, None, torch.float32)
    assert torch.equal(model.score.weight, head["v_head.summary.weight"])
    assert model.reward_mean == 0
    assert "by a mean of -1.0000 and a deviation of 1.0000: both" in capsys.readouterr().out


def test_head_depends_on_the_seed_alone(base):
    heads = [
        load_start(RewardConfig(model=str(base[0]), seed=s), None, torch.float32).score.weight
        for s in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_write_reward_model_of_ids_only_names_no_pad_token(base, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(base[0])
    tokenizer.eos_ids = ()
    monkeypatch.setattr(tokenizer, "spare_pad_token", lambda: None)
    lm = load_pretrained(base[0])
    model = RewardModel(lm, unread_end(lm.config, tokenizer))
    write_reward_model(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8")).get("pad_token_id") is None


ENSEMBLE = ("--heads", 3, "--lcb-coef", 0.5, "--center-rewards-coefficient", 0.01)


@pytest.fixture(scope="module")
def ensemble(base, tmp_path_factory):
    """The folder of a run of three heads, normalised over what is held out."""
    out = tmp_path_factory.mktemp("ensemble") / "run"
    words = (*EVALUATED, *ENSEMBLE, "--normalize", "eval", "--eval-data", base[2])
    assert run_reward(base, out, *words) == 0
    return out


def test_whoever_loads_a_normalised_ensemble_sees_its_scores(base, ensemble, capsys):
    tokenizer, model = load_tokenizer(ensemble / "model"), load_reward_model(ensemble / "model")
    assert (model.heads, model.lcb_coef, model.reward_std) == (3, 0.5, 1.0)
    pairs, _ = load_pairs(base[2], tokenizer, 64, "error")
    result = evaluate_preferences(model, pairs)
    std, mean = torch.std_mean(result.scores.double(), correction=0)
    assert (float(mean), float(std)) == pytest.approx((0.0, 1.0), rel=0, abs=1e-5)
    # `minirlhf score`, and what PPO is given
    assert main(["score", "--model", str(ensemble / "model"), "--data", base[2]]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["chosen_score"] for row in rows] == pytest.approx(result.chosen.tolist(), abs=1e-5)
    config = PPOConfig(reward=(str(ensemble / "model"),))
    source = load_reward(config, tokenizer, partial(load_reward_model, dtype=torch.float32), 4096)
    batch = Completions(
        [""] * 3, [p.prompt_ids for p in pairs], [""] * 3, [p.chosen_ids for p in pairs],
        ["eos"] * 3, {},
    )
    torch.testing.assert_close(source(batch).total, result.chosen, rtol=0, atol=1e-5)


def test_card_is_of_the_model_that_is_written(base, ensemble):
    card = json.loads((ensemble / "card.json").read_text("utf-8"))
    assert card["model"]["heads"] == 3 and card["model"]["normalized"]["over"] == "eval"
    sums = {Path(name): atomic.sha256(name) for name in base[1:]}
    assert {Path(row["file"]): row["sha256"] for row in card["model"]["data"]} == {
        Path(name.name): digest for name, digest in sums.items()
    }
    assert card["model"]["settings"]["lcb_coef"] == 0.5 and "out" not in card["model"]["settings"]
    pairs, _ = load_pairs(base[2], load_tokenizer(ensemble / "model"), 64, "error")
    again = evaluate_preferences(load_reward_model(ensemble / "model"), pairs).metrics
    assert {name: card["sets"]["eval"][name] for name in again} == again
    for name in ("card.json", "card.md"):
        assert (ensemble / name).read_bytes() == (ensemble / "model" / name).read_bytes()


def test_scores_are_normalised_over_pairs_and_lists_together(base, tmp_path):
    row = {"prompt": "the film was", "responses": [f" {w}." for w in WORDS], "best": 0}
    lists, out = write_lines(tmp_path / "lists.jsonl", [row]), tmp_path / "run"
    sets = ("--eval-data", f"lists={lists}", base[2])
    assert run_reward(base, out, *EVALUATED, *sets, "--normalize", "eval") == 0
    tokenizer, model = load_tokenizer(out / "model"), load_reward_model(out / "model")
    read = [load_preferences(path, tokenizer, 64, "error")[0] for path in (base[2], lists)]
    scores = torch.cat([evaluate_preferences(model, rows).scores for rows in read]).double()
    std, mean = torch.std_mean(scores, correction=0)
    assert (float(mean), float(std)) == pytest.approx((0.0, 1.0), rel=0, abs=1e-5)


def test_a_bound_that_was_stored_is_not_dropped_in_silence(base, ensemble, tmp_path, capsys):
    words = (*STEPS, "--heads", 3, "--center-rewards-coefficient", 0.01)
    assert run_reward(base, tmp_path / "run", *words, model=ensemble / "model") == 2
    assert capsys.readouterr().err.endswith("has 0.5: give --lcb-coef 0.5\n")
    words = (*words, "--lcb-coef", 0.5)
    assert run_reward(base, tmp_path / "run", *words, model=ensemble / "model") == 0
    assert "normalises its scores by a mean of " in capsys.readouterr().out


def test_a_reward_folder_names_every_eos(base, tmp_path):
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(base[0], model)
    first = load_tokenizer(model).eos_ids[0]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 5]}))
    assert run_reward(base, out, *STEPS, model=model) == 0
    assert load_tokenizer(out / "model").eos_ids == load_tokenizer(model).eos_ids == (first, 5)


def test_heads_of_another_number_are_refused(base, ensemble, tmp_path, capsys):
    assert run_reward(base, tmp_path / "run", *STEPS, model=ensemble / "model") == 2
    assert "--heads: is 1, the reward model" in (told := capsys.readouterr().err)
    assert told.endswith("has 3: give --heads 3\n") and not (tmp_path / "run").exists()


def test_a_run_on_ranked_lists_is_evaluated_on_lists_and_on_pairs(base, tmp_path, capsys):
    rows = [{"prompt": "the film was", "responses": [f" {w}." for w in WORDS[i:]], "best": 0}
            for i in range(4)]
    lists, out = write_lines(tmp_path / "lists.jsonl", rows), tmp_path / "run"
    words = (*EVALUATED, "--verbose", "--data", lists, "--eval-data", f"lists={lists}", base[2])
    assert run_reward(base, out, *words) == 0
    told = capsys.readouterr().out
    assert "lists a step" in told and "eval_lists, 4 lists: accuracy" in told
    last = read_lines(out / "metrics.jsonl")[-1]
    assert {"top1", "eval_lists_top1", "eval_accuracy"} <= last.keys() and "eval_top1" not in last
    words = (*STEPS, "--data", lists, "--label-smoothing", 0.1)
    assert run_reward(base, tmp_path / "smooth", *words) == 2
    assert "only the label of a pair can be smoothed" in capsys.readouterr().err


def test_a_run_on_the_pairs_of_ranked_lists(base, tmp_path, capsys):
    rows = [{"prompt": "the film was", "responses": [f" {w}." for w in WORDS[i:]],
             "scores": list(range(len(WORDS[i:])))} for i in range(4)]
    scored = write_lines(tmp_path / "scored.jsonl", rows)
    words = (*EVALUATED, "--data", scored, "--eval-data", f"lists={scored}", "--seed", 3)
    losses = {}
    for loss in LIST_LOSSES:
        assert run_reward(base, tmp_path / loss, *words, "--list-loss", loss) == 0
        losses[loss] = timeless(tmp_path / loss)[-1]["eval_lists_loss"]
        card = json.loads((tmp_path / loss / "card.json").read_text("utf-8"))
        assert card["sets"]["eval_lists"]["loss"] == losses[loss]
    # A whole order costs the logarithm of many choices, a margin more than none, a likely label the
    # entropy that a certain one has not.
    assert losses["plackett-luce"] > losses["margins"] > losses["pairs"] > 0
    assert losses["probabilities"] != losses["pairs"]
    for row in rows:
        del row["scores"]
    ordered = write_lines(tmp_path / "ordered.jsonl", rows)
    capsys.readouterr()
    for words, told in (
        (["--data", ordered, "--list-loss", "margins"], "is margins, but {} has no scores"),
        (["--data", scored, "--eval-data", ordered, "--list-loss", "margins"], "{} has no scores"),
        (["--list-loss", "pairs"], "--list-loss: is pairs, but "),
    ):
        assert run_reward(base, tmp_path / "refused", *STEPS, *words) == 2
        assert told.format(ordered) in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
    words = ("--data", ordered, "--list-loss", "pairs", "--label-smoothing", 0.1)
    assert run_reward(base, tmp_path / "smooth pairs", *STEPS, *words) == 0
