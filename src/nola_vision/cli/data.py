"""`nola-vision data check|manifest`: checks a data set, or writes the images of a k-shot draw to a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from nola_vision.cli.options import Options, whole_number
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import refuse_existing
from nola_vision.common.progress import PlainCount, is_live, say_aside
from nola_vision.common.text import printable

if TYPE_CHECKING:
    from nola_vision.data.datasets.base import DatasetEntry
    from nola_vision.data.sources import ImageSource

SHOWN = 10  # lines of each kind of problem


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = (
        "check counts a data set's images and looks for unreadable and repeated ones; manifest writes the exact images "
        "of a k-shot draw to a file, for --data.manifest."
    )
    options.add_argument("what", choices=["check", "manifest"])
    options.add_argument("name", help="a data set, such as cifar100")
    options.add_argument(
        "--root",
        "--data.root",
        metavar="PLACE",
        help="its folder, or a list (default: the variable NOLA_VISION_DATA)",
    )
    options.add_argument(
        "--download",
        "--data.download",
        action="store_true",
        help="check: download missing files, where that is possible",
    )
    options.add_argument("--shots", type=whole_number, help="manifest: images per class (default: 5)")
    options.add_argument("--split", type=whole_number, help="manifest: which draw, data.split_seed (default: 0)")
    options.add_argument("--out", metavar="FILE", help="manifest: the file to write")
    known = options.parse_args(arguments)
    if known.what == "check":
        if given := [name for name in ("shots", "split", "out") if getattr(known, name) is not None]:
            raise NolaVisionError(f"data check takes no --{given[0]}: that is for data manifest")
        return _check(known.name, known.root, known.download)
    if known.out is None:
        raise NolaVisionError("data manifest needs --out FILE, the file to write")
    if known.download:
        raise NolaVisionError("data manifest takes no --download: nola-vision data check fetches a data set")
    _manifest(known.name, known.root, 5 if known.shots is None else known.shots, known.split or 0, Path(known.out))
    return 0


def _check(name: str, root: str | None, download: bool) -> int:
    from nola_vision.data.check import SplitReport, check_split
    from nola_vision.data.datasets.base import Split
    from nola_vision.data.datasets.image_folders import suffix_counts
    from nola_vision.data.datasets.registry import get_dataset, open_split
    from nola_vision.data.duplicates import in_both, repeated, under_two_labels

    entry, console = get_dataset(name), Console(highlight=False)
    _print(console, f"{name}: {entry.expects}")
    reports: dict[Split, SplitReport] = {}
    missing: dict[Split, NolaVisionError] = {}
    live = is_live()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        for split in entry.splits(root):
            task = bar.add_task(split, total=None)
            show = partial(_show, bar, task) if live else PlainCount(f"checking {split}", "images", say=say_aside).show
            try:
                reports[split] = check_split(entry, root, split, download, show)
            except NolaVisionError as error:
                missing[split] = error
    if not reports:
        raise missing["train"]
    contradictory = False
    for split, report in reports.items():
        counts = report.counts
        fewest, most = min(counts, key=lambda named: named[1]), max(counts, key=lambda named: named[1])
        line = f"{_called(entry, root, split)}: {sum(count for _, count in counts):,} images in {len(counts)} classes"
        even = fewest[1] == most[1]
        line += f", {most[1]} each" if even else f", {fewest[1]} ({fewest[0]}) to {most[1]} ({most[0]}):"
        _print(console, line)
        if not even:
            _print(console, "  " + ", ".join(f"{name} {count}" for name, count in counts), wrap=True)
        _listed(console, f"unreadable in {split}", report.unreadable)
        _listed(console, f"twice in {split}", repeated(report.source, report.digests))
        contradictory |= bool(pairs := under_two_labels(report.source, report.digests))
        _listed(console, f"twice in {split} and the labels differ", pairs)
        if others := report.other_files:
            _print(console, f"  files that are not read in {split}: {others.total()} ({suffix_counts(others)})")
    for split, reason in missing.items():
        _print(console, f"{split}: {reason}")
    for note in entry.notes(root):
        _print(console, note)
    both = []
    for (one, first), (two, second) in combinations(reports.items(), 2):
        both += (pairs := in_both(first.source, first.digests, second.source, second.digests))
        _listed(console, f"in {one} and in {two}", pairs)
    if "test" not in {*reports, *missing}:
        _print(console, _estimate(open_split(entry, root, "train")))
    bad = missing or both or contradictory or any(report.unreadable for report in reports.values())
    console.print(
        "Dataset check failed: fix what is missing, unreadable, in two splits, or in two classes."
        if bad
        else "fit for use"
    )
    return 1 if bad else 0


def _called(entry: DatasetEntry, root: str | None, split: str) -> str:
    """The name of a split in a heading."""
    if split == "train" and "test" not in entry.splits(root):
        return "all images"
    return "test (named validation)" if split == "test" and entry.test_name(root) == "validation" else split


def _estimate(source: ImageSource) -> str:
    """How the accuracy on a data set without test images is estimated."""
    from nola_vision.data.duplicates import groups
    from nola_vision.data.folds import number_of_folds

    count = number_of_folds(source.labels, groups(source))
    estimate = f"by cross-validation in {count} folds" if count else "not at all: every class has one image only"
    return f"there are no test images, so the accuracy is estimated {estimate}"


def _show(bar: Progress, task: TaskID, seen: int, total: int) -> None:
    bar.update(task, completed=seen, total=total)


def _listed(console: Console, what: str, lines: Sequence[str]) -> None:
    if lines:
        _print(console, f"  {what}: {len(lines)}")
        for line in lines[:SHOWN]:
            _print(console, f"    {line}")
        if len(lines) > SHOWN:
            _print(console, f"    and {len(lines) - SHOWN} more")


def _print(console: Console, line: str, wrap: bool = False) -> None:
    """Prints one line; names in it may contain any character."""
    console.print(printable(line), markup=False, soft_wrap=not wrap)


def _manifest(name: str, root: str | None, shots: int, split: int, out: Path) -> None:
    from nola_vision.data.kshot_split import KShotSplit
    from nola_vision.data.manifest import make_manifest, write_manifest

    refuse_existing(out)
    drawn = KShotSplit(name, root, shots, split)
    made = make_manifest(drawn.train_source, name, shots, split, drawn.candidates)
    write_manifest(made, out)
    print(printable(f"{out}: {len(made.images)} images; train on them with --data.manifest {out}"))
