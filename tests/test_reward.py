"""Reward training: the loss by hand, and a run that is the same however it is cut."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import make_peer

from minirlhf.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.cli import main
from minirlhf.config import validate
from minirlhf.data import Pair, load_pairs
from minirlhf.errors import NON_FINITE, STOPPED, UserError
from minirlhf.heads import RewardModel, initialize_score
from minirlhf.hf_config import config_from_hf
from minirlhf.pretrained import load_pretrained, load_reward_model, save_pretrained
from minirlhf.recipes import reward as recipe
from minirlhf.recipes.reward import (
    Evaluation,
    RewardConfig,
    calibration_error,
    collate_pairs,
    evaluate,
    load_start,
    named_files,
    pair_loss,
    pair_scores,
    reward,
    sample_rows,
    sample_table,
    score_metrics,
    total_steps,
    without_eos,
    write_model,
)
from minirlhf.run import Run
from minirlhf.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.transformer import CausalLM, initialize

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 48,
}  # fmt: skip
V = 11


def pair(prompt, chosen, rejected, margin=0.0, where="t:1", **columns) -> Pair:
    return Pair(prompt, chosen, rejected, margin, where, columns)


PAIRS = [
    pair([1, 2], [3, 4, 5], [6], 0.5, "t:1"),
    pair([], [7, 8], [9, 10, 1], 0.0, "t:2"),
    pair([3], [4], [5, 6, 7, 8, 9, 10, 1], 1.5, "t:3"),
    pair([2, 2, 2], [1], [2], 0.25, "t:4"),
    pair([9], [8, 7], [6, 5], 0.0, "t:5"),
]


def tiny_model(dtype=torch.float64, **changes) -> RewardModel:
    config = config_from_hf({**TINY, "vocab_size": V, **changes})
    rng = torch.Generator().manual_seed(0)
    return initialize_score(RewardModel(initialize(CausalLM(config), rng)), rng).to(dtype)


def config_of(**changes) -> RewardConfig:
    return RewardConfig(**{"batch_size": 2, "learning_rate": 0.01, **changes})


def state_of(model: RewardModel) -> TrainState:
    return TrainState(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0))


def weights(model) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


def scored_by_first_token(model: RewardModel) -> RewardModel:
    """A stand-in whose score is the id of a row's last token, so that scores can be read off."""
    model.forward = lambda tokens, lengths: tokens.gather(1, lengths[:, None] - 1)[:, 0].double()
    return model


# ---- batches and loss ----------------------------------------------------------------------------


def test_collate_pairs_by_hand():
    batch = collate_pairs(PAIRS[:2])
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 6, 0, 0], [9, 10, 1, 0, 0],
    ]  # fmt: skip
    assert batch.lengths.tolist() == [5, 2, 3, 3]
    assert batch.margin.tolist() == [0.5, 0.0]


def test_pair_scores_splits_chosen_and_rejected():
    chosen, rejected = pair_scores(scored_by_first_token(tiny_model()), collate_pairs(PAIRS[:3]))
    assert chosen.tolist() == [5, 8, 4] and rejected.tolist() == [6, 1, 1]


def test_pair_scores_are_those_of_each_text_alone():
    model = tiny_model()
    chosen, rejected = pair_scores(model, collate_pairs(PAIRS))
    for i, p in enumerate(PAIRS):
        for scores, answer in ((chosen, p.chosen_ids), (rejected, p.rejected_ids)):
            ids = p.prompt_ids + answer
            alone = model(torch.tensor([ids]), torch.tensor([len(ids)]))
            torch.testing.assert_close(scores[i : i + 1], alone, rtol=0, atol=1e-12)


def test_pair_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0])
    margin = torch.tensor([1.0, 2.0])
    # -log sigmoid(2 - 1 - 1) = -log sigmoid(1 + 1 - 2) = log 2; 0.5 (2 + 1)^2 = 4.5, (1 - 1)^2 = 0
    expected = torch.tensor([math.log(2) + 4.5, math.log(2)])
    torch.testing.assert_close(pair_loss(chosen, rejected, margin, 0.5), expected)


def test_pair_loss_centre_term_is_zero_only_where_scores_are_opposite():
    chosen, rejected = torch.tensor([3.0, 3.0, 0.0, -2.0]), torch.tensor([-3.0, 3.0, 0.0, 2.5])
    extra = pair_loss(chosen, rejected, torch.zeros(4), 1.0)
    extra -= pair_loss(chosen, rejected, torch.zeros(4), 0.0)
    expected = torch.tensor([0.0, 36.0, 0.0, 0.25])  # 0^2, 6^2, 0^2, (1/2)^2
    torch.testing.assert_close(extra, expected, rtol=0, atol=1e-5)


def test_score_metrics_by_hand():
    # right, tie, wrong, right
    chosen, rejected = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0, -2.0])
    assert score_metrics(chosen, rejected) == pytest.approx(
        {
            "accuracy": 0.5, "accuracy_half": 0.625, "ties": 0.25,
            "margin": 0.5,  # (2 + 0 - 4 + 4) / 4
            "margin_std": math.sqrt(8.75),  # (4 + 0 + 16 + 16) / 4 - 0.5^2
            "min_reward": -2.0, "mean_reward": 1.25, "max_reward": 4.0,  # 10 / 8
        }, rel=0, abs=1e-12,
    )  # fmt: skip


def test_calibration_error_by_hand():
    log3 = math.log(3)  # P(chosen) = 3/4 at a difference of log 3
    zeros = torch.zeros(4)
    # three of four right at confidence 3/4: perfectly calibrated
    assert calibration_error(torch.tensor([log3] * 3 + [-log3]), zeros) == pytest.approx(0)
    # all right at 3/4: off by 1/4; all wrong: by 3/4
    assert calibration_error(torch.tensor([log3] * 4), zeros) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([-log3] * 4), zeros) == pytest.approx(0.75)
    # two bins: half the pairs right at 3/4, half wrong at (almost) 1
    far = torch.tensor([log3, log3, -99.0, -99.0])
    assert calibration_error(far, zeros) == pytest.approx((0.25 + 1.0) / 2)
    # ties: confidence 1/2, half right
    assert calibration_error(zeros, zeros) == 0.0


def test_total_steps():
    of = {"batch_size": 4}
    assert total_steps(config_of(**of), 40) == 10
    assert total_steps(config_of(**of), 41) == 11
    assert total_steps(config_of(epochs=2.5, **of), 40) == 25
    assert total_steps(config_of(epochs=1.1, **of), 40) == 11  # 1.1 * 10 is above 11 in binary
    assert total_steps(config_of(epochs=0.01, **of), 40) == 1
    assert total_steps(config_of(epochs=3.0, steps=7, **of), 40) == 7


# ---- training ------------------------------------------------------------------------------------


def test_first_loss_by_hand_with_a_zero_head():
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    step = next(reward(state_of(model), PAIRS, config_of(batch_size=5)))
    # all scores are 0: mean of -log sigmoid(-margin) = log(1 + e^margin) over .5, 0, 1.5, .25, 0
    expected = sum(math.log1p(math.exp(m)) for m in (0.5, 0.0, 1.5, 0.25, 0.0)) / 5
    assert step.metrics["loss"] == pytest.approx(expected, rel=0, abs=1e-12)
    assert step.metrics["accuracy"] == 0.0 and step.metrics["ties"] == 1.0
    assert step.metrics["num_tokens"] == 47  # 5+2+2+4+3 chosen... counted below
    assert step.number == 1 and step.samples == []


def test_first_loss_is_about_log_2():
    step = next(reward(state_of(tiny_model()), [p for p in PAIRS if not p.margin], config_of()))
    assert step.metrics["loss"] == pytest.approx(math.log(2), abs=0.1)


def test_margins_reach_the_pairs_they_belong_to():
    """Rows are shuffled, sorted and cut: each pair's gradient must still see its own margin."""
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    seen = {}

    def watch(pairs):
        batch = collate_pairs(pairs)
        seen.update(zip((p.where for p in pairs), batch.margin.tolist(), strict=True))
        return batch

    list(reward(state_of(model), PAIRS, config_of(micro_batch_tokens=16), collate=watch))
    assert seen == {"t:1": 0.5, "t:2": 0.0, "t:3": 1.5, "t:4": 0.25, "t:5": 0.0}


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_a_step_is_the_same_for_any_micro_batch(center):
    made = []
    for tokens in (1, 24, 4096):
        model = tiny_model()
        config = config_of(
            batch_size=5, micro_batch_tokens=tokens, center_rewards_coefficient=center, steps=1
        )
        (step,) = reward(state_of(model), PAIRS, config)
        made.append((step.metrics, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for metrics, parameters in made[:-1]:
        assert metrics == pytest.approx(made[-1][0], rel=0, abs=1e-9)
        torch.testing.assert_close(parameters, made[-1][1], rtol=0, atol=1e-6)


def test_centre_term_pulls_the_mean_score_to_0():
    spread = []
    for center in (0.0, 1.0):
        model = tiny_model()
        model.score.weight.data += 0.5
        config = config_of(center_rewards_coefficient=center, steps=30, schedule="constant")
        steps = list(reward(state_of(model), PAIRS, config))
        spread.append(abs(steps[-1].metrics["mean_reward"]))
    assert spread[1] < 0.2 * spread[0]


def test_training_learns_pairs_by_heart():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(1, V, (8, 2, 4), generator=rng).tolist()
    pairs = [pair([1], chosen, rejected) for chosen, rejected in rows]
    model = tiny_model()
    before = evaluate(model, pairs).metrics
    config = config_of(batch_size=8, steps=40, learning_rate=0.03)
    steps = list(reward(state_of(model), pairs, config))
    after = evaluate(model, pairs).metrics
    assert before["accuracy"] < 1 and before["loss"] > 0.5
    assert after["accuracy"] == 1.0 and after["loss"] < 0.05
    assert steps[-1].metrics["loss"] < 0.05 and state_counts(steps) == list(range(1, 41))


def state_counts(steps) -> list[int]:
    return [step.number for step in steps]


def test_each_pair_counts_once_an_epoch_and_the_rate_falls_to_its_end():
    seen = []

    def watch(pairs):
        seen.extend(p.where for p in pairs)
        return collate_pairs(pairs)

    model = tiny_model()
    state = state_of(model)
    steps = list(reward(state, PAIRS, config_of(epochs=2.0), collate=watch))
    names = sorted(p.where for p in PAIRS)
    assert sorted(seen[:5]) == sorted(seen[5:]) == names and seen[:5] != seen[5:]
    # 3 batches an epoch (2, 2 and 1 pairs), 6 steps: the rate falls by a sixth of 0.01 a step
    rates = [step.metrics["learning_rate"] for step in steps]
    assert rates == pytest.approx([0.01 * k / 6 for k in (6, 5, 4, 3, 2, 1)], rel=0, abs=1e-15)
    assert [step.metrics["epoch"] for step in steps] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]
    assert (state.step, state.samples) == (6, 10)


def test_custom_collate_decides_what_the_model_sees():
    def two_tokens(pairs):
        short = [pair([], p.chosen_ids[:1], p.rejected_ids[:1], p.margin) for p in pairs]
        return collate_pairs(short)

    model = scored_by_first_token(tiny_model())
    assert evaluate(model, PAIRS, collate=two_tokens).chosen.tolist() == [3, 7, 4, 1, 8]


def test_reward_refuses_no_pairs():
    with pytest.raises(ValueError, match="pairs is empty: give at least one"):
        next(reward(state_of(tiny_model()), [], config_of()))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows():
    model = tiny_model()
    model.score.weight.data[0, 0] = math.nan
    before, state = weights(model), state_of(model)
    with pytest.raises(UserError, match=r"^step 1 \(t:\d, t:\d\): loss: is nan") as error:
        next(reward(state, PAIRS, config_of()))
    assert error.value.code == NON_FINITE
    assert weights(model) == before and state.step == 0 and not state.optimizer.state


def test_scores_that_overflow_stop_the_run_though_the_loss_is_finite():
    model = tiny_model()
    model.forward = lambda tokens, lengths: torch.full(
        lengths.shape, math.inf, dtype=torch.float64
    ).where(torch.arange(len(lengths)) < len(lengths) // 2, model.score.weight.sum())
    with pytest.raises(UserError, match=r"^step 1: margin: is inf"):
        next(reward(state_of(model), PAIRS, config_of()))


def test_gradients_that_others_left_do_not_count():
    made = []
    for left in (None, 7.0):
        model = tiny_model()
        for parameter in model.parameters():
            parameter.grad = None if left is None else torch.full_like(parameter, left)
        next(reward(state_of(model), PAIRS, config_of()))
        made.append(weights(model))
    assert made[0] == made[1]


# ---- resume --------------------------------------------------------------------------------------


def test_generator_rebuilt_at_every_yield_goes_on_bit_for_bit(tmp_path):
    config = config_of(epochs=2.0, center_rewards_coefficient=0.01)

    def fresh() -> TrainState:
        model = tiny_model(torch.float32)
        return TrainState(model, torch.optim.AdamW(model.parameters(), fused=True))

    whole = fresh()
    expected = [step.metrics for step in reward(whole, PAIRS, config)]
    state, seen = fresh(), []
    while step := next(reward(state, PAIRS, config), None):
        seen.append(step.metrics)
        commit = save_checkpoint(state, tmp_path)
        state = fresh()
        for parameter in state.model.parameters():
            parameter.data.fill_(9.0)  # nothing but the checkpoint may matter
        load_checkpoint(state, commit)
    assert seen == expected
    assert weights(state.model) == weights(whole.model)
    assert state.meters.as_dict() == whole.meters.as_dict()
    assert state.counters == whole.counters and state.samples == whole.samples == 10


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluate_by_hand():
    # scores are the last ids: (5, 6) (8, 1) (4, 1) (1, 2) (7, 5)
    result = evaluate(scored_by_first_token(tiny_model()), PAIRS, micro_batch_tokens=20)
    assert result.chosen.tolist() == [5, 8, 4, 1, 7]
    assert result.rejected.tolist() == [6, 1, 1, 2, 5]
    differences = ((-1, 0.5), (7, 0), (3, 1.5), (-1, 0.25), (2, 0))  # and margins
    loss = sum(math.log1p(math.exp(m - d)) for d, m in differences) / 5
    assert result.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert (result.metrics["accuracy"], result.metrics["margin"]) == (0.6, 2.0)
    assert (result.metrics["min_reward"], result.metrics["max_reward"]) == (1.0, 8.0)


def test_evaluate_does_not_depend_on_the_batching_nor_change_the_model():
    model = tiny_model()
    before = weights(model)
    one, many = evaluate(model, PAIRS, 1), evaluate(model, PAIRS)
    torch.testing.assert_close(one.chosen, many.chosen, rtol=0, atol=1e-6)
    assert one.metrics == pytest.approx(many.metrics, abs=1e-6)
    assert weights(model) == before and all(p.grad is None for p in model.parameters())


def test_evaluate_adds_ones_own_metrics():
    def by_column(chosen, rejected, pairs):
        hard = torch.tensor([p.columns["hard"] for p in pairs])
        return {"hard_accuracy": float((chosen > rejected)[hard].double().mean())}

    pairs = [pair([], [i], [4], hard=i > 3) for i in range(1, 7)]
    result = evaluate(scored_by_first_token(tiny_model()), pairs, metrics=by_column)
    assert result.metrics["hard_accuracy"] == pytest.approx(2 / 3)  # 4 ties, 5 and 6 win
    assert result.metrics["accuracy"] == pytest.approx(2 / 6)


RESULT = Evaluation({}, torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (2, 2), (3, 3), (9, 3), (-1, 3)])
def test_sample_rows_are_as_many_as_asked_and_minus_one_is_all(count, shown):
    assert len(sample_rows(PAIRS[:3], RESULT, None, count)) == shown


def test_sample_rows_by_hand():
    row = sample_rows(PAIRS[:3], RESULT, None, 1)[0]
    assert row == {
        "prompt": [1, 2], "chosen": [3, 4, 5], "rejected": [6], "margin": 0.5,
        "chosen_score": 2.0, "rejected_score": 2.0, "probability": 0.5,
        "chosen_tokens": 5, "rejected_tokens": 3,
    }  # fmt: skip


def test_sample_table_is_one_line_a_pair_and_safe_for_a_terminal():
    rows = sample_rows(PAIRS[:2], RESULT, None, -1)
    rows[0]["chosen"] = "\x1b[31mred\n" + "x" * 99
    lines = sample_table(rows).split("\n")
    assert len(lines) == 3 and "\x1b" not in lines[1]
    assert lines[2].split() == (
        "[7, 8] [9, 10, 1] 0.000 1.000 0 0.269 2/3".split()  # 0.269 = sigmoid(-1)
    )


def test_named_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=name.jsonl").touch()
    assert named_files(("a.jsonl",)) == {"eval_": "a.jsonl"}
    assert named_files(("short=a.jsonl", "long=b=c.jsonl", "odd=name.jsonl")) == {
        "eval_short_": "a.jsonl", "eval_long_": "b=c.jsonl", "eval_": "odd=name.jsonl",
    }  # fmt: skip
    with pytest.raises(UserError, match="two sets are called 'eval': name each"):
        named_files(("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match="two sets are called 'x'"):
        named_files(("x=a.jsonl", "x=b.jsonl"))


# ---- the command line ----------------------------------------------------------------------------


WORDS = ("good", "bad", "long", "dull", "fine", "warm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a tiny language model with its tokenizer, training pairs, held-out pairs)."""
    folder = tmp_path_factory.mktemp("base")
    texts = [f"the film was {a} and {b}." for a in WORDS for b in WORDS]
    tokenizer = train_tokenizer(texts, 290, folder)
    config = config_from_hf({**TINY, "vocab_size": tokenizer.vocab_size, "eos_token_id": 0})
    save_pretrained(initialize(CausalLM(config), torch.Generator().manual_seed(0)), folder)
    rows = [
        {"prompt": "the film was", "chosen": f" {a} and good.", "rejected": f" {b}.",
         "margin": i / 4, "rating": i}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    ]  # fmt: skip
    return folder, write_lines(folder / "d.jsonl", rows), write_lines(folder / "e.jsonl", rows[:3])


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_reward(base, out, *words, model=None) -> int:
    given = ["--model", model or base[0], "--out", out, *words]
    if "--data" not in words:
        given += ["--data", base[1]]
    return main(["reward", *map(str, given)])


def without_clock(path) -> bytes:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return "".join(json.dumps({k: v for k, v in line.items() if k != "clock"}) for line in lines)


def test_columns_of_the_file_pass_through(base):
    pairs, _ = load_pairs(base[1], load_tokenizer(base[0]), 64, "error")
    assert [p.columns for p in pairs] == [{"rating": i} for i in range(6)]
    assert [p.margin for p in pairs] == [i / 4 for i in range(6)]


STEPS = ("--steps", 6, "--save-every", 2, "--log-every", 1, "--batch-size", 2, "--eval-every", 3,
         "--learning-rate", 0.01)  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of an uninterrupted run of 6 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sets = ("--eval-data", f"seen={base[1]}", base[2])
    assert run_reward(base, out, *STEPS, *sets, "--show-samples", -1) == 0
    return out


def test_main_writes_what_it_says(base, whole):
    names = sorted(p.name for p in whole.iterdir() if p.name != ".lock")
    assert names == ["checkpoints", "metrics.jsonl", "model", "run.json", "samples.jsonl"]
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000004", "step-00000006",
    ]  # fmt: skip
    facts = json.loads((whole / "run.json").read_text("utf-8"))
    assert facts["recipe"] == "reward" and facts["settings"]["steps"] == 6
    assert set(facts["inputs"]) == set(base[1:])
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    of_training = {
        "step", "clock", "loss", "accuracy", "accuracy_half", "ties", "margin", "margin_std",
        "min_reward", "mean_reward", "max_reward", "grad_norm", "learning_rate", "epoch",
        "num_tokens",
    }  # fmt: skip
    assert lines[0].keys() == of_training
    held_out = {"loss", "accuracy", "ties", "calibration_error"}
    wanted = {prefix + name for prefix in ("eval_", "eval_seen_") for name in held_out}
    assert all((wanted <= line.keys()) == (line["step"] in (3, 6)) for line in lines)
    assert lines[-1]["epoch"] == 2.0


def test_main_evaluates_the_model_that_it_writes(base, whole):
    last = json.loads((whole / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    pairs, _ = load_pairs(base[2], load_tokenizer(whole / "model"), 64, "error")
    again = evaluate(load_reward_model(whole / "model"), pairs).metrics
    # another batching of nothing: the same rows in the same order
    assert {f"eval_{name}": value for name, value in again.items()}.items() <= last.items()


def test_main_shows_all_samples(whole):
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["set"]) for row in rows] == (
        [(3, "eval_seen_")] * 6 + [(3, "eval_")] * 3 + [(6, "eval_seen_")] * 6 + [(6, "eval_")] * 3
    )
    assert rows[0]["prompt"] == "the film was" and rows[0]["chosen"] == " good and good."
    assert rows[0]["rejected"] == " bad." and rows[1]["margin"] == 0.25


@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)], ids=["full", "lora"])
def test_killed_run_goes_on_to_the_same_bytes(base, tmp_path, monkeypatch, lora):
    words = (*STEPS, *lora, "--eval-data", base[2])
    assert run_reward(base, tmp_path / "whole", *words) == 0
    log, out = Run.log, tmp_path / "killed"

    def die(run, state, *rest):
        log(run, state, *rest)
        if state.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", die)
    with pytest.raises(KeyboardInterrupt):
        run_reward(base, out, *words)
    monkeypatch.undo()
    assert not (out / "model").exists()
    assert run_reward(base, out, *words, "--resume") == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_clock(out / name) == without_clock(tmp_path / "whole" / name)
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "whole" / "model" / name).read_bytes()
        assert (out / "model" / name).read_bytes() == expected


def test_resume_of_a_finished_run_changes_nothing(base, whole, capsys):
    before = {p: p.read_bytes() for p in (whole / "model").iterdir()}
    logs = (whole / "metrics.jsonl").read_bytes()
    sets = ("--eval-data", f"seen={base[1]}", base[2])
    assert run_reward(base, whole, *STEPS, *sets, "--show-samples", -1, "--resume") == 0
    assert "no steps left to do" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (whole / "model").iterdir()} == before
    assert (whole / "metrics.jsonl").read_bytes() == logs


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
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_lora_trains_the_head_and_adapters_and_writes_a_merged_model(base, tmp_path):
    out = tmp_path / "run"
    config = config_of(model=str(base[0]), lora_rank=2)
    model = load_start(config, False, "cpu", torch.float32)
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
    if model.read_before_eos:
        pairs = [without_eos(p, tokenizer.eos_ids) for p in pairs]
    result = evaluate(model, pairs)
    return torch.stack((result.chosen, result.rejected), 1).flatten()


def whole_texts(base, end: str) -> list[str]:
    rows = [json.loads(line) for line in open(base[1], encoding="utf-8")]
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
    assert run_reward(base, out, *STEPS, "--eval-data", base[2], model=folder) == 0
    assert load_reward_model(out / "model").read_before_eos
    theirs = transformers_scores(out / "model", whole_texts(base, "<|endoftext|>"))
    ours = our_scores(base, out / "model")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # what was trained is what is read: the run's own evaluation saw the same scores
    last = json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    seen = ours.view(-1, 2)[:3]
    assert last["eval_margin"] == pytest.approx(float((seen[:, 0] - seen[:, 1]).mean()), abs=1e-6)


def test_a_reward_model_is_trained_further(base, whole, tmp_path):
    out = tmp_path / "run"
    words = ("--steps", 1, "--learning-rate", 1e-9, "--eval-data", base[2])
    assert run_reward(base, out, *words, model=whole / "model") == 0
    before, after = (load_reward_model(f / "model").score.weight for f in (whole, out))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-7)  # not drawn anew


def test_head_depends_on_the_seed_alone(base):
    heads = [
        load_start(config_of(model=str(base[0]), seed=s), False, "cpu", torch.float32).score.weight
        for s in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_without_eos_by_hand():
    cut = without_eos(pair([1], [2, 0], [0, 3]), (0, 9))
    assert (cut.prompt_ids, cut.chosen_ids, cut.rejected_ids) == ([1], [2], [0, 3])
    assert without_eos(pair([1], [0], [2, 0, 9]), (0, 9)).chosen_ids == []
    with pytest.raises(UserError, match="t:1: a text of nothing but eos: remove the row"):
        without_eos(pair([], [2], [0]), (0,))


def test_write_model_of_ids_only_names_no_pad_token(base, tmp_path):
    tokenizer = load_tokenizer(base[0])
    tokenizer.eos_ids = ()
    model = tiny_model(torch.float32, vocab_size=tokenizer.vocab_size)
    model.read_before_eos = True
    write_model(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8")).get("pad_token_id") is None


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--model", "NONE"], "none: no such folder"),
        (["--data", "NONE"], "none: not a data file"),
        (["--data", "BROKEN"], "broken.jsonl:2: not valid JSON"),
        (["--data", "EQUAL"], "equal.jsonl: no row left of 1: dropped: 1 (chosen equals rejected)"),
        (["--data", "NAN"], "nan.jsonl:1: "),
        (["--data", "LONG"], "long.jsonl: a row of 61 tokens, the model reads 48: give --max-len"),
        (["--eval-data", "NONE"], "none: not a data file"),
        (["--eval-data", "GOOD", "GOOD"], "two sets are called 'eval'"),
        (["--batch-size", "0"], "--batch-size: got 0, must be a whole number >= 1"),
        (["--learning-rate", "nan"], "--learning-rate: got nan, must be a finite number > 0"),
        (["--lerning-rate", "1"], "--lerning-rate: unknown flag: the nearest is --learning-rate"),
        (["--schedule", "step"], "--schedule: got 'step', must be one of constant, linear, cosine"),
        (["--device", "tpu"], "--device: 'tpu' cannot be used"),
        (["--model", "SMALL"], "vocab_size: is 11: must be at least the tokenizer's"),
        (["--model", "DAMAGED"], "lacks 'model.norm.weight'"),
    ],
)  # fmt: skip
def test_main_refuses_in_one_line_and_writes_nothing(words, match, base, tmp_path, capsys):
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    files = {"NONE": tmp_path / "none", "GOOD": base[1]}
    for name, text in {
        "BROKEN": good + "\n{", "EQUAL": good.replace("c\"}", "b\"}"),
        "NAN": good.replace("}", ', "margin": NaN}'),
        "LONG": json.dumps({"chosen_ids": [7] * 61, "rejected_ids": [8]}),
    }.items():  # fmt: skip
        files[name] = tmp_path / f"{name.lower()}.jsonl"
        files[name].write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(base[0])
    for name, vocabulary in (("SMALL", V), ("DAMAGED", tokenizer.vocab_size)):
        files[name] = tmp_path / name.lower()
        lm = initialize(
            CausalLM(config_from_hf({**TINY, "vocab_size": vocabulary})), torch.Generator()
        )
        if name == "DAMAGED":
            del lm.model.norm.weight
        save_pretrained(lm, files[name])
        tokenizer.save(files[name])
    words = [str(files.get(word, word)) for word in words]
    model = words.pop(1) if words[0] == "--model" else None
    words = words[1:] if model else words
    out = tmp_path / "out" / "run"
    assert run_reward(base, out, *words, model=model) == 2
    told = capsys.readouterr().err
    assert match in told and told.count("\n") == 1 and told.startswith("error: ")
    assert not out.parent.exists()


def test_main_refuses_a_folder_before_it_reads_anything(base, whole, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "load_tokenizer", None)
    assert run_reward(base, whole, *STEPS) == 2
    assert "is not empty: give another --out, or --resume" in capsys.readouterr().err


def test_config_defaults_are_legal():
    validate(config_of())
