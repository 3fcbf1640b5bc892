"""What a PPO run tells of an iteration: its metrics, and a table of samples."""

import torch
from torch import Tensor

from minirlhf import streams
from minirlhf.checkpoint import TrainState
from minirlhf.data import Prompt
from minirlhf.errors import printable
from minirlhf.ppo_config import PPOConfig
from minirlhf.ppo_update import PPOStats
from minirlhf.rewards import Completions, RewardSource, Scores, as_scores
from minirlhf.rollout import RolloutBuffer, columns_of, sample
from minirlhf.rollout_stats import rollout_statistics, score_statistics, text_statistics
from minirlhf.run import Run
from minirlhf.tokenizer import Tokenizer


def summarise(
    stats: PPOStats, completions: Completions, given: Scores, scores: Tensor,
    buffer: RolloutBuffer, sequence_kl: float, tokenizer: Tokenizer, config: PPOConfig,
) -> dict[str, float]:  # fmt: skip
    """TRL's metric names, with the numbers that the names promise: see `minirlhf.metrics`.

    Args:
        given: what the reward sources said.
        scores: (B,) under the rule for cut responses, before they were scaled.
    """
    by_token = given.sums - given.total  # (B,)
    scores = scores + by_token
    micros = buffer.micro_batches
    scaled = torch.cat([micro.scores for micro in micros]).cpu()
    if config.bootstrap_truncated:  # the critic's value stands for the score of a cut response
        scaled = torch.where(torch.cat([micro.truncated for micro in micros]).cpu(), 0, scaled)
    learned = scaled + by_token[torch.cat([micro.rows for micro in micros]).cpu()]
    responses, tokens = completions.response_ids, len(buffer.tokens("rewards"))
    unknown = sum(i >= tokenizer.vocab_size for ids in responses for i in ids)
    return given.metrics() | {
        **rollout_statistics(buffer),
        **score_statistics(given.sums, scores),
        **text_statistics(responses, completions.finish_reasons, scores),
        "objective/non_score_reward_per_token": stats.non_score_reward * len(buffer) / tokens,
        "objective/kl": sequence_kl,
        "objective/non_score_reward": stats.non_score_reward,
        "objective/learned_scores": float(learned.mean()),
        "objective/learned_scores_std": float(learned.std(correction=0)),
        "objective/rlhf_reward": float(learned.mean()) + stats.non_score_reward,
        "objective/entropy": -float(buffer.row_sums("old_logprobs").mean()),
        "policy/approxkl_avg": stats.approxkl,
        "policy/policykl_avg": stats.policykl,
        "policy/clipfrac_avg": stats.clipfrac,
        "policy/entropy_avg": stats.entropy,
        "loss/policy_avg": stats.policy_loss,
        "loss/value_avg": stats.value_loss,
        "loss/kl_avg": stats.kl_loss,
        "loss/ptx_avg": stats.ptx_loss,
        "loss/total_avg": stats.loss,
        "val/clipfrac_avg": stats.value_clipfrac,
        "val/vpred_avg": stats.vpred,
        "val/error_avg": stats.value_error,
        "val/ratio": stats.ratio,
        "val/ratio_var": stats.ratio_var,
        "grad_norm": stats.grad_norm,
        "critic_grad_norm": stats.critic_grad_norm,
        "policy/epochs": float(stats.epochs),
        "health/explained_variance": stats.explained_variance,
        "health/unknown_tokens": float(unknown),
    }


def sample_table(
    state: TrainState, prompts: list[Prompt], reward: RewardSource, tokenizer: Tokenizer,
    config: PPOConfig,
) -> list[dict]:  # fmt: skip
    """The same prompts with the same random keys at every call: what changes is the policy."""
    fixed = prompts[: config.sample_prompts]
    keys = streams.key(config.seed, "sample table", torch.arange(len(fixed)))
    # no more at once than a training step, so that the memory plan holds
    rows_at_once = min(config.rollout_batch_size, config.batch_size)
    completions, _ = sample(
        state.model.lm, fixed, keys, config.sampling, tokenizer, rows_at_once, columns_of(prompts)
    )
    where = f"samples at step {state.step}"
    scores = as_scores(reward(completions), completions, where).sums.tolist()
    return [
        {"step": state.step, "kind": "sample", "prompt": prompt, "response": text,
         "finish_reason": reason, "score": value}
        for prompt, text, reason, value in zip(
            completions.prompts, completions.completions, completions.finish_reasons, scores,
            strict=True)
    ]  # fmt: skip


def show_samples(r: Run, state: TrainState, rows: list[dict]) -> None:
    """The table on the console and in samples.jsonl."""
    r.say(f"  samples at step {state.step}")
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        shown = f"{printable(prompt, 60)} | {printable(row['response'], 160)}"
        r.say(f"  {row['score']:>8.3f}  {shown}")
    r.write_samples(state, rows)
