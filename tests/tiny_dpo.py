"""A tiny policy and what it learns from, for the tests of DPO and its family."""

from functools import partial

import torch

from minirlhf.batches.responses import ref_logprobs
from minirlhf.models.transformer import CausalLM
from minirlhf.run.checkpoint import TrainState
from minirlhf.setup.dpo_settings import DPOConfig
from tests.tiny_folders import random_lm
from tests.tiny_reward import TINY, V


def tiny_lm(seed: int = 0, dtype: torch.dtype = torch.float64) -> CausalLM:
    lm = random_lm(TINY, seed, vocab_size=V).to(dtype)
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(20)  # logits that differ
    return lm


def config_of(**changes) -> DPOConfig:
    return DPOConfig(**{"batch_size": 2, "learning_rate": 0.01, **changes})


def state_of(lm: CausalLM) -> TrainState:
    return TrainState(lm, torch.optim.AdamW(lm.parameters(), weight_decay=0.0))


def reference(lm: CausalLM):
    return partial(ref_logprobs, lm.requires_grad_(False))


def sums_by_hand(lm: CausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-prob of a response, from full logits of the row alone."""
    tokens = torch.tensor([prompt + response])
    logprobs = lm.logits(lm(tokens))[0].log_softmax(-1)
    at = range(max(len(prompt), 1), tokens.shape[1])
    return torch.stack([logprobs[t - 1, tokens[0, t]] for t in at]).sum()
