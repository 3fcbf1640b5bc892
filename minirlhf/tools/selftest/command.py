"""Whether this device computes as a CPU does: `minirlhf selftest [--device cuda]`.

Logits, log-probs, losses with their gradients, sampled texts, a checkpoint and three steps of PPO,
within seconds, offline, and without a file that stays.
"""

import json
import math
import platform
import sys
import tempfile
import textwrap
from pathlib import Path
from time import perf_counter

from minirlhf.errors import NON_FINITE, OK, run
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype, environment, make_deterministic
from minirlhf.tools.selftest.checks import CHECKS
from minirlhf.tools.selftest.compare import Result, compare
from minirlhf.tools.selftest.settings import SelftestConfig
from minirlhf.tools.selftest.tiny import Place, language_model

ROOM = max(map(len, CHECKS))
HEAD = f"{'check':<{ROOM}}  numbers  difference  allowed  verdict"


def facts(place: Place) -> dict[str, object]:
    """What a result depends on beside this code."""
    known = environment(language_model(place))
    system = platform.system(), platform.release(), platform.machine()  # platform() starts uname
    known |= {"python": platform.python_version(), "system": " ".join(system)}
    return {name: value for name, value in known.items() if value}


def line(result: Result) -> str:
    cells = f"{result.numbers:>7}  {result.difference:>10.1e}  {result.allowed:>7g}"
    verdict = "agrees" if result.agrees else "DIFFERS"
    if result.problem:
        cells, verdict = f"{'-':>7}  {'-':>10}  {'-':>7}", f"FAILS at {result.problem}"
    return f"{result.check:<{ROOM}}  {cells}  {verdict}"


def as_json(result: Result) -> str:
    finite = result.difference if math.isfinite(result.difference) else None
    return json.dumps(result._asdict() | {"difference": finite, "agrees": result.agrees})


def closing(results: list[Result], seconds: float) -> str:
    """What came of it, and what to do with it."""
    wrong = [result.check for result in results if not result.agrees]
    came = f"{len(results) - len(wrong)} of {len(results)} checks agree with a CPU in float64"
    came += f"; not so: {', '.join(wrong)}" if wrong else ""
    return textwrap.fill(
        f"{came} ({seconds:.0f} s). A difference is a share of the largest number of its kind; of "
        "texts, the share of tokens that are others. Whichever came out, please tell us: paste all "
        "of this, from the first line on, into a report, and add which computer it is. It names "
        "the device, the system and versions, and nothing of you.", 80)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(SelftestConfig, argv, "minirlhf selftest")
    device, dtype, start = choose_device(config.device), choose_dtype(config.dtype), perf_counter()
    make_deterministic(device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(device, dtype, Path(folder))
        known = facts(place)
        table = [*(f"{name:<9}  {value}" for name, value in known.items()), "", HEAD]
        print(json.dumps(known) if config.json else "\n".join(table))
        for check in CHECKS:  # each is shown as soon as it is made
            results.append(compare(check, place))
            print(as_json(results[-1]) if config.json else line(results[-1]), flush=True)
    if not config.json:
        print("\n" + closing(results, perf_counter() - start))
    return OK if all(result.agrees for result in results) else NON_FINITE


if __name__ == "__main__":
    sys.exit(run(main))
