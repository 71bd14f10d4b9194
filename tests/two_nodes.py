"""A Ray cluster of two nodes on this machine, one CPU each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ray reads them once, when it is imported
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="a-token-of-the-tests-that-is-long-enough",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # 15 by default: other tests on the same cores would come first
)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """The cluster. Its processes inherit this one's environment."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
