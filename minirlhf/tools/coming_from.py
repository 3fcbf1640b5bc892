"""Where other tools' parameters went: `minirlhf coming-from trl` or `… llama-factory`.

The tables are in coming_from.tsv, a row a parameter: its name there, ours (flags, verbs or names to
import; "-" where there is none), and what differs. A row in brackets begins a section: its title,
the tools whose parameters it has, and the verbs whose flags it names.
"""

import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from minirlhf.errors import OK, UserError, run
from minirlhf.run.settings import nearest

TOOLS = ("trl", "llama-factory")
WIDTH = 36  # characters of a column of names; longer ones are wrapped
USAGE = f"""usage: minirlhf coming-from TOOL

Prints what another tool's parameters are called here, and what behaves
differently. TOOL is {" or ".join(TOOLS)}.
minirlhf ppo --preset sets PPO's numbers to those of a tool."""


class Section(NamedTuple):
    title: str
    tools: list[str]
    verbs: list[str]
    rows: list[tuple[str, str, str]]  # (there, ours, difference)


def sections() -> list[Section]:
    """All sections of coming_from.tsv, in order."""
    found = []
    _, *lines = Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines()
    for there, ours, difference in (line.split("\t") for line in lines):
        if there.startswith("["):
            found.append(Section(there[1:-1], ours.split(", "), difference.split(", "), []))
        else:
            found[-1].rows.append((there, ours, difference))
    return found


def table(section: Section) -> str:
    lines = [f"{section.title} → minirlhf {', '.join(section.verbs)}"]
    for *names, difference in section.rows:
        wrapped = (textwrap.wrap(name, WIDTH, break_on_hyphens=False) for name in names)
        for there, ours, rest in zip_longest(*wrapped, [difference], fillvalue=""):
            lines.append(f"  {there:<{WIDTH}}  {ours:<{WIDTH}}  {rest}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    tool = words[0] if words else "--help"
    if tool in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(OK)
    if tool not in TOOLS:
        is_flag = tool.startswith("-")
        what, names = ("unknown flag", ["--help"]) if is_flag else ("no such tool", TOOLS)
        do = f"{nearest(tool, names, '')}; tools: {', '.join(TOOLS)}".removeprefix("; ")
        raise UserError(tool, what, do)
    if len(words) > 1:
        raise UserError(words[1], "unexpected argument", "give a tool alone")
    print("\n\n".join(table(section) for section in sections() if tool in section.tools))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
