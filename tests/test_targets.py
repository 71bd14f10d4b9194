"""What each target matches in each family of backbones: docs/backbones.md says it, and these tests read it there."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from nola_vision.adapters.stack import AdapterStack
from nola_vision.backbones import BackboneSpec, create_backbone, probe_batch
from nola_vision.errors import NolaVisionError
from nola_vision.methods import NOLA, LoRA, make_stack
from nola_vision.targets import find_targets

PAGE = (Path(__file__).parent.parent / "docs/backbones.md").read_text(encoding="utf-8")
TABLE = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "---" not in line and "`" in line
]
# fewer and narrower blocks than the models have: what is matched in a block stays the same
SMALLER = {
    "deit_tiny_patch16_224": {"depth": 2, "img_size": 32},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 28},
    "vit_giant_patch14_dinov2": {"depth": 1, "img_size": 28, "embed_dim": 96, "num_heads": 2},
    "vit_small_patch16_dinov3": {"depth": 1, "img_size": 32},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 28},
    "eva02_base_patch14_224": {"depth": 1, "img_size": 28, "embed_dim": 96, "num_heads": 2},
    "vit_base_patch16_clip_224": {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 2},
    "beit_base_patch16_224": {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1), "img_size": 56},
    "swinv2_tiny_window8_256": {"depths": (2, 1), "img_size": 64},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32)},
    "resnet10t": {"zero_init_last": False},
}
NAMES = [name for name in SMALLER]


def backbone(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda tag, **options: original(tag, **{**options, **SMALLER[name]}))
    torch.manual_seed(0)
    made = create_backbone(BackboneSpec(name, base="random"))
    monkeypatch.setattr(timm, "create_model", original)
    with torch.no_grad():  # SwinV2 starts the norms of its branches at zero
        for module in made.modules():
            if isinstance(module, nn.LayerNorm) and not module.weight.any():
                module.weight.fill_(1)
    made.pretrained_cfg["input_size"] = (3, size := SMALLER[name].get("img_size", 64), size)
    return made


def matched(model: nn.Module, target: str) -> str:
    """As the page writes it: the layers of the first block or stage, others alike left out; `-` for none."""
    try:
        found = find_targets(model, target)
    except NolaVisionError as error:
        assert "matches no weight" in str(error)
        return "-"
    names = dict.fromkeys(
        re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", t.weight.removesuffix(".weight"))).rpartition("*.")[2]
        + ("" if t.rows is None else f"[{t.rows[0]}:{t.rows[1]}]".replace(str(t.shape[0]), "3d"))
        for t in found
    )
    return ", ".join(sorted({re.sub(r"\[.*", " rows", name) for name in names}))


def test_the_page_names_every_model_that_is_tested() -> None:
    assert [line[1] for line in TABLE] == NAMES


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line[1])
def test_the_page_says_what_is_matched(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(line[1], monkeypatch)
    assert [matched(model, target) for target in ("mlp", "qkv", "qv", "conv")] == line[2:]
    every = {t.weight for t in find_targets(model, "all")}
    assert not [name for name in every if re.match(r"head|attn_pool|fc\.", name)]
    for target in ("mlp", "qkv", "conv"):
        if matched(model, target) != "-":
            assert {t.weight for t in find_targets(model, target)} <= every


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_reaches_the_features_of_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(name, monkeypatch)
    images = probe_batch(model)
    plain = model(images)
    stack = make_stack(model, NOLA(targets=["all"], rank=1, num_basis=4), 3)
    stack.attach(model, images)  # the probe refuses a target that does not reach the features
    assert torch.equal(model(images), plain)
    shake(stack)
    model.eval()
    changed = model(images)
    assert (changed - plain).abs().max() > 1e-4
    monkeypatch.setattr("nola_vision.adapters.stack.merges_exactly", lambda *_: False)
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * float(changed.detach().abs().max())}
    assert torch.allclose(model(images), changed, **tolerance)  # the additive path
    monkeypatch.undo()
    (changed * torch.randn_like(changed)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.adapter_parameters())
    stack.merge()
    assert torch.allclose(model(images), changed, **tolerance)


def shake(stack: AdapterStack) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_windows_are_routed_to_their_images_adapters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(name, monkeypatch)
    stack = make_stack(model, LoRA(targets=["qkv", "mlp"], rank=2), 3, num_adapters=2)
    stack.attach(model)
    shake(stack)
    images = probe_batch(model)
    with stack.route(torch.tensor([0, 1])):
        both = model(images)
    with stack.route(torch.tensor([0])):
        first = model(images[:1])
    with stack.route(torch.tensor([1])):
        second = model(images[1:])
    assert torch.allclose(both, torch.cat([first, second]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, model_of(stack, model, images[:1], 1), rtol=1e-3)


def model_of(stack: AdapterStack, model: nn.Module, images: torch.Tensor, adapter: int) -> torch.Tensor:
    with stack.route(torch.tensor([adapter])):
        return model(images)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_models_that_read_a_raw_weight_compute_as_timms_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm's switch the bias is added after the layer; without it, the layer's weight is read past an adapter."""
    model = backbone(name, monkeypatch)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("q_bias", "v_bias")):
                parameter.normal_()
    images = probe_batch(model)
    switched = model(images)
    attentions = [module for module in model.modules() if hasattr(module, "qkv_bias_separate")]
    for module in attentions:
        assert module.qkv_bias_separate is True
        module.qkv_bias_separate = False
    assert torch.allclose(model(images), switched, rtol=1e-4, atol=1e-5)
    stack = make_stack(model, LoRA(targets=["qkv"], rank=1), 3)
    with pytest.raises(NolaVisionError, match=r"attn\.qkv.* does not reach the features"):
        stack.attach(model, images)


def test_a_fused_weight_of_another_make_is_refused() -> None:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qkv = nn.Linear(6, 10)
    with pytest.raises(NolaVisionError, match=r"attn\.qkv\.weight has 10 rows, which are no query, key and value"):
        find_targets(model, "qv")
    assert [t.weight for t in find_targets(model, "qkv")] == ["attn.qkv.weight"]
