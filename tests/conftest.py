"""The tests import `reference.py`, which lies beside them, and run with as many threads as the machine's two cores."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
