"""One model in several threads, and copies of it: what a pass computes with belongs to that pass."""

import copy
import io
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from nola_vision import NOLA, LoRA, adapt, load_adapter
from nola_vision.adapters.methods import HashedNet, Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.building import make_bank
from test_bank import IMAGES, METHODS, attached, shake, vit

PASSES, THREADS = 1000, 8


def predicted(bank: nn.Module, images: Tensor, index: list[int]) -> list[Tensor]:
    with torch.inference_mode(), bank.route(torch.tensor(index)):
        return [bank(images)]


def trained(bank: nn.Module, images: Tensor, index: list[int], prefix: float = 1.0) -> list[Tensor]:
    """Logits and gradients. `torch.autograd.grad` leaves `.grad`, which the threads share, alone."""
    with bank.using(prefix=prefix), bank.route(torch.tensor(index)):
        logits = bank(images)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(bank.parameters()))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        NOLA(targets=["qkv", "mlp"], rank=2, num_basis=9),
        NOLA(targets=["mlp", "head"], rank=2, num_basis=6),
        HashedNet(targets=["mlp"], max_parameters=50),
    ],
    ids=["nola", "head", "hashed"],
)
def test_threads_that_route_predict_and_train_get_what_they_get_alone(method: Method, checkpointing: bool) -> None:
    backbone = vit(embed_dim=24, num_heads=2)
    bank = attached(backbone, method, num_adapters=5)
    shake(bank)
    backbone.set_grad_checkpointing(checkpointing)
    generator = torch.Generator().manual_seed(0)
    jobs: list[Callable[[], list[Tensor]]] = []
    for kind in itertools.islice(itertools.cycle([predicted, trained, partial(trained, prefix=0.5)]), 24):
        index = torch.randint(5, (3,), generator=generator).tolist()
        jobs.append(partial(kind, bank, torch.randn(IMAGES.shape, generator=generator), index))
    alone = [job() for job in jobs]
    start = threading.Barrier(THREADS)

    def work(thread: int) -> int:
        start.wait()
        wrong = 0
        for place in range(thread, PASSES // 6, THREADS):  # of six cases
            made = jobs[place % len(jobs)]()
            wrong += not all(map(torch.equal, made, alone[place % len(jobs)]))
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == 0


def test_one_backward_over_passes_of_two_threads_is_right_or_refused() -> None:
    """Of a thread that lives on, and of two of which the system may give the second the number of the first."""
    backbone = vit()
    bank = attached(backbone, METHODS[0])
    shake(bank)

    def in_a_thread(images: Tensor) -> Tensor:
        made: list[Tensor] = []
        thread = threading.Thread(target=lambda: made.append(bank(images).square().sum()))
        thread.start()
        thread.join()
        return made[0]

    def of_this_thread_too() -> Tensor:
        return bank(IMAGES).square().sum() + in_a_thread(2 * IMAGES)

    def of_two_others() -> Tensor:
        return in_a_thread(IMAGES) + in_a_thread(2 * IMAGES)

    expected = torch.autograd.grad(bank(IMAGES).square().sum() + bank(2 * IMAGES).square().sum(), bank.parameters())
    for losses in (of_this_thread_too, of_two_others):
        for one, other in zip(torch.autograd.grad(losses(), bank.parameters()), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    backbone.set_grad_checkpointing(True)
    for losses in (of_this_thread_too, of_two_others):
        with pytest.raises(NolaVisionError, match="covers forward passes of several threads"):
            losses().backward()


@pytest.mark.parametrize("method", [METHODS[1], METHODS[9], METHODS[11]], ids=str)
def test_checkpointing_around_the_backbone_keeps_the_settings_of_its_pass(method: Method) -> None:
    backbone = vit()
    bank = attached(backbone, method, num_adapters=3)
    shake(bank)
    images = IMAGES.clone().requires_grad_()
    bits = {f"groups.{name}": 2 for name, _ in bank.groups.named_parameters()}

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        bank.zero_grad()
        with bank.using(prefix=0.5), bank.using(bits=bits), bank.route(torch.tensor([2, 0, 1])):
            first = bank.logits(run(images))
        with bank.route(torch.tensor([1, 1, 1])):
            second = bank.logits(run(2 * images))
        (first.square().sum() + second.square().sum()).backward()
        return [parameter.grad.clone() for parameter in bank.parameters()]

    plain = gradients(backbone)
    for one, other in zip(gradients(partial(checkpoint, backbone, use_reentrant=False)), plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    with pytest.raises(NolaVisionError, match="use_reentrant=False"):
        gradients(partial(checkpoint, backbone, use_reentrant=True))


def perturbed(method: Method) -> nn.Module:
    model = adapt("vit_mini_patch4_32.contours", method, ["a", "b"]).eval()
    shake(model.bank)
    return model


@pytest.mark.parametrize("attached_too", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_alike_and_apart(how: str, attached_too: bool) -> None:
    model, images = perturbed(NOLA(targets=["qv", "mlp"], rank=2, num_basis=5)), torch.randn(2, 3, 32, 32)
    expected = model(images)
    if not attached_too:
        model.bank.detach()
    if how == "deepcopy":
        made = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        assert file.tell() < 10 * 2**20  # the backbone of 7.5 MB, and no basis
        file.seek(0)
        made = torch.load(file, weights_only=False)
    if not attached_too:
        made.bank.attach(made.backbone)
        model.bank.attach(model.backbone)
    assert torch.equal(made(images), expected)
    shake(made.bank)
    assert torch.equal(model(images), expected) and not torch.allclose(made(images), expected)
    made(images).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    made.bank.merge()
    made.bank.detach()
    assert torch.equal(model(images), expected)


def test_a_file_of_one_adapter_of_several(tmp_path: Path) -> None:
    """Never the first in silence."""
    model = adapt("vit_mini_patch4_32.contours", LoRA(targets=["qkv"], rank=2), ["a", "b"]).eval()
    model.bank.detach()
    model.bank = make_bank(model.backbone, model.metadata.method, 2, num_adapters=3)
    model.bank.attach(model.backbone)
    shake(model.bank)
    with pytest.raises(NolaVisionError, match="the model has 3 adapters and a file contains one: choose it by"):
        model.save(tmp_path / "a.safetensors")
    with pytest.raises(NolaVisionError, match="adapter 3 does not exist"):
        model.save(tmp_path / "a.safetensors", adapter=3)
    model.save(tmp_path / "a.safetensors", adapter=1)
    with model.bank.route(torch.tensor([1, 1, 1])):
        expected = model(IMAGES)
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(IMAGES), expected)


def test_an_averaged_model_is_the_mean_of_its_models() -> None:
    model, images = perturbed(LoRA(targets=["qkv"], rank=2)), torch.randn(2, 3, 32, 32)
    averaged, before = AveragedModel(model), model(images)
    first = [parameter.clone() for parameter in model.bank.parameters()]
    averaged.update_parameters(model)
    shake(model.bank)
    averaged.update_parameters(model)
    second = [parameter.clone() for parameter in model.bank.parameters()]
    with torch.no_grad():
        for parameter, one, other in zip(model.bank.parameters(), first, second, strict=True):
            parameter.copy_((one + other) / 2)
    for parameter, mean in zip(averaged.module.bank.parameters(), model.bank.parameters(), strict=True):
        assert torch.allclose(parameter, mean, atol=1e-6)
    # perturbed layers amplify the last bit in which the two means may differ
    assert torch.allclose(averaged(images), model(images), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(averaged(images), before, rtol=1e-2, atol=1e-2)
