"""What can be shown of a GPU without one: on a test device every recipe runs as on the CPU.

The device is in `tests/elsewhere.py`. It refuses tensors of two devices in one operation; as an
Apple GPU float64 too, and operations that torch has no kernel for there.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch

from minirlhf import streams
from minirlhf.batches.responses import ref_logprobs
from minirlhf.data.examples import Text
from minirlhf.evaluation.dpo import evaluate_direct
from minirlhf.evaluation.reward import evaluate_preferences
from minirlhf.models.generation import decode_steps, generate
from minirlhf.models.lora import add_lora, base_of
from minirlhf.models.sampling import Sampling
from minirlhf.recipes.distill import distill
from minirlhf.recipes.dpo import dpo
from minirlhf.recipes.grpo import grpo
from minirlhf.recipes.reward import reward
from minirlhf.recipes.sft import evaluate as evaluate_sft
from minirlhf.recipes.sft import sft
from minirlhf.rewards.model import score_texts
from minirlhf.run.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.dpo import objective_of
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.tools.selftest.checks import CHECKS
from minirlhf.tools.selftest.compare import compare
from minirlhf.tools.selftest.tiny import Place
from tests import tiny_dpo, tiny_ppo, tiny_reward
from tests.elsewhere import Elsewhere, There
from tests.tiny_ppo import PROMPTS, Letters, letter_d, tiny_lm

IDS = [prompt.ids for prompt in PROMPTS]
KEYS = streams.key(0, "test", torch.arange(len(PROMPTS)))
SAMPLINGS = {
    "plain": {}, "greedy": {"temperature": 0.0}, "penalised": {"repetition_penalty": 1.2},
    "late eos": {"min_new_tokens": 3}, "stop strings": {"stop_strings": ("d",)},
    "truncated": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
}


# ---- the device itself ---------------------------------------------------------------------------


def test_a_tensor_of_the_cpu_meets_one_of_the_device_as_a_scalar_only():
    with Elsewhere("cuda") as there:
        x = torch.ones(3, device="cuda")
        assert isinstance(x, There) and x.device == torch.device("cuda:0") and not x.is_cpu
        assert (x * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]
        for mixing in (
            lambda: x + torch.ones(3), lambda: x[torch.tensor([0])],
            lambda: torch.ones(3).add_(x), lambda: torch.ones(3)[x.long()],
            lambda: torch.stack((x, torch.ones(3))),
        ):
            with pytest.raises(RuntimeError, match="tensors of two devices"):
                mixing()
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            x.normal_(generator=torch.Generator())
    assert there.reads == ["tolist"]


def test_an_apple_gpu_has_no_float64_and_no_kernel_for_some_operations():
    with Elsewhere("mps"):
        x = torch.ones(3, device="mps")
        for wide in (lambda: x.double(), lambda: torch.ones(3, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="float64, which mps:0 does not have"):
                wide()
        with pytest.raises(NotImplementedError, match="geqrf has no kernel for mps:0"):
            torch.geqrf(x[None])
        assert x.cpu().double().tolist() == [1.0, 1.0, 1.0]


def test_what_makes_the_host_wait_is_counted():
    with Elsewhere("cuda") as there:
        x = torch.tensor([1.0, 0.0], device="cuda")
        before = there.uploads
        x.tolist(), x.sum().item(), bool(x.any()), x.cpu(), x.nonzero(), x[x > 0]
        assert there.uploads == before == 1
    assert there.reads == ["tolist", "_local_scalar_dense", "_local_scalar_dense", "_to_copy",
                           "nonzero", "index by a mask"]


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_decoding_step_is_read_off_the_device_once(name):
    sampling = Sampling(8, **SAMPLINGS[name])
    expected = generate(tiny_lm(), IDS, sampling, [0], KEYS, Letters().decode_after)
    with Elsewhere("mps") as there:
        lm = tiny_lm().to("mps")
        made = generate(lm, IDS, sampling, [0], KEYS, Letters().decode_after)
        rows, reads, uploads = [], [], []
        for step in decode_steps(lm, IDS, sampling, [0], KEYS, Letters().decode_after):
            rows.append(len(step.rows))
            reads.append(list(there.reads))
            uploads.append(there.uploads)
            there.reads.clear()
    assert torch.equal(made.tokens, expected.tokens)
    assert made.finish_reason == expected.finish_reason
    torch.testing.assert_close(made.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    if name in ("truncated", "late eos"):
        assert torch.equal(made.support.counts, expected.support.counts)
        assert torch.equal(torch.cat(made.support.rows), torch.cat(expected.support.rows))
    assert reads[1:] == [["tolist"]] * (len(rows) - 1)
    assert rows[-1] < len(PROMPTS) or name in ("greedy", "late eos", "truncated")
    # Copied to it are the numbers of the rows that go on, where some have ended.
    ended = [before > after for before, after in pairwise(rows)]
    copied = [after - before for before, after in pairwise(uploads)]
    assert copied == [int(some) for some in ended]


# ---- recipes -------------------------------------------------------------------------------------

SMALL = {"batch_size": 4, "micro_batch_size": 2, "max_new_tokens": 3, "steps": 1,
         "learning_rate": 1e-2, "adam_epsilon": 1e-4}
TEXTS = [Text([1, 2, 3, 4, 5], 2, "t:1", {}), Text([6, 7, 8], 0, "t:2", {})]


def adapted(model):
    return add_lora(model, 2, 4.0, 0)


def of_sft(device):
    lm = adapted(tiny_lm()).to(device)
    config = SFTConfig(batch_size=2, steps=2, lora_rank=2, lora_dropout=0.25, learning_rate=1e-2)
    return lm, lambda state: sft(state, TEXTS, config), lambda: evaluate_sft(lm, TEXTS)


def of_reward(device):
    model = tiny_reward.tiny_model(torch.float32, heads=2).to(device)
    config = RewardConfig(batch_size=3, steps=2, center_rewards_coefficient=0.1, learning_rate=0.01)

    def evaluate():
        found = [evaluate_preferences(model, rows).metrics
                 for rows in (tiny_reward.PAIRS, tiny_reward.LISTS)]
        score = float(score_texts(model, [[1, 2], [3]]).sum())
        return found[0] | {f"list {name}": x for name, x in found[1].items()} | {"score": score}

    return model, lambda state: reward(state, tiny_reward.PAIRS, config), evaluate


def of_dpo(device):
    lm, ref = (tiny_dpo.tiny_lm(dtype=torch.float32).to(device) for _ in range(2))
    config = DPOConfig(batch_size=3, steps=2, learning_rate=1e-3, sft_coef=0.1)
    ref = partial(ref_logprobs, ref.requires_grad_(False))

    def evaluate():
        return evaluate_direct(lm, tiny_reward.LISTS, ref, objective_of(config), 99).metrics

    return lm, lambda state: dpo(state, tiny_reward.PAIRS, ref, config), evaluate


def of_grpo(device, **settings):
    lm = tiny_lm().to(device)
    config = GRPOConfig(**{**SMALL, "model": "m", "data": "d", "reward": ("r",), "out": "o",
                           "batch_size": 2, "samples_per_prompt": 4, "mini_batches": 2,
                           "kl_coef": 0.1, **settings})
    ref = tiny_lm().to(device)
    return lm, lambda state: grpo(state, PROMPTS, letter_d, ref, Letters(), config), dict


def of_ppo(device, **settings):
    policy = tiny_ppo.tiny_policy()
    if settings.get("lora_rank"):
        adapted(policy.lm)
    policy.to(device)
    ref = base_of(policy.lm) if settings.get("lora_rank") else tiny_lm().to(device)
    config = tiny_ppo.config_of(**{**SMALL, **settings})
    return policy, lambda state: tiny_ppo.steps_from(state, config, ref=ref), dict


def of_distill(device):
    lm, teacher = tiny_lm().to(device), tiny_ppo.tiny_lm(num_layers=1).to(device)
    config = DistillConfig(**SMALL, model="m", teacher="t", data="d", out="o", gkd_beta=0.3)
    return lm, lambda state: distill(state, PROMPTS, teacher, Letters(), config), dict


RUNS = {
    "sft": of_sft, "reward": of_reward, "dpo": of_dpo, "grpo": of_grpo, "ppo": of_ppo,
    "distill": of_distill,
    "grpo truncated": partial(of_grpo, top_k=5, mini_batches=1),
    "ppo full kl": partial(of_ppo, kl_estimator="full", top_p=0.9, lora_rank=2),
}


def trained(make, device: str) -> tuple[torch.nn.Module, list[dict], dict]:
    """The model after a run, the metrics of its steps, and what the evaluation says."""
    model, steps_of, evaluate = make(device)
    state = TrainState(model, make_optimizer(model, 1e-2, eps=1e-4))
    return state, [step.metrics for step in steps_of(state)], evaluate()


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_runs_on_another_device_as_on_the_cpu(name):
    plain, expected, told = trained(RUNS[name], "cpu")
    with Elsewhere("mps"):
        state, metrics, found = trained(RUNS[name], "mps")
        weights = {n: p.detach().cpu() for n, p in state.model.named_parameters()}
        assert all(isinstance(p, There) for p in state.model.parameters())
    assert metrics == [pytest.approx(step, rel=1e-3, abs=1e-4) for step in expected]
    assert found == pytest.approx(told, rel=1e-3, abs=1e-4)
    for n, p in plain.model.named_parameters():
        torch.testing.assert_close(weights[n], p.detach(), rtol=0, atol=1e-4)


def test_a_run_on_another_device_resumes_from_a_checkpoint(tmp_path):
    """And one of the CPU may go on there: files do not tell where their tensors were."""
    _, (first, second), _ = trained(partial(of_ppo, steps=2), "cpu")
    with Elsewhere("mps"):
        model, steps_of, _ = of_ppo("mps", steps=2)
        state = TrainState(model, make_optimizer(model, 1e-2, eps=1e-4))
        assert next(steps_of(state)).metrics == pytest.approx(first, rel=1e-3, abs=1e-4)
        commit = save_checkpoint(state, tmp_path)
        model, steps_of, _ = of_ppo("mps", steps=2)
        state = TrainState(model, make_optimizer(model, 1e-2, eps=1e-4))
        load_checkpoint(state, commit)
        assert all(isinstance(p, There) for p in state.model.parameters())
        assert next(steps_of(state)).metrics == pytest.approx(second, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("check", [name for name in CHECKS if "PPO" not in name])
def test_selftest_agrees_on_another_device(check, tmp_path):
    with Elsewhere("mps"):
        found = compare(check, Place("mps", torch.float32, tmp_path))
    assert found.agrees, found
