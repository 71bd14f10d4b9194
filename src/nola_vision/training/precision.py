"""Number formats: what `trainer.precision: auto` resolves to, and TF32 for float32 runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import lightning as L

MIXED, FLOAT32 = "bf16-mixed", "32-true"
_OTHER_SPELLINGS = {None: FLOAT32, 32: FLOAT32, 64: "64-true", 16: "16-mixed", "bf16": MIXED}  # of Lightning
_OTHER_SPELLINGS |= {str(number): name for number, name in _OTHER_SPELLINGS.items() if isinstance(number, int)}


def gpu_has_bfloat16(accelerator: Any) -> bool:
    """Whether a trainer's accelerator is a GPU that multiplies in bfloat16; all GPUs of this machine must."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return False
    if torch.version.hip is not None:  # all GPUs that PyTorch supports there
        return True
    # asked without a CUDA context, which would take memory of each GPU
    return all(torch.cuda.get_device_capability(number) >= (8, 0) for number in range(torch.cuda.device_count()))


def one_spelling(precision: Any) -> Any:
    """A value of `trainer.precision` in one of Lightning's spellings: `bf16` and `bf16-mixed` are one run."""
    return _OTHER_SPELLINGS.get(precision, precision)


def fastest(accelerator: Any) -> str:
    """The value of `trainer.precision` that `auto` resolves to on this machine.

    `bf16-mixed` on GPUs with bfloat16 and on CPUs with AVX-512 BF16 or AMX; else `32-true`. A CPU without these
    instructions computes in bfloat16 more slowly than in float32.

    Args:
        accelerator: the config's `trainer.accelerator`.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available()):
        able = torch.cpu.get_capabilities()
        return MIXED if able.get("avx512_bf16") or able.get("amx_bf16") else FLOAT32
    return MIXED if gpu_has_bfloat16(accelerator) else FLOAT32


@contextmanager
def tf32(trainer: L.Trainer) -> Iterator[bool]:
    """Lets float32 products of a `32-true` run on a GPU use TF32, inputs of 10 bits of mantissa; restores the setting.

    A setting that the caller's process has made itself is kept. Convolutions use TF32 by torch's default.

    Yields:
        Whether the run computes in TF32.
    """
    device, setting = trainer.strategy.root_device, torch.backends.cuda.matmul
    if device.type != "cuda" or trainer.precision != FLOAT32 or not torch.cuda.is_tf32_supported():
        yield False
        return
    before = setting.fp32_precision
    unset = before == "none"
    if unset:
        setting.allow_tf32 = True  # the older name, which torch.compile and Lightning read
    try:
        yield setting.fp32_precision == "tf32"
    finally:
        if unset:
            setting.allow_tf32 = False
            setting.fp32_precision = before
