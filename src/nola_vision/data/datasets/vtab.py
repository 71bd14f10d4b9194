"""VTAB-1k: 19 tasks with 1,000 training images each, in the folders that NOAH's `get_vtab1k.py` writes.

Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark (2019).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.common.text import plural
from nola_vision.common.validation import quoted
from nola_vision.data.datasets.base import MOST_LIST_BYTES, DatasetEntry, Split, data_root
from nola_vision.data.datasets.list_file import Listed, parse_list
from nola_vision.data.sampling import Indices
from nola_vision.data.sources import FileSource, ImageSource

PREFIX = "vtab_"  # of the data sets' names
# The tasks by group, in the order of the published tables
GROUPS = {
    "Natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "Specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "Structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
_TRAIN = {"train800": 800, "val200": 200}  # the lists of the training images and their lengths
_BOTH = "train800val200"  # lists copies of the same images


@dataclass(frozen=True)
class Vtab(DatasetEntry):
    """A task of VTAB-1k.

    The training split is `train800.txt` followed by `val200.txt`. The second is the validation pool of search runs;
    final runs train on all 1,000 images, as the literature does.

    Args:
        task: its folder's name.
    """

    task: str
    trains_on_pool = True

    @property
    def expects(self) -> str:  # type: ignore[override]
        files = "train800.txt, val200.txt, test.txt and images/"
        return f"vtab-1k/{self.task}/ with {files} under the root (docs/datasets.md states where to get them)"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return class_names()[self.task]

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        read = (*_TRAIN, "test") if split == "test" else _TRAIN
        lists = {name: self._listed(root, name) for name in read}
        _refuse_shared(self._folder(root), lists)
        if split == "test":
            return self._source(root, lists["test"])
        listed = [row for name in _TRAIN for row in lists[name]]
        both, labels = self._file(root, _BOTH), Counter(row.label for row in listed)
        if both.exists() and Counter(row.label for row in self._listed(root, _BOTH)) != labels:
            raise NolaVisionError(
                f"{both} has other labels than train800.txt and val200.txt together: get all lists from one source"
            )
        return self._source(root, listed)

    def pool(self, root: str | None, labels: npt.ArrayLike) -> Indices:
        """The images of `val200.txt`."""
        return np.arange(_TRAIN["train800"], len(np.asarray(labels)), dtype=np.int64)

    def own_content(self, root: str | None) -> bytes:
        """The three lists that are read."""
        return b"\0".join(self._content(root, name) for name in (*_TRAIN, "test"))

    def _folder(self, root: str | None) -> Path:
        """The task's folder, in `vtab-1k` under the root or directly under it."""
        outer = data_root(root)
        inner = outer / "vtab-1k" / self.task
        return inner if inner.is_dir() else outer / self.task

    def _file(self, root: str | None, name: str) -> Path:
        return self._folder(root) / f"{name}.txt"

    def _listed(self, root: str | None, name: str) -> tuple[Listed, ...]:
        """The lines of a list, `images/<list>/<number>.jpg <label>`."""
        file, count = self._file(root, name), len(class_names()[self.task])
        rows = parse_list(self._content(root, name), str(file))
        for row in rows:
            # Python refuses to read more than 4,300 digits
            is_number = row.label.isascii() and row.label.isdecimal() and len(row.label) < 10
            if not is_number or int(row.label) >= count:
                raise NolaVisionError(
                    f"line {row.line} of {file} has label {quoted(row.label)}, but {self.task} has the labels 0 to "
                    f"{count - 1}: get the list again"
                )
            path = PurePosixPath(row.path)
            if path.is_absolute() or ".." in path.parts:
                raise NolaVisionError(
                    f"line {row.line} of {file} has the path {quoted(row.path)}, outside of the task's folder: "
                    "get the list again"
                )
        if len(rows) != (wanted := _TRAIN.get(name, len(rows))):
            raise NolaVisionError(f"{file} lists {len(rows)} images instead of {wanted}: get the list again")
        return rows

    def _content(self, root: str | None, name: str) -> bytes:
        file = self._file(root, name)
        try:
            return read_file(file, MOST_LIST_BYTES)
        except OSError as error:
            reason = f"{file}: {error.strerror}" if file.parent.is_dir() else f"there is no folder {self.task}"
            raise self.missing(f"VTAB-1k's {self.task}", data_root(root), reason) from error

    def _source(self, root: str | None, rows: Sequence[Listed]) -> FileSource:
        folder = self._folder(root)
        paths = [folder / row.path for row in rows]
        if gone := [path for path in paths if not os.path.isfile(path)]:  # False for a name that is too long, too
            raise NolaVisionError(
                f"{len(gone)} of {len(paths)} listed images of {self.task} are missing, for example {gone[0]}: unpack "
                "the archive again"
            )
        return FileSource(paths, [int(row.label) for row in rows], self.class_names(root), data_root(root))


def _refuse_shared(folder: Path, lists: Mapping[str, Sequence[Listed]]) -> None:
    """Refuses lists of a folder, by name, that have an image in common."""
    paths = {name: {os.path.normpath(row.path) for row in rows} for name, rows in lists.items()}
    for earlier, later in combinations(paths, 2):
        if shared := paths[earlier] & paths[later]:
            raise NolaVisionError(
                f"{later}.txt and {earlier}.txt of {folder} share {plural('image', len(shared))}, for example "
                f"{quoted(min(shared))}: get all lists from one source"
            )


@cache
def class_names() -> dict[str, tuple[str, ...]]:
    """The class names of each task by label; numbers where the labels have no names."""
    text = (resources.files("nola_vision.data") / "lists" / "vtab_classes.txt").read_text(encoding="utf-8")
    lines = (line.split(": ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {task: tuple(map(str, range(int(n))) if n.isdecimal() else n.split(", ")) for task, n in lines}
