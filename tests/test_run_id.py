"""A run's identity: choosing an entry, the cell's name, what the hash covers and what it leaves out, the folder."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id

CONFIG: dict[str, Any] = {
    "protocol": "quickstart",
    "method": "nola",
    "methods": {
        "nn1": {"class_path": "NearestNeighbor"},
        "linear": {"class_path": "LinearProbe", "init_args": {"lr": 0.005}, "search": {"lr": [0.005, 0.001]}},
        "nola": {
            "class_path": "NOLA",
            "init_args": {"targets": ["qkv", "mlp"], "rank": 4, "lr": 0.005},
            "search": {"lr": [0.005, 0.001, 0.0005]},
        },
    },
    "model": {
        "backbone": {"tag": "vit_glyph_patch4_32.glyphs", "file": "/here/glyph.safetensors"},
        "run_seed": 0,
        "basis_seed": None,
        "warmup_epochs": 5,
    },
    "data": {"dataset": "digits", "root": None, "shots": 5, "split_seed": 0, "batch_size": 16, "num_workers": 0},
    "trainer": {"max_epochs": 50, "gradient_clip_val": 1.0, "accelerator": "cpu", "devices": 1, "logger": False},
    "threads": 2,
}


def changed(path: str, value: Any, method: str = "nola") -> dict[str, Any]:
    """The run config of an entry with one value at a dotted path put in."""
    run_config = run_id.resolve(CONFIG, method)
    place = run_config
    *sections, key = path.split(".")
    for section in sections:
        place = place[section]
    place[key] = value
    return run_config


def hashes(path: str, value: Any, method: str = "nola") -> bool:
    """Say whether a change of one value changes the run's hash."""
    before = run_id.run_hash(run_id.resolve(CONFIG, method), "final")
    return run_id.run_hash(changed(path, value, method), "final") != before


def test_resolve_chooses_the_configs_own_entry_and_drops_the_others() -> None:
    run_config = run_id.resolve(CONFIG)
    assert run_config["method"] == "nola"
    assert run_config["model"]["method"] == {
        "class_path": "NOLA",
        "init_args": {"targets": ["qkv", "mlp"], "rank": 4, "lr": 0.005},
    }
    assert "methods" not in run_config


def test_resolve_of_a_named_entry_without_settings() -> None:
    run_config = run_id.resolve(CONFIG, "nn1")
    assert run_config["method"] == "nn1"
    assert run_config["model"]["method"] == {"class_path": "NearestNeighbor", "init_args": {}}


def test_resolve_leaves_its_input_alone() -> None:
    before = copy.deepcopy(CONFIG)
    run_config = run_id.resolve(CONFIG)
    run_config["model"]["method"]["init_args"]["targets"].append("conv")
    run_config["data"]["split_seed"] = 9
    assert CONFIG == before


def test_an_unknown_entry_is_refused_with_the_close_names() -> None:
    with pytest.raises(NolaVisionError, match=r"unknown method 'nolla' in the config: did you mean nola\?"):
        run_id.resolve(CONFIG, "nolla")
    with pytest.raises(NolaVisionError, match="nn1, linear, nola"):
        run_id.resolve(CONFIG, "zzz")


def with_search(search: Any) -> dict[str, Any]:
    """Entries of which the first has a search."""
    sized = {"class_path": "NOLA", "search": {"lr": [0.1]}, "budgets": [2000]}
    return {"x": {"class_path": "NOLA", "search": search}, "y": {"class_path": "NOLA"}, "sized": sized}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a/b": {"class_path": "NOLA"}}, "folder's name"),
        ({"..": {"class_path": "NOLA"}}, "folder's name"),
        ({7: {"class_path": "NOLA"}}, "folder's name"),
        ({"x": {"init_args": {}}}, "class_path"),
        ({"x": "NOLA"}, "class_path"),
        (None, "lacks a value for `methods`"),
        ({"x": {"class_path": "NOLA", "learning_rates": [0.1]}}, "unknown key 'learning_rates' .* search"),
        (with_search([0.1, 0.2]), r"`search` of the method 'x' is \[0.1, 0.2\]: write it like \{lr:"),
        (with_search({"lr": 0.1}), "has 0.1 for lr: list the values to try"),
        (with_search({"c": [2], "lr": []}), r"has \[\] for lr: list"),
        (with_search("yy"), r"names an unknown method 'yy': did you mean y\?"),
        (with_search("x"), "names 'x': name an entry with a mapping `search`"),
        (with_search("y"), "names 'y': name an entry with a mapping `search`"),
        (with_search("sized"), "names 'sized': name an entry with a mapping `search`, without budgets"),
    ],
)
def test_a_malformed_entry_is_refused(methods: Any, message: str) -> None:
    name = next(iter(methods)) if methods else "x"
    with pytest.raises(NolaVisionError, match=message):
        run_id.resolve({**CONFIG, "methods": methods}, name)


def test_a_missing_value_is_named() -> None:
    run_config = run_id.resolve(CONFIG)
    del run_config["data"]["shots"]
    with pytest.raises(NolaVisionError, match="`data.shots`"):
        run_id.cell_name(run_config)


def test_cell_names() -> None:
    assert run_id.cell_name(run_id.resolve(CONFIG)) == "vit_glyph_patch4_32.glyphs+glyph-digits-5shot-quickstart"
    without_file = changed("model.backbone.file", None)
    assert run_id.cell_name(without_file) == "vit_glyph_patch4_32.glyphs-digits-5shot-quickstart"
    without_file["data"] |= {"dataset": "folder", "root": "/photos/my flowers/"}
    assert run_id.cell_name(without_file) == "vit_glyph_patch4_32.glyphs-folder.my_flowers-5shot-quickstart"
    for dataset, name in {"hf:/home/me/pets#breed": "hf_pets_breed", "hf:me/pets": "hf_me_pets"}.items():
        without_file["data"]["dataset"] = dataset
        assert run_id.cell_name(without_file) == f"vit_glyph_patch4_32.glyphs-{name}-5shot-quickstart"


def test_a_cell_name_is_one_safe_folder() -> None:
    name = run_id.cell_name(changed("protocol", "../a b:c/d"))
    assert re.fullmatch(r"[\w.+-]+", name)


@pytest.mark.parametrize("root", [".", "/", "..", "a/.."])
def test_a_folder_data_set_needs_a_name(root: str) -> None:
    run_config = changed("data.dataset", "folder")
    run_config["data"]["root"] = root
    with pytest.raises(NolaVisionError, match="write out the folder's name"):
        run_id.cell_name(run_config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("protocol", "other"),
        ("method", "other"),
        ("out", "runs"),
        ("ckpt_path", "last.ckpt"),
        ("data.root", "/elsewhere"),
        ("data.num_workers", 4),
        ("data.download", True),
        ("data.memory_limit_mib", 10),
        ("data.eval_batch_size", 512),
        ("model.backbone.file", "/there/glyph.safetensors"),
        ("trainer.logger", {"class_path": "CSVLogger"}),
        ("trainer.devices", "1"),
        ("trainer.devices", [3]),
        ("trainer.devices", None),
        ("trainer.strategy", "ddp"),
        ("trainer.default_root_dir", "/tmp"),
        ("trainer.log_every_n_steps", 1),
        ("trainer.profiler", "simple"),
        ("trainer.enable_checkpointing", False),
        ("trainer.enable_progress_bar", False),
        ("trainer.enable_model_summary", False),
        ("trainer.callbacks", None),
        ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.RichProgressBar"}]),
        ("trainer.callbacks", {"class_path": "TQDMProgressBar"}),
        ("trainer.gradient_clip_val", 1),
        ("model.method.class_path", "nola_vision.adapters.methods.nola.NOLA"),
        ("model.method.init_args.targets", ("qkv", "mlp")),
    ],
)
def test_the_hash_leaves_out_what_cannot_change_the_result(path: str, value: Any) -> None:
    assert not hashes(path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("threads", 1),
        ("data.dataset", "fashion"),
        ("data.shots", 10),
        ("data.split_seed", 1),
        ("data.batch_size", 64),
        ("model.run_seed", 1),
        ("model.basis_seed", 0),
        ("model.warmup_epochs", 0),
        ("model.backbone.tag", "vit_base_patch16_224.mae"),
        ("model.backbone.file", "/here/other.safetensors"),
        ("model.method.class_path", "LoRA"),
        ("model.method.class_path", "mine.NOLA"),
        ("model.method.init_args.lr", 0.001),
        ("model.method.init_args.targets", ["mlp", "qkv"]),
        ("trainer.max_epochs", 51),
        ("trainer.gradient_clip_val", None),
        ("trainer.precision", "bf16-mixed"),
        ("trainer.callbacks", [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]),
    ],
)
def test_the_hash_covers_what_can_change_the_result(path: str, value: Any) -> None:
    assert hashes(path, value)


def test_the_hash_knows_a_folder_data_set_by_its_name_alone() -> None:
    def run_hash(root: str, dataset: str = "folder") -> str:
        run_config = changed("data.dataset", dataset)
        run_config["data"]["root"] = root
        return run_id.run_hash(run_config, "final")

    assert run_hash("/a/flowers") == run_hash("/b/flowers") != run_hash("/a/birds")
    assert run_hash("C:\\b\\flowers\\") == run_hash("/a/flowers")
    assert run_hash("", "hf:/a/pets") == run_hash("", "hf:/b/pets") != run_hash("", "hf:/b/pets#breed")
    assert run_hash("", "hf:a/pets") != run_hash("", "hf:b/pets")


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    run_config = run_id.resolve(CONFIG)
    turned = {key: run_config[key] for key in reversed(run_config)}
    turned["model"] = {key: run_config["model"][key] for key in reversed(run_config["model"])}
    assert run_id.run_hash(turned, "final") == run_id.run_hash(run_config, "final")


def test_the_hash_is_ten_hex_digits_and_the_stages_differ() -> None:
    run_config = run_id.resolve(CONFIG)
    final, search = run_id.run_hash(run_config, "final"), run_id.run_hash(run_config, "search")
    assert re.fullmatch("[0-9a-f]{10}", final) and re.fullmatch("[0-9a-f]{10}", search)
    assert final != search


def test_hashes_stay_what_they_are() -> None:
    """A change here orphans every row that users have: it must be meant."""
    assert run_id.run_hash(run_id.resolve(CONFIG), "final") == "b11df53dba"
    assert run_id.entry_hash(run_id.resolve(CONFIG)) == "b639b19f86"


def test_no_seed_of_training_enters_the_hash_of_nearest_neighbour() -> None:
    assert not hashes("model.run_seed", 3, method="nn1")
    assert not hashes("model.basis_seed", 3, method="nn1")
    assert hashes("data.split_seed", 3, method="nn1")


def test_hashing_leaves_its_input_alone() -> None:
    run_config = run_id.resolve(CONFIG)
    before = copy.deepcopy(run_config)
    run_id.run_hash(run_config, "final")
    run_id.entry_hash(run_config)
    assert run_config == before


def test_runs_of_one_entry_share_the_entry_hash() -> None:
    base = run_id.entry_hash(run_id.resolve(CONFIG))
    assert run_id.entry_hash(changed("data.split_seed", 3)) == base
    assert run_id.entry_hash(changed("model.run_seed", 3)) == base
    assert run_id.entry_hash(changed("model.method.init_args.rank", 1)) != base


def test_a_fixed_basis_seed_is_a_setting_of_the_entry() -> None:
    fixed = changed("model.basis_seed", 1)
    assert run_id.entry_hash(fixed) != run_id.entry_hash(run_id.resolve(CONFIG))
    for run_seed in (0, 1, 2):  # with init 1 the two seeds are equal, and it is still the same entry
        of_init = copy.deepcopy(fixed)
        of_init["model"]["run_seed"] = run_seed
        assert run_id.entry_hash(of_init) == run_id.entry_hash(fixed)


def test_run_folders() -> None:
    cell = "vit_glyph_patch4_32.glyphs+glyph-digits-5shot-quickstart"
    run_config = changed("data.split_seed", 2)
    run_config["model"]["run_seed"] = 1
    final, search = run_id.run_hash(run_config, "final"), run_id.run_hash(run_config, "search")
    assert run_id.run_folder("runs", run_config, "final") == Path("runs") / cell / "nola" / f"split2-init1-{final}"
    assert run_id.run_folder("runs", run_config, "search").name == f"search-split2-init1-{search}"
    neighbour = run_id.resolve(CONFIG, "nn1")
    expected = Path("runs") / cell / "nn1" / f"split0-{run_id.run_hash(neighbour, 'final')}"
    assert run_id.run_folder("runs", neighbour, "final") == expected


def test_several_devices_are_another_run() -> None:
    def of(devices: Any, **trainer: Any) -> str:
        run_config = changed("trainer.devices", devices)
        run_config["trainer"] |= trainer
        return run_id.run_hash(run_config, "final")

    assert len({of(1), of(2), of(4), of("auto"), of(-1), of(1, num_nodes=2)}) == 6
    assert of(2) == of([0, 1]) == of("0,1") == of("2,3,")
    assert of("9" * 5000) != of(1)
