"""One adapter of a bank: its file, checked and kept packed in memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from nola_vision.adapters.serialization import AdapterFile, adapter_from_bytes
from nola_vision.adapters.stored import Stored
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_adapter_file
from nola_vision.common.hashing import sha256
from nola_vision.common.local_files import read_file
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import Transform, eval_transform
from nola_vision.models.prediction import Prediction, top_classes
from nola_vision.serving.layout import Layout

BASE = "__base__"  # the name under which the backbone alone answers, with its features
MOST_BYTES = 256 * 2**20  # of a file that a bank reads


class UnreadableAdapter(NolaVisionError):
    """A file that could not be read, whatever it contains. Another try may succeed."""


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

    @property
    def memory(self) -> int:
        """Bytes of its tensors and class names."""
        tensors = sum(one.data.nbytes for one in self.stored.values())
        return tensors + sum(map(sys.getsizeof, self.class_names))

    def transform(self, image: Any) -> Tensor:
        """A decoded RGB image as the float32 tensor `[3, size, size]` that the backbone takes."""
        return transform_for(self.input)(image)

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
def transform_for(config: InputConfig) -> Transform:
    """From a decoded image to the backbone's input.

    Raises:
        NolaVisionError: as `eval_transform`.
    """
    return eval_transform(config)


def read_packed(path: Path, shown: Path) -> tuple[AdapterFile, str, int]:
    """An adapter file, its digest and its size, in memory: what happens to the file later has no effect.

    Memory that is mapped to a file would end the process when somebody truncates it. No tensor is decoded.

    Args:
        path: of the file.
        shown: what messages call it.

    Raises:
        UnreadableAdapter: the file does not exist, is larger than a bank takes, or reading it failed.
        NolaVisionError: the content is not that of an adapter file, as `adapter_from_bytes` raises it.
    """
    try:
        need_adapter_file(path, shown)
    except NolaVisionError as error:
        raise UnreadableAdapter(str(error)) from error
    try:
        content = read_file(path, MOST_BYTES)
    except OSError as error:
        raise UnreadableAdapter(f"the adapter file {shown} cannot be read ({error.strerror}): check it") from error
    return adapter_from_bytes(content, shown), sha256(content), len(content)
