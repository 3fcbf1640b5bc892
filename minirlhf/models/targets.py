"""Which linear layers of a decoder have adapters."""

from fnmatch import fnmatchcase

from torch import nn

from minirlhf.models.transformer import Decoder

GROUPS = {"all": "*", "attention": "*.self_attn.*", "mlp": "*.mlp.*"}  # names for several layers


def target_layers(trunk: Decoder, targets: tuple[str, ...] = ("all",)) -> dict[str, nn.Module]:
    """The linear layers that adapters go on, by name.

    Args:
        targets: "all", "attention", "mlp", or patterns with * and ?, which a layer's whole name
            ("layers.0.self_attn.q_proj") or its last part matches.
    Raises:
        ValueError: one that no layer matches.
    """
    layers = {n: m for n, m in trunk.named_modules() if hasattr(m, "in_features")}
    found = set()
    for target in targets:
        pattern = GROUPS.get(target, target)
        here = {n for n in layers if any(fnmatchcase(x, pattern) for x in (n, n.split(".")[-1]))}
        if not here:
            legal = ", ".join(GROUPS) + " or names as " + ", ".join(
                dict.fromkeys(name.split(".")[-1] for name in layers))
            raise ValueError(f"target '{target}' is no layer of this model: legal are {legal}")
        found |= here
    return {name: layer for name, layer in layers.items() if name in found}
