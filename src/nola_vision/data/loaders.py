"""Images as batches: a subset with its transform, the loader, and the order of each epoch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import keyed_hashes, sha256
from nola_vision.common.progress import count_aside
from nola_vision.common.stopwatch import timed
from nola_vision.data.duplicates import digests
from nola_vision.data.sampling import Indices
from nola_vision.data.sources import ArraySource, ImageSource
from nola_vision.images.transforms import Transform

Kept = torch.Tensor | bytes | None  # uint8 pixels [3, h, w]; an image file's content; or not kept


class ImageSubset(Dataset[tuple[torch.Tensor, int]]):
    """Some images of a source, decoded and prepared once if kept, and transformed at each access.

    An index is a position, or (position, seed): the seed of the transform's random numbers, by default the position.
    Items are (float32 `[3, size, size]`, class index).

    Args:
        source: where the images come from.
        indices: which ones.
        prepare: from a PIL image to a uint8 tensor `[3, h, w]`; the same at each access, so its result can be kept.
        transform: from that tensor to a float32 tensor.
        kept: the images by position, as far as they are kept in memory: prepared, or as the contents of their files.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Indices,
        prepare: Transform,
        transform: Transform,
        kept: list[Kept] | None = None,
    ) -> None:
        self._source, self._indices, self._prepare, self._transform = source, indices, prepare, transform
        self._kept = [] if kept is None else kept

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """`[n]` class indices."""
        return self._source.labels[self._indices]

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Identifies these images while their source is open, without keeping the source in memory."""
        return weakref.ref(self._source), self._indices.tobytes()

    def contents(self) -> list[str]:
        """A text per image, which only images of equal content share: SHA-256 of its file, or its size and SHA-256 of
        its pixels. A file on disk is read again only if its size, times or inode changed.
        """
        source, indices = self._source, self._indices.tolist()
        if isinstance(source, ArraySource):
            images = map(source.image, indices)
            return [f"{image.width} x {image.height}: {sha256(image.tobytes())}" for image in images]
        return digests(source, self._indices)

    def read_as(self, contents: Sequence[str]) -> bool:
        """Whether the images that this process has read, and may have kept, had the given `contents`."""
        read = self._source.first_read
        return all(
            read.get(index, known) == known for index, known in zip(self._indices.tolist(), contents, strict=True)
        )

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, seed = key if isinstance(key, tuple) else (key, key)
        index = int(self._indices[position])
        kept = self._kept[position] if position < len(self._kept) else None
        pixels = kept if isinstance(kept, torch.Tensor) else self._prepare(self._source.image(index, kept))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set the GPUs' generators too
            return self._transform(pixels), int(self._source.labels[index])

    @timed("images")
    def __getitems__(self, keys: Sequence[Any]) -> list[tuple[torch.Tensor, int] | NolaVisionError]:
        """The items of one batch. If an image cannot be read, the error is the only item: an error raised in a worker
        process arrives as the text of a traceback.
        """
        try:
            return [self[key] for key in keys]
        except NolaVisionError as error:
            return [error]

    @property
    def not_prepared(self) -> Indices:
        """The images that are not kept as pixels, and so are decoded at each access."""
        positions = np.arange(len(self))
        return self._indices[[not isinstance(image, torch.Tensor) for image in self.kept(positions)]]

    def kept(self, positions: Indices) -> list[Kept]:
        """What is kept at some positions."""
        return [self._kept[position] if position < len(self._kept) else None for position in positions]

    @timed("images")
    def keep(self, limit_bytes: int) -> list[Kept]:
        """Keeps images in memory, in their order: as many as fit into the limit prepared, then the contents of files,
        as many as fit into the same limit again.

        Args:
            limit_bytes: of the pixels, and separately of the files' contents.
        """
        used, count = 0, count_aside("decoding", "images")
        for position in range(len(self._kept), len(self)):
            # a crop is a view of the whole image, which it would keep in memory
            pixels = self._prepare(self._source.image(int(self._indices[position]))).clone()
            used += pixels.numel()
            if used > limit_bytes:
                break
            self._kept.append(pixels)
            count.show(position + 1, len(self))
        used = 0
        for position in range(len(self._kept), len(self)):
            content = self._source.encoded(int(self._indices[position]))
            used += len(content or b"")
            if content is None or used > limit_bytes:  # an image that is not in a file is in memory anyway
                break
            self._kept.append(content)
        return self._kept


def trim(kept: list[Kept], limit_bytes: int) -> None:
    """Removes images from the end of what `ImageSubset.keep` has kept, until the rest is within its limit."""
    pixels = files = 0
    for position, image in enumerate(kept):
        pixels += image.numel() if isinstance(image, torch.Tensor) else 0
        files += len(image) if isinstance(image, bytes) else 0
        if max(pixels, files) > limit_bytes:
            del kept[position:]
            return


def collate(items: list[Any]) -> Any:
    """A batch, or the error that `ImageSubset.__getitems__` gives instead of one."""
    return items[0] if isinstance(items[0], NolaVisionError) else default_collate(items)


def unchanged(batch: Any) -> Any:
    """For data sets whose items are batches already."""
    return batch


class Loader(DataLoader[Any]):
    """A DataLoader of an `ImageSubset` that raises a worker's error as that error."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, NolaVisionError):
                raise batch
            yield batch


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (position, seed) pairs in an order that depends on (`run_seed`, epoch) only; Lightning sets the epoch.

    Several processes take turns along that order, so that together they see the batch that one process would see. If
    the images do not divide evenly, the first ones of the order are seen twice.

    Args:
        length: number of images.
        run_seed: which orders.
        processes: how many train together.
        rank: number of this process.
    """

    def __init__(self, length: int, run_seed: int, processes: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas=processes, rank=rank)  # type: ignore[arg-type]
        self._run_seed = run_seed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        key, length = (self._run_seed, self.epoch), len(self.dataset)  # type: ignore[arg-type]
        order = np.argsort(keyed_hashes(length, "shuffle", *key), kind="stable")
        seeds = keyed_hashes(length, "augment", *key) >> np.uint64(1)  # by place; torch takes 63 bits
        seeded = zip(order.tolist(), seeds.tolist(), strict=True)
        padded = itertools.islice(itertools.cycle(seeded), self.total_size)
        return itertools.islice(padded, self.rank, None, self.num_replicas)
