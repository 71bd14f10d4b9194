"""Figure 2: what PRANC and NOLA reach with as many parameters."""

import numpy as np
import pytest

from nola_vision.adapters.subspace_rank import coverage


@pytest.mark.parametrize("side", [16, 32])
def test_nola_covers_more_at_every_point_and_is_full_long_before(side: int) -> None:
    sizes = [10, 20, 50, 100, 200, 500]
    pranc = [coverage("pranc", side, n) for n in sizes]
    nola = [coverage("nola", side, n) for n in sizes]
    assert pranc == [min(n, side**2) / side**2 for n in sizes]
    assert all(one > other or one == other == 1 for one, other in zip(nola, pranc, strict=True))
    full = {name: next((n for n, share in zip(sizes, shares, strict=True) if share == 1), 10**9)
            for name, shares in (("nola", nola), ("pranc", pranc))}  # fmt: skip
    assert full["nola"] <= 100 and full["nola"] <= full["pranc"] / 4


def test_rank_is_that_of_the_covariance() -> None:
    """At d = 4 and k = l = 2 the changes span the products A_i B_j, four dimensions of sixteen."""
    assert coverage("nola", 4, 4, rank=2) == 4 / 16
    assert np.isclose(coverage("pranc", 4, 3), 3 / 16)
