"""The colours of the charts, and how each entry of a cell is drawn in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nola_vision.reports.charts.labels import short_names
from nola_vision.reports.entries import Summary, kind, of_method, subject

# The subject of a cell has the first colour; the contrast of text in any of them on PAPER is at least 4.5
PALETTE = (
    "#0072b2", "#b84a00", "#007a5a", "#8f4b8f", "#8a5a00", "#c2285c", "#0a7c91", "#5f6b00",
    "#4a4fc4", "#a8249b", "#6e4a2f", "#b3261e",
)  # fmt: skip
INK, MUTED, GRID, PAPER = "#1f2328", "#595f69", "#e1e4e8", "#ffffff"  # text, axes, grid lines, background
# CSS variable that replaces each colour in an SVG; the colour is its fallback
CSS_COLOURS: Mapping[str, str] = {
    **{colour: f"--c{number}" for number, colour in enumerate(PALETTE)},
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
}
# Values of these variables in the dark theme
DARK_COLOURS: Mapping[str, str] = {
    "--c0": "#58b5f0",
    "--c1": "#ff9a57",
    "--c2": "#3fcf9d",
    "--c3": "#d79ad7",
    "--c4": "#dba945",
    "--c5": "#ff86a5",
    "--c6": "#4fc4d6",
    "--c7": "#b9c540",
    "--c8": "#a3a8ff",
    "--c9": "#f08be6",
    "--c10": "#cba582",
    "--c11": "#ff8a80",
    "--ink": "#e6e9ee",
    "--muted": "#a6aebb",
    "--grid": "#333a45",
    "--paper": "#14181f",
}
_MOST_CHARACTERS = 18  # of a label
_MARKERS = "os^DvPX*<>dp"  # as many as colours, for readers who cannot tell some of these apart
_DASHES = ("--", ":", "-.")


class Look(NamedTuple):
    """Label and style of an entry, the same in every chart of its cell."""

    name: str
    colour: str
    marker: str
    line: str
    strong: bool


def entry_looks(summaries: Sequence[Summary]) -> dict[str, Look]:
    """The look of each entry of a cell by its label, sorted by importance, the subject first.

    Methods that train have a colour and a marker; methods on frozen features, the baselines, are grey broken lines. The
    entries of a method at several byte budgets look the same.
    """
    first = subject(summaries)
    ranked = sorted(summaries, key=lambda item: (item is not first, -(item.mean or 0), item.label))
    names = short_names(list(dict.fromkeys(map(of_method, ranked))), _MOST_CHARACTERS)
    looks: dict[str, Look] = {}
    of_methods: dict[str, Look] = {}
    trained = frozen = 0
    for item in ranked:
        method = of_method(item)
        if method in of_methods:
            looks[item.label] = of_methods[method]
            continue
        if kind(item) == "frozen":
            look = Look(names[method], MUTED, "", _DASHES[frozen % len(_DASHES)], item is first)
            frozen += 1
        else:
            around = trained // len(PALETTE)  # repeats the colours with other markers
            marker = _MARKERS[(trained + around) % len(_MARKERS)]
            look = Look(names[method], PALETTE[trained % len(PALETTE)], marker, "-", item is first)
            trained += 1
        looks[item.label] = of_methods[method] = look
    return looks
