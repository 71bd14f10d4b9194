"""An adapted model: a backbone with a parameter bank attached to it. `assembly.adapt` and `loading` make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, overload

import torch
from PIL import Image
from torch import Tensor, nn

from nola_vision.adapters.bank import ParameterBank
from nola_vision.adapters.functional import is_quantised
from nola_vision.adapters.layers import batch_norms, is_trained
from nola_vision.adapters.methods import registry
from nola_vision.adapters.methods.base import Method
from nola_vision.adapters.quantization import bias_correction, rounded
from nola_vision.adapters.serialization import write_adapter
from nola_vision.adapters.target import HEAD
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.tags import short_tag
from nola_vision.common.validation import check_counts
from nola_vision.images.transforms import eval_transform
from nola_vision.models.backbones.properties import weights_digest
from nola_vision.models.building import feature_width, stated_targets
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata, Calibrated, check_calibrated
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
    """A backbone with a parameter bank attached: images `[batch, 3, size, size]` to logits `[batch, classes]`.

    Made by `adapt` or `load_adapter`. `bank.parameters()` are the adapter's and the head's; the backbone's own are
    frozen, except all of `FullFinetune`, the batch norms of `train_norms` and what PEFT adds.

    Attributes:
        temperature: divides the logits for the probabilities of `predict`; `forward` does not use it. 1 if it was not
            fitted.
        calibrated_on: the images that the temperature was fitted on, `folds` or `validation`; None: not calibrated.
        calibration_images: how many images these were.
    """

    def __init__(
        self,
        backbone: nn.Module,
        bank: ParameterBank,
        metadata: AdapterMetadata,
        fingerprint: str | None,
        weights: WeightsOrigin | None = None,
    ) -> None:
        super().__init__()
        self.temperature = 1.0
        self.calibrated_on: str | None = None
        self.calibration_images: int | None = None
        self.weights = weights
        self.backbone, self.bank, self.metadata = backbone, bank, metadata
        # of the weights as they were loaded: a run may cast them, round them to int8, or train them. None for a fully
        # fine-tuned model, whose file contains every weight
        self.fingerprint = fingerprint
        self._versions = _versions(backbone)  # of the weights that have this fingerprint
        # see `compute_with_stored_bits`
        self._stored_bits: dict[str, int] = {}  # by parameter name
        self._bias_change: Tensor | None = None  # of the head

    def forward(self, images: Tensor) -> Tensor:
        return self.classified(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The adapted backbone's features `[batch, features]`, which the head takes, of `[batch, 3, size, size]`."""
        with self._computing_with_bits():
            features: Tensor = self.backbone(images.to(self.dtype(images.dtype)))
        return features

    def classified(self, features: Tensor) -> Tensor:
        """Features to logits `[batch, classes]`: the second half of a forward pass."""
        with self._computing_with_bits():
            return self.bank.logits(features)

    def _computing_with_bits(self) -> AbstractContextManager[None]:
        if not self._stored_bits:
            return nullcontext()
        return self.bank.using(bits=self._stored_bits, bias_change=self._bias_change)

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
            NolaVisionError: an image cannot be read or has another form, or a logit is not finite.
        """
        one, several = one_or_several(images)
        check_counts(top_k=top_k, batch_size=batch_size)
        found = [
            top_classes(row, self.metadata.class_names, top_k)
            for _, batch in batches(several, eval_transform(self.metadata.input), batch_size)
            for row in probabilities(self, batch, self.temperature)
        ]
        return found[0] if one else found

    def embed(self, images: Any, batch_size: int = 64) -> Tensor:
        """The adapted backbone's features of images as `predict` takes them: float32 `[n, features]` on the CPU."""
        _, several = one_or_several(images)
        check_counts(batch_size=batch_size)
        found = [
            run_in_eval_mode(self, self.features, batch).float().cpu()
            for _, batch in batches(several, eval_transform(self.metadata.input), batch_size)
        ]
        return torch.cat(found) if found else torch.empty(0, feature_width(self.backbone))

    def transform(self, image: Any) -> Tensor:
        """One image, as `predict` takes it, as the float32 tensor `[3, size, size]` that the model takes a batch of."""
        return eval_transform(self.metadata.input)(load_image(image, 0))

    def current_fingerprint(self) -> str | None:
        """`fingerprint`, or if the backbone's weights were written to since they were loaded, a digest of them.

        PyTorch counts writes to a tensor; those through `tensor.data` are not counted.
        """
        changed = self.fingerprint is not None and _versions(self.backbone) != self._versions
        return weights_digest(self.backbone) if changed else self.fingerprint

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As usual. The weights that a move or a cast has made count as loaded."""
        unchanged = _versions(self.backbone) == self._versions
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if unchanged:
            self._versions = _versions(self.backbone)
        return self

    def dtype(self, otherwise: torch.dtype) -> torch.dtype:
        """The dtype that the backbone computes in: that of its first parameter."""
        return next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), otherwise)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a batch norm whose weights are frozen keeps its running statistics."""
        super().train(mode)
        for norm in batch_norms(self.backbone).values():
            norm.training = norm.training and is_trained(norm)
        return self

    def trained_tensors(self, adapter: int = 0) -> dict[str, Tensor]:
        """What training changed, by its name in the adapter file, of one adapter."""
        return bank_tensors(self.bank, adapter) | backbone_tensors(self.backbone, self.metadata.method)

    def file_tensors(self, adapter: int = 0) -> dict[str, Tensor]:
        """The tensors of the adapter file: what training changed, and sketches of what the weights determine."""
        return self.trained_tensors(adapter) | {f"sketch.{name}": t for name, t in self.bank.sketches().items()}

    @property
    def bits(self) -> dict[str, int]:
        """Bits per stored value, by the tensor's name in the file."""
        return file_bits(bank_tensors(self.bank), self.metadata.method)

    @torch.no_grad()
    def compute_with_stored_bits(self, most: int = 16, mean_features: Tensor | None = None) -> None:
        """Makes forward passes compute with the values as a file would contain them; gradients go straight through.

        Does not affect `bank.merge` and `bank.changes`: call `round_to_stored_bits` before them.

        Args:
            most: only values of at most this many bits are rounded; 0 ends it.
            mean_features: as for `round_to_stored_bits`, with the same effect on the logits.
        """
        named = {"head.weight": "head_weight"}
        bits = {named.get(name, name.replace("adapter.", "groups.", 1)): width for name, width in self.bits.items()}
        self._stored_bits = {name: width for name, width in bits.items() if width <= most}
        self._bias_change = self._bias_correction(mean_features) if self.computes_with_rounded_head else None

    @property
    def computes_with_rounded_head(self) -> bool:
        """Whether passes compute with the head's matrix as a file would contain it."""
        return "head_weight" in self._stored_bits

    @property
    def head_bits(self) -> int:
        """Bits per stored value of the head's matrix; 32 for a head that is one of the method's targets."""
        return self.bits.get("head.weight", 32)

    @torch.no_grad()
    def round_to_stored_bits(self, mean_features: Tensor | None = None) -> None:
        """Replaces the trained values by what the adapter file contains.

        Args:
            mean_features: mean `[features]` of what the head takes. If given, the bias, which is not rounded, is
                corrected so that the logits of the mean features do not change (`quantization.bias_correction`). The
                mean of a pretrained backbone's features may be several times as large as their deviation from it, and
                so is its part of the error. A head that is one of the method's targets has no separate bias, and is not
                corrected.
        """
        if (correction := self._bias_correction(mean_features)) is not None:
            self.bank.head_bias.add_(correction)
        for name, tensor in bank_tensors(self.bank).items():
            tensor.copy_(rounded(tensor.unsqueeze(0), self.bits.get(name, 32))[0])

    def _bias_correction(self, mean_features: Tensor | None) -> Tensor | None:
        if mean_features is None or self.head_bits == 32:
            return None
        return bias_correction(self.bank.head_weight, self.head_bits, mean_features)

    def not_finite(self, adapter: int = 0) -> str | None:
        """The first trained tensor of an adapter (and its first layer) with a value that is not finite, or None."""
        floats = self.trained_tensors(adapter)
        if (name := first_not_finite(floats)) is None:
            return None
        group = name.removeprefix("adapter.").rpartition(".")[0]
        if group not in self.bank.groups or floats[name].dim() < 2:
            return name
        layer = int((~floats[name].isfinite()).flatten(1).any(1).nonzero()[0])
        return f"{name} of {self.bank.members(group)[layer].name}"

    def file_metadata(self) -> dict[str, Any]:
        """What the adapter file states in addition to its tensors, as plain values."""
        if self.calibrated_on is None and self.temperature != 1:
            raise NolaVisionError(
                f"the model's temperature is {self.temperature} and its calibrated_on is None: state which images it "
                "was fitted on, such as 'validation'"
            )
        calibrated = None
        if self.calibrated_on is not None:
            calibrated = check_calibrated(Calibrated(self.temperature, self.calibrated_on, self.calibration_images))
        names = [target.name for target in self.bank.every_target]
        classes = len(self.metadata.class_names)
        targets = stated_targets(self.backbone, self.metadata.method, classes, names)
        return file_metadata(self.metadata, targets, self.fingerprint, self.weights, calibrated)

    def save(self, path: str | Path, adapter: int | None = None) -> int:
        """Writes the adapter file and returns its size in bytes.

        Args:
            path: the file.
            adapter: which adapter, if the bank has several.

        Raises:
            NolaVisionError: the path cannot be written, the adapter is merged into the backbone, not named or has
                another number of classes than the model has names, or a value is not finite.
        """
        count = self.bank.num_adapters
        if count > 1 and adapter is None:
            raise NolaVisionError(f"the model has {count} adapters and a file contains one: choose it by `adapter=`")
        if not 0 <= (adapter := adapter or 0) < count:
            raise NolaVisionError(f"adapter {adapter} does not exist: the model has {count}, counted from 0")
        if not self.metadata.method.savable:
            raise NolaVisionError(
                f"{type(self.metadata.method).__name__} compares with every training image, which an adapter file does "
                "not contain: save NearestMean or LogisticRegression instead"
            )
        if self.bank.merged:
            raise NolaVisionError("a merged adapter cannot be saved: unmerge() it first")
        if (classes := self.bank.class_counts[adapter]) != len(self.metadata.class_names):
            raise NolaVisionError(
                f"adapter {adapter} has {classes} classes and the model {len(self.metadata.class_names)} class names: "
                "give the model the names of this adapter's classes (model.metadata) to save it"
            )
        if broken := self.not_finite(adapter):
            raise NolaVisionError(f"{broken} is not finite: try a smaller learning rate or scale")
        return write_adapter(path, self.file_metadata(), self.file_tensors(adapter), self.bits)


def _versions(backbone: nn.Module) -> list[int]:
    """How often each tensor of a backbone was written to; those made in inference mode do not count it."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None. Integer tensors pass."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and not is_quantised(t)}
    # a sum is five times as fast as a test of each value, and is only finite if all values are
    if not floats or bool(torch.stack([tensor.sum().float() for tensor in floats.values()]).isfinite().all()):
        return None
    return next((name for name, tensor in floats.items() if not tensor.isfinite().all()), None)


def bank_tensors(bank: ParameterBank, adapter: int = 0) -> dict[str, Tensor]:
    """The trained tensors of one adapter of a bank by their names in the adapter file."""
    tensors = {f"adapter.{name}": parameter[adapter] for name, parameter in bank.groups.named_parameters()}
    if bank.head_target is None:
        classes = bank.class_counts[adapter]
        tensors |= {
            "head.weight": bank.head_weight[adapter, :classes],
            "head.bias": bank.head_bias[adapter, :classes],
        }
    return tensors


def backbone_tensors(backbone: nn.Module, method: Method) -> dict[str, Tensor]:
    """The tensors of the backbone itself that a method changes, by their names in the adapter file."""
    return {f"backbone.{name}": tensor for name, tensor in method.trained_in_backbone(backbone).items()}


def file_bits(names: Collection[str], method: Method) -> dict[str, int]:
    """Bits per stored value, by the tensor's name in the file; biases and norms keep 32."""
    bits, head_bits = method.stored_bits
    widths = {name: bits for name in names if name.startswith("adapter.")}
    return widths | {name: head_bits for name in names if name.startswith((f"adapter.{HEAD}.", "head.weight"))}


def file_metadata(
    metadata: AdapterMetadata,
    targets: Sequence[str] | str,
    fingerprint: str | None,
    weights: WeightsOrigin | None = None,
    calibrated: Calibrated | None = None,
) -> dict[str, Any]:
    """What an adapter file states in addition to its tensors, as plain values; `metadata.Header` is its counterpart.

    Args:
        metadata: the model's.
        targets: what `stated_targets` gives.
        fingerprint: of the backbone's weights.
        weights: the file that the backbone's weights were read from.
        calibrated: of the logits.
    """
    return {
        "backbone": {
            "tag": short_tag(metadata.backbone.tag),
            **{name: getattr(metadata.backbone, name) for name in ("img_size", "base", "int8")},
        },
        "backbone_fingerprint": fingerprint,
        "weights": None if weights is None else dataclasses.asdict(weights),
        "calibration": None if calibrated is None else dataclasses.asdict(calibrated),
        "method": registry.to_dict(metadata.method),
        "run_seed": metadata.run_seed,
        "basis_seed": metadata.basis_seed,
        "targets": targets,
        "class_names": list(metadata.class_names),
        "input": dataclasses.asdict(metadata.input),
    }
