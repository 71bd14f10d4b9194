"""Predictions of an adapted model on image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nola_vision.data.datasets import image_files
from nola_vision.data.sources import FileSource
from nola_vision.data.transforms import eval_transform
from nola_vision.errors import NolaVisionError
from nola_vision.model import AdaptedModel


def find_images(places: Sequence[str]) -> list[Path]:
    """The image files that are named or lie beneath folders that are named, in the order given.

    Raises:
        NolaVisionError: a name is neither file nor folder, or a folder has no images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise NolaVisionError(f"{place} does not exist: name image files, or folders of them")
        found += image_files(place) if place.is_dir() else [place]
    return found


@torch.inference_mode()
def predict(
    model: AdaptedModel, paths: Sequence[Path], batch_size: int = 64, unreadable: list[NolaVisionError] | None = None
) -> Iterator[tuple[Path, str, float]]:
    """Yields (path, most probable class, its probability) for each image.

    Args:
        model: an adapted model.
        paths: of the images.
        batch_size: images at a time.
        unreadable: collects the errors of images that cannot be decoded; the others are predicted.

    Raises:
        NolaVisionError: an image cannot be decoded, and `unreadable` is not given; its path is named.
    """
    model.eval()
    transform = eval_transform(model.card.input)
    images = FileSource(paths, [0] * len(paths), ())
    device = next(model.stack.parameters()).device
    for first in range(0, len(paths), batch_size):
        batch: list[tuple[Path, torch.Tensor]] = []
        for place, path in enumerate(paths[first : first + batch_size], first):
            try:
                batch.append((path, transform(images.image(place))))
            except NolaVisionError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
        if batch:
            probabilities = model(torch.stack([image for _, image in batch]).to(device)).float().softmax(dim=1)
            if not probabilities.isfinite().all():
                raise NolaVisionError(
                    f"the adapter's logits are not finite for {batch[0][0]} or an image after it: train it again with "
                    "a smaller learning rate or scale"
                )
            best, index = probabilities.max(dim=1)
            for (path, _), p, i in zip(batch, best.tolist(), index.tolist(), strict=True):
                yield path, model.card.class_names[i], p
