"""A file beside --out that keeps what a command has done, row by row, so that it can go on.

Its first line says what the command must share with the one that goes on, each further line is an
object that holds the number of its row as "at".
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from minirlhf.errors import UserError
from minirlhf.files import atomic
from minirlhf.files.reading import strict_json
from minirlhf.run.resume import contents
from minirlhf.run.settings import as_dict, resume_rules


def facts_of(config: object, inputs: Sequence[Path], ran: dict[str, str]) -> dict:
    """What a command must share with the one that it goes on from."""
    rules = resume_rules(config)
    settings = {name: value for name, value in as_dict(config).items() if rules[name] != "free"}
    return {"settings": settings,
            "inputs": {str(file): atomic.sha256(file) for file in contents(inputs)} | ran}


def begin(partial: Path, facts: dict) -> int:
    """How many prompts an earlier call of the same command has done; the file is ready for more.

    Raises:
        UserError: the file is of another command, or is damaged.
    """
    data = partial.read_bytes() if partial.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):  # a kill inside the last append
        atomic.truncate(partial, whole)
    if not whole:
        atomic.append_line(partial, json.dumps(facts))
        return 0
    first = strict_json(data[: data.index(b"\n")].decode(errors="replace"), partial, 1)
    if first != json.loads(json.dumps(facts)):
        what = "is what another command, or this one with other inputs, began to write"
        raise UserError(partial, what, "finish that one, or remove the file")
    return sum(1 for _ in outcomes(partial))


def outcomes(partial: Path) -> Iterator[dict]:
    """What became of each prompt that is done.

    Raises:
        UserError: the file is damaged, as by two commands that write it at once.
    """
    with partial.open(encoding="utf-8", errors="replace") as lines:
        next(lines)
        for at, line in enumerate(lines):
            found = strict_json(line.rstrip("\n"), partial, at + 2)
            if not (isinstance(found, dict) and found.get("at") == at):
                raise UserError(f"{partial}:{at + 2}", "is not in order", "remove the file")
            yield found
