"""What a run of supervised fine-tuning reads, refuses and loads: data, tokenizer, model."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from minirlhf import streams
from minirlhf.batches.demonstrations import count_tokens, with_target
from minirlhf.data.examples import Text, load_texts
from minirlhf.data.formats import text_format
from minirlhf.data.split import split_rows
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.files import atomic, folders
from minirlhf.files.reading import read_json
from minirlhf.files.sieve import Report, RowPolicy, Sieve
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf, name_eos
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.run.dry_run import DryRun
from minirlhf.run.machine import make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.common import check_base
from minirlhf.setup.roles import load_trained
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.setup.training import TrainingRun, open_run, read_rows, ready


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
        return load_tokenizer(folders.resolve(config.model, False, config.base))
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
        where = folders.resolve(config.model, False, config.base)
        check_base(config, where)
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


def load_start(
    config: SFTConfig, model_config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype
) -> CausalLM:
    """The model of --model, or random weights; its config.json will name the eos of its texts."""
    if config.model is not None:
        lm = load_trained(config, folders.resolve(config.model, base=config.base), dtype)
    else:
        rng = streams.generator(config.seed, "initial weights")
        lm = initialize(CausalLM(model_config), rng).to(dtype)
    name_eos(lm.config, tokenizer.eos_ids)
    return lm


def load_run(config: SFTConfig) -> TrainingRun[Text]:
    """Refuses all that can be refused, the cheapest first, then loads the model."""
    r, device, dtype = open_run(
        config, "sft", init_config=[config.init_config] if config.init_config else []
    )
    tokenizer = choose_tokenizer(config)
    if source := config.model or config.tokenizer:
        r.inputs["tokenizer"] = tokenizer_files(folders.resolve(source, False, config.base))
    model_config = choose_config(config, tokenizer)

    def read(file: str) -> tuple[list[Text], Report]:
        return load_texts(file, tokenizer, config.max_length, config.overlong,
                          policy=RowPolicy.of(config), finish=with_target,
                          train_on=config.train_on)

    config, rows = read_rows(r, config, read, longest.of_texts, model_config.longest_row)
    if isinstance(r, DryRun):  # one evaluation more, before step 1
        r.evaluations *= 1 + 1 / longest.evaluations(r.steps, config.eval_every)
    make_deterministic(device)
    estimate = memory.of_training("sft", config, model_config, rows.tokens, dtype)
    start = [folders.resolve(config.model, base=config.base)] if config.model else []
    facts = memory.announce(config, estimate, start, dtype, device)
    targets = int(count_tokens(rows.train)[1].sum())
    facts = {"tokens": sum(rows.tokens), "targets": targets} | facts
    lm = load_start(config, model_config, tokenizer, dtype)
    return ready(config, r, lm, tokenizer, rows, "texts", facts, device)
