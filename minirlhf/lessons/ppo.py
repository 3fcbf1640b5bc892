"""PPO for language models on one page, from the prompts to `optimizer.step()`.

    python minirlhf/lessons/ppo.py MODEL DATA REWARD OUT [STEPS]

MODEL is a language model's Hugging Face folder, DATA a file of prompts, REWARD a reward model's
folder, `file.py:function` or `math`, OUT takes the aligned model. This is `minirlhf ppo` with
default settings on a CPU, to the last bit of the weights.

An iteration has five parts. Sample: the policy answers B prompts. Score: the reward says how good
each response is. Measure: policy, critic and reference are read at each response token. Credit:
each token gets an advantage. Update: several passes raise the probability of tokens that were
better than expected.

Shapes: B prompts of an iteration, b rows of a micro-batch, R tokens of the longest response. Column
t of a (b, R) tensor belongs to response token a_t and to the state before it, s_t.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch

from minirlhf import streams
from minirlhf.batches.collect import columns_of, sample, with_scores
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, measure, policy_pass
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt, load_prompts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.kl import kl_k1
from minirlhf.equations.masking import masked_standardize, masked_sum
from minirlhf.equations.policy import clipped_surrogate, clipped_value_loss
from minirlhf.errors import BAD_INPUT, UserError, run
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.pretrained import load_pretrained, load_reward_model
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.load import load_reward
from minirlhf.rewards.parse import RewardSourceSettings
from minirlhf.rewards.source import RewardSource, as_scores
from minirlhf.run.machine import make_deterministic
from minirlhf.run.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from minirlhf.setup.common import write_model

SEED = 0
STEPS = 100  # iterations
BATCH_SIZE = 64  # B, prompts of an iteration
MAX_NEW_TOKENS = 64
TEMPERATURE = 1.0
EPOCHS = 4  # passes over each rollout, one optimizer step each
MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS = 8, 4096  # most rows, most tokens (padding too) in a pass
KL_COEF = 0.05  # beta, reward units per nat
GAMMA, LAM = 1.0, 0.95
CLIP = 0.2  # epsilon, of the ratio to either side
VALUE_CLIP, VF_COEF = 0.2, 0.1  # the clip is in reward units
LEARNING_RATE, ADAM_EPSILON = 3e-6, 1e-5  # at the start; the rate falls linearly to 0
CRITIC_LR_SCALE = 10.0  # the value head starts from zero, on a trunk that is trained already
MAX_GRAD_NORM = 1.0


def ppo(
    policy: ValueHeadModel, ref: CausalLM, prompts: list[Prompt], reward: RewardSource,
    tokenizer: Tokenizer, steps: int,
) -> None:
    """Raises the reward of the policy's responses, at a price for each nat that it moves away from
    the reference. Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022 (arXiv:2203.02155).
    """
    optimizer = make_optimizer(  # AdamW (arXiv:1711.05101)
        policy, LEARNING_RATE, eps=ADAM_EPSILON,
        critic=policy.value_parameters(), critic_lr_scale=CRITIC_LR_SCALE,
    )
    for iteration in range(steps):
        set_learning_rate(optimizer, learning_rate(iteration, steps, LEARNING_RATE, 0, "linear"))

        # Sample. Each row has a random key of its own, so its text does not depend on its batch.
        rows = next_rows(iteration * BATCH_SIZE, BATCH_SIZE, len(prompts), SEED)
        keys = streams.key(SEED, "rollout", iteration, rows, torch.arange(BATCH_SIZE))
        completions, rollout = sample(
            policy.lm, [prompts[i] for i in rows.tolist()], keys,
            Sampling(MAX_NEW_TOKENS, TEMPERATURE), tokenizer, rows_at_once=256,
            columns=columns_of(prompts),  # the data's other fields, for reward functions
        )

        # Score: one number per response (or per token, where a reward function gives these).
        scores = as_scores(reward(completions), completions, f"step {iteration + 1}")
        rollout = with_scores(rollout, scores)

        # Measure. old_logprobs are not those of decoding, which differ by rounding: `policy_pass`,
        # which also trains, computes them anew on the micro-batches of training. So before the
        # first optimizer.step() every ratio pi / pi_old is exactly 1, and nothing is clipped.
        buffer = RolloutBuffer(MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS)
        buffer.add(rollout)
        measure(policy, ref, buffer, TEMPERATURE)

        # Credit.
        buffer.map(assign_credit)
        buffer.over_all("advantages", masked_standardize)  # mean 0, std 1 over the whole rollout

        # Update. Each token weighs the same, so a long response weighs more than a short one.
        for epoch in range(EPOCHS):
            (mini_batch,) = buffer.minibatches(1, SEED, iteration, epoch)  # all of it, shuffled
            tokens = sum(int(micro.response_mask.sum()) for micro in mini_batch)
            optimizer.zero_grad()
            for micro in mini_batch:
                loss = masked_sum(ppo_loss(policy, micro), micro.response_mask) / tokens
                loss.backward()
            clip_gradients(policy, MAX_GRAD_NORM, f"step {iteration + 1}")
            optimizer.step()
        kl = kl_k1(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs")).sum() / BATCH_SIZE
        mean = scores.sums.mean()  # like the KL, of the policy before this update
        print(f"step {iteration + 1}  scores {mean:.4f}  kl {kl:.4f} nats per response")


def assign_credit(micro: Rollout) -> Rollout:
    """From one score per response to an advantage and a return for each of its tokens."""
    # k1 = log pi(a_t | s_t) - log pi_ref(a_t | s_t), whose mean over samples is the KL.
    # Schulman 2020, "Approximating KL divergence"
    kl = kl_k1(micro.old_logprobs, micro.ref_logprobs)  # (b, R) nats

    # r_t = -beta kl_t, and the score on the last token. Ziegler et al. 2019, eq. 2
    rewards = token_rewards(micro.scores, kl, micro.response_mask, KL_COEF)  # (b, R)
    if micro.given_rewards is not None:
        rewards = rewards + micro.given_rewards

    # A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    # Schulman et al. 2016 (arXiv:1506.02438), eq. 16; the return A_t + V(s_t) is V's target.
    # V after the last token is 0, also where MAX_NEW_TOKENS truncated the response: a reward model
    # scores such a response without eos, and nothing is taken off its score.
    credit = gae(rewards, micro.old_values, micro.response_mask, GAMMA, LAM)
    return micro._replace(
        rewards=rewards, advantages=credit.advantages, returns=credit.returns
    )


def ppo_loss(policy: ValueHeadModel, micro: Rollout) -> torch.Tensor:
    """(b, R): the loss of each response token, unreduced: minus eq. 9 of Schulman et al. 2017
    (arXiv:1707.06347), without its entropy bonus; its c_1 is VF_COEF / 2."""
    new = policy_pass(policy, micro, TEMPERATURE)  # log-probs and values under today's weights

    # -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A): no gain from moving far. Eq. 7
    surrogate = clipped_surrogate(new.logprobs, micro.old_logprobs, micro.advantages, CLIP, CLIP)

    # 1/2 max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2), c = VALUE_CLIP.
    # Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9
    value = clipped_value_loss(new.values, micro.old_values, micro.returns, VALUE_CLIP)
    return VF_COEF * value.loss + surrogate.loss


def main(model: str, data: str, reward: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer = load_tokenizer(model)
    policy = ValueHeadModel(load_pretrained(model, torch.float32))  # a value head on its trunk
    ref = load_pretrained(model, torch.float32).requires_grad_(False)  # the policy at step 0
    max_prompt_length = policy.lm.config.longest_row - MAX_NEW_TOKENS
    if max_prompt_length < 1:
        raise UserError(model, f"reads too few tokens for {MAX_NEW_TOKENS} new ones")
    prompts, report = load_prompts(data, tokenizer, max_prompt_length, overlong="error")
    print(report)
    load_model = partial(load_reward_model, dtype=torch.float32)
    settings = RewardSourceSettings(reward=(reward,))
    source = load_reward(settings, tokenizer, load_model, MICRO_BATCH_TOKENS)
    Path(out).mkdir(parents=True)  # refused where it exists
    ppo(policy, ref, prompts, source, tokenizer, int(steps or STEPS))
    write_model(policy.lm, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (4, 5) or not "".join(sys.argv[5:] or "1").isdecimal():
        print("usage: python ppo.py MODEL DATA REWARD OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
