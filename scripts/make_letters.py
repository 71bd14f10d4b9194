"""Writes 26 lower-case letters, each drawn in many fonts, as a data set of folders with a test split.

    apt-get install fonts-dejavu-core fonts-lobster ...      the more families, the better; the script prints how many
    python scripts/make_letters.py DIR                       DIR/train/a/... and DIR/test/a/..., 32 x 32 pixels

Families of fonts are either in train or in test, so a letter is tested in styles that were not trained on, as in
Omniglot and notMNIST. Of a family at most three files are used. Needs `pip install fonttools`.
"""

from __future__ import annotations

import re
import string
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

FONTS = Path("/usr/share/fonts")
FILES_PER_FAMILY = 3
SIDE, INK = 32, 24  # pixels of an image, and of the longer side of its letter


def families() -> list[list[Path]]:
    """The font files that have all letters, by family, in a fixed random order."""
    found = defaultdict(list)
    for path in sorted(FONTS.rglob("*.[ot]tf")):
        try:
            font = TTFont(path, lazy=True)
            name = font["name"].getDebugName(1) or path.stem
            if set(map(ord, string.ascii_lowercase)) <= set(font.getBestCmap() or {}):
                found[re.sub("[^a-z]", "", path.parent.name.lower()) + name.split()[0].lower()].append(path)
        except (TTLibError, KeyError):
            continue
    names = sorted(found)
    draws = np.random.default_rng(0)
    draws.shuffle(names)
    return [[found[name][i] for i in draws.permutation(len(found[name]))[:FILES_PER_FAMILY]] for name in names]


def letter(font: ImageFont.FreeTypeFont, char: str) -> Image.Image | None:
    """A letter in white on black in the middle of the image; None if the font draws nothing."""
    left, top, right, bottom = font.getbbox(char)
    drawn = Image.new("L", (max(1, round(right - left)) + 8, max(1, round(bottom - top)) + 8))
    ImageDraw.Draw(drawn).text((4 - left, 4 - top), char, fill=255, font=font)
    if (box := drawn.getbbox()) is None:
        return None
    drawn = drawn.crop(box)
    scale = INK / max(drawn.size)
    width, height = (max(2, round(side * scale)) for side in drawn.size)
    image = Image.new("L", (SIDE, SIDE))
    small = drawn.resize((width, height), Image.Resampling.BICUBIC)
    image.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return image


def main() -> None:
    out = Path(sys.argv[1])
    all_families = families()
    counts = {"train": 0, "test": 0}
    for number, files in enumerate(all_families):
        split = "train" if number < len(all_families) // 2 else "test"
        for path in files:
            font = ImageFont.truetype(str(path), 64)
            images = {char: letter(font, char) for char in string.ascii_lowercase}
            drawn = {char: image for char, image in images.items() if image is not None}
            if len({image.tobytes() for image in drawn.values()}) < 24:  # a font of symbols or of capitals
                continue
            for char, image in drawn.items():
                (folder := out / split / char).mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{number:03d}-{path.stem}.png")
            counts[split] += 1
    print(f"{len(all_families)} families; font files: {counts}")


if __name__ == "__main__":
    main()
