"""`nola-vision export`: a shorter adapter file, or a plain timm model with the adapter merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nola_vision.adapters.methods.base import check_bits
from nola_vision.cli.options import Options, whole_number
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_adapter_file, need_folder_of, weights_in
from nola_vision.common.imports import without_collections
from nola_vision.common.progress import say_start


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Makes an adapter file shorter, or merges it into a plain timm model."
    options.add_argument("--adapter", required=True, metavar="FILE", help="an adapter file that `fit` wrote")
    options.add_argument(
        "--merged",
        metavar="OUT",
        help="write backbone, adapter, head, preprocessing and class names to a new folder that timm loads "
        "(local-dir:OUT)",
    )
    options.add_argument("--out", metavar="OUT", help="write a shorter adapter file")
    options.add_argument(
        "--max-bytes", type=whole_number, metavar="N", help="cut it to N bytes (trained with `nested: true`)"
    )
    options.add_argument(
        "--bits", type=whole_number, metavar="B", help="bits per stored value, the head's included: 1 to 8, or 16"
    )
    options.add_argument("--weights", metavar="FILE", help="local file with the backbone's weights, to merge with")
    options.add_argument("--dequantise", action="store_true", help="write floats where the backbone holds int8")
    known = options.parse_args(arguments)
    shorter = known.max_bytes is not None or known.bits is not None
    if (known.merged is None) == (known.out is None) or (known.out is None) == shorter:
        raise NolaVisionError("export takes --merged OUT, or --out OUT with --max-bytes N, --bits B or both")
    target = Path(known.merged or known.out)
    need_folder_of(target)
    need_adapter_file(known.adapter)
    if known.bits is not None:
        check_bits("bits", known.bits)
    if known.weights is not None:
        weights_in(known.weights)

    say_start(verb)
    with without_collections():
        from nola_vision.models import export
        from nola_vision.models.loading import load_adapter

    if known.merged is not None:
        model = load_adapter(known.adapter, known.weights)
        print(f"{target}: {export.write_merged(model, target, known.dequantise)}")
        if model.calibrated_on is not None:
            print(f"calibrated probabilities: softmax(logits / {model.temperature:g}), as its config.json states")
    else:
        print(f"{target}: {export.shorten(known.adapter, target, known.max_bytes, known.bits):,} bytes")
    return 0
