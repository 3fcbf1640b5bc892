"""setup.sft."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minirlhf import streams
from minirlhf.batches.demonstrations import count_tokens, with_target
from minirlhf.data.examples import Text, load_texts, split_rows
from minirlhf.data.formats import text_format
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.files import atomic, folders
from minirlhf.files.reading import read_json
from minirlhf.files.sieve import Report, RowPolicy, Sieve, column_problems
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf, name_eos
from minirlhf.models.lora import add_lora
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.run import optim
from minirlhf.run.settings import setting
from minirlhf.setup import memory_plans
from minirlhf.setup.memory import Plan


@dataclass(frozen=True)
class SFTConfig:
    model: str | None = setting(None, "language model to continue", metavar="FOLDER")
    init_config: str | None = setting(
        None, "config.json of a model to train from nothing, instead of --model", metavar="FILE"
    )
    tokenizer: str | None = setting(
        None, "tokenizer of a model from nothing; none: one is trained", metavar="FOLDER"
    )
    vocab_size: int = setting(8192, "most tokens of a tokenizer that is trained", at_least=258)
    data: str = setting(
        "", "texts, or prompts with answers: JSON lines, JSON, CSV, TSV or .txt, also .gz",
        metavar="FILE", required=True,
    )
    out: str = setting("", "folder of the run", metavar="DIR", required=True)
    eval_data: tuple[str, ...] = setting((), "held-out texts, several as NAME=FILE", metavar="FILE")
    eval_every: int = setting(0, "steps between evaluations; 0: at the end only", at_least=0)
    epochs: float = setting(1.0, "passes over the data", above=0, at_most=1e6)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", at_least=1)
    batch_size: int = setting(16, "texts in an optimizer step", at_least=1)
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    learning_rate: float = setting(2e-5, "peak step size of AdamW", above=0)
    schedule: str = setting("linear", "decay of the learning rate", choices=optim.SCHEDULES)
    warmup_steps: int = setting(0, "steps until the peak learning rate", at_least=0)
    weight_decay: float = setting(0.0, "AdamW's decay of matrices", at_least=0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float | None = setting(1.0, "gradient norm to clip at; none: off", above=0)
    skip_nonfinite: int = setting(
        0, "updates in a row that may be skipped where numbers are not finite", at_least=0
    )
    lora_rank: int = setting(
        0, "train adapters of this rank; 0: all weights", at_least=0, at_most=4096
    )
    lora_alpha: float = setting(32.0, "adapter scale: alpha / rank", above=0)
    gradient_checkpointing: bool = setting(
        False, "less memory for a forward pass more in each update"
    )
    compile: bool = setting(
        False, "torch.compile for the passes over whole rows; needs a C++ compiler"
    )
    max_length: int = setting(1024, "tokens of the longest row", at_least=2)
    overlong: str = setting(
        "drop", "what happens to longer rows",
        choices=("drop", "truncate_prompt_left", "truncate_response", "error"),
    )
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or list them in rejected.jsonl and go on",
        choices=("error", "skip"),
    )
    fix_text: bool = setting(False, "replace halves of surrogate pairs by U+FFFD")
    allow_empty_prompt: bool = setting(False, "whether a prompt may be empty")
    max_drop: float = setting(
        1.0, "share of a file's rows that may be left out; 1: no limit", at_least=0, at_most=1
    )
    dtype: str = setting(
        "auto", "of weights and compute; auto: float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: the first CUDA GPU, else the CPU")
    seed: int = setting(0, "of data order and new weights")
    log_every: int = setting(10, "steps between lines of the log", at_least=1)
    save_every: int = setting(100, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "checkpoints kept", at_least=2)
    resume: bool = setting(False, "go on from the newest checkpoint of --out")
    allow_data_change: bool = setting(False, "resume although data files have changed")
    allow_setting_change: bool = setting(
        False, "resume although settings or reward functions have changed"
    )

    def check(self) -> list[str]:
        problems = column_problems(self.columns)
        if (self.model is None) == (self.init_config is None):
            problems.append("give exactly one of --model and --init-config")
        if self.model is not None and self.tokenizer is not None:
            problems.append("--tokenizer goes with --init-config: a --model has its own")
        if self.init_config is not None and self.lora_rank:
            problems.append("--lora-rank goes with --model: random weights need training in full")
        if self.eval_every and not self.eval_data:
            problems.append("eval_every: goes with --eval-data")
        return problems


# ------------------------------------------------------------------------------- the command line


def raw_texts(path: str, policy: RowPolicy) -> Iterator[str]:
    """All text of a data file's rows, for a tokenizer to learn from."""
    for row, parts in split_rows(path, text_format, Sieve(policy)).rows:
        for part in parts:
            if isinstance(part, str):
                yield part
            elif part and isinstance(part[0], dict):
                yield from (message["content"] for message in part)
            elif part:
                what = "holds token ids, from which no tokenizer can be trained"
                raise UserError(row.where, what, "give --tokenizer FOLDER")


def choose_tokenizer(config: SFTConfig) -> Tokenizer:
    """The model's own, or --tokenizer's, or that of the run that is resumed, or a new one."""
    if config.model is not None:
        return load_tokenizer(folders.resolve(config.model, weights=False))
    if config.tokenizer is not None:
        return load_tokenizer(folders.resolve(config.tokenizer, weights=False))
    kept = Path(config.out) / "tokenizer"
    if config.resume and kept.exists():
        return load_tokenizer(kept)
    texts = list(raw_texts(config.data, RowPolicy.of(config)))
    # Elsewhere than in --out, which stays untouched until all data has proved to be right.
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, config.vocab_size, folder)


def keep_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Puts a trained tokenizer where --resume finds it, whole or not at all."""
    temporary, final = out / f"{atomic.TEMPORARY}tokenizer", out / "tokenizer"
    if not final.exists():
        atomic.make_folder(temporary)
        tokenizer.save(temporary)
        for path in temporary.iterdir():
            atomic.fsync(path)
        atomic.commit_folder(temporary, final)


def new_config(path: str, vocab_size: int, **ids: int | None) -> ModelConfig:
    """The config of a model from nothing.

    Args:
        path: of --init-config.
        vocab_size: where the file has none.
        ids: what config.json says of special tokens.
    """
    values = read_json(path)
    if isinstance(values, dict):
        # Written out, because Hugging Face's defaults for absent keys differ by family.
        if "num_attention_heads" in values:
            values = {"num_key_value_heads": values["num_attention_heads"], **values}
        values = {"vocab_size": vocab_size, **values, **ids}
    return config_from_hf(values, path)


def choose_config(config: SFTConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's config, or the one of --init-config with what it may leave to the tokenizer."""
    if config.init_config is None:
        where = folders.resolve(config.model, weights=False)
        model_config = pretrained.read_config(where)
    else:
        where, pad = config.init_config, tokenizer.spare_pad_token()
        model_config = new_config(
            where, tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
            pad_token_id=pad and pad[1],
        )
    if model_config.vocab_size < tokenizer.vocab_size:
        legal = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        raise UserError(f"{where}: vocab_size", f"is {model_config.vocab_size}", legal)
    return model_config


def load(
    config: SFTConfig, path: str, tokenizer: Tokenizer, most: int
) -> tuple[list[Text], Report]:
    """Texts of a file, and its report, which is printed."""
    texts, report = load_texts(
        path, tokenizer, config.max_length, config.overlong,
        policy=RowPolicy.of(config), finish=with_target,
    )
    longest = int(count_tokens(texts)[0].max())
    if longest > most:
        what = f"a row of {longest} tokens, the model reads {most}"
        raise UserError(path, what, f"give --max-length {most}")
    print(report)
    return texts, report


def memory_plan(
    config: SFTConfig, model: ModelConfig, texts: list[Text], sets: dict[str, list[Text]],
    dtype: torch.dtype, held: int,
) -> Plan:
    """What a run over these texts and held-out sets will hold; held: as in `sft_plan`."""
    longest = max(int(count_tokens(rows)[0].max()) for rows in (texts, *sets.values()))
    return memory_plans.sft_plan(
        config, model, longest, dtype, held, max(map(len, sets.values()), default=0),
        memory_plans.heaviest(count_tokens(texts)[0].tolist(), config.batch_size),
    )


def load_start(
    config: SFTConfig, model_config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype
) -> CausalLM:
    """The model of --model, or random weights; its config.json will name the eos of its texts."""
    if config.model is not None:
        lm = pretrained.load_pretrained(config.model, dtype)
    else:
        rng = streams.generator(config.seed, "initial weights")
        lm = initialize(CausalLM(model_config), rng).to(dtype)
    name_eos(lm.config, tokenizer.eos_ids)
    if config.lora_rank:
        add_lora(lm, config.lora_rank, config.lora_alpha, config.seed)
    lm.model.checkpointing = config.gradient_checkpointing
    return lm
