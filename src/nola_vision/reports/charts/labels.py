"""Placement of a chart's labels without overlap; all lengths in points.

The libraries for this (adjustText, textalloc) take 0.1 s or more per chart and do not support labels of lines. Here
each label in turn takes the best free place.
"""

from __future__ import annotations

import itertools
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from nola_vision.common.text import printable

Boxes = NDArray[np.float64]  # [n, 4]: left, bottom, right, top
_DISTANCES = (7.0, 11.0, 17.0, 26.0, 37.0, 50.0, 66.0, 85.0, 110.0, 140.0)  # between a label and its point
_SIDES = [side for side in itertools.product((1.0, 0.5, 0.0, -0.5, -1.0), repeat=2) if 1 in map(abs, side)]
_SIDES.sort(key=lambda side: (side[0] != 1, abs(side[1]), side))  # to the right if possible
_CROSSED = 15.0  # cost of a line under a label, as a distance


class Place(NamedTuple):
    """A label's left edge, vertical middle, and the point of its outline that is nearest to what it labels."""

    left: float
    middle: float
    near: tuple[float, float]
    distance: float


def short_names(names: Sequence[str], most: int) -> dict[str, str]:
    """Names as distinct printable labels of about `most` characters.

    A single long name loses its middle. Several with a common beginning, such as one method with several settings, keep
    the beginning and the part from the first word in which they differ.
    """
    same_start: dict[str, list[str]] = defaultdict(list)
    for text in {printable(name) for name in names if len(printable(name)) > most}:
        same_start[text[: most // 3]].append(text)
    labels: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        text = short_name(name, most)
        if text != (whole := printable(name)) and len(group := same_start[whole[: most // 3]]) > 1:
            common = os.path.commonprefix(group)
            word = max(common.rfind(separator) for separator in " (,/_") + 1
            start = f"{whole[: most // 3]}…" if word > most // 3 + 1 else whole[:word]
            rest = whole[word : word + most - len(start)]
            text = start + (rest if whole.endswith(rest) else f"{rest[:-1]}…")
        label, number = text, 1
        while label in taken:
            number += 1
            label = f"{text} {number}"
        taken.add(label)
        labels[name] = label
    return labels


def short_name(name: str, most: int) -> str:
    """A name as a printable label, without its middle if it is longer than `most` characters."""
    text = printable(name)
    wide = sum(map(_is_wide, text))
    most = most * len(text) // (len(text) + wide) if wide else most
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3 - 1) :]}"


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width of a text in DejaVu Sans, which is wider than the sans-serif fonts of browsers."""
    # the font lacks East Asian letters and emoji, which are about as wide as a W
    known = "".join("W" if _is_wide(letter) else letter for letter in text)
    properties = FontProperties(size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(known, properties, ismath=False)[0])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart between `low` and `high`, as close as possible to `wanted` (least squares).

    With q_i = p_i - i gap, sorted positions p are at least `gap` apart if q does not decrease: isotonic
    regression of `wanted_i - i gap`. Its i-th value is the max over j <= i of the min over k >= i of the mean of those
    from j to k (Robertson, Wright and Dykstra 1988, theorem 1.4.4). Importing scipy.optimize for it would take 0.5 s.
    """
    if not len(wanted):
        return []
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(wanted, dtype=float)[order] - steps)])
    places = np.arange(len(wanted))
    counts = places - places[:, None] + 1
    means = (sums[1:] - sums[:-1, None]) / counts.clip(1)  # `[j, k]`; unused for k < j
    least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
    positions = np.maximum.accumulate(least, axis=0).diagonal()
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
    """Places a label next to each point, in the given order; None if there is no room.

    Args:
        points: the labelled points.
        sizes: width and height of each label.
        hidden: boxes that labels must not cover, including those of the points.
        crossed: boxes that labels should not cover, such as those of error bars and lines.
        area: left, bottom, right and top of the area for labels.
    """
    places: list[Place | None] = []
    labels = np.empty((0, 4))
    sides = np.array([(x, y, distance) for distance in _DISTANCES for x, y in _SIDES])
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        half = np.array([width / 2, height / 2])
        middles = np.array([x, y]) + sides[:, :2] * (half + sides[:, 2:])
        boxes = np.concatenate([middles - half, middles + half], axis=1)
        inside = (boxes[:, :2] >= area[:2]).all(axis=1) & (boxes[:, 2:] <= area[2:]).all(axis=1)
        free = inside & ~_overlap(boxes, np.concatenate([hidden, labels])).any(axis=1)
        cost = np.where(free, sides[:, 2] + _CROSSED * _overlap(boxes, crossed).sum(axis=1), np.inf)
        place = None
        for choice in np.argsort(cost, kind="stable")[: free.sum()]:
            left, bottom, right, top = boxes[choice].tolist()
            near = (min(max(x, left), right), min(max(y, bottom), top))
            joint = along((x, y), near)
            if not _overlap(joint, labels).any():
                place = Place(left, (bottom + top) / 2, near, math.dist((x, y), near))
                labels = np.concatenate([labels, boxes[choice][None]])
                crossed = np.concatenate([crossed, joint])
                break
        places.append(place)
    return places


def along(start: tuple[float, float], end: tuple[float, float], thickness: float = 2.0) -> Boxes:
    """Small boxes that cover a line."""
    steps = np.linspace(0, 1, 2 + int(math.dist(start, end) / 6))[:, None]
    middles = np.array(start) + steps * (np.array(end) - np.array(start))
    return np.concatenate([middles - thickness / 2, middles + thickness / 2], axis=1)


def _overlap(boxes: Boxes, others: Boxes) -> NDArray[np.bool_]:
    """`[box, other]`: whether they overlap."""
    one, other = boxes[:, None], others[None]
    shared: NDArray[np.bool_] = np.logical_and(one[..., :2] < other[..., 2:], other[..., :2] < one[..., 2:])
    return shared[..., 0] & shared[..., 1]
