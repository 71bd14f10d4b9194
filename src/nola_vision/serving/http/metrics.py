"""The service's metrics for Prometheus. None of them is per adapter: 10,000 names would be 10,000 time series each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one service.

    Args:
        cache_counts: hits and misses of the bank's cache of factors since the start.
        labels: of every metric, for one of several services that a scrape may reach.
    """

    def __init__(self, cache_counts: Callable[[], tuple[int, int]], labels: Mapping[str, str] | None = None) -> None:
        self._registry, self._labels = CollectorRegistry(), dict(labels or {})
        self._requests = Counter(
            "nola_vision_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self._queue = self._histogram("queue_seconds", "Time that an image waited for its batch", _SECONDS)
        self._forward = self._histogram("forward_seconds", "Time of a batch's forward pass", _SECONDS)
        self._images = self._histogram("batch_images", "Images per batch", _COUNTS)
        self._adapters = self._histogram("batch_adapters", "Distinct adapters per batch", _COUNTS)
        self._cache_counts = cache_counts

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"nola_vision_{name}", text, buckets=buckets, registry=self._registry)

    def request(self, route: str, status: int) -> None:
        """Counts an answered request, by the route's pattern."""
        self._requests.labels(route, str(status)).inc()

    def batch(self, waited: Sequence[float], distinct: int, seconds: float) -> None:
        """Counts a batch, see `Batcher`."""
        for wait in waited:
            self._queue.observe(wait)
        self._forward.observe(seconds)
        self._images.observe(len(waited))
        self._adapters.observe(distinct)

    def collect(self) -> Iterator[Metric]:
        """All metrics, for `generate_latest`."""
        hits, misses = self._cache_counts()
        cache = (
            CounterMetricFamily("nola_vision_cache_hits", "Factors of adapters found in the cache", hits),
            CounterMetricFamily("nola_vision_cache_misses", "Factors of adapters that were computed", misses),
        )
        for metric in (*self._registry.collect(), *cache):
            metric.samples = [one._replace(labels={**self._labels, **one.labels}) for one in metric.samples]
            yield metric

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self)
