"""From the images of a request to the logits of its adapter: decoding in threads, then the batcher."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from starlette.requests import Request
from torch import Tensor

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.prediction import Prediction
from nola_vision.serving.adapter import ServedAdapter
from nola_vision.serving.http.batcher import Batcher
from nola_vision.serving.http.bodies import gone
from nola_vision.serving.http.budget import Budget
from nola_vision.serving.http.errors import RequestError, busy, without_folders
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.images import decode, from_base64, is_large, return_memory
from nola_vision.serving.http.metrics import Metrics
from nola_vision.serving.http.settings import Settings

_log = logging.getLogger(__name__)
_MOST_THREADS = 8
_TOP_K = 5  # that of transformers' pipeline
Result = TypeVar("Result")


class Service:
    """What the routes share. Made and closed in the event loop's thread.

    Args:
        folder: the adapters.
        settings: batch sizes and limits.
        metrics: counts batches.
    """

    def __init__(self, folder: AdapterFolder, settings: Settings, metrics: Metrics) -> None:
        self.folder, self.settings, self.metrics = folder, settings, metrics
        self.held = Budget(settings.held_bytes, "bytes")
        self._images = Budget(settings.waiting_images, "images")
        self._batcher = Batcher(folder.bank.logits, settings.max_batch_size, settings.max_delay, metrics.batch)
        # as many images are decoded at once, and one large one, which bounds the memory and keeps large ones from
        # delaying the others; torch's own threads are for the forward pass
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
        self._large = ThreadPoolExecutor(1, "decode-large", torch.set_num_threads, (1,))

    def close(self) -> None:
        """Finishes what was taken."""
        self._pool.shutdown()
        self._large.shutdown()
        self._batcher.close()

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function that blocks, in one of the threads that decode."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def logits(
        self, request: Request, name: str, images: Sequence[bytes | bytearray | str]
    ) -> tuple[ServedAdapter, list[Tensor]]:
        """An adapter, and its logits for the images of a request.

        Args:
            request: whose body was read. If its client closes the connection, the images are not computed.
            name: the adapter's.
            images: image files, or such files in base64.

        Raises:
            RequestError: 400, 413, 422: an image cannot be used. 404, 422: the adapter. 503: too many images
                are waiting, the images waited too long, or the forward pass failed.
        """
        if len(images) > self.settings.request_images:
            raise RequestError(413, f"the request has more than {self.settings.request_images} images: send fewer")
        with self._images.holding(len(images)):
            return await self._while_connected(request, self._logits(name, images))

    async def _logits(self, name: str, images: Sequence[bytes | bytearray | str]) -> tuple[ServedAdapter, list[Tensor]]:
        end = time.monotonic() + self.settings.answer_seconds
        adapter, contents, large = await self.in_thread(self._open, name, images)
        prepare = self._prepare_large if large else self._prepare
        pool = self._large if large else self._pool
        tensors = await asyncio.get_running_loop().run_in_executor(pool, prepare, adapter, contents, end)
        results = map(asyncio.wrap_future, self._batcher.submit(tensors, adapter))
        try:
            return adapter, list(await asyncio.gather(*results))
        except NolaVisionError as error:
            raise RequestError(422, without_folders(str(error))) from error
        except Exception as error:
            _log.error("the forward pass failed", exc_info=error)
            raise busy("the forward pass failed: try again later") from error

    def predictions(self, adapter: ServedAdapter, logits: Tensor, top_k: int | None) -> list[Prediction]:
        """The `top_k` most probable classes of an image, 5 by default.

        Raises:
            RequestError: 422: a logit is not finite.
        """
        try:
            return adapter.predictions(logits, top_k or _TOP_K)
        except NolaVisionError as error:
            raise RequestError(422, without_folders(str(error))) from error

    def _open(
        self, name: str, images: Sequence[bytes | bytearray | str]
    ) -> tuple[ServedAdapter, dict[str, bytes], bool]:
        """The adapter, the image files by what messages call them, and whether one of them is large."""
        places = (
            ["of the request"] if len(images) == 1 else [f"number {number}" for number in range(1, len(images) + 1)]
        )
        contents = {
            place: from_base64(image, place) if isinstance(image, str) else bytes(image)
            for place, image in zip(places, images, strict=True)
        }
        return self.folder.find(name), contents, any(map(is_large, contents.values()))

    def _prepare(self, adapter: ServedAdapter, contents: Mapping[str, bytes], end: float) -> list[Tensor]:
        """An adapter's input for each image file, `[3, size, size]`."""
        tensors = []
        for place, content in contents.items():
            if time.monotonic() > end:  # the request is refused already
                raise _late()
            tensors.append(adapter.transform(decode(content, place, self.settings.pixels)))
        return tensors

    def _prepare_large(self, adapter: ServedAdapter, contents: Mapping[str, bytes], end: float) -> list[Tensor]:
        try:
            return self._prepare(adapter, contents, end)
        finally:
            return_memory()

    async def _while_connected(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine, which is cancelled after `answer_seconds` or if the client closes the connection.

        Raises:
            RequestError: in these cases.
        """
        task, closed = asyncio.ensure_future(work), asyncio.ensure_future(_closed(request))
        try:
            await asyncio.wait(
                (task, closed), timeout=self.settings.answer_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            raise gone() if closed.done() else _late()
        finally:
            task.cancel()
            closed.cancel()


async def _closed(request: Request) -> None:
    """Returns when the client of a request whose body was read closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _late() -> RequestError:
    return busy("the request waited too long: try again later")
