"""The settings of a run that torchrun starts as several processes."""

from dataclasses import dataclass

from minirlhf.run.settings import setting


@dataclass(frozen=True)
class ParallelSettings:
    """Memory and speed: several processes, which torchrun starts."""

    parallel: str | None = setting(
        None, "what each process of torchrun holds: the whole models (ddp), or a part of each "
        "(fsdp); none: ddp", choices=("ddp", "fsdp"), resume="free",
    )
    offload_params: bool = setting(
        False, "with fsdp on GPUs, hold parameters, gradients and moments in the CPU's memory",
        resume="free",
    )
    rank_timeout: float = setting(
        60.0, "seconds without a sign of life of a process, after which the others stop", above=0,
        resume="free",
    )

    def check(self) -> list[str]:
        if self.parallel != "fsdp":
            return ["offload_params: goes with --parallel fsdp"] if self.offload_params else []
        problems = []
        if self.trunk_bits:
            problems.append("trunk_bits: fsdp shards no packed weights: use --parallel ddp, or "
                            "leave it out")
        if getattr(self, "offload_frozen", False):  # no recipe but those with rollouts has it
            problems.append("offload_frozen: fsdp shards frozen models, which are not read again: "
                            "leave it out")
        return problems
