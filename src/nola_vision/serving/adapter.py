"""One adapter of a bank: its file, checked and kept packed in memory."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from nola_vision.adapters.serialization import AdapterFile, open_adapter
from nola_vision.adapters.stored import Stored
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import why_not_a_file
from nola_vision.common.hashing import sha256
from nola_vision.common.local_files import read_file
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import Transform, eval_transform
from nola_vision.models.prediction import Prediction, top_classes
from nola_vision.serving.layout import Layout

BASE = "__base__"  # the name under which the backbone alone answers, with its features
MOST_BYTES = 256 * 2**20  # of a file that a bank reads


@dataclass(frozen=True, eq=False, slots=True)
class ServedAdapter:
    """An adapter that was read. It does not change, and stays usable after its name was deleted or given to another.

    Args:
        name: in the bank.
        digest: SHA-256 of the file in hexadecimal digits.
        bytes: of the file.
        method: the class of its method, such as `NOLA`.
        class_names: in the order of the logits; empty for the base.
        input: what images must look like.
        temperature: what divides the logits; 1 if it was not fitted.
        layout: what it shares with the adapters that it is computed with.
        run_seed: of an adapted head.
        stored: the tensors of the file as it has them, packed.
    """

    name: str
    digest: str
    bytes: int
    method: str
    class_names: tuple[str, ...]
    input: InputConfig
    temperature: float
    layout: Layout
    run_seed: int
    stored: Mapping[str, Stored]

    def transform(self, image: Any) -> Tensor:
        """A decoded RGB image as the float32 tensor `[3, size, size]` that the backbone takes."""
        return _transform(self.input)(image)

    def predictions(self, logits: Tensor, top_k: int) -> list[Prediction]:
        """The most probable classes of an image, from its logits `[classes]`: softmax(logits / temperature).

        Raises:
            NolaVisionError: a logit is not finite.
        """
        if not logits.isfinite().all():
            raise NolaVisionError(
                f"the logits of {self.name} are not finite: train it again with a smaller learning rate or scale"
            )
        return top_classes((logits / self.temperature).softmax(0), self.class_names, top_k)


@lru_cache(maxsize=64)
def _transform(config: InputConfig) -> Transform:
    return eval_transform(config)


def read_packed(path: Path, shown: Path) -> tuple[AdapterFile, str, int]:
    """An adapter file, its digest and its size, in memory: what happens to the file later has no effect.

    The copy is what is checked and used: memory that is mapped to a file ends the process when somebody truncates it.

    Args:
        path: of the file.
        shown: what messages call it.

    Raises:
        NolaVisionError: as `open_adapter`; or the file is larger than a bank takes.
    """
    if not os.path.isfile(path):
        raise NolaVisionError(
            f"the adapter file {shown} {why_not_a_file(path)}: give the path of a file that `fit` wrote"
        )
    try:
        content = read_file(path, MOST_BYTES)
    except OSError as error:
        raise NolaVisionError(f"the adapter file {shown} cannot be read ({error.strerror}): check it") from error
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter.safetensors"
        copy.write_bytes(content)
        file = open_adapter(copy, shown=shown)
        file.tensors()  # levels that do not exist, and numbers that are not finite, are refused here
        stored = {name: dataclasses.replace(one, data=one.data.clone()) for name, one in file.stored.items()}
    return dataclasses.replace(file, stored=stored), sha256(content), len(content)
