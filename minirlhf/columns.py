"""Files that call their columns otherwise: `--columns prompt=question chosen=better`."""

from collections.abc import Iterable
from difflib import get_close_matches

from minirlhf.errors import printable

# What formats.py and rankings.py read; of token ids TRL's spelling, since files that have another
# tool's spelling are that tool's, with its names.
COLUMNS = (
    "text", "messages", "prompt", "completion", "response", "chosen", "rejected", "margin",
    "chosen_probability", "responses", "ranks", "scores", "best", "choice", "completions",
    "input_ids", "attention_mask", "prompt_length", "prompt_ids", "chosen_ids", "chosen_mask",
    "rejected_ids", "rejected_mask",
)  # fmt: skip


def column_names(words: Iterable[str]) -> dict[str, str]:
    """Name here -> name in the file, of words in which `column_problems` finds none."""
    return dict(word.split("=", 1) for word in words)


def column_problems(words: Iterable[str]) -> list[str]:
    """What is wrong with them, for a config's own check()."""
    found: list[str] = []
    columns: dict[str, str] = {}
    for word in words:
        name, _, column = word.partition("=")
        shown = printable(name, 40)
        if not (name and column):
            got = printable(repr(word), 80)
            found.append(f"columns: got {got}, must be NAME=COLUMN, as in prompt=question")
        elif name not in COLUMNS:
            nearest = get_close_matches(name[:80], COLUMNS, n=1, cutoff=0)[0]
            swapped = "; our name comes first" if column in COLUMNS else ""
            found.append(f"columns: no {shown!r} is read: the nearest is {nearest}{swapped}")
        elif name in columns:
            two = printable(f"{columns[name]} and {column}", 80)
            found.append(f"columns: two for {shown}: {two}")
        elif column in columns.values():
            found.append(f"columns: {printable(column, 40)!r} is given for two names")
        else:
            columns[name] = column
    return found
