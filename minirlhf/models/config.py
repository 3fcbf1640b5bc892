"""The sizes and switches that make the one transformer into a model of each family."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture depends on; `families.config_from_hf` reads it from config.json."""

    family: str  # llama, mistral, qwen2, qwen3, gpt2: decides the names in files
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    norm: str = "rms"  # rms | layer
    activation: str = "silu"  # a key of transformer.ACTIVATIONS
    gated_mlp: bool = True
    positions: str = "rotary"  # rotary | learned
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": linear | llama3 | yarn | dynamic, ...}
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    sliding_window: int | None = None
    source: dict = field(default_factory=dict, compare=False)  # config.json as read, written back

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row it reads: its positions, or the window of its attention."""
        return min(self.max_positions, self.sliding_window or self.max_positions)
