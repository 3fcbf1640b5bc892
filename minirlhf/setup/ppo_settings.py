"""The settings of PPO, what they refuse, and the small objects that they stand for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from minirlhf.batches.rollouts import KL_ESTIMATORS
from minirlhf.equations.policy import Surrogate, clipped_surrogate
from minirlhf.equations.scores import MISSING_EOS, SCALINGS, EndRule, end_rule
from minirlhf.files.sieve import column_problems
from minirlhf.models.generation import Sampling
from minirlhf.rewards import parse
from minirlhf.rewards.service import FORMS
from minirlhf.run import optim
from minirlhf.run.settings import setting


@dataclass(frozen=True)
class PPOConfig:
    model: str = setting("", "language model to align", metavar="FOLDER", required=True)
    data: str = setting(
        "", "prompts: JSON lines, JSON, CSV, TSV or .txt, also .gz", metavar="FILE", required=True
    )
    reward: tuple[str, ...] = setting(
        (), "reward-model folder, file.py:function or http://host:port/path; of several, also "
        "'0.5*SOURCE' (in quotes: some shells expand the *), the weighted sum",
        metavar="SOURCE", required=True,
    )
    out: str = setting("", "folder of the run", metavar="DIR", required=True)
    eval_data: tuple[str, ...] = setting((), "held-out prompts, more as NAME=FILE", metavar="FILE")
    eval_every: int = setting(0, "steps between evaluations; 0: start and end only", at_least=0)
    eval_prompts: int | None = setting(None, "at most so many of each held-out file", at_least=2)
    keep_best: bool = setting(False, "export the policy of the best evaluation so far to best/")
    ref: str | None = setting(None, "reference; none: the policy at step 0", metavar="FOLDER")
    critic: str | None = setting(
        None, "reward model to start a critic of its own from; none: a head on the policy's trunk",
        metavar="FOLDER",
    )
    train_critic: bool = setting(True, "whether a critic of its own learns")
    # rollout
    steps: int = setting(100, "iterations of sampling and optimising", at_least=1)
    batch_size: int = setting(64, "prompts sampled in an iteration", at_least=1)
    max_new_tokens: int = setting(64, "tokens of the longest response", at_least=1)
    temperature: float = setting(
        1.0, "of sampling, and of every log-prob; 0, greedy, would explore nothing", above=0
    )
    top_k: int = setting(0, "draw from the k most probable tokens; 0: all", at_least=0)
    top_p: float = setting(
        1.0, "draw from the fewest tokens whose mass reaches this", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "draw from tokens at least this fraction of the best", at_least=0, at_most=1
    )
    min_new_tokens: int = setting(0, "no eos is drawn before so many tokens", at_least=0)
    stop: tuple[str, ...] = setting((), "strings that end a response", metavar="TEXT")
    rollout_batch_size: int = setting(256, "rows sampled side by side", at_least=1)
    max_prompt_length: int | None = setting(
        None, "tokens of the longest prompt; none: what the models have room for", at_least=1
    )
    overlong: str = setting(
        "error", "what happens to longer prompts", choices=("error", "drop", "truncate_prompt_left")
    )
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or list them in rejected.jsonl and go on",
        choices=("error", "skip"),
    )
    fix_text: bool = setting(False, "replace halves of surrogate pairs by U+FFFD")
    allow_empty_prompt: bool = setting(False, "whether a prompt may be empty")
    max_drop: float = setting(
        1.0, "share of a file's rows that may be left out; 1: no limit", at_least=0, at_most=1
    )
    # reward
    reward_format: str = setting("ids", "requests to a reward service", choices=FORMS)
    reward_timeout: float = setting(
        60.0, "seconds in which a reward service must have replied", above=0, at_most=86400
    )
    reward_connect_timeout: float = setting(
        5.0, "seconds to reach a reward service", above=0, at_most=86400
    )
    reward_retries: int = setting(
        4, "more attempts where a reward service fails", at_least=0, at_most=100
    )
    reward_batch_size: int = setting(64, "texts in a request to a reward service", at_least=1)
    reward_token_file: str | None = setting(
        None, "holds the bearer token of a reward service", metavar="FILE"
    )
    kl_coef: float = setting(0.05, "weight of the KL penalty, per nat", at_least=0)
    kl_estimator: str = setting(
        "k1", "what is penalised: an estimate from the sampled tokens, or full, of all tokens",
        choices=KL_ESTIMATORS,
    )
    kl_in: str = setting("reward", "where the penalty enters", choices=("reward", "loss"))
    kl_target: float | None = setting(None, "nats a response to steer kl_coef to", above=0)
    kl_horizon: float = setting(10_000.0, "episodes over which kl_coef adapts", above=0)
    missing_eos_penalty: float = setting(0.0, "for a response that its length cut", at_least=0)
    missing_eos: str = setting(
        "subtract", "how: off the score, instead of it, or growing before the limit",
        choices=MISSING_EOS,
    )
    missing_eos_buffer: int = setting(
        0, "tokens before the limit over which a ramp grows", at_least=0
    )
    score_scaling: str = setting(
        "none", "scores in units of their running spread (scale), less their mean (normalize)",
        choices=SCALINGS,
    )
    score_clip: float | None = setting(
        None, "largest size of a score, after scaling; none: off", above=0
    )
    whiten_rewards: bool = setting(False, "rewards to std 1 over the rollout, their mean kept")
    bootstrap_truncated: bool = setting(
        False, "a cut response earns the critic's value of its end instead of its score"
    )
    gamma: float = setting(1.0, "discount", above=0, at_most=1)
    lam: float = setting(0.95, "GAE's lambda", at_least=0, at_most=1)
    # optimisation
    epochs: int = setting(4, "passes over each rollout", at_least=1)
    mini_batches: int = setting(1, "optimizer steps in a pass", at_least=1)
    micro_batch_size: int = setting(8, "most rows in one forward pass", at_least=1)
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    clip_low: float = setting(0.2, "policy ratio clipped below 1 minus this", at_least=0, at_most=1)
    clip_high: float = setting(0.2, "policy ratio clipped above 1 plus this", at_least=0)
    dual_clip: float | None = setting(
        None, "bound on the ratio where the advantage is negative; none: off", above=1
    )
    max_ratio: float | None = setting(
        None, "updates whose mean ratio is above this are not made, and counted; none: off", above=1
    )
    early_stop_kl: float | None = setting(
        None, "nats a token (k3, mean of an epoch) that end a rollout's epochs; none: off", above=0
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus, per nat", at_least=0)
    value_clip: float | None = setting(0.2, "value change clipped at this; none: off", above=0)
    vf_coef: float = setting(0.1, "weight of the value loss", at_least=0)
    whiten_advantages: bool = setting(True, "advantages to mean 0, std 1 over the rollout")
    ptx_data: str | None = setting(
        None, "texts whose language-model loss is mixed into each update", metavar="FILE"
    )
    ptx_coef: float = setting(0.0, "weight of that loss", at_least=0)
    ptx_batch_size: int = setting(16, "texts of that loss in an update", at_least=1)
    learning_rate: float = setting(3e-6, "peak step size of AdamW", above=0)
    critic_learning_rate: float | None = setting(
        None, "the critic's; none: learning_rate, ten times it for a head that starts from zero",
        above=0,
    )
    critic_warmup_steps: int = setting(0, "iterations in which only the critic learns", at_least=0)
    schedule: str = setting("linear", "decay of the learning rate", choices=optim.SCHEDULES)
    warmup_steps: int = setting(0, "iterations until the peak learning rate", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's decay of matrices", at_least=0)
    adam_epsilon: float = setting(1e-5, "AdamW's epsilon", above=0)
    max_grad_norm: float | None = setting(1.0, "gradient norm to clip at; none: off", above=0)
    skip_nonfinite: int = setting(
        0, "updates in a row that may be skipped where numbers are not finite", at_least=0
    )
    lora_rank: int = setting(
        0, "train adapters of this rank; 0: all weights", at_least=0, at_most=4096
    )
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    gradient_checkpointing: bool = setting(
        False, "less memory for a forward pass more in each update"
    )
    compile: bool = setting(
        False, "torch.compile for the passes over whole rows; needs a C++ compiler"
    )
    offload_frozen: bool = setting(
        False, "hold reference and reward models only while needed: they are read again each time"
    )
    # run
    dtype: str = setting(
        "auto", "of weights and compute; auto: float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: the first CUDA GPU, else the CPU")
    seed: int = setting(0, "of prompt order, sampling and mini-batches")
    sample_every: int = setting(10, "steps between tables of samples; 0: none", at_least=0)
    sample_prompts: int = setting(4, "fixed prompts in the table", at_least=1)
    save_rollouts: bool = setting(False, "all rollouts into samples.jsonl, ids and rewards too")
    log_every: int = setting(1, "steps between lines of the log", at_least=1)
    save_every: int = setting(20, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")
    allow_data_change: bool = setting(False, "resume although data files have changed")
    allow_setting_change: bool = setting(
        False, "resume although settings or reward functions have changed"
    )

    def check(self) -> list[str]:
        return [
            *self._sampling_problems(), *self._reward_problems(), *self._update_problems(),
            *self._evaluation_problems(), *parse.problems(self),
            *column_problems(self.columns),
        ]

    def _sampling_problems(self) -> Iterator[str]:
        if self.top_k == 1 or self.min_p == 1:
            name, use = ("top_k", "0, or 2 or more") if self.top_k == 1 else ("min_p", "less")
            yield (
                f"{name} 1: one token is left to draw, whose log-prob is 0 whatever the policy; "
                f"use {use}"
            )
        if not all(self.stop):
            yield "stop: got an empty string, which every text contains"
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}: lower one or raise the other"
            )

    def _reward_problems(self) -> Iterator[str]:
        if self.kl_in == "loss" and self.kl_estimator in ("k1", "abs"):
            yield (
                f"kl_in loss with kl_estimator {self.kl_estimator}: the gradient of that estimate "
                "is not the KL's (k1's is 0 on average); use k2 or full, or k3 as GRPO does"
            )
        own = self.lora_rank and self.ref is None  # the policy under its adapters is the reference
        if self.offload_frozen and self.kl_in == "loss" and self.kl_estimator == "full" and not own:
            yield "offload_frozen: a full KL in the loss reads the reference in each update"
        if self.kl_target is not None and self.kl_coef == 0:
            yield "kl_target: kl_coef is 0, which no factor can move; use one above 0"
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            yield (
                f"kl_horizon {self.kl_horizon:g} is too short for batch_size {self.batch_size}: "
                f"kl_coef could fall to 0 in one step; use more than {self.batch_size / 5:g}"
            )
        if self.missing_eos == "ramp" and not 1 <= self.missing_eos_buffer <= self.max_new_tokens:
            yield (
                f"missing_eos ramp: missing_eos_buffer is {self.missing_eos_buffer}, must be from "
                f"1 to max_new_tokens {self.max_new_tokens}"
            )
        if self.missing_eos == "ramp" and self.missing_eos_penalty == 0:
            yield "missing_eos ramp: missing_eos_penalty is 0, a ramp to nothing; use one above 0"
        if self.missing_eos != "ramp" and self.missing_eos_buffer:
            yield "missing_eos_buffer goes with missing_eos ramp"
        rescaled = self.score_scaling != "none" or self.score_clip is not None
        if self.bootstrap_truncated and self.critic and (rescaled or self.whiten_rewards):
            yield (
                "bootstrap_truncated: a critic from a reward model values cut responses in that "
                "model's scale; leave out score_scaling, score_clip and whiten_rewards"
            )
        weighed = len(self.reward) == 1 and parse.parse_source(self.reward[0]).weight != 1
        if not self.train_critic and (rescaled or weighed or self.whiten_rewards):
            yield (
                "no-train-critic: its values stay in the reward model's scale; leave out "
                "score_scaling, score_clip, whiten_rewards and the reward's weight"
            )
        eos_rule = self.missing_eos_penalty > 0 or self.missing_eos != "subtract"
        if self.bootstrap_truncated and eos_rule:
            yield (
                "bootstrap_truncated: a cut response then has no score that a missing_eos rule "
                "could change; leave out one of them"
            )

    def _update_problems(self) -> Iterator[str]:
        rows, micro, minis = self.batch_size, self.micro_batch_size, self.mini_batches
        if micro * minis > rows:
            legal = [f"batch_size {micro * minis}"]
            legal += [f"micro_batch_size {rows // minis}"] if minis <= rows else []
            legal += [f"mini_batches {rows // micro}"] if micro <= rows else []
            yield (
                f"batch_size {rows} is less than {minis} mini_batches of micro_batch_size {micro}: "
                f"use {' or '.join(legal)}"
            )
        if self.compile and self.dtype == "bfloat16":
            yield (
                "compile with bfloat16: graphs with and without a gradient round apart, and the "
                "first ratio is then not 1; leave out one of them"
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            yield f"dual_clip {self.dual_clip:g}: must be above 1 + clip_high {self.clip_high:g}"
        if self.epochs == self.mini_batches == 1:
            acts = {"max_ratio": self.max_ratio, "dual_clip": self.dual_clip}
            for name in (name for name, value in acts.items() if value is not None):
                flag = f"--{name.replace('_', '-')}"
                yield (
                    f"{name}: the ratio of the only update is 1; raise epochs or mini_batches (of "
                    f"a preset: give {flag} none)"
                )
        if self.early_stop_kl is not None and self.epochs == 1:
            yield "early_stop_kl: there is one epoch, and none after it to leave out"
        elif self.early_stop_kl is not None and self.epochs == 2 and self.mini_batches == 1:
            yield "early_stop_kl: one mini-batch moves nothing before the last of two epochs"
        if (self.ptx_data is None) != (self.ptx_coef == 0):
            yield "ptx_data and ptx_coef go together: give both, or neither"
        if self.critic is None and not self.train_critic:
            yield "no-train-critic: goes with --critic, a value head has to learn"
        if not self.train_critic and (self.critic_learning_rate or self.critic_warmup_steps):
            yield (
                "no-train-critic: leave out critic_learning_rate and critic_warmup_steps (of a "
                "preset: give --critic-learning-rate none)"
            )
        if self.critic_warmup_steps >= self.steps:
            yield (
                f"critic_warmup_steps {self.critic_warmup_steps}: the policy would never learn, "
                f"there are {self.steps} steps"
            )

    def _evaluation_problems(self) -> Iterator[str]:
        if not self.eval_data:
            given = {"eval_every": self.eval_every, "eval_prompts": self.eval_prompts,
                     "keep_best": self.keep_best}
            yield from (f"{name}: goes with --eval-data" for name, value in given.items() if value)
        elif self.keep_best and not self.eval_every:
            yield "keep_best: goes with --eval-every, the policy at the end is in model/"

    @property
    def reward_kl(self) -> str | None:
        """Estimator of the KL penalty in the rewards; None where the penalty is a loss."""
        return self.kl_estimator if self.kl_in == "reward" else None

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p,
            stop_strings=self.stop, min_new_tokens=self.min_new_tokens,
        )

    @property
    def of_the_start(self) -> set[str]:
        """Settings that belong to what a run's state remembers, so that no resume may change them:
        evaluations compare with scores of the start, and a target moves its KL coefficient."""
        names = {"eval_data", "eval_prompts"}
        if self.eval_data:
            names |= {"reward", "reward_format", "seed", "stop", "temperature", "top_k", "top_p",
                      "min_p", "max_new_tokens", "min_new_tokens", "keep_best", "columns",
                      "max_prompt_length", "overlong", "bad_rows", "fix_text",
                      "allow_empty_prompt"}
        return names if self.kl_target is None else names | {"kl_coef"}

    @property
    def policy_loss(self) -> Callable[[Tensor, Tensor, Tensor], Surrogate]:
        """(log-probs, old log-probs, advantages) -> loss."""
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return partial(clipped_surrogate, **clips, dual_clip=self.dual_clip)

    @property
    def end_rule(self) -> EndRule:
        return end_rule(
            self.missing_eos, self.missing_eos_penalty, self.max_new_tokens, self.missing_eos_buffer
        )

    @property
    def critic_lr_scale(self) -> float:
        """Learning rate of the critic as a multiple of the policy's."""
        if self.critic_learning_rate is not None:
            return self.critic_learning_rate / self.learning_rate
        return 1.0 if self.critic else 10.0
