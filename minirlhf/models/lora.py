"""Low-rank adapters: two thin matrices are trained beside each layer. Hu et al. 2021
(arXiv:2106.09685).

The base weights stay as they are, so they are also the reference policy: under `adapters_off` the
model computes what it computed before `add_lora`, without a second copy. There is no dropout.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import streams
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.logprobs import widened
from minirlhf.models.transformer import CausalLM, Linear, linear

Model = TypeVar("Model", CausalLM, ValueHeadModel, RewardModel)


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter. Hu et al. 2021 (arXiv:2106.09685), eq. 3, sec. 4.1.

        h = W x + b + (alpha / rank) B A x

    W and b are the base layer's own parameters under their own names, so its keys in a state dict
    remain and `lora_A` (rank, in) and `lora_B` (out, rank) join them. B starts at 0, which leaves
    the function unchanged. A is uniform in ±1/sqrt(in), as in the authors' code (the paper's text
    has a Gaussian), drawn in float32 on the CPU: the same numbers for any dtype and device.

    Args:
        base: whose parameters are taken over and frozen; A and B get their dtype and device.
        rng: a CPU generator.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rng: torch.Generator):
        super().__init__()
        base.requires_grad_(False)
        self.weight, self.bias = base.weight, base.bias
        down = torch.empty(rank, base.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=rng)
        self.lora_A = nn.Parameter(down.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, rank))
        self.scaling = alpha / rank
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias)
        if not self.enabled:
            return out
        return out + linear(self.scaling * F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer W + (alpha / rank) B A, in place in W; rounded to W's dtype only once."""
        wide = widened(self.weight.dtype)
        update = self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))  # (out, in)
        self.weight.copy_(self.weight.to(wide) + update)
        out_features, in_features = self.weight.shape
        layer = Linear(in_features, out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """All adapted layers by name; a model without any is refused."""
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not adapters:
        raise ValueError("the model has no adapters: call add_lora first")
    return adapters


def add_lora(model: Model, rank: int, alpha: float, seed: int = 0) -> Model:
    """Puts an adapter on every linear layer of the trunk, in place: they and a scalar head are
    trained, nothing else.

    Frozen are all weights of the language model, its embeddings and `lm_head` included. `score` and
    `v_head` are trained in full: a head starts at 0 or at random, and frozen it would stay so. Make
    the optimizer after this call.

    Args:
        model: policy, policy with critic, or reward model, in any dtype and on any device.
        rank: >= 1, rows of A and columns of B.
        alpha: > 0; an adapter's output is scaled by alpha / rank.
        seed: of A; each layer draws from its own stream.
    Returns:
        The same model; its outputs are those before, exactly, until the first update.
    Raises:
        ValueError: rank or alpha out of range, or the model has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: must be 1 or more")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: must be above 0 and finite")
    if has_lora(model):
        raise ValueError("the model has adapters already: call merge_lora before adding new ones")
    trunk = model.lm.model if isinstance(model, ValueHeadModel) else model.model
    layers = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.Linear)}
    model.requires_grad_(False)
    if isinstance(model, ValueHeadModel):
        model.v_head.requires_grad_(True)
    elif isinstance(model, RewardModel):
        model.score.requires_grad_(True)
    for name, layer in layers.items():
        rng = streams.generator(seed, f"lora {name}")
        trunk.set_submodule(name, LoRALinear(layer, rank, alpha, rng))
    return model


def merge_lora(model: Model) -> Model:
    """Folds the adapters into the weights, in place, and leaves the plain model.

    Layers and parameter names are again those before `add_lora`, so `save_pretrained` works; all
    parameters are trainable, as in a model that was just loaded. An optimizer made before still
    holds the adapters: make a new one.

    Raises:
        ValueError: the model has no adapters.
    """
    for name, layer in _adapters(model).items():
        model.set_submodule(name, layer.merged())
    return model.requires_grad_(True)


def merged_copy(model: Model) -> Model:
    """The plain model that `merge_lora` would leave, as a copy: the given one goes on learning.

    Raises:
        ValueError: the model has no adapters.
    """
    return merge_lora(copy.deepcopy(model))


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it did before `add_lora`: the reference policy, exactly.

    A scalar head keeps its trained weights. What the adapters were (on, or off in a nested use)
    they are again afterwards, also after an exception.

    Raises:
        ValueError: the model has no adapters, so what it would compute is no reference.
    """
    layers = list(_adapters(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
