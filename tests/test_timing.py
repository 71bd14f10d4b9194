"""Estimates of how long runs take, with a clock that the work itself sets."""

from dataclasses import replace
from pathlib import Path

import pytest

from nola_vision.runs import timing
from nola_vision.sweep import runner
from nola_vision.sweep.progress import EntryProgress
from nola_vision.training.frozen import FrozenClassifier
from tiny import TINY, tiny

FIXED, PER_IMAGE = 0.5, 0.25  # seconds of a step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("limit", "count"), [(1000.0, 16), (3.0, 6), (0.1, 2)])
def test_seconds_per_image_of_as_many_as_the_limit_admits(clock: list[float], limit: float, count: int) -> None:
    done = []

    def work(images: int) -> None:
        done.append(images)
        clock[0] += FIXED + PER_IMAGE * images

    assert timing._per_image(work, 16, limit) == pytest.approx(PER_IMAGE + FIXED / count)
    assert max(done) == count and timing._per_image(lambda _: None, 16, limit) == 0


def test_a_run_is_the_sum_of_its_parts(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """30 training images in batches of 90 or 10, at 1/8 s per image."""
    asked = []
    monkeypatch.setattr(timing, "_per_image", lambda work, most, limit: asked.append(most) or 0.125)
    found = timing.time_run(tiny("nola", data={"batch_size": 90}))
    counts = found.test / 0.125, found.validation / 0.125
    assert (
        asked[-1] == 30 and found.training == 3 * 30 * 0.125 and found.passes == 0 and counts[0] == 50 and counts[1] > 0
    )
    assert found.final == found.training + found.test and found.search == found.training + found.validation
    validated = timing.time_run(tiny("nola", trainer={"check_val_every_n_epoch": 1, "max_steps": 4}))
    assert validated.passes == 3 and validated.final == validated.training + 3 * validated.validation + validated.test
    assert validated.training == pytest.approx(40 * 0.125)
    assert timing.training_seconds(tiny("nola")) == found.training
    fit = FrozenClassifier.fit
    monkeypatch.setattr(FrozenClassifier, "fit", lambda *given: (clock.__setitem__(0, clock[0] + 7), fit(*given))[1])
    frozen = timing.time_run(tiny("1nn"))
    assert (frozen.training, frozen.test, frozen.split) == (7.0, 0.0, 30 * 0.125)
    assert (frozen.pool, frozen.tested) == (found.validation, found.test)


def test_a_sweep_counts_search_runs_final_runs_and_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    time = timing.RunTime(training=10.0, validation=2.0, passes=0, test=3.0, split=5.0, pool=4.0, tested=3.0)
    monkeypatch.setattr(timing, "time_run", lambda run_config, limit: time)
    sweep = runner.prepare(TINY, ["nola"], [], [], [0, 1, 2, 3], [0], (1, 1))
    entry = EntryProgress("nola", search=2, final=4, done=0, seconds=None)
    (estimated,), shared = sweep.timed([entry])
    assert estimated == replace(entry, seconds=(2 * 12.0 + 4 * 13.0) / 6, estimated=True) and shared == 4 * 5.0 + 7.0
