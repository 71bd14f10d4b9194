"""The Open Inference Protocol, version 2, over HTTP: github.com/kserve/open-inference-protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from torch import Tensor

from nola_vision import __version__
from nola_vision.serving.adapter import BASE
from nola_vision.serving.http.bank import Adapter
from nola_vision.serving.http.bodies import body_of, content_type, parse_json
from nola_vision.serving.http.errors import JSON, RequestError
from nola_vision.serving.http.messages import (
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    OutputTensor,
    Ready,
    ServerMetadata,
    TensorInfo,
)
from nola_vision.serving.http.routes import failures, service_of
from nola_vision.serving.http.service import predictions

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
_BODY = {"required": True, "content": {"application/json": {"schema": InferRequest.model_json_schema()}}}
_INPUTS = [TensorInfo(name="image", datatype="BYTES", shape=[-1])]
_OUTPUTS = {  # names and types, by whether it is the backbone
    True: {"features": "FP32"},
    False: {"label": "BYTES", "score": "FP32"},
}


@router.get("", response_model=ServerMetadata)
async def server() -> JSON:
    """Name and version of the service."""
    return JSON(ServerMetadata(name="nola-vision", version=__version__, extensions=[]).model_dump())


@router.get("/health/live", response_model=Live)
async def live() -> JSON:
    """The service answers."""
    return JSON(Live(live=True).model_dump())


@router.get("/health/ready", response_model=Ready, responses={503: {"model": Ready}})
async def ready(request: Request) -> JSON:
    """The service is loaded, and can compute. Otherwise it must be restarted."""
    found = service_of(request).ready
    return JSON(Ready(ready=found).model_dump(), 200 if found else 503)


@router.get("/models/{adapter}", response_model=ModelMetadata, responses=failures(401, 404, 422))
async def metadata(request: Request, adapter: str) -> JSON:
    """Inputs and outputs of an adapter, or of `__base__`. The number of classes is known only to a request."""
    service = service_of(request)
    await service.files.call(service.folder.find, adapter)
    kinds = _OUTPUTS[adapter == BASE].items()
    outputs = [TensorInfo(name=name, datatype=kind, shape=[-1, -1]) for name, kind in kinds]
    answer = ModelMetadata(name=adapter, platform="nola-vision", inputs=_INPUTS, outputs=outputs)
    return JSON(answer.model_dump())


@router.get("/models/{adapter}/ready", response_model=ModelReady, responses=failures(401, 404, 422))
async def model_ready(request: Request, adapter: str) -> JSON:
    """The adapter's file can be used."""
    service = service_of(request)
    await service.files.call(service.folder.find, adapter)
    return JSON(ModelReady(name=adapter, ready=True).model_dump())


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
        message = await service.decoders.call(parse_json, body, InferRequest)
        images = message.inputs[0].data
        if [len(images)] != message.inputs[0].shape or not images:
            raise RequestError(422, "inputs.0.shape must be [n] for n images in data, 1 or more")
        wanted = _wanted(message, list(_OUTPUTS[adapter == BASE]))
        served, logits = await service.logits(request, adapter, images)
        return await service.answer(_answer, served, logits, adapter, message, wanted)


def _wanted(message: InferRequest, names: Sequence[str]) -> Sequence[str]:
    """The outputs that a request asks for; all if it names none."""
    if message.outputs is None:
        return names
    wanted = [output.name for output in message.outputs]
    if unknown := [name for name in wanted if name not in names]:
        raise RequestError(422, f"there is no output {unknown[0][:100]!r}: ask for {' and '.join(names)}")
    if len({*wanted}) < len(wanted):
        raise RequestError(422, "outputs has a name twice: give each once")
    return wanted


def _answer(served: Adapter, logits: Sequence[Tensor], name: str, message: InferRequest, wanted: Sequence[str]) -> JSON:
    results: dict[str, list[list[Any]]]
    if name == BASE:
        results = {"features": [features.tolist() for features in logits]}
    else:
        best = predictions(served, logits, message.parameters.top_k)
        results = {
            "label": [[label for label, _ in one] for one in best],
            "score": [[score for _, score in one] for one in best],
        }
    outputs = [
        OutputTensor.model_construct(  # checking the type of each value would take longer than all else
            name=output,
            datatype=_OUTPUTS[name == BASE][output],
            shape=[len(results[output]), len(results[output][0])],
            data=[value for row in results[output] for value in row],
        )
        for output in wanted
    ]
    answer = InferResponse.model_construct(model_name=name, id=message.id, outputs=outputs)
    return JSON(answer.model_dump(exclude_none=True))
