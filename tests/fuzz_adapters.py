"""Adapter files as strangers may write them, with the digest recomputed; shared by the tests and `scripts/fuzz.py`.

Each example is a valid file of some method, changed in one to three places: a value of its header becomes another of
its type, or of any type; a key goes or comes; a tensor gets another dtype, shape, name or size of numbers. The right
outcome is always the same: it loads and predicts, or one line of NolaVisionError.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image

from fuzzing import Outcome, measured
from nola_vision import NOLA, PEFT, PRANC, BackboneSpec, FullFinetune, HashedNet, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.format_v1 import digest
from nola_vision.adapters.header import compressed, decompressed
from nola_vision.adapters.methods import FacT, LoRAXS, TinyLoRA, UniLoRA, VeRA
from nola_vision.adapters.serialization import METADATA_KEY, _container, adapter_bytes
from nola_vision.adapters.stored import byte_count

GOLDEN = Path(__file__).parent / "golden"
MLP = BackboneSpec("mlp_784_256.untrained", base="random")
GLYPHS = BackboneSpec("vit_glyph_patch4_32.glyphs")
METHODS = {
    "nola": NOLA(targets=["all"], num_basis=5),
    "nola-head": NOLA(targets=["all", "head"], num_basis=5, bits=4, head_num_basis=70, nested=True, start="random"),
    "nola-budget": NOLA(targets=["all"], max_parameters=24, scope="per_layer", storage="streamed"),
    "lora": LoRA(targets=["all", "head"], rank=2, bits=16),
    "pranc": PRANC(targets=["all"], num_basis=9, scope="layer", storage="streamed", bits=8),
    "hashed": HashedNet(targets=["re:fc1"], max_parameters=30),
    "lora-xs": LoRAXS(targets=["all"], rank=3, bits=4),
    "vera": VeRA(targets=["all"], rank=5),
    "uni-lora": UniLoRA(targets=["all"], rank=5, max_parameters=90, bits=4),
    "fact": FacT(targets=["all"], rank=3),
    "tiny-lora": TinyLoRA(targets=["all"], rank=4, num_basis=7),
    "linear": LinearProbe(head_bits=3),
    "one-bit": LoRA(targets=["all"], rank=2, bits=1),
    "full": FullFinetune(),
    "peft-lora": PEFT(config="peft.LoraConfig", settings={"r": 2, "target_modules": "fc.", "bias": "all"}),
    "peft-vera": PEFT(config="VeraConfig", settings={"r": 4, "target_modules": ["fc1"], "projection_prng_key": 3}),
}
NASTY_TEXTS = (
    "", "a", "re:((((.+)+)+)+)+z", "head", "fc1.weight", "fc1.weight[0:9]", "fc1.weight[9:0]", "x" * 5000, "a\nb",
    "\x1b[31m", "\udce4", "é", "NaN", "../x", "hf-hub:someone/model", "local-dir:/etc", "vit_glyph_patch4_32.glyphs",
    "mlp_784_256.untrained", "resnet20_cifar.untrained", "os.system", "NOLA", "PEFT", "LoRA", "FullFinetune",
    "NearestNeighbor", "BOFTConfig", "XLoraConfig", "LoHaConfig", "pissa", "eva", "cached", "streamed", "model",
    "random", "zero", "squash", "nearest",
)  # fmt: skip
NASTY_NUMBERS = (
    0, 1, 2, 3, 7, 28, 64, 100, 1024, 2048, 10**9, 10**18, 2**63, 10**400, -1, -(10**30), 0.0, 0.5, 1e-9, 1e9, 1e38, 
    1e308, -1e-300,
)  # fmt: skip


@functools.cache
def originals() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Header and stored tensors of valid files by name: the golden ones, and each method on a tiny backbone.

    The header of a file of version 2 has the list `tensors` of the file, and what is stored in front of it as `prefix`;
    its tensors are bytes.
    """
    found = {path.name: _opened(path.read_bytes()) for path in sorted(GOLDEN.glob("v[0-9]-*.safetensors"))}
    for name, method in {**METHODS, "calibrated": LinearProbe()}.items():
        model = adapt(GLYPHS if name == "calibrated" else MLP, method, ["a", "b", "b"])
        model.temperature, model.calibrated_on, model.calibration_images = 1.5, "folds", 30
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        found[name] = _opened(adapter_bytes(model.file_metadata(), model.file_tensors(), model.bits))
    return found


def _opened(content: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][METADATA_KEY])
    if metadata != 2:
        return metadata, safetensors.torch.load(content)
    data = content[8 + size :]
    _, fingerprint, weights, temperature, images, length = struct.unpack("<32s32s32sfII", data[:108])
    header = json.loads(decompressed(data[len(data) - length :], Path()))
    tensors, place = {}, 108
    for name, (bits, *shape) in header["tensors"].items():
        count = byte_count(bits, shape)
        tensors[name] = torch.frombuffer(bytearray(data[place : place + count]), dtype=torch.uint8)
        place += count
    prefix = {"fingerprint": fingerprint.hex(), "weights": weights.hex(), "temperature": temperature, "images": images}
    return {**header, "prefix": prefix}, tensors


def written(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with a digest that fits, of the version that the metadata has the form of."""
    if isinstance(metadata.get("prefix"), dict):
        header = json.dumps({key: value for key, value in metadata.items() if key != "prefix"}, sort_keys=True)
        data = [tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes() for name in sorted(tensors)]
        return contained(prefix(**metadata["prefix"]), b"".join(data), compressed(header))
    metadata = {key: value for key, value in metadata.items() if key != "digest"}
    try:
        metadata["digest"] = digest(metadata, tensors)
    except UnicodeEncodeError:  # a lone surrogate has no bytes to hash
        metadata["digest"] = "0" * 64
    # ASCII: so a surrogate gets into the file, and each reader makes the same text of the rest
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def prefix(fingerprint: Any = "", weights: Any = "", temperature: Any = 0, images: Any = 0, **_: Any) -> bytes:
    """What a file of version 2 has between digest and length; of values that have no bytes, zeros."""
    packed = b""
    for kind, value in (("32s", fingerprint), ("32s", weights), ("f", temperature), ("I", images)):
        one = bytes(struct.calcsize("<" + kind))
        with contextlib.suppress(struct.error, OverflowError, TypeError, ValueError):
            one = struct.pack("<" + kind, bytes.fromhex(value) if kind == "32s" else value)
        packed += one
    return packed


def contained(front: bytes, data: bytes, header: bytes, length: int | None = None) -> bytes:
    """A file of version 2 with a digest that fits, of bytes that may mean nothing."""
    rest = front + struct.pack("<I", len(header) if length is None else length) + data + header
    return _container(32 + len(rest)) + hashlib.sha256(rest).digest() + rest


# --- the strategies --------------------------------------------------------------------------------------------------

texts = st.sampled_from(NASTY_TEXTS) | st.text(max_size=20)
numbers = st.sampled_from(NASTY_NUMBERS) | st.integers(-5, 300) | st.floats(allow_nan=True, allow_infinity=True)
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


def _like(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same type."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return numbers | st.sampled_from([value + 1, value * 2, -value])
    if isinstance(value, str):
        return texts | st.just(value + "x")
    if isinstance(value, list):
        return st.sampled_from([[], value[:1], value + value, value[::-1], value * 3])
    return anything


def _place(draw: st.DrawFn, metadata: dict[str, Any]) -> tuple[Any, Any]:
    """A list or mapping of the header, and a key of it; half of the time deeper where that is possible."""
    inside: Any = metadata
    while True:
        keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = draw(st.sampled_from(keys))
        if not (isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 3))):
            return inside, key
        inside = inside[key]


@st.composite
def inputs(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of the file that an example began as, and the example."""
    name = draw(st.sampled_from(sorted(originals())))
    metadata, tensors = copy.deepcopy(originals()[name][0]), dict(originals()[name][1])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        draw(st.sampled_from([_change_header] * 3 + [_change_tensor, _change_both]))(draw, metadata, tensors)
    assume(len(json.dumps(metadata)) < 50_000_000)  # safetensors itself writes no larger header
    return name, written(metadata, tensors)


def _change_header(draw: st.DrawFn, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if not metadata:
        return
    inside, last = _place(draw, metadata)
    kind = draw(st.sampled_from(["like"] * 8 + ["any", "gone", "new", "deep", "long"]))
    if kind == "gone":
        del inside[last]
    elif kind == "new" and isinstance(inside, dict):
        inside[draw(texts)] = draw(anything)
    elif kind == "deep":
        inside[last] = functools.reduce(lambda inner, _: [inner], range(draw(st.sampled_from([5, 100, 900]))), 0)
    elif kind == "long":
        inside[last] = [inside[last]] * draw(st.sampled_from([2, 100, 5000]))
    else:
        inside[last] = draw(_like(inside[last]) if kind == "like" else anything)


def _change_tensor(draw: st.DrawFn, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        return
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    if isinstance(metadata.get("prefix"), dict):  # bytes, which the list in the header gives a meaning
        match draw(st.sampled_from(["gone", "grown", "filled"])):
            case "grown":
                tensors[name] = torch.cat([tensor, torch.zeros(draw(st.sampled_from([1, 4, 1000])), dtype=torch.uint8)])
            case "filled":
                tensors[name] = torch.full_like(tensor, draw(st.sampled_from([0, 1, 127, 255])))
        return
    match draw(st.sampled_from(["gone", "renamed", "dtype", "shape", "scaled", "filled", "copied"])):
        case "renamed":
            tensors[draw(st.sampled_from([name + "x", "head.weight", "adapter.head.a", "x" * 400, "a\nb", ""]))] = (
                tensor
            )
        case "dtype":
            kinds = "float16 bfloat16 float64 int64 int32 uint8 bool float8_e4m3fn complex64".split()
            tensors[name] = tensor.to(getattr(torch, draw(st.sampled_from(kinds))))
        case "shape":
            sides = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 64, 100]), max_size=3))
            tensors[name] = torch.zeros(sides, dtype=tensor.dtype)
        case "scaled":
            factor = draw(st.sampled_from([1e4, 1e8, 1e20, 1e38, -1.0, 1e-30]))
            tensors[name] = (tensor.double() * factor).to(tensor.dtype)
        case "filled":
            value = draw(st.sampled_from([0.0, 1e9, 1e38, float("nan"), float("inf"), -1e5]))
            tensors[name] = torch.full(tensor.shape, value, dtype=torch.float64).to(tensor.dtype)
        case "copied":
            tensors[name], tensors[name + ".levels"] = tensor, tensor.clone()


def _change_both(draw: st.DrawFn, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Other counts in header and tensors alike, so that they agree."""
    method = metadata.get("method")
    settings = method.get("init_args") if isinstance(method, dict) else None
    if not isinstance(settings, dict):
        return
    count = draw(st.sampled_from([1, 2, 50, 100]))
    grown = [name for name in tensors if "coefficients" in name and tensors[name].dtype == torch.float32]
    for name in grown:
        tensors[name] = torch.randn(*tensors[name].shape[:-1], count) * draw(st.sampled_from([0.1, 10.0, 1e6]))
    table = metadata.get("tensors")
    for name in table if isinstance(table, dict) else ():
        if "coefficients" in name and name in tensors and isinstance(table[name], list) and table[name][:1] == [32]:
            table[name] = [*table[name][:-1], count]
            values = torch.randn(*table[name][1:]) * draw(st.sampled_from([0.1, 10.0, 1e6]))
            tensors[name] = values.flatten().view(torch.uint8)
    settings.update(
        dict.fromkeys(
            ["num_basis", "num_basis_b", "head_num_basis"] if "num_basis_b" in settings else ["num_basis"], count
        )
    )
    settings["rank"] = draw(st.sampled_from([1, 4, 100, 160]))


# --- the check -------------------------------------------------------------------------------------------------------


def image(folder: Path) -> Path:
    path = folder / "image.png"
    if not path.exists():
        Image.new("RGB", (40, 30), (200, 30, 90)).save(path)
    return path


def outcome(content: bytes, folder: Path) -> Outcome:
    """Loads a file and predicts one image.

    Raises:
        Exception: whatever is not a NolaVisionError of one printable line.
    """
    path, picture = folder / "a.safetensors", image(folder)
    path.write_bytes(content)

    def load() -> None:
        with torch.inference_mode():
            assert len(load_adapter(path).predict([picture])) == 1

    return measured(load)


def warm_up(folder: Path) -> None:
    """Does once what a process pays for once: imports, the libraries' own tables, the compiled generator."""
    for metadata, tensors in originals().values():
        assert outcome(written(metadata, tensors), folder).refusal is None
