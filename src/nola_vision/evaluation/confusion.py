"""The file `confusion.csv` that a run writes: its test images by true and predicted class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nola_vision.common.text import csv_cell

CONFUSION_FILE = "confusion.csv"


def confusion_csv(counts: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Test images by true and predicted class as CSV: one line per pair with images, and one per class with itself.

    Args:
        counts: `[true, predicted]`.
        class_names: in the order of the labels, which the CSV keeps; written as `csv_names`.
    """
    true, predicted = np.nonzero(counts + np.eye(len(class_names), dtype=np.int64))
    names = np.array(csv_names(class_names), dtype=object)
    lines = {"true": names[true], "predicted": names[predicted], "count": counts[true, predicted]}
    return pd.DataFrame(lines).to_csv(index=False)


def csv_names(class_names: Sequence[str]) -> list[str]:
    """The class names as written to the file: formulas of a spreadsheet are escaped, duplicates get their label."""
    cells = [csv_cell(name) for name in class_names]
    twice = {name for name, count in Counter(cells).items() if count > 1}
    unique = [f"{name} ({i})" if name in twice else name for i, name in enumerate(cells)]
    if len(set(unique)) < len(unique):  # "crane" twice and "crane (0)"
        unique = [f"{name} ({i})" for i, name in enumerate(cells)]
    return unique
