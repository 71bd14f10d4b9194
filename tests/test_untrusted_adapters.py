"""Adapter files from strangers are data: what one asks for is refused in one line, in under a second and 100 MB."""

import functools
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, seed, settings

import fuzz_adapters
from fuzz_adapters import MLP, contained, originals, outcome, prefix, written
from fuzzing import cheap
from nola_vision import NOLA, PEFT, BackboneSpec, LoRA, adapt, load_adapter
from nola_vision.adapters.header import compressed
from nola_vision.adapters.methods.peft import CONFIGS
from nola_vision.adapters.serialization import METADATA_KEY, _container
from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.export import shorten

GLYPHS, TINY = "v1-nola.safetensors", "nola"


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a process pays once is paid, and backbones are kept, as in a process that does many runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_cache, "_kept", {})
        fuzz_adapters.warm_up(tmp_path_factory.mktemp("warm"))
        yield


def ending(name: str, folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> str | None:
    """How a file ends, cheaply, that has other fields in its header (`method__rank=3` for nested ones) or tensors."""
    metadata, stored = fuzz_adapters.copy.deepcopy(originals()[name])
    for place, value in changes.items():
        *above, last = (int(key) if key.isdecimal() else key for key in place.split("__"))
        if above[:1] == ["settings"]:
            above = ["method", "init_args", *above[1:]]
        inside = functools.reduce(lambda one, key: one[key], above, metadata)
        inside[last] = value
    ended = outcome(written(metadata, {**stored, **(tensors or {})}), folder)
    cheap(ended)
    return ended.refusal


def test_a_header_that_asks_for_too_much_is_refused_at_once(tmp_path: Path) -> None:
    asks = functools.partial(ending, GLYPHS, tmp_path)
    assert "num_basis of NOLA is 1000000000: it must be above zero and at most 1,048,576" in asks(
        settings__num_basis=10**9
    )
    assert "has the shape [12, 6] and not [12, 1000000]" in asks(settings__num_basis=10**6)
    assert "coefficients_a has the shape" in asks(settings__num_basis_b=None, settings__max_parameters=10**9)
    assert ending(TINY, tmp_path, settings__max_bytes=10**9) is None  # a budget is for training: the file is counted
    assert asks(settings__head_rank=10**9) is None  # at most the number of features + 1, and only where it is used
    assert "rank 1000000000 is not possible" in asks(settings__rank=10**9)
    assert "takes at most 128 pixels" in asks(backbone__img_size=2048, input__size=2048)
    assert asks(settings__targets=["re:((((.+)+)+)+)+z"]) is None  # a file's patterns are not run
    assert asks(settings__memory_mib=1e9, settings__storage="streamed") is None
    target = originals()[GLYPHS][0]["targets"][0]
    assert "has a header of 9" in asks(targets=[target] * 10**5)
    assert "names 5,000 targets" in asks(targets=[{**target, "group": ""}] * 5000)
    assert "has a header of 7" in asks(class_names=["n"] * 1_000_000)
    assert "characters" in asks(class_names=["n"] * 600_000)
    assert "class_names has 70,000 names" in asks(class_names=["n"] * 70_000)
    assert "head.bias has the shape [5] and not [60000]" in asks(class_names=["n"] * 60_000)
    head = asks(class_names=["n"] * 4, targets=[*originals()[GLYPHS][0]["targets"], {**target, "name": "head"}])
    assert "the tensor adapter.head.coefficients_a is missing" in head
    big = {"head.weight.levels": torch.zeros(64 * 2**20, dtype=torch.uint8)}
    big["head.weight.scales"] = torch.zeros(1, dtype=torch.bfloat16)
    for bits, shape in ((1, [2**29]), (2, [2**28]), (8, [2**26]), (2, [2**31, 2**31])):
        packed = {"head.weight": {"bits": bits, "shape": shape}}
        assert "does not have the bytes" in asks(big, packed=packed)
    asks = functools.partial(ending, TINY, tmp_path)
    assert "rank 100" in asks(settings__rank=100 * 10)
    assert "has the shape [1, 5] and not [1, 1000000]" in asks(settings__num_basis=10**6)
    assert "names 5,000 targets" in asks(targets=["n"] * 5000)
    assert "head.bias has the shape [3] and not [60000]" in asks(class_names=["n"] * 60_000)
    for entry in (
        [32, 2**30, 2**30],
        [32] * 9,
        [1, 2**31],
        [4],
        [4, 0],
        [32, -1],
        [33, 2],
        [64, 2],
        [None],
        [],
        7,
        [2.0, 3],
    ):
        refusal = asks(tensors__a=entry)
        assert "do not exist" in refusal or "do not have the bytes" in refusal, (entry, refusal)
    for text, reason in [
        ("[" * 10**5, "recursion"), ('{"a":1e999}', "1.8e308"), ("[]", "it is not a mapping"),
        ('{"class_names":[],"targets":[]}', "lists no tensors"),
        ('{"tensors":{"a\\n":[32]}}', "a name that no weight has"),
        (" " * 2**21 + "{}", "has more than 2,097,152 bytes"),
    ]:  # fmt: skip
        assert reason in refused(contained(prefix(), b"", compressed(text)), tmp_path)
    bomb = compressed(" " * 2**28)  # 256 MiB in 256 KiB
    assert len(bomb) < 300_000 and "has more than" in refused(contained(prefix(), b"", bomb), tmp_path)
    good = compressed('{"tensors":{}}')
    for header, length in ((good[:-1], None), (good + b"x", None), (b"\xff" * 9, None), (good, 2**31), (good, 1)):
        assert "is damaged" in refused(contained(prefix(), b"", header, length), tmp_path)
    assert "too short" in refused(_container(9) + bytes(9), tmp_path)


def refused(content: bytes, folder: Path) -> str:
    """The refusal of a file, which is cheap."""
    ended = outcome(content, folder)
    cheap(ended)
    assert ended.refusal is not None
    return ended.refusal


def test_targets_that_a_file_does_not_name_are_those_of_its_method(tmp_path: Path) -> None:
    asks = functools.partial(ending, TINY, tmp_path)
    assert "other targets than all selects in mlp_784_256" in asks(targets="0" * 8)
    assert "a file's patterns are not run" in asks(settings__targets=["re:((((.+)+)+)+)+z"])
    assert "a file's patterns are not run" in asks(settings__targets=["all", "x"])
    assert "matches no weight" in asks(settings__targets=["qkv"])
    assert asks(targets=["fc1.weight"], settings__targets=["re:((((.+)+)+)+)+z"]) is None
    assert "does not fit its method and backbone" in asks(targets=["fc1.weight[0:9]"])


def test_a_basis_too_large_for_memory_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size follows from the numbers that are stored, so it is honest; a file still does not decide on memory."""
    path = tmp_path / "a.safetensors"
    for method in (NOLA(targets=["all", "head"], num_basis=30), fuzz_adapters.METHODS["pranc"]):
        model = adapt(MLP, method, ["a", "b"])
        model.save(path)
        assert basis(load_adapter(path)) == "cached"
        with monkeypatch.context() as patch:
            patch.setattr("nola_vision.adapters.methods.base.MOST_CACHED_ON_LOAD", 1000)
            loaded = load_adapter(path)
        assert basis(loaded) == "streamed" and loaded.metadata == model.metadata
        loaded.save(tmp_path / "b.safetensors")
        assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def basis(model: Any) -> str:
    fixed = next(iter(model.bank.fixed.values()))
    return next(iter(fixed.values())).storage


def test_headers_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    asks = functools.partial(ending, GLYPHS, tmp_path)
    nan, deep = float("nan"), functools.reduce(lambda inner, _: [inner], range(900), 0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input__mean": [nan, 0.5, 0.5]}, "NaN is not a JSON number"),
        ({"input__mean": [1e300, 0.5, 0.5]}, "states mean"),
        ({"input__std": [0.5, 0, 0.5]}, "states std"),
        ({"input__size": 0}, "states size 0"),
        ({"input__size": 64}, "states size 64"),
        ({"input__crop_pct": 1e9}, "states crop_pct"),
        ({"input__crop_pct": 1e-9}, "states crop_pct"),
        ({"input__interpolation": "lanczos"}, "states interpolation"),
        ({"input__crop_mode": "x"}, "states crop_mode"),
        ({"run_seed": -1}, "run_seed is -1: it must be a whole number from 0"),
        ({"basis_seed": 10**40}, "basis_seed is 1000"),
        ({"basis_seed": 2.0}, "basis_seed of AdapterMetadata is 2.0: it must be a whole number"),
        ({"class_names": ["a", "b", "c", "d", "\udce4"]}, "damaged"),
        ({"class_names": ["a", "b", "c", "d", deep]}, "class_names has"),
        ({"settings__targets": deep}, "targets of NOLA is"),
        ({"settings__c": 10**400}, "c of NOLA is"),
        ({"settings__c": True}, "c of NOLA is True"),
        ({"backbone__tag": "vit_\x1b[31m"}, "not a name or setting"),
        ({"backbone__tag": "vit\nline"}, "not a name or setting"),
        ({"backbone__file": "/etc/passwd"}, "unknown field of its backbone: file"),
        ({"method__class_path": ["NOLA"] * 9}, "unknown method"),
        ({"format": "another"}, "does not name its format"),
        ({"backbone_fingerprint": None}, "does not state which weights"),
        ({"targets": []}, "the targets"),
        (
            {"targets": originals()[GLYPHS][0]["targets"][:-1]},
            "640x160.coefficients_a has the shape [6, 6] and not [5, 6]",
        ),
        ({"targets": originals()[GLYPHS][0]["targets"] * 2}, "the targets"),
        ({"targets__0__name": "blocks.0.attn.qkv.weight"}, "is adapted twice"),
        ({"targets__0__name": "blocks.0.attn.qkv.weight[0:161]"}, "does not fit its method and backbone"),
        ({"targets__0__name": "blocks.0.attn.qkv.weight[0:999]"}, "not a part of a weight"),
        ({"targets__0__name": "blocks.0.norm1.weight"}, "not a weight of this VisionTransformer"),
    ]
    for changes, reason in wrong:
        refusal = asks(**changes)
        assert refusal is not None and reason in refusal, (changes, refusal)
    for changes, reason in [
        ({"prefix__temperature": nan}, "the temperature is nan"),
        ({"prefix__temperature": -1.5}, "the temperature is -1.5"),
        ({"prefix__temperature": 1e38}, r"the temperature is 1e+38: it must be a number from 0.0001 to 10,000"),
        ({"calibrated_on": "\x1b[31m"}, "not a name or setting"),
        ({"calibrated_on": "x" * 41}, "calibrated_on is"),
        ({"calibrated_on": None}, "calibrated_on"),
        ({"prefix__images": 2**31}, "fitted on 2147483648 images"),
        ({"weights__file": "/etc/passwd"}, "cannot be one"),
        ({"weights__file": "../x"}, "cannot be one"),
        ({"weights__file": ""}, "cannot be one"),
        ({"weights__file": "a\x1b[31m"}, "not a name or setting"),
        ({"weights__bytes": -1}, "cannot be one"),
        ({"weights__bytes": 1.5}, "bytes of WeightsOrigin"),
        ({"weights__path": "/home/a"}, "not what this release writes"),
    ]:
        refusal = ending("calibrated", tmp_path, **changes)
        assert refusal is not None and reason in refusal, (changes, refusal)
    unknown = {"repository": None, "file": "x", "bytes": 1}
    for name in ("calibrated", "full", TINY):  # found or not, the fingerprint decides
        assert ending(name, tmp_path, weights=unknown, prefix__weights="0" * 64, prefix__temperature=0) is None
    assert asks(class_names=["crane", "crane", "\x1b[31m", "", "é"]) is None  # names are the user's own
    for text, reason in [
        ('{"a":1,"a":2}', "a key occurs twice"),
        ("[" * 10**5, "recursion"),
        ('{"a":1e999}', "1.8e308"),
        ('{"a":' + "1" * 5000 + "}", "damaged"),
    ]:
        content = safetensors.torch.save({}, {METADATA_KEY: text})
        ended = outcome(content, tmp_path)
        cheap(ended)
        assert reason in ended.refusal


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.float8_e4m3fn, "of type F8_E4M3: it must be F32 or F16"),
        (torch.complex64, "of type C64: it must be F32 or F16"),
        (torch.int32, "of type I32: it must be F32 or F16"),
        (torch.float64, "of type F64: it must be F32 or F16"),
        (torch.bfloat16, "of type BF16: it must be F32 or F16"),
    ],
)
def test_only_the_formats_own_dtypes_are_read(kind: torch.dtype, reason: str, tmp_path: Path) -> None:
    name = "adapter.160x640.coefficients_a"
    assert reason in ending(GLYPHS, tmp_path, {name: originals()[GLYPHS][1][name].to(kind)})


def test_integers_where_the_backbone_has_floats_are_refused(tmp_path: Path) -> None:
    name, data = "backbone.fc1.bias", torch.zeros(256 * 8, dtype=torch.uint8)
    assert "another dtype" in ending("full", tmp_path, {name: data}, **{f"tensors__{name}": [64, 256]})


def test_numbers_that_no_training_gives_are_refused(tmp_path: Path) -> None:
    name = "adapter.784x256.coefficients_b"
    stored = originals()[TINY][1][name].view(torch.float32)
    for value, reason in [(1e38, "has the value 1e+38"), (float("nan"), "not finite"), (-1e10, "has the value 1e+10")]:
        assert reason in ending(TINY, tmp_path, {name: torch.full_like(stored, value)})
    packed = originals()["linear"][1]["head.weight"].clone()
    packed[:8] = torch.full([4], 1e38).bfloat16().view(torch.uint8)
    assert "has the value" in ending("linear", tmp_path, {"head.weight": packed})
    model = adapt(MLP, LoRA(targets=["all"]), ["a", "b"])
    with torch.no_grad():
        model.bank.head_bias.fill_(1e10)
    with pytest.raises(NolaVisionError, match=r"head.bias has the value 1e\+10"):  # what is written can be read
        model.save(tmp_path / "big.safetensors")


def test_logits_that_are_not_finite_are_an_error_and_not_a_class(tmp_path: Path) -> None:
    model = adapt(MLP, LoRA(targets=["all"]), ["a", "b"])
    with torch.no_grad():
        model.bank.head_bias.fill_(float("inf"))
    with pytest.raises(NolaVisionError, match="logits are not finite"):
        model.predict([fuzz_adapters.image(tmp_path)])


def test_a_file_is_a_regular_file_and_its_header_is_small(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NolaVisionError, match="not a regular file"):
        load_adapter(tmp_path / "pipe")
    with open(tmp_path / "long", "wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)  # a hole: nothing is on the disk
    with pytest.raises(NolaVisionError, match="header of 1,073,741,824 bytes"):
        load_adapter(tmp_path / "long")


def test_shortening_checks_the_header_too(tmp_path: Path) -> None:
    metadata, tensors = fuzz_adapters.copy.deepcopy(originals()[TINY])
    metadata["method"]["init_args"] = []
    (tmp_path / "a.safetensors").write_bytes(written(metadata, tensors))
    with pytest.raises(NolaVisionError, match=r"init_args of NOLA is \[\]"):
        shorten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=4)


@pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_any_file_works_or_is_refused_in_one_line(examples: int, tmp_path: Path) -> None:
    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(fuzz_adapters.inputs())
    def feed(example: tuple[str, bytes]) -> None:
        cheap(outcome(example[1], tmp_path))

    feed()


# --- what a file may name --------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a file made this process use the network")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", forbidden)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", forbidden)


@pytest.mark.usefixtures("no_network")
def test_only_the_user_names_hubs_and_folders(tmp_path: Path) -> None:
    for tag in ("hf-hub:someone/model", "local-dir:/etc", "hf_hub:someone/model"):
        assert "--weights FOLDER" in ending(TINY, tmp_path, backbone__tag=tag)


def test_a_download_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tag = "test_vit.r160_in1k"
    spec = BackboneSpec(tag, base="random")
    adapt(spec, LoRA(), ["a", "b"]).save(tmp_path / "a.safetensors")
    load_adapter(tmp_path / "a.safetensors")
    assert not caplog.messages
    metadata, tensors = fuzz_adapters._opened((tmp_path / "a.safetensors").read_bytes())
    metadata["backbone"]["base"] = "pretrained"
    (tmp_path / "a.safetensors").write_bytes(written(metadata, tensors))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    size = SimpleNamespace(size=1_300_000)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: size)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NolaVisionError, match="could not be downloaded"):
        load_adapter(tmp_path / "a.safetensors")
    (line,) = caplog.messages
    assert line.startswith(f"downloading {tag} from huggingface.co/timm/{tag} (1 MB, once; kept in ")


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "C3AConfig": {"block_size": 16},
    "DeloraConfig": {"r": 2},
    "FourierFTConfig": {"n_frequency": 20, "random_loc_seed": 3},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 2},
    "HiraConfig": {"r": 2, "rank_pattern": {"fc1": 3}},
    "IA3Config": {"feedforward_modules": []},
    "LNTuningConfig": {},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2, "init_weights": True},
    "LoraConfig": {"r": 2, "use_dora": True, "init_lora_weights": "gaussian", "bias": "lora_only"},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4},
    "PveraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2},
    "VeraConfig": {"r": 4, "projection_prng_key": 7},
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("config", CONFIGS)
def test_each_allowed_config_of_peft_comes_back_from_a_file(config: str, tmp_path: Path) -> None:
    method = PEFT(config=config, settings={"target_modules": "f.1", **PEFT_SETTINGS[config]})
    model = adapt(MLP, method, ["a", "b"])
    assert model.metadata.method.settings["target_modules"] == ["fc1"]  # a pattern becomes what it matched
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval().save(tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_adapter(tmp_path / "a.safetensors")(images), model(images))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ("peft.BOFTConfig", {}, "'peft.BOFTConfig' is not a PEFT config that an adapter file can restore"),
        ("XLoraConfig", {"adapters": {"a": "someone/model"}, "hidden_size": 3}, "'XLoraConfig' is not a PEFT config"),
        ("PromptTuningConfig", {}, "is not a PEFT config"),
        ("AdaLoraConfig", {}, "is not a PEFT config"),
        ("os.system", {}, "is not a PEFT config"),
        ("LoraConfig", {"base_model_name_or_path": "someone/model"}, "base_model_name_or_path .*leave it out"),
        ("LoraConfig", {"revision": "main"}, "revision .*leave it out"),
        ("LoraConfig", {"task_type": "SEQ_CLS"}, "leave it out"),
        ("LoraConfig", {"peft_type": "XLORA"}, "leave it out"),
        ("LoraConfig", {"inference_mode": True}, "leave it out"),
        ("LoraConfig", {"auto_mapping": {"parent_library": "os"}}, "leave it out"),
        ("LoraConfig", {"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config .*leave it out"),
        ("LoraConfig", {"megatron_core": "os"}, "megatron_core of peft.LoraConfig is 'os': use one of"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("LoraConfig", {"init_lora_weights": True, "eva_config": {"rho": 2}}, "eva_config .*leave it out"),
        ("LoraConfig", {"loftq_config": {"loftq_bits": 4}}, "loftq_config .*leave it out"),
        ("LoraConfig", {"runtime_config": {"ephemeral_gpu_offload": True}}, "leave it out"),
        ("LoraConfig", {"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ("LoraConfig", {"r": 10**9}, "r of peft.LoraConfig is 1000000000: use a number"),
        ("LoraConfig", {"r": 2**15}, "does not fit"),
        ("LoraConfig", {"r": -4}, "cannot be used"),
        ("VeraConfig", {"r": 2**15}, "does not fit"),
        ("LoraConfig", {"target_modules": ["((.+)+)+z"]}, "without pattern signs"),
        ("LoraConfig", {"exclude_modules": "((.+)+)+z"}, "or a list of module names"),
        ("LoraConfig", {"rank_pattern": {"((.+)+)+z": 3}}, "without pattern signs"),
        ("LoraConfig", {"modules_to_save": ["((.+)+)+z"]}, "without pattern signs"),
        ("LoraConfig", {"target_modules": "((.+)+)+z"}, "a file's patterns are not run"),
    ],
)
def test_what_a_file_may_not_make_peft_do(config: str, settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    given_settings = {"r": 2, "target_modules": ["fc1"], **settings} if config.endswith("aConfig") else settings
    refusal = ending("peft-lora", tmp_path, settings__config=config, settings__settings=given_settings)
    assert refusal is not None and re.search(reason, refusal), refusal
