"""The settings of `minirlhf report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minirlhf.run.resume import OutSettings
from minirlhf.run.settings import override, setting
from minirlhf.tools.settings import LanguageSettings


@dataclass(frozen=True)
class ReportConfig(OutSettings, LanguageSettings):
    """Show a run on one page, or several side by side: curves, texts, tokens, alarms."""

    FIRST_WORDS: ClassVar = "runs"

    runs: tuple[str, ...] = setting(
        (), "folders of runs, finished or not; they may come first, without this flag",
        metavar="FOLDER", required=True,
    )
    out: str | None = override(
        None, "file for the page; none: report.html in the run's folder", metavar="FILE",
        required=False,
    )
    png: str | None = setting(
        None, "new folder for the same curves as PNG, in English; needs the plot extra: "
        "pip install 'minirlhf[plot]'", metavar="DIR",
    )
    lang: str = override(help="language of the page: English or Chinese")

    def check(self) -> list[str]:
        problems = []
        if len(self.runs) > 1 and self.out is None:
            problems.append("--out: of several runs, name the file")
        if self.out and not Path(self.out).absolute().parent.is_dir():
            problems.append(f"--out: {Path(self.out).parent} is no folder")
        if self.png and Path(self.png).exists():
            problems.append(f"--png: {self.png} is there already: give another")
        return problems
