"""What a person reads while work goes on: plain lines, the time left, and mistakes that do not wait for torch."""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader, TensorDataset

from nola_vision.common import local_files, progress, stopwatch
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import PlainCount, duration, seconds_left
from nola_vision.runs.early_checks import check_run
from nola_vision.training import features
from nola_vision.training.progress import LiveProgress, PlainProgress

CONFIG = ["--config=quickstart.yaml"]


class Clock:
    """A clock that goes on by `step` seconds whenever it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Model(L.LightningModule):
    """One weight; each training batch takes `seconds` on the clock, each test batch six of them."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.weight = clock, seconds, torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        self.clock.now += self.seconds
        return (self.weight * 0 + 0.25).sum()

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.clock.now += 6.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_each_second_is_counted_for_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    stopwatch.start(-2.0)  # before the first look at the clock
    clock.now = 8.0
    stopwatch.started()

    @stopwatch.timed("images")
    def load() -> None:
        clock.now += 3.0

    with stopwatch.timed("training"):
        clock.now += 20.0
        load()
        stopwatch.begin("validation")
        clock.now += 5.0
        stopwatch.end()
        clock.now += 1.0
    clock.now += 4.0
    before = stopwatch.spent()
    with pytest.raises(KeyboardInterrupt), stopwatch.timed("test"):
        stopwatch.begin("validation")
        clock.now += 0.5
        raise KeyboardInterrupt
    assert before == {"start-up": 10.0, "training": 21.0, "images": 3.0, "validation": 5.0}
    assert stopwatch.spent(before) == {"validation": 0.5}
    clock.now += 1.5  # no part is left open
    assert stopwatch.summary() == "45.0, of which training 21.0, start-up 10.0, validation 5.5, images 3.0, other 5.5"


def train(tmp_path: Path, seconds: float) -> tuple[L.Trainer, Model, DataLoader]:
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_model_summary=False, callbacks=[PlainProgress(clock)],
    )  # fmt: skip
    model, images = Model(clock, seconds), DataLoader(TensorDataset(torch.zeros(10, 1)))
    trainer.fit(model, images)
    return trainer, model, images


def test_training_and_testing_say_at_most_one_line_in_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, model, images = train(tmp_path, seconds=4.0)  # 30 steps, 120 s: a line after every third step
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training starts: 3 epochs, 30 steps"
    assert lines[1] == "epoch 1 of 3, step 3 of 30, loss 0.25, about 1 min 48 s left"
    assert lines[-2] == "epoch 3 of 3, step 30 of 30, loss 0.25"
    assert lines[-1] == "training ended: 30 steps, 2 min"
    assert len(lines) == 12
    trainer.test(model, images, verbose=False)  # 60 s: a line after every second batch
    assert capsys.readouterr().out.splitlines() == [
        *(f"testing: {n} of 10 batches, about {6 * (10 - n)} s left" for n in (2, 4, 6, 8)),
        "testing: 10 of 10 batches",
    ]


def test_short_training_says_its_start_and_end_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, seconds=0.3)
    assert capsys.readouterr().out.splitlines() == [
        "training starts: 3 epochs, 30 steps",
        "training ended: 30 steps, 9 s",
    ]


class Frozen(Model):
    """A model whose features take `seconds` per batch."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds
        return images


def compute_features(progress_bar: ProgressBar, clock: Clock, tmp_path: Path) -> torch.Tensor:
    """Of 2,000 images in batches of 256, at 6 s each."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_model_summary=False, callbacks=[progress_bar],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.zeros(2000, 1), torch.zeros(2000)), 256)
    return features.compute_features(Frozen(clock, 6.0), trainer, loader)  # type: ignore[arg-type]


def test_features_say_how_many_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(compute_features(PlainProgress(clock := Clock()), clock, tmp_path)) == 2000
    assert capsys.readouterr().out.splitlines() == [
        "features: 512 of 2,000 images, about 35 s left",
        "features: 1,024 of 2,000 images, about 23 s left",
        "features: 1,536 of 2,000 images, about 11 s left",
        "features: 2,000 of 2,000 images",
    ]
    disabled = PlainProgress(clock)
    disabled.disable()
    compute_features(disabled, clock, tmp_path)
    assert not capsys.readouterr().out


def test_features_have_a_bar_in_a_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    bar = LiveProgress(console_kwargs={"file": screen, "force_terminal": True, "width": 100})
    try:
        compute_features(bar, Clock(), tmp_path)
        assert "Features" in screen.getvalue() and "2000/2000" in screen.getvalue()
        assert bar.progress is not None and not bar.progress.live.is_started
    finally:
        rich.reconfigure()


def test_reading_many_files_says_how_many_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [tmp_path / str(number) for number in range(40)]
    for path in paths:
        path.write_bytes(b"")
    monkeypatch.setattr(progress, "PlainCount", partial(PlainCount, clock=Clock(step=1.0)))
    local_files.file_digests(tmp_path, paths)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"nola-vision: reading: 10 of 40 files in {tmp_path}, about ") and len(lines) == 4
    monkeypatch.setattr(progress, "parent_process", lambda: object())  # in a worker of a sweep
    for path in paths:
        path.write_bytes(b"x")
    local_files.file_digests(tmp_path, paths)
    assert not capsys.readouterr().err


def test_counted_work_and_durations(capsys: pytest.CaptureFixture[str]) -> None:
    count = PlainCount("predicting", "images", Clock(step=1.0), progress.say_aside)
    for done in range(1, 3001):
        count.show(done, 3000)
    printed, aside = capsys.readouterr()
    lines = aside.splitlines()
    assert not printed and lines[0].startswith("nola-vision: predicting: 10 of 3,000 images, about ")
    assert len(lines) < 3000 / 8
    in_words = {0.4: "0 s", 59.4: "59 s", 59.6: "1 min", 200: "3 min 20 s", 180: "3 min", 1234: "21 min",
                3599: "60 min", 7500: "2 h 5 min"}  # fmt: skip
    assert {seconds: duration(seconds) for seconds in in_words} == in_words


@pytest.mark.parametrize(
    ("left", "finished", "workers", "expected"),
    [
        ({"nola": 4}, {}, 1, None),
        ({"nola": 4}, {"nola": []}, 1, None),
        ({"nola": 4}, {"nola": [10.0, 12.0, 100.0]}, 1, 48.0),  # the median: one slow run does not count
        ({"nola": 4}, {"nola": [12.0]}, 2, 24.0),
        ({"nola": 1}, {"nola": [12.0]}, 4, 12.0),  # a run is not divided
        ({"nola": 2, "1nn": 3}, {"nola": [10.0], "1nn": [2.0]}, 1, 26.0),
        ({"nola": 2, "1nn": 3}, {"1nn": [2.0, 4.0]}, 1, 15.0),  # a method without a finished run: of all
        ({"nola": 0}, {"nola": [12.0]}, 1, 0.0),
    ],
)
def test_the_time_left_of_a_sweep(
    left: Mapping[str, int], finished: Mapping[str, list[float]], workers: int, expected: float | None
) -> None:
    assert seconds_left(left, finished, workers) == expected


NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch takes seconds")
sys.meta_path.insert(0, NoTorch())
"""


def command(*words: str, before: str = "", after: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; its last line on stdout says which of torch and Lightning were imported."""
    code = (
        f"{before}\nimport sys; from nola_vision.cli.main import main; status = main({list(words)}); {after}\n"
        "print([m for m in ('torch', 'lightning', 'timm', 'pandas') if m in sys.modules]); sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings}, timeout=120
    )


FIT = ["fit", *CONFIG]
MISTAKES = {
    "no root": ([*FIT, "--data.dataset=folder", "--data.root=nowhere"], "the data root nowhere does not exist"),
    "no key": ([*FIT, "--dta.shots=5"], "there is no option --dta.shots: did you mean data?"),
    "no key of a method": (["sweep", *CONFIG, "--methods=nola", "--config=key.yaml"], "unknown setting 'rnk'"),
    "no adapter": (["predict", "--adapter=none.safetensors", "one.png"], "none.safetensors does not exist"),
    "no device": (["predict", "--adapter=one.png", "--device=gpu", "one.png"], "cuda"),
    "bits of export": (["export", "--adapter=one.png", "--bits=9", "--out=x"], "bits is 9: use 1 to 8"),
    "no adapter to export": (["export", "--adapter=a.safetensors", "--bits=4", "--out=x"], "a.safetensors does not"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_that_need_no_model_import_no_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.png").write_bytes(b"")
    (tmp_path / "key.yaml").write_text("methods: {nola: {init_args: {rnk: 4}}}")
    words, expected = MISTAKES[name]
    ended = command(*words)
    assert ended.returncode == 2 and ended.stdout == "[]\n"
    assert expected in ended.stderr and ended.stderr.count("\n") == 1


def config(**changes: object) -> dict[str, object]:
    method = {"class_path": "NOLA", "init_args": {"rank": 4}}
    return {"method": "nola", "model": {"method": method}, "data": {"dataset": "digits", "shots": 5}, **changes}


def test_early_checks_report_what_is_certain_and_leave_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"")
    wrong = {
        "--model.method.bits=9": "bits of NOLA is 9",
        "--model.method.init_args.bits=9": "bits of NOLA is 9",
        "--model.method.rnk=3": "unknown setting 'rnk' of NOLA: did you mean rank",
        "--data.dataset=digit": "did you mean digits",
        "--data.shots=few": "shots is 'few'",
        "--data.shots=0": "shots is 0",
        "--data.manifest=m.json": "the manifest m.json cannot be read",
        "--data.dataset=cifar10": "this data set needs a folder",
        "--model.backbone.file=no.pth": "the weights file no.pth does not exist",
        "--modl.run_seed=1": "there is no option --modl.run_seed: did you mean model",
    }
    for option, expected in wrong.items():
        for options in ([option], option.split("=")):
            with pytest.raises(NolaVisionError) as raised:
                check_run(config(), options)
            assert expected in str(raised.value), option
    with pytest.raises(NolaVisionError, match="the checkpoint no.ckpt does not exist"):
        check_run(config(), [], "no.ckpt")
    with pytest.raises(NolaVisionError, match="unknown method 'MAGIC'"):
        check_run(config(model={"method": {"class_path": "MAGIC"}}))
    with pytest.raises(NolaVisionError, match="unknown setting 'modl' of the config: did you mean model"):
        check_run(config(modl={}))
    right = [
        ["--data.shots=all"], ["--data.shots", "10"], ["--model.method.bits=4"], ["--model.method.rank", "4.0"],
        ["--model.method=LoRA", "--model.method.init_args.rank=2"], ["--model.method.class_path=my.Method"],
        ["--data.dataset=cifar10", "--data.root=nowhere", "--data.download=true"], ["--model.backbone.file=w.pth"],
        ["--data.manifest=null"], ["--trainer.callbacks+=ModelCheckpoint"], ["--print_config"], ["--threads=1"],
        ["--model={run_seed: 3}"], ["--model.method.c='2'"],
    ]  # fmt: skip
    for options in right:
        check_run(config(), options, "last")


def test_a_command_says_at_once_that_it_starts_and_its_threads_sleep_while_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "one.png").write_bytes(b"")
    shown = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "1.png").write_bytes(b"")
    for verb in ("fit", "init"):
        ended = command(verb, "photos", "--backbone=resnet10t.c3_in1k", before=NO_TORCH)
        first = "nola-vision: the check of resnet10t.c3_in1k starts: importing PyTorch"
        assert ended.stderr.splitlines()[0] == first
    export = ["export", "--adapter=one.png", "--bits=4", "--out=x"]
    ended = command(*export, before=NO_TORCH, after=shown)
    assert ended.stderr.splitlines()[0] == "nola-vision: export starts: importing PyTorch"
    assert ended.stdout.splitlines()[0] == "passive 0"
    assert command("--version", after=shown, GOMP_SPINCOUNT="7").stdout.splitlines()[1] == "None 7"  # the user's own
