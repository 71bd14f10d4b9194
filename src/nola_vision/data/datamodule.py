"""The LightningDataModule: a k-shot training set, its validation pool and the test set of one data set.

The images depend on `split_seed`, their order and augmentation on (`run_seed`, epoch, position). The global random
state is neither read nor set. Test labels are used by the test stage only. Before training, test images are decoded to
find damaged ones, and not used otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import cached_property, partial
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.check import find_mistakes
from nola_vision.data.integrity import refuse_unreadable
from nola_vision.data.kshot_split import Images, KShotSplit
from nola_vision.data.loaders import EpochSampler, ImageSubset, Kept, Loader, collate, trim, unchanged
from nola_vision.data.sampling import Indices
from nola_vision.data.sources import ImageSource
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import (
    Augmentation,
    check_augmentation,
    eval_transform,
    normalise_transform,
    reduce_transform,
    resize_transform,
    train_transform,
)

_POOL = "validation images"  # in the process's cache


class KShotDataModule(KShotSplit, L.LightningDataModule):
    """Few labelled images per class for training, a validation pool and the test set.

    Batches are (float32 images `[b, 3, size, size]`, int64 labels `[b]`). The test set is used by the test stage only;
    before training its image files are decoded to check that they can be.

    Args:
        input: the image format of the backbone; the command line links it to the model's backbone.
        dataset: a name in the registry (docs/datasets.md), or hf:NAME for one of Hugging Face's.
        root: the folder of the data set; by default the environment variable NOLA_VISION_DATA. Not needed for digits.
        shots: training images per class, or "all" for every image outside the validation pool.
        split_seed: which draw of training images.
        run_seed: the order of the training images and their augmentation.
        batch_size: of training; the last batch of an epoch may be smaller.
        eval_batch_size: of validation, test and reference images. null: a run sets it by its backbone, see
            `models.backbones.properties.eval_batch_size`; otherwise 256.
        augmentation: none, light (random crop) or released (what the authors' released code does).
        flip: let "light" flip images horizontally too; leave it off if left and right differ in meaning.
        num_workers: processes that decode and transform; few-shot sets are faster with 0.
        download: download a missing data set, if torchvision or Hugging Face's library can.
        memory_limit_mib: how much memory decoded images may take: the training images, then the validation pool and the
            test images, these resized. As much again holds the files of further images, which are decoded each time.
            Images beyond that are read from disk each time.
        manifest: a file of `nola-vision data manifest`: train on its images, which must be of these shots and split.
        test_limit: test on this many images only, evenly spaced over each class, for quick trials.
        fold: for data without a test set: test on this fold's images and train on the others, on at most `shots` per
            class. `split_seed` shuffles the images into folds. Without it, any image may be used for training, and no
            image for testing.
        hold_out: for data without a test set: take a validation pool out of the training images.

    Attributes:
        evaluations: when this run evaluates: "fit" (the validation pool, in training), "validate" (the pool, after
            training), "test" (the test images); None: not known.
        as_features: for a task that needs features only: replaces the images of a loader by their features, see
            `features.use_features`.

    Raises:
        NolaVisionError: an unknown data set, no folder for it, or a setting that is not possible.
    """

    def __init__(
        self,
        input: InputConfig,
        dataset: str = "digits",
        root: str | None = None,
        shots: int | Literal["all"] = 5,
        split_seed: int = 0,
        run_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
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
        L.LightningDataModule.__init__(self)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("memory_limit_mib", memory_limit_mib, 0),
        ):
            if value is not None and value < least:
                raise NolaVisionError(f"{name} is {value}, but it must be at least {least}")
        check_augmentation(augmentation, flip)
        KShotSplit.__init__(self, dataset, root, shots, split_seed, download, test_limit, manifest, fold, hold_out)
        self.input, self.run_seed, self.augmentation, self.flip = input, run_seed, augmentation, flip
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size or 256, num_workers
        self.memory_limit_mib = memory_limit_mib
        self.evaluations: Collection[str] | None = None
        self.as_features: Callable[[DataLoader[Any]], Dataset[Any]] | None = None

    def prepare_data(self) -> None:
        """Downloads what is missing if `download` is set, and before training decodes the images that are needed after
        it; in one process per machine.

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
        """True once the images that are needed after training were found to be readable.

        Those that this run will evaluate are kept, so that they are not decoded again. The validation pool is checked
        if it may be used, the test set in any case.
        """
        self._check_settings()
        uses = self.evaluations
        if uses is not None:
            _ = self._training_images  # before the others, which get the memory that they leave
        if uses is None or "fit" in uses or "validate" in uses:
            source, indices = self._pool_set
            refuse_unreadable(source, indices if uses is None else self._pool.not_prepared)
        if not self.has_test:
            source = self._open("train")
            indices = np.arange(len(source), dtype=np.int64)
            keeps = uses is not None and self._shares_images
            refuse_unreadable(source, self._all_images.not_prepared if keeps else indices)
        elif uses is not None and "test" in uses:
            refuse_unreadable(self._test_source, self._test_images.not_prepared)
        else:
            refuse_unreadable(self._test_source, self._test_positions)
        if self.entry.own_images:
            for mistake in find_mistakes(self.entry, self.root, {split: self._open(split) for split in self._splits}):
                self.warn(mistake)
        return True

    def setup(self, stage: str) -> None:
        """Opens what a stage needs: "fit" and "validate" the training images, "test" the test images.

        Raises:
            NolaVisionError: files are missing or corrupt, a class has fewer images than shots, or `test_limit` is less
                than one image per class.
        """
        self._check_settings()  # before training, not after
        if stage in ("fit", "validate"):
            _ = self._training_images
        elif stage == "test":
            _ = self._test_set

    def train_dataloader(self) -> DataLoader[Any]:
        """The k-shot set, shuffled and augmented."""
        source, indices = self._train_set
        transform = train_transform(self.input, self.augmentation, self.flip)
        subset = ImageSubset(source, indices, reduce_transform(self.input.size), transform, self._training_images)
        batch_size, rest = divmod(self.batch_size, self._processes)  # `batch_size` is that of one step, on all devices
        if rest:
            raise NolaVisionError(
                f"batch_size is {self.batch_size}, that of one step on all {self._processes} devices together: make it "
                f"a multiple of {self._processes}, or give --trainer.devices 1"
            )
        if len(indices) % self._processes:
            self.warn(
                f"{len(indices)} images do not divide by {self._processes} devices, so some count twice per epoch"
            )
        return self._loader(subset, batch_size, EpochSampler(len(indices), self.run_seed, self._processes, self._rank))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation pool in order; an empty list, which makes Lightning skip validation, if the pool is empty, or
        in training if `evaluations` lacks "fit".
        """
        in_fit = self.evaluations is None or "fit" in self.evaluations
        if not in_fit and self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        subset = self._pool
        return self._loader(subset, self.eval_batch_size, self._shard(subset)) if len(subset) else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The test images in the order of `test_indices`; an empty list if there are none."""
        subset = self._test_images
        return self._loader(subset, self.eval_batch_size, self._shard(subset)) if len(subset) else []

    def reference_dataloader(self) -> DataLoader[Any]:
        """The training images in order, not augmented: the methods on frozen features are fitted to them."""
        return self._loader(self._plain(*self._train_set, self._training_images), self.eval_batch_size)

    def cross_validation_dataloader(self) -> DataLoader[Any]:
        """All images of a data set without a test split, in order and not augmented."""
        return self._loader(self._all_images, self.eval_batch_size)

    def describe(self) -> dict[str, Any]:
        """Plain values for a run's row and its adapter file; opens the training set if that has not been done.

        Returns:
            dataset, class_names, transform (size, mean, std, interpolation, crop_pct), counts (train, validation and,
            if the test set is open, test), draw, the training images' indices (None if shots is "all"),
            majority_share (None if the test set is not open), test_name, folds and untested_classes.
        """
        source, indices = self._train_set
        counts = {"train": len(indices), "validation": len(self._pool_set[1])}
        if is_open := "_test_set" in self.__dict__:
            counts["test"] = len(self.test_indices)
        transform = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.input).items()
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
    def _training_images(self) -> list[Kept]:
        """The drawn images as they are kept in memory."""
        if self._shares_images:
            return self._shared_images(self._train_set[1])
        limit = self.memory_limit_mib * 2**20
        key = (self.dataset, self.root, self._train_set[1].tobytes(), limit, self.input.size)
        return process_cache.last("training images", key, lambda: self._plain(*self._train_set).keep(limit))

    @property
    def _shares_images(self) -> bool:
        """Whether all images of the training split are kept, for all folds and for the run on all of them."""
        return not self.has_test and (self.fold is not None or self.shots == "all")

    @cached_property
    def _all_images(self) -> ImageSubset:
        """All images of the training split, kept for all folds."""
        limit, source = self.memory_limit_mib * 2**20, self._open("train")
        indices = np.arange(len(source), dtype=np.int64)
        key = (self.dataset, self.root, limit, self.input.size)
        kept = process_cache.last("images", key, lambda: self._plain(source, indices).keep(limit))
        return self._plain(source, indices, kept)

    def _shared_images(self, indices: Indices) -> list[Kept]:
        """Some of the images that are kept for all folds."""
        return self._all_images.kept(indices)

    @cached_property
    def _pool(self) -> ImageSubset:
        """The validation pool, kept as far as the training images leave memory for it."""
        return self._evaluated(_POOL, self._pool_set, self._memory_left)

    @cached_property
    def _test_images(self) -> ImageSubset:
        """The test images, kept as far as the training images and the validation pool leave memory for them."""
        uses = self.evaluations
        # this run uses the pool, or a search run of this process did
        pooled = uses is None or "fit" in uses or "validate" in uses or process_cache.has(_POOL)
        pool = 3 * self.input.size**2 * len(self._pool_set[1]) if pooled and self._has_training_images else 0
        return self._evaluated("test images", self._test_set, self._memory_left - pool)

    def _evaluated(self, kind: str, images: Images, limit: int) -> ImageSubset:
        """Images of an evaluation: decoded and resized once per process, as far as the limit in bytes allows.

        Several processes that evaluate together each use a part, and would each keep them all: they keep none.
        """
        source, indices = images
        if self._shares_images:
            return self._plain(source, indices, self._shared_images(indices))
        make = partial(ImageSubset, source, indices, resize_transform(self.input), normalise_transform(self.input))
        if self._processes > 1:
            return make()
        key = (self.dataset, self.root, self._splits, indices.tobytes(), self.input)
        kept = process_cache.last(kind, key, lambda: make().keep(limit))
        trim(kept, limit)  # an earlier run of this process may have had more memory for them
        return make(kept)

    @property
    def _has_training_images(self) -> bool:
        """Whether the training images are in memory: a test alone does not open them."""
        return "_training_images" in self.__dict__

    @property
    def _memory_left(self) -> int:
        """The bytes that the training images leave for others."""
        kept = self._training_images if self._has_training_images else []
        return self.memory_limit_mib * 2**20 - sum(i.numel() for i in kept if isinstance(i, torch.Tensor))

    def _plain(self, source: ImageSource, indices: Indices, kept: list[Kept] | None = None) -> ImageSubset:
        """Images with the evaluation transform, kept as for training."""
        return ImageSubset(source, indices, reduce_transform(self.input.size), eval_transform(self.input), kept)

    @property
    def _processes(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _shard(self, subset: ImageSubset) -> Sampler[Any] | None:
        """This process's share of an evaluation. Lightning's own sampler repeats images, which would count twice."""
        if self._processes == 1:
            return None
        return UnrepeatedDistributedSampler(subset, num_replicas=self._processes, rank=self._rank, shuffle=False)

    def _loader(self, subset: ImageSubset, batch_size: int, sampler: Sampler[Any] | None = None) -> DataLoader[Any]:
        if self.as_features is None:
            return self._image_loader(subset, batch_size, sampler)
        instead = self.as_features(self._image_loader(subset, self.eval_batch_size))
        return DataLoader(instead, batch_size, sampler=sampler, collate_fn=unchanged, generator=torch.Generator())

    def _image_loader(
        self, subset: ImageSubset, batch_size: int, sampler: Sampler[Any] | None = None
    ) -> DataLoader[Any]:
        return Loader(
            subset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator(),  # without one, DataLoader draws from the global state at each epoch
        )
