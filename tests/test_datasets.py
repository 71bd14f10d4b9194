"""The registry of data sets: what is opened, how images are decoded, and what is said when files are wrong."""

import hashlib
import io
import os
import pickle
import shutil
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import stand_ins
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datasets import hugging_face
from nola_vision.data.datasets.base import ROOT_VARIABLE, DatasetEntry
from nola_vision.data.datasets.registry import DATASETS, get_dataset, open_split
from nola_vision.data.datasets.shipped_list import class_of, read_list
from nola_vision.data.sampling import draw
from nola_vision.data.sources import FileSource, ImageSource
from nola_vision.images import decoding
from nola_vision.runs import run_id

ROOT = Path(__file__).parent.parent


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (5, 4), (10, 20, 30))).save(path, **options)
    return path


@pytest.fixture(autouse=True)
def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, one with a space and an accent, files made in an unsorted order."""
    for name in ("train/naïve bée/b.png", "train/ant/z.JPG", "train/ant/a.png", "train/ant/deep/er.png"):
        save(tmp_path / name)
    for name in ("test/naïve bée/1.png", "test/ant/1.png", "test/ant/2.png"):
        save(tmp_path / name)
    return tmp_path


def test_digits_are_split_as_in_scikit_learns_example() -> None:
    bunch = load_digits()
    train, test = DATASETS["digits"].open(None, "train"), DATASETS["digits"].open(None, "test")
    assert (len(train), len(test)) == (898, 899)
    assert (np.concatenate([train.labels, test.labels]) == bunch.target).all()
    assert train.labels.dtype == np.int64
    image = test.image(3)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(image)[..., 1] - bunch.images[901] * 255 / 16).max() <= 0.5
    assert test.where(3) == "digits[3]"
    assert train.class_names == DATASETS["digits"].class_names(None) == tuple("0123456789")


def test_folder_is_sorted_and_skips_what_is_no_image(tree: Path) -> None:
    save(tree / "train/ant/.hidden.png")
    save(tree / "train/ant/.cache/x.png")
    (tree / "train/.git").mkdir()
    (tree / "train/ant/notes.txt").write_text("no image")
    (tree / "train/readme.md").write_text("no class")
    source = DATASETS["folder"].open(str(tree), "train")
    assert source.class_names == DATASETS["folder"].class_names(str(tree)) == ("ant", "naïve bée")
    found = [Path(source.where(index)).relative_to(tree / "train").as_posix() for index in range(len(source))]
    assert found == ["ant/a.png", "ant/deep/er.png", "ant/z.JPG", "naïve bée/b.png"]
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert DATASETS["folder"].open(str(tree), "test").labels.tolist() == [0, 0, 1]


def test_folder_order_is_not_the_file_systems(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, listdir, walk = DATASETS["folder"], os.listdir, os.walk
    plain = [entry.open(str(tree), "train").where(index) for index in range(4)]
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in list(walk(*a, **k))[::-1]))
    assert [entry.open(str(tree), "train").where(index) for index in range(4)] == plain


def test_a_run_id_knows_the_data_sets_of_own_images() -> None:
    assert run_id.OWN_IMAGES == tuple(name for name, entry in DATASETS.items() if entry.own_images)


def test_names_in_unicodes_two_forms_are_one_name(tree: Path) -> None:
    """Some archives and file systems take accents apart; order and names must not follow them."""
    plain = DATASETS["folder"].open(str(tree), "train")
    for split in ("train", "test"):
        (tree / split / "naïve bée").rename(tree / split / unicodedata.normalize("NFD", "naïve bée"))
        save(tree / split / "naîl/1.png")
    other = DATASETS["folder"].open(str(tree), "train")
    assert plain.class_names == ("ant", "naïve bée") and other.class_names == ("ant", "naîl", "naïve bée")
    assert plain.name(3) == other.name(4) == "train/naïve bée/b.png"
    (tree / "train/naïve bée").mkdir()
    with pytest.raises(NolaVisionError, match="one name in Unicode's two forms"):
        DATASETS["folder"].open(str(tree), "train")


@pytest.mark.parametrize(
    ("one", "two"),
    [("\xe9.png", "e\u0301.png"), ("deep/\xe9/1.png", "deep/e\u0301/1.png"), ("\\xe9.png", os.fsdecode(b"\xe9.png"))],
)
def test_two_files_of_one_name_are_refused(one: str, two: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, paths, walk = DATASETS["folder"], [save(tree / "train/ant" / name) for name in (one, two)], os.walk
    with pytest.raises(NolaVisionError, match="one name in Unicode's two forms.*: rename one$") as caught:
        entry.open(str(tree), "train")
    assert all(ascii(str(path)) in str(caught.value) for path in paths) and str(caught.value).isascii()
    paths[1].unlink()
    save(tree / "val/naïve bée/1.png")
    for name, colour in ((one, "red"), (two, "blue")):
        save(tree / "val/ant" / name, Image.new("RGB", (5, 4), colour))
    assert len(entry.open(str(tree), "train")) == 5
    with pytest.raises(NolaVisionError, match="one name in Unicode's two forms"):
        entry.open(str(tree), "validation")
    content = entry.own_content(str(tree))
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in list(walk(*a, **k))[::-1]))
    assert content.count(b"\n") == 11 and entry.own_content(str(tree)) == content


def test_a_link_that_leads_back_is_followed_once(tree: Path) -> None:
    (tree / "train/ant/self").symlink_to(tree / "train/ant")
    (tree / "train/naïve bée/elsewhere").symlink_to(tree / "test/ant")
    assert DATASETS["folder"].open(str(tree), "train").labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_layouts_of_a_folder(tree: Path) -> None:
    entry, root = DATASETS["folder"], str(tree)

    def places(split: str) -> set[str]:
        source = entry.open(root, split)  # type: ignore[arg-type]
        assert source.class_names == entry.class_names(root)
        return {source.name(index).partition("/")[0] for index in range(len(source))}

    assert entry.splits(root) == ("train", "test") and entry.test_name(root) == "test" and not entry.notes(root)
    with_test = entry.own_content(root)
    for name in ("val", "VALID", "Validation"):  # alone it has the test images
        (tree / "test").rename(tree / name)
        assert entry.splits(root) == ("train", "test") and entry.test_name(root) == "validation"
        assert places("test") == {name} and places("train") == {"train"}
        for label in ("ant", "naïve bée"):  # next to test it is the validation pool
            save(tree / "test" / label / "0.png")
        assert entry.splits(root) == ("train", "validation", "test") and entry.test_name(root) == "test"
        assert places("validation") == {name} and places("test") == {"test"}
        assert f"{name}/ant/2.png".encode() in entry.own_content(root) != with_test
        shutil.rmtree(tree / "test")
        (tree / name).rename(tree / "test")
    save(tree / "extra/1.png"), save(tree / "loose.png"), save(tree / "train/also.png"), save(tree / ".hidden.png")
    save(tree / "train/.bee/1.png"), (tree / ".git").mkdir()
    (tree / "readme.txt").write_text("")
    assert entry.notes(root) == [
        f"folders in {root} that are not read, next to train/ and test/: extra/",
        f"images directly in {root}, in no class folder, that are not read: loose.png",
        f"folders of images in {root}/train that are not read, since their names begin with a dot: .bee/",
        f"images directly in {root}/train, in no class folder, that are not read: also.png",
    ]
    assert len(entry.open(root, "train")) == 4
    shutil.rmtree(tree / "test")
    assert entry.splits(root) == ("train",) and entry.class_names(root) == ("ant", "naïve bée")
    with_train = entry.own_content(root)

    flat, root = tree / "train", str(tree / "train")
    (flat / "runs").mkdir(), (flat / "runs/row.json").write_text("{}")
    assert entry.splits(root) == ("train",) and places("train") == {"ant", "naïve bée"}
    assert entry.notes(root) == [
        f"folders in {root} that are not read, without an image: runs/",
        f"folders of images in {root} that are not read, since their names begin with a dot: .bee/",
        f"images directly in {root}, in no class folder, that are not read: also.png",
    ]
    content = entry.own_content(root)
    assert content.count(b"\n") == 4 and b"also" not in content and content != with_train
    save(flat / "naïve bée/b.png", Image.new("RGB", (5, 4), "red"))
    assert entry.own_content(root) != content


def test_layouts_that_are_refused(tree: Path) -> None:
    entry, root = DATASETS["folder"], str(tree)
    for name, expected in (
        ("valid", r"val and .*valid are folders of validation images, but only one is read: merge them or remove one$"),
        ("Test", "test and .*Test|Test and .*test differ in case only: rename one$"),
    ):
        save(tree / "val/ant/1.png"), (tree / name).mkdir()
        with pytest.raises(NolaVisionError, match=expected):
            entry.splits(root)
        shutil.rmtree(tree / "val"), (tree / name).rmdir()
    (tree / "train").rename(tree / "photos")
    with pytest.raises(NolaVisionError, match="has the folder 'test' but no .*'train': name .* if 'test' is a class"):
        entry.class_names(root)
    for name in ("ant", "naïve bée"):
        for path in (tree / "photos" / name).rglob("*.*"):
            path.unlink()
    with pytest.raises(NolaVisionError, match="no folder in .*photos has images: put images there as"):
        entry.class_names(str(tree / "photos"))


def listing(tree: Path, name: str, content: str | bytes) -> str:
    (tree / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tree / name)


def test_lists_of_images(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    entry = DATASETS["list"]
    elsewhere = save(tmp_path_factory.mktemp("else") / "x.png")
    (tree / "lists").mkdir()
    csv = '\ufeffLabel, path,note\r\nbee,"train/naïve bée/b.png",7\r\n"ant, red",train/ant/a.png\r\n\r\n'
    csv += f"bee,{elsewhere}\r\n"
    text = f"train/naïve bée/b.png\tbee\n../{tree.name}/train/ant/a.png\tant, red\n\n  {elsewhere} bee\n"
    semicolons = f"path;label\ntrain/naïve bée/b.png;bee\ntrain/ant/a.png;ant, red\n{elsewhere};bee\n"
    for name, content in (("a.csv", csv), ("a.txt", text), ("list", text), ("b.CSV", semicolons)):
        root = listing(tree, name, content)
        source = entry.open(root, "train")
        assert entry.splits(root) == ("train",) and source.class_names == entry.class_names(root) == ("ant, red", "bee")
        assert source.labels.tolist() == [1, 0, 1] and all(source.image(index).size == (5, 4) for index in range(3))
        first, second, third = (source.name(index) for index in range(3))
        assert first == "train/naïve bée/b.png" and second.endswith("train/ant/a.png") and third == str(elsewhere)
        content = entry.own_content(root)
        save(elsewhere, Image.new("RGB", (5, 4), "red")), os.utime(elsewhere, ns=(1, 1))
        assert entry.own_content(root) != content  # the images are part of the data
        save(elsewhere), os.utime(elsewhere, ns=(2, 2))
    root = listing(tree, "a.csv", csv.replace('bee,"', 'wasp,"'))
    assert entry.own_content(root).partition(b"\0")[0] != csv.encode()

    latin = os.fsdecode(b"stra\xdfe.png")
    save(tree / "train/ant/a.png").rename(tree / latin)
    source = entry.open(listing(tree, "a.txt", b"stra\xdfe.png caf\xe9\ntest/ant/1.png ant"), "train")
    assert source.class_names == ("ant", "caf\\xe9") and source.name(0) == "stra\\xdfe.png" and source.image(0)


def test_splits_of_a_list(tree: Path) -> None:
    entry = DATASETS["list"]
    files = ["train/ant/a.png", "train/naïve bée/b.png", "test/ant/1.png", "test/naïve bée/1.png"]
    for name in ("ant", "naïve bée"):
        save(tree / "val" / name / "2.png")
        files.append(f"val/{name}/2.png")

    def listed(*splits: str) -> str:
        rows = [f"{path},{path.split('/')[1]},{split}" for path, split in zip(files, splits, strict=False)]
        return listing(tree, "a.csv", "\n".join(["path,label,split", *rows]))

    for splits, expected, name in (
        (("train", "", "Train", "train"), {"train": [0, 1, 0, 1]}, "test"),
        (("train", "train", "valid", "val"), {"train": [0, 1], "test": [0, 1]}, "validation"),
        (
            ("train", "train", "test", "test", "val", "validation"),
            {"train": [0, 1], "validation": [0, 1], "test": [0, 1]},
            "test",
        ),
    ):
        root = listed(*splits)
        assert entry.splits(root) == tuple(expected) and entry.test_name(root) == name
        assert {split: entry.open(root, split).labels.tolist() for split in expected} == expected  # type: ignore[arg-type]
    with pytest.raises(NolaVisionError, match="no training images in the list .*: add some"):
        entry.splits(listed("val", "val", "test", "test"))
    with pytest.raises(NolaVisionError, match=r"line 3 of .*a\.csv has split 'dev': write train, val or test"):
        entry.splits(listed("train", "dev", "test", "test"))
    for splits, odd in (
        (("train", "test"), "'ant' is only in train, 'naïve bée' is only in test"),
        (("train", "train", "test"), "'naïve bée' is only in train"),
        (("train", "val", "train"), "'naïve bée' is only in validation"),
    ):
        with pytest.raises(NolaVisionError, match=rf"^train and .* of the list .*a\.csv must have .*{odd}"):
            entry.splits(listed(*splits))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no images in|begins with ''"),
        (b"train/ant/a.png,ant\n", "begins with 'train/ant/a.png,ant': its first line must be path,label or path"),
        (b"path,label,path\n", "its first line must be"),
        (b"path,label\n", "no images in the list .*: add some"),
        (b"path,label\ntrain/ant/a.png\n", r"line 2 of the list .*a\.csv lacks the label: add it"),
        (b"path,label\n ,ant\n", "line 2 of .* lacks the path: add it"),
        (b"path,label\nx.png,ant\ny.png,ant\n", "2 of the 2 images .* do not exist, the first is 'x.png' in line 2"),
        (b"path,label\n" + b"x" * 9999 + b",ant\n", "1 of the 1 images of .* do not exist"),
        (b"path,label\na.png,ant\nb.png,ant\na.png,bee\n", "lines 2 and 4 .* give 'a.png' the labels 'ant' and 'bee'"),
        (b"path,label\na.png,ant\n./a.png,bee\n", "lines 2 and 3 .* give './a.png' the labels 'ant' and 'bee'"),
        (b"path,label\na.png,ant\na.png,ant\n", "lines 2 and 3 of .* give 'a.png' the same label: keep one of them"),
        (b"path,label,split\na.png,ant,\na.png,ant,test\n", "the splits 'train' and 'test': keep one"),
        ("path,label\n".encode("utf-16"), "is not text in UTF-8: save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not text in UTF-8"),
        (b'path,label\n"' + b"x" * 200_000, r"line \d of .* is not CSV \(field larger than field limit"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(content: bytes, expected: str, tree: Path) -> None:
    entry, root = DATASETS["list"], listing(tree, "a.csv", content)
    with pytest.raises(NolaVisionError, match=expected) as caught:
        entry.open(root, "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 2003


def test_text_lists_that_are_refused(tree: Path) -> None:
    entry = DATASETS["list"]
    for content, expected in (
        ("a.png ant\nb.png\n", r"line 2 of .*a\.txt lacks the label"),
        ("\tant\n", "line 1 of .* lacks the (label|path)"),
        ("x" * 100_000 + " ant", "line 1 of .* has 100004 characters"),
        (" \n\n", "no images in the list"),
    ):
        with pytest.raises(NolaVisionError, match=expected):
            entry.open(listing(tree, "a.txt", content), "train")
    os.mkfifo(tree / "pipe.csv")
    with open(tree / "huge.csv", "wb") as file:
        file.truncate(2**40)
    for place, expected in (
        (tree, "it is a folder"), (tree / "none.csv", "No such file"), (tree / "pipe.csv", "it is a FIFO"),
        (tree / "huge.csv", "it is larger than 64 MiB"),
    ):  # fmt: skip
        with pytest.raises(NolaVisionError, match=rf"cannot read the list .*\({expected}.*\): give a CSV or text file"):
            entry.splits(str(place))
    with pytest.raises(NolaVisionError, match="needs a list of images: pass --data.root FILE"):
        entry.place(None)
    with pytest.raises(NolaVisionError, match=r"is a file: give the folder .* or read .* by --data\.dataset list"):
        DATASETS["folder"].splits(listing(tree, "a.csv", ""))


def test_root_from_the_environment(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NolaVisionError, match="pass --data.root FOLDER or set NOLA_VISION_DATA"):
        DATASETS["folder"].open(None, "train")
    monkeypatch.setenv("NOLA_VISION_DATA", str(tree))
    assert len(DATASETS["folder"].open(None, "train")) == 4


def test_folder_says_what_is_wrong(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = DATASETS["folder"]
    with pytest.raises(NolaVisionError, match=r"the data root .*nowhere does not exist: check --data.root"):
        entry.open(str(tree / "nowhere"), "train")
    save(tree / "test/wasp/1.png")
    for split in ("train", "test"):  # also when the training images are opened: before training, not after
        with pytest.raises(NolaVisionError, match="same class folders, but 'wasp' is only in .*test: rename them"):
            entry.open(str(tree), split)
    (tree / "train/wasp").mkdir()
    with pytest.raises(NolaVisionError, match=r"no images in .*train/wasp \(.*\.png.*add some, or remove the folder"):
        entry.open(str(tree), "train")
    (tree / "bare/train").mkdir(parents=True)
    with pytest.raises(
        NolaVisionError, match=r"no class folders in .*bare/train: put images there as .*<class>/<image>"
    ):
        entry.class_names(str(tree / "bare"))
    save(tree / "train/wasp/1.png")
    scandir = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("wasp"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(NolaVisionError, match=r"cannot read the folder .*wasp \(Permission denied\)"):
        entry.open(str(tree), "train")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_a_bad_image_is_named(tree: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(tree / "train/ant/a.png", Image.fromarray(noise))
    source = DATASETS["folder"].open(str(tree), "train")
    assert (np.asarray(source.image(0)) == noise).all()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:900] if damage == "truncated" else b"this is no image")
    with pytest.raises(NolaVisionError, match=r"cannot decode the image .*train/ant/a\.png .*: fix, replace or remove"):
        source.image(0)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putpixel((1, 0), 1)
    return image


GREY16 = Image.fromarray(np.array([[25700, 65535]], dtype=np.uint16))
GREY32 = Image.fromarray(np.array([[25700, 65535]], dtype=np.int32))
GREYS = [[100, 100, 100], [255, 255, 255]]


@pytest.mark.parametrize(
    ("name", "mode", "image", "options", "expected"),
    [
        ("grey.png", "L", Image.fromarray(np.array([[100, 255]], dtype=np.uint8)), {}, GREYS),
        ("bits.png", "1", Image.fromarray(np.array([[False, True]])), {}, [[0, 0, 0], [255, 255, 255]]),
        ("grey_alpha.png", "LA", Image.new("LA", (2, 1), (100, 0)), {}, [[100, 100, 100]] * 2),
        ("alpha.png", "RGBA", Image.new("RGBA", (2, 1), (10, 20, 30, 0)), {}, [[10, 20, 30]] * 2),
        ("palette.png", "P", palette(), {}, [[200, 100, 50], [1, 2, 3]]),
        ("clear.png", "P", palette(), {"transparency": b"\x00\x80"}, [[200, 100, 50], [1, 2, 3]]),
        ("clear.gif", "P", palette(), {"transparency": 1}, [[200, 100, 50], [1, 2, 3]]),
        ("grey16.png", "I;16", GREY16, {}, GREYS),
        ("grey16.tif", "I;16", GREY16, {}, GREYS),
        ("grey32.tif", "I", GREY32, {}, GREYS),
        ("print.tif", "CMYK", Image.new("CMYK", (2, 1), (255, 0, 0, 0)), {}, [[0, 255, 255]] * 2),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_image_modes(
    tree: Path, name: str, mode: str, image: Image.Image, options: dict[str, object], expected: list[list[int]]
) -> None:
    path = save(tree / "train/ant" / f"0{name}", image, **options)
    with Image.open(path) as stored:
        assert stored.mode == mode
    decoded = DATASETS["folder"].open(str(tree), "train").image(0)
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[0].tolist() == expected


def test_pixels_without_a_white_are_refused(tree: Path) -> None:
    save(tree / "train/ant/0.tif", Image.fromarray(np.array([[0.5]], dtype=np.float32)))
    with pytest.raises(NolaVisionError, match=r"ant/0\.tif .*pixel mode F is undefined"):
        DATASETS["folder"].open(str(tree), "train").image(0)
    save(tree / "train/ant/0.tif", Image.fromarray(np.array([[70000]], dtype=np.int32)))
    with pytest.raises(NolaVisionError, match="pixel mode I is undefined"):
        DATASETS["folder"].open(str(tree), "train").image(0)


@pytest.mark.parametrize(
    ("name", "values", "factor"),
    [
        ("1_bit.png", np.array([[0, 1]], dtype=np.uint16), 32768),
        ("8_bits.tif", np.array([[0, 255]], dtype=np.int32), 256),
        ("10_bits.tif", np.array([[1, 1023]], dtype=np.uint16), 64),
        ("12_bits.png", np.array([[0, 4080]], dtype=np.uint16), 16),
        ("12_bits_and_white.png", np.array([[0, 4096]], dtype=np.uint16), 8),
        ("14_bits.tif", np.array([[0, 16383]], dtype=np.int32), 4),
    ],
)
def test_few_bits_in_many_are_refused(tree: Path, name: str, values: np.ndarray, factor: int) -> None:
    """Scaled by 65535 they would be black, and scaled by themselves the images of a data set would differ in scale."""
    save(tree / "train/ant" / f"0{name}", Image.fromarray(values))
    message = (
        rf"values reach {values.max()}, .* white is expected at 65535: multiply .*\(by at most {factor} for .* 8 bits"
    )
    with pytest.raises(NolaVisionError, match=message):
        DATASETS["folder"].open(str(tree), "train").image(0)
    for accepted in (np.zeros((1, 2), values.dtype), np.array([[0, 16384]], values.dtype), values * factor):
        save(tree / "train/ant" / f"0{name}", Image.fromarray(accepted))
        assert DATASETS["folder"].open(str(tree), "train").image(0).getextrema()[0] == (0, round(accepted.max() / 257))


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pi-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    for cached in (decoding._formats, decoding.image_suffixes):
        cached.cache_clear()
    yield
    for cached in (decoding._formats, decoding.image_suffixes):
        cached.cache_clear()


def test_what_pillow_decodes_is_read_and_the_rest_is_counted(tree: Path, no_heif: None) -> None:
    from PIL import features

    kinds = {".jfif": "JPEG", ".JPE": "JPEG", ".tga": "TGA", ".QOI": "QOI", ".ppm": "PPM"}
    kinds |= {".avif": "AVIF"} if features.check("avif") else {}
    kinds |= {".jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    for suffix, kind in kinds.items():
        save(tree / f"train/ant/x{suffix}", format=kind)
    for name in ("photo.HEIC", "photo2.heic", "notes.txt", "bare", "Thumbs.db", "desktop.ini", ".DS_Store", "._z.JPG"):
        (tree / "train/ant" / name).write_bytes(b"")
    save(tree / "train/ant/x", format="PNG")
    save(tree / "train/ant/deep/targa", format="TGA")  # it has no signature
    kinds[""] = "PNG"
    source = DATASETS["folder"].open(str(tree), "train")
    read = [index for index in range(len(source)) if Path(source.name(index)).stem == "x"]
    assert {Path(source.name(index)).suffix for index in read} == {*kinds}
    assert all(source.image(index).size == (5, 4) for index in read)
    assert DATASETS["folder"].other_files(str(tree), "train") == {
        ".heic": 2, ".txt": 1, "without suffix": 2, ".db": 1, ".ini": 1,
    }  # fmt: skip
    assert not DATASETS["folder"].other_files(str(tree), "test")
    (tree / "train/naïve bée/b.png").rename(tree / "train/naïve bée/b.heic")
    with pytest.raises(NolaVisionError, match=r"no images in .* \(.* 1 \.heic \(pip install 'nola-vision\[heic\]'\)\)"):
        DATASETS["folder"].open(str(tree), "train")


def test_heic_is_read_with_the_extra(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo of 6 x 4 pixels, blue on the left and red on the right, which EXIF turns to the right."""
    pytest.importorskip("pi_heif")
    content = (ROOT / "tests/golden/turned.heic").read_bytes()
    for name in ("a.HEIC", "bare"):
        (tree / "train/ant" / name).write_bytes(content)
    source = DATASETS["folder"].open(str(tree), "train")
    names = [Path(source.name(index)).name for index in range(len(source))]
    for name in ("a.HEIC", "bare"):
        image = source.image(names.index(name))
        assert (image.mode, image.size) == ("RGB", (4, 6))
        (top, _, blue), (red, _, bottom) = (image.getpixel((1, y)) for y in (0, 5))
        assert blue > 150 > 60 > top and red > 150 > 60 > bottom
    (tree / "train/ant/a.HEIC").write_bytes(content[:-100])
    with pytest.raises(NolaVisionError, match=r"cannot decode the image .*a\.HEIC \(not an image"):
        source.image(names.index("a.HEIC"))


def test_heic_without_the_extra_names_it(tree: Path, no_heif: None) -> None:
    (tree / "train/ant/a.heic").write_bytes((ROOT / "tests/golden/turned.heic").read_bytes())
    with pytest.raises(NolaVisionError, match=r"a\.heic \(HEIC needs pip install 'nola-vision\[heic\]'\): fix"):
        FileSource([tree / "train/ant/a.heic"], [0], ("ant",)).image(0)


def test_no_other_program_decodes_an_image(tree: Path) -> None:
    """Pillow goes by the content, and starts Ghostscript for an EPS file of any name."""
    save(tree / "train/ant/a.png", format="EPS")
    with pytest.raises(NolaVisionError, match="not an image, or of an unsupported format"):
        DATASETS["folder"].open(str(tree), "train").image(0)


def test_an_image_of_too_many_pixels_is_refused_in_one_line(tree: Path) -> None:
    save(tree / "train/ant/a.png", Image.new("1", (20_000, 20_000)))
    with pytest.raises(NolaVisionError, match=r"a\.png \(Image size .* exceeds limit .*\): fix, replace or remove it$"):
        DATASETS["folder"].open(str(tree), "train").image(0)


def test_names_are_bytes(tree: Path) -> None:
    for split in ("train", "test"):
        os.rename(tree / split / "ant", os.fsencode(tree / split) + b"/caf\xe9")
    os.rename(os.fsencode(tree) + b"/train/caf\xe9/a.png", os.fsencode(tree) + b"/train/caf\xe9/stra\xdfe.png")
    source = DATASETS["folder"].open(str(tree), "train")
    assert source.class_names == ("caf\\xe9", "naïve bée")
    names = [source.name(index) for index in range(len(source))]
    assert "train/caf\\xe9/stra\\xdfe.png" in names and "\n".join(names).encode()
    for index, name in enumerate(names):
        assert source.image(index).size == (5, 4) and source.where(index) == f"{tree}/{name}"
    assert b"stra\\xdfe.png" in DATASETS["folder"].own_content(str(tree))


def test_one_class_is_refused(tree: Path) -> None:
    for split in ("train", "test"):
        (tree / split / "naïve bée").rename(tree / f"{split} bée")
    for split in ("train", "test"):
        with pytest.raises(NolaVisionError, match="there is one class only, ant: give images of two or more"):
            open_split(DATASETS["folder"], str(tree), split)


def test_exif_orientation_is_applied(tree: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    save(tree / "train/ant/0.png", image, exif=exif)
    upright = DATASETS["folder"].open(str(tree), "train").image(0)
    assert np.asarray(upright).tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


def test_fashion_mnist_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for name, labels in (("train", [9, 0, 4]), ("t10k", [1, 2, 3])):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 3, 28, 28) + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes(labels))
    source = get_dataset("fashion_mnist").open(str(tmp_path), "train")
    assert source.labels.tolist() == [9, 0, 4]
    assert get_dataset("fashion_mnist").open(str(tmp_path), "test").labels.tolist() == [1, 2, 3]
    assert (np.asarray(source.image(1)) == pixels[1][..., None]).all()
    assert source.class_names[9] == "Ankle boot"
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    with pytest.raises(NolaVisionError, match="cannot read FashionMNIST in "):
        get_dataset("fashion_mnist").open(str(tmp_path), "train")


def test_cifar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # the real files have known checksums
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    for reader, key in ((CIFAR10, "labels"), (CIFAR100, "fine_labels")):
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        for name, _ in [*reader.train_list, *reader.test_list]:
            (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), key: [7, 3]}))
    for name, images in (("cifar10", 10), ("cifar100", 2)):
        source = get_dataset(name).open(str(tmp_path), "train")
        assert source.labels.tolist() == [7, 3] * (images // 2)
        assert (np.asarray(source.image(1)).transpose(2, 0, 1) == pixels[1]).all()
        assert len(get_dataset(name).open(str(tmp_path), "test")) == 2


@pytest.mark.parametrize(
    ("name", "classes", "folder"),
    [
        ("cifar10", 10, "cifar-10-batches-py"),
        ("cifar100", 100, "cifar-100-python"),
        ("fashion_mnist", 10, "FashionMNIST/raw"),
    ],
)
def test_missing_files_are_named_with_both_fixes(tmp_path: Path, name: str, classes: int, folder: str) -> None:
    names = get_dataset(name).class_names(None)  # the names need no files
    assert len(set(names)) == len(names) == classes
    if name != "fashion_mnist":
        assert list(names) == sorted(names)  # as the makers number them
    with pytest.raises(NolaVisionError) as caught:
        get_dataset(name).open(str(tmp_path), "test")
    message = str(caught.value)
    assert f"in {tmp_path} (" in message and f" in {folder}/ under the root" in message
    assert "or pass --data.download true" in message
    assert not list(tmp_path.iterdir())


def test_download_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    asked = []
    monkeypatch.setattr(CIFAR10, "download", lambda self: asked.append(self.root))
    for download in (False, True):
        with pytest.raises(NolaVisionError):
            get_dataset("cifar10").open(str(tmp_path), "train", download)
        assert len(asked) == download


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(NolaVisionError, match=r"no data set 'cifar1': did you mean .*cifar10"):
        get_dataset("cifar1")
    with pytest.raises(
        NolaVisionError, match="use one of caltech101, cifar10, .*sun397, vtab_caltech101, .*vtab_svhn, or hf:NAME"
    ):
        get_dataset("xyz")


def classes_on_disk(name: str, root: Path, source: ImageSource) -> list[str]:
    """Each image's class as its path or its annotation says it, or as the stand-in numbered the images of an array."""
    if not isinstance(source, FileSource):
        return [source.class_names[index % len(source.class_names)] for index in range(len(source))]
    paths = [Path(source.name(index)) for index in range(len(source))]
    match name:
        case "fgvc_aircraft":
            lists = (root / "fgvc-aircraft-2013b/data").glob("images_variant_*.txt")
            variants = dict(line.split(" ", 1) for file in lists for line in file.read_text().splitlines())
            return [variants[path.stem] for path in paths]
        case "oxford_iiit_pet":
            return [path.stem.rpartition("_")[0].replace("_", " ").title() for path in paths]
        case "sun397":
            return ["/".join(path.parts[2:-1]) for path in paths]
        case "vtab_dtd" | "vtab_dmlab":
            folder = root / paths[0].parents[2]
            lists = (folder / f"{path}.txt" for path in ("train800", "val200", "test"))
            labels = dict(line.split() for file in lists for line in file.read_text().splitlines())
            return [source.class_names[int(labels[(root / path).relative_to(folder).as_posix()])] for path in paths]
    return [path.parent.name for path in paths]


@pytest.mark.parametrize("name", stand_ins.SIZES)
def test_every_data_set_is_read_in_its_own_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(stand_ins.make(name, tmp_path, monkeypatch))
    classes, *counts = stand_ins.SIZES[name]
    entry = get_dataset(name)
    names = entry.class_names(root)
    assert len(names) == len(set(names)) == classes
    seen: set[str] = set()
    for split, count in zip(("train", "test"), counts, strict=True):
        source = entry.open(root, split)
        assert source.class_names == names
        each = np.bincount(source.labels, minlength=classes)
        assert (each == count).all() if count is not None else each.min() > 0
        if name != "digits":  # they have a test of their own
            assert [names[label] for label in source.labels] == classes_on_disk(name, tmp_path, source)
        image = source.image(len(source) - 1)
        assert image.mode == "RGB" and min(image.size) >= 8
        assert not {source.name(index) for index in range(len(source))} & seen
        if isinstance(source, FileSource):
            seen |= {source.name(index) for index in range(len(source))}
            content = source.encoded(0)
            assert content == Path(source.where(0)).read_bytes() == (tmp_path / source.name(0)).read_bytes()
            assert np.array_equal(source.image(0, content), source.image(0))


@pytest.mark.parametrize("name", sorted(stand_ins.SIZES.keys() - {"digits"}))
def test_order_is_not_the_file_systems(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("caltech101", "sun397"):  # their lists ship
        listed = read_list(f"{name}_v1")["train"]
        assert listed == sorted(listed, key=lambda p: (class_of(p), p))
        return
    root = str(stand_ins.make(name, tmp_path, monkeypatch))

    def order() -> list[tuple[str, int]]:
        source = get_dataset(name).open(root, "train")
        return [(source.name(i), int(source.labels[i])) for i in range(len(source))]

    plain, listdir, walk, iterdir = order(), os.listdir, os.walk, Path.iterdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in list(walk(*a, **k))[::-1]))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self), reverse=True)))
    assert order() == plain


@pytest.mark.parametrize("name", sorted(stand_ins.SIZES.keys() - {"digits", "folder"}))
def test_what_is_missing_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(NolaVisionError) as caught:
        get_dataset(name).open(str(tmp_path), "train")
    message = str(caught.value)
    assert str(tmp_path) in message and get_dataset(name).expects in message and "\n" not in message
    assert ("--data.download true" in message) is get_dataset(name).downloads
    assert not list(tmp_path.iterdir())


def test_missing_images_of_a_listed_data_set_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = stand_ins.make("caltech101", tmp_path, monkeypatch)
    base = root / "caltech101/101_ObjectCategories"
    for path in read_list("caltech101_v1")["train"][:2]:
        (base / path).unlink()
    with pytest.raises(NolaVisionError, match=r"2 of 3030 train images are missing, for example .*Faces/image_"):
        get_dataset("caltech101").open(str(root), "train")
    assert len(get_dataset("caltech101").open(str(root), "test")) == 5647


def test_the_lists_follow_their_rule() -> None:
    """Caltech-101's from its counts, by the rule as the docs say it; both are of the sizes that they should be."""
    counts = dict(line.split() for line in (ROOT / "scripts/caltech101_counts.txt").read_text().splitlines())
    train, test = read_list("caltech101_v1").values()
    for folder, count in counts.items():
        names = [f"{folder}/image_{i:04d}.jpg" for i in range(1, int(count) + 1)]
        ranked = sorted(names, key=lambda n: hashlib.blake2b(f"caltech101/v1/0/{n}".encode(), digest_size=8).digest())
        assert {p for p in train if class_of(p) == folder} == set(ranked[:30])
        assert {p for p in test if class_of(p) == folder} == set(ranked[30:])
    assert len(counts) == 101 and len(train) + len(test) == 8677
    sun = read_list("sun397_v1")
    for split in sun.values():
        assert set(np.unique([class_of(p) for p in split], return_counts=True)[1]) == {50}
    ranks = [hashlib.blake2b(f"sun397/v1/0/{p}".encode(), digest_size=8).digest() for p in sun["train"][:50]]
    others = [hashlib.blake2b(f"sun397/v1/0/{p}".encode(), digest_size=8).digest() for p in sun["test"][:50]]
    assert max(ranks) < min(others)


def test_imagenet_100_takes_ones_own_list(tmp_path: Path) -> None:
    shipped = get_dataset("imagenet100").class_names(str(tmp_path))
    assert len(shipped) == 100 and shipped == tuple(sorted(shipped)) and {"n02869837", "n02090622"} <= {*shipped}
    (tmp_path / "imagenet100.txt").write_text("# mine\nn2 two\nn1\n")
    assert get_dataset("imagenet100").class_names(str(tmp_path)) == ("n1", "n2")


def test_a_hugging_face_data_set_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "validation"):
        for name in ("bee", "ant"):
            for number in range(3):
                save(tmp_path / "insects" / split / name / f"{number}.png", Image.new("RGB", (5, 4), (number, 2, 3)))
    entry = get_dataset(f"hf:{tmp_path / 'insects'}")
    assert entry.class_names(str(tmp_path / "cache")) == ("ant", "bee")
    train, test = (entry.open(str(tmp_path / "cache"), split) for split in ("train", "test"))
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.image(1).getpixel((0, 0)) == (1, 2, 3) and train.image(2, train.encoded(2)).size == (5, 4)
    with pytest.raises(NolaVisionError, match=r"cannot read hf:.*nowhere"):
        get_dataset(f"hf:{tmp_path / 'nowhere'}").open(str(tmp_path / "cache"), "train")
    with pytest.raises(NolaVisionError, match=r"which of image, label is the label is not clear"):
        get_dataset(f"hf:{tmp_path / 'insects'}#species").open(str(tmp_path / "cache"), "train")


def test_large_files_of_a_local_hugging_face_data_set_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Parquet file is often larger than an image may be; two that differ are two data sets."""
    monkeypatch.setattr(hugging_face, "MOST_BYTES", 10)
    found = set()
    for content in (b"a" * 20, b"b" * 20):
        (tmp_path / "train.parquet").write_bytes(content)
        found.add(get_dataset(f"hf:{tmp_path}").own_content(None))
    assert len(found) == 2


def write_hub(folder: Path, feature: object = None, **labels: list[int | str | None]) -> DatasetEntry:
    """A data set of Hugging Face's in a local folder, of these labels a split; the entry that opens it."""
    library = pytest.importorskip("datasets")
    folder.mkdir()
    features = library.Features(image=library.Image(), kind=feature or library.Value("string"))
    for split, values in labels.items():
        columns = {"image": [Image.new("RGB", (5, 4))] * len(values), "kind": values}
        library.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in labels)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return get_dataset(f"hf:{folder}#kind")


def test_labels_of_hugging_face_may_be_words(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    entry = write_hub(tmp_path / "words", train=["wasp", "ant", "wasp", "bee"], test=["bee", "bee", "ant"])
    assert entry.class_names(cache) == ("ant", "bee", "wasp")
    for split, labels in (("train", [2, 0, 2, 1]), ("test", [1, 1, 0])):
        source = entry.open(cache, split)
        assert source.class_names == ("ant", "bee", "wasp") and source.labels.tolist() == labels
    entry = write_hub(tmp_path / "strange", train=["ant", "bee"], test=["bee", "moth"])
    with pytest.raises(NolaVisionError, match="the label moth of its test split is missing from its training split"):
        entry.open(cache, "test")


def test_images_of_hugging_face_without_a_label_are_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    numbered = library.ClassLabel(names=["wasp", "ant"])
    for name, entry in (
        ("words", write_hub(tmp_path / "words", train=["ant", "bee"], test=["ant", None])),
        ("numbers", write_hub(tmp_path / "numbers", numbered, train=[1, 0, 1], test=[0, -1])),
        ("gaps", write_hub(tmp_path / "gaps", numbered, train=[1, 0, 1], test=[None, 1])),
    ):
        with pytest.raises(NolaVisionError, match=rf"hf:.*{name} \(its test split has images without a label\)"):
            entry.open(str(tmp_path / "cache"), "test")
    train = entry.open(str(tmp_path / "cache"), "train")
    assert train.class_names == ("wasp", "ant") and train.labels.tolist() == [1, 0, 1]


@pytest.fixture(scope="module")
def hub_columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of Hugging Face's with columns of many kinds; every second image of `gaps` is null."""
    library = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    images = [Image.new("RGB", (5, 4), (number, 0, 0)) for number in range(4)]
    png = [io.BytesIO() for _ in images]
    for image, file in zip(images, png, strict=True):
        image.save(file, "PNG")
    picture, whole, kind = library.Image(), library.Value("int64"), library.ClassLabel(names=["wasp", "ant"])
    columns: dict[str, tuple[object, list[object]]] = {
        "mask": (picture, [Image.new("RGB", (5, 4), (99, 0, 0))] * 4),
        "photo": (picture, images),
        "gaps": (picture, [images[0], None] * 2),
        "content": (library.Value("binary"), [file.getvalue() for file in png]),
        "kind": (kind, [0, 1, 0, 1]),
        "lists": (library.List(whole), [[0], [1], [0, 1], []]),
        "weights": (library.Value("float64"), [0.5, 1.0, 0.5, float("nan")]),
    }
    for name, chosen in {"all": [*columns], "bytes": ["content", "kind"], "named": ["mask", "photo", "kind"]}.items():
        (folder / name).mkdir()
        features = library.Features({column: columns[column][0] for column in chosen})
        data = library.Dataset.from_dict({column: columns[column][1] for column in chosen}, features=features)
        if name == "named":
            data = data.rename_column("photo", "image")
        for split in ("train", "test"):
            data.to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("named", None),  # of several, the one called image
        ("bytes", None),
        ("all##photo", None),
        ("all#kind#photo", None),
        ("all#kind#content", None),
        (
            "all",
            r"which column has the images is not clear, it has mask, photo, gaps\): name it, as in hf:.*#label#gaps",
        ),
        ("all##kind", "kind is not a column of images"),
        ("all##nothing", "nothing is not a column of images"),
        (
            "all##gaps",
            r"2 rows of its test split have no image in column gaps, the first is 1\): remove these rows",
        ),
        ("all#lists#photo", "its column lists has values of type List, but a label is one class"),
        ("all#weights#photo", "its column weights has values of type float64, but a label is one class"),
    ],
)
def test_the_columns_of_hugging_face(name: str, expected: str | None, hub_columns: Path, tmp_path: Path) -> None:
    entry = get_dataset(f"hf:{hub_columns}/{name}")
    if expected is None:
        source = entry.open(str(tmp_path), "test")
        assert source.class_names == ("wasp", "ant") and source.labels.tolist() == [0, 1, 0, 1]
        assert [source.image(index).getpixel((0, 0))[0] for index in range(4)] == [0, 1, 2, 3]
        assert len(entry.own_content(None).splitlines()) == 2  # the files of a local path are in the hash
    else:
        with pytest.raises(NolaVisionError, match=rf"cannot read hf:.*{expected}"):
            entry.open(str(tmp_path), "test")


def test_the_test_split_of_hugging_face_is_the_first_of_four_names(tmp_path: Path) -> None:
    names = ["test", "validation", "valid", "val"]
    for first in range(4):
        splits = {name: ["ant"] * (1 + names.index(name)) for name in reversed(names[first:])}
        entry = write_hub(tmp_path / names[first], train=["ant"], **splits)
        assert len(entry.open(str(tmp_path / "cache"), "test")) == 1 + first


def test_hugging_face_is_asked_over_the_network_only_when_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    library = pytest.importorskip("datasets")
    seen = []

    def load(*args: object, **options: object) -> None:
        seen.append((constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE))
        raise ConnectionError("no network here")

    monkeypatch.setattr(library, "load_dataset", load)
    for name in (constants, library.config):
        monkeypatch.setattr(name, "HF_HUB_OFFLINE", False)
    for download in (False, True):
        with pytest.raises(NolaVisionError, match=r"no network here.*--data\.download true"):
            get_dataset("hf:someone/things").open(str(tmp_path), "train", download)
    assert seen == [(True, True), (False, False)]
    assert not constants.HF_HUB_OFFLINE


def test_names_in_files_are_downloaded_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class names are needed first, also if the files are not downloaded yet."""
    from torchvision.datasets import OxfordIIITPet

    make = stand_ins.make
    monkeypatch.setattr(OxfordIIITPet, "_download", lambda self: make("oxford_iiit_pet", tmp_path, monkeypatch))
    with pytest.raises(NolaVisionError, match="cannot read OxfordIIITPet"):
        get_dataset("oxford_iiit_pet").class_names(str(tmp_path))
    assert len(get_dataset("oxford_iiit_pet").class_names(str(tmp_path), download=True)) == 37


def test_the_root_may_be_cubs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = stand_ins.make("cub200", tmp_path, monkeypatch)
    source = get_dataset("cub200").open(str(root / "CUB_200_2011"), "train")
    assert len(source) == 2400 and source.name(0).startswith("images/001.Some_Bird_0/") and source.image(0)


def test_lists_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "imagenet100.txt"
    for content, expected in (
        (b"n1\nn2\nn1\n", "has n1 twice"),
        (b"# nothing\n", "names no class"),
        ("# à\nn1\n".encode("latin-1"), r"imagenet100\.txt cannot be read \(.utf-8. codec"),
    ):
        path.write_bytes(content)
        with pytest.raises(NolaVisionError, match=expected):
            get_dataset("imagenet100").class_names(str(tmp_path))
    root = stand_ins.make("cub200", tmp_path, monkeypatch)
    for name, line in (("image_class_labels.txt", "7 201\n"), ("train_test_split.txt", "")):
        table = root / "CUB_200_2011" / name
        whole = table.read_text().splitlines(keepends=True)
        table.write_text("".join(whole[:6] + [line] + whole[7:]))
        with pytest.raises(NolaVisionError, match="do not match, the class or split of image 7 is missing"):
            get_dataset("cub200").open(str(root), "train")
        table.write_text("".join(whole))


def test_thousands_of_classes_of_one_image(tmp_path: Path) -> None:
    image = save(tmp_path / "one.png")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(2_000):
            folder = f"{tmp_path}/{split}/{number:05d}"
            os.mkdir(folder), os.link(image, f"{folder}/i.png")
    source = get_dataset("folder").open(str(tmp_path), "train")
    assert len(source) == len(source.class_names) == 2_000 and source.labels[-1] == 1_999
    assert len(draw(source.labels, 1, 0, source.class_names)) == 2_000
    with pytest.raises(NolaVisionError, match="'00000' has 1, .* and 1995 more classes have too few: use 1 shot, or"):
        draw(source.labels, 5, 0, source.class_names)
