"""Image classification as Hugging Face's inference API has it, so that `huggingface_hub.InferenceClient` works."""

from __future__ import annotations

from fastapi import APIRouter, Request
from torch import Tensor

from nola_vision.serving.adapter import BASE
from nola_vision.serving.http.bank import Adapter
from nola_vision.serving.http.bodies import body_of, content_type, parse_json
from nola_vision.serving.http.errors import JSON, RequestError
from nola_vision.serving.http.messages import ClassifyRequest, Label, Parameters
from nola_vision.serving.http.routes import failures, service_of
from nola_vision.serving.http.service import predictions

# the last is what curl states of whatever it sends
_KINDS = ("", "application/octet-stream", "application/json", "application/x-www-form-urlencoded")
router = APIRouter(tags=["Hugging Face"])
_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": ClassifyRequest.model_json_schema()},
    },
}


@router.post(
    "/models/{adapter}",
    response_model=list[Label],
    responses=failures(400, 401, 404, 408, 413, 415, 422, 503),
    openapi_extra={"requestBody": _BODY},
)
async def classify(request: Request, adapter: str) -> JSON:
    """The most probable classes of an image. Its bytes are the body, with or without a Content-Type, or it is JSON."""
    service = service_of(request)
    if adapter == BASE:
        raise RequestError(422, f"{BASE} has no classes; POST /v2/models/{BASE}/infer gives its features")
    kind = content_type(request)
    if not (kind in _KINDS or kind.startswith("image/")):
        raise RequestError(
            415,
            f"the Content-Type {kind[:100]!r} is not image/..., application/octet-stream or application/json: "
            "name one of them, or none",
        )
    async with body_of(request, service.settings, service.held) as body:
        if kind == "application/json":
            message = await service.decoders.call(parse_json, body, ClassifyRequest)
            image, parameters = message.inputs, message.parameters
        else:
            image, parameters = body.getvalue(), Parameters()
        served, logits = await service.logits(request, adapter, [image])
        return await service.answer(_answer, served, logits, parameters.top_k)


def _answer(served: Adapter, logits: list[Tensor], top_k: int | None) -> JSON:
    (best,) = predictions(served, logits, top_k)
    return JSON([Label(label=label, score=score).model_dump() for label, score in best])
