"""The settings of `minirlhf selftest`, apart from it, so that --help need not wait for torch."""

from dataclasses import dataclass

from minirlhf.run.display import JsonSettings
from minirlhf.setup.groups import DeviceSettings


@dataclass(frozen=True)
class SelftestConfig(DeviceSettings, JsonSettings):
    """Compute on a device, and compare with a CPU's numbers; exit code 3 where one differs."""
