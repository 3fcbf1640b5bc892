"""Which weights are under an adapter: a short text that tells one base from another."""

import hashlib

import torch
from torch import Tensor, nn

SAMPLED = 4096  # numbers of each tensor
ADAPTED = ("lora_A", "lora_B", "magnitude")  # what `lora.LoRALinear` adds to a layer
PACKED = ".codes"  # what `quantized.QuantizedLinear` has in place of a weight


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    """sha256 over name, shape and the first numbers of each tensor of a decoder.

    The numbers are rounded to bfloat16, so that a model has one fingerprint in any dtype. Training
    moves some of them, in every layer that it trains.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        first = tensor.detach().flatten()[:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(first.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(trunk: nn.Module) -> str:
    """Of a decoder without its adapters. Packed weights have lost what would tell: whoever packs
    them keeps the fingerprint from before as the decoder's `fingerprint`."""
    plain = {}
    for name, tensor in trunk.state_dict().items():
        if name.endswith(PACKED):
            return trunk.fingerprint
        if name.rpartition(".")[2] not in ADAPTED:
            plain[name.replace(".base.", ".")] = tensor
    return fingerprint_of(plain)
