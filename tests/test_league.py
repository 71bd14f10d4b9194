"""Byte budgets: the solver against written files, the plan of a league, and its report."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.lines import Line2D
from rich.console import Console

from fake_runs import Method as FakeMethod
from fake_runs import write_runs
from nola_vision.adapters.methods import (
    NOLA,
    PRANC,
    Adapter,
    FacT,
    HashedNet,
    LinearProbe,
    LoRA,
    LoRAXS,
    Method,
    TinyLoRA,
    UniLoRA,
    VeRA,
)
from nola_vision.adapters.serialization import adapter_size
from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError, UnreachableBudgetError
from nola_vision.common.integer_search import largest, smallest
from nola_vision.models import known_weights
from nola_vision.models.adapted_model import AdaptedModel, file_bits, file_metadata
from nola_vision.models.assembly import adapt
from nola_vision.models.backbones.creation import skeleton
from nola_vision.models.backbones.sources import input_config, resolve
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.budget_solver import most_file_bytes, solve_budget
from nola_vision.models.building import feature_width, file_shapes, method_targets, stated_targets
from nola_vision.models.metadata import AdapterMetadata, Calibrated
from nola_vision.reports.cell import Cell, cell_of
from nola_vision.reports.charts.league import league_chart
from nola_vision.reports.charts.looks import entry_looks
from nola_vision.reports.charts.pareto import pareto_front
from nola_vision.reports.league import budget_table
from nola_vision.reports.statistics import split_interval
from nola_vision.reports.terminal import cell_table
from nola_vision.runs import run_id
from nola_vision.runs.budget_names import split_budget, with_budget
from nola_vision.runs.budgets import refuse_larger_files, size_and_bytes
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.not_run import NotRun, note_not_run, read_not_run
from nola_vision.runs.parsing import parse
from nola_vision.runs.search_grid import with_settings
from nola_vision.runs.store import read_rows
from nola_vision.sweep import budget_entries, plan, variations
from nola_vision.sweep.search import choose_settings, search_failed

MINI = BackboneSpec("vit_mini_patch4_32.contours")
GLYPHS = BackboneSpec("vit_glyph_patch4_32.glyphs")
TEN = tuple("0123456789")
METHODS = [
    NOLA(bits=4), NOLA(targets=["qkv", "head"], bits=8), LoRA(bits=3), LoRAXS(bits=4), VeRA(bits=4),
    PRANC(bits=4, storage="streamed"), HashedNet(bits=4, head_bits=8), UniLoRA(bits=4), FacT(bits=4),
    TinyLoRA(rank=64, bits=4), NOLA(bits=1), LoRA(bits=1), LoRAXS(bits=1), VeRA(bits=1), HashedNet(bits=1),
    PRANC(bits=1, storage="streamed"), UniLoRA(bits=1), FacT(bits=1), TinyLoRA(rank=64, bits=1),
]  # fmt: skip
SMALL = {"UniLoRA-1bit": 2_500, "VeRA-1bit": 2_500, "TinyLoRA-1bit": 2_000}  # the largest file is below 9 KB


def described(method: Method, spec: BackboneSpec = MINI) -> AdapterMetadata:
    return AdapterMetadata(spec, method, TEN, 0, 0, input_config(spec))


def model_of(method: Adapter, spec: BackboneSpec = MINI) -> AdaptedModel:
    model: AdaptedModel = adapt(spec, method, TEN, run_seed=7)
    model.calibrated_on, model.temperature, model.calibration_images = "validation", 0.123456, 400
    return model


def name_of(method: Adapter) -> str:
    return f"{type(method).__name__}-{method.bits}bit"


def longest_bytes(model: AdaptedModel, draws: random.Random) -> int:
    """Of a file with numbers of any digits, each as long as it can be, that are chosen after the budget is solved."""

    def number() -> float:
        return float(f"{draws.randint(1, 9)}.{draws.randrange(10**15, 10**16)}e-05")

    method = dataclasses.replace(model.metadata.method, lr=number(), head_lr=number(), c=number())  # type: ignore[call-arg]
    seeds = {name: draws.randrange(10**18, 2**63) for name in ("run_seed", "basis_seed")}
    model.metadata = dataclasses.replace(model.metadata, method=method, **seeds)
    model.calibrated_on = draws.choice(["folds", "validation"])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.file_tensors().items()}
    return adapter_size(model.file_metadata(), shapes, model.bits)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_largest_file_within_a_budget_is_written(method: Adapter, tmp_path: Path) -> None:
    budget = SMALL.get(name_of(method), 9_000)
    asked = dataclasses.replace(method, max_bytes=budget)
    found = solve_budget(described(asked))
    count = getattr(found, found.size_setting)
    assert isinstance(found, Adapter) and found.max_bytes is None and count > 1
    model = model_of(found)
    size = model.save(tmp_path / "a")
    most, draws = most_file_bytes(described(found)), random.Random(0)
    assert model_of(asked).save(tmp_path / "b") == size and most - 110 < size < most - 50 and most <= budget
    # the count covers seeds, rates and scales of any length, and no more than that
    assert most - 40 < max(longest_bytes(model, draws) for _ in range(10)) <= most
    more = dataclasses.replace(found, **{found.size_setting: count + (24 if isinstance(method, HashedNet) else 1)})
    assert most_file_bytes(described(more)) > budget - 8


@pytest.mark.parametrize("name", ["w", "weights-of-a-vit-3f9ab81c77e02d54-after-12000-steps"])
def test_no_file_exceeds_a_budget_though_headers_compress_unevenly(name: str, tmp_path: Path) -> None:
    """Of a backbone with another tag, from a local file."""
    file = tmp_path / f"{name}.safetensors"
    file.write_bytes(Path(resolve(GLYPHS).cfg.file).read_bytes())
    spec, draws = BackboneSpec(GLYPHS.tag, file=str(file)), random.Random(1)
    method = HashedNet(targets=["qkv", "mlp"], bits=4)
    for budget in range(4994, 5006):
        found = solve_budget(described(dataclasses.replace(method, max_bytes=budget), spec))
        assert budget - 64 < most_file_bytes(described(found, spec)) <= budget
        if budget == 5000:
            model = model_of(found, spec)
            assert max(longest_bytes(model, draws) for _ in range(10)) <= budget
            assert model.save(tmp_path / "a") <= budget  # with the last of these numbers


@pytest.mark.parametrize("tag", ["vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_224.augreg_in21k", MINI.tag])
def test_what_is_downloaded_does_not_matter(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, spec, file = LoRA(bits=4, max_bytes=30_000), BackboneSpec(tag), tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 1234)
    found = []
    for cached in (None, str(file)):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, cached=cached, **__: cached)
            patch.setattr("nola_vision.models.known_weights.file_digest", lambda *_: pytest.fail("weights are read"))
            method = solve_budget(described(asked, spec))
            found.append((method, most_file_bytes(described(method, spec))))
    assert found[0] == found[1]
    # what the file will state of the weights is counted
    method, most = found[0]
    origin = known_weights.longest_origins(spec)[0]
    assert origin is not None and (origin.repository is None) == (spec == MINI)
    backbone = skeleton(spec)
    targets = method_targets(backbone, method, 10)
    shapes = file_shapes(method.groups(targets), 10, feature_width(backbone))
    stated = dataclasses.replace(origin, file="model.safetensors", bytes=1_234_567_890)
    names = stated_targets(backbone, method, 10, [target.name for target in targets])
    written = file_metadata(described(method, spec), names, None, stated, Calibrated(1.5, "folds"))
    assert most - 130 < adapter_size(written, shapes, file_bits(shapes, method)) <= most


def test_the_header_of_a_file_of_vit_b_is_short() -> None:
    """With 100 class names. The values of NOLA k=1024 on both layers of 12 MLPs, and of the head, take 67,312 bytes."""
    spec = BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k")
    names = tuple(str(number) for number in range(100))
    metadata = dataclasses.replace(described(NOLA(targets=["mlp"], bits=4, start="a0"), spec), class_names=names)
    coefficients = 12 * 2 * 2 * (1024 * 4 // 8 + 1024 // 64 * 2)
    head = 100 * (768 * 4 // 8 + 768 // 64 * 2 + 4)
    assert 0 < most_file_bytes(metadata) - coefficients - head < 700


def test_a_methods_own_size_does_not_matter() -> None:
    """TinyLoRA's default of 64 matrices is too many for rank 4."""
    with pytest.raises(UnreachableBudgetError) as e:
        solve_budget(described(TinyLoRA(rank=4, bits=4, max_bytes=1)))
    for count in (1, 64):
        asked = TinyLoRA(rank=4, num_basis=count, bits=4, max_bytes=e.value.least + 12)
        found = solve_budget(described(asked))
        assert isinstance(found, TinyLoRA) and 4 <= found.num_basis <= 10


def test_a_budget_out_of_reach_states_the_smallest_file(tmp_path: Path) -> None:
    with pytest.raises(
        UnreachableBudgetError, match=r"max_bytes is 1,000, but the smallest file \(rank 1\) needs"
    ) as e:
        solve_budget(described(LoRA(max_bytes=1000)))
    assert e.value.least == most_file_bytes(described(LoRA(rank=1))) + 8  # room for other settings of a search
    assert solve_budget(described(LoRA(max_bytes=e.value.least))) == LoRA(rank=1)
    with pytest.raises(UnreachableBudgetError, match=r"\(max_parameters 12\)"):  # one for each target
        solve_budget(described(HashedNet(max_bytes=1000)))
    # a method with a largest size takes that, whatever the budget is
    assert solve_budget(described(LoRA(max_bytes=10**9))) == LoRA(rank=160)


def test_long_class_names_leave_room_for_other_digits() -> None:
    draws = random.Random(1)
    letters = [chr(n) for a, b in ((0x4E00, 0x9FFF), (0x3B1, 0x3C9), (97, 122)) for n in range(a, b)]
    names = tuple("".join(draws.choices(letters, k=200)) + str(n) for n in range(70))
    metadata = dataclasses.replace(described(UniLoRA(targets=["qkv"], bits=1, max_parameters=2000)), class_names=names)
    model = adapt(MINI, metadata.method, names)
    assert max(longest_bytes(model, draws) for _ in range(25)) <= most_file_bytes(metadata)


@pytest.mark.parametrize("budget", [0, -1, "ten", 10**10, True, 2.5])
def test_hostile_budgets(budget: Any) -> None:
    with pytest.raises(NolaVisionError, match="max_bytes of LoRA is"):
        adapt(MINI, LoRA(max_bytes=budget), TEN)
    with pytest.raises(NolaVisionError, match="`budgets` of the method 'a' has"):
        run_id.resolve({"methods": {"a": {"class_path": "LoRA", "budgets": [2000, budget]}}}, "a")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "lora@20KB",
            ["--model.method.max_bytes=50000"],
            "max_bytes would give lora@20KB another budget than its name",
        ),
        ("lora@20KB", ["--model.method.init_args.max_bytes=null"], "max_bytes would give lora@20KB another budget"),
        ("lora@20KB", ["--model.method.rank=3"], "the budget of 20,000 bytes decides rank: leave one"),
        ("lora@20KB", ['--model.method.init_args={"rank": 3}'], "the budget of 20,000 bytes decides rank: leave one"),
        ("lora@20KB", ['--model.method={"class_path": "LoRA", "init_args": {"rank": 3}}'], "decides rank: leave one"),
        ("linear@20KB", [], "the method 'linear' has no budgets, so there is no 'linear@20KB': leave @20KB out"),
        ("twice", [], "'twice' has both budgets and max_bytes: leave one out"),
        ("ranked@20KB", [], "the budget of 20,000 bytes decides rank: leave one of them out"),
        ("1nn@2KB", [], "'1nn' has budgets, but NearestNeighbor has no size to choose: leave them out"),
        ("lorra@20KB", [], "unknown method 'lorra@20KB' in the config: did you mean lora?"),
    ],
)
def test_contradictions_of_a_budget(name: str, options: list[str], expected: str) -> None:
    more = {
        "twice": {"class_path": "LoRA", "init_args": {"max_bytes": 9000}, "budgets": [2000]},
        "1nn": {"class_path": "NearestNeighbor", "budgets": [2000]},
        "ranked": {"class_path": "LoRA", "init_args": {"rank": 4}, "budgets": [20_000, 30_000]},
    }
    with pytest.raises(NolaVisionError, match=re.escape(expected)):
        parse(run_id.resolve({**LEAGUE, "methods": {**LEAGUE["methods"], **more}}, name), [*QUIET, *options])


def test_what_does_not_contradict_a_budget(tmp_path: Path) -> None:
    plain = parse(run_id.resolve(LEAGUE, "lora@20KB"), QUIET)
    assert parse(run_id.resolve(LEAGUE, "lora@20KB"), [*QUIET, "--model.method.max_bytes=20000"]) == plain
    own = {**LEAGUE, "methods": {"own": {"class_path": "LoRA", "init_args": {"bits": 2, "rank": 9}}}}
    solved = parse(run_id.resolve(own, "own"), [*QUIET, "--model.method.max_bytes=20000"])
    assert solved["model"] == plain["model"]  # the option overrides the config's rank
    other = parse(
        run_id.resolve(LEAGUE, "lora@20KB"), [*QUIET, "--model.method=UniLoRA", "--model.method.max_bytes=7000"]
    )
    assert other["method"] == "unilora"
    (tmp_path / "a.yaml").write_text("methods: {x@9KB: {class_path: LoRA}}")
    with pytest.raises(NolaVisionError, match="the method name 'x@9KB' looks like a budget: list it as `budgets`"):
        load_configs([str(tmp_path / "a.yaml")])


def test_search_for_a_number() -> None:
    for first in range(1, 40):
        assert smallest(lambda n, f=first: f <= n <= 100, 1000) == first
        for last in range(first, 60):
            assert largest(lambda n, f=first, e=last: f <= n <= e, 50, first) == min(last, 50)
    assert smallest(lambda n: False, 1000) is None


LEAGUE: dict[str, Any] = {
    "protocol": "league",
    "threads": 1,
    "methods": {
        "logistic": {"class_path": "LogisticRegression"},
        "linear": {"class_path": "LinearProbe", "search": {"lr": [0.01, 0.001]}},
        "lora": {
            "class_path": "LoRA",
            "init_args": {"bits": 2},
            "search": {"lr": [0.01, 0.001]},
            "budgets": [9000, 1000, 8990, 20000, 30000],
        },
        "vera": {
            "class_path": "VeRA",
            "init_args": {"bits": 2, "lr": 0.02},
            "budgets": [500, 100000, 200000],
        },
    },
    "model": {"backbone": {"tag": MINI.tag}},
    "data": {"dataset": "digits", "shots": 1, "batch_size": 16, "num_workers": 0, "augmentation": "none"},
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}  # fmt: skip
QUIET = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def entries() -> budget_entries.Entries:
    names = budget_entries.expand(LEAGUE, list(LEAGUE["methods"]))
    return budget_entries.solve(LEAGUE, names, lambda one: parse(one, QUIET))


def test_entries_of_a_league(entries: budget_entries.Entries) -> None:
    assert entries.methods == ["logistic", "linear", "lora@8990B", "lora@20KB", "lora@30KB", "vera@100KB"]
    assert set(entries.not_run) == {"lora@1KB", "lora@9KB", "vera@500B", "vera@200KB"}
    assert "the smallest file (rank 1) needs" in entries.not_run["lora@1KB"].reason
    assert entries.not_run["lora@9KB"].same_as == "lora@8990B"
    assert entries.not_run["vera@200KB"].same_as == "vera@100KB"
    args = entries.config["methods"]["lora@20KB"]["init_args"]
    assert args["max_bytes"] is None and args["rank"] > entries.config["methods"]["lora@8990B"]["init_args"]["rank"]
    # the run is named by what was solved: the hash is that of the same rank given by hand
    budgeted = run_id.resolve(entries.config, "lora@20KB")
    by_hand = {
        **LEAGUE,
        "method": "x",
        "methods": {"x": {"class_path": "LoRA", "init_args": {"bits": 2, "rank": args["rank"]}}},
    }
    assert run_id.run_hash(parse(run_id.resolve(by_hand), QUIET), "final") == run_id.run_hash(budgeted, "final")
    assert run_id.run_folder("out", budgeted, "final").parent.name == "lora@20KB"


def test_one_search_per_method(entries: budget_entries.Entries) -> None:
    specs = plan.search_specs(entries.config, entries.methods)
    # the middle budget is 9 KB, and its solution that of 8,990 bytes
    assert [(one.method, one.searched["lr"]) for one in specs] == [
        ("linear", 0.01), ("linear", 0.001), ("lora@8990B", 0.01), ("lora@8990B", 0.001),
    ]  # fmt: skip
    assert entries.notes == ["lora is searched at lora@8990B, which is the same, instead of lora@9KB"]
    from nola_vision.runs.record import Row

    rows = [Row.of(s.config, "search", "completed", val_accuracy=0.5 + 0.1 * n) for n, s in enumerate(specs)]
    chosen = choose_settings(entries.config, rows, ["lora@30KB", "lora@8990B"])
    assert chosen == {"lora@30KB": {"lr": 0.001}, "lora@8990B": {"lr": 0.001}}
    final = plan.final_specs(entries.config, [0, 1], [0], ["lora@30KB"], chosen)
    assert [one.config["model"]["method"]["init_args"]["lr"] for one in final] == [0.001, 0.001]
    # where the step grows with the size, a larger entry has a smaller learning rate, a smaller one the same
    nola = {"class_path": "NOLA", "init_args": {"bits": 4}, "search": {"lr": [0.02]}, "budgets": [2000, 4000, 9000]}
    names = budget_entries.expand({"methods": {"nola": nola}}, ["nola"])
    found = budget_entries.solve({**LEAGUE, "methods": {"nola": nola}}, names, lambda one: parse(one, QUIET))
    sizes = [found.config["methods"][name]["init_args"]["num_basis"] for name in names]
    specs = plan.final_specs(found.config, [0], [0], names, {name: {"lr": 0.02} for name in names})
    rates = [one.config["model"]["method"]["init_args"]["lr"] for one in specs]
    assert rates[:2] == [0.02, 0.02] and rates[2] == pytest.approx(0.02 * sizes[1] / sizes[2], rel=5e-3)
    assert sizes[2] > 2 * sizes[1]
    failed = [dataclasses.replace(row, status="failed", error="x") for row in rows]
    assert search_failed(entries.config, failed, "lora@30KB") and not search_failed(entries.config, rows, "lora@30KB")


def test_a_part_of_the_budgets_is_searched_and_run_where_all_are() -> None:
    names = budget_entries.expand(LEAGUE, ["lora"], [30_000])
    one = budget_entries.solve(LEAGUE, names, lambda config: parse(config, QUIET))
    assert names == one.methods == ["lora@30KB"]
    assert {spec.method for spec in plan.search_specs(one.config, one.methods)} == {"lora@8990B"}
    # and the run of a smaller budget with the same solution is that of the whole
    for size, run in ((9_000, "lora@8990B"), (8_990, "lora@8990B"), (200_000, "vera@100KB")):
        (name,) = budget_entries.expand(LEAGUE, [run.partition("@")[0]], [size])
        found = budget_entries.solve(LEAGUE, [name], lambda config: parse(config, QUIET))
        assert found.methods == [run] and {*found.not_run} == {name} - {run}
        assert all(why.same_as == run for why in found.not_run.values())
    # `search` may name an entry that is not swept itself
    like = {**LEAGUE["methods"]["lora"], "search": "linear"}
    named = {**LEAGUE, "methods": {"linear": LEAGUE["methods"]["linear"], "like": like}}
    found = budget_entries.solve(named, ["like@9KB"], lambda config: parse(config, QUIET))
    assert found.methods == ["like@8990B"] and not found.notes
    assert {spec.method for spec in plan.search_specs(found.config, found.methods)} == {"linear"}
    with pytest.raises(NolaVisionError, match="no entry has the budget 7B: give some of 1KB, 8990B, 9KB, 20KB, 30KB"):
        budget_entries.expand(LEAGUE, ["lora"], [7])
    with pytest.raises(UnreachableBudgetError):
        budget_entries.solve(LEAGUE, ["lora@1KB"], lambda config: parse(config, QUIET))


def test_a_search_keeps_files_within_their_budgets(entries: budget_entries.Entries) -> None:
    solved = run_id.resolve(entries.config, "lora@20KB")
    refuse_larger_files(solved, {"lr": [0.1, 1.2345678901234567e-05], "c": [0.5, 8.0, 123.25], "bits": [1, 2]}, 20_000)
    _, size = size_and_bytes(solved) or ("", 0)
    refuse_larger_files(solved, {"bits": [2]}, size)
    with pytest.raises(
        NolaVisionError, match=f"bits 2, with which the file has {size:,} bytes, more than {size - 1:,}: "
    ):
        refuse_larger_files(solved, {"bits": [2], "c": [8.0]}, size - 1)
    refuse_larger_files(solved, {"bits": [32], "rank": [160]}, None)
    # digits of other settings are counted: three long ones take more than the room that a solution leaves
    nola = {"methods": {"nola": {"class_path": "NOLA", "init_args": {"bits": 4}, "search": {"c": [2.0]}}}}
    of_nola = parse(run_id.resolve({**LEAGUE, **nola}, "nola"), QUIET)
    _, size = size_and_bytes(of_nola) or ("", 0)
    refuse_larger_files(of_nola, {"c": [1.2345678901234567], "quantise_from": [0.5, 1.0]}, size + 8)
    long = {"c": [1.2345678901234567], "quantise_from": [0.98765432109876543], "memory_mib": [13.579246801357924]}
    with pytest.raises(NolaVisionError, match=r"has quantise_from 0.98.*, memory_mib 13.*, with which the file has"):
        refuse_larger_files(of_nola, long, size + 8)
    model = model_of(dataclasses.replace(NOLA(bits=4), **{name: values[0] for name, values in long.items()}))
    draws = random.Random(0)
    assert max(longest_bytes(model, draws) for _ in range(10)) > size + 8
    for name, search, message in (
        ("lora@20KB", {"rank": [1]}, "'lora@20KB' has rank, which its budget decides: leave it out"),
        (
            "half",
            {"bits": [2, 4]},
            r"'half' has bits 4, with which the file has [\d,]+ bytes, more than 20,000: search",
        ),
    ):
        lora = {**LEAGUE["methods"]["lora"], "search": search}
        half = {"class_path": "LoRA", "init_args": {"bits": 2, "max_bytes": 20_000}, "search": search}
        config = {**LEAGUE, "methods": {"lora": lora, "half": half}}
        with pytest.raises(NolaVisionError, match=message):
            budget_entries.solve(config, [name], lambda one: parse(one, QUIET))


def test_names_of_budgets() -> None:
    for budget in (1, 999, 1000, 2500, 50_000, 999_999_999):
        assert split_budget(with_budget("a-b", budget)) == ("a-b", budget)
    assert split_budget("nola") == ("nola", None) and split_budget("a@0KB") == ("a@0KB", None)
    with pytest.raises(NolaVisionError, match="'lora' has budgets: name one of lora@1KB, lora@8990B"):
        run_id.resolve(LEAGUE, "lora")
    assert run_id.resolve(LEAGUE, "lora@30KB")["model"]["method"]["init_args"] == {"bits": 2, "max_bytes": 30_000}
    for other in ("lora@30000B", "lora@030KB"):  # one budget has one name, and so one folder
        with pytest.raises(NolaVisionError, match=f"unknown method '{other}' in the config: .*lora"):
            run_id.resolve(LEAGUE, other)
    with pytest.raises(NolaVisionError, match="unknown method 'lora@30000B' in the config: write lora@30KB"):
        run_id.resolve(LEAGUE, "lora@30000B")
    with pytest.raises(
        NolaVisionError, match="unknown method 'lora@31KB' in the config: use one of lora@.*, lora@30KB"
    ):
        run_id.resolve(LEAGUE, "lora@31KB")
    varied, names = variations.vary(LEAGUE, ["lora", "vera@100KB"], "c", [1, 2])
    assert names == ["lora-c1", "lora-c2", "vera-c1@100KB", "vera-c2@100KB"]
    assert run_id.resolve(varied, "vera-c2@100KB")["model"]["method"]["init_args"]["max_bytes"] == 100_000
    for key in ("rank", "max_bytes"):
        with pytest.raises(NolaVisionError, match=f"the budget of 'lora' decides {key}: vary another setting"):
            variations.vary(LEAGUE, ["lora@30KB"], key, [1, 2])
    one = {"methods": {"m": {"class_path": "LoRA", "init_args": {"max_bytes": 20_000}}}}
    with pytest.raises(NolaVisionError, match="the budget of 'm' decides rank"):
        variations.vary(one, ["m"], "rank", [1, 2])
    assert variations.vary(one, ["m"], "max_bytes", [9000, 20_000])[1] == ["m-max_bytes9000", "m-max_bytes20000"]
    renamed, names = variations.rename(LEAGUE, ["lora@30KB", "linear"], "-shots2")
    assert names == ["lora-shots2@30KB", "linear-shots2"] and run_id.resolve(renamed, names[0])
    assert LinearProbe().size_setting == ""


CELL = "backbone-data-5shot-league"
FAKE = [
    FakeMethod("logistic", "LogisticRegression", 0.8, 1500),
    FakeMethod("1nn", "NearestNeighbor", 0.7),
    *(FakeMethod(f"nola@{kb}KB", "NOLA", 0.85 + 0.005 * kb, 1000 * kb - 3) for kb in (2, 10)),
    *(FakeMethod(f"lora@{kb}KB", "LoRA", 0.84 + 0.005 * kb, 1000 * kb - 5) for kb in (5, 10)),
]  # fmt: skip


@pytest.fixture(scope="module")
def league(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("league")
    write_runs(folder, TEN, FAKE, splits=4, inits=1, images=20, cell=CELL)
    note_not_run(folder / CELL / "lora@2KB", NotRun("the smallest file (rank 1) needs 3,110 bytes"))
    note_not_run(folder / CELL / "nola@5KB", NotRun("no larger file is within it than that of nola@2KB", "nola@2KB"))
    (folder / CELL / "broken").mkdir()
    (folder / CELL / "broken" / "not_run.json").write_text('{"reason": 1}')
    return folder


def test_table_by_budget(league: Path) -> None:
    cell = cell_of(read_rows(league)[0], CELL)
    table = budget_table(cell.entries, cell.not_run)
    assert table is not None and cell.tables[0] == table
    assert table.columns == ("method", "2 KB, %", "5 KB, %", "10 KB, %")
    lines = {line[0].text: line[1:] for line in table.lines}
    assert list(lines) == ["logistic", "lora", "nola"]
    accuracy = {e.summary.method: [100 * (row.test_accuracy or 0) for row in e.runs] for e in cell.entries}
    assert lines["lora"][0].text == "-" and lines["nola"][1].text == lines["nola"][0].text
    assert "lora at 2 KB: the smallest file (rank 1) needs 3,110 bytes" in table.notes
    places = {("nola", 0): "nola@2KB", ("nola", 1): "nola@2KB", ("nola", 2): "nola@10KB"}
    places |= {("lora", 1): "lora@5KB", ("lora", 2): "lora@10KB"} | {("logistic", n): "logistic" for n in range(3)}
    for column in range(3):
        means = {name: np.mean(accuracy[entry]) for (name, at), entry in places.items() if at == column}
        best = max(means, key=lambda name: means[name])
        for name, mean in means.items():
            text, mark = lines[name][column]
            assert text == f"{mean:.1f}"
            test = scipy.stats.ttest_rel(accuracy[places[name, column]], accuracy[places[best, column]])
            expected = "best" if name == best else "even" if test.pvalue > 0.05 else "plain"
            assert mark == expected, (name, column)
    assert {cell.mark for line in table.lines for cell in line[1:]} == {"best", "even", "plain"}
    entry = next(e for e in cell.entries if e.summary.method == "lora@10KB")
    values = accuracy["lora@10KB"]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert split_interval(entry.runs) == pytest.approx((low, high))
    assert split_interval(entry.runs[:2]) is None
    assert set(read_not_run(league / CELL)) == {"lora@2KB", "nola@5KB"}
    assert budget_table([e for e in cell.entries if "@" not in e.summary.method], {}) is None


def test_a_mean_over_few_splits_does_not_lead(league: Path, tmp_path: Path) -> None:
    shutil.copytree(league, tmp_path, dirs_exist_ok=True)
    for method, splits, inits in (
        (FakeMethod("vera@10KB", "VeRA", 0.99, 9_900), 1, 1),
        (FakeMethod("fact@10KB", "FacT", 0.99, 9_900), 3, 1),
        (FakeMethod("pranc@10KB", "PRANC", 0.5, 9_900), 4, 3),
    ):
        write_runs(tmp_path, TEN, [method], splits=splits, inits=inits, images=20, cell=CELL)
    cell = cell_of(read_rows(tmp_path)[0], CELL)
    table = budget_table(cell.entries, cell.not_run)
    assert table is not None
    lines = {line[0].text: line[3] for line in table.lines}
    assert lines["vera"].text.endswith(" (n = 1, not compared)") and lines["vera"].mark == "plain"
    assert lines["fact"].text.endswith(" (n = 3)") and lines["fact"].mark == "even"  # better on the splits that it has
    assert "(" not in lines["pranc"].text and lines["pranc"].mark == "plain"
    assert [name for name, cell in lines.items() if cell.mark == "best"] in (["nola"], ["lora"])
    assert table.notes[0].startswith("means over n = 4 splits, 1 to 3 inits each; best in bold, in italics: not ")
    assert {item.splits for item in pareto_front(cell.summaries)} == {4}
    # with two splits nothing is said of differences
    few = cell_of([row for row in read_rows(tmp_path)[0] if row.split < 2], CELL).tables[0]
    assert {cell.mark for line in few.lines for cell in line[1:]} == {"best", "plain"}
    assert "not compared" not in str(few) and few.notes[0].endswith("best in bold")


def test_a_version_with_more_splits_keeps_the_methods_name(league: Path) -> None:
    rows = read_rows(league)[0]
    named = [row for row in rows if row.method == "nola@10KB"]
    changed = {"entry_hash": "other", "config": with_settings(named[0].config, {"lr": 0.5})}
    other = [dataclasses.replace(row, run_hash=f"other{row.split}", **changed) for row in named]

    def shown(cell: Cell) -> dict[str, list[str]]:
        return {line[0].text: [one.text for one in line[1:]] for line in cell.tables[0].lines}

    before, few = cell_of(rows, CELL), cell_of([*rows, *other[:2]], CELL)
    stray = shown(few)["nola (lr=0.5)"]
    assert stray[:2] == ["-", "-"] and stray[2].endswith("(n = 2, not compared)")
    assert {name: line for name, line in shown(few).items() if name != "nola (lr=0.5)"} == shown(before)
    assert "nola (lr=0.5): no runs at 2 KB, 5 KB" in few.tables[0].notes
    assert few.tables[2].columns[1] == before.tables[2].columns[1] == "difference to nola at the same budget (95 % CI)"
    assert {item.label for item in pareto_front(few.summaries)} == {
        item.label for item in pareto_front(before.summaries)
    }
    both = cell_of([*rows, *other], CELL)  # none has more
    assert shown(both)["nola"][2] == "-" and sum(name.startswith("nola (lr=") for name in shown(both)) == 2
    assert not any("no run was completed" in note for note in both.tables[0].notes)
    # one more split does not make the others unfair
    more = dataclasses.replace(named[0], run_hash="more", split=9)
    assert len(pareto_front(cell_of([*rows, more], CELL).summaries)) == len(pareto_front(before.summaries))
    # an entry without budgets is where no entry with the budget is
    changed = {"method": "lora", "method_class": "LoRA", "adapter_file_bytes": 1500}
    plain = [dataclasses.replace(row, run_hash=f"plain{row.split}", **changed) for row in named]
    assert shown(cell_of([*rows, *plain], CELL))["lora"][1:] == shown(before)["lora"][1:]


def test_methods_are_compared_with_the_subject_at_their_budget(league: Path) -> None:
    cell = cell_of(read_rows(league)[0], CELL)
    table = cell.tables[2]
    assert table.columns[1] == "difference to nola at the same budget (95 % CI)"
    lines = {line[0].text: line[1].text for line in table.lines}
    accuracy = {e.summary.method: np.array([100 * (row.test_accuracy or 0) for row in e.runs]) for e in cell.entries}
    references = {"lora@5KB": "nola@2KB", "lora@10KB": "nola@10KB", "logistic": "nola@2KB"}
    for name, other in references.items():
        assert lines[name].split()[0] == f"{np.mean(accuracy[name] - accuracy[other]):+.1f}", name
    assert {lines[name] for name in accuracy if name not in references} == {"-"}
    assert table.notes[-1] == "compared at another budget: logistic with nola@2KB, lora@5KB with nola@2KB"


def test_the_chart_of_a_league(league: Path) -> None:
    cell = cell_of(read_rows(league)[0], CELL)
    looks = entry_looks(cell.summaries)
    chart = league_chart(cell.entries, looks)
    assert chart is not None
    drawn = [line for line in chart.figure.artists if isinstance(line, Line2D)]
    bars = {text for line in drawn if (text := str(line.get_label())).startswith("bar of")}
    barred = {item.label for item in pareto_front(cell.summaries)} | {"nola@2KB", "nola@10KB"}
    assert bars == {f"bar of {name}" for name in barred} and len(barred) < 5
    texts = [text.get_text() for text in chart.figure.texts]
    assert {"2 KB", "5 KB", "10 KB", "nola", "lora", "logistic", "1nn"} <= {*texts}
    # a label at the right begins with the marker of its method
    for name in ("nola", "lora"):
        (label,) = [text for text in chart.figure.texts if text.get_text() == name]
        beside = [line for line in drawn if line.get_marker() == looks[f"{name}@10KB"].marker]
        places = [line.get_transform().transform((line.get_xdata()[0], line.get_ydata()[0])) for line in beside]
        x, y = label.get_transform().transform(label.get_position())
        assert any(0 < x - px < 15 and abs(y - py) < 10 for px, py in places), name


def test_report_of_a_league(league: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, plots = tmp_path / "r.html", tmp_path / "plots"
    assert main(["report", str(league), "--format", "latex", "--html", str(page), "--plots", str(plots)]) == 0
    assert r"\textit{" in capsys.readouterr().out
    assert main(["report", str(league), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    by_budget, _, results = out.partition("### Results")  # another mark than for what is within a point of the best
    assert "### Accuracy by budget of the whole file" in out and re.search(r"\| +\*\d\d\.\d\* +\|", by_budget)
    assert "<u>" not in by_budget and results
    text = page.read_text()
    assert '<td class="even">' in text and ".even { font-style: italic; }" in text
    cell = cell_of(read_rows(league)[0], CELL)
    console = Console(width=140, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(cell_table(cell))
    assert re.search(r"\x1b\[3m *\d\d\.\d", capture.get())
    assert (
        "Pareto front, the points that no smaller file reaches, of entries with enough splits" in text
        and "95 % interval over splits" in text
    )
    assert (plots / f"{CELL}-pareto.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_league_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "runs"
    config.write_text(json.dumps(LEAGUE))
    words = ["sweep", "--config", str(config), "--splits", "0-2", "--inits", "0", "--out", str(out)]
    assert main([*words, "--dry-run"]) == 0
    assert "lora@1KB is not run: the smallest file" in capsys.readouterr().out and not out.exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Accuracy by budget of the whole file" in printed
    rows, problems = read_rows(out)
    assert not problems and {row.status for row in rows} == {"completed"}
    assert {row.method for row in rows if row.stage == "search"} == {"linear", "lora@8990B"}
    for row in rows:
        budget = split_budget(row.method)[1]
        assert budget is None or row.stage == "search" or (row.adapter_file_bytes or 0) <= budget
    assert main(words) == 0  # everything is completed
    assert len(read_rows(out)[0]) == len(rows)
