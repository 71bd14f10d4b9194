"""Layers that training treats in a special way: batch norms."""

from __future__ import annotations

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}


def is_trained(norm: nn.Module) -> bool:
    """Whether a batch norm has a trained weight or bias; then its running statistics move in training, too."""
    return any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
