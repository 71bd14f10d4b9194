"""One sweep: from a config to the rows of all its runs, on one of the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.imports import without_collections
from nola_vision.runs import run_id, store
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.not_run import NotRun, note_not_run
from nola_vision.runs.record import Row
from nola_vision.sweep import budget_entries, plan, search
from nola_vision.sweep.engines import local, multi_device
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.progress import EntryProgress, entry_progress
from nola_vision.sweep.queue import RunCallback

TIMING_SECONDS = 60.0  # that `--dry-run` times steps for, about
# A sweep has a progress bar, and starts an interrupted run again instead of resuming it
SWEEP_SETTINGS = ("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Args:
        config: a full config with `methods`, what `plan.complete` returns.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`.
        shard: (i, n) for part i of n of the final runs. All shards search; in one folder they share that work.
        searches: whether settings are chosen; otherwise there is no validation pool.
        methods: names of the entries with final runs, if not all.
        not_run: the entries that are not run.
        notes: sentences on the plan.
    """

    config: run_id.Config
    splits: Sequence[int]
    inits: Sequence[int]
    shard: tuple[int, int]
    searches: bool = True
    methods: Sequence[str] | None = None
    not_run: Mapping[str, NotRun] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def final(self) -> Sequence[str]:
        """Names of the entries with final runs."""
        return list(self.config["methods"]) if self.methods is None else self.methods

    @property
    def cell(self) -> str:
        """The name of its cell."""
        return run_id.cell_name(run_id.resolve(self.config, next(iter(self.config["methods"]))))

    def planned(self) -> list[RunSpec]:
        """All runs; the final ones with the settings of the config."""
        final = plan.final_specs(self.config, self.splits, self.inits, self.final, {})
        return [*plan.search_specs(self.config, self.final), *plan.shard_of(final, self.shard)]

    def progress(self, out: Path) -> list[EntryProgress]:
        """The progress of each entry, from the rows in the folder of all runs.

        Raises:
            NolaVisionError: a row cannot be read; reported before the first run, not when its run is reached.
        """
        folder = out / self.cell
        rows, problems = store.read_rows(folder) if folder.is_dir() else ([], [])
        if problems:
            raise NolaVisionError("; ".join(problem for _, problem in problems[:5]))
        return entry_progress(self.config, self.splits, self.inits, rows, self.shard, self.final)

    def sizes(self) -> dict[str, tuple[str, int]]:
        """The setting that decides the size of each entry's file, and its bytes, if an entry has a byte budget."""
        from nola_vision.runs.budgets import size_and_bytes

        if not any(split_budget(name)[1] for name in (*self.config["methods"], *self.not_run)):
            return {}
        sizes = {name: size_and_bytes(run_id.resolve(self.config, name)) for name in self.config["methods"]}
        return {name: size for name, size in sizes.items() if size is not None}

    def note_not_run(self, out: Path) -> None:
        """Writes into the folders of entries why they are not run, for reports."""
        for name in (*self.final, *self.not_run):
            if split_budget(name)[1] is not None:
                note_not_run(run_id.method_folder(out / self.cell, name), self.not_run.get(name))

    def timed(self, entries: Sequence[EntryProgress]) -> tuple[list[EntryProgress], float]:
        """Estimates the seconds of entries without a completed run, from a few timed steps of each; writes no row.

        Args:
            entries: what `progress` returns.

        Returns:
            The entries, and the seconds for what a worker's runs share: decoded images and features.
        """
        from nola_vision.runs.cross_validation import number_of_folds
        from nola_vision.runs.timing import RunTime, time_run

        pending = [entry for entry in entries if entry.seconds is None and entry.left]
        estimates, shared = {}, 0.0
        alike = {split_budget(entry.method)[0]: entry.method for entry in pending}  # one budget of each method
        timed: dict[str, RunTime] = {}
        with process_cache.keeping():
            for entry in pending:
                run_config = run_id.resolve(self.config, entry.method)
                base = split_budget(entry.method)[0]
                if base not in timed:
                    one = run_id.resolve(self.config, alike[base])
                    timed[base] = time_run(one, TIMING_SECONDS / len(alike))
                time = timed[base]
                # a fold leaves out one part, so all folds and the run on all images are as many trainings as folds
                folds = max(1, number_of_folds(run_config)) - 1
                final = time.final + folds * time.training
                each = (entry.search * time.search + entry.final * final) / entry.runs
                estimates[entry.method] = replace(entry, seconds=each, estimated=True)
                pool = time.pool if entry.search or time.passes else 0.0
                shared = max(shared, len(self.splits) * time.split + pool + time.tested)
        return [estimates.get(entry.method, entry) for entry in entries], shared

    def run(self, execute: Callable[[Sequence[RunSpec]], list[Row]], say: Callable[[str], None]) -> list[Row]:
        """Chooses the searched settings of each entry on validation images, then does the final runs.

        Args:
            execute: an engine: it does every run that is not completed yet, and returns a row for each.
            say: called with a line for each entry that was searched: the settings that were chosen.

        Returns:
            The rows of the final runs. For an entry whose search runs all failed there is no final run: the rows of its
            search runs instead.
        """
        found = execute(plan.search_specs(self.config, self.final))
        failed = [method for method in self.final if search.search_failed(self.config, found, method)]
        kept = [method for method in self.final if method not in failed]
        chosen = search.choose_settings(self.config, found, kept)
        for line in search.choices_in_words(self.config, found, chosen):
            say(line)
        final = plan.final_specs(self.config, self.splits, self.inits, kept, chosen)
        rows = execute(plan.shard_of(final, self.shard))
        of_failed = {run_id.searched_at(self.config, method) for method in failed}
        return [*(row for row in found if row.method in of_failed), *rows]


def prepare(
    raw: run_id.Config,
    methods: Sequence[str],
    options: Sequence[str],
    allow_import: Sequence[str],
    splits: Sequence[int] | None,
    inits: Sequence[int],
    shard: tuple[int, int],
    fastest: Callable[[Any], str] | None = None,
) -> Sweep:
    """The sweep of a config.

    Args:
        raw: a config with `methods`, as the user wrote it.
        methods: names of entries.
        options: command-line options that override the config.
        allow_import: packages whose classes the config may name.
        splits: the default is 0 to 3, or the split of the config's manifest.
        inits: as in `Sweep`.
        shard: as in `Sweep`.
        fastest: as in `parse`; the default asks this machine.

    Raises:
        NolaVisionError: the config is invalid, or its manifest is of another split.
    """
    # Lightning takes seconds to import; a user error before this is reported at once
    with without_collections():
        from nola_vision.data.manifest import read_manifest
        from nola_vision.runs.parsing import has_validation_images, parse
        from nola_vision.training import precision

    def parsed(entry: run_id.Config) -> run_id.Config:
        return parse(entry, [*SWEEP_SETTINGS, *options], allow_import, fastest or precision.fastest)

    entries = budget_entries.solve(raw, methods, parsed)
    config = entries.config
    if (path := config["data"]["manifest"]) is not None:
        drawn = read_manifest(path).split_seed
        if splits not in (None, [drawn]):
            raise NolaVisionError(f"the manifest {path} has only split {drawn}: leave --splits out")
        splits, config["data"]["split_seed"] = [drawn], drawn
    searches = has_validation_images(run_id.resolve(config, entries.methods[0]))  # missing images are reported here
    if not searches:
        config = plan.without_search(config)
    if config["trainer"]["num_nodes"] != 1:
        raise NolaVisionError("a run of a sweep takes one machine: use --trainer.num_nodes with `nola-vision fit`")
    splits = range(4) if splits is None else splits
    notes = entries.notes if searches else ()
    return Sweep(config, splits, inits, shard, searches, entries.methods, entries.not_run, notes)


@dataclass(frozen=True)
class Engine:
    """Where the runs of a sweep are done.

    Args:
        name: `local`, `multi_device` or `ray`.
        workers: runs at a time; None if the Ray cluster decides.
        gpus: those of the local workers, as CUDA_VISIBLE_DEVICES names them.
        address: of the Ray cluster.
        gpus_per_run: on Ray.
    """

    name: str
    workers: int | None = 1
    gpus: Sequence[str] = ()
    address: str = "auto"
    gpus_per_run: float | None = None

    def execute(self, specs: Sequence[RunSpec], out: Path, callback: RunCallback) -> list[Row]:
        """Does every run that is not completed yet, and returns a row for each."""
        if self.name == "ray":
            from nola_vision.sweep.engines import ray

            return ray.execute(specs, out, callback, self.address, self.workers, self.gpus_per_run)
        if self.name == "multi_device":
            return multi_device.execute(specs, out, callback)
        return local.execute(specs, out, callback, self.workers or 1, self.gpus)


def local_engine(trainer: Mapping[str, Any], workers: int | None) -> Engine:
    """The engine for this machine: one worker per GPU unless `workers` is given, and one worker on the CPU.

    Runs that use several devices are done one after another, since Lightning starts their processes from this one.
    """
    import torch

    if not _uses_one_device(trainer):
        return Engine("multi_device")
    if trainer["accelerator"] not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return Engine("local", workers or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return Engine("local", workers or len(gpus), gpus)


def ray_engine(trainer: Mapping[str, Any], workers: int | None, address: str, gpus_per_run: float | None) -> Engine:
    """The engine for a Ray cluster.

    Raises:
        NolaVisionError: a run uses several devices.
    """
    if not _uses_one_device(trainer):
        raise NolaVisionError("on Ray each run has one device: leave --trainer.devices out")
    return Engine("ray", workers, address=address, gpus_per_run=gpus_per_run)


def _uses_one_device(trainer: Mapping[str, Any]) -> bool:
    return trainer["devices"] in ("auto", "1", 1)
