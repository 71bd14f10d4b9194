"""The HTTP service over a fake bank: routes, real clients, limits, and that one bad request fails alone."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import math
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from fake_bank import GOOD, FakeAdapter, FakeBank, expected, png
from nola_vision import load_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.serving.adapter import UnreadableAdapter
from nola_vision.serving.bank import AdapterBank
from nola_vision.serving.http import bank as interface
from nola_vision.serving.http import connections, service
from nola_vision.serving.http.app import create_app
from nola_vision.serving.http.batcher import Batcher
from nola_vision.serving.http.connections import LimitedConnection
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.settings import Settings
from test_adapter_bank import SPEC, save

FILES = {"birds": b"", "cats": b"", "many classes": b"", "wide": b"wide", "nan": b"nan", "crash": b"crash"}
KEY = "a-key-of-16-or-more"


class Served(NamedTuple):
    """A service in a thread of this process, and a client for it."""

    url: str
    bank: FakeBank
    folder: Path
    client: httpx.Client
    app: FastAPI

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])


@contextmanager
def serve(folder: Path, settings: Settings | None = None, bank: Any = None) -> Iterator[Served]:
    folder.mkdir(exist_ok=True)
    for name, kind in FILES.items():
        (folder / f"{name}.safetensors").write_bytes(GOOD + kind)
    (folder / "bad.safetensors").write_bytes(b"something else")
    (folder / "notes.txt").write_bytes(b"")
    bank = bank or FakeBank()
    app = create_app(bank, folder, settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=LimitedConnection, ws="none", access_log=False, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                time.sleep(0.01)
            with httpx.Client(base_url=url, timeout=30) as client:
                yield Served(url, bank, folder, client, app)
        finally:
            if isinstance(bank, FakeBank):
                bank.open.set()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("serving") / "adapters") as found:
        yield found


def close_to(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"label": one["label"], "score": pytest.approx(one["score"], rel=1e-5)} for one in answer]


def infer(*images: bytes, **more: Any) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}], **more}


# --- conventions -------------------------------------------------------------------------------------------------


def test_the_inference_client_of_hugging_face(served: Served, tmp_path: Path) -> None:
    client = InferenceClient(model=f"{served.url}/models/birds")
    (tmp_path / "a.png").write_bytes(png(90))
    for image in (png(90), tmp_path / "a.png"):
        found = client.image_classification(image)
        assert [(one.label, pytest.approx(one.score)) for one in found] == [
            (one["label"], one["score"]) for one in expected("birds", 90)
        ]
    found = client.image_classification(png(90), top_k=2, function_to_apply="softmax")
    assert [one.label for one in found] == [one["label"] for one in expected("birds", 90, 2)]
    with pytest.raises(HfHubHTTPError, match="softmax"):
        client.image_classification(png(90), function_to_apply="sigmoid")
    with pytest.raises(HfHubHTTPError, match="did you mean birds"):
        client.image_classification(png(90), model=f"{served.url}/models/bird")


@pytest.mark.parametrize(
    "content_type", [None, "image/png", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_raw_bytes_with_and_without_a_content_type(served: Served, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = served.client.post("/models/many%20classes", content=png(200), headers=headers)
    assert answer.json() == close_to(expected("many classes", 200))
    assert len(answer.json()) == 5 and answer.headers["content-type"] == "application/json"


def test_large_images_over_one_connection(served: Served) -> None:
    file = io.BytesIO()
    Image.effect_noise((900, 900), 90).save(file, "PNG")  # larger than the headers may be
    assert len(file.getvalue()) > 500_000
    with httpx.Client(base_url=served.url, limits=httpx.Limits(max_connections=1)) as client:
        answers = [client.post("/models/birds", content=file.getvalue()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3


def test_the_open_inference_protocol(served: Served) -> None:
    get = served.client.get
    assert get("/v2").json().keys() == {"name", "version", "extensions"}
    assert get("/v2/health/live").json() == {"live": True} and get("/v2/health/ready").json() == {"ready": True}
    assert get("/v2/models/cats/ready").json() == {"name": "cats", "ready": True}
    metadata = get("/v2/models/cats").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [(one["name"], one["datatype"]) for one in metadata["outputs"]] == [("label", "BYTES"), ("score", "FP32")]

    levels = [10, 250, 130]
    images = [png(level) for level in levels]
    answer = served.client.post("/v2/models/cats/infer", json=infer(*images, id="x", parameters={"top_k": 2})).json()
    best = [one for level in levels for one in expected("cats", level, 2)]
    label, score = answer["outputs"]
    assert (answer["model_name"], answer["id"]) == ("cats", "x")
    assert label == {"name": "label", "datatype": "BYTES", "shape": [3, 2], "data": [one["label"] for one in best]}
    assert score["shape"] == [3, 2] and score["datatype"] == "FP32"
    assert score["data"] == pytest.approx([one["score"] for one in best], rel=1e-5)

    only = served.client.post("/v2/models/cats/infer", json=infer(images[0], outputs=[{"name": "score"}])).json()
    assert [one["name"] for one in only["outputs"]] == ["score"] and "id" not in only
    (features,) = served.client.post("/v2/models/__base__/infer", json=infer(*images)).json()["outputs"]
    assert (features["name"], features["datatype"], features["shape"]) == ("features", "FP32", [3, 2])
    assert features["data"] == pytest.approx([value * level / 255 for level in levels for value in (1, 2)])


def test_the_list_of_models(served: Served) -> None:
    get = served.client.get
    everything = get("/v1/models").json()
    ids = [one["id"] for one in everything["data"]]
    assert ids == ["__base__", *sorted([*FILES, "bad"])] and everything["total"] == 8 and not everything["has_more"]
    assert everything["data"][0]["parent"] is None and everything["data"][1]["parent"] == "__base__"
    assert {one["root"] for one in everything["data"]} == {"fake.backbone"}
    pages, after = [], {}
    for _ in range(3):
        page = get("/v1/models", params={"limit": 3, **after}).json()
        pages += [one["id"] for one in page["data"]]
        assert page["has_more"] == (len(pages) < 8)
        after = {"after": pages[-1]}
    assert pages == ids
    found = get("/v1/models", params={"search": "CA"}).json()
    assert [one["id"] for one in found["data"]] == ["cats"] and found["total"] == 1
    one = get("/v1/models/cats").json()
    assert one["classes"][:1] == ["cats-0"] and len(one["digest"]) == 64 and one["method"] == "NOLA"
    assert get("/v1/models/__base__").json()["classes"] == []


def test_metrics_and_openapi(served: Served) -> None:
    served.client.post("/models/birds", content=png(1))
    served.bank.counts = 7, 2
    text = served.client.get("/metrics").text
    for line in (
        'nola_vision_requests_total{route="/models/{adapter}",status="200"}',
        "nola_vision_queue_seconds_count",
        "nola_vision_batch_images_bucket",
        "nola_vision_batch_adapters_sum",
        "nola_vision_cache_hits_total 7.0",
        "nola_vision_cache_misses_total 2.0",
    ):
        assert line in text
    assert "birds" not in text
    document = served.client.get("/openapi.json").json()
    classify = document["paths"]["/models/{adapter}"]["post"]
    assert set(classify["requestBody"]["content"]) == {"image/*", "application/octet-stream", "application/json"}
    assert "503" in classify["responses"] and "/v1/adapters/{adapter}" not in document["paths"]
    assert served.client.get("/docs").status_code == 404


def test_a_real_bank_answers_as_each_adapter_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, image = Path("a secret folder/of adapters"), tmp_path / "image.png"
    folder.mkdir(parents=True)
    for name in ("nola", "lora parts"):
        save(folder / f"{name}.safetensors", name, temperature=1.5)
    Image.effect_noise((70, 50), 90).convert("RGB").save(image)
    with serve(folder, bank=AdapterBank(SPEC)) as served:
        assert served.client.get("/v1/models").json()["data"][0]["root"] == SPEC.tag
        for name in ("nola", "lora parts"):
            answer = served.client.post(f"/models/{name}", content=image.read_bytes()).json()
            own = load_adapter(folder / f"{name}.safetensors").predict(image, top_k=5)
            assert [(one["label"], one["score"]) for one in answer] == [(a, pytest.approx(b, abs=1e-5)) for a, b in own]
        assert served.client.get("/v1/models/nola").json()["uses"] == 1
        assert "nola_vision_cache_misses_total 2.0" in served.client.get("/metrics").text
        answer = served.client.post("/v2/models/__base__/infer", json=infer(image.read_bytes())).json()
        assert answer["outputs"][0]["shape"] == [1, 160]
        bad = served.client.post("/models/bad", content=image.read_bytes())
        assert bad.status_code == 422 and bad.json()["error"].startswith("bad.safetensors is truncated")
        listed = served.client.get("/v1/models", params={"search": "bad"}).json()["data"]
        assert [one["error"] for one in listed] == [bad.json()["error"]]
        with pytest.raises(NolaVisionError, match="^new.safetensors is truncated"):
            served.bank.check(folder / "bad.safetensors", shown=Path("new.safetensors"))
        (served.folder / "birds.safetensors").unlink()
        gone = served.client.post("/models/birds", content=image.read_bytes())
        assert gone.status_code == 404 and "secret" not in gone.text


@pytest.mark.parametrize("kind", [FakeBank, AdapterBank])
def test_banks_have_what_the_service_needs(kind: type) -> None:
    """mypy checks `AdapterBank`, the bank of these tests it does not see."""
    for name, method in inspect.getmembers(interface.Bank, inspect.isfunction):
        if not name.startswith("_"):
            assert [*inspect.signature(getattr(kind, name)).parameters] == [*inspect.signature(method).parameters]


# --- requests next to each other ---------------------------------------------------------------------------------


def test_mixed_requests_get_their_own_answers(served: Served) -> None:
    served.bank.batches.clear()

    def ask(number: int) -> None:
        draw = random.Random(number)
        name, level = (
            draw.choice(["birds", "cats", "many classes", "wide", "nan", "crash", "bad", "x"]),
            draw.randrange(256),
        )
        image = b"no image" if draw.random() < 0.2 else png(level, draw.choice((8, 40)))
        answer = served.client.post(f"/models/{name}", content=image)
        status = {"x": 404, "bad": 422}.get(name) or (image == b"no image" and 400)
        status = status or {"nan": 422, "crash": 503}.get(name, 200)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.json() == close_to(expected(name, level))
        else:
            assert answer.json()["error"] and "secret" not in answer.text and str(served.folder) not in answer.text

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(150)))
    assert max(map(len, served.bank.batches)) > 1
    assert all(("wide" in batch) == (set(batch) == {"wide"}) for batch in served.bank.batches)  # its image side differs


def test_the_folder_is_looked_at_when_asked_and_not_while_idle(served: Served) -> None:
    file = served.folder / "new one.safetensors"
    assert served.client.get("/v1/models/new%20one").status_code == 404
    file.write_bytes(GOOD + b"1")
    first = served.client.get("/v1/models/new%20one").json()  # an unknown name: at once
    scans = served.bank.scans
    file.write_bytes(GOOD + b"22")
    time.sleep(1.2)
    assert served.bank.scans == scans
    second = served.client.get("/v1/models/new%20one").json()
    assert first["digest"] != second["digest"] and served.bank.scans == scans + 1
    file.unlink()
    time.sleep(1.1)
    assert served.client.post("/models/new%20one", content=png(1)).status_code == 404
    assert served.client.get("/v1/models").json()["total"] == 8


def test_a_file_that_cannot_be_read_now_does_not_make_each_request_scan(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(name: str) -> FakeAdapter:
        raise UnreadableAdapter("birds.safetensors cannot be read (Too many open files): check it")

    assert served.client.post("/models/birds", content=png(1)).status_code == 200  # scans if that is due
    scans = served.bank.scans
    monkeypatch.setattr(served.bank, "adapter", unreadable)
    monkeypatch.setattr(served.bank, "read", {})
    monkeypatch.setattr(served.app.state.service.folder, "_next_scan", math.inf)
    for _ in range(3):
        answer = served.client.post("/models/birds", content=png(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert served.bank.scans == scans


# --- refusals ----------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A valid PNG of one colour whose pixels are compressed to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def ico(content: bytes) -> bytes:
    """An ICO file that states 16 x 16 pixels, with another image inside."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content


IMAGE = base64.b64encode(png(9)).decode()
JSON = "application/json"
REFUSALS: list[tuple[str, str, bytes | str | dict[str, Any], str | None, int, str]] = [
    ("POST", "/models/birds", b"", None, 400, "cannot decode"),
    ("POST", "/models/birds", png(9)[:50], None, 400, "cannot decode"),
    ("POST", "/models/birds", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None, 400, "not an image"),
    ("POST", "/models/birds", png_of(100_000, 1000), None, 413, "more than 50,000,000 pixels"),
    ("POST", "/models/birds", png_of(30_000, 30_000), None, 413, "more than 50,000,000 pixels"),
    ("POST", "/models/birds", png_of(40_000_000, 1), None, 413, "more than 50 times"),
    ("POST", "/models/birds", ico(png_of(10_000, 10_000)), None, 413, "more than 50,000,000 pixels"),
    ("POST", "/models/birds", png(9), "text/plain", 415, "Content-Type"),
    ("POST", "/models/birds", png(9), "multipart/form-data; boundary=x", 415, "Content-Type"),
    ("POST", "/models/birds", b"{", JSON, 422, "JSON"),
    ("POST", "/models/birds", b"[" * 9000, JSON, 422, "recursion"),
    ("POST", "/models/birds", b"[" * 2**20, JSON, 422, "more than 10,000 values"),
    ("POST", "/models/birds", b'{"inputs": "\xff"}', JSON, 422, ""),
    ("POST", "/models/birds", '{"inputs": "\\ud800"}', JSON, 422, ""),
    ("POST", "/models/birds", {"inputs": "no base64!"}, JSON, 422, "base64"),
    ("POST", "/models/birds", {"inputs": IMAGE[:-1]}, JSON, 422, "base64"),
    ("POST", "/models/birds", {"inputs": base64.b64encode(b"x").decode()}, JSON, 400, "not an image"),
    ("POST", "/models/birds", {"inputs": [IMAGE]}, JSON, 422, "inputs"),
    ("POST", "/models/birds", {"input": IMAGE}, JSON, 422, "inputs: Field required"),
    ("POST", "/models/birds", {"inputs": IMAGE, "parameters": {"topk": 1}}, JSON, 422, "topk"),
    ("POST", "/models/birds", {"inputs": IMAGE, "parameters": {"top_k": 0}}, JSON, 422, "top_k"),
    ("POST", "/models/birds", {"inputs": IMAGE, "parameters": {"top_k": True}}, JSON, 422, "top_k"),
    ("POST", "/models/birds", f'{{"inputs": "{IMAGE}", "parameters": {{"top_k": NaN}}}}', JSON, 422, "top_k"),
    ("POST", "/models/birds", f'{{"inputs": "{IMAGE}", "parameters": {{"top_k": {"9" * 5000}}}}}', JSON, 422, ""),
    ("POST", "/models/__base__", png(9), None, 422, "/v2/models/__base__/infer"),
    ("POST", "/models/bad", png(9), None, 422, "bad.safetensors is damaged"),
    ("POST", "/models/bird", png(9), None, 404, "did you mean birds"),
    ("POST", "/models/%2e%2e", png(9), None, 404, ""),
    ("POST", "/models/%2e%2e%2fbirds", png(9), None, 404, ""),
    ("POST", "/models/..%5cbirds", png(9), None, 404, ""),
    ("POST", "/models/birds%00", png(9), None, 404, ""),
    ("POST", "/models/%ff%fe", png(9), None, 404, ""),
    ("POST", "/models/birds%0d%0ax:y", png(9), None, 404, ""),
    ("POST", f"/models/{'x' * 20_000}", png(9), None, 404, ""),
    ("GET", "/models/birds", b"", None, 405, ""),
    ("GET", "/nothing", b"", None, 404, ""),
    ("GET", "/v1/models/", b"", None, 404, ""),
    ("PUT", "/v1/adapters/x", GOOD, None, 404, ""),
    ("DELETE", "/v1/adapters/birds", b"", None, 404, ""),
    ("GET", "/v1/models?limit=0", b"", None, 422, "limit"),
    ("GET", "/v1/models?limit=x", b"", None, 422, "limit"),
    ("GET", "/v1/models/x%00", b"", None, 404, ""),
    ("GET", "/v2/models/bad/ready", b"", None, 422, "damaged"),
    ("POST", "/v2/models/birds/infer", infer(png(1), b"x"), JSON, 400, "number 2"),
    ("POST", "/v2/models/birds/infer", infer(*[b"x"] * 65), JSON, 413, "64 images"),
    ("POST", "/v2/models/birds/infer", infer(), JSON, 422, "shape"),
    ("POST", "/v2/models/birds/infer", infer(png(1), outputs=[{"name": "logits"}]), JSON, 422, "'logits'"),
    ("POST", "/v2/models/birds/infer", infer(png(1), outputs=[{"name": "score"}] * 2), JSON, 422, "a name twice"),
    ("POST", "/v2/models/birds/infer", infer(png(1), outputs=[{"name": "score"}] * 17), JSON, 422, "outputs: "),
    ("POST", "/v2/models/birds/infer", {"inputs": []}, JSON, 422, "inputs"),
    ("POST", "/v2/models/birds/infer", png(1), "image/png", 415, "application/json"),
    ("POST", "/v2/models/none/infer", infer(png(1)), JSON, 404, ""),
]


@pytest.mark.parametrize(("method", "path", "body", "kind", "status", "reason"), REFUSALS)
def test_refusals_are_json_with_a_reason(
    served: Served,
    method: str,
    path: str,
    body: bytes | str | dict[str, Any],
    kind: str | None,
    status: int,
    reason: str,
) -> None:
    content = json.dumps(body) if isinstance(body, dict) else body
    headers = {} if kind is None else {"Content-Type": kind}
    answer = served.client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == JSON and reason in answer.json()["error"]
    assert len(answer.text) < 3000 and str(served.folder) not in answer.text and "Traceback" not in answer.text
    if reason.startswith("did you mean"):
        assert answer.json()["close"] == ["birds"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:99"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.1.2.3"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_host_and_origin(served: Served, headers: dict[str, str], status: int) -> None:
    answer = served.client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def talk(served: Served, *parts: bytes, pause: float = 0) -> bytes:
    """Sends bytes over a connection, and returns all that comes until it is closed."""
    with socket.create_connection(served.address, timeout=20) as connection:
        found = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while part := connection.recv(65536):
                found += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return found


def head(path: str = "/models/birds", *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (head("/models/birds", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (head("/models/birds", "Content-Length: -5"), 400),
        (head("/models/birds", f"X: {'x' * 70_000}"), 431),
        (head("/models/birds", *[f"X{n}: {'x' * 1000}" for n in range(70)]), 431),
        (b"GET /" + b"x" * 300_000, 431),
        (head("/models/birds", "Content-Length: 999999999999"), 413),
        (head("/models/birds", "Content-Length: 3", "Content-Encoding: gzip"), 415),
        (head("/models/birds", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n" + b"X: y\r\n" * 20_000, 431),
        (head("/models/birds", "Transfer-Encoding: chunked") + b"0\r\nX: " + b"y" * 100_000, 431),
        (head("/models/birds", "Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", 400),
    ],
)
def test_bytes_that_no_client_library_sends(served: Served, content: bytes, status: int) -> None:
    with socket.create_connection(served.address, timeout=20) as connection:
        connection.sendall(content)
        answer = b""
        while not answer.endswith(b"}") and (part := connection.recv(65536)):
            answer += part
    lines, _, body = answer.partition(b"\r\n\r\n")
    assert lines.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(body)["error"]


def test_requests_sent_ahead_are_not_counted_as_headers(served: Served) -> None:
    one = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    count = 100_000 // len(one)
    last = one.replace(b"Host", b"Connection: close\r\nHost")
    found = talk(served, one * count + last[:20], last[20:], pause=0.1)
    assert found.count(b"HTTP/1.1 200 ") == count + 1 and b"431" not in found


def test_large_images_do_not_delay_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images are decoded by other threads, and wait until the pixels of those before are not in memory any more.

    The header of an ICO does not show its size, so it counts as the largest one.
    """
    free, begun = threading.Event(), threading.Semaphore(0)
    decode = service.decode

    def slow(content: bytes, *others: Any) -> Image.Image:
        if len(content) > 1000:
            begun.release()
            assert free.wait(20)
        return decode(content, *others)

    monkeypatch.setattr(service, "decode", slow)
    large, icon = png(50, 2100), io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(icon, "ICO")
    assert len(large) > 1000 and len(icon.getvalue()) > 1000

    def ask(content: bytes) -> httpx.Response:
        return httpx.post(f"{served.url}/models/birds", content=content, timeout=30)

    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(ask, icon.getvalue())]
        assert begun.acquire(timeout=20)
        answers += [threads.submit(ask, content) for content in [large, icon.getvalue()] * 5]
        for _ in range(3):
            assert served.client.post("/models/birds", content=png(30)).json() == close_to(expected("birds", 30))
        assert not begun.acquire(timeout=0.1)  # the others wait
        free.set()
        assert [answer.result().status_code for answer in answers] == [200] * 11


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ahead", [b"", b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_images_of_a_client_that_left_are_counted_until_they_are_not_in_memory(
    served: Served, monkeypatch: pytest.MonkeyPatch, ahead: bytes
) -> None:
    """Also those of a client that has sent another request ahead."""
    free, decoded = threading.Event(), []
    decode = service.decode

    def slow(content: bytes, *others: Any) -> Image.Image:
        decoded.append(content)
        assert free.wait(20)
        return decode(content, *others)

    monkeypatch.setattr(service, "decode", slow)
    own = served.app.state.service
    assert (own._images._held, own.held._held) == (0, 0)
    body = json.dumps(infer(*[png(1)] * 3)).encode()
    with socket.create_connection(served.address) as connection:
        connection.sendall(head("/v2/models/birds/infer", f"Content-Length: {len(body)}") + body + ahead)
        until(lambda: decoded)
    time.sleep(0.1)  # the service sees that the connection is closed
    assert (own._images._held, own.held._held) == (3, len(body))
    free.set()
    until(lambda: own._images._held == own.held._held == 0)
    assert len(decoded) == 1  # and not the others


def test_an_answer_that_is_not_read_ends_the_connection(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_ANSWER_SECONDS", 0.2)
    one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(served.address)
        connection.sendall(one * 500)
        time.sleep(0.6)
        found = b""
        try:
            while part := connection.recv(2**20):
                found += part
        except ConnectionResetError:
            pass
    assert 0 < found.count(b"HTTP/1.1 200 OK") < 500


class Odd(Exception):
    """An error that nothing expects."""


def test_unexpected_errors_are_counted_and_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise Odd("a secret")

    monkeypatch.setattr(served.bank, "adapters", fail, raising=False)
    answer = served.client.get("/v1/models")
    assert answer.status_code == 500 and answer.json() == {"error": "internal error"}
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert 'requests_total{route="/v1/models",status="500"} 1.0' in served.client.get("/metrics").text
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [Odd]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(NolaVisionError("crop mode 'border'"), 422, "crop mode"), (Odd("a secret"), 503, "forward pass failed")],
)
def test_a_transform_that_fails(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, reason: str
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(FakeAdapter, "transform", fail)
    answer = served.client.post("/models/birds", content=png(1))
    assert answer.status_code == status and reason in answer.json()["error"] and "secret" not in answer.text


def test_the_number_of_results_is_limited(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_MOST_RESULTS", 20)
    for count, top_k, status in ((2, 9, 200), (2, 2**31 - 1, 200), (3, 6, 200), (3, 7, 413)):
        message = infer(*[png(1)] * count, parameters={"top_k": top_k})
        assert served.client.post("/v2/models/many%20classes/infer", json=message).status_code == status


def test_the_page_answers_head(served: Served) -> None:
    answer = served.client.head("/")
    assert answer.status_code == 200 and answer.content == b""
    assert answer.headers["content-length"] == str(len(served.client.get("/").content))


SMALL = Settings(
    body_bytes=5000, held_bytes=20_000, body_seconds=1, idle_seconds=0.3, waiting_images=4, request_images=3,
    answer_seconds=2, allow_changes=True, api_key=KEY,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with an API key, changes, and small limits; its client has the key."""
    with serve(tmp_path_factory.mktemp("small") / "adapters", SMALL) as found:
        found.client.headers["Authorization"] = f"Bearer {KEY}"
        yield found


def test_the_api_key(small: Served) -> None:
    client = InferenceClient(model=f"{small.url}/models/birds", token=KEY)
    assert client.image_classification(png(90))[0].label == expected("birds", 90)[0]["label"]
    for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xe9"):
        headers = {"Authorization": header.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v2", "/nothing"):
            answer = small.client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert small.client.put("/v1/adapters/x", content=GOOD, headers=headers).status_code == 401
        assert small.client.get("/v2/health/ready", headers=headers).status_code == 200
        assert small.client.get("/", headers=headers).status_code == 200
    assert small.client.get("/v1/models", headers={"Host": "vision.example"}).status_code == 200  # a proxy's


def test_the_older_adapter_is_not_given_while_a_change_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds.safetensors").write_bytes(GOOD)
    bank, begun, go = FakeBank(), threading.Event(), threading.Event()
    folder, scan = AdapterFolder(bank, tmp_path), bank.load_folder

    def slow(path: str | Path) -> list[str]:
        begun.set()
        go.wait(10)
        return scan(path)

    assert folder.loaded("birds") is None and folder.find("birds").digest == folder.loaded("birds").digest
    _, digest = folder.store("birds", GOOD + b"new")
    monkeypatch.setattr(bank, "load_folder", slow)
    scanning = threading.Thread(target=folder.refresh)
    scanning.start()
    assert begun.wait(10) and folder.loaded("birds") is None
    go.set()
    scanning.join()
    assert folder.find("birds").digest == folder.loaded("birds").digest == digest


def test_adapters_are_stored_and_deleted(small: Served) -> None:
    before = {file.name: file.read_bytes() for file in small.folder.iterdir()}
    # what services leave that are killed while they store an adapter; another service may be writing the new one
    left = [small.folder / name for name in (f".{'a1' * 16}.tmp", f".{'b2' * 16}.tmp")]
    writing = small.folder / f".{'d4' * 16}.tmp"
    for file in (*left, writing):
        file.write_bytes(GOOD)
    for file in left:
        os.utime(file, (0, 0))
    put, delete = (lambda name, content: small.client.put(f"/v1/adapters/{name}", content=content)), small.client.delete
    assert put("new", GOOD + b"1").status_code == 201
    assert small.client.post("/models/new", content=png(30)).json() == close_to(expected("new", 30))
    scans = small.bank.scans
    replaced = put("new", GOOD + b"2")
    assert small.bank.scans == scans
    assert replaced.status_code == 200
    assert replaced.json()["digest"] == small.client.get("/v1/models/new").json()["digest"]
    for name, content, status in [
        ("new", b"bad", 422),
        ("other", b"bad", 422),
        ("__base__", GOOD, 422),
        (".hidden", GOOD, 422),
        ("a b", GOOD, 422),
        ("x.safetensors", GOOD, 422),
        ("x%00", GOOD, 422),
        ("%2e%2e%2fx", GOOD, 404),
        ("%2e%2e", GOOD, 422),
        ("x" * 129, GOOD, 422),
        ("big", GOOD + bytes(5000), 413),
    ]:
        answer = put(name, content)
        assert answer.status_code == status and ".tmp" not in answer.text and str(small.folder) not in answer.text
    assert (small.folder / "new.safetensors").read_bytes() == GOOD + b"2"
    (small.folder / "folder.safetensors").mkdir()
    assert put("folder", GOOD).status_code == 422
    (small.folder / "folder.safetensors").rmdir()
    assert writing.exists() and not any(file.exists() for file in left)
    writing.unlink()
    assert delete("/v1/adapters/new").json() == {"id": "new", "deleted": True}
    assert small.client.post("/models/new", content=png(30)).status_code == 404
    for name, status in (("new", 404), ("notes", 404), ("__base__", 422), ("..%2fx", 404), ("%2e%2e", 404)):
        assert delete(f"/v1/adapters/{name}").status_code == status
    assert {file.name: file.read_bytes() for file in small.folder.iterdir()} == before


def test_a_key_in_the_trailers_is_none(small: Served) -> None:
    """They are in the same segment as the headers here, so the service has them before it answers."""
    found = talk(
        small,
        head("/models/birds", "Transfer-Encoding: chunked", "Connection: close")
        + b"1\r\nx\r\n0\r\n"
        + f"Authorization: Bearer {KEY}\r\n\r\n".encode(),
    )
    assert found.startswith(b"HTTP/1.1 401 ")


def with_key(path: str, *lines: str) -> bytes:
    return head(path, f"Authorization: Bearer {KEY}", *lines)


def test_bodies_are_limited_while_they_come(small: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(1000)

    answer = small.client.post("/models/birds", content=endless())  # chunked: without a Content-Length
    assert answer.status_code == 413 and "5,000 bytes" in answer.json()["error"]
    assert small.client.post("/models/birds", content=png(1)).status_code == 200
    start = time.monotonic()
    slow = talk(small, with_key("/models/birds", "Content-Length: 1000"), b"x")
    assert slow.startswith(b"HTTP/1.1 408 ") and json.loads(slow.partition(b"\r\n\r\n")[2])["error"]
    assert time.monotonic() - start < 5
    start = time.monotonic()
    talk(small, with_key("/models/birds", "Content-Length: 1000"), *[b"x"] * 100, pause=0.15)
    assert time.monotonic() - start < 5  # `body_seconds`, and not 15


def test_slow_clients_do_not_block_others(small: Served) -> None:
    slow = [socket.create_connection(small.address) for _ in range(40)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(head()[:20] if number % 2 else with_key("/models/birds", "Content-Length: 1000") + b"x")
        start = time.monotonic()
        assert small.client.post("/models/birds", content=png(1)).status_code == 200
        assert time.monotonic() - start < 3
    finally:
        for connection in slow:
            connection.close()


@pytest.fixture
def held_up(small: Served) -> Iterator[Callable[[int], Any]]:
    """Starts requests while the forward pass stands still; they are answered afterwards."""
    small.bank.open.clear()
    threads = ThreadPoolExecutor(8)

    def start(count: int) -> Any:
        futures = [threads.submit(small.client.post, "/models/birds", content=png(7)) for _ in range(count)]
        time.sleep(0.3)
        return futures

    yield start
    small.bank.open.set()
    threads.shutdown()


def test_over_the_limit_requests_are_told_to_come_again(small: Served, held_up: Callable[[int], Any]) -> None:
    taken = held_up(4)
    answer = small.client.post("/models/birds", content=png(1))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.json()["error"]
    assert small.client.get("/v2/health/live").status_code == 200
    small.bank.open.set()
    assert [future.result().status_code for future in taken] == [200] * 4
    assert small.client.post("/models/birds", content=png(1)).status_code == 200


def test_requests_that_wait_too_long_or_are_gone_are_not_computed(small: Served, held_up: Callable[[int], Any]) -> None:
    held_up(1)  # is in the forward pass
    with socket.create_connection(small.address) as connection:
        connection.sendall(with_key("/models/cats", f"Content-Length: {len(png(1))}") + png(1))
        time.sleep(0.2)
    late = small.client.post("/models/wide", content=png(1))  # after `answer_seconds`
    assert late.status_code == 503 and late.headers["retry-after"]
    small.bank.batches.clear()
    small.bank.open.set()
    assert small.client.post("/models/birds", content=png(1)).status_code == 200
    assert {name for batch in small.bank.batches for name in batch} == {"birds"}


def test_shutdown_finishes_what_it_took(tmp_path: Path) -> None:
    names = ["birds", "cats", "wide"] * 4
    with ThreadPoolExecutor(12) as threads, httpx.Client(timeout=30) as client:
        with serve(tmp_path / "adapters") as served:
            served.bank.seconds = 0.3
            futures = [threads.submit(client.post, f"{served.url}/models/{one}", content=png(5)) for one in names]
            while not served.bank.batches:
                time.sleep(0.05)
            time.sleep(0.1)
        for name, future in zip(names, futures, strict=True):
            assert future.result().json() == close_to(expected(name, 5))
        with pytest.raises(httpx.ConnectError):
            client.get(f"{served.url}/v2/health/live")


def test_the_app_is_a_plain_asgi_application(tmp_path: Path) -> None:
    """As Ray Serve and other servers use it: its lifespan starts and ends the service."""
    (tmp_path / "birds.safetensors").write_bytes(GOOD)
    app, before = create_app(FakeBank(), tmp_path), {*threading.enumerate()}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            return await client.post("http://localhost/models/birds", content=png(77))

    assert asyncio.run(ask()).json() == close_to(expected("birds", 77))
    assert {*threading.enumerate()} <= before


def test_a_service_without_a_worker_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "_work", lambda self: None)
    with serve(tmp_path / "adapters") as served:
        answer = served.client.get("/v2/health/ready")
        assert answer.status_code == 503 and answer.json() == {"ready": False}
        assert served.client.get("/v2/health/live").status_code == 200


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NolaVisionError, match="none cannot be read"):
        create_app(FakeBank(), tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"api_key": ""}, "api_key must have 16 or more"),
        ({"api_key": "a key with spaces in it"}, "api_key must have 16 or more"),
        ({"api_key": b"0123456789abcdef"}, "api_key must have 16 or more"),
        ({"allow_changes": True}, "allow_changes needs an API key"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"pixels": -1}, "pixels is -1"),
        ({"waiting_images": 1.5}, "waiting_images of Settings is 1.5"),
        ({"answer_seconds": 0}, "answer_seconds is 0"),
        ({"idle_seconds": float("nan")}, "idle_seconds is nan"),
        ({"max_delay": -0.1}, "max_delay is -0.1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NolaVisionError, match=reason) as error:
        Settings(**settings)
    assert "spaces in it" not in str(error.value)
