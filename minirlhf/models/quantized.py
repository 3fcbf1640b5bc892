"""Linear layers whose frozen weights take 8 or 4 bits, after QLoRA. Dettmers et al. 2023
(arXiv:2305.14314).

Adapters leave the trunk as it was loaded, so its weights need not be as fine as what is trained:
they are stored as small integers, and a layer makes floats of its own for the moment of a product.
Gradients go through those floats to the layer's input, and so to the adapters below.

**8 bits**: a weight is a signed byte times its output channel's scale, the largest magnitude in
the channel / 127. The error is at most half a step, scale / 2.

**4 bits (NF4)**. One scale a channel is too coarse for 16 values: a single large weight would leave
all others of its channel 0. So weights are taken in blocks of 64, as they lie in memory, each with
its own scale, its largest magnitude ("absmax"). What is then in [-1, 1] is rounded to the nearest
of 16 values, the codebook. Trained weights are nearly normal, so the values are quantiles of a
normal distribution: near 0, where most weights are, they lie close. Two codes fill a byte.

A float32 scale for 64 weights is half a bit more a weight. **Double quantisation** stores scales in
8 bits as well. They are all positive and much alike, so their mean is taken off; what remains is a
signed byte times the scale of a block of 256 of them, in float32. (The paper has 8-bit floats
there. Even steps have the smaller largest error, in one line.) In sum:

    8 bits:  1 byte                          + 4 / in_features                = 1.00 to 1.01 bytes
    4 bits:  1/2 byte  + 1/64 byte of scale  + 4 / (64 * 256) of its scale    = 0.516 bytes a weight

Shapes: n weights of a layer, b = ceil(n / 64) blocks, s = ceil(b / 256) blocks of scales.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.models.dropout import Dropout
from minirlhf.models.fingerprint import fingerprint
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.transformer import Linear, linear

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one (QLoRA, sec. 3)


# ------------------------------------------------------------------------------------------ 8 bits


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, k) as signed bytes (…, k) and float32 scales (…, 1): x is bytes * scales ± scales / 2.

    A row of zeros has the scale 0.
    """
    scales = x.float().abs().amax(-1, keepdim=True) / 127
    return (x / scales.where(scales > 0, 1.0)).round().to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float().mul_(scales)


# ------------------------------------------------------------------------------------------ 4 bits


def nf4_codebook() -> Tensor:
    """The 16 values of NF4, ascending, (16,) float32. QLoRA, sec. 3, eq. 4; appendix E.

    Quantiles of N(0, 1), 8 from the positive half and 7 from the negative, and between them an
    exact 0, so that a zero stays one; divided by the largest, so that they span [-1, 1].

    Where the outermost quantile lies the paper does not say: at probability 1 it would be infinite.
    Its authors' code, bitsandbytes, takes the mean of 1 - 1/30 and 1 - 1/32: the middles of the
    last of 15 and of 16 equal parts. We do too: what they packed and what adapters were trained on
    has these values.
    """
    quantile, outermost = NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    # From 1/2, where the quantile is 0, to the outermost in 8 even steps, and down in 7.
    positive = [quantile(0.5 + (outermost - 0.5) * step / 8) for step in range(1, 9)]
    negative = [-quantile(0.5 + (outermost - 0.5) * step / 7) for step in range(7, 0, -1)]
    normal = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64, device="cpu")
    return (normal / normal[-1]).float()


CODEBOOK = nf4_codebook()


class NF4(NamedTuple):
    codes: Tensor  # (32 b,) uint8, two codes a byte, the first in the upper half
    scales: Tensor  # (b,) int8, of each block, less `mean`
    scales_scale: Tensor  # (s,) float32
    mean: Tensor  # () float32


def to_nf4(weight: Tensor) -> NF4:
    """A weight of any shape; it is filled up with zeros to whole blocks.

    The error of a weight is at most its block's absmax times half of the codebook's widest gap,
    and what double quantisation adds: half of its step.
    """
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # (b, 64)
    absmax = blocks.abs().amax(1)
    mean = absmax.mean()
    rest = F.pad(absmax - mean, (0, -len(absmax) % SCALES)).view(-1, SCALES)
    scales, scales_scale = to_int8(rest)  # (s, 256), (s, 1)
    unit = blocks / absmax.where(absmax > 0, 1.0)[:, None]
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for middle in ((CODEBOOK[1:] + CODEBOOK[:-1]) / 2).tolist():
        codes += unit > middle  # 0 to 15: how many values lie below the nearest one
    codes = codes.flatten()
    pairs = codes[::2] << 4 | codes[1::2]
    return NF4(pairs, scales.flatten()[: len(blocks)].clone(), scales_scale.flatten(), mean)


def from_nf4(packed: NF4, shape: tuple[int, ...]) -> Tensor:
    """The weight of this shape, float32."""
    shared = packed.scales_scale.repeat_interleave(SCALES)[: len(packed.scales)]  # (b,)
    scales = from_int8(packed.scales, shared) + packed.mean
    # Both values of a byte are looked up at once and moved as one number of 8 bytes: 10 times as
    # fast on a CPU.
    pairs = torch.cartesian_prod(CODEBOOK, CODEBOOK).view(torch.int64).flatten()
    bytes_ = pairs.to(packed.codes.device).index_select(0, packed.codes.int())  # (32 b,)
    values = bytes_.view(torch.float32).view(-1, BLOCK)
    values.mul_(scales[:, None])
    return values.flatten()[: math.prod(shape)].view(shape)


# ------------------------------------------------------------------------------------------- layers


class _Product(torch.autograd.Function):
    """x W^T. The layer unpacks W for it and, since W is not kept, again for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized().to(gradient.dtype), None


def pack(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """A weight (out, in) in 8 or 4 bits: the buffers of a `QuantizedLinear`.

    Raises:
        ValueError: bits are not 8 or 4, or a weight is not finite: none in its block could stay so.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}: 8 and 4 are legal")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("a weight is not finite")
    if bits == 4:
        return to_nf4(weight)._asdict()
    return dict(zip(("codes", "scales"), to_int8(weight), strict=True))


class QuantizedLinear(nn.Module):
    """A frozen linear layer in 8 or 4 bits: x (…, in) -> x Ŵ^T + b (…, out), in x's dtype.

    Ŵ is the same float32 numbers whatever x is; the bias stays as it is in the given layer.
    """

    frozen = True  # its buffers too: no checkpoint needs them

    def __init__(self, layer: nn.Linear, bits: int):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.dtype, self.bias = bits, layer.weight.dtype, layer.bias
        for name, tensor in pack(layer.weight.detach(), bits).items():
            self.register_buffer(name, tensor)
        self.requires_grad_(False)

    def dequantized(self) -> Tensor:
        """Ŵ (out, in), float32, made anew."""
        if self.bits == 8:
            return from_int8(self.codes, self.scales)
        packed = NF4(*(getattr(self, name) for name in NF4._fields))
        return from_nf4(packed, (self.out_features, self.in_features))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def weight(self) -> Tensor:
        """Ŵ in the dtype of the given layer."""
        return self.dequantized().to(self.dtype)

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return linear(x, self.dequantized().to(x.dtype), self.bias)
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias

    def plain(self) -> Linear:
        """The layer that computes the same with weights of their full size."""
        layer = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Goes to a device with its model; what is packed keeps its dtype, whatever is asked."""
        packed = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


def quantize_trunk(model: nn.Module, bits: int) -> dict[str, QuantizedLinear]:
    """Packs every linear layer of the decoder, in place and one at a time; returns them by name.

    Embeddings, norms, biases, the unembedding and heads stay as they are: they are few, or what
    they compute is not forgiving. Adapters come after this.
    """
    trunk = model.lm.model if isinstance(model, ValueHeadModel) else model.model
    if not trunk.embed_tokens.weight.is_meta:
        trunk.fingerprint = fingerprint(trunk)
    for name, layer in list(trunk.named_modules()):
        if isinstance(layer, nn.Linear):
            trunk.set_submodule(name, QuantizedLinear(layer, bits))
    return quantized_layers(model)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
