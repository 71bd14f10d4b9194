"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from nola_vision import NOLA, BackboneSpec, adapt
from nola_vision.adapters.random_basis import basis_bytes, basis_key
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.building import make_bank
from nola_vision.runs import runner
from tiny import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_basis_has_the_same_bits_on_a_gpu() -> None:
    key = basis_key(1, "shape 768x3072", "A")
    assert torch.equal(basis_bytes(key, 0, 64, 4, 768, "cuda").cpu(), basis_bytes(key, 0, 64, 4, 768))


def test_an_adapted_model_moves_to_a_gpu_and_agrees() -> None:
    model = adapt("vit_mini_patch4_32.contours", NOLA(targets=["qkv", "mlp"], num_basis=16), ["a", "b"]).eval()
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.1)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.allclose(model.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_float32_run_uses_tf32_and_a_16_bit_run_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    rows = {p: runner.run(tiny(trainer={"accelerator": "gpu", "precision": p}), tmp_path) for p in ("32-true", "auto")}
    assert str(rows["32-true"].device).endswith(" (TF32)") == torch.cuda.is_tf32_supported()
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    assert rows["auto"].train_loss == pytest.approx(rows["32-true"].train_loss, rel=0.02)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert rows["auto"].config["trainer"]["precision"] == "bf16-mixed"
        assert "TF32" not in str(rows["auto"].device)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_routed_batch_agrees_with_the_cpu(dtype: torch.dtype | None) -> None:
    method = NOLA(targets=["qkv", "mlp"], num_basis=16)
    backbone = create_backbone(BackboneSpec("vit_mini_patch4_32.contours"), 0).eval()
    bank = make_bank(backbone, method, 2, num_adapters=3)
    bank.attach(backbone)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    images, index = torch.randn(4, 3, 32, 32), torch.tensor([2, 0, 2, 1])
    with bank.route(index):
        expected = bank(images)
    backbone.cuda(), bank.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype is not None), bank.route(index):
        found = bank(images.cuda()).cpu().float()
    tolerance = 1e-3 if dtype is None else 5e-2
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
