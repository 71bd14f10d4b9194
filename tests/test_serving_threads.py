"""The threads of the service: what a call keeps in memory, and what calls wait for."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import torch

from nola_vision.serving.http.threads import Share, Threads, compute_with


class Content:
    """An argument whose end can be observed."""


def test_a_cancelled_call_that_waits_for_a_thread_keeps_nothing() -> None:
    free = threading.Event()

    async def main() -> None:
        threads = Threads(1, "test")
        first = asyncio.ensure_future(threads.call(free.wait, 10))
        content = Content()
        second = asyncio.ensure_future(threads.call(id, content))
        await asyncio.sleep(0.02)
        there = weakref.ref(content)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        del content, second
        await asyncio.sleep(0.01)  # until then the loop has the exception, with its frames
        gc.collect()
        assert there() is None and not first.done()
        free.set()
        assert await first is True
        threads.close()

    asyncio.run(main())


def test_a_thread_computes_with_its_own_number_of_threads_whatever_others_set_afterwards() -> None:
    asked, set_by_others, counts = threading.Event(), threading.Event(), []

    def work() -> None:
        compute_with(3)
        asked.set()
        set_by_others.wait(10)
        torch.ones(10**6).sum()  # the thread's first operation
        counts.append(torch.get_num_threads())

    before, thread = torch.get_num_threads(), threading.Thread(target=work)
    thread.start()
    asked.wait(10)
    other = threading.Thread(target=compute_with, args=(1,))
    other.start()
    other.join()
    set_by_others.set()
    thread.join()
    assert counts == [3] and torch.get_num_threads() == before


def test_a_cancelled_call_that_runs_ends_with_its_function() -> None:
    begun, free, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        free.wait(10)
        ended.append(True)
        raise ValueError("nobody reads it")

    async def main() -> None:
        threads = Threads(1, "test")
        call = asyncio.ensure_future(threads.call(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait((call,), timeout=0.05)
        assert not call.done()
        free.set()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled() and ended
        assert await threads.call(abs, -1) == 1
        threads.close()

    asyncio.run(main())


def test_shares_wait_in_the_order_of_their_arrival() -> None:
    async def main() -> None:
        share, order = Share(4), []
        free = [asyncio.Event() for _ in range(4)]

        async def one(number: int, count: int) -> None:
            async with share.of(count):
                order.append(number)
                await free[number].wait()

        calls = [asyncio.ensure_future(one(number, count)) for number, count in enumerate((3, 100, 1, 1))]
        await asyncio.sleep(0.01)
        assert order == [0]  # the second takes all, and the others, which would fit, do not overtake it
        free[0].set()
        await asyncio.sleep(0.01)
        assert order == [0, 1]
        calls[1].cancel()
        await asyncio.sleep(0.01)
        assert order == [0, 1, 2, 3]
        for event in free:
            event.set()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(main())
