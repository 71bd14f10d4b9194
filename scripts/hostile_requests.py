"""Sends hostile requests to `nola-vision serve`, with good ones in between: `python scripts/hostile_requests.py`.

Nine of ten requests are hostile: damaged and polyglot images, decompression bombs, wrong JSON, huge headers, names that
try to leave the folder, slow and cut bodies, endless trailers, answers that are not read, ambiguous HTTP, requests of
foreign pages. The others are good, and their answers are compared with those of an `AdapterBank` in this process.

The exit status is 1 if an answer is 5xx but not 503, if there is none, if a good request is not answered as the bank
answers it, if the service ends, or if it has more than 256 MiB more memory at the end than at the 1,000th request.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import torch
from PIL import Image

from nola_vision import NOLA, PRANC, AdapterBank, BackboneSpec, LinearProbe, LoRA, VeRA, adapt
from nola_vision.serving.files import backbone_of

BACKBONE = BackboneSpec("vit_mini_patch4_32.contours")
METHODS = {
    "nola": NOLA(targets=["mlp"], rank=4, num_basis=64, bits=4),
    "nola 2": NOLA(targets=["mlp"], rank=4, num_basis=64, bits=4),
    "per layer": NOLA(targets=["qv"], rank=3, num_basis=5, scope="per_layer"),
    "lora": LoRA(targets=["qkv"], rank=2),
    "lora conv": LoRA(targets=["all"], rank=1),
    "vera": VeRA(targets=["mlp"], rank=4),
    "pranc": PRANC(targets=["qkv"], scope="layer", num_basis=4),
    "linear": LinearProbe(head_bits=4),
}
LARGE = 7000  # a side, so that an image is just within the limit of 50 million pixels
ANSWER_SECONDS = 90.0  # more than the service lets a request wait
EARLY = 1000  # requests, after which all code paths have been taken and the caches are full
MOST_GROWTH = 256.0  # MiB from then to the end
MOST_AT_ONCE = 2**14  # bytes; if a longer request is refused before it is read, TCP may lose the answer


class Request(NamedTuple):
    """Parts with a pause in seconds after each, whether the answer is waited for, and the right answer."""

    kind: str
    parts: Sequence[tuple[bytes, float]]
    waits: bool = True
    expected: Any = None


# --- images -----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def photo(draw: random.Random, side: int) -> Image.Image:
    """An image with coarse structure."""
    values = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(values).resize((side, side + draw.randrange(side)), Image.Resampling.BICUBIC)


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file that states its size and has almost no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def ico(content: bytes) -> bytes:
    """An ICO file that states 16 x 16 pixels, with another image inside."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content


def large_images() -> list[bytes]:
    """Valid images within the limits of the service that take as much memory as possible."""
    side = LARGE
    grey = Image.new("L", (side, side), 90)
    colour = Image.new("RGB", (side, side), (200, 90, 10))
    turned = Image.Exif()
    turned[0x0112] = 6
    return [
        encoded(colour, "PNG", compress_level=1),
        encoded(Image.new("RGBA", (side, side), (1, 2, 3, 4)), "PNG", compress_level=1),
        encoded(Image.fromarray(np.full((side, side), 40_000, np.uint16)), "PNG", compress_level=1),
        encoded(colour, "JPEG", quality=30, exif=turned),
        encoded(grey, "JPEG", quality=30, progressive=True),
        encoded(Image.new("CMYK", (side, side), (9, 9, 9, 9)), "JPEG", quality=30),
        encoded(colour.resize((9000, 5000)), "WEBP", quality=1, method=0),
        encoded(grey.convert("P"), "GIF"),
        encoded(colour, "TIFF", compression="tiff_deflate", exif=turned),
        ico(encoded(Image.new("RGB", (4900, 4900)), "PNG", compress_level=1)),
    ]


# --- requests ---------------------------------------------------------------------------------------------------------


def http(
    path: str = "/models/nola", body: bytes = b"", method: str = "POST", version: str = "1.1", **headers: str
) -> bytes:
    """A request; `headers` replace the ones it would have, an empty one leaves it out."""
    named = {
        "host": "127.0.0.1",
        "content-length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in named.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Maker:
    """Draws requests.

    Args:
        names: the adapters.
        answers: from an image file and a name to the predictions of the bank.
        seed: of all requests.
    """

    def __init__(self, names: Sequence[str], answers: Callable[[Image.Image, str], Any], seed: int) -> None:
        self.draw, self.names = random.Random(seed), names
        photos = [photo(self.draw, side) for side in (24, 40, 100, 300, 800, 1600)]
        kinds = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "ICO", "TGA"]
        self.files = [encoded(one, kind) for one in photos[:4] for kind in kinds]
        self.good = [encoded(one, kind) for one in photos for kind in ("JPEG", "PNG", "WEBP")]
        self.expected = {
            (place, name): answers(Image.open(io.BytesIO(file)), name)
            for place, file in enumerate(self.good)
            for name in names
        }
        self.large = large_images()
        self.stripes = encoded(Image.new("1", (60_000, 2)), "PNG")
        self.too_large = encoded(Image.new("L", (10_000, 6_000)), "JPEG", quality=1)

    def next(self) -> Request:
        share = self.draw.random()
        if share < 0.1:
            return self.good_request()
        if share < 0.103:
            return Request("large", [(http(body=self.draw.choice(self.large)), 0)])
        if share < 0.105:  # the client leaves while its image is decoded
            return Request("left", [(http(body=self.draw.choice(self.large)), 0.3)], waits=False)
        if share < 0.110:
            return self.slow()
        if share < 0.113:
            return Request("unread", [(http("/openapi.json", method="GET") * 200, 3.0)], waits=False)
        make = self.draw.choice(
            [self.damaged, self.damaged, self.polyglot, self.bomb, self.json, self.json, self.headers, self.name,
             self.name, self.cut, self.ambiguous, self.trailers, self.method, self.foreign, self.pipelined]
        )  # fmt: skip
        return make()

    def good_request(self) -> Request:
        place, name = self.draw.randrange(len(self.good)), self.draw.choice(self.names)
        text = base64.b64encode(self.good[place]).decode()
        form = self.draw.randrange(3)
        if form == 0:
            sent = http(f"/models/{quote(name)}", self.good[place])
        elif form == 1:
            body = json.dumps({"inputs": text, "parameters": {"top_k": 5}}).encode()
            sent = http(f"/models/{quote(name)}", body, content_type="application/json")
        else:
            tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
            sent = http(f"/v2/models/{quote(name)}/infer", json.dumps({"inputs": [tensor]}).encode())
        return Request("good", [(sent, 0)], expected=self.expected[place, name])

    def damaged(self) -> Request:
        content = bytearray(self.draw.choice(self.files))
        if self.draw.random() < 0.5:
            del content[self.draw.randrange(len(content)) :]
        else:
            for _ in range(self.draw.randrange(1, 30)):
                content[self.draw.randrange(min(len(content), self.draw.choice([40, 400, 10**9])))] = (
                    self.draw.randrange(256)
                )
        return Request("damaged image", [(http(body=bytes(content)), 0)])

    def polyglot(self) -> Request:
        first, second = self.draw.choice(self.files), self.draw.choice(self.files)
        cut = self.draw.randrange(len(first))
        extra = self.draw.choice([b"PK\x03\x04" + bytes(60), b"<html><script>alert(1)</script>", b"%PDF-1.7\n", second])
        content = self.draw.choice(
            [first + extra, extra + first, first[:cut] + second, first[:cut] + extra + first[cut:]]
        )
        return Request("polyglot", [(http(body=content), 0)])

    def bomb(self) -> Request:
        side = self.draw.choice([10_000, 50_000, 2**31 - 1])
        gif = bytearray(self.files[3])
        gif[6:10] = b"\xff\xff\xff\xff"
        content = self.draw.choice(
            [
                png_header(side, side),
                png_header(side, 1, 1, 0),
                png_header(LARGE, LARGE, 16, 6),
                ico(png_header(side, side)),
                bytes(gif),
                self.stripes,
                b"P6\n%d %d\n255\n" % (side, side),
                b"P1\n7000 7000\n" + b"1 " * 1000,
                self.too_large,
            ]
        )
        return Request("bomb", [(http(body=content), 0)])

    def json(self) -> Request:
        text = base64.b64encode(self.draw.choice(self.files)).decode()
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
        content = self.draw.choice(
            [
                b"{",
                b"[" * self.draw.choice([100, 9_000, 100_000]),
                b'{"inputs":' * 5_000,
                b"\xff\xfe{}",
                b"null",
                b'"' + b"a" * 2**20 + b'"',
                b'{"inputs": NaN}',
                b'{"inputs": "' + b"A" * self.draw.choice([3, 4, 2**20]) + b'"}',
                b'{"inputs": "\\ud800"}',
                b'{"inputs": "", "inputs": 3}',
                b'{"parameters": {"top_k": 1%s}, "inputs": "AAAA"}' % (b"0" * self.draw.choice([30, 5_000])),
                json.dumps(
                    {"inputs": text, "parameters": {"top_k": self.draw.choice([0, -1, 1.5, "3", [], None, True])}}
                ).encode(),
                json.dumps({"inputs": text, "parameters": {"function_to_apply": "sigmoid"}}).encode(),
                json.dumps({"inputs": [tensor] * self.draw.choice([0, 2, 300])}).encode(),
                json.dumps(
                    {"inputs": [{**tensor, "shape": self.draw.choice([[2], [], [-1], [10**30], "1"])}]}
                ).encode(),
                json.dumps({"inputs": [{**tensor, "shape": [65], "data": [text[:40]] * 65}]}).encode(),
                json.dumps({"inputs": [{**tensor, "shape": [3], "data": [text, "AAAA", text]}]}).encode(),
                json.dumps({"inputs": [{**tensor, "data": [[[["x"]]]]}]}).encode(),
                json.dumps(
                    {"inputs": [tensor], "outputs": [{"name": "score"}] * self.draw.choice([2, 16, 17, 4_900])}
                ).encode(),
                json.dumps(
                    {"inputs": [tensor], "outputs": [{"name": self.draw.choice(["", "x" * 10_000, "\x00"])}]}
                ).encode(),
            ]
        )
        path = self.draw.choice(["/models/nola", "/v2/models/nola/infer", "/v2/models/__base__/infer"])
        kind = self.draw.choice(
            ["application/json", "application/json", "application/json; charset=utf-16", "text/plain"]
        )
        return Request("JSON", [(http(path, content, content_type=kind), 0)])

    def headers(self) -> Request:
        many = {f"x_{number}": "y" * 30 for number in range(self.draw.choice([500, 3_000]))}
        sent = self.draw.choice(
            [
                http(method="GET", x="y" * self.draw.choice([60_000, 70_000, 2**20])),
                http(method="GET", **many),
                http("/" + "a" * self.draw.choice([60_000, 70_000, 2**20]), method="GET"),
                b"G" * 200_000,
                b"GET / HTTP/1.1\r\n" + b"x" * 100_000,
                http(method="GET", authorization="Bearer \xff\xfe", cookie="\x01"),
                http(method="GET", content_type="a/" * 5_000),
            ]
        )
        return Request("headers", [(sent, 0)])

    def name(self) -> Request:
        name = self.draw.choice(
            ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%252e%252e%252fetc", "%00", "nola%00", "nola%00.safetensors",
             "%ff", "%f0%9f", "nola.safetensors", ".", "", "/etc/passwd", "%2fetc%2fpasswd", "..%5c..%5cx",
             "nola%2f..%2flora",
             "a" * 10_000, "%e2%80%ae", "NOLA", "nola%20", "nola;x=1", "nola%0d%0ax:y", "%", "%zz",
             "~root", "*", "[!a]",
             "__base__", "__class__", "nola?limit=x", "nola#x", "é", "con", "nola%2e", "{adapter}", "\x7f"]
        )  # fmt: skip
        path, method = self.draw.choice(
            [("/models/{}", "POST"), ("/v2/models/{}/infer", "POST"), ("/v2/models/{}", "GET"),
             ("/v1/models/{}", "GET"),
             ("/v2/models/{}/ready", "GET"), ("/v1/adapters/{}", "PUT"), ("/v1/adapters/{}", "DELETE"), ("/{}", "GET"),
             ("/v1/models?after={}", "GET"), ("/v1/models?limit={}", "GET")]
        )  # fmt: skip
        return Request("name", [(http(path.replace("{}", name), b"x" * (method == "POST"), method), 0)])

    def cut(self) -> Request:
        whole = http(body=self.draw.choice(self.good))
        return Request("cut", [(whole[: self.draw.randrange(len(whole))], 0)], waits=False)

    def slow(self) -> Request:
        whole = http(body=self.draw.choice(self.good))
        step = max(1, len(whole) // self.draw.randrange(5, 20))
        parts = [(whole[first : first + step], 0.5) for first in range(0, len(whole), step)]
        if self.draw.random() < 0.3:
            parts[-2:] = [(b"", 12.0)]  # the end never comes
        return Request("slow body", parts)

    def ambiguous(self) -> Request:
        chunks = b"5\r\nhello\r\n0\r\n\r\n"
        second = b"POST /models/nola HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n\r\n"
        start = b"POST /models/nola HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        sent = self.draw.choice(
            [
                start + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello" + second,
                start + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + second,
                start + b"transfer-encoding: xchunked\r\ncontent-length: 5\r\n\r\nhello" + second,
                start + b"transfer-encoding: chunked, identity\r\n\r\n" + chunks,
                start + b"x: a\r\n b\r\ncontent-length: 0\r\n\r\n",
                start + b"content-length : 5\r\n\r\nhello",
                start + b"content-length: -5\r\n\r\nhello",
                start + b"content-length: +5\r\n\r\nhello",
                start + b"content-length: 1" + b"0" * 30 + b"\r\n\r\nhello",
                start + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello",
                start + b"transfer-encoding: chunked\r\n\r\n5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n",
                start + b"transfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
                start + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n",
                start + b"host: evil.example\r\ncontent-length: 0\r\n\r\n",
                start + b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello",
                start + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\nhello",
                start + b"expect: 200-ok\r\ncontent-length: 5\r\n\r\nhello",
                start.replace(b"\r\n", b"\n") + b"\n",
                b"POST /models/nola HTTP/1.0\r\n\r\n",
                b"GET /\r\n\r\n",
                b"GET / HTTP/9.9\r\nhost: 127.0.0.1\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
                b"\x00" * 100,
                b"GET http://evil.example/ HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
                b"CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: h2c\r\nconnection: Upgrade, HTTP2-Settings\r\n\r\n",
            ]
        )
        return Request("ambiguous HTTP", [(sent, 0)])

    def trailers(self) -> Request:
        body = self.good[0]
        start = http(content_length="", transfer_encoding="chunked") + b"%x\r\n%b\r\n0\r\n" % (len(body), body)
        sent = self.draw.choice(
            [
                start + b"host: evil.example\r\nauthorization: Bearer x\r\n\r\n",
                start + b"x: y\r\n" * self.draw.choice([1_000, 100_000]) + b"\r\n",
                start + b"x: " + b"y" * self.draw.choice([1_000, 1_000_000]) + b"\r\n\r\n",
                start + b"x: y\r\n" * 100_000,
            ]
        )
        return Request("trailers", [(sent, 0)])

    def method(self) -> Request:
        method = self.draw.choice(["HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "DELETE", "PROPFIND", "get", "PURGE"])
        path = self.draw.choice(
            ["/", "*", "/models/nola", "/v1/adapters/nola", "/metrics", "/openapi.json", "/v1/models/"]
        )
        return Request("method", [(http(path, method=method), 0)])

    def foreign(self) -> Request:
        page = self.draw.choice(
            [{"origin": "null"}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:1"},
             {"sec_fetch_site": "cross-site"},
             {"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {"host": ""},
             {"host": "127.0.0.1, evil.example"},
             {"host": "localhost@evil.example"}, {"host": "[::1"}, {"host": "a" * 10_000}]
        )  # fmt: skip
        return Request("foreign page", [(http(body=self.good[0], content_type="text/plain", **page), 0)])

    def pipelined(self) -> Request:
        return Request("pipelined", [(http("/v2/health/live", method="GET") * self.draw.choice([2, 50, 2_000]), 0)])


# --- sending ----------------------------------------------------------------------------------------------------------


async def ask(host: str, port: int, request: Request) -> tuple[int, bytes]:
    """The first answer to a request: its status, 0 if the connection was closed without one; and its body."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        for part, pause in request.parts:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
        if not request.waits:
            return 0, b""
        async with asyncio.timeout(ANSWER_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            lengths = [int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")]
            body = await reader.readexactly(lengths[0]) if lengths and request.kind == "good" else b""
        return int(lines[0].split()[1]), body
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, b""
    except TimeoutError:
        return -1, b""
    finally:
        writer.transport.abort()


def is_right(request: Request, status: int, body: bytes) -> bool:
    if status != 200:
        return False
    answer = json.loads(body)
    if isinstance(answer, dict):
        labels, scores = (output["data"] for output in answer["outputs"])
    else:
        labels, scores = zip(*((one["label"], one["score"]) for one in answer), strict=True)
    wanted = request.expected
    close = np.allclose(scores, [one.probability for one in wanted], rtol=0, atol=1e-4)
    return bool(close) and [*labels] == [one.label for one in wanted]


def mib(pid: int | None, field: str = "VmRSS") -> float:
    """Memory of a process, MiB; not a number if it is unknown."""
    if pid is None or not Path(f"/proc/{pid}/status").exists():
        return float("nan")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


async def send_all(host: str, port: int, maker: Maker, count: int, clients: int, pid: int | None) -> tuple[bool, float]:
    """Sends the requests of some clients at a time and prints what came back.

    Returns:
        Whether all of it is right, and the service's memory at request `EARLY`, MiB; not a number if it is unknown.
    """
    statuses: dict[str, Counter[int]] = {}
    seconds: list[float] = []
    wrong: list[str] = []
    sent, early, start = 0, float("nan"), time.monotonic()

    async def client() -> None:
        nonlocal sent, early
        while sent < count:
            request = maker.next()
            sent += 1
            if sent == EARLY:
                early = mib(pid)
            if sent % 1000 == 0:
                elapsed = time.monotonic() - start
                print(
                    f"{sent:6,} requests {elapsed:6.0f} s: {mib(pid):.0f} MiB, most {mib(pid, 'VmHWM'):.0f}", flush=True
                )
            began = time.monotonic()
            try:
                status, body = await ask(host, port, request)
            except OSError as error:
                wrong.append(f"{request.kind}: {error}")
                return
            statuses.setdefault(request.kind, Counter())[status] += 1
            if status >= 500 and status != 503:
                wrong.append(f"{status} for {request.kind}: {request.parts[0][0][:200]!r}")
            size = sum(len(part) for part, _ in request.parts)
            if request.waits and (status < 0 or (status == 0 and size <= MOST_AT_ONCE)):
                wrong.append(f"no answer for {request.kind}: {request.parts[0][0][:200]!r}")
            if request.kind == "good":
                seconds.append(time.monotonic() - began)
                if not is_right(request, status, body):
                    wrong.append(f"good request: {status} {body[:200]!r}")

    await asyncio.gather(*(client() for _ in range(clients)))
    for kind, counts in sorted(statuses.items()):
        print(f"{kind:15}", ", ".join(f"{status}: {number}" for status, number in sorted(counts.items())))
    p50, p95, most = np.quantile(seconds, [0.5, 0.95, 1])
    print(
        f"{len(seconds)} good requests: p50 {p50:.3f} s, p95 {p95:.3f} s, slowest {most:.3f} s; {len(wrong)} problems"
    )
    for line in wrong[:20]:
        print("PROBLEM", line)
    return not wrong, early


def make_adapters(folder: Path) -> None:
    """Adapter files of several methods with random values."""
    for number, (name, method) in enumerate(METHODS.items()):
        model = adapt(BACKBONE, method, [f"{name} {label}" for label in range(3 + number)], number, number // 2)
        draws = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.bank.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
        model.save(folder / f"{name}.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16, help="requests at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a running service without a key (default: starts one)")
    parser.add_argument(
        "--adapters", type=Path, help="the folder that it serves, with nola.safetensors (default: made)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.adapters or Path(place)
        if options.adapters is None:
            make_adapters(folder)
        bank = AdapterBank(backbone_of(folder))
        names = bank.load_folder(folder)
        maker = Maker(names, lambda image, name: bank.predict(image, name, top_k=5), options.seed)
        if options.url is not None:
            address = urlsplit(options.url)
            sent = send_all(address.hostname or "", address.port or 80, maker, options.requests, options.clients, None)
            return 0 if asyncio.run(sent)[0] else 1
        command = [sys.executable, "-m", "nola_vision.cli.main", "serve", f"--adapters={folder}", "--port=0"]
        environment = {name: value for name, value in os.environ.items() if name != "NOLA_VISION_API_KEY"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                print(f"{line.strip()}; {mib(process.pid):.0f} MiB", flush=True)
                address = urlsplit(line.split()[0])
                assert address.hostname is not None and address.port is not None
                right, early = asyncio.run(
                    send_all(address.hostname, address.port, maker, options.requests, options.clients, process.pid)
                )
                alive = process.poll() is None
                time.sleep(2)
                rest, most = mib(process.pid), mib(process.pid, "VmHWM")
                grown = rest - early > MOST_GROWTH
                print(
                    f"at rest {rest:.0f} MiB ({early:.0f} at request {EARLY:,}{', PROBLEM: grown' if grown else ''}), "
                    f"most {most:.0f} MiB; still there: {alive}"
                )
            finally:
                process.terminate()
        return 0 if right and alive and not grown and process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
