"""What a person sees while weights are downloaded, against a stand-in for the Hugging Face Hub on this machine."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.backbones.spec import BackboneSpec

TAG = "test_vit.r160_in1k"


class Hub(ThreadingHTTPServer):
    """Answers for `timm/TAG`'s model.safetensors as the hub does; counts the requests; can fall silent."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests, self.silent = content, [], threading.Event()
        self.leave = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        if hub.silent.is_set():
            hub.leave.wait(60)
            return
        found = self.path == f"/timm/{TAG}/resolve/main/model.safetensors"
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(hub.content) if found else 0))
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body and found:
            self.wfile.write(hub.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", num_classes=1000).state_dict()
    server = Hub(safetensors.torch.save(weights, {"format": "pt"}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.leave.set()
    server.shutdown()
    server.server_close()


def test_a_download_is_one_line_and_happens_once(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = create_backbone(TAG)
        place = f"127.0.0.1:{hub.server_port}/timm/{TAG}"
        size = f"{len(hub.content) / 1e6:.0f}"
        assert caplog.messages == [f"downloading {TAG} from {place} ({size} MB, once; kept in {tmp_path / 'hub'})"]
        fetched = f"GET /timm/{TAG}/resolve/main/model.safetensors"
        assert hub.requests.count(fetched) == 1
        caplog.clear()
        again = create_backbone(TAG)
        assert not caplog.messages
        assert hub.requests.count(fetched) == 1
    stored = safetensors.torch.load(hub.content)
    for model in (first, again):
        assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], stored["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("failure", ["silent", "closed"])
def test_without_a_network_the_wait_is_short_and_the_message_names_the_ways_out(
    hub: Hub, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nola_vision.models.backbones.weights._TIMEOUT", 0.3)
    if failure == "silent":  # as where a firewall drops packets
        hub.silent.set()
    else:
        hub.shutdown()
        hub.server_close()
    start = time.perf_counter()
    with pytest.raises(NolaVisionError) as caught:
        create_backbone(BackboneSpec(TAG))
    assert time.perf_counter() - start < 3  # timm alone tries ten times, for 50 s or more
    for way in ("--weights FILE", "--backbone quickstart", f"models--timm--{TAG}", str(tmp_path / "hub"), "127.0.0.1"):
        assert way in str(caught.value)
    assert not caplog.messages
