"""The deployment file of the docs on a real cluster of two nodes: two replicas, mixed batches, a replica that dies."""

import io
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from nola_vision.common.errors import NolaVisionError
from nola_vision.serving.bank import AdapterBank
from test_adapter_bank import SPEC, save
from two_nodes import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")]
pytest.importorskip("ray")

FILE = Path(__file__).parents[1] / "docs" / "serve-ray.yaml"
KEY = "a-key-of-16-or-more"
NAMES = ["nola", "nola again", "lora", "linear"]
APPLICATION, DEPLOYMENT = "nola-vision", "AdapterService"


def png(seed: int) -> bytes:
    file = io.BytesIO()
    bands = [Image.linear_gradient("L").rotate(90 * band + 13 * seed).resize((50, 40)) for band in range(3)]
    Image.merge("RGB", bands).save(file, "PNG")
    return file.getvalue()


class Served(NamedTuple):
    """Two replicas, and a client for them."""

    folder: Path
    urls: list[str]
    client: httpx.Client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        save(folder / f"{name}.safetensors", name, temperature=2.0)
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        ports = [found.getsockname()[1] for found in (one, other)]
    config = yaml.safe_load(FILE.read_text())
    config["http_options"]["port"] = ports[0]
    (application,) = config["applications"]
    application["args"]["adapters"] = str(folder)
    (deployment,) = application["deployments"]
    assert (application["name"], deployment["name"]) == (APPLICATION, DEPLOYMENT)
    assert deployment["autoscaling_config"]["min_replicas"] == 2
    deployment["autoscaling_config"]["max_replicas"] = 2
    deployment["ray_actor_options"]["num_cpus"] = 1
    file = folder / "deployment.yaml"
    file.write_text(yaml.safe_dump(config))

    import ray
    from ray import serve
    from ray.serve.scripts import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOLA_VISION_API_KEY", KEY)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "0")
        patch.setenv("RAY_SERVE_WORKER_PROXY_HTTP_PORT", str(ports[1]))  # the second node is this machine too
        with two_nodes() as cluster:
            ray.init(cluster.address, namespace="serve", log_to_driver=False)
            cli.main(["run", "--non-blocking", "--address", cluster.address, str(file)], standalone_mode=False)
            wait_until(lambda: serve.status().applications[APPLICATION].status != "DEPLOYING")
            assert serve.status().applications[APPLICATION].status == "RUNNING", serve.status()
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            with httpx.Client(base_url=urls[0], headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
                yield Served(folder, urls, client)
            ray.shutdown()


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def replicas() -> dict[str, dict[str, Any]]:
    """Those that run, by their ids."""
    from ray.serve.context import _get_global_client

    deployments = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"]
    return {one["replica_id"]: one for one in deployments[DEPLOYMENT]["replicas"] if one["state"] == "RUNNING"}


def metrics(client: httpx.Client) -> tuple[str, dict[str, float]]:
    """A replica, and its metrics without labels of their own."""
    lines = re.findall(r'^(\w+){replica="(\w+)"} (\S+)$', client.get("/metrics").text, re.M)
    return lines[0][1], {name: float(value) for name, _, value in lines}


def images(client: httpx.Client) -> dict[str, float]:
    """How many images each of the two replicas has computed."""
    found: dict[str, dict[str, float]] = {}
    wait_until(lambda: found.update([metrics(client)]) or len(found) == 2)
    return {replica: one["nola_vision_batch_images_sum"] for replica, one in found.items()}


def test_batches_of_two_nodes_mix_adapters_and_answer_as_the_bank_does(served: Served) -> None:
    assert len({one["node_id"] for one in replicas().values()}) == 2
    images = [png(seed) for seed in range(8)]
    asked = [(name, image) for image in images for name in NAMES] * 4
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda one: served.client.post(f"/models/{one[0]}", content=one[1]), asked))
    assert {answer.status_code for answer in answers} == {200}
    bank = AdapterBank(SPEC)
    bank.load_folder(served.folder)
    own = bank.predict([Image.open(io.BytesIO(image)) for _, image in asked], [name for name, _ in asked], top_k=5)
    for answer, best in zip(answers, own, strict=True):
        assert [one["label"] for one in answer.json()] == [label for label, _ in best]
        assert [one["score"] for one in answer.json()] == pytest.approx([score for _, score in best], abs=1e-4)

    found: dict[str, dict[str, float]] = {}
    wait_until(lambda: found.update([metrics(served.client)]) or len(found) == 2)
    assert sum(one["nola_vision_batch_images_sum"] for one in found.values()) == len(asked)
    for one in found.values():
        assert one["nola_vision_batch_adapters_sum"] / one["nola_vision_batch_adapters_count"] > 1.5


def test_refusals_are_those_of_one_service(served: Served) -> None:
    post, image = served.client.post, png(0)
    unknown = post("/models/nola%20agin", content=image)
    assert (unknown.status_code, unknown.json()["close"][0]) == (404, "nola again")
    foreign = {"Origin": "http://elsewhere.example"}
    assert post("/models/nola", content=image, headers=foreign).status_code == 403
    for url in served.urls:  # each node's proxy
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
        refused = httpx.get(f"{url}/v1/models", headers={"Host": "elsewhere.example"})
        assert (refused.status_code, refused.headers["x-content-type-options"]) == (401, "nosniff")
    assert post("/models/nola", content=b"no image").status_code == 400
    assert post("/models/nola", content=(b"x" * 2**20 for _ in range(33))).status_code == 413
    assert served.client.put("/v1/adapters/new", content=b"").status_code == 404
    assert httpx.get(served.urls[0]).text.startswith("<!doctype html>")


def test_every_replica_finds_a_new_file(served: Served) -> None:
    (served.folder / "new.safetensors").write_bytes((served.folder / "lora.safetensors").read_bytes())
    before = images(served.client)

    def both_answered() -> bool:
        assert {served.client.post("/models/new", content=png(0)).status_code for _ in range(8)} == {200}
        return all(count > before[replica] for replica, count in images(served.client).items())

    wait_until(both_answered)


def test_requests_go_on_while_a_killed_replica_is_replaced(served: Served) -> None:
    """Ray answers those that the replica was computing with 500; sent again, they succeed."""
    before, stop = replicas(), threading.Event()
    statuses: Counter[int] = Counter()

    def ask() -> None:
        while not stop.is_set():
            status = served.client.post("/models/nola", content=png(1)).status_code
            statuses[status] += 1
            if status != 200:
                assert served.client.post("/models/nola", content=png(1)).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            wait_until(lambda: statuses[200] > 20)
            killed = next(iter(before))
            os.kill(before[killed]["pid"], signal.SIGKILL)
            wait_until(lambda: statuses[200] > 60)
            wait_until(lambda: killed not in (now := replicas()) and len(now) == 2)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert statuses[500] <= 4 and set(statuses) <= {200, 500, 503}
    found: set[str] = set()
    wait_until(lambda: found.add(metrics(served.client)[0]) or found == set(replicas()))


def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nola_vision.serving.http import ray_serve

    for wrong, reason in {
        "{adapters: data}": "absolute path",
        "{adapters: /data, weights: file}": "absolute path",
        "{adapters: /data, max_batch_size: 0}": "greater than or equal to 1",
        "{adapters: /data, allow_changes: true}": "allow_changes",
    }.items():
        with pytest.raises(ValidationError, match=reason):
            ray_serve.Arguments.model_validate(yaml.safe_load(wrong))
    monkeypatch.delenv("NOLA_VISION_API_KEY", raising=False)
    with pytest.raises(NolaVisionError, match="set NOLA_VISION_API_KEY on every node"):
        ray_serve._app(ray_serve.Arguments(adapters=str(tmp_path)))
