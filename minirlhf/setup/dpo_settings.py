"""The settings of direct preference optimisation and its family, and what they refuse together."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.run.settings import override, setting
from minirlhf.setup.adapter_settings import DropoutSettings
from minirlhf.setup.groups import (
    InputSettings,
    LabelSettings,
    LengthSettings,
    PairTableSettings,
    ReferenceSettings,
    TrainingSettings,
)

LOSSES = ("sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto")
NO_REFERENCE = ("simpo", "orpo")
OF_MEANS = ("ipo", "simpo", "orpo")  # read mean log-probs of tokens, the others sums


@dataclass(frozen=True)
class DirectSettings(LabelSettings):
    """Preferences: the loss."""

    loss: str = setting(
        "sigmoid",
        "sigmoid: DPO; robust: DPO for labels of which a known share is wrong; ipo: the margin is "
        "drawn to a finite value; hinge: a pair whose margin is reached is left alone; simpo, "
        "orpo: without a reference; kto: single responses, each liked or not",
        choices=LOSSES,
    )
    beta: float | None = setting(
        None,
        "how near the policy is held to the reference; simpo: scale of the rewards; orpo: weight "
        "of the odds-ratio loss; none: 2 for simpo, 0.1 for the others",
        above=0,
    )
    simpo_gamma: float = setting(
        1.0, "simpo: by how much the chosen response should win, in units of the reward",
        at_least=0,
    )

    desirable_weight: float = setting(
        1.0, "kto: weight of responses that were liked", at_least=0
    )
    undesirable_weight: float = setting(
        1.0, "kto: weight of responses that were not liked", at_least=0
    )
    sft_coef: float | None = setting(
        None, "weight of the SFT loss of the chosen response, a mean over its tokens; none: 1 for "
        "orpo, 0 for the others", at_least=0,
    )

    def check(self) -> list[str]:
        problems = []
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            problems.append(f"label_smoothing: goes with --loss sigmoid or robust, not {self.loss}")
        if self.loss == "robust" and not self.label_smoothing:
            problems.append("loss robust: needs --label-smoothing, how likely a label is wrong")
        if self.simpo_gamma != 1.0 and self.loss != "simpo":
            problems.append(f"simpo_gamma: goes with --loss simpo, not {self.loss}")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1.0 and self.loss != "kto":
                problems.append(f"{name}: goes with --loss kto, not {self.loss}")
        return problems


@dataclass(frozen=True)
class KeptReferenceSettings(ReferenceSettings):
    """Memory and speed: the reference."""

    ref: str | None = override(help="reference model of the loss; none: the policy at step 0")
    cache_ref: bool = setting(
        True, "compute the log-probs of the reference before the first step, keep them in the "
        "run's folder and let the reference go; not: compute them at each step", resume="free",
    )


@dataclass(frozen=True)
class DPOConfig(
    InputSettings, KeptReferenceSettings, LengthSettings, DirectSettings, PairTableSettings,
    TrainingSettings, DropoutSettings,
):
    """Align a policy with preferences directly: DPO and its family."""

    SHOWN_FIRST: ClassVar = (
        "model", "data", "max_length", "loss", "beta", "eval_data", "eval_every", "epochs", "steps",
        "batch_size", "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    model: str = override(help="language model to align: a folder or a hub name")
    data: str = override(
        help="preference pairs or ranked lists, or of kto single responses with a label: JSON "
        "lines, JSON, CSV or TSV, also .gz; or Parquet"
    )
    batch_size: int = override(help="pairs, lists or responses in an optimizer step")
    show_samples: int = override(
        help="held-out pairs or responses that each evaluation prints with their rewards; -1: all"
    )
    learning_rate: float = override(1e-6)

    def check(self) -> list[str]:
        if self.loss == "kto" and self.batch_size == 1:
            do = "kto compares a response with others of its step: use 2 or more"
            return [f"batch_size: got 1, {do}"]
        if self.loss not in NO_REFERENCE:
            return []
        given = {"ref": self.ref is not None, "cache_ref": not self.cache_ref}
        return [f"{name}: {self.loss} has no reference: leave it out" for name in given
                if given[name]]


def beta_of(config: DirectSettings) -> float:
    """config.beta, or what none means."""
    if config.beta is not None:
        return config.beta
    return 2.0 if config.loss == "simpo" else 0.1


def sft_coef_of(config: DirectSettings) -> float:
    """config.sft_coef, or what none means."""
    if config.sft_coef is not None:
        return config.sft_coef
    return 1.0 if config.loss == "orpo" else 0.0
