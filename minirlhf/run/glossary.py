"""What every number of metrics.jsonl means: one definition a name, as `minirlhf metrics` prints it.

Names are those of TRL 1.x, so that plots made for them go on working; the numbers are what the
names promise, without the faults named in `LEFT_OUT` and beside the metrics. Every mean over tokens
counts each token once, prompts and padding never. A line that covers several steps (`log_every`)
holds the mean over these steps; what counts or follows the run (`lr`, `episode` …) is the last.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One number of metrics.jsonl. A word in capitals in the name stands for any word."""

    name: str
    unit: str
    over: str  # what is reduced: the mask
    reduction: str
    meaning: str
    trl09: str | None = None  # what TRL 0.9 calls it
    when: str | None = None  # condition under which a run writes it; None: always
    clock: bool = False  # depends on the machine; stands under the key `clock`


def _quantiles(stem: str, unit: str, over: str, what: str) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"{stem}_p{p:02}", unit, over, f"{p}% quantile", f"{p}% of {what} lie below")
        for p in (5, 50, 95)
    )


_RUN = (
    Metric("step", "steps", "the run", "count", "iterations completed, from 1"),
    Metric("elapsed", "s", "the process", "sum", "since this process began", clock=True),
    Metric("peak_memory", "GB", "the process", "max",
           "most memory held so far: of the GPU what torch allocated, else resident", clock=True),
)

_TRAINING = (
    Metric("loss", "nats", "the batch", "mean", "what is minimised: per pair, or per target token"),
    Metric("grad_norm", "1", "trained weights", "2-norm", "of the gradient, before clipping"),
    Metric("learning_rate", "1", "the step", "value", "of AdamW, after warm-up and decay"),
    Metric("epoch", "epochs", "the data", "count", "passes over the data so far, a fraction"),
    Metric("num_tokens", "tokens", "the run", "count", "trained on so far, prompts included"),
    Metric("skipped_updates", "updates", "the run", "count",
           "optimizer steps left out because a number was not finite"),
    Metric("step_time", "s", "the step", "sum", "seconds of the step", clock=True),
    Metric("tok_per_s", "tokens/s", "the step", "ratio", "tokens trained on a second", clock=True),
)

_SIDES = (
    Metric("accuracy", "share", "pairs", "mean", "chosen scores above rejected; a tie is wrong"),
    Metric("accuracy_half", "share", "pairs", "mean", "the same, a tie counts half"),
    Metric("ties", "share", "pairs", "mean", "both sides score the same"),
    Metric("margin", "reward", "pairs", "mean", "chosen minus rejected score"),
    Metric("margin_std", "reward", "pairs", "population std", "of chosen minus rejected"),
    Metric("min_reward", "reward", "both sides", "min", "lowest score"),
    Metric("mean_reward", "reward", "both sides", "mean", "score"),
    Metric("max_reward", "reward", "both sides", "max", "highest score"),
    Metric("top1", "share", "ranked lists", "mean", "the best response scores highest",
           when="the data are ranked lists"),
)


def _held_out(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """The same of held-out data, whose set may have a name: eval_loss, eval_short_loss."""
    when = "--eval-data, at evaluations"
    return tuple(m._replace(name=f"eval_{m.name}", when=when) for m in metrics)


_SFT = (
    *_TRAINING,
    Metric("entropy", "nats a token", "target tokens", "mean", "of the next-token law"),
    *_held_out((
        _TRAINING[0],
        Metric("entropy", "nats a token", "target tokens", "mean", "of the next-token law"),
        Metric("perplexity", "1", "target tokens", "exp of mean", "exp(loss)"),
    )),
)

_REWARD = (
    *_TRAINING,
    *_SIDES,
    *_held_out((
        _TRAINING[0],
        *_SIDES,
        Metric("calibration_error", "share", "pairs", "10 bins",
               "gap between sigmoid(margin) and how often it is right (Guo et al. 2017, eq. 3)"),
    )),
)

TOKENS, ROWS, UPDATES = "response tokens", "responses", "response tokens, all epochs"


def _of_policy(name: str, unit: str, reduction: str, meaning: str, when: str = "") -> Metric:
    return Metric(f"eval/{name}", unit, "held-out prompts", reduction, meaning,
                  when=f"--eval-data{when}")


_EVALUATION = (
    _of_policy("objective/scores", "reward", "mean", "as the sources gave it, before any penalty"),
    _of_policy("objective/scores_se", "reward", "standard error", "of that mean"),
    _of_policy("objective/kl", "nats a response", "sum over tokens, mean over rows",
              "log-ratio of policy to reference (k1)"),
    _of_policy("response_length", "tokens", "mean", "of the response, eos included"),
    _of_policy("eos_rate", "share", "mean", "not cut by the length"),
    _of_policy("distinct_1", "share", "ratio", "different words over all words of all responses"),
    _of_policy("distinct_2", "share", "ratio", "different pairs of words over all pairs"),
    _of_policy("duplicates", "share", "mean", "says exactly what one before it said"),
    _of_policy("win_rate", "share", "mean", "scores above the starting policy's answer; a tie half",
              ", after the first evaluation"),
    _of_policy("win_rate_low", "share", "95% interval", "where the true rate may begin",
              ", after the first evaluation"),
    _of_policy("win_rate_high", "share", "95% interval", "where it may end",
              ", after the first evaluation"),
)

_PPO = (
    # the objective
    Metric("objective/scores", "reward", ROWS, "mean",
           "of the reward sources, under the rule for cut responses, in the reward's own unit"),
    Metric("objective/scores_std", "reward", ROWS, "population std", "of the same"),
    Metric("objective/learned_scores", "scaled reward", ROWS, "mean",
           "the same after score_scaling and score_clip, and 0 for cut responses under "
           "bootstrap_truncated: what PPO learns from",
           "ppo/mean_scores"),
    Metric("objective/learned_scores_std", "scaled reward", ROWS, "population std", "of the same",
           "ppo/std_scores"),
    *_quantiles("objective/scores", "reward", ROWS, "the scores"),
    Metric("reward", "reward", ROWS, "mean", "as the source gave it, before any penalty",
           "env/reward_mean"),
    Metric("reward_std", "reward", ROWS, "population std", "of the same", "env/reward_std"),
    Metric("rewards/NAME/mean", "reward", "responses it applies to", "mean",
           "of one source, before its weight", when="the reward has named parts"),
    Metric("rewards/NAME/std", "reward", "responses it applies to", "population std", "of the same",
           when="the reward has named parts"),
    Metric("objective/kl", "nats a response", ROWS, "sum over tokens, mean over rows",
           "log-ratio of policy to reference (k1): unbiased, a batch may be below 0",
           "objective/kl"),
    *_quantiles("objective/kl", "nats a response", ROWS, "the responses' KL"),
    Metric("objective/kl_k3", "nats a response", ROWS, "sum over tokens, mean over rows",
           "the same KL by Schulman's k3: unbiased and never below 0"),
    Metric("objective/kl_per_token", "nats a token", TOKENS, "mean",
           "k1; OpenRLHF and verl call this the KL"),
    Metric("objective/kl_coef", "reward a nat", "the step", "value", "KL coefficient of this step",
           "objective/kl_coef"),
    Metric("objective/non_score_reward", "reward", ROWS, "sum over tokens, mean over rows",
           "the KL penalty as it enters the reward: below 0 where the KL is above"),
    Metric("objective/non_score_reward_per_token", "reward a token", TOKENS, "mean", "the same",
           "ppo/mean_non_score_reward"),
    Metric("objective/rlhf_reward", "reward", ROWS, "mean", "learned_scores + non_score_reward"),
    Metric("objective/entropy", "nats a response", ROWS, "sum over tokens, mean over rows",
           "minus the log-prob of what was sampled: estimates the entropy of whole responses",
           "objective/entropy"),
    Metric("objective/logprobs", "nats a token", TOKENS, "mean", "of the policy that sampled",
           "objective/logprobs"),
    Metric("objective/ref_logprobs", "nats a token", TOKENS, "mean", "of the reference",
           "objective/ref_logprobs"),
    # the policy
    Metric("policy/approxkl_avg", "nats a token", UPDATES, "mean",
           "(new - old log-prob)² / 2 (k2): how far the updates went", "ppo/policy/approxkl"),
    Metric("policy/policykl_avg", "nats a token", UPDATES, "mean",
           "old - new log-prob (k1): may be below 0", "ppo/policy/policykl"),
    Metric("policy/clipfrac_avg", "share", UPDATES, "mean", "gradient cut off by the clip",
           "ppo/policy/clipfrac"),
    Metric("policy/entropy_avg", "nats a token", UPDATES, "mean",
           "of the whole next-token law, at the sampling temperature", "ppo/policy/entropy"),
    Metric("policy/advantages_mean", "reward", TOKENS, "mean",
           "before whitening: above 0 where responses were better than the critic thought",
           "ppo/policy/advantages_mean"),
    Metric("loss/policy_avg", "1", UPDATES, "mean", "clipped surrogate", "ppo/loss/policy"),
    Metric("loss/value_avg", "reward²", UPDATES, "mean", "clipped, the 1/2 inside, before vf_coef",
           "ppo/loss/value"),
    Metric("loss/kl_avg", "1", UPDATES, "mean", "kl_coef · KL where kl_in is loss; else 0"),
    Metric("loss/ptx_avg", "nats a target", UPDATES, "mean",
           "language-model loss of the texts that are mixed in; 0 without"),
    Metric("loss/total_avg", "1", UPDATES, "mean",
           "policy + vf_coef · value + kl + ptx_coef · ptx - entropy_coef · entropy",
           "ppo/loss/total"),
    Metric("policy/epochs", "epochs", "the step", "count",
           "passes over the rollout: fewer than asked for after an early stop"),
    Metric("val/ratio", "1", UPDATES, "mean", "new / old probability: 1 before the first update",
           "ppo/policy/ratio"),
    Metric("val/ratio_var", "1", UPDATES, "population variance", "of the ratio over tokens"),
    Metric("grad_norm", "1", "trained weights", "2-norm, mean over updates", "before clipping"),
    Metric("critic_grad_norm", "1", "weights of a critic of its own", "2-norm, mean over updates",
           "before clipping; 0 without one: then it is in grad_norm"),
    # the critic
    Metric("val/clipfrac_avg", "share", UPDATES, "mean", "value gradient cut off by value_clip",
           "ppo/val/clipfrac"),
    Metric("val/mean", "reward", TOKENS, "mean", "value before the updates", "ppo/val/mean"),
    Metric("val/var", "reward²", TOKENS, "population variance", "of the same", "ppo/val/var"),
    Metric("val/vpred_avg", "reward", UPDATES, "mean", "value during the updates", "ppo/val/vpred"),
    Metric("val/error_avg", "reward²", UPDATES, "mean", "(value - return)², no clip",
           "ppo/val/error"),
    Metric("returns/mean", "reward", TOKENS, "mean", "value targets", "ppo/returns/mean"),
    Metric("returns/var", "reward²", TOKENS, "population variance", "of the same",
           "ppo/returns/var"),
    Metric("health/explained_variance", "share", TOKENS, "1 - ratio of variances",
           "1 - var(return - value before the updates) / var(return)", "ppo/val/var_explained"),
    # the texts
    Metric("prompt_length", "tokens", ROWS, "mean", "of the prompt", "tokens/queries_len_mean"),
    Metric("prompt_length_std", "tokens", ROWS, "population std", "of the same",
           "tokens/queries_len_std"),
    Metric("response_length", "tokens", ROWS, "mean", "of the response, eos included",
           "tokens/responses_len_mean"),
    Metric("response_length_std", "tokens", ROWS, "population std", "of the same",
           "tokens/responses_len_std"),
    *_quantiles("response_length", "tokens", ROWS, "the responses"),
    Metric("val/num_eos_tokens", "responses", ROWS, "count", "ended by eos"),
    Metric("health/eos_rate", "share", ROWS, "mean", "ended by eos or by a stop string"),
    Metric("health/truncated_rate", "share", ROWS, "mean", "cut at max_new_tokens"),
    Metric("health/dup_rate", "share", ROWS, "mean", "same tokens as another of the batch before"),
    Metric("health/reward_len_corr", "1", ROWS, "Pearson's r",
           "of score and length within the batch; 0 where either is constant"),
    Metric("health/unknown_tokens", "tokens", TOKENS, "count", "ids that the tokenizer has not"),
    Metric("health/logprobs_diff", "nats a token", TOKENS, "max",
           "between the log-prob that decoding drew a token with and that of the training pass, "
           "which PPO uses: rounding"),
    # the run
    Metric("lr", "1", "the step", "value", "learning rate of AdamW", "ppo/learning_rate"),
    Metric("episode", "responses", "the run", "count", "sampled so far"),
    Metric("epoch", "epochs", "the prompts", "count", "passes over the prompts, a fraction"),
    Metric("skipped_updates", "updates", "the run", "count",
           "optimizer steps left out because a number was not finite"),
    Metric("skipped_ratio", "updates", "the run", "count",
           "optimizer steps left out because the mean ratio was above max_ratio"),
    Metric("early_stops", "steps", "the run", "count", "rollouts whose epochs early_stop_kl ended"),
    *_EVALUATION,
    Metric("time/rollout", "s", "the step", "sum", "sampling", clock=True),
    Metric("time/score", "s", "the step", "sum", "the reward source", clock=True),
    Metric("time/measure", "s", "the step", "sum", "log-probs and values before the updates",
           "time/ppo/forward_pass", clock=True),
    Metric("time/update", "s", "the step", "sum", "credit, and all updates",
           "time/ppo/optimize_step", clock=True),
    Metric("time/step", "s", "the step", "sum", "all four", clock=True),
    Metric("eps", "responses/s", "the step", "ratio", "responses a second", clock=True),
    Metric("tok_per_s", "tokens/s", "the step", "ratio", "sampled tokens a second", clock=True),
)

METRICS: dict[str, tuple[Metric, ...]] = {
    "ppo": (*_RUN, *_PPO),
    "reward": (*_RUN, *_REWARD),
    "sft": (*_RUN, *_SFT),
}

_HISTOGRAM = "a histogram of raw cells, padding among them"
LEFT_OUT = {  # statistics of TRL 0.9 that have no number here
    "objective/kl_dist": "all rows' numbers; objective/kl_p05, _p50 and _p95 show their spread",
    "ppo/policy/advantages": f"{_HISTOGRAM}; after whitening it has mean 0 and deviation 1",
    "tokens/queries_dist": "all rows' numbers; prompts do not change, mean and std say enough",
    "tokens/responses_dist": "all rows' numbers; response_length_p05, _p50 and _p95 show it",
    "env/reward_dist": "all rows' numbers; objective/scores_p05, _p50 and _p95 show it",
    "time/ppo/compute_rewards": "well below a millisecond; inside time/update",
    "time/ppo/compute_advantages": "well below a millisecond; inside time/update",
    "time/ppo/calc_stats": "well below a millisecond; inside time/update",
    "time/ppo/total": "leaves out sampling and scoring; time/step holds all",
    "game_log": "a table of texts; samples.jsonl has it",
}


def definition(recipe: str, name: str) -> Metric | None:
    """What a number in metrics.jsonl of a recipe means; None where it has no definition.

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


def rename_to_trl09(metrics: Mapping[str, float]) -> dict[str, float]:
    """PPO's metrics under TRL 0.9's names instead of TRL 1.x's, never under both.

    What TRL 0.9 has no name for keeps its own. Numbers are not changed: they stay masked and
    weighted by tokens where TRL 0.9's are not.

    Args:
        metrics: a line of metrics.jsonl without its clock, or the clock.

    >>> rename_to_trl09({"step": 3, "loss/policy_avg": 0.5, "objective/kl": 2.0})
    {'step': 3, 'ppo/loss/policy': 0.5, 'objective/kl': 2.0}
    """
    names = {m.name: m.trl09 for m in METRICS["ppo"] if m.trl09}
    return {names.get(name, name): value for name, value in metrics.items()}
