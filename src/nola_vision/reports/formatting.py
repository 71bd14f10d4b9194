"""Numbers, accuracies and names as text, the same in all outputs."""

from __future__ import annotations

import math

from nola_vision.common.text import printable, shortened
from nola_vision.reports.statistics import cross_validated, mean_std, run_accuracies
from nola_vision.runs.record import Row

NOT_MEASURED = "-"
_MOST_CHARACTERS = 60  # of a name


def points(per_cent: float | None) -> str:
    """A number of per cent or points with one digit: `91.2`; `-` for None and nan."""
    if per_cent is None or math.isnan(per_cent):
        return NOT_MEASURED
    return f"{round(per_cent, 1) + 0.0:.1f}"  # avoids -0.0


def interval_text(interval: tuple[float, float]) -> str:
    """An interval in per cent: `[87.0, 94.2]`."""
    return f"[{points(interval[0])}, {points(interval[1])}]"


def count_text(number: int | None) -> str:
    """A number with separators: `24,552`; `-` for None."""
    return NOT_MEASURED if number is None else f"{number:,}"


def signed(difference: float) -> str:
    """A difference in points with its sign: `+1.2`; zero without."""
    text = f"{difference:+.1f}"
    return text if float(text) else "0.0"


def bytes_text(number: float) -> str:
    """A size in units of 1,000: `37.2 KB`, `1 MB`."""
    units = ["B", "KB", "MB", "GB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def accuracy_text(row: Row) -> str:
    """The accuracy of a run: `91.2 %`, or `85.0 % (6.1), mean and std of 50 folds`."""
    accuracies = run_accuracies(row)
    if not cross_validated(row):
        return f"{points(accuracies[0])} %" if accuracies else NOT_MEASURED
    mean, std = mean_std(accuracies)
    return f"{points(mean)} % ({points(std)}), mean and std of {len(accuracies)} folds"


def short_printable(name: object, most: int = _MOST_CHARACTERS) -> str:
    """A name from a row as printable text of at most `most` characters."""
    return shortened(printable(str(name)), most)
