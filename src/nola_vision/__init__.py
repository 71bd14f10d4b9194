"""nola-vision: adapt any timm ViT or ResNet to a new task from a few labelled images with NOLA.

Data flows one way:

    config -> backbone -> stack -> k-shot split -> train -> evaluate -> row -> table

`backbones` makes a frozen timm model from a tag; `targets` finds its weights by name; `methods` says what is trained;
`adapters` holds the trained numbers in a stack beside the backbone; `model` joins the two (the Python interface);
`data` draws the k-shot set; `tasks` are the LightningModules; `config_files` finds a config, `config` goes from it to
these objects, `run` from them to a row; `results` turns rows into tables; `sweep` plans and runs many; `cli` is the
command line.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nola_vision.adapters.methods.registry import NOLA as NOLA
    from nola_vision.adapters.methods.registry import PEFT as PEFT
    from nola_vision.adapters.methods.registry import PRANC as PRANC
    from nola_vision.adapters.methods.registry import FullFinetune as FullFinetune
    from nola_vision.adapters.methods.registry import HashedNet as HashedNet
    from nola_vision.adapters.methods.registry import LinearProbe as LinearProbe
    from nola_vision.adapters.methods.registry import LoRA as LoRA
    from nola_vision.models.adapted_model import AdaptedModel as AdaptedModel
    from nola_vision.models.adapted_model import adapt as adapt
    from nola_vision.models.adapted_model import load_adapter as load_adapter
    from nola_vision.models.backbones.spec import BackboneSpec as BackboneSpec

__version__ = version("nola-vision")

# the public names, imported when first used: `nola-vision --help` must not wait for torch
_PUBLIC = {
    "BackboneSpec": "nola_vision.models.backbones.spec",
    "FullFinetune": "nola_vision.adapters.methods.registry",
    "HashedNet": "nola_vision.adapters.methods.registry",
    "LinearProbe": "nola_vision.adapters.methods.registry",
    "LoRA": "nola_vision.adapters.methods.registry",
    "PEFT": "nola_vision.adapters.methods.registry",
    "NOLA": "nola_vision.adapters.methods.registry",
    "PRANC": "nola_vision.adapters.methods.registry",
    "AdaptedModel": "nola_vision.models.adapted_model",
    "adapt": "nola_vision.models.adapted_model",
    "load_adapter": "nola_vision.models.adapted_model",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'nola_vision' has no attribute '{name}'")
