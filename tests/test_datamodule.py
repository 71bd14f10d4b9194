"""The data module and the transforms: what a batch is, and that nothing but the seeds decides it."""

import dataclasses
import gc
import json
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.transforms import v2

from nola_vision.common import local_files, process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.data import integrity, sources
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.datasets.digits import Digits
from nola_vision.data.folds import folds
from nola_vision.data.loaders import EpochSampler
from nola_vision.data.sampling import draw, validation_pool
from nola_vision.data.sources import ImageSource
from nola_vision.images.augment import ColorJitter, GaussianBlur, PlanarFloat
from nola_vision.images.input_config import InputConfig
from nola_vision.images.transforms import Reduce, eval_transform, reduced, train_transform
from nola_vision.runs.parsing import has_validation_images

CONFIG = InputConfig(size=10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.9)
ORDER_SEED_0 = [5, 7, 2, 8, 9, 6, 3, 4, 1, 0]
SEEDS_SEED_0 = [3659013950861718008, 8365302289374977613]


def module(**options: object) -> KShotDataModule:
    return KShotDataModule(CONFIG, **{"shots": 2, "batch_size": 8, **options})  # type: ignore[arg-type]


def epoch_of(data: KShotDataModule, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def same(left: list[tuple[torch.Tensor, torch.Tensor]], right: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits of digits that were opened, in order."""
    splits: list[str] = []
    original = Digits.open
    monkeypatch.setattr(
        Digits, "open", lambda self, root, split, *rest: splits.append(split) or original(self, root, split, *rest)
    )
    return splits


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the images that were decoded, in order."""
    indices: list[int] = []
    original = ImageSource.image
    monkeypatch.setattr(ImageSource, "image", lambda self, i, *kept: indices.append(i) or original(self, i, *kept))
    return indices


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """Two classes of four images of different sizes: too few for a validation pool."""
    for split in ("train", "test"):
        for label, name in enumerate(("été", "an ant")):
            for number in range(4):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9 + number, 12 + label), (50 * number, 99, 9 * (split == "test"))).save(path)
    return tmp_path


def test_batches_have_the_promised_shapes_and_keep_the_last() -> None:
    data = module()
    batches = epoch_of(data, 0)
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert all(images.shape[1:] == (3, 10, 10) and images.dtype == torch.float32 for images, _ in batches)
    assert all(type(images) is torch.Tensor and labels.dtype == torch.int64 for images, labels in batches)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted([*range(10)] * 2)
    assert [len(labels) for _, labels in module(batch_size=64).train_dataloader()] == [20]


def test_loaders_serve_the_right_images() -> None:
    data, source = module(), Digits().open(None, "train")
    transform = eval_transform(CONFIG)
    for loader, indices in (
        (data.reference_dataloader(), draw(source.labels, 2, 0)),
        (data.val_dataloader(), validation_pool(source.labels)),
    ):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.tolist() == source.labels[indices].tolist()
        assert torch.equal(images, torch.stack([transform(source.image(int(index))) for index in indices]))
    test = Digits().open(None, "test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    assert labels.tolist() == test.labels.tolist()
    assert torch.equal(images[-1], transform(test.image(898)))


def test_classes_need_no_setup(opened: list[str], small_tree: Path) -> None:
    data = module()
    assert data.num_classes == 10 and data.class_names == tuple("0123456789")
    assert module(dataset="folder", root=str(small_tree)).class_names == ("an ant", "été")
    assert opened == []


def test_the_test_set_is_opened_by_the_test_stage_only(opened: list[str]) -> None:
    data = module()
    for stage in ("fit", "validate", "predict", "fit"):
        data.setup(stage)
    data.train_dataloader(), data.val_dataloader(), data.reference_dataloader()
    assert opened == ["train"]
    assert data.describe()["counts"] == {"train": 20, "validation": 177}
    data.setup("test")
    data.test_dataloader()
    assert opened == ["train", "test"]
    assert data.describe()["counts"] == {"train": 20, "validation": 177, "test": 899}
    only = module()
    only.setup("test")
    assert opened == ["train", "test", "test"]


@pytest.mark.parametrize("download", [False, True])
def test_data_are_prepared_once_and_only_when_asked(download: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(Digits, "open", lambda self, root, split, download=False: calls.append((root, split, download)))
    module(root="here", download=download).prepare_data()
    assert calls == [("here", "train", True)] * download


def test_training_images_are_decoded_once(decoded: list[int]) -> None:
    data = module()
    data.setup("fit")
    assert sorted(decoded) == sorted(data.describe()["draw"])
    decoded.clear()
    epoch_of(data, 0), epoch_of(data, 1), list(data.reference_dataloader())
    assert decoded == []


@pytest.mark.parametrize(
    ("limit", "train", "pool", "test"),
    [  # an image takes 192 bytes decoded, 300 resized and 246 as a file; the pool has what the training images leave
        (0, "......", "........", ""),
        (492, "ddff..", "........", ""),
        (768, "ddddff", "........", ""),
        (6 * 192 - 1, "dddddf", "........", ""),
        (6 * 192 + 492, "dddddd", "dff.....", ""),
        (6 * 192 + 7 * 300, "dddddd", "dddddddf", ""),
        (6 * 192 + 8 * 300 + 600, "dddddd", "dddddddd", "ddff"),
        (10**9, "dddddd", "dddddddd", 40 * "d"),
    ],
)
def test_memory_limit(limit: int, train: str, pool: str, test: str, tmp_path: Path) -> None:
    """Which images are kept decoded (d), which as files (f) and which not at all (.)."""
    for index in range(80):
        path = tmp_path / ("test", "train")[index % 2] / ("ant", "bee")[index // 2 % 2] / f"{index:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 99, 0)).save(path)
    data, reference = (module(dataset="folder", root=str(tmp_path), shots=3) for _ in range(2))
    data.memory_limit_mib = limit / 2**20  # type: ignore[assignment]
    for kept, expected in (
        (data._training_images, train),
        (data._pool._kept, pool),
        (data._test_images._kept, test),
    ):
        assert "".join("f" if isinstance(image, bytes) else "d" for image in kept) == expected.rstrip(".")
        decoded = [image for image in kept if isinstance(image, torch.Tensor)]
        assert sum(image.untyped_storage().nbytes() for image in decoded) <= limit  # no crop keeps the whole image
    assert same(epoch_of(data, 0), epoch_of(reference, 0))
    assert same(list(data.val_dataloader()), list(reference.val_dataloader()))
    transform, source = eval_transform(CONFIG), data._test_source  # the pixels are those that were never kept
    images = torch.cat([batch for batch, _ in data.test_dataloader()])
    assert torch.equal(images, torch.stack([transform(source.image(index)) for index in range(40)]))


@pytest.mark.parametrize("keeps", [True, False])
def test_evaluated_images_are_decoded_once_per_process(
    keeps: bool, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(80):
        path = tmp_path / ("test", "train")[index % 2] / ("ant", "bee")[index // 2 % 2] / f"{index:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (index, 99, 0)).save(path)
    monkeypatch.setattr(process_cache, "_kept", {} if keeps else None)
    checked, decodes = [], integrity._decodes
    monkeypatch.setattr(integrity, "_decodes", lambda path: checked.append(path) or decodes(path))

    def run(*evaluations: str, split_seed: int = 0) -> tuple[int, int]:
        """What a run decodes, and what only its check does."""
        decoded.clear(), checked.clear()
        data = module(dataset="folder", root=str(tmp_path), split_seed=split_seed)
        data.evaluations = evaluations
        for _ in range(2):
            data.prepare_data(), data.setup("fit")
            if "fit" in evaluations or "validate" in evaluations:
                assert len(list(data.val_dataloader())) == 1
            if "test" in evaluations:
                assert len(list(data.test_dataloader())) == 1
        return len(decoded), len(checked)

    assert run("test") == (4 + 40, 0)  # no pass over the pool: its images are not touched
    assert run("validate", "test") == ((8, 0) if keeps else (4 + 8 + 40, 0))
    assert run("fit", "validate", "test", split_seed=1) == ((4, 0) if keeps else (4 + 8 + 40, 0))
    assert run("validate", split_seed=2) == ((4, 40) if keeps else (4 + 8, 40))  # a search checks the test images
    if keeps:  # a run with less memory for them
        data = module(dataset="folder", root=str(tmp_path))
        data.evaluations, data.memory_limit_mib = ("test",), 2 * 3 * CONFIG.size**2 / 2**20
        images = torch.cat([images for images, _ in data.test_dataloader()])
        kept = process_cache.last("test images", process_cache._kept["test images"][0], list)
        assert len(kept) == 2 and len(images) == 40


@pytest.mark.parametrize("limit", [10**9, 9 * 12 * 3 * 2 + 400], ids=["decoded", "as files"])
def test_a_second_epoch_opens_no_file(limit: int, small_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(dataset="folder", root=str(small_tree), shots=3)
    data.memory_limit_mib = limit / 2**20  # type: ignore[assignment]
    read, original = [], sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path, most: read.append(path) or original(path, most))
    first = epoch_of(data, 0)
    assert {path.parent.name for path in read} == {"été", "an ant"}
    read.clear()
    assert same(epoch_of(data, 0), first) and not same(epoch_of(data, 1), first) and not read


def test_run_seed_and_epoch_decide_the_batches() -> None:
    first = epoch_of(module(), 3)
    assert same(first, epoch_of(module(), 3))
    order = [torch.cat([labels for _, labels in epoch]).tolist() for epoch in (first, epoch_of(module(), 4))]
    assert order[0] != order[1]
    other = module(run_seed=1)
    assert other.describe()["draw"] == module().describe()["draw"]
    assert not same(first, epoch_of(other, 3))
    assert module(split_seed=1).describe()["draw"] != module().describe()["draw"]
    orders = {
        tuple(torch.cat([labels for _, labels in epoch_of(module(augmentation="none"), e)]).tolist()) for e in range(9)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("augmentation", ["light", "released"])
def test_augmentation_differs_between_epochs_and_images(augmentation: str) -> None:
    data = module(augmentation=augmentation, shots=1, batch_size=10)
    (first, labels), (second, others) = epoch_of(data, 0)[0], epoch_of(data, 1)[0]
    assert not torch.equal(first[labels.argsort()], second[others.argsort()])
    data._training_images[:] = [data._training_images[0]] * 10  # ten times one image
    (images, _), *_ = epoch_of(data, 0)
    assert len({image.numpy().tobytes() for image in images}) > 5  # digits are small: some crops coincide


@pytest.mark.parametrize("augmentation", ["none", "light", "released"])
def test_global_random_state_is_neither_read_nor_set(augmentation: str) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        data = module(augmentation=augmentation)
        data.setup("fit")
        results.append([*epoch_of(data, 0), *data.val_dataloader(), *data.reference_dataloader()])
        assert torch.equal(before[0], torch.get_rng_state())
        assert (str(np.random.get_state()), random.getstate()) == before[1:]
    assert same(*results)


def test_workers_change_nothing() -> None:
    assert same(
        epoch_of(module(augmentation="released"), 1), epoch_of(module(augmentation="released", num_workers=2), 1)
    )


def test_the_order_never_changes_and_is_fast() -> None:
    def order(length: int, run_seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(length, run_seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert [position for position, _ in order(10, 0, 0)] == ORDER_SEED_0
    assert [seed for _, seed in order(2, 0, 0)] == SEEDS_SEED_0
    assert len({tuple(order(10, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    clock = time.process_time()
    whole = order(120_000, 3, 5)
    assert time.process_time() - clock < 0.4  # 0.05 s; hashing each position takes 0.9 s
    assert sorted(position for position, _ in whole) == [*range(120_000)]
    assert len({seed for _, seed in whole}) == 120_000 and max(seed for _, seed in whole) < 2**63


def test_memory_is_pinned_for_a_gpu_only() -> None:
    data = module()
    assert not data.reference_dataloader().pin_memory
    for kind in ("cpu", "cuda"):
        device = SimpleNamespace(root_device=torch.device(kind))
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=device)  # type: ignore[assignment]
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            assert loader.pin_memory is (kind == "cuda")  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_sentence_whatever_reads_it(workers: int, small_tree: Path) -> None:
    data = module(dataset="folder", root=str(small_tree), num_workers=workers, memory_limit_mib=0, shots=4)
    data.setup("fit"), data.setup("test")
    for split, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
        bad = small_tree / split / "été/2.png"
        bad.write_bytes(b"no image")
        with pytest.raises(NolaVisionError) as caught:
            list(loader)
        reason = "not an image, or of an unsupported format"
        assert str(caught.value) == f"cannot decode the image {bad} ({reason}): fix, replace or remove it"
        del caught  # it holds the workers, which would be waited for later, while the threads of another test run
        gc.collect()


def test_bad_images_of_later_stages_are_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "RACY_NS", -(10**12))
    for index in range(80):
        path = tmp_path / ("test", "train")[index % 2] / ("ant", "bee")[index // 2 % 2] / f"{index:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 99, 0)).save(path)

    def prepared(**options: object) -> KShotDataModule:
        data = module(dataset="folder", root=str(tmp_path), **options)
        data.prepare_data()
        return data

    data = prepared()
    source = data._train_set[0]
    bad = [source.paths[data._pool_set[1][-1]], tmp_path / "test/bee/78.bmp"]
    assert data.describe()["counts"] == {"train": 4, "validation": 8}  # the test set is not open
    read, decodes = [], integrity._decodes
    monkeypatch.setattr(integrity, "_decodes", lambda path: read.append(path) or decodes(path))
    prepared()
    assert read == []  # each is decoded once
    for path in bad:
        whole = path.read_bytes()
        path.write_bytes(whole[:60])
        with pytest.raises(
            NolaVisionError, match=rf"cannot decode the image {path} \(image file is truncated.*\): fix"
        ):
            prepared()
        assert read == [path]
        if path.parts[-3] == "test":
            prepared(test_limit=2)  # which does not use it
        path.write_bytes(whole)
        prepared()
        read.clear()


class Recorder(L.LightningModule):
    """Records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.validated = 0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch)
        return (self.weight - 1).square().sum()

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: KShotDataModule, folder: Path, epochs: int, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=resume)
    return recorder


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit(module(), tmp_path / "whole", 3)
    fit(module(), tmp_path / "part", 2)
    torch.manual_seed(99)
    resumed = fit(module(), tmp_path / "part", 3, tmp_path / "part/last.ckpt")
    assert sorted(whole.seen) == [0, 1, 2] and sorted(resumed.seen) == [2]
    assert same(whole.seen[2], resumed.seen[2]) and not same(whole.seen[1], whole.seen[2])
    assert same(whole.seen[2], epoch_of(module(), 2))
    assert whole.validated == 3


def flat(root: Path, *counts: int) -> Path:
    """A folder of photos: so many images per class, no test split."""
    for label, count in enumerate(counts):
        for number in range(count):
            path = root / f"class {label}" / f"{number:02d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 20 * label, 0)).save(path)
    return root


def test_without_a_test_split_all_images_train_or_a_fold_is_tested(tmp_path: Path, decoded: list[int]) -> None:
    root = flat(tmp_path / "photos", 25, 7, 4, 1)
    (root / "class 1/copy.bmp").write_bytes((root / "class 1/00.bmp").read_bytes())
    labels = np.repeat(np.arange(4), [25, 8, 4, 1])
    make = partial(module, dataset="folder", root=str(root), shots="all")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(process_cache, "_kept", None)
    process_cache.keep()
    try:
        final = make()
        final.prepare_data(), final.setup("fit"), final.setup("test")
        assert not final.has_test and final.number_of_folds == 5 and final.untested_classes == ["class 3"]
        assert final.test_name is None and final.test_dataloader() == [] == final.val_dataloader()
        assert len(final.test_indices) == 0 and final.majority_share == 25 / 37
        described = final.describe()
        assert json.loads(json.dumps(described)) == described
        assert described["counts"] == {"train": 38, "validation": 0, "test": 0} and described["draw"] is None
        expected = {"majority_share": 25 / 37, "test_name": None, "folds": 5, "untested_classes": ["class 3"]}
        assert {key: described[key] for key in expected} == expected
        assert not final.warnings  # copies of one class are no mistake, and no pool is missed
        decodings = len(decoded)

        expected_folds, tested = folds(labels, final.groups, 5), []
        for number, (train, test) in enumerate(expected_folds):
            data = make(fold=number, split_seed=5)
            data.setup("fit"), data.setup("test")
            assert data.test_name == f"fold {number + 1} of 5" and data.test_indices.tolist() == test.tolist()
            assert data.describe()["counts"] == {"train": len(train), "validation": 0, "test": len(test)}
            images, answers = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
            source = data._open("train")
            assert answers.tolist() == labels[test].tolist()
            assert torch.equal(images[0], eval_transform(CONFIG)(source.image(int(test[0]))))
            decodings += 1
            assert sum(len(batch) for _, batch in epoch_of(data, 0)) == len(train)
            tested += test.tolist()
            few = make(fold=number, split_seed=5, shots=5)
            drawn = few._train_set[1].tolist()
            assert set(drawn) <= set(train.tolist())
            assert np.bincount(labels[drawn]).tolist() == [5, 5, np.sum(labels[train] == 2), 1]
            assert few.describe()["draw"] == drawn
        assert sorted(tested) == [*range(37)]
        assert len(decoded) == decodings  # all folds share what is decoded once
    finally:
        monkeypatch.undo()
    assert make(split_seed=1).groups[25] == make().groups[32]  # the copy is the last of class 1
    assert make(fold=0, split_seed=1).test_indices.tolist() != make(fold=0).test_indices.tolist()


def test_settings_are_chosen_on_images_held_out_of_the_training_part(tmp_path: Path) -> None:
    make = partial(module, dataset="folder", root=str(flat(tmp_path, 25, 7, 1)), shots="all", hold_out=True)
    data = make(fold=1)
    (train, test), groups = folds(data._open("train").labels, data.groups, 0)[1], data.groups
    pool = data._pool_set[1]
    assert sorted([*data._train_set[1], *pool]) == train.tolist() and 0 < len(pool) < len(train) / 2
    assert data.test_indices.tolist() == test.tolist()
    images = torch.cat([images for images, _ in data.val_dataloader()])
    assert torch.equal(images[0], eval_transform(CONFIG)(data._open("train").image(int(pool[0]))))
    everything = make()
    assert sorted([*everything._train_set[1], *everything._pool_set[1]]) == [*range(33)]
    assert len(everything.test_indices) == 0 and everything.describe()["counts"]["validation"] == 7
    few = make(shots=2)
    assert np.bincount(few._open("train").labels[few._train_set[1]]).tolist() == [2, 2, 1]
    assert few._pool_set[1].tolist() == everything._pool_set[1].tolist() and len(groups) == 33


def test_images_next_to_the_test_set_are_the_pool(tmp_path: Path) -> None:
    for split, count in (("train", 25), ("val", 3), ("test", 2)):
        flat(tmp_path / split, count, count)
    data = module(dataset="folder", root=str(tmp_path), shots="all")
    data.prepare_data(), data.setup("test")
    assert data.describe()["counts"] == {"train": 50, "validation": 6, "test": 4} and data.test_name == "test"
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 0, 1, 1, 1]
    assert data.majority_share == data.describe()["majority_share"] == 0.5 and data.number_of_folds is None
    assert len(data.warnings) == 3 and "in both train and test: 4, such as" in data.warnings[1]
    assert module().describe()["majority_share"] is None  # of a test set that is not open
    (tmp_path / "val/class 1/02.bmp").write_bytes(b"BM")
    with pytest.raises(NolaVisionError, match=r"cannot decode the image .*val/class 1/02\.bmp"):
        module(dataset="folder", root=str(tmp_path)).prepare_data()


def test_settings_that_do_not_fit_the_splits_are_refused(tmp_path: Path) -> None:
    make = partial(module, dataset="folder", root=str(flat(tmp_path, 6, 3, 1)), shots=1)
    for data, expected in (
        (make(fold=5), "data.fold is 5, but there are 5 folds, counted from 0"),
        (make(fold=-1), "data.fold is -1"),
        (make(test_limit=5), "data.test_limit requires test images, which this data set lacks"),
        (make(fold=0, manifest="m.json"), "data.fold draws from all images, and data.manifest names some"),
        (module(fold=0), "data.fold is for data without test images"),
        (module(hold_out=True), "data.hold_out is for data without test images"),
    ):
        for stage in ("fit", "test"):
            with pytest.raises(NolaVisionError, match=expected):
                data.setup(stage)
    with pytest.raises(NolaVisionError, match="2 shots need that many images in every class, but 'class 2' has 1"):
        make(shots=2).setup("fit")
    (tmp_path / "class 1/02.bmp").write_bytes(b"BM")
    with pytest.raises(NolaVisionError, match=r"cannot decode the image .*class 1/02\.bmp"):
        make().prepare_data()  # also where this image is not drawn: a fold tests it


def test_mistakes_in_a_users_images_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = flat(tmp_path / "photos", 3, 3)
    (root / "class 1/same.bmp").write_bytes((root / "class 0/01.bmp").read_bytes())
    for name in ("class 0/notes.txt", "class 1/more.txt", "class 1/Thumbs.db", "loose.png", "class 0/.DS_Store"):
        (root / name).write_bytes(b"")
    (root / "empty").mkdir()
    expected = [
        "files that are not read: 2 .txt, 1 .db",
        f"folders in {root} that are not read, without an image: empty/",
        f"images directly in {root}, in no class folder, that are not read: loose.png",
        "images that are in two classes, trained on and never tested; delete the wrong ones: 1, such as "
        f"{root}/class 0/01.bmp (class 0) and {root}/class 1/same.bmp"
        " (class 1)",
    ]
    for _ in range(2):
        data = module(dataset="folder", root=str(root), shots="all")
        data.prepare_data()
        assert data.warnings == expected
    assert [record.getMessage() for record in caplog.records if record.name.startswith("nola")] == expected


@pytest.mark.filterwarnings("ignore")
def test_small_classes_skip_validation_and_say_so(
    small_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = module(dataset="folder", root=str(small_tree))
    assert fit(data, tmp_path / "run", 1).validated == 0
    assert data.val_dataloader() == []
    said = [record.getMessage() for record in caplog.records if record.name.startswith("nola_vision")]
    expected = "no images are held out for validation: every class has fewer than 20 training images"
    assert said == data.warnings == [expected]


def test_test_limit_is_balanced_and_refused_before_training() -> None:
    data = module(test_limit=30)
    (_, labels), *_ = data.test_dataloader()
    assert np.bincount(labels).tolist() == [3] * 10
    with pytest.raises(NolaVisionError, match="test_limit is 9, but there are 10 classes"):
        module(test_limit=9).setup("fit")


def test_that_there_is_a_pool_is_known_without_an_image(decoded: list[int]) -> None:
    config = {"model": {"backbone": {"tag": "test_vit"}}, "data": {"dataset": "digits", "shots": "all"}}
    assert has_validation_images(config) and decoded == []


def test_describe_is_plain(small_tree: Path) -> None:
    described = module().describe()
    assert json.loads(json.dumps(described)) == described
    assert described["transform"] == {
        "size": 10, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": "center",
    }  # fmt: skip
    assert described["draw"] == draw(Digits().open(None, "train").labels, 2, 0).tolist()
    everything = module(dataset="folder", root=str(small_tree), shots="all").describe()
    assert everything["draw"] is None and everything["counts"] == {"train": 8, "validation": 0}


def test_mistakes_are_said(small_tree: Path) -> None:
    with pytest.raises(NolaVisionError, match="no data set 'digit': did you mean digits"):
        module(dataset="digit")
    with pytest.raises(NolaVisionError, match="batch_size is 0, but it must be at least 1"):
        module(batch_size=0)
    with pytest.raises(NolaVisionError, match="'an ant' has 4, 'été' has 4: use 4 shots or fewer"):
        module(dataset="folder", root=str(small_tree), shots=5).setup("fit")
    (small_tree / "train/été/2.png").write_bytes(b"")
    with pytest.raises(NolaVisionError, match=r"cannot decode the image .*train/été/2\.png"):
        module(dataset="folder", root=str(small_tree), shots=4).setup("fit")
    with pytest.raises(NolaVisionError, match=r"unknown augmentation 'heavy': use one of none, light, released"):
        module(augmentation="heavy")
    for name, what in (("none", "flips nothing"), ("released", "always flips")):
        with pytest.raises(NolaVisionError, match=f"'{name}' {what}: give --data.flip false"):
            module(augmentation=name, flip=True)
    with pytest.raises(NolaVisionError, match=r"needs a folder: pass --data.root"):
        module(dataset="cifar10")
    with pytest.raises(NolaVisionError, match="crop mode 'border'"):
        eval_transform(InputConfig(8, (0, 0, 0), (1, 1, 1), "bicubic", 1.0, "border"))
    with pytest.raises(NolaVisionError, match="interpolation 'lanczos'"):
        eval_transform(InputConfig(8, (0, 0, 0), (1, 1, 1), "lanczos", 1.0))


def test_the_command_line_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KShotDataModule, "data")
    for text, shots in (("all", "all"), ("7", 7)):
        image = [f"--data.input={json.dumps(dataclasses.asdict(CONFIG))}"]
        data = parser.instantiate(parser.parse_args([*image, "--data.shots", text])).data
        assert (data.shots, data.input, data.dataset) == (shots, CONFIG, "digits")


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("width", "height"), [(53, 37), (29, 64), (31, 31)])
def test_eval_transform_is_timms(width: int, height: int, crop_mode: str) -> None:
    from timm.data import create_transform

    config = InputConfig(23, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", crop_pct=0.9, crop_mode=crop_mode)
    image = Image.fromarray(np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8))
    theirs = create_transform(
        config.size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=crop_mode,
    )(image)
    ours = eval_transform(config)(image)
    # Pillow and torch round separately: at most one level apart, where no overshoot is cut off.
    assert ours.shape == theirs.shape == (3, 23, 23)
    assert ((ours - theirs).abs() * torch.tensor(config.std)[:, None, None]).max() <= 1.01 / 255


@pytest.mark.parametrize("limit", [0, 2048])
def test_large_images_are_reduced_alike_in_training_testing_and_prediction(limit: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = [(79, 200), (80, 90), (250, 131)]  # shorter sides of 7.9, 8 and 13.1 times the backbone's 10: k = 1, 2, 3
    arrays = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for label in "ab":
        for number, array in enumerate(arrays):
            path = tmp_path / label / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(array).save(path)
    data = module(dataset="folder", root=str(tmp_path), shots="all", memory_limit_mib=limit, augmentation="none")
    rows = [
        torch.from_numpy(array).permute(2, 0, 1).double().unflatten(1, (-1, k)).unflatten(3, (-1, k)).mean((2, 4))
        for array, k in zip((arrays[0], arrays[1][:80, :90], arrays[2][:249, :129]), (1, 2, 3), strict=True)
    ]  # the mean of k x k pixels, without the rest at the right and at the bottom
    for array, means, k in zip(arrays, rows, (1, 2, 3), strict=True):
        small = np.asarray(reduced(Image.fromarray(array), 10))
        assert small.shape[:2] == tuple(-(-side // k) for side in array.shape[:2])
        found = torch.from_numpy(small.copy()).permute(2, 0, 1)[:, : means.shape[1], : means.shape[2]]
        assert (found - means).abs().max() <= 0.6  # Pillow rounds a little off
        assert reduced(again := Image.fromarray(small), 10) is again
    images = next(iter(data.reference_dataloader()))[0][:3]
    trained, numbers = data._train_set[0], data.train_indices[:3].tolist()
    assert sum(isinstance(kept, torch.Tensor) for kept in data._training_images) == (6 if limit else 0)
    predicted = torch.stack([eval_transform(CONFIG)(trained.image(number)) for number in numbers])  # as `batches` does
    assert torch.equal(images, predicted)
    tensors = [torch.from_numpy(np.asarray(trained.image(number)).copy()).permute(2, 0, 1) for number in numbers]
    assert torch.equal(images, torch.stack([eval_transform(CONFIG)(tensor) for tensor in tensors]))


def test_normalisation_by_hand() -> None:
    flat = eval_transform(CONFIG)(Image.new("RGB", (12, 15), (255, 51, 0)))
    assert type(flat) is torch.Tensor and flat.dtype == torch.float32
    expected = torch.tensor([(1 - 0.5) / 0.2, (0.2 - 0.4) / 0.3, (0 - 0.3) / 0.4])
    assert torch.allclose(flat, expected[:, None, None].expand(3, 10, 10), atol=1e-6)


def described(step: v2.Transform) -> tuple[type, dict[str, object], list[object]]:
    """A step's class, its settings and the steps in it."""
    settings = {key: value for key, value in vars(step).items() if not key.startswith("_") and key != "transforms"}
    return type(step), settings, [described(inner) for inner in getattr(step, "transforms", [])]


BICUBIC = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
LIGHT_CROP, FLIP = v2.RandomResizedCrop(10, scale=(0.6, 1.0), **BICUBIC), v2.RandomHorizontalFlip(0.5)


@pytest.mark.parametrize(
    ("augmentation", "flip", "steps"),
    [
        ("none", False, [v2.Resize(11, **BICUBIC), v2.CenterCrop(10), PlanarFloat()]),
        ("light", False, [LIGHT_CROP, PlanarFloat()]),
        ("light", True, [LIGHT_CROP, FLIP, PlanarFloat()]),
        (
            "released",
            False,
            [
                v2.RandomResizedCrop(10, scale=(0.2, 1.0), **BICUBIC),
                PlanarFloat(),
                v2.RandomApply([ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
                FLIP,
            ],
        ),
    ],
)
def test_each_augmentation_is_the_promised_steps(augmentation: str, flip: bool, steps: list[v2.Transform]) -> None:
    expected = v2.Compose([Reduce(10), v2.ToImage(), *steps, v2.Normalize(CONFIG.mean, CONFIG.std)])
    assert described(train_transform(CONFIG, augmentation, flip)) == described(expected)  # type: ignore[arg-type]


def test_only_flip_flips() -> None:
    """A picture dark on the left and bright on the right shows which transforms turn it round."""
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 1, 3)))

    def turned(augmentation: str, flip: bool) -> int:
        transform = train_transform(CONFIG, augmentation, flip)
        images = [transform(ramp).mean(dim=(0, 1)) for _ in range(40)]
        return sum(bool(image[-1] < image[0]) for image in images)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        assert turned("none", False) == 0 and turned("light", False) == 0
        assert 8 < turned("light", True) < 32
        assert 8 < turned("released", False) < 32
