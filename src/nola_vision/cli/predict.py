"""`nola-vision predict`: images in, labels out."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from nola_vision.cli.options import Options, device, whole_number
from nola_vision.errors import NolaVisionError
from nola_vision.files import need_adapter_file, weights_in, write_file
from nola_vision.progress import PlainCount, say_aside, say_start
from nola_vision.text import csv_cell, printable


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Class and probability of each image."
    options.add_argument("--adapter", required=True, metavar="FILE", help="an adapter file that `fit` wrote")
    options.add_argument("--weights", metavar="FILE", help="local file with the backbone's weights")
    options.add_argument("--out", metavar="FILE.csv", help="write image, class, probability there instead of printing")
    options.add_argument("--batch_size", type=whole_number, default=64)
    options.add_argument("--device", type=device, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    options.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    known = options.parse_args(arguments)
    if known.batch_size < 1:
        raise NolaVisionError(f"batch_size is {known.batch_size}: it must be at least 1")
    if known.out is not None and not Path(known.out).absolute().parent.is_dir():
        raise NolaVisionError(f"the folder of {known.out} does not exist: make it first")
    need_adapter_file(known.adapter)
    if known.weights is not None:
        weights_in(known.weights)

    say_start(verb)
    import torch

    from nola_vision.model import load_adapter
    from nola_vision.predict import find_images, predict

    paths = find_images(known.images)
    model = load_adapter(known.adapter, known.weights)
    try:
        model.to(known.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise NolaVisionError(
            f"the device {known.device} cannot be used here ({reason}): leave --device out"
        ) from error
    width = max(len(printable(str(path))) for path in paths)
    unreadable: list[NolaVisionError] = []
    rows = [("image", "class", "probability")]
    count = PlainCount("predicting", "images", say=say_aside)
    for path, name, probability in predict(model, paths, known.batch_size, unreadable):
        rows.append((csv_cell(str(path)), csv_cell(name), f"{probability:.4f}"))
        if known.out is None:
            print(f"{printable(str(path)):{width}s}  {printable(name)}  {probability:.4f}")
        if known.out is not None or not sys.stdout.isatty():
            count.show(len(rows) - 1 + len(unreadable), len(paths))
    if known.out is not None and len(rows) > 1:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_file(known.out, text.getvalue().encode())
        print(printable(f"{len(rows) - 1} predictions in {known.out}"), file=sys.stderr)
    if unreadable:
        raise NolaVisionError(f"{len(unreadable)} of {len(paths)} images have no prediction: {unreadable[0]}")
    return 0
