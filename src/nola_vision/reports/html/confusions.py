"""The most confused pairs of classes and the confusion matrix on the report page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt, plural, printable
from nola_vision.reports.charts.labels import short_names
from nola_vision.reports.confusion import confused_pairs
from nola_vision.reports.entry_predictions import EntryPredictions
from nola_vision.reports.formatting import points, short_printable
from nola_vision.reports.html.classes import counted_runs

_MOST_PAIRS = 10
_MATRIX_CLASSES = 20
_HEATS = 5  # steps of colour of the matrix
_LABEL = 18  # characters of a class name in the matrix
_UPRIGHT = 3  # characters of a class name that fit above a column without rotation


@dataclass(frozen=True)
class Pair:
    """Images of one class predicted as another."""

    true: str
    predicted: str
    images: str
    share: str


@dataclass(frozen=True)
class Heat:
    """A cell of the confusion matrix; `level` from 0 to `_HEATS` is the depth of its colour."""

    text: str
    level: int
    right: bool


@dataclass(frozen=True)
class MatrixLine:
    """A true class; its label is short and unique."""

    label: str
    name: str
    cells: Sequence[Heat]


@dataclass(frozen=True)
class ConfusionView:
    """The most confused pairs, and the matrix of the classes in them."""

    note: str
    pairs: Sequence[Pair]
    more_pairs: str
    caption: str
    upright: bool  # names are so short that they are not rotated
    lines: Sequence[MatrixLine]


def confusion_view(own: EntryPredictions) -> ConfusionView | None:
    """The most confused pairs of classes and the matrix; None if no image was misclassified."""
    names = [short_printable(name) for name in own.class_names]
    pairs = confused_pairs(own.counts)
    if not len(pairs):
        return None
    kept = list(range(len(names)))
    if len(names) > _MATRIX_CLASSES:
        found = pairs[: _MATRIX_CLASSES**2, :2].ravel().tolist()  # n pairs have at least sqrt(n) classes
        kept = sorted(list(dict.fromkeys(found))[:_MATRIX_CLASSES])
    labels = short_names([own.class_names[i] for i in kept], _LABEL)
    several = len(own.runs) > 1
    part = "" if len(kept) == len(names) else f" of the {len(kept)} classes in the most confused pairs"
    unit = "% of the true class's images" if several else "images"
    rest = len(pairs) - _MOST_PAIRS
    return ConfusionView(
        note=f"{counted_runs(own)} Each image counts once per run." if several else counted_runs(own),
        pairs=[
            Pair(names[true], names[predicted], f"{count:,}", points(own.shares[true, predicted]))
            for true, predicted, count in pairs[:_MOST_PAIRS].tolist()
        ],
        more_pairs=f"and {plural('more pair', rest)}" if rest > 0 else "",
        caption=f"Confusion matrix{part}: {unit}; true class by row, predicted class by column",
        upright=max(map(len, labels.values())) <= _UPRIGHT,
        lines=[
            MatrixLine(
                labels[own.class_names[i]], excerpt(printable(own.class_names[i])), [heat(own, i, j) for j in kept]
            )
            for i in kept
        ],
    )


def heat(own: EntryPredictions, true: int, predicted: int) -> Heat:
    count, share = int(own.counts[true, predicted]), float(own.shares[true, predicted])
    if not count:
        return Heat("", 0, true == predicted)
    in_per_cent = f"{share:.0f}" if share >= 0.5 else "<1"
    text = in_per_cent if len(own.runs) > 1 else f"{count:,}"
    return Heat(text, max(1, math.ceil(share / 100 * _HEATS)), true == predicted)
