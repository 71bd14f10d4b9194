"""The LightningDataModule: a k-shot training set, its validation pool and the test set of one data set.

Which images are drawn depends on `split_seed`, in which order and with which augmentation on (`run_seed`, epoch,
position), and nothing on the global random state, which is neither read nor set. Test labels are used by the test stage
only; before training, test images are decoded to find damaged ones, and nothing else is done with them.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property, partial
from itertools import combinations
from typing import Any, Literal

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate
from torchvision.transforms.v2.functional import pil_to_tensor

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import keyed_hashes
from nola_vision.common.progress import count_aside
from nola_vision.common.text import printable
from nola_vision.data.datasets.base import Split
from nola_vision.data.datasets.image_folders import suffix_counts
from nola_vision.data.datasets.registry import get_dataset, open_split
from nola_vision.data.duplicates import digests, groups, in_both, under_two_labels
from nola_vision.data.folds import folds, hold_out, number_of_folds
from nola_vision.data.integrity import refuse_unreadable
from nola_vision.data.manifest import locate, read_manifest, refuse_other_settings
from nola_vision.data.sampling import (
    Indices,
    candidates,
    classes_without_pool,
    draw,
    evenly_spaced,
    validation_pool,
)
from nola_vision.data.sources import ImageSource
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import (
    Augmentation,
    Transform,
    check_augmentation,
    eval_transform,
    reduced,
    train_transform,
)
from nola_vision.models import backbones
from nola_vision.models.backbones import BackboneSpec

Kept = torch.Tensor | bytes | None  # uint8 pixels [3, h, w], `reduced`; an image file's content; or not kept

_log = logging.getLogger(__name__)
_told: set[tuple[str, str | None, str]] = set()  # the warnings that this process has logged


class ImageSubset(Dataset[tuple[torch.Tensor, int]]):
    """Some images of a source, decoded once if kept and transformed at each access.

    An item is asked for by its position, or by (position, seed): its transform then draws from that seed alone. Items
    are (float32 `[3, size, size]`, class index).

    Args:
        source: where the images come from.
        indices: which ones.
        transform: from a PIL image or a uint8 tensor `[3, h, w]` to a float32 tensor.
        kept: the images by position, as far as they are kept in memory: decoded, or as the content of their files.
    """

    def __init__(
        self, source: ImageSource, indices: Indices, transform: Transform, kept: list[Kept] | None = None
    ) -> None:
        self._source, self._indices, self._transform = source, indices, transform
        self._kept = [] if kept is None else kept

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """`[n]` class indices."""
        return self._source.labels[self._indices]

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Which images these are, as long as their source is open; it does not keep the source in memory."""
        return weakref.ref(self._source), self._indices.tobytes()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        position, seed = key if isinstance(key, tuple) else (key, key)
        index = int(self._indices[position])
        kept = self._kept[position] if position < len(self._kept) else None
        pixels = kept if isinstance(kept, torch.Tensor) else self._source.image(index, kept)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set the GPUs' generators too
            return self._transform(pixels), int(self._source.labels[index])

    def __getitems__(self, keys: Sequence[Any]) -> list[tuple[torch.Tensor, int] | NolaVisionError]:
        """The items of one batch. If an image cannot be read, the error is the only item: raised in a worker process it
        would arrive as the text of a traceback.
        """
        try:
            return [self[key] for key in keys]
        except NolaVisionError as error:
            return [error]

    def keep(self, limit_bytes: int, size: int) -> list[Kept]:
        """Keeps images from the first on: decoded as many as fit into the limit, and of those after them the files'
        contents, as many as fit into the same limit again.

        Args:
            limit_bytes: of the pixels, and of the files' contents.
            size: the side that the transform gives, for which large images are `reduced`.
        """
        used, count = 0, count_aside("decoding", "images")
        for position in range(len(self._kept), len(self)):
            pixels = pil_to_tensor(reduced(self._source.image(int(self._indices[position])), size))
            used += pixels.numel()
            if used > limit_bytes:
                break
            self._kept.append(pixels)
            count.show(position + 1, len(self))
        used = 0
        for position in range(len(self._kept), len(self)):
            content = self._source.encoded(int(self._indices[position]))
            used += len(content or b"")
            if content is None or used > limit_bytes:  # without a file of its own an image is in memory anyway
                break
            self._kept.append(content)
        return self._kept


def _collated(items: list[Any]) -> Any:
    return items[0] if isinstance(items[0], NolaVisionError) else default_collate(items)


def _unchanged(batch: Any) -> Any:
    return batch


class Loader(DataLoader[Any]):
    """A DataLoader of an `ImageSubset` that raises a worker's error as that error."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, NolaVisionError):
                raise batch
            yield batch


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (position, seed) pairs in an order that (`run_seed`, epoch) alone decides; Lightning sets the epoch.

    Several processes take turns along that order, so that a step on all of them together sees the batch that one
    process would see. Where the images do not divide evenly, the order's beginning is seen twice.

    Args:
        length: number of images.
        run_seed: which orders.
        processes: how many train together.
        rank: which of them this is.
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


class KShotDataModule(L.LightningDataModule):
    """Few labelled images a class for training, a validation pool and the test set.

    Batches are (float32 images `[b, 3, size, size]`, int64 labels `[b]`). The test set is used by the test stage only;
    before training its image files are decoded to see that they can be.

    Args:
        backbone: whose input size and normalisation the images get; the command line links it to the model's.
        dataset: a name in the registry (docs/datasets.md), or hf:NAME for one of Hugging Face's.
        root: the folder of the data set; without it the environment variable NOLA_VISION_DATA. digits needs none.
        shots: training images a class, or "all" for every image outside the validation pool.
        split_seed: which draw of training images.
        run_seed: the order of the training images and their augmentation.
        batch_size: of training; the last batch of an epoch may be smaller.
        eval_batch_size: of validation, test and reference images.
        augmentation: none, light (random crop) or released (what the authors' released code does).
        flip: let "light" flip images horizontally too; leave it off where left and right carry meaning.
        num_workers: processes that decode and transform; few-shot sets are faster with 0.
        download: fetch a missing data set, where torchvision or Hugging Face's library can.
        memory_limit_mib: how much of the decoded training set is kept in memory; as much again holds the files of
            images beyond it, which are decoded each time, and what is beyond that is read each time too.
        manifest: a file of `nola-vision data manifest`: train on its images, which must be of these shots and split.
        test_limit: test on this many images only, evenly spaced over each class, for quick trials.
        fold: for data without a test set: test on this fold's images and train on the others, on at most `shots` per
            class. `split_seed` shuffles the images into folds. Without it, all images may train and none are tested.
        hold_out: for data without a test set: take a validation pool out of the training images.

    Attributes:
        warnings: sentences about the data for a run's row.

    Raises:
        NolaVisionError: an unknown data set, no folder for it, or a setting that is not possible.
    """

    def __init__(
        self,
        backbone: BackboneSpec,
        dataset: str = "digits",
        root: str | None = None,
        shots: int | Literal["all"] = 5,
        split_seed: int = 0,
        run_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        augmentation: Augmentation = "light",
        flip: bool = False,
        num_workers: int = 0,
        download: bool = False,
        memory_limit_mib: int = 2048,
        test_limit: int | None = None,
        manifest: str | None = None,
        fold: int | None = None,
        hold_out: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("memory_limit_mib", memory_limit_mib, 0),
        ):
            if value < least:
                raise NolaVisionError(f"{name} is {value}, but it must be at least {least}")
        check_augmentation(augmentation, flip)
        self.entry = get_dataset(dataset)
        if self.entry.needs_root:  # said before a backbone's weights are fetched
            self.entry.place(root)
        self.backbone, self.dataset, self.root, self.download = backbone, dataset, root, download
        self.shots, self.split_seed, self.run_seed = shots, split_seed, run_seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augmentation, self.flip = augmentation, flip
        self.memory_limit_mib, self.test_limit, self.manifest = memory_limit_mib, test_limit, manifest
        self.fold, self.hold_out = fold, hold_out
        self.warnings: list[str] = []
        # What a task that needs features only puts in place of images, given their loader: see `features.use_features`
        self.as_features: Callable[[DataLoader[Any]], Dataset[Any]] | None = None

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names by class index; needs no `setup`."""
        return self.entry.class_names(self.root, self.download)

    @property
    def num_classes(self) -> int:
        """The number of classes; needs no `setup`."""
        return len(self.class_names)

    @cached_property
    def _splits(self) -> tuple[Split, ...]:
        return self.entry.splits(self.root)

    @property
    def has_test(self) -> bool:
        """Whether the data set has test images; without them its accuracy is estimated by cross-validation."""
        return "test" in self._splits

    @property
    def number_of_folds(self) -> int | None:
        """How many folds cross-validation has (0 if no class has two different images); None with a test set."""
        return None if self.has_test else number_of_folds(self._open("train").labels, self.groups)

    @property
    def untested_classes(self) -> list[str]:
        """The classes that no fold tests: those of one image, or whose images are all under other labels too."""
        if self.has_test:
            return []
        tested = {int(label) for _, test in self._folds for label in self._open("train").labels[test]}
        return [name for label, name in enumerate(self.class_names) if label not in tested]

    @property
    def test_name(self) -> str | None:
        """What the tested images are: "test", "validation", such as "fold 2 of 5", or None if there are none."""
        if self.has_test:
            return self.entry.test_name(self.root)
        return None if self.fold is None else f"fold {self.fold + 1} of {self.number_of_folds}"

    @property
    def majority_share(self) -> float:
        """The share of the largest class among the test images; without a test set, among those that a fold tests, or
        among all if there is no fold.
        """
        if self.has_test:
            labels = self._test_source.labels[self._test_positions]
        else:
            labels = self._open("train").labels
            if self._folds:
                labels = labels[np.concatenate([test for _, test in self._folds])]
        return float(np.bincount(labels).max() / len(labels))

    @cached_property
    def groups(self) -> Indices:
        """`[n]` numbers of the images of the training split; equal ones are exact copies of one image."""
        return process_cache.once("groups", (self.dataset, self.root), lambda: groups(self._open("train")))

    @property
    def test_indices(self) -> Indices:
        """The positions of the test images in their source, in the order of `test_dataloader`."""
        return self._test_set[1]

    @property
    def tested_source(self) -> ImageSource:
        """Where the positions of tested images point to: the test split, or all images if there is none."""
        return self._test_source if self.has_test else self._train_set[0]

    @cached_property
    def input_config(self) -> InputConfig:
        """What the backbone takes."""
        return backbones.input_config(self.backbone)

    def prepare_data(self) -> None:
        """Downloads what is missing if `download` is set, and before training decodes the images that are needed after
        it; in one process of a machine.

        Raises:
            NolaVisionError: as `setup`, or an image of the validation pool or the test set (without one, any image)
                cannot be read.
        """
        if self.download:
            self.entry.open(self.root, "train", download=True)
        if self.entry.in_files and (self.trainer is None or self.trainer.state.fn == "fit"):
            _ = self._checked

    @cached_property
    def _checked(self) -> bool:
        """True once the images of the validation pool and the test set were found to be readable."""
        self._refuse_impossible()
        refuse_unreadable(*self._pool_set)
        if self.has_test:
            refuse_unreadable(self._test_source, self._test_positions)
        else:
            source = self._open("train")
            refuse_unreadable(source, np.arange(len(source), dtype=np.int64))
        if self.entry.own_images:
            self._warn_of_mistakes()
        return True

    def _warn_of_mistakes(self) -> None:
        """Warns of files that are not read and of copies; images are digested once."""
        skipped = sum((self.entry.other_files(self.root, split) for split in self._splits), Counter())
        if skipped:
            self._warn(f"files that are not read: {suffix_counts(skipped)}")
        for note in self.entry.notes(self.root):
            self._warn(note)
        sources = {split: self._open(split) for split in self._splits}
        known = {split: digests(source) for split, source in sources.items()}
        untested = "" if self.has_test else ", trained on and never tested; delete the wrong ones"
        found = {
            f"that are in two classes{f' of {split}' if self.has_test else ''}{untested}": under_two_labels(
                source, known[split]
            )
            for split, source in sources.items()
        }
        for one, two in combinations(sources, 2):
            found[f"in both {one} and {two}"] = in_both(sources[one], known[one], sources[two], known[two])
        for where, pairs in found.items():
            if pairs:
                self._warn(f"images {where}: {len(pairs)}, such as {pairs[0]}")

    def _refuse_impossible(self) -> None:
        """Refuses settings that do not fit the data."""
        if self.has_test:
            if self.fold is not None or self.hold_out:
                name = "hold_out" if self.fold is None else "fold"
                raise NolaVisionError(f"data.{name} is for data without test images, and these have some: leave it out")
        elif self.test_limit is not None:
            raise NolaVisionError("data.test_limit takes a part of the test images, and there are none: leave it out")
        elif self.fold is not None and self.manifest is not None:
            raise NolaVisionError("data.fold takes its images from all, and data.manifest names some: leave one out")
        elif self.fold is not None and not 0 <= self.fold < len(self._folds):
            raise NolaVisionError(f"data.fold is {self.fold}, but there are {len(self._folds)} folds, counted from 0")
        if self.test_limit is not None and self.test_limit < self.num_classes:
            raise NolaVisionError(
                f"test_limit is {self.test_limit}, but there are {self.num_classes} classes: give one for each"
            )

    def setup(self, stage: str) -> None:
        """Opens what a stage needs: "fit" and "validate" the training images, "test" the test images.

        Raises:
            NolaVisionError: files are missing or corrupt, a class has fewer images than shots, or `test_limit` is less
                than one image a class.
        """
        self._refuse_impossible()  # before training, not after
        if stage in ("fit", "validate"):
            _ = self._kept
        elif stage == "test":
            _ = self._test_set

    def train_dataloader(self) -> DataLoader[Any]:
        """The k-shot set, shuffled and augmented."""
        (source, indices), kept = self._train_set, self._kept
        subset = ImageSubset(source, indices, train_transform(self.input_config, self.augmentation, self.flip), kept)
        batch_size, rest = divmod(self.batch_size, self._processes)  # `batch_size` is that of one step, on all devices
        if rest:
            raise NolaVisionError(
                f"batch_size is {self.batch_size}, that of one step on all {self._processes} devices together: make it "
                f"a multiple of {self._processes}, or give --trainer.devices 1"
            )
        if len(indices) % self._processes:
            self._warn(
                f"{len(indices)} images do not divide by {self._processes} devices, so some count twice an epoch"
            )
        return self._loader(subset, batch_size, EpochSampler(len(indices), self.run_seed, self._processes, self._rank))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation pool in order; an empty list, which makes Lightning skip validation, if the pool is empty."""
        subset = self._pool
        return self._loader(subset, self.eval_batch_size, self._shard(subset)) if len(subset) else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test images in the order of `test_indices`; an empty list if there are none."""
        source, indices = self._test_set
        kept = self._shared_images(indices) if self._shares_images else None
        subset = self._plain(source, indices, kept)
        return self._loader(subset, self.eval_batch_size, self._shard(subset)) if len(subset) else []

    def reference_dataloader(self) -> DataLoader[Any]:
        """The training images in order, not augmented: the methods on frozen features are fitted to them."""
        return self._loader(self._plain(*self._train_set, self._kept), self.eval_batch_size)

    def cross_validation_dataloader(self) -> DataLoader[Any]:
        """All images of a data set without a test split, in order and not augmented."""
        source = self._open("train")
        indices = np.arange(len(source), dtype=np.int64)
        return self._loader(self._plain(source, indices, self._shared_images(indices)), self.eval_batch_size)

    def draw_of_fold(self, train: Indices) -> Indices:
        """The images to train on out of a fold's training part: at most `shots` per class."""
        source = self._open("train")
        return draw(source.labels, self.shots, self.split_seed, source.class_names, train, at_most=True)

    @property
    def train_indices(self) -> Indices:
        """The positions of the training images in their source, in the order of `reference_dataloader`."""
        return self._train_set[1]

    @property
    def train_labels(self) -> npt.NDArray[np.int64]:
        """The class indices of the training images, in the order of the draw."""
        source, indices = self._train_set
        return source.labels[indices]

    @property
    def train_groups(self) -> Indices:
        """Numbers of the training images, in the order of the draw; equal ones are exact copies of one image."""
        return groups(*self._train_set)

    def describe(self) -> dict[str, Any]:
        """Plain values for a run's row and its adapter file; opens the training set if that has not been done.

        Returns:
            dataset, class_names, transform (size, mean, std, interpolation, crop_pct), counts (train, validation and,
            if the test set is open, test), draw, the training images' indices (None where shots is "all"),
            majority_share (None if the test set is not open), test_name, folds and untested_classes.
        """
        source, indices = self._train_set
        counts = {"train": len(indices), "validation": len(self._pool_set[1])}
        if is_open := "_test_set" in self.__dict__:
            counts["test"] = len(self.test_indices)
        transform = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.input_config).items()
        }
        return {
            "dataset": self.dataset,
            "class_names": list(self.class_names),
            "transform": transform,
            "counts": counts,
            "draw": None if self.shots == "all" else indices.tolist(),
            "majority_share": self.majority_share if is_open or not self.has_test else None,
            "test_name": self.test_name,
            "folds": self.number_of_folds,
            "untested_classes": self.untested_classes,
        }

    @cached_property
    def _train_set(self) -> tuple[ImageSource, Indices]:
        """The opened training images and the draw."""
        self._refuse_impossible()
        source = self._open("train")
        indices = self._draw(source)
        if self._splits != ("train", "test"):  # no pool, or one of its own
            return source, indices
        small = [source.class_names[label] for label in classes_without_pool(source.labels)]
        if small:
            listed = ", ".join(map(repr, small[:5])) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
            if len(small) == self.num_classes:
                self._warn("no images are held out for validation: every class has fewer than 20 training images")
            else:
                self._warn(f"no images are held out for validation of classes with fewer than 20: {listed}")
        return source, indices

    @cached_property
    def _kept(self) -> list[Kept]:
        """The drawn images as they are kept in memory."""
        if self._shares_images:
            return self._shared_images(self._train_set[1])
        limit = self.memory_limit_mib * 2**20
        key = (self.dataset, self.root, self._train_set[1].tobytes(), limit, size := self.input_config.size)
        return process_cache.once("training images", key, lambda: self._plain(*self._train_set).keep(limit, size))

    @property
    def _shares_images(self) -> bool:
        """Whether all images of the training split are kept, for all folds and for the run on all of them."""
        return not self.has_test and (self.fold is not None or self.shots == "all")

    def _shared_images(self, indices: Indices) -> list[Kept]:
        """Some of the images that are kept for all folds; None for one that is not."""
        limit, source = self.memory_limit_mib * 2**20, self._open("train")
        everything = self._plain(source, np.arange(len(source), dtype=np.int64))
        key = (self.dataset, self.root, limit, size := self.input_config.size)
        kept = process_cache.once("images", key, lambda: everything.keep(limit, size))
        return [kept[index] if index < len(kept) else None for index in indices]

    @cached_property
    def _folds(self) -> list[tuple[Indices, Indices]]:
        return folds(self._open("train").labels, self.groups, self.split_seed)

    @cached_property
    def _parts(self) -> tuple[Indices, Indices, Indices]:
        """Of the training split: what may train, the validation pool and the test images, without a test split."""
        labels = self._open("train").labels
        everything, nothing = np.arange(len(labels), dtype=np.int64), np.empty(0, dtype=np.int64)
        train, test = (everything, nothing) if self.fold is None else self._folds[self.fold]
        if not self.hold_out:
            return train, nothing, test
        inner, validation = hold_out(labels[train], self.groups[train], self.split_seed)
        return train[inner], train[validation], test

    def _open(self, split: Split) -> ImageSource:
        open_it = partial(open_split, self.entry, self.root, split, self.download)
        return process_cache.once(f"{split} source", (self.dataset, self.root), open_it)

    def _draw(self, source: ImageSource) -> Indices:
        if self.manifest is None:
            among = candidates(source.labels, self._splits) if self.has_test else self._parts[0]
            at_most = self.fold is not None or self.hold_out
            return draw(source.labels, self.shots, self.split_seed, source.class_names, among, at_most)
        manifest = read_manifest(self.manifest)
        settings = {"dataset": self.dataset, "shots": self.shots, "split_seed": self.split_seed}
        refuse_other_settings(manifest, self.manifest, **settings)
        return locate(manifest, source)

    @cached_property
    def _pool(self) -> ImageSubset:
        """The validation pool; what the k-shot set leaves of the memory limit keeps it decoded."""
        source, indices = self._pool_set
        if self._shares_images:
            return self._plain(source, indices, self._shared_images(indices))
        used = sum(image.numel() for image in self._kept if isinstance(image, torch.Tensor))
        limit = self.memory_limit_mib * 2**20 - used
        key = (self.dataset, self.root, self._splits, indices.tobytes(), size := self.input_config.size)
        kept = process_cache.once("validation images", key, lambda: self._plain(source, indices).keep(limit, size))
        return self._plain(source, indices, kept)

    @property
    def _pool_set(self) -> tuple[ImageSource, Indices]:
        """The images of the validation pool."""
        if "validation" in self._splits:
            source = self._open("validation")
            return source, np.arange(len(source), dtype=np.int64)
        source, drawn = self._train_set
        pool = validation_pool(source.labels) if self.has_test else self._parts[1]
        return source, np.setdiff1d(pool, drawn)  # a manifest may have some of the pool

    def _warn(self, sentence: str) -> None:
        """Adds a warning, and logs it once per process: a fit has several runs on the same data."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
        if (told := (self.dataset, self.root, sentence)) not in _told:
            _told.add(told)
            _log.warning("%s", printable(sentence))

    @property
    def _processes(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _shard(self, subset: ImageSubset) -> Sampler[Any] | None:
        """This process's share of an evaluation, without the repeats that Lightning's own sampler would count twice."""
        if self._processes == 1:
            return None
        return UnrepeatedDistributedSampler(subset, num_replicas=self._processes, rank=self._rank, shuffle=False)

    @cached_property
    def _test_source(self) -> ImageSource:
        return self._open("test")

    @property
    def _test_positions(self) -> Indices:
        """Which images of the test split are used."""
        source = self._test_source
        if self.test_limit is None:
            return np.arange(len(source), dtype=np.int64)
        return evenly_spaced(source.labels, self.test_limit)

    @cached_property
    def _test_set(self) -> tuple[ImageSource, Indices]:
        """The opened test images and which of them are used."""
        if self.has_test:
            return self._test_source, self._test_positions
        self._refuse_impossible()
        return self._open("train"), self._parts[2]

    def _plain(self, source: ImageSource, indices: Indices, kept: list[Kept] | None = None) -> ImageSubset:
        return ImageSubset(source, indices, eval_transform(self.input_config), kept)

    def _loader(self, subset: ImageSubset, batch_size: int, sampler: Sampler[Any] | None = None) -> DataLoader[Any]:
        if self.as_features is None:
            return self._image_loader(subset, batch_size, sampler)
        instead = self.as_features(self._image_loader(subset, self.eval_batch_size))
        return DataLoader(instead, batch_size, sampler=sampler, collate_fn=_unchanged, generator=torch.Generator())

    def _image_loader(
        self, subset: ImageSubset, batch_size: int, sampler: Sampler[Any] | None = None
    ) -> DataLoader[Any]:
        return Loader(
            subset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_collated,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # without one, DataLoader draws from the global state at each epoch
        )
