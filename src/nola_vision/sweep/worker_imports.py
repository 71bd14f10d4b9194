"""What a worker imports before its first run. Workers on the CPU are forked from a process that has imported this."""

from __future__ import annotations

from nola_vision.common.imports import without_collections

with without_collections():
    from nola_vision.runs.cross_validation import run_with_estimate as run_with_estimate
