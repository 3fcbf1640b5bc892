"""Supervised fine-tuning of a model on demonstrations, or the training of a tiny one from nothing.

    loss = -(sum over target tokens of log pi(token | those before it)) / (number of target tokens)

With a prompt the targets are the answer's tokens, without one all that have a predecessor.
What is left out: packing several texts into one row, which would let them see each other.
Run it as `minirlhf sft`, `python -m minirlhf.recipes.sft`, or loop over `sft(...)`.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch

from minirlhf import config as settings
from minirlhf import fsio, interrupt, model_files, optim, plans, pretrained, streams
from minirlhf.batching import cut_by_tokens, epoch_batches, total_steps
from minirlhf.checkpoint import TrainState
from minirlhf.columns import column_problems
from minirlhf.compiling import compile_blocks
from minirlhf.config import setting
from minirlhf.data import Text, load_texts, split_rows
from minirlhf.errors import OK, STOPPED, UserError, run
from minirlhf.formats import text_format
from minirlhf.hf_config import config_from_hf, name_eos
from minirlhf.lora import add_lora, merge_lora
from minirlhf.machine import choose_device, choose_dtype, make_deterministic, process_bytes
from minirlhf.memory import Plan
from minirlhf.meters import Step
from minirlhf.rows import read_json
from minirlhf.run import PLACE, Run, named_files, write_model
from minirlhf.sieve import Report, RowPolicy, Sieve
from minirlhf.texts import collate_texts, count_tokens, target_stats, with_target
from minirlhf.tokenizer import Tokenizer, load_tokenizer, tokenizer_files, train_tokenizer
from minirlhf.transformer import CausalLM, ModelConfig, initialize


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
    )  # fmt: skip
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
    )  # fmt: skip
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )  # fmt: skip
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or list them in rejected.jsonl and go on",
        choices=("error", "skip"),
    )  # fmt: skip
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


def accumulate(lm: CausalLM, batch: list[Text], config: SFTConfig, where: str) -> dict[str, float]:
    """Gradient of the mean loss over the targets of the whole batch, in micro-batches.

    Returns:
        loss and entropy, nats a target; grad_norm, before clipping.
    """
    lengths, counts = count_tokens(batch)
    sums, count = {"loss": 0.0, "entropy": 0.0}, int(counts.sum())  # no cut changes the count
    for part in cut_by_tokens(lengths, len(batch), config.micro_batch_tokens):
        here = [batch[i] for i in part.tolist()]
        stats = target_stats(lm, collate_texts(here))
        loss = -stats.logprobs.sum() / count
        value = float(loss.detach())
        optim.check_finite(f"{where} ({', '.join(t.where for t in here[:8])})", {"loss": value})
        loss.backward()
        interrupt.check()
        sums["loss"] += value
        sums["entropy"] += float(stats.entropy.detach().sum()) / count
    return sums | {"grad_norm": optim.clip_gradients(lm, config.max_grad_norm, where)}


def sft(state: TrainState, texts: list[Text], config: SFTConfig) -> Iterator[Step]:
    """Trains state.model, a CausalLM; yields after each optimizer step.

    Args:
        state: may come from a checkpoint; training goes on at its step.
        texts: N demonstrations.
        config: only its training settings are read.
    Raises:
        UserError: a text of one token; a number is not finite (exit code 3), the step then changed
            nothing.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one")
    lm, N = state.model, len(texts)
    lengths, counts = count_tokens(texts)
    per_epoch = ceil(N / config.batch_size)
    steps = total_steps(N, config.batch_size, config.epochs, config.steps)
    epoch_of, batches = -1, []
    while state.step < steps:
        started = time.perf_counter()
        epoch, position = divmod(state.step, per_epoch)
        if epoch != epoch_of:
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
            epoch_of = epoch
        rows = batches[position]
        rate = optim.learning_rate(
            state.step, steps, config.learning_rate, config.warmup_steps, config.schedule
        )
        optim.set_learning_rate(state.optimizer, rate)
        batch, where = [texts[i] for i in rows.tolist()], f"step {state.step + 1}"
        metrics = optim.update_or_skip(
            state.optimizer, partial(accumulate, lm, batch, config, where),
            state.counters, config.skip_nonfinite,
        )  # fmt: skip
        state.step += 1
        state.samples += len(rows)
        tokens_here = int(lengths[rows].sum())
        state.count("num_tokens", tokens_here)
        if metrics is not None:
            tokens = {name: metrics[name] for name in ("loss", "entropy")}
            state.meters.update(tokens, int(counts[rows].sum()))
            state.meters.update({"grad_norm": metrics["grad_norm"]})
        metrics = (metrics or {}) | {"learning_rate": rate, "epoch": state.step / per_epoch}
        metrics |= {name: state.counters.get(name, 0) for name in ("num_tokens", "skipped_updates")}
        seconds = time.perf_counter() - started
        clock = {"step_time": seconds, "tok_per_s": tokens_here / seconds}
        yield Step(state.step, metrics, clock, [])


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(lm: CausalLM, texts: list[Text], micro_batch_tokens: int = 4096) -> dict[str, float]:
    """loss and entropy, nats a target token over all texts, and perplexity = exp(loss)."""
    lengths, counts = count_tokens(texts)
    sums = torch.zeros(2, dtype=torch.float64)
    for part in cut_by_tokens(lengths, len(texts), micro_batch_tokens):
        interrupt.check()
        stats = target_stats(lm, collate_texts([texts[i] for i in part.tolist()]))
        sums += torch.stack((-stats.logprobs.sum(), stats.entropy.sum())).cpu()
    loss, entropy = sums / counts.sum()
    return {"loss": float(loss), "perplexity": float(loss.exp()), "entropy": float(entropy)}


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
        return load_tokenizer(model_files.resolve(config.model, weights=False))
    if config.tokenizer is not None:
        return load_tokenizer(model_files.resolve(config.tokenizer, weights=False))
    kept = Path(config.out) / "tokenizer"
    if config.resume and kept.exists():
        return load_tokenizer(kept)
    texts = list(raw_texts(config.data, RowPolicy.of(config)))
    # Elsewhere than in --out, which stays untouched until all data has proved to be right.
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, config.vocab_size, folder)


def keep_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Puts a trained tokenizer where --resume finds it, whole or not at all."""
    temporary, final = out / f"{fsio.TEMPORARY}tokenizer", out / "tokenizer"
    if not final.exists():
        fsio.make_folder(temporary)
        tokenizer.save(temporary)
        for path in temporary.iterdir():
            fsio.fsync(path)
        fsio.commit_folder(temporary, final)


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
        where = model_files.resolve(config.model, weights=False)
        model_config = pretrained.read_config(where)
    else:
        where, pad = config.init_config, tokenizer.spare_pad_token()
        model_config = new_config(
            where, tokenizer.vocab_size, bos_token_id=tokenizer.bos_id,
            pad_token_id=pad and pad[1],
        )  # fmt: skip
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
    )  # fmt: skip
    longest = int(count_tokens(texts)[0].max())
    if longest > most:
        what = f"a row of {longest} tokens, the model reads {most}"
        raise UserError(path, what, f"give --max-length {most}")
    print(report)
    return texts, report


def memory_plan(
    config: SFTConfig, model: ModelConfig, texts: list[Text], sets: dict[str, list[Text]],
    dtype: torch.dtype, held: int,
) -> Plan:  # fmt: skip
    """What a run over these texts and held-out sets will hold; held: as in `sft_plan`."""
    longest = max(int(count_tokens(rows)[0].max()) for rows in (texts, *sets.values()))
    return plans.sft_plan(
        config, model, longest, dtype, held, max(map(len, sets.values()), default=0),
        plans.heaviest(count_tokens(texts)[0].tolist(), config.batch_size),
    )  # fmt: skip


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


def evaluate_all(
    r: Run, state: TrainState, sets: dict[str, list[Text]], config: SFTConfig
) -> dict[str, float]:
    """Every held-out set; the metrics under their prefixes."""
    metrics = {}
    for prefix, texts in sets.items():
        values = evaluate(state.model, texts, config.micro_batch_tokens)
        metrics |= {prefix + name: value for name, value in values.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        r.say(f"  {prefix.rstrip('_')}: {len(texts):,} texts  {shown}")
    return metrics


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        SFTConfig, argv, "minirlhf sft", "Fine-tune a language model on demonstrations."
    )
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    files = {"": config.data} | named_files(config.eval_data)
    inputs = [*files.values(), *([config.init_config] if config.init_config else [])]
    # Refused here, before anything is loaded; written to only once all is.
    r = Run(config.out, "sft", settings.as_dict(config), config.resume, inputs, PLACE)
    tokenizer = choose_tokenizer(config)
    if source := config.model or config.tokenizer:
        r.inputs += tokenizer_files(model_files.resolve(source, weights=False))
    model_config = choose_config(config, tokenizer)
    most = model_config.longest_row
    read = {prefix: load(config, file, tokenizer, most) for prefix, file in files.items()}
    sets = {prefix: rows for prefix, (rows, _) in read.items()}
    texts = sets.pop("")
    make_deterministic(device)
    plan = memory_plan(config, model_config, texts, sets, dtype, process_bytes(device))
    start = [model_files.resolve(config.model)] if config.model else []
    fits = plans.announce(plan, start, dtype, device)
    lm = load_start(config, model_config, tokenizer, dtype).to(device)
    if config.compile:
        compile_blocks(lm)
    optimizer = optim.make_optimizer(
        lm, config.learning_rate, config.weight_decay, eps=config.adam_epsilon
    )
    state = TrainState(lm, optimizer)
    steps = total_steps(len(texts), config.batch_size, config.epochs, config.steps)
    lengths, counts = count_tokens(texts)
    with r:
        if config.model is None and config.tokenizer is None:
            keep_tokenizer(tokenizer, r.folder)
        r.list_left_out(report for _, report in read.values())
        r.facts({
            "examples": len(texts), "tokens": int(lengths.sum()), "targets": int(counts.sum()),
            "epochs": f"{steps / ceil(len(texts) / config.batch_size):.2f}",
            "texts a step": config.batch_size, "steps": steps,
            "trainable parameters": sum(p.numel() for p in lm.parameters() if p.requires_grad),
            "memory": fits, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        })  # fmt: skip
        r.restore(state)
        for step in r.bar(sft(state, texts, config), state, steps):
            last = step.number == steps
            steady = ("learning_rate", "epoch", "num_tokens", "skipped_updates")
            extra = {name: step.metrics[name] for name in steady}
            evaluating = last or (config.eval_every and step.number % config.eval_every == 0)
            with r.report(state, step):
                if evaluating:
                    extra |= evaluate_all(r, state, sets, config)
                if evaluating or step.number % config.log_every == 0:
                    r.log(state, extra, step.clock, ("loss", "entropy", "grad_norm"))
            if last or step.number % config.save_every == 0:
                r.save(state)
        if r.stopped:
            r.save(state)
            return STOPPED
        if config.lora_rank:
            merge_lora(lm)
        written = r.export(lambda target: write_model(lm, tokenizer, target))
        print(f"language model in {written}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
