"""What reads the hidden states: log-probs of given tokens, a value per state, a score per row."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minirlhf.errors import UserError
from minirlhf.support import Support
from minirlhf.transformer import CausalLM, Decoder

CHUNK = 128  # positions whose logits are held at once


class TokenStats(NamedTuple):
    logprobs: Tensor  # (…), nats
    entropy: Tensor  # (…), nats, of the whole distribution at that position


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype heads compute in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def token_logprobs(
    lm: CausalLM, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK,
    support: Support | None = None,
) -> TokenStats:  # fmt: skip
    """Log-prob of each target and entropy of its distribution, from float32 logits.

        logprob = log softmax(W h / temperature)[target],   the softmax over `support`

    Chunked over tokens, and the backward pass computes each chunk's logits again: neither pass
    holds more than (chunk, V) of them. Float32 because bf16 logits alone are off by up to 0.07
    nats, a third of PPO's clip range.

    Args:
        lm: whose unembedding W (V, D) is used.
        hidden: (…, D) states before the targets.
        targets: (…) int64 ids.
        temperature: > 0; that of sampling, so that ratios compare laws actually sampled.
        support: of the positions in their order, where not every token could be drawn; a target
            outside it has log-prob -inf.
    Returns:
        TokenStats(logprobs, entropy), each (…) float32 (float64 for a float64 model).
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets is {tuple(targets.shape)}, hidden is {tuple(hidden.shape)}: "
            "give one target for each state, targets (…) beside hidden (…, D)"
        )
    _check_law(temperature, support, targets.numel())
    states, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    stats = _TokenLogprobs.apply(states, lm.unembedding, ids, temperature, chunk, support)
    return TokenStats(*(x.view(targets.shape) for x in stats))


def token_kl(
    lm: CausalLM, hidden: Tensor, ref: CausalLM, ref_hidden: Tensor, temperature: float = 1.0,
    chunk: int = CHUNK, support: Support | None = None,
) -> Tensor:  # fmt: skip
    """KL(policy || ref) of the next token's law at each position, over the whole vocabulary.

        kl = sum_v p_v (log p_v - log q_v),   p = softmax(W h / temperature), q the reference's

    Chunked as `token_logprobs` is, and with the same arguments; what is of the reference is
    constant.

    Args:
        hidden, ref_hidden: (…, D) and (…, D') states before the tokens.
    Returns:
        (…) nats, >= 0 up to rounding.
    """
    if hidden.shape[:-1] != ref_hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden is {tuple(ref_hidden.shape)}, hidden is {tuple(hidden.shape)}: "
            "give the reference's state for each of the policy's"
        )
    _check_law(temperature, support, hidden[..., 0].numel())
    states, ref_states = (x.reshape(-1, x.shape[-1]) for x in (hidden, ref_hidden.detach()))
    ref_weight = ref.unembedding.detach()
    kl = _TokenKL.apply(
        states, lm.unembedding, ref_states, ref_weight, temperature, chunk, support
    )
    return kl.view(hidden.shape[:-1])


def _check_law(temperature: float, support: Support | None, positions: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: must be above 0")
    if support is not None and len(support.counts) != positions:
        raise ValueError(f"support is of {len(support.counts)} positions, there are {positions}")


def _logits(
    states: Tensor, weight: Tensor, at: slice, temperature: float, allowed: Tensor | None
) -> Tensor:
    """(n, V) logits / temperature of some states; -inf for what could not be drawn.

    It is the state that is divided: as exact, and V / D times less work.
    """
    logits = F.linear(states[at].to(weight.dtype) / temperature, weight)
    return logits if allowed is None else logits.masked_fill_(~allowed, -torch.inf)


def _allowed(support: Support | None, at: slice, weight: Tensor) -> Tensor | None:
    return None if support is None else support.allowed(at, len(weight))


def _expectation(law: Tensor, values: Tensor) -> Tensor:
    """(n,) sum_v law_v values_v of (n, V) each, without a third."""
    return torch.bmm(law[:, None], values[:, :, None])[:, 0, 0]


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` of (N, D) states and (N,) ids, with its derivative by hand.

    With z = W h / temperature, p = softmax(z) and H its entropy:

        d logprob / dz_j = [j = target] - p_j,    dH / dz_j = -p_j (log p_j + H)

    Outside a support p is 0, and so is everything that p multiplies. Most is done in place: the
    logits are so large that each pass over them costs time beside the matrix product.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, ids: Tensor, temperature: float, chunk: int,
        support: Support | None,
    ):  # fmt: skip
        wide = widened(states.dtype)
        logprobs, entropy = (states.new_empty(len(ids), dtype=wide) for _ in range(2))
        normalizer = torch.empty_like(logprobs)  # log sum_v exp z_v
        rows = weight.to(wide)
        for at in _slices(len(ids), chunk):
            allowed, target = _allowed(support, at, rows), ids[at, None]
            logits = _logits(states, rows, at, temperature, allowed)
            log_law = logits.log_softmax(-1)  # (chunk, V)
            logprobs[at] = log_law.gather(-1, target)[:, 0]
            anywhere = logits.argmax(-1, keepdim=True)  # where both are finite
            normalizer[at] = (logits.gather(-1, anywhere) - log_law.gather(-1, anywhere))[:, 0]
            torch.exp(log_law, out=logits)
            if allowed is not None:
                log_law.masked_fill_(~allowed, 0)  # 0 x inf is NaN
            entropy[at] = -_expectation(logits, log_law)
        ctx.save_for_backward(states, weight, ids, normalizer, entropy)
        ctx.temperature, ctx.chunk, ctx.support = temperature, chunk, support
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logprobs: Tensor | None, of_entropy: Tensor | None):
        states, weight, ids, normalizer, entropy = ctx.saved_tensors
        rows = weight.to(widened(states.dtype))
        to_states = torch.zeros_like(states)
        to_weight = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        for at in _slices(len(ids), ctx.chunk):
            allowed = _allowed(ctx.support, at, rows)
            log_law = _logits(states, rows, at, ctx.temperature, allowed)  # (chunk, V)
            log_law -= normalizer[at, None]
            if of_entropy is None:
                to_logits = log_law.exp_().mul_(-of_logprobs[at, None])
            else:
                law = log_law.exp()
                if allowed is not None:
                    log_law.masked_fill_(~allowed, 0)
                per_law = log_law.add_(entropy[at, None]).mul_(-of_entropy[at, None])
                if of_logprobs is not None:
                    per_law -= of_logprobs[at, None]
                to_logits = law.mul_(per_law)
            if of_logprobs is not None:
                to_logits.scatter_add_(-1, ids[at, None], of_logprobs[at, None].to(rows.dtype))
            _pass_on(to_logits, states, rows, at, ctx.temperature, to_states, to_weight)
        return to_states, _narrowed(to_weight, weight), None, None, None, None


class _TokenKL(torch.autograd.Function):
    """`token_kl` of (N, D) states, with its derivative by hand.

        d kl / dz_j = p_j (log p_j - log q_j - kl)
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, ref_states: Tensor, ref_weight: Tensor,
        temperature: float, chunk: int, support: Support | None,
    ):  # fmt: skip
        ctx.temperature, ctx.chunk, ctx.support = temperature, chunk, support
        kl = states.new_empty(len(states), dtype=widened(states.dtype))
        for at in _slices(len(states), chunk):
            law, log_ratio = _TokenKL.laws(ctx, states, weight, ref_states, ref_weight, at)
            kl[at] = _expectation(law, log_ratio)
        ctx.save_for_backward(states, weight, ref_states, ref_weight, kl)
        return kl

    @staticmethod
    def laws(ctx, states, weight, ref_states, ref_weight, at: slice) -> tuple[Tensor, Tensor]:
        """(p, log p - log q), (chunk, V) each; both 0 outside the support."""
        wide = widened(states.dtype)
        weight, ref_weight = weight.to(wide), ref_weight.to(wide)
        allowed = _allowed(ctx.support, at, weight)
        log_law = _logits(states, weight, at, ctx.temperature, allowed).log_softmax(-1)
        ref = _logits(ref_states, ref_weight, at, ctx.temperature, allowed).log_softmax(-1)
        log_ratio = torch.sub(log_law, ref, out=ref)
        if allowed is not None:
            log_ratio.masked_fill_(~allowed, 0)
        return log_law.exp_(), log_ratio

    @staticmethod
    @once_differentiable
    def backward(ctx, of_kl: Tensor):
        states, weight, ref_states, ref_weight, kl = ctx.saved_tensors
        rows = weight.to(widened(states.dtype))
        to_states = torch.zeros_like(states)
        to_weight = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        for at in _slices(len(states), ctx.chunk):
            law, log_ratio = _TokenKL.laws(ctx, states, weight, ref_states, ref_weight, at)
            to_logits = log_ratio.sub_(kl[at, None]).mul_(of_kl[at, None]).mul_(law)
            _pass_on(to_logits, states, rows, at, ctx.temperature, to_states, to_weight)
        return to_states, _narrowed(to_weight, weight), *[None] * 5


def _pass_on(
    to_logits: Tensor, states: Tensor, rows: Tensor, at: slice, temperature: float,
    to_states: Tensor, to_weight: Tensor | None,
) -> None:  # fmt: skip
    """Adds a chunk's gradient of W h / temperature to those of h and of W, in place."""
    to_states[at] = (to_logits @ rows / temperature).to(states.dtype)
    if to_weight is not None:
        to_weight.addmm_(to_logits.T, states[at].to(rows.dtype) / temperature)


def _narrowed(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(weight.dtype)


def _slices(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def response_states(hidden: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """The state each response token was chosen in: the one off-by-one of RLHF lives here.

    Response token t of row b stands at index P_b + t, so its log-prob and the value of the state
    before it are both read at index P_b - 1 + t.

    Args:
        hidden: (B, T, …) per-token states or values, rows left-aligned.
        prompt_lengths: (B,) P_b >= 1.
        width: R, columns of the result.
    Returns:
        (B, R, …); column t beyond a row's response repeats the last column and is to be masked.
    """
    index = prompt_lengths[:, None] - 1 + torch.arange(width, device=hidden.device)
    index = index.clamp(max=hidden.shape[1] - 1)  # (B, R)
    # gather, because the backward of indexing with repeated indices differs from run to run
    shape = index.shape + hidden.shape[2:]
    return hidden.gather(1, index.view(index.shape + (1,) * (hidden.dim() - 2)).expand(shape))


class ValueHeadModel(nn.Module):
    """Policy and critic: `model(tokens)` -> (hidden (B, T, D) of the policy, values (B, T)).
    With `lengths` (B,) nothing is computed for padding, as in `Decoder`.

    The critic reads the policy's own hidden states, through a head that starts at zero, so that the
    first values are 0. Or it has a trunk of its own, as `critic_from_reward_model` gives it.
    """

    def __init__(self, lm: CausalLM, critic: Decoder | None = None):
        super().__init__()
        self.lm = lm
        self.critic = critic
        trunk = lm.model if critic is None else critic
        self.v_head = nn.Linear(trunk.config.hidden_size, 1).to(trunk.embed_tokens.weight)
        nn.init.zeros_(self.v_head.weight)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.lm(tokens, lengths=lengths)
        states = hidden if self.critic is None else self.critic(tokens, lengths=lengths)
        wide = widened(states.dtype)
        weight, bias = self.v_head.weight.to(wide), self.v_head.bias.to(wide)
        return hidden, F.linear(states.to(wide), weight, bias).squeeze(-1)

    def value_parameters(self) -> list[nn.Parameter]:
        """Of the critic alone: its head, and its trunk where that is its own."""
        trunk = [] if self.critic is None else list(self.critic.parameters())
        return [*self.v_head.parameters(), *trunk]


class RewardModel(nn.Module):
    """Trunk of a language model with a scalar head: `model(tokens, lengths)` -> scores (B,).

    Hugging Face calls it `…ForSequenceClassification` with one label, and that is how it is saved.
    Where the tokenizer has no token to spare for padding, Hugging Face pads with eos and reads the
    score before it; `read_before_eos` says that this model was trained on texts without their eos.

    Several heads on the trunk are an ensemble, whose score is a lower confidence bound: texts on
    which the heads disagree are scored lower, since there a policy finds what only looks good.
    Coste et al. 2023 (arXiv:2310.02743) penalise the variance; the deviation has the scores' unit.

        score = (mean - lcb_coef · std - reward_mean) / reward_std
        mean, std of the heads' scores, of the population; reward_mean, reward_std as stored

    Args:
        heads: >= 1.
        lcb_coef: >= 0 standard deviations; 0 for a single head.
    """

    def __init__(
        self, lm: CausalLM, read_before_eos: bool = False, heads: int = 1, lcb_coef: float = 0.0
    ):
        super().__init__()
        if heads < 1 or lcb_coef < 0 or (heads == 1 and lcb_coef):
            raise ValueError(
                f"heads is {heads} and lcb_coef {lcb_coef}: at least 1 head and a lcb_coef of 0 "
                "or more are legal, 0 for a single head, which disagrees with nobody"
            )
        self.config = lm.config
        self.read_before_eos = read_before_eos
        self.heads, self.lcb_coef = heads, lcb_coef
        self.reward_mean, self.reward_std = 0.0, 1.0
        self.model = lm.model
        self.score = nn.Linear(lm.config.hidden_size, heads, bias=False).to(lm.unembedding)

    def head_scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) left-aligned; lengths (B,) in 1..T. What each head says of each row's last
        token: (B, heads), not normalised."""
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths is {tuple(lengths.shape)}, tokens is {tuple(tokens.shape)}: "
                "give one length a row"
            )
        hidden = self.model(tokens, lengths=lengths)
        last = response_states(hidden, lengths, 1)[:, 0]  # (B, D): index length - 1
        wide = widened(hidden.dtype)
        return F.linear(last.to(wide), self.score.weight.to(wide))

    def combine(self, each: Tensor) -> Tensor:
        """(B, heads) -> scores (B,)."""
        if self.heads == 1:
            score = each.squeeze(-1)
        else:
            score = each.mean(1) - self.lcb_coef * each.std(1, correction=0)
        return (score - self.reward_mean) / self.reward_std

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.combine(self.head_scores(tokens, lengths))


def initialize_score(model: RewardModel, *rngs: torch.Generator) -> RewardModel:
    """Heads drawn from N(0, 1/(D + 1)), as Stiennon et al. 2020 (arXiv:2009.01325), each from a
    generator of its own; same model."""
    std = (model.config.hidden_size + 1) ** -0.5
    with torch.no_grad():
        for head, rng in zip(model.score.weight, rngs, strict=True):
            head.normal_(0.0, std, generator=rng)
    return model


def normalize_scores(model: RewardModel, mean: float, std: float) -> RewardModel:
    """Makes scores that had this mean and standard deviation have 0 and 1; same model.

    As Ziegler et al. 2019 (arXiv:1909.08593): a policy then meets the same scale whatever the
    reward model. The scale goes into the heads' weights, where other tools see it too; a head
    without bias has no room for the mean, so that stays beside them.

    Raises:
        ValueError: std is not above 0.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: scores that are all alike cannot be normalised")
    scale = model.reward_std * std
    with torch.no_grad():
        model.score.weight.div_(scale)
    model.reward_mean = (model.reward_mean + mean * model.reward_std) / scale
    model.reward_std = 1.0
    return model


def critic_from_reward_model(
    lm: CausalLM, reward_model: RewardModel, trainable: bool = True
) -> ValueHeadModel:
    """A critic with a trunk of its own, a copy of the reward model (arXiv:2403.17031, detail 22).

    The first value of a state is the score of the text so far, which foretells the final score
    from the first token on; a head that starts from zero has to learn that first. The mean of an
    ensemble and what normalises a score are linear, so they go into the one head.

    Args:
        lm: the policy.
        reward_model: of the same tokenizer; it is copied and stays as it is.
        trainable: False freezes the critic.
    Raises:
        UserError: the score is the lower bound of an ensemble, which is not linear in the state.
    """
    if reward_model.lcb_coef:
        what = f"is an ensemble with a lcb_coef of {reward_model.lcb_coef}, a critic has one head"
        raise UserError("--critic", what, "give a reward model of one head, or of lcb_coef 0")
    policy = ValueHeadModel(lm, copy.deepcopy(reward_model.model))
    policy.v_head.to(reward_model.score.weight)
    with torch.no_grad():
        head = reward_model.score.weight.mean(0, keepdim=True)
        policy.v_head.weight.copy_(head / reward_model.reward_std)
        policy.v_head.bias.fill_(-reward_model.reward_mean / reward_model.reward_std)
    for part in (policy.critic, policy.v_head):
        part.requires_grad_(trainable)
    return policy
