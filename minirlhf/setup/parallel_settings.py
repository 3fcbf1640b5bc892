"""The settings of a run that torchrun starts as several processes."""

from dataclasses import dataclass

from minirlhf.run.settings import setting


@dataclass(frozen=True)
class ParallelSettings:
    """Memory and speed: several processes, which torchrun starts."""

    parallel: str | None = setting(
        None, "what each process of torchrun holds: the whole models (ddp); none: ddp",
        choices=("ddp",), resume="free",
    )
    rank_timeout: float = setting(
        60.0, "seconds without a sign of life of a process, after which the others stop", above=0,
        resume="free",
    )
