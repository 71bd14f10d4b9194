"""A bank of adapters: answers are those of each adapter's own model; files, names, threads and memory."""

import gc
import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nola_vision
from nola_vision import BackboneSpec, adapt, load_adapter
from nola_vision.adapters import methods
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.serving.bank import BASE, AdapterBank, UnknownAdapter, backbone_of

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


def save(path: Path, name: str, temperature: float = 1.0) -> None:
    """An adapter file whose trained values are all random: what has no effect on the logits cannot be compared."""
    method, classes, run_seed, basis_seed = ADAPTERS[name]
    model = adapt(SPEC, method, [f"{name} {number}" for number in range(classes)], run_seed, basis_seed)
    draws = torch.Generator().manual_seed(run_seed)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
    model.temperature, model.calibrated_on = temperature, "validation"
    model.save(path)


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

    def ask(seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        try:
            for _ in range(6):
                names = [LOW_RANK[int(torch.randint(len(LOW_RANK), (), generator=draws))] for _ in range(8)]
                places = torch.randperm(24, generator=draws)[:8].tolist()
                check(answers(bank, names, places), own, names, places)
        except BaseException as error:
            wrong.append(error)

    def change() -> None:
        while not done.is_set():
            bank.load_adapter(folder / "nola.safetensors", "passing")
            bank.load_adapter(folder / "lora.safetensors", "passing")
            bank.load_folder(folder)
            bank.delete_adapter("passing")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    changing = threading.Thread(target=change)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changing.join()
    assert not wrong, wrong[0]


def test_factors_are_kept_within_the_budget(folder: Path, own: dict[str, torch.Tensor]) -> None:
    small = AdapterBank(SPEC, cache_mib=0.2)  # a little more than the factors of one adapter
    small.load_folder(folder)
    names = ["nola", "lora", "nola again", "lora parts", "nola"]
    for _ in range(2):
        check(answers(small, names, [0, 1, 2, 3, 4]), own, names, [0, 1, 2, 3, 4])
    assert 0 < small._shared._cache.used <= 0.2 * 2**20
    whole = AdapterBank(SPEC)
    whole.load_folder(folder)
    for _ in range(2):
        answers(whole, names, [0, 1, 2, 3, 4])
    assert whole.cache_counts() == (4, 4)
    used = whole._shared._cache.used
    whole.load_adapter(folder / "nola.safetensors", "nola")  # the name's former adapter leaves nothing in memory
    assert whole._shared._cache.used < used


def test_basis_seeds_that_no_adapter_has_are_forgotten(folder: Path) -> None:
    bank = AdapterBank(SPEC, cache_mib=0.05)  # no more than 12 values, of at least 4 KiB each
    for name in ("nola", "nola other seed", "nola per layer"):
        answers(bank, [bank.load_adapter(folder / f"{name}.safetensors", "one")], [0])
    gc.collect()
    shared = bank._shared
    assert len(shared._layouts) == len(shared._kinds) <= 2 and len(shared._cache._values) <= 12
    layouts = [bank._shared.read(folder / f"{name}.safetensors", "").layout for name in ("nola", "nola other seed")]
    assert layouts[0] is not layouts[1] and layouts[0].groups is layouts[1].groups


@pytest.mark.parametrize("names", [3, None, [None], [["nola"]], b"nola"])
def test_names_of_another_type(bank: AdapterBank, names: Any) -> None:
    with pytest.raises(NolaVisionError, match="adapter_names is .*give one name as a string"):
        bank.predict([torch.rand(3, 8, 8)], names)


@pytest.mark.parametrize("mib", [0, -1, float("nan"), float("inf"), "x", None])
def test_budgets_that_are_none(mib: Any) -> None:
    with pytest.raises(NolaVisionError, match="cache_mib is"):
        AdapterBank(SPEC, cache_mib=mib)


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
    assert uses["linear"] >= 2 and bank.info("lora conv").classes == tuple(f"lora conv {number}" for number in range(3))


def test_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    bank = AdapterBank(SPEC)
    first = (folder / "nola.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(first)
    (tmp_path / "broken.safetensors").write_bytes(first[:-1])
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / f"{BASE}.safetensors").write_bytes(first)
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


@pytest.mark.parametrize(
    "method, spec, reason",
    [
        (nola_vision.FullFinetune(), SPEC, "FullFinetune changes the whole backbone"),
        (
            PEFT,
            SPEC,
            "PEFT changes the whole backbone",
        ),
        (nola_vision.LoRA(), BackboneSpec("test_vit.r160_in1k", base="random"), "other weights"),
        (nola_vision.LoRA(), replace(SPEC, img_size=48), "images of 48 pixels, and the bank's backbone takes 32"),
        (nola_vision.LoRA(), replace(SPEC, int8=True), "int8"),
    ],
    ids=["full-ft", "peft", "weights", "image size", "int8"],
)
def test_files_that_cannot_share_the_backbone_are_refused_by_name(
    bank: AdapterBank, tmp_path: Path, method: methods.Method, spec: BackboneSpec, reason: str
) -> None:
    adapt(spec, method, ["a", "b"]).save(tmp_path / "other.safetensors")
    with pytest.raises(NolaVisionError, match=f"other.safetensors .*{reason}"):
        bank.load_adapter(tmp_path / "other.safetensors")


def test_the_backbone_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert backbone_of(tmp_path, tag="some.tag") == BackboneSpec("some.tag")
    with pytest.raises(NolaVisionError, match="has no adapter file"):
        backbone_of(tmp_path)
    adapt(BackboneSpec("test_vit.r160_in1k", base="random"), nola_vision.LoRA(), ["a", "b"]).save(
        tmp_path / "a.safetensors"
    )
    with pytest.raises(NolaVisionError, match="a.safetensors belongs to a backbone that is not pretrained"):
        backbone_of(tmp_path)
    (tmp_path / "b.safetensors").write_bytes((folder / "nola.safetensors").read_bytes())
    assert backbone_of(tmp_path).tag == SPEC.tag


def test_batches_that_do_not_fit_are_refused(bank: AdapterBank) -> None:
    with pytest.raises(NolaVisionError, match="1 adapter"):
        bank.logits(IMAGES[:2], [bank.adapter("nola")])
    with pytest.raises(NolaVisionError, match="2 adapter names for 1 images"):
        bank.predict([torch.zeros(3, 8, 8)], ["nola", "nola"])
    with pytest.raises(NolaVisionError, match="--device is 'gpu'"):
        AdapterBank(SPEC, "gpu")
    with pytest.raises(NolaVisionError, match="needs pretrained weights"):
        AdapterBank(replace(SPEC, base="random"))
    for name in ("", BASE, "a\nb"):
        with pytest.raises(NolaVisionError, match="the adapter's name"):
            bank.load_adapter("anything.safetensors", name)
