"""Targets by structure: the table of docs/backbones.md, and each target of each family at work, on random weights."""

import copy
import functools
import re
from fnmatch import fnmatchcase
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from torch import nn

from nola_vision.adapters.methods import LoRA
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.backbones.properties import probe_batch
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.building import make_bank
from nola_vision.models.targets import TARGETS, find_targets, named_targets

LINES = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("|")]
COLUMNS, ROWS = TABLE[0][2:], {row[1].strip("`"): row[2:] for row in TABLE[2:]}
VIT = dict(depth=2, embed_dim=32, num_heads=2)
SMALL: dict[str, tuple[int | None, dict[str, object]]] = {  # image side and what makes it small
    "vit_tiny_patch16_224": (32, VIT),
    "deit_tiny_patch16_224": (32, VIT),
    "vit_small_patch14_dinov2": (28, VIT),
    "vit_small_patch16_dinov3": (32, VIT),
    "eva02_tiny_patch14_224": (28, VIT),
    "eva02_base_patch14_224": (28, VIT),
    "beit_base_patch16_224": (32, VIT),
    "vit_base_patch32_clip_quickgelu_224": (64, VIT),
    "vit_base_patch32_siglip_256": (64, VIT),
    "swin_tiny_patch4_window7_224": (56, dict(depths=(2, 1), num_heads=(2, 2), embed_dim=16)),
    "swinv2_tiny_window8_256": (64, dict(depths=(2, 1), num_heads=(2, 2), embed_dim=16)),
    "convnext_atto": (None, dict(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))),
    "convnext_tiny": (None, dict(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))),
    "resnet10t": (None, dict(channels=(8, 8, 12, 12))),
}


def number(cell: str) -> int:
    return int(cell.split()[0])


def layers(backbone: nn.Module) -> list[str]:
    return [name for name, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@functools.cache
def small(tag: str) -> nn.Module:
    """A family's model as `create_backbone` makes it, small, and without zeros that would hide what a change does."""
    size, options = SMALL[tag]
    with patch("timm.create_model", functools.partial(timm.create_model, **options)):
        backbone = create_backbone(BackboneSpec(tag, img_size=size, base="random"))
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        if parameter.dim() == 1:  # biases, norms, layer scales
            parameter.data = 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.mark.parametrize("tag", ROWS)
def test_the_table_of_the_docs(tag: str) -> None:
    assert sorted(COLUMNS) == sorted(TARGETS)
    with torch.device("meta"):
        backbone = timm.create_model(tag, num_classes=0)
    for name, cell in zip(COLUMNS, ROWS[tag], strict=True):
        patterns = re.findall("`(.*?)`", cell)
        if not number(cell):
            with pytest.raises(NolaVisionError, match=f"'{name}' matches no weight of this {type(backbone).__name__}"):
                find_targets(backbone, name)
            continue
        targets = find_targets(backbone, name)
        assert len(targets) == number(cell)
        fitting = [layer for layer in layers(backbone) if any(fnmatchcase(layer, pattern) for pattern in patterns)]
        assert list(dict.fromkeys(module for target in targets for module in target.modules)) == fitting
        assert not [m for m in fitting if m.startswith(("head", "attn_pool", "global_pool"))]
        assert [t.rows for t in targets if t.rows] == (
            [] if name != "qv" or "proj" in cell else [r for t in targets[::2] for r in thirds(t.shape[0])]
        )


def thirds(rows: int) -> list[tuple[int, int]]:
    return [(0, rows // 3), (rows // 3 * 2, rows)]


def test_every_family_of_the_table_is_tried_at_work() -> None:
    assert list(SMALL) == list(ROWS)


WORK = [(tag, name) for tag, row in ROWS.items() for name, cell in zip(COLUMNS, row, strict=True) if number(cell)]


@pytest.mark.parametrize(("tag", "name"), WORK)
def test_each_target_at_work(tag: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 0, the effect of every target, both paths, the gradient and merging."""
    backbone = small(tag)
    probe = probe_batch(backbone)[..., :64, :64]  # a convolutional network takes any size
    images = torch.randn(probe.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = backbone(images)
    bank = make_bank(backbone, LoRA(targets=[name], rank=1), num_classes=3)
    bank.attach(backbone, probe)  # refuses a target without effect
    try:
        assert torch.equal(backbone(images), plain)
        generator = torch.Generator().manual_seed(2)
        for parameter in bank.adapter_parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        results = []
        for path in ("merged", "additive"):
            if path == "additive":
                monkeypatch.setattr("nola_vision.adapters.injection.merges_exactly", lambda *_: False)
            bank.zero_grad()
            features = backbone(images)
            features.square().sum().backward()
            results.append((features.detach(), [p.grad.clone() for p in bank.adapter_parameters()]))
        (merged, gradients), (additive, others) = results
        assert (merged - plain).abs().max() > 1e-2 * plain.abs().max()
        assert (merged - additive).abs().max() < 1e-4 * merged.abs().max()
        for one, other in zip(gradients, others, strict=True):
            assert one.abs().max() > 0 and (one - other).abs().max() < 1e-3 * one.abs().max()
        bank.merge()
        assert (backbone(images) - merged).abs().max() < 1e-4 * merged.abs().max()
    finally:
        bank.detach()
    assert torch.equal(backbone(images), plain)


RAW = {"eva02_tiny_patch14_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"}  # they read `self.qkv.weight`


@pytest.mark.parametrize("tag", sorted(RAW))
def test_a_raw_weight_is_refused_by_name_without_timms_switch(tag: str) -> None:
    backbone = copy.deepcopy(small(tag))
    images = probe_batch(backbone)
    called = backbone(images)
    for module in backbone.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = False
    assert (backbone(images) - called).abs().max() < 1e-5 * called.abs().max()
    with pytest.raises(NolaVisionError, match=r"0\.attn\.qkv\.weight.* does not reach the features.*leave it out"):
        make_bank(backbone, LoRA(targets=["qkv"], rank=1), 3).attach(backbone, images)
    make_bank(backbone, LoRA(targets=["mlp"], rank=1), 3).attach(backbone, images)


@pytest.mark.parametrize("tag", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_routing_through_windows(tag: str) -> None:
    backbone = small(tag)
    images = probe_batch(backbone)[[0, 1, 1]]
    bank = make_bank(backbone, LoRA(targets=["qkv", "mlp"], rank=1), 3, num_adapters=3)
    bank.attach(backbone)
    for parameter in bank.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([2, 0, 1])
    with bank.route(index):
        routed = bank(images)
    for sample, adapter in enumerate(index):
        bank.merge(int(adapter))
        alone = bank(images[sample : sample + 1])[0]
        assert (routed[sample] - alone).abs().max() < 1e-4 * alone.abs().max()
        bank.unmerge()
    assert (routed[1] - routed[2]).abs().max() > 1e-2 * routed.abs().max()  # one image, two adapters
    bank.detach()


def test_routing_through_a_position_bias_is_refused() -> None:
    backbone = small("swinv2_tiny_window8_256")
    bank = make_bank(backbone, LoRA(targets=["all"], rank=1), 3, num_adapters=2)
    bank.attach(backbone)
    with pytest.raises(NolaVisionError, match="rows cannot be matched to samples"), bank.route(torch.tensor([0, 1])):
        bank(probe_batch(backbone))
    bank.detach()


def test_what_is_no_block_is_matched_by_no_name() -> None:
    """The head with a hidden layer, CLIP's attention pooling, a squeeze, the MLP of a position bias."""
    with torch.device("meta"):
        hidden = timm.create_model("convnext_atto", num_classes=5, head_hidden_size=16)
        clip = timm.create_model("resnet50_clip", num_classes=0)
        squeeze = timm.create_model("seresnet18", num_classes=0)
        bias = timm.create_model("vit_relpos_small_patch16_224", num_classes=0)
        uneven = timm.create_model("efficientformer_l1", num_classes=0)
    for backbone, idle in ((hidden, "head.pre_logits.fc"), (clip, "head.q"), (squeeze, None)):
        every = [target.modules[0] for target in find_targets(backbone, ["all"])]
        inside = [name for name in layers(backbone) if not name.startswith(("head", "fc"))]
        assert every == inside and (idle is None or idle in layers(backbone))
    with pytest.raises(NolaVisionError, match="'mlp' matches no weight"):
        find_targets(squeeze, ["mlp"])
    assert "blocks.0.attn.rel_pos.mlp.fc1" in layers(bias) and len(find_targets(bias, ["mlp"])) == 24
    assert len(find_targets(hidden, ["re:head.*"])) == 2
    with pytest.raises(NolaVisionError, match=r"1536 rows where query, key and value of width 1024 have 3072: use qkv"):
        find_targets(uneven, ["qv"])


@pytest.mark.parametrize("tag", SMALL)
def test_targets_come_back_by_their_names(tag: str) -> None:
    """As an adapter file lists them: no name is read as a pattern."""
    backbone = small(tag)
    for name in TARGETS:
        try:
            targets = find_targets(backbone, name)
        except NolaVisionError:
            continue
        assert named_targets(backbone, [target.name for target in targets]) == targets
    for wrong in ("re:.*", "all", "qkv", targets[0].name + "x", targets[0].name.replace(".", "_")):
        with pytest.raises(NolaVisionError, match="not a weight of this"):
            named_targets(backbone, [wrong])
