"""The plan of a sweep: which runs, with which seeds and settings, and how search runs decide the settings."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from rich.console import Console

from nola_vision.cli.options import parse_methods, parse_range
from nola_vision.common.errors import NolaVisionError
from nola_vision.runs.record import Row
from nola_vision.runs.search_grid import in_words
from nola_vision.sweep.display import plan_table, threads_warning
from nola_vision.sweep.plan import complete, final_specs, search_specs, shard_of
from nola_vision.sweep.progress import EntryProgress, entry_progress
from nola_vision.sweep.search import choices_in_words, choose_settings
from nola_vision.sweep.variations import rename, suffix, vary

RATES = [0.005, 0.001, 0.0005]
CONFIG: dict[str, Any] = {
    "protocol": "quickstart",
    "method": "nola",
    "methods": {
        "nn1": {"class_path": "NearestNeighbor"},
        "linear": {"class_path": "LinearProbe", "init_args": {"lr": 0.005}, "search": {"lr": [0.002]}},
        "full": {"class_path": "FullFinetune", "init_args": {"lr": 8e-5}},
        "lora": {"class_path": "LoRA", "init_args": {"rank": 4, "lr": 0.005}, "search": {"lr": [0.005, 0.001]}},
        "nola": {"class_path": "NOLA", "init_args": {"lr": 0.005, "head_lr": 0.01}, "search": {"lr": RATES}},
    },
    "model": {"backbone": {"tag": "tag"}, "run_seed": 5, "basis_seed": None},
    "data": {"dataset": "digits", "shots": 5, "split_seed": 5},
}
ALL = list(CONFIG["methods"])


def with_search(search: Any, method: str = "nola") -> dict[str, Any]:
    """The config with another search of an entry."""
    config = copy.deepcopy(CONFIG)
    config["methods"][method]["search"] = search
    return config


GRID = with_search({"lr": [0.005, 0.001], "c": [8.0, 2.0]})


def searched(
    method: str, accuracies: list[float | None], losses: list[float] | None = None, config: dict[str, Any] = CONFIG
) -> list[Row]:
    """Rows of a method's search runs; None means a failed run."""
    specs = search_specs(config, [method])
    return [
        Row.of(
            spec.config,
            "search",
            "failed" if accuracy is None else "completed",
            val_accuracy=accuracy,
            val_loss=loss,
            error="it broke" if accuracy is None else None,
        )
        for spec, accuracy, loss in zip(specs, accuracies, losses or [1.0] * len(specs), strict=True)
    ]


def test_the_whole_grid_of_five_methods_is_52_runs() -> None:
    specs = final_specs(CONFIG, range(4), range(3), ALL, {})
    assert len(specs) == 4 * 12 + 4 == 52
    assert len({spec.run_hash for spec in specs}) == 52
    neighbours = [(spec.split, spec.init) for spec in specs if spec.method == "nn1"]
    assert neighbours == [(0, None), (1, None), (2, None), (3, None)]
    assert len({(spec.split, spec.init) for spec in specs if spec.method == "nola"}) == 12
    assert all(spec.stage == "final" for spec in specs)


def test_a_spec_carries_its_seeds_and_its_settings() -> None:
    chosen = {"nola": {"lr": 0.001, "c": 8.0}, "lora": {"lr": 0.1}}
    (spec,) = final_specs(CONFIG, [2], [1], ["nola"], chosen)
    assert spec.config["data"]["split_seed"] == 2
    assert spec.config["model"]["run_seed"] == 1
    assert spec.config["model"]["basis_seed"] is None
    assert spec.config["model"]["method"] == {"class_path": "NOLA", "init_args": {"lr": 0.001, "head_lr": 0.01, "c": 8}}
    assert spec.searched == chosen["nola"]
    row = Row.of(spec.config, "final", "completed")
    assert (row.run_hash, row.split, row.init) == (spec.run_hash, spec.split, spec.init)


def test_an_entry_without_chosen_settings_keeps_its_own() -> None:
    full, neighbour = final_specs(CONFIG, [0], [0], ["full", "nn1"], {})
    assert full.config["model"]["method"]["init_args"] == {"lr": 8e-5} and full.searched == {}
    assert neighbour.config["model"]["method"]["init_args"] == {}


def test_a_fixed_basis_seed_stays() -> None:
    fixed = copy.deepcopy(CONFIG)
    fixed["model"]["basis_seed"] = 7
    specs = final_specs(fixed, [0], range(3), ["nola"], {})
    assert [spec.config["model"]["basis_seed"] for spec in specs] == [7, 7, 7]


def test_planning_leaves_the_config_alone() -> None:
    before = copy.deepcopy(CONFIG)
    specs = final_specs(CONFIG, [0, 1], [0], ALL, {"nola": {"lr": 0.1}}) + search_specs(CONFIG, ALL)
    for spec in specs:
        spec.config["data"]["shots"] = 99
    assert CONFIG == before


def test_search_is_one_run_per_combination_for_entries_with_several() -> None:
    specs = search_specs(CONFIG, ALL)
    assert [(spec.method, spec.searched) for spec in specs] == [
        ("lora", {"lr": 0.005}),
        ("lora", {"lr": 0.001}),
        *(("nola", {"lr": rate}) for rate in RATES),
    ]
    assert {(spec.split, spec.init, spec.stage) for spec in specs} == {(0, 0, "search")}
    assert [spec.config["model"]["method"]["init_args"]["lr"] for spec in specs] == [0.005, 0.001, *RATES]
    assert len({spec.run_hash for spec in specs}) == 5
    grid = search_specs(GRID, ["nola"])
    assert [spec.config["model"]["method"]["init_args"] for spec in grid] == [
        {"lr": 0.005, "head_lr": 0.01, "c": 8},
        {"lr": 0.005, "head_lr": 0.01, "c": 2},
        {"lr": 0.001, "head_lr": 0.01, "c": 8},
        {"lr": 0.001, "head_lr": 0.01, "c": 2},
    ]
    assert len({spec.run_hash for spec in grid}) == 4
    assert [in_words(spec.searched) for spec in grid[:2]] == ["lr 0.005, c 8", "lr 0.005, c 2"]
    assert in_words({"targets": ["qkv", "mlp"], "head_lr": None}) == "targets qkv+mlp, head_lr null"


def test_the_settings_with_the_best_validation_accuracy_are_chosen() -> None:
    rows = searched("nola", [0.5, 0.7, 0.6]) + searched("lora", [0.8, 0.4])
    assert choose_settings(CONFIG, rows) == {
        "nn1": {}, "linear": {"lr": 0.002}, "full": {}, "lora": {"lr": 0.005}, "nola": {"lr": 0.001},
    }  # fmt: skip
    chosen = choose_settings(GRID, searched("nola", [0.5, 0.6, 0.6, 0.7], config=GRID), ["nola"])
    assert chosen == {"nola": {"lr": 0.001, "c": 2}}
    (final,) = final_specs(GRID, [0], [0], ["nola"], chosen)
    assert final.config["model"]["method"]["init_args"] == {"lr": 0.001, "head_lr": 0.01, "c": 2}


@pytest.mark.parametrize(
    ("config", "accuracies", "losses", "expected"),
    [
        (CONFIG, [0.7, 0.7, 0.7], [1.0, 0.9, 1.1], {"lr": 0.001}),  # a tie goes to the lower loss
        (CONFIG, [0.7, 0.7, 0.6], [1.0, 1.0, 0.1], {"lr": 0.001}),  # then to the smaller rate
        (CONFIG, [0.7, 0.7, 0.7], [1.0, 1.0, 1.0], {"lr": 0.0005}),
        (CONFIG, [None, 0.0, None], [1.0, 9.0, 1.0], {"lr": 0.001}),  # a failed run is worse than any other
        (GRID, [0.7, 0.7, 0.7, 0.7], [1.0, 1.0, 1.0, 1.0], {"lr": 0.001, "c": 8}),  # then to the first of the config
        (GRID, [0.7, 0.7, 0.6, 0.6], [1.0, 1.0, 1.0, 1.0], {"lr": 0.005, "c": 8}),
        (with_search({"c": [8, 2]}), [0.7, 0.7], [1.0, 1.0], {"c": 8}),
    ],
)
def test_ties_and_failures(
    config: dict[str, Any], accuracies: list[float | None], losses: list[float], expected: dict[str, float]
) -> None:
    rows = searched("nola", accuracies, losses, config)
    assert choose_settings(config, rows, ["nola"]) == {"nola": expected}
    assert choose_settings(config, rows[::-1], ["nola"]) == {"nola": expected}


def test_a_search_by_another_entrys_name() -> None:
    config = copy.deepcopy(GRID)
    config["methods"]["other"] = {"class_path": "NOLA", "init_args": {"rank": 2}, "search": "nola"}
    assert search_specs(config, ["other"]) == search_specs(config, ["nola", "other"]) == search_specs(GRID, ["nola"])
    rows = searched("nola", [0.5, 0.7, 0.6, 0.6], config=config)
    chosen = choose_settings(config, rows, ["other"])
    assert choices_in_words(config, rows, chosen) == ["nola: lr 0.005, c 2 (best of 4)"]
    few = searched("nola", [None, 0.7, None, 0.6], config=config)
    assert choices_in_words(config, few, chosen) == ["nola: lr 0.005, c 2 (best of 2; 2 failed)"]
    (final,) = final_specs(config, [0], [0], ["other"], chosen)
    assert final.config["model"]["method"]["init_args"] == {"rank": 2, "lr": 0.005, "c": 2}
    (line,) = [line for line in entry_progress(config, [0], [0], rows) if line.method == "other"]
    assert (line.search, line.final, line.done) == (0, 1, 0)
    of_linear = with_search("nola", "linear")
    of_linear["methods"]["nola"] = GRID["methods"]["nola"]
    with pytest.raises(NolaVisionError, match="'linear' with lr 0.005, c 8: unknown setting 'c' of LinearProbe"):
        complete(of_linear, ["linear"], lambda one: one)


def test_a_failed_run_is_worst_whatever_it_measured() -> None:
    rows = searched("lora", [0.9, 0.1])
    rows[0] = dataclasses.replace(rows[0], status="failed")
    assert choose_settings(CONFIG, rows, ["lora"]) == {"lora": {"lr": 0.001}}


def test_all_failed_is_an_error() -> None:
    with pytest.raises(NolaVisionError, match="all search runs of 'lora' failed"):
        choose_settings(CONFIG, searched("lora", [None, None]), ["lora"])


def test_a_search_that_has_not_ended_decides_nothing() -> None:
    rows = searched("lora", [0.5, 0.6])
    with pytest.raises(NolaVisionError, match="0.001 has not ended"):
        choose_settings(CONFIG, rows[:1], ["lora"])
    with pytest.raises(NolaVisionError, match="0.001 has not ended"):
        choose_settings(CONFIG, [rows[0], dataclasses.replace(rows[1], status="interrupted")], ["lora"])


def test_rows_of_other_settings_are_not_taken() -> None:
    """Final runs and search runs of another shot count lie in the same folder."""
    rows = searched("lora", [0.5, 0.6])
    ten_shot = copy.deepcopy(CONFIG)
    ten_shot["data"]["shots"] = 10
    best_elsewhere = Row.of(search_specs(ten_shot, ["lora"])[0].config, "search", "completed", val_accuracy=1.0)
    final = Row.of(final_specs(CONFIG, [0], [0], ["lora"], {})[0].config, "final", "completed", val_accuracy=1.0)
    assert choose_settings(CONFIG, [*rows, best_elsewhere, final], ["lora"]) == {"lora": {"lr": 0.001}}


@pytest.mark.parametrize(
    ("method", "search", "message"),
    [
        ("nola", {"lrr": [0.1]}, r"unknown setting 'lrr' of NOLA: did you mean lr"),
        ("linear", {"c": [2, 8]}, "unknown setting 'c' of LinearProbe"),
        ("nola", {"lr": [0.1, "fast"]}, "lr of NOLA is 'fast': it must be a number"),
        ("nola", {"lr": [None, 0.1]}, "lr of NOLA is None: it must be a number"),
        ("nola", {"lr": [0.1], "c": [2, -2]}, "with lr 0.1, c -2: c of NOLA is -2.0: it must be above zero"),
        ("nola", {"max_bytes": [2000]}, "max_bytes: list `budgets`"),
        ("nola", {key: list(range(1, 99)) for key in ("rank", "num_basis", "c", "lr")}, "has 92,236,816 combinations"),
    ],
)
def test_a_search_that_cannot_be_done_is_refused(method: str, search: dict[str, Any], message: str) -> None:
    with pytest.raises(NolaVisionError, match=f"`search` of the method '{method}'.*{message}"):
        complete(with_search(search, method), [method], lambda one: one)


def test_values_of_a_search_are_those_of_the_parser() -> None:
    given = {
        "lr": ["5e-3", 0.005, 1],
        "c": [2, 2.0],
        "bits": ["4", 8],
        "targets": ["qkv", ["qkv", "mlp"], ["qkv", "mlp"]],
    }
    found = complete(with_search(given), ["nola"], lambda one: one)["methods"]["nola"]["search"]
    assert found == {"lr": [0.005, 1], "c": [2], "bits": [4, 8], "targets": ["qkv", ["qkv", "mlp"]]}
    assert {type(value) for value in (*found["lr"], *found["c"])} == {float} and type(found["bits"][0]) is int


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("0,2,5", [0, 2, 5]),
        ("7", [7]),
        ("4-4", [4]),
        ("0-2, 9", [0, 1, 2, 9]),
        ("1,0-2", [1, 0, 2]),
    ],
)
def test_ranges(text: str, numbers: list[int]) -> None:
    assert parse_range(text) == numbers


@pytest.mark.parametrize("text", ["", "3-0", "a", "-1", "1,,2", "1-", "0.5", "0-1-2", "1 2", "٣"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(NolaVisionError, match="not a range of numbers"):
        parse_range(text)


def test_a_huge_range_takes_no_memory() -> None:
    with pytest.raises(NolaVisionError, match="more than 10,000 numbers"):
        parse_range("0-99999999999")


def test_methods() -> None:
    assert parse_methods("all", CONFIG) == ["nn1", "linear", "full", "lora", "nola"]
    assert parse_methods("nola, lora,nola", CONFIG) == ["nola", "lora"]
    for text, message in (("", "has an empty name"), ("nola,", "has an empty name"), ("nola,lorra", "unknown method")):
        with pytest.raises(NolaVisionError, match=message):
            parse_methods(text, CONFIG)


def test_entries_under_another_name() -> None:
    config, names = rename(CONFIG, ["nola"], suffix("data.shots", 10))
    assert names == ["nola-shots10"] and config["methods"]["nola-shots10"] == CONFIG["methods"]["nola"]
    assert suffix("targets", ["qkv", "mlp"]) == "-targetsqkv+mlp"
    # a search by another entry's name is one of a copy of that
    config, names = rename(with_search("nola", "lora"), ["lora"], "-shots10")
    assert names == ["lora-shots10"] and {spec.method for spec in search_specs(config, names)} == {"nola-shots10"}


def test_vary_and_shards() -> None:
    config, names = vary(CONFIG, ["nn1", "lora", "nola"], "rank", [1, 4])
    assert names == ["nn1", "lora-rank1", "lora-rank4", "nola-rank1", "nola-rank4"]
    assert config["methods"]["nola-rank4"]["init_args"]["rank"] == 4
    assert config["methods"]["nola-rank4"]["search"] == CONFIG["methods"]["nola"]["search"]
    specs = final_specs(config, [0, 1], [0], names, {})
    assert [spec.method for spec in specs[:3]] == ["nn1", "lora-rank1", "lora-rank4"]
    assert sorted(s.run_hash for i in (1, 2, 3) for s in shard_of(specs, (i, 3))) == sorted(s.run_hash for s in specs)
    rates, names = vary(CONFIG, ["nola"], "lr", [0.1, 0.2])
    assert not search_specs(rates, names)
    scales, names = vary(GRID, ["nola"], "c", [1, 4])
    assert [entry["search"] for name, entry in scales["methods"].items() if name in names] == 2 * [
        {"lr": [0.005, 0.001]}
    ]
    named, names = vary(with_search("nola", "lora"), ["lora"], "rank", [1, 4])
    found = [(spec.method, spec.config["model"]["method"]["init_args"]["rank"]) for spec in search_specs(named, names)]
    assert found == [("lora-rank1", 1)] * 3 + [("lora-rank4", 4)] * 3
    listed, names = vary(CONFIG, ["nola"], "targets", [["qkv", "mlp"]])
    assert names == ["nola-targetsqkv+mlp"] and listed["methods"][names[0]]["init_args"]["targets"] == ["qkv", "mlp"]
    with pytest.raises(NolaVisionError, match="already has a method 'nola-c1'"):
        vary(CONFIG, ["nola"], "c", [1, 1])


def test_progress_counts_completed_runs() -> None:
    rows = searched("nola", [0.5, 0.6, None])
    rows[2] = dataclasses.replace(rows[2], status="failed")
    final = final_specs(CONFIG, [0, 1], [0], ["nola"], {"nola": {"lr": 0.001}})
    rows.append(Row.of(final[0].config, "final", "completed", seconds_total=4.0))
    (line,) = [line for line in entry_progress(CONFIG, [0, 1], [0], rows) if line.method == "nola"]
    assert (line.search, line.final, line.done, line.seconds) == (3, 2, 3, 4.0)
    (line,) = [line for line in entry_progress(CONFIG, [0, 1], [0], rows, (2, 2)) if line.method == "nola"]
    assert line.final == 1


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "advice"),
    [
        (2, 1, 2, None),
        (1, 2, 2, None),
        (2, 2, 2, "2 workers x 2 threads on 2 cores is slow: give --workers 1 or --threads 1"),
        (3, 2, 5, "3 workers x 2 threads on 5 cores is slow: give --workers 2 or --threads 1"),
        (1, 8, 2, "8 threads on 2 cores is slow: give --threads 2"),
        (4, 1, 2, "4 workers x 1 thread on 2 cores is slow: give --workers 2"),
        (4, 4, 2, "4 workers x 4 threads on 2 cores is slow: give --workers 2 --threads 1"),
        (4, 2, 2, "4 workers x 2 threads on 2 cores is slow: give --workers 1 or --workers 2 --threads 1"),
        (2, 2, 1, "2 workers x 2 threads on 1 core is slow: give --workers 1 --threads 1"),
    ],
)
def test_more_threads_than_cores_are_warned_of(workers: int, threads: int, cores: int, advice: str | None) -> None:
    assert threads_warning(workers, threads, cores) == advice


def test_the_plan_of_a_league_keeps_names_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["lora-1bit@10KB", "tiny-lora@50KB"]
    entries = [EntryProgress(name, 6, 8, 0, 1243.2, estimated=True) for name in names]
    sizes = {name: ("max_parameters 51,050", 49_967) for name in names}
    Console(width=80).print(plan_table(entries, 1, (1, 1), sizes=sizes))
    out = capsys.readouterr().out
    assert all(text in out for text in (*names, "max_parameters", "51,050", "49,967", "~1243.2")) and "…" not in out


def test_fit_and_sweep_with_the_same_settings_are_one_run() -> None:
    from nola_vision.runs import run_id
    from nola_vision.runs.config_files import load_configs
    from nola_vision.runs.parsing import parse
    from nola_vision.sweep.runner import SWEEP_SETTINGS

    raw, options = load_configs(["quickstart.yaml"]), ["--data.shots=3", "--trainer.max_epochs=2"]
    methods = ["1nn", "linear", "nola"]
    of_sweep = complete(raw, methods, lambda entry: parse(entry, [*SWEEP_SETTINGS, *options]))
    for method in methods:
        fitted = parse(run_id.resolve(raw, method), options)
        rate = fitted["model"]["method"]["init_args"].get("lr")
        (spec,) = final_specs(of_sweep, [0], [0], [method], {} if rate is None else {method: {"lr": rate}})
        assert spec.run_hash == run_id.run_hash(fitted, "final"), method
        assert run_id.run_folder("runs", spec.config, "final") == run_id.run_folder("runs", fitted, "final")
