"""Rows: to and from JSON, written whole or not at all, and unreadable ones reported instead of raised."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import store
from nola_vision.runs.environment import environment, git_state
from nola_vision.runs.record import DETERMINISTIC, SCHEMA_VERSION, Row, count_once

RUN_CONFIG: dict[str, Any] = {
    "protocol": "quickstart",
    "method": "nola",
    "model": {
        "backbone": {"tag": "tag"},
        "method": {"class_path": "nola_vision.adapters.methods.nola.NOLA", "init_args": {"lr": 0.005}},
        "run_seed": 2,
        "basis_seed": None,
    },
    "data": {"dataset": "digits", "shots": 5, "split_seed": 1},
    "threads": 2,
}


def row(**measured: Any) -> Row:
    return Row.of(RUN_CONFIG, "final", measured.pop("status", "completed"), **measured)


def test_a_row_knows_its_run_from_the_config() -> None:
    made = row(test_accuracy=0.5)
    assert (made.cell, made.method, made.method_class) == ("tag-digits-5shot-quickstart", "nola", "NOLA")
    assert (made.split, made.init, made.split_seed, made.run_seed, made.basis_seed) == (1, 2, 1, 2, 2)
    assert (made.threads, made.test_accuracy, made.val_accuracy) == (2, 0.5, None)
    fixed = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "basis_seed": 7}}
    assert Row.of(fixed, "final", "completed").basis_seed == 7
    neighbour = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "method": {"class_path": "NearestNeighbor"}}}
    of_neighbour = Row.of(neighbour, "final", "completed")
    assert (of_neighbour.init, of_neighbour.run_seed, of_neighbour.basis_seed) == (None, None, None)


def test_a_row_comes_back_from_json_as_it_was() -> None:
    made = row(test_accuracy=0.1 + 0.2, adapter_file_bytes=98612, versions={"torch": "2"}, git={"dirty": True})
    assert Row.from_json(made.to_json(), Path("row.json")) == made


def test_deterministic_columns_are_columns() -> None:
    assert set(DETERMINISTIC) < {item.name for item in dataclasses.fields(Row)}


def test_not_a_number_is_written_as_null_with_a_warning() -> None:
    made = row(train_loss=float("nan"), val_loss=float("inf"), data={"counts": [1.0, float("nan")]}, warnings=["old"])
    plain = json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (plain["train_loss"], plain["val_loss"], plain["data"]) == (None, None, {"counts": [1.0, None]})
    assert plain["warnings"] == [
        "old",
        "train_loss was nan and is written as null",
        "val_loss was inf and is written as null",
        "data.counts[1] was nan and is written as null",
    ]
    assert made.warnings == ["old"]


def test_a_path_in_the_config_is_written_as_text() -> None:
    assert json.loads(row(data={"root": Path("/a")}).to_json())["data"] == {"root": "/a"}


def test_an_unknown_key_is_ignored() -> None:
    plain = {**json.loads(row().to_json()), "invented_later": 1}
    assert Row.from_json(json.dumps(plain), Path("row.json")) == row()


GOOD = json.loads(row().to_json())


def changed(setting: str, value: Any) -> str:
    """The good row with another setting in its config."""
    plain = json.loads(json.dumps(GOOD))
    *path, last = f"config.{setting}".split(".")
    place = plain
    for key in path:
        place = place[key]
    place[last] = value
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"schema_version": 1, "sta', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" * 100_001, "more than 100,000 lists"),
        ("[]", "not a result row"),
        ("3", "not a result row"),
        ("{}", "not a result row"),
        ('{"schema_version": "1"}', "not a result row"),
        ('{"schema_version": 1}', "lacks status"),
        (json.dumps({**GOOD, "schema_version": SCHEMA_VERSION + 1}), "update it"),
        (json.dumps({**GOOD, "test_accuracy": "high"}), "wrong kind in test_accuracy"),
        (json.dumps({**GOOD, "test_accuracy": True}), "wrong kind in test_accuracy"),
        (json.dumps({**GOOD, "split": 0.5}), "wrong kind in split"),
        (json.dumps({**GOOD, "status": "fine"}), "wrong kind in status"),
        (json.dumps({**GOOD, "config": []}), "wrong kind in config"),
        (json.dumps({**GOOD, "warnings": [1]}), "wrong kind in warnings"),
        (json.dumps({**GOOD, "status": ["completed"]}), "wrong kind in status"),
        (json.dumps({**GOOD, "test_accuracy": float("nan")}), "which is not finite"),
        (json.dumps({**GOOD, "data": {"mean": [-float("inf")]}}), "which is not finite"),
        (json.dumps({**GOOD, "split": 7}).replace(" 7", " 1e400"), "which is not finite"),
        (json.dumps({**GOOD, "split": 7}).replace(" 7", f" {10**4000}"), r"10{56}\.\.\., which does not fit 64 bits"),
        (json.dumps({**GOOD, "test_nll": 1e308}), "holds the number 1e.308, which is not finite or too large"),
        (
            json.dumps({**GOOD, "data": {"counts": {"test": 2**62}}}),
            "lacks a valid number of test images in data.counts",
        ),
        (json.dumps({**GOOD, "data": {"draw": [3, 10**4000]}}), r"10{56}\.\.\., which does not fit 64 bits"),
        (json.dumps({**GOOD, "data": {"seed": -(2**63) - 1}}), "-9223372036854775809, which does not fit 64 bits"),
        (json.dumps({**GOOD, "test_accuracy": 7}), "has test_accuracy 7, which must be between 0 and 1"),
        (json.dumps({**GOOD, "val_accuracy": -0.1}), "has val_accuracy -0.1, which must be between 0 and 1"),
        (json.dumps({**GOOD, "adapter_file_bytes": -1}), "has adapter_file_bytes -1, which must be 0 or more"),
        (json.dumps({**GOOD, "seconds_total": -1.5}), "has seconds_total -1.5, which must be 0 or more"),
        (json.dumps({**GOOD, "error": "\ud800"}), "not valid Unicode"),
        (json.dumps({**GOOD, "data": {"\ud800": 1}}), "not valid Unicode"),
        (json.dumps({**GOOD, "data": {"deep": json.loads("[" * 60 + "]" * 60)}}), "nested more than 50 levels deep"),
        (json.dumps({**GOOD, "data": dict.fromkeys(map(str, range(1000)))}), "more than 1000 keys"),
        (json.dumps({**GOOD, "estimate": {"folds": [0.5]}}), "has an unusable estimate .an estimate must have"),
        (json.dumps({**GOOD, "estimate": []}), "wrong kind in estimate"),
        (json.dumps({**GOOD, "data": {"counts": [1]}}), "valid number of test images in data.counts"),
        (json.dumps({**GOOD, "data": {"counts": {"test": -1}}}), "valid number of test images in data.counts"),
        (
            json.dumps({**GOOD, "data": {"counts": {"test": True}}}),
            "valid number of test images in data.counts",
        ),
        (json.dumps({**GOOD, "data": {"majority_share": "1"}}), 'majority_share "1", which must be between 0 and 1'),
        (json.dumps({**GOOD, "data": {"class_names": {"a": 1}}}), "class_names .*, which must be a list of names"),
        (
            json.dumps({**GOOD, "data": {"untested_classes": [1]}}),
            "untested_classes .1., which must be a list of names",
        ),
        (json.dumps({**GOOD, "data": {"majority_share": 1.5}}), "majority_share 1.5, which must be between 0 and 1"),
        (json.dumps({**GOOD, "started": "yesterday"}), 'has started "yesterday", which is not like 2026'),
        (json.dumps({**GOOD, "started": "2026-01-31T12:00:00+02:00"}), "which is not like 2026"),
        (json.dumps({**GOOD, "config": {}}), "config without model.backbone.tag"),
        (json.dumps({**GOOD, "config": {"model": [1]}}), "config whose model is not a mapping"),
        (changed("model.backbone", ["b"]), "config whose model.backbone is not a mapping"),
        (changed("model.backbone.tag", ["b"]), "config of the wrong kind in model.backbone.tag"),
        (changed("model.backbone.file", 3), "config of the wrong kind in model.backbone.file"),
        (changed("model.method", None), "config without model.method.class_path"),
        (changed("model.method.init_args", [1]), "config of the wrong kind in model.method.init_args"),
        (
            changed("data", {"dataset": "folder", "root": ".."}),
            'data.root ".." .* which does not end in a name',
        ),
        (changed("data", {"dataset": "folder"}), "config without data.root"),
        (changed("data.shots", [5]), r"config of the wrong kind in data.shots \(\[5\]\)"),
        (changed("trainer", "fast"), "config of the wrong kind in trainer"),
        (json.dumps({**GOOD, "method": "m" * 256}), "has method .* of 256 characters, more than 255"),
        *(
            (json.dumps({**GOOD, column: name}), f"has {column} .*, which is not a file name")
            for column in ("cell", "run_hash", "entry_hash")
            for name in ("../x", "/etc/x", "a/b", "a\\b", "", ".hidden", "a\0b", "a\nb", "\x1b[31m", "x" * 5000)
        ),
    ],
    ids=lambda value: str(value)[-40:].encode("unicode_escape").decode(),
)
def test_garbage_is_refused_with_its_path(text: str, message: str) -> None:
    with pytest.raises(NolaVisionError, match=message) as raised:
        Row.from_json(text, Path("/runs/row.json"))
    assert str(raised.value).startswith("/runs/row.json") and len(str(raised.value)) < 250
    assert str(raised.value).isprintable()


def test_a_whole_number_does_as_an_accuracy() -> None:
    assert Row.from_json(json.dumps({**GOOD, "test_accuracy": 1}), Path("row.json")).test_accuracy == 1


def test_write_and_read(tmp_path: Path) -> None:
    assert store.find_row(tmp_path) is None
    assert store.find_row(tmp_path / "missing") is None
    path = store.write_row(tmp_path, row())
    assert path == tmp_path / "row.json"
    assert store.read_row(path) == row()
    assert store.find_row(tmp_path) == row()
    store.write_row(tmp_path, row(status="failed", error="it broke"))
    found = store.find_row(tmp_path)
    assert found is not None and found.error == "it broke"
    assert os.listdir(tmp_path) == ["row.json"]


@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_before_the_new_row_is_in_place_leaves_the_old_one(
    crash: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_row(tmp_path, row(test_accuracy=0.25))
    written: list[Row] = []

    def fail(source: Path, target: Path) -> None:
        written.append(store.read_row(source))
        raise crash

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((NolaVisionError, KeyboardInterrupt)):
        store.write_row(tmp_path, row(test_accuracy=0.75))
    assert written == [row(test_accuracy=0.75)]  # the new row was whole before it took the old one's place
    assert store.read_row(tmp_path / "row.json").test_accuracy == 0.25
    assert os.listdir(tmp_path) == ["row.json"]


def test_a_crash_while_writing_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NolaVisionError, match="Input/output error"):
        store.write_row(tmp_path, row())
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_the_old_row(tmp_path: Path) -> None:
    """A kill runs no clean-up: what it leaves beside the row is not taken for one."""
    store.write_row(tmp_path, row(test_accuracy=0.25))
    code = (
        "import dataclasses, os, sys; from nola_vision.runs import store;"
        "os.replace = lambda *paths: os._exit(9); row = store.read_row(sys.argv[1] + '/row.json');"
        "store.write_row(sys.argv[1], dataclasses.replace(row, test_accuracy=0.75))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=_environment()).returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    rows, problems = store.read_rows(tmp_path)
    assert [found.test_accuracy for found in rows] == [0.25] and problems == []


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NolaVisionError, match=r"cannot be written to .*missing \(No such file or directory\)"):
        store.write_row(tmp_path / "missing", row())
    with pytest.raises(NolaVisionError, match="no folder .*missing"):
        store.read_rows(tmp_path, tmp_path / "missing")
    with pytest.raises(NolaVisionError, match="cannot be read"):
        store.read_row(tmp_path / "row.json")


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, for whom every folder is writable
    with pytest.raises(NolaVisionError, match="Permission denied"):
        store.write_row(tmp_path, row())


def test_unreadable_rows_are_reported_and_the_others_read(tmp_path: Path) -> None:
    for name, content in {"a": b"{", "b": b"\xff\xfe", "d": b"[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "row.json").write_bytes(content)
    (tmp_path / "c" / "deep").mkdir(parents=True)
    store.write_row(tmp_path / "c" / "deep", row())
    (tmp_path / "c" / "other.json").write_text("{")
    rows, problems = store.read_rows(tmp_path, tmp_path / "c")  # the second is inside the first: read once
    assert rows == [row()]
    assert [path for path, _ in problems] == [tmp_path / name / "row.json" for name in "abd"]
    assert all(str(path) in sentence for path, sentence in problems)


def test_what_is_not_a_small_regular_file_is_named_at_once(tmp_path: Path) -> None:
    for name in ("big", "device", "fifo", "folder", "loop"):
        (tmp_path / name).mkdir()
    with (tmp_path / "big" / "row.json").open("wb") as file:
        file.truncate(2**30)  # a sparse file
    (tmp_path / "device" / "row.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo" / "row.json")
    (tmp_path / "folder" / "row.json").mkdir()
    (tmp_path / "loop" / "row.json").symlink_to("row.json")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "self").symlink_to(".")
    rows, problems = store.read_rows(tmp_path)
    assert rows == [] and [path.parent.name for path, _ in problems] == ["big", "device", "fifo", "folder", "loop"]
    reasons = ("larger than 32 MiB", "a device", "a FIFO", "a folder", "Too many levels of symbolic links")
    for (path, problem), reason in zip(problems, reasons, strict=True):
        assert problem.startswith(f"{path} cannot be read") and reason in problem


def test_a_row_knows_its_folder_which_is_no_column(tmp_path: Path) -> None:
    path = store.write_row(tmp_path, row(test_accuracy=0.5))
    read = store.read_row(path)
    assert read.folder == tmp_path and row().folder is None and read == row(test_accuracy=0.5)
    assert read.to_json() == path.read_text() and "folder" not in read.columns()
    moved = Row.from_json(json.dumps({**GOOD, "folder": "/etc"}), path)
    assert moved.folder == tmp_path


def test_a_row_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text("{")
    with pytest.raises(NolaVisionError, match="not JSON"):
        store.find_row(tmp_path)


def test_the_environment_names_what_is_installed() -> None:
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] and found["cpu"] and found["platform"]
    assert all(isinstance(value, str) for value in found.values())


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state() is None  # no commit yet
    Path("file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "first"], check=True)
    clean = git_state()
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    Path("untracked").write_text("1")
    assert git_state() == clean
    Path("file").write_text("2")
    assert git_state() == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_results_and_plans_are_read_without_torch() -> None:
    code = (
        "import sys, nola_vision.reports.tables, nola_vision.runs.published, nola_vision.runs.store;"
        "assert not any(name.startswith('nola_vision.sweep') for name in sys.modules);"
        "import nola_vision.sweep.plan;"
        "print([name for name in ('torch', 'lightning', 'timm') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_run_to_repeat_counts_until_the_repetition_does(tmp_path: Path) -> None:
    folder = tmp_path / "cell" / "nola" / "split0-init0-ab"
    store.set_aside(folder)  # nothing to repeat
    folder.mkdir(parents=True)
    store.write_row(folder, row(status="failed", started="2026-01-01T00:00:00+00:00"))
    store.set_aside(folder)
    assert store.find_row(folder) is not None  # what is not completed stays
    old = row(test_accuracy=0.25, started="2026-01-02T00:00:00+00:00")
    store.write_row(folder, old)
    (folder / "adapter.safetensors").write_text("old")
    with store.lock_run(folder), pytest.raises(store.BusyError):
        store.set_aside(folder)
    store.set_aside(folder)

    def counted() -> Row:
        rows, problems = store.read_rows(tmp_path)
        assert not problems
        (found,) = count_once(rows)
        return found

    assert store.find_completed(folder) is None and counted() == old  # as after a crash at any moment from here on
    assert counted().folder is not None and (counted().folder / "adapter.safetensors").read_text() == "old"
    folder.mkdir()
    store.write_row(folder, row(status="interrupted", started="2026-01-03T00:00:00+00:00"))
    assert counted() == old
    store.set_aside(folder)
    assert counted() == old
    new = row(test_accuracy=0.5, started="2026-01-04T00:00:00+00:00")
    store.write_row(folder, new)
    assert counted() == new
    store.set_aside(folder)  # again, although the first one was never dropped
    assert counted() == new and not folder.exists()
    folder.mkdir()
    store.drop_aside(folder)
    assert list(folder.parent.iterdir()) == [folder]
    store.drop_aside(folder)

    store.write_row(folder, new)
    aside = folder.with_name(f"{folder.name}.before")
    aside.write_text("a person's own file")
    with pytest.raises(NolaVisionError, match=r"\.before is not a folder, but --again moves .* there: remove it"):
        store.set_aside(folder)
    assert store.find_completed(folder) == new and aside.is_file()
    aside.unlink(), (folder / "row.json").unlink(), (folder / "row.json").mkdir()
    with pytest.raises(NolaVisionError, match=r"row\.json is a folder, but the run writes its row there"):
        store.lock_run(folder).__enter__()
