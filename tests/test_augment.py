"""The cheap colour jitter and blur, against torchvision's own functions on float images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from nola_vision.images.augment import ColorJitter, PlanarFloat, adjust_hue, gaussian_blur
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import train_transform

CONFIG = InputConfig(size=20, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.9)
TOLERANCE = 1e-5  # of a range of 1; a level of 8 bits is 4e-3


def noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))


def edge_colours() -> torch.Tensor:
    """Every colour of the levels 0, 1/2 and 1, where two channels or all are equal, as an image of 3 x 9 pixels."""
    level = torch.tensor([0.0, 0.5, 1.0])
    return torch.cartesian_prod(level, level, level).T.reshape(3, 3, 9).contiguous()


@pytest.mark.parametrize("factor", [-1 / 6, -0.1, -0.013, 0.0, 0.05, 0.1, 1 / 6])
def test_hue_is_torchvisions(factor: float) -> None:
    for image in (noise(40, 31), edge_colours(), noise(8, 8) * 1e-3):
        assert (adjust_hue(image, factor) - functional.adjust_hue(image, factor)).abs().max() < TOLERANCE


def test_hue_by_hand() -> None:
    """A sixth of the circle turns red to yellow, green to cyan and blue to magenta, and leaves grey alone."""
    colours = torch.tensor([[1, 0, 0, 0.3], [0, 1, 0, 0.3], [0, 0, 1, 0.3]])[:, None]
    turned = torch.tensor([[1, 0, 1, 0.3], [1, 1, 0, 0.3], [0, 1, 1, 0.3]])[:, None]
    assert torch.allclose(adjust_hue(colours, 1 / 6), turned, atol=1e-6)
    assert torch.equal(adjust_hue(colours, 0.0), colours)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    for image in (noise(40, 31), noise(7, 7), noise(9, 30)[:1].expand(3, -1, -1)):
        before = image.clone()
        blurred = gaussian_blur(image, 13, sigma)
        assert (blurred - functional.gaussian_blur(image, [13, 13], [sigma, sigma])).abs().max() < TOLERANCE
        assert torch.equal(image, before)


@pytest.mark.parametrize("seed", range(8))
def test_jitter_is_torchvisions_from_the_same_seed(seed: int) -> None:
    image, ranges = noise(20, 20), (0.4, 0.4, 0.4, 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        ours = ColorJitter(*ranges)(image)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        theirs = v2.ColorJitter(*ranges)(image)
        assert torch.equal(torch.get_rng_state(), state)
    assert (ours - theirs).abs().max() < TOLERANCE


def test_released_is_torchvisions_chain_from_the_same_seeds() -> None:
    """The same draws, so the same law. On bytes torchvision cuts off a part of a level at each of up to six steps."""
    crop = [v2.ToImage(), v2.RandomResizedCrop(20, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)]
    recolour = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(0.5),
    ]
    to_float, normalise = v2.ToDtype(torch.float32, scale=True), v2.Normalize(CONFIG.mean, CONFIG.std)
    on_floats = v2.Compose([*crop, to_float, *recolour, normalise])
    on_bytes = v2.Compose([*crop, *recolour, to_float, normalise])
    ours = train_transform(CONFIG, "released")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    deviation, different = torch.tensor(CONFIG.std)[:, None, None], set()
    with torch.random.fork_rng(devices=[]):
        for seed in range(60):
            results = []
            for transform in (ours, on_floats, on_bytes):
                torch.default_generator.manual_seed(seed)
                results.append(transform(image) * deviation)
            different.add(results[0].numpy().tobytes())
            assert (results[0] - results[1]).abs().max() < TOLERANCE
            assert (results[0] - results[2]).abs().mean() < 4 / 255
    assert len(different) == 60


def test_planar_float_keeps_the_values() -> None:
    pixels = functional.pil_to_tensor(Image.effect_noise((9, 7), 90).convert("RGB"))
    assert not pixels.is_contiguous()
    planes = PlanarFloat()(pixels)
    assert planes.is_contiguous() and type(planes) is torch.Tensor
    assert torch.equal(planes, functional.to_dtype(pixels, torch.float32, scale=True))
