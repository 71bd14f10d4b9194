"""Adapter files cut shorter, stored with fewer bits, and merged into checkpoints that timm alone loads."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from nola_vision import NOLA, PEFT, PRANC, BackboneSpec, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.serialization import read_adapter
from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.backbones.sources import input_config, resolve
from nola_vision.models.export import shorten, with_classifier, write_merged

SPEC = BackboneSpec("vit_mini_patch4_32.contours")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shaken(method: NOLA | PRANC | LoRA, spec: BackboneSpec = SPEC) -> AdaptedModel:
    model = adapt(spec, method, ["a", "b", "c"]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "method",
    [
        NOLA(targets=["mlp", "head"], num_basis=300, nested=True),
        NOLA(targets=["qkv"], num_basis=1000, nested=True, bits=4),
        NOLA(targets=["qkv"], num_basis=1000, nested=True, bits=16),
        NOLA(targets=["mlp", "head"], num_basis=300, num_basis_b=200, nested=True),
        PRANC(targets=["re:blocks.0.attn.proj"], num_basis=2000, nested=True),
    ],
    ids=str,
)
def test_a_cut_file_is_the_prefix(method: NOLA | PRANC, tmp_path: Path) -> None:
    model = shaken(method)
    model.round_to_stored_bits()
    size = model.save(tmp_path / "a.safetensors")
    for share in (0.75, 0.5):
        limit = int(size * share)
        assert main(["export", "--adapter", f"{tmp_path}/a.safetensors", "--out", f"{tmp_path}/b.safetensors",
                     "--max-bytes", str(limit)]) == 0  # fmt: skip
        assert limit - 200 <= (tmp_path / "b.safetensors").stat().st_size <= limit
        cut = load_adapter(tmp_path / "b.safetensors")
        kept = cut.trained_tensors()
        for name, whole in model.trained_tensors().items():
            first = whole[..., : kept[name].shape[-1]]
            assert torch.equal(kept[name], first) if method.bits > 8 else torch.allclose(kept[name], first, atol=0.06)
        name = next(name for name in kept if name.endswith(("coefficients_a", "coefficients")))
        share = kept[name].shape[-1] / model.trained_tensors()[name].shape[-1]
        if method.bits > 8 and getattr(method, "num_basis_b", None) is None:
            with model.bank.using(prefix=share):
                assert torch.allclose(cut(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_fewer_bits_without_training(tmp_path: Path) -> None:
    model = shaken(NOLA(targets=["mlp"], num_basis=200))
    sizes = {32: model.save(tmp_path / "a.safetensors")}
    for bits in (16, 8, 4, 2):
        sizes[bits] = shorten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=bits)
        loaded = load_adapter(tmp_path / "b.safetensors")
        assert loaded.metadata.method.bits == bits
        error = (loaded(IMAGES) - model(IMAGES)).abs().max() / model(IMAGES).abs().max()
        assert error < {16: 1e-3, 8: 0.05, 4: 0.5, 2: 10}[bits]
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())


def test_a_vit_bs_file_of_4_bits_is_a_tenth_of_loras(tmp_path: Path) -> None:
    spec = BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k", base="zero")
    names = [f"class {number}" for number in range(100)]
    nola = NOLA(targets=["mlp", "head"], rank=4, num_basis=1024, bits=4)
    model = adapt(spec, nola, names)
    assert [p.numel() for p in model.bank.adapter_parameters()] == [12 * 1024] * 4
    assert [p.numel() for p in model.bank.head_parameters()] == [1024] * 2
    small = model.save(tmp_path / "nola.safetensors")
    large = adapt(spec, LoRA(targets=["qkv"], rank=4, bits=16), names).save(tmp_path / "lora.safetensors")
    assert large > 2 * (147_456 + 76_900) - 200  # the head's bias keeps 32 bits
    assert 51_200 / 2 < small <= large / 10


def test_bits_of_a_head_alone_and_of_what_keeps_its_bits(tmp_path: Path) -> None:
    model = adapt(SPEC, LinearProbe(), ["a", "b", "c"]).eval()
    model.save(tmp_path / "a.safetensors")
    size = shorten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=4)
    loaded = load_adapter(tmp_path / "b.safetensors")
    assert loaded.metadata.method.head_bits == 4 and loaded.save(tmp_path / "c.safetensors") == size
    with pytest.raises(NolaVisionError, match="have no more than 8 bits: give fewer bits"):
        shorten(tmp_path / "b.safetensors", tmp_path / "x.safetensors", bits=8)
    # values with fewer bits keep theirs
    wide = shaken(LoRA(bits=1, head_bits=32)).save(tmp_path / "a.safetensors")
    assert shorten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=8) < wide
    assert load_adapter(tmp_path / "b.safetensors").metadata.method.stored_bits == (1, 8)
    peft = adapt(SPEC, PEFT(config="VeraConfig", settings={"r": 2, "target_modules": ["qkv"]}), ["a", "b"])
    peft.save(tmp_path / "p.safetensors")
    with pytest.raises(NolaVisionError, match="PEFT stores its values in 32 bits: leave --bits out"):
        shorten(tmp_path / "p.safetensors", tmp_path / "x.safetensors", bits=4)
    with pytest.raises(NolaVisionError, match="PEFT merges its own methods"):
        write_merged(peft, tmp_path / "x")
    large = shaken(LoRA(bits=16))
    large.bank.groups["160x480"].b.data[0, 0, 0, 0] = 1e5
    with pytest.raises(NolaVisionError, match=r"160x480\.b has a value that 16 bits cannot represent"):
        large.save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_cut_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shaken(NOLA(num_basis=20)).save(tmp_path / "a.safetensors")
    shaken(NOLA(num_basis=20, nested=True)).save(tmp_path / "n.safetensors")
    for options, expected in (
        (["--adapter", "a.safetensors", "--out", "b", "--max-bytes", "9000"], "not trained to be cut"),
        (["--adapter", "n.safetensors", "--out", "b", "--max-bytes", "300"], "one coefficient per factor alone take"),
        (["--adapter", "n.safetensors", "--out", "b", "--bits", "0"], "bits is 0"),
        (["--adapter", "n.safetensors", "--out", "b"], "export takes"),
        (["--adapter", "n.safetensors", "--merged", "no/b"], "the folder of no/b does not exist"),
        (["--adapter", "n.safetensors", "--out", "b", "--bits", "32"], "have no more than 32 bits"),
        (["--adapter", "n.safetensors", "--out", "b", "--bits", "5.5"], "'5.5' is not a whole number"),
        (["--adapter", "n.safetensors", "--out", "n.safetensors", "--bits", "4"], "is the adapter itself"),
        (["--adapter", "gone", "--merged", "b"], "does not exist"),
    ):
        options[1] = str(tmp_path / options[1])
        options[3] = options[3] if "/" in options[3] else str(tmp_path / options[3])
        assert main(["export", *options]) == 2
        errors = capsys.readouterr().err.strip()
        assert expected in errors and "\n" not in errors and not (tmp_path / "b").exists()


def as_printed(capsys: pytest.CaptureFixture[str]) -> torch.nn.Module:
    """What the code that `export --merged` printed makes."""
    needed, _, code = capsys.readouterr().out.partition(": ")[2].partition("; ")
    assert needed == "import nola_vision"  # timm has no `vit_mini_patch4_32` of its own
    made: torch.nn.Module = eval(code, {"timm": timm})
    return made.eval()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max() / other.abs().max())


def test_timm_alone_loads_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = replace(input_config(SPEC), crop_pct=0.8, mean=(0.5, 0.5, 0.25))
    names = ["crane", "crane", 'Kran "ä"']
    for number, method in enumerate((NOLA(targets=["mlp", "head"], num_basis=30), LoRA(targets=["qkv"]))):
        model = shaken(method)
        model.metadata = replace(model.metadata, class_names=tuple(names), input=image)
        model.save(tmp_path / "a.safetensors")
        out = tmp_path / f"merged {number}"
        assert main(["export", "--adapter", f"{tmp_path}/a.safetensors", "--merged", str(out)]) == 0
        loaded = as_printed(capsys)
        assert apart(loaded(IMAGES), model(IMAGES)) < 1e-5
        assert loaded.pretrained_cfg["label_names"] == names
        for test_size in (False, True):
            found = timm.data.resolve_model_data_config(loaded, use_test_size=test_size)
            assert (tuple(found["input_size"]), found["crop_pct"]) == ((3, 32, 32), 0.8)
            assert (list(found["mean"]), list(found["std"])) == ([0.5, 0.5, 0.25], [0.5] * 3)
            assert (found["interpolation"], found["crop_mode"]) == ("bicubic", "center")
        assert input_config(BackboneSpec(f"local-dir:{out}")) == model.metadata.input
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=9)(IMAGES).shape == (2, 9)
        with pytest.raises(NolaVisionError, match="exists already"):
            write_merged(model, out)
    assert main(["export", "--adapter", f"{tmp_path}/a.safetensors", "--merged", f"{tmp_path}/m.pth"]) == 2
    assert "name it without .pth" in capsys.readouterr().err and not (tmp_path / "m.pth").exists()


def test_a_merged_model_keeps_the_image_side(tmp_path: Path) -> None:
    model = shaken(LoRA(targets=["qkv"]), BackboneSpec("vit_mini_patch4_32.contours", img_size=48))
    plain = eval(write_merged(model, tmp_path / "m").partition("; ")[2], {"timm": timm}).eval()
    images = torch.randn(2, 3, 48, 48)
    assert apart(plain(images), model(images)) < 1e-5
    assert timm.data.resolve_model_data_config(plain)["input_size"] == (3, 48, 48)


def test_an_adapter_on_a_merged_model(tmp_path: Path) -> None:
    """`local-dir:` is a backbone like any other; its adapter file has no path of this machine."""
    first = shaken(LoRA(targets=["qkv"]))
    write_merged(first, tmp_path / "m")
    spec = BackboneSpec(f"local-dir:{tmp_path}/m")
    assert apart(create_backbone(spec)(IMAGES), first.backbone(IMAGES)) < 1e-5
    model = shaken(LoRA(targets=["mlp"]), spec)
    model.save(tmp_path / "a.safetensors")
    assert str(tmp_path) not in str(read_adapter(tmp_path / "a.safetensors")[0])
    (tmp_path / "m").rename(tmp_path / "moved")
    again = load_adapter(tmp_path / "a.safetensors", str(tmp_path / "moved"))
    assert torch.equal(again(IMAGES), model(IMAGES)) and again.metadata.input == model.metadata.input
    plain = eval(write_merged(again, tmp_path / "m2").partition("; ")[2], {"timm": timm}).eval()
    assert apart(plain(IMAGES), model(IMAGES)) < 1e-5


def test_a_merged_model_that_timm_would_compute_differently_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shaken(LoRA(targets=["qkv"]))
    before = model(IMAGES)
    with (
        monkeypatch.context() as patch,
        pytest.raises(NolaVisionError, match="computes different logits in timm") as caught,
    ):
        patch.setattr("nola_vision.models.export._place_head", lambda *_: None)
        write_merged(model, tmp_path / "m")
    with monkeypatch.context() as patch, pytest.raises(NolaVisionError, match="timm cannot load the merged"):
        patch.setattr("nola_vision.models.export._config", lambda *_: {"architecture": "resnet18"})
        write_merged(model, tmp_path / "m")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert torch.equal(model(IMAGES), before) and not model.bank.merged
    with pytest.raises(NolaVisionError, match="cannot be written"):
        write_merged(model, tmp_path / "gone" / "m")


def test_an_int8_adapter_is_merged_into_floats_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shaken(NOLA(targets=["mlp"], num_basis=30), BackboneSpec("vit_mini_patch4_32.contours", int8=True))
    model.save(tmp_path / "a.safetensors")
    command = ["export", "--adapter", f"{tmp_path}/a.safetensors", "--merged", f"{tmp_path}/m"]
    assert main(command) == 2
    assert "--dequantise" in capsys.readouterr().err and not (tmp_path / "m").exists()
    assert main([*command, "--dequantise"]) == 0
    assert apart(as_printed(capsys)(IMAGES), model(IMAGES)) < 1e-4


def test_a_merged_resnet_with_its_own_batch_norm(tmp_path: Path) -> None:
    spec = BackboneSpec("resnet10t.c3_in1k", base="random", img_size=64)
    model = adapt(spec, NOLA(targets=["conv"], rank=2, num_basis=5, train_norms=True), ["a", "b"])
    images = torch.randn(4, 3, 64, 64)
    model.train()(images)  # moves the statistics
    model.eval()
    plain = eval(write_merged(model, tmp_path / "m"), {"timm": timm}).eval()
    assert apart(plain(images), model(images)) < 1e-4
    model.save(tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(images), model(images))


# A small model of each way in which timm's classifiers differ, and a side at which it is cheap
HEADS = {
    "test_vit.r160_in1k": 32, "test_convnext.r160_in1k": 32, "test_efficientnet.r160_in1k": 32,  # a linear layer
    "resnetv2_18.ra4_e3600_r224_in1k": 32, "dla46x_c.in1k": 32,  # a convolution
    "deit_tiny_distilled_patch16_224.fb_in1k": 32,  # two for distillation
    "levit_128s.fb_dist_in1k": 64, "repvit_m1.dist_in1k": 32,  # two, each behind a batch norm
    "crossvit_tiny_240.in1k": None, "efficientvim_m1_dist.in1k": 64,  # one for each stage
    "volo_d1_224.sail_in1k": 32, "caformer_s18.sail_in1k": 32,  # made linear
    "resnet20_cifar.untrained": 32, "mlp_784_256.untrained": None,  # this package's own
}  # fmt: skip


@pytest.mark.parametrize("tag", HEADS)
def test_every_kind_of_head_is_merged(tag: str, tmp_path: Path) -> None:
    model = adapt(BackboneSpec(tag, base="zero", img_size=HEADS[tag]), LinearProbe(), ["a", "b", "c"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.backbone.parameters(), *model.bank.parameters()]:
            if tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    images = torch.randn(2, 3, model.metadata.input.size, model.metadata.input.size, generator=generator)
    with torch.no_grad():
        model.eval().bank.head_weight.div_(model.backbone(images).abs().mean())  # so that not the bias alone counts
        expected = model(images)
        found = eval(write_merged(model, tmp_path / "m").rpartition("; ")[2], {"timm": timm}).eval()(images)
    assert apart(found, expected) < 1e-3


def smallest_of_each_family() -> list[str]:
    """One architecture for each of timm's modules, and those with a head of another kind."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    size = re.compile(r"(test|nano|atto|pico|femto|tiny|small|mini|_xxs|_xs|_s|_t|050|18|_b0|_m0|128)")
    chosen = [min(names, key=lambda name: (not size.search(name), len(name), name)) for names in families.values()]
    return sorted({*chosen, *(tag.partition(".")[0] for tag in HEADS), "deepseek_vit_412m_enc", "iformer_l_distilled",
                   "mobilenetv5_300m_enc", "resnet50_clip"})  # fmt: skip


@pytest.mark.slow
def test_a_merged_model_of_every_family_has_timms_own_weights() -> None:
    """On the meta device: no numbers, but every name and shape of the weights."""
    refused = []
    for name in smallest_of_each_family():
        source = resolve(BackboneSpec(name))
        with torch.device("meta"):
            backbone = source.create(0)
            try:
                _, plain, classifiers = with_classifier(source, backbone, 7)
            except NolaVisionError:
                refused.append(name)
                continue
        widths = [plain.get_submodule(classifier).weight.shape[1] for classifier in classifiers]
        features = backbone.num_features if not hasattr(backbone, "head_hidden_size") else backbone.head_hidden_size
        assert sum(widths) % features == 0, name
        assert all(plain.get_submodule(classifier).bias is not None for classifier in classifiers), name
        own = {n: t.shape for n, t in plain.state_dict().items()}
        assert {n: t.shape for n, t in backbone.state_dict().items()}.items() <= own.items(), name
    assert refused == ["deepseek_vit_412m_enc", "mobilenetv5_300m_enc"]  # encoders: timm gives them no classifier
