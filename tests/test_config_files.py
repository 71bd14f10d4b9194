"""Configs by name: every cell of the paper is composed, understood, of the paper's size, and carries its figures."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from nola_vision.cli.main import main
from nola_vision.config import parse
from nola_vision.config_files import cells, compose, dump, load_config, load_configs, part_names, split_cell
from nola_vision.data.datasets import DATASETS
from nola_vision.errors import NolaVisionError
from nola_vision.methods import FullFinetune, from_dict, make_stack
from nola_vision.results import identity
from nola_vision.results.published import published_figures

PAPER = [name for name in cells() if load_config(name)["published"]]
BACKBONES = {"vitb": "ViT-B", "vitb_mae": "ViT-B-MAE", "vitl": "ViT-L", "vitl_mae": "ViT-L-MAE"}


def test_the_cells_carry_every_figure_that_the_paper_prints() -> None:
    figures = published_figures()
    few_shot = figures[figures["shots"].notna()]
    carried = [line for name in PAPER for line in load_config(name)["published"]]
    # of Table 10, the row that repeats Table 6 digit for digit is left out
    twice = (few_shot["table"] == 10) & (few_shot["method"] == "NOLA-MLP")
    assert len(PAPER) == 40 and len(carried) == len(few_shot) - int(twice.sum())
    assert sorted(line["mean"] for line in carried) == sorted(few_shot[~twice]["mean"])
    notes = {line["note"] for line in carried if "note" in line}
    assert any("ViT-Tiny" in note for note in notes) and any("digit for digit" in note for note in notes)
    for config, count in (("resnet20_cifar10_scratch", 4), ("resnet18_imagenet100_scratch", 5)):
        assert len(load_config(config)["published"]) == count


def test_one_figure_looked_up_by_hand() -> None:
    lines = {line["entry"]: line for line in load_config("vitl_cifar100_5shot.yaml")["published"]}
    assert lines["nola-mlp-94k"] == {"entry": "nola-mlp-94k", "table": 6, "params": "94K", "mean": 83.6, "std": 0.9}
    (line,) = [x for x in load_config("vitb_cifar10_5shot")["published"] if x["entry"] == "nola-qv"]
    assert (line["table"], line["mean"], line["std"]) == (10, 87.0, 0.9) and "read as ViT-B" in line["note"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_entry_has_the_size_that_the_paper_prints(backbone: str) -> None:
    config = compose(backbone, "cifar100", 5)
    with torch.device("meta"):
        model = timm.create_model(config["model"]["backbone"]["tag"], num_classes=0).requires_grad_(False)
    printed = {line["entry"]: line for line in config["published"]}
    assert printed.keys() == config["methods"].keys() - ({"nola-qv"} if backbone == "vitb_mae" else set())
    for name in printed:
        method = from_dict(identity.resolve(config, name)["model"]["method"])
        if isinstance(method, FullFinetune):
            count = sum(parameter.numel() for parameter in model.parameters())
        else:
            count = sum(parameter.numel() for parameter in make_stack(model, method, 100).adapter_parameters())
        said = printed[name].get("params", "0")
        if "note" in printed[name] and "ViT-Tiny" in printed[name]["note"]:
            assert said == "5.3M" and round(count / 2**20) == 82
        elif said.endswith("K"):
            assert round(1000 * count / 2**20) == int(said[:-1])
        else:
            assert round(count / 2**20) == float(said.removesuffix("M"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_entry_of_a_cell_is_understood(backbone: str) -> None:
    config = compose(backbone, "cifar100", 10, "released")
    for name in config["methods"]:
        plain = parse(identity.resolve(config, name))
        assert plain["data"]["shots"] == 10 and plain["protocol"] == "released"
        assert plain["model"]["backbone"]["normalisation"] == "imagenet"


def test_what_the_presets_say() -> None:
    default, paper, released = (compose("vitb", "pets", 5, name) for name in ("default", "paper", "released"))
    assert paper["data"]["batch_size"] == 64 and released["data"]["batch_size"] == 16
    for preset in (paper, released):
        assert preset["data"]["augmentation"] == "released" and preset["trainer"]["gradient_clip_val"] is None
        assert preset["model"] | {"backbone": None} == {
            "label_smoothing": 0.1, "warmup_epochs": 0, "min_lr": 1e-6, "backbone": None,
        }  # fmt: skip
        assert preset["methods"]["nola-mlp"]["learning_rates"] == [5e-3, 1e-3, 5e-4]
        assert preset["methods"]["full-ft"]["learning_rates"] == [8e-5, 5e-5, 3e-5, 1e-5]
        assert preset["methods"]["nola-mlp"]["init_args"]["c"] == 1
    assert "normalisation" not in paper["model"]["backbone"]
    assert released["methods"]["nola-mlp"]["init_args"]["start"] == "released"
    assert default["model"]["warmup_epochs"] == 5 and default["trainer"]["gradient_clip_val"] == 1


def test_every_data_set_of_a_cell_is_in_the_registry() -> None:
    assert {compose("vitb", name, 5)["data"]["dataset"] for name in part_names("datasets")} <= DATASETS.keys()


def test_names_of_cells() -> None:
    assert split_cell("vitl_mae_sun397_16shot_paper") == ("vitl_mae", "sun397", 16, "paper")
    assert split_cell("vitb_pets_5shot") == ("vitb", "pets", 5, "default")
    for name in ("vitb_pets_0shot", "vitb_pets_5shot_mine", "vitb_5shot", "resnet_pets_5shot", "vitb_pets_05shot"):
        assert split_cell(name) is None
    with pytest.raises(NolaVisionError, match=r"did you mean vitl_cifar100_5shot\.yaml"):
        load_config("vitl_cifar100_5shots.yaml")


def test_the_configs_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}.yaml" in printed for name in (*PAPER, "quickstart", "resnet20_cifar10_scratch"))
    assert main(["configs", "show", "vitl_cifar100_5shot.yaml"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == load_config("vitl_cifar100_5shot") == yaml.safe_load(dump(yaml.safe_load(shown)))
    assert main(["configs", "copy", "vitl_cifar100_5shot.yaml"]) == 0
    capsys.readouterr()
    copied = Path("vitl_cifar100_5shot.yaml")
    copied.write_text(copied.read_text().replace("shots: 5", "shots: 7"))
    for name in ("vitl_cifar100_5shot.yaml", "vitl_cifar100_5shot"):  # a local file wins
        assert load_configs([name])["data"]["shots"] == 7
    assert main(["configs", "copy", "vitl_cifar100_5shot", "mine.yaml"]) == 0
    assert capsys.readouterr().out == "mine.yaml: written\n"
    for words, expected in (
        (["copy", "vitl_cifar100_5shot.yaml"], "exists already"),
        (["show"], "needs the name"),
        (["list", "quickstart"], "takes no name"),
        (["show", "vitx_cifar100_5shot"], "did you mean"),
        (["show", "vitl_cifar100_5shot_papr"], "did you mean vitl_cifar100_5shot_paper.yaml"),
        (["show", "."], "is a folder"),
        (["copy", "quickstart", "."], "is a folder"),
        (["copy", "quickstart.yaml", "no/where.yaml"], "cannot be written"),
        (["print"], "invalid choice"),
    ):
        assert main(["configs", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error and "\n" not in error
