"""Accuracy of trained adapters after shortening their files without training: fewer bits, or a cut.

    python scripts/measure_files.py runs nola-32bit lora-32bit          32, 16, 8, 4, 3, 2 and 1 bits per value
    python scripts/measure_files.py runs nested --cut                  all, 1/2, 1/4 and 1/8 of the bytes

Reads every completed final run of the named methods, shortens its adapter file as the end of a training does, loads it
and evaluates it on the validation pool, since the bits are a choice, or with --test on the test images. With --alone
the head's matrix is rounded without a change of its bias. The difference is that to the whole file of the same run,
with a 95 % interval (Student's t over runs, one per split).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, pstdev

import torch

from nola_vision import load_adapter
from nola_vision.adapters.quantization import bias_correction
from nola_vision.adapters.serialization import adapter_bytes, read_adapter
from nola_vision.models.export import shorten
from nola_vision.reports.statistics import student_half_width
from nola_vision.runs import run_id, store
from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.parsing import build
from nola_vision.runs.store import ADAPTER_FILE


def fewer_bits(source: Path, out: Path, mean: torch.Tensor | None, head_bits: int | None = None) -> Iterator[str]:
    """Writes the file with fewer bits for the adapter's values, and for the head's matrix, or that in `head_bits`.

    With the mean of the features the bias is corrected, as in `AdaptedModel.round_to_stored_bits`.
    """
    metadata, tensors = read_adapter(source)
    for bits in (32, 16, 8, 4, 3, 2, 1):
        widths = {name: bits for name in tensors if name.startswith("adapter.")} | {"head.weight": head_bits or bits}
        stored = dict(tensors)
        if mean is not None and "head.weight" in tensors:
            change = bias_correction(tensors["head.weight"][None], head_bits or bits, mean)[0]
            stored["head.bias"] = tensors["head.bias"] + change
        out.write_bytes(adapter_bytes(metadata, stored, widths))
        yield f"{bits} bits"


def cut(source: Path, out: Path) -> Iterator[str]:
    """Writes the file's first coefficients to a share of its bytes."""
    size = source.stat().st_size
    for parts in (1, 2, 4, 8):
        shorten(source, out, max_bytes=size // parts)
        yield f"1/{parts} of the bytes"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--cut", action="store_true", help="cut files of nested runs instead of reducing the bits")
    parser.add_argument("--head-bits", type=int, help="of the head's matrix, not for cuts (default: as the adapter)")
    parser.add_argument("--alone", action="store_true", help="round the head without a change of its bias")
    parser.add_argument("--test", action="store_true", help="evaluate on the test images")
    known = parser.parse_args()
    if known.cut and known.alone:
        parser.error("--alone is about bits, and --cut keeps them")
    found: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    batches = None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "a.safetensors"
        for row in store.read_rows(known.runs)[0]:
            if row.status != "completed" or row.stage != "final" or row.method not in known.methods:
                continue
            source = run_id.run_folder(known.runs, row.config, "final") / ADAPTER_FILE
            with quiet():
                data, whole = build(row.config, Path(scratch)).datamodule, load_adapter(source)
            data.setup("fit")
            if batches is None:
                batches = list(data.test_dataloader() if known.test else data.val_dataloader())
            mean = None
            if not known.cut and not known.alone:
                mean = torch.cat([whole.features(images) for images, _ in data.reference_dataloader()]).mean(0)
            for name in cut(source, out) if known.cut else fewer_bits(source, out, mean, known.head_bits):
                model = load_adapter(out)
                right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
                accuracy = 100 * right / sum(len(labels) for _, labels in batches)
                found[row.method, name].append((accuracy, out.stat().st_size))
    print(f"{'method':16s}{'file':20s}{'bytes':>9s}   top-1 % (std, ddof 0)   difference (95 % CI)    n")
    for (method, name), measured in found.items():
        accuracy = [one for one, _ in measured]
        before = [one for one, _ in next(values for (other, _), values in found.items() if other == method)]
        differences = [one - other for one, other in zip(accuracy, before, strict=True)]
        half = student_half_width(differences) if len(differences) > 1 else math.nan
        spread = f"{fmean(accuracy):.2f} ({pstdev(accuracy):.2f})"
        difference = f"{fmean(differences):+.2f} (± {half:.2f})"
        print(f"{method:16s}{name:20s}{measured[0][1]:9,d}   {spread:22s}  {difference:20s}{len(accuracy):5d}")


if __name__ == "__main__":
    main()
