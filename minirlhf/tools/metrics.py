"""The meaning of each number in metrics.jsonl: `minirlhf metrics --recipe ppo`."""

import json
import sys

from minirlhf.errors import OK, run
from minirlhf.run import flags
from minirlhf.run.glossary import METRICS, Metric
from minirlhf.tools.settings import MetricsConfig


def table(metrics: tuple[Metric, ...]) -> str:
    """One line a metric, in columns."""
    rows = [("metric", "unit", "over", "reduction", "meaning")]
    for m in metrics:
        where = " (under clock)" if m.clock else ""
        when = f" (only with: {m.when})" if m.when else ""
        rows.append((m.name, m.unit, m.over, m.reduction, f"{m.meaning}{where}{when}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # nothing stands behind the meaning
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in line) for line in lines)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(MetricsConfig, argv, "minirlhf metrics")
    metrics = METRICS[config.recipe]
    if config.json:
        for metric in metrics:
            print(json.dumps(metric._asdict(), ensure_ascii=False))
    else:
        print(table(metrics))
        print("\nA line over several steps holds their mean; counts and lr are the last step's.")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
