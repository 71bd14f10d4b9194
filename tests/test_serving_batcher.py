"""The batcher of the service: what is computed together, what fails alone, what is not computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch

from nola_vision.serving.http.batcher import Batcher


class Sums:
    """Each image's sum times its adapter, which is a number; negative adapters cannot be computed."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, images: torch.Tensor, adapters: Any) -> list[torch.Tensor]:
        self.entered.set()
        assert self.open.wait(10)
        self.calls.append(list(adapters))
        if min(adapters) < 0:
            raise ValueError(f"{adapters} cannot be computed")
        return [image.sum() * adapter for image, adapter in zip(images, adapters, strict=True)]


@pytest.fixture
def sums() -> Sums:
    return Sums()


@pytest.fixture
def batcher(sums: Sums) -> Iterator[Batcher]:
    batcher = Batcher(sums, max_batch_size=8, max_delay=0.03)
    yield batcher
    sums.open.set()
    batcher.close()


def submit(batcher: Batcher, adapter: int, *shape: int) -> Future[torch.Tensor]:
    (future,) = batcher.submit([torch.ones(shape or (2,))], adapter)
    return future


def test_what_waits_is_computed_together(batcher: Batcher, sums: Sums) -> None:
    sums.open.clear()
    first = submit(batcher, 1)
    assert sums.entered.wait(5)
    others = [submit(batcher, number) for number in range(2, 12)]
    sums.open.set()
    assert [future.result(5).item() for future in (first, *others)] == [2.0 * number for number in range(1, 12)]
    assert sums.calls == [[1], [*range(2, 10)], [10, 11]]


def test_the_first_image_waits_for_others_only_a_moment(batcher: Batcher, sums: Sums) -> None:
    start = time.monotonic()
    futures = [submit(batcher, 1)]
    futures.append(submit(batcher, 2))
    wait(futures, 5)
    assert sums.calls == [[1, 2]]
    assert 0.03 <= time.monotonic() - start


def test_a_full_batch_does_not_wait(sums: Sums) -> None:
    batcher = Batcher(sums, max_batch_size=3, max_delay=100)
    wait([submit(batcher, number) for number in range(3)], 10)
    assert sums.calls == [[0, 1, 2]]
    batcher.close()


def test_shapes_are_not_mixed(batcher: Batcher, sums: Sums) -> None:
    futures = [submit(batcher, 1, 2), submit(batcher, 2, 3), submit(batcher, 3, 2)]
    assert [future.result(5).item() for future in futures] == [2, 6, 6]
    assert sums.calls == [[1, 3], [2]]


def test_only_what_cannot_be_computed_fails(batcher: Batcher) -> None:
    numbers = [1, 2, -3, 4, 5, -6, 7]
    futures = [submit(batcher, number) for number in numbers]
    for number, future in zip(numbers, futures, strict=True):
        if number < 0:
            assert isinstance(future.exception(5), ValueError)
        else:
            assert future.result(5).item() == 2 * number


def test_what_was_cancelled_is_not_computed(batcher: Batcher, sums: Sums) -> None:
    sums.open.clear()
    first = submit(batcher, 1)
    assert sums.entered.wait(5)
    second, third = submit(batcher, 2), submit(batcher, 3)
    assert second.cancel() and not first.cancel()
    sums.open.set()
    assert third.result(5).item() == 6
    assert sums.calls == [[1], [3]]


def test_closing_finishes_what_was_taken(batcher: Batcher, sums: Sums) -> None:
    sums.open.clear()
    futures = [submit(batcher, number) for number in range(20)]
    threading.Timer(0.05, sums.open.set).start()
    batcher.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        submit(batcher, 1)


def test_an_idle_batcher_sleeps(batcher: Batcher) -> None:
    submit(batcher, 1).result(5)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_observed_are_waits_distinct_adapters_and_seconds() -> None:
    observed = []
    batcher = Batcher(Sums(), 8, 0.02, lambda *values: observed.append(values))
    futures = [future for adapter in (5, 7, 5) for future in batcher.submit([torch.ones(1)], adapter)]
    wait(futures, 5)
    batcher.close()
    ((waited, distinct, seconds),) = observed
    assert len(waited) == 3 and 0.02 <= max(waited) < 1 and distinct == 2 and 0 <= seconds < 1


def test_the_worker_survives_an_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*values: Any) -> None:
        raise ValueError("not counted")

    batcher = Batcher(Sums(), 8, 0, fail)
    assert [submit(batcher, number).result(5).item() for number in (1, 2)] == [2, 4]
    assert batcher.alive
    batcher.close()
    assert not batcher.alive and "not counted" in caplog.text
