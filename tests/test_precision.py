"""Number formats of a run: what `auto` resolves to, and TF32 on GPUs that do not have to be here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nola_vision.runs import photos, run_id
from nola_vision.runs.config_files import load_config
from nola_vision.runs.parsing import parse
from nola_vision.training import precision
from tiny import TINY, tiny


def gpus(monkeypatch: pytest.MonkeyPatch, *able: bool) -> None:
    """Makes torch report GPUs, with bfloat16 or without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(able))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(able))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(able))
    capabilities = [(8, 0) if one else (7, 5) for one in able]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])


@pytest.mark.parametrize(
    ("accelerator", "able", "cpu", "expected"),
    [
        ("cpu", (True,), {}, "32-true"),
        ("cpu", (), {"amx_bf16": True}, "bf16-mixed"),
        ("auto", (), {"avx512_bf16": True}, "bf16-mixed"),
        ("auto", (), {"avx512_f": True, "avx512_bf16": False}, "32-true"),
        ("auto", (True, True), {}, "bf16-mixed"),
        ("auto", (True, False), {"amx_bf16": True}, "32-true"),
        ("gpu", (True,), {}, "bf16-mixed"),
        ("mps", (), {"avx512_bf16": True}, "32-true"),
    ],
)
def test_auto_is_what_all_devices_compute_fast(
    accelerator: str, able: tuple[bool, ...], cpu: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *able)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert precision.fastest(accelerator) == expected


def test_auto_is_stored_and_hashed_as_its_value() -> None:
    def run(*options: str, fastest: str = "none") -> tuple[str, str]:
        made = parse(run_id.resolve(TINY, "nola"), options, fastest=lambda accelerator: {"cpu": fastest}[accelerator])
        return made["trainer"]["precision"], run_id.run_hash(made, "final")

    assert run("--trainer.precision=auto", fastest="bf16-mixed") == run("--trainer.precision=bf16-mixed")
    assert run("--trainer.precision", "auto", fastest="32-true") == run("--trainer.precision=32-true")
    for spelling, value in (("bf16", "bf16-mixed"), ("16", "16-mixed"), ("32", "32-true"), ("null", "32-true")):
        assert run(f"--trainer.precision={spelling}") == run(f"--trainer.precision={value}")
    assert run("--trainer.precision=32-true")[1] == run()[1] != run("--trainer.precision=bf16-mixed")[1]
    assert tiny(trainer={"precision": "auto"})["trainer"]["precision"] in ("bf16-mixed", "32-true")


def test_cells_of_the_paper_and_photos_on_a_gpu_are_16_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cell in ("vitb_cifar10_5shot.yaml", "vitl_mae_cub200_10shot_released.yaml", "vitb_pets_1shot_paper.yaml"):
        assert load_config(cell)["trainer"]["precision"] == "bf16-mixed"
    for config in ("quickstart.yaml", "resnet20_cifar10_scratch.yaml", "mlp_mnist_scratch.yaml"):
        assert "precision" not in load_config(config)["trainer"]
    made = {"trainer": {"precision": "32-true"}}
    for able, device, expected in (
        ((), {}, "32-true"),
        ((True,), {}, "bf16-mixed"),
        ((False,), {}, "32-true"),
        ((True,), {"accelerator": "cpu"}, "32-true"),
        ((True,), {"accelerator": "cuda", "devices": [0]}, "bf16-mixed"),
    ):
        gpus(monkeypatch, *able)
        found = photos.for_this_machine({"trainer": {**made["trainer"], **device}}, device.get("accelerator", "auto"))
        assert found["trainer"] == {**device, "precision": expected}


def test_tf32_is_for_float32_on_a_gpu_and_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(device: str, value: str) -> SimpleNamespace:
        return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), precision=value)

    setting = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    before = setting.fp32_precision
    for device, value, expected in (
        ("cuda", "32-true", True),
        ("cuda", "bf16-mixed", False),
        ("cpu", "32-true", False),
    ):
        with pytest.raises(KeyError), precision.tf32(trainer(device, value)) as used:  # type: ignore[arg-type]
            assert used == expected == (setting.fp32_precision == "tf32")
            assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")  # Lightning asks
            assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"
            raise KeyError
        assert setting.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"
    try:
        setting.fp32_precision = "ieee"  # chosen by the user
        with precision.tf32(trainer("cuda", "32-true")) as used:  # type: ignore[arg-type]
            assert not used and setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before
