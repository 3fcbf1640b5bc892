"""Alarms: what a run's numbers say is going wrong, with the likely cause and what to change.

Each is raised once a run. `check_alarms` is a pure function of a history, which is part of the
state, so a resumed run raises those of the uninterrupted one. The comment above a rule names the
source of its threshold, or says that it is a rule of thumb.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import NamedTuple

from minirlhf.equations.intervals import pearson

FIRST, LAST = 5, 20  # values kept of each metric: the first and the latest

History = dict[str, list[float]]  # "METRIC", "first METRIC", "told ALARM", "steps"


class Alarm(NamedTuple):
    name: str
    step: int
    text: str  # what was seen, its cause, the setting to change
    word: str = "alarm"  # or "note", of what is usual

    def __str__(self) -> str:
        return f"{self.word} at step {self.step}: {self.name}: {self.text}"


class Seen(NamedTuple):
    """Of one metric: its first FIRST and latest LAST values, and how many steps there were."""

    name: str
    first: list[float]
    latest: list[float]
    steps: int

    def recent(self, n: int) -> list[float]:
        """The latest n values; none where there are fewer."""
        return self.latest[-n:] if len(self.latest) >= n else []


Test = Callable[..., str | None]  # one Seen a metric -> what is wrong, or None


class Rule(NamedTuple):
    name: str
    metrics: tuple[str, ...]
    test: Test
    advice: str
    word: str = "alarm"


# ------------------------------------------------------------------------------------------ tests


def mean_above(limit: float, steps: int, shown: str = "{:.2f}") -> Test:
    """Whether the latest values are too large on average."""

    def test(seen: Seen) -> str | None:
        window = seen.recent(steps)
        if window and mean(window) > limit:
            return f"{seen.name} is {shown.format(mean(window))} on average over {steps} steps"
        return None

    return test


def mean_fell(share: float, shown: str = "{:.2f}") -> Test:
    """Whether the latest 5 values are on average below a share of what the first ones were."""

    def test(seen: Seen) -> str | None:
        window, start = seen.recent(5), mean(seen.first)
        if window and mean(window) < share * start:
            return f"{seen.name} fell from {shown.format(start)} to {shown.format(mean(window))}"
        return None

    return test


def rose_above(limit: float) -> Test:
    """Whether the latest 5 values are on average above the limit, and twice what the first were."""

    def test(seen: Seen) -> str | None:
        window, start = seen.recent(5), mean(seen.first)
        if window and mean(window) > max(limit, 2 * start):
            return f"{seen.name} rose from {start:.2f} to {mean(window):.2f}"
        return None

    return test


def not_zero_at_start(kl: Seen) -> str | None:
    if kl.steps == 1 and abs(kl.latest[0]) > 0.1:
        return f"{kl.name} is {kl.latest[0]:.3g} nats before any training"
    return None


def surely_negative(kl: Seen) -> str | None:
    window = kl.recent(10)
    if window and mean(window) + 4 * stdev(window) / len(window) ** 0.5 < 0:
        return f"{kl.name} is {mean(window):.3g} nats on average over 10 steps"
    return None


def worse_than_constant(explained: Seen) -> str | None:
    window = explained.recent(5)
    if explained.steps >= 15 and window and mean(window) < 0:
        return f"{explained.name} is {mean(window):.2f} on average over 5 steps"
    return None


def grows_with_score(length: Seen, scores: Seen) -> str | None:
    window, start = length.recent(20), mean(length.first)
    if not window or mean(window[-5:]) <= 1.25 * start:
        return None
    r = pearson(window, scores.recent(20))
    if r is not None and r > 0.8:
        grown = f"{length.name} grew from {start:.0f} to {mean(window[-5:]):.0f} tokens"
        return f"{grown}, and goes with the scores (r = {r:.2f} over 20 steps)"
    return None


def no_spread(std: Seen) -> str | None:
    if std.recent(3) == [0, 0, 0]:
        return "what is learned from has been the same for all responses of a batch for 3 steps"
    return None


def spike(norm: Seen) -> str | None:
    before = norm.latest[:-1]
    # The norm is 0 while a critic with a trunk of its own warms up, as the policy then has no
    # gradient: a median of 0 says nothing.
    if len(before) >= 10 and norm.latest[-1] > 10 * median(before) > 0:
        return f"{norm.name} is {norm.latest[-1]:.3g}, {median(before):.3g} is usual"
    return None


def both_fall(chosen: Seen, rejected: Seen, margins: Seen) -> str | None:
    windows = [seen.recent(5) for seen in (chosen, rejected, margins)]
    if not all(windows):
        return None
    means = [mean(window) for window in windows]
    if means[0] < -0.01 and means[1] < 0 < means[2]:
        numbers = "{:.3g} and {:.3g}, {:.3g} apart".format(*means)
        return f"{chosen.name} and {rejected.name} are {numbers}, on average over 5 steps"
    return None


# ------------------------------------------------------------------------------------------ rules

RULES = (
    # The reference is where the policy starts (Ziegler et al. 2019, sec. 2), so it is 0; with
    # another --ref it need not be. A tenth of a nat a response: rule of thumb.
    Rule("kl_at_start", ("objective/kl",), not_zero_at_start,
         "the reference is another model than the policy: leave out --ref, unless that is meant"),
    # A KL is never below 0, its estimate k1 may be: the mean of 10 steps lies 4 standard errors
    # below 0 by chance in one window of 600 (Student's t), and these windows overlap.
    Rule("negative_kl", ("objective/kl",), surely_negative,
         "updates are too large, or the sampled distribution is not the scored one: lower "
         "learning_rate; look at health/logprobs_diff, which dtype float32 keeps at rounding"),
    # Usually below 0.02 (Huang et al. 2022, "The 37 Implementation Details of PPO"); five times it.
    Rule("large_update", ("policy/approxkl_avg",), mean_above(0.1, 5, "{:.3g} nats a token"),
         "an iteration moves the policy too far: lower learning_rate or epochs"),
    # With a third of the gradient clipped away, the rest is no longer that of the objective: rule
    # of thumb. Schulman et al. 2017, sec. 3, has the clip for outliers.
    Rule("clipped_policy", ("policy/clipfrac_avg",), mean_above(0.3, 5),
         "updates run into the clip: lower learning_rate, epochs or mini_batches"),
    Rule("clipped_policy", ("clip_ratio/region_mean",), mean_above(0.3, 5),
         "updates run into the clip: lower learning_rate, epochs or mini_batches"),
    # value_clip is in units of the reward: a critic with far to go is held back (rule of thumb).
    Rule("clipped_value", ("val/clipfrac_avg",), mean_above(0.5, 5),
         "rewards are large for value_clip, which is in their units: set value_clip none"),
    # Below 0 a constant would predict better; the first 10 steps are for learning.
    Rule("useless_critic", ("health/explained_variance",), worse_than_constant,
         "the critic predicts worse than a constant: raise vf_coef, or start it with --critic"),
    # Reward is gained at the cost of entropy, and without any nothing more is gained (Cui et al.
    # 2025, arXiv:2505.22617, eq. 6). A fifth of the first steps' is a rule of thumb.
    Rule("entropy_collapse", ("policy/entropy_avg",), mean_fell(0.2, "{:.3g} nats a token"),
         "the policy hardly varies what it writes: raise kl_coef, lower learning_rate"),
    Rule("entropy_collapse", ("entropy",), mean_fell(0.2, "{:.3g} nats a token"),
         "the policy hardly varies what it writes: raise kl_coef, lower learning_rate"),
    # Truncated texts are not what the reward was trained on; half of the first steps' (rule of
    # thumb).
    Rule("endless_responses", ("health/eos_rate",), mean_fell(0.5),
         "the reward does not mind truncated texts: raise missing_eos_penalty"),
    Rule("endless_responses", ("completions/clipped_ratio",), rose_above(0.5),
         "the reward does not mind truncated texts: raise missing_eos_penalty"),
    # Most of the reward that PPO gains may come from length alone (Singhal et al. 2023,
    # arXiv:2310.03716). Chance gives 20 independent steps r > 0.8 once in 87,000 times.
    Rule("length_drift", ("response_length", "objective/scores"), grows_with_score,
         "the reward may pay for length: look at the samples, raise kl_coef, correct the reward"),
    Rule("length_drift", ("completions/mean_length", "reward"), grows_with_score,
         "the reward may pay for length: look at the samples, raise kl_coef, correct the reward"),
    Rule("equal_scores", ("objective/learned_scores_std",), no_spread,
         "nothing tells good texts from bad: check --reward (or, with bootstrap_truncated, whether "
         "any response ends), raise batch_size or temperature"),
    # Where four of five groups agree, a rollout is worth a fifth of what it costs: rule of thumb.
    # Yu et al. 2025 (arXiv:2503.14476), sec. 3.2, see their share grow.
    Rule("equal_groups", ("frac_reward_zero_std",), mean_above(0.8, 5),
         "most groups agree and teach nothing: take prompts that are answered well now and then, "
         "raise samples_per_prompt or temperature, or set resample"),
    # Ten times the median of 10 steps or more before it: rule of thumb.
    Rule("gradient_spike", ("grad_norm",), spike,
         "one batch pulls much harder than the others: look at its rollout, lower max_grad_norm"),
    # Nothing is learned from comparing a text with itself: rule of thumb.
    Rule("repeated_responses", ("health/dup_rate",), mean_above(0.5, 3),
         "the policy gives the same answers again: raise temperature or kl_coef"),
)

DPO_RULES = (
    # A reward is beta times how much likelier a response is than under the reference. Likelihood
    # displacement: Razin et al. 2024 (arXiv:2410.08847); seen before by Pal et al. 2024
    # (arXiv:2402.13228). The loss asks for the margin alone. Less than 0.01, a tenth of a nat a
    # response at a beta of 0.1, it is the noise of a run's first steps: rule of thumb.
    Rule("both_fall", ("rewards/chosen", "rewards/rejected", "rewards/margins"), both_fall,
         "both kinds of response have become less likely than under the reference, the rejected "
         "ones more so: usual, since the loss asks for their difference alone, but what they lose "
         "goes to texts that are neither: look at samples; sft_coef holds the chosen ones up, a "
         "larger beta holds both", "note"),
)


def check_alarms(
    history: Mapping[str, list[float]], step: int, metrics: Mapping[str, float],
    rules: Sequence[Rule] = RULES,
) -> tuple[list[Alarm], History]:
    """The alarms that a step raises, and the history with that step in it.

    Args:
        history: as the last call returned it, empty at the start of a run; it is not changed.
        step: its number, from 1.
        metrics: of that step alone. A rule is skipped where one of its metrics is missing.
    Returns:
        (alarms that this run has not raised before, history), the history made of lists of numbers.
    """
    history = {name: list(values) for name, values in history.items()}
    steps = int(history.get("steps", [0])[0]) + 1
    history["steps"] = [steps]
    for name in sorted({name for rule in rules for name in rule.metrics if name in metrics}):
        history[f"first {name}"] = [*history.get(f"first {name}", []), metrics[name]][:FIRST]
        history[name] = [*history.get(name, []), metrics[name]][-LAST:]
    alarms = []
    for rule in rules:
        if f"told {rule.name}" in history or not all(name in metrics for name in rule.metrics):
            continue
        series = [Seen(n, history[f"first {n}"], history[n], steps) for n in rule.metrics]
        if what := rule.test(*series):
            history[f"told {rule.name}"] = [step]
            alarms.append(Alarm(rule.name, step, f"{what}: {rule.advice}", rule.word))
    return alarms, history
