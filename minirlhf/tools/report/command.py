"""Runs on one page: `minirlhf report RUN… --out report.html`."""

import sys
from pathlib import Path

from minirlhf.errors import OK, UserError, run
from minirlhf.evaluation.report.page import FILE, START, page
from minirlhf.evaluation.report.record import RunRecord, read_run
from minirlhf.files import atomic
from minirlhf.run import flags
from minirlhf.tools.report import plot
from minirlhf.tools.report.settings import ReportConfig


def read_runs(folders: tuple[str, ...]) -> list[RunRecord]:
    """The runs, each under the shortest end of its path that no other has.

    Raises:
        UserError: one is no run, or stands twice.
    """
    places = [Path(folder).resolve() for folder in folders]
    for k, place in enumerate(places):
        if place in places[:k]:
            raise UserError(folders[k], "stands twice", "give each run once")
    ends = range(1, max(len(place.parts) for place in places) + 1)
    depth = next(n for n in ends if len({place.parts[-n:] for place in places}) == len(places))
    names = ["/".join(place.parts[-depth:]) for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def check_page(path: Path) -> None:
    """Refuses to overwrite what is not a report."""
    if path.exists() and not (path.is_file() and START.encode() in path.read_bytes()[:200]):
        raise UserError(path, "is there already, and is no report", "give another --out")


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(ReportConfig, argv, "minirlhf report")
    if config.png:
        plot.check()
    runs = read_runs(config.runs)
    out = Path(config.out) if config.out else runs[0].folder / FILE
    check_page(out)
    text = page(runs, config.lang)
    temporary = out.with_name(f"{atomic.TEMPORARY}{out.name}")
    atomic.write_text(temporary, text)
    atomic.replace_file(temporary, out)
    print(f"report in {out}")
    if config.png:
        print(f"{plot.write(runs, Path(config.png))} curves in {config.png}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
