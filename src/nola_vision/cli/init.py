"""`nola-vision init PHOTOS`: writes the config of `fit PHOTOS` as a commented YAML file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from nola_vision.cli.options import Options, add_photo_options, photo_settings
from nola_vision.common.files import need_folder_of, refuse_existing, write_file
from nola_vision.common.text import printable
from nola_vision.runs import photos


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Writes the config of `nola-vision fit PHOTOS` to a commented YAML file, to edit."
    options.add_argument("photos", metavar="PHOTOS", help=photos.PHOTOS)
    options.add_argument("--out", metavar="FILE", help="the file to write (default: <name of PHOTOS>.yaml)")
    add_photo_options(options)
    known = options.parse_args(arguments)
    name = re.sub(r"[^\w.+-]+", "_", Path(os.path.abspath(os.path.expanduser(known.photos))).stem).lstrip(".-")
    target = Path(known.out or f"{name or 'photos'}.yaml")
    refuse_existing(target, "--out")
    need_folder_of(target)
    write_file(target, photos.describe(photos.config(known.photos, **photo_settings(known))).encode())
    print(printable(f"{target}: written. Train it with: nola-vision fit --config {target}"))
    return 0
