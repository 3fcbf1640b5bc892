"""Continuations of prompts, as JSON lines: `minirlhf sample --model FOLDER --data FILE`.

The lines go to --out or to stdout, everything else to stderr. A response depends on its prompt, the
number of its row and the seed, not on the rows that share its batch.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf import console, streams
from minirlhf.data.arguments import ARGUMENTS, given_arguments
from minirlhf.data.encoding import encode
from minirlhf.data.examples import Prompt, encoded_text, load_prompts
from minirlhf.data.split import NOT_READ
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import OK, STOPPED, UserError, printable, run
from minirlhf.files import atomic, folders
from minirlhf.files.reading import read_json
from minirlhf.files.rows import Row
from minirlhf.files.sieve import RowPolicy, Sieve
from minirlhf.models import pretrained
from minirlhf.models.generation import generate
from minirlhf.models.sampling import Sampling, before_stop
from minirlhf.models.transformer import CausalLM
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.setup.common import check_base
from minirlhf.setup.groups import COLDEST
from minirlhf.tools.sampling_settings import OwnSamplingSettings, SampleConfig


def sample(
    lm: CausalLM, tokenizer: Tokenizer, prompts: list[Prompt], sampling: Sampling,
    seed: int = 0, batch_size: int = 16, samples: int = 1,
) -> Iterator[dict]:
    """Yields `samples` rows for each prompt, in order.

    Args:
        prompts: each leaves room for sampling.max_new_tokens in the context.
        seed: row i is drawn with the key (seed, "sample", i).
        batch_size: rows sampled in parallel; those of one prompt share its forward pass.
    Yields:
        prompt: as it stands in the file; of a truncated text, what is left of it.
        response: the text before a stop string; to a prompt of messages, the assistant's message.
        finish_reason: "eos", "stop" or "length".
        tokens: sampled, eos included.
        tools, chat_template_kwargs: as the prompt's, if it has them.
        input_ids, prompt_length, tokenizer: where not all prompts are encoded from their texts, so
            that whoever reads the rows takes these ids instead of the texts.
    """
    exact = all(encoded_text(tokenizer, prompt) == prompt.ids for prompt in prompts)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    keys = streams.key(seed, "sample", torch.arange(len(repeated)))
    for start in range(0, len(repeated), batch_size):
        part = repeated[start : start + batch_size]
        made = generate(lm, [prompt.ids for prompt in part], sampling, tokenizer.eos_ids,
                        keys[start : start + batch_size], tokenizer.decode_after)
        for prompt, ids, reason in zip(part, made.responses(), made.finish_reason, strict=True):
            said = ids[:-1] if reason == "eos" else ids
            text = tokenizer.answer_text(prompt.text, prompt.ids, said)
            text = before_stop(text, sampling.stop_strings)
            is_chat = not isinstance(prompt.text, str)
            row = {
                "prompt": prompt.text,
                "response": [{"role": "assistant", "content": text}] if is_chat else text,
                "finish_reason": reason, "tokens": len(ids),
            }
            if is_chat:
                row |= {name: prompt.columns[name] for name in ARGUMENTS if name in prompt.columns}
            if not exact:
                if reason == "stop":  # the stop string is no part of the response
                    said = tokenizer.ids_of_answer(prompt.text, prompt.ids, ids, text)
                    ids = said + list(tokenizer.eos_ids[:1])
                row |= {"input_ids": prompt.ids + ids, "prompt_length": len(prompt.ids),
                        "tokenizer": tokenizer.fingerprint}
            yield row


def json_lines(out: str | None) -> Callable[[dict], None]:
    """A function that writes a row as a JSON line at once, to the new file `out` or to stdout.

    Where a disk fails or Ctrl-C comes, the lines before stay, and no half of one.
    """
    if out is None:
        ascii_only = (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8")

        def say(row: dict) -> None:
            print(json.dumps(row, ensure_ascii=ascii_only, allow_nan=False), flush=True)
            console.check()

        return say
    path, size = Path(out), 0
    path.touch(exist_ok=False)

    def write(row: dict) -> None:
        nonlocal size
        try:
            size = atomic.append_line(path, json.dumps(row, ensure_ascii=False, allow_nan=False))
        except BaseException:
            os.truncate(path, size)
            raise

    return write


def read_prompts(config: SampleConfig, tokenizer: Tokenizer, room: int) -> list[Prompt]:
    """The prompts of --data or --prompt, each of at most `room` tokens."""
    if config.max_length is not None and config.max_length > room:
        what = f"is {config.max_length}, the model has room for {room} before the new tokens"
        raise UserError("--max-length", what, "lower it or --max-new-tokens")
    if config.data is not None:
        most = room if config.max_length is None else config.max_length
        policy = RowPolicy.of(config)
        prompts, report = load_prompts(
            config.data, tokenizer, most, config.overlong, policy=policy, others=NOT_READ,
            longer="; or lower --max-new-tokens" if most == room else "; or raise --max-length",
        )
        print(report, file=sys.stderr)
        return prompts[: config.limit]
    is_turn, _ = as_turn(config, tokenizer)
    turn = {"role": "user", "content": config.prompt}
    columns = {}
    if config.template_kwargs:
        if not is_turn:
            do = "leave --raw out" if config.raw else "give --chat"
            raise UserError("--template-kwargs", "no chat template renders --prompt", do)
        columns["chat_template_kwargs"] = given_arguments(config.template_kwargs)
    prompt = Prompt([], [turn] if is_turn else config.prompt, "--prompt", columns)
    row = Row("--prompt", {"prompt": prompt.text, **columns}), (prompt.text,)
    ids = tokenizer.encode("")
    if config.prompt or is_turn:
        found = encode("--prompt", [row], tokenizer, Sieve(RowPolicy.of(config)))
        ((ids,),) = found.ids
        print("".join(f"note: {note}\n" for note in found.notes), end="", file=sys.stderr)
    if not 1 <= len(ids) <= room:
        raise UserError("--prompt", f"has {len(ids)} tokens", f"must have 1 to {room}")
    return [replace(prompt, ids=ids)]


def as_turn(config: SampleConfig, tokenizer: Tokenizer) -> tuple[bool, str]:
    """(whether --prompt is the user's turn in a chat, that and why in words)."""
    if config.raw or config.rendered:
        why = "--raw" if config.raw else "--rendered"
        return False, f"as it stands ({why})"
    if tokenizer.has_template:
        return True, "the user's turn, by the model's chat template (--raw: as it stands)"
    if config.chat:
        return True, "the user's turn, by a plain template: the model has none"
    return False, "as it stands: the model has no chat template"


# ------------------------------------------------------------------------------------- how to draw

CHAT_TEMPERATURE = 0.7  # where a chat model's folder names none
GENERATION = "generation_config.json"
LEGAL = {  # what such a file may say: type, range, in words
    "temperature": (float, lambda x: x == 0 or COLDEST <= x <= 1e6, f"0, or from {COLDEST:g} on"),
    "top_k": (int, lambda x: x >= 0, "a whole number from 0 on"),
    "top_p": (float, lambda x: 0 < x <= 1, "above 0, at most 1"),
}


def sampling_of(config: OwnSamplingSettings, folder: Path, chat: bool) -> tuple[Sampling, str]:
    """(how responses are drawn, that and where it is from in words).

    Args:
        folder: of the model; in a chat its generation_config.json is asked for what is not set.
    Raises:
        UserError: what the file says is illegal.
    """
    values, told = {"temperature": CHAT_TEMPERATURE if chat else 1.0, "top_k": 0, "top_p": 1.0}, []
    unset = [name for name in values if getattr(config, name) is None]
    own = _generation_config(folder, unset) if chat else {}
    for name, default in values.items():
        value, source = getattr(config, name), ""
        if value is None:
            value, source = own.get(name), f" ({GENERATION})"
        if value is None:
            value, source = default, " (the default of chats)" if chat else " (the model itself)"
        if name == "temperature" or value != default:
            told.append(f"{name} {value:g}{source}")
        values[name] = value
    for name in ("min_p", "repetition_penalty"):
        value = values[name] = getattr(config, name)
        told += [f"{name} {value:g}"] * (value != type(config).__dataclass_fields__[name].default)
    sampling = Sampling(config.max_new_tokens, stop_strings=config.stop, **values)
    return sampling, ", ".join(told)


def _generation_config(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """What a folder's file says of these; it may be absent, and so may each of them."""
    path = folders.file_of(folder, GENERATION)
    values = read_json(path) if path.exists() else {}  # an object: its tokenizer was read with it
    found = {}
    for name in names:
        kind, fits, legal = LEGAL[name]
        if (value := values.get(name)) is None:
            continue
        if type(value) not in (int, kind) or not fits(value):
            got, flag = f"is {printable(repr(value), 80)}", f"--{name.replace('_', '-')}"
            raise UserError(f"{path}: {name}", got, f"{legal}: mend it, or give {flag}")
        found[name] = value
    return found


# ------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(SampleConfig, argv, "minirlhf sample")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder = folders.resolve(config.model, base=config.base)
    check_base(config, folder)
    tokenizer, positions = load_tokenizer(folder), pretrained.read_config(folder).longest_row
    tokenizer.check_stops(config.stop)
    room = positions - config.max_new_tokens + 1  # the last token is sampled, not read
    if room < 1:
        legal = f"the model has {positions} positions"
        raise UserError("--max-new-tokens", f"is {config.max_new_tokens}", legal)
    prompts = read_prompts(config, tokenizer, room)
    is_chat = any(not isinstance(prompt.text, str) for prompt in prompts)
    sampling, told = sampling_of(config, folder, is_chat)
    for line in pretrained.remarks([folder], dtype):
        print(f"warning: {line}", file=sys.stderr)
    lm = pretrained.load_pretrained(folder, dtype, device)
    if config.prompt is not None:
        print(f"prompt: {as_turn(config, tokenizer)[1]}", file=sys.stderr)
    print(f"sampling: {told}", file=sys.stderr)
    rows = sample(
        lm, tokenizer, prompts, sampling, config.seed, config.batch_size, config.samples
    )
    total = len(prompts) * config.samples
    write = json_lines(config.out)
    written = 0
    shown = config.out is None and sys.stdout.isatty()  # the rows, where the bar would be
    quiet = shown or not sys.stderr.isatty()
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
