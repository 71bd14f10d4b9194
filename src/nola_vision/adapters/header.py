"""The header of an adapter file as text: strict JSON with sorted keys, which format version 2 compresses."""

from __future__ import annotations

import json
import math
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nola_vision.common.errors import NolaVisionError

FORMAT_VERSION = 2  # of what is written; `random_basis.BASIS_VERSION` is another number
# The metadata of ImageNet-21k's 21,841 classes with their synonyms takes 1 MB, the list of the 2,000 tensors of a fully
# fine-tuned model 0.1 MB. What Python makes of 2 MiB of any JSON fits in 100 MB.
MAX_METADATA = 2 * 2**20  # characters, or bytes of UTF-8 in version 2

# The preset dictionary of the compression: text that headers share, the most frequent last. It makes every setting cost
# a few bytes without leaving any out, so that a file's meaning never depends on a default. Part of format version 2.
DICTIONARY = "".join(
    'true"squash""border""bilinear""per_layer""released""random""streamed""zero""layer""conv""all""head""qv"block'
    "s.0.attn.proj.weightblocks.0.attn.qkv.weight[0:768]blocks.0.mlp.fc1.weightblocks.0.mlp.fc2.weightbackbone.ru"
    "nning_meanrunning_varsketch.768x2304.aadapter.model.thetaadapter.model.coreadapter.model.uadapter.model.vada"
    "pter.model.coefficientsadapter.768x2304.radapter.head.aadapter.head.bresnet50.a1_in1kswin_base_patch4_window"
    "7_224.ms_in22k_ft_in1kconvnext_base.fb_in22k_ft_in1kdeit_base_patch16_224.fb_in1keva02_base_patch14_448.mim_"
    "in22k_ft_in1kvit_base_patch16_siglip_224.weblivit_base_patch16_clip_224.openaivit_large_patch14_dinov2.lvd14"
    "2mvit_base_patch14_reg4_dinov2.lvd142mvit_small_patch14_dinov2.lvd142mvit_large_patch16_224.maevit_base_patc"
    "h16_224.maevit_small_patch16_224.augreg_in21kvit_glyph_patch4_32.glyphsvit_large_patch16_224.augreg_in21k_ft"
    '_in1k{"crop_mode":"center","crop_pct":1.0,"interpolation":"bicubic","mean":[0.48145466,0.4578275,0.40821073]'
    ',"size":224,"std":[0.26862954,0.26130258,0.27577711]}{"crop_mode":"center","crop_pct":0.875,"interpolation":'
    '"bicubic","mean":[0.485,0.456,0.406],"size":224,"std":[0.229,0.224,0.225]}{"class_path":"PEFT","init_args":{'
    '"config":"peft.LoraConfig","head_lr":null,"lr":0.005,"settings":{"r":4,"target_modules":["fc1","fc2","qkv","'
    'proj"]}}}{"class_path":"FullFinetune","init_args":{"head_lr":null,"lr":0.0001}}{"class_path":"NearestMean","'
    'init_args":{"head_bits":32}}{"class_path":"LogisticRegression","init_args":{"head_bits":32}}{"class_path":"H'
    'ashedNet","init_args":{"bits":32,"c":1.0,"head_bits":null,"head_lr":null,"lr":0.005,"max_bytes":null,"max_pa'
    'rameters":10000,"quantise_from":1.0,"targets":["mlp"],"train_norms":false}}{"class_path":"PRANC","init_args"'
    ':{"bits":32,"c":1.0,"head_bits":null,"head_lr":null,"lr":0.005,"max_bytes":null,"memory_mib":16.0,"nested":f'
    'alse,"num_basis":1024,"quantise_from":1.0,"scope":"model","storage":"cached","targets":["mlp"],"train_norms"'
    ':false}}{"class_path":"VeRA","init_args":{"bits":32,"c":1.0,"head_bits":null,"head_lr":null,"lr":0.005,"max_'
    'bytes":null,"quantise_from":1.0,"rank":256,"targets":["qv"],"train_norms":false}}{"class_path":"LoRAXS","ini'
    't_args":{"bits":32,"c":16.0,"head_bits":null,"head_lr":null,"lr":0.005,"max_bytes":null,"quantise_from":1.0,'
    '"rank":16,"targets":["qkv"],"train_norms":false}}{"class_path":"TinyLoRA","init_args":{"bits":32,"c":16.0,"h'
    'ead_bits":null,"head_lr":null,"lr":0.005,"max_bytes":null,"num_basis":64,"quantise_from":1.0,"rank":16,"targ'
    'ets":["qkv"],"train_norms":false}}{"class_path":"UniLoRA","init_args":{"bits":32,"c":4.0,"head_bits":null,"h'
    'ead_lr":null,"lr":0.005,"max_bytes":null,"max_parameters":10000,"quantise_from":1.0,"rank":4,"targets":["qkv'
    '"],"train_norms":false}}{"class_path":"FacT","init_args":{"bits":32,"c":1.0,"head_bits":null,"head_lr":null,'
    '"lr":0.005,"max_bytes":null,"quantise_from":1.0,"rank":8,"targets":["qkv","mlp"],"train_norms":false}}{"clas'
    's_path":"LinearProbe","init_args":{"head_bits":32,"lr":0.005}}{"class_path":"LoRA","init_args":{"bits":32,"c'
    '":8.0,"head_bits":null,"head_lr":null,"lr":0.005,"max_bytes":null,"quantise_from":1.0,"rank":4,"targets":["q'
    'kv"],"train_norms":false}}{"backbone":{"base":"pretrained","img_size":null,"int8":false,"tag":"vit_base_patc'
    'h16_224.augreg_in21k_ft_in1k"},"basis_seed":0,"calibrated_on":"folds","calibrated_on":"validation","class_na'
    'mes":[""],"input":{"crop_mode":"center","crop_pct":0.9,"interpolation":"bicubic","mean":[0.5,0.5,0.5],"size"'
    ':224,"std":[0.5,0.5,0.5]},"method":{"class_path":"NOLA","init_args":{"bits":4,"c":2.0,"head_bits":null,"head'
    '_lr":null,"head_num_basis":null,"head_rank":null,"lr":0.005,"max_bytes":null,"max_parameters":null,"memory_m'
    'ib":16.0,"nested":false,"num_basis":1024,"num_basis_b":null,"quantise_from":1.0,"rank":4,"scope":"shared","s'
    'tart":"a0","storage":"cached","targets":["mlp"],"train_norms":false}},"run_seed":0,"targets":[],"tensors":{"'
    'adapter.3072x768.coefficients_a":[4,12,1024],"adapter.3072x768.coefficients_b":[4,12,1024],"adapter.768x2304'
    '.a":[32,12,768,4],"adapter.768x2304.b":[32,12,4,2304],"adapter.768x2304.coefficients_a":[4,12,1024],"adapter'
    '.768x2304.coefficients_b":[4,12,1024],"adapter.768x3072.coefficients_a":[4,12,1024],"adapter.768x3072.coeffi'
    'cients_b":[4,12,1024],"adapter.head.coefficients_a":[4,1,1024],"adapter.head.coefficients_b":[4,1,1024],"hea'
    'd.bias":[32,100],"head.weight":[4,100,768]},"weights":null}"weights":{"bytes":346284714,"file":"model.safete'
    'nsors","repository":"timm/vit_base_patch16_224.augreg_in21k_ft_in1k"}}'
).encode()


def canonical(metadata: Mapping[str, Any]) -> str:
    """Metadata as JSON with sorted keys and no spaces."""
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def compressed(text: str) -> bytes:
    """A text in UTF-8 as a raw deflate stream (RFC 1951) with the preset dictionary."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return compressor.compress(text.encode()) + compressor.flush()


def decompressed(data: bytes, path: Path) -> str:
    """The text that `compressed` compressed. It stops at `MAX_METADATA` bytes, whatever the stream would give.

    Raises:
        NolaVisionError: it is longer, or not such a stream.
    """
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS, DICTIONARY)
    try:
        text = decompressor.decompress(data, MAX_METADATA + 1)
        if len(text) > MAX_METADATA:
            raise NolaVisionError(
                f"the header of {path} has more than {MAX_METADATA:,} bytes, and an adapter's has fewer: get another "
                "file"
            )
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("the compressed data is incomplete, or something follows it")
        return text.decode()
    except (zlib.error, ValueError) as error:
        raise NolaVisionError(f"the header of {path} is damaged ({reason(error)}): get another file") from error


def parsed(text: str, path: Path) -> dict[str, Any]:
    """Metadata from strict JSON.

    Raises:
        NolaVisionError: it is too long, not JSON or not a mapping, has a key twice, or NaN, an infinity or a lone
            surrogate.
    """
    if len(text) > MAX_METADATA:
        raise NolaVisionError(
            f"the metadata of {path} has {len(text):,} characters, and an adapter's has at most {MAX_METADATA:,}: get "
            "another file"
        )
    try:
        metadata = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
        text.encode(), canonical(metadata).encode()  # a lone surrogate is not text
        if not isinstance(metadata, dict):
            raise ValueError("it is not a mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise NolaVisionError(f"the metadata of {path} is damaged ({reason(error)}): get another file") from error
    return metadata


def reason(error: Exception) -> str:
    """What a library reports, on one line of printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten("".join(c if c.isprintable() else "?" for c in text), 160)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse("a number above 1.8e308")
