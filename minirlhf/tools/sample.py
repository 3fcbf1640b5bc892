"""Continuations of prompts, as JSON lines: `minirlhf sample --model FOLDER --data FILE`.

Lines go to stdout or to --out, all else to stderr. A row's text depends on its prompt, its number
and the seed, not on the rows it shares a batch with.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf import streams
from minirlhf.data.examples import Prompt, load_prompts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import OK, STOPPED, UserError, run
from minirlhf.files import folders
from minirlhf.files.sieve import RowPolicy, column_problems
from minirlhf.models import pretrained
from minirlhf.models.generation import Sampling, before_stop, generate
from minirlhf.models.transformer import CausalLM
from minirlhf.run import settings
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.run.settings import setting


@dataclass(frozen=True)
class SampleConfig:
    model: str = setting(help="language model", metavar="FOLDER")
    data: str | None = setting(
        None, "prompts: JSON lines, JSON, CSV, TSV or .txt, also .gz", metavar="FILE"
    )
    prompt: str | None = setting(None, "one prompt, instead of --data", verbatim=True)
    out: str | None = setting(None, "new file for the lines; none: stdout", metavar="FILE")
    max_new_tokens: int = setting(64, "tokens of the longest response", at_least=1)
    temperature: float = setting(1.0, "of the softmax; 0: greedy", at_least=0)
    top_k: int = setting(0, "sample from the k most probable tokens; 0: all", at_least=0)
    top_p: float = setting(1.0, "sample from the fewest of this mass", above=0, at_most=1)
    min_p: float = setting(0.0, "least fraction of the best's probability", at_least=0, at_most=1)
    repetition_penalty: float = setting(1.0, "of tokens already there; 1: off", above=0)
    stop: tuple[str, ...] = setting((), "strings that end a response, which is cut before them")
    samples: int = setting(1, "continuations of each prompt, one after another", at_least=1)
    batch_size: int = setting(16, "continuations sampled at a time", at_least=1)
    max_length: int | None = setting(
        None, "tokens of the longest prompt; none: what the model has room for", at_least=1
    )
    overlong: str = setting(
        "error", "what happens to longer prompts",
        choices=("drop", "truncate_prompt_left", "error"),
    )
    columns: tuple[str, ...] = setting(
        (), "names of columns that the files call otherwise, as in prompt=question",
        metavar="NAME=COLUMN",
    )
    bad_rows: str = setting(
        "error", "malformed rows: refuse the file, or leave them out and tell how many",
        choices=("error", "skip"),
    )
    fix_text: bool = setting(False, "replace halves of surrogate pairs by U+FFFD")
    allow_empty_prompt: bool = setting(False, "whether a prompt may be empty")
    max_drop: float = setting(
        1.0, "share of the rows that may be left out; 1: no limit", at_least=0, at_most=1
    )
    limit: int | None = setting(None, "only so many prompts, the first", at_least=1)
    dtype: str = setting(
        "auto", "of weights and compute; auto: float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: the first CUDA GPU, else the CPU")
    seed: int = setting(0, "of the draws")

    def check(self) -> list[str]:
        problems = column_problems(self.columns)
        if (self.data is None) == (self.prompt is None):
            problems.append("give exactly one of --data and --prompt")
        if self.samples > 1 and self.temperature == 0:
            problems.append(f"--samples {self.samples} with temperature 0: they would all be one")
        if not all(self.stop):
            problems.append("--stop: got an empty string, which every text contains")
        return problems + check_new(self.out)


def check_new(out: str | None, flag: str = "--out") -> list[str]:
    """The problem with a file that is to be made, told before any work is done for it."""
    if out and Path(out).exists():
        return [f"{flag}: {out} is there already: give another"]
    if out and not Path(out).parent.is_dir():
        return [f"{flag}: {Path(out).parent} is no folder"]
    return []


def sample(
    lm: CausalLM, tokenizer: Tokenizer, prompts: list[Prompt], sampling: Sampling,
    seed: int = 0, batch_size: int = 16, samples: int = 1,
) -> Iterator[dict]:
    """So many rows a prompt, in order.

    Args:
        prompts: each with room for sampling.max_new_tokens behind it.
        seed: row i draws from the key (seed, "sample", i).
        samples: rows of each prompt; those of a batch read it once.
    Returns:
        {prompt: as it stood in the file, or what is left of a text that was cut, response: text
        before a stop string (for a prompt of messages: the assistant's message), finish_reason: eos
        | stop | length, tokens: sampled}; and input_ids, prompt_length, tokenizer where a prompt's
        ids are not those of its text.
    """
    # False for prompts that came as ids, or were cut: others then read the ids instead of the text.
    exact = all(read_again(tokenizer, prompt) == prompt.ids for prompt in prompts)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    keys = streams.key(seed, "sample", torch.arange(len(repeated)))
    for start in range(0, len(repeated), batch_size):
        part = repeated[start : start + batch_size]
        ids = [prompt.ids for prompt in part]
        rows_keys = keys[start : start + batch_size]
        made = generate(lm, ids, sampling, tokenizer.eos_ids, rows_keys, tokenizer.decode)
        rows = zip(part, made.responses(), made.finish_reason, strict=True)
        for prompt, response, reason in rows:
            kept = response[:-1] if reason == "eos" else response
            text = before_stop(tokenizer.decode(kept), sampling.stop_strings)
            read = response
            if reason == "stop":  # what stops it is no part of what it says
                read = tokenizer.encode(text, bos=False) + list(tokenizer.eos_ids[:1])
            is_chat = not isinstance(prompt.text, str)
            yield {
                "prompt": prompt.text,
                "response": [{"role": "assistant", "content": text}] if is_chat else text,
                "finish_reason": reason, "tokens": len(response),
                **({} if exact else {"input_ids": prompt.ids + read,
                                     "prompt_length": len(prompt.ids),
                                     "tokenizer": tokenizer.fingerprint}),
            }


def read_again(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt as whoever reads its line finds them."""
    text = prompt.text
    return tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode_chat(text)


@contextmanager
def json_lines(out: str | None) -> Iterator[Callable[[dict], None]]:
    """A function that writes one JSON line at once, to a new file or, without one, to stdout."""
    file = sys.stdout if out is None else open(out, "x", encoding="utf-8")
    ascii_only = (getattr(file, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")

    def write(row: dict) -> None:
        print(json.dumps(row, ensure_ascii=ascii_only, allow_nan=False), file=file, flush=True)

    try:
        yield write
    finally:
        if out is not None:
            file.close()


def read_prompts(config: SampleConfig, tokenizer: Tokenizer, room: int) -> list[Prompt]:
    """The prompts of --data or --prompt, each of at most `room` tokens."""
    if config.max_length is not None and config.max_length > room:
        what = f"is {config.max_length}, the model has room for {room} before the new tokens"
        raise UserError("--max-length", what, "lower it or --max-new-tokens")
    if config.data is not None:
        most = room if config.max_length is None else config.max_length
        policy = RowPolicy.of(config)
        prompts, report = load_prompts(config.data, tokenizer, most, config.overlong, policy=policy)
        print(report, file=sys.stderr)
        return prompts[: config.limit]
    ids = tokenizer.encode(config.prompt)
    if not 1 <= len(ids) <= room:
        raise UserError("--prompt", f"has {len(ids)} tokens", f"must have 1 to {room}")
    return [Prompt(ids, config.prompt, "--prompt", {})]


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        SampleConfig, argv, "minirlhf sample", "Write continuations of prompts, as JSON lines."
    )
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder = folders.resolve(config.model)
    tokenizer, positions = load_tokenizer(folder), pretrained.read_config(folder).longest_row
    tokenizer.check_stops(config.stop)
    room = positions - config.max_new_tokens + 1  # the last token is sampled, not read
    if room < 1:
        legal = f"the model has {positions} positions"
        raise UserError("--max-new-tokens", f"is {config.max_new_tokens}", legal)
    prompts = read_prompts(config, tokenizer, room)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p,
        config.repetition_penalty, config.stop,
    )
    for line in pretrained.rounded([folder], dtype):
        print(f"warning: {line}", file=sys.stderr)
    lm = pretrained.load_pretrained(folder, dtype, device)
    rows = sample(
        lm, tokenizer, prompts, sampling, config.seed, config.batch_size, config.samples
    )
    total = len(prompts) * config.samples
    with json_lines(config.out) as write:
        written = 0
        quiet = not sys.stderr.isatty()
        try:
            for row in tqdm(rows, "sample", total, disable=quiet):
                write(row)
                written += 1
        except KeyboardInterrupt:
            print(f"stopped after {written:,} of {total:,} rows", file=sys.stderr)
            return STOPPED
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
