"""`nola-vision predict`: images in, labels and probabilities out."""

from __future__ import annotations

import argparse
import codecs
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nola_vision.cli.options import Options, whole_number
from nola_vision.common.devices import parse_device
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_adapter_file, need_folder_of, weights_in, write_file
from nola_vision.common.imports import without_collections
from nola_vision.common.progress import PlainCount, say_aside, say_start
from nola_vision.common.text import csv_cell, printable
from nola_vision.common.validation import check_counts

if TYPE_CHECKING:
    from nola_vision.models.prediction import Prediction

UNKNOWN = "unknown"
_WIDEST = 200  # characters of a path that the others are aligned with


class Answer(NamedTuple):
    """One line of the output.

    Args:
        path: of the image.
        label: its class, or `unknown`.
        best: the most probable classes, as many as were asked for.
        scores: the probability of every class, in the order of the classes; empty if they were not asked for.
    """

    path: str
    label: str
    best: list[Prediction]
    scores: list[float]


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Class and probability of each image. docs/using.md describes the formats."
    options.add_argument("--adapter", required=True, metavar="FILE", help="an adapter file that `fit` wrote")
    options.add_argument(
        "--weights", metavar="FILE", help="local file with the backbone's weights (default: found by its digest)"
    )
    options.add_argument("--top-k", type=whole_number, default=1, metavar="K", help="the K most probable classes")
    options.add_argument("--scores", action="store_true", help="the probability of every class (csv and jsonl)")
    options.add_argument(
        "--min-probability", type=_share, metavar="P", help=f"answer `{UNKNOWN}` where the best class has less than P"
    )
    options.add_argument("--format", choices=("csv", "jsonl"), help="default: that of --out, else aligned text")
    options.add_argument("--out", metavar="FILE", help="write to a .csv or .jsonl file instead of printing")
    options.add_argument("--batch-size", "--batch_size", type=whole_number, default=64)
    options.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    options.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="`-` reads paths from standard input, one per line"
    )
    known = options.parse_args(arguments)
    check_counts(batch_size=known.batch_size, top_k=known.top_k)
    if known.device is not None:
        parse_device(known.device)
    if known.out is not None:
        need_folder_of(known.out)
    kind = known.format or (None if known.out is None else "jsonl" if known.out.endswith(".jsonl") else "csv")
    if known.scores and kind is None:
        raise NolaVisionError("--scores needs --format csv or --format jsonl")
    paths = find_images(known.images)
    need_adapter_file(known.adapter)
    if known.weights is not None:
        weights_in(known.weights)

    say_start(verb)
    with without_collections():
        import torch

        from nola_vision.images.transforms import eval_transform
        from nola_vision.models.loading import load_adapter
        from nola_vision.models.prediction import batches, probabilities, to_device, top_classes

    model = load_adapter(known.adapter, known.weights)
    to_device(model, known.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names, transform = model.metadata.class_names, eval_transform(model.metadata.input)
    if known.min_probability is not None and model.calibrated_on is None:
        say_aside("the adapter's probabilities are not calibrated (docs/using.md)")

    columns = column_names(names) if known.scores else []
    top_k = min(known.top_k, len(names))
    line = _as_text(paths) if kind is None else _as_csv if kind == "csv" else _as_json(columns)
    head = _csv_line(_csv_head(top_k, columns)) if kind == "csv" else ""
    lines: list[str] = []

    def put(text: str) -> None:
        lines.append(text) if known.out is not None else sys.stdout.write(text)

    unreadable: list[NolaVisionError] = []
    count = 0
    progress = PlainCount("predicting", "images", say=say_aside)
    for kept, batch in batches(paths, transform, known.batch_size, unreadable):
        for path, row in zip(kept, probabilities(model, batch, model.temperature), strict=True):
            best = top_classes(row, names, top_k)
            unsure = known.min_probability is not None and best[0].probability < known.min_probability
            answer = Answer(str(path), UNKNOWN if unsure else best[0].label, best, row.tolist() if known.scores else [])
            put(line(answer) if count else head + line(answer))
            count += 1
        if known.out is None:
            sys.stdout.flush()
        if known.out is not None or not sys.stdout.isatty():
            progress.show(count + len(unreadable), len(paths))
    if known.out is not None and count:
        write_file(known.out, "".join(lines).encode())
        print(printable(f"{count} predictions in {known.out}"), file=sys.stderr)
    if unreadable:
        raise NolaVisionError(f"{len(unreadable)} of {len(paths)} images have no prediction: {unreadable[0]}")
    return 0


def find_images(places: Sequence[str]) -> list[Path]:
    """The image files that are named or are in folders that are named, in the order given; `-`: standard input names.

    Raises:
        NolaVisionError: a name is neither file nor folder, or there are no images in a folder. Such a name on standard
            input is kept, and predicted as an image that cannot be read.
    """
    from nola_vision.data.datasets.image_folders import image_files

    found: list[Path] = []
    for place in places:
        listed = place == "-"
        for path in _paths_from_input() if listed else [Path(place)]:
            if not listed and not os.path.exists(path):
                raise NolaVisionError(f"{path} does not exist: name image files, or folders of them")
            try:
                found += image_files(path) if os.path.isdir(path) else [path]
            except NolaVisionError:
                if not listed:
                    raise
                found.append(path)
    return found


def _paths_from_input() -> list[Path]:
    """The paths on standard input, one per line."""
    content = sys.stdin.buffer.read() if sys.stdin is not None else b""
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not (paths := [Path(os.fsdecode(line.removesuffix(b"\r"))) for line in lines if line.strip()]):
        raise NolaVisionError("there are no paths on standard input: give one per line, or name images instead of `-`")
    return paths


def _share(text: str) -> float:
    """The type of an option that takes a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def column_names(class_names: Sequence[str]) -> list[str]:
    """The class names, made different where several classes have one name: `crane`, `crane (2)`."""
    columns: dict[str, None] = {}
    seen: Counter[str] = Counter()
    for name in class_names:
        column = name
        while column in columns:
            seen[name] += 1
            column = f"{name} ({seen[name] + 1})"
        columns[column] = None
    return list(columns)


def _as_text(paths: Sequence[Path]) -> Callable[[Answer], str]:
    width = min(_WIDEST, max(len(printable(str(path))) for path in paths))

    def line(answer: Answer) -> str:
        labels = [answer.label, *(label for label, _ in answer.best[1:])]
        pairs = zip(labels, answer.best, strict=True)
        best = "  ".join(f"{printable(label)}  {probability:.4f}" for label, (_, probability) in pairs)
        return f"{printable(answer.path):{width}s}  {best}\n"

    return line


def _csv_head(top_k: int, columns: Sequence[str]) -> list[str]:
    further = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("class", "probability")]
    return ["image", "class", "probability", *further, *(f"score of {name}" for name in columns)]


def _as_csv(answer: Answer) -> str:
    labels = [answer.label, *(label for label, _ in answer.best[1:])]
    best = [
        cell
        for label, (_, probability) in zip(labels, answer.best, strict=True)
        for cell in (label, f"{probability:.4f}")
    ]
    return _csv_line([answer.path, *best, *(f"{score:.6g}" for score in answer.scores)])


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(map(csv_cell, cells))
    return text.getvalue()


def _as_json(columns: Sequence[str]) -> Callable[[Answer], str]:
    def line(answer: Answer) -> str:
        best = [{"class": label, "probability": _rounded(probability)} for label, probability in answer.best]
        found: dict[str, Any] = {"image": answer.path, "class": answer.label, "probability": best[0]["probability"]}
        if len(best) > 1:
            found["top"] = best
        if answer.scores:
            found["scores"] = dict(zip(columns, map(_rounded, answer.scores), strict=True))
        return json.dumps(found) + "\n"  # ASCII: a file name's bytes that are not UTF-8 are escaped too

    return line


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")
