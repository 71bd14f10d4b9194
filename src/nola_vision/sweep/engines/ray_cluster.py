"""The Ray engine: runs go to the nodes of a cluster, and their files come back by way of the driver."""

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
from nola_vision.runs.store import LOCK_FILE, ROW_FILE, BusyError, claim, read_row, write_row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import FIRST_BATCH, HANG_SECONDS, POLL_SECONDS, Note, RunQueue, row_of_a_lost_run

NODE_TRIES = 5  # a node's loss is no fault of the runs that were on it
_REACH_SECONDS = 10.0

_log = logging.getLogger(__name__)

Files = Mapping[str, bytes]


def execute(
    specs: Sequence[RunSpec],
    out: Path,
    note: Note,
    address: str = "auto",
    slots: int | None = None,
    gpus: float | None = None,
    hang_seconds: float = HANG_SECONDS,
    work: Callable[[run_id.Config, run_id.Stage, str, float, Mapping[str, str]], Files] | None = None,
) -> list[Row]:
    """Does every run that has no row of a completed run yet, as `local.execute` does, on a running Ray cluster.

    A run takes as many CPUs as its `threads` (1 where it says nothing), works in a temporary folder of its node, and
    its files are written by the driver, which holds the claim on the run's folder meanwhile: no disk need be shared. A
    run whose process dies or hangs is tried once more, one whose node is lost up to `NODE_TRIES` times in all.

    Args:
        specs: the runs.
        out: the folder of all runs, at the driver.
        note: as in `RunQueue`.
        address: of the cluster, as `ray.init` takes it; `auto` finds the one of this machine.
        slots: runs at a time; as many as there is room for unless said otherwise.
        gpus: that a run takes, from 0 to 1; one where the cluster has any and the runs' accelerator is not the CPU,
            unless said otherwise.
        hang_seconds: as in `local.execute`.
        work: what is done on a node; returns the files of a run's folder.

    Raises:
        NolaVisionError: Ray is not installed, there is no cluster to be reached, or a node of it can do no run.
    """
    if gpus is not None and not 0 <= gpus <= 1:
        raise NolaVisionError(f"a run takes from 0 to 1 GPUs, not {gpus:g}: give a fraction for several runs on one")
    ray = _connected(address)
    queue = RunQueue(specs, out, note)
    running: dict[Any, tuple[RunSpec, ExitStack]] = {}
    try:
        on_cpu = all((spec.config.get("trainer") or {}).get("accelerator") == "cpu" for spec in specs)
        own_gpus = gpus if gpus is not None else 0.0 if on_cpu else min(1.0, ray.cluster_resources().get("GPU", 0))
        needs = {"CPU": max([spec.config.get("threads") or 1 for spec in specs], default=1), "GPU": own_gpus}
        # a process that has had a GPU holds its memory until it ends; options() would not take max_calls
        once = {"max_calls": 1} if own_gpus else {}
        do = ray.remote(num_cpus=needs["CPU"], num_gpus=own_gpus, max_retries=0, **once)(work or _work)
        waited = False
        while not queue.ended:
            room = _room(ray.nodes(), needs)
            if not room and not waited:
                asked = " and ".join(f"{count:g} {name}" for name, count in needs.items() if count)
                _log.warning("no node of the cluster has %s, as a run takes: one is waited for", asked)
                waited = True
            most = room + 1  # one that waits tells a cluster that can grow to do so
            while len(running) < min(most, slots or most) and (spec := queue.take()) is not None:
                if (held := _claimed(queue, spec)) is not None:
                    running[do.remote(spec.config, spec.stage, os.getcwd(), hang_seconds, _versions())] = spec, held
            if not running:
                time.sleep(0 if queue.ended else POLL_SECONDS)
                continue
            for ended in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                spec, held = running.pop(ended)
                with held:
                    _receive(ray, ended, spec, held, queue)
    finally:
        for left, (spec, held) in running.items():
            with held, suppress(Exception):
                ray.cancel(left, force=True)
                lost = row_of_a_lost_run(spec, "interrupted", "interrupted before it ended")
                write_row(queue.folder(spec), lost)
        ray.shutdown()
    return queue.rows()


def _connected(address: str) -> Any:
    """Ray, with a connection to a cluster."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 seconds each
    try:
        import ray
    except ImportError as error:
        raise NolaVisionError("--engine ray needs Ray: pip install 'nola-vision[ray]'") from error
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in host:  # known at once, where Ray itself takes its time
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # a wrong address, a wrong token and another version of Ray each fail in their own way
        raise NolaVisionError(
            f"no Ray cluster answers at {address!r} ({' '.join(str(error).split())[:200]}): start one by `ray start "
            "--head`, with the RAY_AUTH_MODE and RAY_AUTH_TOKEN that this shell has too"
        ) from error
    return ray


def _room(nodes: Sequence[Mapping[str, Any]], needs: Mapping[str, float]) -> int:
    """How many runs the living nodes hold at a time."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    fits = ([math.floor(node.get(name, 0) / need + 1e-6) for name, need in needs.items() if need] for node in alive)
    return sum(min(counts) for counts in fits)


def _claimed(queue: RunQueue, spec: RunSpec) -> ExitStack | None:
    """The claim on a run's folder; None where another process has it, or has done the run meanwhile."""
    held = ExitStack()
    try:
        held.enter_context(claim(queue.folder(spec)))
    except BusyError:
        queue.postpone(spec)
        return None
    if queue.settled(spec):
        held.close()
        return None
    return held


def _receive(ray: Any, ended: Any, spec: RunSpec, held: ExitStack, queue: RunQueue) -> None:
    """Writes the files of a run to its folder, the row last; or hears how it was lost, and gives up the claim."""
    folder = queue.folder(spec)
    try:
        files: Files = ray.get(ended)
    except ray.exceptions.RayTaskError as error:  # what goes wrong with a run leaves its row: this is a node's trouble
        said = str(error.cause).strip().splitlines() or [repr(error.cause)]
        raise NolaVisionError(
            f"a node of the cluster cannot do runs ({said[-1]}): every node needs nola-vision and what the config names"
        ) from error
    except (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError):
        held.close()
        queue.lose(spec, "its node was lost", NODE_TRIES)
        return
    except ray.exceptions.RayError as error:
        held.close()
        queue.lose(spec, f"its process on the cluster died, or ended no batch for long ({type(error).__name__})")
        return
    for name in sorted(files, key=lambda name: name == ROW_FILE):
        try:
            write_whole(folder / name, files[name])
        except OSError as error:
            raise NolaVisionError(
                f"{folder / name} cannot be written ({error.strerror}): make room there, and sweep again"
            ) from error
    queue.settle(spec, read_row(folder / ROW_FILE))


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("nola-vision", "torch")}


def _work(
    config: run_id.Config, stage: run_id.Stage, cwd: str, hang_seconds: float, versions: Mapping[str, str]
) -> Files:
    """On a node: does a run, and returns the files of its folder by name.

    Args:
        config: of the run.
        stage: of the run.
        cwd: the driver's, which relative paths in the config start from.
        hang_seconds: the process ends itself where no batch ends for so long.
        versions: of the driver's packages.

    Raises:
        NolaVisionError: the node has others, so that its rows would not be the driver's.
    """
    for name, own in _versions().items():
        if own != versions[name]:
            raise NolaVisionError(
                f"the node {socket.gethostname()} has {name} {own} and the driver {versions[name]}: give them the same"
            )
    let_idle_threads_sleep()  # the environment is that of `ray start`
    faulthandler.dump_traceback_later(FIRST_BATCH * hang_seconds, exit=True)
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves it alone where a task was given none
    from nola_vision.common import process_cache
    from nola_vision.runs.cross_validation import run_with_estimate

    process_cache.keep()
    with suppress(OSError):
        os.chdir(cwd)
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            faulthandler.dump_traceback_later(hang_seconds, exit=True)

    try:
        with TemporaryDirectory(prefix="nola-vision-") as out:
            run_with_estimate(config, out, stage, keep_going=True, beat=beat)
            folder = run_id.run_folder(out, config, stage)
            files = [path for path in folder.iterdir() if path.is_file() and path.name != LOCK_FILE]
            return {path.name: path.read_bytes() for path in files}
    finally:
        faulthandler.cancel_dump_traceback_later()
