"""The update of PPO: credit for each token of a rollout, then the clipped objective.

Schulman et al. 2017 (arXiv:1707.06347), eq. 7 and 9, with advantages by GAE (arXiv:1506.02438).
Read `ppo_step` first, then `accumulate`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf import interrupt, optim
from minirlhf.advantages import gae, token_rewards
from minirlhf.errors import NonFinite
from minirlhf.heads import ValueHeadModel
from minirlhf.kl import ESTIMATORS, kl_k3
from minirlhf.lora import has_lora
from minirlhf.losses import clipped_value_loss
from minirlhf.masking import masked_rescale, masked_standardize, masked_sum
from minirlhf.passes import TokenPass, kl_to_ref, policy_pass
from minirlhf.ppo_config import PPOConfig
from minirlhf.rollout import Rollout, RolloutBuffer
from minirlhf.texts import TextMix
from minirlhf.transformer import CausalLM


class PPOStats(NamedTuple):
    """Statistics of one `ppo_step`; means over the response tokens, those of all epochs alike."""

    policy_loss: float
    value_loss: float
    kl_loss: float  # kl_coef times the KL where it is a loss; else 0
    ptx_loss: float  # of the texts that are mixed in, before its weight; 0 without
    loss: float  # all of them with their weights
    approxkl: float  # mean of (new - old logprob)^2 / 2, nats
    policykl: float  # mean of old - new logprob, nats
    clipfrac: float  # share of tokens whose policy gradient was clipped
    value_clipfrac: float
    vpred: float  # value during the updates
    value_error: float  # mean of (value - return)^2
    entropy: float  # nats a token
    ratio: float
    ratio_var: float
    grad_norm: float  # mean over optimizer steps, before clipping
    critic_grad_norm: float  # of a critic with a trunk of its own; else 0: it is in grad_norm
    explained_variance: float  # 1 - var(returns - old values) / var(returns)
    non_score_reward: float  # mean over rows of the summed KL penalty, <= 0 on average
    first_ratio_gap: float  # largest |ratio - 1| before the first optimizer step; 0 if exact
    epochs: int  # passes made; fewer than asked for where the KL ended them


def assign_credit(buffer: RolloutBuffer, config: PPOConfig, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE)."""

    def pay(micro: Rollout) -> Rollout:
        kl, scores = penalised_kl(micro, config), micro.scores
        if config.bootstrap_truncated:
            scores = torch.where(micro.truncated, 0, scores)
        rewards = token_rewards(scores, kl, micro.response_mask, kl_coef)
        return micro._replace(
            rewards=rewards if micro.given_rewards is None else rewards + micro.given_rewards
        )

    def credit(micro: Rollout) -> Rollout:
        end = torch.where(micro.truncated, micro.last_values, 0) if bootstraps else None
        mask = micro.response_mask
        out = gae(micro.rewards, micro.old_values, mask, config.gamma, config.lam, end)
        return micro._replace(advantages=out.advantages, returns=out.returns)

    bootstraps = config.bootstrap_truncated
    buffer.update(pay)
    # Each is whitened over the whole rollout, so that no mini-batch split can change it.
    if config.whiten_rewards:
        rescale(buffer, "rewards", masked_rescale)
    buffer.update(credit)
    if config.whiten_advantages:
        rescale(buffer, "advantages", masked_standardize)


def penalised_kl(micro: Rollout, config: PPOConfig) -> Tensor:
    """(b, R) nats: what each token of a measured rollout pays for in its reward."""
    if config.kl_in == "loss":
        return torch.zeros_like(micro.old_logprobs)
    if config.kl_estimator == "full":
        return micro.full_kl
    return ESTIMATORS[config.kl_estimator](micro.old_logprobs, micro.ref_logprobs)


def rescale(
    buffer: RolloutBuffer, name: str, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    flat = buffer.tokens(name)
    buffer.set_tokens(name, function(flat, torch.ones_like(flat, dtype=torch.bool)))


class MiniBatchStats(NamedTuple):
    """What one mini-batch showed on its way to an optimizer step."""

    sums: dict[str, Tensor]  # over its response tokens
    tokens: int
    largest_gap: Tensor  # () largest |ratio - 1|
    ptx_loss: float
    grad_norm: float  # before clipping
    critic_grad_norm: float

    @property
    def ratio(self) -> float:
        return 1 + float(self.sums["gap"]) / self.tokens


class Update(NamedTuple):
    """What all mini-batches of one `ppo_step` share."""

    policy: ValueHeadModel
    ref: CausalLM | None
    config: PPOConfig
    kl_coef: float
    mix: TextMix | None
    learns_policy: bool  # False while the critic warms up: then the policy is frozen
    where: str  # for messages


def accumulate(
    update: Update, mini_batch: list[Rollout], number: int, begun: bool
) -> MiniBatchStats:
    """Gradient of one mini-batch's loss, in its micro-batches.

    Args:
        number: of this update among all of the run.
        begun: whether it is too late to stop.
    """
    policy, config = update.policy, update.config
    # Every token of the optimizer step weighs the same, however it is cut.
    tokens = sum(int(micro.response_mask.sum()) for micro in mini_batch)
    sums: dict[str, Tensor] = {}
    losses, gaps = [], []
    for micro in mini_batch:
        mask = micro.response_mask
        new = policy_pass(policy, micro, config.temperature)
        surrogate = config.policy_loss(new.logprobs, micro.old_logprobs, micro.advantages)
        value = clipped_value_loss(new.values, micro.old_values, micro.returns, config.value_clip)
        kl_loss = loss_of_kl(update, new, micro)
        of_policy = surrogate.loss + kl_loss
        if config.entropy_coef:  # its gradient costs as much as that of the log-probs
            of_policy = of_policy - config.entropy_coef * new.entropy
        total = config.vf_coef * value.loss + of_policy
        loss = masked_sum(total, mask) / tokens
        loss.backward()
        if not begun:
            interrupt.check()
        losses.append(loss.detach())
        gap = surrogate.ratio - 1
        gaps.append(gap[mask].abs().max())
        log_ratio = new.logprobs.detach() - micro.old_logprobs
        seen = {
            "policy_loss": surrogate.loss, "value_loss": value.loss, "kl_loss": kl_loss,
            "loss": total, "approxkl": log_ratio.square() / 2, "policykl": -log_ratio,
            "clipfrac": surrogate.clipped, "entropy": new.entropy,
            "value_clipfrac": value.clipped, "vpred": new.values,
            "value_error": (new.values - micro.returns).square(),
            "gap": gap, "gap_sq": gap.square(), "moved": kl_k3(micro.old_logprobs, new.logprobs),
        }  # fmt: skip
        sums = {k: sums.get(k, 0) + masked_sum(x.detach(), mask) for k, x in seen.items()}
    for micro, loss in zip(mini_batch, torch.stack(losses).tolist(), strict=True):
        rows = ", ".join(map(str, micro.rows.tolist()[:8]))
        optim.check_finite(f"{update.where} (rollout rows {rows})", {"loss": loss})
    mixes = update.mix is not None and update.learns_policy
    ptx_loss = update.mix.backward(policy.lm, number) if mixes else 0.0
    optim.check_finite(update.where, {"ptx_loss": ptx_loss})
    return MiniBatchStats(sums, tokens, torch.stack(gaps).max(), ptx_loss, *clip_gradients(update))


def loss_of_kl(update: Update, new: TokenPass, micro: Rollout) -> Tensor:
    """(b, R) KL to the reference as a loss, weighted; zeros where it is in the reward."""
    config = update.config
    if config.kl_in == "reward":
        return torch.zeros_like(micro.old_logprobs)
    policy, ref = update.policy.lm, update.ref
    kl = kl_to_ref(config.kl_estimator, policy, new, ref, micro, config.temperature)
    return update.kl_coef * kl


def clip_gradients(update: Update) -> tuple[float, float]:
    """Norms before clipping; a critic with a trunk of its own is another model, with its own."""
    policy, most = update.policy, update.config.max_grad_norm
    if policy.critic is None:
        return optim.clip_gradients(policy, most, update.where), 0.0
    critic = nn.ModuleList([policy.critic, policy.v_head])
    return tuple(optim.clip_gradients(part, most, update.where) for part in (policy.lm, critic))


def ppo_step(
    policy: ValueHeadModel,
    optimizer: torch.optim.Optimizer,
    rollout: RolloutBuffer,
    config: PPOConfig,
    iteration: int | None = None,
    kl_coef: float | None = None,
    counters: dict[str, int] | None = None,
    ref: CausalLM | None = None,
    mix: TextMix | None = None,
) -> PPOStats:
    """GAE and the clipped-PPO update on one rollout, for one's own loop.

    Args:
        rollout: measured (see `measure`); rewards, advantages and returns are filled here.
        iteration: 0, 1, … of the run. Decides, with config.seed, the order of the mini-batches and
            which texts of `mix` come, and whether the critic still warms up. None is 0.
        kl_coef: None is config.kl_coef.
        counters: where updates that were not made and early stops are counted.
        ref: needed where the full KL is a loss, unless the policy has adapters.
        mix: texts whose loss is added to each update.
    Raises:
        ValueError: there is no ref, or no iteration, where one is needed.
        NonFinite: a loss or gradient is not finite, before it is applied: more of them in a row
            than config.skip_nonfinite, or all of the rollout's.
    """
    if ref is None and config.kl_in == "loss" and config.kl_estimator == "full":
        if not has_lora(policy):
            raise ValueError("ref is None: a full KL in the loss needs it, or a policy's adapters")
    if iteration is None and config.critic_warmup_steps:
        raise ValueError("iteration is None: critic_warmup_steps needs it, give 0, 1, …")
    iteration = iteration or 0
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    counters = {} if counters is None else counters
    assign_credit(rollout, config, kl_coef)
    learns_policy = iteration >= config.critic_warmup_steps
    update = Update(policy, ref, config, kl_coef, mix, learns_policy, f"step {iteration + 1}")
    tried: list[MiniBatchStats | None] = []
    with nullcontext() if learns_policy else frozen(policy.lm):
        for epoch in range(config.epochs):
            parts = rollout.minibatches(config.mini_batches, config.seed, iteration, epoch)
            for i, mini_batch in enumerate(parts):
                number = (iteration * config.epochs + epoch) * config.mini_batches + i
                # From the first update on, a signal waits until the iteration is finished.
                work = partial(accumulate, update, mini_batch, number, begun=bool(tried))
                wanted = partial(within_max_ratio, config)
                seen = optim.update_or_skip(
                    optimizer, work, counters, config.skip_nonfinite, wanted
                )
                tried.append(seen)
            last = epoch + 1 == config.epochs  # none is left to end
            if not last and moved_too_far(tried[-len(parts) :], config.early_stop_kl):
                counters["early_stops"] = counters.get("early_stops", 0) + 1
                break
    seen = [seen for seen in tried if seen is not None]
    if not seen:
        what = f"all {len(tried)} updates were skipped"
        raise NonFinite(update.where, what, "lower learning_rate")
    ptx_coef = 0.0 if mix is None else mix.coef
    return summarise_updates(seen, rollout, config, kl_coef, epoch + 1, ptx_coef)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient is computed for its weights, and no pass keeps what one would need."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def within_max_ratio(config: PPOConfig, seen: MiniBatchStats) -> bool:
    """Whether a mini-batch's policy is near enough to the one that sampled to learn from it."""
    return config.max_ratio is None or seen.ratio <= config.max_ratio


def moved_too_far(epoch: list[MiniBatchStats | None], limit: float | None) -> bool:
    """Whether an epoch's mean KL (k3) from the policy that sampled to the new one is above it."""
    seen = [seen for seen in epoch if seen is not None]
    if limit is None or not seen:
        return False
    return float(sum(s.sums["moved"] for s in seen)) / sum(s.tokens for s in seen) > limit


def summarise_updates(
    updates: list[MiniBatchStats], rollout: RolloutBuffer, config: PPOConfig, kl_coef: float,
    epochs: int, ptx_coef: float,
) -> PPOStats:  # fmt: skip
    """Token means over all updates, and what the rollout itself says."""
    total = sum(seen.tokens for seen in updates)
    mean = {k: float(sum(seen.sums[k] for seen in updates)) / total for k in updates[0].sums}
    gap, gap_sq = mean.pop("gap"), mean.pop("gap_sq")  # squares around 1 keep small variances
    mean.pop("moved")
    ptx_loss = sum(seen.ptx_loss for seen in updates) / len(updates)
    mean["loss"] += ptx_coef * ptx_loss
    returns, old_values = rollout.tokens("returns"), rollout.tokens("old_values")
    spread = float(returns.var(correction=0))
    unexplained = float((returns - old_values).var(correction=0))
    kl = sum(
        float(masked_sum(penalised_kl(micro, config), micro.response_mask))
        for micro in rollout.micro_batches
    )
    return PPOStats(
        **mean, ptx_loss=ptx_loss, ratio=1 + gap, ratio_var=max(gap_sq - gap**2, 0.0),
        grad_norm=sum(seen.grad_norm for seen in updates) / len(updates),
        critic_grad_norm=sum(seen.critic_grad_norm for seen in updates) / len(updates),
        explained_variance=1 - unexplained / spread if spread > 0 else 0.0,
        non_score_reward=-kl_coef * kl / len(rollout),
        first_ratio_gap=float(updates[0].largest_gap), epochs=epochs,
    )  # fmt: skip
