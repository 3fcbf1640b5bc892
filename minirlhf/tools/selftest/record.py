"""Writes numbers.json: `python -m minirlhf.tools.selftest.record`, after a change that is meant to
change numbers. A CPU gives them in float64, so that which CPU it was does not matter.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from minirlhf.errors import OK, run
from minirlhf.files import atomic
from minirlhf.tools.selftest.checks import CHECKS, Numbers
from minirlhf.tools.selftest.compare import STORED
from minirlhf.tools.selftest.tiny import Place


def recorded(check: str) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        found = CHECKS[check](Place("cpu", torch.float64, Path(folder)))
    return {kind: [float(f"{x:.10g}") for x in numbers] for kind, numbers in found.items()}


def main() -> int:
    lines = [f"{json.dumps(check)}: {json.dumps(recorded(check))}" for check in CHECKS]
    atomic.write_text(STORED, "{\n" + ",\n".join(lines) + "\n}\n")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
