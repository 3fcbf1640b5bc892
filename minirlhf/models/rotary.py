"""Rotary positions: each pair of channels of a query or key turns by an angle of its position.

Su et al. 2021 (arXiv:2104.09864). T tokens, E channels of a head.
"""

import math

import torch
from torch import Tensor

from minirlhf.models.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels, (E/2,) float64, and a factor on cos and sin.

    Su et al. 2021 (arXiv:2104.09864), eq. 15: theta_i = base^(-2i/E). Scaled forms: linear
    (arXiv:2306.15595), Llama 3.1's by wavelength, and YaRN (arXiv:2309.00071, sec. 3.2 and 3.4).
    """
    dim, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    freqs = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = scaling.get("rope_type", "default")
    if kind in ("default", "dynamic"):  # dynamic NTK differs only beyond max_positions
        return freqs, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return freqs / factor, 1.0
    trained = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained * freqs / (2 * math.pi)  # full turns within the trained context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / factor, 1.0

    def channel_of(turns: float) -> float:  # the pair that makes so many turns in `trained`
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel_of(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(channel_of(scaling.get("beta_slow") or 1)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1
    return (1 - ramp) * freqs + ramp * freqs / factor, attention_factor


class RotaryTable:
    """cos and signed sin of every position, (T, E) each, for `rotate`: a function of the config,
    grown on demand."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.cos = self.sin = torch.empty(0, 0)

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.cos) < length or self.cos.dtype != like.dtype or self.cos.device != like.device:
            rows = 1 << max(length - 1, 255).bit_length()
            freqs, factor = rotary_frequencies(self.config)
            angles = torch.outer(torch.arange(rows, dtype=torch.float64), freqs)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            self.cos = torch.cat((cos, cos), dim=-1).to(like)  # halves, not interleaved
            self.sin = torch.cat((-sin, sin), dim=-1).to(like)
        return self.cos, self.sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel i with channel i + E/2 by its position's angle; x (B, H, T, E).

        x_i cos - x_(i + E/2) sin,   x_(i + E/2) cos + x_i sin
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)
