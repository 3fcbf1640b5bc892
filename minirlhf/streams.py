"""Randomness that is derived, never stored: every draw is a hash of (seed, stream, indices).

No generator state exists that could be lost, so a run that is killed and resumed draws the same
numbers, a row draws the same numbers in any batch, and adding an evaluation does not shift the
training that follows it.

The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
with variant 13 of Stafford's finalisers), in 64-bit integers that wrap around.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_M1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_M2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's >> copies the sign bit, so that is masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's bijection of int64 onto int64; neighbours in, unrelated numbers out."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    return x ^ _shift_right(x, 31)


def key(seed: int, stream: str, *indices: int | Tensor) -> Tensor:
    """int64 key of (seed, stream, indices); a tensor index gives a key for each of its elements."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little", signed=True)
    out = mix(torch.tensor(seed, dtype=torch.int64) ^ mix(torch.tensor(name, dtype=torch.int64)))
    for index in indices:
        out = mix(out ^ mix(torch.as_tensor(index, dtype=torch.int64)))
    return out


def uniform(keys: Tensor, t: int | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """One number in [0, 1) for each key at position t: a multiple of 2^-53.

    In float32, which some devices have no wider one than, the nearest to it: it may be 1.
    """
    t = t if isinstance(t, Tensor) else torch.full((), t, device=keys.device)
    return _shift_right(mix(keys ^ mix(t)), 11).to(dtype) * 2.0**-53


def permutation(seed: int, stream: str, epoch: int, n: int) -> Tensor:
    """(n,) int64: a shuffled order of 0..n-1, a pure function of its arguments."""
    return torch.argsort(key(seed, stream, epoch, torch.arange(n)), stable=True)


def generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """A fresh torch generator, for initial weights; never kept."""
    made = torch.Generator()
    made.manual_seed(int(key(seed, stream, *indices)) & (2**63 - 1))
    return made
