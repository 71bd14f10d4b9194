"""VTAB-1k: its lists and labels, which images a search and a final run train on, its cells, and its table."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import stand_ins
from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.datasets import vtab
from nola_vision.data.datasets.registry import DATASETS
from nola_vision.data.kshot_split import KShotSplit
from nola_vision.images.transforms import eval_transform
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.reports.cell import report_of
from nola_vision.reports.confusion import read_confusion
from nola_vision.reports.html.page import html_page
from nola_vision.reports.terminal import benchmark_tables
from nola_vision.reports.vtab import group_means, vtab_benchmarks
from nola_vision.runs import run_id, store
from nola_vision.runs.cells import compose, part_files, split_cell
from nola_vision.runs.config_files import load_config
from nola_vision.runs.parsing import parse
from nola_vision.runs.published import published_vtab
from nola_vision.runs.record import Row
from nola_vision.training.frozen import with_absent
from tiny import SMALL_VIT

# The tasks and numbers of classes of the published scripts
CLASSES = dict(
    zip(
        """cifar caltech101 dtd oxford_flowers102 oxford_iiit_pet svhn sun397 patch_camelyon eurosat resisc45
        diabetic_retinopathy clevr_count clevr_dist dmlab kitti dsprites_loc dsprites_ori smallnorb_azi
        smallnorb_ele""".split(),
        (100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks; in `kitti` no image of the training lists has label 2."""
    folder = tmp_path_factory.mktemp("vtab")
    stand_ins.vtab(folder / "vtab-1k/dmlab", 6, 12)
    stand_ins.vtab(folder / "vtab-1k/kitti", 4, 12)
    for name in ("train800", "val200", "train800val200"):
        file = folder / f"vtab-1k/kitti/{name}.txt"
        file.write_text(file.read_text().replace(".jpg 2\n", ".jpg 3\n"))
    return folder


def test_the_tasks_and_their_classes() -> None:
    assert tuple(CLASSES) == vtab.TASKS and [len(tasks) for tasks in vtab.GROUPS.values()] == [7, 4, 8]
    for task, count in CLASSES.items():
        names = DATASETS[f"vtab_{task}"].class_names(None)
        assert len(names) == len(set(names)) == count and all(names)
    assert DATASETS["vtab_svhn"].class_names(None) == tuple("0123456789")
    assert DATASETS["vtab_cifar"].class_names(None) == DATASETS["cifar100"].class_names(None)
    # TensorFlow Datasets counts the background as a class
    assert {*DATASETS["vtab_caltech101"].class_names(None)} - {"background_google"} == {
        name.lower() for name in DATASETS["caltech101"].class_names(None)
    }


def test_a_search_holds_val200_out_and_a_final_run_trains_on_all(root: Path) -> None:
    make = partial(KShotSplit, "vtab_dmlab", str(root), "all", 0)
    final, search = make(), make(hold_out=True)

    def folders(images: tuple[object, np.ndarray]) -> dict[str, int]:
        source, indices = images
        names = [Path(source.name(i)).parent.name for i in indices]  # type: ignore[attr-defined]
        return {name: names.count(name) for name in names}

    assert folders(final._train_set) == {"train800": 800, "val200": 200} and folders(final._pool_set) == {}
    assert folders(search._train_set) == {"train800": 800} and folders(search._pool_set) == {"val200": 200}
    assert folders(search._test_set) == folders(final._test_set) == {"test": 12}
    assert final.search_holds_out and not final.warnings
    few = KShotSplit("vtab_dmlab", str(root), 5, 0, hold_out=True)
    assert np.bincount(few.train_labels).tolist() == [5] * 6 and few.train_indices.max() < 800
    # the root may be the folder vtab-1k itself
    assert len(KShotSplit("vtab_dmlab", str(root / "vtab-1k"), "all", 0).train_indices) == 1000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "val200.txt").unlink(), r"cannot read VTAB-1k's dmlab in .* \(.*val200.txt: No such file"),
        (lambda f: f.rename(f.with_name("other")), r"there is no folder dmlab\): it must have vtab-1k/dmlab/"),
        (lambda f: (f / "images/val200/000003.jpg").unlink(), "1 of 1000 listed images of dmlab are missing"),
        (lambda f: edit(f / "train800.txt", ".jpg 5\n", ".jpg 6\n"), "line 6 of .* label '6', .* the labels 0 to 5"),
        (lambda f: edit(f / "train800.txt", ".jpg 5\n", ".jpg x\n"), "line 6 of .*train800.txt has label 'x'"),
        (lambda f: edit(f / "test.txt", ".jpg 5\n", f".jpg {'9' * 5000}\n"), r"line 6 of .* label '9+\.\.\.9+', but"),
        (lambda f: edit(f / "train800.txt", "images/train800/000000.jpg 0\n", ""), "lists 799 images instead of 800"),
        (lambda f: edit(f / "train800val200.txt", ".jpg 5\n", ".jpg 4\n"), "train800val200.txt has other labels than"),
        (lambda f: edit(f / "train800.txt", ".jpg 5\n", ".jpg \u0663\n"), "line 6 of .* label '\u0663'"),
        (lambda f: edit(f / "test.txt", "images/test/000000.jpg", "/etc/hostname"), "'/etc/hostname', outside"),
        (lambda f: edit(f / "test.txt", "images/test/", "images/../../"), r"'images/\.\./\.\./0+.jpg', outside"),
        (lambda f: edit(f / "test.txt", "images/test/", "images/" + 300 * "a"), "12 of 12 listed images of dm"),
        (lambda f: edit(f / "test.txt", "/test/000000", "//train800/000000"), "test.txt and train800.txt of .* share"),
        (lambda f: edit(f / "val200.txt", "val200/000000", "train800/000000"), r"800.txt of .* share 1 image,"),
        (lambda f: edit(f / "test.txt", ".jpg 5\n", "\n"), "line 6 of the list .*test.txt lacks the label"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_one_line(change, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    stand_ins.make("vtab_dmlab", tmp_path, monkeypatch)
    change(tmp_path / "vtab-1k/dmlab")
    with pytest.raises(NolaVisionError, match=expected) as caught:
        for split in ("train", "test"):
            DATASETS["vtab_dmlab"].open(str(tmp_path), split)
    assert "\n" not in str(caught.value) and ": " in str(caught.value)


def test_the_lists_are_in_the_hash(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dmlab"
    folder.mkdir()
    for name in ("train800", "val200", "test"):
        (folder / f"{name}.txt").write_bytes((root / f"vtab-1k/dmlab/{name}.txt").read_bytes())
    config = compose("vitb_in21k", "vtab_dmlab", None, "vtab")
    config["data"]["root"] = str(tmp_path)

    def content() -> str:
        return str(parse(run_id.resolve(config, "nearest-mean"))["content"]["data"])

    seen = [content()]
    for name in ("train800", "val200", "test"):
        file = folder / f"{name}.txt"
        file.write_text(file.read_text()[:-2] + "0\n")  # the last image gets another label
        seen.append(content())
    assert len({*seen}) == 4
    (folder / "test.txt").unlink()  # the run reports it
    assert "data" not in parse(run_id.resolve(config, "nearest-mean"))["content"]


def edit(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def test_data_check_and_a_missing_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "vtab_dmlab", "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "train: 1,000 images in 6 classes" in printed and "fit for use" in printed
    assert main(["data", "check", "vtab_dmlab", "--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_sweep_searches_on_train800_and_trains_on_both(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    """Of a task in which class 2 has no training image."""
    monkeypatch.chdir(tmp_path)
    options = ["--methods=nearest-mean,logistic,linear", "--splits=0", "--inits=0", f"--data.root={root}", *SMALL_VIT]
    quick = ["--threads=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.precision=32"]
    assert main(["sweep", "--config=vitb_in21k_vtab_kitti", "--data.num_workers=0", *options, *quick]) == 0
    # `fit --search` has the same search runs: it finds them
    one = ["--method=linear", "--search", f"--data.root={root}", *SMALL_VIT, *quick]
    assert main(["fit", "--config=vitb_in21k_vtab_kitti", "--data.num_workers=0", *one]) == 0
    rows, problems = store.read_rows("runs")
    assert not problems and {row.status for row in rows} == {"completed"}
    counts = {row.stage: row.data["counts"] for row in rows if row.method == "linear"}
    assert counts["search"] == {"train": 800, "validation": 200} and len(rows) == 3 + 3
    assert counts["final"] == {"train": 1000, "validation": 0, "test": 12}
    final = [row for row in rows if row.stage == "final"]
    assert {row.method for row in final} == {"nearest-mean", "logistic", "linear"}
    assert all("1 of the 4 classes have no training images" in row.warnings for row in rows)
    for row in final:
        transform = row.data["transform"]
        assert transform["crop_pct"] == 1 and transform["crop_mode"] == "squash" and transform["mean"][0] == 0.485
        if row.method != "linear":
            counts = read_confusion(row.folder / "confusion.csv")
            absent = "over 20 m"
            assert counts.loc[absent].sum() == 3 and counts[absent].sum() == 0 and counts.to_numpy().sum() == 12


def test_an_absent_class_has_the_mean_logit() -> None:
    generator = np.random.default_rng(0)
    weight, bias, x = generator.normal(size=(3, 5)), generator.normal(size=3), generator.normal(size=(100, 5))
    whole, offset = with_absent(weight, bias, np.array([0, 2, 4]), 6)
    logits, present = x @ whole.T + offset, x @ weight.T + bias
    np.testing.assert_allclose(logits[:, [0, 2, 4]], present)
    np.testing.assert_allclose(logits[:, [1, 3, 5]], present.mean(1, keepdims=True).repeat(3, 1))
    assert {*logits.argmax(1)} == {0, 2, 4}


def test_without_a_crop_all_of_an_image_is_seen() -> None:
    tag = "vit_base_patch16_224.orig_in21k"
    own, none = (input_config(BackboneSpec(tag, crop=crop)) for crop in ("own", "none"))  # type: ignore[arg-type]
    wide = np.zeros((300, 1200, 3), dtype=np.uint8)
    wide[:, :300], wide[:, 900:] = 255, 255
    cropped, whole = (eval_transform(config)(Image.fromarray(wide)).mean(0) for config in (own, none))
    assert cropped.max() < 0 < whole[0, 0] and whole.shape == (224, 224)
    # half of its columns are bright, in quarters
    assert torch.equal(whole[0] > 0, (torch.arange(224) // 56) % 3 == 0)


def test_the_cells() -> None:
    assert split_cell("vitb_in21k_vtab_svhn") == ("vitb_in21k", "vtab_svhn", None, "vtab")
    assert split_cell("vitb_vtab_svhn_paper") == ("vitb", "vtab_svhn", None, "paper")
    assert split_cell("vitb_vtab_svhn_5shot") == ("vitb", "vtab_svhn", 5, "vtab")
    assert split_cell("vitb_pets") is None and split_cell("vitb_vtab_svhnx") is None
    assert {name for name in part_files("datasets") if name.startswith("vtab_")} == {f"vtab_{task}" for task in CLASSES}
    assert load_config("vitb_vtab_svhn_5shot")["data"]["shots"] == 5
    for task in CLASSES:
        config = load_config(f"vitb_in21k_vtab_{task}")
        assert config["data"]["dataset"] == f"vtab_{task}" and config["data"]["shots"] == "all"
        assert config["protocol"] == "vtab" and config["published"] == []
        full = parse(run_id.resolve(config))
        assert full["trainer"]["max_epochs"] == 100 and full["data"]["augmentation"] == "none"
        assert run_id.cell_name(full) == f"vit_base_patch16_224.orig_in21k-vtab_{task}-allshot-vtab"
        assert full["model"]["optimizer"]["init_args"]["weight_decay"] == 1e-4


# VPT (ECCV 2022), Table 1: full fine-tuning, printed as 75.88, 83.36 and 47.64 by group
FULL = dict(
    zip(
        CLASSES,
        (68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8)
        + (79.7, 95.7, 84.2, 73.9)
        + (56.3, 58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1),
        strict=True,
    )
)  # fmt: skip


def test_the_published_mean_is_that_of_the_groups_means() -> None:
    means = group_means(FULL)
    assert means == pytest.approx(
        {"Natural": 75.88, "Specialized": 83.38, "Structured": 47.64, "mean": 68.96}, abs=0.02
    )
    (printed,) = [line.mean for line in published_vtab() if line.name == "Full"]
    assert abs(printed - means["mean"]) < 0.1 < 3 < printed - np.mean(list(FULL.values()))
    assert group_means({task: 50.0 for task in CLASSES if task != "kitti"}) == {"Natural": 50, "Specialized": 50}
    # bytes of the repository's files of Bi-LoRA, rank 1: 768 bytes and two numbers per layer's matrix; a head of 1 bit
    sizes = {task: (48 * (96 + 8) + 96 * count + 8) / 1024 for task, count in CLASSES.items()}
    (printed,) = [line.kib for line in published_vtab() if line.name == "Bi-LoRA r=1, 1-bit head"]
    assert round(group_means(sizes)["mean"], 1) == printed != round(np.mean(list(sizes.values())), 1)


def rows_of(tag: str, tasks: dict[str, float], method: str = "nola", kib: int = 2, **columns: object) -> list[Row]:
    rows = []
    for task, accuracy in tasks.items():
        config = compose("vitb_in21k", f"vtab_{task}", None, "vtab")
        config["model"]["backbone"]["tag"] = tag
        config = run_id.resolve(config, "nola-mlp")
        unique = f"{task}-{method}-{columns.get('init', 0)}"
        rows.append(
            Row(**{"stage": "final", "cell": run_id.cell_name(config), "run_hash": unique, "entry_hash": method,
                "config": config, "split": 0, "init": 0, "basis_seed": 0, "method_class": "NOLA", "status": "completed",
                "method": method, "split_seed": 0, "run_seed": 0, "test_accuracy": accuracy / 100,
                "adapter_file_bytes": 1024 * kib} | columns)
        )  # fmt: skip
    return rows


def test_the_table_over_tasks() -> None:
    tag = "vit_base_patch16_224.orig_in21k"
    other = {task: accuracy + 1 for task, accuracy in FULL.items() if task != "kitti"}
    report = report_of(
        [*rows_of(tag, FULL), *rows_of(tag, other, "lora", 4), *rows_of("vit_x.y", {"dtd": 3, "svhn": 4})]
    )
    benchmark, elsewhere = vtab_benchmarks(report.cells)
    means, per_task = benchmark.tables
    lines = {line[0].text: [cell.text for cell in line[1:]] for line in means.lines}
    assert lines["nola"] == ["2.0", "75.9", "83.4", "47.6", "69.0", "65.6", "19 of 19"]
    assert lines["lora"] == ["-", "76.9", "84.4", "-", "-", "-", "18 of 19"]
    assert lines["published Bi-LoRA r=1, 1-bit head"] == ["9.2", "-", "-", "-", "74.6", "-", "19 of 19"]
    assert len(lines) == 2 + len(published_vtab()) and any("keeps the best result" in note for note in means.notes)
    named = [(line[0].text, *item) for line in means.lines for item in zip(means.columns, line, strict=True)]
    marked = {(label, column) for label, column, cell in named if cell.mark == "best"}
    assert marked == {("lora", "Natural"), ("lora", "Specialized"), ("nola", "Structured"), ("nola", "mean")}
    assert [line[0].text for line in per_task.lines] == list(CLASSES) and per_task.columns == ("task", "lora", "nola")
    assert [cell.text for cell in per_task.lines[14]] == ["kitti", "-", "65.5"]
    # other weights: the published results do not belong next to them
    assert [line[0].text for line in elsewhere.tables[0].lines] == ["nola"] and "2 of 19" in str(elsewhere.tables[0])
    console = Console(file=io.StringIO(), width=100)
    console.print(benchmark_tables(benchmark))
    assert console.file.getvalue().count("published ") > 9  # type: ignore[attr-defined]
    assert html_page(report).text.count("<caption>") == 0 and "Means over tasks" in html_page(report).text


def test_the_report_verb_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in rows_of("vit_x.y", {"dtd": 50, "svhn": 60}):
        folder = tmp_path / row.cell / "nola" / row.run_hash
        folder.mkdir(parents=True)
        store.write_row(folder, row)
    for format in ("table", "markdown", "latex"):
        assert main(["report", str(tmp_path), "--format", format]) == 0
        printed = capsys.readouterr().out
        assert printed.count("Means over tasks") == 1 and "VTAB-1k: " in printed and "2 of 19" in printed


def test_batches_of_a_final_run(root: Path) -> None:
    config = input_config(BackboneSpec("test_vit.r160_in1k", img_size=32, crop="none"))
    data = KShotDataModule(config, "vtab_dmlab", str(root), "all", augmentation="none", batch_size=500)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 1000 and data.val_dataloader() == []
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [*range(6)] * 2
