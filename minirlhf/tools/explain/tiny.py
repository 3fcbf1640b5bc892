"""The demo's model, made anew in memory: something to explain where no run is given.

The package holds no weights, so a model of the demo's shape reads some of the demo's reviews for a
few seconds; then one step of each algorithm is taken with it. Everything is a function of the seeds
below: two calls on one machine show the same numbers.
"""

import copy
import tempfile
from functools import cache, partial
from typing import NamedTuple

import torch

from minirlhf import streams
from minirlhf.batches.collect import replay_rows
from minirlhf.batches.credit import assign_group_credit
from minirlhf.batches.demonstrations import collate_texts, target_stats
from minirlhf.batches.responses import ref_logprobs, response_stats, texts_of
from minirlhf.batches.rollouts import RolloutBuffer, TokenPass, lm_pass, policy_pass
from minirlhf.data.examples import Pair, Prompt, Text
from minirlhf.data.tokenizer import Tokenizer, train_tokenizer
from minirlhf.evaluation.dpo import evaluate_direct
from minirlhf.evaluation.reward import evaluate_preferences, pair_rows
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.recipes import dpo, grpo, ppo, reward
from minirlhf.rewards.source import Completions, as_scores
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.dpo import objective_of
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.tools.demo import film_data, film_judge, film_world
from minirlhf.tools.explain.record import Record, Update
from minirlhf.tools.explain.settings import ExplainConfig

SEED = 0
TEXTS, STEPS, BATCH_SIZE, LEARNING_RATE = 720, 60, 12, 4e-3  # what the model reads first
PAIRS = 32
POLICY = {  # of both algorithms that sample
    "model": "", "data": "", "reward": ("",), "out": "", "max_new_tokens": 32, "seed": SEED,
    "epochs": 1, "mini_batches": 1, "micro_batch_size": 16,
}
PPO = PPOConfig(**POLICY, steps=3, batch_size=16, kl_coef=0.1, value_clip=None,
                learning_rate=1e-3)
GRPO = GRPOConfig(**POLICY, steps=2, batch_size=4, samples_per_prompt=4, learning_rate=2e-4)
REWARD = RewardConfig(model="", data="", out="", steps=4, batch_size=8, learning_rate=1e-3)
DPO = DPOConfig(model="", data="", out="", steps=4, batch_size=8, learning_rate=3e-4)


def record(asked: ExplainConfig) -> Record:
    """A step of the algorithm, taken by a copy of the model."""
    make_deterministic("cpu")
    start = {"ppo": ppo_record, "grpo": grpo_record, "reward": reward_record, "dpo": dpo_record}
    return start[asked.algorithm](asked.sample)


class World(NamedTuple):
    tokenizer: Tokenizer
    lm: CausalLM
    prompts: list[Prompt]


@cache
def world() -> World:
    """A tokenizer and a model that have read some of the demo's reviews, and prompts."""
    texts = film_world.reviews(TEXTS, SEED)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, 1024, folder)
    config = film_data.MODEL | {"vocab_size": tokenizer.vocab_size, "eos_token_id": 0}
    lm = initialize(CausalLM(config_from_hf(config)), streams.generator(SEED, "explain"))
    rows = [Text([*tokenizer.encode(t), *tokenizer.eos_ids], 0, "", {}) for t in texts]
    optimizer = make_optimizer(lm, LEARNING_RATE)
    for step in range(STEPS):
        batch = collate_texts(rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        optimizer.zero_grad()
        (-target_stats(lm, batch).logprobs.mean()).backward()
        optimizer.step()
    prompts = [Prompt(tokenizer.encode(p), p, "", {}) for p in film_world.prompts(32, SEED)]
    return World(tokenizer, lm.requires_grad_(False), prompts)


def trainable() -> CausalLM:
    return copy.deepcopy(world().lm).requires_grad_(True)


def opinion(completions: Completions) -> torch.Tensor:
    """How much each review praises its film: the largest part of the demo's true score."""
    both = zip(completions.prompts, completions.completions, strict=True)
    return torch.tensor([film_judge.opinion(prompt + text)[0] for prompt, text in both])


def update_of(passes: list[TokenPass], buffer: RolloutBuffer, sample: int) -> Update | None:
    """The sample's log-probs and values in passes over the buffer's micro-batches."""
    for made, micro in zip(passes, buffer.micro_batches, strict=True):
        for b, row in enumerate(micro.rows.tolist()):
            if row == sample:
                mask = micro.response_mask[b]
                values = None if made.values is None else made.values[b][mask].tolist()
                return Update(made.logprobs[b][mask].tolist(), values)
    return None


# ------------------------------------------------------------------------------------ algorithms


def ppo_record(sample: int) -> Record:
    """The second pass over the third rollout: the policy has left its reference by then."""
    tokenizer, ref, prompts = world()
    policy = ValueHeadModel(trainable())
    state = TrainState(policy, make_optimizer(policy, PPO.learning_rate))
    for step in ppo.ppo(state, prompts, opinion, ref, tokenizer, PPO):
        if step.number == PPO.steps - 1:
            break
    completions, rollout = ppo.sample_rollout(state, prompts, tokenizer, PPO)
    given = as_scores(opinion(completions), completions, "explain")
    *_, rollout = ppo.score_rollout(state, rollout, given, PPO, None, "explain")
    buffer, _ = ppo.measure_rollout(policy, ref, rollout, PPO, state.step)
    ppo.ppo_step(policy, state.optimizer, buffer, PPO, state.step)
    with torch.no_grad():
        passes = [policy_pass(policy, micro, PPO.temperature) for micro in buffer.micro_batches]
    return rollout_record(PPO, completions, buffer, passes, sample)


def grpo_record(sample: int) -> Record:
    """The second pass over the second rollout, likewise."""
    tokenizer, ref, prompts = world()
    policy = trainable()
    state = TrainState(policy, make_optimizer(policy, GRPO.learning_rate))
    for step in grpo.grpo(state, prompts, opinion, ref, tokenizer, GRPO):
        if step.number == GRPO.steps - 1:
            break
    completions, rollout = grpo.sample_groups(state, prompts, tokenizer, GRPO, 0, GRPO.batch_size)
    _, scores, rollout = grpo.score_groups(opinion, GRPO, None, "explain", completions, rollout)
    buffer = RolloutBuffer(GRPO.micro_batch_size, GRPO.micro_batch_tokens)
    buffer.add(rollout, GRPO.samples_per_prompt)
    grpo.measure_rollout(policy, ref, buffer, GRPO, 1)
    assign_group_credit(buffer, scores, GRPO)
    grpo.grpo_step(policy, state.optimizer, buffer, GRPO, state.step)
    with torch.no_grad():
        passes = [lm_pass(policy, micro, GRPO.temperature) for micro in buffer.micro_batches]
    return rollout_record(GRPO, completions, buffer, passes, sample)


def rollout_record(
    config: object, completions: Completions, buffer: RolloutBuffer, passes: list[TokenPass],
    sample: int,
) -> Record:
    rows = [{"step": config.steps} | row for row in replay_rows(completions, buffer)]
    update = update_of(passes, buffer, sample)
    return Record("explain", config, rows, sample, world().tokenizer, update, example=True)


def pairs_of(tokenizer: Tokenizer) -> list[Pair]:
    """Pairs of reviews that begin with one opening, as a noisy rater prefers them."""
    made = []
    for row in film_judge.preferences(PAIRS, SEED):
        texts = [[*tokenizer.encode(row[side]), *tokenizer.eos_ids]
                 for side in ("chosen", "rejected")]
        same = [a == b for a, b in zip(*texts, strict=False)]
        shared = same.index(False) if False in same else 0
        ids = texts[0][:shared], texts[0][shared:], texts[1][shared:]
        if all(ids):
            made.append(Pair(*ids, row["margin"], "explain", {}))
    return made


def reward_record(sample: int) -> Record:
    tokenizer, pairs = world().tokenizer, pairs_of(world().tokenizer)
    model = RewardModel(trainable())
    initialize_score(model, streams.generator(SEED, "reward head"))
    state = TrainState(model, make_optimizer(model, REWARD.learning_rate))
    for _ in reward.reward(state, pairs, REWARD):
        pass
    result = evaluate_preferences(model, pairs, 4096)
    rows = [{"step": REWARD.steps} | row for row in pair_rows(result, tokenizer, -1)]
    return Record("explain", REWARD, rows, sample, tokenizer, example=True)


def dpo_record(sample: int) -> Record:
    tokenizer, ref = world().tokenizer, world().lm
    pairs, policy = pairs_of(tokenizer), trainable()
    state = TrainState(policy, make_optimizer(policy, DPO.learning_rate))
    of_ref = partial(ref_logprobs, ref)
    for _ in dpo.dpo(state, pairs, of_ref, DPO):
        pass
    result = evaluate_direct(policy, pairs, of_ref, objective_of(DPO))
    rows = [{"step": DPO.steps} | row for row in pair_rows(result, tokenizer, -1)]
    if sample < len(pairs):
        with torch.no_grad():
            texts = collate_texts(texts_of(pairs[sample]))  # chosen, rejected
            found = [x.tolist() for lm in (policy, ref)
                     for x in (response_stats(lm, texts).logprobs,)]
        rows[sample]["logprobs"] = [*found[0], *found[1]]
    return Record("explain", DPO, rows, sample, tokenizer, example=True)
