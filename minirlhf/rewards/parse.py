"""What `--reward SOURCE [SOURCE ...]` may say, and the reward source that it stands for.

A SOURCE is the folder of a reward model, file.py:function or http(s)://host:port/path; 0.5*SOURCE
has a weight. A policy learns from their weighted sum; each is logged by itself.
"""

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import torch

from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.files.folders import resolve
from minirlhf.files.reading import read_text
from minirlhf.models.heads import RewardModel
from minirlhf.models.pretrained import load_reward_model
from minirlhf.rewards.journal import Journal
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.service import Service, service_reward
from minirlhf.rewards.source import RewardSource, combine, failed_at, function_reward

TOKEN_CAP = 1 << 16  # bytes of the file that holds one
SERVICE_SETTINGS = (
    "reward_format", "reward_timeout", "reward_connect_timeout", "reward_retries",
    "reward_batch_size", "reward_token_file",
)


class RewardSettings(Protocol):
    """The settings of a recipe that name its rewards."""

    reward: tuple[str, ...]
    reward_format: str
    reward_timeout: float
    reward_connect_timeout: float
    reward_retries: int
    reward_batch_size: int
    reward_token_file: str | None


class Spec(NamedTuple):
    """One SOURCE, by its spelling: no file has been read."""

    weight: float
    place: str  # folder, file.py:function or URL
    kind: str  # "model", "function" or "service"

    def names(self) -> list[str]:
        """Its possible names in logs, the shortest first."""
        if self.kind == "service":
            parts = urlsplit(self.place)
            return [parts.hostname, parts.netloc, parts.netloc + parts.path, self.place]
        if self.kind == "function":
            file, _, function = self.place.rpartition(":")
            return [function, f"{Path(file).stem}.{function}", self.place]
        parts = Path(self.place).absolute().parts
        parts = parts[:-1] if parts[-1] == "model" and len(parts) > 2 else parts  # as runs call it
        return [parts[-1], "/".join(parts[-2:]), self.place]


def parse_source(source: str) -> Spec:
    """Takes a SOURCE apart by its spelling.

    Raises:
        UserError: the weight is no number, or the URL cannot be a service's.
    """
    weight, place = 1.0, source
    before, star, after = source.partition("*")
    if star and not Path(source).exists():
        number = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
        if not re.fullmatch(number, before) or not math.isfinite(weight := float(before)):
            what = f"{printable(source)}: the weight is {printable(before, 40)!r}"
            raise UserError("--reward", what, "a finite number before the *, as in 0.5*SOURCE")
        place = after
    if "://" in place:
        _check_url(place)
        return Spec(weight, place, "service")
    file, colon, _ = place.rpartition(":")
    is_code = place.endswith(".py") or (colon and file.endswith(".py"))
    return Spec(weight, place, "function" if is_code else "model")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise UserError(f"--reward {printable(url)}", f"no URL: {error}") from None
    wrong = {
        f"{printable(parts.scheme, 20)}:// is no scheme of a service":
            parts.scheme not in ("http", "https"),
        "names no host": not parts.hostname,
        "port 0": port == 0,
        "a name or password inside": "@" in parts.netloc,
        "a fragment": "#" in url,
        "a character that no URL has": not re.fullmatch(r"[!-~]+", url),
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"--reward {printable(url)}", what, "http://host:port/path, or https")


def locate(spec: Spec, weights: bool = True) -> Path | None:
    """The folder (as `resolve` finds it) or file that must exist; None for a service.

    Args:
        weights: whether a folder's weights must be there, too.
    Raises:
        UserError: it does not exist, or the file names no function.
    """
    if spec.kind == "service":
        return None
    if spec.kind == "model":
        return resolve(spec.place, weights)
    if spec.place.endswith(".py"):
        do = f"give {spec.place}:function"
        raise UserError("--reward", f"{spec.place} names no function", do)
    file = Path(spec.place.rpartition(":")[0])
    if not file.is_file():
        raise UserError("--reward", f"{file} does not exist", "give file.py:function")
    return file


def part_names(specs: Sequence[Spec]) -> list[str]:
    """The name of each in logs: the shortest ones that differ.

    Raises:
        UserError: the same source twice.
    """
    choices = [[printable(name, 100) for name in spec.names()] for spec in specs]
    names = [choice[0] for choice in choices]
    for length in range(1, max(map(len, choices), default=0)):
        names = [
            choice[min(length, len(choice) - 1)] if names.count(name) > 1 else name
            for choice, name in zip(choices, names, strict=True)
        ]
    for name in names:
        if names.count(name) > 1:
            raise UserError("--reward", f"{name} stands twice", "give each source once, and by "
                            "names that differ in their first 100 characters")
    return names


def problems(config: RewardSettings) -> list[str]:
    """What is wrong with the settings taken together, for a config's own check()."""
    specs = [parse_source(source) for source in config.reward]
    part_names(specs)
    found = []
    if specs and not any(spec.weight for spec in specs):
        found.append("reward: all weights are 0; give one source that counts")
    if specs and not any(spec.kind == "service" for spec in specs):
        for field in fields(config):
            if field.name in SERVICE_SETTINGS and getattr(config, field.name) != field.default:
                flag = field.name.replace("_", "-")
                found.append(f"{flag}: is for a service; no --reward is http://host:port/path")
    return found


def facts(specs: Sequence[Spec], tokenizer: Tokenizer) -> dict[str, str]:
    """What a run prints about its rewards before it starts: name -> source."""
    shown = {}
    for spec, name in zip(specs, part_names(specs), strict=True):
        weight = "" if spec.weight == 1 else f"{spec.weight:g} x "
        differs = spec.kind == "model" and reencoded(resolve(spec.place), tokenizer)
        own = " (its own tokenizer: texts are re-encoded)" if differs else ""
        key = "reward" if len(specs) == 1 else f"reward {name}"
        shown[key] = f"{weight}{printable(spec.place)}{own}"
    return shown


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


def load_function(place: str, columns: Mapping[str, set[str]] | None = None) -> RewardSource:
    """The reward source of `file.py:function`. The file is run: it is the user's, and trusted.

    Args:
        columns: as in `function_reward`.
    Raises:
        UserError: the file does not import, or has no such function.
    """
    file, _, name = place.rpartition(":")
    name_of_module = f"user_reward.{Path(file).resolve()}"  # two files may have the same name
    module_spec = importlib.util.spec_from_file_location(name_of_module, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {printable(error)}"
        where = f"--reward {failed_at(error) or file}"
        raise UserError(where, what, "the file must import cleanly") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(
            f"--reward {file}",
            f"has no function {name!r}",
            f"it has: {', '.join(defined) or 'none'}",
        )
    return function_reward(function, place, columns)


def load_reward(
    config: RewardSettings,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: str,
    micro_batch_tokens: int,
    columns: Mapping[str, set[str]] | None = None,
    journal: Path | None = None,
    models: list[tuple[RewardModel, Path]] | None = None,
) -> RewardSource:
    """The weighted sum of all sources of `--reward`.

    Args:
        tokenizer: the policy's. A reward model with another one scores texts, not ids.
        columns: as in `function_reward`.
        journal: file that keeps the replies of services, made with the first; None: in memory.
        models: takes the reward models that are read, with their folders, for `offload`.
    """
    specs, replies = [parse_source(source) for source in config.reward], Journal(journal)

    def load(spec: Spec) -> RewardSource:
        place = locate(spec)
        if spec.kind == "function":
            return load_function(spec.place, columns)
        if spec.kind == "service":
            service = _service(config, spec)
            return service_reward(service, partial(tokenizer.decode, skip_special=False), replies)
        model = load_reward_model(place, dtype, device)
        if models is not None:
            models.append((model, place))
        return model_reward(
            model, load_tokenizer(place), micro_batch_tokens, reencoded(place, tokenizer),
            f"--reward {spec.place}",
        )

    names = part_names(specs)
    return combine([(n, s.weight, load(s)) for n, s in zip(names, specs, strict=True)])


def _service(config: RewardSettings, spec: Spec) -> Service:
    file = config.reward_token_file
    return Service(
        spec.place, config.reward_format, config.reward_timeout, config.reward_connect_timeout,
        config.reward_retries, config.reward_batch_size, None if file is None else read_token(file),
    )
