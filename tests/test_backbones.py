"""Backbones by name: folders and repositories as tags, image sides, weights files, downloads."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from nola_vision import BackboneSpec, LinearProbe, adapt
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone, skeleton
from nola_vision.models.backbones.properties import eval_batch_size
from nola_vision.models.backbones.sources import input_config, local_files
from nola_vision.models.backbones.weights import _hub_files
from nola_vision.models.export import write_merged
from nola_vision.runs import run_id
from nola_vision.runs.parsing import parse

MINI = "vit_mini_patch4_32.contours"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that `export --merged` wrote."""
    write_merged(adapt(MINI, LinearProbe(), ["a", "b"]), tmp_path / "mini")
    return tmp_path / "mini"


def refused(spec: BackboneSpec, match: str) -> None:
    with pytest.raises(NolaVisionError, match=match) as caught:
        create_backbone(spec)
    assert "\n" not in str(caught.value)


def hashes(tag: str, **backbone: Any) -> tuple[str, str]:
    data = {"dataset": "folder", "root": "somewhere"}
    method = {"class_path": "LinearProbe", "init_args": {}}
    config = parse({"model": {"backbone": {"tag": tag, **backbone}, "method": method}, "data": data})
    assert str(Path.cwd()) not in run_id.cell_name(config)
    return run_id.cell_name(config), run_id.run_hash(config, "final")


def test_a_folder_as_a_backbone(folder: Path) -> None:
    backbone, images = create_backbone(BackboneSpec(f"local-dir:{folder}")), torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), create_backbone(MINI)(images))
    assert input_config(BackboneSpec(f"local-dir:{folder}")) == input_config(BackboneSpec(MINI))
    resized, own = (create_backbone(BackboneSpec(tag, img_size=48)) for tag in (f"local-dir:{folder}", MINI))
    large = torch.randn(2, 3, 48, 48)
    assert torch.allclose(resized(large), own(large), atol=0.01)  # the packaged position embedding has 16 bits
    # a folder given as the weights replaces the tag's, and serves timm's own tags too
    for tag in ("local-dir:gone", "hf-hub:someone/something", MINI):
        assert torch.equal(create_backbone(BackboneSpec(tag, file=str(folder)))(images), backbone(images))


def test_a_folders_path_is_not_in_the_run_and_its_content_is(folder: Path, tmp_path: Path) -> None:
    first = hashes(f"local-dir:{folder}")
    assert first[0].startswith("local-dir_mini-")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "mini"
    assert hashes(f"local-dir:{moved}") == first == hashes(f"local-dir:{moved}/")
    config = json.loads((moved / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    (moved / "config.json").write_text(json.dumps(config))
    second = hashes(f"local-dir:{moved}")
    assert second[0] == first[0] and second[1] != first[1]
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    weights["norm.bias"] = weights["norm.bias"] + 1 if "norm.bias" in weights else weights["fc_norm.bias"] + 1
    safetensors.torch.save_file(weights, moved / "model.safetensors")
    assert hashes(f"local-dir:{moved}")[1] not in (first[1], second[1])


def test_local_files(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    assert local_files(f"local-dir:{folder}", None) == {"config": config, "weights": weights}
    assert local_files("hf-hub:a/b", str(folder)) == {"config": config, "weights": weights}
    assert local_files(MINI, str(folder)) == local_files(MINI, str(weights)) == {"weights": weights}
    assert local_files(MINI, None)["weights"].name == "vit_mini_patch4_32.safetensors"
    assert local_files("hf-hub:a/b", None) == local_files("test_vit.r160_in1k", None) == {}
    with pytest.raises(NolaVisionError, match="unknown pretrained tag 'typo' of timm's .*: use one of r160_in1k"):
        local_files("test_vit.typo", None)


def test_a_folder_that_is_not_a_model_is_refused(folder: Path) -> None:
    spec, content = BackboneSpec(f"local-dir:{folder}"), (folder / "config.json").read_text()
    refused(BackboneSpec("local-dir:gone"), "local-dir:gone does not contain a config.json: give a folder")
    for damaged in (
        "{",
        "[]",
        "{}",
        content.replace('"mean"', '"meen"'),
        content.replace('"model_args"', '"x": 1, "y"'),
    ):
        (folder / "config.json").write_text(damaged)
        if "x" not in damaged:
            refused(spec, "does not describe a timm model")
    (folder / "config.json").write_text(content.replace("vit_mini_patch4_32", "vit_unknown"))
    refused(spec, "names the architecture 'vit_unknown', which timm lacks")
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").unlink()
    refused(spec, "holds no weights: it must have a file model.safetensors")


def test_a_repository_as_a_backbone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> Any:
        cfg, architecture, model_args = timm.models._hub.load_model_config_from_path(folder)
        return {**cfg, "file": None, "source": "hf-hub", "hf_hub_id": name}, architecture, model_args

    monkeypatch.setattr("nola_vision.models.backbones.sources.load_model_config_from_hf", config)
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda name, **_: safetensors.torch.load_file(folder / "model.safetensors"),
    )
    size = SimpleNamespace(size=7_000_000)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: size)
    spec, images = BackboneSpec("hf-hub:someone/mini"), torch.randn(2, 3, 32, 32)
    assert torch.equal(create_backbone(spec)(images), create_backbone(MINI)(images))
    assert hashes(spec.tag)[0].startswith("hf-hub_someone_mini-")

    def offline(name: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("nola_vision.models.backbones.sources.load_model_config_from_hf", offline)
    refused(BackboneSpec("hf-hub:someone/other"), "hf-hub:someone/other is not on this machine .*local-dir:FOLDER")


@pytest.mark.parametrize(
    ("tag", "side", "works"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", 100, "96 or 112, or its own 224"),
        ("test_convnext.r160_in1k", 8, "32, or its own 160"),
        ("mlp_784_256.untrained", 32, "28"),
    ],
)
def test_image_sides_are_checked_before_weights_are_fetched(
    tag: str, side: int, works: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("weights are fetched")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    spec = BackboneSpec(tag, img_size=side, base="random" if "untrained" in tag else "pretrained")
    refused(spec, rf"does not accept images of {side} pixels \(img_size\): use {works}$")


def test_weights_files_that_lack_something_or_are_not_finite(tmp_path: Path) -> None:
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    spec = BackboneSpec("test_vit.r160_in1k", file=str(tmp_path / "w.safetensors"))

    def save(state: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    save(weights)
    create_backbone(spec)
    save({name: tensor for name, tensor in weights.items() if name not in ("norm.weight", "blocks.0.norm1.bias")})
    refused(spec, "w.safetensors lacks 2 weights of test_vit.r160_in1k, for example blocks.0.norm1.bias")
    for number in (float("nan"), float("inf")):
        broken = {name: tensor.clone() for name, tensor in weights.items()}
        broken["blocks.0.mlp.fc1.weight"][3, 4] = number
        save(broken)
        refused(spec, "w.safetensors: blocks.0.mlp.fc1.weight has a value that is not finite: download it again")
    assert timm.models._builder.load_pretrained.__module__ == "timm.models._builder"  # nothing in timm is replaced


def test_a_damaged_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("nola_vision.models.backbones.sources.Source.create", create)
    with pytest.raises(NolaVisionError, match="a file of the installed package, is missing or damaged: install"):
        create_backbone(BackboneSpec(MINI))


def test_each_thread_reports_the_weights_that_its_own_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = timm.create_model("test_vit", num_classes=10).state_dict()
    loggers = [logging.getLogger(name) for name in ("timm.models", "huggingface_hub")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.WARNING)
    state = torch.get_rng_state()

    def lacks(count: int) -> str:
        kept = dict(list(weights.items())[count:])
        path = tmp_path / f"{count}.pth"
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in kept.items()}}, path)
        try:
            create_backbone(BackboneSpec("test_vit.r160_in1k", file=str(path), img_size=96))
        except NolaVisionError as error:
            return str(error)
        return "complete"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lacks, [0, 1, 2, 3]))
    assert found[0] == "complete"
    first = next(iter(weights))
    assert [f"{n} weights of test_vit.r160_in1k, for example {first}" in found[n] for n in (1, 2, 3)] == [True] * 3
    assert [logger.level for logger in loggers] == [logging.WARNING] * 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tag", ["test_vit.r160_in1k", "test_convnext.r160_in1k", "resnet20_cifar.untrained"])
def test_a_skeleton_is_the_model_without_values(tag: str) -> None:
    made, model = skeleton(BackboneSpec(tag)), create_backbone(BackboneSpec(tag, base="random"))
    assert str(made) == str(model)
    tensors, expected = made.state_dict(), model.state_dict()
    assert list(tensors) == list(expected)
    assert all((t.shape, t.dtype) == (expected[n].shape, expected[n].dtype) for n, t in tensors.items())
    assert all(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])


@pytest.mark.parametrize("file", [None, "pytorch_model.bin", "open_clip_pytorch_model.bin", "x.bin", "x.safetensors"])
def test_weights_are_looked_for_under_the_names_that_timm_tries(file: str | None) -> None:
    name = file or timm.models._hub.HF_WEIGHTS_NAME
    names = [*timm.models._hub._get_safe_alternatives(name), name]
    assert _hub_files(timm.models.PretrainedCfg(hf_hub_id="a/b", hf_hub_filename=file)) == names


def test_evaluation_batches_depend_on_backbone_and_image_size_alone() -> None:
    def size(tag: str, side: int) -> int:
        with torch.device("meta"):
            return eval_batch_size(timm.create_model(tag, num_classes=0), side)

    # 12 float32 copies of 256 patches x 384 values are 4.5 MiB, and 113 of them 512 MiB
    assert size("vit_small_patch14_dinov2", 224) == 64
    # 4 copies of 64 channels of 112 x 112 values are 12.25 MiB
    assert size("resnet18", 224) == 32 and size("resnet18", 4000) == 1
    assert size("test_vit", 32) == size("mlp_784_256", 28) == 256
