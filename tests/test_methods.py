"""LoRA-XS, TinyLoRA, VeRA, Uni-LoRA and FacT against NumPy's SVD, a generator in NumPy, PEFT and the authors' layers.

`test_bank.py` has what holds for every method.
"""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import reference
from fuzz_adapters import _opened, written
from nola_vision import BackboneSpec, adapt, load_adapter
from nola_vision.adapters.methods import FacT, HashedNet, LoRAXS, Method, TinyLoRA, UniLoRA, VeRA, svd
from nola_vision.adapters.random_basis import balanced_slots, basis_key
from nola_vision.adapters.target import LowRank, dense
from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.building import make_bank
from nola_vision.models.export import shorten
from test_bank import IMAGES, attached, resnet, shake, vit

MINI = BackboneSpec("vit_mini_patch4_32.contours")
SCRATCH = BackboneSpec("resnet20_cifar.untrained", base="random")
CASES = {
    "lora-xs": (MINI, LoRAXS(targets=["qv"], rank=7, c=3)),
    "lora-xs-all-ranks": (MINI, LoRAXS(targets=["re:blocks.1.mlp.fc."], rank=160)),
    "lora-xs-4bit-conv": (SCRATCH, LoRAXS(targets=["conv"], rank=5, bits=4)),
    "lora-xs-int8": (BackboneSpec(MINI.tag, int8=True), LoRAXS(targets=["re:blocks.2.*"], rank=4)),
    "tiny-lora": (MINI, TinyLoRA(targets=["re:blocks.[03].attn.qkv", "re:blocks.3.*fc1"], rank=6, num_basis=20, c=3)),
    "tiny-lora-model-4bit-conv": (SCRATCH, TinyLoRA(targets=["conv"], rank=3, num_basis=70, scope="model", bits=4)),
    "uni-lora": (MINI, UniLoRA(targets=["qv", "re:blocks.3.*fc."], rank=3, max_parameters=300, c=2)),
    "uni-lora-4bit-conv": (SCRATCH, UniLoRA(targets=["conv"], rank=2, max_parameters=90, bits=4)),
    "fact": (MINI, FacT(targets=["qkv", "re:blocks.3.*fc."], rank=7, c=2)),
    "fact-8bit-conv": (SCRATCH, FacT(targets=["re:layers.*conv."], rank=3, bits=8)),
    "vera": (MINI, VeRA(targets=["qv", "re:blocks.3.*fc."], rank=200, c=2)),
    "vera-8bit-conv": (SCRATCH, VeRA(targets=["conv"], rank=9, bits=8)),
}


@pytest.fixture(scope="module", autouse=True)
def backbones_are_kept() -> Iterator[None]:
    with process_cache.keeping():
        yield


@functools.cache
def weights_of(spec: BackboneSpec) -> dict[str, np.ndarray]:
    """The frozen weights, before anything rounds them to int8."""
    plain = adapt(BackboneSpec(spec.tag, base=spec.base), VeRA(targets=["all"], rank=1), ["a", "b"], basis_seed=4)
    return {name: tensor.numpy() for name, tensor in plain.backbone.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_is_what_numpy_decodes_and_comes_back(case: str, tmp_path: Path) -> None:
    spec, method = CASES[case]
    model = adapt(spec, method, ["a", "b", "c"], run_seed=3, basis_seed=4).eval()
    started = model.bank.changes()
    assert all(not change.any() for change in started.values())
    shake(model.bank, 0.1)
    model.round_to_stored_bits()
    path = tmp_path / "a.safetensors"
    model.save(path)
    weights = weights_of(spec)
    expected = reference.changes(str(path), reference.targets_of(model.bank), weights)
    changes = model.bank.changes()
    assert list(changes) == list(expected)
    for target, change in changes.items():
        assert np.abs(change.numpy() - expected[target]).max() < 2e-5 * np.abs(expected[target]).max()
    loaded = load_adapter(path)
    side = loaded.metadata.input.size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), model(images))
    for target, change in loaded.bank.changes().items():
        assert torch.equal(change, changes[target])
    _, stored = reference.read(str(path))
    sketches = {name for name in stored if name.startswith("sketch.")}
    groups = loaded.bank.groups if isinstance(method, LoRAXS | TinyLoRA) else ()
    assert sketches == {f"sketch.{group}.{factor}" for group in groups for factor in "ab"}
    for group in groups:
        targets = loaded.bank.members(group)
        pairs = []
        for target in targets:
            weight = weights[target.weight].astype(np.float64)
            weight = weight[slice(*target.rows)] if target.rows else weight
            matrix = weight.T if target.kind == "linear" else weight.reshape(target.inputs, target.outputs)
            pairs.append(reference.svd_factors(matrix, method.rank))
        for factor, matrices in (("a", [a.T for a, _ in pairs]), ("b", [b for _, b in pairs])):
            assert stored[f"sketch.{group}.{factor}"] == pytest.approx(
                reference.sketch(matrices, factor.upper()), rel=1e-4, abs=1e-4
            )


def test_fewer_bits_leave_the_sketch_as_it_is(tmp_path: Path) -> None:
    model = adapt(*CASES["lora-xs"], ["a", "b"])
    shake(model.bank)
    model.save(tmp_path / "a.safetensors")
    shorten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=4)
    before, after = (reference.read(str(tmp_path / f"{name}.safetensors"))[1] for name in "ab")
    assert all(np.array_equal(after[name], before[name]) for name in before if name.startswith("sketch."))
    shorter = load_adapter(tmp_path / "b.safetensors").bank.changes()
    for name, change in model.bank.changes().items():
        assert 1e-3 < (shorter[name] - change).norm() / change.norm() < 0.2


@pytest.mark.parametrize(
    "method",
    [
        LoRAXS(targets=["qv", "mlp"], rank=3),
        VeRA(targets=["qv", "mlp"], rank=9),
        TinyLoRA(targets=["qv", "mlp"], rank=3, num_basis=5),
        UniLoRA(targets=["qv", "mlp"], rank=3, max_parameters=50),
        FacT(targets=["qkv", "mlp"], rank=3),
    ],
    ids=str,
)
def test_n_adapters_share_what_is_fixed(method: Method) -> None:
    backbone = vit()
    bank = attached(backbone, method, num_adapters=3)
    alone = make_bank(backbone, method, num_classes=5)
    for group in bank.groups:
        for name, fixed in bank.fixed[group].items():
            assert not isinstance(fixed, torch.Tensor) or torch.equal(fixed, alone.fixed[group][name])
    shake(bank)
    index = torch.tensor([2, 0, 2])
    with bank.route(index):
        routed = backbone(IMAGES)
    for sample, adapter in enumerate(index):
        bank.merge(int(adapter))
        expected = backbone(IMAGES[sample : sample + 1])
        bank.unmerge()
        assert (routed[sample] - expected[0]).abs().max() / expected.abs().max() < 1e-4


def test_lora_xs_can_remove_the_largest_singular_values() -> None:
    """With R = -(rank / c) I the change cancels the best approximation of rank r (Eckart and Young)."""
    backbone = vit()
    method = LoRAXS(targets=["qkv"], rank=6, c=2)
    bank = make_bank(backbone, method, 5)
    with torch.no_grad():
        bank.groups["48x144"].r += -3 * torch.eye(6)
    for name, change in bank.changes().items():
        weight = backbone.get_parameter(name)
        left, before = torch.linalg.svdvals(weight + change), torch.linalg.svdvals(weight)
        assert torch.allclose(left[:-6], before[6:], rtol=1e-4) and left[-6:].max() < 1e-4


def wrapped_by_peft(backbone: nn.Module, config: object) -> tuple[nn.Module, dict[str, nn.Module]]:
    """PEFT's copy of a backbone, and its layers by the name of their weight."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = get_peft_model(copy.deepcopy(backbone), config)
    layers = {
        n.partition("base_model.model.")[2]: m for n, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer)
    }
    return wrapped, {f"{name}.weight": layer for name, layer in layers.items() if name}


def same_features_and_gradients(
    backbone: nn.Module, own: nn.Parameter, wrapped: nn.Module, other: list[nn.Parameter]
) -> None:
    ours, theirs = backbone(IMAGES), wrapped(IMAGES)
    assert (ours - vit()(IMAGES)).abs().max() > 1e-2  # the change is not small
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    expected = torch.stack([parameter.grad for parameter in other])
    assert torch.allclose(own.grad[0].view_as(expected), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_tiny_lora_equals_peft(scope: str) -> None:
    """PEFT has A = sqrt(S) V^T and B = U sqrt(S), so its P are ours between roots of the singular values."""
    from peft import TinyLoraConfig

    backbone, rank, k = vit(), 4, 9
    config = TinyLoraConfig(r=rank, u=k, weight_tying=float(scope == "model"), target_modules=["qkv", "fc1", "fc2"])
    wrapped, layers = wrapped_by_peft(backbone, config)
    bank = attached(backbone, TinyLoRA(targets=["qkv", "mlp"], rank=rank, num_basis=k, scope=scope, c=2.0))
    assert list(layers) == [target.name for target in bank.targets]
    shake(bank)
    alpha, fixed = bank.groups["model"].coefficients, bank.fixed["model"]
    theirs = wrapped.base_model.tinylora_v["default"]
    assert len(theirs) == alpha.shape[1]
    with torch.no_grad():
        for vector, own in zip(theirs.values(), alpha[0], strict=True):
            vector.copy_(own)
        for target in bank.targets:
            layer = layers[target.name]
            a, b = layer.tinylora_A["default"], layer.tinylora_B["default"]  # [r, m], [o, r]
            roots, sign = a.norm(dim=1), (a @ fixed[f"a {target.name}"]).diag().sign()
            assert torch.allclose(b.t() * sign[:, None], roots[:, None] * fixed[f"b {target.name}"], atol=1e-4)
            drawn = reference.values(reference.basis(0, f"weight {target.name}", "R", k, rank, rank))
            own = torch.from_numpy(drawn).float() * (2.0 / rank / rank**0.5) * sign[:, None] * sign
            layer.tinylora_P["default"].copy_((own * roots[:, None] / roots).mT)
    same_features_and_gradients(backbone, alpha, wrapped, list(theirs.values()))


def test_tiny_lora_is_lora_xs_with_combined_random_matrices() -> None:
    """With as many matrices as R has entries, it reaches every R; the first matrices of a basis are a smaller basis."""
    rank = 3
    bank = make_bank(vit(), TinyLoRA(targets=["qkv"], rank=rank, num_basis=9, c=5.0), 5)
    other = make_bank(vit(), LoRAXS(targets=["qkv"], rank=rank, c=5.0), 5)
    wanted = torch.randn(2, rank, rank, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.groups["48x144"].r[0] = wanted
        for layer, target in enumerate(bank.targets):
            drawn = reference.values(reference.basis(0, f"weight {target.name}", "R", 9, rank, rank)).reshape(9, 9)
            solved = np.linalg.solve(drawn.T / rank**0.5, wanted[layer].numpy().ravel())
            bank.groups["model"].coefficients[0, layer] = torch.from_numpy(solved)
    for name, change in other.changes().items():
        assert torch.allclose(bank.changes()[name], change, rtol=0, atol=1e-4 * float(change.abs().max()))
    fewer = make_bank(vit(), TinyLoRA(targets=["qkv"], rank=rank, num_basis=4, c=5.0), 5)
    with torch.no_grad():
        bank.groups["model"].coefficients[..., 4:] = 0
        fewer.groups["model"].coefficients.copy_(bank.groups["model"].coefficients[..., :4])
    for name, change in fewer.changes().items():
        assert torch.allclose(bank.changes()[name], change, rtol=0, atol=1e-5 * float(change.abs().max()))


# --- Uni-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 7), (1000, 1), (1000, 999), (1000, 300), (4099, 64)])
def test_slots_are_balanced_and_those_of_the_format_page(size: int, count: int) -> None:
    slots = balanced_slots(basis_key(8, "unilora", "slots"), size, count)
    assert slots.tolist() == reference.balanced_slots(8, size, count).tolist()
    counts = torch.bincount(slots, minlength=count)
    assert len(counts) == count and counts.max() - counts.min() <= 1
    if size < 4000:
        return
    # neighbouring entries have independent slots: chi-squared of pairs of 8 classes, 49 degrees of freedom
    pairs = torch.bincount(8 * (slots[:-1] // 8) + slots[1:] // 8, minlength=64).double()
    assert 20 < float(((pairs - pairs.mean()).square() / pairs.mean()).sum()) < 90
    assert not torch.equal(slots, balanced_slots(basis_key(9, "unilora", "slots"), size, count))


def test_uni_lora_equals_peft_without_a0() -> None:
    """The wiring alone: PEFT's layers get our hash and normalisers. The hash is tested above, the start below."""
    from peft import UniLoraConfig

    backbone, rank = vit(), 3
    config = UniLoraConfig(r=rank, theta_d_length=70, target_modules=["qkv", "fc1", "fc2"])
    wrapped, layers = wrapped_by_peft(backbone, config)
    bank = attached(backbone, UniLoRA(targets=["qkv", "mlp"], rank=rank, max_parameters=70, c=float(rank)))
    theta, fixed = bank.groups["model"].theta, bank.fixed["model"]
    shake(bank)
    assert list(layers) == [target.name for target in bank.targets]
    indices = [layer.unilora_indices_A["default"] for layer in layers.values()]
    scales = [layer.unilora_scales_A["default"] for layer in layers.values()]
    assert torch.cat([one.flatten() for one in scales]).unique().tolist() == fixed["normaliser"].unique().tolist()
    with torch.no_grad():
        wrapped.base_model.unilora_theta_d["default"].copy_(theta[0])
        for name, layer in layers.items():
            fixed[f"a0 {name}"] = torch.zeros_like(fixed[f"a0 {name}"])
            a, b = fixed[f"a {name}"].t(), fixed[f"b {name}"].t()
            layer.unilora_indices_A["default"], layer.unilora_indices_B["default"] = a.contiguous(), b.contiguous()
            layer.unilora_scales_A["default"] = fixed["normaliser"][a]
            layer.unilora_scales_B["default"] = fixed["normaliser"][b]
    assert not torch.equal(indices[0], fixed[f"a {bank.targets[0].name}"].t())
    same_features_and_gradients(backbone, theta, wrapped, [wrapped.base_model.unilora_theta_d["default"]])


def test_uni_loras_projection_is_an_isometry_and_starts_at_a0_with_a_gradient() -> None:
    backbone = vit()
    bank = attached(backbone, UniLoRA(targets=["qkv", "mlp"], rank=3, max_parameters=50))
    backbone(IMAGES)[:, 0].sum().backward()
    (theta,) = bank.adapter_parameters()
    assert theta.grad.abs().min() > 0  # of every value: each serves some entry of some B

    def entries() -> torch.Tensor:
        changes = bank.method.changes(bank.group_settings["model"], {"theta": theta}, bank.fixed["model"], bank.targets)
        return torch.cat([factor.flatten() for change in changes.values() for factor in change[:2]])

    start = entries()
    assert (start != 0).sum() == 3 * sum(target.inputs for target in bank.targets)
    shake(bank)
    assert float((entries() - start).detach().square().sum()) == pytest.approx(
        float(theta.detach().square().sum()), rel=1e-5
    )
    every = make_bank(vit(), UniLoRA(targets=["qkv"], rank=1, max_parameters=10**6), 5)
    assert [p.numel() for p in every.adapter_parameters()] == [2 * (48 + 144)]  # no more than there are entries


# --- FacT -------------------------------------------------------------------------------------------------------------


class AuthorsFacT(nn.Module):
    """What the authors' code adds to the output of a layer, one linear layer after the other."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, cores: torch.Tensor, inputs: int) -> None:
        super().__init__()
        self.u, self.v = u, v  # [r, d] as nn.Linear has it, [d, r]
        # nn.Linear(r, r) for query, key and value, nn.Linear(r, 4 r) for fc1, nn.Linear(4 r, r) for fc2
        parts = list(cores.mT)
        self.core = torch.cat(parts, 0) if inputs == 48 else torch.cat(parts, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.unflatten(-1, (-1, 48))
        inside = nn.functional.linear(nn.functional.linear(pieces, self.u).flatten(-2), self.core)
        return nn.functional.linear(inside.unflatten(-1, (-1, self.u.shape[0])), self.v).flatten(-2)


def test_fact_equals_the_authors_layers() -> None:
    backbone = vit()
    edited = copy.deepcopy(backbone)
    bank = attached(backbone, FacT(targets=["qkv", "mlp"], rank=5, c=0.7))
    group = bank.groups["model"]
    shapes = {name: tuple(parameter.shape[1:]) for name, parameter in group.items()}
    assert shapes == {"u": (5, 48), "v": (5, 48), "core": (2 * (3 + 4 + 4), 5, 5)}
    assert float(group.u.detach().std()) == pytest.approx((1 / 3 / 48) ** 0.5, rel=0.1) and not group.v.any()
    assert float(group.core.detach().std()) == pytest.approx((1 / 3 / 5) ** 0.5, rel=0.1)
    shake(bank)
    first = 0
    for target in bank.targets:
        pieces = target.size // 48**2
        added = AuthorsFacT(group.u[0], group.v[0].t(), group.core[0, first : first + pieces], target.inputs)
        edited.get_submodule(target.modules[0]).register_forward_hook(
            lambda module, args, out, added=added: out + 0.7 * added(args[0])
        )
        first += pieces
    ours, theirs = backbone(IMAGES), edited(IMAGES)
    assert (ours - vit()(IMAGES)).abs().max() > 1e-2
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    own = torch.autograd.grad((ours * direction).sum(), list(group.values()))
    for one, other in zip(own, torch.autograd.grad((theirs * direction).sum(), list(group.values())), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


# --- what determines singular vectors ---------------------------------------------------------------------------------


def with_singular_values(values: list[float]) -> nn.Module:
    """A backbone whose second layer's weight `[8, 6]` has these six singular values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8)).requires_grad_(False)
    u, v = (torch.linalg.qr(torch.randn(side, 6, dtype=torch.float64))[0] for side in (8, 6))
    with torch.no_grad():
        model.double()[1].weight.copy_(u @ torch.tensor(values, dtype=torch.float64).diag() @ v.t())
    model.num_features = 8
    return model


CLOSE = {
    "at the cut": ([6, 5, 4, 4, 2, 1], 3, "singular value 3 is zero or almost equal .* a rank of at most 2"),
    "before the cut": ([6, 5, 5, 3, 2, 1], 4, "singular value 2 is zero or almost equal .* a rank of at most 1"),
    "nearly": ([6, 5, 4, 4 - 3e-7, 2, 1], 3, "1.weight: its singular value 3"),
    "zero": ([6, 5, 4, 0, 0, 0], 4, "singular value 4 is zero or almost equal .* a rank of at most 3"),
    "the last is zero": ([6, 5, 4, 3, 2, 0], 6, "singular value 6 is zero .* a rank of at most 5"),
    "orthogonal": ([1] * 6, 1, "leave it out of the targets"),
    "nothing": ([0] * 6, 1, "leave it out of the targets"),
    "far enough": ([6, 5, 4, 4 - 3e-6, 2, 1], 3, None),
    "only after the cut": ([6, 5, 4, 2, 2, 0], 3, None),
    "every one": ([6, 5, 4, 3, 2, 1], 6, None),
}


@pytest.mark.parametrize("case", CLOSE)
def test_singular_values_that_do_not_determine_vectors_are_refused_in_training_only(case: str) -> None:
    values, rank, refusal = CLOSE[case]
    backbone, method = with_singular_values(values), LoRAXS(targets=["re:1"], rank=rank)
    if refusal is None:
        a, b = reference.svd_factors(backbone[1].weight.numpy().T, rank)
        fixed = make_bank(backbone, method, 2).fixed["6x8"]
        assert np.abs(fixed["a"][0].numpy() - a).max() < 1e-5 and np.abs(fixed["b"][0].numpy() - b).max() < 1e-5
    else:
        with pytest.raises(NolaVisionError, match=f"rank {rank} of LoRAXS is not possible for .*{refusal}"):
            make_bank(backbone, method, 2)
    make_bank(backbone, method, 2, target_names=["1.weight"])  # as a file is loaded: the sketch decides there


def test_rounding_changes_neither_signs_nor_vectors() -> None:
    """Another LAPACK rounds otherwise; a weight with a symmetry has singular vectors with several largest entries."""
    symmetric = torch.tensor([[3.0, 1, 0.5, 0], [1, 3, 0, 0.5], [0.5, 0, 2, 1], [0, 0.5, 1, 2]], dtype=torch.float64)
    reflected = torch.cat([symmetric, symmetric.flip(0)], 1)
    generator = torch.Generator().manual_seed(0)
    for weight in (vit().blocks[0].mlp.fc1.weight.t(), vit().blocks[0].mlp.fc2.weight.t(), symmetric, reflected):
        plain = svd._factors(None, weight, 3)
        for _ in range(10):
            noise = 1e-14 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            moved = svd._factors(None, weight.double() + noise, 3)
            for one, other in zip(plain[:2], moved[:2], strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    backbone = with_singular_values([6, 5, 4, 3, 2, 1])
    backbone[1].weight[0, 0] = torch.nan
    with pytest.raises(NolaVisionError, match=r"singular vectors of 1.weight \(1 of its values"):
        make_bank(backbone, LoRAXS(targets=["re:1"], rank=2), 2)


# --- the sketch -------------------------------------------------------------------------------------------------------


def test_a_file_for_other_factors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    adapt(MINI, LoRAXS(targets=["re:blocks.[01].mlp.fc1"], rank=4), ["a", "b"]).save(path)
    metadata, tensors = _opened(path.read_bytes())
    name = "sketch.160x640.a"

    def ending(sketch: torch.Tensor | None, named: str = name) -> str:
        kept, table = dict(tensors), dict(metadata["tensors"])
        del kept[name], table[name]
        if sketch is not None:
            kept[named], table[named] = sketch, [8 * sketch.element_size(), *sketch.shape]
        path.write_bytes(written({**metadata, "tensors": table}, kept))
        try:
            load_adapter(path)
        except NolaVisionError as error:
            assert "\n" not in str(error)
            return str(error)
        return ""

    sketch = tensors[name].view(torch.float32)
    for change, refused in ((5e-4, False), (2e-3, True), (1e8, True)):
        moved = sketch + torch.tensor([0, change * sketch.abs().max()])
        assert bool(ending(moved)) == refused
    assert "trained with another 160x640.a than this machine computes" in ending(-sketch)
    assert "sketch.160x640.a is missing" in ending(None)
    assert "sketch.160x640.a has the shape [3] and not [2]" in ending(torch.zeros(3))
    assert "sketch.160x640.a is missing" in ending(sketch, "sketch.160x640.z")
    assert "not finite" in ending(torch.tensor([torch.nan, 0.0]))
    assert "bits and shape of the tensor sketch.160x640.a do not exist" in ending(torch.zeros(2, dtype=torch.int64))
    assert ending(sketch) == ""
    # a library that finds one vector with the other sign
    plain = svd._factors

    def flipped(target: object, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        a, b, most = plain(target, weight, rank)
        sign = torch.tensor([1.0, 1, -1, 1]) if target.name.startswith("blocks.1.") else torch.ones(4)
        return a * sign, b * sign.unsqueeze(1), most

    monkeypatch.setattr(svd, "_factors", flipped)
    assert "use the weights and the release" in ending(sketch)


# --- VeRA -------------------------------------------------------------------------------------------------------------


def test_vera_equals_peft() -> None:
    """PEFT cuts A and B from one pair of the largest shape; with equal values, features and gradients are equal."""
    from peft import VeraConfig, get_peft_model

    backbone = vit()
    config = VeraConfig(r=12, target_modules=["qkv", "fc1", "fc2"], d_initial=0.1)
    wrapped = get_peft_model(copy.deepcopy(backbone), config)
    bank = attached(backbone, VeRA(targets=["qkv", "mlp"], rank=12))
    shared = {}  # the largest of each, from our generator
    for factor, side in (("a", 192), ("b", 192)):
        own = next(bank.fixed[g][factor] for g, t in bank.group_settings.items()
                   if (t.targets[0].inputs if factor == "a" else t.targets[0].outputs) == side)  # fmt: skip
        shared[factor] = own.t()  # PEFT's layout
    layers = {name: module for name, module in wrapped.named_modules() if hasattr(module, "vera_lambda_d")}
    assert len(layers) == 6
    for name, group in bank.group_settings.items():
        m = group.targets[0].inputs
        for place, target in enumerate(group.targets):
            layer = next(one for key, one in layers.items() if key.endswith(target.modules[0]))
            assert torch.equal(layer.vera_lambda_d["default"], bank.groups[name].d[0, place])
            assert torch.equal(layer.vera_lambda_b["default"], bank.groups[name].b[0, place])
            # the normaliser of our A is that of the weight's own shape; PEFT's that of the largest
            layer.scale = (192 / m) ** 0.5
    shake(bank)
    with torch.no_grad():
        wrapped.base_model.vera_A["default"].copy_(shared["a"])
        wrapped.base_model.vera_B["default"].copy_(shared["b"])
        for name, group in bank.group_settings.items():
            for place, target in enumerate(group.targets):
                layer = next(one for key, one in layers.items() if key.endswith(target.modules[0]))
                layer.vera_lambda_d["default"].copy_(layer.scale * bank.groups[name].d[0, place])
                layer.vera_lambda_b["default"].copy_(bank.groups[name].b[0, place])
    ours, theirs = backbone(IMAGES), wrapped(IMAGES)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for name, group in bank.group_settings.items():
        for place, target in enumerate(group.targets):
            layer = next(one for key, one in layers.items() if key.endswith(target.modules[0]))
            for mine, other in (
                (bank.groups[name].d.grad[0, place], layer.scale * layer.vera_lambda_d["default"].grad),
                (bank.groups[name].b.grad[0, place], layer.vera_lambda_b["default"].grad),
            ):
                assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("rank", [1, 36, 37, 300])
def test_veras_changes_are_never_larger_than_the_weights(rank: int) -> None:
    """The factors of a 48 x 144 weight have as many entries as the weight at rank 36."""
    bank = attached(vit(), VeRA(targets=["qkv"], rank=rank, c=2))
    shake(bank)
    (group,) = bank.group_settings.values()
    trained, fixed = dict(bank.groups[group.name].items()), bank.fixed[group.name]
    with torch.no_grad():
        found = bank.method.changes(group, trained, fixed, group.targets)
    for place, target in enumerate(group.targets):
        change = found[target.name]
        assert isinstance(change, LowRank) == (rank <= 36)
        assert sum(part.numel() for part in change[:2] if isinstance(part, torch.Tensor)) <= target.size
        d, b = (trained[name][0, place].detach().diag() for name in "db")
        expected = (2 * fixed["a"] @ d @ fixed["b"] @ b).t()
        assert torch.allclose(dense(target, change)[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_veras_pair_is_one_for_all_shapes_with_kaimings_variances() -> None:
    bank = make_bank(vit(), VeRA(targets=["qkv", "mlp"], rank=300), 5)
    narrow, wide = bank.fixed["48x192"], bank.fixed["192x48"]
    assert torch.allclose(wide["a"][:48] * 2, narrow["a"], rtol=1e-6)  # sqrt(192 / 48)
    assert torch.equal(narrow["b"][:, :48], wide["b"])
    assert float(narrow["a"].var()) == pytest.approx(2 / 48, rel=0.05)
    assert float(narrow["b"].var()) == pytest.approx(2 / 300, rel=0.05)
    assert sum(p.numel() for p in bank.adapter_parameters()) == 6 * 300 + 2 * (144 + 192 + 48)
    assert sum(p.numel() for p in make_bank(vit(), LoRAXS(rank=9), 5).adapter_parameters()) == 2 * 81


def test_hashednet_keeps_four_bytes_per_weight() -> None:
    bank = make_bank(vit(), HashedNet(targets=["qkv", "mlp"], max_parameters=50), 5)
    kept = [tensor for fixed in bank.fixed.values() for tensor in fixed.values()]
    assert sum(tensor.nbytes for tensor in kept) == 4 * sum(target.size for target in bank.targets)


REFUSED = {
    "hashednet's values": (HashedNet(max_parameters=2 * 10**9), "max_parameters of HashedNet is 2000000000: it must"),
    "head": (LoRAXS(targets=["qkv", "head"]), "LoRAXS does not adapt the head .*: leave head out of targets"),
    "vera's head": (VeRA(targets=["qkv", "head"]), "VeRA does not adapt the head"),
    "rank": (LoRAXS(rank=49), "rank 49 is not possible for blocks.0.attn.qkv.weight"),
    "no rank": (LoRAXS(rank=0), "rank 0 is not possible"),
    "vera's rank": (VeRA(rank=5000), "rank of VeRA is 5000: it must be at most 4,096"),
    "vera without a rank": (VeRA(rank=0), "rank of VeRA is 0: it must be above zero"),
    "scale": (LoRAXS(c=-1.0), "c of LoRAXS is -1.0"),
    "tiny-lora's head": (TinyLoRA(targets=["qkv", "head"]), "TinyLoRA does not adapt the head"),
    "redundant matrices": (
        TinyLoRA(rank=3, num_basis=10),
        "num_basis of TinyLoRA is 10, but 9 matrices span .* rank 3",
    ),
    "tied ones too": (TinyLoRA(rank=3, num_basis=19, scope="model"), "19, but 18 matrices span"),
    "no matrices": (TinyLoRA(num_basis=0), "num_basis of TinyLoRA is 0: it must be above zero"),
    "tiny-lora's rank": (TinyLoRA(rank=49), "rank 49 is not possible for blocks.0.attn.qkv.weight"),
    "uni-lora's head": (UniLoRA(targets=["qkv", "head"]), "UniLoRA does not adapt the head"),
    "no values": (UniLoRA(max_parameters=0), "max_parameters of UniLoRA is 0: it must be above zero"),
    "uni-lora's rank": (UniLoRA(rank=49), "rank 49 is not possible for blocks.0.attn.qkv.weight"),
    "too many entries": (UniLoRA(targets=["re:.*fc."], rank=48), "rank 48 of UniLoRA gives factors of 46,080 entries"),
    "fact's head": (FacT(targets=["qkv", "head"]), "FacT does not adapt the head"),
    "fact's rank": (
        FacT(rank=49),
        "rank 49 of FacT .*: 48 is the greatest common divisor of .*, so use a rank from 1 to 48",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nola_vision.adapters.methods.uni_lora._MOST_ENTRIES", 46_079)
    method, refusal = REFUSED[case]
    with pytest.raises(NolaVisionError, match=refusal):
        make_bank(vit(), method, 5)


def test_a_zero_base_is_refused() -> None:
    zero = BackboneSpec("mlp_784_256.untrained", base="zero")
    for method in (VeRA, UniLoRA, FacT):
        with pytest.raises(NolaVisionError, match=f"{method.__name__} on base zero would never move"):
            adapt(zero, method(targets=["all"], rank=1), ["a", "b"])
        assert attached(resnet(), method(targets=["conv"], rank=2), base="random")
    for method in (LoRAXS(targets=["all"]), TinyLoRA(targets=["all"])):
        with pytest.raises(NolaVisionError, match="fc1.weight: its singular value 1 is zero .*leave it out"):
            adapt(zero, method, ["a", "b"])
