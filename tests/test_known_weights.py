"""A local weights file is found again by its digest, wherever it is now, and an adapter file has no path of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nola_vision import BackboneSpec, LinearProbe, adapt, load_adapter
from nola_vision.adapters.serialization import read_adapter
from nola_vision.common import local_files
from nola_vision.common.errors import NolaVisionError
from nola_vision.models import known_weights
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.export import write_merged

TAG = "vit_mini_patch4_32.contours"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NOLA_VISION_WEIGHTS", raising=False)
    monkeypatch.setattr(local_files, "_in_process", {})


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Other weights than those that ship, of the same size."""
    state = create_backbone(TAG).state_dict()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"] + 0.01
    return state


@pytest.fixture
def trained(weights: dict[str, torch.Tensor], tmp_path: Path) -> tuple[Path, Path]:
    """A weights file in a private folder, and an adapter file for it."""
    file = tmp_path / "private place" / "mine: é\xa0.safetensors"
    file.parent.mkdir()
    safetensors.torch.save_file(weights, file)
    adapter = tmp_path / "adapter.safetensors"
    adapt(BackboneSpec(TAG, file=str(file)), LinearProbe(), ["a", "b"]).save(adapter)
    return file, adapter


def test_an_adapter_file_names_the_weights_and_no_path(trained: tuple[Path, Path], tmp_path: Path) -> None:
    file, adapter = trained
    metadata, _ = read_adapter(adapter)
    origin = metadata["weights"]
    assert origin["file"] == "mine_ é_.safetensors" and origin["repository"] is None
    assert origin["bytes"] == file.stat().st_size and origin["sha256"] == local_files.file_digest(file)
    for path in (adapter, tmp_path / "shipped.safetensors"):
        if not path.exists():
            adapt(TAG, LinearProbe(), ["a", "b"]).save(path)
            assert read_adapter(path)[0]["weights"]["file"] == "vit_mini_patch4_32.safetensors"
        stated = str(read_adapter(path)[0])
        assert "private place" not in stated and str(Path.home()) not in stated
    assert adapt(BackboneSpec(TAG, base="random"), LinearProbe(), ["a", "b"]).file_metadata()["weights"] is None


def test_a_weights_file_is_found_again_by_its_digest(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, adapter = trained
    assert load_adapter(adapter).metadata.backbone.file == str(file)  # `adapt` has put it into the list
    moved = tmp_path / "elsewhere" / "below" / "renamed.pth.safetensors"
    moved.parent.mkdir(parents=True)
    file.rename(moved)
    other = moved.with_name(file.name)  # of that name and size, but another
    other.write_bytes(moved.read_bytes()[:-1] + b"?")
    with pytest.raises(NolaVisionError) as refused:
        load_adapter(adapter)
    digest = read_adapter(adapter)[0]["weights"]["sha256"]
    for part in (
        "'mine_ é_.safetensors'",
        f"SHA-256 {digest[:12]}...",
        "--weights FILE",
        "NOLA_VISION_WEIGHTS",
        "`fit`",
    ):
        assert part in str(refused.value)

    monkeypatch.setenv("NOLA_VISION_WEIGHTS", str(tmp_path / "elsewhere"))
    read: list[str] = []
    digests = known_weights.file_digests
    monkeypatch.setattr(
        known_weights, "file_digests", lambda base, paths: read.extend(p.name for p in paths) or digests(base, paths)
    )
    (moved.parent / "large.safetensors").write_bytes(b"of another size, so it is not read")
    assert load_adapter(adapter).metadata.backbone.file == str(moved)
    assert read[:2] == [other.name, moved.name] and "large.safetensors" not in read  # that of the name comes first
    monkeypatch.delenv("NOLA_VISION_WEIGHTS")
    assert load_adapter(adapter).metadata.backbone.file == str(moved)  # it is in the list now
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(NolaVisionError, match="not found"):
        load_adapter(adapter)
    assert load_adapter(adapter, str(moved)).metadata.backbone.file == str(moved)
    assert load_adapter(adapter).metadata.backbone.file == str(moved)
    monkeypatch.setenv("NOLA_VISION_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(NolaVisionError, match="which is not a folder"):
        load_adapter(adapter)


def test_a_folder_of_a_merged_model_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(TAG, LinearProbe(), ["a", "b"])
    model.temperature, model.calibrated_on = 1.5, "folds"
    write_merged(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["temperature"] == 1.5
    adapter = tmp_path / "a.safetensors"
    adapt(f"local-dir:{tmp_path / 'merged'}", LinearProbe(), ["c", "d"]).save(adapter)
    assert read_adapter(adapter)[0]["weights"]["file"] == "model.safetensors"
    assert load_adapter(adapter).metadata.backbone.file == str(tmp_path / "merged")
    (tmp_path / "place").mkdir()
    (tmp_path / "merged").rename(tmp_path / "place" / "new")
    with pytest.raises(NolaVisionError, match=r"only you may name .*--weights FOLDER.*model.safetensors"):
        load_adapter(adapter)
    monkeypatch.setenv("NOLA_VISION_WEIGHTS", str(tmp_path / "place"))
    assert load_adapter(adapter).metadata.backbone.file == str(tmp_path / "place" / "new")
    (tmp_path / "place" / "new" / "config.json").unlink()  # without it nothing states the architecture
    with pytest.raises(NolaVisionError, match="--weights FOLDER"):
        load_adapter(adapter)


def test_the_search_in_a_folder_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    place, outside = tmp_path / "place", tmp_path / "outside.pth"
    (place / "deep").mkdir(parents=True)
    outside.write_bytes(b"wanted")
    digest = local_files.file_digest(outside)
    assert digest is not None
    wanted, spec = known_weights.WeightsOrigin(None, "w.pth", 6, digest), BackboneSpec(TAG)
    (place / "link.pth").symlink_to(outside)
    (place / "up").symlink_to(tmp_path)
    os.mkfifo(place / "w.pth")
    for number in range(300):
        (place / f"{number}.pth").write_bytes(b"others")
    written: list[Path] = []
    whole = local_files.write_cache
    monkeypatch.setattr(local_files, "RACY_NS", -(10**12))
    monkeypatch.setattr(local_files, "write_cache", lambda path, entries: written.append(path) or whole(path, entries))
    monkeypatch.setenv("NOLA_VISION_WEIGHTS", str(place))
    assert known_weights.find(wanted, spec) is None
    assert len(written) == 1  # not once per file
    (place / "deep" / "in.pth").write_bytes(b"wanted")
    (place / "in.pth").symlink_to(place / "deep" / "in.pth")
    assert known_weights.find(wanted, spec) == str(place / "in.pth")
    (place / "in.pth").unlink()
    assert known_weights.find(wanted, spec) == str(place / "deep" / "in.pth") and not capsys.readouterr().err
    monkeypatch.setattr(known_weights, "_MOST_ENTRIES", 303)
    assert known_weights.find(wanted, spec) is None
    assert capsys.readouterr().err.count("stops after 303 files and folders: set NOLA_VISION_WEIGHTS") == 1

    # the list of known files may have any content
    monkeypatch.delenv("NOLA_VISION_WEIGHTS")
    for entries in ({"a\0b": [digest], "\ud800": [digest], "x" * 5000: [digest], str(outside): [digest]},):
        local_files.write_cache(known_weights._list_file(), entries)
        assert known_weights.find(wanted, spec) == str(outside)
    local_files.write_cache(known_weights._list_file(), [digest])  # type: ignore[arg-type]
    assert known_weights.find(wanted, spec) is None
    known_weights.remember(BackboneSpec(TAG, file=str(outside)))
    assert known_weights.find(wanted, spec) == str(outside)


def test_names_that_are_not_a_files() -> None:
    assert known_weights.is_file_name("vit é (2).safetensors")
    for name in ("", ".", "..", "/etc/passwd", "a/b", "..\\a", "C:a", "a\nb", "\x1b[31m", "a\u202eb", "x" * 256):
        assert not known_weights.is_file_name(name)
        assert known_weights.is_file_name(known_weights._name(Path("folder", name.replace("/", "")[:300] or "_")))
