"""What `minirlhf explain` prints is checked as a person would: the printed numbers are read, and
the loss is computed again with `math` alone."""

import math
import re

import pytest

from minirlhf.cli import main
from minirlhf.run.terminal import width
from minirlhf.tools.explain.record import read_record
from minirlhf.tools.explain.settings import ExplainConfig
from tests.tools.explain.conftest import SAMPLES, record_of, told, write_run

NUMBER = r"-?\d+\.\d+"


def table(text: str, *titles: str) -> list[dict]:
    """The rows of the printed table with these titles; the last one is that of sums."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines)
                if set(titles) <= set(re.split(r"\s{2,}", line.strip())))
    names = re.split(r"\s{2,}", lines[head].strip())[1:]
    names = [name for name in names if name != "clipped"]
    rows = []
    for line in lines[head + 1 :]:
        found = re.match(rf"\s*(\d+)  (.*?)((?:\s+(?:{NUMBER}|yes))+)$", line)
        if not found:
            break
        numbers = [float(x) for x in re.findall(NUMBER, found[3])]
        rows.append(dict(zip(names, numbers, strict=True)) | {"clipped": "yes" in found[3]})
    return rows


def setting(text: str, name: str) -> float:
    return float(re.search(rf"\b{name} (\S+)", text)[1])


def equation(text: str, name: str) -> tuple[list[float], float]:
    """Numbers between the two last "=" of an equation, and its result."""
    flat = re.sub(r"\n\s+= ", " = ", text)
    line = re.search(rf"^  {re.escape(name)} = .*$", flat, re.MULTILINE)[0]
    *_, numbers, result = line.split(" = ")
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", numbers)], float(result)


def final(text: str) -> float:
    return float(re.search(rf"loss of the sample = .* = ({NUMBER})", text)[1])


# ---- the four losses, by hand --------------------------------------------------------------------


def ppo_by_hand(text: str) -> list[dict]:
    """Rewards, advantages and losses of each token, from old, ref, value, new and the settings."""
    credit, update = table(text, "old", "delta"), table(text, "ratio", "loss")
    gamma, lam, kl_coef = (setting(text, name) for name in ("gamma", "lam", "kl_coef"))
    score = float(re.search(rf"^score +({NUMBER})", text, re.MULTILINE)[1])
    (_, mean, std), _ = equation(text, "advantage")
    low, high = 1 - setting(text, "clip_low"), 1 + setting(text, "clip_high")
    later = value_later = 0.0
    rows = []
    for t in reversed(range(len(credit))):
        reward = -kl_coef * (credit[t]["old"] - credit[t]["ref"])
        reward += score if t == len(credit) - 1 else 0.0
        delta = reward + gamma * value_later - credit[t]["V"]
        later = delta + gamma * lam * later
        value_later = credit[t]["V"]
        advantage, ratio = (later - mean) / std, math.exp(update[t]["new"] - credit[t]["old"])
        policy = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
        now = update[t].get("V", credit[t]["V"])
        error = now - (later + credit[t]["V"])
        rows.append({
            "reward": reward, "delta": delta, "A": later, "return": later + credit[t]["V"],
            "ratio": ratio, "advantage": advantage, "policy loss": policy,
            "value loss": error**2 / 2,
            "loss": policy + setting(text, "vf_coef") * error**2 / 2,
            "clipped": (ratio > high and advantage > 0) or (ratio < low and advantage < 0),
        })
    return rows[::-1]


def test_ppo_can_be_checked_with_a_pocket_calculator(records):
    text = told(records("ppo"), "ppo")
    rows, credit, update = ppo_by_hand(text), table(text, "old", "delta"), table(text, "ratio")
    assert len(rows) == len(credit) == len(update) > 5
    assert sum(row["loss"] for row in rows) / len(rows) == pytest.approx(final(text), abs=5e-5)
    for row, *printed in zip(rows, credit, update, strict=True):
        for shown in printed:
            for name in row.keys() & shown.keys() - {"clipped"}:
                assert row[name] == pytest.approx(shown[name], abs=2e-4), name
    assert [row["clipped"] for row in rows] == [row["clipped"] for row in update]
    sums = [float(x) for x in re.findall(NUMBER, text.split("sum of ")[2].splitlines()[0])]
    assert sums[-1] == pytest.approx(sum(row["loss"] for row in rows), abs=1e-3)


@pytest.mark.parametrize("name", ["KL", "delta", "A", "return", "ratio", "value loss", "loss"])
def test_ppo_writes_each_equation_out(name, records):
    text = told(records("ppo"), "ppo")
    numbers, result = equation(text, name)
    by_hand = {
        "KL": lambda old, ref: old - ref,
        "delta": lambda r, gamma, after, value: r + gamma * after - value,
        "A": lambda delta, gamma, lam, after: delta + gamma * lam * after,
        "return": lambda A, value: A + value,
        "ratio": lambda new, old: math.exp(new - old),
        "value loss": lambda one, two, V, goal, square: (V - goal) ** 2 / 2,
        "loss": lambda policy, vf_coef, value: policy + vf_coef * value,
    }[name]
    assert by_hand(*numbers) == pytest.approx(result, abs=3e-5)


def grpo_by_hand(text: str) -> float:
    group, rows = table(text, "score", "advantage"), table(text, "old", "loss")
    mine = int(re.search(r"Response (\d) of the group", text)[1])
    scores = [row["score"] for row in group]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    advantage = (scores[mine] - mean) / (std + 1e-4)
    assert group[mine]["advantage"] == pytest.approx(advantage, abs=1e-4)
    low, high = 1 - setting(text, "clip_low"), 1 + setting(text, "clip_high")
    total = 0.0
    for row in rows:
        ratio = math.exp(row["new"] - row["old"])
        assert row["clipped"] == (ratio > high if advantage > 0 else ratio < low)
        policy = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
        total += policy + setting(text, "kl_coef") * (row["new"] - row["ref"]) ** 2 / 2
    return total / len(rows)


def test_grpo_can_be_checked_with_a_pocket_calculator(records):
    text = told(records("grpo"), "grpo")
    assert grpo_by_hand(text) == pytest.approx(final(text), abs=5e-5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_reward_can_be_checked_with_a_pocket_calculator(records):
    text = told(records("reward"), "reward")
    chosen, rejected = (row["score"] for row in table(text, "score"))
    (_, _, margin), _ = equation(text, "difference")
    loss = -math.log(sigmoid(chosen - rejected - margin))
    assert loss == pytest.approx(equation(text, "loss")[1], abs=5e-5)


def test_dpo_can_be_checked_with_a_pocket_calculator(records):
    text = told(records("dpo"), "dpo")
    chosen, rejected = table(text, "log policy", "log ref")
    beta = setting(text, "beta")
    margin = beta * (chosen["log policy"] - chosen["log ref"])
    margin -= beta * (rejected["log policy"] - rejected["log ref"])
    assert abs(margin) > 1e-3
    assert -math.log(sigmoid(margin)) == pytest.approx(equation(text, "loss")[1], abs=5e-5)


# ---- of a run ------------------------------------------------------------------------------------


def of_run(folder: str, algorithm: str, **settings) -> str:
    settings = {"what": (algorithm, folder), "sample": SAMPLES[algorithm]} | settings
    asked = ExplainConfig(**settings)
    more = {name: settings[name] for name in settings.keys() - {"what", "step", "sample"}}
    return told(read_record(asked), algorithm, **more)


def test_ppo_of_a_run_is_explained_at_ratio_one(tmp_path):
    text = of_run(write_run(tmp_path / "run", "ppo"), "ppo")
    rows = ppo_by_hand(text)
    assert "The first update" in text
    assert [row["ratio"] for row in table(text, "ratio")] == [1.0] * len(rows)
    assert sum(row["loss"] for row in rows) / len(rows) == pytest.approx(final(text), abs=5e-5)


def test_grpo_of_a_run_is_explained_at_ratio_one(tmp_path):
    text = of_run(write_run(tmp_path / "run", "grpo"), "grpo")
    assert grpo_by_hand(text) == pytest.approx(final(text), abs=5e-5)


@pytest.mark.parametrize("algorithm", ["reward", "dpo"])
def test_a_pair_of_a_run_has_the_same_loss(algorithm, tmp_path, records):
    text = of_run(write_run(tmp_path / "run", algorithm), algorithm)
    whole = told(records(algorithm), algorithm)
    assert equation(text, "loss")[1] == equation(whole, "loss")[1]


def test_a_pair_has_the_loss_that_its_run_was_trained_with(tmp_path):
    """(margin / beta - 1 / (2 beta))^2 with beta 0.1."""
    text = of_run(write_run(tmp_path / "run", "dpo", loss="ipo"), "dpo")
    _, margin = equation(text, "margin")
    assert equation(text, "loss")[1] == pytest.approx((margin / 0.1 - 5) ** 2, abs=2e-3)
    text = of_run(write_run(tmp_path / "orpo", "dpo", loss="orpo"), "dpo")
    _, margin = equation(text, "margin")
    assert equation(text, "loss")[1] == pytest.approx(-math.log(sigmoid(margin)), abs=2e-5)


def test_the_last_step_is_explained_where_none_is_named(tmp_path):
    run = write_run(tmp_path / "run", "ppo")
    assert f"step {record_of('ppo').config.steps} of" in of_run(run, "ppo")
    assert "step 2 of" in of_run(run, "ppo", step=2)


# ---- how it looks --------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("algorithm", SAMPLES)
def test_pages_fit_100_columns_in_both_languages(algorithm, language, records):
    text = told(records(algorithm), algorithm, lang=language)
    assert max(map(width, text.splitlines())) <= 100
    assert bool(re.search("[\u4e00-\u9fff]", text)) == (language == "zh")
    assert "\x1b" not in text


def test_long_responses_are_cut_in_the_middle_and_sums_stay_whole(records):
    record = records("ppo")
    whole, cut = told(record, "ppo"), told(record, "ppo", rows=4)
    left_out = len(record.row["response_ids"]) - 4
    assert cut.count(f"… {left_out} more") == 2
    assert len(cut.splitlines()) == len(whole.splitlines()) - 2 * (left_out - 1)
    assert [line for line in whole.splitlines() if "sum of" in line] == [
        line for line in cut.splitlines() if "sum of" in line]


def test_a_token_can_be_chosen(records):
    text = told(records("ppo"), "ppo", token=2)
    assert text.count("Token 2 of these in numbers") == 2
    assert equation(text, "ratio")[1] == table(text, "ratio")[2]["ratio"]


def test_the_command_prints_the_page(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", "reward")
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "reward", "run", "--sample", "1", "--decimals", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reward model: pair 1 of 0 to 31, step 4 of run\n")
    assert re.search(r"loss = -log sigmoid\(difference\) = -log\(0\.\d{3}\) = \d\.\d{3}\n", out)
