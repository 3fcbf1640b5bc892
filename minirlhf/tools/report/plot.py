"""The curves of a report as PNG, a file each, for papers and slides."""

import re
from collections.abc import Sequence
from pathlib import Path

from minirlhf.console import progress
from minirlhf.errors import UserError
from minirlhf.evaluation.report.record import RunRecord
from minirlhf.run.glossary import definition


def check() -> None:
    """Refuses where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--png", "needs matplotlib", "pip install 'minirlhf[plot]'") from None


def write(runs: Sequence[RunRecord], folder: Path) -> int:
    """Writes FOLDER/METRIC.png for each number of the logs; returns how many there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True)
    taken: set[str] = set()
    names = sorted({name for run in runs for name in run.series})
    for name in progress(names, "draw", unit=" curves"):
        figure = Figure(figsize=(5, 3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for k, run in enumerate(runs):
            if (series := run.series.get(name)) is not None:
                dots = "." if len(series.values) < 50 else None  # a value between gaps has no line
                axes.plot(series.steps, series.values, f"C{k}", linewidth=1.4, marker=dots,
                          label=plain(run.name))
        found = next((m for run in runs if (m := definition(run.recipe, name))), None)
        axes.set(title=plain(name), xlabel="step", ylabel=found.unit if found else "")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
        figure.savefig(folder / file_name(name, taken), dpi=150)
    return len(taken)


def plain(name: str) -> str:
    r"""A name as matplotlib shows it: $ would begin a formula, and other alphabets need fonts that
    it has not.

    >>> plain("a$b\x1b奖")
    'a\\$b??'
    """
    return "".join(c if c.isprintable() and c < "\u0250" else "?" for c in name[:80]).replace(
        "$", r"\$"
    )


def file_name(metric: str, taken: set[str]) -> str:
    """A plain name for a metric's file, put among those that are taken.

    >>> file_name("objective/kl", set()), file_name("../kl", {"kl.png"})
    ('objective_kl.png', 'kl-2.png')
    """
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", metric).strip("._")[:100] or "metric"
    name, number = f"{stem}.png", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    taken.add(name)
    return name
