"""A YAML file of settings, read as strictly as TOML and JSON.

The library is PyYAML, which comes with huggingface_hub. Of YAML only plain values are taken: no
alias, which a few lines could grow to gigabytes, no tag, and no key twice.
"""

import re
from pathlib import Path
from typing import Any

from minirlhf.errors import UserError, printable

DEPTH_CAP = 16
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def _is_float(node: Any) -> bool:
    """1e-5 and its like, which are numbers since YAML 1.2, and texts to PyYAML."""
    return node.id == "scalar" and node.style is None and bool(_FLOAT.fullmatch(node.value))


def read_yaml(text: str, path: str | Path) -> dict[str, Any]:
    """The top table of a YAML file.

    Raises:
        UserError: it is none, or holds what is not read; PyYAML is not installed.
    """
    try:
        from yaml import SafeLoader, YAMLError, compose, events, nodes, parse
    except ImportError:
        do = "pip install pyyaml, or write it as TOML or JSON"
        raise UserError(path, "a YAML file needs PyYAML", do) from None

    def wrong(what: str, mark: Any, do: str) -> UserError:
        return UserError(path if mark is None else f"{path}:{mark.line + 1}", what, do)

    depth = 0
    try:
        for event in parse(text, SafeLoader):
            if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
                raise wrong("an anchor or an alias", event.start_mark, "write the value out")
            if getattr(event, "tag", None):
                what = f"a tag, {printable(event.tag, 40)}"
                raise wrong(what, event.start_mark, "write plain values")
            depth += isinstance(event, events.CollectionStartEvent)
            depth -= isinstance(event, events.CollectionEndEvent)
            if depth > DEPTH_CAP:
                raise wrong(f"nested deeper than {DEPTH_CAP}", event.start_mark,
                            "settings stand at the top of the file")
        node = compose(text, SafeLoader)
        if not isinstance(node, nodes.MappingNode):
            raise wrong("no settings", node and node.start_mark, "one a line, as in steps: 10")
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, nodes.ScalarNode) or key.value in seen:
                what = f"{printable(key.value, 40)!r} stands twice, or is no name"
                raise wrong(what, key.start_mark, "give each setting once")
            seen.add(key.value)
        loader = SafeLoader("")
        return {
            key.value: float(value.value) if _is_float(value)
            else loader.construct_object(value, deep=True)
            for key, value in node.value
        }
    except YAMLError as error:
        what = printable(getattr(error, "problem", None) or str(error), 200)
        raise wrong(f"not valid YAML: {what}", getattr(error, "problem_mark", None), "") from None
    except (ValueError, RecursionError) as error:  # a huge integer, an impossible date
        raise UserError(path, f"not valid YAML: {printable(error)}") from None
