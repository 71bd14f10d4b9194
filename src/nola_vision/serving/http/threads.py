"""Threads for what would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Threads:
    """Threads of one kind. Used by the event loop's thread only.

    A call waits for a free thread in its coroutine, not in the executor's queue: if it is cancelled, nothing keeps its
    arguments. Once its function runs, a cancelled call ends with the function, so what it holds is counted as long as
    it is in memory.

    Args:
        count: how many functions run at once.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        # torch's own threads are for the forward pass
        self._pool = ThreadPoolExecutor(count, name, compute_with, (1,))
        self._free = asyncio.Semaphore(count)

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function in a thread."""
        async with self._free:
            running = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
            try:
                await asyncio.wait((running,))
            except asyncio.CancelledError:
                await asyncio.gather(running, return_exceptions=True)
                raise
            return running.result()

    def close(self) -> None:
        """Returns when all functions that run have returned."""
        self._pool.shutdown()


def compute_with(count: int) -> None:
    """Sets the number of threads that torch computes with in this thread, whatever other threads set later."""
    torch.get_num_threads()  # without it, torch's first operation here takes the number that any thread has set last
    torch.set_num_threads(count)


class Share:
    """A quantity that calls have at once, and wait for in the order of their arrival.

    Args:
        most: of all calls at once. A call that needs more has all of it.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._turn, self._returned = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def of(self, count: int) -> AsyncIterator[None]:
        """Waits until so much is free, and has it during the block."""
        count = min(count, self._most)
        async with self._turn:
            while self._taken + count > self._most:
                self._returned.clear()
                await self._returned.wait()
            self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            self._returned.set()
