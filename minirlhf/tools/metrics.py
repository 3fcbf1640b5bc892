"""What the numbers of metrics.jsonl mean: `minirlhf metrics --recipe ppo`."""

import json
import sys
from dataclasses import dataclass

from minirlhf.errors import OK, run
from minirlhf.run import settings
from minirlhf.run.glossary import LEFT_OUT, METRICS, Metric
from minirlhf.run.settings import setting


@dataclass(frozen=True)
class MetricsConfig:
    recipe: str = setting("ppo", "whose log", choices=tuple(METRICS))
    json: bool = setting(False, "one JSON object a metric, instead of a table")


def table(metrics: tuple[Metric, ...]) -> str:
    """One line a metric, in columns."""
    columns = ("metric", "unit", "over", "reduction", "TRL 0.9")
    rows = [(m.name, m.unit, m.over, m.reduction, m.trl09 or "") for m in metrics]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [_aligned((*columns, "meaning"), widths)]
    for metric, row in zip(metrics, rows, strict=True):
        where = " (under clock)" if metric.clock else ""
        when = f" (only with: {metric.when})" if metric.when else ""
        lines.append(_aligned((*row, f"{metric.meaning}{where}{when}"), widths))
    return "\n".join(lines)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    *fixed, last = cells
    return "  ".join([*(f"{c:<{w}}" for c, w in zip(fixed, widths, strict=True)), last])


def main(argv: list[str] | None = None) -> int:
    config = settings.parse(
        MetricsConfig, argv, "minirlhf metrics", "Print what each number of metrics.jsonl means."
    )
    metrics = METRICS[config.recipe]
    if config.json:
        for metric in metrics:
            print(json.dumps(metric._asdict(), ensure_ascii=False))
        return OK
    print(table(metrics))
    print("\nA line over several steps holds their mean; counts and lr are the last step's.")
    if config.recipe == "ppo":
        print("\nStatistics of TRL 0.9 that have no number here:")
        width = max(map(len, LEFT_OUT))
        for name, reason in LEFT_OUT.items():
            print(f"  {name:<{width}}  {reason}")
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
