"""A tiny policy, prompts, a reward, and a rollout made by hand, for the tests of PPO."""

import json
import math
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nan, nn

from minirlhf import streams
from minirlhf.batches.collect import sample
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, TokenPass, measure
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.evaluation.updates import PPOStats
from minirlhf.models import pretrained
from minirlhf.models.alignment import response_states
from minirlhf.models.config import ModelConfig
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.lora import add_lora
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.recipes import ppo as recipe
from minirlhf.run.checkpoint import TrainState, load_checkpoint
from minirlhf.run.meters import Step
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.policy import sampling_of
from minirlhf.setup.ppo_settings import PPOConfig
from tests.tiny_folders import save_lm, save_scorer, write_lines

T, F = True, False
f64 = torch.float64
PROMPTS = [
    Prompt(ids, "x", f"p:{i}", {}) for i, ids in enumerate([[3, 4], [5], [6, 7, 8, 9], [2, 2, 9]])
]


class Letters:
    """Ids 0 to 19 as letters; id 0 is eos and has no text."""

    eos_ids, vocab_size = (0,), 20

    def decode(self, ids):
        return "".join("_bcdefghijklmnopqrst"[i] for i in ids if i)

    def decode_after(self, before, ids):
        return self.decode(ids)

    def answer_text(self, prompt, prompt_ids, ids):
        return self.decode(ids)


def assert_close(got, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, equal_nan=True)


def config_of(**settings) -> PPOConfig:
    values = {
        "model": "m", "data": "d", "reward": ("r",), "out": "o", "batch_size": 4, "epochs": 2,
        "micro_batch_size": 2, "max_new_tokens": 6, "steps": 4, "learning_rate": 1e-2,
        "adam_epsilon": 1e-8,
    }
    return PPOConfig(**{**values, **settings})


def tiny_lm(dtype=torch.float32, **changes) -> CausalLM:
    shape = {
        "family": "llama", "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_positions": 64,
        "tied_embeddings": False,
    }
    lm = initialize(CausalLM(ModelConfig(**{**shape, **changes})), torch.Generator().manual_seed(3))
    with torch.no_grad():
        lm.lm_head.weight.mul_(8)  # a distribution that is neither flat nor certain
    return lm.to(dtype)


def tiny_policy(dtype=torch.float32) -> ValueHeadModel:
    policy = ValueHeadModel(tiny_lm(dtype))
    with torch.no_grad():
        policy.v_head.weight.copy_(torch.linspace(-0.1, 0.1, 32))
    return policy


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def letter_d(completions) -> Tensor:
    """A reward: how often a response holds the id 4."""
    return torch.tensor([float(ids.count(4)) for ids in completions.response_ids])


def state_of(policy: nn.Module, config: PPOConfig) -> TrainState:
    return TrainState(policy, make_optimizer(policy, config.learning_rate))


def steps_from(
    state: TrainState, config: PPOConfig, reward=letter_d, prompts=PROMPTS, tokenizer=None,
    ref="its own", mix=None, policy_loss=None,
) -> Iterator[Step]:
    """The loop of a run that goes on at the state's step; its reference is a `tiny_lm`."""
    if ref == "its own":
        ref = tiny_lm(next(state.model.parameters()).dtype)
    tokenizer = tokenizer or Letters()
    return recipe.ppo(state, prompts, reward, ref, tokenizer, config, mix, policy_loss)


def run_steps(config: PPOConfig, reward=letter_d, policy=None, **more):
    """Steps of a whole run from `tiny_policy`, and its state at the end."""
    state = state_of(policy or tiny_policy(), config)
    return list(steps_from(state, config, reward, **more)), state


# ---- a rollout that was sampled ------------------------------------------------------------------


def measured(policy, rows=2, tokens=99, ref=None, temperature=1.0) -> RolloutBuffer:
    """A sampled and measured rollout of 5 rows of unequal lengths."""
    prompts = [*PROMPTS, Prompt([5, 6], "y", "p:5", {})]
    keys = streams.key(0, "test", torch.arange(5))
    lm = tiny_lm(f64)  # the texts are those of one model, whatever the policy's dtype
    _, rollout = sample(lm, prompts, keys, sampling_of(config_of()), Letters(), 5)
    assert len(set(rollout.response_lengths.tolist())) > 2
    buffer = RolloutBuffer(rows, tokens)
    buffer.add(rollout._replace(scores=torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])))
    ref = tiny_lm(policy.v_head.weight.dtype) if ref is None else ref
    measure(policy, ref, buffer, temperature)
    return buffer


def plain_step(buffer: RolloutBuffer, policy: ValueHeadModel, more=None, **settings):
    """One step of gradient descent with rate 1: (minus the gradient, stats)."""
    config = config_of(**{"epochs": 1, "max_grad_norm": None, **settings})
    before, optimizer = parameters(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = recipe.ppo_step(policy, optimizer, buffer, config, **(more or {}))
    return parameters(policy) - before, stats


def by_row(buffer: RolloutBuffer, name: str) -> list[Tensor]:
    rows = {}
    for micro in buffer.micro_batches:
        for b, row in enumerate(micro.rows.tolist()):
            rows[row] = getattr(micro, name)[b][micro.response_mask[b]]
    return [rows[row] for row in sorted(rows)]


def assert_rows(buffer: RolloutBuffer, name: str, expected: list[list[float]]) -> None:
    for got, row in zip(by_row(buffer, name), expected, strict=True):
        assert_close(got, row)


def other_ref() -> CausalLM:
    ref = tiny_lm(f64)
    with torch.no_grad():
        ref.lm_head.weight.mul_(0.7)
    return ref


def full_distributions(policy, ref, buffer, temperature=1.0) -> list[Tensor]:
    """(N, V) log-probs of policy and reference at all response tokens, in the buffer's order."""
    both = []
    for lm in (policy.lm, ref):
        rows = []
        for micro in buffer.micro_batches:
            mask = micro.response_mask
            states = response_states(lm(micro.tokens), micro.prompt_lengths, mask.shape[1])
            rows.append((lm.logits(states[mask]) / temperature).log_softmax(-1))
        both.append(torch.cat(rows))
    return both


def gradient_of(policy, loss) -> Tensor:
    grads = torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True,
                                allow_unused=True)
    return torch.cat([g.flatten() for g in grads])


# ---- two rows by hand ----------------------------------------------------------------------------


class Table(nn.Module):
    """A policy whose log-probs and values are its parameters, one a cell."""

    critic = lm = None

    def __init__(self, logprobs, values, entropy):
        super().__init__()
        self.logprobs = nn.Parameter(torch.tensor(logprobs, dtype=f64))
        self.values = nn.Parameter(torch.tensor(values, dtype=f64))
        self.entropy = torch.tensor(entropy, dtype=f64)

    def gradient_groups(self) -> list[nn.Module]:
        return [self]


def table_pass(policy: Table, micro: Rollout, temperature: float) -> TokenPass:
    cells = (policy.logprobs, policy.entropy, policy.values)
    return TokenPass(*(x[micro.rows, : micro.response_mask.shape[1]] for x in cells))


def hand_buffer(micro_batch_size: int = 2) -> RolloutBuffer:
    """A response of two tokens and one of one; what lies outside the mask is NaN."""
    buffer = RolloutBuffer(micro_batch_size, 99)
    buffer.add(
        Rollout(
            rows=torch.arange(2),
            tokens=torch.tensor([[1, 2, 3], [4, 5, 0]]),
            prompt_lengths=torch.tensor([1, 1]),
            response_mask=torch.tensor([[T, T], [T, F]]),
            scores=torch.tensor([1.0, -1.0], dtype=f64),
            old_logprobs=torch.tensor([[-1.0, -2.0], [-0.5, nan]], dtype=f64),
            ref_logprobs=torch.tensor([[-1.5, -1.0], [-0.7, nan]], dtype=f64),
            old_values=torch.tensor([[0.2, 0.4], [0.1, nan]], dtype=f64),
        )
    )
    return buffer


def hand_config(**settings) -> PPOConfig:
    plain = {"gamma": 0.5, "lam": 0.5, "kl_coef": 0.1, "whiten_advantages": False, "epochs": 1}
    return config_of(**{**plain, "max_grad_norm": None, **settings})


def moved_table() -> Table:
    """Ratios 1.5, 0.5 and 0.5; values 0.5, 0.8 and 0.1."""
    logprobs = [[-1 + math.log(1.5), -2 + math.log(0.5)], [-0.5 + math.log(0.5), 0.0]]
    return Table(logprobs, [[0.5, 0.8], [0.1, 0.0]], [[1.0, 2.0], [3.0, nan]])


class HandStep(NamedTuple):
    stats: PPOStats
    logprobs: Tensor  # (2, 2) what was added to them: minus the gradient at rate 1
    values: Tensor
    counters: dict[str, int]


def hand_step(
    config: PPOConfig, policy: Table | None = None, buffer: RolloutBuffer | None = None,
    rate: float = 1.0, passes=table_pass, optimizer=torch.optim.SGD, **more,
) -> HandStep:
    """One ppo_step of a table, `moved_table` if none is given, on the hand-made rollout."""
    policy, buffer, counters = policy or moved_table(), buffer or hand_buffer(), {}
    before = policy.logprobs.detach().clone(), policy.values.detach().clone()
    chosen = optimizer(policy.parameters(), lr=rate)
    with mock.patch.object(recipe, "policy_pass", passes):
        stats = recipe.ppo_step(policy, chosen, buffer, config, counters=counters, **more)
    return HandStep(
        stats, policy.logprobs.detach() - before[0], policy.values.detach() - before[1], counters
    )


# ---- folders and a command line ------------------------------------------------------------------

SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "eos_token_id": 0,
}
REWARD = """
def vowels(completions, prompts, bonus):
    pairs = zip(completions, bonus, strict=True)
    return [sum(c in "aeiou" for c in text) + more for text, more in pairs]

def letters(completions):
    return [sum(ord(c) % 7 for c in text) for text in completions]

def broken(completions):
    return [float("nan") if len(completions) > 2 else 0.0] * len(completions)  # tried on two
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a policy, another policy and a reward model; prompts; a file of rewards."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("policy", "other", "reward"):
        train_tokenizer([], 258, folder / name)
    ends = {"eos_token_id": [0, 67], "top_k": 50}
    (folder / "policy" / "generation_config.json").write_text(json.dumps(ends))
    save_lm(folder / "policy", SHAPE, 0)
    save_lm(folder / "other", SHAPE, 1)
    save_scorer(folder / "reward", SHAPE, 2, 2)
    rows = [{"prompt": "The film" + "!" * i, "bonus": i / 8} for i in range(5)]
    write_lines(folder / "prompts.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(world, out, *flags: str, **settings) -> list[str]:
    values = {
        "model": world / "policy", "data": world / "prompts.jsonl", "out": out,
        "reward": f"{world / 'reward.py'}:vowels", "steps": 4, "save_every": 2, "batch_size": 4,
        "micro_batch_size": 2, "epochs": 2, "mini_batches": 2, "max_new_tokens": 5,
        "learning_rate": 1e-2, "kl_target": 0.1, "kl_horizon": 20, "sample_every": 3,
        "sample_prompts": 2, "log_every": 3, **settings,
    }
    return ["ppo", *flags] + [w for k, v in values.items() for w in (f"--{k}", str(v))]


def policy_at(out, step: int, world, lora: int = 0) -> ValueHeadModel:
    """The policy of a checkpoint."""
    policy = ValueHeadModel(pretrained.load_pretrained(world / "policy"))
    if lora:
        add_lora(policy, lora, 32.0, 0)
    load_checkpoint(state_of(policy, config_of()), out / "checkpoints" / f"step-{step:08d}")
    return policy
