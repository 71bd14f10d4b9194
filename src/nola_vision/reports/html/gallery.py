"""The gallery of misclassified images on the report page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from nola_vision.common.text import plural, printable
from nola_vision.reports.entry_predictions import EntryPredictions, Mistake, mistakes
from nola_vision.reports.formatting import short_printable

MOST_IMAGE_BYTES = 2**21  # of all images on a page, as text
_MOST_PHOTOS = 24  # per cell
_MOST_RUNS_WITH_PHOTOS = 4  # whose thumbnails are read on a page of one cell
_TINY = 48  # pixels of an image that is enlarged without smoothing


@dataclass(frozen=True)
class Photo:
    """A misclassified image."""

    source: str
    width: int
    height: int
    tiny: bool
    name: str
    true: str
    predicted: str
    probability: str
    runs: str


@dataclass(frozen=True)
class GalleryView:
    """Misclassified images, the highest probability first."""

    note: str
    photos: Sequence[Photo]


def gallery_view(own: EntryPredictions, most_bytes: int, problems: list[str]) -> GalleryView | None:
    """The misclassified images with the highest probabilities, each once; None if there are no thumbnails."""
    # decoding is slow: 24 images per run; the first run alone fills a gallery
    shown = own.first(max(1, _MOST_RUNS_WITH_PHOTOS * most_bytes // MOST_IMAGE_BYTES))
    photos: list[Photo] = []
    for mistake in mistakes(shown, problems):
        photo = _photo(mistake, own)
        most_bytes -= len(photo.source)
        if len(photos) == _MOST_PHOTOS or most_bytes < 0:
            break
        photos.append(photo)
    if not photos:
        return None
    wrong = shown.misclassified
    which = "All" if len(photos) == wrong else f"{len(photos)} of the"
    label = short_printable(own.label)
    of_runs = "" if own.summary.completed == 1 else f" in {plural('run', len(shown.runs))} of {label}"
    probabilities = "calibrated" if shown.calibrated else "not calibrated"
    return GalleryView(
        f"{which} {plural('image', wrong)} that {'was' if wrong == 1 else 'were'} misclassified{of_runs}, those "
        f"predicted with the highest probability first. Probabilities are {probabilities}.",
        photos,
    )


def _photo(mistake: Mistake, own: EntryPredictions) -> Photo:
    thumbnail = mistake.thumbnail
    wrong, tested = own.times_wrong(thumbnail.index)
    return Photo(
        source=f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}",
        width=thumbnail.width,
        height=thumbnail.height,
        tiny=max(thumbnail.width, thumbnail.height) < _TINY,
        name=printable(thumbnail.name),
        true=short_printable(own.class_names[mistake.true]),
        predicted=short_printable(own.class_names[mistake.predicted]),
        probability=f"{100 * mistake.probability:.0f} %",
        runs=f"misclassified in {wrong} of {plural('run', tested)}" if len(own.runs) > 1 else "",
    )
