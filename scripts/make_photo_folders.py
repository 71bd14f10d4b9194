"""Writes four folders of images from installed packages, to try `nola-vision fit PHOTOS`: 20 per class, no test split.

    python scripts/make_photo_folders.py DIR

- digits/: ten classes of 8 x 8 pixels, of scikit-learn
- stamps/: birds, flowers, fruit, mammals: photos cut out of their background (Debian: tuxpaint-stamps-default)
- fashion/: the ten classes of Fashion-MNIST (Debian: dataset-fashion-mnist)
- icons/: four kinds of icons of 128 x 128 pixels (Debian: oxygen-icon-theme)

A folder is skipped if its package is not installed.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PER_CLASS = 20
STAMPS = Path("/usr/share/tuxpaint/stamps")
FASHION = Path("/usr/share/datasets/fashion-mnist")
ICONS = Path("/usr/share/icons/oxygen/base/128x128")
FASHION_NAMES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()


def write_arrays(folder: Path, images: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(np.flatnonzero(labels == label)[:PER_CLASS]):
            Image.fromarray(images[index]).save(folder / name / f"{number:02}.png")


def write_files(folder: Path, sources: dict[str, Path]) -> None:
    for name, source in sources.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        # evenly over the sorted names, since neighbours often show the same object
        files = sorted(path for path in source.rglob("*.png") if not path.is_symlink())
        for number in range(PER_CLASS):
            with Image.open(files[number * len(files) // PER_CLASS]) as image:
                shown = image.convert("RGBA")
            white = Image.new("RGBA", shown.size, "white")
            white.alpha_composite(shown)
            white.thumbnail((640, 640))
            white.convert("RGB").save(folder / name / f"{number:02}.jpg", quality=90)


def installed(folder: Path) -> bool:
    if not folder.is_dir():
        print(f"{folder} does not exist: install the Debian package that is named at the top of this script")
    return folder.is_dir()


def main() -> None:
    out = Path(sys.argv[1])
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    write_arrays(out / "digits", pixels, digits.target, [str(number) for number in range(10)])
    if installed(STAMPS):
        places = {
            "birds": "animals/birds",
            "flowers": "plants/flowers",
            "fruit": "food/fruit",
            "mammals": "animals/mammals",
        }
        write_files(out / "stamps", {name: STAMPS / place for name, place in places.items()})
    if installed(FASHION):
        raw = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())
        labels = np.frombuffer(gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        write_arrays(out / "fashion", np.frombuffer(raw[16:], np.uint8).reshape(-1, 28, 28), labels, FASHION_NAMES)
    if installed(ICONS):
        write_files(out / "icons", {name: ICONS / name for name in ("actions", "apps", "devices", "mimetypes")})


if __name__ == "__main__":
    main()
