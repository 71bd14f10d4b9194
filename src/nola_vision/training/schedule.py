"""The schedule of the learning rate."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int, min_lr: float) -> LRScheduler:
    """A linear warm-up to the optimizer's learning rate, then half a cosine to `min_lr`; stepped every optimizer step.

    Step t of the warm-up has (t + 1) / (warmup + 1) of the learning rate.

    Args:
        optimizer: of the training.
        steps: of the whole training.
        warmup: steps of the warm-up; at most `steps` - 1 are used.
        min_lr: at the end.
    """
    warmup = min(warmup, steps - 1)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup), eta_min=min_lr)
    if warmup <= 0:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
