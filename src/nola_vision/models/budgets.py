"""Budgets: the most coefficients whose adapter file is within a number of bytes."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

from torch import nn

from nola_vision.adapters.methods.base import Method
from nola_vision.adapters.methods.registry import check
from nola_vision.adapters.serialization import adapter_size
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import backbone_tensors, file_bits, file_metadata
from nola_vision.models.building import feature_width, file_shapes, method_targets, names_in_bank, stated_targets
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata, Calibrated

_CALIBRATIONS = (None, Calibrated(1.0, "folds"), Calibrated(1.0, "validation"))  # training may end with any of them


def spend_bytes(backbone: nn.Module, metadata: AdapterMetadata, weights: WeightsOrigin | None, budget: int) -> Method:
    """The method with the most coefficients per target whose adapter file, calibrated, is within a budget of bytes."""
    method, classes, width = metadata.method, len(metadata.class_names), feature_width(backbone)
    targets = method_targets(backbone, method, classes)
    stated = stated_targets(backbone, method, classes, [target.name for target in targets])
    fixed = {name: tensor.shape for name, tensor in backbone_tensors(backbone, method).items()}

    def size(count: int) -> int:
        counted = check(method.with_count(count))
        groups = counted.groups(targets)
        shapes = file_shapes(groups, classes, width) | fixed
        names = stated if isinstance(stated, str) else names_in_bank(groups)
        bits, ended = file_bits(shapes, counted), dataclasses.replace(metadata, method=counted)
        described = [file_metadata(ended, names, None, weights, calibrated) for calibrated in _CALIBRATIONS]
        return max(adapter_size(one, shapes, bits) for one in described)

    if size(1) > budget:
        raise NolaVisionError(
            f"max_bytes is {budget}, but a file with one coefficient per factor and target takes {size(1)}: give more, "
            "fewer bits, or fewer targets"
        )
    return method.with_count(largest(lambda count: size(count) <= budget, budget))


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, where 1 does and no number after a misfit does."""
    high = 2
    while high <= limit and fits(high):  # trying a number may cost memory in proportion to it
        high *= 2
    between = range(high // 2 + 1, min(high, limit + 1))
    return high // 2 + bisect.bisect_left(between, True, key=lambda number: not fits(number))
