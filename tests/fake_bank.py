"""A bank without a backbone: its numbers depend on the image's mean and on the adapter's name."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.prediction import Prediction, top_classes
from nola_vision.serving.bank import BASE, AdapterInfo, UnknownAdapter

GOOD = b"adapter:"


def png(level: int, side: int = 8) -> bytes:
    """A grey image whose mean is `level / 255`."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def expected(name: str, level: int, top_k: int = 5) -> list[dict[str, Any]]:
    """The answer of an adapter to `png(level)`, computed with NumPy."""
    logits = _weights(name) * level / 255
    scores = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": f"{name}-{place}", "score": float(scores[place])} for place in best]


def _weights(name: str) -> np.ndarray:
    digest = hashlib.sha256(name.encode()).digest()
    return np.frombuffer(digest[: 9 if "many" in name else 3 + digest[-1] % 2], np.uint8) / 32.0


@dataclass(frozen=True)
class FakeAdapter:
    name: str
    content: bytes
    side: int = 8

    digest = property(lambda self: hashlib.sha256(self.content).hexdigest())
    method = "NOLA"
    class_names = property(
        lambda self: () if self.name == BASE else tuple(f"{self.name}-{n}" for n in range(len(_weights(self.name))))
    )
    bytes = property(lambda self: len(self.content))

    def transform(self, image: Any) -> torch.Tensor:
        assert image.mode == "RGB"
        small = np.asarray(image.resize((self.side, self.side)), np.float32) / 255
        return torch.from_numpy(small).permute(2, 0, 1)

    def predictions(self, logits: torch.Tensor, top_k: int) -> list[Prediction]:
        if not logits.isfinite().all():
            raise NolaVisionError(f"the logits of {self.name} are not finite")
        return top_classes(logits.softmax(0), self.class_names, top_k)


class FakeBank:
    """Files are good if they begin with `GOOD`; what follows may be `wide` (other image side), `nan` or `crash`."""

    backbone_tag = "fake.backbone"

    def __init__(self) -> None:
        self.paths: dict[str, tuple[Path, int]] = {}
        self.read: dict[str, FakeAdapter] = {}
        self.scans, self.batches, self.seconds, self.counts = 0, [], 0.0, (0, 0)
        self.open = threading.Event()
        self.open.set()

    def load_folder(self, folder: str | Path) -> list[str]:
        self.scans += 1
        try:
            found = {file.stem: (file, file.stat().st_mtime_ns) for file in Path(folder).iterdir()}
        except OSError as error:
            raise NolaVisionError(f"the folder {folder} cannot be read") from error
        found = {name: place for name, place in found.items() if place[0].suffix == ".safetensors"}
        self.read = {name: one for name, one in self.read.items() if found.get(name) == self.paths.get(name)}
        self.paths = found
        return sorted(found)

    def check(self, path: str | Path, shown: Path | None = None) -> None:
        if not Path(path).read_bytes().startswith(GOOD):
            raise NolaVisionError(f"{shown or Path(path).name} is damaged: get another file")

    def adapters(self) -> list[AdapterInfo]:
        return [self.info(name) for name in sorted(self.paths)]

    def info(self, name: str) -> AdapterInfo:
        if name not in self.paths:
            raise self._unknown(name)
        one = self.read.get(name)
        known = (None, None, None) if one is None else (one.digest, one.method, one.class_names)
        return AdapterInfo(name, self.paths[name][0].stat().st_size, 0, *known, None)

    def loaded(self, name: str) -> FakeAdapter | None:
        return FakeAdapter(BASE, b"") if name == BASE else self.read.get(name)

    def adapter(self, name: str) -> FakeAdapter:
        if (known := self.loaded(name)) is not None:
            return known
        if name not in self.paths:
            raise self._unknown(name)
        self.check(self.paths[name][0])
        content = self.paths[name][0].read_bytes()
        self.read[name] = FakeAdapter(name, content, 12 if b"wide" in content else 8)
        return self.read[name]

    def _unknown(self, name: str) -> UnknownAdapter:
        return UnknownAdapter(name, [*self.paths])

    def logits(self, images: torch.Tensor, adapters: Sequence[FakeAdapter]) -> list[torch.Tensor]:
        self.open.wait()
        time.sleep(self.seconds)
        self.batches.append([adapter.name for adapter in adapters])
        if any(b"crash" in adapter.content for adapter in adapters):
            raise RuntimeError("a secret of the forward pass")
        means = images.double().mean(dim=(1, 2, 3))
        return [
            torch.tensor([mean, 2 * mean]).float()
            if adapter.name == BASE
            else torch.from_numpy(_weights(adapter.name) * float("nan" if b"nan" in adapter.content else mean))
            for mean, adapter in zip(means.tolist(), adapters, strict=True)
        ]

    def cache_counts(self) -> tuple[int, int]:
        return self.counts
