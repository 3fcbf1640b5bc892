"""Low-rank adapters: two thin matrices are trained beside each layer. Hu et al. 2021
(arXiv:2106.09685), with the scale of rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) and the
magnitudes of DoRA (Liu et al. 2024, arXiv:2402.09353).

    h = W x + b + s B A x      W (out, in) is frozen; A (rank, in) and B (out, rank) are trained
    s = alpha / rank           or alpha / sqrt(rank) (rsLoRA)

Fine-tuning changes W by a matrix of low rank, or nearly so; then the change need not have the
shape of W. A starts at random and B at 0: the first forward pass is the base's, and the first
gradient of B is not 0, as it would be if both were 0. The scale s keeps the size of the change
when the rank is raised, so that one learning rate serves several ranks; alpha / rank does so less
well the higher the rank, since B A x grows with sqrt(rank).

DoRA also trains the length of each row of W + s B A, so that length and direction of a row are
learned apart, as they are when W itself is trained:

    h = m ⊙ (W x + s B A x) / |W + s B A| + b      m (out,), at first the lengths of W's rows

Models are trees of modules, and trees may share what is frozen: policy, reference, reward model and
critic can be four models over one set of weights (`share`, `base_of`).
"""

import copy
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import streams
from minirlhf.models.dropout import Dropout
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.logprobs import widened
from minirlhf.models.quantized import QuantizedLinear, quantized_layers
from minirlhf.models.targets import target_layers
from minirlhf.models.transformer import CausalLM, Decoder, Linear, linear

Model = TypeVar("Model", CausalLM, ValueHeadModel, RewardModel, Decoder)


class LoRALinear(nn.Module):
    """A frozen linear layer, `base`, with an adapter: the equations above.

    A is uniform in ±1/sqrt(in), as in the authors' code, drawn in float32 on the CPU: the same
    numbers for any dtype and device.

    Args:
        base: its layer; it is frozen, and A, B and m get its dtype and device.
        rng: a CPU generator, of which no other layer draws.
        rslora: divide alpha by sqrt(rank), not by rank.
        dora: learn magnitudes too.
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, rng: torch.Generator, rslora: bool = False,
        dora: bool = False,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha, self.rslora = alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        of = base if isinstance(base, QuantizedLinear) else base.weight  # whose would be unpacked
        like = {"dtype": of.dtype, "device": of.device}
        down = torch.empty(rank, base.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=rng)
        self.key = torch.randint(2**62, (), generator=rng, device="cpu")  # of its dropout
        self.lora_A = nn.Parameter(down.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.magnitude = nn.Parameter(self.row_lengths()) if dora else None

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """(…, in) -> (…, out); dropout is of the adapter's x alone."""
        seen = x if dropout is None else dropout(x, self.key)
        change = linear(self.scaling * F.linear(seen, self.lora_A), self.lora_B)
        if self.magnitude is None:
            return self.base(x) + change
        # Sec. 4.3: the lengths are read as constants, which the gradient does not pass.
        factor, bias = self.magnitude / self.row_lengths(), self.base.bias
        if bias is None:
            return factor * (self.base(x) + change)
        return factor * (self.base(x) - bias + change) + bias

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """(out,) 2-norms of the rows of W + s B A."""
        return self.adapted().norm(dim=1).to(self.lora_A.dtype)

    @torch.no_grad()
    def adapted(self) -> Tensor:
        """(out, in) W + s B A, in float32 at least."""
        wide = widened(self.lora_A.dtype)
        change = self.lora_B.to(wide) @ self.lora_A.to(wide)
        return self.base.weight.to(wide) + self.scaling * change

    @torch.no_grad()
    def merged(self) -> Linear:
        """The plain layer that computes the same; its weight is a new one, rounded once."""
        weight = self.adapted()
        if self.magnitude is not None:
            weight *= (self.magnitude / self.row_lengths()).to(weight)[:, None]
        out_features, in_features = weight.shape
        bias = self.base.bias
        layer = Linear(in_features, out_features, bias is not None, device="meta")
        of = self.base if isinstance(self.base, QuantizedLinear) else self.base.weight
        layer.weight = nn.Parameter(weight.to(of.dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """All adapted layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def has_lora(model: nn.Module) -> bool:
    return bool(adapters(model))


def trunk_of(model: CausalLM | ValueHeadModel | RewardModel | Decoder) -> Decoder:
    """The decoder that adapters go into: of a policy with a critic the policy's."""
    if isinstance(model, Decoder):
        return model
    return model.lm.model if isinstance(model, ValueHeadModel) else model.model


def add_lora(
    model: Model, rank: int, alpha: float, seed: int = 0, targets: tuple[str, ...] = ("all",),
    rslora: bool = False, dora: bool = False,
) -> Model:
    """Puts an adapter on linear layers of the trunk, in place: they and a scalar head are trained,
    nothing else. A head starts at 0 or at random, and frozen it would stay so. Make the optimizer
    after this call.

    Args:
        model: policy, policy with critic, reward model or decoder.
        rank: >= 1, rows of A and columns of B.
        alpha: > 0; see `LoRALinear` for it, for rslora and for dora.
        seed: of A; each layer draws from its own stream.
        targets: see `target_layers`. All is best (Schulman et al. 2025, "LoRA Without Regret").
    Returns:
        The same model, whose outputs are those before: exactly, with dora up to rounding.
    Raises:
        ValueError: rank or alpha out of range, a target that is no layer, adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: must be 1 or more")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: must be above 0 and finite")
    if has_lora(model):
        raise ValueError("the model has adapters already: call merge_lora before adding new ones")
    trunk = trunk_of(model)
    layers = target_layers(trunk, targets)
    model.requires_grad_(False)
    for head in ("v_head", "score"):
        if hasattr(model, head):
            getattr(model, head).requires_grad_(True)
    for name, layer in layers.items():
        rng = streams.generator(seed, f"lora {name}")
        trunk.set_submodule(name, LoRALinear(layer, rank, alpha, rng, rslora, dora))
    return model


def merge_lora(model: Model) -> Model:
    """Folds the adapters into weights, in place, and leaves the plain model, all of it trainable,
    with the names before `add_lora`. The base's own weights stay as they are, for whoever shares
    them; quantised ones are unpacked, so that the model computes what was trained. An optimizer
    made before still holds the adapters. Raises ValueError for a model without adapters.
    """
    if not has_lora(model):
        raise ValueError("the model has no adapters: call add_lora first")
    return _merged(model).requires_grad_(True)


def merged_copy(model: Model) -> Model:
    """What `merge_lora` would leave, over the same frozen weights; the given model learns on."""
    return _merged(share(model))


def _merged(model: Model) -> Model:
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.merged())
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, layer.plain())
    return model


def share(model: Model) -> Model:
    """Another model over the same weights: its modules are its own, its tensors are not."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def base_of(model: Model) -> Model:
    """The model that `add_lora` was given, over the same weights: the reference policy, exactly. A
    scalar head is the one that is trained."""
    base = share(model)
    for name, layer in adapters(base).items():
        base.set_submodule(name, layer.base)
    return base
