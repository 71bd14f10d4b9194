"""Test accuracy of the adapters under a folder of runs, stored with fewer bits after training.

    python scripts/measure_stored_bits.py runs nola lora-r4

Reads every completed final run of the methods that are named, writes its adapter file with 16, 8, 4, 3 and 2 bits for
the coefficients (`--head-bits` for the head's matrix), loads it and tests it on the digits' test images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev

import torch

from nola_vision import load_adapter
from nola_vision.adapters.file import adapter_bytes, read_adapter
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.results import identity, store
from nola_vision.run import ADAPTER_FILE


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--head-bits", type=int, default=32)
    known = parser.parse_args()
    rows, _ = store.read_rows(known.runs)
    found: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    batches = None
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows:
            if row.status != "completed" or row.stage != "final" or row.method not in known.methods:
                continue
            source = identity.run_folder(known.runs, row.config, "final") / ADAPTER_FILE
            metadata, tensors = read_adapter(source)
            described = {key: value for key, value in metadata.items() if key not in ("packed", "digest")}
            for bits in (32, 16, 8, 4, 3, 2):
                widths = {name: bits for name in tensors if name.startswith("adapter.")}
                content = adapter_bytes(described, tensors, {**widths, "head.weight": known.head_bits})
                (path := Path(scratch) / "a.safetensors").write_bytes(content)
                model = load_adapter(path)
                if batches is None:
                    batches = list(KShotDataModule(model.card.backbone).test_dataloader())
                right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
                found[row.method, bits].append((100 * right / sum(len(y) for _, y in batches), len(content)))
    print(f"{'method':12s}{'bits':>5s}  top-1 % (std, ddof 0)     n   bytes   (head: {known.head_bits} bits)")
    for (method, bits), measured in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])):
        accuracy = [one for one, _ in measured]
        print(
            f"{method:12s}{bits:5d}  {fmean(accuracy):6.2f} ({pstdev(accuracy):.2f})"
            f"{len(accuracy):15d} {measured[0][1]:8,d}"
        )


if __name__ == "__main__":
    main()
