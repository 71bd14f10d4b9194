"""Predictions of an adapted model on image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nola_vision.data.sources import FileSource
from nola_vision.data.transforms import eval_transform
from nola_vision.model import AdaptedModel


@torch.inference_mode()
def predict(model: AdaptedModel, paths: Sequence[Path], batch_size: int = 64) -> Iterator[tuple[Path, str, float]]:
    """Yields (path, most probable class, its probability) for each image.

    Raises:
        NolaVisionError: an image cannot be decoded; its path is named.
    """
    model.eval()
    transform = eval_transform(model.card.input)
    images = FileSource(paths, [0] * len(paths), ())
    device = next(model.stack.parameters()).device
    for first in range(0, len(paths), batch_size):
        batch = [transform(images.image(i)) for i in range(first, min(first + batch_size, len(paths)))]
        probabilities = model(torch.stack(batch).to(device)).float().softmax(dim=1)
        best, index = probabilities.max(dim=1)
        for offset, (p, i) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            yield paths[first + offset], model.card.class_names[i], p
