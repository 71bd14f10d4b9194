"""Where the labels of a chart go, so that none hides another; all lengths in points.

The libraries for this (adjustText, textalloc) move labels step by step for 0.1 s and more per chart and know no labels
of lines. Here each label takes the best free place in turn.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from nola_vision.text import printable

Boxes = NDArray[np.float64]  # [n, 4]: left, bottom, right, top
_DISTANCES = (5.0, 10.0, 17.0, 26.0, 37.0, 50.0, 66.0, 85.0)  # of a label from its point
_SIDES = [side for side in itertools.product((1.0, 0.5, 0.0, -0.5, -1.0), repeat=2) if 1 in map(abs, side)]
_SIDES.sort(key=lambda side: (side[0] != 1, abs(side[1]), side))  # to the right if possible
_CROSSED = 15.0  # a line under a label is as bad as so many points of distance


class Place(NamedTuple):
    """Where a label is: its left edge and the middle of its height, and the point of its edge next to what it names."""

    left: float
    middle: float
    near: tuple[float, float]
    distance: float


def short_names(names: Sequence[str], most: int) -> dict[str, str]:
    """Names as distinct printable labels; a name of more than `most` characters is without its middle."""
    texts = {name: short_name(name, most) for name in dict.fromkeys(names)}
    count = Counter(texts.values())
    numbers: Counter[str] = Counter()
    for name, text in texts.items():
        if count[text] > 1:
            numbers[text] += 1
            texts[name] = f"{text} {numbers[text]}"
    return texts


def short_name(name: str, most: int) -> str:
    """A name as a label: on one line, and without its middle if it is longer than `most` characters."""
    text = printable(name)
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3 - 1) :]}"


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is in DejaVu Sans, which is wider than the sans-serif fonts of browsers."""
    # it has no East Asian letters and emoji, whose width is about that of a W
    known = "".join("W" if unicodedata.east_asian_width(letter) in "WF" else letter for letter in text)
    properties = FontProperties(size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(known, properties, ismath=False)[0])  # type: ignore[no-untyped-call]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart between `low` and `high`, as near as possible to those wanted (least squares).

    With q_i = p_i - i gap, positions p in the order of those wanted are `gap` apart if q does not decrease: isotonic
    regression of `wanted_i - i gap`.
    """
    from scipy.optimize import isotonic_regression  # takes a while to import

    if not len(wanted):
        return []
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    positions = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.empty(len(wanted))
    placed[order] = positions.clip(low, max(low, high - steps[-1])) + steps
    return [float(position) for position in placed]


def place_at_points(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    hidden: Boxes,
    crossed: Boxes,
    area: tuple[float, float, float, float],
) -> list[Place | None]:
    """Place a label next to each point, in the given order; None where there is no room for one.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        hidden: boxes that no label may cover, those of the points included.
        crossed: boxes that a label had better not cover, such as those of error bars and lines.
        area: left, bottom, right and top of what labels may use.
    """
    places: list[Place | None] = []
    sides = np.array([(x, y, distance) for distance in _DISTANCES for x, y in _SIDES])
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        middles = np.stack(
            [x + sides[:, 0] * (width / 2 + sides[:, 2]), y + sides[:, 1] * (height / 2 + sides[:, 2])], axis=1
        )
        half = np.array([width / 2, height / 2])
        boxes = np.concatenate([middles - half, middles + half], axis=1)
        inside = (boxes[:, :2] >= area[:2]).all(axis=1) & (boxes[:, 2:] <= area[2:]).all(axis=1)
        free = inside & ~_overlap(boxes, hidden).any(axis=1)
        if not free.any():
            places.append(None)
            continue
        cost = sides[:, 2] + _CROSSED * _overlap(boxes, crossed).sum(axis=1)
        best = int(np.where(free, cost, np.inf).argmin())
        left, bottom, right, top = boxes[best].tolist()
        near = (min(max(x, left), right), min(max(y, bottom), top))
        places.append(Place(left, (bottom + top) / 2, near, math.dist((x, y), near)))
        hidden = np.concatenate([hidden, boxes[best][None]])
        crossed = np.concatenate([crossed, along((x, y), near)])
    return places


def along(start: tuple[float, float], end: tuple[float, float], thickness: float = 2.0) -> Boxes:
    """Small boxes that cover a line."""
    steps = np.linspace(0, 1, 2 + int(math.dist(start, end) / 6))[:, None]
    middles = np.array(start) + steps * (np.array(end) - np.array(start))
    return np.concatenate([middles - thickness / 2, middles + thickness / 2], axis=1)


def _overlap(boxes: Boxes, others: Boxes) -> NDArray[np.bool_]:
    """`[box, other]`: whether they share area."""
    one, other = boxes[:, None], others[None]
    return ((one[..., :2] < other[..., 2:]) & (other[..., :2] < one[..., 2:])).all(axis=-1)
