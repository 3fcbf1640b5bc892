"""Groups of settings, each setting declared once: default, help, range, resume rule.

A command's config inherits the groups that it needs, so its settings stay flat
(`config.learning_rate`), and `--help` shows each group under its heading, the words of its
docstring before the colon. A function that reads one group asks for that group. A config that
needs another default, sentence or range says so by `override`. No group imports torch, so that
`--help` need not wait for it.
"""

from dataclasses import dataclass

from minirlhf.data.arguments import argument_problems
from minirlhf.data.parts import TRAIN_ON
from minirlhf.files.sieve import column_problems, name_problems
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import setting
from minirlhf.setup.parallel_settings import ParallelSettings


@dataclass(frozen=True)
class BaseSettings:
    """Model: what adapters go on."""

    base: str | None = setting(
        None, "folder or hub name of what the adapters among the given models were trained on; "
        "none: what their adapter_config.json names", metavar="FOLDER", resume="fixed",
    )


@dataclass(frozen=True)
class ModelSettings(BaseSettings):
    """Model: where the weights come from."""

    model: str = setting(
        "", "folder or hub name of the model, or of an adapter (LoRA) as peft saves it",
        metavar="FOLDER", required=True, resume="fixed",
    )


@dataclass(frozen=True)
class ReferenceSettings:
    """Model: what the policy is held near to."""

    ref: str | None = setting(
        None, "reference model of the KL penalty; none: the policy at step 0", metavar="FOLDER",
        resume="fixed",
    )


@dataclass(frozen=True)
class TemplateSettings:
    """Data: what is said to the chat template."""

    chat: bool = setting(
        False, "make turns of texts, the user's of a prompt and the assistant's of an answer, for "
        "the model's chat template to write", resume="start",
    )
    template_kwargs: tuple[str, ...] = setting(
        (), "what all rows of messages tell the chat template, as in enable_thinking=false; VALUE "
        "is JSON, else a string; a row's column chat_template_kwargs wins",
        metavar="NAME=VALUE", resume="start",
    )

    def check(self) -> list[str]:
        return argument_problems(self.template_kwargs)


@dataclass(frozen=True)
class DataSettings(TemplateSettings):
    """Data: what is read, and what happens to rows that cannot be used as they are."""

    data: str = setting(
        "", "data file: JSON lines, JSON, CSV, TSV or .txt, also .gz; or Parquet", metavar="FILE",
        required=True, data=True,
    )
    overlong: str = setting(
        "drop", "what happens to rows that are longer than max_length",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"), resume="start",
    )
    columns: tuple[str, ...] = setting(
        (), "read the file's COLUMN as the column NAME, as in prompt=question",
        metavar="NAME=COLUMN", resume="start",
    )
    bad_rows: str = setting(
        "error", "what happens to malformed rows: error refuses the file, skip leaves them out and "
        "lists them in rejected.jsonl", choices=("error", "skip"), resume="start",
    )
    fix_text: bool = setting(
        False, "replace halves of surrogate pairs, which no UTF-8 text can hold, by U+FFFD",
        resume="start",
    )
    allow_empty_prompt: bool = setting(
        False, "accept rows whose prompt is empty", resume="start"
    )
    max_drop: float = setting(
        1.0, "refuse a file of which more than this share of rows is left out; 1: no limit",
        at_least=0, at_most=1,
    )

    rendered: bool = setting(
        False, "strings are rendered already: names of control tokens in them are tokens, and "
        "nothing is put in front", resume="start",
    )
    spelled: bool = setting(
        False, "names of control tokens in strings and in the assistant's turns are text",
        resume="start",
    )

    def check(self) -> list[str]:
        return [*column_problems(self.columns), *name_problems(self.rendered, self.spelled)]


@dataclass(frozen=True)
class LengthSettings:
    """Data: the longest row."""

    max_length: int = setting(
        1024, "most tokens in a row, prompt and response together", at_least=2, resume="start"
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation: held-out data, and how often the model is measured on it."""

    eval_data: tuple[str, ...] = setting(
        (), "held-out data files; of several, name each: NAME=FILE", metavar="FILE", data=True
    )
    eval_every: int = setting(
        0, "steps from one evaluation to the next; 0: evaluate at the end only", at_least=0
    )

    def check(self) -> list[str]:
        alone = self.eval_every and not self.eval_data
        return ["eval_every: goes with --eval-data"] if alone else []


@dataclass(frozen=True)
class LabelSettings:
    """Preferences: how far their labels are trusted."""

    label_smoothing: float = setting(
        0.0, "probability that the label of a pair is wrong", at_least=0, below=0.5
    )


@dataclass(frozen=True)
class PairTableSettings:
    """Evaluation: held-out pairs to look at."""

    show_samples: int = setting(
        4, "held-out pairs that each evaluation prints with their scores; -1: all", at_least=-1,
        resume="free",
    )


@dataclass(frozen=True)
class StepSettings:
    """Steps and batches: how long the run is."""

    epochs: float = setting(1.0, "passes over the data", above=0, at_most=1e6)
    steps: int | None = setting(None, "optimizer steps; given, it replaces epochs", at_least=1)


@dataclass(frozen=True)
class TurnSettings:
    """Data: what of messages is learned."""

    train_on: str = setting(
        "all", "what of messages is learned: all turns of the assistant (of a row with a prompt, "
        "those of its completion), the last one, or the whole completion, whoever speaks in it",
        choices=TRAIN_ON, resume="start",
    )


@dataclass(frozen=True)
class BatchSettings:
    """Steps and batches: how much is processed together."""

    batch_size: int = setting(16, "examples in an optimizer step", at_least=1, resume="start")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer: AdamW, its learning rate and its gradients."""

    learning_rate: float = setting(
        1e-5, "peak learning rate of AdamW; with --lora-rank ten times the default", above=0
    )
    schedule: str = setting(
        "linear", "how the learning rate decays after its peak",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = setting(
        0, "steps over which the learning rate rises to its peak", at_least=0
    )
    weight_decay: float = setting(
        0.0, "weight decay of AdamW, applied to matrices only", at_least=0
    )
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW", above=0)
    max_grad_norm: float | None = setting(
        1.0, "longer gradients are scaled down to this norm; none: no clipping", above=0
    )
    skip_nonfinite: int = setting(
        0, "stop only after more than this many updates in a row were skipped because a loss or "
        "gradient was not finite", at_least=0,
    )


@dataclass(frozen=True)
class MergeSettings:
    """Adapters: what becomes of them."""

    merge: bool = setting(
        True, "write the model with its adapters merged too, not the adapters alone",
        resume="free",
    )


@dataclass(frozen=True)
class AdapterSettings(MergeSettings):
    """Adapters: LoRA (Hu et al. 2021, arXiv:2106.09685)."""

    lora_rank: int = setting(
        0, "rank of the LoRA adapters that are trained in place of the weights; 0: train the "
        "weights", at_least=0, at_most=4096, resume="fixed",
    )
    lora_alpha: float = setting(
        32.0, "adapter outputs are multiplied by lora_alpha / lora_rank", above=0, resume="fixed"
    )
    lora_targets: tuple[str, ...] = setting(
        ("all",), "linear layers that have adapters: all, attention, mlp, or names and patterns, "
        "as in q_proj or layers.1?.*", metavar="NAME", resume="fixed",
    )
    rslora: bool = setting(
        False, "multiply adapter outputs by lora_alpha / sqrt(lora_rank) (rsLoRA, Kalajdzievski "
        "2023, arXiv:2312.03732)", resume="fixed",
    )
    dora: bool = setting(
        False, "train the length of each weight's rows too (DoRA, Liu et al. 2024, "
        "arXiv:2402.09353)", resume="fixed",
    )
    trunk_bits: int = setting(
        0, "bits of the frozen weights under the adapters: 8 (int8) or 4 (NF4, Dettmers et al. "
        "2023, arXiv:2305.14314); 0: as many as dtype has", choices=(0, 8, 4), resume="fixed",
    )

    def check(self) -> list[str]:
        if self.trunk_bits and not self.lora_rank:
            return [f"trunk_bits: got {self.trunk_bits}, but packed weights cannot be trained: "
                    "give --lora-rank too, 16 for a start"]
        alone = {"lora_targets": self.lora_targets != ("all",), "rslora": self.rslora,
                 "dora": self.dora, "merge": not self.merge}
        return [] if self.lora_rank else [
            f"{name}: goes with --lora-rank" for name, given in alone.items() if given]


@dataclass(frozen=True)
class ResponseSettings:
    """Sampling: the longest response."""

    max_new_tokens: int = setting(64, "most tokens in a response", at_least=1, resume="start")


COLDEST = 1e-4  # temperature; a lower one makes infinities of logits


@dataclass(frozen=True)
class SamplingSettings(ResponseSettings):
    """Sampling: the distribution that each token of a response is drawn from."""

    temperature: float = setting(
        1.0, "logits are divided by it before the softmax", at_least=COLDEST, resume="start"
    )
    top_k: int = setting(
        0, "sample from the k most probable tokens; 0: from all", at_least=0, resume="start"
    )
    top_p: float = setting(
        1.0, "sample from the fewest tokens whose probabilities reach this sum", above=0,
        at_most=1, resume="start",
    )
    min_p: float = setting(
        0.0, "sample from tokens whose probability is at least this fraction of the highest",
        at_least=0, at_most=1, resume="start",
    )
    stop: tuple[str, ...] = setting(
        (), "strings that end a response", metavar="TEXT", resume="start"
    )

    def check(self) -> list[str]:
        return [] if all(self.stop) else ["stop: got an empty string, which every text contains"]


@dataclass(frozen=True)
class KLSettings:
    """KL penalty: how far the policy may move from its reference."""

    kl_coef: float = setting(
        0.05, "weight of the KL penalty, per nat", at_least=0, resume="start"
    )
    kl_estimator: str = setting(
        "k1", "estimator of the KL from the sampled tokens; full: the exact KL over all tokens",
        choices=("k1", "k2", "k3", "abs", "full"),
    )
    kl_in: str = setting(
        "reward", "whether the KL penalty is subtracted from the rewards or added to the loss",
        choices=("reward", "loss"),
    )

    def check(self) -> list[str]:
        if self.kl_in == "loss" and self.kl_estimator in ("k1", "abs"):
            return [
                f"kl_in loss with kl_estimator {self.kl_estimator}: the gradient of that estimate "
                "is not the KL's (k1's is 0 on average); use k2 or full, or k3 as GRPO does"
            ]
        return []


@dataclass(frozen=True)
class AdaptiveKLSettings:
    """KL penalty: a coefficient that steers to a target; KLSettings go with them."""

    kl_target: float | None = setting(
        None, "adapt kl_coef until the KL of a response is this many nats; none: kl_coef stays",
        above=0,
    )
    kl_horizon: float = setting(
        10_000.0, "responses over which an adaptive kl_coef changes by at most a fifth", above=0
    )

    def check(self) -> list[str]:
        if self.kl_target is not None and self.kl_coef == 0:
            return ["kl_target: kl_coef is 0, which no factor can move; use one above 0"]
        return []


@dataclass(frozen=True)
class MicroBatchSettings:
    """Memory and speed: the size of a forward pass."""

    micro_batch_tokens: int = setting(
        4096, "most tokens in one forward pass; fewer need less memory", at_least=1
    )


@dataclass(frozen=True)
class MemorySettings(MicroBatchSettings):
    """Memory and speed: what training trades one for the other."""

    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, one more forward pass",
        resume="free",
    )
    compile: bool = setting(
        False, "compile passes over whole rows, on a CUDA GPU decoding too; needs a C++ compiler"
    )


@dataclass(frozen=True)
class DeviceSettings:
    """Memory and speed: where and in which format numbers are held."""

    dtype: str = setting(
        "auto", "number format of weights and computation; auto: float32",
        choices=("auto", "float32", "bfloat16"), resume="fixed",
    )
    device: str = setting(
        "auto", "cpu, cuda, cuda:N, mps; auto: CUDA, else Apple's GPU, else the CPU", resume="free"
    )


@dataclass(frozen=True)
class SeedSettings:
    """Run: what is drawn at random."""

    seed: int = setting(0, "seed of all that is drawn at random", resume="start")


@dataclass(frozen=True)
class InputSettings(
    ModelSettings, DataSettings, EvaluationSettings, StepSettings, BatchSettings
):
    """What every recipe reads, and how long it goes on; TrainingSettings go with them."""


@dataclass(frozen=True)
class TrainingSettings(
    OptimizerSettings, AdapterSettings, MemorySettings, DeviceSettings, ParallelSettings,
    SeedSettings, RunSettings,
):
    """How every recipe trains and where it writes; InputSettings go with them."""

    @classmethod
    def defaults_beside(cls, given: dict) -> dict:
        """Adapters learn best at about ten times the rate of all weights (Schulman et al. 2025,
        "LoRA Without Regret")."""
        default = cls.__dataclass_fields__["learning_rate"].default
        return {"learning_rate": float(f"{10 * default:.9g}")} if given.get("lora_rank") else {}
