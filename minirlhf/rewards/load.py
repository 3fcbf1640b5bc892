"""What `--reward` names, read: models, functions, services and rules become one reward source."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minirlhf import interrupt, ranks
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import read_text
from minirlhf.models.heads import RewardModel
from minirlhf.rewards.containment import Container
from minirlhf.rewards.function import failures, function_reward
from minirlhf.rewards.journal import Journal
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.parse import RewardSourceSettings, Spec, locate, parse_source, part_names
from minirlhf.rewards.service import Service, service_reward
from minirlhf.rewards.shared import asked_once
from minirlhf.rewards.source import Completions, RewardSource, Scores, combine
from minirlhf.rewards.user_code import modules_of, open_folder, run_file
from minirlhf.rewards.verifiers import (
    exact_reward,
    format_reward,
    length_reward,
    math_reward,
    reference_number,
    reference_text,
)

TOKEN_CAP = 1 << 16  # bytes of the file that holds one


def facts(
    specs: Sequence[Spec], tokenizer: Tokenizer, prompts: Iterable, base: str | None = None
) -> dict[str, str]:
    """What a run prints about its rewards before it starts: name -> source.

    Args:
        prompts: str, or list of messages.
        base: of those that are adapters, in place of what they name.
    """
    shown = {}
    for spec, name in zip(specs, part_names(specs), strict=True):
        weight = "" if spec.weight == 1 else f"{spec.weight:g} x "
        differs = spec.kind == "model" and reencoded(locate(spec, base), tokenizer)
        own = " (its own tokenizer: texts are re-encoded)" if differs else ""
        key = "reward" if len(specs) == 1 else f"reward {name}"
        shown[key] = f"{weight}{printable(spec.place)}{own}"
    if any(spec.kind == "function" for spec in specs) and any(isinstance(p, list) for p in prompts):
        shown["completions"] = 'messages for functions, as in TRL: completion[0]["content"]'
    return shown


REFERENCES = {"math": reference_number, "exact": reference_text}  # how a rule reads `answer`


def check_answers(specs: Sequence[Spec]) -> Callable[[Prompt], Prompt] | None:
    """The `finish` of `load_prompts` that finds fault with prompts whose column `answer` a rule of
    `--reward` cannot read; None where no rule reads it.

    Called, it raises UserError at the prompt's file:line.
    """
    rules = [spec.place for spec in specs if spec.place in REFERENCES and spec.kind == "rule"]

    def check(prompt: Prompt) -> Prompt:
        for rule in rules:
            if "answer" not in prompt.columns:
                there = ", ".join(printable(name, 40) for name in sorted(prompt.columns)) or "none"
                what = f"no column answer, which --reward {rule} needs; beside the prompt: {there}"
                raise UserError(prompt.where, what, "name it by --columns answer=COLUMN")
            try:
                REFERENCES[rule](prompt.columns["answer"])
            except ValueError as error:
                what = f"--reward {rule}: {error}"
                raise UserError(prompt.where, what, "mend or remove the row") from None
        return prompt

    return check if rules else None


def rule_reward(place: str) -> RewardSource:
    """The reward source of a rule of verifiers.py, as math or length:40. Called, it raises
    UserError where an answer cannot be read or a search for a pattern takes too long."""
    name, _, argument = place.partition(":")
    rules = {
        "math": lambda batch, answers: math_reward(batch.completions, answers),
        "exact": lambda batch, answers: exact_reward(batch.completions, answers),
        "format": lambda batch, _: format_reward(batch.completions, argument),
        "length": lambda batch, _: length_reward(
            batch.response_ids, batch.finish_reasons, int(argument)
        ),
    }

    def score(batch: Completions) -> Tensor:
        answers = batch.columns.get("answer", [None] * len(batch.completions))
        try:
            with interrupt.outside():
                return torch.tensor(rules[name](batch, answers))
        except (ValueError, TimeoutError) as error:
            raise UserError(f"--reward {printable(place)}", str(error)) from None

    return score


def reencoded(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a reward model has another tokenizer than the policy, and so must score texts."""
    return load_tokenizer(folder).fingerprint != tokenizer.fingerprint


def read_token(path: str) -> str:
    """The bearer token in a file of one line.

    Raises:
        UserError: the file holds anything else.
    """
    token = read_text(path, TOKEN_CAP).strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(path, "holds no token", "one line of visible ASCII characters")
    return token


def load_function(
    place: str, columns: Mapping[str, set[str]] | None = None, tokenizer: Tokenizer | None = None,
    ran: dict[str, str] | None = None,
) -> RewardSource:
    """The reward source of `file.py:function`. The file is run: it is the user's, and trusted.

    Args:
        columns, tokenizer: as in `function_reward`.
        ran: takes file -> sha256 of what was run: the file, and what it imported from its folder.
    Raises:
        UserError: the file does not import, or has no such function.
    """
    file, _, name = place.rpartition(":")
    container = Container(place)
    open_folder(file)
    with interrupt.outside(), container.entered(), failures(file, "the file must import cleanly"):
        module, sums = run_file(file)
    if ran is not None:
        ran |= sums
    function = getattr(module, name, None)
    if not callable(function):
        defined = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v))
        what = f"has no function {name!r}"
        raise UserError(f"--reward {file}", what, f"it has: {defined or 'none'}")
    source = function_reward(function, place, columns, tokenizer, container)

    def score(batch: Completions) -> Scores:
        scores = source(batch)
        if late := sorted(modules_of(file).keys() - sums.keys()):
            sums.update(dict.fromkeys(late, ""))
            what = f"{place} imports {', '.join(late)} only now: not among the run's inputs"
            tqdm.write(printable(what, 2000), file=sys.stdout)
        return scores

    return score


def trial(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Completions:
    """Two made-up completions of the first prompt: the beginning of its own tokens and their end.
    They are two and differ, since a function may compare those of a batch."""
    first, names = prompts[0], sorted({name for prompt in prompts for name in prompt.columns})
    ids = [first.ids[:8], first.ids[-4:]]
    return Completions(
        [first.text] * 2, [first.ids] * 2, [tokenizer.decode(some) for some in ids], ids,
        ["length"] * 2, {name: [first.columns.get(name)] * 2 for name in names},
    )


def _try(source: RewardSource, tried: Completions) -> None:
    """Lets a function say now what it would say after the first rollout."""
    try:
        source(tried)
    except UserError as error:
        what = f"{error.what} (tried on two made-up completions of the first prompt)"
        raise UserError(error.where, what, error.do, error.code) from error


def load_reward(
    config: RewardSourceSettings, tokenizer: Tokenizer, load_model: Callable[[Path], RewardModel],
    micro_batch_tokens: int, columns: Mapping[str, set[str]] | None = None,
    journal: Path | None = None, ran: dict[str, str] | None = None, base: str | None = None,
    tried: Completions | None = None,
) -> RewardSource:
    """The weighted sum of all sources of `--reward`; prompts went through `check_answers`.

    Args:
        tokenizer: the policy's. A reward model with another one scores texts, not ids.
        load_model: folder -> its reward model, as `load_reward_model`.
        columns: as in `function_reward`.
        journal: file that keeps the replies of services, made with the first; None: in memory.
        ran: as in `load_function`.
        base: of adapters, in place of what they name.
        tried: what each function is tried on before any model is loaded, as `trial` makes it.
    """
    specs, replies = [parse_source(source) for source in config.reward], Journal(journal)

    def load(spec: Spec) -> RewardSource:
        place = locate(spec, base)
        if spec.kind == "function":
            return functions[spec]
        if spec.kind == "rule":
            return asked_once(rule_reward(spec.place))
        if spec.kind == "service":
            file = config.reward_token_file
            service = Service(
                spec.place, config.reward_format, config.reward_timeout,
                config.reward_connect_timeout, config.reward_retries, config.reward_batch_size,
                None if file is None else read_token(file),
            )
            decode = partial(tokenizer.decode, skip_special=False)
            return asked_once(service_reward(service, decode, replies))
        model, own = load_model(place), load_tokenizer(place)
        again = reencoded(place, tokenizer)
        return model_reward(model, own, micro_batch_tokens, again, f"--reward {spec.place}")

    names, functions = part_names(specs), {}
    for spec in (spec for spec in specs if spec.kind == "function"):
        def load_and_try(spec: Spec = spec) -> None:
            functions[spec] = source = load_function(spec.place, columns, tokenizer, ran)
            if tried is not None:
                _try(source, tried)

        ranks.from_first(load_and_try)
        functions[spec] = asked_once(functions.get(spec))
    return combine([(n, s.weight, load(s)) for n, s in zip(names, specs, strict=True)])
