"""The JSON messages of the service's routes, checked by pydantic and described in its OpenAPI document."""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

TopK = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1, description="the most probable classes; default 5")]


def _from_base64(text: Any) -> bytes:
    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except (AttributeError, ValueError) as error:  # no text; binascii.Error, and surrogates
        raise PydanticCustomError(
            "base64", "it is not base64: encode the bytes of an image file, without line breaks"
        ) from error


# decoded as it is parsed, so that the text is not kept
ImageFile = Annotated[
    bytes, BeforeValidator(_from_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class Parameters(BaseModel):
    """Parameters of Hugging Face's image classification."""

    model_config = ConfigDict(extra="forbid")
    top_k: TopK | None = None
    function_to_apply: Literal["softmax"] | None = None


class ClassifyRequest(BaseModel):
    """An image with parameters."""

    model_config = ConfigDict(extra="forbid")
    inputs: ImageFile = Field(description="an image file in base64")
    parameters: Parameters = Parameters()


class Label(BaseModel):
    """A class and its calibrated probability."""

    label: str
    score: float


class InferInput(BaseModel):
    """Images: a tensor of the Open Inference Protocol."""

    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=1, description="the number of images")
    data: list[ImageFile] = Field(description="image files in base64")
    parameters: dict[str, Any] = {}


class InferParameters(BaseModel):
    """Parameters of a request of the Open Inference Protocol; the protocol lets others be ignored."""

    top_k: TopK | None = None


class InferOutput(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(None, max_length=1000)
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(None, max_length=16)
    parameters: InferParameters = InferParameters()


class OutputTensor(BaseModel):
    """Results: a tensor of the Open Inference Protocol, its data in row-major order."""

    name: str
    datatype: str
    shape: list[int]
    data: list[str] | list[float]


class InferResponse(BaseModel):
    """`label` and `score` `[images, k]`; of the backbone `features` `[images, width]`."""

    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorInfo(BaseModel):
    """Name, type and shape of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """An adapter, or the backbone, in the Open Inference Protocol."""

    name: str
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class ModelReady(BaseModel):
    """An adapter that can be used."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """The service, in the Open Inference Protocol."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """The service answers."""

    live: bool


class Ready(BaseModel):
    """The service is loaded, and can compute."""

    ready: bool


class Model(BaseModel):
    """An adapter or the backbone in a list, in the form of OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["nola-vision"] = "nola-vision"
    root: str = Field(description="timm's tag of the backbone")
    parent: str | None = Field(description="`__base__` for an adapter")
    digest: str | None = Field(None, description="SHA-256 of the file; null until its first use")
    method: str | None = Field(None, description="such as NOLA; null until the first use")
    bytes: int | None = Field(None, description="of the file")
    uses: int | None = Field(None, description="images since the start")
    error: str | None = Field(None, description="why the file cannot be used, once that is known")


class ModelDetails(Model):
    """An adapter that was read, with its classes."""

    classes: list[str]


class ModelList(BaseModel):
    """A part of a list."""

    object: Literal["list"] = "list"
    data: list[Model]
    total: int = Field(description="of the whole list")
    has_more: bool = Field(description="whether more follow: ask again with `after` set to the last id")


class AdapterChange(BaseModel):
    """What a change did."""

    id: str
    digest: str | None = None
    deleted: bool = False


class Failure(BaseModel):
    """The reason why a request was refused."""

    error: str
    close: list[str] | None = Field(None, description="similar names, if the adapter is not known")
