"""Where scores come from: a reward-model folder or a Python function of the texts.

A reward source is any function `source(completions) -> (B,) float32 scores`.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.errors import BAD_INPUT, NON_FINITE, UserError, printable
from minirlhf.generation import pad_right
from minirlhf.heads import RewardModel
from minirlhf.optim import cut_by_tokens
from minirlhf.pretrained import load_reward_model, resolve
from minirlhf.tokenizer import Tokenizer, load_tokenizer

KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
OFFERED = ("prompts", "completions", "completion_ids", "finish_reasons")  # beside the columns
LARGEST = torch.finfo(torch.float32).max


class Completions(NamedTuple):
    """B sampled responses, as reward sources see them."""

    prompts: list  # str, or list of messages, as in the data
    prompt_ids: list[list[int]]
    completions: list[str]  # without eos, cut before a stop string
    response_ids: list[list[int]]  # as sampled, eos or stop string included
    finish_reasons: list[str]  # eos | stop | length
    columns: dict[str, list]  # every other column of the prompts' file


class Scores(NamedTuple):
    """What a reward source says of B responses."""

    total: Tensor  # (B,) float32, what PPO learns from
    parts: dict[str, Tensor]  # name -> (B,) of each source, unweighted; NaN: does not apply
    token_rewards: list[list[float]] | None = None  # one a response token, beside the score


RewardSource = Callable[[Completions], Tensor | Scores]


def model_reward(model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int) -> RewardSource:
    """Scores of a reward model that shares the policy's tokenizer.

    Texts end here as in its training: with eos where the policy ended the text, without where the
    length cut it. A response that a stop string ended is scored as the text before it, with eos.

    Raises:
        UserError: the tokenizer names no eos; a row is longer than what the model reads.
    """
    if not tokenizer.eos_ids:
        what = "names no eos token, which every text that is scored ends with"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    most = model.config.longest_row

    def row(prompt: list[int], response: list[int], text: str, reason: str) -> list[int]:
        if reason == "stop":
            response = [*tokenizer.encode(text, bos=False), tokenizer.eos_ids[0]]
        if model.read_before_eos and response[-1] in tokenizer.eos_ids:
            response = response[:-1]
        return prompt + response

    @torch.no_grad()
    def score(batch: Completions) -> Tensor:
        ids = [
            row(*parts)
            for parts in zip(
                batch.prompt_ids, batch.response_ids, batch.completions, batch.finish_reasons,
                strict=True,
            )
        ]  # fmt: skip
        lengths = torch.tensor([len(r) for r in ids])
        if lengths.max() > most:
            what = f"a text of {lengths.max()} tokens, the reward model reads {most}"
            raise UserError("--reward", what, "lower max_prompt_length or max_new_tokens")
        scores, device = torch.zeros(len(ids)), model.score.weight.device
        for part in cut_by_tokens(lengths, len(ids), micro_batch_tokens):
            interrupt.check()
            tokens = pad_right([ids[i] for i in part.tolist()]).to(device)
            scores[part] = model(tokens, lengths[part].to(device)).float().cpu()
        return scores

    return score


def function_reward(
    function: Callable, name: str, columns: Iterable[str] | None = None
) -> RewardSource:
    """Scores of `function(prompts=…, completions=…, <every column>=…)`, one finite number each.

    It is given those keywords that its signature names, or all if it takes **keywords.

    Args:
        columns: those of the prompts, where they are known; what it needs beside them is then
            missed at once, and not when the first responses are scored.
    Raises:
        UserError: it needs a column that the data lacks, fails, or returns anything but numbers.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in KEYWORDS}

    def check(offered: Iterable[str]) -> None:
        if missing := sorted(needed - set(offered)):
            what = f"needs {', '.join(missing)}, which no prompt has"
            raise UserError(name, what, f"there are {', '.join(offered)}")

    if columns is not None:
        check([*sorted(columns), *OFFERED])

    def score(batch: Completions) -> Tensor:
        offered = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.response_ids,
            "finish_reasons": batch.finish_reasons,
        }
        given = {k: v for k, v in offered.items() if takes_all or k in known}
        check(offered)
        try:
            with interrupt.outside():
                scores = function(**given)
        except Exception as error:
            raise UserError(
                _place(error) or name,
                f"{name} raised {type(error).__name__}: {printable(error)}",
                f"it was given {', '.join(given)}",
                BAD_INPUT,
            ) from error
        return _checked(scores, len(batch.completions), name)

    return score


def _place(error: Exception) -> str:
    """file:line where the user's file failed, not a library that it called; "" if nowhere."""
    if isinstance(error, SyntaxError) and Path(str(error.filename)).is_file():
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    same_file = [f for f in theirs if f.filename == theirs[0].filename]
    return f"{Path(same_file[-1].filename).name}:{same_file[-1].lineno}" if same_file else ""


def _checked(scores: object, count: int, name: str) -> Tensor:
    """(B,) float32 of a list, tensor or array; anything else than B finite numbers is refused."""
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(values, (list, tuple)) or len(values) != count:
        shape = (
            f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(scores).__name__
        )
        raise UserError(name, f"returned {shape}", f"return one number for each of the {count}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UserError(name, f"score {i} is {printable(value)!r}", "return finite numbers")
        if not abs(value) <= LARGEST:
            raise UserError(
                name, f"score {i} is {printable(value)}", "return finite numbers", NON_FINITE
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


def load_function(spec: str, columns: Iterable[str] | None = None) -> RewardSource:
    """`file.py:function` -> its reward source. The file is run: it is the user's, and trusted."""
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {printable(error)}"
        where = f"--reward {_place(error) or file}"
        raise UserError(where, what, "the file must import cleanly") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(
            f"--reward {file}",
            f"has no function {name!r}",
            f"it has: {', '.join(defined) or 'none'}",
        )
    return function_reward(function, spec, columns)


def locate(spec: str) -> Path:
    """The file or the folder that `--reward` names."""
    file, colon, _ = spec.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise UserError("--reward", f"{file} does not exist", "give file.py:function")
        return Path(file)
    if spec.endswith(".py"):
        raise UserError("--reward", f"{spec} names no function", f"give {spec}:function")
    return resolve(spec)


def load_reward(
    spec: str,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: str,
    micro_batch_tokens: int,
    columns: Iterable[str] | None = None,
) -> RewardSource:
    """Reward source of `--reward`: a reward-model folder or `file.py:function`.

    Args:
        columns: as in `function_reward`.
    """
    folder = locate(spec)
    if folder.suffix == ".py":
        return load_function(spec, columns)
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--reward {spec}",
            "has another tokenizer than the policy",
            "train the reward model from a model with the policy's tokenizer",
        )
    return model_reward(load_reward_model(folder, dtype, device), tokenizer, micro_batch_tokens)
