"""The methods, one file each: settings, equation, initial values, changes. Importing them loads no torch."""

from nola_vision.adapters.methods.base import Adapter, FrozenMethod, Method
from nola_vision.adapters.methods.fact_tt import FacT
from nola_vision.adapters.methods.frozen import LogisticRegression, NearestMean, NearestNeighbor
from nola_vision.adapters.methods.full import FullFinetune
from nola_vision.adapters.methods.hashednet import HashedNet
from nola_vision.adapters.methods.linear import LinearProbe
from nola_vision.adapters.methods.lora import LoRA
from nola_vision.adapters.methods.lora_xs import LoRAXS
from nola_vision.adapters.methods.nola import NOLA
from nola_vision.adapters.methods.peft import PEFT
from nola_vision.adapters.methods.pranc import PRANC
from nola_vision.adapters.methods.tiny_lora import TinyLoRA
from nola_vision.adapters.methods.uni_lora import UniLoRA
from nola_vision.adapters.methods.vera import VeRA

__all__ = [
    "NOLA",
    "PEFT",
    "PRANC",
    "Adapter",
    "FacT",
    "FrozenMethod",
    "FullFinetune",
    "HashedNet",
    "LinearProbe",
    "LoRA",
    "LoRAXS",
    "LogisticRegression",
    "Method",
    "NearestMean",
    "NearestNeighbor",
    "TinyLoRA",
    "UniLoRA",
    "VeRA",
]
