"""What `--reward SOURCE [SOURCE ...]` may say, by its spelling alone: load.py reads what it names.

A SOURCE is the folder of a reward model, file.py:function, http(s)://host:port/path or a rule of
verifiers.py: math, exact, format:REGEX or length:N; 0.5*SOURCE has a weight. A policy learns from
their weighted sum; each is logged by itself.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from minirlhf.errors import UserError, printable
from minirlhf.files.folders import resolve
from minirlhf.run.settings import setting

RULES = {"math": "", "exact": "", "format": "REGEX", "length": "N"}  # name -> what its colon gives


@dataclass(frozen=True)
class RewardSourceSettings:
    """Reward: what scores a response."""

    reward: tuple[str, ...] = setting(
        (), "reward-model folder, file.py:function, http://host:port/path, or a rule: math or "
        "exact (against the column answer), format:REGEX, length:N (tokens); several are added, "
        "each with its weight, as in '0.5*SOURCE' (in quotes: some shells expand the *)",
        metavar="SOURCE", required=True, resume="start",
    )
    reward_format: str = setting(
        "ids", "JSON form of the requests to a reward service",
        choices=("ids", "llama-factory"), resume="start",
    )
    reward_timeout: float = setting(
        60.0, "seconds within which a reward service must reply", above=0, at_most=86400,
        resume="free",
    )
    reward_connect_timeout: float = setting(
        5.0, "seconds within which a reward service must accept a connection", above=0,
        at_most=86400, resume="free",
    )
    reward_retries: int = setting(
        4, "how often a failed request to a reward service is repeated", at_least=0, at_most=100,
        resume="free",
    )
    reward_batch_size: int = setting(
        64, "texts in one request to a reward service", at_least=1, resume="free"
    )
    reward_token_file: str | None = setting(
        None, "file that holds the bearer token of a reward service", metavar="FILE",
        resume="free",
    )

    def check(self) -> list[str]:
        specs, found = [parse_source(source) for source in self.reward], []
        part_names(specs)
        if specs and not any(spec.weight for spec in specs):
            found.append("reward: all weights are 0; give one source that counts")
        if specs and not any(spec.kind == "service" for spec in specs):
            for field in fields(RewardSourceSettings)[1:]:  # all but `reward`
                if getattr(self, field.name) != field.default:
                    flag = field.name.replace("_", "-")
                    found.append(f"{flag}: is for a service; no --reward is http://host:port/path")
        return found


class Spec(NamedTuple):
    """One SOURCE, by its spelling: no file has been read."""

    weight: float
    place: str  # folder, file.py:function, URL, or a rule with its argument
    kind: str  # "model", "function", "service" or "rule"

    def names(self) -> list[str]:
        """Its possible names in logs, the shortest first."""
        if self.kind == "service":
            parts = urlsplit(self.place)
            return [parts.hostname, parts.netloc, parts.netloc + parts.path, self.place]
        if self.kind == "rule":
            return [self.place.partition(":")[0], self.place]
        if self.kind == "function":
            file, _, function = self.place.rpartition(":")
            return [function, f"{Path(file).stem}.{function}", self.place]
        parts = Path(self.place).absolute().parts
        parts = parts[:-1] if parts[-1] == "model" and len(parts) > 2 else parts  # as runs call it
        return [parts[-1], "/".join(parts[-2:]), self.place]


def parse_source(source: str) -> Spec:
    """Takes a SOURCE apart by its spelling. A folder that is called like a rule is ./math.

    Raises:
        UserError: the weight is no number, the URL cannot be a service's, or a rule lacks what
            stands behind its colon.
    """
    weight, place = 1.0, source
    before, star, after = source.partition("*")
    if star and not _is_rule(before) and not Path(source).exists():
        number = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
        if not re.fullmatch(number, before) or not math.isfinite(weight := float(before)):
            what = f"{printable(source)}: the weight is {printable(before, 40)!r}"
            raise UserError("--reward", what, "a finite number before the *, as in 0.5*SOURCE")
        place = after
    if _is_rule(place):
        _check_rule(place)
        return Spec(weight, place, "rule")
    if "://" in place:
        _check_url(place)
        return Spec(weight, place, "service")
    file, colon, _ = place.rpartition(":")
    is_code = place.endswith(".py") or (colon and file.endswith(".py"))
    return Spec(weight, place, "function" if is_code else "model")


def _is_rule(place: str) -> bool:
    """Whether a place, or what stands of it before its first star, is a rule's."""
    name, colon, _ = place.partition(":")
    return name in RULES and (not colon or bool(RULES[name]))


def _check_rule(place: str) -> None:
    name, _, argument = place.partition(":")
    if name == "format":
        try:
            re.compile(argument)
        except (re.error, RecursionError, OverflowError) as error:
            do = "write it as Python's re does, in quotes for the shell"
            raise UserError(f"--reward {printable(place)}", f"no regex: {error}", do) from None
    wrong = RULES[name] and not argument
    if wrong or (name == "length" and not re.fullmatch("0*[1-9][0-9]{0,8}", argument)):
        what = f"{printable(argument)!r} is no length" if argument else "says too little"
        raise UserError(f"--reward {printable(place)}", what, f"give {name}:{RULES[name]}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        do = "http://host:port/path, or https"
        raise UserError(f"--reward {printable(url)}", f"no URL: {error}", do) from None
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


def locate(spec: Spec, base: str | None = None) -> Path | None:
    """The folder (as `resolve` finds it, of an adapter with its base) or file that must exist; None
    for a service or a rule.

    Raises:
        UserError: it does not exist, or the file names no function.
    """
    if spec.kind in ("service", "rule"):
        return None
    if spec.kind == "model":
        return resolve(spec.place, base=base)
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
