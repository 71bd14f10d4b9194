"""Prediction: images in any form to probabilities, for `AdaptedModel.predict` and `nola-vision predict`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.common.text import printable
from nola_vision.common.validation import quoted
from nola_vision.evaluation.calibration import check_temperature
from nola_vision.images.decoding import MOST_BYTES, decode_image, decoding_error, to_rgb
from nola_vision.images.transforms import Transform


class Prediction(NamedTuple):
    """A class and its probability from 0 to 1."""

    label: str
    probability: float


def load_image(image: Any, position: int) -> Image.Image:
    """An image as `AdaptedModel.predict` takes it, as an upright PIL image in mode RGB.

    Args:
        image: a path, PIL image, array or tensor.
        position: its position among all images; used in messages if there is no path.

    Raises:
        NolaVisionError: it is of another type, or cannot be read.
    """
    try:
        return to_rgb(_decode(image))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        is_path = isinstance(image, str | os.PathLike)
        raise decoding_error(printable(str(image)) if is_path else f"number {position}", error) from error


def _decode(image: Any) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if os.path.isdir(path):  # false, not an error, for a name that no file can have
            raise NolaVisionError("it is a folder: give its files, such as list(Path(folder).glob('*.jpg'))")
        return decode_image(read_file(path, MOST_BYTES))
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    if isinstance(image, Tensor):
        image = _array(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise NolaVisionError(f"{quoted(image)} is not a path, a PIL image, an array or a tensor")


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor `[h, w]` or `[1 or 3, h, w]` as an array `[h, w]` or `[h, w, 1 or 3]` of uint8."""
    if tensor.dim() not in (2, 3) or (tensor.dim() == 3 and tensor.shape[0] not in (1, 3)):
        raise NolaVisionError(
            f"a tensor of shape {list(tensor.shape)}: give [height, width] or [1 or 3, height, width]"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # not a number fails too
            raise NolaVisionError(
                "its floats are not between 0 and 1: divide them by 255, or give uint8; for the output of `transform`, "
                "call model(batch)"
            )
        tensor = (tensor * 255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise NolaVisionError(f"a tensor of {tensor.dtype}: give uint8, or floats from 0 to 1")
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array if array.ndim == 2 else array.transpose(1, 2, 0)


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """An array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]` of uint8, or `[h, w]` of uint16, as an image."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise NolaVisionError(
            f"an array of shape {list(array.shape)}: give [height, width] or [height, width, 1, 3 or 4]; channels "
            "first are for tensors"
        )
    if not (array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2)):
        raise NolaVisionError(f"an array of {array.dtype}: give uint8 from 0 to 255")
    return Image.fromarray(np.ascontiguousarray(array))


def one_or_several(images: Any) -> tuple[bool, Iterable[Any]]:
    """Whether an argument is a single image, and the images.

    Raises:
        NolaVisionError: it is neither an image nor an iterable.
    """
    if isinstance(images, np.ndarray | Tensor) and images.ndim > 1:
        return (True, [images]) if images.ndim < 4 else (False, images)
    if isinstance(images, str | os.PathLike | Image.Image):
        return True, [images]
    if isinstance(images, bytes | Mapping) or not isinstance(images, Iterable) or getattr(images, "ndim", 1) == 0:
        raise NolaVisionError(
            f"{quoted(images)} is not an image: give paths, PIL images, NumPy arrays or tensors, one or a list of them"
        )
    return False, images


def batches(
    images: Iterable[Any], transform: Transform, batch_size: int, unreadable: list[NolaVisionError] | None = None
) -> Iterator[tuple[list[Any], Tensor]]:
    """Yields images and their transformed tensors, `[batch, 3, size, size]` on the CPU.

    Args:
        images: the images, see `load_image`.
        transform: the model's evaluation transform.
        batch_size: images per batch.
        unreadable: collects the errors of images that cannot be read; these images are skipped.

    Raises:
        NolaVisionError: an image cannot be read, and `unreadable` is not given.
    """
    remaining, first = iter(images), 0
    while chunk := list(islice(remaining, batch_size)):
        kept, tensors = [], []
        for position, image in enumerate(chunk, first):
            try:
                tensors.append(transform(load_image(image, position)))
                kept.append(image)
            except NolaVisionError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
        if tensors:
            yield kept, torch.stack(tensors)
        first += len(chunk)


def to_device(model: nn.Module, device: str) -> None:
    """Moves a model.

    Raises:
        NolaVisionError: this machine or this PyTorch does not have the device.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise NolaVisionError(f"the device {device} cannot be used here ({reason}): leave --device out") from error


@torch.no_grad()
def run_in_eval_mode(model: nn.Module, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Applies a function of the model, such as the model or its `features`, to a batch on the model's device.

    The model is in eval mode meanwhile, and no gradients are recorded. Several threads may do so at once.
    """
    with _evaluation(model):
        return function(batch.to(next(model.parameters()).device))


def probabilities(model: nn.Module, batch: Tensor, temperature: float) -> Tensor:
    """The calibrated probabilities `[batch, classes]` of a batch, float32 on the CPU: softmax(logits / temperature).

    Raises:
        NolaVisionError: a logit is not finite, or the temperature is outside the range that a file can state.
    """
    temperature = check_temperature(temperature)
    found = (run_in_eval_mode(model, model, batch).float() / temperature).softmax(dim=1).cpu()
    if not found.isfinite().all():
        raise NolaVisionError(
            "the adapter's logits are not finite: train it again with a smaller learning rate or scale"
        )
    return found


def top_classes(probabilities: Tensor, class_names: Sequence[str], top_k: int) -> list[Prediction]:
    """The `top_k` most probable classes, given `[classes]` probabilities; ties keep the order of the classes."""
    values, places = probabilities.sort(descending=True, stable=True)
    best = zip(values[:top_k].tolist(), places[:top_k].tolist(), strict=True)
    return [Prediction(class_names[place], value) for value, place in best]


_lock = threading.Lock()
_evaluating: WeakKeyDictionary[nn.Module, tuple[list[None], list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode; the last of several threads to leave restores training mode where it was on."""
    with _lock:
        if model not in _evaluating:
            _evaluating[model] = ([], [module for module in model.modules() if module.training])
        inside, trained = _evaluating[model]
        inside.append(None)
        for module in trained:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            inside.pop()
            if not inside:
                del _evaluating[model]
                for module in trained:
                    module.training = True
