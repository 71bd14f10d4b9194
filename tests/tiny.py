"""A run of a second: two blocks of a small ViT with random weights on the digits; and how tests read such runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.vision_transformer import VisionTransformer, test_vit

from nola_vision.common import process_cache
from nola_vision.common.mappings import overlay
from nola_vision.runs import run_id, store
from nola_vision.runs.cross_validation import run_with_estimate
from nola_vision.runs.parsing import parse
from nola_vision.runs.record import Row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import RunCallback, RunQueue

# timm looks up `default_cfgs` in the module that registers the model
default_cfgs = generate_default_cfgs({"vit_short.r160_in1k": get_pretrained_cfg("test_vit.r160_in1k").to_dict()})


@register_model
def vit_short(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's smallest ViT with two of its six blocks: most of a run's time is Lightning's and a block's overhead."""
    return test_vit(pretrained, **{"depth": 2, **kwargs})


TINY: dict[str, Any] = {
    "protocol": "tiny",
    "method": "nola",
    "methods": {
        "1nn": {"class_path": "NearestNeighbor"},
        "linear": {"class_path": "LinearProbe", "init_args": {"lr": 0.05}},
        "nola": {"class_path": "NOLA", "init_args": {"targets": ["mlp"], "num_basis": 16, "lr": 0.01}},
        "nola4": {"class_path": "NOLA", "init_args": {"targets": ["mlp"], "num_basis": 16, "lr": 0.01, "bits": 4}},
        "full-ft": {"class_path": "FullFinetune", "init_args": {"lr": 0.001}},
    },
    "threads": 1,
    "model": {"backbone": {"tag": "vit_short.r160_in1k", "base": "random", "img_size": 32}, "warmup_epochs": 1},
    "data": {"dataset": "digits", "shots": 3, "batch_size": 10, "augmentation": "none", "test_limit": 50},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
}

# for the command line: the same ViT, on the data of whatever config is given; nothing is run on frozen features first
SMALL_VIT = [
    "--model.backbone.tag=vit_short.r160_in1k", "--model.backbone.base=random", "--model.backbone.img_size=32"
]  # fmt: skip


def tiny(method: str = "nola", **changes: object) -> run_id.Config:
    """The run config of a tiny run, with sections of it changed."""
    return parse(run_id.resolve(overlay(TINY, changes), method))


def trained_rows(folder: str | Path) -> list[Row]:
    """The rows in a folder, without those of frozen features that a `fit` of another method leaves too."""
    rows, problems = store.read_rows(folder)
    assert not problems
    return [row for row in rows if row.method_class not in run_id.FROZEN_METHODS.values()] or rows


def execute_in_process(specs: Sequence[RunSpec], out: Path, callback: RunCallback, *_: object) -> list[Row]:
    """As `local.execute` without worker processes, each of which imports torch for seconds."""
    queue = RunQueue(specs, out, callback)
    with process_cache.keeping():
        while (spec := queue.take()) is not None:
            queue.finish(spec, run_with_estimate(spec.config, out, spec.stage, keep_going=True))
    return queue.rows()
