"""Alarms: what a PPO run's numbers say is going wrong, with the likely cause and what to change.

Each is told once a run. `check` is a pure function of a history, which is part of the state, so
that a resumed run tells what the run that went on would have told. Thresholds have their source
beside them; those without one are rules of thumb, and say so.
"""

from collections.abc import Callable, Mapping
from statistics import mean, median, stdev
from typing import NamedTuple

from minirlhf.evaluation.rollout import correlation

FIRST, LAST = 5, 20  # values kept of each metric: the first and the latest

History = dict[str, list[float]]  # "METRIC", "first METRIC", "told ALARM", "steps"


class Alarm(NamedTuple):
    name: str
    step: int
    text: str  # what was seen, its cause, the setting to change

    def __str__(self) -> str:
        return f"alarm at step {self.step}: {self.name}: {self.text}"


class Rule(NamedTuple):
    """Looks at the values of some metrics; returns what it saw, or None where all is well."""

    name: str
    metrics: tuple[str, ...]
    look: Callable[..., str | None]  # one Seen a metric
    advice: str


class Seen(NamedTuple):
    """Of one metric: its first FIRST and latest LAST values, and how many steps there were."""

    first: list[float]
    latest: list[float]
    steps: int

    def recent(self, n: int) -> list[float]:
        """The latest n values; none where there are fewer."""
        return self.latest[-n:] if len(self.latest) >= n else []


def kl_at_start(kl: Seen) -> str | None:
    # The reference is where the policy starts (Ziegler et al. 2019, sec. 2), so it is 0; with
    # another --ref it need not be. A tenth of a nat a response: rule of thumb.
    if kl.steps == 1 and abs(kl.latest[0]) > 0.1:
        return f"objective/kl is {kl.latest[0]:.3g} nats before any training"
    return None


def negative_kl(kl: Seen) -> str | None:
    # A KL is never below 0, its estimate k1 may be: the mean of 10 steps lies 4 standard errors
    # below 0 by chance in one window of 600 (Student's t), and these windows overlap.
    window = kl.recent(10)
    if window and mean(window) + 4 * stdev(window) / len(window) ** 0.5 < 0:
        return f"objective/kl is {mean(window):.3g} nats on average over 10 steps"
    return None


def large_update(approxkl: Seen) -> str | None:
    # Usually below 0.02 (Huang et al. 2022, "The 37 Implementation Details of PPO"); five times it.
    window = approxkl.recent(5)
    if window and mean(window) > 0.1:
        return f"policy/approxkl_avg is {mean(window):.3g} nats a token on average over 5 steps"
    return None


def clipped_policy(clipfrac: Seen) -> str | None:
    # With a third of the gradient cut off, the rest is no longer that of the objective: rule of
    # thumb. Schulman et al. 2017, sec. 3, has the clip for outliers.
    window = clipfrac.recent(5)
    if window and mean(window) > 0.3:
        return f"policy/clipfrac_avg is {mean(window):.2f} on average over 5 steps"
    return None


def clipped_value(clipfrac: Seen) -> str | None:
    # value_clip is in units of the reward: a critic with far to go is held back (rule of thumb).
    window = clipfrac.recent(5)
    if window and mean(window) > 0.5:
        return f"val/clipfrac_avg is {mean(window):.2f} on average over 5 steps"
    return None


def useless_critic(explained: Seen) -> str | None:
    # Below 0 a constant would predict better; the first 10 steps are for learning.
    window = explained.recent(5)
    if explained.steps >= 15 and window and mean(window) < 0:
        return f"health/explained_variance is {mean(window):.2f} on average over 5 steps"
    return None


def entropy_collapse(entropy: Seen) -> str | None:
    # What is gained is paid for with entropy, and without any nothing more is gained (Cui et al.
    # 2025, arXiv:2505.22617, eq. 6). A fifth of the first steps' is a rule of thumb.
    window, start = entropy.recent(5), mean(entropy.first)
    if window and mean(window) < 0.2 * start:
        return f"policy/entropy_avg fell from {start:.3g} to {mean(window):.3g} nats a token"
    return None


def endless_responses(eos_rate: Seen) -> str | None:
    # Cut texts are not what the reward was trained on; half of the first steps' (rule of thumb).
    window, start = eos_rate.recent(5), mean(eos_rate.first)
    if window and mean(window) < 0.5 * start:
        return f"health/eos_rate fell from {start:.2f} to {mean(window):.2f}"
    return None


def length_drift(length: Seen, scores: Seen) -> str | None:
    # Most of the reward that PPO gains may come from length alone (Singhal et al. 2023,
    # arXiv:2310.03716). Chance gives 20 independent steps r > 0.8 once in 87,000 times.
    window, start = length.recent(20), mean(length.first)
    if not window or mean(window[-5:]) <= 1.25 * start:
        return None
    r = correlation(window, scores.recent(20))
    if r > 0.8:
        grown = f"response_length grew from {start:.0f} to {mean(window[-5:]):.0f} tokens"
        return f"{grown}, and goes with the scores (r = {r:.2f} over 20 steps)"
    return None


def equal_scores(std: Seen) -> str | None:
    if std.recent(3) == [0, 0, 0]:
        return "what is learned from has been the same for all responses of a batch for 3 steps"
    return None


def gradient_spike(norm: Seen) -> str | None:
    # Ten times the median of 10 steps or more before it: rule of thumb.
    # It is 0 while a critic with a trunk of its own warms up: the policy has no gradient then.
    before = norm.latest[:-1]
    if len(before) >= 10 and norm.latest[-1] > 10 * median(before) > 0:
        return f"grad_norm is {norm.latest[-1]:.3g}, {median(before):.3g} is usual"
    return None


def repeated_responses(dup_rate: Seen) -> str | None:
    # Nothing is learned from comparing a text with itself: rule of thumb.
    window = dup_rate.recent(3)
    if window and mean(window) > 0.5:
        return f"health/dup_rate is {mean(window):.2f} on average over 3 steps"
    return None


RULES = (
    Rule("kl_at_start", ("objective/kl",), kl_at_start,
         "the reference is another model than the policy: leave out --ref, unless that is meant"),
    Rule("negative_kl", ("objective/kl",), negative_kl,
         "updates are too large, or texts are drawn from another law than is scored: lower "
         "learning_rate; look at health/logprobs_diff, which dtype float32 keeps at rounding"),
    Rule("large_update", ("policy/approxkl_avg",), large_update,
         "an iteration moves the policy too far: lower learning_rate or epochs"),
    Rule("clipped_policy", ("policy/clipfrac_avg",), clipped_policy,
         "updates run into the clip: lower learning_rate, epochs or mini_batches"),
    Rule("clipped_value", ("val/clipfrac_avg",), clipped_value,
         "rewards are large for value_clip, which is in their units: set value_clip none"),
    Rule("useless_critic", ("health/explained_variance",), useless_critic,
         "the critic predicts worse than a constant: raise vf_coef, or start it with --critic"),
    Rule("entropy_collapse", ("policy/entropy_avg",), entropy_collapse,
         "the policy hardly varies what it writes: raise kl_coef, lower learning_rate"),
    Rule("endless_responses", ("health/eos_rate",), endless_responses,
         "the reward does not mind texts that are cut: raise missing_eos_penalty"),
    Rule("length_drift", ("response_length", "objective/scores"), length_drift,
         "the reward may pay for length: look at the samples, raise kl_coef, mend the reward"),
    Rule("equal_scores", ("objective/learned_scores_std",), equal_scores,
         "nothing tells good texts from bad: check --reward (or, with bootstrap_truncated, whether "
         "any response ends), raise batch_size or temperature"),
    Rule("gradient_spike", ("grad_norm",), gradient_spike,
         "one batch pulls much harder than the others: look at its rollout, lower max_grad_norm"),
    Rule("repeated_responses", ("health/dup_rate",), repeated_responses,
         "the policy gives the same answers again: raise temperature or kl_coef"),
)


def check(
    history: Mapping[str, list[float]], step: int, metrics: Mapping[str, float]
) -> tuple[list[Alarm], History]:
    """What to tell after a step, and the history with that step in it.

    Args:
        history: as the last call returned it, empty at the start of a run; it is not changed.
        step: its number, from 1.
        metrics: of that step alone. A rule whose metrics are not all there is not asked.
    Returns:
        (alarms that were not told before, history), the history made of lists of numbers.
    """
    history = {name: list(values) for name, values in history.items()}
    steps = int(history.get("steps", [0])[0]) + 1
    history["steps"] = [steps]
    for name in sorted({name for rule in RULES for name in rule.metrics if name in metrics}):
        history[f"first {name}"] = [*history.get(f"first {name}", []), metrics[name]][:FIRST]
        history[name] = [*history.get(name, []), metrics[name]][-LAST:]
    alarms = []
    for rule in RULES:
        if f"told {rule.name}" in history or not all(name in metrics for name in rule.metrics):
            continue
        series = [Seen(history[f"first {n}"], history[n], steps) for n in rule.metrics]
        if seen := rule.look(*series):
            history[f"told {rule.name}"] = [step]
            alarms.append(Alarm(rule.name, step, f"{seen}: {rule.advice}"))
    return alarms, history
