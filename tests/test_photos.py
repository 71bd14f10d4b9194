"""From a place with images to a config, and to the YAML file that is the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nola_vision.cli.main import main
from nola_vision.cli.options import take_photos
from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import config_files, photos, run_id
from nola_vision.runs.cells import read_part
from nola_vision.runs.parsing import parse


def place(folder: Path, images: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (8, 8), (40 * label, number, 0)).save(folder / name / f"{number}.png")
    return folder


def written(made: config_files.Config, path: Path) -> config_files.Config:
    path.write_text(photos.describe(made), encoding="utf-8")
    return config_files.load_config(str(path))


def run_hash(config: config_files.Config, *options: str) -> str:
    return run_id.run_hash(parse(run_id.resolve(config), options), "final")


def test_the_defaults(tmp_path: Path) -> None:
    folder = place(tmp_path / "my photos")
    made = photos.config(str(folder))
    assert list(made) == ["protocol", "method", "methods", "model", "data", "trainer"]
    assert list(made["methods"]) == ["1nn", "nearest-mean", "logistic", "linear", "nola", "lora-r4", "full-ft"]
    assert made["model"]["backbone"] == {"tag": "vit_small_patch14_dinov2.lvd142m", "img_size": 224}
    data = {"dataset": "folder", "root": str(folder), "shots": "all", "batch_size": 16}
    assert made["data"] == {**data, "augmentation": "light", "flip": True}
    assert made["methods"]["nola"]["init_args"]["max_parameters"] == 6144
    for name in ("linear", "nola", "lora-r4", "full-ft"):
        assert made["methods"][name]["init_args"]["lr"] in made["methods"][name]["search"]["lr"]
    default = read_part("protocols", "default")
    for key in ("label_smoothing", "min_lr"):
        assert made["model"][key] == default["model"][key]
    full = parse(run_id.resolve(made), ["--data.batch_size", "8", "--model.method.rank=8"])
    assert (full["data"]["batch_size"], full["model"]["method"]["init_args"]["rank"]) == (8, 8)
    assert run_id.cell_name(full) == "vit_small_patch14_dinov2.lvd142m-folder.my_photos-allshot-photos"


def test_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path / "photos")
    (tmp_path / "w.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"method": "logistic", "shots": 2, "epochs": 7, "device": "cuda:1"}
    made = photos.config("photos", backbone="quickstart", weights="w.safetensors", **given)
    assert made["method"] == "logistic" and made["data"]["shots"] == 2
    assert made["model"]["backbone"] == {"tag": photos.QUICKSTART, "file": str(tmp_path / "w.safetensors")}
    trainer = {"accelerator": "cuda", "devices": [1], "max_epochs": 7}
    assert {key: made["trainer"][key] for key in trainer} == trainer
    assert made["model"]["warmup_epochs"] == 1


@pytest.mark.parametrize(
    ("tag", "side", "targets"),
    [
        ("test_vit.r160_in1k", None, ["qkv", "mlp"]),  # its own 160 is less
        ("vit_base_patch16_siglip_384.v2_webli", 224, ["qkv", "mlp"]),
        ("convnext_atto.d2_in1k", None, ["mlp"]),
        ("resnet10t.c3_in1k", None, ["conv"]),
    ],
)
def test_another_backbone(tag: str, side: int | None, targets: list[str], tmp_path: Path) -> None:
    made = photos.config(str(place(tmp_path / "photos")), backbone=tag)
    assert made["model"]["backbone"].get("img_size") == side
    assert made["methods"]["nola"]["init_args"]["targets"] == targets
    assert made["methods"]["lora-r4"]["init_args"]["targets"] == targets[:1]


def test_a_side_that_a_model_does_not_take_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nola_vision.models.backbones.image_size.accepts", lambda source, side: side == 384)
    made = photos.config(str(place(tmp_path / "photos")), backbone="swin_base_patch4_window12_384.ms_in22k_ft_in1k")
    assert "img_size" not in made["model"]["backbone"]


@pytest.mark.parametrize(("images", "epochs"), [(1, 50), (10, 50), (80, 20), (150, 10), (5000, 10)])
def test_passes_make_a_hundred_steps(images: int, epochs: int) -> None:
    assert photos._epochs(images) == epochs


@pytest.mark.parametrize("form", ["csv", "text"])
def test_a_list_is_a_place(form: str, tmp_path: Path) -> None:
    place(tmp_path / "photos")
    lines = [f"photos/{name}/{n}.png{',' if form == 'csv' else ' '}{name}" for name in ("cat", "dog") for n in range(3)]
    path = tmp_path / ("all.csv" if form == "csv" else "all.txt")
    path.write_text("\n".join(["path,label", *lines] if form == "csv" else lines) + "\n")
    made = photos.config(str(path))
    assert (made["data"]["dataset"], made["data"]["root"]) == ("list", str(path))
    assert len(photos.open_images(str(path))) == 6
    assert written(made, tmp_path / "made.yaml") == made


@pytest.mark.parametrize(
    "name",
    [
        "photos",
        'it\'s: a [test], {#1} & "two" ',
        "🐱 猫 \u200d\u2028x",
        "tab\tline\n  two\n",
        "- yes",
        "a: ~ # b",
        "%\\x",
    ],
)
def test_the_yaml_is_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(tmp_path / name, images=2)
    monkeypatch.chdir(tmp_path)
    assert main(["init", name if not name.startswith("-") else f"./{name}", "--out", "made.yaml"]) == 0
    made, read = photos.config(str(folder)), config_files.load_config("made.yaml")
    assert read == made and read["data"]["root"] == str(folder)
    assert run_hash(read) == run_hash(made)
    assert all(len(line) <= 120 or "root:" in line for line in (tmp_path / "made.yaml").read_text().splitlines())
    assert main(["init", str(folder), "--out", "made.yaml"]) == 2  # what a person changed there is kept


def test_a_path_that_yaml_cannot_store_is_trained_on_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    made = photos.config(str(folder))
    assert len(run_hash(made)) == 10
    assert main(["init", str(folder), "--out", str(tmp_path / "a.yaml")]) == 2
    assert "caf\\xe9 has bytes that are not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()


def test_mistakes(tmp_path: Path) -> None:
    folder = str(place(tmp_path / "photos"))
    place(tmp_path / "one", classes=("cat",))
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "a.png")

    def refused(match: str, where: str = folder, **options: Any) -> None:
        with pytest.raises(NolaVisionError, match=match):
            photos.config(where, **options)

    refused("nowhere' does not exist: give a folder", str(tmp_path / "nowhere"))
    refused("one class only, cat", str(tmp_path / "one"))
    refused(f"no class folders in {tmp_path / 'empty'}", str(tmp_path / "empty"))
    refused(f"no class folders in {tmp_path / 'loose'}", str(tmp_path / "loose"))
    refused("a.png' is one image", str(tmp_path / "loose" / "a.png"))
    refused("--config quickstart.yaml", "quickstart.yaml")
    refused("unknown method 'nolla' in the config: did you mean nola", method="nolla")
    refused("--shots is 0: give 1 or more, or all", shots=0)
    refused("--epochs is 0: give 1 or more", epochs=0)
    refused("--device is 'cudda': did you mean cuda", device="cudda")
    refused("--device is 'gpu': did you mean cuda", device="gpu")
    refused("--device is 'mps:1': did you mean mps", device="mps:1")
    refused("gone.pth does not exist", weights=str(tmp_path / "gone.pth"))
    refused("did you mean vit_small_patch14_dinov2", backbone="vit_smal_patch14_dinov2")


def test_a_mistake_does_not_wait_for_torch(tmp_path: Path) -> None:
    folder = place(tmp_path / "photos")
    code = (
        "import sys; from nola_vision.cli.main import main\n"
        f"assert main(['init', {str(folder)!r}, '--method', 'nolla']) == 2\n"
        f"assert main(['init', {str(folder)!r}, '--out', {str(tmp_path / 'a.yaml')!r}]) == 0\n"
        "assert not {'torch', 'timm', 'sklearn', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_photos_among_the_words_of_a_command_line() -> None:
    others = ["--data.shots", "10", "--trainer.x=3", "--print_config", "--model.lr", "-1"]
    assert take_photos(["p", *others]) == ("p", others)
    assert take_photos([*others, "p"]) == ("p", others)
    assert take_photos(others) == (None, others)
    assert take_photos(["--data.shots"]) == (None, ["--data.shots"])
    with pytest.raises(NolaVisionError, match="'p' and 'q' are two sets of images"):
        take_photos(["p", *others, "q"])
