"""A bank of adapters: answers are those of each adapter's own model; files, names, threads and memory."""

import gc
import hashlib
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import nola_vision
from nola_vision import BackboneSpec, adapt, load_adapter
from nola_vision.adapters import methods
from nola_vision.adapters.methods.base import Source
from nola_vision.adapters.serialization import AdapterFile, open_adapter
from nola_vision.adapters.stored import Stored, stored
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.building import generator
from nola_vision.serving import adapter as adapter_module
from nola_vision.serving import bank as bank_module
from nola_vision.serving.adapter import UnreadableAdapter
from nola_vision.serving.bank import BASE, AdapterBank, UnknownAdapter
from nola_vision.serving.cache import ByteCache
from nola_vision.serving.files import backbone_of
from nola_vision.serving.shared_backbone import odd_layers

SPEC = BackboneSpec("vit_mini_patch4_32.contours")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 32, 32, generator=GENERATOR)
# name: method, classes, run seed, basis seed
ADAPTERS = {
    "nola": (methods.NOLA(targets=["mlp"], rank=4, num_basis=16, bits=4), 3, 0, 0),
    "nola again": (methods.NOLA(targets=["mlp"], rank=4, num_basis=16, bits=8, lr=0.02), 5, 1, 0),
    "nola shorter": (methods.NOLA(targets=["mlp"], rank=4, num_basis=7, head_bits=2), 2, 2, 0),
    "nola other seed": (methods.NOLA(targets=["mlp"], rank=4, num_basis=16), 3, 3, 9),
    "nola head": (methods.NOLA(targets=["qkv", "head"], rank=2, num_basis=8, bits=4), 4, 4, 0),
    "nola per layer": (methods.NOLA(targets=["qv"], rank=3, num_basis=5, scope="per_layer", start="released"), 3, 5, 0),
    "lora": (methods.LoRA(targets=["qkv"], rank=2), 3, 6, 6),
    "lora other seed": (methods.LoRA(targets=["qkv"], rank=2, lr=0.1), 3, 17, 17),
    "lora parts": (methods.LoRA(targets=["qv"], rank=8, bits=1), 7, 7, 7),
    "lora conv": (methods.LoRA(targets=["all"], rank=1), 3, 8, 8),
    "lora xs": (methods.LoRAXS(targets=["qkv"], rank=4), 3, 9, 9),
    "vera": (methods.VeRA(targets=["mlp"], rank=4), 3, 10, 10),
    "uni lora": (methods.UniLoRA(targets=["qkv", "mlp"], max_parameters=100), 3, 11, 11),
    "fact": (methods.FacT(targets=["qkv", "mlp"], rank=4), 3, 12, 12),
    "tiny lora": (methods.TinyLoRA(targets=["qkv"], rank=8, num_basis=12), 3, 13, 13),
    "hashednet": (methods.HashedNet(targets=["mlp"], max_parameters=64), 3, 14, 14),
    "pranc": (methods.PRANC(targets=["qkv"], scope="layer", num_basis=4), 3, 15, 15),
    "linear": (nola_vision.LinearProbe(head_bits=4), 10, 16, 16),
}
PEFT = nola_vision.PEFT(config="peft.LoraConfig", settings={"r": 2, "target_modules": ["qkv"]})
LOW_RANK = [name for name in ADAPTERS if name not in ("lora conv", "hashednet", "pranc")]


def save(path: Path, name: str, temperature: float = 1.0, spec: BackboneSpec = SPEC) -> None:
    """An adapter file whose trained values are all random: what has no effect on the logits cannot be compared."""
    method, classes, run_seed, basis_seed = ADAPTERS[name]
    model = adapt(spec, method, [f"{name} {number}" for number in range(classes)], run_seed, basis_seed)
    draws = torch.Generator().manual_seed(run_seed)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
    model.temperature, model.calibrated_on = temperature, "validation"
    model.save(path)


def rewrite(path: Path, to: Path, change: Callable[[AdapterFile], dict[str, Any] | None]) -> Path:
    """A copy of an adapter file with other tensors, which `change` replaces in place, or fields, which it returns."""
    file = open_adapter(path)
    fields = change(file)
    to.write_bytes(file.rewritten(fields or {}))
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(ADAPTERS):
        save(folder / f"{name}.safetensors", name, 1 + number / 10)
    return folder


@pytest.fixture(scope="module")
def own(folder: Path) -> dict[str, torch.Tensor]:
    """Each adapter's own logits of all images, by `load_adapter`."""
    with torch.no_grad():
        return {name: load_adapter(folder / f"{name}.safetensors")(IMAGES) for name in ADAPTERS}


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return create_backbone(SPEC)(IMAGES)


@pytest.fixture(scope="module")
def bank(folder: Path) -> AdapterBank:
    bank = AdapterBank(SPEC)
    assert bank.load_folder(folder) == sorted(ADAPTERS)
    return bank


def answers(bank: AdapterBank, names: list[str], places: list[int]) -> list[torch.Tensor]:
    return bank.logits(IMAGES[places], [bank.adapter(name) for name in names])


def check(found: list[torch.Tensor], own: dict[str, torch.Tensor], names: list[str], places: list[int]) -> None:
    for logits, name, place in zip(found, names, places, strict=True):
        assert torch.allclose(logits, own[name][place], rtol=0, atol=1e-4 * float(own[name].abs().max().clamp(min=1)))


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_batch_equals_each_adapters_own_model(
    bank: AdapterBank, own: dict[str, torch.Tensor], features: torch.Tensor, seed: int
) -> None:
    spread = torch.stack([one[0, :2] for one in own.values()])
    assert len({tuple(row.tolist()) for row in spread}) == len(own)  # so that a mix-up would be seen
    draws = torch.Generator().manual_seed(seed)
    pool = [*ADAPTERS, BASE] if seed < 2 else LOW_RANK[: 1 + 3 * seed]
    names = [pool[int(torch.randint(len(pool), (), generator=draws))] for _ in range(24)]
    places = torch.randperm(24, generator=draws).tolist()
    found = answers(bank, names, places)
    known = [position for position, name in enumerate(names) if name != BASE]
    check([found[one] for one in known], own, [names[one] for one in known], [places[one] for one in known])
    for position in set(range(24)) - set(known):
        assert torch.allclose(found[position], features[places[position]], rtol=0, atol=1e-4)


def test_the_base_gives_features(bank: AdapterBank, features: torch.Tensor) -> None:
    found = bank.logits(IMAGES, [bank.adapter(BASE)] * 24)
    assert torch.allclose(torch.stack(found), features, rtol=0, atol=1e-5)


def test_threads_get_their_own_answers_while_adapters_come_and_go(
    bank: AdapterBank, own: dict[str, torch.Tensor], folder: Path
) -> None:
    wrong: list[BaseException] = []
    done = threading.Event()

    passing = {
        hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest(): name for name in ("nola", "lora")
    }
    passed = set[str | None]()

    def ask(seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        try:
            for _ in range(6):
                names = [LOW_RANK[int(torch.randint(len(LOW_RANK), (), generator=draws))] for _ in range(8)]
                places = torch.randperm(24, generator=draws)[:8].tolist()
                chosen = [bank.adapter(name) for name in names]
                try:
                    chosen[3] = bank.adapter("passing")
                    names[3] = passing[chosen[3].digest]
                    passed.add(names[3])
                except UnknownAdapter:
                    passed.add(None)
                check(bank.logits(IMAGES[places], chosen), own, names, places)
        except BaseException as error:
            wrong.append(error)

    def change() -> None:
        try:
            while not done.is_set():
                for name in ("nola", "lora"):
                    bank.load_adapter(folder / f"{name}.safetensors", "passing")
                    time.sleep(0.001)  # lets the others ask for it
                bank.load_folder(folder)
                bank.delete_adapter("passing")
                time.sleep(0.001)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    changing = threading.Thread(target=change)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changing.join()
    assert not wrong, wrong[0]
    assert passed & {"nola", "lora"}


def test_what_was_read_and_computed_is_kept_within_the_budget(
    folder: Path, own: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = AdapterBank(SPEC, cache_mib=0.2)  # a little more than the factors of one adapter
    small.load_folder(folder)
    names = ["nola", "lora", "nola again", "lora parts", "nola"]
    for _ in range(2):
        check(answers(small, names, [0, 1, 2, 3, 4]), own, names, [0, 1, 2, 3, 4])
    assert 0 < small._shared.cache.used <= 0.2 * 2**20
    whole = AdapterBank(SPEC)
    whole.load_folder(folder)
    made, during = whole._shared._maker.make, []

    def make(*arguments: Any) -> Any:
        during.append(whole.cache_counts())
        return made(*arguments)

    monkeypatch.setattr(whole._shared._maker, "make", make)
    for _ in range(2):
        answers(whole, names, [0, 1, 2, 3, 4])
    assert whole.cache_counts() == (4, 4) and set(during) == {(0, 4)}  # counters never decrease


def test_adapters_of_a_folder_leave_the_memory_and_loaded_ones_stay(
    folder: Path, own: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for number in range(20):  # each counts for 4 KiB or more
        shutil.copy(folder / "lora parts.safetensors", tmp_path / f"{number}.safetensors")
    bank = AdapterBank(SPEC, cache_mib=0.05)
    names = bank.load_folder(tmp_path)
    kept = shutil.copy(folder / "nola.safetensors", tmp_path / "kept")
    bank.load_adapter(kept, "kept")
    read = [weakref.ref(bank.adapter(name).stored["head.weight"].data) for name in names]
    Path(kept).unlink()
    gc.collect()
    assert read[0]() is None and read[-1]() is not None
    first, last = bank.info(names[0]), bank.info(names[-1])
    assert first.digest == last.digest and first.classes is None and last.classes is not None
    check(answers(bank, ["0", "kept"], [3, 4]), own, ["lora parts", "nola"], [3, 4])


def test_the_least_recently_used_goes_first_and_files_after_what_was_computed() -> None:
    cache = ByteCache(100_000)
    for key in "abcd":
        cache.put(key, key, 25_000)
    assert cache.get("a") == "a" and cache.peek("b") == "b"
    cache.put("e", "e", 25_000)
    assert [cache.peek(key) for key in "abcde"] == ["a", None, "c", "d", "e"]
    cache.put("e", "new", 20_000)
    assert cache.get("e") == "new" and cache.used == 95_000
    cache.put("f", "f", 100_001)
    assert cache.peek("f") is None and cache.used == 95_000
    cache.put("1", "1", 25_000, file=True)
    cache.put("2", "2", 25_000, file=True)
    assert [cache.peek(key) for key in "acde12"] == ["a", None, None, "new", "1", "2"]
    cache.put("g", "g", 30_000)
    cache.put("h", "h", 30_000)
    assert [cache.peek(key) for key in "acdegh12"] == [None] * 5 + ["h", "1", "2"]
    cache.put("3", "3", 1, file=True)  # counts for 4 KiB
    assert cache.peek("3") == "3" and cache.peek("1") == "1" and cache.used == 84_096
    cache.put("4", "4", 30_000, file=True)  # files take more than half
    assert [cache.peek(key) for key in "h1234"] == ["h", None, "2", "3", "4"]


def test_basis_seeds_that_no_adapter_has_are_forgotten(folder: Path) -> None:
    bank = AdapterBank(SPEC, cache_mib=0.05)  # no more than 12 values, of at least 4 KiB each
    for name in ("nola", "nola other seed", "nola per layer"):
        answers(bank, [bank.load_adapter(folder / f"{name}.safetensors", "one")], [0])
    gc.collect()
    shared = bank._shared
    assert len(shared._layouts) == len(shared._kinds) <= 2 and len(shared.cache._computed) <= 12

    def layout(name: str) -> Any:
        return shared.read(folder / f"{name}.safetensors", "").layout

    layouts = [layout("nola"), layout("nola other seed")]
    assert layouts[0] is not layouts[1] and layouts[0].groups is layouts[1].groups
    assert layout("lora") is layout("lora other seed")  # nothing random in it is fixed


@pytest.mark.parametrize("name", ["lora", "lora xs", "fact"])
def test_methods_without_a_basis_seed_fix_nothing_random(bank: AdapterBank, name: str) -> None:
    layout, backbone = bank.adapter(name).layout, bank._shared._injection.backbone
    assert not layout.method.uses_basis_seed
    for group in layout.groups:
        made = [
            layout.method.fixed(group, Source(1, seed, "pretrained", generator(0, "factors"), backbone, loading=True))
            for seed in (0, 1)
        ]
        assert made[0].keys() == made[1].keys()
        assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(made[1][key])) for key, one in made[0].items())


def test_files_that_are_refused_leave_nothing(folder: Path, tmp_path: Path) -> None:
    shared = AdapterBank(SPEC)._shared

    def larger(file: AdapterFile) -> dict[str, Any]:
        method = file.metadata["method"]
        return {"method": {**method, "init_args": {**method["init_args"], "c": 1.5}}}

    other = rewrite(folder / "nola.safetensors", tmp_path / "other.safetensors", larger)
    adapter = shared.read(other, "")
    assert len(shared._groupings) == len(shared._layouts) == 1
    del adapter

    def without(file: AdapterFile) -> dict[str, Any]:
        del file.stored["head.bias"]
        return larger(file)

    with pytest.raises(NolaVisionError, match="head.bias is missing"):
        shared.read(rewrite(folder / "nola.safetensors", other, without), "")
    gc.collect()
    assert len(shared._groupings) == len(shared._layouts) == 0


def test_nothing_is_decoded_before_the_shapes_are_checked_and_then_one_tensor_at_a_time(
    bank: AdapterBank, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surplus(file: AdapterFile) -> None:
        file.stored["surplus"] = stored(torch.ones(1, 1000), 1)

    def infinite(file: AdapterFile) -> None:
        file.stored["head.bias"] = stored(torch.tensor([0, float("inf"), 0]), 32)

    made: list[weakref.ref[torch.Tensor]] = []
    decode = Stored.tensor

    def count(one: Stored) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in made)
        tensor = decode(one).clone()
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Stored, "tensor", count)
    source, changed = folder / "nola.safetensors", tmp_path / "changed.safetensors"
    with pytest.raises(NolaVisionError, match="changed.safetensors .*the tensor surplus does not belong there"):
        bank.check(rewrite(source, changed, surplus))
    assert not made
    bank.check(source)
    assert len(made) == len(open_adapter(source).stored)
    with pytest.raises(NolaVisionError, match="head.bias in .*changed.safetensors has a value that is not finite"):
        bank.check(rewrite(source, changed, infinite))


def test_factors_of_other_weights_are_refused(bank: AdapterBank, folder: Path, tmp_path: Path) -> None:
    def change(file: AdapterFile) -> None:
        name = next(name for name in file.stored if name.startswith("sketch."))
        file.stored[name] = stored(1.01 * file.tensor(name), 32)

    with pytest.raises(NolaVisionError, match="changed.safetensors was trained with another .*than this machine"):
        bank.load_adapter(rewrite(folder / "lora xs.safetensors", tmp_path / "changed.safetensors", change))


def test_images_that_cannot_be_prepared_are_refused_with_the_file(
    bank: AdapterBank, folder: Path, tmp_path: Path
) -> None:
    changed = rewrite(
        folder / "nola.safetensors",
        tmp_path / "changed.safetensors",
        lambda file: {"input": {**file.metadata["input"], "crop_mode": "border"}},
    )
    with pytest.raises(NolaVisionError, match="changed.safetensors cannot be used: .*crop mode 'border'"):
        bank.load_adapter(changed)


def test_a_bank_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    spec = replace(SPEC, int8=True)
    bank = AdapterBank(spec)
    for name in ("nola", "lora", "hashednet"):
        save(tmp_path / f"{name}.safetensors", name, spec=spec)
    names = bank.load_folder(tmp_path)
    with torch.no_grad():
        own = {name: load_adapter(tmp_path / f"{name}.safetensors")(IMAGES[:3]) for name in names}
    check(answers(bank, names, [0, 1, 2]), own, names, [0, 1, 2])
    for name in ("lora xs", "tiny lora"):
        save(tmp_path / f"{name}.safetensors", name, spec=spec)
        with pytest.raises(NolaVisionError, match=f"{name}.safetensors cannot be in .* 8 bits .*the float weights"):
            bank.load_adapter(tmp_path / f"{name}.safetensors")


class Table(torch.nn.Module):
    """Adds to its images what a linear layer makes of a table of four rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.odd, self.plain = torch.ones(rows, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        windows = images.flatten(2).mT.repeat_interleave(2, 0)
        return self.plain(windows).unflatten(0, (len(images), 2)).mean((1, 2)) + self.odd(self.table).mean(0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
def test_layers_whose_input_does_not_grow_with_the_batch(rows: int) -> None:
    assert odd_layers(Table(rows), torch.ones(2, 3, 4, 4)) == {"odd"}


@pytest.mark.parametrize("names", [3, None, [None], [["nola"]], b"nola"])
def test_names_of_another_type(bank: AdapterBank, names: Any) -> None:
    with pytest.raises(NolaVisionError, match="adapter_names is .*give one name as a string"):
        bank.predict([torch.rand(3, 8, 8)], names)


@pytest.mark.parametrize(
    "settings, message",
    [
        *(({"cache_mib": mib}, "cache_mib is") for mib in (0, -1, float("nan"), float("inf"), "x", None)),
        ({"device": "gpu"}, "^device is 'gpu': did you mean cuda"),
        ({"device": None}, "^device is 'None': use cpu"),
        ({"backbone": 3}, "backbone is 3: give timm's tag"),
        ({"backbone": "quickstart"}, "unknown timm model 'quickstart': .* is vit_mini_patch4_32.contours"),
        ({"backbone": "vit_mini_patch4_32.contour"}, "unknown pretrained tag 'contour' .*: use one of contours, mae"),
        ({"backbone": replace(SPEC, base="random")}, "needs pretrained weights"),
    ],
)
def test_settings_that_no_bank_can_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NolaVisionError, match=message):
        AdapterBank(**{"backbone": SPEC, **settings})


@pytest.mark.parametrize("value", [None, 3, ["nola"], b"nola"])
def test_paths_and_names_of_another_type(bank: AdapterBank, value: Any) -> None:
    for call in (bank.load_adapter, bank.check, bank.load_folder, backbone_of):
        with pytest.raises(NolaVisionError, match="(path|folder) is .*: give a path"):
            call(value)
    for call in (bank.adapter, bank.info, bank.delete_adapter):
        with pytest.raises(NolaVisionError, match="the adapter's name is .*: give text"):
            call(value)


def test_predictions_are_those_of_each_adapters_own_model(bank: AdapterBank, folder: Path) -> None:
    images = [torch.rand(3, 40, 50, generator=GENERATOR) for _ in range(5)]
    names = ["nola", "linear", "lora conv", "nola", "linear"]
    found = bank.predict(images, names, top_k=2, batch_size=3)
    for image, name, best in zip(images, names, found, strict=True):
        expected = load_adapter(folder / f"{name}.safetensors").predict(image, top_k=2)
        assert [one.label for one in best] == [one.label for one in expected]
        assert [one.probability for one in best] == pytest.approx([one.probability for one in expected], abs=1e-5)
    assert bank.predict(images[0], "nola", top_k=2) == found[0]
    features = bank.predict(images[:2], BASE)
    assert torch.equal(
        torch.stack(features).round(decimals=4), torch.stack(bank.predict(images[:2], [BASE, BASE])).round(decimals=4)
    )
    uses = {one.name: one.uses for one in bank.adapters()}
    bank.adapter("lora conv")
    assert uses["linear"] >= 2 and bank.info("lora conv").classes == tuple(f"lora conv {number}" for number in range(3))


def test_images_are_prepared_as_each_adapter_needs_them(tmp_path: Path) -> None:
    tag, file = "test_resnet.r160_in1k", tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(tag).state_dict(), file)
    specs = {
        "small": BackboneSpec(tag, file=str(file), img_size=32),
        "large": BackboneSpec(tag, file=str(file), img_size=64),
        "normalised": BackboneSpec(tag, file=str(file), img_size=32, normalisation="imagenet"),
    }
    bank, alone = AdapterBank(specs["large"]), {}
    for number, (name, spec) in enumerate(specs.items()):
        model = adapt(spec, nola_vision.LinearProbe(), ["a", "b"], run_seed=number)
        model.save(tmp_path / f"{name}.safetensors")
        alone[name] = load_adapter(tmp_path / f"{name}.safetensors", str(file))
        bank.load_adapter(tmp_path / f"{name}.safetensors")
    assert bank.adapter("small").input.mean != bank.adapter("normalised").input.mean
    images = [torch.rand(3, 70, 90, generator=GENERATOR) for _ in range(6)]
    names = [*specs, *specs]
    found = bank.predict(images, names)
    for image, name, best in zip(images, names, found, strict=True):
        expected = alone[name].predict(image)
        assert [one.label for one in best] == [one.label for one in expected]
        assert [one.probability for one in best] == pytest.approx([one.probability for one in expected], abs=1e-5)
    norms = adapt(specs["large"], nola_vision.LoRA(targets=["re:.*downsample.*"], rank=1, train_norms=True), ["a", "b"])
    norms.save(tmp_path / "norms.safetensors")
    with pytest.raises(NolaVisionError, match="norms.safetensors cannot share .*its batch norms"):
        bank.load_adapter(tmp_path / "norms.safetensors")


def test_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    bank = AdapterBank(SPEC)
    first = (folder / "nola.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(first)
    (tmp_path / "broken.safetensors").write_bytes(first[:-1])
    (tmp_path / "notes.txt").write_text("no adapter")
    for name in (BASE, ".x", "._a", ""):
        (tmp_path / f"{name}.safetensors").write_bytes(first)
    (tmp_path / "b.safetensors").mkdir()
    assert bank.load_folder(tmp_path) == ["a", "broken"]
    assert [(one.name, one.digest) for one in bank.adapters()] == [("a", None), ("broken", None)]  # nothing is read
    a = bank.adapter("a")
    assert bank.adapter("a") is a and bank.info("a").digest == hashlib.sha256(first).hexdigest() == a.digest
    for _ in range(2):
        with pytest.raises(NolaVisionError, match="broken.safetensors .*(damaged|truncated)"):
            bank.adapter("broken")
    assert "broken.safetensors" in (bank.info("broken").error or "")

    other = (folder / "lora.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(other)
    (tmp_path / "broken.safetensors").write_bytes(first)
    (tmp_path / "new.safetensors").write_bytes(other)
    assert bank.load_folder(tmp_path) == ["a", "broken", "new"]
    assert bank.adapter("a").method == "LoRA" and bank.adapter("broken").method == "NOLA"
    assert a.method == "NOLA" and len(bank.logits(IMAGES[:1], [a])[0]) == 3  # whoever has it may still use it
    bank.load_adapter(folder / "linear.safetensors", "mine")
    (tmp_path / "a.safetensors").unlink()
    assert bank.load_folder(tmp_path) == ["broken", "new"]
    assert [one.name for one in bank.adapters()] == ["broken", "mine", "new"]
    with pytest.raises(UnknownAdapter, match="no adapter 'brocken': did you mean broken"):
        bank.adapter("brocken")
    bank.delete_adapter("mine")
    with pytest.raises(UnknownAdapter):
        bank.delete_adapter("mine")


def test_an_older_list_of_a_folder_does_not_replace_a_newer_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, files = AdapterBank(SPEC), bank_module.adapter_files
    other = threading.Thread(target=bank.load_folder, args=(tmp_path,))

    def slow(path: Path) -> dict[str, Path]:
        found = files(path)
        if not other.ident:
            shutil.copy(folder / "nola.safetensors", tmp_path / "new.safetensors")
            other.start()
            other.join(0.1)
        return found

    monkeypatch.setattr(bank_module, "adapter_files", slow)
    bank.load_folder(tmp_path)
    other.join()
    assert [one.name for one in bank.adapters()] == ["new"]


@pytest.mark.parametrize("age, again", [(-3600, True), (3600, False)])
def test_a_file_that_was_read_right_after_a_change_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, again: bool
) -> None:
    changed = time.time_ns() - age * 10**9  # an hour from now is recent however slow the machine is
    # another change does not show
    monkeypatch.setattr(bank_module, "file_state", lambda path: (1, changed, changed, 1))
    bank = AdapterBank(SPEC)
    shutil.copy(folder / "nola.safetensors", tmp_path / "a.safetensors")
    bank.load_folder(tmp_path)
    first = bank.adapter("a")
    shutil.copy(folder / "lora.safetensors", tmp_path / "a.safetensors")
    bank.load_folder(tmp_path)
    assert bank.info("a").digest == first.digest
    assert (bank.adapter("a").method == "LoRA") == again


def test_a_file_that_could_not_be_read_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank(SPEC)
    shutil.copy(folder / "nola.safetensors", tmp_path / "a.safetensors")
    bank.load_folder(tmp_path)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(UnreadableAdapter, match=r"a.safetensors .*\(Too many open"):
        patch.setattr(adapter_module, "read_file", fail)
        bank.adapter("a")
    assert bank.info("a").error is None
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UnreadableAdapter, match="a.safetensors does not exist"):
        bank.adapter("a")
    (tmp_path / "a.safetensors").write_bytes(content)
    assert bank.adapter("a").method == "NOLA"


@pytest.mark.parametrize(
    "method, spec, reason",
    [
        (nola_vision.FullFinetune(), SPEC, "FullFinetune changes the whole backbone"),
        (PEFT, SPEC, "PEFT changes the whole backbone"),
        (nola_vision.LoRA(), BackboneSpec("vit_glyph_patch4_32.glyphs"), "other weights"),
        (nola_vision.LoRA(), replace(SPEC, base="random"), "not pretrained"),
        (nola_vision.LoRA(), replace(SPEC, img_size=48), "images of 48 pixels, and the bank's backbone takes 32"),
        (nola_vision.LoRA(), replace(SPEC, int8=True), "8 bits, and the bank's is in floats: .*int8=True"),
    ],
    ids=["full-ft", "peft", "weights", "random", "image size", "int8"],
)
def test_files_that_cannot_share_the_backbone_are_refused_by_name(
    bank: AdapterBank, tmp_path: Path, method: methods.Method, spec: BackboneSpec, reason: str
) -> None:
    adapt(spec, method, ["a", "b"]).save(tmp_path / "other.safetensors")
    with pytest.raises(NolaVisionError, match=f"other.safetensors .*{reason}"):
        bank.load_adapter(tmp_path / "other.safetensors")


def test_the_backbone_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert backbone_of(tmp_path, tag="some.tag") == BackboneSpec("some.tag")
    (tmp_path / ".hidden.safetensors").write_bytes((folder / "nola.safetensors").read_bytes())
    with pytest.raises(NolaVisionError, match="has no adapter file"):
        backbone_of(tmp_path)
    random = BackboneSpec("test_vit.r160_in1k", base="random")
    adapt(random, nola_vision.LoRA(), ["a", "b"]).save(tmp_path / "a.safetensors")
    adapt(random, nola_vision.FullFinetune(), ["a", "b"]).save(tmp_path / "b.safetensors")
    with pytest.raises(NolaVisionError, match="a.safetensors belongs to a backbone that is not pretrained"):
        backbone_of(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(NolaVisionError, match="b.safetensors cannot share a backbone .*FullFinetune"):
        backbone_of(tmp_path)
    (tmp_path / "c.safetensors").write_bytes((folder / "nola.safetensors").read_bytes())
    assert backbone_of(tmp_path).tag == SPEC.tag


def test_batches_that_do_not_fit_are_refused(bank: AdapterBank) -> None:
    with pytest.raises(NolaVisionError, match="1 adapter"):
        bank.logits(IMAGES[:2], [bank.adapter("nola")])
    with pytest.raises(NolaVisionError, match="2 adapter names for 1 images"):
        bank.predict([torch.zeros(3, 8, 8)], ["nola", "nola"])
    for name in ("", BASE, "a\nb"):
        with pytest.raises(NolaVisionError, match="the adapter's name"):
            bank.load_adapter("anything.safetensors", name)
