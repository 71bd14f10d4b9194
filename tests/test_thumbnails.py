"""Thumbnails of misclassified images: which ones, what their files reveal, and what a stranger's file can do."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, ImageCms

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.data import sources
from nola_vision.data.datasets.hugging_face import HubSource
from nola_vision.data.datasets.registry import DATASETS
from nola_vision.data.sources import ArraySource, FileSource
from nola_vision.evaluation.predictions import Predictions
from nola_vision.images.decoding import decode_image
from nola_vision.runs.thumbnails import (
    MOST_THUMBNAILS,
    SIDE,
    THUMBNAILS_FILE,
    Thumbnail,
    load_thumbnails,
    most_confident_mistakes,
    write_thumbnails,
)


def all_wrong(count: int, first: int = 0) -> Predictions:
    """Predictions of images from `first` on, all wrong; the last one is the most confident."""
    logits = np.stack([np.linspace(0.1, 3, count), np.zeros(count)], axis=1)
    return Predictions.of(np.arange(first, first + count), np.ones(count), logits)


def jpeg_of(size: tuple[int, int], file_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize(size).save(buffer, file_format, **options)
    return buffer.getvalue()


def test_the_most_confident_mistakes_come_first() -> None:
    generator = np.random.default_rng(0)
    index = np.sort(generator.choice(1000, 200, replace=False))
    label, predicted = generator.integers(0, 3, (2, 200))
    probability = generator.integers(4, 11, 200).astype(np.float32) / 10  # many are equal
    found = Predictions(index, label, predicted, probability)
    expected = sorted(
        (position for position in range(200) if label[position] != predicted[position]),
        key=lambda position: (-probability[position], index[position]),
    )
    assert len(expected) > 100
    assert most_confident_mistakes(found).tolist() == expected[:MOST_THUMBNAILS]
    assert most_confident_mistakes(found, 200).tolist() == expected
    assert most_confident_mistakes(Predictions(index, label, label, probability)).tolist() == []


def test_a_thumbnail_is_small_upright_and_has_no_metadata(tmp_path: Path) -> None:
    phone = Image.new("RGB", (400, 300), "blue")
    phone.paste("red", (0, 0, 200, 300))  # the left half, which is at the top when upright
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a private description"  # turned by 90 degrees
    exif.get_ifd(0x8825)[1] = "N"
    phone.save(tmp_path / "phone.jpg", exif=exif, comment=b"a private comment", icc_profile=b"a private profile")
    Image.new("RGBA", (20, 10), (0, 200, 0, 255)).save(tmp_path / "tiny.png")
    Image.effect_noise((4000, 30), 200).convert("RGB").save(tmp_path / "a\n\u202eb.png")
    paths = [tmp_path / name for name in ("phone.jpg", "tiny.png", "a\n\u202eb.png")]
    write_thumbnails(tmp_path, all_wrong(3), FileSource(paths, [1, 1, 1], ("a", "b"), tmp_path))
    found = load_thumbnails(tmp_path)
    assert {index: (one.name, one.width, one.height) for index, one in found.items()} == {
        0: ("phone.jpg", 96, 128),
        1: ("tiny.png", 20, 10),
        2: ("a\\n\\u202eb.png", 128, 1),
    }
    assert b"private" in paths[0].read_bytes() and b"private" not in (tmp_path / THUMBNAILS_FILE).read_bytes()
    images = {index: Image.open(io.BytesIO(one.jpeg)) for index, one in found.items()}
    assert all(image.format == "JPEG" and not image.getexif() for image in images.values())
    top, bottom = (np.array(images[0].getpixel((48, y))) for y in (20, 108))
    assert abs(top - (255, 0, 0)).max() < 10 and abs(bottom - (0, 0, 255)).max() < 10
    assert abs(np.array(images[1].getpixel((10, 5))) - (0, 200, 0)).max() < 10


def test_colours_of_a_profile_become_those_of_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = srgb.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")  # red and green exchanged
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "a.png", icc_profile=wide)
    write_thumbnails(tmp_path, all_wrong(1), FileSource([tmp_path / "a.png"], [1], ("a", "b")))
    shown = np.array(Image.open(io.BytesIO(load_thumbnails(tmp_path)[0].jpeg)).getpixel((8, 8)))
    assert shown[1] > 150 > 100 > shown[0]


def test_a_large_jpeg_is_decoded_at_a_part_of_its_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg_of((2000, 1100))
    assert decode_image(content).size == (2000, 1100) and decode_image(content, SIDE).size == (250, 138)
    exact = decode_image(content).resize((250, 138), Image.Resampling.BOX)
    assert np.abs(np.asarray(exact, dtype=int) - np.asarray(decode_image(content, SIDE), dtype=int)).mean() < 2
    assert decode_image(jpeg_of((200, 100)), SIDE).size == (200, 100)  # never smaller than asked for
    (tmp_path / "a.jpg").write_bytes(content)
    monkeypatch.setattr(sources, "to_rgb", lambda image: sizes.append(image.size) or image)
    sizes: list[tuple[int, int]] = []
    write_thumbnails(tmp_path, all_wrong(1), FileSource([tmp_path / "a.jpg"], [1], ("a", "b")))
    assert sizes == [(250, 138)]


def test_a_name_has_no_folder_around_the_data_set(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for place in (photos / "cat", elsewhere):
        place.mkdir(parents=True)
        (place / "1.jpg").write_bytes(jpeg_of((9, 8)))
    (photos / "list.csv").write_text(f"path,label\ncat/1.jpg,cat\n{elsewhere / '1.jpg'},dog\n")
    source = DATASETS["list"].open(str(photos / "list.csv"), "train")
    write_thumbnails(tmp_path, all_wrong(2), source)
    assert [one.name for one in load_thumbnails(tmp_path).values()] == ["cat/1.jpg", "1.jpg"]
    assert str(tmp_path).encode() not in (tmp_path / THUMBNAILS_FILE).read_bytes()
    column = [{"bytes": jpeg_of((9, 8)), "path": None}]
    shown = {"hf:someone/pets[test]": "hf:someone/pets[test][0]", "hf:/home/me/pets[test]": "pets[test][0]"}
    for name, expected in shown.items():
        write_thumbnails(tmp_path, all_wrong(1), HubSource(name, column, [1], ("a", "b")))
        assert load_thumbnails(tmp_path)[0].name == expected


def test_at_most_so_many_are_stored_in_few_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 200, 200, 3), dtype=np.uint8)  # noise: hard to compress
    source = ArraySource("noise", pixels, np.ones(40), ("a", "b"))
    write_thumbnails(tmp_path, all_wrong(30, first=10), source)
    found = load_thumbnails(tmp_path)
    assert sorted(found) == list(range(16, 40)) and found[16].name == "noise[16]"
    assert max(len(one.jpeg) for one in found.values()) < 16_000
    with process_cache.keeping():
        write_thumbnails(tmp_path, all_wrong(30, first=10), source)
        source._decode = None  # type: ignore[method-assign, assignment]
        write_thumbnails(tmp_path, all_wrong(28, first=12), source)  # of another run in this process
    assert load_thumbnails(tmp_path) == found
    nothing = Predictions.of([0, 1], [0, 0], [[1, 0], [1, 0]])
    write_thumbnails(tmp_path, nothing, source)
    assert load_thumbnails(tmp_path) == {} and (tmp_path / THUMBNAILS_FILE).is_file()
    assert not caplog.messages


def test_what_goes_wrong_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(4)]
    for path in paths:
        path.write_bytes(jpeg_of((300, 200)))
    source = FileSource(paths, [1] * 4, ("a", "b"), tmp_path)
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:900])
    write_thumbnails(tmp_path, all_wrong(4), source)
    assert sorted(load_thumbnails(tmp_path)) == [0, 3]
    (message,) = caplog.messages
    assert message.startswith("2 misclassified images are not stored") and f"{paths[2]}" in message
    caplog.clear()
    (tmp_path / THUMBNAILS_FILE).unlink()
    (tmp_path / THUMBNAILS_FILE).mkdir()
    write_thumbnails(tmp_path, all_wrong(1), source)
    (message,) = caplog.messages
    assert f"{tmp_path / THUMBNAILS_FILE} cannot be written (not a regular file)" in message


def bomb(side: int) -> bytes:
    """A tiny JPEG file whose header promises so many pixels a side."""
    content = bytearray(jpeg_of((8, 8)))
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = side.to_bytes(2, "big") * 2
    return bytes(content)


GOOD = np.frombuffer(jpeg_of((8, 8)), dtype=np.uint8)
DAMAGED = {
    "not safetensors": b"damaged",
    "empty": b"",
    "too many": {f"{index} a": GOOD for index in range(MOST_THUMBNAILS + 1)},
    "no index": {"a.jpg": GOOD},
    "a negative index": {"-1 a.jpg": GOOD},
    "an endless index": {f"{'9' * 5000} a.jpg": GOOD},
    "no name": {"1 ": GOOD},
    "a newline": {"1 a\nb": GOOD},
    "an escape": {"1 \x1b[2Ja": GOOD},
    "another type": {"1 a": GOOD.astype(np.float32)},
    "two dimensions": {"1 a": GOOD[None]},
    "no content": {"1 a": GOOD[:0]},
    "half a header": {"1 a": GOOD[: len(GOOD) // 2]},
    "half an image": {"1 a": np.frombuffer(jpeg_of((200, 100))[:-900], dtype=np.uint8)},
    "PNG": {"1 a": np.frombuffer(jpeg_of((8, 8), "PNG"), dtype=np.uint8)},
    "SVG": {"1 a": np.frombuffer(b"<svg xmlns='http://www.w3.org/2000/svg'/>", dtype=np.uint8)},
    "many bytes": {"1 a": np.frombuffer(jpeg_of((8, 8)) + bytes(2**16), dtype=np.uint8)},
    "many scans": {"1 a": np.frombuffer(jpeg_of((64, 64), progressive=True), dtype=np.uint8)},
    "too large": {"1 a": np.frombuffer(jpeg_of((513, 8)), dtype=np.uint8)},
    "a bomb": {"1 a": np.frombuffer(bomb(60_000), dtype=np.uint8)},
    "a bomb that Pillow warns of": {"1 a": np.frombuffer(bomb(10_000), dtype=np.uint8)},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line(case: str, tmp_path: Path) -> None:
    content = DAMAGED[case]
    file = tmp_path / THUMBNAILS_FILE
    file.write_bytes(content if isinstance(content, bytes) else safetensors.numpy.save(content))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(NolaVisionError) as raised:
        warnings.simplefilter("always")
        load_thumbnails(tmp_path)
    message = str(raised.value)
    assert not warned
    assert message.startswith(f"{file} is damaged (") and message.isprintable() and len(message) < len(str(file)) + 130


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    assert load_thumbnails(tmp_path) == {}
    file = tmp_path / THUMBNAILS_FILE
    os.mkfifo(file)
    with pytest.raises(NolaVisionError, match=r"cannot be read \(it is a FIFO"):
        load_thumbnails(tmp_path)
    file.unlink()
    with open(file, "wb") as huge:
        huge.truncate(2**40)
    with pytest.raises(NolaVisionError, match=r"cannot be read \(it is larger than 2 MiB"):
        load_thumbnails(tmp_path)
    file.write_bytes(safetensors.numpy.save({"0 a b": GOOD}))
    assert load_thumbnails(tmp_path) == {0: Thumbnail(0, "a b", GOOD.tobytes(), 8, 8)}
