"""The setting of adapters that only recipes have which learn from given texts."""

from dataclasses import dataclass

from minirlhf.run.settings import setting
from minirlhf.setup.groups import AdapterSettings

STEP = 2.0**-16  # of `models.dropout`


@dataclass(frozen=True)
class DropoutSettings(AdapterSettings):
    """Adapters: LoRA (Hu et al. 2021, arXiv:2106.09685).

    Who learns from its own samples has no dropout: the log-probs of sampling, and those before and
    after an update, must be of one policy, and each mask makes another one.
    """

    lora_dropout: float = setting(
        0.0, "probability that a number which an adapter reads is dropped, in training only",
        at_least=0, below=1,
    )

    def check(self) -> list[str]:
        if self.lora_dropout and not self.lora_rank:
            return ["lora_dropout: goes with --lora-rank"]
        if self.lora_dropout and not STEP <= self.lora_dropout <= 1 - STEP:
            return [f"lora_dropout: got {self.lora_dropout}, must be 0, or {STEP:.2g} or more and "
                    f"{1 - STEP:.5f} or less: masks are drawn with 16 bits"]
        return []


def dropout_in(config: AdapterSettings) -> float:
    """Its lora_dropout; 0 of a recipe that has none."""
    return config.lora_dropout if isinstance(config, DropoutSettings) else 0.0
