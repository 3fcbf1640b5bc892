#!/usr/bin/env python3
"""Curves of a run's metrics.jsonl as one SVG: `pip install 'minirlhf[plot]'`, then

python benchmarks/plot_run.py RUN/metrics.jsonl OUT.svg objective/scores objective/kl
"""

import json
import sys

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    source, target, *names = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        rows = [line for line in lines if name in line]
        panel.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1.2)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})  # the same curves give the same file
    print(f"written to {target}")


if __name__ == "__main__":
    main()
