"""The settings of `minirlhf learn`, apart from it, so that --help need not wait for torch."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.run.settings import setting


@dataclass(frozen=True)
class LearnConfig:
    """Show exercises: what to change, what to look at, what to expect and why."""

    FIRST_WORDS: ClassVar = "exercise"

    exercise: int | None = setting(
        None, "number of the exercise to show; it may come first, without this flag; none: a list "
        "of all", at_least=1, at_most=12,
    )
    gradcheck: bool = setting(
        False, "compare the gradient of every loss with finite differences in float64; exit code 1 "
        "where one is wrong",
    )

    def check(self) -> list[str]:
        both = self.gradcheck and self.exercise is not None
        return ["gradcheck: goes without an exercise"] if both else []
