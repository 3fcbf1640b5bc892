"""A copy of a model to sample from on a CPU, whose products are of bytes.

Decoding reads all weights for one token of each row, so it is as fast as weights are read, and a
byte is a quarter of a float32. Weights are bytes with a scale for each output channel, as in
`quantized`. The input x of a layer is rounded to two bytes a number, with a scale for each row;
both go through one product, which reads the weights once, and sums exactly in int32:

    x W^T  ≈  s (h q^T + l q^T / 254) s_W     W ≈ s_W q (out, in), q in bytes
    s = max |x| / 127,   h = round(x / s),   l = round(254 (x / s - h))      all of one row

With h alone, of which a row's few large numbers leave little for the others, the KL of copy and
policy is 14 times as large on a real model. What is drawn is still of another distribution than
the policy's; what is learned from it is weighed for that: `equations.policy.truncated_weights`.
"""

import torch
from torch import Tensor, nn

from minirlhf.models.lora import adapters, share
from minirlhf.models.quantized import QuantizedLinear, to_int8
from minirlhf.models.transformer import CausalLM


class Int8Linear(nn.Module):
    """x (…, in) -> (…, out), in x's dtype; no gradient. A row's output depends on no other row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        codes, scales = to_int8(weight.detach())
        self.register_buffer("codes", codes)  # (out, in) int8
        self.register_buffer("scales", scales[:, 0])  # (out,) float32
        self.bias = bias

    @torch.no_grad()
    def forward(self, x: Tensor, dropout: None = None) -> Tensor:
        rows = x.flatten(0, -2).float()  # (n, in)
        scales = rows.abs().amax(1, keepdim=True) / 127
        unit = rows / scales.where(scales > 0, 1.0)
        high = unit.round()
        both = torch.cat((high, ((unit - high) * 254).round())).to(torch.int8)  # (2n, in)
        out, low = torch._int_mm(both, self.codes.T).float().chunk(2)  # (n, out) each
        out = out.add_(low, alpha=1 / 254).mul_(scales).mul_(self.scales)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Int8LM(CausalLM):
    """A language model with its linear layers and its unembedding in bytes, adapters merged.

    Embeddings, norms and biases are the given model's own tensors. It is made anew after each
    update, in less time than a token of a batch takes.
    """

    def __init__(self, lm: CausalLM):
        nn.Module.__init__(self)
        self.config, self.model = lm.config, share(lm.model)
        if not lm.config.tied_embeddings:
            self.lm_head = lm.lm_head
        for name, layer in adapters(self.model).items():
            merged = layer.merged()
            self.model.set_submodule(name, Int8Linear(merged.weight, merged.bias))
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, nn.Linear | QuantizedLinear):
                self.model.set_submodule(name, Int8Linear(layer.weight, layer.bias))
        self.unembed = Int8Linear(lm.unembedding)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.unembed(hidden)
