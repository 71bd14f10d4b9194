"""An adapter merged into the backbone's weights, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nola_vision.adapters.functional import is_quantised
from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError


class Merged:
    """A backbone whose weights have the changes of one adapter added, with the original weights.

    Args:
        backbone: its weights are replaced.
        adapter: which one; for the reader.
        targets: what is changed.
        changes: by target name, in the weight's layout.
        dequantise: make integer weights floats.

    Raises:
        NolaVisionError: the weights are integers and are to stay so.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: nn.Module,
        adapter: int,
        targets: Sequence[Target],
        changes: Mapping[str, Tensor],
        dequantise: bool = False,
    ) -> None:
        if not dequantise and any(is_quantised(backbone.get_parameter(target.weight)) for target in targets):
            raise NolaVisionError(
                "the backbone's weights are stored in int8, and 8 bits would lose most of the change: leave the "
                "adapter next to it, or merge into floats (dequantise=True, --dequantise)"
            )
        self.backbone, self.adapter = backbone, adapter
        self._originals: dict[str, nn.Parameter] = {}  # by the name of the module that uses it
        for target in targets:
            for module in target.modules:
                layer = backbone.get_submodule(module)
                if module not in self._originals:
                    original = self._originals[module] = cast(nn.Parameter, layer.weight)
                    floats = original.dequantize() if is_quantised(original) else original.detach().clone()
                    layer.weight = nn.Parameter(floats, requires_grad=False)
                rows = slice(None) if target.rows is None else slice(*target.rows)
                weight, change = cast(nn.Parameter, layer.weight), changes[target.name]
                weight[rows] = (weight[rows].to(change.dtype) + change).to(weight.dtype)

    @torch.no_grad()
    def undo(self) -> None:
        """Puts the original weights back."""
        for module, original in self._originals.items():
            layer = cast(Any, self.backbone.get_submodule(module))
            # the backbone may have moved, or changed its dtype, since
            dtype = None if is_quantised(original) else layer.weight.dtype
            original.data = original.data.to(device=layer.weight.device, dtype=dtype)
            layer.weight = original
