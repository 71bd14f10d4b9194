"""Adapter files of this and of every earlier format version keep loading, and no damage to a file passes."""

import functools
import hashlib
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from nola_vision import load_adapter
from nola_vision.adapters.serialization import adapter_from_bytes, open_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import AdaptedModel

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = {
    name: entry for page in sorted(GOLDEN.glob("*.json")) for name, entry in json.loads(page.read_text()).items()
}


@functools.cache
def loaded(name: str) -> AdaptedModel:
    return load_adapter(GOLDEN / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_files_load_to_the_same_logits(name: str) -> None:
    assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == EXPECTED[name]["sha256"]
    model = loaded(name)
    size = model.metadata.input.size
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size))[0]
    assert logits.tolist() == pytest.approx(EXPECTED[name]["logits"], rel=1e-3, abs=1e-4)
    calibration = [model.temperature, model.calibrated_on, model.calibration_images]
    assert calibration == EXPECTED[name].get("calibration", [1.0, None, None])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_numpy_decoder_reads_golden_files(name: str) -> None:
    model = loaded(name)
    state = {} if model.metadata.backbone.int8 else model.backbone.state_dict()
    weights = {key: tensor.numpy() for key, tensor in state.items()}
    stored = reference.read(str(GOLDEN / name))[1]
    for key, tensor in model.trained_tensors().items():
        assert np.array_equal(stored[key], tensor.detach().numpy()), key
    expected = reference.changes(str(GOLDEN / name), reference.targets_of(model.bank), weights)
    changes = model.bank.changes()
    assert set(changes) == set(expected) - {"head"}
    for target, change in changes.items():
        assert np.abs(change.numpy() - expected[target]).max() < 1e-5 * np.abs(expected[target]).max()
    if "head" in expected:
        weight, bias = (t[0].detach().numpy() for t in model.bank.head())
        assert np.abs(np.c_[weight, bias] - expected["head"]).max() < 1e-5 * np.abs(expected["head"]).max()


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_unharmed(count: int, tmp_path: Path) -> None:
    draws = random.Random(0)
    originals = [(GOLDEN / name).read_bytes() for name in EXPECTED]
    originals = [content for content in originals if len(content) < 30_000]
    assert len(originals) >= 5
    whole = {content: _fields(content, tmp_path) for content in originals}
    refused = 0
    for _ in range(count):
        content = draws.choice(originals)
        damaged = bytearray(content)
        kind = draws.randrange(4)
        if kind == 0:  # a few flipped bits
            for _ in range(draws.choice([1, 1, 2, 8])):
                damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
        elif kind == 1:  # cut, or grown
            damaged = damaged[: draws.randrange(len(damaged))] + draws.randbytes(draws.choice([0, 0, 3]))
        elif kind == 2:  # an edited header: a digit for another
            header = 8 + int.from_bytes(content[:8], "little")
            digits = [place for place in range(8, header) if chr(content[place]).isdigit()]
            damaged[draws.choice(digits)] = ord(draws.choice("0123456789"))
        else:  # a piece moved
            start, length = draws.randrange(len(damaged)), draws.randrange(1, 64)
            piece = damaged[start : start + length]
            del damaged[start : start + length]
            place = draws.randrange(len(damaged))
            damaged[place:place] = piece
        try:
            found = _fields(bytes(damaged), tmp_path)
        except NolaVisionError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert found == whole[content]
    assert refused > 0.8 * count


def test_a_header_whose_metadata_is_null(tmp_path: Path) -> None:
    with pytest.raises(NolaVisionError, match="lacks that metadata"):
        _fields(struct.pack("<Q", 24) + b'{"__metadata__":null}   ', tmp_path)


def _fields(content: bytes, folder: Path) -> tuple[str, dict[str, bytes]]:
    """What a file contains; the same from its bytes in memory, or the same refusal."""
    path = folder / "a.safetensors"
    path.write_bytes(content)
    try:
        file = open_adapter(path)
    except NolaVisionError:
        with pytest.raises(NolaVisionError):
            adapter_from_bytes(content, path)
        raise
    read = adapter_from_bytes(content, path)
    assert (read.version, read.metadata, read.shapes) == (file.version, file.metadata, file.shapes)
    tensors = file.tensors()
    assert all((read.tensor(name) == tensor).all() for name, tensor in tensors.items())
    return json.dumps(file.metadata, sort_keys=True), {n: t.numpy().tobytes() for n, t in tensors.items()}
