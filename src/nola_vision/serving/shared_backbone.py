"""A frozen backbone that computes a batch with a different adapter for every image."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nola_vision.adapters.context import Pass, Settings
from nola_vision.adapters.header import canonical
from nola_vision.adapters.injection import Injection
from nola_vision.adapters.methods import LinearProbe, registry
from nola_vision.adapters.methods.base import Adapter
from nola_vision.adapters.target import HEAD, Target
from nola_vision.common.devices import parse_device
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.tags import split_tag
from nola_vision.common.validation import check_types, quoted
from nola_vision.models.backbones.creation import create_backbone, to_int8
from nola_vision.models.backbones.properties import fingerprint, input_lengths, probe_batch
from nola_vision.models.backbones.sources import input_config, resolve
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.building import feature_width, file_shapes
from nola_vision.models.loading import check_shapes, check_sketch, header_targets
from nola_vision.models.metadata import AdapterMetadata, Header, parse_header
from nola_vision.models.prediction import to_device
from nola_vision.models.targets import find_targets
from nola_vision.serving.adapter import BASE, ServedAdapter, read_packed, transform_for
from nola_vision.serving.cache import ByteCache
from nola_vision.serving.layout import FactorMaker, Factors, Grouping, Layout, mixes, stacked

# settings that every adapter has and that only training and the file read
_OF_TRAINING = frozenset(field.name for field in dataclasses.fields(Adapter)) - {"targets"}


class SharedBackbone:
    """One backbone for the adapters of an `AdapterBank`: it checks their files and computes with them.

    Args:
        backbone, device, cache_mib: as for `AdapterBank`.
    """

    merged = False  # as `injection.Bank` asks

    def __init__(self, backbone: str | BackboneSpec, device: str, cache_mib: float) -> None:
        device = str(device)
        parse_device(device, "device")
        if not (isinstance(cache_mib, int | float) and 0 < cache_mib < 2**40):
            raise NolaVisionError(f"cache_mib is {quoted(cache_mib)}: it must be a number of MiB greater than 0")
        if not isinstance(backbone, str | BackboneSpec):
            raise NolaVisionError(f"backbone is {quoted(backbone)}: give timm's tag or a BackboneSpec")
        spec = check_types(BackboneSpec(backbone) if isinstance(backbone, str) else backbone)
        if spec.base != "pretrained":
            raise NolaVisionError(f"a bank needs pretrained weights, and base is {spec.base}: use load_adapter instead")
        self.spec, self.device = spec, torch.device(device)
        model = create_backbone(spec)
        self.fingerprint = fingerprint(model)
        if spec.int8:
            to_int8(model)
        to_device(model, device)
        self.width = feature_width(model)
        self._input, self._one_size = input_config(spec), bool(resolve(spec).cfg.fixed_input_size)
        self.targets: tuple[Target, ...] = tuple(find_targets(model, "re:.*"))
        self._injection = Injection(self, model)
        probe = probe_batch(model)
        self._idle = frozenset(self._injection.idle(probe))
        odd = odd_layers(model, probe)
        self._odd = frozenset(target.weight for target in self.targets if not odd.isdisjoint(target.modules))
        # adapters that were read, their factors, and what is fixed
        self.cache = ByteCache(int(cache_mib * 2**20))
        self._maker = FactorMaker(model, self.device, self.cache)
        # files decide how many there are: each is kept as long as an adapter has it
        self._groupings: WeakValueDictionary[str, Grouping] = WeakValueDictionary()
        self._layouts: WeakValueDictionary[tuple[Grouping, int], Layout] = WeakValueDictionary()
        # bytes of one adapter's factors, and `mixes`
        self._kinds: WeakKeyDictionary[Layout, tuple[int, bool]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        layout = Layout(Grouping(LinearProbe(), ()), 0)
        self.base = ServedAdapter(BASE, self.fingerprint, 0, "", (), self._input, 1.0, layout, 0, {})

    def make_pass(self, targets: Sequence[Target], settings: Settings | None = None) -> Pass:
        """Of a call of the backbone by itself: no adapter."""
        return Pass({}, None)

    # --- files ---------------------------------------------------------------------------------------------------

    def read(self, path: Path, name: str, shown: Path | None = None) -> ServedAdapter:
        """An adapter from its file, checked against this backbone. One tensor at a time is decoded, the last check.

        Args:
            path: of the file.
            name: of the adapter.
            shown: what messages call the file.

        Raises:
            UnreadableAdapter: the file could not be read.
            NolaVisionError: its content cannot be used, as for `AdapterBank.load_adapter`.
        """
        shown = shown or path
        file, digest, size = read_packed(path, shown)
        path = shown  # below, only messages name it
        header = parse_header(file.metadata, path)
        self._check_backbone(header, path)
        metadata = header.metadata
        key = self._grouping_key(header)
        with self._lock:
            grouping = self._groupings.get(key)
        if grouping is None:
            grouping = self._grouping(header, path)
        check_shapes(file, file_shapes(grouping.groups, len(metadata.class_names), self.width))
        for stored in file.stored:
            file.tensor(stored)  # levels that do not exist, and numbers that are not finite, are refused here
        # not inherited: `fixed` of a subclass may draw what that of its base does not
        seeded = vars(type(metadata.method)).get("uses_basis_seed", True)
        seed = metadata.basis_seed if seeded else 0
        with self._lock:
            grouping = self._groupings.setdefault(key, grouping)
            layout = self._layouts.setdefault((grouping, seed), Layout(grouping, seed))
        for group in layout.groups if any(one.sketch for one in layout.groups) else ():
            for own, tensor in layout.method.sketch(group, self._maker.fixed(layout, group)).items():
                stated = f"sketch.{group.name}.{own}"
                check_sketch(stated, tensor.cpu(), file.tensor(stated), path)
        temperature = 1.0 if header.calibrated is None else header.calibrated.temperature
        return ServedAdapter(
            name,
            digest,
            size,
            type(metadata.method).__name__,
            metadata.class_names,
            metadata.input,
            temperature,
            layout,
            metadata.run_seed,
            file.stored,
        )

    def _check_backbone(self, header: Header, path: Path) -> None:
        """Refuses a file that was not made for this backbone, or that needs other images than any backbone takes."""
        check_shareable(header.metadata, path)
        spec = header.metadata.backbone
        sources = [split_tag(one.tag) for one in (spec, self.spec)]
        named = [tag.partition(".")[0] for source, tag in sources if not source]
        if header.fingerprint != self.fingerprint or len({*named}) > 1:
            raise NolaVisionError(
                f"{path} was made for other weights ({spec.tag}) than the bank's ({self.spec.tag}): start a bank with "
                "its backbone"
            )
        if spec.int8 != self.spec.int8:
            own, bank = ("8 bits" if one.int8 else "floats" for one in (spec, self.spec))
            raise NolaVisionError(
                f"{path} was trained on a backbone in {own}, and the bank's is in {bank}: start a bank with "
                f"BackboneSpec({spec.tag!r}, int8={spec.int8})"
            )
        if self._one_size and header.metadata.input.size != self._input.size:
            raise NolaVisionError(
                f"{path} was trained with images of {header.metadata.input.size} pixels, and the bank's backbone takes "
                f"{self._input.size}: start a bank with that img_size"
            )
        try:
            transform_for(header.metadata.input)
        except NolaVisionError as error:
            raise NolaVisionError(f"{path} cannot be used: {error}") from error

    def _grouping_key(self, header: Header) -> str:
        """What decides on an adapter's `Grouping`."""
        metadata = header.metadata
        described = registry.to_dict(metadata.method)
        stated = header.targets if isinstance(header.targets, list) else metadata.method.target_names or ()
        return canonical(
            {
                "class_path": described["class_path"],
                "settings": {name: one for name, one in described["init_args"].items() if name not in _OF_TRAINING},
                "targets": header.targets,
                "classes": len(metadata.class_names) if HEAD in stated else None,
            }
        )

    def _grouping(self, header: Header, path: Path) -> Grouping:
        """An adapter's method and groups. Its file may still have other tensors."""
        targets = header_targets(header, self._injection.backbone, path)
        if idle := [target.name for target in targets if target.weight in self._idle]:
            raise NolaVisionError(
                f"{path} changes {idle[0]}, which does not reach the features of {self.spec.tag}: get another file"
            )
        method = header.metadata.method.for_base("pretrained").for_loading(targets)
        groups = tuple(method.groups(targets))
        if self.spec.int8 and any(group.sketch for group in groups):
            raise NolaVisionError(
                f"{path} cannot be in a bank whose backbone is in 8 bits ({type(method).__name__} computes with the "
                "float weights, which are not kept): use `predict` with it"
            )
        return Grouping(method, groups)

    # --- passes --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, images: Tensor, adapters: Sequence[ServedAdapter]) -> list[Tensor]:
        """As `AdapterBank.logits`."""
        if len(images) != len(adapters):
            raise NolaVisionError(f"{len(adapters)} adapters for {len(images)} images: give one for each image")
        places: dict[ServedAdapter, list[int]] = {}
        for place, adapter in enumerate(adapters):
            places.setdefault(adapter, []).append(place)
        misses = sum(self.cache.peek(adapter.digest) is None for adapter in places)
        with self._lock:
            self._hits, self._misses = self._hits + len(places) - misses, self._misses + misses
        images = images.to(self.device)
        found: list[Tensor] = [images.new_empty(0)] * len(images)
        for together in self._passes(list(places)):
            members = [places[adapter] for adapter in together]
            counts = [len(own) for own in members]
            features = self._injection.run(images[[*chain(*members)]], self._pass([*together.values()], counts))
            for factors, own, some in zip(together.values(), members, features.split(counts), strict=True):
                if factors.head is not None:
                    some = F.linear(some.to(factors.head[0].dtype), *factors.head)
                for place, row in zip(own, some.float().cpu(), strict=True):
                    found[place] = row
        return found

    def _pass(self, factors: Sequence[Factors], counts: Sequence[int]) -> Pass:
        """A pass over as many samples of each adapter, one adapter after the other."""
        if len(factors) == 1:
            return Pass(factors[0].changes, None)
        place = torch.arange(len(factors)).repeat_interleave(torch.tensor(counts))
        return Pass(stacked(factors), place.to(self.device))

    def _passes(self, adapters: Sequence[ServedAdapter]) -> Iterator[dict[ServedAdapter, Factors]]:
        """Divides distinct adapters into passes, with their factors: as few as their kinds and the memory allow.

        The stacked factors of a pass take at most the budget of the cache: ranks are padded to the largest, so the
        adapters come in the order of their size.
        """
        kinds = {adapter: self._kind(adapter) for adapter in adapters}
        waiting: list[ServedAdapter] = []
        for adapter in sorted(adapters, key=lambda one: kinds[one][0]):
            size, mixed = kinds[adapter]
            if not mixed:
                yield self._factors([adapter])
                continue
            if waiting and (len(waiting) + 1) * size > self.cache.budget:
                yield self._factors(waiting)
                waiting = []
            waiting.append(adapter)
        if waiting:
            yield self._factors(waiting)

    def _kind(self, adapter: ServedAdapter) -> tuple[int, bool]:
        """The bytes of an adapter's factors and whether they mix with others, as the first of its layout shows."""
        if (known := self._kinds.get(adapter.layout)) is None:
            factors = self._make(adapter.layout, [adapter])[0]
            known = factors.size, mixes(self._injection.backbone, factors.changes, self._odd)
            self._kinds[adapter.layout] = known
        return known

    def _factors(self, adapters: Sequence[ServedAdapter]) -> dict[ServedAdapter, Factors]:
        """The factors of some adapters in their order, made by layout where they are not in the cache."""
        found: dict[ServedAdapter, Factors] = {}
        missing: dict[Layout, list[ServedAdapter]] = {}
        for adapter in adapters:
            if (factors := self.cache.get(adapter.digest)) is not None:
                found[adapter] = factors
            else:
                missing.setdefault(adapter.layout, []).append(adapter)
        made = {
            adapter: factors
            for layout, some in missing.items()
            for adapter, factors in zip(some, self._make(layout, some), strict=True)
        }
        return {adapter: found.get(adapter) or made[adapter] for adapter in adapters}

    def _make(self, layout: Layout, adapters: Sequence[ServedAdapter]) -> list[Factors]:
        made = self._maker.make(layout, [one.stored for one in adapters], [one.run_seed for one in adapters])
        for adapter, factors in zip(adapters, made, strict=True):
            self.cache.put(adapter.digest, factors, factors.size)  # a file's content decides on them
        return made

    def cache_counts(self) -> tuple[int, int]:
        """As `AdapterBank.cache_counts`."""
        with self._lock:
            return self._hits, self._misses


def check_shareable(metadata: AdapterMetadata, path: Path) -> None:
    """Refuses an adapter that changes more of a backbone than chosen weights, or a backbone that a bank cannot have.

    Raises:
        NolaVisionError: as above; `path` is that of the file.
    """
    method = metadata.method
    if method.trains_backbone or method.edits_backbone or method.train_norms:
        what = "its batch norms" if method.train_norms else f"{type(method).__name__} changes the whole backbone"
        raise NolaVisionError(f"{path} cannot share a backbone with others ({what}): use `predict` with it")
    if metadata.backbone.base != "pretrained":
        raise NolaVisionError(f"{path} belongs to a backbone that is not pretrained: use `predict` with it")


def odd_layers(backbone: nn.Module, images: Tensor) -> set[str]:
    """The layers whose input does not have the batch as its first dimension: it does not grow with the batch.

    Args:
        backbone: the model.
        images: a batch of two or more.
    """
    more = torch.cat([images, images[:1]])
    lengths, longer = input_lengths(backbone, images), input_lengths(backbone, more)
    return {name for name in lengths if lengths[name] * len(more) != longer.get(name, 0) * len(images)}
