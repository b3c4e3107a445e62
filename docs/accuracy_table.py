"""Prints the table of docs/accuracy.md from the runs that docs/accuracy.sh trained: docs/accuracy_table.py RUNS."""

import statistics
import sys
from pathlib import Path

from fedmoe import metrics

ROWS = ("layer-batch-batch", "paper", "default", "static", "local")
SEEDS = (0, 1, 2)


def main(runs: Path) -> None:
    """A row a setting: after each round the mean over clients, averaged over seeds, ± its deviation over seeds."""
    print("| | " + " | ".join(f"round {number}" for number in range(1, 6)) + " |")
    print("|---" * 6 + "|")
    for row in ROWS:
        curves = [[line["accuracy"]["mean"] for line in metrics.read(runs / f"{row}-{seed}")] for seed in SEEDS]
        cells = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in zip(*curves, strict=True)]
        print(f"| {row} | " + " | ".join(cells) + " |")


main(Path(sys.argv[1]))
