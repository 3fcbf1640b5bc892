"""A short text that tells one set of weights from another."""

import hashlib

import torch
from torch import Tensor

from minirlhf import shards

SAMPLED = 4096  # numbers of each tensor


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    """sha256 over name, shape and the first numbers of each tensor.

    The numbers are rounded to bfloat16, so that a model has one fingerprint in any dtype. Training
    moves some of them, in every layer that it trains.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        first = shards.whole(tensor.detach()).flatten()[:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(first.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
