"""The list of adapters, in the form of OpenAI's API as vLLM serves it, and changes to it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from nola_vision.serving.adapter import BASE
from nola_vision.serving.bank import AdapterInfo
from nola_vision.serving.http.bodies import body_of
from nola_vision.serving.http.errors import JSON
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.messages import AdapterChange, Model, ModelDetails, ModelList
from nola_vision.serving.http.routes import failures, service_of

router = APIRouter(prefix="/v1", tags=["adapters"])
changes = APIRouter(prefix="/v1/adapters", tags=["changes"])


@router.get("/models", response_model=ModelList, responses=failures(401, 422))
async def models(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=10_000, description="the longest list")] = 1000,
    after: Annotated[str | None, Query(description="the id that the list begins after")] = None,
    search: Annotated[str, Query(max_length=200, description="only ids that contain this, in either case")] = "",
) -> JSON:
    """The backbone and the adapters, in the order of their names."""
    service = service_of(request)
    return await service.files.call(_page, service.folder, limit, after, search.lower())


def _page(folder: AdapterFolder, limit: int, after: str | None, search: str) -> JSON:
    folder.refresh()
    tag = folder.bank.backbone_tag
    found = [info for info in folder.bank.adapters() if search in info.name.lower()]
    rest = found if after in (None, BASE) else [info for info in found if info.name > str(after)]
    first = [Model(**_base(tag))] if after is None and search in BASE else []
    data = [*first, *(Model(**_adapter(info, tag)) for info in rest[: limit - len(first)])]
    more = len(first) + len(rest) > limit
    return JSON(ModelList(data=data, total=len(found) + (search in BASE), has_more=more).model_dump())


def _base(tag: str) -> dict[str, Any]:
    return {"id": BASE, "root": tag, "parent": None}


def _adapter(info: AdapterInfo, tag: str) -> dict[str, Any]:
    return {
        "id": info.name,
        "root": tag,
        "parent": BASE,
        "digest": info.digest,
        "method": info.method,
        "bytes": info.bytes,
        "uses": info.uses,
        "error": info.error,
    }


@router.get("/models/{adapter}", response_model=ModelDetails, responses=failures(401, 404, 422))
async def model(request: Request, adapter: str) -> JSON:
    """An adapter with its classes, or the backbone."""
    service = service_of(request)
    return await service.files.call(_details, service.folder, adapter)


def _details(folder: AdapterFolder, name: str) -> JSON:
    served, tag = folder.find(name), folder.bank.backbone_tag
    known = _base(tag) if name == BASE else _adapter(folder.info(name), tag)
    return JSON(ModelDetails(**known, classes=list(served.class_names)).model_dump())


@changes.put("/{adapter}", response_model=AdapterChange, responses=failures(401, 408, 413, 422, 503))
async def store(request: Request, adapter: str) -> JSON:
    """Stores the adapter file that is the body, if this service can use it; one of that name is replaced."""
    service = service_of(request)
    async with body_of(request, service.settings, service.held) as body:
        new, digest = await service.files.call(service.folder.store, adapter, body.getvalue())
    return JSON(AdapterChange(id=adapter, digest=digest).model_dump(), 201 if new else 200)


@changes.delete("/{adapter}", response_model=AdapterChange, responses=failures(401, 404, 422, 503))
async def delete(request: Request, adapter: str) -> JSON:
    """Deletes an adapter's file. Requests that have begun are answered."""
    service = service_of(request)
    await service.files.call(service.folder.remove, adapter)
    return JSON(AdapterChange(id=adapter, deleted=True).model_dump(exclude_none=True))
