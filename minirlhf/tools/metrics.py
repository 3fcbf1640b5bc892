"""The meaning of each number in metrics.jsonl: `minirlhf metrics --recipe ppo`."""

import json
import sys

from minirlhf.errors import OK, run
from minirlhf.run import flags
from minirlhf.run.glossary import METRICS, Metric, translated
from minirlhf.run.language import tell
from minirlhf.run.terminal import width
from minirlhf.tools.settings import MetricsConfig

HEAD = ("metric", "unit", "over", "reduction", "meaning")
NOTE = "A line over several steps holds their mean; counts and lr are the last step's."


def table(metrics: tuple[Metric, ...], language: str = "en") -> str:
    """One line a metric, in columns."""
    rows = [tuple(tell(word, language) for word in HEAD)]
    for m in (translated(metric, language) for metric in metrics):
        where = tell(" (under clock)", language) if m.clock else ""
        when = tell(" (only with: {when})", language, when=m.when) if m.when else ""
        rows.append((m.name, m.unit, m.over, m.reduction, f"{m.meaning}{where}{when}"))
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # nothing stands behind the meaning
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join(
        "  ".join(cell + " " * (room - width(cell)) for cell, room in line) for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(MetricsConfig, argv, "minirlhf metrics")
    metrics = METRICS[config.recipe]
    if config.json:
        for metric in metrics:
            shown = translated(metric, config.lang)._asdict()
            print(json.dumps(shown, ensure_ascii=False))
    else:
        print(table(metrics, config.lang))
        print("\n" + tell(NOTE, config.lang))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
