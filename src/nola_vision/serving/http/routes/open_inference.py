"""The Open Inference Protocol, version 2, over HTTP: github.com/kserve/open-inference-protocol."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nola_vision import __version__
from nola_vision.serving.adapter import BASE
from nola_vision.serving.http.bodies import body_of, content_type, parse_json
from nola_vision.serving.http.errors import JSON, RequestError
from nola_vision.serving.http.messages import (
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
)
from nola_vision.serving.http.routes import failures, service_of

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
_BODY = {"required": True, "content": {"application/json": {"schema": InferRequest.model_json_schema()}}}
_INPUTS = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
_OUTPUTS = {  # names and types, by whether it is the backbone
    True: {"features": "FP32"},
    False: {"label": "BYTES", "score": "FP32"},
}


@router.get("", response_model=ServerMetadata)
async def server() -> JSON:
    """Name and version of the service."""
    return JSON({"name": "nola-vision", "version": __version__, "extensions": []})


@router.get("/health/live", response_model=Live)
async def live() -> JSON:
    """The service answers."""
    return JSON({"live": True})


@router.get("/health/ready", response_model=Ready)
async def ready() -> JSON:
    """The service is loaded."""
    return JSON({"ready": True})


@router.get("/models/{adapter}", response_model=ModelMetadata, responses=failures(401, 404, 422))
async def metadata(request: Request, adapter: str) -> JSON:
    """Inputs and outputs of an adapter, or of `__base__`. The number of classes is known only to a request."""
    service = service_of(request)
    await service.in_thread(service.folder.find, adapter)
    outputs = [{"name": name, "datatype": kind, "shape": [-1, -1]} for name, kind in _OUTPUTS[adapter == BASE].items()]
    return JSON({"name": adapter, "platform": "nola-vision", "inputs": _INPUTS, "outputs": outputs})


@router.get("/models/{adapter}/ready", response_model=ModelReady, responses=failures(401, 404, 422))
async def model_ready(request: Request, adapter: str) -> JSON:
    """The adapter's file can be used."""
    service = service_of(request)
    await service.in_thread(service.folder.find, adapter)
    return JSON({"name": adapter, "ready": True})


@router.post(
    "/models/{adapter}/infer",
    response_model=InferResponse,
    responses=failures(400, 401, 404, 408, 413, 415, 422, 503),
    openapi_extra={"requestBody": _BODY},
)
async def infer(request: Request, adapter: str) -> JSON:
    """Labels and scores of images, or features of `__base__`. Images are a BYTES tensor `[n]` of base64."""
    service = service_of(request)
    if content_type(request) not in ("", "application/json"):
        raise RequestError(415, "the Content-Type must be application/json")
    async with body_of(request, service.settings, service.held) as body:
        message = await service.in_thread(parse_json, body, InferRequest)
        images = message.inputs[0].data
        if [len(images)] != message.inputs[0].shape or not images:
            raise RequestError(422, "inputs.0.shape must be [n] for n images in data, 1 or more")
        names = list(_OUTPUTS[adapter == BASE])
        wanted = names if message.outputs is None else [output.name for output in message.outputs]
        if unknown := [name for name in wanted if name not in names]:
            raise RequestError(422, f"there is no output {unknown[0][:100]!r}: ask for {' and '.join(names)}")
        served, logits = await service.logits(request, adapter, images)
    results: dict[str, list[list[Any]]]
    if adapter == BASE:
        results = {"features": [features.tolist() for features in logits]}
    else:
        best = [service.predictions(served, one, message.parameters.top_k) for one in logits]
        results = {
            "label": [[label for label, _ in one] for one in best],
            "score": [[score for _, score in one] for one in best],
        }
    outputs = [
        {
            "name": name,
            "datatype": _OUTPUTS[adapter == BASE][name],
            "shape": [len(results[name]), len(results[name][0])],
            "data": [value for row in results[name] for value in row],
        }
        for name in wanted
    ]
    same_id = {} if message.id is None else {"id": message.id}
    return JSON({"model_name": adapter, **same_id, "outputs": outputs})
