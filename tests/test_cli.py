"""The command line as a person types it: verbs, config names, and one sentence for each mistake."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from nola_vision.cli import configs
from nola_vision.cli.main import main
from nola_vision.runs import store
from nola_vision.runs.config_files import SHIPPED
from nola_vision.sweep.engines import local
from tiny import SMALL_VIT, trained_rows

QUICK = ["--threads=1", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--data.test_limit=40"]
SMALL = [*SMALL_VIT, *QUICK]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    assert main(["fit", "--config", "quickstart.yaml", f"--out={out}", "--method=linear", *SMALL]) == 0
    (path,) = out.rglob("linear/*/adapter.safetensors")
    return path


def digit(path: Path, index: int) -> None:
    Image.fromarray((load_digits().images[index] * 15).astype(np.uint8)).save(path)


def test_help_and_version_import_neither_torch_nor_lightning() -> None:
    for option in ("--help", "--version"):
        code = (
            f"import sys; from nola_vision.cli.main import main; assert main(['{option}']) == 0; "
            "print([m for m in ('torch', 'lightning', 'timm', 'numpy') if m in sys.modules])"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ended.stdout.endswith("[]\n")


def test_fit_prints_its_row_and_the_table(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Path("runs/vit_mini_patch4_32.mae-digits-5shot-quickstart/nola/bad/row.json")  # of another run
    bad.parent.mkdir(parents=True)
    bad.write_text('{"schema_version": 1, "config": {}}')
    assert main(["fit", "--config", "quickstart.yaml", "--method", "nola", *QUICK]) == 0
    printed, named = capsys.readouterr()
    assert re.search(r"^Seconds: [\d.]+, of which .*training [\d.]+.*, other [\d.]+\.$", printed, re.M | re.S)
    for text in ("test accuracy", "adapter file", "top-1", "nola", "vit_mini_patch4_32.mae-digits-5shot"):
        assert text in printed
    assert named.count(f"{bad} lacks status") == 1
    bad.unlink()
    assert len(list(Path("runs").rglob("row.json"))) == 4  # with three of frozen features
    (row,) = trained_rows("runs")
    assert {"building", "training", "test"} <= row.seconds.keys() and "start-up" not in row.seconds
    assert row.seconds_total is not None and 0 < sum(row.seconds.values()) <= row.seconds_total + 0.01
    assert main(["report", "runs", str(adapter.parents[3])]) == 0
    printed = capsys.readouterr().out
    assert "linear" in printed and "nola" in printed
    assert main(["report", "runs", "--format", "markdown"]) == 0
    assert "| nola" in capsys.readouterr().out


def test_options_override_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["--model.method.rank=2", "--model.method.num_basis", "10", "--data.shots=1", "--trainer.precision=64-true"]
    assert main(["fit", "--config", "quickstart.yaml", *SMALL, *extra]) == 0
    (row,) = trained_rows("runs")
    assert row.adapter_parameters == 6 * 2 * 10 and row.cell.endswith("digits-1shot-quickstart")
    assert row.config["model"]["method"]["init_args"]["rank"] == 2
    (path,) = Path("runs").rglob("nola/*/adapter.safetensors")
    digit(Path("seven.png"), 7)
    assert main(["predict", "--adapter", str(path), "seven.png"]) == 0  # whatever the precision it was trained in


def test_print_config_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", "quickstart.yaml", "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["dataset"] == "digits" and printed["model"]["method"]["class_path"].endswith("NOLA")
    assert "strategy" in printed["trainer"]


def test_a_local_config_wins_over_a_shipped_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump({**shipped, "protocol": "mine"}))
    (tmp_path / "one_shot.yaml").write_text("data: {shots: 1}\nmethod: 1nn\n")
    assert main(["fit", "--config", "quickstart.yaml", "--config", "one_shot.yaml", *SMALL]) == 0
    assert "digits-1shot-mine" in capsys.readouterr().out


def test_validate_and_test_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "quickstart.yaml", "--method=linear", *SMALL]
    assert main(["test", *options]) == 2
    assert "last.ckpt does not exist: give one by --ckpt_path" in capsys.readouterr().err
    assert main(["fit", *options]) == 0
    (row,) = trained_rows("runs")
    capsys.readouterr()
    assert main(["test", *options]) == 0
    assert str(row.test_accuracy)[:6] in capsys.readouterr().out
    assert main(["validate", *options]) == 0
    assert str(row.val_accuracy)[:6] in capsys.readouterr().out


def test_predict_writes_class_and_probability(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new images").mkdir()
    for index in range(3):
        digit(tmp_path / "new images" / f"é{index}.png", index)
    digit(tmp_path / "single.png", 7)
    assert main(["predict", "--adapter", str(adapter), "new images", "single.png", "--out", "p.csv"]) == 0
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"new images/é{i}.png" for i in range(3)] + ["single.png"]
    assert all(row["class"] in "0123456789" and 0.1 <= float(row["probability"]) <= 1 for row in rows)
    capsys.readouterr()
    assert main(["predict", "--adapter", str(adapter), "single.png"]) == 0
    assert capsys.readouterr().out.split() == ["single.png", rows[3]["class"], rows[3]["probability"]]


def test_sweep_chooses_settings_runs_everything_once_and_resumes(
    in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grid.yaml").write_text("methods: {linear: {search: {lr: [0.01, 2e-3], head_bits: [32, 4]}}}")
    configs = ["--config=quickstart.yaml", "--config=grid.yaml"]
    sweep = ["sweep", *configs, "--splits=0-1", "--inits=0", "--methods=1nn,linear", *SMALL]
    assert main(sweep) == 0
    printed = capsys.readouterr().out
    assert "linear split 0 init 0: lr 0.002, head_bits 4, validation" in printed
    rows, problems = store.read_rows("runs")
    assert not problems
    search = [row for row in rows if row.stage == "search"]
    settings = {row.run_hash: row.config["model"]["method"]["init_args"] for row in rows}
    tried = sorted((settings[row.run_hash]["lr"], settings[row.run_hash]["head_bits"]) for row in search)
    assert tried == [(0.002, 4), (0.002, 32), (0.01, 4), (0.01, 32)]
    assert {(row.split, row.init) for row in search} == {(0, 0)}
    best = max(search, key=lambda row: (row.val_accuracy, -row.val_loss, -row.learning_rate))
    chosen = {name: settings[best.run_hash][name] for name in ("lr", "head_bits")}
    choice = f"linear: lr {chosen['lr']:g}, head_bits {chosen['head_bits']} (best of 4)\n"
    assert choice in printed
    final = [row for row in rows if row.stage == "final"]
    assert [(r.method, r.split, r.init) for r in sorted(final, key=lambda r: (r.method, r.split))] == [
        ("1nn", 0, None), ("1nn", 1, None), ("linear", 0, 0), ("linear", 1, 0),
    ]  # fmt: skip
    for row in final:
        if row.method == "linear":
            assert settings[row.run_hash] == settings[best.run_hash] and row.learning_rate == best.learning_rate

    (left,) = [folder for folder in Path("runs").rglob("linear/split1-*")]
    (left / "row.json").unlink()
    assert main(sweep) == 0
    assert choice in capsys.readouterr().out  # a resumed sweep has a choice too
    again = store.read_rows("runs")[0]
    assert len(again) == len(rows)
    anew = [row for row, before in zip(again, rows, strict=True) if row != before]
    assert [(row.method, row.split) for row in anew] == [("linear", 1)]  # only the run without a row
    # a plain fit with the chosen settings is the same run, and `fit --search` finds the search runs and that
    options = [f"--model.method.{name}={value}" for name, value in chosen.items()]
    assert main(["fit", "--config=quickstart.yaml", "--method=linear", *options, *SMALL]) == 0
    capsys.readouterr()
    assert main(["fit", *configs, "--method=linear", "--search", *SMALL]) == 0
    printed = capsys.readouterr().out
    tried = [f"linear: lr {lr:g}, head_bits {bits}, validation" for lr, bits in tried]
    assert choice in printed and all(trial in printed for trial in tried)
    assert len(trained_rows("runs")) == len([row for row in rows if row.method == "linear"])


def test_a_dry_run_says_what_there_is_to_do(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["sweep", "--config=quickstart.yaml", "--splits=0-1", "--inits=0-1", "--methods=1nn,nola", *SMALL]
    vary = ["--vary=rank=2,4", "--vary=num_basis=8", "--dry-run"]
    assert main([*sweep, *vary, "--workers=500"]) == 0
    printed, aside = capsys.readouterr()
    lines = [line.split() for line in printed.splitlines()]
    for start in (["1nn", "0", "2", "0"], ["nola-rank4-num_basis8", "8", "4", "0"]):
        (estimate,) = [line[4] for line in lines if line[:4] == start]
        assert re.fullmatch(r"~\d+\.\d", estimate)
    assert "26 runs, 0 done; about" in printed and "~ is an estimate from a few timed steps" in printed
    assert "500 workers x 1 thread on" in aside and "is slow: give --workers" in aside
    assert not Path("runs").exists()
    assert main([*sweep, "--methods=1nn", "--vary=data.shots=1,2", "--vary=trainer.max_epochs=3,4", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("1nn-shots2-max_epochs") == 2 and "1nn-shots1-max_epochs4" in printed
    assert main([*sweep, "--vary=data.split_seed=1,2"]) == 2 and main([*sweep, "--vary=data.shot=1,2"]) == 2
    errors = capsys.readouterr().err
    assert "--data.split_seed is set by the sweep" in errors and "shot" in errors.splitlines()[-1]
    fast = ["--methods=1nn", "--splits=0-2", "--config=quickstart.yaml", *SMALL]
    assert main(["sweep", *fast, "--shard=2/2"]) == 0
    assert [row.split for row in store.read_rows("runs")[0]] == [1]
    capsys.readouterr()
    assert main(["sweep", *fast, "--dry-run"]) == 0
    printed, aside = capsys.readouterr()
    assert re.search(r"3 runs, 1 done; about \d+ s left with 1 at a time", printed)
    assert "estimate" not in printed and not aside  # a run is completed: its time is used


def test_a_sweep_without_its_data_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--config=quickstart.yaml", "--data.dataset=folder", "--data.root=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not list(Path().rglob("row.json"))


def test_report_tells_of_cells_without_a_result(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("methods: {bad: {class_path: NOLA, init_args: {targets: ['re:x']}}}")
    sweep = ["sweep", "--splits=0", "--inits=0", "--methods=bad", "--config=quickstart.yaml", "--config=bad.yaml"]
    assert main([*sweep, *SMALL]) == 1
    capsys.readouterr()
    assert main(["report", "runs"]) == 0
    printed = capsys.readouterr().out
    assert "digits-5shot-quickstart: no completed final run; the last one ended with:" in printed
    assert "method" not in printed


def test_a_failing_run_does_not_stop_a_sweep(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--splits=0", "--inits=0", "--methods=1nn,bad", "--config=quickstart.yaml", "--config=bad.yaml"]
    Path("bad.yaml").write_text("methods: {bad: {class_path: NOLA, init_args: {targets: ['re:x']}}}")
    assert main(["sweep", *options, *SMALL]) == 1
    printed = capsys.readouterr().out
    assert "bad split 0 init 0: failed" in printed and "1nn" in printed
    assert {row.status for row in store.read_rows("runs")[0]} == {"completed", "failed"}


FIT = ["fit", "--config=quickstart.yaml"]
MISTAKES = {
    "no verb of that name": (["fitt"], "did you mean fit"),
    "config": (["fit", "--config", "quikstart.yaml"], "did you mean quickstart.yaml"),
    "optimizer without settings": ([*FIT, "--config=null.yaml"], "model.optimizer"),
    "config that is no YAML": (["fit", "--config", "broken.yaml"], "broken.yaml cannot be read as YAML"),
    "config that is a list": (["fit", "--config", "list.yaml"], "list.yaml must be a mapping"),
    "unknown key": (["fit", "--config", "quickstart.yaml", "--data.shts", "5"], "--data.shts"),
    "unknown key in a file": (["fit", "--config", "quickstart.yaml", "--config", "typo.yaml"], "augmentatoin"),
    "wrong type": ([*FIT, "--data.shots", "few"], "shots is 'few', but it must be a whole number from 1 up, or 'all'"),
    "abbreviation": ([*FIT, "--data.shot", "3"], "there is no option --data.shot: did you mean shots"),
    "choice": ([*FIT, "--model.method.scope=all"], "model.method.scope is 'all': it must be shared or per_layer"),
    "precision": ([*FIT, "--trainer.precision=8"], "trainer.precision is '8': use one of"),
    "method on the command line": ([*FIT, "--model.method=NOLAA"], "not the name of a class: did you mean NOLA"),
    "key of a group": ([*FIT, "--config=nested.yaml"], "unknown key 'init_args.shots' in `data`"),
    "top-level key": ([*FIT, "--thread=2"], "there is no option --thread: did you mean threads"),
    "method as a word": ([*FIT[:1], "--config=word.yaml"], "the method is 'NOLA'"),
    "key of the backbone": ([*FIT, "--config=tagg.yaml"], "unknown key 'backbone.tagg' in `model`: did you mean tag"),
    "a split in a sweep": (["sweep", *FIT[1:], "--data.split_seed=3"], "--splits"),
    "a method's setting in a sweep": (["sweep", "--config=quickstart.yaml", "--model.method.rank=2"], "`methods`"),
    "format": (["report", "empty", "--format=word"], "choose from"),
    "damaged checkpoint": ([*FIT, *SMALL, "--ckpt_path=one.png"], "one.png is damaged or not a checkpoint"),
    "method": (["fit", "--config", "quickstart.yaml", "--method", "nolla"], "nola"),
    "method without config": (["fit", "--method", "nola"], "--config"),
    "stray config": (["fit", "quickstart.yaml"], "--config quickstart.yaml"),
    "threads": ([*FIT, "--threads=0"], "threads is 0"),
    "seed": ([*FIT, "--model.run_seed=-1"], "-1 is not in bounds"),
    "split seed": ([*FIT, "--data.split_seed=-1"], "split_seed must not be below 0"),
    "smoothing": ([*FIT, "--model.label_smoothing=2"], "label_smoothing (2.0)"),
    "learning rate": ([*FIT, "--model.method.lr=-1"], "lr of NOLA is -1"),
    "devices": ([*FIT, *SMALL, "--trainer.devices=0"], "cannot be set up"),
    "strategy": ([*FIT, "--trainer.strategy=dpp"], "dpp"),
    "accelerator": ([*FIT, *SMALL, "--trainer.accelerator=tpu"], "cannot be set up"),
    "checkpoint": ([*FIT, "--ckpt_path=nowhere.ckpt"], "the checkpoint nowhere.ckpt does not exist"),
    "image size": ([*FIT, "--model.backbone.img_size=-4"], "img_size is -4"),
    "methods as a list": (["fit", "--config=quickstart.yaml", "--config=listed.yaml"], "`methods` of the config"),
    "no end": ([*FIT, "--trainer.max_epochs=-1"], "needs an end"),
    "batch size": (["predict", "--adapter=a", "--batch_size=0", "one.png"], "batch_size is 0"),
    "output folder": (["predict", "--adapter=a", "--out=no/p.csv", "one.png"], "the folder of no/p.csv"),
    "method class": (["fit", "--config", "quickstart.yaml", "--config", "magic.yaml"], "unknown method 'MAGIC'"),
    "method setting": ([*FIT, "--model.method.rnk=3"], "unknown setting 'rnk' of NOLA: did you mean rank"),
    "no config": (["fit"], "--config"),
    "empty config": ([*FIT, "--config=empty.yaml"], "the config empty.yaml is empty"),
    "a path as a tag": ([*FIT, "--model.backbone.tag=../x"], "unknown timm model '../x'"),
    "nothing to search": ([*FIT, "--search", "--config=once.yaml"], "--search needs several values of a setting"),
    "a search beyond a budget": (
        [*FIT, "--search", "--config=wide.yaml", "--model.method.max_bytes=3000"],
        "'nola' has bits 8, with which the file has",
    ),
    "search": (
        ["sweep", *FIT[1:], "--methods=nola", "--config=search.yaml"],
        "lrr 0.1: unknown setting 'lrr' of NOLA",
    ),
    "sweep shard": (["sweep", *FIT[1:], "--shard=3/2"], "is not a shard"),
    "sweep workers": (["sweep", *FIT[1:], "--workers=0"], "at least 1"),
    "sweep vary": (["sweep", *FIT[1:], "--vary=rank"], "--vary rank=1,4,16"),
    "sweep vary of no method": (["sweep", *FIT[1:], "--vary=rnak=1,2"], "has a setting 'rnak'"),
    "sweep vary with a tag": (["sweep", *FIT[1:], "--vary=rank=!!python/name:os.system"], "are not YAML: write them"),
    "a class of another package": ([*FIT, "--trainer.callbacks+=evil.Thing"], "--allow-import evil"),
    "a class of another package in a file": (["fit", "--config=evil.yaml"], "--allow-import evil"),
    "a sweep with a class of another package": (["sweep", "--config=evil.yaml"], "--allow-import evil"),
    "a file in place of settings": ([*FIT, "--data=typo.yaml"], "give the file by --config"),
    "a package that cannot be one": ([*FIT, "--allow-import=a b"], "give the name of a package"),
    "infinite": ([*FIT, "--data.batch_size=1e999"], "data.batch_size"),
    "dates for numbers": ([*FIT, "--model.method.num_basis=1e10"], "num_basis is '10000000000.0': it must be a whole"),
    "name of a method": (["fit", "--config=quickstart.yaml", "--config=method.yaml"], "its `method` a name"),
    "sweep without config": (["sweep"], "--config"),
    "sweep range": (["sweep", "--config", "quickstart.yaml", "--splits", "3-1"], "3-1"),
    "sweep method": (["sweep", "--config", "quickstart.yaml", "--methods", "nola,lora"], "lora-r4"),
    "backbone": ([*FIT, "--model.backbone.tag=vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
    "weights file": ([*FIT, "--model.backbone.file=no.pth"], "no.pth does not exist"),
    "target": ([*FIT, *SMALL, "--model.method.targets=[mpl]"], "unknown target 'mpl'"),
    "target without weight": ([*FIT, *SMALL, "--model.method.targets=[re:nothing]"], "matches no weight"),
    "data set": ([*FIT, "--data.dataset=digit"], "digits"),
    "shots": ([*FIT, "--data.shots=75"], "use 69 shots or fewer"),
    "folder": ([*FIT, "--data.dataset=folder", "--data.root=nowhere"], "nowhere"),
    "empty folder": ([*FIT, "--data.dataset=folder", "--data.root=empty"], "empty"),
    "no CIFAR": ([*FIT, "--data.dataset=cifar10", "--data.root=empty"], "download"),
    "no rows": (["report", "empty"], "no results in empty"),
    "no adapter": (["predict", "--adapter", "none.safetensors", "one.png"], "none.safetensors does not exist"),
    "no image": (["predict", "--adapter", "none.safetensors", "nothing.png"], "nothing.png does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence_and_status_2(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "null.yaml").write_text("model: {optimizer: {class_path: SGD, init_args: null}}")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "typo.yaml").write_text("data: {augmentatoin: light}")
    (tmp_path / "word.yaml").write_text("model: {method: NOLA}")
    (tmp_path / "tagg.yaml").write_text("model: {backbone: {tagg: x}}")
    (tmp_path / "nested.yaml").write_text("data: {init_args: {shots: 5}}")
    (tmp_path / "listed.yaml").write_text("methods: [nola]")
    (tmp_path / "magic.yaml").write_text("methods: {nola: {class_path: MAGIC}}")
    (tmp_path / "evil.yaml").write_text("{method: a, methods: {a: {class_path: evil.Thing}}, model: {}}")
    (tmp_path / "method.yaml").write_text("method: [nola]")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "once.yaml").write_text("methods: {nola: {search: {lr: [0.1], c: [8]}}}")
    (tmp_path / "wide.yaml").write_text("methods: {nola: {init_args: {max_bytes: 9000}, search: {bits: [4, 8]}}}")
    (tmp_path / "search.yaml").write_text("methods: {nola: {search: {lrr: [0.1]}}}")
    (tmp_path / "empty").mkdir()
    digit(tmp_path / "one.png", 0)
    arguments, expected = MISTAKES[name]
    assert main(arguments) == 2
    errors = capfd.readouterr().err.strip()
    assert expected in errors and "Traceback" not in errors
    assert errors.count("\n") == 0, errors
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.tmp"))


def test_a_corrupt_image_is_named(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for name in ("a b", "ç"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for index in range(3):
                digit(tmp_path / "tree" / split / name / f"{index}.png", index)
    bad = tmp_path / "tree" / "train" / "ç" / "1.png"
    bad.write_bytes(bad.read_bytes()[:80])
    fit = ["fit", "--config=quickstart.yaml", "--method=1nn", "--data.dataset=folder", "--data.root=tree", *QUICK[:-1]]
    assert main([*fit, "--data.shots=3"]) == 2
    assert "ç/1.png" in capsys.readouterr().err
    assert main([*fit, "--data.shots=4"]) == 2
    errors = capsys.readouterr().err
    assert "a b" in errors and "3" in errors
    assert main(["predict", "--adapter", str(adapter), str(bad), "--out", "p.csv"]) == 2
    assert "ç/1.png" in capsys.readouterr().err
    assert not Path("p.csv").exists()
    good = bad.with_name("0.png")
    assert main(["predict", "--adapter", str(adapter), str(bad), str(good)]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(str(good)) and "1 of 2 images have no prediction" in printed.err


def test_a_small_folder_from_run_to_prediction(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        for name, first in (("zero", 0), ("one one", 1)):
            (tmp_path / "a" / "tree" / split / name).mkdir(parents=True)
            for index in range(2):
                digit(tmp_path / "a" / "tree" / split / name / f"{index}.png", first + 10 * index)
    monkeypatch.setenv("NOLA_VISION_DATA", str(tmp_path / "a" / "tree"))
    options = ["--config=quickstart.yaml", "--data.dataset=folder", "--data.shots=all", *SMALL[:-1]]
    # five images a class and fewer leave no validation pool: each method keeps its own rate
    assert main(["sweep", *options, "--methods=linear,nola", "--splits=0", "--inits=0", "--basis-seed=7"]) == 0
    printed = capsys.readouterr().out
    assert "there is no validation pool" in printed and "folder.tree-allshot" in printed
    rows = [row for row in store.read_rows("runs")[0] if row.stage == "final"]
    assert {row.learning_rate for row in rows} == {0.05, 0.02} and {row.val_accuracy for row in rows} == {None}
    assert {(row.run_seed, row.basis_seed) for row in rows} == {(0, 7)}
    path = next(Path("runs").rglob("nola/split0*/adapter.safetensors"))
    assert main(["predict", "--adapter", str(path), str(tmp_path / "a")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    # another tree of the same name is another run
    (tmp_path / "a").rename(tmp_path / "b")
    digit(tmp_path / "b" / "tree" / "train" / "zero" / "2.png", 20)
    monkeypatch.setenv("NOLA_VISION_DATA", str(tmp_path / "b" / "tree"))
    assert main(["fit", *options, "--method=linear"]) == 0
    assert len([row for row in trained_rows("runs") if row.stage == "final"]) == 3


def test_interrupted_sweeps_end_with_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "execute", interrupt)
    assert main(["sweep", "--config=quickstart.yaml", "--methods=linear", *QUICK]) == 130


def broken(error: BaseException):  # noqa: ANN201
    def fail(*_: object) -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (ValueError("first line\nsecond \x1b[31mline"), 1, r"unexpected ValueError at nola_vision/cli/main.py:"),
        (OSError(28, "No space left on device"), 2, "No space left on device: free disk space"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), 2, "No such file or directory (x.csv)"),
        (MemoryError(), 1, "out of memory at nola_vision/cli/main.py:"),
        (RecursionError("too deep"), 1, "unexpected RecursionError at"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 1, "unexpected UnicodeEncodeError at"),
        (configs.NolaVisionError("a user error: fix it"), 2, "nola-vision: a user error: fix it"),
        (configs.NolaVisionError("long " * 9999), 2, "long long"),
    ],
)
def test_any_error_is_one_line_and_debug_prints_its_traceback(
    error: Exception, status: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configs, "main", broken(error))
    assert main(["configs", "list"]) == status
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1 and "\x1b" not in printed and len(printed) < 2100
    for words in (["--debug", "configs"], ["configs", "--debug"], ["configs", "list", "--debug", "--", "x"]):
        assert main(words) == status
        printed = capsys.readouterr().err
        assert printed.startswith("Traceback") and "raise error" in printed and expected in printed.splitlines()[-1]
    assert main(["configs", "--", "--debug"]) == status and "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("NOLA_VISION_DEBUG", "1")
    assert main(["configs"]) == status and "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("NOLA_VISION_DEBUG", "0")
    assert main(["configs"]) == status and "Traceback" not in capsys.readouterr().err


def test_printing_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(*_: object) -> int:
        print("a\U0001f600\udcdf")
        raise configs.NolaVisionError("b\U0001f600\udcdf")

    monkeypatch.setattr(configs, "main", show)
    for encoding in ("cp1252", "ascii", "utf-8"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert main(["configs"]) == 2
        for stream, shown in zip(streams, (r"\udcdf", r"\xdf"), strict=True):  # a message shows a name's bytes
            stream.flush()
            assert shown in stream.buffer.getvalue().decode(encoding)
