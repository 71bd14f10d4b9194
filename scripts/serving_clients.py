"""Sends requests to a running `nola-vision serve` from 64 connections and prints the seconds of each as JSON.

    python scripts/serving_clients.py PORT NAMES.json IMAGE...

`scripts/benchmark_bank.py serve` runs it in a separate process; it imports nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

CLIENTS = 64


async def clients(port: int, names: list[str], images: list[bytes]) -> list[float]:
    """The connections take one request after the other from a common list.

    Args:
        port: of the service on this machine.
        names: the adapter of each request.
        images: encoded; the requests take them in turn.
    """
    waiting = iter(enumerate(names))
    seconds = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number, name in waiting:
            body = images[number % len(images)]
            start = time.perf_counter()
            head = f"POST /models/{name} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            content = await reader.readexactly(int(answer.partition("content-length:")[2].partition("\r")[0]))
            if " 200 " not in answer.partition("\r")[0]:
                raise SystemExit(f"{answer} {content!r}")
            seconds.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return seconds


def main() -> None:
    port, names, *images = sys.argv[1:]
    sent = clients(int(port), json.loads(Path(names).read_text()), [Path(image).read_bytes() for image in images])
    print(json.dumps(asyncio.run(sent)))


if __name__ == "__main__":
    main()
