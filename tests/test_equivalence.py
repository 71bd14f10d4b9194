"""Other ways to compute the same training: each gives the plain run's loss curve within the tolerance stated here."""

import copy
from pathlib import Path

import pandas as pd
import pytest

from nola_vision.common.mappings import overlay
from nola_vision.runs import run_id, runner
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import parse

# the head hardly moves, so that the curve is the adapter's own
ADAPTER = {"num_basis": 64, "lr": 0.02, "head_lr": 1e-6, "c": 8}
SHORT = {
    "threads": 1,
    "data": {"test_limit": 20, "shots": 2, "eval_batch_size": 20},
    "model": {
        "backbone": {"tag": "vit_mini_patch4_32.contours"},  # on which four epochs change much
        "warmup_epochs": 0,
        "method": {"init_args": ADAPTER},
    },
    "trainer": {
        "max_epochs": 4,
        "check_val_every_n_epoch": 4,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
    },
}
WAYS = {
    "streamed": ({"model": {"method": {"init_args": {"storage": "streamed", "memory_mib": 0.5}}}}, 1e-5),
    "gradient checkpointing": ({"model": {"grad_checkpointing": True}}, 1e-5),
    "compiled": ({"model": {"compile": True}}, 1e-4),
    "bf16-mixed": ({"trainer": {"precision": "bf16-mixed"}}, 5e-4),
}


def losses(out: Path, changes: dict) -> list[float]:
    config = overlay(run_id.resolve(overlay(load_configs(["quickstart.yaml"]), {}), "nola"), copy.deepcopy(SHORT))
    run_config = parse(overlay(config, changes))
    row = runner.run(run_config, out)
    log = pd.read_csv(run_id.run_folder(out, run_config, "final") / "metrics.csv")["train_loss"].dropna()
    assert row.status == "completed" and len(log) == 4
    return log.tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    made = losses(tmp_path_factory.mktemp("plain"), {})
    dead = losses(tmp_path_factory.mktemp("dead"), {"model": {"method": {"init_args": {"c": 1e-6}}}})
    # an adapter that does nothing would be ten tolerances away, the widest being 5e-4
    assert dead[-1] - made[-1] > 10 * max(tolerance for _, tolerance in WAYS.values()) * made[-1]
    return made


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way == "compiled" else ()) for way in WAYS]
)
def test_the_loss_curve_is_that_of_the_plain_run(
    way: str, plain: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "compiled":
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    changes, tolerance = WAYS[way]
    assert losses(tmp_path, changes) == pytest.approx(plain, rel=tolerance)


@pytest.mark.parametrize("method", ["pranc", "hashed"])
def test_other_methods_run_to_a_row(method: str, tmp_path: Path) -> None:
    settings = {
        "pranc": {
            "class_path": "PRANC",
            "init_args": {"targets": ["re:blocks.0.attn.*"], "num_basis": 50, "nested": True},
        },
        "hashed": {"class_path": "HashedNet", "init_args": {"max_parameters": 500, "bits": 4, "quantise_from": 0.5}},
    }[method]
    config = overlay(load_configs(["quickstart.yaml"]), {"methods": {method: settings}})
    config = overlay(run_id.resolve(config, method), {k: v for k, v in SHORT.items() if k != "model"})
    row = runner.run(parse(config), tmp_path)
    assert row.status == "completed" and row.adapter_parameters == {"pranc": 50, "hashed": 492}[method]
    assert row.adapter_file_bytes is not None and row.test_accuracy is not None
