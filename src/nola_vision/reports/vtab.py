"""The tasks of VTAB-1k together: mean accuracy and file size of each method, next to published results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nola_vision.common.mappings import value_at
from nola_vision.common.text import printable
from nola_vision.data.datasets.vtab import GROUPS, PREFIX, TASKS
from nola_vision.reports.cell import Cell
from nola_vision.reports.description import backbone_name
from nola_vision.reports.entries import Summary
from nola_vision.reports.formatting import NOT_MEASURED, points
from nola_vision.reports.tables import Table, TableCell
from nola_vision.runs.published import VTAB_BACKBONE, published_vtab

# A method's summary of each task that it was run on
Results = Mapping[str, Summary]
_HELP = {
    "method": "name in the config; in brackets the settings that differ, if it was run with several",
    "KiB": "size of the adapter file with its head, in units of 1,024 bytes: mean of the groups' means",
    "mean": "mean of the three groups' means, as in the published tables",
    "mean of 19": "mean over the 19 tasks",
    "tasks": "number of tasks with a completed run; means need all of their tasks",
    "task": "a task of VTAB-1k, in the order of the published tables",
}


@dataclass(frozen=True)
class Benchmark:
    """Several cells in common tables.

    Args:
        title: heading.
        tables: the tables.
    """

    title: str
    tables: Sequence[Table]


def vtab_benchmarks(cells: Sequence[Cell]) -> list[Benchmark]:
    """The tables over VTAB-1k's tasks, one benchmark per backbone, shots and protocol with at least two tasks."""
    found: dict[str, dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        dataset = str(value_at(cell.rows[0].config, "data", "dataset"))
        if (task := dataset.removeprefix(PREFIX)) in TASKS and dataset != task:
            found[cell.name.replace(f"-{dataset}-", "-VTAB-1k-")][task] = cell
    return [_benchmark(name, tasks) for name, tasks in found.items() if len(tasks) > 1]


def group_means(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each group of tasks that is complete, and under "mean" the mean of all groups' means.

    The published tables average the groups: full fine-tuning is printed as 68.9, which is the mean of 75.9, 83.4 and
    47.6 (7, 4 and 8 tasks); the mean over its 19 tasks is 65.6.

    Args:
        values: by task.
    """
    means = {
        group: fmean(values[task] for task in tasks) for group, tasks in GROUPS.items() if values.keys() >= {*tasks}
    }
    return means | ({"mean": fmean(means.values())} if len(means) == len(GROUPS) else {})


def _benchmark(name: str, tasks: Mapping[str, Cell]) -> Benchmark:
    results: dict[str, dict[str, Summary]] = defaultdict(dict)
    for task in TASKS:
        for summary in tasks[task].summaries if task in tasks else ():
            if summary.mean is not None:
                results[summary.label][task] = summary
    first = next(iter(tasks.values()))
    config = first.rows[0].config
    same = (value_at(config, "model", "backbone", "tag"), value_at(config, "data", "shots")) == (VTAB_BACKBONE, "all")
    return Benchmark(
        f"VTAB-1k: {backbone_name(first.rows[0])} ({printable(name)})",
        [_means(results, with_published=same), _per_task(results)],
    )


def _means(results: Mapping[str, Results], with_published: bool) -> Table:
    columns = ("method", "KiB", *GROUPS, "mean", "mean of 19", "tasks")
    accuracies = {label: {task: one.mean or 0.0 for task, one in found.items()} for label, found in results.items()}
    means = {label: group_means(of_tasks) for label, of_tasks in accuracies.items()}
    best = {key: max((points(m[key]) for m in means.values() if key in m), key=float, default="") for key in columns}
    lines = []
    for label, found in results.items():
        sizes = {task: n / 1024 for task, one in found.items() if (n := one.adapter_file_bytes) is not None}
        texts = [points(means[label].get(key)) for key in (*GROUPS, "mean")]
        marked = [
            TableCell(text, "best" if text == best[key] else "plain")
            for key, text in zip((*GROUPS, "mean"), texts, strict=True)
        ]
        all_tasks = points(fmean(accuracies[label].values())) if len(found) == len(TASKS) else NOT_MEASURED
        lines.append(
            (
                TableCell(printable(label)),
                TableCell(points(group_means(sizes).get("mean"))),
                *marked,
                TableCell(all_tasks),
                TableCell(f"{len(found)} of {len(TASKS)}"),
            )
        )
    notes = ["top-1 accuracy in per cent; mean: of the three groups' means, as in the published tables; best in bold"]
    counts = sorted({one.n for found in results.values() for one in found.values()})
    runs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    notes.append(f"of each task the mean over n runs, n = {runs}")
    if with_published:
        figures = published_vtab()
        for line in figures:
            texts = [f"published {line.name}", f"{line.kib:,.1f}", *[NOT_MEASURED] * len(GROUPS), points(line.mean)]
            lines.append(tuple(map(TableCell, (*texts, NOT_MEASURED, f"{len(TASKS)} of {len(TASKS)}"))))
        notes.append(f"published: {'; '.join(dict.fromkeys(line.source for line in figures))}")
        notes += dict.fromkeys(f"published {line.name.split()[0]}: {line.note}" for line in figures if line.note)
    explained = _HELP | {group: f"mean over its {len(tasks)} tasks" for group, tasks in GROUPS.items()}
    return Table("Means over tasks", columns, tuple(lines), tuple(notes), tuple(explained[name] for name in columns))


def _per_task(results: Mapping[str, Results]) -> Table:
    lines = []
    for task in (task for task in TASKS if any(task in found for found in results.values())):
        texts = [points(found[task].mean if task in found else None) for found in results.values()]
        best = max((text for text in texts if text != NOT_MEASURED), key=float)
        lines.append((TableCell(task), *(TableCell(text, "best" if text == best else "plain") for text in texts)))
    labels = tuple(map(printable, results))
    explained = (_HELP["task"], *(f"top-1 accuracy of {label} in per cent, mean over runs" for label in labels))
    return Table("Top-1 % per task", ("task", *labels), tuple(lines), ("best of a task in bold",), explained)
