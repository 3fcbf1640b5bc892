"""The settings of supervised fine-tuning, and what they refuse together."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.run.settings import override, setting
from minirlhf.setup.adapter_settings import DropoutSettings
from minirlhf.setup.groups import InputSettings, LengthSettings, TrainingSettings, TurnSettings


@dataclass(frozen=True)
class NewModelSettings:
    """Model: one to train from random weights."""

    init_config: str | None = setting(
        None, "config.json of a model to train from random weights, instead of --model",
        metavar="FILE", resume="fixed",
    )
    tokenizer: str | None = setting(
        None, "folder whose tokenizer such a model gets; none: one is trained on the data",
        metavar="FOLDER", resume="fixed",
    )
    vocab_size: int = setting(
        8192, "most tokens in the vocabulary of a tokenizer that is trained", at_least=258,
        resume="fixed",
    )


@dataclass(frozen=True)
class SFTConfig(
    InputSettings, NewModelSettings, TurnSettings, LengthSettings, TrainingSettings,
    DropoutSettings,
):
    """Fine-tune a language model on demonstrations."""

    SHOWN_FIRST: ClassVar = (
        "model", "init_config", "data", "train_on", "max_length", "eval_data", "eval_every",
        "epochs", "steps", "batch_size", "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    model: str | None = override(
        None, "language model to fine-tune: a folder or a hub name", required=False
    )
    data: str = override(
        help="texts, or prompts with responses: JSON lines, JSON, CSV, TSV or .txt, also .gz; or "
        "Parquet"
    )
    eval_every: int = override(
        help="steps from one evaluation to the next; 0: evaluate at the start and the end only"
    )
    batch_size: int = override(help="texts in an optimizer step")
    learning_rate: float = override(2e-5)

    def check(self) -> list[str]:
        problems = []
        if (self.model is None) == (self.init_config is None):
            problems.append("give exactly one of --model and --init-config")
        if self.model is not None and self.tokenizer is not None:
            problems.append("--tokenizer goes with --init-config: a --model has its own")
        if self.init_config is not None and self.lora_rank:
            problems.append("--lora-rank goes with --model: random weights need training in full")
        return problems
