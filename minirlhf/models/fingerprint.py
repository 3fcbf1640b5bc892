"""Which weights are under an adapter: a short text that tells one base from another."""

from torch import nn

from minirlhf.files.fingerprint import fingerprint_of

ADAPTED = ("lora_A", "lora_B", "magnitude")  # what `lora.LoRALinear` adds to a layer
PACKED = ".codes"  # what `quantized.QuantizedLinear` has in place of a weight


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
