"""What the service needs of a bank of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nola_vision.models.prediction import Prediction
from nola_vision.serving.bank import AdapterInfo


class Adapter(Protocol):
    """An adapter that was read, as `ServedAdapter` is."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def transform(self, image: Any) -> Tensor: ...

    def predictions(self, logits: Tensor, top_k: int) -> list[Prediction]: ...


class Bank(Protocol):
    """Adapters by their names, as `AdapterBank` has them; its docstrings describe the methods.

    A method that raises `NolaVisionError` for an adapter's file names the file without its folder.
    """

    @property
    def backbone_tag(self) -> str: ...

    def load_folder(self, folder: str | Path) -> list[str]: ...

    def adapters(self) -> list[AdapterInfo]: ...

    def info(self, name: str) -> AdapterInfo: ...

    def loaded(self, name: str) -> Adapter | None: ...

    def adapter(self, name: str) -> Adapter: ...

    def check(self, path: str | Path, shown: Path | None = None) -> None: ...

    def logits(self, images: Tensor, adapters: Sequence[Any]) -> list[Tensor]: ...

    def cache_counts(self) -> tuple[int, int]: ...
