"""crash.json: what a report of a fault of ours would have to say."""

import traceback

from minirlhf.files import atomic
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.place import place_of
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import as_dict


def write_crash(error: Exception, state: TrainState | None, config: RunSettings) -> None:
    """Writes it into the folder of the run.

    Args:
        state: None before there is one.
    """
    atomic.write_json(place_of(config.out) / "crash.json", {
        "error": f"{type(error).__name__}: {error}",
        "after_step": state.step if state else None,
        "samples": state.samples if state else None,
        "trace": traceback.format_exception(error),
        "settings": as_dict(config),
    })
