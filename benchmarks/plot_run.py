#!/usr/bin/env python3
"""Curves of runs' metrics.jsonl as one SVG: `pip install -e '.[plot]'`, then

python benchmarks/plot_run.py RUN/metrics.jsonl OUT.svg objective/scores objective/kl
python benchmarks/plot_run.py NAME=RUN/metrics.jsonl OTHER=RUN2/metrics.jsonl OUT.svg loss
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def read_runs(words: list[str]) -> dict[str, list[dict]]:
    """Name -> lines; a run without a name has its folder's."""
    runs: dict[str, list[dict]] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or Path(word).exists():
            name, path = Path(word).resolve().parent.name, word
        if name in runs:
            sys.exit(f"two runs are called {name}: name each, NAME=FILE")
        with open(path, encoding="utf-8") as file:
            runs[name] = [json.loads(line) for line in file]
    return runs


def main() -> None:
    words = sys.argv[1:]
    at = next((i for i, word in enumerate(words) if word.endswith(".svg")), 0)
    metrics = words[at + 1 :]
    if not at or not metrics:
        sys.exit(__doc__)
    runs, target = read_runs(words[:at]), words[at]
    figure, panels = pyplot.subplots(1, len(metrics), figsize=(4 * len(metrics), 3), squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        for name, lines in runs.items():
            rows = [line for line in lines if metric in line]
            if not rows:
                sys.exit(f"{name} has no {metric}")
            steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
            panel.plot(steps, values, linewidth=1.2, label=name)
        panel.set_title(metric)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if len(runs) > 1:
            panel.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})  # the same curves give the same file
    print(f"written to {target}")


if __name__ == "__main__":
    main()
