"""nola-vision: adapt any timm ViT or ResNet to a new task from a few labelled images with NOLA.

Data flows one way:

    config -> backbone -> adapters -> k-shot split -> train -> evaluate -> row -> table

`adapters` is the engine: the methods, and the bank of trained parameters next to an untouched backbone; `models` makes
backbones and adapted models (the Python interface); `data` draws the k-shot set; `training` has the LightningModules;
`runs` goes from a config to a row; `sweep` plans and runs many; `reports` turns rows into tables; `serving` answers
with many adapters; `cli` is the command line. `common`, `images` and `evaluation` are what they share.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nola_vision.adapters.methods import NOLA as NOLA
    from nola_vision.adapters.methods import PEFT as PEFT
    from nola_vision.adapters.methods import PRANC as PRANC
    from nola_vision.adapters.methods import FacT as FacT
    from nola_vision.adapters.methods import FullFinetune as FullFinetune
    from nola_vision.adapters.methods import HashedNet as HashedNet
    from nola_vision.adapters.methods import LinearProbe as LinearProbe
    from nola_vision.adapters.methods import LoRA as LoRA
    from nola_vision.adapters.methods import LoRAXS as LoRAXS
    from nola_vision.adapters.methods import TinyLoRA as TinyLoRA
    from nola_vision.adapters.methods import UniLoRA as UniLoRA
    from nola_vision.adapters.methods import VeRA as VeRA
    from nola_vision.models.adapted_model import AdaptedModel as AdaptedModel
    from nola_vision.models.assembly import adapt as adapt
    from nola_vision.models.backbones.spec import BackboneSpec as BackboneSpec
    from nola_vision.models.loading import load_adapter as load_adapter
    from nola_vision.serving.bank import AdapterBank as AdapterBank

__version__ = version("nola-vision")

# the public names, imported when first used: `nola-vision --help` must not wait for torch
_PUBLIC = {
    "BackboneSpec": "nola_vision.models.backbones.spec",
    "FacT": "nola_vision.adapters.methods",
    "FullFinetune": "nola_vision.adapters.methods",
    "HashedNet": "nola_vision.adapters.methods",
    "LinearProbe": "nola_vision.adapters.methods",
    "LoRA": "nola_vision.adapters.methods",
    "LoRAXS": "nola_vision.adapters.methods",
    "PEFT": "nola_vision.adapters.methods",
    "NOLA": "nola_vision.adapters.methods",
    "PRANC": "nola_vision.adapters.methods",
    "TinyLoRA": "nola_vision.adapters.methods",
    "UniLoRA": "nola_vision.adapters.methods",
    "VeRA": "nola_vision.adapters.methods",
    "AdapterBank": "nola_vision.serving.bank",
    "AdaptedModel": "nola_vision.models.adapted_model",
    "adapt": "nola_vision.models.assembly",
    "load_adapter": "nola_vision.models.loading",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'nola_vision' has no attribute '{name}'")
