"""What every number of metrics.jsonl means: one definition a name, as `minirlhf metrics` prints it.

PPO's names are those of TRL 1.x, so that plots made for them work here. A mean over tokens counts
each response token once, and neither prompts nor padding. A line that covers several steps
(`log_every`) holds their mean; counts and what follows the run (`lr`, `episode` …) are those of the
last step.
"""

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One number of metrics.jsonl. A word in capitals in the name stands for any word."""

    name: str
    unit: str
    over: str  # what the reduction runs over
    reduction: str
    meaning: str
    when: str | None = None  # the condition under which a run writes it; None: always
    clock: bool = False  # whether it depends on the machine and stands under the key `clock`


def _quantiles(stem: str, unit: str, over: str, what: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{stem}_p{p:02}", unit, over, f"{p}% quantile", f"{p}% of {what} lie below")
        for p in (5, 50, 95)
    )


_RUN = (
    Metric("step", "steps", "the run", "count", "iterations completed, from 1"),
    Metric("elapsed", "s", "the process", "sum", "since this process began", clock=True),
    Metric("peak_memory", "GB", "the process", "max",
           "memory so far: allocated by torch on a GPU, resident on a CPU", clock=True),
)

_TRAINING = (
    Metric("loss", "nats", "the batch", "mean", "what is minimised: per pair, or per target token"),
    Metric("grad_norm", "1", "trained weights", "2-norm", "of the gradient, before clipping"),
    Metric("learning_rate", "1", "the step", "value", "of AdamW, after warm-up and decay"),
    Metric("epoch", "epochs", "the data", "count", "passes over the data so far, a fraction"),
    Metric("num_tokens", "tokens", "the run", "count", "trained on so far, prompts included"),
    Metric("skipped_updates", "updates", "the run", "count",
           "optimizer steps skipped because a number was not finite"),
    Metric("step_time", "s", "the step", "sum", "duration", clock=True),
    Metric("tok_per_s", "tokens/s", "the step", "ratio", "trained on a second", clock=True),
)

_SCORES = (
    Metric("accuracy", "share", "pairs", "mean", "chosen scores above rejected; a tie is wrong"),
    Metric("accuracy_half", "share", "pairs", "mean", "the same, a tie counts half"),
    Metric("ties", "share", "pairs", "mean", "both responses score the same"),
    Metric("margin", "reward", "pairs", "mean", "chosen minus rejected score"),
    Metric("margin_std", "reward", "pairs", "population std", "of the same"),
    Metric("min_reward", "reward", "all responses", "min", "the lowest score"),
    Metric("mean_reward", "reward", "all responses", "mean", "of their scores"),
    Metric("max_reward", "reward", "all responses", "max", "the highest score"),
    Metric("top1", "share", "ranked lists", "mean", "the best response scores highest",
           when="the data are ranked lists"),
)


def _held_out(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """The same of held-out data, whose set may have a name: eval_loss, eval_short_loss."""
    when = "--eval-data, at evaluations"
    return tuple(m._replace(name=f"eval_{m.name}", when=when) for m in metrics)


_ENTROPY = Metric(
    "entropy", "nats a token", "target tokens", "mean", "of the next-token distribution"
)
_SFT = (
    *_TRAINING,
    _ENTROPY,
    *_held_out((
        _TRAINING[0],
        _ENTROPY,
        Metric("perplexity", "1", "target tokens", "exp of mean", "exp(loss)"),
    )),
)

_REWARD = (
    *_TRAINING,
    *_SCORES,
    *_held_out((
        _TRAINING[0],
        *_SCORES,
        Metric("calibration_error", "share", "pairs", "10 bins",
               "gap between sigmoid(margin) and how often it is right (Guo et al. 2017, eq. 3)"),
    )),
)

TOKENS, ROWS, UPDATES = "response tokens", "responses", "response tokens, all epochs"


def _of_policy(name: str, unit: str, reduction: str, meaning: str, when: str = "") -> Metric:
    return Metric(f"eval/{name}", unit, "held-out prompts", reduction, meaning,
                  when=f"--eval-data{when}")


_EVALUATION = (
    _of_policy("objective/scores", "reward", "mean", "of the reward source, before any penalty"),
    _of_policy("objective/scores_se", "reward", "standard error", "of that mean"),
    _of_policy("objective/kl", "nats a response", "sum over tokens, mean over rows",
              "log-ratio of policy to reference (k1)"),
    _of_policy("response_length", "tokens", "mean", "of the response, eos included"),
    _of_policy("eos_rate", "share", "mean", "ended by eos or by a stop string"),
    _of_policy("distinct_1", "share", "ratio", "different words / words, of all responses"),
    _of_policy("distinct_2", "share", "ratio", "different pairs of neighbouring words / pairs"),
    _of_policy("duplicates", "share", "mean", "the same text as a response before it"),
    _of_policy("win_rate", "share", "mean", "beats the starting policy's answer; a tie counts half",
              ", after the first evaluation"),
    _of_policy("win_rate_low", "share", "95% interval", "its lower end",
              ", after the first evaluation"),
    _of_policy("win_rate_high", "share", "95% interval", "its upper end",
              ", after the first evaluation"),
)

_PPO = (
    # the objective
    Metric("objective/scores", "reward", ROWS, "mean",
           "of the reward source, after the penalty for truncated responses, before scaling"),
    Metric("objective/scores_std", "reward", ROWS, "population std", "of the same"),
    Metric("objective/learned_scores", "scaled reward", ROWS, "mean",
           "the same after score_scaling and score_clip, and 0 for truncated responses under "
           "bootstrap_truncated: what PPO learns from"),
    Metric("objective/learned_scores_std", "scaled reward", ROWS, "population std", "of the same"),
    *_quantiles("objective/scores", "reward", ROWS, "the scores"),
    Metric("reward", "reward", ROWS, "mean", "of the reward source, before any penalty"),
    Metric("reward_std", "reward", ROWS, "population std", "of the same"),
    Metric("rewards/NAME/mean", "reward", "responses it applies to", "mean",
           "of one source, before its weight", when="the reward has named parts"),
    Metric("rewards/NAME/std", "reward", "responses it applies to", "population std", "of the same",
           when="the reward has named parts"),
    Metric("objective/kl", "nats a response", ROWS, "sum over tokens, mean over rows",
           "log-ratio of policy to reference (k1): unbiased, a batch may be below 0"),
    *_quantiles("objective/kl", "nats a response", ROWS, "the responses' KL"),
    Metric("objective/kl_k3", "nats a response", ROWS, "sum over tokens, mean over rows",
           "the same KL by the k3 estimator: unbiased and never below 0"),
    Metric("objective/kl_per_token", "nats a token", TOKENS, "mean",
           "k1; OpenRLHF and verl call this the KL"),
    Metric("objective/kl_coef", "reward a nat", "the step", "value", "KL coefficient of this step"),
    Metric("objective/non_score_reward", "reward", ROWS, "sum over tokens, mean over rows",
           "the KL penalty in the reward, -kl_coef · KL; 0 where kl_in is loss"),
    Metric("objective/non_score_reward_per_token", "reward a token", TOKENS, "mean", "the same"),
    Metric("objective/rlhf_reward", "reward", ROWS, "mean", "learned_scores + non_score_reward"),
    Metric("objective/entropy", "nats a response", ROWS, "sum over tokens, mean over rows",
           "minus the log-prob of what was sampled: estimates the entropy of whole responses"),
    Metric("objective/logprobs", "nats a token", TOKENS, "mean", "of the policy that sampled"),
    Metric("objective/ref_logprobs", "nats a token", TOKENS, "mean", "of the reference"),
    # the policy
    Metric("policy/approxkl_avg", "nats a token", UPDATES, "mean",
           "(new - old log-prob)² / 2 (k2): how far the updates went"),
    Metric("policy/policykl_avg", "nats a token", UPDATES, "mean",
           "old - new log-prob (k1): may be below 0"),
    Metric("policy/clipfrac_avg", "share", UPDATES, "mean", "policy gradient is 0: clipped"),
    Metric("policy/entropy_avg", "nats a token", UPDATES, "mean",
           "of the whole next-token distribution, at the sampling temperature"),
    Metric("policy/advantages_mean", "reward", TOKENS, "mean",
           "before whitening: above 0 where responses were better than the critic thought"),
    Metric("loss/policy_avg", "1", UPDATES, "mean", "clipped surrogate"),
    Metric("loss/value_avg", "reward²", UPDATES, "mean", "clipped, the 1/2 inside, before vf_coef"),
    Metric("loss/kl_avg", "1", UPDATES, "mean", "kl_coef · KL where kl_in is loss; else 0"),
    Metric("loss/ptx_avg", "nats a target", UPDATES, "mean",
           "language-model loss of the texts that are mixed in; 0 without"),
    Metric("loss/total_avg", "1", UPDATES, "mean",
           "policy + vf_coef · value + kl + ptx_coef · ptx - entropy_coef · entropy"),
    Metric("policy/epochs", "epochs", "the step", "count",
           "passes over the rollout: fewer than asked for after an early stop"),
    Metric("val/ratio", "1", UPDATES, "mean", "new / old probability: 1 before the first update"),
    Metric("val/ratio_var", "1", UPDATES, "population variance", "of the ratio over tokens"),
    Metric("grad_norm", "1", "trained weights", "2-norm, mean over updates", "before clipping"),
    Metric("critic_grad_norm", "1", "weights of a critic of its own", "2-norm, mean over updates",
           "before clipping; 0 without one: then it is in grad_norm"),
    # the critic
    Metric("val/clipfrac_avg", "share", UPDATES, "mean", "value gradient is 0: clipped"),
    Metric("val/mean", "reward", TOKENS, "mean", "value before the updates"),
    Metric("val/var", "reward²", TOKENS, "population variance", "of the same"),
    Metric("val/vpred_avg", "reward", UPDATES, "mean", "value during the updates"),
    Metric("val/error_avg", "reward²", UPDATES, "mean", "(value - return)², no clip"),
    Metric("returns/mean", "reward", TOKENS, "mean", "value targets"),
    Metric("returns/var", "reward²", TOKENS, "population variance", "of the same"),
    Metric("health/explained_variance", "share", TOKENS, "1 - ratio of variances",
           "1 - var(return - value before the updates) / var(return)"),
    # the texts
    Metric("prompt_length", "tokens", ROWS, "mean", "of the prompt"),
    Metric("prompt_length_std", "tokens", ROWS, "population std", "of the same"),
    Metric("response_length", "tokens", ROWS, "mean", "of the response, eos included"),
    Metric("response_length_std", "tokens", ROWS, "population std", "of the same"),
    *_quantiles("response_length", "tokens", ROWS, "the responses"),
    Metric("val/num_eos_tokens", "responses", ROWS, "count", "ended by eos"),
    Metric("health/eos_rate", "share", ROWS, "mean", "ended by eos or by a stop string"),
    Metric("health/truncated_rate", "share", ROWS, "mean", "truncated at max_new_tokens"),
    Metric("health/dup_rate", "share", ROWS, "mean", "equal to a response before it in the batch"),
    Metric("health/reward_len_corr", "1", ROWS, "Pearson's r",
           "of score and length within the batch; 0 where either is constant"),
    Metric("health/unknown_tokens", "tokens", TOKENS, "count", "ids unknown to the tokenizer"),
    Metric("health/logprobs_diff", "nats a token", TOKENS, "max",
           "|log-prob when it was drawn - log-prob that PPO uses|: rounding"),
    # the run
    Metric("lr", "1", "the step", "value", "learning rate of AdamW"),
    Metric("episode", "responses", "the run", "count", "sampled so far"),
    Metric("epoch", "epochs", "the prompts", "count", "passes over the prompts, a fraction"),
    Metric("skipped_updates", "updates", "the run", "count",
           "optimizer steps skipped because a number was not finite"),
    Metric("skipped_ratio", "updates", "the run", "count",
           "optimizer steps skipped because the mean ratio was above max_ratio"),
    Metric("early_stops", "steps", "the run", "count", "rollouts whose epochs early_stop_kl ended"),
    *_EVALUATION,
    Metric("time/rollout", "s", "the step", "sum", "sampling", clock=True),
    Metric("time/score", "s", "the step", "sum", "scoring", clock=True),
    Metric("time/measure", "s", "the step", "sum", "log-probs and values before the updates",
           clock=True),
    Metric("time/update", "s", "the step", "sum", "advantages, and all updates", clock=True),
    Metric("time/step", "s", "the step", "sum", "all four", clock=True),
    Metric("eps", "responses/s", "the step", "ratio", "sampled a second", clock=True),
    Metric("tok_per_s", "tokens/s", "the step", "ratio", "sampled a second", clock=True),
)

METRICS: dict[str, tuple[Metric, ...]] = {
    "ppo": (*_RUN, *_PPO),
    "reward": (*_RUN, *_REWARD),
    "sft": (*_RUN, *_SFT),
}


def definition(recipe: str, name: str) -> Metric | None:
    """The definition of a number in a recipe's metrics.jsonl, or None.

    >>> definition("reward", "eval_short_accuracy").meaning
    'chosen scores above rejected; a tie is wrong'
    """
    exact = {m.name: m for m in METRICS[recipe]}
    if name in exact:
        return exact[name]
    matching = [m for m in METRICS[recipe] if _pattern(m.name).fullmatch(name)]
    return max(matching, key=lambda m: len(m.name), default=None)


def _pattern(name: str) -> re.Pattern[str]:
    words = re.sub(r"\b[A-Z]+\b", ".+", re.escape(name))
    words = re.sub("^eval/", "eval/(.+/)?", words)
    return re.compile(re.sub("^eval_", "eval_(.+_)?", words))
