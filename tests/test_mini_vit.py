"""The packaged backbones: they load from the package alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from nola_vision.models.zoo import mini_vit

NAME = "vit_mini_patch4_32.contours"
NAMES = pytest.mark.parametrize("name", [NAME, "vit_mini_patch4_32.mae", "vit_glyph_patch4_32.glyphs"])


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


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (NAME, "vit_mini_patch4_32"),
        ("vit_mini_patch4_32", "vit_mini_patch4_32"),  # without a tag
        ("vit_mini_patch4_32.mae", "vit_mini_patch4_32_mae"),
        ("vit_glyph_patch4_32.glyphs", "vit_glyph_patch4_32"),
    ],
)
def test_weights_are_those_of_the_file(name: str, file: str) -> None:
    loaded = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    stored = load_file(mini_vit.WEIGHTS / f"{file}.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key].float()) for key in loaded)


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


@pytest.mark.parametrize(("script", "file"), [("contours", "vit_mini_patch4_32"), ("masked", "vit_mini_patch4_32_mae")])
def test_the_log_is_that_of_the_weights(script: str, file: str) -> None:
    log = Path(__file__).parents[1] / "scripts" / f"pretrain_{script}.log.jsonl"
    end = json.loads(log.read_text().splitlines()[-1])
    weights = (mini_vit.WEIGHTS / f"{file}.safetensors").read_bytes()
    assert (end["sha256"], end["bytes"]) == (hashlib.sha256(weights).hexdigest(), len(weights))


def test_the_page_describes_every_file() -> None:
    described = (mini_vit.WEIGHTS / "README.md").read_text()
    files = list(mini_vit.WEIGHTS.glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in described
        assert file.stat().st_size < 6e6
