"""What a run recorded is explained by the settings that made it, or refused in one line."""

from dataclasses import replace

import pytest
import torch

from minirlhf.batches.credit import assign_credit, assign_group_credit
from minirlhf.batches.rollouts import Rollout, RolloutBuffer
from minirlhf.cli import main
from minirlhf.errors import UserError
from minirlhf.models.alignment import pad_right
from minirlhf.run.language import translations
from minirlhf.tools.explain.record import Record
from tests.tiny_folders import read_lines, write_lines
from tests.tools.explain.conftest import record_of, told, write_run

FILLED = ("rewards", "advantages", "returns")


def credited(algorithm: str, truncated: bool = False, **settings) -> Record:
    """The record of `record_of` as if these settings had assigned its credit."""
    record = record_of(algorithm)
    config, rows = replace(record.config, **settings), record.rows
    mask = torch.arange(max(len(row["response_ids"]) for row in rows))
    mask = mask < torch.tensor([[len(row["response_ids"])] for row in rows])

    def padded(name):
        flat = torch.tensor([x for row in rows for x in row.get(name, row["old_logprobs"])])
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    rollout = Rollout(
        torch.arange(len(rows)),
        pad_right([row["prompt_ids"] + row["response_ids"] for row in rows]),
        torch.tensor([len(row["prompt_ids"]) for row in rows]), mask,
        torch.tensor([row["score"] for row in rows]), torch.full((len(rows),), truncated),
        old_logprobs=padded("old_logprobs"), ref_logprobs=padded("ref_logprobs"),
        old_values=padded("old_values"), last_values=torch.linspace(-1, 1, len(rows)),
    )
    buffer = RolloutBuffer(8, 4096)
    buffer.add(rollout)
    if algorithm == "ppo":
        assign_credit(buffer, config, config.kl_coef)
    else:
        assign_group_credit(buffer, rollout.scores, config)
    made = {}
    for micro in buffer.micro_batches:
        for b, i in enumerate(micro.rows.tolist()):
            found = {n: getattr(micro, n)[b][micro.response_mask[b]].tolist() for n in FILLED
                     if getattr(micro, n) is not None}
            why = "length" if truncated else "eos"
            made[i] = {k: v for k, v in rows[i].items() if k not in FILLED} | found | {
                "finish_reason": why}
    return record._replace(config=config, rows=[made[i] for i in range(len(rows))])


PPO = [
    {"kl_coef": 0.7, "gamma": 0.9, "lam": 0.5}, {"lam": 0.0}, {"whiten_advantages": False},
    {"whiten_rewards": True}, {"bootstrap_truncated": True, "truncated": True},
    {"kl_estimator": "k2"}, {"kl_in": "loss", "kl_estimator": "k3"}, {"value_clip": 0.01},
    {"kl_target": 6.0}, {"dual_clip": 3.0}, {"critic_warmup_steps": 9},
]
GRPO = [{"advantage": name} for name in ("dr_grpo", "lite_ppo", "rloo", "reinforce++")] + [
    {"kl_in": "reward", "kl_estimator": "k1"}, {"policy_loss": "gspo"}, {"policy_loss": "cispo"},
    {"kl_estimator": "k3"}, {"loss_mean": "fixed"}, {"loss_mean": "sequence"},
    {"mask_truncated": True, "truncated": True}, {"kl_coef": 0.0},
]


@pytest.mark.parametrize(("algorithm", "settings"),
                         [("ppo", s) for s in PPO] + [("grpo", s) for s in GRPO], ids=str)
def test_every_setting_of_credit_is_explained(algorithm, settings, records):
    """`told` refuses what it computes otherwise than the recipe did."""
    record = credited(algorithm, **settings)
    for language in ("en", "zh"):
        assert "nan" not in told(record, algorithm, lang=language)
    assert told(record._replace(update=None, tokenizer=None), algorithm).count("id ") > 5


def test_an_adaptive_coefficient_is_read_off_the_rewards(records):
    record = credited("ppo", kl_coef=0.37)
    record = record._replace(config=replace(record.config, kl_coef=0.1, kl_target=6.0))
    assert "settings  kl_coef 0.37 " in told(record, "ppo")


@pytest.mark.parametrize("settings", [{"gamma": 0.5}, {"lam": 0.2}, {"kl_coef": 0.9}])
def test_numbers_of_other_settings_are_refused(settings, records):
    record = records("ppo")
    changed = record._replace(config=replace(record.config, **settings))
    match = "do not follow from the settings in run.json: were settings changed"
    with pytest.raises(UserError, match=match):
        told(changed, "ppo")


def refused(words: str, capsys) -> str:
    assert main(["explain", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error[len("error: ") : -1]


def test_what_is_not_there_is_told_in_one_line(tmp_path, monkeypatch, capsys, records):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", "ppo")
    for words, line in {
        "ppo run --step 9": "--step: got 9: recorded are 2-3",
        "ppo run --sample 16": "--sample: got 16: there are 0 to 15",
        "ppo run --token 99": "--token: got 99: the sample has 0 to ",
        "grpo run": "run: is of a run of ppo: minirlhf explain ppo run",
        "ppo none": "none: holds no run.json: give the folder of a run",
        "sft": "what: got sft: begin with ppo, grpo, reward or dpo",
        "ppo run other": "what: other: give one run",
        "ppo --step 3": "step: goes with the folder of a run",
        "dpo --token 3": "token: dpo scores whole texts",
        "--sample 1": "--what: required, but not given",
    }.items():
        assert refused(words, capsys).startswith(line), words


@pytest.mark.parametrize(("algorithm", "flag"), [("ppo", "--save-rollouts"),
                                                 ("dpo", "--show-samples with --eval-data")])
def test_a_run_without_samples_names_the_flag_that_records_them(
    algorithm, flag, tmp_path, monkeypatch, capsys, records
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    write_run(run, algorithm)
    line = f"run/samples.jsonl: holds no samples of {algorithm}: {flag} records them"
    write_lines(run / "samples.jsonl", [{"step": 1, "kind": "sample", "score": 1.0}])
    assert refused(f"{algorithm} run", capsys) == line
    (run / "samples.jsonl").unlink()
    assert refused(f"{algorithm} run", capsys) == line


@pytest.mark.parametrize(("change", "what"), [
    ({"old_logprobs": [0.0]}, "old_logprobs is not a number for each of"),
    ({"returns": None}, "returns is not a number for each of"),
    ({"response_ids": []}, "has no list of ids response_ids"),
    ({"score": "high"}, "score is no number"), ({"step": None}, "has no step"),
    ({"more": 1}, "has other fields than its step's first row"),
])
def test_a_damaged_row_is_refused_with_its_line(
    change, what, tmp_path, monkeypatch, capsys, records
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    write_run(run, "ppo")
    rows = read_lines(run / "samples.jsonl")
    write_lines(run / "samples.jsonl", [*rows[:-1], rows[-1] | change])
    assert refused("ppo run", capsys).startswith(f"run/samples.jsonl:{len(rows)}: {what}")


def test_hostile_texts_stay_on_their_line(tmp_path, monkeypatch, capsys, records):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    write_run(run, "reward")
    rows = read_lines(run / "samples.jsonl")
    rows[-32] |= {"chosen": "a\x1b[2Jb\nc", "prompt": [{"content": "\x07 奖励"}]}
    write_lines(run / "samples.jsonl", rows)
    assert main(["explain", "reward", "run"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "chosen    a\\x1b[2Jb\\nc\n" in out and "奖励" in out


def test_translations_name_the_values_of_their_sentences():
    from string import Formatter

    for sentence, other in translations("zh").items():
        names = [{name for _, name, _, _ in Formatter().parse(s) if name}
                 for s in (sentence, other)]
        assert names[0] == names[1], sentence
