"""What one forward pass computes with, and how a layer finds the pass that it is part of.

Several threads may use one bank at a time, and passes nest, so the state of a pass is not stored on the bank:

- Settings (the adapter of each sample, the share of the coefficients, the stored bits) belong to the thread or task
  that set them: a `ContextVar`.
- The changes are made when a pass starts. Its layers find them through a `ContextVar` too.
- Activation checkpointing runs layers, or the whole backbone, again in the backward pass, on an autograd thread without
  the caller's context variables. There the pass is found by autograd's number of the backward call: the first gradient
  that reaches a pass's features registers it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from nola_vision.adapters.target import Change
from nola_vision.common.errors import NolaVisionError


@dataclass(frozen=True, eq=False)
class Route:
    """The adapters of a batch.

    Args:
        adapters: `[d]`, the distinct adapters, in ascending order.
        place: `[batch]`, the position in `adapters` of each sample's adapter.
    """

    adapters: Tensor
    place: Tensor


@dataclass(frozen=True)
class Settings:
    """What the passes of a thread compute with.

    Args:
        route: the adapter of each sample; None for the only adapter.
        prefix: the share of the coefficients that is used, the first ones.
        bits: stored bits by parameter name: compute with the values that a file of these bits contains.
        bias_change: `[n, classes]`, added to the biases of the heads that are not targets.
    """

    route: Route | None = None
    prefix: float = 1.0
    bits: Mapping[str, int] = field(default_factory=dict)
    bias_change: Tensor | None = None

    def check_batch(self, batch: Tensor) -> None:
        """Refuses a batch of another length than the route's index."""
        if self.route is not None and len(batch) != (samples := len(self.route.place)):
            raise NolaVisionError(f"the index names adapters for {samples} samples, but the batch has {len(batch)}")


class _Threads(threading.local):
    """One object per thread, which identifies it. Thread numbers are reused after a thread has ended."""

    def __init__(self) -> None:
        self.token = object()


_threads = _Threads()


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass computes with, also where activation checkpointing repeats its layers.

    Args:
        changes: by target name; with the distinct adapters `[d, ...]` in front where there are several.
        place: `[batch]`, the position of each sample's adapter among those; None where one adapter serves all samples.
        settings: what it was made with.
        thread: the thread that ran it.
    """

    changes: Mapping[str, Change]
    place: Tensor | None
    settings: Settings = field(default_factory=Settings)
    thread: object = field(default_factory=lambda: _threads.token)


# pairs of an owner (a bank) and what it set, innermost first: a model may contain another
_settings: ContextVar[tuple[tuple[object, Settings], ...]] = ContextVar("settings", default=())
_running: ContextVar[tuple[tuple[object, Pass], ...]] = ContextVar("running", default=())
# by (backward call, owner); the graph of a pass keeps it alive
_in_backward: WeakValueDictionary[tuple[int, int], Pass] = WeakValueDictionary()
_MIXED = Pass({}, None)  # in place of the passes of two threads that one backward call differentiates


def settings(owner: object) -> Settings:
    """The settings of this thread (or task) for an owner."""
    for other, found in _settings.get():
        if other is owner:
            return found
    return Settings()


@contextmanager
def using(owner: object, **changes: Any) -> Iterator[None]:
    """Changes some settings of this thread (or task) for an owner; the others stay as they are outside."""
    token = _settings.set(((owner, replace(settings(owner), **changes)), *_settings.get()))
    try:
        yield
    finally:
        _settings.reset(token)


@contextmanager
def running(owner: object, current: Pass) -> Iterator[None]:
    """Makes a pass the one that this thread's layers belong to."""
    token = _running.set(((owner, current), *_running.get()))
    try:
        yield
    finally:
        _running.reset(token)


def current_pass(owner: object) -> Pass | None:
    """The pass that a layer of an owner is part of; None where a part of the backbone is called by itself.

    Raises:
        NolaVisionError: activation checkpointing repeats a layer in a backward call over passes of several threads.
    """
    for other, found in _running.get():
        if other is owner:
            return found
    return pass_in_backward(owner)


def in_backward() -> bool:
    """Whether autograd runs in this thread: what computes then is repeated by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def pass_in_backward(owner: object) -> Pass | None:
    """The pass whose backward call runs in this thread.

    Raises:
        NolaVisionError: the call covers passes of several threads.
    """
    found = _in_backward.get((torch._C._current_graph_task_id(), id(owner)))
    if found is _MIXED:
        raise NolaVisionError(
            "one backward pass covers forward passes of several threads, which activation checkpointing cannot "
            "distinguish: call backward() once for each, or switch checkpointing off"
        )
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin_backward_at(features: Tensor, owner: object, current: Pass) -> None:
    """Registers the pass for a backward call when the gradient reaches its features; its layers are then recomputed."""

    def begin(_: Tensor) -> None:
        key = torch._C._current_graph_task_id(), id(owner)
        other = _in_backward.get(key)
        same = other is None or (other is not _MIXED and other.thread is current.thread)
        _in_backward[key] = current if same else _MIXED

    features.register_hook(cast(Any, begin))
