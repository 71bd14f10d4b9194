"""Thousands of adapters next to one frozen backbone; every image of a batch is answered by its own adapter."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import RACY_NS
from nola_vision.common.suggestions import close_names
from nola_vision.common.text import printable
from nola_vision.common.validation import check_counts, quoted
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.prediction import load_image, one_or_several
from nola_vision.serving.adapter import BASE, ServedAdapter, UnreadableAdapter
from nola_vision.serving.files import adapter_files, as_path, file_state, is_name
from nola_vision.serving.shared_backbone import SharedBackbone


class UnknownAdapter(NolaVisionError):
    """A name that no adapter has.

    Attributes:
        close: names that are similar.
    """

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.close = close_names(name, known)
        hint = f"did you mean {' or '.join(map(printable, self.close))}?" if self.close else "see adapters()"
        super().__init__(f"there is no adapter {quoted(name)}: {hint}")


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter without reading its file.

    Args:
        name: in the bank.
        bytes: of the file.
        uses: images that it answered.
        digest: SHA-256 of the file in hexadecimal digits; None before its first use.
        method: the class of its method; None before its first use.
        classes: their names; None while the adapter is not in memory.
        error: why its file cannot be used.
    """

    name: str
    bytes: int
    uses: int
    digest: str | None
    method: str | None
    classes: tuple[str, ...] | None
    error: str | None


@dataclass(eq=False)
class _Entry:
    """An adapter by its name: its file, and what was read of it. An adapter of a folder is kept in the cache by it."""

    path: Path
    size: int
    state: tuple[int, ...] | None = None  # of a file that `load_folder` found
    adapter: ServedAdapter | None = None  # of `load_adapter`
    digest: str | None = None
    method: str | None = None
    error: str | None = None
    unsettled: bool = False  # the file was read so soon after a change that another may not show in its times
    uses: int = 0


class AdapterBank:
    """Adapters of any number for one backbone, of several methods, ranks, bits, basis seeds and numbers of classes.

        bank = AdapterBank("vit_base_patch16_224.augreg2_in21k_ft_in1k")
        bank.load_folder("adapters/")
        bank.predict(["a.jpg", "b.jpg"], adapter_names=["birds", "flowers"])

    An adapter is in memory as its file has it: packed, a few kilobytes. A pass makes the low-rank factors of the
    distinct adapters of its batch, by one matrix product for each layout (adapters whose method, targets, number of
    coefficients and basis seed are the same). So the cost of a batch does not depend on how many adapters there are.
    `y = x W' + (x A) B` is computed for all samples together, each with its own A and B; smaller ranks are padded with
    zeros. Adapters whose change is not low-rank or not of a plain linear layer (convolutions, HashedNet, PRANC) are
    computed one after the other.

    Factors, bases and the adapters of a folder stay in memory within a number of bytes; those that were not used for
    the longest time go first, and are read or computed again at their next use.

    All methods may be called by several threads at a time.

    Args:
        backbone: timm's tag, or a `BackboneSpec` for a local file or another image size.
        device: where to compute, such as `cpu` or `cuda`.
        cache_mib: MiB of memory for what was read from a folder or computed from files. It limits how many adapters a
            pass computes with at once, too.

    Attributes:
        backbone_tag: timm's.

    Raises:
        NolaVisionError: the backbone does not exist or is not pretrained, or the device cannot be used.
    """

    def __init__(self, backbone: str | BackboneSpec, device: str = "cpu", cache_mib: float = 512) -> None:
        self._shared = SharedBackbone(backbone, device, cache_mib)
        self.backbone_tag = self._shared.spec.tag
        self._entries: dict[str, _Entry] = {}
        self._lock, self._reading, self._scanning = threading.Lock(), threading.Lock(), threading.Lock()

    def load_adapter(self, path: str | Path, adapter_name: str | None = None) -> str:
        """Reads and checks an adapter file and gives it a name, which it takes from another adapter that has it.

        The adapter stays in memory, and its file is not read again.

        Args:
            path: of the file.
            adapter_name: its name; the file's stem if not given.

        Returns:
            The name.

        Raises:
            NolaVisionError: the file is damaged, does not belong to this backbone, changes more than chosen weights
                (Full-FT, PEFT, batch norms), or needs the float weights of a backbone in 8 bits (LoRA-XS, TinyLoRA); or
                the name is empty, not printable or `__base__`.
        """
        path = as_path(path, "path")
        name = path.stem if adapter_name is None else adapter_name
        if not is_name(name):
            raise NolaVisionError(f"the adapter's name is {quoted(name)}: use printable characters, and not {BASE}")
        adapter = self._shared.read(path, name)
        with self._lock:
            self._entries[name] = _Entry(
                path, adapter.bytes, adapter=adapter, digest=adapter.digest, method=adapter.method
            )
        return name

    def load_folder(self, folder: str | Path) -> list[str]:
        """Gives a name to each `.safetensors` file of a folder, its stem; a file is read when it is first used.

        Called again, it finds new and changed files, and forgets those that are gone. A name that is not printable, is
        `__base__` or begins with a dot is left out.

        Returns:
            The names of the folder's adapters, sorted.

        Raises:
            NolaVisionError: the folder cannot be read.
        """
        folder = as_path(folder, "folder")
        with self._scanning:  # an older list must not replace a newer one
            found = {name: (path, state) for name, path in adapter_files(folder).items() if (state := file_state(path))}
            with self._lock:
                for name, entry in list(self._entries.items()):
                    if entry.state is not None and entry.path.parent == folder and name not in found:
                        del self._entries[name]
                for name, (path, state) in found.items():
                    before = self._entries.get(name)
                    if before is None or before.path != path or before.state != state:
                        self._entries[name] = _Entry(path, state[0], state)
                    elif before.unsettled:  # is read again
                        self._entries[name] = dataclasses.replace(before, error=None, unsettled=False)
        return sorted(found)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; its file stays. Passes that are under way end with it.

        Raises:
            UnknownAdapter: there is none of this name.
        """
        self._entry(adapter_name)
        with self._lock:
            self._entries.pop(adapter_name, None)

    def _entry(self, name: str) -> _Entry:
        if not isinstance(name, str):
            raise NolaVisionError(f"the adapter's name is {quoted(name)}: give text")
        with self._lock:
            if (entry := self._entries.get(name)) is not None:
                return entry
            known = [*self._entries]
        raise UnknownAdapter(name, known)  # names are compared without the lock

    def adapters(self) -> list[AdapterInfo]:
        """All adapters, sorted by name; no file is read for it."""
        with self._lock:
            every = sorted(self._entries.items())
        return [self._info(name, entry) for name, entry in every]

    def loaded(self, name: str) -> ServedAdapter | None:
        """An adapter by its name if it is in memory; None if it is not, or if there is none."""
        if name == BASE:
            return self._shared.base
        with self._lock:
            entry = self._entries.get(name) if isinstance(name, str) else None
        return None if entry is None else self._in_memory(entry)

    def _in_memory(self, entry: _Entry) -> ServedAdapter | None:
        return entry.adapter or self._shared.cache.get(entry)

    def adapter(self, name: str) -> ServedAdapter:
        """An adapter by its name; its file is read if it is not in memory.

        Raises:
            UnknownAdapter: there is none of this name.
            UnreadableAdapter: its file could not be read; the next call tries it again.
            NolaVisionError: its file cannot be used, as for `load_adapter`.
        """
        if (known := self.loaded(name)) is not None:
            return known
        entry = self._entry(name)
        with self._reading:
            if (known := self._in_memory(entry)) is not None:  # another thread has read it
                return known
            if entry.error is not None:
                raise NolaVisionError(entry.error)
            unsettled = entry.state is not None and max(entry.state[1:3]) > time.time_ns() - RACY_NS
            try:
                # clients of a service see the message, and not the folder
                read = self._shared.read(entry.path, name, shown=Path(entry.path.name))
            except UnreadableAdapter:
                raise
            except NolaVisionError as error:
                entry.error, entry.unsettled = str(error), unsettled
                raise
            entry.digest, entry.method, entry.unsettled = read.digest, read.method, unsettled
            self._shared.cache.put(entry, read, read.memory, file=True)
        return read

    def info(self, name: str) -> AdapterInfo:
        """What `adapters` lists of one adapter.

        Raises:
            UnknownAdapter: there is none of this name.
        """
        return self._info(name, self._entry(name))

    def _info(self, name: str, entry: _Entry) -> AdapterInfo:
        adapter: ServedAdapter | None = entry.adapter or self._shared.cache.peek(entry)
        classes = None if adapter is None else adapter.class_names
        return AdapterInfo(name, entry.size, entry.uses, entry.digest, entry.method, classes, entry.error)

    def check(self, path: str | Path, shown: Path | None = None) -> None:
        """Raises what `load_adapter` raises, and keeps nothing. Messages call the file `shown`."""
        self._shared.read(as_path(path, "path"), "", shown)

    def cache_counts(self) -> tuple[int, int]:
        """How many adapters of all passes had their factors in the cache, and for how many these were made."""
        return self._shared.cache_counts()

    # --- answers -------------------------------------------------------------------------------------------------

    def logits(self, images: Tensor, adapters: Sequence[ServedAdapter]) -> list[Tensor]:
        """The logits of a batch, each image by its own adapter; the features for the base.

        Args:
            images: `[batch, 3, height, width]`, each as its adapter's `transform` gives it.
            adapters: one for each image, of this bank.

        Returns:
            For each image float32 `[classes]` on the CPU.

        Raises:
            NolaVisionError: the numbers of images and adapters differ.
        """
        found = self._shared.logits(images, adapters)
        with self._lock:
            for name, uses in Counter(adapter.name for adapter in adapters).items():
                if (entry := self._entries.get(name)) is not None:
                    entry.uses += uses
        return found

    def predict(
        self, images: Any, adapter_names: str | Sequence[str], top_k: int = 3, batch_size: int = 64
    ) -> list[Any]:
        """The most probable classes of each image, by the adapter that is named for it.

        Args:
            images: one image or several, as `AdaptedModel.predict` takes them.
            adapter_names: one name for each image, or one for all.
            top_k: how many classes for each image; all if there are fewer.
            batch_size: images at a time. Those of adapters with other image sizes are computed apart.

        Returns:
            For one image a list of `Prediction(label, probability)`, the most probable first, or the features
            `[features]` if the name is `__base__`; for several a list of those.

        Raises:
            UnknownAdapter: a name that no adapter has.
            NolaVisionError: a file that cannot be used, an image that cannot be read, a logit that is not finite, or
                another number of names than images.
        """
        check_counts(top_k=top_k, batch_size=batch_size)
        single, several = one_or_several(images)
        images = list(several)
        names = [adapter_names] * len(images) if isinstance(adapter_names, str) else _names(adapter_names)
        if len(names) != len(images):
            raise NolaVisionError(f"{len(names)} adapter names for {len(images)} images: give one for each image")
        adapters = {name: self.adapter(name) for name in dict.fromkeys(names)}
        answers: list[Any] = []
        for first in range(0, len(images), batch_size):
            chosen = [adapters[name] for name in names[first : first + batch_size]]
            inputs = [
                adapter.transform(load_image(image, first + position))
                for position, (image, adapter) in enumerate(
                    zip(images[first : first + batch_size], chosen, strict=True)
                )
            ]
            logits: dict[int, Tensor] = {}
            for side in dict.fromkeys(one.shape for one in inputs):
                places = [position for position, one in enumerate(inputs) if one.shape == side]
                batch = torch.stack([inputs[place] for place in places])
                logits |= zip(places, self.logits(batch, [chosen[place] for place in places]), strict=True)
            answers += [
                logits[place] if adapter.name == BASE else adapter.predictions(logits[place], top_k)
                for place, adapter in enumerate(chosen)
            ]
        return answers[0] if single else answers


def _names(names: Any) -> list[str]:
    found = list(names) if isinstance(names, Iterable) else []
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in found):
        raise NolaVisionError(f"adapter_names is {quoted(names)}: give one name as a string, or one for each image")
    return found
