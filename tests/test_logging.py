"""The commands of docs/logging.md, with what each tool then has."""

import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nola_vision.cli.main import main
from nola_vision.runs import run_id, runner, store
from nola_vision.runs.parsing import parse
from nola_vision.runs.record import Row
from tiny import TINY, tiny

pytestmark = pytest.mark.slow  # each of the packages takes seconds to import and to start
PAGE = Path(__file__).parent.parent / "docs" / "logging.md"
QUICK = (
    "--method=linear --threads=1 --trainer.max_epochs=2 --trainer.check_val_every_n_epoch=1 --data.test_limit=20 "
    "--trainer.enable_progress_bar=false"
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield


def fit(tool: str) -> Row:
    """Runs the page's command for a tool, made short, and returns the row of the run that it logged."""
    pytest.importorskip(tool)
    found = re.search(rf"<!-- test: {tool} -->\n```bash\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    command, *arguments = shlex.split(found[1].replace("\\\n", " "))
    assert command == "nola-vision" and main([*arguments, *shlex.split(QUICK)]) == 0
    rows, _ = store.read_rows("runs")
    (row,) = [row for row in rows if row.method == "linear" and row.stage == "final"]
    return row


def test_tensorboard() -> None:
    row = fit("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = Path("logs").glob("*/version_0")
    events = EventAccumulator(str(folder)).Reload()
    assert {"train_loss", "val_loss", "test_accuracy", "test_macro_f1"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("test_accuracy")] == [pytest.approx(row.test_accuracy)]


def test_wandb_offline_has_one_run_for_each() -> None:
    fit("wandb")
    options = ["--trainer.logger+=WandbLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.offline=true"]
    runner.run(parse(run_id.resolve(TINY, "linear"), options, ["wandb"]), "again")  # as a sweep's process does
    logged = sorted(Path("logs/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logged) == 2
    for path in logged:
        assert all(name in path.read_bytes() for name in (b"train_loss", b"val_accuracy", b"test_balanced_accuracy"))
    validated = tiny(
        "linear", trainer={"check_val_every_n_epoch": 1}
    )  # a logger is not in the hash, its validations are
    assert run_id.run_hash(validated, "final") == next(iter(store.read_rows("again")[0])).run_hash


def test_mlflow_in_a_local_file() -> None:
    row = fit("mlflow")
    with sqlite3.connect("mlflow.db") as database:
        values = database.execute("select value from metrics where key = 'test_accuracy'").fetchall()
        (ended,) = database.execute("select status from runs").fetchall()
    assert values == [(pytest.approx(row.test_accuracy),)] and ended == ("FINISHED",)
