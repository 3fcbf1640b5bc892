"""`minirlhf selftest` agrees on this CPU, and names the check that does not."""

import copy
import json
import tempfile
from dataclasses import replace

import pytest
import torch

from minirlhf.batches import preferences
from minirlhf.cli import main
from minirlhf.models import cache
from minirlhf.run.machine import make_deterministic
from minirlhf.tools.selftest import checks, command, compare, record, tiny
from minirlhf.tools.selftest.tiny import Place


@pytest.fixture
def place(tmp_path):
    return Place("cpu", torch.float32, tmp_path)


def failing(place: Place, names: tuple[str, ...] = tuple(checks.CHECKS)) -> set[str]:
    return {name for name in names if not compare.compare(name, place).agrees}


def test_a_cpu_agrees_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    make_deterministic("cpu")  # what it imports makes a folder for its own cache
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["selftest", "--device", "cpu"]) == 0
    known, table, told = capsys.readouterr().out.split("\n\n")
    assert {"device     cpu", "dtype      float32", f"torch      {torch.__version__}"} < set(
        known.split("\n"))
    head, *rows = table.split("\n")
    assert head.split() == ["check", "numbers", "difference", "allowed", "verdict"]
    assert [row[: command.ROOM].strip() for row in rows] == list(checks.CHECKS)
    assert all(row.endswith("  agrees") for row in rows)
    assert told.startswith("13 of 13 checks agree with a CPU in float64 (")
    assert "paste all of this, from the first line on, into a report" in " ".join(told.split())
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_agrees_as_json_lines(capsys):
    assert main(["selftest", "--device", "cpu", "--dtype", "bfloat16", "--json"]) == 0
    known, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert (known["device"], known["dtype"]) == ("cpu", "bfloat16")
    assert [row["check"] for row in rows] == list(checks.CHECKS)
    assert all(row["agrees"] and row["difference"] <= row["allowed"] for row in rows)


def test_what_a_cpu_records_is_what_is_stored(tmp_path, monkeypatch):
    # In float64 processors differ by 1e-13 or so; ten digits are stored, and three steps of Adam
    # make the most of it.
    monkeypatch.setattr(record, "STORED", tmp_path / "numbers.json")
    assert record.main() == 0
    made, kept = json.loads((tmp_path / "numbers.json").read_text()), compare.stored()
    assert {c: list(kinds) for c, kinds in made.items()} == {c: list(k) for c, k in kept.items()}
    assert list(kept) == list(checks.CHECKS)
    gaps = [compare.difference(kind, numbers, kept[check][kind])
            for check, kinds in made.items() for kind, numbers in kinds.items()]
    assert max(gaps) < 1e-8


@pytest.mark.parametrize(("found", "gap"), [
    ([1.0, -3.0], 0.25), ([1.0, -4.0], 0.0), ([1.0], float("inf")),
    ([1.0, float("nan")], float("inf")), ([], float("inf")),
])
def test_a_difference_is_a_share_of_the_largest_number(found, gap):
    assert compare.difference("logits", found, [1.0, -4.0]) == gap


def test_a_difference_from_nothing_but_zeros_is_itself():
    assert compare.difference("weights", [0.5], [0.0]) == 0.5


# ---- what is wrong is found, and named -----------------------------------------------------------


@pytest.mark.parametrize("check", checks.CHECKS)
def test_a_stored_number_that_is_another_is_found(check, place, monkeypatch):
    changed = copy.deepcopy(compare.stored())
    for numbers in changed[check].values():
        at = max(range(len(numbers)), key=lambda i: abs(numbers[i]))
        numbers[at] = numbers[at] * 0.99 or 1.0
    original = compare.stored()[check]
    monkeypatch.setattr(compare, "stored", lambda: changed)
    monkeypatch.setitem(checks.CHECKS, check, lambda place: original)
    result = compare.compare(check, place)
    # 0.01 of 0.99; of 192 tokens one; of a checkpoint 0 in place of 1
    shares = {"sampled texts": 1 / 192, "checkpoint, saved and read": 1.0}
    assert result.difference == pytest.approx(shares.get(check, 1 / 99))
    assert not result.agrees and result.numbers == sum(map(len, original.values()))


def minus(function):
    """The loss with its sign flipped, whether it comes alone or with others."""
    def flipped(*args, **kwargs):
        out = function(*args, **kwargs)
        return out._replace(loss=-out.loss) if hasattr(out, "loss") else -out
    return flipped


def swapped(function):
    return lambda first, second, *rest: function(second, first, *rest)


WRONG = {  # what is changed -> (whose, name, into what), the checks that must see it
    "Bradley-Terry, swapped": (
        (preferences, "loss_of_pairs",
         lambda function: lambda how, first, second, *rest: function(how, second, first, *rest)),
        "Bradley-Terry's"),
    "DPO, swapped": ((checks.dpo, "dpo_loss", swapped), "DPO's"),
    "PPO's surrogate, its sign": ((checks.ppo, "clipped_surrogate", minus), "PPO's"),
    "PPO's value loss, its sign": ((checks.ppo, "clipped_value_loss", minus), "PPO's"),
    "PPO's KL, its sign": ((checks.ppo, "kl_k1", minus), "PPO's"),
    "GRPO's surrogate, its sign": ((checks.grpo, "clipped_surrogate", minus), "GRPO's"),
    "GRPO's KL, its sign": ((checks.grpo, "kl_k2", minus), "GRPO's"),
    "SFT, its sign": ((checks.sft, "sft_loss", minus), "SFT's loss and gradient"),
    "keys of other texts": ((checks, "STEADY", lambda keys: (*keys[:7], 1)), "sampled texts"),
    "a checkpoint that is not read": (
        (checks, "load_checkpoint", lambda _: lambda state, commit: None),
        "checkpoint, saved and read"),
    "a cache that does not grow": (
        (cache.KVCache, "grow", lambda _: lambda self: None), "log-probs in decoding"),
    "another KL coefficient": (
        (checks, "RUN", lambda config: replace(config, kl_coef=0.2)), "three steps of PPO"),
    "other rewards": ((checks, "loudness", minus), "three steps of PPO"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_computed_otherwise_is_found(what, place, monkeypatch):
    (whose, name, change), check = WRONG[what]
    monkeypatch.setattr(whose, name, change(getattr(whose, name)))
    assert not compare.compare(check, place).agrees


OF_MODELS = tuple(name for name in checks.CHECKS if not name.startswith(("checkpoint", "three")))


@pytest.fixture
def off(monkeypatch):
    """off(size): from here on weights are off by so much of themselves, up or down."""
    fill = tiny.fill

    def set_size(size: float) -> None:
        def filled(module, stream):
            fill(module, stream)
            rng = torch.Generator().manual_seed(0)
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.data.mul_(1 + size * noise.sign())
        monkeypatch.setattr(tiny, "fill", filled)

    return set_size


def test_products_of_10_bits_are_found_in_float32(off, place):
    off(2**-11)  # as TF32 rounds what it multiplies
    assert failing(place, OF_MODELS) == set(OF_MODELS) - {"sampled texts"}


def test_weights_off_by_a_tenth_are_found_in_bfloat16(off, place):
    off(0.1)
    seen = set(OF_MODELS) - {"SFT's loss and gradient", "Bradley-Terry's", "GRPO's"}
    assert failing(place._replace(dtype=torch.bfloat16), OF_MODELS) >= seen


def test_sums_in_another_order_are_allowed(off, place):
    off(1e-6)  # more than other processors are off
    assert failing(place, (*OF_MODELS, "three steps of PPO")) == set()


def test_weights_are_the_same_in_every_format():
    lms = [tiny.language_model(Place("cpu", dtype, None))
           for dtype in (torch.float64, torch.bfloat16)]
    for a, b in zip(*(lm.parameters() for lm in lms), strict=True):
        assert torch.equal(a, b.double()) and a.unique().numel() > 8


# ---- what is told --------------------------------------------------------------------------------


def test_a_check_that_differs_is_named_and_ends_with_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(command, "CHECKS", ("DPO's", "GRPO's"))
    monkeypatch.setattr(checks.dpo, "dpo_loss", swapped(checks.dpo.dpo_loss))
    assert main(["selftest", "--device", "cpu"]) == 3
    out = capsys.readouterr().out
    verdicts = [row.split()[-1] for row in out.splitlines() if row.startswith(("DPO's", "GRPO's"))]
    assert verdicts == ["DIFFERS", "agrees"]
    assert "1 of 2 checks agree with a CPU in float64; not so: DPO's (" in out


def test_a_check_that_cannot_be_computed_says_where_and_the_others_go_on(monkeypatch, capsys):
    def lacks(self):
        raise TypeError("Cannot convert a Tensor to float64\nbacktrace")

    monkeypatch.setattr(command, "CHECKS", ("log-probs in decoding", "GRPO's"))
    monkeypatch.setattr(cache.KVCache, "grow", lacks)
    assert main(["selftest", "--device", "cpu"]) == 3
    rows = capsys.readouterr().out.splitlines()
    failed = next(row for row in rows if row.startswith("log-probs"))
    assert "FAILS at minirlhf/tools/selftest/checks.py:" in failed
    assert failed.endswith(": TypeError: Cannot convert a Tensor to float64")
    assert any(row.startswith("GRPO's") and row.endswith("agrees") for row in rows)
    assert main(["selftest", "--device", "cpu", "--json"]) == 3
    row = json.loads(capsys.readouterr().out.splitlines()[1])
    assert row["difference"] is None and not row["agrees"] and "TypeError" in row["problem"]


def test_a_device_that_is_not_there_is_refused_in_one_line(capsys):
    assert main(["selftest", "--device", "cuda:77"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: --device: 'cuda:77' cannot be used (")
    assert told.err.count("\n") == 1 and told.out == ""


def test_help_names_its_settings(capsys):
    with pytest.raises(SystemExit):
        main(["selftest", "--help"])
    told = capsys.readouterr().out
    assert "exit code 3 where one differs" in " ".join(told.split())
    assert all(flag in told for flag in ("--device", "--dtype", "--json"))
