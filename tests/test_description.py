"""A cell in words: its title, what was asked, how it was measured, and the verdict on all its runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nola_vision.evaluation.confusion import CONFUSION_FILE, confusion_csv
from nola_vision.evaluation.estimates import Estimate, compare
from nola_vision.reports.cell import Cell, cell_of, report_of
from nola_vision.reports.description import backbone_name, cell_facts, cell_title, grid_text, how_measured
from nola_vision.reports.entries import subject, summarise
from nola_vision.reports.formatting import points
from nola_vision.reports.html.page import html_page
from nola_vision.reports.terminal import cell_report
from nola_vision.reports.verdict import run_verdict
from nola_vision.runs.record import Row
from test_estimates import predictions
from test_tables import CELL, CONFIG, grid, row, text_of

FROZEN = {"method_class": "LogisticRegression"}
LORA, FULL = {"method_class": "LoRA"}, {"method_class": "FullFinetune"}


def config(tag: str = "b", dataset: str = "digits", shots: Any = 5, **sections: Any) -> dict[str, Any]:
    backbone = {"tag": tag} | sections.pop("backbone", {})
    data = {"dataset": dataset, "shots": shots} | sections.pop("data", {})
    return {"model": {"backbone": backbone, "method": {"class_path": "NOLA"}}, "data": data, **sections}


def facts(classes: int = 10, **data: Any) -> dict[str, Any]:
    return {"class_names": list("abcdefghij")[:classes], "counts": {"train": 50, "test": 1297}} | data


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "ViT-S/14 DINOv2"),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", "ViT-B/16 ImageNet-21k"),
        ("vit_large_patch16_224.mae", "ViT-L/16 MAE"),
        ("vit_large_patch14_reg4_dinov2.lvd142m", "ViT-L/14 DINOv2"),
        ("resnet18.a1_in1k", "ResNet-18 ImageNet-1k"),
        ("vit_mini_patch4_32.contours", "small ViT/4 pretrained on contours"),
        ("vit_mini_patch4_32.mae", "small ViT/4 MAE"),
        ("vit_so150m_patch16_reg4_gap_256.sbb", "vit_so150m_patch16_reg4_gap_256"),
        ("local-dir:/home/me/merged", "merged"),
        (r"local-dir:C:\Users\me\merged", "merged"),
        ("hf-hub:owner/name", "owner/name"),
        ("a\x1b[31m", "a\\x1b[31m"),
    ],
)
def test_a_backbone_by_its_name(tag: str, name: str) -> None:
    assert backbone_name(row(config=config(tag))) == name


def test_a_cell_in_words() -> None:
    tag = "vit_small_patch14_dinov2.lvd142m"
    photos = config(tag, "folder", "all", data={"root": "/home/me/stamps"}, protocol="photos")
    estimate = Estimate.of([(9, 16)] * 5).to_dict()
    own = facts(4, counts={"train": 80}, transform={"size": 224})
    rows = [row("nola", None, estimate=estimate, data=own, config=photos, started="2026-01-02T10:00:00+00:00")]
    assert cell_title(rows) == "stamps: 4 classes, 80 images, ViT-S/14 DINOv2"
    assert cell_facts(rows) == [
        ("data", "80 training images of 4 classes in 'stamps', no test images: 5-fold cross-validation"),
        ("shots", "every training image"),
        ("backbone", f"ViT-S/14 DINOv2 ({tag}), images of 224 pixels"),
        ("runs", "1 method, 1 split x 1 init: 1 final run"),
        ("protocol", "photos"),
    ]
    text = " ".join(how_measured(rows))
    for part in (
        "divided into 5 folds",
        "Split s divides them with seed s.",
        "in the first division into folds; the table averages all folds.",
        "Clopper and Pearson",
        "Init i seeds the basis, the head and the order of batches. ",
        "Each fold's model was tested once, after its last epoch.",
        "Started 2026-01-02 10:00 UTC.",
        f"Cell: {CELL}.",
    ):
        assert part in text
    assert not any(part in text for part in ("Wilson", "training images with seed", "compared image by image"))
    assert "/home" not in text + str(cell_facts(rows))
    text = " ".join(how_measured([*rows, dataclasses.replace(rows[0], split=1, run_hash="s1", monitor="val_loss")]))
    assert "after its last epoch or best epoch by val_loss." in text and "compared image by image" in text
    text = " ".join(how_measured([row("1nn", 0.5, init=None, config=photos, **FROZEN)]))
    assert not any(part in text for part in ("Split s", "Init i", "epoch"))

    trained = config("resnet18.a1_in1k", "cifar100", protocol="paper", trainer={"max_epochs": 50})
    trained["data"] |= {"batch_size": 16, "augmentation": "none"}
    columns = {"config": trained, "data": facts(), "device": "cpu", "threads": 2, "versions": {"torch": "2.13"}}
    rows = [
        *grid("nola", [[70, 72, 71], [70, None, 71]], monitor="val_loss", **columns),
        *(row("1nn", 0.5, split=split, init=None, **FROZEN, **columns) for split in (0, 1)),
        row("nola", None, stage="search", run_hash="s", **columns),
    ]
    assert cell_title(rows) == "CIFAR-100: 10 classes, 5 images per class, ResNet-18 ImageNet-1k, protocol paper"
    assert dict(cell_facts(rows)) == {
        "data": "50 training images of 10 classes of CIFAR-100, tested on 1,297 test images",
        "shots": "5 images per class, drawn with seeds 0 to 1 (the splits)",
        "backbone": "ResNet-18 ImageNet-1k (resnet18.a1_in1k)",
        "runs": "2 methods, 2 splits x 3 inits (frozen features: one run per split): 8 final runs, 1 failed",
        "protocol": "paper (as the paper states): 50 epochs, batches of 16, augmentation none",
    }
    text = " ".join(how_measured(rows))
    for part in (
        "tested on 1,297 test images.",
        "Wilson",
        "Split s draws the training images with seed s. Init i seeds the basis",
        "order of batches; methods on frozen features have none.",
        "Each run was tested once, after its best epoch by val_loss.",
        "Device: cpu with 2 threads.",
        "PyTorch 2.13.",
    ):
        assert part in text
    assert points(None) == points(math.nan) == "-" and points(-0.04) == "0.0"
    assert grid_text(rows[:3]) == "3 runs: 1 split x 3 inits" and grid_text(rows[6:8]) == "2 splits"
    assert grid_text([*rows[:4], rows[5]]) == "5 runs of 2 splits"
    assert "Student's t" not in text
    rows.append(row("1nn", 0.5, split=5, init=None, **FROZEN, **columns))
    assert (
        "Student's t" in " ".join(how_measured(rows))
        and "seeds 0, 1, 5 (the splits)" in dict(cell_facts(rows))["shots"]
    )


def test_what_rows_do_not_say_is_left_out() -> None:
    bare = [row(config=CONFIG)]
    names = {"hf:/home/me/pets": "pets", r"hf:C:\Users\me\pets": "pets", "hf:me/pets": "me/pets"}
    for name, title in names.items():
        assert cell_title([row(config=config(dataset=name, shots="all"))]) == f"{title}: b"
    windows = config(data={"dataset": "folder", "root": "C:\\Users\\me\\photos\\"})
    assert cell_title([row(config=windows)]) == "photos: 5 images per class, b"
    assert cell_title([row(config=config(backbone={"file": "/home/me/w.pth"}))]).endswith(", b, local weights")
    assert cell_title(bare) == "digits: b" and cell_title([]) == "" and cell_facts([]) == []
    assert dict(cell_facts(bare))["data"] == "digits" and how_measured(bare) and how_measured([])
    odd = row(config=CONFIG | {"protocol": [1]}, data={"counts": {"train": "x"}, "transform": 3, "test_name": ["\x1b"]})
    assert "\x1b" not in str([cell_title([odd]), cell_facts([odd]), how_measured([odd]), Cell("cell", [odd]).verdict])


def test_the_subject_is_nola_then_what_trains_then_frozen_features() -> None:
    rows = [
        row("nola-qv", 0.5), row("nola-mlp", 0.6), row("lora", 0.9, **LORA), row("full", 0.8, **FULL),
        row("logistic", 0.95, init=None, **FROZEN), row("nola-big", None, status="failed"),
    ]  # fmt: skip

    def chosen(*kept: Row) -> str | None:
        found = subject(summarise(kept))
        return None if found is None else found.method

    assert chosen(*rows) == "nola-mlp"
    assert chosen(*rows[2:]) == "lora" and chosen(*rows[4:]) == "logistic" and chosen(rows[-1]) is None
    assert chosen(*(dataclasses.replace(one, test_accuracy=0.5) for one in rows[:2])) == "nola-mlp"  # the first by name
    # one lucky run is not it
    assert chosen(*rows, row("nola-qv", 0.5, init=1)) == "nola-qv"
    assert chosen(*rows, row("nola-qv", 0.5, init=1), row("nola-mlp", 0.1, split=1)) == "nola-mlp"


def with_confusion(rows: list[Row], place: Path, counts: list[list[int]]) -> list[Row]:
    made = []
    for number, one in enumerate(rows):
        folder = place / f"{one.method}-{number}"
        folder.mkdir()
        names = ["cat", "dog", "owl"]
        (folder / CONFUSION_FILE).write_text(confusion_csv(np.array(counts), names))
        made.append(dataclasses.replace(one, folder=folder))
    return made


def test_a_verdict_on_several_runs(tmp_path: Path) -> None:
    data = facts(majority_share=0.4, class_names=["cat", "dog", "owl"], counts={"train": 50, "test": 20})
    nola = grid("nola", [[70, 72], [80, 82], [75, 77]], adapter_file_bytes=1000, data=data)
    names = data["class_names"]
    nola = with_confusion(nola, tmp_path, [[5, 1, 2], [0, 5, 0], [1, 1, 5]])
    lora = grid("lora", [[76, 74], [83, 83], [81, 79]], adapter_file_bytes=1500, data=data, **LORA)
    frozen = [row("logistic", 0.6 + 0.1 * split, split=split, init=None, data=data, **FROZEN) for split in range(3)]
    worse = [row("1nn", 0.1, init=None, method_class="NearestNeighbor", data=data)]
    lost = [row("lora", None, split=9, status="failed", error="no room", **LORA)]
    # nola - lora by split: -4, -2, -4; nola - logistic 11, 11, -4; t(0.975, 2) = 4.3027
    lines, problems = cell_of([*nola, *lora, *frozen, *worse, *lost, row(cell="another")], CELL).verdict
    assert not problems and lines == [
        "nola: top-1 accuracy 76.0 % (std 4.2; 6 runs: 3 splits x 2 inits).",
        "Chance: always predicting the largest class is right for 40.0 %.",
        "Best of 2 frozen-feature methods (an optimistic choice): logistic, 70.0 % (std 8.2; 3 splits).",
        "nola against logistic, split by split: no difference shown (+6.0 points, -15.5 to +27.5, 3 splits).",
        "The other method that trains: lora, 79.3 % (std 3.4; 6 runs: 3 splits x 2 inits).",
        "nola against lora, split by split: 3.3 points worse (-6.2 to -0.5, 3 splits).",
        "The adapter file of lora is 1.5 times as large as that of nola.",
        "Most often misclassified: 'cat' as 'owl' (12 times in 6 runs), 'cat' as 'dog' (6 times in 6 runs), "
        "and 2 more pairs with 6.",
        "Not completed: 1 run (lora 1).",
    ]
    other = [dataclasses.replace(one, method="nola-big", test_accuracy=0.2) for one in nola]
    first = Cell("cell", [*nola, *other]).verdict[0][0]
    assert first.startswith("nola, the best of 2 NOLA entries (an optimistic choice): top-1 accuracy 76.0 %")
    assert Cell("cell", [*nola, *other[:2]]).verdict[0][0].startswith("nola: top-1 accuracy 76.0 %")
    one_split, _ = Cell("cell", [*nola[:2], frozen[0]]).verdict
    assert "nola against logistic: +11.0 points on 1 split, too few splits for an interval." in one_split
    alike = [row("logistic", 0.5, split=split, init=None, data=data, **FROZEN) for split in range(3)]
    first = Cell("cell", [*frozen, *(dataclasses.replace(one, method="1nn") for one in alike)]).verdict[0][0]
    assert first.startswith(
        "logistic, the best of 2 frozen-feature methods (an optimistic choice): top-1 accuracy 70.0"
    )
    (nola[0].folder or tmp_path).joinpath(CONFUSION_FILE).write_text("x")
    lines, problems = Cell("cell", nola).verdict
    assert "(10 times in 5 runs)" in lines[-1] and problems[0].endswith("delete it (plots then leave its run out)")
    # files of other runs are named, not those of the others, and so is the run whose row has other classes than most
    other = confusion_csv(np.diag([5, 10, 5]), ["cat", "dog", "fox"])
    (nola[0].folder or tmp_path).joinpath(CONFUSION_FILE).write_text(other)
    (nola[1].folder or tmp_path).joinpath(CONFUSION_FILE).write_text(confusion_csv(np.diag([5, 5, 5]), names))
    (nola[2].folder or tmp_path).joinpath(CONFUSION_FILE).write_text(other)
    nola[2] = dataclasses.replace(nola[2], data=data | {"class_names": ["cat", "dog", "fox"]})
    lines, problems = Cell("cell", nola).verdict
    assert "'cat' as 'owl' (6 times in 3 runs)" in lines[-1]
    assert [problem.partition("/confusion.csv ")[::2] for problem in problems] == [
        (str(nola[0].folder), "has other classes than its run's row: delete it (plots then leave its run out)"),
        (str(nola[1].folder), "counts 15 images, and its run's row 20: delete it (plots then leave its run out)"),
        (str(nola[2].folder), "has other classes than most runs of nola: it is left out"),
    ]
    lines, _ = Cell("cell", lost).verdict
    assert lines == ["No run of this cell has an accuracy yet.", "Not completed: 1 run (lora 1)."]


def test_cross_validated_splits_are_compared_image_by_image(tmp_path: Path) -> None:
    """Splits divide the same images into folds, so their differences say nothing of an interval."""
    rows = []
    for method, correct, columns in (("nola", 18, {}), ("logistic", 10, FROZEN | {"init": None})):
        for split in range(3):
            found = predictions([0] * correct + [1] * (20 - correct), [0] * 20)
            folder = tmp_path / f"{method}{split}"
            folder.mkdir()
            found.save(folder)
            estimate = Estimate.of([(correct // 2, 10), (correct - correct // 2, 10)]).to_dict()
            made = row(method, None, split=split, estimate=estimate, data={"class_names": ["cat", "dog"]}, **columns)
            rows.append(dataclasses.replace(made, folder=folder))
    lines, problems = Cell("cell", [*rows[1:], row("logistic", None, status="failed", split=0, **FROZEN)]).verdict
    against = compare(predictions([0] * 18 + [1] * 2, [0] * 20), predictions([0] * 10 + [1] * 10, [0] * 20))
    between = f"+{against.low:.1f} to +{against.high:.1f}"
    assert not problems and lines[0] == "nola: top-1 accuracy 90.0 % (std 0.0; 4 folds of 2 runs: 2 splits x 1 init)."
    assert lines[2] == f"nola against logistic, image by image (split 1, init 0): 40.0 points better ({between})."
    (tmp_path / "nola1" / "predictions.safetensors").write_bytes(b"x")
    lines, problems = Cell("cell", rows[1:]).verdict
    assert not any("against" in line for line in lines) and len(problems) == 1 and "is damaged" in problems[0]
    page = html_page(report_of(rows[1:]))
    assert page.text.count("nola1/predictions.safetensors is damaged") == 1


def test_the_page_and_the_verdict_name_the_same_frozen_method() -> None:
    """On the split of the only run: over all its splits another is better."""
    rows = [row("nola", 0.9, data=facts())]
    for method, accuracies in {"logistic": (0.7, 0.1), "1nn": (0.6, 0.8)}.items():
        rows += [row(method, one, split=s, init=None, data=facts(), **FROZEN) for s, one in enumerate(accuracies)]
    assert (
        Cell("cell", rows).verdict[0][1].startswith("Best of 2 frozen-feature methods (an optimistic choice): logistic")
    )
    text = html_page(report_of(rows)).text
    assert "logistic, best on frozen features" in text and "1nn, best on frozen features" not in text
    alone = html_page(report_of([row("nola", 0.9)])).text  # tested on an unknown number of images
    assert "90.0 %" in alone and "mean of 1 run" not in alone and "std 0.0" not in alone


def test_a_verdict_on_one_run_of_a_cell_is_that_of_fit(tmp_path: Path) -> None:
    names, rows = ["cat", "dog"], {}
    of = {"nola": [0] * 18 + [1] * 2, "logistic": [0] * 10 + [1] * 10, "full": [0] * 20}
    for method, predicted in of.items():
        found = predictions(predicted, [0] * 20)
        folder = tmp_path / method
        folder.mkdir()
        found.save(folder)
        columns = {"logistic": FROZEN | {"init": None}, "full": FULL}.get(method, {})
        rows[method] = dataclasses.replace(
            row(
                method,
                found.correct.mean(),
                data={"class_names": names, "counts": {"test": 20}},
                adapter_file_bytes=100 if method == "nola" else 123_456,
                **columns,
            ),
            folder=folder,
        )
    lines, problems = run_verdict(rows["nola"], [rows["logistic"]], [rows["full"]])
    assert Cell("cell", [*rows.values()]).verdict == (lines, []) and not problems
    elsewhere = row("logistic", 0.1, split=5, init=None, **FROZEN)  # on another split, so it is not compared
    assert Cell("cell", [elsewhere, *rows.values()]).verdict[0] == lines
    assert [line.partition(" (")[0] for line in lines] == [
        "nola: top-1 accuracy 90.0 %",
        "Frozen features: logistic, 50.0 %",
        "nola against logistic, image by image: 40.0 points better",
        "The other method that trains: full, 100.0 %",
        "nola against full, image by image: no difference shown",
        "The adapter file of full is 1,235 times as large as that of nola.",
        "Most often misclassified: 'cat' as 'dog'",
    ]
    assert Cell("cell", [rows["logistic"], row("nola", None)]).verdict[0][0] == (
        "There is no accuracy estimate for nola: it was not tested."
    )
    (tmp_path / "logistic" / "predictions.safetensors").write_bytes(b"x")
    lines, problems = Cell("cell", [*rows.values()]).verdict
    assert "logistic/predictions.safetensors is damaged" in problems[0]
    predictions([0] * 9, [0] * 9).save(tmp_path / "logistic")  # of another run
    lines, problems = Cell("cell", [*rows.values()]).verdict
    assert len(problems) == 1 and "logistic/predictions.safetensors is damaged: it is of 9 images, and" in problems[0]
    assert lines[0].startswith("nola: top-1 accuracy 90.0 %") and any("nola against full" in line for line in lines)
    assert not any("against logistic" in line for line in lines)


def test_the_terminal_shows_title_verdict_and_tables_in_this_order() -> None:
    rows = [
        *grid("nola", [[70, 72], [80, 82]], data=facts()),
        *grid("lora", [[71, 71], [78, 78]], data=facts(), **LORA),
    ]
    text = text_of(cell_report(cell_of(rows, CELL)), width=80)
    places = [
        text.index(part) for part in ("digits: 10 classes", "nola: top-1 accuracy 76.0 %", "Results", "Differences")
    ]
    assert places == sorted(places) and max(map(len, text.splitlines())) <= 80
