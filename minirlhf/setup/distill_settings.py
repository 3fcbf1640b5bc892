"""The settings of on-policy distillation."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import TrainingSettings
from minirlhf.setup.policy_settings import (
    PassSettings,
    PromptInputSettings,
    RolloutSettings,
    SampleTableSettings,
)


@dataclass(frozen=True)
class TeacherSettings:
    """Model: the teacher."""

    teacher: str = setting(
        "", "model to learn from, with the same tokenizer: a folder or a hub name",
        metavar="FOLDER", required=True, resume="fixed",
    )


@dataclass(frozen=True)
class DivergenceSettings:
    """Divergence: what is minimised (GKD, arXiv:2306.13649)."""

    gkd_beta: float = setting(
        1.0, "divergence of student and teacher at each token: 1: KL(student || teacher), which "
        "drops what the student cannot hold; 0: KL(teacher || student), which covers all; between: "
        "the generalised Jensen-Shannon divergence", at_least=0, at_most=1,
    )


@dataclass(frozen=True)
class DistillConfig(
    PromptInputSettings, TeacherSettings, RolloutSettings, DivergenceSettings, PassSettings,
    SampleTableSettings, TrainingSettings,
):
    """Train a student on its own responses, each token judged by a teacher (distillation)."""

    SHOWN_FIRST: ClassVar = (
        "model", "teacher", "data", "gkd_beta", "eval_data", "eval_every", "epochs", "steps",
        "batch_size", "max_new_tokens", "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    model: str = override(help="student, the language model to train: a folder or a hub name")
    epochs: float = override(help="passes over the prompts")
    steps: int | None = override(
        help="optimizer steps, each on responses of its own; given, it replaces epochs"
    )
    batch_size: int = override(32, "prompts that are answered in a step", resume="ask")
    temperature: float = override(
        help="logits are divided by it before the softmax, in sampling and in the divergence"
    )
    log_every: int = override(1)
    save_every: int | None = override(20)

    def remembers(self, name: str) -> bool:
        """Whether a run's state holds what came of a setting at the start: the KL that evaluations
        are compared with."""
        return bool(self.eval_data)
