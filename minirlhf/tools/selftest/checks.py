"""What is computed: by the functions that the recipes use, and by the losses of the lessons.

Each check gives numbers under names of their kinds. A gradient, or what has become of weights, is
told by one number a parameter, its sum under signs that are fixed: an error anywhere moves it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minirlhf import streams
from minirlhf.batches.demonstrations import collate_texts, count_tokens, target_stats
from minirlhf.batches.preferences import collate_pairs
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, TokenPass, lm_pass, policy_pass
from minirlhf.data.tokenizer import train_tokenizer
from minirlhf.equations.critic_free import group_advantages
from minirlhf.equations.masking import masked_standardize, masked_sum
from minirlhf.lessons import dpo, grpo, ppo, sft
from minirlhf.models.cache import KVCache
from minirlhf.models.generation import generate
from minirlhf.models.logprobs import token_logprobs
from minirlhf.models.pretrained import load_pretrained, save_pretrained
from minirlhf.models.sampling import Sampling
from minirlhf.recipes.ppo import ppo as run_ppo
from minirlhf.rewards.source import Completions
from minirlhf.run.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.ppo import ppo_optimizer
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.tools.selftest import tiny
from minirlhf.tools.selftest.tiny import Place

# Keys of texts that bfloat16's rounding does not change: no draw is near to another token.
STEADY = (4, 4, 23, 10, 6, 2, 32, 0)
Numbers = dict[str, list[float]]  # kind -> numbers; those of the kind "tokens" are ids
RUN = PPOConfig(
    model="", data="", reward=("",), out="", steps=3, batch_size=8, max_new_tokens=8, epochs=2,
    mini_batches=2, micro_batch_size=4, learning_rate=1e-3, kl_coef=0.1,
)
METRICS = (  # of the run, at each of its steps
    "objective/scores", "objective/kl", "objective/entropy", "objective/logprobs",
    "loss/policy_avg", "loss/value_avg", "grad_norm", "val/vpred_avg", "policy/approxkl_avg",
    "response_length",
)


def listed(x: Tensor) -> list[float]:
    return x.detach().cpu().double().flatten().tolist()  # in this order: MPS has no float64


def signed_sums(tensors: Iterable[Tensor]) -> list[float]:
    """One number for each tensor."""
    found = []
    for n, x in enumerate(tensors):
        signs = streams.uniform(streams.key(0, "signs", n), torch.arange(x.numel())).round() * 2 - 1
        found.append(float((x.detach().cpu().double().flatten() * signs).sum()))
    return found


def with_gradient(model: nn.Module, loss: Tensor) -> Numbers:
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"loss": listed(loss), "gradient": signed_sums(gradients)}


# ------------------------------------------------------------------------------------------- models


@torch.no_grad()
def last_logits(place: Place, family: str) -> Numbers:
    """After rows of several lengths, of which two are compared: the shortest and the longest."""
    lm, batch = tiny.language_model(place, family), collate_texts(tiny.texts())
    hidden = lm(batch.tokens.to(place.device), lengths=batch.lengths.to(place.device))
    last = [hidden[row, int(batch.lengths[row]) - 1] for row in (1, 2)]
    return {"logits": listed(lm.logits(torch.stack(last)))}


def text_logprobs(place: Place) -> Numbers:
    """And entropies; the gradient of a sum of them with weights of both signs."""
    lm = tiny.language_model(place)
    stats = target_stats(lm, collate_texts(tiny.texts()))
    weights = tiny.offsets("weights", torch.zeros(1, dtype=torch.int64), stats.logprobs.numel())[0]
    loss = (weights.to(place.device) * (stats.logprobs + 0.5 * stats.entropy)).sum()
    told = {"log-probs": listed(stats.logprobs), "entropies": listed(stats.entropy)}
    return told | with_gradient(lm, loss)


@torch.no_grad()
def cached_logprobs(place: Place) -> Numbers:
    """Log-probs of responses that are read token by token, rows of several lengths side by side."""
    lm, rollout = tiny.language_model(place), tiny.rollout(place)
    B, R = rollout.response_mask.shape
    cache = KVCache(lm.config, B, rollout.tokens.shape[1] + R, lm.unembedding)
    rows, at, found = torch.arange(B, device=place.device), rollout.prompt_lengths, []
    hidden = lm(rollout.tokens[:, : int(at.max())], cache)[rows, at - 1]
    cache.hold(at)
    for t in range(R):
        place_of_next = (at + t).clamp(max=rollout.tokens.shape[1] - 1)
        tokens = rollout.tokens[rows, place_of_next]
        found.append(token_logprobs(lm, hidden, tokens).logprobs)
        hidden = lm(tokens[:, None], cache)[:, 0]
        cache.grow()
    return {"log-probs": listed(torch.stack(found, 1)[rollout.response_mask])}


def sampled(place: Place) -> Numbers:
    """Rows end one by one, at any of 24 ids; from the whole distribution, and from a part of it."""
    lm, rows = tiny.language_model(place), [p.ids for p in tiny.prompts()]
    keys, tokens = streams.key(0, "selftest", torch.tensor(STEADY)), []
    for sampling in (Sampling(12), Sampling(12, temperature=0.7, top_k=20, top_p=0.9)):
        tokens += generate(lm, rows, sampling, range(24), keys).responses()
    return {"tokens": [token for row in tokens for token in [*row, *[-1] * (12 - len(row))]]}


# ------------------------------------------------------------------------------------------- losses


def sft_numbers(place: Place) -> Numbers:
    lm, texts = tiny.language_model(place), tiny.texts()
    return with_gradient(lm, sft.sft_loss(lm, texts, int(count_tokens(texts)[1].sum())))


def reward_numbers(place: Place) -> Numbers:
    model, batch = tiny.reward_model(place), collate_pairs(tiny.pairs())
    scores = model(batch.tokens.to(place.device), batch.lengths.to(place.device))
    return with_gradient(model, batch.loss(scores).mean())


def dpo_numbers(place: Place) -> Numbers:
    policy, ref = tiny.language_model(place), tiny.language_model(place, stream="reference")
    pairs = tiny.pairs()
    return with_gradient(policy, dpo.summed_loss(policy, ref, pairs) / len(pairs))


def ppo_numbers(place: Place) -> Numbers:
    policy = tiny.value_head_model(place)
    buffer = filled_buffer(place, lambda micro: policy_pass(policy, micro, ppo.TEMPERATURE))
    buffer.map(ppo.assign_credit)
    buffer.over_all("advantages", masked_standardize)
    told = {name: listed(buffer.flat(name)) for name in ("advantages", "returns")}
    return told | with_gradient(policy, mean_over_tokens(buffer, policy, ppo.ppo_loss))


def grpo_numbers(place: Place) -> Numbers:
    lm = tiny.language_model(place)
    buffer = filled_buffer(place, lambda micro: lm_pass(lm, micro, grpo.TEMPERATURE))
    advantages = group_advantages(tiny.rollout(place).scores, 2)
    buffer.map(lambda micro: grpo.assign(micro, advantages))
    return with_gradient(lm, mean_over_tokens(buffer, lm, grpo.grpo_loss))


@torch.no_grad()
def filled_buffer(place: Place, read: Callable[[Rollout], TokenPass]) -> RolloutBuffer:
    """As if another policy had sampled: each old number is off by up to 1/2, so that ratios are
    clipped at either end, and others are not."""

    def fill(micro: Rollout) -> Rollout:
        now, columns = read(micro), micro.response_mask.shape[1]
        old, of_ref, values = (tiny.offsets(stream, micro.rows, columns)
                               for stream in ("old", "reference", "values"))
        return micro._replace(
            old_logprobs=now.logprobs + old, ref_logprobs=now.logprobs + of_ref,
            old_values=None if now.values is None else now.values + values,
        )

    buffer = RolloutBuffer(2, 4096)
    buffer.add(tiny.rollout(place))
    buffer.map(fill)
    return buffer


def mean_over_tokens(buffer: RolloutBuffer, model: nn.Module, loss: Callable) -> Tensor:
    parts = [masked_sum(loss(model, micro), micro.response_mask) for micro in buffer.micro_batches]
    return torch.stack(parts).sum() / sum(int(m.response_mask.sum()) for m in buffer.micro_batches)


# --------------------------------------------------------------------------------------------- runs


def kept(place: Place) -> Numbers:
    """By how much weights and moments differ that were saved and read again: not at all."""
    saved, read = (TrainState(policy, make_optimizer(policy, 1e-3), step=1) for policy in (
        tiny.value_head_model(place, stream) for stream in ("policy", "another")))
    hidden, values = saved.model(tiny.rollout(place).tokens)
    (hidden.float().mean() + values.mean()).backward()
    saved.optimizer.step()
    load_checkpoint(read, save_checkpoint(saved, place.folder / "checkpoints"))
    save_pretrained(saved.model.lm, place.folder / "model")
    again = load_pretrained(place.folder / "model", place.dtype, place.device)
    weights = [state.model.parameters() for state in (saved, read)]
    moments = [[moment for p in state.model.parameters()
                for _, moment in sorted(state.optimizer.state[p].items())]
               for state in (saved, read)]
    models = [lm.parameters() for lm in (saved.model.lm, again)]
    kinds = {"weights": weights, "moments": moments, "model": models}
    return {kind: [max(max(listed((x - y).abs())) for x, y in zip(*both, strict=True))]
            for kind, both in kinds.items()}


def ppo_run(place: Place) -> Numbers:
    """Three steps: their metrics, and what has become of the weights."""
    policy, ref = tiny.value_head_model(place), tiny.language_model(place).requires_grad_(False)
    start = [p.detach().clone() for p in policy.parameters()]
    state = TrainState(policy, ppo_optimizer(policy, RUN))
    tokenizer = train_tokenizer([], tiny.WORDS, place.folder / "tokenizer")
    steps = [step.metrics for step in run_ppo(state, tiny.prompts(), loudness, ref, tokenizer, RUN)]
    moved = [p - before for p, before in zip(policy.parameters(), start, strict=True)]
    return {name: [float(metrics[name]) for metrics in steps] for name in METRICS} | {
        "weights after": signed_sums(moved)}


def loudness(completions: Completions) -> Tensor:
    """(B,) scores in 0 … 2, that a change of one token moves but little."""
    rows = completions.response_ids
    return torch.tensor([2 * sum(row) / (len(row) * tiny.WORDS) for row in rows])


CHECKS: dict[str, Callable[[Place], Numbers]] = {
    "logits of Llama": lambda place: last_logits(place, "llama"),
    "logits of Qwen3": lambda place: last_logits(place, "qwen3"),
    "logits of GPT-2": lambda place: last_logits(place, "gpt2"),
    "log-probs and their gradient": text_logprobs,
    "log-probs in decoding": cached_logprobs,
    "sampled texts": sampled,
    "SFT's loss and gradient": sft_numbers,
    "Bradley-Terry's": reward_numbers,
    "DPO's": dpo_numbers,
    "PPO's": ppo_numbers,
    "GRPO's": grpo_numbers,
    "checkpoint, saved and read": kept,
    "three steps of PPO": ppo_run,
}
