"""Features on disk: what a key depends on, files that are damaged or not ours, several writers, the size limit."""

import copy
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from nola_vision import LinearProbe, adapt
from nola_vision.cli import main as cli
from nola_vision.common import local_files, process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.loaders import ImageSubset
from nola_vision.data.sources import ArraySource, FileSource
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.runs import runner
from nola_vision.runs.parsing import RunCLI, build
from nola_vision.runs.record import Row
from nola_vision.runs.store import ADAPTER_FILE
from nola_vision.training import feature_cache, features
from tiny import TINY, tiny, trained_rows

MINI = {"tag": "vit_mini_patch4_32.contours"}
KEY, OTHER = "a" * 64, "b" * 64
FEATURES = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Switches the cache on; where its files will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(feature_cache.VARIABLE)
    monkeypatch.setattr(local_files, "_warned", False)
    return tmp_path / "cache" / "nola-vision" / "features"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_loaded_in_another_process(folder: Path, dtype: torch.dtype) -> None:
    stored = FEATURES.to(dtype).t().contiguous().t()  # not contiguous
    feature_cache.store(KEY, stored)
    with torch.inference_mode():
        found = feature_cache.load(KEY, (4, 3))
    assert found is not None and torch.equal(found, stored) and found.dtype == dtype and not found.is_inference()
    assert feature_cache.load(OTHER, (4, 3)) is None
    assert feature_cache.load(KEY, (3, 4)) is None  # other images or another backbone
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.safetensors"]


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "a bit", "text", "foreign", "of another key", "not finite", "integers", "fifo", "large", "link"],
)
def test_a_damaged_file_is_replaced(damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feature_cache.store(KEY, FEATURES)
    path = folder / f"{KEY}.safetensors"
    content = path.read_bytes()

    def write(features: torch.Tensor) -> None:
        checksum = feature_cache._checksum(KEY, features)
        path.write_bytes(safetensors.torch.save({"features": features, "sha256": checksum}))

    write(FEATURES + 1)
    assert feature_cache.load(KEY, (4, 3)) is not None  # written like this it is accepted
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[:-9])
        case "a bit":
            path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        case "text":
            path.write_text("features" * 99)
        case "foreign":
            path.write_bytes(safetensors.torch.save({"weight": FEATURES}))
        case "of another key":
            feature_cache.store(OTHER, FEATURES + 1)
            shutil.move(folder / f"{OTHER}.safetensors", path)
        case "not finite":
            write(FEATURES / 0)
        case "integers":
            write(FEATURES.long())
        case "large":
            # as valid as a file with more metadata, but not read
            metadata = {"filler": "x" * feature_cache._MOST_HEADER}
            stored = {"features": FEATURES, "sha256": feature_cache._checksum(KEY, FEATURES)}
            path.write_bytes(safetensors.torch.save(stored, metadata))
        case "fifo":
            path.unlink()
            os.mkfifo(path)
        case "link":
            (folder / "elsewhere").write_bytes(b"precious")
            path.unlink()
            path.symlink_to("elsewhere")
    assert feature_cache.load(KEY, (4, 3)) is None
    feature_cache.store(KEY, FEATURES)
    if damage != "fifo":  # what is not a file is not touched
        assert torch.equal(feature_cache.load(KEY, (4, 3)), FEATURES)
    if damage == "link":  # it is replaced, not written through
        assert (folder / "elsewhere").read_bytes() == b"precious" and not path.is_symlink()


def test_features_that_are_not_finite_are_not_stored(folder: Path) -> None:
    feature_cache.store(KEY, FEATURES / 0)
    assert not folder.exists()


def test_the_least_recently_used_files_are_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [letter * 64 for letter in "abc"]
    for number, key in enumerate(keys):
        feature_cache.store(key, FEATURES)
        os.utime(folder / f"{key}.safetensors", (number, number))
    size = (folder / f"{KEY}.safetensors").stat().st_size
    monkeypatch.setenv(feature_cache.VARIABLE, str(3 * size / 2**30))
    assert feature_cache.load(keys[0], (4, 3)) is not None  # used now
    old, new = (folder / f".{KEY}.safetensors.{letter * 32}.tmp" for letter in "12")
    for path in (old, new, folder / "notes.txt", folder / "photo.safetensors"):
        path.write_bytes(b"x")
        os.utime(path, None if path == new else (0, 0))  # `old` is of a process that died
    monkeypatch.setenv(feature_cache.VARIABLE, "1")
    feature_cache.store(KEY, FEATURES)
    assert not old.exists() and len(list(folder.iterdir())) == 6
    os.utime(folder / f"{KEY}.safetensors")
    monkeypatch.setenv(feature_cache.VARIABLE, str(3 * size / 2**30))
    feature_cache.store("d" * 64, FEATURES)
    left = {path.name for path in folder.iterdir()}
    # `new` counts, so two are deleted
    assert left == {"notes.txt", "photo.safetensors", new.name, f"{keys[0]}.safetensors", f"{'d' * 64}.safetensors"}
    monkeypatch.setenv(feature_cache.VARIABLE, str(size / 2 / 2**30))
    feature_cache.store("e" * 64, FEATURES)  # larger than the limit: it would push out all others
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("broken", ["a file", "no home"])
def test_a_folder_that_cannot_be_written_costs_one_warning(
    broken: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "a file":
        folder.parent.mkdir(parents=True)
        folder.write_text("")
    else:
        monkeypatch.setattr(feature_cache, "cache_folder", lambda: None)
    for key in (KEY, OTHER):
        feature_cache.store(key, FEATURES)
        assert feature_cache.load(key, (4, 3)) is None
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("the cache cannot be written")


@pytest.mark.parametrize("text", ["lots", "-1", "nan", "inf", "1e300"])
def test_the_size_limit_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv(feature_cache.VARIABLE, text)
    with pytest.raises(NolaVisionError, match=f"NOLA_VISION_CACHE_GIB is '{text}': give the size"):
        feature_cache.most_bytes()
    for verb in ("fit", "sweep"):
        assert cli.main([verb, "--config", "quickstart.yaml"]) == 2
        assert "NOLA_VISION_CACHE_GIB" in capsys.readouterr().err


def _write_and_read(home: str, number: int, rounds: int) -> None:
    os.environ |= {"XDG_CACHE_HOME": home, feature_cache.VARIABLE: "1"}
    features = torch.full((200, 50), float(number % 2))
    for _ in range(rounds):
        feature_cache.store(KEY, features)
        found = feature_cache.load(KEY, (200, 50))
        assert found is not None and len(found.unique()) == 1  # one writer's, whole


def test_several_processes_may_write_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = [(str(folder.parents[1]), number, 20) for number in range(3)]
    processes = [context.Process(target=_write_and_read, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.safetensors"]


# --- runs ------------------------------------------------------------------------------------------------------------

MEASURED = ("test_accuracy", "test_nll", "val_loss", "val_accuracy", "train_loss", "temperature", "ece")


def measured(row: Row) -> list[object]:
    """What may not depend on where the features come from, and the adapter file."""
    file = row.folder / ADAPTER_FILE if row.folder else None
    return [*(getattr(row, name, None) for name in MEASURED), file and file.exists() and file.read_bytes()]


def test_a_key_is_of_all_that_features_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: `test_features_are_computed_again_for_other_images_weights_or_settings` of test_frozen."""

    def described(built: RunCLI) -> str:
        made = features._description(built.model.model, built.trainer, built.datamodule.reference_dataloader())
        return feature_cache.key_of(made)

    pretrained = build(tiny("linear", model={"backbone": {"base": "pretrained", **MINI}, "run_seed": 0}), tmp_path)
    other_seed = build(tiny("linear", model={"backbone": {"base": "pretrained", **MINI}, "run_seed": 1}), tmp_path)
    for built in (pretrained, other_seed):
        built.datamodule.setup("fit")
    known = described(pretrained)
    assert described(other_seed) == known  # the seed is of the head
    changes = {
        "nola_vision.training.features.processor_name": lambda: "another",
        "nola_vision.training.features._versions": lambda: {"torch": "3.0"},
        "nola_vision.training.features.file_digest": lambda _: "another",
        "torch.get_num_threads": lambda: 63,
        "nola_vision.training.features._source_digest": lambda: "another",
        "torch.are_deterministic_algorithms_enabled": lambda: True,
        "torch.backends.cpu.get_cpu_capability": lambda: "AVX1",
    }
    found = {known}
    for target, changed in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(target, changed)
            found.add(described(pretrained))
    with torch.no_grad():
        pretrained.model.model.backbone.pos_embed[0, 0, 0] += 1
        found.add(described(pretrained))
        pretrained.model.model.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1
        found.add(described(pretrained))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="bf16"))
        found.add(described(pretrained))
    pretrained.datamodule.eval_batch_size = 17
    found.add(described(pretrained))
    backbone = pretrained.model.model.backbone
    assert described(pretrained) == (backbone.eval(), described(pretrained))[1]
    before = described(pretrained)
    for stored in ({}, {"cpu": torch.ones(1)}):  # as LeViT does in its first pass
        backbone.attention_bias_cache = stored
        assert described(pretrained) == before
    assert backbone.register_forward_hook(lambda *_: None) and described(pretrained) == before
    backbone.blocks[0].attn.fused_attn = not backbone.blocks[0].attn.fused_attn  # timm's choice by a variable
    found.add(described(pretrained))
    backbone.register_buffer("table", torch.ones(2), persistent=False)
    found.add(described(pretrained))
    backbone.table += 1
    found.add(described(pretrained))
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    found.add(described(pretrained))
    for seed in (0, 1):
        random = build(tiny("linear", model={"run_seed": seed}), tmp_path)
        random.datamodule.setup("fit")
        found.add(described(random))
    assert len(found) == 1 + len(changes) + 10


class OfAPackage(torch.nn.LayerNorm):
    """The code of another package, which may change without its weights."""


def test_features_of_other_packages_modules_are_not_stored_and_infinite_ones_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    for changed, refused in ((True, False), (False, True), (False, False)):
        built = build(tiny("linear"), tmp_path / "run")
        built.datamodule.setup("fit")
        model, loader = built.model.model, built.datamodule.reference_dataloader()
        if changed:
            model.backbone.norm.__class__ = OfAPackage
        if refused:
            model.backbone.norm.bias.data[0] = torch.inf
            with pytest.raises(NolaVisionError, match="features that are not finite: use another weights file"):
                features.features_of(model, built.trainer, loader)
        else:
            features.features_of(model, built.trainer, loader)
        assert folder.exists() != (changed or refused)


def as_it_is(image: Any) -> Any:
    return image


def test_contents_are_of_what_an_image_shows(tmp_path: Path) -> None:
    """Equal bytes of pixels in another shape, and another order, are other images."""
    labels, names = [0, 1], ("a", "b")
    sources = [ArraySource("x", np.zeros((2, *sides), np.uint8), labels, names) for sides in ((4, 4), (2, 8))]
    square, flat = (ImageSubset(source, np.arange(2), as_it_is, as_it_is).contents() for source in sources)
    assert square[0] == square[1] != flat[0]
    place = photos(tmp_path / "photos")
    files = FileSource(sorted(place.rglob("*.png")), np.zeros(6), names)
    some = [ImageSubset(files, np.array(indices), as_it_is, as_it_is).contents() for indices in ([0, 1], [1, 0])]
    assert some[0] == some[1][::-1] and len(set(some[0])) == 2


def test_a_linear_probe_computes_nothing_again_and_gives_the_same_numbers(
    folder: Path, tmp_path: Path, images_seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, counts = {}, {}
    for name, size in (("without", "0"), ("first", "1"), ("second", "1")):
        monkeypatch.setenv(feature_cache.VARIABLE, size)
        images_seen.clear()
        rows[name] = [runner.run(tiny(method), tmp_path / name) for method in ("linear", "1nn")]
        counts[name] = sum(images_seen)
    assert [measured(row) for row in rows["first"]] == [measured(row) for row in rows["without"]]
    assert [measured(row) for row in rows["second"]] == [measured(row) for row in rows["without"]]
    assert counts["second"] < counts["first"] < counts["without"]


def photos(folder: Path) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 30), (90 * number, 200, 30 if label == "cat" else 90)).save(
                folder / label / f"{number}.png"
            )
    return folder


def test_a_photo_that_changes_is_computed_again_and_one_that_moves_is_not(
    folder: Path, tmp_path: Path, images_seen: list[int]
) -> None:
    place = photos(tmp_path / "photos")

    def computed(root: Path) -> int:
        images_seen.clear()
        data = {"dataset": "folder", "root": str(root), "shots": "all", "test_limit": None}
        with process_cache.keeping():
            runner.run(
                tiny("nearest-mean", methods={"nearest-mean": {"class_path": "NearestMean"}}, data=data), tmp_path
            )
        return sum(images_seen)

    assert computed(place) == 6
    shutil.copytree(place, moved := tmp_path / "moved")
    assert computed(moved) == 0
    times = os.stat(place / "cat" / "0.png")
    shutil.copy(place / "dog" / "1.png", place / "cat" / "0.png")
    os.utime(place / "cat" / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert computed(place) == 6


def test_what_was_read_before_a_file_changed_is_not_stored_under_its_new_content(
    folder: Path, tmp_path: Path, images_seen: list[int]
) -> None:
    place = photos(tmp_path / "photos")
    data = {"dataset": "folder", "root": str(place), "shots": "all", "test_limit": None}
    config = tiny("nearest-mean", methods={"nearest-mean": {"class_path": "NearestMean"}}, data=data)
    built = build(config, tmp_path / "run")
    built.datamodule.setup("fit")  # decodes
    shutil.copy(place / "dog" / "1.png", place / "cat" / "0.png")
    built.model.fit_to(built.datamodule, built.trainer)
    assert sum(images_seen) == 6 and not folder.exists()


def test_no_cache_is_no_part_of_the_hash_and_is_inherited_by_workers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    monkeypatch.setenv(feature_cache.VARIABLE, "1")  # the option changes it: put it back afterwards
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = ["--config", str(tmp_path / "tiny.yaml"), "--methods", "1nn", "--splits", "0", "--inits", "0"]
    assert cli.main(["sweep", *words, "--out", str(tmp_path / "a"), "--no-cache"]) == 0
    assert not folder.exists() and os.environ[feature_cache.VARIABLE] == "0"
    monkeypatch.setenv(feature_cache.VARIABLE, "1")
    assert cli.main(["sweep", *words, "--out", str(tmp_path / "b")]) == 0
    assert len(list(folder.iterdir())) == 2  # training and test images
    before, after = trained_rows(tmp_path / "a"), trained_rows(tmp_path / "b")
    assert [row.run_hash for row in before] == [row.run_hash for row in after]
    assert [measured(row) for row in before] == [measured(row) for row in after]
    capsys.readouterr()
    fit = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--method", "1nn", "--out", str(tmp_path / "c")]
    assert cli.main([*fit, "--trainer.enable_progress_bar=true"]) == 0
    assert "features of 50 images: from the cache\n" in capsys.readouterr().out


def test_weights_that_were_written_to_have_another_digest() -> None:
    """A cast replaces the statistics of batch norms, and a copy counts its writes anew."""
    model = adapt(BackboneSpec("test_resnet.r160_in1k", base="random"), LinearProbe(), ["a", "b"])
    known = model.current_fingerprint()
    assert known == model.fingerprint == model.to(torch.bfloat16).current_fingerprint()
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    assert model.current_fingerprint() not in (None, known) and model.fingerprint == known
    whole = adapt(BackboneSpec(MINI["tag"], int8=True), LinearProbe(), ["a", "b"])
    digests = [copy.deepcopy(whole).current_fingerprint() for _ in range(2)]
    assert digests[0] == digests[1] is not None
    with torch.inference_mode():
        assert adapt(BackboneSpec(MINI["tag"]), LinearProbe(), ["a", "b"]).current_fingerprint() is not None
