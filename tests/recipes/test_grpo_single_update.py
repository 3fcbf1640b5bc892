"""A single update needs no pass that measures the policy, and goes as it would with one."""

import pytest
import torch

from minirlhf.batches import rollouts
from minirlhf.batches.rollouts import measure_lm
from minirlhf.recipes import grpo as recipe
from tests.recipes.test_grpo import config_of, credited, hand_step, run_steps, state_of, steps_from
from tests.tiny_ppo import hand_buffer, tiny_lm

ONE = {"epochs": 1, "mini_batches": 1, "micro_batch_size": 2, "save_rollouts": True}


def always(policy, ref, buffer, config, iteration):
    """Measures the policy whether it is needed or not."""
    measure_lm(policy, ref, buffer, config.temperature)


def spared_passes(monkeypatch, **settings):
    """The passes without a gradient of each step of a run: (of the policy, of the reference)."""
    config, passes = config_of(**{**ONE, "steps": 2, **settings}), []
    state, ref = state_of(tiny_lm(), config), tiny_lm()
    plain = rollouts.lm_pass

    def counted(lm, micro, temperature):
        if not torch.is_grad_enabled():
            passes[-1]["policy" if lm is state.model else "ref"] += 1
        return plain(lm, micro, temperature)

    monkeypatch.setattr(rollouts, "lm_pass", counted)
    passes.append({"policy": 0, "ref": 0})
    for _ in steps_from(state, config, ref=ref):
        passes.append({"policy": 0, "ref": 0})
    return [tuple(each.values()) for each in passes[:2]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"kl_coef": 0.0}, {"policy_loss": "gspo", "loss_mean": "sequence"}, {"advantage": "rloo"},
     {"advantage": "reinforce++"}, {"policy_loss": "cispo", "top_k": 8}, {"resample": 1}],
)
def test_a_single_update_without_measuring_the_policy_is_the_same_to_the_last_bit(
    settings, monkeypatch
):
    runs = []
    for measure in (recipe.measure_rollout, always):
        monkeypatch.setattr(recipe, "measure_rollout", measure)
        lm = tiny_lm()
        steps, _ = run_steps(config_of(**ONE, **settings), lm=lm)
        weights = torch.cat([p.detach().flatten() for p in lm.parameters()])
        runs.append((weights, [(step.metrics, step.samples) for step in steps]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert all(row["old_logprobs"] for _, rows in runs[0][1] for row in rows)
    assert not torch.equal(runs[0][0], torch.cat([p.detach().flatten()
                                                  for p in tiny_lm().parameters()]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(4, 4), (0, 4)]),  # 8 rows in micro-batches of 2; step 1 checks the first KL
        ({"mini_batches": 2}, [(4, 4), (4, 4)]),  # the second update needs the old log-probs
        ({"epochs": 2}, [(4, 4), (4, 4)]),
        ({"kl_in": "reward", "kl_estimator": "k1"}, [(4, 4), (4, 4)]),
        ({"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.0, "ref": "r"}, [(0, 4), (0, 4)]),
    ],
)
def test_the_policy_is_measured_only_where_its_log_probs_are_needed_first(
    settings, expected, monkeypatch
):
    assert spared_passes(monkeypatch, **settings) == expected


def test_several_updates_of_a_rollout_that_was_not_measured_are_refused(monkeypatch):
    buffer = credited(micro_batch_size=1)
    buffer.map(lambda micro: micro._replace(old_logprobs=None))
    for settings in ({"mini_batches": 2, "micro_batch_size": 1}, {"epochs": 2}):
        with pytest.raises(ValueError, match="no old_logprobs: measure it, or make one update"):
            hand_step(monkeypatch, buffer, **settings)


def test_renew_puts_micro_batches_in_the_place_of_those_they_were_made_of():
    buffer = hand_buffer(micro_batch_size=1)
    shuffled = buffer.micro_batches[::-1]
    new = [micro._replace(scores=micro.scores + 1) for micro in shuffled]
    buffer.renew(shuffled, new)
    assert buffer.micro_batches[0] is new[1] and buffer.micro_batches[1] is new[0]
