"""The settings of reward-model training, and what they refuse together."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.run.settings import override, setting
from minirlhf.setup.adapter_settings import DropoutSettings
from minirlhf.setup.groups import (
    InputSettings,
    LabelSettings,
    LengthSettings,
    PairTableSettings,
    TrainingSettings,
)


@dataclass(frozen=True)
class PreferenceSettings(LabelSettings):
    """Preferences: the loss, and the score that the finished model gives."""

    list_loss: str = setting(
        "plackett-luce",
        "loss of a ranked list: of its whole order (plackett-luce), or of all its pairs: plain, "
        "with the difference of their given scores as the margin, or with the sigmoid of that "
        "difference as the probability of the label",
        choices=("plackett-luce", "pairs", "margins", "probabilities"),
    )
    center_rewards_coefficient: float = setting(
        0.0, "weight of a loss (chosen + rejected)^2 that keeps the scores around 0; 0.01 is usual",
        at_least=0,
    )
    heads: int = setting(
        1, "linear heads on one trunk, an ensemble whose mean is the score", at_least=1,
        at_most=1024, resume="fixed",
    )
    lcb_coef: float = setting(
        0.0, "subtract this many standard deviations of the heads from their mean", at_least=0
    )
    normalize: str = setting(
        "none", "give the finished model's scores mean 0 and std 1 over this data",
        choices=("none", "eval", "train"),
    )


@dataclass(frozen=True)
class RewardConfig(
    InputSettings, LengthSettings, PreferenceSettings, PairTableSettings, TrainingSettings,
    DropoutSettings,
):
    """Train a reward model on pairs or ranked lists."""

    SHOWN_FIRST: ClassVar = (
        "model", "data", "max_length", "eval_data", "eval_every", "epochs", "steps", "batch_size",
        "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    model: str = override(
        help="language model, or reward model, to start from: a folder or a hub name"
    )
    data: str = override(
        help="preference pairs or ranked lists: JSON lines, JSON, CSV or TSV, also .gz"
    )
    batch_size: int = override(help="pairs or lists in an optimizer step")
    lora_rank: int = override(
        help="rank of the LoRA adapters that are trained with the head, in place of the weights; "
        "0: train the weights"
    )

    def check(self) -> list[str]:
        problems = []
        if self.lcb_coef and self.heads == 1:
            problems.append(f"lcb_coef: got {self.lcb_coef}, must be 0 for a single head")
        elif self.lcb_coef and not self.center_rewards_coefficient:
            # Pairs leave each head's zero open; without one their spread would measure that
            # (Eisenstein et al. 2023, arXiv:2312.09244, regularise for the same reason).
            do = "heads that share no zero cannot be compared: give --center-rewards-coefficient"
            problems.append(f"lcb_coef: got {self.lcb_coef}, {do} 0.01")
        if self.normalize == "eval" and not self.eval_data:
            problems.append("normalize: got 'eval', there is no eval_data: give it, or train")
        return problems
