"""DPO and its family: what counts in the loss, and that a run is what it says."""

import json
import math
import os
import re
import shutil
import signal
import weakref
from functools import partial

import pytest
import torch

from minirlhf.batches.kept import KeptReference
from minirlhf.batches.responses import (
    PairObjective,
    collate_answers,
    ref_logprobs,
    response_stats,
    with_answers,
)
from minirlhf.cli import main
from minirlhf.equations.dpo import dpo_loss
from minirlhf.errors import BAD_INPUT, BUG, OK, STOPPED, UserError
from minirlhf.evaluation.dpo import evaluate_direct
from minirlhf.models.lora import add_lora, base_of
from minirlhf.models.pretrained import load_pretrained
from minirlhf.recipes import dpo as dpo_recipe
from minirlhf.recipes.dpo import dpo
from minirlhf.run.checkpoint import TrainState
from minirlhf.setup.dpo import objective_of
from minirlhf.setup.dpo_settings import LOSSES, NO_REFERENCE
from minirlhf.setup.roles import load_reference
from tests.kill_harness import SHAPE, command, make_world, remains
from tests.tiny_dpo import config_of, reference, state_of, sums_by_hand, tiny_lm
from tests.tiny_folders import read_lines, rebuilt_at_each_step, save_lm, timeless, write_lines
from tests.tiny_reward import LISTS, PAIRS, pair

OF_PAIRS = [loss for loss in LOSSES if loss != "kto"]  # which is in test_kto.py
NUMBERS = {"robust": {"label_smoothing": 0.1}}


def settings_of(loss: str, **changes) -> dict:
    return {"loss": loss, **NUMBERS.get(loss, {}), **changes}


# ---- what counts ---------------------------------------------------------------------------------


def test_collate_answers_has_the_chosen_texts_before_the_rejected_ones():
    batch = collate_answers(PAIRS[:2])
    # prompts 1 2 and none: of a text without one the first token has nothing before it
    assert batch.texts.tokens.tolist() == [
        [1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 6, 0, 0], [9, 10, 1, 0, 0]
    ]
    assert batch.texts.starts.tolist() == [2, 1, 2, 1]
    assert batch.texts.targets[batch.texts.target_mask].tolist() == [3, 4, 5, 8, 6, 10, 1]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 1], [2, 3])
    assert batch.share.tolist() == [1, 1] and batch.pairs == [1, 1]


def test_collate_answers_has_each_text_of_a_list_once_and_shares_its_weight_among_its_pairs():
    batch = collate_answers(LISTS[1:])  # 2 before 8 and 6, which tie; then two of one prompt each
    assert batch.texts.tokens.shape[0] == 5
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 0, 3], [1, 2, 4])
    assert batch.share.tolist() == [0.5, 0.5, 1.0] and batch.pairs == [2, 1]


def test_response_stats_are_sums_over_the_response_alone():
    lm = tiny_lm()
    batch = collate_answers(PAIRS)
    found = response_stats(lm, batch.texts)
    sides = [(p.prompt_ids, ids) for side in (0, 1) for p in PAIRS for ids in [p.responses[side]]]
    expected = torch.stack([sums_by_hand(lm, *side) for side in sides])
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=1e-9)
    assert found.tokens.tolist() == [3, 1, 1, 1, 2, 1, 2, 7, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 13, 4096])
def test_at_step_0_the_policy_is_its_reference_to_the_last_bit(dtype, tokens):
    policy, ref = tiny_lm(dtype=dtype), reference(tiny_lm(dtype=dtype))
    config = config_of(batch_size=4, micro_batch_tokens=tokens, sft_coef=0.0)
    metrics = next(dpo(state_of(policy), PAIRS, ref, config)).metrics
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name] == 0.0
    wide = torch.promote_types(dtype, torch.float32)
    # a mean of four equal numbers is exact
    assert metrics["loss"] == float(torch.tensor(2, dtype=wide).log())
    assert metrics["rewards/accuracies"] == 0  # all tie


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_the_step_is_that_of_the_mean_loss_over_pairs_for_any_micro_batch(loss):
    """Gradients by autograd over rows passed alone, each formula written out once more."""
    config = config_of(**settings_of(loss, batch_size=5, max_grad_norm=None, learning_rate=1.0,
                                     schedule="constant", sft_coef=0.25, beta=0.5))
    policy, ref = tiny_lm(0), tiny_lm(1)
    losses = []
    for p in PAIRS:
        n = [len(ids) - (not p.prompt_ids) for ids in p.responses]
        c, r = (sums_by_hand(policy, p.prompt_ids, ids) for ids in p.responses)
        rc, rr = (sums_by_hand(ref, p.prompt_ids, ids).detach() for ids in p.responses)
        margin = 0.5 * (c - rc - r + rr)
        odds = [x - torch.log1p(-x.exp()) for x in (c / n[0], r / n[1])]
        losses.append({
            "sigmoid": torch.log1p(torch.exp(-margin)),
            "robust": (0.9 * torch.log1p(torch.exp(-margin))
                       - 0.1 * torch.log1p(torch.exp(margin))) / 0.8,
            "ipo": ((c - rc) / n[0] - (r - rr) / n[1] - 1) ** 2,
            "hinge": torch.clamp(1 - margin, min=0),
            "simpo": torch.log1p(torch.exp(-(0.5 * (c / n[0] - r / n[1]) - 1))),
            "orpo": 0.5 * torch.log1p(torch.exp(-(odds[0] - odds[1]))),
        }[loss] - 0.25 * c / n[0])
    mean = torch.stack(losses).mean()
    mean.backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in policy.parameters()])
    for tokens in (1, 14, 4096):
        policy = tiny_lm(0)
        state = TrainState(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
        given = None if loss in NO_REFERENCE else reference(ref)
        now = config if given is None else config_of(**vars(config) | {"ref": "another"})
        now = type(config)(**vars(now) | {"micro_batch_tokens": tokens})
        step = next(dpo(state, PAIRS, given, now))
        assert step.metrics["loss"] == pytest.approx(mean.item(), abs=1e-9)
        got = torch.cat([p.detach().flatten() for p in policy.parameters()])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_metrics_are_means_over_pairs_by_hand():
    policy, ref = tiny_lm(0), tiny_lm(1)
    c, r, rc, rr = (
        torch.stack([sums_by_hand(lm, p.prompt_ids, p.responses[side]) for p in PAIRS]).detach()
        for lm in (policy, ref) for side in (0, 1)
    )
    chosen, rejected = 0.5 * (c - rc), 0.5 * (r - rr)
    expected = {
        "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": c.mean(), "logps/rejected": r.mean(),
    }
    config = config_of(batch_size=5, beta=0.5, ref="another", micro_batch_tokens=14)
    step = next(dpo(state_of(policy), PAIRS, reference(ref), config))
    held_out = evaluate_direct(tiny_lm(0), PAIRS, reference(ref), objective_of(config), 14)
    for metrics in (step.metrics, held_out.metrics):
        assert {name: metrics[name] for name in expected} == pytest.approx(
            {name: float(x) for name, x in expected.items()}, abs=1e-9
        )
        assert "nll_loss" not in metrics
    assert held_out.metrics["loss"] == pytest.approx(step.metrics["loss"], abs=1e-9)
    assert step.metrics["num_tokens"] == sum(
        2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in PAIRS
    )
    # held-out pairs stand in the order of the file, whatever the micro-batches
    torch.testing.assert_close(held_out.chosen, chosen, rtol=0, atol=1e-9)
    torch.testing.assert_close(held_out.rejected, rejected, rtol=0, atol=1e-9)
    assert held_out.pairs == PAIRS


def test_a_ranked_list_counts_as_the_mean_of_its_pairs():
    config, ref = config_of(batch_size=3, beta=0.5, ref="another"), reference(tiny_lm(1))
    found = next(dpo(state_of(tiny_lm(0)), LISTS, ref, config)).metrics
    of_lists = []
    for ranked in LISTS:
        pairs = [
            pair(ranked.prompt_ids, ranked.responses[i], ranked.responses[j])
            for i in range(len(ranked.ranks)) for j in range(len(ranked.ranks))
            if ranked.ranks[i] < ranked.ranks[j]
        ]
        of_lists.append(evaluate_direct(tiny_lm(0), pairs, ref, objective_of(config)).metrics)
    losses = [metrics["loss"] for metrics in of_lists]
    assert found["loss"] == pytest.approx(sum(losses) / 3, abs=1e-9)
    # metrics are over all pairs: 6, 2 and 1
    margins = [n * m["rewards/margins"] for n, m in zip((6, 2, 1), of_lists, strict=True)]
    assert found["rewards/margins"] == pytest.approx(sum(margins) / 9, abs=1e-9)


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_dpo_learns_a_tiny_set(loss):
    policy = tiny_lm()
    ref = None if loss in NO_REFERENCE else reference(tiny_lm())
    config = config_of(**settings_of(loss, steps=30, batch_size=5))
    *_, last = dpo(state_of(policy), PAIRS, ref, config)
    assert last.number == 30 and last.metrics["rewards/accuracies"] == 1
    assert last.metrics["rewards/margins"] > (0.4 if loss == "ipo" else 0.9)


def test_base_under_adapters_is_the_reference():
    whole, plain = tiny_lm(), tiny_lm()
    add_lora(whole, 2, 4.0)
    state = TrainState(whole, torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad]))
    config = config_of(steps=8, batch_size=5)
    steps = [s.metrics for s in dpo(state, PAIRS, partial(ref_logprobs, base_of(whole)), config)]
    assert steps[0]["rewards/margins"] == 0 < steps[-1]["rewards/margins"]
    texts = collate_answers(PAIRS).texts
    assert torch.equal(ref_logprobs(base_of(whole), texts), reference(plain)(texts))
    assert not torch.equal(response_stats(whole, texts).logprobs, reference(plain)(texts))


def test_a_loss_of_ones_own_is_the_one_that_is_learned_from():
    def doubled(*sides):
        found = dpo_loss(*sides, beta=0.1)
        return found._replace(loss=2 * found.loss)

    plain, twice = (
        next(dpo(state_of(tiny_lm()), PAIRS, reference(tiny_lm()), config_of(), objective)).metrics
        for objective in (None, PairObjective(doubled))
    )
    assert twice["loss"] == 2 * plain["loss"]
    assert twice["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-12)


# ---- what is refused -----------------------------------------------------------------------------


def test_dpo_refuses_an_empty_list_of_pairs():
    with pytest.raises(ValueError, match="examples is empty: give at least one"):
        next(dpo(state_of(tiny_lm()), [], reference(tiny_lm()), config_of()))


def test_dpo_refuses_to_do_without_a_reference_where_its_loss_has_one():
    with pytest.raises(ValueError, match="ref is None: give one, the loss sigmoid is relative"):
        next(dpo(state_of(tiny_lm()), PAIRS, None, config_of()))


def test_dpo_refuses_a_reference_that_is_not_the_policy_at_step_0():
    steps = dpo(state_of(tiny_lm(0)), PAIRS, reference(tiny_lm(1)), config_of())
    with pytest.raises(UserError, match="step 1: rewards/margins: a token's KL is") as error:
        next(steps)
    assert error.value.code == BUG


@pytest.mark.parametrize("example", [pair([], [3], [4, 5]), pair([1], [], [2]), LISTS[2]])
def test_a_response_without_a_token_that_can_be_learned_is_refused(example):
    if example is LISTS[2]:
        assert with_answers(example) is example
        return
    with pytest.raises(UserError, match="t:1: has a response without tokens: remove the row"):
        with_answers(example)


def test_dpo_stops_at_a_loss_that_is_not_finite():
    lm = tiny_lm()
    torch.nn.init.constant_(lm.model.norm.weight, math.nan)
    with pytest.raises(UserError, match=r"step 1 \(t:.*\): loss: is nan: ") as error:
        next(dpo(state_of(lm), PAIRS, reference(tiny_lm()), config_of(ref="another")))
    assert error.value.code == 3


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [PAIRS, LISTS], ids=["pairs", "lists"])
def test_dpo_goes_on_bit_for_bit_from_any_yield(examples, tmp_path):
    config, ref = config_of(steps=5, warmup_steps=1), reference(tiny_lm())
    whole = state_of(tiny_lm())
    expected = [step.metrics for step in dpo(whole, examples, ref, config)]
    steps, state = rebuilt_at_each_step(
        lambda: state_of(tiny_lm()), lambda state: dpo(state, examples, ref, config), tmp_path
    )
    assert [step.metrics for step in steps] == expected
    assert state.step == 5 and state.samples == whole.samples
    assert state.meters.as_dict() == whole.meters.as_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], tensor), name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name, changes in (("short", {"max_position_embeddings": 12}), ("other", {})):
        shutil.copytree(folder / "model", folder / name)
        save_lm(folder / name, SHAPE, 1, vocab_size=258, **changes)
    return folder


def test_main_evaluates_named_sets_and_shows_their_pairs(world, tmp_path, capsys):
    out, few = tmp_path / "run", str(world / "few_pairs.jsonl")
    argv = ["dpo", "--model", str(world / "model"), "--data", str(world / "pairs.jsonl"),
            "--eval-data", few, f"lists={world / 'few_lists.jsonl'}", "--out", str(out),
            "--steps", "4", "--eval-every", "2", "--batch-size", "4", "--learning-rate", "1e-2",
            "--show-samples", "2", "--log-every", "1", "--verbose"]
    assert main(argv) == OK
    told, lines = capsys.readouterr().out, timeless(out)
    assert lines[0]["loss"] == float(torch.tensor(2.0).log()) and lines[0]["rewards/margins"] == 0
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert {"eval_lists_rewards/margins", "eval_rewards/accuracies"} <= lines[1].keys()
    rows = read_lines(out / "samples.jsonl")
    assert [(row["step"], row["set"], row["chosen"]) for row in rows[:2]] == [
        (2, "eval_", " good."), (2, "eval_", " bad.")
    ]
    assert len(rows) == 8
    assert re.search(r"  eval, 3 pairs: loss \d\.\d+, margin ", told)
    assert "  eval_lists, 3 lists: loss " in told
    assert "margin and chosen_probability: not read" in told
    assert "reference             the policy at step 0" in told


def test_a_run_notes_once_that_both_responses_fall_and_a_resumed_one_does_not_again(
    world, tmp_path, capsys
):
    settings = {"steps": 12, "learning_rate": 0.1, "sft_coef": 0.0, "label_smoothing": 0.0}

    def notes(*more: str) -> list[str]:
        assert main([*command("dpo", world, tmp_path / "run", **settings), *more]) == OK
        told = capsys.readouterr().out.splitlines()
        return [line for line in told if line.startswith("note at step")]

    (first,) = notes()
    assert "both_fall: rewards/chosen and rewards/rejected are -" in first
    assert notes("--resume", "--resume-from", "step-00000011") == []


def test_main_of_lists_learns_from_their_pairs(world, tmp_path):
    out = tmp_path / "run"
    assert main(command("dpo", world, out, data="lists", eval_data="few_lists", log_every=1)) == OK
    assert timeless(out)[0]["rewards/margins"] == 0 < timeless(out)[-1]["rewards/margins"]


def test_main_with_lora_writes_a_merged_model_that_changed(world, tmp_path):
    out = tmp_path / "run"
    assert main(command("dpo", world, out, lora_rank=2)) == OK
    before, after = (load_pretrained(f).state_dict() for f in (world / "model", out / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all("_proj" in name for name in changed)


def run(world, out, **changes) -> dict[str, bytes]:
    """A run of 4 steps that saves each; what it leaves."""
    settings = {"steps": 4, "log_every": 1, "eval_every": 1, **changes}
    assert main(command("dpo", world, out, **settings)) == OK
    return remains(out)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"ref": "other"}, {"data": "lists"}],
                         ids=["plain", "lora", "ref", "lists"])
def test_kept_log_probs_are_those_that_are_computed_each_time(changes, world, tmp_path):
    if "ref" in changes:
        changes = changes | {"ref": world / changes["ref"]}
    kept = run(world, tmp_path / "kept", **changes)
    each = run(world, tmp_path / "each", cache_ref=False, **changes)
    assert len(kept.pop("reference.jsonl").splitlines()) > 16
    assert kept == each


def test_the_reference_leaves_memory_and_a_resumed_run_does_without(world, tmp_path, monkeypatch):
    loaded = []

    def load(*arguments):
        model = load_reference(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("minirlhf.setup.dpo.load_reference", load)
    steps = dpo_recipe.dpo

    def watched(*arguments):
        assert [model() for model in loaded] == [None]  # before the first step
        yield from steps(*arguments)

    monkeypatch.setattr(dpo_recipe, "dpo", watched)
    whole = run(world, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("minirlhf.setup.dpo.load_reference", None)  # it must not be asked for
    argv = command("dpo", world, tmp_path / "run", steps=4, log_every=1, eval_every=1)
    assert main([*argv, "--resume", "--resume-from", "step-00000002"]) == BAD_INPUT  # is pruned
    assert main([*argv, "--resume", "--resume-from", "step-00000003"]) == OK
    assert remains(tmp_path / "run") == whole


def test_a_signal_while_the_reference_is_passed_loses_nothing(world, tmp_path, monkeypatch):
    whole, out, add = run(world, tmp_path / "whole"), tmp_path / "run", KeptReference.add
    passes = []

    def stopping(*arguments):
        passes.append(1)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        add(*arguments)

    monkeypatch.setattr(KeptReference, "add", stopping)
    argv = command("dpo", world, out, steps=4, log_every=1, eval_every=1)
    assert main(argv) == STOPPED
    monkeypatch.undo()
    kept = (out / "reference.jsonl").read_bytes()
    assert whole["reference.jsonl"].startswith(kept) and kept.count(b"\n") > 2
    with (out / "reference.jsonl").open("ab") as file:  # and a kill inside a later append
        file.write(whole["reference.jsonl"][len(kept) : len(kept) + 130])
    assert main([*argv, "--resume"]) == OK
    assert remains(out) == whole


def test_kept_log_probs_of_another_reference_are_not_taken(tmp_path):
    texts = collate_answers(PAIRS).texts
    ref = reference(tiny_lm())
    kept = KeptReference(tmp_path / "reference.jsonl", "one")
    kept.add(texts, ref)
    assert torch.equal(kept(texts), ref(texts))
    assert list(kept.missing([texts])) == []
    again, other = (KeptReference(kept.journal.path, name) for name in ("one", "other"))
    assert torch.equal(again(texts), ref(texts))
    assert list(other.missing([texts])) == [texts]
    for changed in (PAIRS[:4], PAIRS[::-1]):  # a row's neighbours are part of what it is
        assert len(list(again.missing([collate_answers(changed).texts]))) == 1


def test_a_log_prob_of_the_reference_that_is_not_finite_is_not_kept(tmp_path):
    kept = KeptReference(tmp_path / "reference.jsonl", "one")
    texts = collate_answers(PAIRS).texts
    with pytest.raises(UserError, match="the reference: log-prob of a response: is nan") as error:
        kept.add(texts, lambda _: torch.full((10,), math.nan))
    assert error.value.code == 3 and not kept.journal.path.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "robust", "label_smoothing": 0.0}, "loss robust: needs --label-smoothing"),
        ({"loss": "ipo"}, "label_smoothing: goes with --loss sigmoid or robust, not ipo"),
        ({"simpo_gamma": 0.5}, "simpo_gamma: goes with --loss simpo, not sigmoid"),
        ({"loss": "simpo", "label_smoothing": 0.0, "ref": "model"}, "ref: simpo has no reference"),
        ({"loss": "dpo"}, "--loss: got 'dpo', must be one of sigmoid, robust, ipo, hinge"),
        ({"loss": "orpo", "label_smoothing": 0.0, "cache_ref": False}, "cache_ref: orpo has no r"),
        ({"ref": "short"}, "a row of 15 tokens, the model reads 12: give --max-length 12"),
    ],
)
def test_main_refuses(changes, told, world, tmp_path, capsys):
    if "ref" in changes:
        changes = changes | {"ref": world / changes["ref"]}
    assert main(command("dpo", world, tmp_path / "run", **changes)) == BAD_INPUT
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_main_refuses_a_reference_with_another_tokenizer(world, tmp_path, capsys):
    other = tmp_path / "other"
    save_lm(other, SHAPE, vocab_size=300)
    tokenizer = json.loads((world / "model" / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[5:7]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert main(command("dpo", world, tmp_path / "run", ref=other)) == BAD_INPUT
    assert "has another tokenizer than the policy" in capsys.readouterr().err


def test_main_refuses_a_row_without_an_answer_by_its_line(world, tmp_path, capsys):
    rows = [{"chosen": "Good.", "rejected": "x"}]
    data = write_lines(tmp_path / "d.jsonl", rows)
    argv = ["dpo", "--model", str(world / "model"), "--data", data, "--out", str(tmp_path / "run"),
            "--max-length", "2", "--overlong", "truncate_response"]
    code = main(argv)
    assert code == OK or "d.jsonl:1" in capsys.readouterr().err
