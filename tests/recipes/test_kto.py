"""KTO: single responses, the KL of mismatched ones over a whole step, and that a run is so."""

import math
import re

import pytest
import torch

from minirlhf.batches.preferences import row_lengths
from minirlhf.batches.responses import collate_answers, mismatched, mismatched_ratios
from minirlhf.cli import main
from minirlhf.data.batching import training_batches
from minirlhf.data.unpaired import Unpaired
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.evaluation.dpo import evaluate_direct
from minirlhf.recipes.dpo import dpo
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.glossary import definition
from minirlhf.setup.dpo import objective_of
from tests.kill_harness import KTO, command, make_world, remains
from tests.tiny_dpo import config_of, reference, state_of, sums_by_hand, tiny_lm
from tests.tiny_folders import read_lines, rebuilt_at_each_step, timeless

ROWS = [
    Unpaired([1, 2], [3, 4, 5], True, "t:1", {}),
    Unpaired([1, 2], [6], False, "t:2", {}),
    Unpaired([7], [8, 9, 10, 1], True, "t:3", {}),
    Unpaired([3, 2, 1], [2, 2], True, "t:4", {}),
    Unpaired([9, 9], [4], False, "t:5", {}),
]


def kto(**changes):
    return config_of(**{"loss": "kto", "batch_size": 5, "beta": 0.5, "ref": "another", **changes})


# ---- mismatched pairs ----------------------------------------------------------------------------


def test_each_response_comes_under_the_next_other_prompt_of_the_batch():
    found = mismatched(ROWS, 9)
    # t:1 passes t:2 over, which has its own prompt; t:5 is followed by the first
    assert [e.prompt_ids for e in found] == [[7], [7], [3, 2, 1], [9, 9], [1, 2]]
    assert [(e.response_ids, e.where) for e in found] == [(e.response_ids, e.where) for e in ROWS]


def test_a_prompt_with_which_a_row_would_be_too_long_is_passed_over():
    # most 6: t:3 has 4 tokens, so that a prompt of 3 is too long; the next of 2 is t:5's
    assert [e.prompt_ids for e in mismatched(ROWS, 6)] == [[7], [7], [9, 9], [9, 9], [1, 2]]
    # most 5: only its own of one token is left for t:3
    assert mismatched(ROWS, 5)[2].prompt_ids == [7]


def test_where_there_is_no_other_prompt_a_response_keeps_its_own():
    alike = [ROWS[0], ROWS[1]]
    assert mismatched(alike, 99) == alike
    empty = [ROWS[0], Unpaired([], [5, 6], True, "t:6", {})]
    assert [e.prompt_ids for e in mismatched(empty, 99)] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("tokens", [1, 14, 4096])
def test_the_kl_is_that_of_the_whole_step_whatever_the_micro_batches(tokens):
    policy, ref = tiny_lm(0), tiny_lm(1)
    ratios = mismatched_ratios(policy, ROWS, reference(ref), 9, tokens)
    expected = [
        sums_by_hand(policy, e.prompt_ids, e.response_ids)
        - sums_by_hand(ref, e.prompt_ids, e.response_ids) for e in mismatched(ROWS, 9)
    ]
    assert not ratios.requires_grad
    assert float(ratios.mean()) == pytest.approx(float(sum(expected).detach()) / 5, abs=1e-9)


# ---- the step ------------------------------------------------------------------------------------


def first_step() -> list[Unpaired]:
    """The rows as the first batch has them: of like length, so in another order."""
    return [ROWS[i] for i in next(training_batches(row_lengths(ROWS), 5, 0)).tolist()]


def by_hand(policy, ref, z: float, weights=(1.0, 1.0), sft: float = 0.0):
    losses = []
    for e in ROWS:
        logprob = sums_by_hand(policy, e.prompt_ids, e.response_ids)
        reward = 0.5 * (logprob - sums_by_hand(ref, e.prompt_ids, e.response_ids).detach())
        sign, weight = (1, weights[0]) if e.desirable else (-1, weights[1])
        losses.append(weight / (1 + torch.exp(sign * (reward - 0.5 * z)))
                      - (sft * logprob / len(e.response_ids) if e.desirable else 0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tokens", [1, 14, 4096])
def test_the_step_is_that_of_the_mean_loss_over_responses_for_any_micro_batch(tokens):
    ref = tiny_lm(1)
    z = float(mismatched_ratios(tiny_lm(0), first_step(), reference(ref), 5, 4096).mean())
    policy = tiny_lm(0)
    mean = by_hand(policy, ref, max(z, 0), (2.0, 0.5), 0.25)
    mean.backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in policy.parameters()])
    policy = tiny_lm(0)
    state = TrainState(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    config = kto(desirable_weight=2.0, undesirable_weight=0.5, sft_coef=0.25, max_grad_norm=None,
                 learning_rate=1.0, micro_batch_tokens=tokens)
    step = next(dpo(state, ROWS, reference(ref), config))
    assert step.metrics["loss"] == pytest.approx(mean.item(), abs=1e-9)
    assert step.metrics["kl"] == pytest.approx(max(z, 0), abs=1e-9)
    got = torch.cat([p.detach().flatten() for p in policy.parameters()])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])  # of one the KL is above 0, of the other below
def test_a_kl_below_zero_counts_as_zero(seeds):
    policy, ref = map(tiny_lm, seeds)
    z = float(mismatched_ratios(policy, first_step(), reference(ref), 5, 4096).mean())
    step = next(dpo(state_of(policy), ROWS, reference(ref), kto()))
    assert step.metrics["kl"] == pytest.approx(max(z, 0), abs=1e-9)
    mean = by_hand(tiny_lm(seeds[0]), ref, max(z, 0)).item()
    assert step.metrics["loss"] == pytest.approx(mean, abs=1e-9)


def test_at_step_0_every_response_has_lost_a_half():
    step = next(dpo(state_of(tiny_lm()), ROWS, reference(tiny_lm()), kto(ref=None)))
    names = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
    assert [step.metrics[name] for name in names] == [0.0] * 4
    assert step.metrics["loss"] == pytest.approx(0.5, abs=1e-15)
    assert "rewards/accuracies" not in step.metrics


def test_metrics_are_means_over_liked_and_other_responses_and_left_out_where_there_are_none():
    policy, ref = tiny_lm(0), tiny_lm(1)
    sums = [float(sums_by_hand(policy, e.prompt_ids, e.response_ids).detach()) for e in ROWS]
    ratios = [x - float(sums_by_hand(ref, e.prompt_ids, e.response_ids).detach())
              for x, e in zip(sums, ROWS, strict=True)]
    held_out = evaluate_direct(policy, ROWS, reference(ref), objective_of(kto()), 14)
    metrics = held_out.metrics
    assert metrics["logps/chosen"] == pytest.approx((sums[0] + sums[2] + sums[3]) / 3, abs=1e-9)
    assert metrics["rewards/rejected"] == pytest.approx((ratios[1] + ratios[4]) / 4, abs=1e-9)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert held_out.rewards == pytest.approx([x / 2 for x in ratios], abs=1e-6)
    liked = [e for e in ROWS if e.desirable]
    state = state_of(policy)
    step = next(dpo(state, liked, reference(ref), kto(batch_size=3)))
    assert "rewards/chosen" in step.metrics
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & step.metrics.keys()
    # a log window weighs each mean by what it is a mean of: liked, others, rows, tokens
    state = state_of(policy)
    next(dpo(state, ROWS, reference(ref), kto()))
    names = ("rewards/chosen", "logps/rejected", "loss", "entropy")
    assert [state.meters.meters[name].count for name in names] == [3, 2, 5, 11]


def test_kto_learns_a_tiny_set():
    *_, last = dpo(state_of(tiny_lm()), ROWS, reference(tiny_lm()), kto(ref=None, steps=30))
    assert last.metrics["rewards/chosen"] > 0 > last.metrics["rewards/rejected"]
    assert last.metrics["loss"] < 0.3


def test_kto_goes_on_bit_for_bit_from_any_yield(tmp_path):
    config, ref = kto(ref=None, steps=5, batch_size=3), reference(tiny_lm())
    whole = state_of(tiny_lm())
    expected = [step.metrics for step in dpo(whole, ROWS, ref, config)]
    steps, state = rebuilt_at_each_step(
        lambda: state_of(tiny_lm()), lambda state: dpo(state, ROWS, ref, config), tmp_path
    )
    assert [step.metrics for step in steps] == expected
    assert state.meters.as_dict() == whole.meters.as_dict()


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["plain", "lora"])
def test_kept_log_probs_are_those_that_are_computed_each_time(changes, world, tmp_path, capsys):
    left = []
    for name, kept in (("kept", True), ("each", False)):
        settings = {**KTO, "steps": 4, "log_every": 1, "eval_every": 2, "verbose": True, **changes}
        argv = command("dpo", world, tmp_path / name, cache_ref=kept, **settings)
        assert main(argv) == OK
        left.append(remains(tmp_path / name))
    assert left[0].pop("reference.jsonl") and left[0] == left[1]
    lines = timeless(tmp_path / "kept")
    assert lines[0]["kl"] == 0 and lines[0]["rewards/margins"] == 0 < lines[-1]["eval_kl"]
    rows = read_lines(tmp_path / "kept" / "samples.jsonl")
    assert [row["desirable"] for row in rows[:2]] == [False, True]
    assert all(definition("dpo", name) for line in lines for name in line)
    told = capsys.readouterr().out
    # 5 of 8 rows at 1.5, 3 at 1
    assert re.search("  liked : others +7.5 : 3 = 2.50, weighted; 1 to 1.33 is usual\n", told)
    assert "note:     5 answers were liked, 3 were not" in told
    assert re.search("  responses a step +4\n", told)
    assert re.search(r"\n  response +desirable +reward  tokens\n +good\. +no ", told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 1}, "batch_size: got 1, kto compares a response with others of its step"),
        ({"batch_size": 7}, "--batch-size: is 7: of 8 responses one is left for a step: kto "),
        ({"data": "pairs"}, "pairs.jsonl:1: has no label: needs one of label, kto_tag: true where"),
        ({"loss": "sigmoid", "desirable_weight": 1.0},
         "one answer a row, with label, where two are compared: make rows of one prompt with"),
        ({"loss": "sigmoid"}, "desirable_weight: goes with --loss kto, not sigmoid"),
    ],
)
def test_main_refuses(changes, told, world, tmp_path, capsys):
    assert main(command("dpo", world, tmp_path / "run", **{**KTO, **changes})) == BAD_INPUT
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_of_seven_that_meets_no_epochs_end_is_fine(world, tmp_path):
    argv = command("dpo", world, tmp_path / "run", **{**KTO, "batch_size": 7, "steps": 1})
    assert main(argv) == OK


def test_collated_responses_know_their_labels():
    batch = collate_answers(ROWS)
    assert batch.desirable.tolist() == [True, False, True, True, False]
    assert batch.sizes() == ([1, 0, 1, 1, 0], [0, 1, 0, 0, 1])
    assert math.isclose(float(batch.texts.target_mask.sum()), 11)
