"""Which images of a data set are for training, for validation and for testing. Importing it does not import torch."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import printable
from nola_vision.data.datasets.base import Split
from nola_vision.data.datasets.registry import get_dataset, open_split
from nola_vision.data.duplicates import groups
from nola_vision.data.folds import folds, hold_out, number_of_folds
from nola_vision.data.manifest import locate, read_manifest, refuse_other_settings
from nola_vision.data.sampling import Indices, classes_without_pool, draw, evenly_spaced, outside
from nola_vision.data.sources import ImageSource

Images = tuple[ImageSource, Indices]  # an open source, and positions in it

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str | None, str]] = set()  # the warnings that this process has logged


class KShotSplit:
    """The images of one run: the k-shot training set, the validation pool and the test set.

    Splits are opened when they are first needed. The settings are those of `KShotDataModule`, which adds batches.

    Attributes:
        entry: the data set.
        warnings: sentences about the data for a run's row.

    Raises:
        NolaVisionError: an unknown data set, or no folder for it.
    """

    def __init__(
        self,
        dataset: str,
        root: str | None,
        shots: int | Literal["all"],
        split_seed: int,
        download: bool = False,
        test_limit: int | None = None,
        manifest: str | None = None,
        fold: int | None = None,
        hold_out: bool = False,
    ) -> None:
        self.entry = get_dataset(dataset)
        if self.entry.needs_root:  # before a backbone's weights are downloaded
            self.entry.place(root)
        self.dataset, self.root, self.download = dataset, root, download
        self.shots, self.split_seed, self.manifest = shots, split_seed, manifest
        self.test_limit, self.fold, self.hold_out = test_limit, fold, hold_out
        self.warnings: list[str] = []
        self._sources: dict[Split, ImageSource] = {}  # the open ones

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names by class index, without opening a split."""
        return self.entry.class_names(self.root, self.download)

    @property
    def num_classes(self) -> int:
        """The number of classes, without opening a split."""
        return len(self.class_names)

    @cached_property
    def _splits(self) -> tuple[Split, ...]:
        return self.entry.splits(self.root)

    @property
    def has_test(self) -> bool:
        """Whether the data set has test images; without them its accuracy is estimated by cross-validation."""
        return "test" in self._splits

    @property
    def test_name(self) -> str | None:
        """The name of the tested images: "test", "validation" or a fold ("fold 2 of 5"); None without tested images."""
        if self.has_test:
            return self.entry.test_name(self.root)
        return None if self.fold is None else f"fold {self.fold + 1} of {self.number_of_folds}"

    @property
    def search_holds_out(self) -> bool:
        """Whether final runs train on all images, so that a search run must set `hold_out`."""
        return not self.has_test or self.entry.trains_on_pool

    @property
    def train_source(self) -> ImageSource:
        """The images of the training split."""
        return self._open("train")

    @property
    def candidates(self) -> Indices:
        """The positions in `train_source` that a draw may take."""
        return outside(self._pool_positions, self.train_source.labels) if self.has_test else self._parts[0]

    @property
    def train_indices(self) -> Indices:
        """The positions of the training images in their source, in the order of the draw."""
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

    @property
    def test_indices(self) -> Indices:
        """The positions of the test images in their source, in the order of testing."""
        return self._test_set[1]

    @property
    def tested_source(self) -> ImageSource:
        """The source of the tested images: the test split, or all images if there is none."""
        return self._test_source if self.has_test else self._train_set[0]

    @property
    def majority_share(self) -> float:
        """The share of the largest class among the test images; without a test set, among those that a fold tests, or
        among all if there are no folds.
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
        return process_cache.last("groups", (self.dataset, self.root), lambda: groups(self._open("train")))

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

    def draw_of_fold(self, train: Indices) -> Indices:
        """The images to train on out of a fold's training part: at most `shots` per class."""
        source = self._open("train")
        return draw(source.labels, self.shots, self.split_seed, source.class_names, train, at_most=True)

    def _check_settings(self) -> None:
        """Refuses settings that do not fit the data."""
        if self.has_test:
            if self.fold is not None or (self.hold_out and not self.entry.trains_on_pool):
                name = "hold_out" if self.fold is None else "fold"
                raise NolaVisionError(
                    f"data.{name} is for data without test images, and this data set has some: leave it out"
                )
        elif self.test_limit is not None:
            raise NolaVisionError("data.test_limit requires test images, which this data set lacks: leave it out")
        elif self.fold is not None and self.manifest is not None:
            raise NolaVisionError("data.fold draws from all images, and data.manifest names some: leave one out")
        elif self.fold is not None and not 0 <= self.fold < len(self._folds):
            raise NolaVisionError(f"data.fold is {self.fold}, but there are {len(self._folds)} folds, counted from 0")
        if self.test_limit is not None and self.test_limit < self.num_classes:
            raise NolaVisionError(
                f"test_limit is {self.test_limit}, but there are {self.num_classes} classes: use at least one image "
                "per class"
            )

    def _open(self, split: Split) -> ImageSource:
        if split not in self._sources:
            open_it = partial(open_split, self.entry, self.root, split, self.download)
            self._sources[split] = process_cache.last(f"{split} source", (self.dataset, self.root), open_it)
        return self._sources[split]

    @cached_property
    def _train_set(self) -> Images:
        """The training images: the draw, or those of the manifest."""
        self._check_settings()
        source = self._open("train")
        indices = self._draw(source)
        if self.entry.trains_on_pool:
            if lacking := self.num_classes - len(np.unique(source.labels[indices])):
                self.warn(f"{lacking} of the {self.num_classes} classes have no training images")
            return source, indices
        if self._splits != ("train", "test"):  # there is no pool, or it is a split
            return source, indices
        small = [source.class_names[label] for label in classes_without_pool(source.labels)]
        if small:
            listed = ", ".join(map(repr, small[:5])) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
            if len(small) == self.num_classes:
                self.warn("no images are held out for validation: every class has fewer than 20 training images")
            else:
                self.warn(f"no images are held out for validation of classes with fewer than 20: {listed}")
        return source, indices

    def _draw(self, source: ImageSource) -> Indices:
        if self.manifest is None:
            if self.shots == "all" and self.entry.trains_on_pool:
                return self.candidates  # of every class that the published lists have
            at_most = self.fold is not None or self.hold_out
            return draw(source.labels, self.shots, self.split_seed, source.class_names, self.candidates, at_most)
        manifest = read_manifest(self.manifest)
        settings = {"dataset": self.dataset, "shots": self.shots, "split_seed": self.split_seed}
        refuse_other_settings(manifest, self.manifest, **settings)
        return locate(manifest, source)

    @property
    def _pool_set(self) -> Images:
        """The images of the validation pool."""
        if "validation" in self._splits:
            source = self._open("validation")
            return source, np.arange(len(source), dtype=np.int64)
        source, drawn = self._train_set
        return source, np.setdiff1d(self._pool_positions, drawn)  # a manifest may have some of the pool

    @property
    def _pool_positions(self) -> Indices:
        """The validation pool as positions in the training split; empty if it is a split, or is trained on."""
        if not self.has_test:
            return self._parts[1]
        if "validation" in self._splits or (self.entry.trains_on_pool and not self.hold_out):
            return np.empty(0, dtype=np.int64)
        return self.entry.pool(self.root, self._open("train").labels)

    @cached_property
    def _test_set(self) -> Images:
        """The images to test on."""
        if self.has_test:
            return self._test_source, self._test_positions
        self._check_settings()
        return self._open("train"), self._parts[2]

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
    def _folds(self) -> list[tuple[Indices, Indices]]:
        return folds(self._open("train").labels, self.groups, self.split_seed)

    @cached_property
    def _parts(self) -> tuple[Indices, Indices, Indices]:
        """Without a test split: the images of the training split for training, for validation and for testing."""
        labels = self._open("train").labels
        everything, nothing = np.arange(len(labels), dtype=np.int64), np.empty(0, dtype=np.int64)
        train, test = (everything, nothing) if self.fold is None else self._folds[self.fold]
        if not self.hold_out:
            return train, nothing, test
        inner, validation = hold_out(labels[train], self.groups[train], self.split_seed)
        return train[inner], train[validation], test

    def warn(self, sentence: str) -> None:
        """Adds a warning, and logs it once per process: a fit has several runs on the same data."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
        if (key := (self.dataset, self.root, sentence)) not in _logged:
            _logged.add(key)
            _log.warning("%s", printable(sentence))
