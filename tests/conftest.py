"""The tests import helpers that lie beside them, and run on one thread each: several processes may share the cores."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
# Facts about files are not stored in the home folder. Matplotlib's font cache is expensive to make, so it stays there.
_cache = tempfile.TemporaryDirectory()
os.environ.setdefault(
    "MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache/")).expanduser() / "matplotlib")
)
os.environ["XDG_CACHE_HOME"] = _cache.name
