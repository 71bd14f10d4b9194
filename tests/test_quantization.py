"""Quantised numbers against a decoder of their own, and what a file of them gives back."""

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import reference
from nola_vision import NOLA, PRANC, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.quantization import (
    GROUP,
    dequantise,
    pack,
    quantise,
    rounded,
    rounded_straight_through,
    unpack,
)
from nola_vision.adapters.stored import stacked_tensors, stored
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.runs import runner
from nola_vision.runs.parsing import build
from nola_vision.runs.store import ADAPTER_FILE
from nola_vision.training.callbacks import LAST_CHECKPOINT
from nola_vision.training.classifier import Classifier
from nola_vision.training.mean_features import MeanFeatures
from tiny import tiny

SPEC = BackboneSpec("vit_mini_patch4_32.contours")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_levels_come_back_and_take_their_bits(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    levels = torch.randint(-most, max(1, most) + 1, (3, 101), dtype=torch.int8)
    stream = pack(levels, bits)
    assert stream.dtype == torch.uint8 and len(stream) == -(-3 * 101 * bits // 8)
    assert torch.equal(unpack(stream, bits, 3, 101), levels)
    assert np.array_equal(reference.levels(stream.numpy(), bits, 303).reshape(3, 101), levels.numpy())
    with pytest.raises(ValueError, match="bytes"):
        unpack(stream[:-1], bits, 3, 101)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_has_a_zero_and_is_symmetric_and_does_nothing_twice(bits: int) -> None:
    values = torch.randn(5, 3 * GROUP + 7, generator=torch.Generator().manual_seed(bits))
    values[1] = 0
    once = rounded(values, bits)
    assert torch.equal(rounded(once, bits), once) and torch.equal(rounded(-values, bits), -once)
    assert not once[1].any()  # a scale of 0 decodes to 0
    levels, scales = quantise(values, bits)
    assert torch.equal(dequantise(levels, scales, bits), once) and not scales[1].any()
    # no scale of a fine grid is much better than the chosen one, over a hundred groups
    most, groups = 2 ** (bits - 1) - 1, torch.randn(100, GROUP, generator=torch.Generator().manual_seed(bits))
    grid = torch.linspace(0.02, 1.2, 2000).view(-1, 1, 1) * groups.abs().amax(1, keepdim=True) / most
    errors = ((groups / grid).round().clamp(-most, most) * grid - groups).square().sum(-1)
    assert (rounded(groups, bits) - groups).square().sum() <= 1.25 * errors.amin(0).sum()


def test_one_bit_is_the_nearer_quartile_of_the_normal_distribution() -> None:
    values = (torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) + 0.2) * torch.logspace(-3, 1, 4)[:, None]
    mean, std = values.mean(1, keepdim=True), values.std(1, correction=0, keepdim=True)
    expected = mean + float(scipy.stats.norm.ppf(0.75)) * std * (values - mean).sign()
    once = rounded(values, 1)
    decided = (values - mean).abs() >= 0.02 * std  # the mean of the two bfloat16 numbers is not exactly that of the row
    assert decided.float().mean() > 0.95
    assert ((once - expected).abs() <= 2**-8 * expected.abs())[decided].all()
    assert all(len(row.unique()) == 2 for row in once) and torch.equal(once, once.bfloat16().float())
    assert torch.equal(rounded(once, 1), once)
    for kept in ([0.0] * 5, [0.25, -0.5, 0.25], [3.0]):  # two values at most stay as they are
        assert rounded(torch.tensor([kept]), 1).tolist() == [kept]
    assert torch.equal(rounded(values.view(1, 4, 20, 25), 1), once.view(1, 4, 20, 25))  # a layer is a row
    levels, scales = quantise(values, 1)
    stream = reference.levels(pack(levels, 1).numpy(), 1, 2000).reshape(4, -1)
    assert scales.shape == (4, 2)
    assert np.array_equal(np.take_along_axis(scales.float().numpy(), stream, 1), once.numpy())


def test_the_gradient_of_one_bit_is_that_of_the_authors_formula() -> None:
    """`w = (w - mean) / std; (q(w) - w).detach() + w) * std + mean`, differentiated by autograd, in float64."""
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(3, 80, dtype=torch.float64, generator=draws).requires_grad_()
    weights = torch.randn(3, 80, dtype=torch.float64, generator=draws)
    mean, std = values.mean(1, keepdim=True), values.std(1, correction=0, keepdim=True)
    z = (values - mean) / std
    formula = ((z.sign() * float(scipy.stats.norm.ppf(0.75)) - z).detach() + z) * std + mean
    (expected,) = torch.autograd.grad((formula * weights).sum(), values)
    seen = rounded_straight_through(values, 1)
    assert (seen - rounded(values.detach(), 1)).abs().max() < 1e-12
    # 4 of 100 draws have a value between the mean and the mean of the stored bfloat16 numbers: it gets the other sign
    assert torch.equal(seen > mean, z > 0)
    (found,) = torch.autograd.grad((seen * weights).sum(), values)
    assert (found - expected).abs().max() < 0.01 < (found - weights).abs().max()  # the numbers are bfloat16
    zeros = torch.zeros(2, 70, requires_grad=True)  # where training starts
    (rounded_straight_through(zeros, 1) * weights[:2, :70]).sum().backward()
    assert torch.equal(zeros.grad, weights[:2, :70].float())


def test_gradients_go_straight_through() -> None:
    values = torch.randn(2, 70, requires_grad=True)
    weights = torch.randn(2, 70)
    seen = rounded_straight_through(values, 3)
    (seen * weights).sum().backward()
    assert (seen - rounded(values.detach(), 3)).abs().max() < 1e-6
    assert torch.equal(values.grad, weights)


METHODS = [
    NOLA(targets=["mlp", "head"], num_basis=100, bits=4, head_num_basis=30),
    NOLA(targets=["qkv"], num_basis=70, bits=3, head_bits=8),
    LoRA(targets=["qkv"], rank=2, bits=8),
    PRANC(targets=["qkv"], num_basis=90, bits=2, scope="layer"),
    NOLA(targets=["mlp"], num_basis=30, bits=16, head_bits=32),
    NOLA(targets=["mlp", "head"], num_basis=100, bits=1, head_num_basis=30),
    LoRA(targets=["qkv"], rank=2, bits=1),
    LinearProbe(head_bits=1),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_quantised_file_gives_what_was_rounded(method: NOLA, tmp_path) -> None:
    model = adapt(SPEC, method, ["a", "b", "c", "d"]).eval()
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    exact = model(IMAGES)
    model.compute_with_stored_bits()
    seen, features = model(IMAGES), model.features(IMAGES)
    model.compute_with_stored_bits(most=0)
    model.round_to_stored_bits()
    assert not torch.equal(model(IMAGES), exact) and torch.allclose(model(IMAGES), seen, rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.features(IMAGES), features, rtol=1e-4, atol=1e-5)
    doubled = copy.deepcopy(model)
    doubled.backbone.double()  # the bank stays in float32
    assert torch.allclose(doubled(IMAGES.double()).float(), model(IMAGES), rtol=1e-3, atol=1e-3)
    size = model.save(tmp_path / "a.safetensors")
    assert size == (tmp_path / "a.safetensors").stat().st_size
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(IMAGES), model(IMAGES))
    metadata, tensors = reference.read(str(tmp_path / "a.safetensors"))
    for name, tensor in model.trained_tensors().items():
        assert np.array_equal(tensors[name], tensor.detach().numpy()), name
    numbers = sum(t.numel() * model.bits.get(n, 32) / 8 for n, t in model.trained_tensors().items())
    groups = sum(np.prod(t.shape[:-1]) * -(-t.shape[-1] // GROUP) for t in model.trained_tensors().values())
    assert size < numbers + 2 * 8 * groups + 8000


@pytest.mark.parametrize("method", [LoRA(rank=2, bits=1), NOLA(bits=1, head_bits=4, num_basis=20)], ids=str)
def test_one_bit_starts_at_the_pretrained_model_and_trains_from_the_first_step(
    method: LoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(SPEC, method, ["a", "b"])
    model.compute_with_stored_bits()
    model.bank.detach()
    pretrained = model.backbone(IMAGES)
    model.bank.attach(model.backbone)
    assert torch.equal(model.features(IMAGES), pretrained)
    optimizer = torch.optim.AdamW(model.bank.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert not torch.allclose(model.features(IMAGES), pretrained, atol=1e-3)

    fields = {"targets": ["mlp"], "bits": 1, "head_bits": 4}
    computed: list[set[int]] = []
    step = Classifier.training_step
    monkeypatch.setattr(
        Classifier,
        "training_step",
        lambda task, *batch: computed.append(set(task.model._stored_bits.values())) or step(task, *batch),
    )
    run = build(tiny("one", methods={"one": {"class_path": type(method).__name__, "init_args": fields}}), tmp_path)
    run.trainer.fit(run.model, datamodule=run.datamodule)
    assert len(computed) > 5 and all(widths == {1} for widths in computed)  # the head's 4 bits come after training


def test_the_bias_makes_up_for_what_rounding_the_head_changes_on_average() -> None:
    draws = torch.Generator().manual_seed(0)
    model = adapt(SPEC, LinearProbe(head_bits=4), [f"class {number}" for number in range(20)])
    features = torch.randn(50, model.bank.num_features, generator=draws)
    mean = 5 + torch.randn(model.bank.num_features, generator=draws)
    features += mean - features.mean(0)
    with torch.no_grad():
        weight = model.bank.head_weight.normal_(generator=draws)[0].double().numpy()
        bias = model.bank.head_bias.normal_(generator=draws)[0].double().numpy()
        exact = model.classified(features)
        model.compute_with_stored_bits(mean_features=mean)
        seen = model.classified(features)
        model.compute_with_stored_bits(most=0)
        model.round_to_stored_bits(mean)
        once = model.classified(features)
        model.round_to_stored_bits(mean)
    stored, corrected = (one.detach()[0].double().numpy() for one in (model.bank.head_weight, model.bank.head_bias))
    assert np.allclose(corrected, bias + (weight - stored) @ mean.double().numpy(), atol=1e-4)
    assert np.abs(corrected - bias).max() > 1
    assert (once - exact).mean(0).abs().max() < 1e-4 and (once - exact).abs().max() > 0.1
    assert torch.equal(seen, once) and torch.equal(model.classified(features), once)


def test_training_rounds_the_head_with_the_mean_of_the_training_images(tmp_path: Path) -> None:
    """In one epoch of equal batches, so that the mean is exact. A head that trains with its bits is not changed."""
    heads, means = {}, {}
    for bits in (32, 4, 1):
        settings = {"class_path": "LinearProbe", "init_args": {"lr": 0.05, "head_bits": bits}}
        config = tiny("probe", methods={"probe": settings}, trainer={"max_epochs": 1})
        row = runner.run(config, tmp_path)
        file = reference.read(str(row.folder / ADAPTER_FILE))[1]
        heads[bits] = file["head.weight"], file["head.bias"]
        checkpoint = torch.load(row.folder / LAST_CHECKPOINT, weights_only=True)
        means[bits] = checkpoint["mean_features"]["value"]
        trained = {name: checkpoint["state_dict"][f"model.bank.head_{name}"][0].numpy() for name in ("weight", "bias")}
        if bits != 4:
            assert np.array_equal(trained["bias"], heads[bits][1])
    assert not means[1].any() and not means[32].any()
    built = build(tiny("linear"), tmp_path)
    built.datamodule.setup("fit")
    images = torch.stack([image for image, _ in built.datamodule.reference_dataloader().dataset])
    with torch.no_grad():
        mean = built.model.model.eval().features(images).double().mean(0).numpy()
    assert np.allclose(means[4].numpy(), mean, atol=1e-4)
    weight, bias = (one.astype(np.float64) for one in heads[32])
    assert np.allclose(heads[4][1], bias + (weight - heads[4][0]) @ mean, atol=1e-4)
    assert np.abs(heads[4][1] - bias).max() > 1e-3


def test_the_mean_of_features_follows_training() -> None:
    batches = 3 + torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    followed = MeanFeatures(4)
    expected = np.zeros(4)
    for number, batch in enumerate(batches, 1):
        followed.update(batch, 3)
        followed.update(torch.full((5, 4), torch.nan), 3)  # left out
        expected += (batch.numpy().mean(0) - expected) / min(number, 3)
        assert np.allclose(followed.value.numpy(), expected, atol=1e-6)
        if number == 3:
            assert np.allclose(expected, batches[:3].mean((0, 1)))
    other = MeanFeatures(4)
    other.load(followed.state())
    for one in (followed, other):
        one.update(batches[0], 3)
    assert torch.equal(other.value, followed.value)
    followed.clear()
    followed.update(batches[0], 3)
    assert torch.allclose(followed.value, batches[0].mean(0).float())
    other.load(None)  # of a checkpoint of an earlier version
    assert not other.value.any()
    state = followed.state()
    for wrong in (
        3,
        {"value": state["value"]},
        {**state, "value": state["value"][:3]},
        {**state, "value": state["value"].double()},
        {**state, "value": state["value"].to_sparse()},
        {**state, "value": state["value"] / 0},
        {**state, "count": torch.empty((), device="meta")},
    ):
        with pytest.raises(NolaVisionError, match="the checkpoint is damaged .its mean_features"):
            other.load(wrong)


def test_cut_steps_of_nested_training_are_not_in_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"targets": ["mlp"], "num_basis": 16, "bits": 4, "nested": True, "lr": 0.01}
    run = build(tiny("one", methods={"one": {"class_path": "NOLA", "init_args": fields}}), tmp_path)
    counted: list[float | None] = []
    update = Classifier._update_mean
    monkeypatch.setattr(
        Classifier, "_update_mean", lambda task, given, prefix: counted.append(prefix) or update(task, given, prefix)
    )
    run.trainer.fit(run.model, datamodule=run.datamodule)
    assert len(set(counted)) > 1 and run.model.mean_features.count == counted.count(1.0)


@pytest.mark.parametrize("shape", [(6, 142), (3, 5), (40, 7, 3)])
def test_tensors_that_are_decoded_together_are_those_that_are_decoded_alone(shape: tuple[int, ...]) -> None:
    kept = {bits: [stored(torch.randn(shape), bits) for _ in range(4)] for bits in (1, 2, 3, 4, 8, 16, 32)}
    for several in [*kept.values(), [some[0] for some in kept.values()]]:
        assert (stacked_tensors(several) == torch.stack([one.tensor() for one in several])).all()


def test_bits_that_do_not_exist_are_refused() -> None:
    for bits in (9, 0, 64):
        with pytest.raises(NolaVisionError, match="1 to 8 for integers, 16 or 32"):
            adapt(SPEC, NOLA(bits=bits), ["a", "b"])


def test_what_is_not_a_level_is_refused() -> None:
    for bits in (0, 9, 16):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            unpack(torch.zeros(4, dtype=torch.uint8), bits, 1, 4)
    with pytest.raises(ValueError, match="255 is not a level of 8 bits"):  # -127 to 127 are 255 levels
        unpack(torch.tensor([0, 255], dtype=torch.uint8), 8, 1, 2)
    many = torch.randint(-3, 4, (3, 1_000_003), dtype=torch.int8)  # more than are unpacked at once
    assert torch.equal(unpack(pack(many, 3), 3, 3, 1_000_003), many)
