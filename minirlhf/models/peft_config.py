"""adapter_config.json of PEFT: which adapters are read here, and what is written of ours.

PEFT knows dozens of kinds. Read are LoRA, rsLoRA and DoRA of linear layers; what would change the
computation in another way is refused by name. Which layers have an adapter, the tensors tell: the
file's own targets may be patterns, and only a list of names is checked against them.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minirlhf.errors import UserError, printable
from minirlhf.files.folders import MERGE

# Keys that must say nothing: each changes what is computed.
REFUSED = (
    "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora", "use_qalora",
    "monteclora_config",
)
INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that leave the base's weights
HEADS = ("score", "classifier")  # of modules_to_save; peft writes both, a model has one
LARGEST_RANK, LARGEST_ALPHA = 1 << 15, 1e6
# A pattern that is read: literals, classes, groups, and at most two repeats, none of a group, so
# that none takes long to match.
PATTERN = re.compile(r"\^?(?:\\[.dw]|[\w.|-]|\(\??:?|\)|\[[\w-]+\]|(?<=[\w.\]])[*+?])*\$?")
LONGEST, MOST, REPEATS = 200, 2000, 2


class AdapterConfig(NamedTuple):
    """What is needed of the file. Ranks and alphas of single layers stand first in their lists."""

    where: Path
    ranks: list[tuple[re.Pattern, int]]
    alphas: list[tuple[re.Pattern, float]]
    rslora: bool
    dora: bool
    targets: list[str] | None  # names or ends of names, all of which have adapters; None: unknown

    def rank(self, layer: str) -> int:
        return _first(self.ranks, layer)

    def alpha(self, layer: str) -> float:
        return _first(self.alphas, layer)

    def asks_for(self, layer: str) -> bool:
        """Whether a layer of this name must have an adapter."""
        ends = self.targets or ()
        return any(layer == end or layer.endswith(f".{end}") for end in ends)


def _first(values: list, layer: str):
    return next(value for pattern, value in values if pattern.fullmatch(layer))


def config_from_peft(values: dict, where: Path) -> AdapterConfig:
    """What the adapter_config.json of a LoRA adapter says.

    Raises:
        UserError: a kind of adapter that is not read, by name; a value that is none.
    """
    for key in REFUSED:
        if values.get(key):
            raise _refused(where, key, values[key])
    if values.get("bias", "none") != "none":
        raise _refused(where, "bias", values["bias"])
    if values.get("init_lora_weights") not in INITS:
        raise UserError(f"{where}: init_lora_weights", f"is {_shown(values['init_lora_weights'])}, "
                        "which changes the base's weights too", MERGE)
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or any(name not in HEADS for name in saved):
        raise _refused(where, "modules_to_save", saved)
    flags = {key: values.get(key, False) for key in ("use_rslora", "use_dora")}
    for key, flag in flags.items():
        if type(flag) is not bool:
            raise UserError(f"{where}: {key}", f"is {_shown(flag)}", "must be true or false")
    targets = values.get("target_modules")
    known = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    partly = values.get("layers_to_transform") is not None or values.get("exclude_modules")
    return AdapterConfig(
        where, list(_numbers(values, "r", "rank_pattern", int, LARGEST_RANK, where)),
        list(_numbers(values, "lora_alpha", "alpha_pattern", float, LARGEST_ALPHA, where)),
        *flags.values(), targets if known and not partly else None,
    )


def _numbers(
    values: dict, key: str, patterns_key: str, kind: type, most: float, where: Path
) -> Iterator[tuple[re.Pattern, float]]:
    """What layers match, and their number; last the one of all others. As peft's
    `get_pattern_key`."""
    patterns = values.get(patterns_key) or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST:
        raise UserError(f"{where}: {patterns_key}", f"is {_shown(patterns)}", "must be an object")
    for pattern, value in (*patterns.items(), (None, values.get(key, 8))):
        at = f"{where}: {key if pattern is None else patterns_key}"
        legal = (int,) if kind is int else (int, float)
        if type(value) not in legal or not 0 < value <= most:
            what = f"is {_shown(value)}" + ("" if pattern is None else f" for {_shown(pattern)}")
            legal = "a whole number" if kind is int else "a number"
            raise UserError(at, what, f"must be {legal} above 0, at most {most:,.0f}")
        yield re.compile(r"[\s\S]*") if pattern is None else _pattern(pattern, at), kind(value)


def _pattern(text: str, where: str) -> re.Pattern:
    repeats = sum(text.count(sign) for sign in "*+?")
    try:
        if len(text) > LONGEST or repeats > REPEATS or not PATTERN.fullmatch(text):
            raise ValueError
        return re.compile(rf"(?:.*\.)?(?:{text})")
    except (ValueError, re.error):
        legal = f"write names, with . and .* and at most {REPEATS} repeats"
        raise UserError(where, f"has the pattern {_shown(text)}", legal) from None


def _shown(value: object) -> str:
    return printable(repr(value), 80)


def _refused(where: Path, key: str, value: object) -> UserError:
    return UserError(f"{where}: {key}", f"is {_shown(value)}, which is not read", MERGE)


def config_to_peft(
    base_name: str, layers: dict[str, tuple[int, float]], others: Iterable[str], rslora: bool,
    dora: bool, dropout: float, transposed: bool, is_reward: bool,
) -> dict:
    """The adapter_config.json of adapters that are written.

    Args:
        base_name: folder or hub name of the model that they go on.
        layers: name -> rank and alpha.
        others: linear layers without an adapter; targets are written as the ends of names where
            they match none of these.
        transposed: whether the base stores its weights so.
    """
    ends = {name.rpartition(".")[2] for name in layers}
    short = not ends & {name.rpartition(".")[2] for name in others}
    kinds = list(layers.values())
    rank, alpha = max(set(kinds), key=lambda kind: (kinds.count(kind), kind))
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "base_model_name_or_path": base_name, "revision": None, "inference_mode": True,
        "r": rank, "lora_alpha": _plain(alpha), "lora_dropout": dropout,
        "target_modules": sorted(ends if short else layers),
        "rank_pattern": {n: r for n, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {n: _plain(a) for n, (_, a) in layers.items() if a != alpha},
        "bias": "none", "fan_in_fan_out": transposed, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None,
        "modules_to_save": ["score"] if is_reward else None,
        "use_rslora": rslora, "use_dora": dora,
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == math.floor(alpha) else alpha
