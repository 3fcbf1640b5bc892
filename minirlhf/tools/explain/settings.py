"""The settings of `minirlhf explain`, apart from it, so that --help need not wait for torch."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.errors import printable
from minirlhf.run.settings import override, setting
from minirlhf.tools.settings import LanguageSettings, StepSettings

ALGORITHMS = ("ppo", "grpo", "reward", "dpo")


@dataclass(frozen=True)
class ExplainConfig(StepSettings, LanguageSettings):
    """Show one sample of one step with all its numbers, and the arithmetic of its loss."""

    FIRST_WORDS: ClassVar = "what"

    what: tuple[str, ...] = setting(
        (), "ppo, grpo, reward or dpo, then the folder of a run; without one the demo's model "
        "takes a few steps in memory; they may come first, without this flag",
        metavar="RECIPE", required=True,
    )
    step: int | None = override(help="step of the run; none: the last one recorded")
    sample: int = setting(0, "sample of the step, counted from 0", at_least=0)
    token: int | None = setting(
        None, "token whose arithmetic is written out; none: one that moves the loss", at_least=0
    )
    rows: int | None = setting(
        40, "most tokens in a table, which leaves out those between; sums are of all; none: every "
        "token", at_least=2,
    )
    decimals: int = setting(5, "decimals of each number", at_least=2, at_most=9)

    @property
    def algorithm(self) -> str:
        return self.what[0]

    @property
    def run(self) -> str | None:
        """Folder of the run, if one is given."""
        return self.what[1] if len(self.what) > 1 else None

    def check(self) -> list[str]:
        if not self.what or self.what[0] not in ALGORITHMS:
            got = printable(self.what[0], 40) if self.what else "nothing"
            return [f"what: got {got}: begin with {', '.join(ALGORITHMS[:-1])} or dpo"]
        if len(self.what) > 2:
            return [f"what: {printable(self.what[2], 40)}: give one run"]
        if self.run is None and self.step is not None:
            return ["step: goes with the folder of a run"]
        if self.token is not None and self.algorithm in ("reward", "dpo"):
            return [f"token: {self.algorithm} scores whole texts"]
        return []
