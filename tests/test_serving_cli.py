"""`nola-vision serve` as a user starts it: its options, its errors, and what signals do."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from fake_bank import GOOD, expected, png
from nola_vision import load_adapter
from nola_vision.cli.main import main
from test_adapter_bank import SPEC, save

# the verb with a bank that needs no backbone
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import fake_bank
from nola_vision.cli.main import main
from nola_vision.serving import bank, files
made = fake_bank.FakeBank()
made.seconds = 0.01
bank.AdapterBank, files.backbone_of = lambda *settings: made, lambda folder, weights, tag: "fake.backbone"
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("birds", "cats"):
        (folder / f"{name}.safetensors").write_bytes(GOOD)
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "--adapters"),
        (["--adapters=none"], "none does not exist: give the folder"),
        (["--adapters=file"], "file is not a folder"),
        (["--adapters=.", "--port=70000"], "--port is 70000"),
        (["--adapters=.", "--host=0.0.0.0"], "--host 0.0.0.0 needs an API key: set the environment variable NOLA_V"),
        (["--adapters=.", "--host=::"], "needs an API key"),
        (["--adapters=.", "--allow-changes"], "--allow-changes needs an API key"),
        (["--adapters=.", "--host=no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--adapters=.", "--device=gpu"], "--device is 'gpu'"),
        (["--adapters=.", "--max-batch-size=0"], "max_batch_size is 0"),
        (["--adapters=.", "--weights=none.safetensors"], "none.safetensors does not exist"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOLA_VISION_API_KEY", raising=False)
    (tmp_path / "file").touch()
    assert main(["serve", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and reason in printed.err


@pytest.mark.parametrize("key", ["short", "a key with spaces in it", "sixteen-letters-\xe9"])
def test_keys_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.setenv("NOLA_VISION_API_KEY", key)
    assert main(["serve", f"--adapters={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "16 or more" in error and key not in error


def test_a_port_in_use_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", f"--adapters={tmp_path}", f"--port={port}"]) == 2
    assert re.search(f"127.0.0.1 port {port} cannot be used .*: give another", capsys.readouterr().err)
    monkeypatch.setattr("nola_vision.cli.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve", f"--adapters={tmp_path}"]) == 2
    assert "needs the package uvicorn: pip install 'nola-vision[serve]'" in capsys.readouterr().err


Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts the service in a process, and returns it and its URL once it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), "serve", f"--adapters={folder}", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"(http://\S+) serves 2 adapters for fake.backbone\n", line)
        assert found, (line, process.communicate(timeout=5))
        return process, found[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_idle_it_takes_no_time_and_a_signal_ends_it_after_what_it_took(start: Start) -> None:
    process, url = start("--port=0", "--max-delay-ms=500")
    answers: list[httpx.Response] = []
    client = httpx.Client(base_url=url, timeout=20)
    client.get("/v2/health/live")

    def seconds() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    before = seconds()
    time.sleep(4)
    assert seconds() - before < 0.1
    thread = threading.Thread(target=lambda: answers.append(client.post("/models/birds", content=png(40))))
    thread.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].status_code == 200
    ended(process)


def ended(process: subprocess.Popen[str]) -> None:
    """The process ends with status 0, and has printed nothing more than that it imports PyTorch."""
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "" and len(err.splitlines()) <= 1


@pytest.mark.slow
def test_real_adapters(tmp_path: Path) -> None:
    for name in ("nola", "lora parts"):
        save(tmp_path / f"{name}.safetensors", name)
    image = Path(__file__).parent.parent / "docs" / "quickstart.png"
    command = [sys.executable, "-m", "nola_vision.cli.main", "serve", f"--adapters={tmp_path}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url, _, rest = line.partition(" ")
            assert rest == f"serves 2 adapters for {SPEC.tag}\n"
            answer = httpx.post(f"{url}/models/nola", content=image.read_bytes()).json()
        finally:
            process.terminate()
    own = load_adapter(tmp_path / "nola.safetensors").predict(image, top_k=5)
    assert [(one["label"], one["score"]) for one in answer] == [(a, pytest.approx(b, abs=1e-5)) for a, b in own]
    assert process.returncode == 0


@pytest.mark.slow
def test_another_host_with_a_key(start: Start) -> None:
    key = "0123456789abcdef"
    _, url = start("--host=0.0.0.0", "--port=0", "--allow-changes", NOLA_VISION_API_KEY=key)
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.put(f"{url}/v1/adapters/new", content=GOOD, headers=headers).status_code == 201
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["total"] == 4


@pytest.mark.slow
def test_killed_under_load_it_serves_again(start: Start, folder: Path) -> None:
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    process, url = start("--port=0")
    enough = threading.Event()
    answered = []

    def load(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(timeout=10) as client:
            while not enough.is_set():
                name, level = draw.choice(["birds", "cats"]), draw.randrange(256)
                try:
                    answer = client.post(f"{url}/models/{name}", content=png(level))
                except httpx.TransportError:
                    time.sleep(0.05)
                    continue
                best = expected(name, level)[0]
                assert answer.json()[0] == {"label": best["label"], "score": pytest.approx(best["score"], rel=1e-4)}
                answered.append(time.monotonic())

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while len(answered) < 50:
        time.sleep(0.05)
    process.kill()
    process.wait()
    count = len(answered)
    process, _ = start(f"--port={url.rpartition(':')[2]}")  # the same port at once
    end = time.monotonic() + 20
    while len(answered) < count + 50 and time.monotonic() < end:
        time.sleep(0.05)
    enough.set()
    for thread in threads:
        thread.join()
    assert len(answered) >= count + 50
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    process.send_signal(signal.SIGINT)
    ended(process)
