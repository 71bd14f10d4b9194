"""scikit-learn's digits: the data set of the quick start."""

from __future__ import annotations

import numpy as np

from nola_vision.data.datasets.base import DatasetEntry, Split
from nola_vision.data.sources import ArraySource, ImageSource


class Digits(DatasetEntry):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. They are installed with it and need no root.

    There is no official test split. As in scikit-learn's example, the first 898 images are for training and the last
    899 for testing. The file is sorted by writer, so most test digits are from other writers.
    """

    TRAIN_IMAGES = 898
    expects = "bundled with scikit-learn, no root needed"
    needs_root = False
    in_files = False

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple("0123456789")

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        part = slice(None, self.TRAIN_IMAGES) if split == "train" else slice(self.TRAIN_IMAGES, None)
        pixels = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
        return ArraySource("digits", pixels, bunch.target[part], self.class_names(root))
