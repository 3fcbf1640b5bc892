"""Our numbers are TRL's, on the same weights and ids; where they are not, why is told here.

tests/data holds what TRL 0.9.6 (its last PPOTrainer.step) and TRL 1.16 (RewardTrainer, and how
GRPOTrainer calls reward functions) compute; trl_reference.py made it and says how. Each number of
the losses is derived once more in plain Python, so that the files are no black box. What TRL is
known to get wrong, and what it defines otherwise:

    whitening divides by the sample's deviation (n - 1); ours is that of the population (n), so
        advantages differ by sqrt(n / (n - 1)), and the policy loss with them
    whitened rewards are not masked again, so that padding pays into the returns
    a mean ratio above ratio_threshold turns the losses into 0, and the optimizer steps all the same
    var_explained compares the new values with the sample variance; ours compares those that the
        advantages were made of with the population's
    mean_non_score_reward is a mean over tokens, ours over responses

The last bits of TRL's log-probs are float32's: its value-head model rounds its logits to that.
"""

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, pvariance, stdev, variance

import pytest
import torch
from torch import Tensor, nn

from minirlhf.batches.credit import assign_credit
from minirlhf.batches.preferences import collate_pairs
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, measure, policy_pass
from minirlhf.data.examples import Pair
from minirlhf.equations.advantages import gae
from minirlhf.equations.kl import AdaptiveKL, kl_k1, kl_k2
from minirlhf.equations.masking import masked_mean, masked_rescale
from minirlhf.equations.policy import clipped_surrogate
from minirlhf.equations.scores import RunningMoments
from minirlhf.evaluation.reward import score_metrics
from minirlhf.models.alignment import pad_right
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.transformer import CausalLM
from minirlhf.recipes.ppo import ppo_step
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.source import Completions
from minirlhf.setup.ppo_settings import PPOConfig
from tests import trl_reference as reference
from tests.tiny_ppo import by_row
from tests.trl_reference import (
    KL_COEF,
    NEW,
    OLD,
    PAIRS,
    QUERIES,
    REF,
    RESPONSES,
    SCORES,
    SETTINGS,
    fill,
)

FILES = Path(__file__).parent / "data"
PPO, REWARD = (
    json.loads((FILES / f"trl_{name}.json").read_text("utf-8")) for name in ("0_9_6", "1_16_0")
)
TOKENS = sum(map(len, RESPONSES))  # n, 7
BESSEL = math.sqrt(TOKENS / (TOKENS - 1))
NEAR = {"rel": 0, "abs": 1e-5}

# ---- ours ----------------------------------------------------------------------------------------


def language_model(phase: float) -> CausalLM:
    config = config_from_hf({**reference.SHAPE, "model_type": "llama"})
    return fill(CausalLM(config).double(), phase)


def policy(phase: float) -> ValueHeadModel:
    model = ValueHeadModel(language_model(phase))
    fill(model.v_head, phase)
    return model


def config_of(**changes: object) -> PPOConfig:
    values = {
        "batch_size": 3, "micro_batch_size": 2, "epochs": 1, "max_grad_norm": None,
        "gamma": SETTINGS["gamma"], "lam": SETTINGS["lam"], "kl_coef": KL_COEF,
        "clip_low": SETTINGS["cliprange"], "clip_high": SETTINGS["cliprange"],
        "value_clip": SETTINGS["cliprange_value"], "vf_coef": SETTINGS["vf_coef"],
    }
    return PPOConfig(**{**values, **changes})


def measured(full_kl: bool = False) -> RolloutBuffer:
    """TRL's rows in micro-batches of two and one: no split changes a number."""
    sizes = torch.tensor([len(ids) for ids in RESPONSES])
    rollout = Rollout(
        rows=torch.arange(3),
        tokens=pad_right([q + r for q, r in zip(QUERIES, RESPONSES, strict=True)]),
        prompt_lengths=torch.tensor([len(ids) for ids in QUERIES]),
        response_mask=torch.arange(4) < sizes[:, None],
        scores=torch.tensor(SCORES, dtype=torch.float64),
    )
    buffer = RolloutBuffer(2, 99)
    buffer.add(rollout)
    measure(policy(OLD), language_model(REF), buffer, 1.0, full_kl)
    return buffer


def assert_near(got: list[Tensor] | list[float], expected: list) -> None:
    """Row by row, all finite."""
    for ours, theirs in zip(got, expected, strict=True):
        values = ours.tolist() if isinstance(ours, Tensor) else ours
        assert values == pytest.approx(theirs, **NEAR)


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def filled(whiten: bool) -> RolloutBuffer:
    buffer = measured()
    assign_credit(buffer, config_of(whiten_advantages=whiten), KL_COEF)
    return buffer


class Ascent(torch.optim.SGD):
    """Keeps the gradient that ppo_step hands to its optimizer."""

    def step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.projected = [float((p.grad * reference.direction(p)).sum()) for p in parameters]
        self.norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))


def stepped(**changes: object):
    """One ppo_step of the policy NEW on the rollout of OLD; its stats and its optimizer."""
    model, buffer = policy(NEW), measured()
    names = {name.replace("lm.", "pretrained_model.").replace("v_head.", "v_head.summary."): p
             for name, p in model.named_parameters()}
    optimizer = Ascent([names[name] for name in sorted(names)], lr=1.0)
    return ppo_step(model, optimizer, buffer, config_of(**changes)), optimizer, buffer


# ---- PPO against TRL -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "old_values"])
def test_measured_log_probs_and_values_are_trls(name):
    assert_near(by_row(measured(), name), PPO[name])


@pytest.mark.parametrize("name", ["logprobs", "values"])
def test_a_training_pass_gives_trls_log_probs_and_values(name):
    buffer, model = measured(), policy(NEW)
    rows = {}
    with torch.no_grad():
        for micro in buffer.micro_batches:
            cells = getattr(policy_pass(model, micro, 1.0), name)
            for b, row in enumerate(micro.rows.tolist()):
                rows[row] = cells[b][micro.response_mask[b]]
    assert_near([rows[row] for row in range(3)], PPO[name])


def test_rewards_and_returns_are_trls():
    buffer = filled(whiten=False)
    assert_near(by_row(buffer, "rewards"), PPO["rewards"])
    assert_near(by_row(buffer, "returns"), PPO["returns"])


def test_advantages_are_trls_before_and_after_whitening():
    raw = [[r - v for r, v in zip(*rows, strict=True)]
           for rows in zip(PPO["returns"], PPO["old_values"], strict=True)]
    assert_near(by_row(filled(whiten=False), "advantages"), raw)
    white = [[BESSEL * a for a in row] for row in PPO["advantages"]]
    assert_near(by_row(filled(whiten=True), "advantages"), white)


def test_losses_are_trls():
    stats, _, _ = stepped()
    assert stats.policy_loss == pytest.approx(BESSEL * PPO["loss"]["policy"], **NEAR)
    assert stats.value_loss == pytest.approx(PPO["stats"]["loss/value"], **NEAR)
    vf_coef = SETTINGS["vf_coef"]
    assert PPO["loss"]["value"] == pytest.approx(vf_coef * stats.value_loss, **NEAR)


def test_gradients_are_trls():
    gradients = PPO["gradients"]
    _, optimizer, _ = stepped()
    expected = [BESSEL * p + v for p, v in zip(*gradients.values(), strict=True)]
    assert optimizer.projected == pytest.approx(expected, **NEAR)
    _, optimizer, _ = stepped(vf_coef=0.0)
    assert optimizer.projected == pytest.approx([BESSEL * p for p in gradients["policy"]], **NEAR)
    assert max(map(abs, gradients["policy"])) > 0.05 < max(map(abs, gradients["value"]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("approxkl", "policy/approxkl"), ("clipfrac", "policy/clipfrac"),
        ("value_clipfrac", "val/clipfrac"), ("entropy", "policy/entropy"),
    ],
)
def test_statistics_of_the_step_are_trls(ours, theirs):
    stats, _, _ = stepped()
    assert getattr(stats, ours) == pytest.approx(PPO["stats"][theirs], **NEAR)
    assert PPO["stats"][theirs] > 0


def test_ratios_are_trls():
    stats, _, _ = stepped()
    ratios = flat(PPO["ratio"])
    assert stats.ratio == pytest.approx(fmean(ratios), **NEAR)
    assert stats.ratio_var == pytest.approx(pvariance(ratios), **NEAR)


def test_statistics_of_the_rollout_are_trls():
    stats, _, buffer = stepped()
    theirs = PPO["stats"]
    kl = kl_k1(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs"))
    assert float(kl.sum()) / 3 == pytest.approx(theirs["objective/kl"], **NEAR)
    entropy = -float(buffer.row_sums("old_logprobs").mean())
    assert entropy == pytest.approx(theirs["objective/entropy"], **NEAR)
    over_responses = theirs["ppo/mean_non_score_reward"] * TOKENS / 3
    assert stats.non_score_reward == pytest.approx(over_responses, **NEAR)


def test_kl_penalties_are_trls():
    old, ref = (torch.tensor(flat(PPO[name])) for name in ("old_logprobs", "ref_logprobs"))
    kinds = {"kl": kl_k1(old, ref), "abs": kl_k1(old, ref).abs(), "mse": kl_k2(old, ref)}
    for kind, ours in kinds.items():
        assert ours.tolist() == pytest.approx(flat(PPO["penalties"][kind]), **NEAR)


def test_the_full_kl_and_the_rewards_made_of_it_are_trls():
    """Both are sum_v p_v (log p_v - log q_v) over the whole vocabulary, p of the policy."""
    buffer, theirs = measured(full_kl=True), PPO["penalties"]["full"]
    assert_near(by_row(buffer, "full_kl"), theirs)
    assign_credit(buffer, config_of(kl_estimator="full"), KL_COEF)
    rewards = [[-KL_COEF * kl for kl in row] for row in theirs]
    for row, score in zip(rewards, SCORES, strict=True):
        row[-1] += score  # as TRL's compute_rewards does with any of its penalties
    assert_near(by_row(buffer, "rewards"), rewards)


def test_running_moments_are_trls():
    """Its deviation has Bessel's correction, as ours has; TRL rounds it to float32. A single score,
    of which that correction divides by 0, is not compared: ours is 1 there."""
    ours, seen = RunningMoments(), []
    for batch in reference.RUNNING_SCORES:
        ours.update(torch.tensor(batch))
        seen.append([ours.mean, ours.std])
    assert_near(seen, PPO["running_moments"])


def test_the_adaptive_coefficient_is_trls():
    ours = AdaptiveKL(KL_COEF, reference.TARGET, reference.HORIZON)
    coefs = []
    for kl, n in ((PPO["stats"]["objective/kl"], 3), (0.0, 3), (0.052, 8), (-1.0, 3)):
        ours.update(kl, n)
        coefs.append(ours.coef)
    assert coefs == pytest.approx(PPO["kl_coefs"], **NEAR)


# ---- what TRL does otherwise ---------------------------------------------------------------------


def test_whitened_rewards_are_trls_once_they_are_masked_again():
    rewards = torch.tensor(flat(PPO["rewards"]), dtype=torch.float64)
    theirs = torch.tensor(flat(PPO["whitened_rewards"]), dtype=torch.float64)
    ours, mean = masked_rescale(rewards, torch.ones(TOKENS, dtype=torch.bool)), rewards.mean()
    torch.testing.assert_close(ours, mean + BESSEL * (theirs - mean), rtol=0, atol=1e-5)

    rows = [torch.tensor(row, dtype=torch.float64) for row in PPO["whitened_rewards"]]
    values = [torch.tensor(row, dtype=torch.float64) for row in PPO["old_values"]]
    rewards, values = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, values))
    mask = torch.arange(4) < torch.tensor([[len(row)] for row in rows])
    credit = gae(rewards, values, mask, SETTINGS["gamma"], SETTINGS["lam"])
    returns = [row[here] for row, here in zip(credit.returns, mask, strict=True)]
    assert_near(returns, PPO["returns_of_whitened"])
    # The second row has no padding behind it, so what TRL leaves in the padding cannot reach it.
    leaked = PPO["returns_of_whitened_unmasked"]
    assert leaked[1] == pytest.approx(PPO["returns_of_whitened"][1], **NEAR)
    for row in (0, 2):
        assert abs(leaked[row][-1] - PPO["returns_of_whitened"][row][-1]) > 0.05


def test_trls_ratio_guard_hides_a_loss_that_there_is():
    assert PPO["guarded_policy_loss"] == 0
    assert PPO["unguarded_policy_loss"] == PPO["loss"]["policy"] != 0
    logprobs, old = (torch.tensor([flat(PPO[n])]) for n in ("logprobs", "old_logprobs"))
    advantages = torch.tensor([flat(PPO["advantages"])])
    loss = clipped_surrogate(logprobs, old, advantages, 0.2, 0.2).loss
    ours = float(masked_mean(loss, torch.ones_like(loss, dtype=torch.bool)))
    assert ours == pytest.approx(PPO["unguarded_policy_loss"], **NEAR)


def test_explained_variance_is_of_the_values_that_credit_was_made_of():
    stats, _, _ = stepped()
    returns, old, new = (flat(PPO[name]) for name in ("returns", "old_values", "values"))
    errors = [r - v for r, v in zip(returns, old, strict=True)]
    ours = 1 - pvariance(errors) / pvariance(returns)
    assert stats.explained_variance == pytest.approx(ours, **NEAR)
    squares = [(r - v) ** 2 for r, v in zip(returns, new, strict=True)]
    theirs = 1 - fmean(squares) / variance(returns)
    assert PPO["stats"]["ppo/val/var_explained"] == pytest.approx(theirs, **NEAR)
    assert abs(ours - theirs) > 0.04


# ---- the same numbers by hand --------------------------------------------------------------------


def test_trls_rewards_and_returns_by_hand():
    gamma, lam = SETTINGS["gamma"], SETTINGS["lam"]
    kl_sums, tokens = [], []
    for row in range(3):
        old, ref, values = (PPO[n][row] for n in ("old_logprobs", "ref_logprobs", "old_values"))
        kl = [o - r for o, r in zip(old, ref, strict=True)]
        rewards = [-KL_COEF * k for k in kl]
        kl_sums.append(sum(kl))
        tokens += rewards
        rewards[-1] += SCORES[row]
        assert PPO["rewards"][row] == pytest.approx(rewards, **NEAR)
        after = [*values[1:], 0.0]
        deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
        for t in range(len(values)):  # each advantage as its own sum, without a recursion
            ahead = enumerate(deltas[t:])
            advantage = sum((gamma * lam) ** step * delta for step, delta in ahead)
            assert PPO["returns"][row][t] == pytest.approx(advantage + values[t], **NEAR)
    assert PPO["stats"]["objective/kl"] == pytest.approx(fmean(kl_sums), **NEAR)
    assert PPO["stats"]["ppo/mean_scores"] == pytest.approx(fmean(SCORES), **NEAR)
    assert PPO["stats"]["ppo/std_scores"] == pytest.approx(stdev(SCORES), **NEAR)


def test_trls_losses_by_hand():
    names = ("logprobs", "old_logprobs", "values", "old_values", "returns", "advantages")
    rows = list(zip(*(flat(PPO[name]) for name in names), strict=True))
    raw = [r - v for _, _, _, v, r, _ in rows]
    policy_losses, value_losses, squares, clipped, value_clipped = [], [], [], 0, 0
    for (new, old, value, old_value, target, advantage), a in zip(rows, raw, strict=True):
        assert advantage == pytest.approx((a - fmean(raw)) / stdev(raw), **NEAR)
        ratio = math.exp(new - old)
        free, bounded = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)
        policy_losses.append(max(free, bounded))
        clipped += bounded > free
        near_old = min(max(value, old_value - 0.2), old_value + 0.2)
        plain, bounded = (value - target) ** 2, (near_old - target) ** 2
        value_losses.append(max(plain, bounded) / 2)
        value_clipped += bounded > plain
        squares.append((new - old) ** 2 / 2)
    stats = PPO["stats"]
    assert PPO["loss"]["policy"] == pytest.approx(fmean(policy_losses), **NEAR)
    assert PPO["loss"]["value"] == pytest.approx(0.1 * fmean(value_losses), **NEAR)
    assert stats["loss/total"] == pytest.approx(
        fmean(policy_losses) + 0.1 * fmean(value_losses), **NEAR
    )
    assert stats["policy/approxkl"] == pytest.approx(fmean(squares), **NEAR)
    assert stats["policy/clipfrac"] == pytest.approx(clipped / TOKENS, **NEAR)
    assert stats["val/clipfrac"] == pytest.approx(value_clipped / TOKENS, **NEAR)
    assert 0 < clipped < TOKENS and 0 < value_clipped < TOKENS


def distributions(phase: float) -> list[Tensor]:
    """(n, V) log-probs before each response token of each row, without a batch."""
    lm, out = language_model(phase), []
    with torch.no_grad():
        for query, response in zip(QUERIES, RESPONSES, strict=True):
            states = lm(torch.tensor([query + response]))[0]
            out.append(lm.logits(states).log_softmax(-1)[len(query) - 1 : -1])
    return out


def test_trls_full_kl_and_entropy_by_hand():
    for row, (old, ref) in enumerate(zip(distributions(OLD), distributions(REF), strict=True)):
        kl = (old.exp() * (old - ref)).sum(-1).tolist()
        assert PPO["penalties"]["full"][row] == pytest.approx(kl, **NEAR)
    entropies = [float(-(logs.exp() * logs).sum()) for logs in distributions(NEW)]
    assert PPO["stats"]["policy/entropy"] == pytest.approx(sum(entropies) / TOKENS, **NEAR)


def test_trls_adaptive_coefficient_by_hand():
    # -0.419 / 0.05 and 0 / 0.05 are far below 1: 1 - 0.2 · 3 / 40; then 0.04 · 8 / 40; then again
    first = KL_COEF * 0.985
    expected = [first, first * 0.985, first * 0.985 * 1.008, first * 0.985 * 1.008 * 0.985]
    assert PPO["kl_coefs"] == pytest.approx(expected, **NEAR)


def test_trls_running_moments_by_hand():
    seen: list[float] = []
    for batch, got in zip(reference.RUNNING_SCORES, PPO["running_moments"], strict=True):
        seen += batch
        assert got == pytest.approx([fmean(seen), stdev(seen)], **NEAR)


# ---- the reward model ----------------------------------------------------------------------------


def pairs(margin: bool) -> list[Pair]:
    return [
        Pair([], row["chosen_ids"], row["rejected_ids"], row["margin"] if margin else 0.0, "", {})
        for row in PAIRS
    ]


CASES = [("plain", False, 0.0), ("margin", True, 0.0), ("centred", True, reference.CENTER)]


@pytest.mark.parametrize(("name", "margin", "center"), CASES)
def test_reward_loss_metrics_and_gradient_are_trls(name, margin, center):
    theirs = REWARD[name]
    model = fill(RewardModel(language_model(NEW)), NEW)
    batch = collate_pairs(pairs(margin))
    scores = model(batch.tokens, batch.lengths)
    assert scores.tolist() == pytest.approx(theirs["scores"], **NEAR)
    loss = batch.loss(scores, center=center).mean()
    assert float(loss.detach()) == pytest.approx(theirs["loss"], **NEAR)
    gradient = [float(x) for x in reference.projected(model, loss)]
    assert gradient == pytest.approx(theirs["gradient"], **NEAR)
    metrics = score_metrics(*scores.detach().chunk(2), scores.detach())
    assert {n: metrics[n] for n in theirs["metrics"]} == pytest.approx(theirs["metrics"], **NEAR)
    assert theirs["metrics"].keys() == {
        "min_reward", "mean_reward", "max_reward", "accuracy", "margin"
    }


@pytest.mark.parametrize(("name", "margin", "center"), CASES)
def test_trls_reward_loss_by_hand(name, margin, center):
    scores, losses = REWARD[name]["scores"], []
    for chosen, rejected, row in zip(scores[:3], scores[3:], PAIRS, strict=True):
        gap = chosen - rejected - (row["margin"] if margin else 0.0)
        losses.append(math.log1p(math.exp(-gap)) + center * (chosen + rejected) ** 2)
    assert REWARD[name]["loss"] == pytest.approx(fmean(losses), **NEAR)
    wins = sum(c > r for c, r in zip(scores[:3], scores[3:], strict=True))
    assert REWARD[name]["metrics"]["accuracy"] == pytest.approx(wins / 3, **NEAR)


# ---- TRL itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [PPO, REWARD], ids=lambda kept: kept["trl"])
def test_the_trl_that_is_installed_gives_the_numbers_that_are_kept(kept):
    try:
        installed = version("trl")
    except PackageNotFoundError:
        installed = None
    if installed != kept["trl"]:
        pytest.skip(f"trl {kept['trl']} is not installed: see trl_reference.py")
    found = reference.compute()
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        assert leaves(found[name]) == pytest.approx(leaves(value), **NEAR), name


def leaves(value: object) -> list[float]:
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in leaves(value[key])]
    if isinstance(value, list):
        return [x for part in value for x in leaves(part)]
    return [value] if not isinstance(value, str) else []


# ---- reward functions ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.FUNCTIONS)
def test_reward_functions_are_called_and_read_as_trl_does(name):
    function, is_chat = reference.FUNCTIONS[name]
    batch = reference.FUNCTION_BATCH
    prompts = [reference.chat(p, "user") if is_chat else p for p in batch["prompts"]]
    found = function_reward(function, name)(Completions(
        prompts, [[1]] * 3, batch["completions"], batch["completion_ids"], ["eos"] * 3,
        {"answer": batch["answer"]},
    ))
    (part,) = found.parts.values()
    assert [None if math.isnan(r) else r for r in part.tolist()] == REWARD["functions"][name]
