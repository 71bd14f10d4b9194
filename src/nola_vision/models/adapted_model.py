"""An adapted model: a backbone, the stack attached to it, and what its adapter file says. The Python interface."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, overload

import torch
from PIL import Image
from torch import Tensor, nn

from nola_vision.adapters.bank import AdapterStack
from nola_vision.adapters.functional import is_quantised
from nola_vision.adapters.methods import registry
from nola_vision.adapters.methods.registry import (
    NOLA,
    PEFT,
    PRANC,
    Adapter,
    FullFinetune,
    HashedNet,
    Method,
    NearestNeighbor,
    stored_bits,
)
from nola_vision.adapters.quantization import rounded
from nola_vision.adapters.serialization import AdapterFile, adapter_bytes, open_adapter, write_adapter
from nola_vision.adapters.target import HEAD, Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.tags import short_tag
from nola_vision.common.validation import check_counts, check_types, plain_number, quoted
from nola_vision.images.transforms import eval_transform
from nola_vision.models import known_weights
from nola_vision.models.backbones.creation import create_backbone, skeleton, to_int8
from nola_vision.models.backbones.from_scratch import check_random_features, open_branches
from nola_vision.models.backbones.properties import batch_norms, fingerprint, probe_batch
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.backbones.weights import weights_file
from nola_vision.models.building import (
    edited_by_peft,
    feature_width,
    make_stack,
    method_targets,
    settle,
    tensor_shapes,
    with_module_names,
)
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import Calibrated, Card, Header, check_calibrated, check_card, parse_header
from nola_vision.models.prediction import (
    Prediction,
    batches,
    load_image,
    one_or_several,
    probabilities,
    run_in_eval_mode,
    top_classes,
)


class AdaptedModel(nn.Module):
    """A backbone with an adapter stack attached: images `[batch, 3, size, size]` to logits `[batch, classes]`.

    Made by `adapt` or `load_adapter`. `stack.parameters()` are the adapter's and the head's; the backbone's own are
    frozen, but for all of `FullFinetune`, the batch norms of `train_norms` and what PEFT adds.

    Attributes:
        temperature: divides the logits for the probabilities of `predict`; `forward` does not use it. 1 if nothing was
            fitted.
        calibrated_on: the images that the temperature was fitted on, `folds` or `validation`; None: not calibrated.
        calibration_images: how many images these were.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stack: AdapterStack,
        card: Card,
        fingerprint: str | None,
        weights: WeightsOrigin | None = None,
    ) -> None:
        super().__init__()
        self.temperature = 1.0
        self.calibrated_on: str | None = None
        self.calibration_images: int | None = None
        self.weights = weights
        self.backbone, self.stack, self.card = backbone, stack, card
        # of the weights as they were loaded: a run may cast them, round them to int8, or train them; a fully
        # fine-tuned model has none, since its file holds every weight and so fits any of the shape
        self.fingerprint = fingerprint
        self._stored_bits: dict[str, int] = {}  # by parameter name, see `compute_with_stored_bits`

    def forward(self, images: Tensor) -> Tensor:
        with self.stack.using(bits=self._stored_bits) if self._stored_bits else nullcontext():
            return self.stack.logits(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The adapted backbone's features `[batch, features]`, which the head takes, of `[batch, 3, size, size]`."""
        features: Tensor = self.backbone(images.to(self._dtype(images.dtype)))
        return features

    def classified(self, features: Tensor) -> Tensor:
        """Features to logits `[batch, classes]`: the second half of a forward pass."""
        with self.stack.using(bits=self._stored_bits) if self._stored_bits else nullcontext():
            return self.stack.logits(features)

    @overload
    def predict(self, images: str | Path | Image.Image, top_k: int = 3, batch_size: int = 64) -> list[Prediction]: ...
    @overload
    def predict(self, images: Any, top_k: int = 3, batch_size: int = 64) -> Any: ...
    def predict(self, images: Any, top_k: int = 3, batch_size: int = 64) -> Any:
        """The most probable classes of an image, or of each of several, with their probabilities.

            label, probability = model.predict("photo.jpg")[0]

        Probabilities are softmax(logits / `temperature`). Modes and gradients of the model stay as they are. Several
        threads may predict with one model at a time.

        Args:
            images: one image or an iterable of them. An image is a path; a PIL image; a NumPy array `[h, w]`,
                `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]` of uint8, or `[h, w]` of uint16; or a tensor `[h, w]` or
                `[1 or 3, h, w]` of uint8, or of floats from 0 to 1 (rounded to 8 bits). An array or a tensor with
                four dimensions is several images. Images are turned as their EXIF states, and made RGB.
            top_k: how many classes for each image; all if there are fewer.
            batch_size: images at a time.

        Returns:
            `Prediction(label, probability)`, the most probable first: a list of them for one image, a list of such
            lists for several.

        Raises:
            NolaVisionError: an image cannot be read or is none of the above, or a logit is not finite.
        """
        one, several = one_or_several(images)
        check_counts(top_k=top_k, batch_size=batch_size)
        found = [
            top_classes(row, self.card.class_names, top_k)
            for _, batch in batches(several, eval_transform(self.card.input), batch_size)
            for row in probabilities(self, batch, self.temperature)
        ]
        return found[0] if one else found

    def embed(self, images: Any, batch_size: int = 64) -> Tensor:
        """The adapted backbone's features of images as `predict` takes them: float32 `[n, features]` on the CPU."""
        _, several = one_or_several(images)
        check_counts(batch_size=batch_size)
        found = [
            run_in_eval_mode(self, self.features, batch).float().cpu()
            for _, batch in batches(several, eval_transform(self.card.input), batch_size)
        ]
        return torch.cat(found) if found else torch.empty(0, feature_width(self.backbone))

    def transform(self, image: Any) -> Tensor:
        """One image, as `predict` takes it, as the float32 tensor `[3, size, size]` that the model takes a batch of."""
        return eval_transform(self.card.input)(load_image(image, 0))

    def _dtype(self, otherwise: torch.dtype) -> torch.dtype:
        """The dtype that the backbone computes in: that of its first parameter."""
        return next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), otherwise)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a batch norm whose weights are frozen keeps its running statistics."""
        super().train(mode)
        for norm in batch_norms(self.backbone).values():
            norm.training = norm.training and _is_trained(norm)
        return self

    def trained_tensors(self, adapter: int = 0) -> dict[str, Tensor]:
        """What training changed, by its name in the adapter file, of one adapter."""
        backbone = {
            f"backbone.{name}": tensor for name, tensor in backbone_tensors(self.backbone, self.card.method).items()
        }
        return stack_tensors(self.stack, adapter) | backbone

    @property
    def bits(self) -> dict[str, int]:
        """Bits a stored number, by the tensor's name in the file."""
        return file_bits(stack_tensors(self.stack), self.card.method)

    def compute_with_stored_bits(self, on: bool = True) -> None:
        """Makes the forward pass see the numbers as a file would hold them; gradients go straight through."""
        named = {"head.weight": "head_weight"}
        bits = {named.get(name, name.replace("adapter.", "groups.", 1)): width for name, width in self.bits.items()}
        self._stored_bits = {name: width for name, width in bits.items() if width != 32} if on else {}

    @torch.no_grad()
    def round_to_stored_bits(self) -> None:
        """Replaces the trained numbers by what the adapter file holds of them."""
        for name, tensor in stack_tensors(self.stack).items():
            tensor.copy_(rounded(tensor.unsqueeze(0), self.bits.get(name, 32))[0])

    def not_finite(self, adapter: int = 0) -> str | None:
        """The first trained tensor of an adapter (and its first layer) with a value that is not finite, or None."""
        floats = self.trained_tensors(adapter)
        if (name := first_not_finite(floats)) is None:
            return None
        group = name.removeprefix("adapter.").rpartition(".")[0]
        if group not in self.stack.groups or floats[name].dim() < 2:
            return name
        layer = int((~floats[name].isfinite()).flatten(1).any(1).nonzero()[0])
        return f"{name} of {self.stack.members(group)[layer].name}"

    def metadata(self) -> dict[str, Any]:
        """What the adapter file says besides its tensors."""
        if self.calibrated_on is None and self.temperature != 1:
            raise NolaVisionError(
                f"the model's temperature is {self.temperature} and its calibrated_on is None: state which images it "
                "was fitted on, such as 'validation'"
            )
        calibrated = None
        if self.calibrated_on is not None:
            calibrated = check_calibrated(Calibrated(self.temperature, self.calibrated_on, self.calibration_images))
        return file_metadata(self.card, self.stack, self.fingerprint, self.weights, calibrated)

    def save(self, path: str | Path, adapter: int | None = None) -> int:
        """Writes the adapter file and returns its size in bytes.

        Args:
            path: the file.
            adapter: which adapter, where the stack holds several.

        Raises:
            NolaVisionError: the path cannot be written, the adapter is merged into the backbone or not named, or a
                value is not finite.
        """
        count = self.stack.num_adapters
        if count > 1 and adapter is None:
            raise NolaVisionError(f"the model has {count} adapters and a file contains one: choose it by `adapter=`")
        if not 0 <= (adapter := adapter or 0) < count:
            raise NolaVisionError(f"adapter {adapter} does not exist: the model has {count}, counted from 0")
        if isinstance(self.card.method, NearestNeighbor):
            raise NolaVisionError(
                "1-NN compares with every training image, which an adapter file does not hold: save NearestMean or "
                "LogisticRegression instead"
            )
        if self.stack.merged:
            raise NolaVisionError("a merged adapter cannot be saved: unmerge() it first")
        if broken := self.not_finite(adapter):
            raise NolaVisionError(f"{broken} is not finite: try a smaller learning rate or scale")
        return write_adapter(path, self.metadata(), self.trained_tensors(adapter), self.bits)

    @torch.no_grad()
    def check_saved(self, path: str | Path, images: Tensor) -> None:
        """Checks that an adapter file gives this model back: a new model with the file's tensors, on some images.

        Args:
            path: a file that `save` wrote.
            images: `[batch, 3, size, size]`, on the model's device.

        Raises:
            NolaVisionError: the logits differ, so something that training changed is not in the file.
        """
        restored = _assemble(_to_fill(self.card), self.card, verify=False)
        _fill(restored, open_adapter(path).tensors(), path)
        restored.to(images.device, self._dtype(images.dtype))
        expected = run_in_eval_mode(self, self, images).float()
        found = restored.eval()(images).float()
        exact = self._dtype(images.dtype) in (torch.float32, torch.float64)
        tolerance = (1e-3 if exact else 5e-2) * max(1.0, float(expected.abs().max()))
        if not bool(((found - expected).abs() <= tolerance).all()):
            raise NolaVisionError(
                f"{path} does not give the trained model back (logits differ by up to "
                f"{float((found - expected).abs().max()):.3g}): {type(self.card.method).__name__} changes something "
                "that an adapter file does not hold; use other settings for it"
            )


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None. Tensors that hold integers pass."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and not is_quantised(t)}
    # a sum is five times as fast as a test of each value, and finite sums leave nothing to find
    if not floats or bool(torch.stack([tensor.sum().float() for tensor in floats.values()]).isfinite().all()):
        return None
    return next((name for name, tensor in floats.items() if not tensor.isfinite().all()), None)


def stack_tensors(stack: AdapterStack, adapter: int = 0) -> dict[str, Tensor]:
    """The trained tensors of one adapter of a stack by their names in the adapter file."""
    tensors = {f"adapter.{name}": parameter[adapter] for name, parameter in stack.groups.named_parameters()}
    if stack.head_target is None:
        tensors |= {"head.weight": stack.head_weight[adapter], "head.bias": stack.head_bias[adapter]}
    return tensors


def _is_trained(norm: nn.Module) -> bool:
    """Whether a batch norm has a trained weight or bias; then its running statistics move in training, too."""
    return any(parameter.requires_grad for parameter in norm.parameters(recurse=False))


def backbone_tensors(backbone: nn.Module, method: Method) -> dict[str, Tensor]:
    """The tensors of the backbone itself that a method changes, statistics of batch norms included.

    All for `FullFinetune`; what PEFT trains, with the statistics of the norms it trains; all batch norms for
    `train_norms`.
    """
    if isinstance(method, FullFinetune):
        return backbone.state_dict()
    norms = batch_norms(backbone)
    if isinstance(method, PEFT):
        kept = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        trained = [name for name, norm in norms.items() if _is_trained(norm)]
        moving = {f"{name}.{key}": tensor for name in trained for key, tensor in norms[name].named_buffers()}
        return kept | {name: tensor for name, tensor in moving.items() if not name.endswith("num_batches_tracked")}
    if isinstance(method, Adapter) and method.train_norms:
        whole = {f"{name}.{key}": tensor for name, norm in norms.items() for key, tensor in norm.state_dict().items()}
        return {name: tensor for name, tensor in whole.items() if not name.endswith("num_batches_tracked")}
    return {}


def file_bits(names: Collection[str], method: Method) -> dict[str, int]:
    """Bits a stored number, by the tensor's name in the file; biases and norms keep 32."""
    bits, head_bits = stored_bits(method)
    widths = {name: bits for name in names if name.startswith("adapter.")}
    return widths | {name: head_bits for name in names if name.startswith((f"adapter.{HEAD}.", "head.weight"))}


def file_metadata(
    card: Card,
    stack: AdapterStack,
    fingerprint: str | None,
    weights: WeightsOrigin | None = None,
    calibrated: Calibrated | None = None,
) -> dict[str, Any]:
    """What an adapter file says besides its tensors, as plain values."""
    return {
        "backbone": {
            "tag": short_tag(card.backbone.tag),
            **{name: getattr(card.backbone, name) for name in ("img_size", "base", "int8")},
        },
        "backbone_fingerprint": fingerprint,
        "weights": None if weights is None else dataclasses.asdict(weights),
        "calibration": None if calibrated is None else dataclasses.asdict(calibrated),
        "method": registry.to_dict(card.method),
        "run_seed": card.run_seed,
        "basis_seed": card.basis_seed,
        "targets": [
            {"name": t.name, "shape": list(t.shape), "group": stack.group_of[t.name]} for t in stack.every_target
        ],
        "class_names": list(card.class_names),
        "input": dataclasses.asdict(card.input),
    }


def adapt(
    backbone: str | BackboneSpec,
    method: Method,
    class_names: Iterable[str],
    run_seed: int = 0,
    basis_seed: int | None = None,
) -> AdaptedModel:
    """A pretrained backbone with a new adapter and a new head, ready to train.

    Args:
        backbone: timm's tag, or a `BackboneSpec` for a local file or another image size.
        method: what to train, such as `NOLA(targets=["mlp"], rank=4, num_basis=1024)`.
        class_names: the classes, in the order of the logits; two may have the same name.
        run_seed: sets the head's start and LoRA's A.
        basis_seed: sets NOLA's basis; `run_seed` if not given.

    Raises:
        NolaVisionError: the backbone or a target is not there, a target has no effect on the features, or an argument
            makes no sense.
    """
    if not isinstance(method, Method):
        raise NolaVisionError(f"the method is {method!r}: give a value such as NOLA(targets=['mlp'])")
    names = () if isinstance(class_names, str) or not isinstance(class_names, Iterable) else tuple(class_names)
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise NolaVisionError(f"class_names is {quoted(names or class_names)}: give the names of two classes or more")
    spec = check_types(BackboneSpec(backbone) if isinstance(backbone, str) else backbone)
    run_seed = plain_number(run_seed)
    basis_seed = run_seed if basis_seed is None else plain_number(basis_seed)
    model = _assemble(spec, check_card(Card(spec, method, names, run_seed, basis_seed, input_config(spec))))
    if spec.base == "random" and not _trains_norms(method):
        check_random_features(model.backbone, spec.tag)
    known_weights.remember(spec)
    return model


def _to_fill(card: Card) -> BackboneSpec:
    """The backbone that a file's tensors are copied into: a Full-FT file contains every weight."""
    if not isinstance(card.method, FullFinetune):
        return card.backbone
    return dataclasses.replace(card.backbone, base="zero", file=None)


def _trains_norms(method: Method) -> bool:
    return isinstance(method, FullFinetune) or bool(getattr(method, "train_norms", False))


@torch.inference_mode(False)  # whoever loads an adapter while predicting: the probe needs gradients
def _assemble(spec: BackboneSpec, card: Card, header: Header | None = None, verify: bool = True) -> AdaptedModel:
    """The model of a card.

    Args:
        spec: what its backbone is made from.
        card: which model.
        header: of the file that the model is for, which lists the targets by exact name; else the method's patterns
            find them.
        verify: take the fingerprint of the weights, and probe that each target has an effect.
    """
    card = dataclasses.replace(card, method=settle(card.method, card.backbone.base))
    backbone = create_backbone(spec, card.basis_seed)
    if spec.base != "pretrained" and not _trains_norms(card.method):
        open_branches(backbone)
    weights = header.weights if header is not None else None
    if verify and weights is None:
        weights = known_weights.origin(spec)
    if isinstance(card.method, NOLA) and card.method.max_bytes is not None:
        method = _spend_bytes(backbone, card, weights, card.method, card.method.max_bytes)
        card = dataclasses.replace(card, method=method)
    stack = _stack(backbone, card, None if header is None else [name for name, _, _ in header.targets])
    if spec.int8 and isinstance(card.method, FullFinetune | PEFT):
        raise NolaVisionError(f"{type(card.method).__name__} needs float weights: leave int8 out")
    if isinstance(card.method, PEFT):  # what it adds and does not train is guarded too
        backbone = edited_by_peft(backbone, card.method, card.run_seed)
        card = dataclasses.replace(card, method=with_module_names(card.method, backbone))
    fixed = None
    if verify and not isinstance(card.method, FullFinetune):
        fixed = fingerprint(backbone, backbone_tensors(backbone, card.method) if isinstance(card.method, PEFT) else ())
    if spec.int8:
        to_int8(backbone)
    # with all weights zero nothing reaches the features, and norms that train may start at zero
    alive = spec.base == "pretrained" or (spec.base == "random" and not _trains_norms(card.method))
    stack.attach(backbone, probe_batch(backbone) if verify and alive else None)
    if isinstance(card.method, FullFinetune):
        backbone.requires_grad_(True)
    elif isinstance(card.method, Adapter) and card.method.train_norms:
        for norm in batch_norms(backbone).values():
            norm.requires_grad_(True)
    return AdaptedModel(backbone, stack, card, fixed, weights)


def _stack(backbone: nn.Module, card: Card, target_names: list[str] | None = None) -> AdapterStack:
    seeds, base = (card.run_seed, card.basis_seed), card.backbone.base
    return make_stack(backbone, card.method, len(card.class_names), *seeds, base=base, target_names=target_names)


_LONGEST_CALIBRATED = Calibrated(temperature=0.000123456, calibrated_on="validation", images=10**9)


def _spend_bytes(backbone: nn.Module, card: Card, weights: WeightsOrigin | None, method: NOLA, budget: int) -> NOLA:
    """The method with the most coefficients a target whose adapter file, calibrated, is within a budget of bytes."""

    def size(k: int) -> int:
        fixed = dataclasses.replace(method, num_basis=k, max_bytes=None)
        stack = _stack(backbone, dataclasses.replace(card, method=fixed))
        tensors = stack_tensors(stack) | {f"backbone.{n}": t for n, t in backbone_tensors(backbone, method).items()}
        described = file_metadata(
            dataclasses.replace(card, method=fixed), stack, "0" * 64, weights, _LONGEST_CALIBRATED
        )
        return len(adapter_bytes(described, tensors, file_bits(tensors, fixed)))

    if size(1) > budget:
        raise NolaVisionError(
            f"max_bytes is {budget}, but a file with one coefficient a factor and target takes {size(1)}: give more, "
            "fewer bits, or fewer targets"
        )
    return dataclasses.replace(method, num_basis=largest(lambda k: size(k) <= budget, budget), max_bytes=None)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, where 1 does and no number after a misfit does."""
    high = 2
    while high <= limit and fits(high):  # trying a number may cost memory in proportion to it
        high *= 2
    between = range(high // 2 + 1, min(high, limit + 1))
    return high // 2 + bisect.bisect_left(between, True, key=lambda number: not fits(number))


def load_adapter(path: str | Path, weights: str | None = None) -> AdaptedModel:
    """The adapted model of an adapter file, in eval mode.

    The file is data: nothing that it names is run, and it takes no more memory than its tensors and the backbone do.
    `docs/security.md` has the details. Each step below is checked before the next one costs anything.

    Args:
        path: the adapter file.
        weights: a local file with the backbone's weights. Without it the file that the adapter was trained with is
            found by its digest (see `known_weights`); else the weights that timm names are taken.

    Raises:
        NolaVisionError: the file is damaged, states what an adapter cannot have, or was made for other weights, shapes
            or methods than are here.
    """
    file = open_adapter(path)
    header = parse_header(file.metadata, file.path, weights)
    spec, wanted = header.card.backbone, header.weights
    if spec.base != "pretrained" or (isinstance(header.card.method, FullFinetune) and ":" not in spec.tag):
        wanted = None  # there is no such file, or the adapter file contains every weight
    if weights is None and wanted is not None and (found := known_weights.find(wanted, spec)) is not None:
        spec = dataclasses.replace(spec, file=found)
        header = dataclasses.replace(header, card=dataclasses.replace(header.card, backbone=spec))
    missing = wanted if spec.file is None else None
    if ":" in spec.tag and not (spec.file is not None and Path(spec.file).is_dir()):
        raise NolaVisionError(
            f"{path} names the backbone {spec.tag}, and only you may name what is fetched from a hub or read from a "
            "folder: give the folder with its config.json and weights by `weights` (--weights FOLDER)"
            + (f"; {known_weights.how_to_find(missing)}" if missing else "")
        )
    _check_agreement(file, header)
    tensors = file.tensors()
    try:
        model = _assemble(_to_fill(header.card), header.card, header)
    except NolaVisionError as error:
        if missing is None or weights_file(spec) is not None:
            raise
        raise NolaVisionError(f"{path}: {known_weights.how_to_find(missing)} ({error})") from error
    if header.fingerprint != model.fingerprint:
        raise NolaVisionError(
            f"{path} was made for other weights of {spec.tag} than the ones here: "
            + (known_weights.how_to_find(missing) if missing else "give the file it was trained with by `weights` ")
            + ("" if missing else "(--weights FILE)")
        )
    _fill(model, tensors, path)
    if header.calibrated is not None:
        model.temperature, model.calibrated_on = header.calibrated.temperature, header.calibrated.calibrated_on
        model.calibration_images = header.calibrated.images
    known_weights.remember(spec)
    return model.eval()


def set_temperature(path: str | Path, temperature: float, calibrated_on: str | None, images: int | None = None) -> None:
    """Writes a temperature into an adapter file; what was trained stays as it is.

    Args:
        path: the adapter file. It is replaced, whole or not at all, and gets the newest format version.
        temperature: as `calibration.fit_temperature` gives it.
        calibrated_on: the images that it was fitted on, `folds`, `validation` or another short text; None marks the
            file as uncalibrated, and the temperature must be 1.
        images: how many images these were.

    Raises:
        NolaVisionError: the file is damaged, or cannot state these values.
    """
    file = open_adapter(path)
    parse_header(file.metadata, file.path)
    if calibrated_on is None and temperature != 1:
        raise NolaVisionError(f"the temperature is {temperature} and calibrated_on None: state what it was fitted on")
    calibrated = (
        None
        if calibrated_on is None
        else dataclasses.asdict(check_calibrated(Calibrated(temperature, calibrated_on, images)))
    )
    write_file(path, file.rewritten({"calibration": calibrated}))


@torch.no_grad()
def _fill(model: AdaptedModel, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Copies the tensors of an adapter file into a model."""
    own = model.trained_tensors()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise NolaVisionError(f"the tensors of {path} are not those of {type(model.card.method).__name__}: train again")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _check_agreement(file: AdapterFile, header: Header) -> None:
    """Compares the header with the stored tensors and with the backbone's shapes, before anything of that size is made.

    Raises:
        NolaVisionError: a target, a count or a tensor that the backbone, the method or the file does not have.
    """
    card, path = header.card, file.path
    backbone = skeleton(card.backbone)
    targets: list[Target] = []
    if isinstance(card.method, Adapter):
        names = [name for name, _, _ in header.targets]
        targets = method_targets(backbone, card.method, len(card.class_names), names)
        whole = "model" if isinstance(card.method, PRANC) and card.method.scope == "model" else None
        single = isinstance(card.method, PRANC | HashedNet)
        for target, (name, shape, group) in zip(targets, header.targets, strict=True):
            here = whole or (name.replace(".", "/") if single else target.group)
            if target.shape != shape or group != here:
                raise NolaVisionError(
                    f"{path} was made for other weight shapes: {name} is {list(shape)} (group {group}) there and "
                    f"{list(target.shape)} ({here}) in {card.backbone.tag} here"
                )
    shapes = tensor_shapes(card.method, targets, len(card.class_names), feature_width(backbone))
    if isinstance(card.method, PEFT):
        with torch.device("meta"):
            backbone = edited_by_peft(backbone, card.method, card.run_seed)
    own = {f"backbone.{name}": tensor for name, tensor in backbone_tensors(backbone, card.method).items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name in sorted(shapes.keys() | file.shapes.keys()):
        wanted, stored = shapes.get(name), file.shapes.get(name)
        if wanted != stored:
            if wanted is None or stored is None:
                fault = "does not belong there" if wanted is None else "is missing"
            else:
                fault = f"has the shape {list(stored)} and not {list(wanted)}"
            raise NolaVisionError(
                f"{path} does not fit its method and backbone: the tensor {name} {fault}, train again"
            )
    for name, tensor in own.items():
        if tensor.is_floating_point() != file.floats(name):
            raise NolaVisionError(f"the tensor {name} of {path} has another type of numbers than the backbone's")
