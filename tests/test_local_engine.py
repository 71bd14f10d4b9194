"""The local engine: several workers, crashes, hangs and other sweeps change nothing in the rows."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import light_worker
from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id, store
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import parse
from nola_vision.runs.record import DETERMINISTIC, Row
from nola_vision.sweep import plan
from nola_vision.sweep.engines import local
from nola_vision.sweep.plan import RunSpec

pytestmark = pytest.mark.slow  # separate processes, each of which imports torch

OPTIONS = ["--threads=1", "--trainer.max_steps=20", "--data.test_limit=50", "--trainer.enable_checkpointing=false"]


def specs() -> list[RunSpec]:
    quiet = [*OPTIONS, "--trainer.enable_progress_bar=false"]
    raw, names = load_configs(["quickstart.yaml"]), ["1nn", "linear"]
    config = plan.complete(raw, names, lambda entry: parse(entry, quiet))
    return plan.final_specs(config, [0, 1], [0], names, {})


def results(out: Path) -> dict[tuple[str, str], dict[str, object]]:
    """What must not depend on how a sweep went: each run's status and deterministic columns."""
    rows, problems = store.read_rows(out)
    assert not problems
    kept = {(r.method, r.run_hash): {"status": r.status} | {k: asdict(r)[k] for k in DETERMINISTIC} for r in rows}
    assert len(kept) == len(rows)
    return kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, object]]:
    out = tmp_path_factory.mktemp("undisturbed")
    local.execute(specs(), out, lambda *_: None)
    found = results(out)
    assert len(found) == 4 and {columns["status"] for columns in found.values()} == {"completed"}
    return found


def test_several_workers_change_nothing(undisturbed: dict[object, object], tmp_path: Path) -> None:
    finished: list[Row] = []
    wanted = specs()
    wanted[-1].config["data"]["num_workers"] = 1  # no setting of the result; its process starts one of its own
    elsewhere = store.lock_run(run_id.run_folder(tmp_path, wanted[0].config, "final"))
    elsewhere.__enter__()

    def callback(spec: RunSpec, row: Row | None) -> None:
        if row is not None:
            finished.append(row)
        if len(finished) == 3 and row is not None:  # the first run was waiting meanwhile
            elsewhere.__exit__(None, None, None)

    rows = local.execute(wanted, tmp_path, callback, workers=2)
    assert finished[-1].run_hash == wanted[0].run_hash
    assert results(tmp_path) == undisturbed
    assert [row.run_hash for row in rows] == [spec.run_hash for spec in specs()]
    assert sorted(r.run_hash for r in finished) == sorted(r.run_hash for r in rows)
    again = local.execute(specs(), tmp_path, lambda *_: None)
    assert [row.started for row in again] == [row.started for row in rows]  # each has a row: nothing is done


def light(count: int) -> list[RunSpec]:
    config = {
        "model": {"backbone": {"tag": "b"}, "run_seed": 0, "method": {"class_path": "NOLA"}},
        "data": {"dataset": "digits", "shots": 5}, "protocol": "p", "methods": {"nola": {"class_path": "NOLA"}},
    }  # fmt: skip
    return plan.final_specs(config, range(count), [0], ["nola"], {})


def test_trouble_costs_its_own_run_only(tmp_path: Path) -> None:
    """A worker dies once, dies twice, hangs, dies after its row; one run is locked by another process, one fails."""
    scripts = {0: "die quit", 1: "die", 2: "die die", 3: "hang", 4: "busy busy", 5: "fail"}
    for split, script in scripts.items():
        (tmp_path / f"split{split}.txt").write_text(f"{script} ")
    finished: list[Row] = []
    rows = local.execute(
        light(8), tmp_path, lambda _, row: row and finished.append(row), workers=2, gpus=["7", "9"], hang_seconds=3,
        work=light_worker.serve,
    )  # fmt: skip
    assert [row.split for row in rows] == list(range(8))
    assert [row.split for row in rows if row.status == "failed"] == [2, 5]
    assert rows[2].error == "the worker died (SIGKILL, as when memory runs out), 2 times"
    assert {row.run_hash: row for row in store.read_rows(tmp_path)[0]} == {row.run_hash: row for row in rows}
    assert sorted(row.split for row in finished) == list(range(8))
    devices = [row.device.split() for row in rows if row.device]
    assert {gpu for _, gpu, *_ in devices} == {"7", "9"}
    assert len({process for process, *_ in devices}) < len(devices)  # a process does many runs
    # once more: what failed is tried again, and nothing else
    again = local.execute(light(8), tmp_path, lambda *_: None, work=light_worker.serve)
    assert {row.status for row in again} == {"completed"}
    assert [one == other for one, other in zip(rows, again, strict=True)].count(False) == 2


def test_one_run_under_two_names_is_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [replace(spec, method=name) for spec in light(1) for name in ("a", "b")]
    specs = [replace(spec, config={**spec.config, "method": spec.method}) for spec in specs]
    assert specs[0].run_hash == specs[1].run_hash
    rows = local.execute(specs, tmp_path, lambda *_: None, work=light_worker.serve)
    assert [row.method for row in rows] == ["a", "b"]
    # a worker on the CPU is forked from a process that has imported everything
    assert {str(row.device).split()[2] for row in rows} == {str(sys.platform == "linux")}
    # with the environment of now, not of when that process started
    monkeypatch.setenv("NOLA_VISION_TEST", "later")
    (row,) = local.execute(light(9)[8:], tmp_path, lambda *_: None, work=light_worker.serve)
    assert str(row.device).split()[3] == "later"


def test_a_row_that_cannot_be_written_ends_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "split1.txt").write_text("full ")
    with pytest.raises(NolaVisionError, match="the row cannot be written"):
        local.execute(light(4), tmp_path, lambda *_: None, work=light_worker.serve)
    assert [row.split for row in store.read_rows(tmp_path)[0]] == [0]
    assert not multiprocessing.active_children()


def begun(out: Path) -> bool:
    return bool(list(out.rglob("metrics.csv")))


def sweep(out: Path, *own: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nola_vision.cli.main", "sweep", "--config", "quickstart.yaml", "--splits=0-1"]
    command += ["--inits=0", "--methods=1nn,linear", f"--out={out}", *OPTIONS, "--config=search.yaml", *own]
    return subprocess.Popen(
        command, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "search.yaml").write_text("methods: {linear: {search: null}}")
    return tmp_path / "runs"


def test_a_killed_sweep_goes_on_to_the_same_rows_and_two_share_the_work(
    undisturbed: dict[object, object], out: Path
) -> None:
    first = sweep(out)
    while not begun(out) and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.wait()
    for one in [sweep(out), sweep(out)]:  # the first one's worker may still be running
        printed, _ = one.communicate(timeout=300)
        assert one.returncode == 0, printed
    assert results(out) == undisturbed


@pytest.mark.parametrize("engine", [["--workers=2"], ["--trainer.devices=2", "--trainer.strategy=ddp"]])
def test_ctrl_c_leaves_a_row_and_no_process(engine: list[str], out: Path) -> None:
    """The terminal sends SIGINT to every process of the sweep at once."""
    going = sweep(out, *engine, "--methods=linear", "--trainer.max_steps=100000", "--trainer.max_epochs=100000")
    while not begun(out) and going.poll() is None:
        time.sleep(0.05)
    os.killpg(going.pid, signal.SIGINT)
    try:
        printed, _ = going.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(going.pid, signal.SIGKILL)
        raise
    assert going.returncode == 130 and "Traceback" not in printed, printed
    rows = store.read_rows(out)[0]
    assert 1 <= len(rows) <= 2 and {row.status for row in rows} == {"interrupted"}
    deadline = time.monotonic() + 10
    while alive(going.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(going.pid)


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group_of = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if int(group_of) == group and state != "Z" else []
    return found


def test_two_sweeps_of_runs_on_two_devices_share_the_work(undisturbed: dict[tuple[str, str], dict], out: Path) -> None:
    """All processes of a run do the same run, although only rank 0 sees that another sweep has locked it."""
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp", "--methods=linear"]
    for one in [sweep(out, *devices), sweep(out, *devices)]:
        printed, _ = one.communicate(timeout=300)
        assert one.returncode == 0, printed
    found = results(out)
    alone = {key: columns for key, columns in undisturbed.items() if key[0] == "linear"}
    assert len(found) == len(alone) == 2 and not found.keys() & alone.keys()  # the number of devices is in the hash
    by_loss = [sorted(rows.values(), key=lambda columns: columns["train_loss"]) for rows in (found, alone)]
    for columns, expected in zip(*by_loss, strict=True):
        assert columns["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert columns["test_accuracy"] == expected["test_accuracy"]


def test_an_entry_that_cannot_be_trained_costs_the_others_nothing(out: Path) -> None:
    """All search runs of full-ft end in NaN; a failure of this sweep's time is not tried again by another one."""
    (out.parent / "search.yaml").write_text("methods: {full-ft: {search: {lr: [1.e+8, 1.e+9]}}}")
    both = [sweep(out, "--methods=1nn,full-ft") for _ in range(2)]
    for one in both:
        printed, _ = one.communicate(timeout=300)
        assert one.returncode == 1, printed
        assert "full-ft: search runs only; the last failure" in " ".join(printed.replace("\u2502", " ").split())
    rows = store.read_rows(out)[0]
    assert sorted((row.method, row.stage, row.status) for row in rows) == [
        *[("1nn", "final", "completed")] * 2, *[("full-ft", "search", "failed")] * 2
    ]  # fmt: skip


def test_a_row_file_of_garbage_is_named_before_the_first_run(out: Path) -> None:
    folder = out / "vit_mini_patch4_32.mae-digits-5shot-quickstart" / "linear" / "split9-init0-0123456789"
    folder.mkdir(parents=True)
    (folder / "row.json").write_text("{garbage")
    ended = sweep(out)
    printed, _ = ended.communicate(timeout=100)
    assert ended.returncode == 2 and "split9-init0-0123456789/row.json is not JSON: delete it" in printed
    assert len(list(out.rglob("row.json"))) == 1
