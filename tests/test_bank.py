"""The adapter bank: exact start, gradients, the two paths, routing, merging, and what it refuses."""

import copy

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from nola_vision.adapters.functional import additive_linear, dense_change, merged_linear, merges_exactly
from nola_vision.adapters.methods import (
    NOLA,
    PRANC,
    FacT,
    HashedNet,
    LinearProbe,
    LoRA,
    LoRAXS,
    Method,
    TinyLoRA,
    UniLoRA,
    VeRA,
)
from nola_vision.adapters.methods.base import Group, Source
from nola_vision.adapters.random_basis import Basis, basis_key, combine
from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.adapted_model import bank_tensors
from nola_vision.models.backbones.properties import probe_batch
from nola_vision.models.building import make_bank
from nola_vision.models.targets import find_targets

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**{**VIT, **changes}).eval().requires_grad_(False)
    with torch.no_grad():  # timm's small initial weights would hide what a change does
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(3)
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0, zero_init_last=False)
    return model.eval().requires_grad_(False)


def attached(backbone: nn.Module, method: Method, **options: object):
    bank = make_bank(backbone, method, num_classes=5, **options)
    bank.attach(backbone, probe_batch(backbone) if isinstance(backbone, timm.models.VisionTransformer) else None)
    return bank


def shake(bank: nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def factors(bank: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[n, layers, m, r]` and B `[n, layers, r, o]` of a group."""
    group = bank.group_settings[name]
    changes = bank.method.changes(group, dict(bank.groups[name].items()), bank.fixed[name], group.targets)
    return torch.stack([c.a for c in changes.values()], 1), torch.stack([c.b for c in changes.values()], 1)


METHODS = [
    NOLA(targets=["mlp"], rank=4, num_basis=16),
    NOLA(targets=["qkv", "mlp"], rank=2, num_basis=9, scope="per_layer"),
    NOLA(targets=["qv"], rank=4, num_basis=16),
    LoRA(targets=["qkv"], rank=4),
    LoRA(targets=["qv", "mlp"], rank=3),
    NOLA(targets=["mlp", "head"], rank=4, num_basis=8, num_basis_b=5, head_num_basis=7),
    NOLA(targets=["mlp"], rank=3, num_basis=9, scope="per_layer", storage="streamed", memory_mib=0.01),
    LoRA(targets=["qkv", "head"], rank=2),
    PRANC(targets=["qkv"], num_basis=12),
    PRANC(targets=["qv", "mlp", "head"], num_basis=6, scope="layer", storage="streamed"),
    HashedNet(targets=["mlp"], max_parameters=50),
    HashedNet(targets=["qv", "head"], max_parameters=50),
    LoRAXS(targets=["qv", "mlp"], rank=5),
    VeRA(targets=["qv", "mlp"], rank=30),  # factors for the MLP, dense changes for the smaller Q and V
    UniLoRA(targets=["qv", "mlp"], rank=3, max_parameters=70),
    FacT(targets=["qkv", "mlp"], rank=3),
    TinyLoRA(targets=["qv", "mlp"], rank=5, num_basis=9),
    TinyLoRA(targets=["qkv", "mlp"], rank=4, num_basis=20, scope="model"),
]
IDS = [f"{type(m).__name__}-{'+'.join(m.targets)}" for m in METHODS]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_step_zero_is_the_pretrained_model_bit_for_bit(method: Method) -> None:
    backbone = vit()
    plain = backbone(IMAGES)
    bank = attached(backbone, method)
    assert torch.equal(backbone(IMAGES), plain)
    weight, bias = bank.head()
    assert torch.equal(bank(IMAGES), nn.functional.linear(plain, weight[0], bias[0]))


def test_step_zero_of_a_resnet_is_bit_for_bit() -> None:
    backbone = resnet()
    images = torch.randn(2, 3, 64, 64)
    plain = backbone(images)
    attached(backbone, NOLA(targets=["conv"], rank=2, num_basis=5))
    assert torch.equal(backbone(images), plain)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_changes_equal_the_weights_they_stand_for(method: Method) -> None:
    """The attached model against a copy whose weights were edited by hand."""
    backbone = vit()
    edited = copy.deepcopy(backbone)
    bank = attached(backbone, method)
    shake(bank)
    for target in bank.targets:
        rows = slice(*target.rows) if target.rows else slice(None)
        with torch.no_grad():
            edited.get_parameter(target.weight)[rows] += bank.changes()[target.name]
    features, expected = backbone(IMAGES), edited(IMAGES)
    assert (features - vit()(IMAGES)).abs().max() > 1e-2  # the change is no trifle
    assert (features - expected).abs().max() / expected.abs().max() < 1e-5


def test_lora_equals_peft() -> None:
    backbone = vit()
    wrapped = get_peft_model(copy.deepcopy(backbone), LoraConfig(r=4, lora_alpha=6, target_modules=["qkv"]))
    bank = attached(backbone, LoRA(targets=["qkv"], rank=4, c=6))
    shake(bank)
    group = bank.groups["48x144"]
    with torch.no_grad():
        for layer, block in enumerate(wrapped.base_model.model.blocks):
            block.attn.qkv.lora_A["default"].weight.copy_(group.a[0, layer].T)
            block.attn.qkv.lora_B["default"].weight.copy_(group.b[0, layer].T)
    ours, theirs = backbone(IMAGES), wrapped(IMAGES)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    direction = torch.randn(ours.shape)  # the sum of squares after a layer norm is constant
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for layer, block in enumerate(wrapped.base_model.model.blocks):
        for mine, other in ((group.a, "lora_A"), (group.b, "lora_B")):
            expected = getattr(block.attn.qkv, other)["default"].weight.grad.T
            assert torch.allclose(mine.grad[0, layer], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


LOW_RANK = [method for method in METHODS if not isinstance(method, PRANC | HashedNet)]


@pytest.mark.parametrize("method", LOW_RANK, ids=str)
def test_additive_and_merged_paths_agree(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = vit()
    bank = attached(backbone, method)
    shake(bank)
    merged = bank(IMAGES)
    merged.square().sum().backward()
    gradients = [p.grad.clone() for p in bank.parameters()]
    bank.zero_grad()
    monkeypatch.setattr("nola_vision.adapters.injection.merges_exactly", lambda *_: False)
    additive = bank(IMAGES)
    additive.square().sum().backward()
    assert not torch.equal(merged, additive)
    assert (merged - additive).abs().max() / merged.abs().max() < 1e-5
    for one, parameter in zip(gradients, bank.parameters(), strict=True):
        assert (one - parameter.grad).abs().max() < 1e-4 * one.abs().max()


def held(backbone: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd holds of a forward pass (`saved` keeps them alive, so that no address comes twice)."""
    saved: list[torch.Tensor] = []
    leaf = torch.zeros(48, requires_grad=True)  # so that the frozen backbone has a backward pass too
    hook = backbone.norm_pre.register_forward_hook(lambda module, args, out: out + leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = backbone(images)
    hook.remove()
    assert out.requires_grad
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}.values())


@pytest.mark.parametrize("targets", [["mlp"], ["qkv", "mlp"]], ids="+".join)
def test_inputs_of_adapted_layers_are_made_again_instead_of_held(targets: list[str]) -> None:
    images = torch.randn(16, 3, 32, 32)
    frozen = held(vit(), images)
    backbone = vit()
    bank = attached(backbone, NOLA(targets=targets, rank=1, num_basis=4))
    factors = 4 * sum(t.inputs + t.outputs for t in bank.targets)
    thin = 4 * 16 * 17 * len(bank.targets)  # x A, of rank 1, where it was made
    assert frozen < held(backbone, images) < frozen + 2 * factors + thin + 4096
    inputs = 16 * 17 * 4 * sum(t.inputs for t in bank.targets)
    assert inputs > 4 * (2 * factors + thin + 4096)  # what the bound would not let pass


@pytest.mark.parametrize("shape", [(5,), (4, 5), (0, 5), (2, 3, 5), (2, 2, 3, 5), (40, 5), (2, 30, 5)], ids=str)
def test_the_merged_path_of_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    """Against the same formula left to autograd; with fewer rows than a side of the weight, and with more."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 7).double().requires_grad_(False)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (5, 2), (2, 7)))
    out = merged_linear(x, layer, a, b, 0.7)
    expected = x @ (layer.weight + 0.7 * (a @ b).t()).t() + layer.bias
    assert out.shape == expected.shape and torch.allclose(out, expected, rtol=0, atol=1e-12)
    dy = torch.randn(7, dtype=torch.float64).expand(out.shape)  # without strides of its own
    for one, other in zip(torch.autograd.grad(out, (x, a, b), dy), torch.autograd.grad(expected, (x, a, b), dy),
                          strict=True):  # fmt: skip
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_what_comes_out_of_a_layer_may_be_written_to() -> None:
    """As an activation in place does, or an attention that adds a bias of its own."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 7).requires_grad_(False)
    for rows in (2, 9):
        a, b = torch.randn(5, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True)
        x = torch.randn(1, rows, 5, requires_grad=True)
        merged_linear(x, layer, a, b, 0.7).relu_().sum().backward()
        expected = (x @ (layer.weight + 0.7 * (a @ b).t()).t() + layer.bias).relu().sum()
        for leaf, gradient in zip((x, a, b), torch.autograd.grad(expected, (x, a, b)), strict=True):
            assert torch.allclose(leaf.grad, gradient, rtol=1e-4, atol=1e-5)


class Overwritten(nn.Module):
    """Writes to an activation's output before it goes on."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)).mul_(3))


def test_an_activation_that_was_written_to_is_held_as_it_is() -> None:
    torch.manual_seed(0)
    model = Overwritten().requires_grad_(False)
    bank = make_bank(model, LoRA(targets=["re:fc."], rank=2), 5)
    shake(bank)
    bank.attach(model)
    x = torch.randn(4, 5)
    model(x).square().sum().backward()
    group = bank.groups["7x6"]
    weight = model.fc2.weight + bank.changes()["fc2.weight"]
    edited = {"weight": model.fc1.weight + bank.changes()["fc1.weight"], "bias": model.fc1.bias}
    inside = 3 * nn.functional.gelu(nn.functional.linear(x, **edited))
    dy = 2 * nn.functional.linear(inside, weight, model.fc2.bias)
    expected = bank.fixed["7x6"]["scale"] * inside.t() @ dy @ group.b[0, 0].t()
    assert torch.allclose(group.a.grad[0, 0], expected, rtol=1e-4, atol=1e-5)


def hook_before(module: nn.Module) -> None:
    module.act.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def hook_after(module: nn.Module) -> None:
    module.act.register_forward_hook(lambda m, args, out: out * 3)


def in_place(module: nn.Module) -> None:
    module.act = nn.SiLU(inplace=True)


@pytest.mark.parametrize("change", [hook_before, hook_after, in_place], ids=lambda change: change.__name__)
@pytest.mark.parametrize("late", [False, True])
def test_an_activation_that_is_not_a_function_of_its_input_is_held(change, late: bool) -> None:
    torch.manual_seed(0)
    model = Overwritten().requires_grad_(False)
    model.forward = lambda x: model.fc2(model.act(model.fc1(x)))
    if not late or change is in_place:
        change(model)
    bank = make_bank(model, LoRA(targets=["re:fc."], rank=2), 5)
    shake(bank)
    bank.attach(model)
    if late:
        change(model)
    x = torch.randn(4, 5)
    model(x).square().sum().backward()
    parameter = bank.groups["7x6"].a
    exact, direction = parameter.grad.clone(), torch.randn_like(parameter)
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * 1e-3 * direction
            moved.append(float(model(x).square().sum()))
            parameter -= sign * 1e-3 * direction
    assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(float((exact * direction).sum()), rel=1e-2)


def test_a_head_is_made_of_the_present_numbers() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[5])
    with torch.no_grad():
        features = backbone(IMAGES)
    assert bank.logits(features).requires_grad  # on features that were made without gradients
    features = backbone(IMAGES)
    shake(bank)
    assert torch.equal(bank.logits(features), bank.logits(features))


def test_a_merged_bank_routes_nothing() -> None:
    backbone = vit()
    bank = attached(backbone, LoRA(targets=["qkv"], rank=2), num_adapters=2)
    with pytest.raises(NolaVisionError, match="no adapter 2 to merge"):
        bank.merge(2)
    bank.merge(1)
    with pytest.raises(NolaVisionError, match="unmerge"), bank.route(torch.tensor([0, 1, 0])):
        pass


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_gradients_agree_with_finite_differences_in_float64(method: Method) -> None:
    backbone = vit().double()
    bank = attached(backbone, method).double()
    shake(bank)
    images = IMAGES.double()
    bank(images).square().sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    generator = torch.Generator().manual_seed(2)
    for parameter in bank.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        numeric = 0.0
        for step, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # central differences of fourth order
            with torch.no_grad():
                parameter.add_(step * 1e-4 * direction)
                numeric += weight * float(bank(images).square().sum()) / 12e-4
                parameter.sub_(step * 1e-4 * direction)
        exact = float((parameter.grad * direction).sum())
        assert abs(numeric - exact) < 1e-6 * max(1.0, abs(exact))


def test_conv_gradients_agree_with_finite_differences_in_float64() -> None:
    backbone = resnet().double()
    bank = attached(backbone, NOLA(targets=["re:layer[12].*conv1"], rank=2, num_basis=4)).double()
    shake(bank)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    bank(images).square().sum().backward()
    parameter = bank.groups["192x192/576"].coefficients_b
    with torch.no_grad():
        parameter[0, 0, 1] += 1e-6
        up = bank(images).square().sum()
        parameter[0, 0, 1] -= 2e-6
        down = bank(images).square().sum()
    assert abs(float(up - down) / 2e-6 / float(parameter.grad[0, 0, 1]) - 1) < 1e-5


class Grouped(nn.Module):
    """A grouped and a depthwise convolution."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 12, 3, groups=3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.grouped(x).relu()).mean((2, 3))


@pytest.mark.parametrize(
    "method",
    [
        NOLA(targets=["conv"], rank=3, num_basis=7),
        LoRA(targets=["conv"], rank=2),
        PRANC(targets=["conv"], num_basis=9),
        HashedNet(targets=["conv"], max_parameters=30),
        LoRAXS(targets=["conv"], rank=3),
        VeRA(targets=["conv"], rank=20),
        UniLoRA(targets=["conv"], rank=3, max_parameters=40),
        FacT(targets=["conv"], rank=2),
        TinyLoRA(targets=["conv"], rank=3, num_basis=7),
    ],
    ids=str,
)
def test_grouped_and_depthwise_convolutions(method: Method) -> None:
    torch.manual_seed(0)
    backbone = Grouped().requires_grad_(False)
    bank = make_bank(backbone, method, 5)
    assert [(t.inputs, t.outputs) for t in bank.targets] == [(12, 18), (9, 12)]
    edited = copy.deepcopy(backbone)
    bank.attach(backbone)
    shake(bank)
    weights = {f"{name}.weight": getattr(edited, name).weight + bank.changes()[f"{name}.weight"]
               for name in ("grouped", "depthwise")}  # fmt: skip
    for weight in weights.values():
        weight.requires_grad_()
    images = torch.randn(2, 6, 8, 8)
    expected = torch.func.functional_call(edited, weights, (images,))
    out = backbone(images)
    assert (out - expected).abs().max() < 1e-5 < (out - edited(images)).abs().max()
    # the change in the loss along a change of the trained numbers, by the dense gradient and by their own
    dense_gradients = torch.autograd.grad(expected.square().sum(), list(weights.values()))
    out.square().sum().backward()
    before, gradients = bank.changes(), [p.grad.clone() for p in bank.adapter_parameters()]
    directions = [1e-3 * torch.randn_like(p) for p in gradients]
    with torch.no_grad():
        for parameter, direction in zip(bank.adapter_parameters(), directions, strict=True):
            parameter += direction
    moved = sum(((bank.changes()[n] - before[n]) * g).sum() for n, g in zip(weights, dense_gradients, strict=True))
    own = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert float(own) == pytest.approx(float(moved), rel=0.02)


OWN_FORWARD = [
    lambda: timm.layers.Conv2dSame(6, 8, 3, stride=2),
    lambda: timm.layers.StdConv2d(6, 8, 3, padding=1),
    lambda: timm.layers.ScaledStdConv2dSame(6, 8, 3, stride=2, padding="same"),
]


@pytest.mark.parametrize("make", OWN_FORWARD, ids=["same", "standardised", "scaled"])
def test_a_convolution_with_a_forward_of_its_class_is_adapted(make) -> None:
    """Against a copy whose weight was edited by hand, and with 16-bit weights and autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).requires_grad_(False)
    model.num_features = 32
    edited, images = copy.deepcopy(model), torch.randn(2, 6, 9, 9)
    bank = make_bank(model, NOLA(targets=["conv"], rank=3, num_basis=7), 5)
    bank.attach(model)
    shake(bank)
    with torch.no_grad():
        edited[0].weight += bank.changes()["0.weight"]
    edited[0].weight.requires_grad_()
    features, expected = model(images), edited(images)
    assert torch.allclose(features, expected, atol=1e-6) and not torch.equal(features, model[2](model[1](images)))
    direction = torch.randn_like(features)
    (expected * direction).sum().backward()
    (features * direction).sum().backward()
    coefficients = next(bank.groups.parameters())
    step = torch.zeros_like(coefficients)
    step[0, 0, 0] = 1e-2  # along one coefficient, the weight's gradient gives the coefficient's
    before = bank.changes()["0.weight"]
    with torch.no_grad():
        coefficients += step
    moved = (bank.changes()["0.weight"] - before) / 1e-2
    assert float(coefficients.grad[0, 0, 0]) == pytest.approx(float((moved * edited[0].weight.grad).sum()), rel=1e-2)
    with torch.no_grad():
        coefficients -= step
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(images).float(), expected, atol=0.05)
    assert torch.allclose(model.bfloat16()(images.bfloat16()).float(), expected, atol=0.05)
    bank.merge()
    assert torch.allclose(model(images.bfloat16()).float(), expected, atol=0.05)


def test_every_convolution_of_a_mobilenet_can_be_adapted() -> None:
    backbone = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=0).requires_grad_(False)
    bank = make_bank(backbone, NOLA(targets=["conv"], rank=1, num_basis=2), 5)
    bank.attach(backbone, torch.randn(2, 3, 64, 64))
    with pytest.raises(NolaVisionError, match=r"rank 10 is not possible for depthwise.weight, a 9 x 12 matrix"):
        make_bank(Grouped(), NOLA(targets=["conv"], rank=10, num_basis=2), 5)


def test_gradients_reach_the_declared_tensors_only() -> None:
    backbone = resnet()
    bank = attached(backbone, NOLA(targets=["conv"], rank=2, num_basis=5))
    bank(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in bank.parameters())
    assert list(dict(bank.named_parameters())) == [
        "head_weight", "head_bias",
        *[f"groups.{group}.coefficients_{factor}" for group in bank.groups for factor in "ab"],
    ]  # fmt: skip


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[1])
    shake(bank)
    bank(IMAGES).square().sum().backward()
    plain = [p.grad.clone() for p in bank.parameters()]
    bank.zero_grad()
    backbone.set_grad_checkpointing(True)
    bank(IMAGES.clone().requires_grad_()).square().sum().backward()
    for one, parameter in zip(plain, bank.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, rtol=1e-5, atol=1e-6)


def test_two_passes_before_one_backward_keep_their_own_changes_under_checkpointing() -> None:
    backbone, index = vit(), torch.tensor([[2, 0, 1], [1, 1, 0]])
    bank = attached(backbone, METHODS[1], num_adapters=3)
    shake(bank)

    def gradients() -> list[torch.Tensor]:
        bank.zero_grad()
        with bank.route(index[0]):
            first = bank(IMAGES)
        with bank.using(prefix=0.5), bank.route(index[1]):  # nested training draws a share for each batch
            second = bank(2 * IMAGES)
        (first.square().sum() + second.square().sum()).backward()
        return [p.grad.clone() for p in bank.parameters()]

    plain = gradients()
    backbone.set_grad_checkpointing(True)
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_a_part_called_by_itself_uses_the_present_coefficients() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[0])
    backbone(IMAGES)
    shake(bank)
    alone = backbone.forward_head(backbone.forward_features(IMAGES))
    assert torch.equal(alone, backbone(IMAGES))
    block = checkpoint(backbone.blocks[0], torch.randn(1, 17, 48), use_reentrant=False)
    block.sum().backward()  # no pass before it
    assert bank.groups["48x192"].coefficients_b.grad.abs().sum() > 0


def test_scope_and_start() -> None:
    backbone = vit()
    shared = make_bank(backbone, NOLA(targets=["mlp"], rank=2, num_basis=3, scope="shared"), 5)
    layered = make_bank(backbone, NOLA(targets=["mlp"], rank=2, num_basis=3, scope="per_layer"), 5)
    for bank, same in ((shared, True), (layered, False)):
        bank.groups["48x192"].coefficients_b.data[:] = 1
        a, b = factors(bank, "48x192")
        assert torch.equal(b[0, 0], b[0, 1]) is same
        assert not torch.equal(a[0, 0], a[0, 1])  # A0 is keyed by the weight's name in both scopes
    released = make_bank(backbone, NOLA(targets=["mlp"], rank=2, num_basis=4, start="released"), 5)
    assert released.groups["48x192"].coefficients_a.unique().tolist() == [0.25]
    a, b = factors(released, "48x192")
    assert float(a.std()) == pytest.approx((1 / 3 / 4 / 48) ** 0.5, rel=0.2)
    assert float(b.std()) == pytest.approx((1 / 3 / 4 / 192) ** 0.5, rel=0.2)


def test_the_basis_is_in_no_state_dict_and_order_does_not_matter() -> None:
    backbone = vit()
    one = make_bank(backbone, NOLA(targets=["mlp", "qkv"], num_basis=7), 5)
    other = make_bank(backbone, NOLA(targets=["qkv", "mlp"], num_basis=7), 5)
    assert set(one.state_dict()) == set(dict(one.named_parameters()))
    shake(one)
    other.load_state_dict(one.state_dict())
    for name, change in one.changes().items():
        assert torch.equal(change, other.changes()[name])


def test_state_dict_of_the_backbone_stays_timms_own() -> None:
    backbone = vit()
    names = list(backbone.state_dict())
    bank = attached(backbone, METHODS[0])
    assert list(backbone.state_dict()) == names
    bank.detach()
    assert all("forward" not in module.__dict__ for module in backbone.modules())


@pytest.mark.parametrize("backbone", [vit(), resnet()], ids=["vit", "resnet"])
def test_merge_equals_attached_and_unmerge_restores_the_bits(backbone: nn.Module) -> None:
    method = METHODS[4] if isinstance(backbone, timm.models.VisionTransformer) else NOLA(targets=["conv"], num_basis=5)
    original = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    bank = attached(backbone, method)
    shake(bank, 0.1)
    expected = bank(images)
    bank.merge()
    assert (bank(images) - expected).abs().max() / expected.abs().max() < 1e-5
    bank.unmerge()
    assert all(torch.equal(tensor, original[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(bank(images), expected)
    bank.merge()
    bank.detach()
    assert all(torch.equal(tensor, original[name]) for name, tensor in backbone.state_dict().items())


def test_routing_sends_each_sample_to_its_adapter() -> None:
    for backbone, method in ((vit(), METHODS[1]), (resnet(), NOLA(targets=["conv"], rank=2, num_basis=5))):
        bank = attached(backbone, method, num_adapters=3)
        shake(bank)
        images = torch.cat([IMAGES, IMAGES[:1]])
        index = torch.tensor([2, 0, 1, 2])
        with bank.route(index):
            routed = bank(images)
        for sample, adapter in enumerate(index):
            bank.merge(int(adapter))
            features = backbone(images[sample : sample + 1])
            expected = nn.functional.linear(features, bank.head_weight[adapter], bank.head_bias[adapter])
            bank.unmerge()
            assert (routed[sample] - expected[0]).abs().max() / expected.abs().max() < 1e-4
        with pytest.raises(NolaVisionError, match="route"):
            bank(IMAGES)


@pytest.mark.parametrize("samples", [(), (4,)], ids=["one adapter", "routed"])
def test_the_additive_path_keeps_its_input_once_and_no_output(samples: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 64).requires_grad_(False)
    x = torch.randn(4, 5, 6, requires_grad=True)
    a, b = torch.randn(*samples, 6, 2, requires_grad=True), torch.randn(*samples, 2, 64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        y = additive_linear(x, layer, a, b, 0.5)
    assert y.dtype == torch.bfloat16 and y.shape == (4, 5, 64)
    assert [t.numel() for t in kept].count(x.numel()) == 1 and not [t for t in kept if t.numel() == y.numel()]
    y.float().square().sum().backward()
    assert {x.grad.dtype, a.grad.dtype, b.grad.dtype} == {torch.float32}
    values = [value.detach().double().requires_grad_() for value in (x, a, b)]
    double = layer.double()
    assert torch.autograd.gradcheck(lambda x, a, b: additive_linear(x, double, a, b, 0.5), values)
    expected = double(values[0]) + 0.5 * values[0] @ values[1] @ values[2]
    assert torch.allclose(additive_linear(values[0], double, values[1], values[2], 0.5), expected)
    assert (y.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_bfloat16_autocast_does_not_round_the_change_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of about 1e-3 of W, on one layer: the additive path keeps it, merging in 16 bits loses most of it."""
    layer = nn.Linear(64, 64)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 4, generator=generator), torch.randn(4, 64, generator=generator)
    scale = float(1e-3 * layer.weight.std() / (a @ b).std())
    x = torch.randn(256, 64, generator=generator).bfloat16().float()
    exact = scale * (x @ a) @ b
    weight = layer.weight.detach().bfloat16()
    merged = (weight.float() + scale * (a @ b).T).bfloat16().float() - weight.float()
    lost = nn.functional.cosine_similarity((x @ merged.T).flatten(), exact.flatten(), 0)
    zero = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(zero.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not merges_exactly(x, layer.weight)
        kept = nn.functional.cosine_similarity(
            additive_linear(x, zero, a, b, scale).float().flatten(), exact.flatten(), 0
        )
    assert kept > 0.999 and lost < 0.9
    assert merges_exactly(x, layer.weight)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), lambda: nn.Conv2d(64, 64, 1)], ids=["linear", "conv"])
def test_16_bits_do_not_round_a_dense_change_away(make) -> None:
    """The change, recovered by least squares from what it does to the outputs of many inputs."""
    torch.manual_seed(0)
    layer = make()
    change = torch.randn_like(layer.weight) * 1e-3 * layer.weight.std()
    x = torch.randn(2**15, 64, *[1] * (change.dim() - 2)).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        moved, still = (dense_change(x, layer, d).float().flatten(1) for d in (change, 0 * change))
    found = torch.linalg.lstsq(x.flatten(1), moved - still).solution.T
    assert nn.functional.cosine_similarity(found.flatten(), change.flatten(), 0) > 0.99


def test_a_moved_backbone_unmerges_to_its_own_dtype() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[0])
    shake(bank)
    kept = backbone.blocks[0].mlp.fc1.weight
    before = bank(IMAGES)
    bank.merge()
    bank.double(), backbone.double()
    bank.unmerge()
    assert backbone.blocks[0].mlp.fc1.weight is kept and kept.dtype == torch.float64
    assert (bank(IMAGES.double()) - before).abs().max() / before.abs().max() < 1e-5


def test_a_weight_that_is_unfrozen_while_adapted_is_refused() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[0])
    backbone.requires_grad_(True)
    with pytest.raises(NolaVisionError, match="is trained itself: freeze the backbone"):
        bank(IMAGES)


WRONG_INDICES = {
    "negative": (torch.tensor([0, -1, 2]), "names adapter -1, but the bank has 3: use 0 to 2"),
    "too large": (torch.tensor([0, 3, 2]), "names adapter 3, but the bank has 3"),
    "floats": (torch.tensor([0.0, 1.0, 2.0]), "give a vector of integers"),
    "booleans": (torch.tensor([True, False, True]), "give a vector of integers"),
    "a matrix": (torch.tensor([[0, 1, 2]]), "give a vector of integers"),
    "no values": (torch.zeros(3, dtype=torch.int64, device="meta"), "on meta: give a vector of integers"),
    "a list": ([0, 1, 2], "the index is a list: give a tensor"),
}


@pytest.mark.parametrize(("index", "reason"), WRONG_INDICES.values(), ids=WRONG_INDICES)
def test_a_wrong_index_is_refused(index: object, reason: str) -> None:
    bank = attached(vit(), METHODS[0], num_adapters=3)
    with pytest.raises(NolaVisionError, match=reason), bank.route(index):
        pass


def test_routing_mistakes_are_refused() -> None:
    backbone = vit()
    bank = attached(backbone, METHODS[0], num_adapters=3)
    with pytest.raises(NolaVisionError, match="2 samples, but the batch has 3"), bank.route(torch.tensor([0, 1])):
        bank(IMAGES)
    with pytest.raises(NolaVisionError, match="for 1 samples, but the batch has 3"), bank.route(torch.tensor([2])):
        backbone(IMAGES)
    with pytest.raises(NolaVisionError, match="for 1 samples, but the batch has 3"), bank.route(torch.tensor([2])):
        bank.logits(torch.randn(3, 48))
    with pytest.raises(NolaVisionError, match="several adapters"):
        backbone(IMAGES)
    with pytest.raises(NolaVisionError, match="several adapters"):
        bank.logits(torch.randn(2, 48))
    with pytest.raises(NolaVisionError, match="prefix is 0: it is a share"), bank.using(prefix=0):
        pass
    shake(bank)
    with bank.route(torch.tensor([2, 2, 2])):
        expected = bank(IMAGES)
    bank.merge(2)
    assert (bank(IMAGES) - expected).abs().max() / expected.abs().max() < 1e-4  # its own head too


def test_routes_nest_and_keep_their_own_index() -> None:
    bank = attached(vit(), METHODS[1], num_adapters=3)
    shake(bank)
    index = torch.tensor([2, 0, 1], dtype=torch.uint8)
    with bank.route(index):
        outer = bank(IMAGES)
        index.zero_()  # the index was taken as it was
        with bank.route(torch.tensor([1, 1, 1])), pytest.raises(RuntimeError, match="inside"):
            inner = bank(IMAGES)
            raise RuntimeError("inside")
        assert torch.equal(bank(IMAGES), outer)
    assert not torch.allclose(inner, outer)
    with bank.route(torch.tensor([2, 0, 1])):
        assert torch.equal(bank(IMAGES), outer)
        with bank.using(prefix=0.5):
            cut = bank(IMAGES)
    with bank.using(prefix=0.5), bank.route(torch.tensor([2, 0, 1])):
        assert torch.equal(bank(IMAGES), cut) and not torch.allclose(cut, outer)


def test_a_merged_weight_in_16_bits_is_the_rounded_sum() -> None:
    backbone = vit().bfloat16()
    bank = attached(backbone, METHODS[0])
    shake(bank)
    changes = {name: change[0] if change.dim() > 2 else change for name, change in bank.changes().items()}
    before = {name: backbone.get_parameter(name).clone() for name in changes}
    bank.merge()
    for name, change in changes.items():
        assert torch.equal(backbone.get_parameter(name), (before[name].float() + change).bfloat16())


def test_loras_a_starts_as_pefts_does() -> None:
    """Uniform in +-1/sqrt(m), PEFT's kaiming_uniform_(a=sqrt(5))."""
    drawn = dict(attached(vit(), LoRA(targets=["mlp"], rank=16)).named_parameters())
    for name, values in drawn.items():
        if name.endswith(".a"):
            bound = values.shape[-2] ** -0.5
            assert 0.98 * bound < values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert any(name.endswith(".a") for name in drawn)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_pass_computes_the_adapters_of_its_batch_alone(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 adapters no more is computed than of the two that the batch names."""
    bank = attached(vit(), method, num_adapters=1000)
    sizes: list[int] = []
    plain = type(method).changes

    def changes(self: Method, group: Group, trained: dict[str, torch.Tensor], fixed: object, wanted: object) -> object:
        sizes.extend(map(len, trained.values()))
        return plain(self, group, trained, fixed, wanted)

    monkeypatch.setattr(type(method), "changes", changes)
    with bank.route(torch.tensor([998, 3, 998])), torch.no_grad():
        bank(IMAGES)
    assert sizes and set(sizes) == {2}


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_a_cast_to_16_bits_keeps_what_is_trained_in_float32(cast) -> None:
    """A step of 1e-4 on a coefficient of 1 would be rounded away in bfloat16, and sums of 40s overflow in float16."""
    backbone = vit()
    bank = attached(backbone, NOLA(targets=["mlp", "head"], rank=4, num_basis=1024, c=1e-4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(40.001 * torch.randn(parameter.shape, generator=generator).sign())
    plain, exact = bank(IMAGES), bank.changes()
    kept = {name: parameter.clone() for name, parameter in bank.named_parameters()}
    cast(bank), cast(backbone)
    for name, parameter in bank.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, kept[name])
    for name, change in bank.changes().items():
        assert torch.equal(change, exact[name])
    logits = bank(IMAGES.to(backbone.cls_token.dtype))
    assert logits.dtype == torch.float32 and (logits - plain).abs().max() / plain.abs().max() < 0.05
    bank.double()
    assert {parameter.dtype for parameter in bank.parameters()} == {torch.float64}


def test_sums_of_16_bit_coefficients_do_not_overflow() -> None:
    basis = Basis([basis_key(0, "w", "P")], 1024, 1, 64)
    coefficients = torch.full((1, 1024), 40.0)
    made = combine(coefficients.half(), basis)
    assert torch.equal(made, combine(coefficients, basis)) and made.abs().max() > 100


def test_tied_weights_are_adapted_and_counted_once() -> None:
    backbone = vit()
    backbone.blocks[1].mlp.fc1.weight = backbone.blocks[0].mlp.fc1.weight
    (target,) = find_targets(backbone, ["re:blocks.*fc1"])
    assert target.modules == ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1")
    bank = attached(backbone, LoRA(targets=["re:blocks.*fc1"], rank=2))
    assert sum(p.numel() for p in bank.adapter_parameters()) == 2 * (48 + 192)


class ReadsItsWeight(nn.Module):
    """Attention of the kind that multiplies by `self.qkv.weight` itself (BEiT, SwinV2)."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv = qkv

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)[..., : x.shape[-1]]


def test_refusals() -> None:
    backbone = vit()
    for block in backbone.blocks:
        block.attn = ReadsItsWeight(block.attn.qkv)
    with pytest.raises(NolaVisionError, match=r"blocks\.0\.attn\.qkv.* does not reach the features"):
        attached(backbone, LoRA(targets=["qkv"]))
    assert all("forward" not in module.__dict__ for module in backbone.modules())  # refused whole

    backbone = vit()
    bank = attached(backbone, METHODS[0])
    with pytest.raises(NolaVisionError, match="attached already"):
        bank.attach(backbone)
    with pytest.raises(NolaVisionError, match="adapter attached already"):
        attached(backbone, METHODS[0])
    bank.detach()
    with pytest.raises(NolaVisionError, match="not attached"):
        bank(IMAGES)
    with pytest.raises(NolaVisionError, match="freeze"):
        attached(vit().requires_grad_(True), METHODS[0])
    with pytest.raises(NolaVisionError, match="unknown target 'mpl'"):
        find_targets(backbone, ["mpl"])
    with pytest.raises(NolaVisionError, match="matches no weight of this VisionTransformer: it has mlp, qkv, qv"):
        find_targets(vit(), ["re:nothing"])
    with pytest.raises(NolaVisionError, match="not both"):
        find_targets(backbone, ["qkv", "qv"])
    with pytest.raises(NolaVisionError, match="is not a regular expression"):
        find_targets(backbone, ["re:("])
    with pytest.raises(NolaVisionError, match="rank 49"):
        make_bank(backbone, LoRA(rank=49), 5)
    with pytest.raises(NolaVisionError, match="num_basis of NOLA is 0"):
        make_bank(backbone, NOLA(num_basis=0), 5)
    batch = resnet()
    bank = attached(batch, NOLA(targets=["conv"], rank=1, num_basis=2), num_adapters=2)
    batch.train()
    with pytest.raises(NolaVisionError, match="batch statistics"), bank.route(torch.tensor([0, 1])):
        pass


def test_linear_probe_has_a_head_and_nothing_else() -> None:
    backbone = vit()
    bank = attached(backbone, LinearProbe())
    assert not any(
        m._forward_hooks for m in backbone.modules() if m is not backbone
    )  # each costs time, and Ctrl-C may hit it
    assert bank.adapter_parameters() == []
    assert sum(p.numel() for p in bank.head_parameters()) == 5 * 48 + 5


B16, L16 = "vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_large_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("tag", "method", "count"),
    [  # PAPER.md, 'Parameter counts that must come out exactly', the ViT rows
        (B16, LoRA(targets=["qkv"], rank=4), 147_456),
        (B16, LoRA(targets=["qv"], rank=4), 147_456),
        (L16, LoRA(targets=["qkv"], rank=4), 393_216),
        (L16, LoRA(targets=["qkv"], rank=1), 98_304),
        (B16, NOLA(targets=["mlp"], rank=4, num_basis=1024), 49_152),
        (B16, NOLA(targets=["mlp"], rank=1, num_basis=1024), 49_152),
        (B16, NOLA(targets=["qv"], rank=4, num_basis=1024), 49_152),
        (B16, NOLA(targets=["qkv"], rank=4, num_basis=1024), 24_576),
        (L16, NOLA(targets=["mlp"], rank=1, num_basis=1024), 98_304),
        (L16, NOLA(targets=["mlp"], rank=1, num_basis=512), 49_152),
    ],
)
def test_parameter_counts_of_the_paper(tag: str, method: Method, count: int) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(tag, num_classes=0)
    bank = make_bank(backbone, method, num_classes=100)
    assert sum(p.numel() for p in bank.adapter_parameters()) == count


@pytest.mark.parametrize("method", [LinearProbe(), NOLA(targets=["mlp"], rank=2, num_basis=5)], ids=["linear", "nola"])
def test_heads_of_different_class_counts_compute_what_separate_banks_do(method: Method) -> None:
    counts, backbone = (2, 5, 3), vit()
    bank = make_bank(backbone, method, counts, num_adapters=3)
    bank.attach(backbone)
    shake(bank)
    index = torch.tensor([1, 0, 2])
    with bank.route(index):
        routed = bank(IMAGES)
    routed[routed.isfinite()].square().sum().backward()
    assert routed.shape == (3, 5) and routed.isneginf().sum(1).tolist() == [0, 3, 2]
    for sample, adapter in enumerate(index.tolist()):
        classes, other = counts[adapter], vit()
        alone = make_bank(other, method, classes)
        alone.attach(other)
        with torch.no_grad():
            alone.head_weight.copy_(bank.head_weight[adapter : adapter + 1, :classes])
            alone.head_bias.copy_(bank.head_bias[adapter : adapter + 1, :classes])
            for own, shared in zip(alone.groups.parameters(), bank.groups.parameters(), strict=True):
                own.copy_(shared[adapter : adapter + 1])
        expected = alone(IMAGES[sample : sample + 1])[0]
        assert torch.allclose(routed[sample, :classes], expected, rtol=1e-4, atol=1e-5)
        with bank.route(torch.full((3,), adapter)):
            assert bank(IMAGES)[:, classes:].isneginf().all()
        expected.square().sum().backward()
        assert torch.allclose(bank.head_weight.grad[adapter, :classes], alone.head_weight.grad[0], rtol=1e-3, atol=1e-5)
        assert not bank.head_weight.grad[adapter, classes:].any() and not bank.head_bias.grad[adapter, classes:].any()
        assert {n: t.shape[0] for n, t in bank_tensors(bank, adapter).items() if "head" in n} == {
            "head.weight": classes, "head.bias": classes,
        }  # fmt: skip
    bank.merge(0)
    assert bank(IMAGES)[:, 2:].isneginf().all() and bank(IMAGES)[:, :2].isfinite().all()
    with pytest.raises(NolaVisionError, match="num_classes has 2 numbers, but the bank has 3 adapters"):
        make_bank(backbone, method, (2, 5), num_adapters=3)
    with pytest.raises(NolaVisionError, match="the same number of classes for all adapters"):
        make_bank(backbone, NOLA(targets=["mlp", "head"], rank=2, num_basis=5), counts, num_adapters=3)


@pytest.mark.parametrize("backbone", [vit(), resnet()], ids=["vit", "resnet"])
def test_a_method_sees_the_frozen_weight_as_its_change_is_added(backbone: nn.Module) -> None:
    """Against the layout of a change: `W + scale A B` with A = W, B = the identity, doubles the weight."""
    targets = find_targets(backbone, ["qv", "mlp"] if isinstance(backbone, timm.models.VisionTransformer) else ["conv"])
    source = Source(1, 0, "pretrained", torch.Generator(), backbone, torch.randn(5, 49))
    for target in targets:
        weight = source.weight(target)
        assert weight.shape == (target.inputs, target.outputs) and not weight.requires_grad
        rows = slice(*target.rows) if target.rows else slice(None)
        doubled = target.product(weight, torch.eye(target.outputs), 1.0)
        assert torch.equal(doubled, backbone.get_parameter(target.weight)[rows])
    head = Target("head", (), "linear", (5, 49))
    assert torch.equal(head.product(source.weight(head), torch.eye(5), 1.0), source.head)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_initial_values_have_the_shapes_that_files_are_checked_against(method: Method) -> None:
    bank = make_bank(vit(), method, 5, num_adapters=2)
    for group in bank.group_settings.values():
        assert {n: tuple(p.shape) for n, p in bank.groups[group.name].items()} == {
            name: (2, *shape) for name, shape in group.shapes.items()
        }
    assert method.cuttable <= {name for group in bank.group_settings.values() for name in group.shapes}
