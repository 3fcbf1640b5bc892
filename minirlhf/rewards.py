"""Where scores come from: a reward-model folder or a Python function of the texts.

A reward source is any function `source(completions) -> (B,) float32 scores`.
"""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.errors import BAD_INPUT, NON_FINITE, UserError, printable
from minirlhf.generation import pad_right
from minirlhf.heads import RewardModel
from minirlhf.optim import cut_by_tokens
from minirlhf.pretrained import load_reward_model
from minirlhf.tokenizer import Tokenizer, load_tokenizer


class Completions(NamedTuple):
    """B sampled responses, as reward sources see them."""

    prompts: list  # str, or list of messages, as in the data
    prompt_ids: list[list[int]]
    completions: list[str]  # without eos, cut before a stop string
    response_ids: list[list[int]]  # as sampled, eos or stop string included
    finish_reasons: list[str]  # eos | stop | length
    columns: dict[str, list]  # every other column of the prompts' file


RewardSource = Callable[[Completions], Tensor]


def model_reward(model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int) -> RewardSource:
    """Scores of a reward model that shares the policy's tokenizer.

    Texts end here as in its training: with eos where the policy ended the text, without where the
    length cut it. A response that a stop string ended is scored as the text before it, with eos.
    """
    eos = tokenizer.eos_ids[0]

    def row(prompt: list[int], response: list[int], text: str, reason: str) -> list[int]:
        if reason == "stop":
            response = [*tokenizer.encode(text, bos=False), eos]
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
        scores, device = torch.zeros(len(ids)), model.score.weight.device
        for part in cut_by_tokens(lengths, len(ids), micro_batch_tokens):
            tokens = pad_right([ids[i] for i in part.tolist()]).to(device)
            scores[part] = model(tokens, lengths[part].to(device)).float().cpu()
        return scores

    return score


def function_reward(function: Callable, name: str) -> RewardSource:
    """Scores of `function(prompts=…, completions=…, <every column>=…)`, one finite number each.

    It is given those keywords that its signature names, or all if it takes **keywords.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}

    def score(batch: Completions) -> Tensor:
        offered = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.response_ids,
            "finish_reasons": batch.finish_reasons,
        }
        given = {k: v for k, v in offered.items() if takes_all or k in known}
        try:
            scores = function(**given)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{Path(frame.filename).name}:{frame.lineno}",
                f"{name} raised {type(error).__name__}: {printable(error)}",
                f"it was given {', '.join(given)}",
                BAD_INPUT,
            ) from error
        return _checked(scores, len(batch.completions), name)

    return score


def _checked(scores: object, count: int, name: str) -> Tensor:
    """(B,) float32 of a user's list or tensor; anything else than B finite numbers is refused."""
    values = scores.tolist() if isinstance(scores, Tensor) else scores
    if not isinstance(values, (list, tuple)) or len(values) != count:
        shape = (
            f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(scores).__name__
        )
        raise UserError(name, f"returned {shape}", f"return one number for each of the {count}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(name, f"score {i} is {printable(value)!r}", "return finite numbers")
        if not math.isfinite(value):
            raise UserError(name, f"score {i} is {value}", "return finite numbers", NON_FINITE)
    return torch.tensor(values, dtype=torch.float32)


def load_function(spec: str) -> RewardSource:
    """`file.py:function` -> its reward source. The file is run: it is the user's, and trusted."""
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        what = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"--reward {file}:{line}", what, "the file must import cleanly") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(
            f"--reward {file}", f"has no function {name!r}", f"it has: {', '.join(defined)}"
        )
    return function_reward(function, spec)


def load_reward(
    spec: str, tokenizer: Tokenizer, dtype: torch.dtype, device: str, micro_batch_tokens: int
) -> RewardSource:
    """Reward source of `--reward`: a reward-model folder or `file.py:function`."""
    file, colon, _ = spec.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise UserError("--reward", f"{file} does not exist", "give file.py:function")
        return load_function(spec)
    if spec.endswith(".py"):
        raise UserError("--reward", f"{spec} names no function", f"give {spec}:function")
    model = load_reward_model(spec, dtype, device)
    if load_tokenizer(spec).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--reward {spec}",
            "has another tokenizer than the policy",
            "train the reward model from a model with the policy's tokenizer",
        )
    return model_reward(model, tokenizer, micro_batch_tokens)
