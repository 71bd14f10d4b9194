"""Several processes of one run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only


def is_main_process(run_config: Mapping[str, Any] | None = None) -> bool:
    """Whether this is the first process of a run, the one that writes its files.

    Args:
        run_config: of the run; needed for runs on several nodes before the trainer exists.
    """
    nodes = ((run_config or {}).get("trainer") or {}).get("num_nodes") or 1
    if nodes > 1 and int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0) > 0:
        return False  # the first process of another node, whose rank Lightning has not set yet
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]
