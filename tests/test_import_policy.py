"""Configs from strangers are data: which classes they may name, and what reading one may cost."""

import dataclasses
import gc
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings

import fuzz_configs
from fuzzing import cheap
from nola_vision import BackboneSpec, LoRAXS, VeRA, adapt, load_adapter
from nola_vision.adapters.methods import Adapter, LoRA, registry
from nola_vision.adapters.target import Dense
from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import overlay
from nola_vision.runs import import_policy, run_id, store
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import build, parse
from tiny import TINY, trained_rows

QUICK = run_id.resolve(load_configs(["quickstart.yaml"]), "linear")
SPEC = BackboneSpec("test_vit.r160_in1k", base="random")
FAST = ["--threads=1", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--data.test_limit=20"]
MINE = """
import lightning as L, nola_vision
class Count(L.Callback):
    def on_test_end(self, trainer, pl_module):
        print("counted")
def adam(params): pass
class Other: pass
class Plugin(nola_vision.LinearProbe): pass
class NOLA(nola_vision.LinearProbe): pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported and that no config may name without leave."""
    (tmp_path / "mine_to_import.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    yield "mine_to_import"
    sys.modules.pop("mine_to_import", None)
    gc.collect()  # jsonargparse finds classes by their short names among all subclasses that are alive


def spec(path: str, key: str = "init_args", **args: Any) -> dict[str, Any]:
    return {"class_path": path, key: args}


HOSTILE = {
    "optimizer": ({"model": {"optimizer": spec("os.system")}}, "'os.system' may not be imported"),
    "method": ({"model": {"method": spec("evil.Thing")}}, "--allow-import evil"),
    "method of a known name": ({"model": {"method": spec("evil.LinearProbe")}}, "--allow-import evil"),
    "callback": ({"trainer": {"callbacks": [spec("evil.Thing")]}}, "--allow-import evil"),
    "logger": ({"trainer": {"logger": spec("evil.Thing")}}, "--allow-import evil"),
    "plugin": ({"trainer": {"plugins": [spec("evil.Thing")]}}, "--allow-import evil"),
    "profiler": ({"trainer": {"profiler": spec("evil.Thing")}}, "--allow-import evil"),
    "what a module of Lightning's imports": (
        {"trainer": {"callbacks": [spec("lightning.pytorch.trainer.trainer.os.system")]}},
        "'posix.system' may not be imported",
    ),
    "a wrapper": ({"model": {"optimizer": spec("torch.optim.optimizer.functools.partial")}}, "functools.partial"),
    "a function": ({"model": {"optimizer": "torch.optim.adam.adam"}}, "torch.optim.adam.adam"),
    "a class of another kind": ({"model": {"optimizer": spec("nola_vision.runs.parsing.RunCLI")}}, "RunCLI"),
    "nested": (
        {"trainer": {"callbacks": [spec("LambdaCallback", on_fit_start="os.system")]}},
        "'os.system' may not be imported",
    ),
    "a function in a callback": (
        {"trainer": {"callbacks": [spec("LambdaCallback", on_fit_start="nola_vision.cli.main.main")]}},
        "nola_vision.cli.main.main",
    ),
    "in what is passed on": (
        {"trainer": {"callbacks": [spec("LambdaCallback", "dict_kwargs", x=spec("os.system"))]}},
        "'os.system' may not be imported",
    ),
    "a logger to a server": ({"trainer": {"logger": [spec("WandbLogger")]}}, "--allow-import wandb"),
    "an upload": ({"trainer": {"model_registry": "theirs/model"}}, "--allow-import litmodels"),
    "its own leave": ({"allow_import": ["evil"]}, "--allow-import"),
    "the parser": ({"trainer": {"callbacks": [spec("jsonargparse.set_parsing_settings")]}}, "may not be imported"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_names_classes_of_known_packages(name: str, tmp_path: Path) -> None:
    changes, expected = HOSTILE[name]
    (tmp_path / "evil.py").write_text("raise AssertionError('a config imported it')")
    with fuzz_configs.nothing_runs(tmp_path), pytest.raises(NolaVisionError) as refused:
        parse(overlay(QUICK, changes))
    assert expected in str(refused.value) and "evil" not in sys.modules


def test_options_are_under_the_same_policy(mine: str) -> None:
    for option in (
        "--model.optimizer=os.system",
        f"--trainer.callbacks+={mine}.Count",
        f"--trainer.callbacks+={{class_path: {mine}.Count}}",
        f"--model.method={mine}.Plugin",
        f"--model.method.class_path={mine}.Plugin",
        f"--trainer.plugins+={mine}.Other",
    ):
        with pytest.raises(NolaVisionError, match="may not be imported"):
            parse(QUICK, [option])
    with pytest.raises(NolaVisionError, match="is not a class|function"):
        parse(QUICK, ["--model.optimizer=torch.optim.adam.adam"])
    assert mine not in sys.modules


def test_what_a_path_resolves_to_is_checked() -> None:
    for path, expected in (
        ("lightning.pytorch.cli.ArgumentParser", "'jsonargparse"),  # a class, defined elsewhere
        ("lightning.pytorch.Trainer", "name a subclass of"),
        ("torch.optim.adam.adam", "is not a class"),
        ("lightning.pytorch.callbacks.Nothing", "cannot be imported"),
        ("os.system", "may not be imported"),
    ):
        with pytest.raises(NolaVisionError, match=expected):
            import_policy.check_classes({"trainer": {"callbacks": [{"class_path": path}]}}, [])
    for path in ("lightning.pytorch.callbacks.Timer", "torch.optim.SGD", "torch.optim.lr_scheduler.StepLR"):
        import_policy.check_classes({"x": {"class_path": path}}, [])


def test_allow_import_covers_a_run_from_config_to_row(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=quickstart.yaml", "--method=1nn", *FAST]
    assert main([*fit, f"--trainer.callbacks+={mine}.Count", "--allow-import", mine]) == 0
    ((row,), _) = store.read_rows("runs")
    assert "counted" in capsys.readouterr().out and row.status == "completed"
    # the leave is that of this run alone, and not part of the hash
    del sys.modules[mine]
    for option in (f"--trainer.callbacks+={mine}.Count", f"--model.method={mine}.Plugin"):
        with pytest.raises(NolaVisionError, match="may not be imported"):
            parse(QUICK, [option])
    assert mine not in sys.modules
    assert run_id.run_hash(parse(QUICK, [], [mine]), "final") == run_id.run_hash(parse(QUICK), "final")
    # what is allowed must still be of a kind that a run has a use for
    with pytest.raises(NolaVisionError, match="not a subclass of .*Method"):
        parse(QUICK, [f"--model.method={mine}.Other"], [mine])
    with pytest.raises(NolaVisionError, match="name of another method"):
        parse(QUICK, [f"--model.method={mine}.NOLA"], [mine])
    with pytest.raises(NolaVisionError, match="adam"):
        parse(QUICK, [f"--model.optimizer={mine}.adam"], [mine])
    for name in ("jsonargparse", "a-b", "", "os;"):
        with pytest.raises(NolaVisionError, match="--allow-import"):
            parse(QUICK, [], [name])


def install_plugin(folder: Path, stated: str) -> None:
    """Installs a package that states a method, as pip leaves it on disk."""
    package = stated.partition(":")[0]
    (info := folder / f"{package}-1.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{registry.PLUGINS}]\nplugin = {stated}\n")


def test_a_registered_plugin_is_a_method(mine: str, tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(f"from {mine} import Plugin")
    install_plugin(tmp_path, "outer:Plugin")
    parse(QUICK)
    assert mine not in sys.modules  # a plug-in that no config names is not imported
    with pytest.raises(NolaVisionError, match=r"no method 'outer.Plugni': did you mean outer.Plugin\?"):
        parse(overlay(QUICK, {"model": {"method": spec("outer.Plugni")}}))
    for path in ("outer.Plugin", f"{mine}.Plugin", "Plugin"):  # as stated, where it is defined, and its short name
        run_config = parse(overlay(QUICK, {"model": {"method": spec(path, lr=0.5)}}), FAST)
        task = build(run_config, tmp_path / "run").model
        assert type(task.method).__name__ == "Plugin" and task.method.lr == 0.5
    with pytest.raises(NolaVisionError, match="may not be imported"):
        parse(overlay(QUICK, {"trainer": {"callbacks": [spec(f"{mine}.Count")]}}))
    with pytest.raises(NolaVisionError, match="'elsewhere.Other' may not be imported"):
        parse(overlay(QUICK, {"model": {"method": spec("elsewhere.Other")}}))


PAGE = Path(__file__).parents[1] / "docs" / "own-method.md"
GAIN = re.search("```python\n(.*?)```", PAGE.read_text(), re.S)[1]  # type: ignore[index]


def test_plugins_of_other_packages_and_of_one_name(mine: str, tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "renames.py").write_text(f"from {mine} import Plugin as Other")
    (tmp_path / "second.py").write_text("import nola_vision\nclass Plugin(nola_vision.LinearProbe): pass")
    for stated in ("stops:Stops", "renames:Other", "garbage ! in it", f"{mine}:Plugin", "second:Plugin"):
        install_plugin(tmp_path, stated)
    for _ in range(2):  # a refusal registers nothing
        with pytest.raises(NolaVisionError, match=f"(second.Plugin|{mine}.Plugin) .*different methods of one name"):
            registry.from_dict(spec("Plugin"))
    for name, cause in (("Stops", r"stops:Stops cannot be imported: SystemExit"), ("Other", "a class named Plugin")):
        with pytest.raises(NolaVisionError, match=cause):
            registry.from_dict(spec(name))
    chosen = parse(overlay(QUICK, {"model": {"method": spec("second.Plugin")}}))  # the path decides
    assert type(registry.from_dict(chosen["model"]["method"])).__module__ == "second"


def test_another_class_starts_from_its_own_defaults() -> None:
    for option in ("--model.method=LoRAXS", "--model.method.class_path=LoRAXS", "--model.method={class_path: LoRAXS}"):
        settings = parse(QUICK, ["--method=x", option, "--model.method.lr=0.5"])["model"]["method"]["init_args"]
        assert {**settings, "targets": ("qkv",)} == {**dataclasses.asdict(LoRAXS()), "lr": 0.5}
    lora = run_id.resolve(load_configs(["quickstart.yaml"]), "lora-r4")
    assert parse(lora, ["--model.method=LoRA"])["model"]["method"]["init_args"]["targets"] == ["qkv"]
    assert parse(lora, ["--model.method=VeRA"])["model"]["method"]["init_args"]["rank"] == VeRA().rank


def test_what_a_method_states_wrongly_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    right: dict[str, Any] = {}
    exec(GAIN, right)
    right = right["RowGain"].__dict__
    changes = right["changes"]

    def refused(cause: str, **wrong: Any) -> None:
        parts = {name: right[name] for name in ("groups", "initial", "fixed", "changes")} | wrong
        made = dataclass(frozen=True, kw_only=True)(type("Wrong", (Adapter,), {**parts, "scale": 1.0}))
        registry.METHODS["Wrong"] = made
        with pytest.raises(NolaVisionError, match=cause):
            bank = adapt(SPEC, made(targets=["mlp"]), ["a", "b"]).bank
            bank.changes()

    refused(r"Wrong.groups leaves out 12 of 12 targets, such as blocks.0.mlp.fc1.weight", groups=lambda *_: [])
    refused("Wrong.groups gives .* twice", groups=lambda *args: [*right["groups"](*args), *right["groups"](*args)])
    refused("Wrong does not define initial", initial=Adapter.initial)
    refused("Wrong does not define changes", changes=Adapter.changes)
    refused(r"Wrong.changes gives Dense None for", changes=lambda *_: {})
    turned = {"changes": lambda *args: {n: Dense(c.value.transpose(-1, -2)) for n, c in changes(*args).items()}}
    refused(r"Dense \[1, 64, 192\] for .*: it must be Dense \[1, 192, 64\]", **turned)
    refused("Dense .192, 64. for", changes=lambda *a: {n: Dense(c.value[0]) for n, c in changes(*a).items()})
    refused("initial gives gain as torch.int64", initial=lambda *a: {"gain": right["initial"](*a)["gain"].long()})
    refused("sketch gives .*, but its `sketch` is", sketch=lambda *_: {"s": torch.zeros(3)})
    for taken in ("keys", "training"):
        named = {"groups": lambda *a, name=taken: [replace(g, shapes={name: (1,)}) for g in right["groups"](*a)]}
        refused(f"names a group or tensor '{taken}'", **named)
    registry.METHODS.pop("Wrong")
    with pytest.raises(NolaVisionError, match="Wrong is not registered"):
        adapt(SPEC, dataclass(frozen=True)(type("Wrong", (Adapter,), {}))(), ["a", "b"])
    with pytest.raises(NolaVisionError, match="put @dataclass"):
        registry.register(type("Wrong", (Adapter,), {"__annotations__": {"scale": float}, "scale": 1.0}))
    with pytest.raises(NolaVisionError, match="put @dataclass"):
        registry.register(type("Wrong", (LoRA,), {"c": 1.0}))  # LoRA's own default would be used


def test_another_packages_method_from_config_to_report(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It multiplies the rows of the frozen weights: trained for a step, saved, loaded, and in the report."""
    (tmp_path / "mine_to_import.py").write_text(GAIN)
    entry = {"gain": {**spec(f"{mine}.RowGain", targets=["mlp"], scale=2.0, lr=0.1)}}
    config = overlay(TINY, {"methods": entry, "method": "gain", "data": {"batch_size": 30}})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config=tiny.yaml", "--trainer.max_epochs=1"]
    assert main(fit) == 2 and f"--allow-import {mine}" in capsys.readouterr().err and mine not in sys.modules
    assert main([*fit, "--allow-import", mine]) == 0
    assert "to use the adapter, install the package of RowGain as a plug-in" in capsys.readouterr().out
    assert main(["report", "runs"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ gain ")]
    (row,) = trained_rows("runs")
    assert row.method_class == "RowGain" and f"{100 * row.test_accuracy:.1f}" in line
    (path,) = Path("runs").rglob("adapter.safetensors")
    model = load_adapter(path)
    plain = {name: parameter for name, parameter in model.backbone.named_parameters()}
    (group, *_), changes = model.bank.groups, model.bank.changes()
    for name, change in changes.items():
        gain = change[:, 0] / plain[name][:, 0]
        assert gain.any() and torch.allclose(change, gain.unsqueeze(1) * plain[name], rtol=1e-3, atol=1e-6)
    # a new process: the file imports nothing, unless the package is installed as a plug-in
    registry.METHODS.pop("RowGain"), sys.modules.pop(mine)
    with pytest.raises(NolaVisionError, match="unknown method 'RowGain': .* must be installed as a plug-in"):
        load_adapter(path)
    assert mine not in sys.modules
    install_plugin(tmp_path, f"{mine}:RowGain")
    assert torch.equal(load_adapter(path).bank.groups[group].gain, model.bank.groups[group].gain)


def test_a_config_cannot_pull_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PL_DATA__NUM_WORKERS", "3")
    for name, text in (
        ("data.yaml", "{dataset: digits, shots: 2}"),
        ("backbone.yaml", "{tag: test_vit.r160_in1k}"),
        ("trainer.yaml", "{max_epochs: 1}"),
        ("EarlyStopping", "[{class_path: Timer, init_args: {duration: null}}]"),
    ):
        (tmp_path / name).write_text(text)
    for option in (
        "--data=data.yaml",
        "--model.backbone=backbone.yaml",
        "--trainer=trainer.yaml",
        "--data=file:data.yaml",
    ):
        with pytest.raises(NolaVisionError, match="takes settings, not a file"):
            parse(QUICK, [option])
    with pytest.raises(NolaVisionError, match="takes settings, not a file"):
        parse(overlay(QUICK, {"model": {"backbone": "backbone.yaml"}}))
    for value in ("data.yaml", "http://localhost/data.yaml", f"file://{tmp_path}/EarlyStopping", "/etc/passwd"):
        with fuzz_configs.nothing_runs(tmp_path), pytest.raises(NolaVisionError):
            parse(QUICK, [f"--trainer.callbacks={value}"])
    full = parse(QUICK, ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"])
    (callback,) = full["trainer"]["callbacks"]  # the class, although a file has that name
    assert callback["class_path"].endswith("EarlyStopping") and full["data"]["num_workers"] == 0


def test_an_option_may_have_the_value_lr() -> None:
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir", "lr", "--trainer.logger.name", "lr"]
    assert parse(QUICK, options)["trainer"]["logger"]["init_args"]["name"] == "lr"
    assert parse(QUICK, ["--protocol", "lr"])["protocol"] == "lr"
    rate = [
        "--model.optimizer.lr=1",
        "--model.optimizer.init_args.lr=1",
        "--model.optimizer={class_path: SGD, init_args: {lr: 1}}",
    ]
    for option in rate:
        with pytest.raises(NolaVisionError, match="the optimizer's learning rate is the method's"):
            parse(QUICK, [option])


def test_the_limits_of_yaml_hold_for_options() -> None:
    started = time.process_time()
    assert parse(QUICK, [f"--data.root=!!int 1{':1' * 150_000}"])["data"]["root"].startswith("!!int")
    assert time.process_time() - started < 2


def test_emoji_and_names_that_are_bytes_survive() -> None:
    for root in ("\U0001f600/a", "stra\udcdfe", "ä", "a\u2028b"):
        assert parse(overlay(QUICK, {"data": {"root": root}}))["data"]["root"] == root
        assert parse(QUICK, [f"--data.root={root}"])["data"]["root"] == root


def test_a_config_stays_as_it_was(tmp_path: Path) -> None:
    given_config = overlay(QUICK, {"trainer": {"callbacks": [spec("EarlyStopping", monitor="val_loss")]}})
    full = parse(given_config, FAST)
    for config in (given_config, full):
        (callback,) = config["trainer"]["callbacks"]
        assert type(callback) is dict and type(callback["init_args"]) is dict
    assert isinstance(build(full, tmp_path).trainer.early_stopping_callback, L.pytorch.callbacks.EarlyStopping)
    assert type(full["trainer"]["callbacks"][0]) is dict


def test_null_is_refused_where_a_value_is_needed() -> None:
    for path in (("data", "dataset"), ("data", "shots"), ("data", "split_seed"), ("model", "optimizer"), ("protocol",)):
        changes: Any = None
        for key in reversed(path):
            changes = {key: changes}
        with pytest.raises(NolaVisionError, match=f"lacks a value for `{'.'.join(path)}`"):
            parse(overlay(QUICK, changes))
    assert parse(overlay(QUICK, {"trainer": {"gradient_clip_val": None}, "data": {"test_limit": None}}))


@pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_any_config_is_understood_or_refused_in_one_line(examples: int, tmp_path: Path) -> None:
    quiet = list(HealthCheck)

    @settings(max_examples=examples, database=None, deadline=None, derandomize=True, suppress_health_check=quiet)
    @given(fuzz_configs.inputs())
    def feed(example: tuple[str, tuple[str, list[str]]]) -> None:
        cheap(fuzz_configs.outcome(example[1], tmp_path))

    fuzz_configs.warm_up(tmp_path)
    feed()
