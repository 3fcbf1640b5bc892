"""Alarms: what a run's numbers say is going wrong, with the likely cause and what to change.

Each is raised once a run. `check_alarms` is a pure function of a history, which is part of the
state, so a resumed run raises those of the uninterrupted one. The comment above a rule names the
source of its threshold, or says that it is a rule of thumb.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import NamedTuple

from minirlhf.equations.intervals import pearson
from minirlhf.run.language import tell

FIRST, LAST = 5, 20  # values kept of each metric: the first and the latest

History = dict[str, list[float]]  # "METRIC", "first METRIC", "told ALARM" (step, numbers), "steps"


class Seen(NamedTuple):
    """Of one metric: its first FIRST and latest LAST values, and how many steps there were."""

    name: str
    first: list[float]
    latest: list[float]
    steps: int

    def recent(self, n: int) -> list[float]:
        """The latest n values; none where there are fewer."""
        return self.latest[-n:] if len(self.latest) >= n else []


Test = Callable[..., tuple[float, ...] | None]  # one Seen a metric -> what is wrong, in numbers


class Rule(NamedTuple):
    name: str
    metrics: tuple[str, ...]
    test: Test
    seen: str  # a sentence; {m} and {n} are the first metrics, {a}, {b}, {c} the test's numbers
    advice: str  # the likely cause, the setting to change
    word: str = "alarm"


class Alarm(NamedTuple):
    """A rule that found something; `numbers` of its test, none in states of older versions."""

    rule: Rule
    step: int
    numbers: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def text(self) -> str:
        return self.told()

    def told(self, language: str = "en") -> str:
        """What was seen, its cause, the setting to change."""
        advice = tell(self.rule.advice, language)
        if not self.numbers:
            return advice
        values = dict(zip("mn", self.rule.metrics[:2], strict=False))
        values |= dict(zip("abc", self.numbers, strict=False))
        return tell("{seen}: {advice}", language, advice=advice,
                    seen=tell(self.rule.seen, language, **values))

    def __str__(self) -> str:
        return f"{self.rule.word} at step {self.step}: {self.name}: {self.text}"


# ------------------------------------------------------------------------------------------ tests

AVERAGE = "{m} is {a:.2f} on average over {b} steps"
NATS = "{m} is {a:.3g} nats a token on average over {b} steps"
FELL = "{m} fell from {a:.2f} to {b:.2f}"
FELL_NATS = "{m} fell from {a:.3g} to {b:.3g} nats a token"
ROSE = "{m} rose from {a:.2f} to {b:.2f}"
LONGER = (
    "{m} grew from {a:.0f} to {b:.0f} tokens, and goes with the scores (r = {c:.2f} over 20 steps)"
)


def mean_above(limit: float, steps: int) -> Test:
    """Whether the latest values are too large on average; their mean, and how many they are."""

    def test(seen: Seen) -> tuple[float, ...] | None:
        window = seen.recent(steps)
        return (mean(window), steps) if window and mean(window) > limit else None

    return test


def mean_fell(share: float) -> Test:
    """Whether the latest 5 values are on average below a share of what the first ones were; both
    means."""

    def test(seen: Seen) -> tuple[float, ...] | None:
        window, start = seen.recent(5), mean(seen.first)
        return (start, mean(window)) if window and mean(window) < share * start else None

    return test


def rose_above(limit: float) -> Test:
    """Whether the latest 5 values are on average above the limit, and twice what the first were;
    both means."""

    def test(seen: Seen) -> tuple[float, ...] | None:
        window, start = seen.recent(5), mean(seen.first)
        risen = window and mean(window) > max(limit, 2 * start)
        return (start, mean(window)) if risen else None

    return test


def not_zero_at_start(kl: Seen) -> tuple[float, ...] | None:
    return (kl.latest[0],) if kl.steps == 1 and abs(kl.latest[0]) > 0.1 else None


def surely_negative(kl: Seen) -> tuple[float, ...] | None:
    window = kl.recent(10)
    if window and mean(window) + 4 * stdev(window) / len(window) ** 0.5 < 0:
        return mean(window), 10
    return None


def worse_than_constant(explained: Seen) -> tuple[float, ...] | None:
    window = explained.recent(5)
    if explained.steps >= 15 and window and mean(window) < 0:
        return mean(window), 5
    return None


def grows_with_score(length: Seen, scores: Seen) -> tuple[float, ...] | None:
    window, start = length.recent(20), mean(length.first)
    if not window or mean(window[-5:]) <= 1.25 * start:
        return None
    r = pearson(window, scores.recent(20))
    return (start, mean(window[-5:]), r) if r is not None and r > 0.8 else None


def no_spread(std: Seen) -> tuple[float, ...] | None:
    return (3,) if std.recent(3) == [0, 0, 0] else None


def spike(norm: Seen) -> tuple[float, ...] | None:
    before = norm.latest[:-1]
    # The norm is 0 while a critic with a trunk of its own warms up, as the policy then has no
    # gradient: a median of 0 says nothing.
    if len(before) >= 10 and norm.latest[-1] > 10 * median(before) > 0:
        return norm.latest[-1], median(before)
    return None


def both_fall(chosen: Seen, rejected: Seen, margins: Seen) -> tuple[float, ...] | None:
    windows = [seen.recent(5) for seen in (chosen, rejected, margins)]
    if not all(windows):
        return None
    means = tuple(mean(window) for window in windows)
    return means if means[0] < -0.01 and means[1] < 0 < means[2] else None


# ------------------------------------------------------------------------------------------ rules

RULES = (
    # The reference is where the policy starts (Ziegler et al. 2019, sec. 2), so it is 0; with
    # another --ref it need not be. A tenth of a nat a response: rule of thumb.
    Rule("kl_at_start", ("objective/kl",), not_zero_at_start,
         "{m} is {a:.3g} nats before any training",
         "the reference is another model than the policy: leave out --ref, unless that is meant"),
    # A KL is never below 0, its estimate k1 may be: the mean of 10 steps lies 4 standard errors
    # below 0 by chance in one window of 600 (Student's t), and these windows overlap.
    Rule("negative_kl", ("objective/kl",), surely_negative,
         "{m} is {a:.3g} nats on average over {b} steps",
         "updates are too large, or the sampled distribution is not the scored one: lower "
         "learning_rate; look at health/logprobs_diff, which dtype float32 keeps at rounding"),
    # Usually below 0.02 (Huang et al. 2022, "The 37 Implementation Details of PPO"); five times it.
    Rule("large_update", ("policy/approxkl_avg",), mean_above(0.1, 5), NATS,
         "an iteration moves the policy too far: lower learning_rate or epochs"),
    # With a third of the gradient clipped away, the rest is no longer that of the objective: rule
    # of thumb. Schulman et al. 2017, sec. 3, has the clip for outliers.
    Rule("clipped_policy", ("policy/clipfrac_avg",), mean_above(0.3, 5), AVERAGE,
         "updates run into the clip: lower learning_rate, epochs or mini_batches"),
    Rule("clipped_policy", ("clip_ratio/region_mean",), mean_above(0.3, 5), AVERAGE,
         "updates run into the clip: lower learning_rate, epochs or mini_batches"),
    # value_clip is in units of the reward: a critic with far to go is held back (rule of thumb).
    Rule("clipped_value", ("val/clipfrac_avg",), mean_above(0.5, 5), AVERAGE,
         "rewards are large for value_clip, which is in their units: set value_clip none"),
    # Below 0 a constant would predict better; the first 10 steps are for learning.
    Rule("useless_critic", ("health/explained_variance",), worse_than_constant, AVERAGE,
         "the critic predicts worse than a constant: raise vf_coef, or start it with --critic"),
    # Reward is gained at the cost of entropy, and without any nothing more is gained (Cui et al.
    # 2025, arXiv:2505.22617, eq. 6). A fifth of the first steps' is a rule of thumb.
    Rule("entropy_collapse", ("policy/entropy_avg",), mean_fell(0.2), FELL_NATS,
         "the policy hardly varies what it writes: raise kl_coef, lower learning_rate"),
    Rule("entropy_collapse", ("entropy",), mean_fell(0.2), FELL_NATS,
         "the policy hardly varies what it writes: raise kl_coef, lower learning_rate"),
    # Truncated texts are not what the reward was trained on; half of the first steps' (rule of
    # thumb).
    Rule("endless_responses", ("health/eos_rate",), mean_fell(0.5), FELL,
         "the reward does not mind truncated texts: raise missing_eos_penalty"),
    Rule("endless_responses", ("completions/clipped_ratio",), rose_above(0.5), ROSE,
         "the reward does not mind truncated texts: raise missing_eos_penalty"),
    # Most of the reward that PPO gains may come from length alone (Singhal et al. 2023,
    # arXiv:2310.03716). Chance gives 20 independent steps r > 0.8 once in 87,000 times.
    Rule("length_drift", ("response_length", "objective/scores"), grows_with_score, LONGER,
         "the reward may pay for length: look at the samples, raise kl_coef, correct the reward"),
    Rule("length_drift", ("completions/mean_length", "reward"), grows_with_score, LONGER,
         "the reward may pay for length: look at the samples, raise kl_coef, correct the reward"),
    Rule("equal_scores", ("objective/learned_scores_std",), no_spread,
         "what is learned from has been the same for all responses of a batch for {a} steps",
         "nothing tells good texts from bad: check --reward (or, with bootstrap_truncated, whether "
         "any response ends), raise batch_size or temperature"),
    # Where four of five groups agree, a rollout is worth a fifth of what it costs: rule of thumb.
    # Yu et al. 2025 (arXiv:2503.14476), sec. 3.2, see their share grow.
    Rule("equal_groups", ("frac_reward_zero_std",), mean_above(0.8, 5), AVERAGE,
         "most groups agree and teach nothing: take prompts that are answered well now and then, "
         "raise samples_per_prompt or temperature, or set resample"),
    # Ten times the median of 10 steps or more before it: rule of thumb.
    Rule("gradient_spike", ("grad_norm",), spike, "{m} is {a:.3g}, {b:.3g} is usual",
         "one batch pulls much harder than the others: look at its rollout, lower max_grad_norm"),
    # Nothing is learned from comparing a text with itself: rule of thumb.
    Rule("repeated_responses", ("health/dup_rate",), mean_above(0.5, 3), AVERAGE,
         "the policy gives the same answers again: raise temperature or kl_coef"),
)

DPO_RULES = (
    # A reward is beta times how much likelier a response is than under the reference. Likelihood
    # displacement: Razin et al. 2024 (arXiv:2410.08847); seen before by Pal et al. 2024
    # (arXiv:2402.13228). The loss asks for the margin alone. Less than 0.01, a tenth of a nat a
    # response at a beta of 0.1, it is the noise of a run's first steps: rule of thumb.
    Rule("both_fall", ("rewards/chosen", "rewards/rejected", "rewards/margins"), both_fall,
         "{m} and {n} are {a:.3g} and {b:.3g}, {c:.3g} apart, on average over 5 steps",
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
        if numbers := rule.test(*series):
            history[f"told {rule.name}"] = [step, *numbers]
            alarms.append(Alarm(rule, step, numbers))
    return alarms, history


def alarms_told(
    history: Mapping[str, list[float]], rules: Sequence[Rule] = RULES
) -> list[Alarm]:
    """The alarms that a run with this history has raised, the earliest first."""
    found = [
        Alarm(rule, int(told[0]), tuple(told[1:])) for rule in rules
        if (told := history.get(f"told {rule.name}")) and all(n in history for n in rule.metrics)
    ]
    return sorted(found, key=lambda alarm: alarm.step)
