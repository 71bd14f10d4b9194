"""`nola-vision data check` and `data manifest`, and training on a manifest's images; a step on every data set."""

import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stand_ins
from nola_vision.cli.main import main
from nola_vision.data import check
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.manifest import Manifest, content, write_manifest
from nola_vision.data.sources import ArraySource
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.runs import store
from nola_vision.runs.cells import compose, part_files
from tiny import SMALL_VIT, trained_rows

QUICK = [
    "--threads=1", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2", "--data.eval_batch_size=8",
]  # fmt: skip
SMALL = [*SMALL_VIT, *QUICK]
DIGITS = ["--config=quickstart.yaml", "--data.shots=2", "--data.test_limit=40", *SMALL]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NOLA_VISION_DATA", raising=False)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_ins.make("folder", tmp_path / "insects", monkeypatch)


def run(*words: str) -> int:
    return main([str(word) for word in words])


def test_check_says_what_is_there(tree: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("data", "check", "folder", "--root", tree) == 0
    printed = capsys.readouterr().out
    assert "folder: <class>/<image> under the root, or train/<class>/<image>, with test/<class>/<image>" in printed
    assert "train: 36 images in 3 classes, 12 each" in printed and "fit for use" in printed
    monkeypatch.setenv("NOLA_VISION_DATA", str(tree))
    assert run("data", "check", "folder") == 0

    (tree / "train/class 0 é/0.png").write_bytes(b"no image")
    one = (tree / "train/class 1 é/5.png").read_bytes()
    (tree / "train/class 1 é/6.png").write_bytes(one)
    (tree / "test/class 2 é/9.png").write_bytes(one)
    capsys.readouterr()
    assert run("data", "check", "folder") == 1
    printed = capsys.readouterr().out
    for line in (
        "test: 7 images in 3 classes, 2 (class 0 é) to 3 (class 2 é):\n  class 0 é 2, class 1 é 2, class 2 é 3\n",
        "unreadable in train: 1",
        f"cannot decode the image {tree}/train/class 0 é/0.png",
        "twice in train: 1",
        f"in train and in test: 1\n    {tree}/train/class 1 é/5.png (class 1 é) and {tree}/test/class 2 é/9.png"
        " (class 2 é): the labels differ",
        "Dataset check failed: fix what is missing, unreadable, in two splits, or in two classes.",
    ):
        assert line in printed


def test_check_refuses_what_fit_refuses_and_says_what_is_not_read(
    tree: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = (tree / "train/class 0 é/0.png").read_bytes()
    (tree / "train/class 1 é/same.png").write_bytes(same)
    (tree / "test/class 2 é/same.png").write_bytes(same)
    (tree / "train/class 2 é/letter.DOCX").write_bytes(b"")
    (tree / "train/class 2 é/\x1b[31mred\nline.png").write_bytes(b"no image")
    os.mkfifo(tree / "test/class 0 é/pipe.png")
    assert run("data", "check", "folder", "--root", tree) == 1
    printed = capsys.readouterr().out
    train, test = f"{tree}/train", f"{tree}/test"
    for line in (
        "twice in train and the labels differ: 1\n"
        f"    {train}/class 0 é/0.png (class 0 é) and {train}/class 1 é/same.png (class 1 é)\n",
        f"    {train}/class 0 é/0.png (class 0 é) and {test}/class 2 é/same.png (class 2 é): the labels differ\n",
        "files that are not read in train: 1 (1 .docx)",
        "red\\nline.png (not an image",
        f"cannot read the image {test}/class 0 é/pipe.png (it is a FIFO, not a regular file)",
    ):
        assert line in printed
    assert "\x1b[31mred" not in printed

    for split in ("train", "test"):
        for number in (1, 2):
            shutil.rmtree(tree / split / f"class {number} é")
    fit = ["fit", "--config=quickstart.yaml", "--method=1nn", "--data.dataset=folder", *QUICK]
    for words in (["data", "check", "folder", "--root", tree], [*fit, f"--data.root={tree}"]):
        assert run(*words) == 2
        assert "there is one class only, class 0 é: give images of two or more" in capsys.readouterr().err
    two = ArraySource("birds", np.arange(3, dtype=np.uint8).reshape(3, 1, 1), [0, 1, 1], ("crane", "crane"))
    monkeypatch.setattr(check, "open_split", lambda *_: two)  # one name for two classes, as ImageNet has
    counts = check.check_split(stand_ins.DATASETS["digits"], None, "train", False, lambda *_: None).counts
    assert counts == [("crane", 1), ("crane", 2)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as people have them: no test split, other names of the splits, files of many kinds, two labels."""
    place = tmp_path_factory.mktemp("cases")
    for root, splits in (
        ("train_only", ["train"]), ("valid", ["train", "valid"]), ("validation", ["train", "validation"]),
        ("flat", [""]), ("formats", ["train", "test"]), ("two_labels", ["train", "test"]),
        ("pool", ["train", "Val", "test"]), ("both", ["train", "val", "valid", "test"]),
    ):  # fmt: skip
        for number, (split, name, i) in enumerate(itertools.product(splits, ("a", "b"), range(6))):
            stand_ins.picture(place / root / split / name / f"{i}.png", number)
    for suffix, kind in (
        (".jfif", "JPEG"),
        (".JPE", "JPEG"),
        (".tga", "TGA"),
        ("", "PNG"),
        (".AVIF", "AVIF"),
        (".jp2", "JPEG2000"),
    ):
        Image.new("RGB", (9, 9), (1, 2, len(suffix))).save(place / f"formats/train/a/x{suffix}", kind)
    (place / "formats/train/b/x.doc").write_bytes(b"")
    (place / "two_labels/train/b/same.png").write_bytes((place / "two_labels/train/a/0.png").read_bytes())
    (place / "list.csv").write_text("path,label\n" + "".join(f"flat/{n}/{i}.png,{n}\n" for n in "ab" for i in range(6)))
    return place


@pytest.mark.parametrize(
    ("name", "status", "lines"),
    [
        ("train_only", 0, ["all images: 12 images in 2 classes, 6 each", "estimated by cross-validation in 5 folds"]),
        ("flat", 0, ["all images: 12 images in 2 classes, 6 each", "estimated by cross-validation in 5 folds"]),
        ("list.csv", 0, ["all images: 12 images in 2 classes, 6 each", "estimated by cross-validation in 5 folds"]),
        ("valid", 0, ["train: 12 images", "test (named validation): 12 images"]),
        ("validation", 0, ["train: 12 images", "test (named validation): 12 images"]),
        ("pool", 0, ["train: 12 images", "validation: 12 images", "test: 12 images"]),
        ("formats", 0, ["train: 18 images in 2 classes, 6 (b) to 12 (a)", "not read in train: 1 (1 .doc)"]),
        ("two_labels", 1, ["twice in train and the labels differ: 1\n", "/a/0.png (a) and ", "/b/same.png (b)"]),
        ("both", 2, ["both/val and ", "both/valid are folders of validation images, but only one is read"]),
    ],
)  # fmt: skip
def test_cases_of_layouts(name: str, status: int, lines: list[str], cases: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = "list" if name.endswith(".csv") else "folder"
    assert run("data", "check", dataset, "--root", cases / name) == status
    printed, error = capsys.readouterr()
    assert all(line in printed + error for line in lines), printed
    assert error.count("\n") == (status == 2)


def test_a_manifest_without_a_test_split_draws_from_all_images(cases: Path, capsys: pytest.CaptureFixture) -> None:
    for dataset, root in (("folder", cases / "flat"), ("list", cases / "list.csv")):
        assert run("data", "manifest", dataset, "--root", root, "--shots", 6, "--out", f"{dataset}.json") == 0
        images = json.loads(Path(f"{dataset}.json").read_text())["images"]
        prefix = "flat/" if dataset == "list" else ""
        assert sorted(name for name, _, _ in images) == [f"{prefix}{n}/{i}.png" for n in "ab" for i in range(6)]
        data = KShotDataModule(
            input_config(BackboneSpec("test_vit")), dataset, str(root), shots=6, manifest=str(Path(f"{dataset}.json"))
        )
        assert sorted(data._train_set[1]) == [*range(12)] and len(data._pool_set[1]) == 0


def test_file_names_are_bytes(tree: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the check through a manifest, a run and its row to predictions, on a terminal that lacks most characters."""
    for split in ("train", "test"):
        os.rename(tree / split / "class 0 é", os.fsencode(tree / split) + b"/caf\xe9")
        os.rename(os.fsencode(tree / split) + b"/caf\xe9/0.png", os.fsencode(tree / split) + b"/caf\xe9/stra\xdfe.png")
        (tree / split / "class 1 é/1.png").rename(tree / split / "class 1 é/😀.png")
    root = os.fsdecode(os.fsencode(tree.parent) + b"/k\xe4fer")
    tree.rename(root)
    assert run("data", "check", "folder", "--root", root) == 0
    assert "caf\\xe9" not in capsys.readouterr().err
    assert run("data", "manifest", "folder", "--root", root, "--shots", 11, "--out", "m.json") == 0
    assert "train/caf\\\\xe9/stra\\\\xdfe.png" in Path("m.json").read_text("utf-8")
    fit = ["fit", "--config=quickstart.yaml", "--method=linear", "--data.dataset=folder", *SMALL, "--data.shots=11"]
    assert run(*fit, f"--data.root={root}", "--data.manifest=m.json") == 0
    (row,) = trained_rows("runs")
    assert row.status == "completed" and row.data["class_names"][0] == "caf\\xe9"
    assert "data" in row.config["content"] and row.config["data"]["root"].endswith("/k\\udce4fer")
    (adapter,) = Path("runs").rglob("linear/*/adapter.safetensors")

    folder = Path("new")
    folder.mkdir()
    for name in (b"\xe4.png", "😀.png".encode(), b"a\x1b[31mred.png"):
        Image.new("RGB", (9, 9)).save(os.fsdecode(b"new/" + name), "PNG")
    Image.new("RGB", (9, 9)).save("=cmd().png")
    places = ["new", "=cmd().png"]
    assert run("predict", "--adapter", adapter, "--out", "p.csv", *places) == 0
    written = [line.split(",")[0] for line in Path("p.csv").read_text("utf-8").splitlines()]
    assert sorted(written) == ["'=cmd().png", "image", "new/\\xe4.png", "new/a\\x1b[31mred.png", "new/😀.png"]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert run("predict", "--adapter", adapter, *places) == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined]
    assert "new/\\xe4.png" in printed and "new/\\U0001f600.png" in printed and "\x1b" not in printed


def test_devices_and_huge_manifests_are_not_read(tree: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo("pipe.json")
    Path("deep.json").write_text("[" * 100_000)
    with open("huge.json", "wb") as file:
        file.truncate(10 * 2**30)
    fit = ["fit", "--config=quickstart.yaml", "--method=1nn", "--data.dataset=folder", f"--data.root={tree}", *QUICK]
    for manifest, expected in (
        ("/dev/zero", "cannot be read (it is a device, not a regular file)"),
        ("pipe.json", "cannot be read (it is a FIFO, not a regular file)"),
        ("huge.json", "cannot be read (it is larger than 128 MiB)"),
        ("deep.json", "is not JSON"),
    ):
        assert run(*fit, f"--data.manifest={manifest}") == 2
        error = capsys.readouterr().err.strip()
        assert f"the manifest {manifest} {expected}" in error and "\n" not in error
    os.mkfifo(tree / "train/class 0 é/00.png")
    assert run(*fit, "--data.shots=all") == 2
    assert "00.png (it is a FIFO, not a regular file): fix, replace or remove it" in capsys.readouterr().err
    (tree / "train/class 0 é/00.png").unlink()
    (tree / "test/class 1 é/0.png").write_bytes((tree / "test/class 1 é/0.png").read_bytes()[:50])
    assert run(*fit) == 2 and not Path("runs").exists()
    assert "test/class 1 é/0.png (image file is truncated): fix, replace or remove it" in capsys.readouterr().err


def test_a_manifest_is_what_one_trains_on(tree: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("data", "manifest", "folder", "--root", tree, "--shots", 3, "--split", 2, "--out", "m.json") == 0
    written = json.loads(Path("m.json").read_text())
    assert [written[k] for k in ("dataset", "shots", "split_seed")] == ["folder", 3, 2] and len(written["images"]) == 9
    assert written["images"][0][0].startswith("train/class 0 é/")

    moved = tree.rename(tree.with_name("elsewhere"))  # another lab's copy, with an image more, first in the order
    Image.new("RGB", (9, 9)).save(moved / "train/class 0 é/!first.png")
    fit = ["fit", "--config=quickstart.yaml", "--method=linear", "--data.dataset=folder", *SMALL]
    here = [*fit, f"--data.root={moved}", "--data.shots=3", "--data.split_seed=2"]
    assert run(*here, "--data.manifest=m.json", "--out=a") == 0
    (row,) = trained_rows("a")
    source = stand_ins.DATASETS["folder"].open(str(moved), "train")
    assert [source.name(i) for i in row.data["draw"]] == [name for name, _, _ in written["images"]]
    assert run(*here, "--out=b") == 0
    (other,) = trained_rows("b")
    assert other.data["draw"] != row.data["draw"] and other.run_hash != row.run_hash

    Path("bad.json").write_text("[]")
    Path("cut.json").write_text(Path("m.json").read_text()[:99])
    capsys.readouterr()
    for words, expected in (
        ([*fit, f"--data.root={moved}", "--data.manifest=m.json"], "has shots 3, but the config has 5"),
        ([*here, "--data.manifest=none.json"], "none.json cannot be read"),
        ([*here, "--data.manifest=bad.json"], "is not a k-shot manifest"),
        ([*here, "--data.manifest=cut.json"], "is not JSON"),
        (["data", "manifest", "folder", "--root", moved], "needs --out FILE"),
        (["data", "manifest", "folder", "--root", moved, "--out", "x", "--shots", 99], "99 shots need"),
        (["data", "manifest", "digits", "--out", "no/x"], "cannot be written"),
        (["data", "check", "folder", "--root", moved, "--shots", 2], "takes no --shots"),
        (["data", "check", "folder", "--root", "gone"], "the data root gone does not exist"),
        (["data", "manifest", "folder", "--root", moved, "--out", "x", "--split", -1], "is not a whole number"),
        (["data", "check", "folder", "--root", "m.json"], "the data root m.json is a file"),
        (["data", "check", "cifar10", "--root", "gone"], "the folder does not exist"),
        (["data", "check", "cifar1000"], "did you mean cifar100"),
        (["data", "check", "cub200"], "this data set needs a folder"),
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err.strip()
        assert expected in error and "\n" not in error, error
    assert not Path("x").exists()

    name = written["images"][4][0]
    Image.new("RGB", (9, 9), (1, 2, 3)).save(moved / name)
    assert run(*here, "--data.manifest=m.json", "--out=c") == 2
    assert f"{name} is another image" in capsys.readouterr().err
    (moved / name).unlink()
    assert run(*here, "--data.manifest=m.json", "--out=c") == 2
    assert f"the data set here lacks 1 of the manifest's 9 images, for example {name}" in capsys.readouterr().err


CHANGES = {
    "another version": (lambda m: m.update(format_version=2), "has version 2"),
    "another data set": (lambda m: m.update(dataset="cifar10"), "has dataset cifar10"),
    "another split": (lambda m: m.update(split_seed=1), "has split_seed 1, but the config has 0"),
    "a class more": (lambda m: m["class_names"].append("wasp"), "0 different images of 'wasp'"),
    "a class's name": (
        lambda m: m["class_names"].__setitem__(0, "wasp"),
        "only the manifest has 'wasp'; only the data",
    ),
    "the classes' order": (lambda m: m["class_names"].reverse(), "their order differs"),
    "a label": (
        lambda m: [image.__setitem__(1, (image[1] + 1) % 3) for image in m["images"]],
        "has another label here",
    ),
    "an image less": (lambda m: m["images"].pop(), "1 different images of 'class 2 é'"),
    "an image twice": (lambda m: m["images"].__setitem__(0, m["images"][1]), "1 different images of 'class 0 é'"),
    "no such image": (lambda m: m["images"][0].__setitem__(0, "train/x.png"), "lacks 1 of the manifest's 6 images"),
    "a text for an image": (lambda m: m["images"].__setitem__(0, "train/x.png"), "is not what nola-vision writes"),
    "a text for a number": (lambda m: m.update(shots="2"), "shots of Manifest is '2': it must be a whole number"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_was_changed_is_refused(name: str, tree: Path, capsys: pytest.CaptureFixture) -> None:
    change, expected = CHANGES[name]
    assert run("data", "manifest", "folder", "--root", tree, "--shots", 2, "--out", "m.json") == 0
    written = json.loads(Path("m.json").read_text())
    change(written)
    Path("m.json").write_text(json.dumps(written))
    fit = ["fit", "--config=quickstart.yaml", "--method=1nn", "--data.dataset=folder", f"--data.root={tree}", *QUICK]
    capsys.readouterr()
    assert run(*fit, "--data.shots=2", "--data.manifest=m.json") == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error and not Path("runs").exists()


def test_images_of_a_manifest_are_not_validated_on(capsys: pytest.CaptureFixture) -> None:
    """Another lab may have drawn with another rule."""
    source = stand_ins.DATASETS["digits"].open(None, "train")
    members = [[int(i) for i in (source.labels == label).nonzero()[0][[4, 9]]] for label in range(10)]  # of the pool
    images = [(source.name(i), label, content(source, i)) for label, two in enumerate(members) for i in two]
    write_manifest(Manifest("digits", 2, 0, source.class_names, tuple(images)), "m.json")
    options = ["--method=1nn", *DIGITS]
    assert run("fit", *options, "--data.manifest=m.json") == 0
    (row,) = trained_rows("runs")
    assert row.data["draw"] == sum(members, []) and row.data["counts"]["validation"] == 177 - 20


def test_a_sweep_of_a_manifest_is_of_its_split(in_process: None, capsys: pytest.CaptureFixture) -> None:
    assert run("data", "manifest", "digits", "--shots", 2, "--split", 3, "--out", "m.json") == 0
    sweep = ["sweep", "--methods=1nn,linear", "--inits=0", *DIGITS]
    assert run(*sweep, "--data.manifest=m.json", "--splits=0-1") == 2
    assert "has only split 3" in capsys.readouterr().err
    assert run(*sweep, "--data.manifest=m.json") == 0
    rows, _ = store.read_rows("runs")
    assert {row.split for row in rows} == {3} and {row.stage for row in rows} == {"search", "final"}


def test_a_manifest_of_images_without_files(capsys: pytest.CaptureFixture) -> None:
    assert run("data", "manifest", "digits", "--shots", 2, "--out", "d.json") == 0
    options = ["--method=1nn", *DIGITS]
    assert run("fit", *options, "--data.manifest=d.json", "--out=a") == 0 and run("fit", *options, "--out=b") == 0
    (one,), (other,) = trained_rows("a"), trained_rows("b")
    assert one.data["draw"] == other.data["draw"] and one.test_accuracy == other.test_accuracy


@pytest.mark.parametrize(
    "dataset", [name for name in part_files("datasets") if not name.startswith("vtab_") or name == "vtab_dtd"]
)
def test_a_cell_of_every_data_set_runs_a_step_through_its_reader(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small ViT: the step of a real backbone costs more, and shows nothing of the data set."""
    root = stand_ins.make(compose("vitb", dataset, 5)["data"]["dataset"], tmp_path / "data", monkeypatch)
    options = [f"--data.root={root}", "--data.batch_size=4"]
    options.append("--data.test_limit=400")  # or all 20,000 test images of sun397 are decoded before training
    assert run("fit", f"--config=vitb_{dataset}_5shot.yaml", *options, *SMALL) == 0
    (row,) = trained_rows("runs")
    classes = stand_ins.SIZES[row.config["data"]["dataset"]][0]
    assert row.status == "completed" and row.data["counts"]["train"] == 5 * classes
    assert row.adapter_parameters == 8 * 1024 and row.head_parameters == 65 * classes


@pytest.mark.slow  # 86 and 304 million numbers each
@pytest.mark.parametrize("backbone", sorted(part_files("backbones")))
def test_a_cell_of_every_backbone_runs_a_step(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32 pixels and with random weights, which nothing downloads."""
    root = stand_ins.make("cifar10", tmp_path / "data", monkeypatch)
    small = ["--model.backbone.base=random", "--model.backbone.img_size=32", "--data.batch_size=2", "--data.shots=1"]
    assert run("fit", f"--config={backbone}_cifar10_5shot_paper", f"--data.root={root}", *small, *QUICK) == 0
    (row,) = trained_rows("runs")
    assert row.status == "completed" and row.adapter_parameters == {"b": 49_152, "l": 98_304}[backbone[3]]


@pytest.mark.parametrize("method", compose("vitb", "cifar10", 5)["methods"])
def test_every_entry_of_a_cell_runs_a_step(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small ViT."""
    root = stand_ins.make("cifar10", tmp_path / "data", monkeypatch)
    options = [f"--method={method}", f"--data.root={root}", "--data.shots=1"]
    assert run("fit", "--config=vitb_cifar10_5shot", *options, *SMALL) == 0
    (row,) = trained_rows("runs")
    assert row.status == "completed" and row.method == method and row.test_accuracy is not None
    block = 4 * 64 + (64 + 1) * 3 * 64 + (64 + 1) * 64 + (64 + 1) * 192 + (192 + 1) * 64
    whole = 2 * block + (16 * 16 * 3 + 1) * 64 + (1 + 5) * 64 + 2 * 64  # patches, class token, positions, last norm
    parameters = {"full-ft": whole, "lora-r4": 2 * 4 * 4 * 64, "nola-mlp": 4 * 2048, "nola-qv": 4 * 2048}
    assert row.adapter_parameters == parameters.get(method, 0)
    assert (row.train_loss is None) is (method in ("1nn", "nearest-mean", "logistic"))


@pytest.mark.parametrize(
    ("config", "dataset", "method"),
    [("mlp_mnist_scratch", "mnist", name) for name in ("pranc", "nola")]
    + [("resnet20_cifar10_scratch", "cifar10", name) for name in ("dense", "pranc", "lora", "nola")]
    + [("resnet18_imagenet100_scratch", "imagenet100", "lora")]
    + [
        pytest.param("resnet18_imagenet100_scratch", "imagenet100", name, marks=pytest.mark.slow)  # 11 million weights
        for name in ("dense", "nola", "hashednet")
    ],
)
def test_a_network_from_scratch_runs_a_step(
    config: str, dataset: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy, and all of Tables 8 and 9 but PRANC on a ResNet-18; at 32 pixels, with few vectors of bases."""
    root = stand_ins.make(dataset, tmp_path / "data", monkeypatch)
    options = [f"--method={method}", f"--data.root={root}", "--data.batch_size=8", "--data.num_workers=0"]
    few = {
        "resnet20-pranc": ["--model.method.num_basis=50"],
        "resnet18-nola": ["--model.method.num_basis=20", "--model.method.head_num_basis=20"],
    }
    options += few.get(f"{config[:8]}-{method}", [])
    small = ["--model.backbone.img_size=32"] if dataset == "imagenet100" else []
    once = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    assert run("fit", f"--config={config}.yaml", *options, *small, *QUICK, *once) == 0
    (row,) = trained_rows("runs")
    assert row.status == "completed" and row.train_loss is not None and row.test_accuracy is not None
