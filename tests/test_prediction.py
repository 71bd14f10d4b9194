"""One image in every form gives one answer: PIL, NumPy, tensors and files; and the command's formats."""

import copy
import csv
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nola_vision import LoRA, adapt
from nola_vision.cli.main import main
from nola_vision.cli.predict import column_names
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.loading import set_temperature

NAMES = ["=cmd()", "crane", "crane", "dog\x1b[31m"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptedModel, Path]:
    model = adapt("vit_mini_patch4_32.contours", LoRA(targets=["qv"], rank=2), NAMES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    model.save(path)
    set_temperature(path, 1.5, "folds")
    model.temperature, model.calibrated_on = 1.5, "folds"
    return model.eval(), path


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8)


def test_every_form_of_an_image_gives_the_same(adapter: tuple[AdaptedModel, Path], tmp_path: Path) -> None:
    model, _ = adapter
    array = pixels()
    Image.fromarray(array).save(tmp_path / "a.png")
    turned = Image.fromarray(np.rot90(array).copy())
    exif = turned.getexif()
    exif[274] = 6  # turn by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms: list[Any] = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.open(tmp_path / "a.png"),
        tmp_path / "turned.png",
        Image.open(tmp_path / "turned.png"),
        array,
        array[:, :, ::-1][:, :, ::-1],
        np.dstack([array, np.full(array.shape[:2], 7, np.uint8)]),  # alpha is dropped
        tensor,
        tensor.float() / 255,
        (tensor.double() / 255).requires_grad_(),
    ]
    batch = model.transform(array)[None]
    logits = (model(batch)[0] / 1.5).softmax(0)
    expected = model.predict(array, top_k=4)
    assert [p for _, p in expected] == pytest.approx(sorted(logits.tolist(), reverse=True), rel=1e-4)
    assert expected[0].label == NAMES[int(logits.argmax())]
    for form in forms:
        assert model.predict(form, top_k=4) == expected and torch.equal(model.transform(form), batch[0])
    found = model.predict(iter(forms), top_k=2, batch_size=3)
    assert len(found) == len(forms)
    for one in found:
        assert one == [(label, pytest.approx(p, rel=1e-4)) for label, p in expected[:2]]
    assert len(model.predict(array)) == 3 and len(model.predict(array, top_k=99)) == 4
    assert model.predict(tensor[None])[0] == model.predict([tensor])[0] == expected[:3]
    assert model.predict([]) == [] and model.embed([]).shape == (0, 160)
    features = model.embed([array, tmp_path / "a.png"], batch_size=1)
    assert features.shape == (2, 160) and torch.equal(features[0], features[1]) and not features.requires_grad
    assert torch.equal(features[:1], model.features(batch).detach())
    grey = array[:, :, 0]
    same = [grey, grey[:, :, None], grey.astype(np.uint16) * 257, torch.from_numpy(grey.copy()), Image.fromarray(grey)]
    assert all(model.predict(one) == model.predict(grey) for one in same)


def test_what_is_not_an_image_is_refused_with_a_hint(adapter: tuple[AdaptedModel, Path], tmp_path: Path) -> None:
    model, path = adapter
    array = pixels()
    wrong: list[tuple[Any, str]] = [
        (tmp_path, "is a folder: give its files"),
        (tmp_path / "no.png", r"no.png \(No such file"),
        (path, "not an image"),
        ([array, tmp_path / "no.png"], "no.png"),
        ([array, array.astype(np.float32)], r"number 1 \(an array of float32: give uint8 from 0 to 255"),
        (array.transpose(2, 0, 1), r"shape \[3, 48, 40\]: .* channels first are for tensors"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (torch.from_numpy(array), r"shape \[48, 40, 3\]"),
        (torch.from_numpy(array).permute(2, 0, 1).float(), "not between 0 and 1: divide them by 255"),
        (model.transform(array), r"call model\(batch\)"),
        (torch.full((3, 8, 8), float("nan")), "not between 0 and 1"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "tensor of torch.int32: give uint8"),
        (b"bytes", "is not an image: give paths"),
        (None, "None is not an image"),
        (np.array(3), "not an image"),
        ([3], "number 0 .*3 is not a path"),
        ({"a": array}, "is not an image"),
    ]
    for images, reason in wrong:
        with pytest.raises(NolaVisionError, match=reason):
            model.predict(images)
    counts: list[Any] = [0, 1.5, "3", True, None, 10**30, 10**5000, float("nan")]
    for options in [{name: count} for name in ("top_k", "batch_size") for count in counts]:
        with pytest.raises(NolaVisionError, match="must be a whole number from 1 to 2147483647"):
            model.predict(array, **options)
    assert len(model.predict(array, top_k=np.int64(2), batch_size=2**31 - 1)) == 2
    changed = copy.deepcopy(model)
    for temperature in (-1, 0, float("nan"), "x", None, True, 1e-5, 10**400):
        changed.temperature = temperature  # type: ignore[assignment]
        with pytest.raises(NolaVisionError, match="the temperature is .* from 0.0001 to 10,000"):
            changed.predict(array)
    changed.temperature = np.float32(1.5)  # type: ignore[assignment]
    assert changed.predict(array) == model.predict(array)


def test_predicting_leaves_modes_as_they_are_also_with_threads(adapter: tuple[AdaptedModel, Path]) -> None:
    model = copy.deepcopy(adapter[0])
    arrays = [pixels(seed) for seed in range(6)]
    expected = model.predict(arrays, batch_size=1)
    noise = torch.nn.Dropout(0.9)
    model.backbone.norm = torch.nn.Sequential(model.backbone.norm, noise)
    model.train()
    model.backbone.blocks[0].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    wrong: list[Any] = []

    def ask(first: int) -> None:
        for place in [*range(first, 6), *range(first)] * 3:
            found = model.predict(arrays[place])
            if found != expected[place]:
                wrong.append((place, found))

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [module.training for module in model.modules()] == modes and noise.training
    model(model.transform(arrays[0])[None]).sum().backward()  # nothing that was computed is left without a gradient
    with pytest.raises(NolaVisionError):
        model.predict([arrays[0], "no.png"])
    assert [module.training for module in model.modules()] == modes


def test_the_commands_formats(
    adapter: tuple[AdaptedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, path = adapter
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "b é.png", "bad.png"]
    for number, name in enumerate(names):
        Image.fromarray(pixels(number)).save(name)
    Path("bad.png").write_bytes(b"no image")
    expected = model.predict(names[:2], top_k=4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(names[:2]).encode() + b"\r\n\n")))

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["predict", "--adapter", str(path), *words])
        return status, *capsys.readouterr()

    status, printed, _ = run("--top-k=2", "-")
    assert status == 0
    first, second = expected[0][:2]
    label = first.label.replace("\x1b", "\\x1b")
    assert printed.splitlines()[0].startswith(f"=1+1.png  {label}  {first.probability:.4f}  ")

    # on standard input what is not there is left out like an image that cannot be read
    Path("empty").mkdir()
    listed = ["b é.png", "gone.png", "x" * 5000, "nul\0", "empty", "=1+1.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + "\n".join(listed).encode())))
    status, printed, error = run("--format=csv", "-")
    assert [row["image"] for row in csv.DictReader(io.StringIO(printed))] == ["b é.png", "'=1+1.png"]
    assert status == 2 and "4 of 6 images have no prediction: cannot decode the image gone.png (No such file" in error
    status, printed, error = run("b é.png", "gone.png")  # on the command line it is refused at once
    assert status == 2 and not printed and "gone.png does not exist" in error

    status, printed, error = run("--format=csv", "--top-k=3", "--scores", *names)
    assert status == 2 and "1 of 3 images have no prediction: cannot decode the image bad.png" in error
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert rows[0]["image"] == "'=1+1.png" and [row["image"] for row in rows[1:]] == ["b é.png"]
    shown = ["'=cmd()", "crane", "crane", "dog\\x1b[31m"]
    for row, best in zip(rows, expected, strict=True):
        for rank, end in ((0, ""), (1, "_2"), (2, "_3")):
            assert row[f"class{end}"] == shown[NAMES.index(best[rank].label)]
            assert row[f"probability{end}"] == f"{best[rank].probability:.4f}"
        scores = [float(row[f"score of {name}"]) for name in ("=cmd()", "crane", "crane (2)", "dog\\x1b[31m")]
        assert sorted(scores, reverse=True) == pytest.approx([p for _, p in best], rel=1e-4)

    limit = (expected[0][0].probability + expected[1][0].probability) / 2
    status, printed, _ = run("--format=jsonl", f"--min-probability={limit}", "--top-k=2", "--scores", *names[:2])
    assert status == 0 and printed.isascii()
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["image"] for line in lines] == names[:2]
    for line, best in zip(lines, expected, strict=True):
        assert line["class"] == ("unknown" if best[0].probability < limit else best[0].label)
        assert line["probability"] == pytest.approx(best[0].probability, rel=1e-4)
        assert [one["class"] for one in line["top"]] == [one.label for one in best[:2]]
        assert list(line["scores"]) == column_names(NAMES) and sum(line["scores"].values()) == pytest.approx(1)
    assert {line["class"] == "unknown" for line in lines} == {True, False}

    assert run("--out=p.jsonl", *names[:2])[0] == 0 and json.loads(Path("p.jsonl").read_text().splitlines()[1])
    assert run("--out=p.csv", *names)[0] == 2 and len(Path("p.csv").read_text().splitlines()) == 3
    set_temperature(path, 1, None)
    try:
        assert "not calibrated" in run("--min-probability=0.5", names[0])[2]
    finally:
        set_temperature(path, 1.5, "folds")
    for words, reason in [
        (["--scores", names[0]], "--scores needs --format csv"),
        (["--top-k=0", names[0]], "top_k is 0"),
        (["--batch-size=99999999999999999999", names[0]], "batch_size is 99999999999999999999: it must be"),
        ([f"--batch-size={'9' * 5000}", names[0]], "9' is not a whole number"),
        (["x" * 5000], "x does not exist: name image files"),
        (["--min-probability=1.5", names[0]], "'1.5' is not a number from 0 to 1"),
        (["--min-probability=nan", names[0]], "is not a number from 0 to 1"),
        (["--device=gpu", names[0]], "--device is 'gpu': did you mean cuda?"),
        (["-"], "no paths on standard input"),
    ]:
        status, printed, error = run(*words)
        assert status == 2 and reason in error and not printed and len(error) < 600


def test_lines_are_printed_as_batches_are_done(
    adapter: tuple[AdaptedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pixels()).save("a.png")
    after: list[int] = []
    from nola_vision.models import prediction

    computed = prediction.probabilities
    lines = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal lines
        lines += capsys.readouterr().out.count("\n")
        after.append(lines)
        return computed(*arguments)

    monkeypatch.setattr(prediction, "probabilities", counted)
    assert main(["predict", "--adapter", str(adapter[1]), "--batch-size=2", *["a.png"] * 5]) == 0
    assert after == [0, 2, 4]
    after.clear()
    assert main(["predict", "--adapter", str(adapter[1]), "--batch-size=2", "--out=/nowhere/x", "a.png"]) == 2
    assert not after


def test_columns_of_classes_with_one_name() -> None:
    assert column_names(["a", "b", "a", "a", "a (2)"]) == ["a", "b", "a (2)", "a (3)", "a (2) (2)"]
