"""Plot accuracy over adapter file bytes, one point a method with its standard deviation, from the rows of a sweep.

pip install matplotlib
python scripts/plot_accuracy.py runs docs/quickstart.png
"""

from __future__ import annotations

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nola_vision.results.statistics import summarise
from nola_vision.results.store import read_rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", help="folder of the runs of one cell")
    options.add_argument("picture", help="file to write: .png, .svg or .pdf")
    known = options.parse_args()
    rows, _ = read_rows(known.runs)
    summaries = [s for s in summarise(rows) if s.completed]

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for summary in summaries:
        if not summary.adapter_file_bytes:
            axes.axhline(summary.mean, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(f"{summary.label} (no file)", (1, summary.mean), xycoords=("axes fraction", "data"),
                          textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=9, color="0.4")  # fmt: skip
            continue
        axes.errorbar(summary.adapter_file_bytes, summary.mean, yerr=summary.std, fmt="o", capsize=3)
        axes.annotate(summary.label, (summary.adapter_file_bytes, summary.mean), textcoords="offset points",
                      xytext=(7, 5), fontsize=9)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("adapter file, bytes (head included)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{summaries[0].cell}: mean and std of {max(s.completed for s in summaries)} runs", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(known.picture, dpi=150)


if __name__ == "__main__":
    main()
