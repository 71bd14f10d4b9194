"""Whole networks from nothing: exact counts of Tables 8 and 9, random starts of the right size, and training."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nola_vision import NOLA, PRANC, BackboneSpec, FullFinetune, HashedNet, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.methods import Method
from nola_vision.adapters.methods.registry import from_dict
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.loading import set_temperature
from nola_vision.runs import run_id
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import parse

TEN, HUNDRED = [str(i) for i in range(10)], [str(i) for i in range(100)]
R20 = BackboneSpec("resnet20_cifar.untrained", base="random")


def counts(model: AdaptedModel) -> tuple[int, int, int]:
    """Trained numbers of the bank, of the backbone (batch norms), and batch-norm statistics."""
    bank = sum(p.numel() for p in model.bank.parameters())
    norms = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    return bank, norms, sum(t.numel() for n, t in model.trained_tensors().items() if "running_" in n)


def entry(config: str, name: str) -> tuple[BackboneSpec, Method]:
    loaded = load_configs([config])
    return BackboneSpec(**loaded["model"]["backbone"]), from_dict(run_id.resolve(loaded, name)["model"]["method"])


@pytest.mark.parametrize(
    ("config", "name", "classes", "bank", "norms", "total"),
    [  # PAPER.md, 'Parameter counts that must come out exactly', and Tables 8 and 9
        ("resnet20_cifar10_scratch.yaml", "nola", TEN, 11_500, 1_376, 12_876),
        ("resnet20_cifar10_scratch.yaml", "pranc", TEN, 10_000, 1_376, 12_752),
        ("resnet18_imagenet100_scratch.yaml", "nola", HUNDRED, 100_000, 9_600, 109_600),
        ("resnet18_imagenet100_scratch.yaml", "pranc", HUNDRED, 100_000, 9_600, 119_200),
    ],
)
def test_counts_of_the_paper(config: str, name: str, classes: list[str], bank: int, norms: int, total: int) -> None:
    found = counts(adapt(*entry(config, name), classes))
    assert found == (bank, norms, norms)
    assert total == bank + norms + (norms if name == "pranc" else 0)  # the paper counts PRANC's statistics too


def test_counts_of_dense_hashed_and_lora_networks() -> None:
    for config, name, classes, total in (
        ("resnet20_cifar10_scratch.yaml", "dense", TEN, 269_722),
        ("resnet18_imagenet100_scratch.yaml", "dense", HUNDRED, 11_227_812),
    ):
        model = adapt(*entry(config, name), classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    bank, norms, statistics = counts(adapt(*entry("resnet18_imagenet100_scratch.yaml", "hashednet"), HUNDRED))
    assert 129_200 - 21 <= bank + norms + statistics <= 129_200  # a fraction of a bucket is lost in each weight
    bank, norms, _ = counts(adapt(*entry("resnet20_cifar10_scratch.yaml", "lora"), TEN))
    assert abs(bank + norms - 13_295) < 50


@pytest.mark.parametrize("config", ["resnet20_cifar10_scratch.yaml", "resnet18_imagenet100_scratch.yaml",
                                    "mlp_mnist_scratch.yaml"])  # fmt: skip
def test_every_entry_of_the_shipped_configs_is_understood(config: str) -> None:
    loaded = load_configs([config])
    for name in loaded["methods"]:
        plain = parse({**run_id.resolve(loaded, name), "data": {**loaded["data"], "root": "somewhere"}})
        assert plain["model"]["backbone"]["base"] in ("random", "zero")


METHODS = [
    NOLA(targets=["all", "head"], rank=16, num_basis=200, c=1),
    LoRA(targets=["all", "head"], rank=2, c=1),
    PRANC(targets=["all", "head"], num_basis=300, scope="layer"),
    PRANC(targets=["all", "head"], num_basis=300),
    HashedNet(targets=["all", "head"], max_parameters=500),
]


@pytest.mark.parametrize("base", ["zero", "random"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'scope', '')}")
def test_a_network_from_nothing_starts_with_hes_variance_and_learns(method: Method, base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapt(BackboneSpec("mlp_784_256.untrained", base=base), method, TEN)
    change = model.bank.changes()["fc1.weight"]
    assert float(change.var()) == pytest.approx(2 / 784, rel=0.25)
    assert model.backbone.fc1.weight.any() == (base == "random")
    images, labels = torch.randn(40, 3, 28, 28), torch.arange(40) % 10
    lr, steps = (0.05, 8) if isinstance(method, PRANC) else (0.02, 30)  # a step of PRANC takes a third of a second
    optimizer, losses = torch.optim.Adam(model.bank.parameters(), lr=lr), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save(tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(images), model(images))


def test_a_random_base_is_a_function_of_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (adapt(R20, FullFinetune(), TEN, basis_seed=seed).backbone for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.dim() == 4:
            assert not torch.equal(parameter, other.get_parameter(name))
            fan_in = math.prod(parameter.shape[1:])
            assert float(parameter.var()) == pytest.approx(2 / fan_in, rel=0.3)


@pytest.mark.parametrize(
    ("tag", "base"),
    [
        ("resnet10t.c3_in1k", "random"),
        ("resnet10t.c3_in1k", "zero"),
        ("test_convnext.r160_in1k", "random"),
        ("swinv2_tiny_window8_256.ms_in1k", "random"),
    ],
)
def test_frozen_norms_of_a_random_base_leave_no_dead_block(tag: str, base: str) -> None:
    spec = BackboneSpec(tag, base=base, img_size=64)
    backbone = adapt(spec, LinearProbe(), ["a", "b"]).backbone
    plain = create_backbone(spec)  # where norms are trained they start as in timm
    opened = [n for n, p in plain.named_parameters() if p.dim() == 1 and "bias" not in n and p.abs().max() < 1e-2]
    assert opened and all(backbone.get_parameter(name).min() >= 0.2 for name in opened)
    if base == "random":
        features = backbone.requires_grad_(True)(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        assert 0.1 < float(features.detach().square().mean().sqrt()) < 10
        features.square().sum().backward()
        assert all(bool(p.grad.any()) for p in backbone.parameters() if p.dim() > 1)


def test_random_weights_whose_features_explode_or_vanish_are_refused() -> None:
    lora = LoRA(targets=["conv"], rank=1)
    resnet = BackboneSpec("resnet10t.c3_in1k", base="random", img_size=64)
    with pytest.raises(NolaVisionError, match=r"start at a size of \de\+\d\d, .*train_norms: true"):
        adapt(resnet, lora, ["a", "b"])
    model = adapt(resnet, replace(lora, train_norms=True), ["a", "b"])
    assert model.train()(torch.randn(4, 3, 64, 64)).isfinite().all()
    with pytest.raises(NolaVisionError, match=r"start at a size of \de-\d\d, .* its layers: use base: pretrained"):
        adapt(BackboneSpec("test_nfnet.r160_in1k", base="random", img_size=64), LinearProbe(), ["a", "b"])


def test_a_target_that_does_nothing_is_refused_on_random_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nola_vision.models.assembly.open_branches", lambda backbone: None)
    with pytest.raises(NolaVisionError, match="does not reach the features"):
        adapt(BackboneSpec("resnet10t.c3_in1k", base="random", img_size=64), LoRA(targets=["conv"], rank=1), ["a", "b"])


def test_batch_norms_are_trained_stored_and_restored(tmp_path: Path) -> None:
    model = adapt(R20, NOLA(targets=["conv"], num_basis=9, train_norms=True), TEN)
    images = torch.randn(6, 3, 32, 32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        nn.functional.cross_entropy(model.train()(images), torch.arange(6)).backward()
        optimizer.step()
    model.eval().save(tmp_path / "a.safetensors")
    again = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(again(images), model(images)) and model.backbone.bn1.running_mean.any()
    with torch.no_grad():
        again.backbone.bn1.weight.add_(1)
    assert not torch.equal(again(images), model(images))


def test_what_would_never_move_is_refused() -> None:
    with pytest.raises(NolaVisionError, match=r"does not accept images of 32 pixels \(img_size\): use 28"):
        adapt(BackboneSpec("mlp_784_256.untrained", base="random", img_size=32), LoRA(targets=["all"]), TEN)
    zero = BackboneSpec("resnet20_cifar.untrained", base="zero")
    with pytest.raises(NolaVisionError, match="never move"):
        adapt(zero, NOLA(targets=["conv"], start="a0"), TEN)
    with pytest.raises(NolaVisionError, match="base zero does not use the weights file x.pth: leave one of them out"):
        adapt(BackboneSpec("resnet20_cifar.untrained", base="zero", file="x.pth"), NOLA(targets=["conv"]), TEN)


def test_a_basis_that_no_memory_holds_is_refused() -> None:
    vit_b = BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k", base="zero")
    with pytest.raises(NolaVisionError, match="1024 vectors would take 54 GiB: use storage streamed"):
        adapt(vit_b, PRANC(targets=["mlp"]), TEN)


def test_budgets(tmp_path: Path) -> None:
    mini = BackboneSpec("vit_mini_patch4_32.contours")
    model = adapt(mini, NOLA(targets=["mlp", "head"], max_parameters=1000), TEN)
    assert sum(p.numel() for p in model.bank.adapter_parameters()) == 24 * (1000 // 24)
    with pytest.raises(NolaVisionError, match="its targets need 24"):
        adapt(mini, NOLA(max_parameters=23), TEN)
    with pytest.raises(NolaVisionError, match="its targets need 12"):
        adapt(mini, HashedNet(targets=["mlp"], max_parameters=11), TEN)
    for bits, limit in ((32, 40_000), (4, 9_000)):
        model = adapt(mini, NOLA(targets=["mlp"], max_bytes=limit, bits=bits), TEN)
        size = model.save(tmp_path / "a.safetensors")
        assert limit - 24 * bits / 8 - 280 <= size <= limit  # seeds and learning rates may take up to 160 bytes more
        assert load_adapter(tmp_path / "a.safetensors").metadata.method.max_bytes is None
        set_temperature(tmp_path / "a.safetensors", 0.000123456, "validation", 10**6)  # the longest there is
        assert (tmp_path / "a.safetensors").stat().st_size <= limit
    with pytest.raises(NolaVisionError, match=r"the smallest file \(num_basis 1\) needs [\d,]+ bytes"):
        adapt(mini, NOLA(max_bytes=500), TEN)
    with pytest.raises(NolaVisionError, match="give one budget"):
        adapt(mini, NOLA(max_bytes=50_000, max_parameters=500), TEN)
