"""The service on a Ray cluster, as docs/serve-ray.yaml deploys it; docs/serving.md describes it. Ray imports this."""

# without annotations from __future__: Ray looks for a pydantic model in the builder's signature
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from nola_vision.common.errors import NolaVisionError
from nola_vision.serving.http.settings import KEY_VARIABLE, service_settings

_RETRY_SECONDS = 1.0
_END_SECONDS = 60.0  # for what a replica took, before it is stopped


class Arguments(BaseModel):
    """What the deployment file has under `args`. Each replica has a separate cache.

    Args:
        adapters: the folder of the adapter files, the same on every node.
        backbone: timm's tag; that of the first adapter file if not given.
        weights: a local file with the backbone's weights, on every node; else it is found by its digest.
        max_batch_size: images per forward pass of a replica.
        max_delay_ms: that the first image of a batch waits for others.
        cache_mib: memory for adapters in use.
    """

    model_config = ConfigDict(extra="forbid")

    adapters: str
    backbone: str | None = None
    weights: str | None = None
    max_batch_size: int = Field(64, ge=1)
    max_delay_ms: int = Field(5, ge=0)
    cache_mib: int = Field(512, ge=1)

    @field_validator("adapters", "weights")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError("give an absolute path, the same on every node")
        return path


def build(arguments: Arguments) -> serve.Application:
    """The application that a deployment file names. Each replica has a bank and the same routes as `nola-vision serve`.

    A replica takes twice `max_batch_size` requests at a time, so that the next batch is there when one is computed. Ray
    gives a request to any replica, so that batches mix adapters.
    """

    def app() -> FastAPI:  # Ray calls it in each replica
        return _app(arguments)

    deployed = serve.deployment(
        name="AdapterService",
        max_ongoing_requests=2 * arguments.max_batch_size,
        max_queued_requests=4 * arguments.max_batch_size,
        backpressure_config={"retry_after_s": _RETRY_SECONDS},
        graceful_shutdown_timeout_s=_END_SECONDS,
    )
    return deployed(serve.ingress(app)()).bind()


def _app(arguments: Arguments) -> FastAPI:
    """The application of a replica.

    Raises:
        NolaVisionError: its node has no API key or no adapters.
    """
    import ray

    from nola_vision.serving.http.app import load_app

    settings = service_settings(arguments.max_batch_size, arguments.max_delay_ms)
    if settings.api_key is None:  # Ray's proxies may listen at any address
        raise NolaVisionError(f"this node has no API key: set {KEY_VARIABLE} on every node before `ray start`")
    device = "cuda" if ray.get_gpu_ids() else "cpu"  # of the deployment's num_gpus
    replica = serve.get_replica_context().replica_id.unique_id
    app, _ = load_app(
        arguments.adapters,
        settings,
        arguments.backbone,
        arguments.weights,
        device,
        arguments.cache_mib,
        {"replica": replica},
    )
    return app
