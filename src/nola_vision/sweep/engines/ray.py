"""The Ray engine: runs go to the nodes of a cluster, and the driver writes the files that they return."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_whole
from nola_vision.common.progress import let_idle_threads_sleep
from nola_vision.runs import run_id
from nola_vision.runs.record import Row
from nola_vision.runs.store import LOCK_FILE, ROW_FILE, BusyError, lock_run, read_row, write_row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import FIRST_BATCH, HANG_SECONDS, POLL_SECONDS, RunCallback, RunQueue, crashed_row
from nola_vision.training import feature_cache

NODE_TRIES = 5  # the runs did not cause the death of their node
_REACH_SECONDS = 10.0

_log = logging.getLogger(__name__)

Files = Mapping[str, bytes]


def execute(
    specs: Sequence[RunSpec],
    out: Path,
    callback: RunCallback,
    address: str = "auto",
    workers: int | None = None,
    gpus: float | None = None,
    hang_seconds: float = HANG_SECONDS,
    work: Callable[[run_id.Config, run_id.Stage, str, float, Mapping[str, str], str | None], Files] | None = None,
) -> list[Row]:
    """Does every run that is not completed yet, as `local.execute` does, on a running Ray cluster.

    A run takes as many CPUs as its `threads` (default 1) and works in a temporary folder of its node. The driver locks
    the run's folder meanwhile and writes the files, so nodes need no shared disk. A run whose worker dies or hangs is
    tried once more, one whose node dies up to `NODE_TRIES` times in all.

    Args:
        specs: the runs.
        out: the folder of all runs, at the driver.
        callback: as in `RunQueue`.
        address: of the cluster, as `ray.init` takes it; `auto` finds the one of this machine.
        workers: runs at a time (default: as many as the nodes have resources for).
        gpus: per run, from 0 to 1 (default: 1 if the cluster has GPUs and the runs' accelerator is not the CPU).
        hang_seconds: as in `local.execute`.
        work: what a node does; returns the files of a run's folder.

    Raises:
        NolaVisionError: Ray is not installed, no cluster can be reached, or a node cannot do runs.
    """
    if gpus is not None and not 0 <= gpus <= 1:
        raise NolaVisionError(f"a run takes from 0 to 1 GPUs, not {gpus:g}: give a fraction for several runs on one")
    ray = _connected(address)
    queue = RunQueue(specs, out, callback)
    running: dict[Any, tuple[RunSpec, ExitStack]] = {}
    try:
        on_cpu = all((spec.config.get("trainer") or {}).get("accelerator") == "cpu" for spec in specs)
        own_gpus = _gpus(ray, gpus, on_cpu)
        needs = {"CPU": max([spec.config.get("threads") or 1 for spec in specs], default=1), "GPU": own_gpus}
        # a process keeps GPU memory until it ends; options() does not accept max_calls
        once = {"max_calls": 1} if own_gpus else {}
        do = ray.remote(num_cpus=needs["CPU"], num_gpus=own_gpus, max_retries=0, **once)(work or _work)
        waited, cache_gib = False, os.environ.get(feature_cache.VARIABLE)
        while not queue.ended:
            room = _room(ray.nodes(), needs)
            if not room and not waited:
                asked = " and ".join(f"{count:g} {name}" for name, count in needs.items() if count)
                _log.warning("no node of the cluster has the %s that a run takes: waiting for one", asked)
                waited = True
            most = room + 1  # a waiting run makes an autoscaling cluster grow
            while len(running) < min(most, workers or most) and (spec := queue.take()) is not None:
                if (lock := _lock(queue, spec)) is not None:
                    call = spec.config, spec.stage, os.getcwd(), hang_seconds, _versions(), cache_gib
                    running[do.remote(*call)] = spec, lock
            if not running:
                time.sleep(0 if queue.ended else POLL_SECONDS)
                continue
            for ended in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                spec, lock = running.pop(ended)
                with lock:
                    _receive(ray, ended, spec, lock, queue)
    finally:
        for left, (spec, lock) in running.items():
            with lock, suppress(Exception):
                ray.cancel(left, force=True)
                write_row(queue.folder(spec), crashed_row(spec, "interrupted", "interrupted before it ended"))
        ray.shutdown()
    return queue.rows()


def fastest_precision(accelerator: Any, address: str = "auto", gpus: float | None = None) -> str:
    """The value of `trainer.precision` that `auto` resolves to on a cluster.

    Every node that has the resources for a run is asked, and a 16-bit format is chosen if it is fastest on all of them,
    since all runs of a sweep have one value.

    Args:
        accelerator: the config's `trainer.accelerator`.
        address: as in `execute`.
        gpus: as in `execute`.

    Raises:
        NolaVisionError: as `execute`.
    """
    ray = _connected(address)
    try:
        own_gpus = _gpus(ray, gpus, accelerator == "cpu")
        needs = {"CPU": 1, "GPU": own_gpus}
        ask = ray.remote(num_cpus=1, num_gpus=own_gpus)(_fastest)
        on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        nodes = [on(node["NodeID"], soft=False) for node in ray.nodes() if _room([node], needs)]
        asked = [ask.options(scheduling_strategy=node).remote(accelerator) for node in nodes or ["DEFAULT"]]
        found = set(ray.get(asked))
    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:
        raise NolaVisionError(
            f"no node of the cluster states its fastest precision ({' '.join(str(error).split())[:200]}): give "
            "--trainer.precision bf16-mixed or 32-true"
        ) from error
    finally:
        ray.shutdown()
    return str(found.pop()) if len(found) == 1 else "32-true"


def _fastest(accelerator: Any) -> str:
    """The fastest precision of a node."""
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in `_work`
    from nola_vision.training.precision import fastest

    return fastest(accelerator)


def _gpus(ray: Any, asked: float | None, on_cpu: bool) -> float:
    """The GPUs of a run."""
    return asked if asked is not None else 0.0 if on_cpu else min(1.0, ray.cluster_resources().get("GPU", 0))


def _connected(address: str) -> Any:
    """The package ray, connected to a cluster."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 seconds each
    try:
        import ray
    except ImportError as error:
        raise NolaVisionError("--engine ray needs Ray: pip install 'nola-vision[ray]'") from error
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in host:  # fails at once, while Ray takes long
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # a wrong address, a wrong token and another version of Ray raise different exceptions
        raise NolaVisionError(
            f"no Ray cluster answers at {address!r} ({' '.join(str(error).split())[:200]}): start one with `ray "
            "start --head`, and the same RAY_AUTH_MODE and RAY_AUTH_TOKEN as in this shell"
        ) from error
    return ray


def _room(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> int:
    """How many runs the living nodes have resources for."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    fits = ([math.floor(node.get(name, 0) / need + 1e-6) for name, need in needs.items() if need] for node in alive)
    return sum(min(counts) for counts in fits)


def _lock(queue: RunQueue, spec: RunSpec) -> ExitStack | None:
    """The lock of a run's folder; None if another process holds it, or has done the run meanwhile."""
    lock = ExitStack()
    try:
        lock.enter_context(lock_run(queue.folder(spec)))
    except BusyError:
        queue.postpone(spec)
        return None
    if queue.finish_if_done(spec):
        lock.close()
        return None
    return lock


def _receive(ray: Any, ended: Any, spec: RunSpec, lock: ExitStack, queue: RunQueue) -> None:
    """Writes the files of a run to its folder, the row last; or releases the lock and reports a crash."""
    folder = queue.folder(spec)
    try:
        files: Files = ray.get(ended)
    except ray.exceptions.RayTaskError as error:  # an error of a run is in its row: this is one of the node
        lines = str(error.cause).strip().splitlines() or [repr(error.cause)]
        raise NolaVisionError(
            f"a node of the cluster cannot do runs ({lines[-1]}): every node needs nola-vision and all that the config "
            "names"
        ) from error
    except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
        lock.close()
        queue.crash(spec, "its node died", NODE_TRIES)
        return
    except ray.exceptions.RayError as error:
        lock.close()
        queue.crash(spec, f"its worker on the cluster died or hung ({type(error).__name__})")
        return
    for name in sorted(files, key=lambda name: name == ROW_FILE):
        try:
            write_whole(folder / name, files[name])
        except OSError as error:
            raise NolaVisionError(
                f"{folder / name} cannot be written ({error.strerror}): free disk space there, and sweep again"
            ) from error
    queue.finish(spec, read_row(folder / ROW_FILE))


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("nola-vision", "torch")}


def _work(
    config: run_id.Config,
    stage: run_id.Stage,
    cwd: str,
    hang_seconds: float,
    versions: Mapping[str, str],
    cache_gib: str | None,
) -> Files:
    """Does a run on a node, and returns the files of its folder by name.

    Args:
        config: of the run.
        stage: of the run.
        cwd: the driver's, for relative paths in the config.
        hang_seconds: the process exits if no batch ends for so long.
        versions: of the driver's packages.
        cache_gib: the driver's `feature_cache.VARIABLE`; without one, that of the node applies.

    Raises:
        NolaVisionError: the node has other versions, so its rows might differ from the driver's.
    """
    for name, own in _versions().items():
        if own != versions[name]:
            raise NolaVisionError(
                f"the node {socket.gethostname()} has {name} {own} and the driver {versions[name]}: install the same"
            )
    let_idle_threads_sleep()  # the environment is that of `ray start`
    if cache_gib is not None:
        os.environ[feature_cache.VARIABLE] = cache_gib
    faulthandler.dump_traceback_later(FIRST_BATCH * hang_seconds, exit=True)
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not set it for a task without GPUs
    from nola_vision.common import process_cache
    from nola_vision.runs.cross_validation import run_with_estimate

    process_cache.keep()
    with suppress(OSError):
        os.chdir(cwd)
    last = 0.0

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            faulthandler.dump_traceback_later(hang_seconds, exit=True)

    try:
        with TemporaryDirectory(prefix="nola-vision-") as out:
            run_with_estimate(config, out, stage, keep_going=True, heartbeat=heartbeat)
            folder = run_id.run_folder(out, config, stage)
            files = [path for path in folder.iterdir() if path.is_file() and path.name != LOCK_FILE]
            return {path.name: path.read_bytes() for path in files}
    finally:
        faulthandler.cancel_dump_traceback_later()
