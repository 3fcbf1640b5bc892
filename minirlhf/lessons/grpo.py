"""GRPO for language models on one page, from the prompts to `optimizer.step()`.

    python minirlhf/lessons/grpo.py MODEL DATA REWARD OUT [STEPS]

MODEL is a language model's Hugging Face folder, DATA a file of prompts, REWARD what --reward of
`minirlhf grpo` takes, OUT takes the aligned model. This is `minirlhf grpo` with default settings on
a CPU, to the last bit of the weights.

PPO (lessons/ppo.py) asks a critic what to expect of a prompt. GRPO asks the policy: it answers each
prompt several times, and a response is good if it scores above the others to its prompt. So the
critic and its GAE are gone, and of PPO's five parts there remain: sample, score, measure, credit
(one advantage a response, the same for all its tokens) and update.

Shapes: P prompts of an iteration, G responses to each, B = P · G, b rows of a micro-batch, R tokens
of the longest response. The rows of a group are adjacent.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__ and Path(__file__).parts[-3] == "minirlhf":  # run by its path
    sys.path[0] = str(Path(__file__).parents[2])

import torch
from torch import Tensor

from minirlhf import streams
from minirlhf.batches.collect import columns_of, sample, with_scores
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, lm_pass, measure_lm
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Prompt, load_prompts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.equations.critic_free import group_advantages
from minirlhf.equations.kl import kl_k2, kl_k3
from minirlhf.equations.masking import masked_sum
from minirlhf.equations.policy import clipped_surrogate
from minirlhf.errors import BAD_INPUT, UserError, run
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
BATCH_SIZE = 8  # P, prompts of an iteration
SAMPLES_PER_PROMPT = 8  # G, responses to each
MAX_NEW_TOKENS = 64
TEMPERATURE = 1.0
MINI_BATCHES = 4  # parts of a rollout, one optimizer step each; each response is used once
MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS = 8, 4096  # most rows, most tokens (padding too) in a pass
KL_COEF = 0.04  # beta, per nat
CLIP = 0.2  # epsilon, of the ratio to either side
LEARNING_RATE = 1e-6  # at the start; it falls linearly to 0
MAX_GRAD_NORM = 1.0


def grpo(
    policy: CausalLM, ref: CausalLM, prompts: list[Prompt], reward: RewardSource,
    tokenizer: Tokenizer, steps: int,
) -> None:
    """Raises the reward of the policy's responses, at a price for each nat that it moves away from
    the reference. Shao et al. 2024 (arXiv:2402.03300), section 4.1."""
    optimizer = make_optimizer(policy, LEARNING_RATE)  # AdamW (arXiv:1711.05101)
    for iteration in range(steps):
        set_learning_rate(optimizer, learning_rate(iteration, steps, LEARNING_RATE, 0, "linear"))

        # Sample. Each row has a random key of its own, so the responses to a prompt differ; the
        # prompt itself is read once, and its keys and values are copied for all of them.
        rows = next_rows(iteration * BATCH_SIZE, BATCH_SIZE, len(prompts), SEED)  # (P,)
        rows = rows.repeat_interleave(SAMPLES_PER_PROMPT)  # (B,)
        keys = streams.key(SEED, "rollout", iteration, rows, torch.arange(len(rows)))
        completions, rollout = sample(
            policy, [prompts[i] for i in rows.tolist()], keys,
            Sampling(MAX_NEW_TOKENS, TEMPERATURE), tokenizer, rows_at_once=256,
            columns=columns_of(prompts),  # the data's other fields, for reward functions
        )

        # Score: one number per response.
        scores = as_scores(reward(completions), completions, f"step {iteration + 1}")
        rollout = with_scores(rollout, scores)

        # Measure. `lm_pass`, which also trains, reads old_logprobs on the micro-batches of
        # training. So before the first optimizer.step() every ratio pi / pi_old is exactly 1.
        buffer = RolloutBuffer(MICRO_BATCH_SIZE, MICRO_BATCH_TOKENS)
        buffer.add(rollout, SAMPLES_PER_PROMPT)
        measure_lm(policy, ref, buffer, TEMPERATURE)

        # Credit. A_i = (S_i - mean(group)) / (std(group) + 1e-4). Shao et al. 2024, sec. 4.1.2
        # A group whose scores all agree gets 0: nothing is learned from it.
        advantages = group_advantages(scores.sums, SAMPLES_PER_PROMPT)  # (B,)
        buffer.map(lambda micro, of_rows=advantages: assign(micro, of_rows))

        # Update. Each token weighs the same, as in DAPO (arXiv:2503.14476), eq. 8. The first paper
        # averages over each response, then over these: then a token of a long one weighs less.
        for mini_batch in buffer.minibatches(MINI_BATCHES, SEED, iteration, epoch=0):
            tokens = sum(int(micro.response_mask.sum()) for micro in mini_batch)
            optimizer.zero_grad()
            for micro in mini_batch:
                loss = masked_sum(grpo_loss(policy, micro), micro.response_mask) / tokens
                loss.backward()
            clip_gradients(policy, MAX_GRAD_NORM, f"step {iteration + 1}")
            optimizer.step()
        kl = kl_k3(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs")).mean()
        mean = scores.sums.mean()  # like the KL, of the policy before this update
        print(f"step {iteration + 1}  reward {mean:.4f}  kl {kl:.4f} nats per token")


def assign(micro: Rollout, advantages: Tensor) -> Rollout:
    """Gives each token of a response the advantage of that response; advantages: (B,)."""
    of_rows = advantages[micro.rows]  # (b,)
    return micro._replace(advantages=torch.where(micro.response_mask, of_rows[:, None], 0))


def grpo_loss(policy: CausalLM, micro: Rollout) -> Tensor:
    """(b, R): the loss of each response token, unreduced: minus eq. 3 of Shao et al. 2024."""
    new = lm_pass(policy, micro, TEMPERATURE)  # log-probs under today's weights

    # -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A): no gain from moving far.
    surrogate = clipped_surrogate(new.logprobs, micro.old_logprobs, micro.advantages, CLIP, CLIP)

    # (log pi - log pi_ref)^2 / 2, whose gradient is that of KL(pi || pi_ref) on average over
    # samples. The paper has k3 here: the gradient of KL(pi_ref || pi), the other direction.
    kl = kl_k2(new.logprobs, micro.ref_logprobs)
    return surrogate.loss + KL_COEF * kl


def main(model: str, data: str, reward: str, out: str, steps: str | None = None) -> None:
    make_deterministic("cpu")
    tokenizer = load_tokenizer(model)
    policy = load_pretrained(model, torch.float32)
    ref = load_pretrained(model, torch.float32).requires_grad_(False)  # the policy at step 0
    max_prompt_length = policy.config.longest_row - MAX_NEW_TOKENS
    if max_prompt_length < 1:
        raise UserError(model, f"reads too few tokens for {MAX_NEW_TOKENS} new ones")
    prompts, report = load_prompts(data, tokenizer, max_prompt_length, overlong="error")
    print(report)
    load_model = partial(load_reward_model, dtype=torch.float32)
    settings = RewardSourceSettings(reward=(reward,))
    source = load_reward(settings, tokenizer, load_model, MICRO_BATCH_TOKENS)
    Path(out).mkdir(parents=True)  # refused where it exists
    grpo(policy, ref, prompts, source, tokenizer, int(steps or STEPS))
    write_model(policy, tokenizer, Path(out))


if __name__ == "__main__":
    if len(sys.argv) - 1 not in (4, 5) or not "".join(sys.argv[5:] or "1").isdecimal():
        print("usage: python grpo.py MODEL DATA REWARD OUT [STEPS]", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: main(*sys.argv[1:])))
