"""Stub of the bank's interface, until the bank is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.prediction import Prediction

BASE = "__base__"


class UnknownAdapter(NolaVisionError):
    close: list[str]


@dataclass(frozen=True)
class AdapterInfo:
    name: str
    bytes: int
    uses: int
    digest: str | None
    method: str | None
    classes: tuple[str, ...] | None
    error: str | None


class ServedAdapter:
    name: str
    digest: str | None
    method: str | None
    class_names: tuple[str, ...]
    bytes: int

    def transform(self, image: Image.Image) -> Tensor:
        raise NotImplementedError

    def predictions(self, logits: Tensor, top_k: int) -> list[Prediction]:
        raise NotImplementedError


class AdapterBank:
    backbone_tag: str

    def __init__(self, backbone: str | BackboneSpec, device: str = "cpu", cache_mib: float = 512) -> None:
        raise NotImplementedError

    def load_adapter(self, path: str | Path, adapter_name: str | None = None) -> str:
        raise NotImplementedError

    def load_folder(self, folder: str | Path) -> list[str]:
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        raise NotImplementedError

    def adapters(self) -> list[AdapterInfo]:
        raise NotImplementedError

    def adapter(self, name: str) -> ServedAdapter:
        raise NotImplementedError

    def logits(self, images: Tensor, adapters: Sequence[ServedAdapter]) -> list[Tensor]:
        raise NotImplementedError

    def info(self, name: str) -> AdapterInfo:
        raise NotImplementedError

    def check(self, path: str | Path) -> None:
        raise NotImplementedError

    def cache_counts(self) -> tuple[int, int]:
        raise NotImplementedError


def backbone_of(folder: Path, weights: str | None) -> BackboneSpec:
    raise NotImplementedError
