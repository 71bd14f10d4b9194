"""From the images of a request to the logits of its adapter: decoding in threads, then the batcher."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from torch import Tensor

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.prediction import Prediction
from nola_vision.serving.http.bank import Adapter
from nola_vision.serving.http.batcher import Batcher
from nola_vision.serving.http.bodies import gone
from nola_vision.serving.http.budget import Budget
from nola_vision.serving.http.errors import RequestError, busy
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.images import decode, pixels_of, return_memory
from nola_vision.serving.http.metrics import Metrics
from nola_vision.serving.http.settings import Settings
from nola_vision.serving.http.threads import Share, Threads

_log = logging.getLogger(__name__)
_MOST_THREADS = 8
_FILE_THREADS = 4
_LARGE = 4_000_000  # pixels of an image that other threads decode
_TOP_K = 5  # that of transformers' pipeline
_SHORT = 1000  # logits of all images of a request
_MOST_RESULTS = 100_000  # classes of all images of a request
Result = TypeVar("Result")


class Service:
    """What the routes share. Made and closed in the event loop's thread.

    Attributes:
        held: the bytes of all bodies.
        files: threads that read adapter files and the folder; a slow disk delays nothing else.
        decoders: threads that decode small images, and bodies.

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
        count = min(_MOST_THREADS, os.cpu_count() or 1)
        self.files, self.decoders = Threads(_FILE_THREADS, "files"), Threads(count, "decode")
        self._answers = Threads(1, "answer")  # long ones, which no image delays
        # large images have separate threads, so that they do not delay the others, and together as many pixels as the
        # largest one may have, which bounds the memory
        self._large, self._pixels = Threads(count, "decode-large"), Share(settings.pixels)

    @property
    def ready(self) -> bool:
        """Whether images can be computed."""
        return self._batcher.alive

    def close(self) -> None:
        """Finishes what was taken."""
        for threads in (self.files, self.decoders, self._large, self._answers):
            threads.close()
        self._batcher.close()

    async def logits(self, request: Request, name: str, images: Sequence[bytes]) -> tuple[Adapter, list[Tensor]]:
        """An adapter, and its logits for the images of a request.

        Args:
            request: whose body was read. If its client closes the connection, the images are not computed.
            name: the adapter's.
            images: image files.

        Raises:
            RequestError: 400, 413, 422: an image cannot be used. 404, 422: the adapter. 503: too many images
                are waiting, the images waited too long, or the forward pass failed.
        """
        if len(images) > self.settings.request_images:
            raise RequestError(413, f"the request has more than {self.settings.request_images} images: send fewer")
        stopped = threading.Event()
        with self._images.holding(len(images)):
            return await self._while_connected(request, self._logits(name, images, stopped), stopped)

    async def _logits(
        self, name: str, images: Sequence[bytes], stopped: threading.Event
    ) -> tuple[Adapter, list[Tensor]]:
        if (adapter := self.folder.loaded(name)) is None:
            # shielded: a disk that hangs must not keep the request
            adapter = await asyncio.shield(self.files.call(self.folder.find, name))
        try:
            pixels, inputs = await self.decoders.call(self._prepare, adapter, images, stopped, _LARGE)
            if pixels > _LARGE:
                async with self._pixels.of(pixels):
                    inputs = await self._large.call(self._prepare_large, adapter, images, stopped)
            results = map(asyncio.wrap_future, self._batcher.submit(inputs, adapter))
            return adapter, list(await asyncio.gather(*results))
        except RequestError:
            raise
        except NolaVisionError as error:
            raise RequestError(422, str(error)) from error
        except Exception as error:
            _log.error("the forward pass failed", exc_info=error)
            raise busy("the forward pass failed: try again later") from error

    async def answer(self, make: Callable[..., Result], adapter: Adapter, logits: list[Tensor], *rest: Any) -> Result:
        """`make(adapter, logits, *rest)`: here if the answer is short, which is faster, and otherwise in a thread."""
        if sum(map(len, logits)) <= _SHORT:
            return make(adapter, logits, *rest)
        return await self._answers.call(make, adapter, logits, *rest)

    def _prepare(
        self, adapter: Adapter, images: Sequence[bytes], stopped: threading.Event, most_pixels: float
    ) -> tuple[int, list[Tensor]]:
        """The pixels of the largest image, and an adapter's input `[3, size, size]` for each unless these are too many.

        Once the request is stopped, no further image is decoded.
        """
        pixels, inputs = max(pixels_of(image, self.settings.pixels) for image in images), []
        for number, image in enumerate(images if pixels <= most_pixels else (), 1):
            if stopped.is_set():
                break
            place = "of the request" if len(images) == 1 else f"number {number}"
            inputs.append(adapter.transform(decode(image, place, self.settings.pixels)))
        return pixels, inputs

    def _prepare_large(self, adapter: Adapter, images: Sequence[bytes], stopped: threading.Event) -> list[Tensor]:
        try:
            return self._prepare(adapter, images, stopped, math.inf)[1]
        finally:
            return_memory()

    async def _while_connected(
        self, request: Request, work: Coroutine[Any, Any, Result], stopped: threading.Event
    ) -> Result:
        """The result of a coroutine, which is cancelled after `answer_seconds` or if the client closes the connection.

        It has ended when this returns: what it holds is not in memory any more.

        Args:
            request: whose client is waited for.
            work: the coroutine.
            stopped: is set before it is cancelled.

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
            raise gone() if closed.done() else busy("the request waited too long: try again later")
        finally:
            stopped.set()
            task.cancel()
            closed.cancel()
            await asyncio.gather(task, return_exceptions=True)


def predictions(adapter: Adapter, logits: Sequence[Tensor], top_k: int | None) -> list[list[Prediction]]:
    """The `top_k` most probable classes of each image, 5 by default.

    Raises:
        RequestError: 413: these are too many. 422: a logit is not finite.
    """
    top_k = min(top_k or _TOP_K, len(adapter.class_names))
    if len(logits) * top_k > _MOST_RESULTS:
        raise RequestError(
            413, f"the answer would have more than {_MOST_RESULTS:,} scores: send fewer images, or a smaller top_k"
        )
    try:
        return [adapter.predictions(one, top_k) for one in logits]
    except NolaVisionError as error:
        raise RequestError(422, str(error)) from error


async def _closed(request: Request) -> None:
    """Returns when the client of a request whose body was read closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
