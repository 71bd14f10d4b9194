"""Writes the lists of `nola_vision/data/lists` from the names of all images of a data set.

    python scripts/make_split_lists.py sun397 NAMES.txt                            one image per line, a/abbey/sun_x.jpg
    python scripts/make_split_lists.py caltech101 scripts/caltech101_counts.txt    one class per line: name and count

SUN397's names are those of its archive (108,753 images; tensorflow-datasets, Apache-2.0, lists them too). Caltech-101
numbers its images image_0001.jpg, ..., so a count per class is enough (8,677 without BACKGROUND_Google).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nola_vision.data
from nola_vision.data.datasets.shipped_list import pack_list, split_by_rule

LISTS = Path(nola_vision.data.__file__).parent / "lists"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["sun397", "caltech101"])
    parser.add_argument("names", type=Path)
    known = parser.parse_args()
    lines = known.names.read_text().split("\n")
    if known.dataset == "sun397":
        splits = split_by_rule("sun397", (line.strip("/") for line in lines if line), 50, 50)
    else:
        counts = {name: int(count) for name, count in (line.split() for line in lines if line)}
        paths = [f"{name}/image_{i:04d}.jpg" for name, count in counts.items() for i in range(1, count + 1)]
        splits = split_by_rule("caltech101", paths, 30, None)
    out = LISTS / f"{known.dataset}_v1.txt.xz"
    out.write_bytes(pack_list(splits))
    print(f"{out}: {len(splits['train'])} train, {len(splits['test'])} test, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
