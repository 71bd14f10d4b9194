"""Batches of images of many requests, computed by one worker thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nola_vision.serving.http.threads import compute_with

_log = logging.getLogger(__name__)


class _Item(NamedTuple):
    image: Tensor
    adapter: Any
    result: Future[Tensor]
    since: float


class Batcher:
    """Computes the logits of images from any thread, as many at once as are waiting.

    One worker thread takes up to `max_batch_size` images in the order of their arrival. It waits for more of them until
    the first is `max_delay` seconds old; while it computes, the next ones collect. Idle, it sleeps.

    Args:
        logits: from images `[batch, ...]` of one shape and as many adapters to one result per image.
        max_batch_size: images per call of `logits`.
        max_delay: seconds.
        observe: called after each batch with the seconds that its images waited, the number of distinct adapters, and
            the seconds that it was computed.
    """

    def __init__(
        self,
        logits: Callable[[Tensor, Sequence[Any]], list[Tensor]],
        max_batch_size: int,
        max_delay: float,
        observe: Callable[[Sequence[float], int, float], None] = lambda waited, distinct, seconds: None,
    ) -> None:
        self._logits, self._observe = logits, observe
        self._max_batch_size, self._max_delay = max_batch_size, max_delay
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = torch.get_num_threads()
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._worker.start()

    def submit(self, images: Sequence[Tensor], adapter: Any) -> list[Future[Tensor]]:
        """Futures of the results, one per image. One that is cancelled before its batch starts is not computed."""
        items = [_Item(image, adapter, Future(), time.monotonic()) for image in images]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.extend(items)
            self._changed.notify()
        return [item.result for item in items]

    @property
    def alive(self) -> bool:
        """Whether there is a worker."""
        return self._worker.is_alive()

    def close(self) -> None:
        """Returns when all that was submitted is computed. Nothing can be submitted afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _work(self) -> None:
        compute_with(self._threads)  # those that decode have one each
        while (batch := self._next()) is not None:
            groups: dict[torch.Size, list[_Item]] = {}
            for item in batch:
                groups.setdefault(item.image.shape, []).append(item)
            for items in groups.values():
                self._compute(items)

    def _next(self) -> list[_Item] | None:
        """The next batch; None if there will be none. May be empty: all of its requests were cancelled."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            end = self._waiting[0].since + self._max_delay
            while len(self._waiting) < self._max_batch_size and not self._closed:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Item] = []
            while self._waiting and len(batch) < self._max_batch_size:
                item = self._waiting.popleft()
                if item.result.set_running_or_notify_cancel():
                    batch.append(item)
        return batch

    def _compute(self, items: Sequence[_Item]) -> None:
        """Sets the results. Where the call fails, each half is tried again, so that only the image that fails fails."""
        start = time.monotonic()
        try:
            results = self._logits(torch.stack([item.image for item in items]), [item.adapter for item in items])
            pairs = list(zip(items, results, strict=True))
        except Exception as error:
            if len(items) == 1:
                items[0].result.set_exception(error)
                return
            half = len(items) // 2
            self._compute(items[:half])
            self._compute(items[half:])
            return
        for item, result in pairs:
            item.result.set_result(result)
        try:
            waited = [start - item.since for item in items]
            self._observe(waited, len({id(item.adapter) for item in items}), time.monotonic() - start)
        except Exception as error:  # the worker must go on; the results are there
            _log.error("a batch was not counted", exc_info=error)
