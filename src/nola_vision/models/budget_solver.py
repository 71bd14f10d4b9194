"""Budgets: the largest size of a method whose whole adapter file is within a number of bytes."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from nola_vision.adapters.methods.base import Adapter, Group, Method
from nola_vision.adapters.methods.registry import check
from nola_vision.adapters.serialization import adapter_size
from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError, UnreachableBudgetError
from nola_vision.common.integer_search import largest, smallest
from nola_vision.common.validation import MOST_COUNT
from nola_vision.models import known_weights
from nola_vision.models.adapted_model import backbone_tensors, file_bits, file_metadata
from nola_vision.models.backbones.creation import skeleton
from nola_vision.models.building import (
    feature_width,
    file_shapes,
    method_targets,
    names_in_bank,
    selects_by_structure,
    targets_checksum,
)
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata, Calibrated

_CALIBRATIONS = (None, Calibrated(1.0, "folds"), Calibrated(1.0, "validation"))  # training may end with any of them
# Numbers of the header that are chosen later: as long as they can be, and with digits that hardly compress.
_SEEDS = {"run_seed": 8304917265830947162, "basis_seed": 9152637480613925748}
LONGEST = {"lr": 1.2345678901234567e-05, "head_lr": 1.8306942514938624e-05, "c": 2.6940527836194074e-05}
_ROOM = 8  # bytes of a budget that are left for other values of further settings, such as a searched `quantise_from`


def solve_budget(metadata: AdapterMetadata, backbone: nn.Module | None = None) -> Method:
    """The method with the largest `size_setting` whose file is within its `max_bytes`.

    Only the shapes of the backbone are used: its weights are not read, hashed or downloaded.

    Args:
        metadata: of the model. Seeds, learning rates, c, calibration and the file of the weights do not matter: a file
            is counted with the longest of them.
        backbone: the model's, if there is one already; its weights may be on the meta device.

    Raises:
        UnreachableBudgetError: the smallest file is larger.
        NolaVisionError: the method cannot be used on this backbone.
    """
    method = metadata.method
    assert isinstance(method, Adapter) and method.max_bytes is not None
    budget = method.max_bytes
    files = _Files.of(skeleton(metadata.backbone) if backbone is None else backbone, metadata)

    def is_allowed(count: int) -> bool:
        try:
            return bool(files.groups(method.with_count(count)))
        except NolaVisionError:
            return False

    def size(count: int) -> int:
        return files.size(method.with_count(count)) + _ROOM

    if (least := smallest(is_allowed, MOST_COUNT)) is None:
        files.groups(method.with_count(1))  # raises why every size is refused
        raise NolaVisionError(f"{type(method).__name__} adapts no weight of this backbone: give it targets")
    if size(least) > budget:
        raise UnreachableBudgetError(budget, size(least), f"{method.size_setting} {least}")
    most = largest(lambda count: is_allowed(count) and size(count) <= budget, MOST_COUNT, least)
    # where a larger setting adds no values, the smallest that has them
    values = files.values(method.with_count(most))
    count = bisect.bisect_left(
        range(most + 1), values, lo=least, key=lambda count: files.values(method.with_count(count))
    )
    # a header compresses better with some numbers than with others
    return method.with_count(count if size(count) <= budget else most)


def most_file_bytes(metadata: AdapterMetadata) -> int:
    """The bytes of the longest adapter file of a model, by its shapes; the argument as in `solve_budget`."""
    return _Files.of(skeleton(metadata.backbone), metadata).size(metadata.method)


@dataclass(frozen=True)
class _Files:
    """The adapter files of a backbone, for methods that differ in their size alone."""

    metadata: AdapterMetadata
    weights: Sequence[WeightsOrigin | None]  # the file states one of them
    targets: Sequence[Target]
    width: int
    fixed: Mapping[str, tuple[int, ...]]  # shapes of the stored tensors of the backbone itself

    @classmethod
    def of(cls, backbone: nn.Module, metadata: AdapterMetadata) -> _Files:
        method = metadata.method
        return cls(
            replace(metadata, **_SEEDS),  # type: ignore[arg-type]
            known_weights.longest_origins(metadata.backbone),
            method_targets(backbone, method, len(metadata.class_names)),
            feature_width(backbone),
            {name: tuple(tensor.shape) for name, tensor in backbone_tensors(backbone, method).items()},
        )

    def groups(self, method: Method) -> list[Group]:
        """Of the trained values; raises NolaVisionError for a size that the targets cannot have."""
        return check(method).groups(self.targets)

    def values(self, method: Method) -> int:
        """The number of trained values, without the head's."""
        return sum(math.prod(shape) for group in self.groups(method) for shape in group.shapes.values())

    def size(self, method: Method) -> int:
        """The bytes of the longest file: what is chosen later, or differs between runs, is as long as it can be."""
        method = method.for_base(self.metadata.backbone.base)
        groups, classes = self.groups(method), len(self.metadata.class_names)
        shapes = file_shapes(groups, classes, self.width) | dict(self.fixed)
        # as `stated_targets`, whose look-up of the method's names is done already
        by_structure = selects_by_structure(method)
        names = targets_checksum([t.name for t in self.targets]) if by_structure else names_in_bank(groups)
        longest: dict[str, Any] = {
            name: LONGEST[name] for name in LONGEST.keys() & {one.name for one in fields(method)}
        }
        metadata, bits = replace(self.metadata, method=replace(method, **longest)), file_bits(shapes, method)
        described = (
            file_metadata(metadata, names, None, weights, ended)
            for weights, ended in itertools.product(self.weights, _CALIBRATIONS)
        )
        names_bytes = sum(len(name.encode()) for name in self.metadata.class_names)
        return max(adapter_size(one, shapes, bits) for one in described) + _spare(names_bytes)


def _spare(names_bytes: int) -> int:
    """Bytes for digits that compress less than those counted, after long class names even less."""
    return 8 + names_bytes // 1_000
