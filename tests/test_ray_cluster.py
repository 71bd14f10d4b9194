"""The Ray engine on a real cluster of two nodes: lost nodes and processes change nothing in the rows."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id, store
from nola_vision.runs.record import Row
from nola_vision.sweep.engines import local
from nola_vision.sweep.engines import ray as ray_engine
from nola_vision.sweep.plan import RunSpec
from nola_vision.training import precision
from test_local_engine import light, results, specs
from two_nodes import two_nodes

pytestmark = pytest.mark.slow  # processes of their own, each of which imports torch

pytest.importorskip("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no node has it


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with two_nodes() as found:
        yield found


def test_its_rows_are_the_local_engines(cluster, tmp_path: Path) -> None:
    local.execute(specs(), tmp_path / "here", lambda *_: None)
    calls: list[tuple[str, bool]] = []
    rows = ray_engine.execute(
        specs(), tmp_path / "ray", lambda spec, row: calls.append((spec.run_hash, row is not None)), cluster.address
    )
    assert results(tmp_path / "ray") == results(tmp_path / "here")
    assert [row.run_hash for row in rows] == [spec.run_hash for spec in specs()]
    assert sorted(calls) == sorted((row.run_hash, ended) for row in rows for ended in (False, True))
    for kept in ("metrics.csv", "adapter.safetensors"):
        folders = [sorted(p.parent.name for p in (tmp_path / out).rglob(kept)) for out in ("here", "ray")]
        assert folders[0] == folders[1] != []
    again = ray_engine.execute(specs(), tmp_path / "ray", lambda *_: None, cluster.address)
    assert [row.started for row in again] == [row.started for row in rows]


def test_the_nodes_are_asked_for_the_fastest_precision(cluster) -> None:
    found = ray_engine.fastest_precision("cpu", cluster.address)
    assert found == precision.fastest("cpu")  # all nodes are this machine


def scripted(
    config, stage, cwd: str, hang_seconds: float, versions: dict[str, str], cache_gib: str | None
) -> dict[str, bytes]:
    """Work that trains nothing: what goes wrong with a run is written in a file."""
    os.chdir(cwd)
    script = Path(f"split{config['data']['split_seed']}.txt")
    event, _, rest = (script.read_text() if script.exists() else "").partition(" ")
    script.write_text(rest)
    if event == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "raise":
        raise ImportError("No module\n\nnamed 'torch'")
    while event == "wait" and not Path("node-lost").exists():
        Path(f"{script}-waits").touch()
        time.sleep(0.1)
    return {"row.json": Row.of(config, stage, "completed", device=str(os.getpid())).to_json().encode(), "log": b"1"}


def test_trouble_costs_its_own_run_only(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies once, dies twice; one run is locked by another process at first."""
    monkeypatch.chdir(tmp_path)
    for split, events in {0: "die ", 1: "die die "}.items():
        Path(f"split{split}.txt").write_text(events)
    wanted = light(5)
    elsewhere = store.lock_run(run_id.run_folder("runs", wanted[3].config, "final"))
    elsewhere.__enter__()

    def callback(spec: RunSpec, row: Row | None) -> None:
        if spec.split == 4 and row is not None:
            elsewhere.__exit__(None, None, None)

    rows = ray_engine.execute(wanted, Path("runs"), callback, cluster.address, work=scripted)
    assert [row.split for row in rows] == list(range(5))
    assert {row.split: row.error for row in rows if row.status == "failed"} == {
        1: "its worker on the cluster died or hung (WorkerCrashedError), 2 times",
    }
    assert {row.run_hash: row for row in store.read_rows("runs")[0]} == {row.run_hash: row for row in rows}
    assert len(list(Path("runs").rglob("log"))) == 4


def test_a_node_that_can_do_no_run_ends_the_sweep(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("split1.txt").write_text("raise ")
    with pytest.raises(NolaVisionError, match=r"cannot do runs \(named 'torch'\)"):
        ray_engine.execute(light(3), Path("runs"), lambda *_: None, cluster.address, workers=1, work=scripted)
    assert [row.split for row in store.read_rows("runs")[0]] == [0]
    with pytest.raises(NolaVisionError, match="has torch .* and the driver 1.0"):
        ray_engine._work({}, "final", ".", 1.0, {**ray_engine._versions(), "torch": "1.0"}, None)


def test_a_worker_that_hangs_exits(cluster, tmp_path: Path) -> None:
    (row,) = ray_engine.execute(specs()[:1], tmp_path, lambda *_: None, cluster.address, hang_seconds=0.01)
    assert (
        row.status == "failed"
        and row.error
        and "its worker on the cluster died or hung (WorkerCrashedError), 2 times" in row.error
    )
    assert store.read_rows(tmp_path)[0] == [row] and row.started and row.versions


def test_ctrl_c_writes_rows_of_running_runs(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("split1.txt").write_text("wait ")

    def stop(spec: RunSpec, row: Row | None) -> None:
        if row is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ray_engine.execute(light(2), Path("runs"), stop, cluster.address, work=scripted)
    assert {row.split: row.status for row in store.read_rows("runs")[0]} == {0: "completed", 1: "interrupted"}
    with store.lock_run(run_id.run_folder("runs", light(2)[1].config, "final")):
        pass  # it is not locked


def test_room() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert ray_engine._room(nodes, {"CPU": 2, "GPU": 0}) == 5
    assert ray_engine._room(nodes, {"CPU": 1, "GPU": 0.1}) == 8
    assert ray_engine._room(nodes, {"CPU": 0.1, "GPU": 0.1}) == 10
    assert ray_engine._room(nodes, {"CPU": 16, "GPU": 0}) == 0


def test_the_command_line(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sweep", "--config=quickstart.yaml", "--methods=1nn", "--splits=0", f"--out={tmp_path}", "--threads=1"]
    asked += ["--data.test_limit=50", "--engine=ray"]
    assert main([*asked, f"--address={cluster.address}"]) == 0
    assert [row.status for row in store.read_rows(tmp_path)[0]] == ["completed"]
    for wrong, said in {
        "--gpus-per-run=2": "from 0 to 1 GPUs, not 2",
        "--gpus-per-run=nan": "from 0 to 1 GPUs, not nan",
        "--trainer.devices=2": "on Ray each run has one device",
        "--engine=local": "--address and --gpus-per-run are for --engine ray",
    }.items():
        assert main([*asked, f"--address={cluster.address}", wrong]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_no_cluster_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NolaVisionError, match="no Ray cluster answers at 'nowhere:1'"):
        ray_engine.execute([], tmp_path, lambda *_: None, "nowhere:1")


def test_runs_of_a_node_that_died_are_tried_again(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in range(2):
        Path(f"split{split}.txt").write_text("wait ")

    def remove_node() -> None:
        while not all(Path(f"split{split}.txt-waits").exists() for split in range(2)):
            time.sleep(0.1)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        Path("node-lost").touch()

    removing = threading.Thread(target=remove_node)
    removing.start()
    rows = ray_engine.execute(light(4), Path("runs"), lambda *_: None, cluster.address, work=scripted)
    removing.join()
    assert [row.status for row in rows] == ["completed"] * 4
    cluster.add_node(num_cpus=1)
