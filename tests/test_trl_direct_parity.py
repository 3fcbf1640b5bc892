"""Losses, metrics and gradients of DPO and its family are those of TRL 1.16, or why they are not.

tests/data/trl_1_16_0.json holds what TRL's DPOTrainer, KTOTrainer, ORPOTrainer and CPOTrainer make
of small fixed inputs; trl_reference.py made it and says how. The losses are derived once more in
plain Python. What TRL defines otherwise:

    rewards of ipo are sums over tokens there, though its loss reads means; ours are what it reads
    rewards of orpo are beta times the mean log-prob there; ours are the log odds, which it compares
    the batch KL of KTO is there that of a micro-batch, and completions turn within it; ours is that
        of the whole optimizer step, and a prompt that is the same is passed over
"""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch

from minirlhf.batches.responses import (
    batches_of,
    collate_answers,
    mismatched_ratios,
    ref_logprobs,
    response_stats,
)
from minirlhf.data.examples import Pair
from minirlhf.data.unpaired import Unpaired
from minirlhf.equations.dpo import orpo_loss, simpo_loss
from minirlhf.evaluation.dpo import direct_metrics
from minirlhf.models.families import config_from_hf
from minirlhf.models.transformer import CausalLM
from minirlhf.setup.dpo import objective_of
from minirlhf.setup.dpo_settings import DPOConfig
from tests import trl_reference as reference
from tests.trl_reference import BETA, GAMMA, LIKED, NEW, QUERIES, REF, REJECTED, RESPONSES, fill

TRL = json.loads((Path(__file__).parent / "data/trl_1_16_0.json").read_text("utf-8"))["direct"]
NEAR = {"rel": 0, "abs": 1e-5}
PAIRS = [Pair(q, c, r, 0.0, "t:1", {})
         for q, c, r in zip(QUERIES, RESPONSES, REJECTED, strict=True)]
SINGLE = [Unpaired(q, c, label, "t:1", {})
          for q, c, label in zip(QUERIES, RESPONSES, LIKED, strict=True)]
LOSSES = ("sigmoid", "robust", "hinge", "ipo")


def lm(phase: float) -> CausalLM:
    config = config_from_hf({**reference.SHAPE, "model_type": "llama"})
    return fill(CausalLM(config).double(), phase)


def config_of(loss: str) -> DPOConfig:
    smoothing = reference.SMOOTHING if loss == "robust" else 0.0
    weights = dict(zip(("desirable_weight", "undesirable_weight"), reference.WEIGHTS, strict=True))
    return DPOConfig(loss=loss, beta=BETA, label_smoothing=smoothing,
                     **(weights if loss == "kto" else {}))


def ours(name: str):
    """Loss, metrics and gradient of TRL's rows, in micro-batches of one row each."""
    loss = "kto" if name.startswith("kto") else name
    phases = reference.KTO_PHASES.get(name, (NEW, REF))
    policy, ref = map(lm, phases)
    rows, objective = (SINGLE if loss == "kto" else PAIRS), objective_of(config_of(loss))
    if loss == "kto":
        ratios = mismatched_ratios(policy, rows, lambda t: ref_logprobs(ref, t), 9, 1)
        objective = objective._replace(kl=ratios)
    total, outcomes = 0.0, []
    for _, batch in batches_of(rows, 1):
        losses, told = batch.losses(
            response_stats(policy, batch.texts), ref_logprobs(ref, batch.texts), objective
        )
        total, outcomes = total + losses.sum() / len(rows), [*outcomes, told]
    gradient = [float(x) for x in reference.projected(policy, total)]
    return total.item(), direct_metrics(outcomes, objective)[0], gradient


@pytest.mark.parametrize("name", [*LOSSES, *reference.KTO_PHASES])
def test_loss_metrics_and_gradient_are_trls(name):
    loss, metrics, gradient = ours(name)
    theirs = TRL[name]
    assert loss == pytest.approx(theirs["loss"], **NEAR)
    assert gradient == pytest.approx(theirs["gradient"], **NEAR)
    same = {n for n in theirs["metrics"] if not (name == "ipo" and n.startswith("rewards/"))}
    assert len(same) >= 3
    expected = {n: theirs["metrics"][n] for n in same}
    assert {n: metrics[n] for n in same} == pytest.approx(expected, **NEAR)
    assert metrics.keys() == theirs["metrics"].keys()


def test_one_of_the_kls_is_clamped_and_the_other_is_not():
    assert TRL["kto"]["metrics"]["kl"] == 0 < TRL["kto, KL above 0"]["metrics"]["kl"]


def test_rewards_of_ipo_are_those_of_means_here():
    _, metrics, _ = ours("ipo")
    stats = [response_stats(model, collate_answers(PAIRS).texts) for model in (lm(NEW), lm(REF))]
    ratios = (stats[0].logprobs - stats[1].logprobs).detach() / stats[0].tokens
    assert metrics["rewards/chosen"] == pytest.approx(BETA * float(ratios[:3].mean()), abs=1e-9)
    sums = BETA * float((ratios * stats[0].tokens)[:3].mean())
    assert TRL["ipo"]["metrics"]["rewards/chosen"] == pytest.approx(sums, **NEAR)


@pytest.mark.parametrize("loss", LOSSES)
def test_trls_losses_by_hand(loss):
    c, r, rc, rr = (
        response_stats(model, collate_answers(PAIRS).texts).logprobs.detach().chunk(2)[side]
        for model in (lm(NEW), lm(REF)) for side in (0, 1)
    )
    found = []
    for at, pair in enumerate(PAIRS):
        chosen, rejected = float(c[at] - rc[at]), float(r[at] - rr[at])
        margin = BETA * (chosen - rejected)
        right, wrong = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
        mean = chosen / len(pair.chosen_ids) - rejected / len(pair.rejected_ids)
        found.append({
            "sigmoid": right, "robust": (0.9 * right - 0.1 * wrong) / 0.8,
            "hinge": max(0.0, 1 - margin), "ipo": (mean - 1 / (2 * BETA)) ** 2,
        }[loss])
    assert TRL[loss]["loss"] == pytest.approx(fmean(found), **NEAR)


def test_orpo_and_simpo_losses_are_trls():
    chosen, rejected = torch.tensor(TRL["orpo"]["means"], dtype=torch.float64)
    losses = BETA * orpo_loss(chosen, rejected).loss
    assert losses.tolist() == pytest.approx(TRL["orpo"]["losses"], **NEAR)
    out = simpo_loss(chosen, rejected, reference.SIMPO_BETA, GAMMA)
    assert out.loss.tolist() == pytest.approx(TRL["simpo"]["losses"], **NEAR)
    for rewards, theirs in zip(out[1:], TRL["simpo"]["rewards"], strict=True):
        assert rewards.tolist() == pytest.approx(theirs, **NEAR)
