"""A tiny model in float64, states to read and ids to score, for the tests of what reads states."""

import torch
from torch import nn

from minirlhf.models.config import ModelConfig
from minirlhf.models.support import Support
from minirlhf.models.transformer import CausalLM, initialize

f64 = torch.float64
CONFIG = ModelConfig("llama", 50, 16, 24, 2, 4, 2, 4, 32)


def assert_close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def make_lm(dtype=f64) -> CausalLM:
    lm = initialize(CausalLM(CONFIG).to(dtype), torch.Generator().manual_seed(0))
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(20)  # logits of a few nats
    return lm


def states(*shape: int, dtype=f64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 16, generator=rng, dtype=f64).to(dtype).requires_grad_()


def targets(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(2))


class Unembedding(nn.Module):
    """All that log-probs and divergences look at."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.unembedding = nn.Parameter(weight)


def support_of(*allowed: list[int], banned: bool = False) -> Support:
    ids = torch.tensor([i for position in allowed for i in position], dtype=torch.int32)
    return Support(ids, torch.tensor([len(position) for position in allowed]), banned)


EYE = torch.eye(3, dtype=f64)
# Laws (1/2, 1/3, 1/6) and (1/6, 1/2, 1/3)
LAWS = torch.tensor([[1 / 2, 1 / 3, 1 / 6], [1 / 6, 1 / 2, 1 / 3]], dtype=f64).log()
