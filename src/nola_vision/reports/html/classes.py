"""Accuracy by class on the report page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nola_vision.reports.entry_predictions import EntryPredictions
from nola_vision.reports.formatting import NOT_MEASURED, points, short_printable, signed

_MOST_CLASSES = 40  # in one table; with more classes the worst are shown, the others are collapsed
_WORST_CLASSES = 20


@dataclass(frozen=True)
class ClassLine:
    """One class: the accuracies of both methods as text, and as positions from 0 to 100."""

    name: str
    images: str
    accuracy: str
    other: str
    difference: str
    at: float
    other_at: float | None


@dataclass(frozen=True)
class ClassesView:
    """Accuracy by class of the subject and of the best frozen-feature method, the worst class first."""

    subject: str
    colour: str  # CSS class
    other: str | None
    note: str
    shown: Sequence[ClassLine]
    rest: Sequence[ClassLine]


def classes_view(own: EntryPredictions, other: EntryPredictions | None, colour: str) -> ClassesView:
    """Accuracy by class, the lowest first; classes without a tested image are left out.

    Two methods are compared on the splits that both have, since splits may differ in difficulty.
    """
    names, note = own.class_names, counted_runs(own)
    if other is not None and other.class_names == names and (shared := own.splits & other.splits):
        own, other = own.on(shared), other.on(shared)
        if max(own.summary.completed, other.summary.completed) > 1:
            splits = "" if len(shared) == 1 else ", on the splits of both"
            note = f"Over {_runs_text(own)} and {_runs_text(other)}{splits}."
    else:
        other = None
    accuracies = np.diag(own.shares)
    others = np.full(len(names), np.nan) if other is None else np.diag(other.shares)
    images = own.counts.sum(axis=1) / len(own.runs)
    lines = [
        ClassLine(
            name=short_printable(names[i]),
            images=f"{images[i]:,.0f}",
            accuracy=points(accuracies[i]),
            other=points(others[i]),
            difference=signed(accuracies[i] - others[i]) if np.isfinite(others[i]) else NOT_MEASURED,
            at=round(float(accuracies[i]), 1),
            other_at=round(float(others[i]), 1) if np.isfinite(others[i]) else None,
        )
        for i in np.argsort(accuracies, kind="stable").tolist()
        if images[i]
    ]
    shown = len(lines) if len(lines) <= _MOST_CLASSES else _WORST_CLASSES
    part = "" if shown == len(lines) else f" The {shown} classes of {len(lines)} with the lowest accuracy."
    labels = short_printable(own.label), short_printable(other.label) if other else None
    return ClassesView(labels[0], colour, labels[1], note + part, lines[:shown], lines[shown:])


def counted_runs(entry: EntryPredictions) -> str:
    """The images and runs that were counted, as a sentence."""
    if entry.summary.completed > 1:
        return f"Over {_runs_text(entry)}."
    if entry.summary.cross_validated:
        return "Each image was tested once, in one fold."
    return "Counts of one run on its test images."


def _runs_text(entry: EntryPredictions) -> str:
    completed, read = entry.summary.completed, len(entry.runs)
    which = f"{read} of the {completed:,} runs" if read < completed else "the run" if read == 1 else f"the {read} runs"
    return f"{which} of {short_printable(entry.label)}"
