"""The Python interface and the adapter file: train, save, load, merge, and every way a file can be wrong."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import fuzz_adapters
import reference
from nola_vision import NOLA, BackboneSpec, FullFinetune, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.format_v1 import digest
from nola_vision.adapters.methods import Method
from nola_vision.adapters.serialization import METADATA_KEY, TENSOR, read_adapter, write_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.backbones.sources import input_config

SPEC = BackboneSpec("vit_mini_patch4_32.contours")
NAMES = ["ja", "nein", "vielleicht"]
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SMALL = NOLA(targets=["qkv", "mlp"], rank=4, num_basis=8)


def trained(method: Method, steps: int = 4, lr: float = 5e-3, **options: int):
    """A model after a few steps, with everything it trains moved."""
    model = adapt(SPEC, method, NAMES, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-3 if isinstance(method, FullFinetune) else lr)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize(
    "method",
    [
        SMALL,
        NOLA(targets=["qv"], num_basis=5, scope="per_layer", start="released"),
        LoRA(),
        LinearProbe(),
        FullFinetune(),
    ],
    ids=["nola", "nola-released", "lora", "linear", "full"],
)
def test_a_saved_adapter_comes_back_exactly(method: Method, tmp_path: Path) -> None:
    model = trained(method, run_seed=3, basis_seed=9)
    size = model.save(tmp_path / "a.safetensors")
    assert size == (tmp_path / "a.safetensors").stat().st_size
    torch.manual_seed(123)  # whatever state the process is in
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.metadata.class_names == tuple(NAMES)
    assert not loaded.training
    untrained = adapt(SPEC, method, NAMES, run_seed=3, basis_seed=9)
    assert not torch.equal(untrained.eval()(IMAGES), model(IMAGES))  # so that equality above means something
    model.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def random_resnet(folder: Path) -> BackboneSpec:
    """A small ResNet from a file; timm's own start has zero batch-norm scales, which hide half of its convolutions."""
    torch.manual_seed(0)
    path = folder / "resnet10t.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet10t", zero_init_last=False).state_dict(), path)
    return BackboneSpec("resnet10t.c3_in1k", file=str(path))


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@pytest.mark.parametrize("start", ["a0", "released"])
def test_the_numpy_decoder_reads_the_same_changes(scope: str, start: str, tmp_path: Path) -> None:
    model = trained(NOLA(targets=["qv", "mlp"], rank=3, num_basis=7, scope=scope, start=start, c=2.5))
    model.save(tmp_path / "a.safetensors")
    expected = reference.changes(str(tmp_path / "a.safetensors"), reference.targets_of(model.bank))
    changes = model.bank.changes()
    assert list(changes) == list(expected)
    for name, change in changes.items():
        difference = np.abs(change.numpy() - expected[name]).max()
        assert difference < 1e-5 * np.abs(expected[name]).max(), name


def test_the_numpy_decoder_reads_a_convolution(tmp_path: Path) -> None:
    spec = random_resnet(tmp_path)
    model = adapt(spec, NOLA(targets=["re:layer1.0.conv."], rank=2, num_basis=3), NAMES)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.normal_()
    model.save(tmp_path / "a.safetensors")
    expected = reference.changes(str(tmp_path / "a.safetensors"), reference.targets_of(model.bank))
    for name, change in model.bank.changes().items():
        assert change.shape == (64, 64, 3, 3)
        assert np.abs(change.numpy() - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()


def test_merging_leaves_the_logits_and_unmerging_the_weights() -> None:
    model = trained(SMALL)
    before, weights = model(IMAGES), bits(model.backbone)
    assert weights == bits(create_backbone(SPEC))  # training left the frozen weights alone, bit for bit
    model.bank.merge()
    assert bits(model.backbone) != weights
    assert (model(IMAGES) - before).abs().max() / before.abs().max() < 1e-5
    with pytest.raises(NolaVisionError, match="unmerge"):
        model.save("never.safetensors")
    model.bank.unmerge()
    assert bits(model.backbone) == weights


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    model = adapt(random_resnet(tmp_path), NOLA(targets=["conv"], num_basis=4), NAMES)
    before = bits(model.backbone)
    model.train()
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    assert bits(model.backbone) == before
    full = adapt(random_resnet(tmp_path), FullFinetune(), NAMES).train()
    before = bits(full.backbone)
    full(torch.randn(4, 3, 64, 64))
    assert bits(full.backbone) != before


def test_seeds_decide_what_they_should() -> None:
    methods = (SMALL, LoRA(), LinearProbe())
    heads = [adapt(SPEC, method, NAMES, run_seed=seed).bank.head_weight for method in methods for seed in (0, 1)]
    assert torch.equal(heads[0], heads[2]) and torch.equal(heads[0], heads[4])  # one head start for all methods
    assert not torch.equal(heads[0], heads[1])
    seeds = ((0, 5), (1, 5), (0, 6))
    banks = [adapt(SPEC, SMALL, NAMES, run_seed=run, basis_seed=basis).bank for run, basis in seeds]
    basis = [bank.fixed["160x480"]["basis_a"].cached() for bank in banks]
    assert torch.equal(basis[0], basis[1]) and not torch.equal(basis[0], basis[2])


# --- arguments of adapt ----------------------------------------------------------------------------------------------


def test_class_names_come_from_any_iterable_and_may_be_equal(tmp_path: Path) -> None:
    """ImageNet has "crane" and "maillot" twice."""
    model = adapt(SPEC, SMALL, (name for name in ["crane", "maillot", "crane"]))
    assert model.metadata.class_names == ("crane", "maillot", "crane") and model.eval()(IMAGES).shape == (6, 3)
    model.save(tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").metadata == model.metadata
    assert adapt(SPEC, SMALL, np.array(["a", "b"])).metadata.class_names == ("a", "b")


def test_numpys_numbers_are_numbers(tmp_path: Path) -> None:
    class Index:
        def __index__(self) -> int:
            return 4

    method = NOLA(targets=["qkv"], rank=Index(), num_basis=np.int64(8), c=np.float32(2), nested=np.bool_(True))
    model = adapt(SPEC, method, NAMES, run_seed=np.int64(3), basis_seed=torch.tensor(9))
    model.save(tmp_path / "a.safetensors")
    plain = NOLA(targets=["qkv"], rank=4, num_basis=8, c=2.0, nested=True, start="a0")
    assert model.metadata.method == plain and (model.metadata.run_seed, model.metadata.basis_seed) == (3, 9)
    assert load_adapter(tmp_path / "a.safetensors").metadata == model.metadata
    assert create_backbone(replace(SPEC, img_size=np.int16(32))).patch_embed.img_size == (32, 32)
    for wrong in (NOLA(rank=True), NOLA(rank=np.bool_(True)), NOLA(rank=np.float64(4)), NOLA(rank="4")):
        with pytest.raises(NolaVisionError, match="rank of NOLA is .*: it must be a whole number"):
            adapt(SPEC, wrong, NAMES)


def test_what_a_file_cannot_state_is_refused_before_training() -> None:
    def refused(match: str, spec: BackboneSpec = SPEC, names: object = NAMES, method: Method = SMALL, **seeds: object):
        with pytest.raises(NolaVisionError, match=match) as caught:
            adapt(spec, method, names, **seeds)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400

    refused("class_names is 'ab': give the names of two classes", names="ab")
    refused("class_names is 3", names=3)
    refused(r"class_names is \('a',\)", names=["a"])
    refused(r"class_names is \('a', 1\)", names=["a", 1])
    refused("class_names has 70,000 names", names=["n"] * 70_000)
    refused("the class names take 2,000,000 bytes", names=["n" * 10**6] * 2)
    refused(r"the class name 'stra\\udcdfe' is not text", names=["a", "stra\udcdfe"])
    refused("run_seed is -1: it must be a whole number from 0", run_seed=-1)
    refused("basis_seed is 100000", basis_seed=10**30)
    refused("run_seed of AdapterMetadata is True", run_seed=True)
    refused("img_size is 160, but vit_mini_patch4_32.contours takes at most 128", spec=replace(SPEC, img_size=160))
    resnet = BackboneSpec("resnet20_cifar.untrained", base="random", img_size=2048)  # of any size: the cost is linear
    refused("takes at most 1024", spec=resnet, method=NOLA(targets=["conv"]))
    refused("num_basis of NOLA is 10000000000: it must be", method=NOLA(num_basis=10**10))
    refused("c of NOLA is 1e", method=NOLA(c=1e38))
    refused("is not a setting of NOLA", method=NOLA(targets=["re:" + "x" * 2000]))


# --- files that are wrong --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "good.safetensors"
    trained(SMALL).save(path)
    return path


def bits(backbone: torch.nn.Module) -> str:
    return digest({}, backbone.state_dict())


def rewritten(adapter: Path, folder: Path, **changes: object) -> Path:
    """The adapter with other metadata and a digest that fits it."""
    metadata, tensors = read_adapter(adapter)
    write_adapter(folder / "changed.safetensors", {**metadata, **changes}, tensors, {})
    return folder / "changed.safetensors"


def refused(path: Path, match: str, **options: str) -> None:
    with pytest.raises(NolaVisionError, match=match) as caught:
        load_adapter(path, **options)
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused_wherever_they_differ(adapter: Path, tmp_path: Path) -> None:
    state = create_backbone(SPEC).state_dict()
    for name, fits in (("fc_norm.weight", False), ("blocks.0.attn.proj.bias", False), ("pos_embed", True)):
        other = {key: value.clone() for key, value in state.items()}
        other[name].view(-1)[0] += 1e-3
        safetensors.torch.save_file(other, tmp_path / "other.safetensors")
        if fits:  # timm resamples it, so it is no part of the fingerprint
            load_adapter(adapter, str(tmp_path / "other.safetensors"))
        else:
            refused(adapter, "made for other weights", weights=str(tmp_path / "other.safetensors"))


def test_damaged_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    good, bad = adapter.read_bytes(), tmp_path / "bad.safetensors"
    for size in (0, 4, 100, len(good) - 1):
        bad.write_bytes(good[:size])
        refused(bad, "truncated or not a safetensors file")
    bad.write_bytes(b"not a tensor in sight, but some text that is long enough")
    refused(bad, "truncated or not a safetensors file")
    flipped = bytearray(good)
    flipped[-5] ^= 1
    bad.write_bytes(flipped)
    refused(bad, "changed or damaged")
    refused(tmp_path / "absent.safetensors", "does not exist")
    safetensors.torch.save_file({"w": torch.zeros(2)}, bad)
    refused(bad, "not a nola-vision adapter")
    safetensors.torch.save_file({"w": torch.zeros(2)}, bad, {METADATA_KEY: "[1"})
    refused(bad, "metadata .* is damaged")


def test_files_for_something_else_are_refused(adapter: Path, tmp_path: Path) -> None:
    metadata, _ = read_adapter(adapter)
    path = tmp_path / "v3.safetensors"
    for newer in ("3", '{"format":"nola-vision adapter","format_version":3}'):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, {METADATA_KEY: newer})
        refused(path, "format version 3 and this nola-vision reads versions 1 to 2")
    for wrong in ("1", '{"format":"nola-vision adapter","format_version":2}'):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, {METADATA_KEY: wrong})
        refused(path, "damaged")
    for others in (
        {"a": torch.zeros(2)},
        {TENSOR: torch.zeros(2)},
        {TENSOR: torch.zeros(200).byte(), "a": torch.zeros(2)},
    ):
        safetensors.torch.save_file(others, path, {METADATA_KEY: "2"})
        refused(path, "it has other tensors than the format")

    refused(rewritten(adapter, tmp_path, backbone_fingerprint="1" * 64), "made for other weights of vit_mini")
    refused(rewritten(adapter, tmp_path, backbone={"tag": "vit_nowhere", "img_size": None}), "unknown timm model")
    method = {**metadata["method"], "class_path": "MAGIC"}
    refused(rewritten(adapter, tmp_path, method=method), "unknown method 'MAGIC'")
    method = {"class_path": "NOLA", "init_args": {**metadata["method"]["init_args"], "num_basis": 9}}
    refused(rewritten(adapter, tmp_path, method=method), r"does not fit .*coefficients_a has the shape \[6, 8\]")
    refused(rewritten(adapter, tmp_path, targets=metadata["targets"][::-1]), "other targets than qkv, mlp selects")
    refused(rewritten(adapter, tmp_path, input=None), "not what this release writes")

    other = create_backbone(SPEC).state_dict()
    other["blocks.0.mlp.fc1.weight"] += 1
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    refused(adapter, "made for other weights", weights=str(tmp_path / "other.safetensors"))


def places(value: object, above: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The way to every value of nested metadata; the first item stands for all of a list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in inner:
        yield *above, key
        yield from places(one, (*above, key))


def test_metadata_of_other_types_is_refused(adapter: Path, tmp_path: Path) -> None:
    metadata, tensors = fuzz_adapters._opened(adapter.read_bytes())
    told = [place for place in places(metadata) if place[0] not in ("prefix", "calibrated_on")]
    assert len(told) > 35
    for *above, last in told:
        changed = copy.deepcopy(metadata)
        inside = changed
        for key in above:
            inside = inside[key]
        inside[last] = {"wrong": True}
        (tmp_path / "changed.safetensors").write_bytes(fuzz_adapters.written(changed, tensors))
        refused(tmp_path / "changed.safetensors", r"^[^\n]+$")


def test_a_file_is_written_whole_or_not_at_all(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_adapter(adapter)
    with pytest.raises(NolaVisionError, match="cannot be written"):
        model.save(tmp_path / "no such folder" / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NolaVisionError, match="No space left"):
        model.save(tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"


def test_a_file_is_what_safetensors_writes_and_numpy_reads(adapter: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(adapter)
    assert list(tensors) == [TENSOR]
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", {METADATA_KEY: "2"})
    assert load_adapter(tmp_path / "b.safetensors").metadata == load_adapter(adapter).metadata
    metadata, _ = reference.read(str(adapter))
    assert metadata["class_names"] == NAMES and metadata["backbone"]["tag"] == SPEC.tag


# --- backbones -------------------------------------------------------------------------------------------------------


def test_backbones_from_local_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=11, img_size=64)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    images = torch.randn(1, 3, 64, 64)
    source.reset_classifier(0)
    expected = source.eval()(images)
    for name in ("w.safetensors", "w.pth"):
        spec = BackboneSpec("vit_tiny_patch16_224.augreg_in21k", file=str(tmp_path / name), img_size=64)
        backbone = create_backbone(spec)
        assert torch.equal(backbone(images), expected)
        assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
    larger = create_backbone(BackboneSpec(spec.tag, file=str(tmp_path / "w.pth"), img_size=96))
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 192)  # the position embedding is resized


def test_input_configs_are_timms_own() -> None:
    mae, augreg = (
        input_config(BackboneSpec("vit_base_patch16_224.mae")),
        input_config(BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k")),
    )
    assert mae.mean == pytest.approx((0.485, 0.456, 0.406)) and augreg.mean == (0.5, 0.5, 0.5)
    assert (augreg.size, augreg.interpolation, augreg.crop_pct) == (224, "bicubic", 0.9)
    assert input_config(BackboneSpec("resnet18.a1_in1k", img_size=64)).size == 64
    imagenets = input_config(BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k", normalisation="imagenet"))
    assert imagenets == replace(augreg, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_backbone_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(spec: BackboneSpec, match: str) -> None:
        with pytest.raises(NolaVisionError, match=match) as caught:
            create_backbone(spec)
        assert "\n" not in str(caught.value)

    refused(BackboneSpec("vit_tinny_patch16_224"), "did you mean vit_tiny_patch16_224")
    refused(BackboneSpec("vit_tiny_patch16_224.best"), "unknown pretrained tag 'best' of timm's .*: use one of augreg")
    refused(BackboneSpec("vit_tiny_patch16_224", file="nowhere.pth"), "nowhere.pth does not exist")
    (tmp_path / "text.safetensors").write_text("hello")
    refused(BackboneSpec("vit_tiny_patch16_224", file=str(tmp_path / "text.safetensors")), "cannot be loaded")
    other = timm.create_model("resnet10t").state_dict()
    safetensors.torch.save_file(other, tmp_path / "resnet.safetensors")
    refused(BackboneSpec("vit_tiny_patch16_224", file=str(tmp_path / "resnet.safetensors")), "lacks .* weights")
    torch.save({"head.weight": Harmful()}, tmp_path / "harm.pth")
    refused(BackboneSpec("vit_tiny_patch16_224", file=str(tmp_path / "harm.pth")), "cannot be loaded")
    assert "code ran" not in capsys.readouterr().out  # pickle is read with weights_only

    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    refused(BackboneSpec("vit_tiny_patch16_224.augreg_in21k"), "could not be downloaded .*--model.backbone.file FILE")
