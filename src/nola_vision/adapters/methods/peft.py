"""The methods of Hugging Face's PEFT that an adapter file can restore: configs that consist of numbers and names.

Adapter files are untrusted, so only listed configs and settings are allowed. Training accepts the same list, so that
every trained adapter can be loaded.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from nola_vision.adapters.methods.base import Method, check_positive
from nola_vision.adapters.methods.registry import register
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.validation import quoted

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

# Not included: prompts, which a vision backbone cannot use; configs that read other models, data or files (XLora,
# Arrow), compile CUDA (BOFT), need a call in each training step (AdaLora), or cannot be built without the weights
# (Shira, PSOFT, OSF, TinyLora).
CONFIGS = (
    "C3AConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "OFTConfig",
    "PveraConfig",
    "RandLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
)
# fields of every config, which name a task, a repository on a hub or code, or switch the training off
_NOT_SETTINGS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
_TEXTS = ("none", "all", "gaussian", "orthogonal")  # of `bias` and `init_weights`; `bias` has `lora_only` too
_ALL_LINEAR = "all-linear"
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)  # PEFT reads some names as patterns: these contain no quantifiers
_MOST = 2**16  # a rank, a number of vectors, a block's side, the terms of a series
_MOST_SEED = 2**63 - 1


@register
@dataclass(frozen=True, kw_only=True)
class PEFT(Method):
    """A method of Hugging Face's PEFT (`pip install 'nola-vision[peft]'`), which edits the backbone in its own way.

    Args:
        config: the class of its config, such as `peft.VeraConfig`: one of `CONFIGS`, with or without `peft.` in front.
        settings: that config's fields, such as `{r: 256, target_modules: [qkv]}`; module names are timm's. Numbers,
            true, false and null are plain; so are lists of module names or numbers, and mappings of module names to
            numbers in the fields that end in `_pattern`. Only a few strings are allowed, and a pattern in
            `target_modules`, which the file stores as the list of modules that it matches.
        lr: learning rate of what PEFT trains.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 5e-3
    head_lr: float | None = None

    edits_backbone = True

    def check(self) -> None:
        """Refuses what an adapter file could not restore, and what could make PEFT fetch, import or compile anything.

        Raises:
            NolaVisionError: a config that is not in `CONFIGS`, or a setting that is not plain.
        """
        check_positive(self, "lr", "head_lr")
        name = self._name
        if name not in CONFIGS:
            hint = did_you_mean(f"peft.{name}", [f"peft.{known}" for known in CONFIGS])
            raise NolaVisionError(f"'{self.config}' is not a PEFT config that an adapter file can restore: {hint}")
        for setting, value in self.settings.items():
            if fix := _fix(setting, value):
                raise NolaVisionError(f"the setting {setting} of peft.{name} is {quoted(value)}: {fix}")

    @property
    def _name(self) -> str:
        return self.config.removeprefix("peft.")

    @property
    def _has_pattern(self) -> bool:
        """Whether `target_modules` is a regular expression, which is for a config only, not for a file."""
        modules = self.settings.get("target_modules")
        return isinstance(modules, str) and modules != _ALL_LINEAR

    @property
    def learning_rates(self) -> tuple[float, float]:
        return self.lr, self.lr if self.head_lr is None else self.head_lr

    def from_file(self, path: Path) -> Self:
        if self._has_pattern:
            raise NolaVisionError(
                f"{path} gives PEFT's target_modules as a pattern, and a file's patterns are not run: train again with "
                "this release, which stores a list of module names"
            )
        return self

    def edit(self, backbone: nn.Module, seed: int) -> tuple[Self, nn.Module]:
        """PEFT's model around the backbone: what it adds and trains has `requires_grad`.

        Args:
            backbone: a timm model, possibly on the meta device.
            seed: of everything that PEFT draws.

        Raises:
            NolaVisionError: PEFT is not installed, lacks this config, or refuses its settings for this backbone.
        """
        import torch

        try:
            import peft
        except ImportError as error:
            raise NolaVisionError("the method PEFT needs the package peft: pip install 'nola-vision[peft]'") from error
        name = self._name
        if not hasattr(peft, name):
            raise NolaVisionError(f"PEFT {peft.__version__} does not provide {name}: pip install -U peft")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                edited: nn.Module = peft.get_peft_model(backbone, getattr(peft, name)(**self.settings))
        except Exception as error:  # each of its methods refuses in its own way
            reason = textwrap.shorten(str(error), 300) or type(error).__name__
            raise NolaVisionError(
                f"peft.{name} cannot be used on this backbone with these settings: {reason}"
            ) from error
        if not self._has_pattern:
            return self, edited
        modules = sorted(edited.base_model.targeted_module_names)  # type: ignore[union-attr, arg-type]
        return replace(self, settings={**self.settings, "target_modules": modules}), edited

    def trained_in_backbone(self, backbone: nn.Module) -> dict[str, Tensor]:
        """What PEFT trains, with the statistics of the batch norms that it trains."""
        from nola_vision.adapters.layers import batch_norms, is_trained

        trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        norms = {name: norm for name, norm in batch_norms(backbone).items() if is_trained(norm)}
        moving = {f"{name}.{key}": tensor for name, norm in norms.items() for key, tensor in norm.named_buffers()}
        return trained | {name: tensor for name, tensor in moving.items() if not name.endswith("num_batches_tracked")}


def _fix(setting: str, value: Any) -> str | None:
    """How to make a setting plain, or None if it is."""
    most = _MOST_SEED if setting.endswith(("_seed", "_key")) else _MOST
    if setting in _NOT_SETTINGS:
        return "leave it out"
    if setting == "target_modules" and isinstance(value, str):
        return None if len(value) <= 1000 else "use a list of module names"
    if setting == "layers_pattern" and isinstance(value, str):
        return None if _is_name(value) else "use a module's name"
    match value:
        case bool() | None:
            return None
        case int() | float():
            return None if abs(value) <= most else f"use a number from -{most:,} to {most:,}"
        case str():
            plain = value in _TEXTS or re.fullmatch(r"[a-z0-9]{1,20}_only", value) is not None
            return None if plain else f"use one of {', '.join(_TEXTS)}, or a list of module names"
        case list() | tuple():
            plain = all(_is_name(one) or _is_number(one) for one in value)
            return None if plain else "use a list of module names, without pattern signs, or of numbers"
        case dict() if setting.endswith("_pattern"):
            plain = all(_is_name(key) and _is_number(one) for key, one in value.items())
            return None if plain else "use module names, without pattern signs, and numbers"
    return "leave it out"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and _NAME.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MOST
