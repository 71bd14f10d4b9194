"""What only a GPU can show; skipped where there is none."""

import pytest
import torch

from nola_vision import NOLA, adapt
from nola_vision.adapters.random_basis import basis_bytes, basis_key

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_basis_has_the_same_bits_on_a_gpu() -> None:
    key = basis_key(1, "shape 768x3072", "A")
    assert torch.equal(basis_bytes(key, 0, 64, 4, 768, "cuda").cpu(), basis_bytes(key, 0, 64, 4, 768))


def test_an_adapted_model_moves_to_a_gpu_and_agrees() -> None:
    model = adapt("vit_glyph_patch4_32.glyphs", NOLA(targets=["qkv", "mlp"], num_basis=16), ["a", "b"]).eval()
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.1)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.allclose(model.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
