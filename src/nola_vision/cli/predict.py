"""`nola-vision predict`: images in, labels out."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from nola_vision.errors import NolaVisionError


def main(arguments: Sequence[str], verb: str) -> int:
    options = argparse.ArgumentParser(f"nola-vision {verb}", description="Class and probability of each image.")
    options.add_argument("--adapter", required=True, metavar="FILE", help="an adapter file that `fit` wrote")
    options.add_argument("--weights", metavar="FILE", help="local file with the backbone's weights")
    options.add_argument("--out", metavar="FILE.csv", help="write image, class, probability there instead of printing")
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    known = options.parse_args(arguments)

    from nola_vision.data.datasets import find_images
    from nola_vision.model import load_adapter
    from nola_vision.predict import predict

    paths = find_images(known.images)
    model = load_adapter(known.adapter, known.weights)
    rows = [(str(path), name, f"{p:.4f}") for path, name, p in predict(model, paths, known.batch_size)]
    if known.out is None:
        width = max(len(path) for path, _, _ in rows)
        for path, name, probability in rows:
            print(f"{path:{width}s}  {name}  {probability}")
        return 0
    target = Path(known.out)
    try:
        with target.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "class", "probability"), *rows])
    except OSError as error:
        raise NolaVisionError(f"{target} cannot be written: {error.strerror}") from error
    print(f"{len(rows)} predictions in {target}", file=sys.stderr)
    return 0
