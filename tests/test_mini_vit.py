"""The packaged backbones: they load from the package alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch

from nola_vision.models.zoo import mini_vit

NAME = "vit_mini_patch4_32.contours"
NAMES = pytest.mark.parametrize("name", [NAME, "vit_glyph_patch4_32.glyphs"])
WEIGHTS = mini_vit.WEIGHTS / "vit_mini_patch4_32.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download would be an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the packaged weights need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@NAMES
def test_is_registered(name: str) -> None:
    assert timm.is_model(name.partition(".")[0])
    assert name in timm.list_pretrained("vit_*_patch4_32*")


@NAMES
def test_loads_offline_with_finite_features(name: str) -> None:
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        features = model(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert features.shape == (2, model.num_features) == (2, 160)
    assert features.isfinite().all()
    assert features[0].sub(features[1]).abs().max() > 0


@NAMES
def test_weights_are_the_packaged_ones(name: str) -> None:
    first, second = (timm.create_model(name, pretrained=True, num_classes=0).state_dict() for _ in range(2))
    random = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], random["blocks.0.attn.qkv.weight"])


def test_takes_a_new_head() -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=7)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_data_config() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model(NAME, pretrained=False))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0


def test_is_small() -> None:
    model = timm.create_model(NAME, pretrained=False, num_classes=0)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert WEIGHTS.stat().st_size < 6e6


def test_the_log_and_the_page_are_those_of_the_weights() -> None:
    log = Path(__file__).parents[1] / "scripts" / "pretrain_contours.log.jsonl"
    end = json.loads(log.read_text().splitlines()[-1])
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert (end["sha256"], end["bytes"]) == (digest, WEIGHTS.stat().st_size)
    described = (mini_vit.WEIGHTS / "README.md").read_text()
    for file in mini_vit.WEIGHTS.glob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in described
