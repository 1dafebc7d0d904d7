"""The web application: POST /generate, GET /health and GET /metrics."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as WebError

from diffcore import __version__
from diffcore.cli.image_model import ImageModel
from diffcore.cli.serving.messages import (
    GenerateMessage,
    RequestDefaults,
    read_message,
    read_request,
)
from diffcore.cli.serving.results import MEDIA_TYPES, check_format, encode_samples
from diffcore.sampling import Samples
from diffcore.serving import SamplingService
from diffcore.serving.request import QueueFullError

T = TypeVar("T")

__all__ = ["ServedModel", "create_application"]

MAXIMUM_BODY = 2**16
"""Bytes of the largest body that is read."""
CONNECTION_CHECK = 0.2
"""Seconds between two checks whether the client is still connected."""
RETRY_AFTER = "1"
"""Seconds after which a client whose request met a full queue should send it again."""


class ServedModel(NamedTuple):
    """A model and the service that draws its samples.

    Args:
        name: name of the model, for `GET /health`.
        model: network, and the decoder of its latents.
        service: service of the network, which is running.
        defaults: what a request that names no components is drawn with.
        timeout: maximum seconds of a request.
    """

    name: str
    model: ImageModel
    service: SamplingService
    defaults: RequestDefaults
    timeout: float


def create_application(served: ServedModel) -> FastAPI:
    """Create the web application of a model.

    Args:
        served: the model and its service.

    Returns:
        The application, for any ASGI server.
    """
    application = FastAPI(title="diffcore", version=__version__, docs_url=None, redoc_url=None)
    schema = {"application/json": {"schema": GenerateMessage.model_json_schema()}}

    @application.exception_handler(WebError)
    async def _report(_: Request, error: WebError) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @application.get("/health")
    async def health() -> dict[str, Any]:
        if not served.service.is_running:
            raise HTTPException(503, "the service has ended")
        return _describe(served)

    @application.get("/metrics")
    async def metrics() -> Response:
        service = served.service
        text = service.counters.text(service.gauges)
        return Response(text, media_type="text/plain; version=0.0.4")

    @application.post("/generate", openapi_extra={"requestBody": {"content": schema}})
    async def generate(request: Request) -> Response:
        body = await _read_body(request)
        message, future = await _answer_mistakes(lambda: run_in_threadpool(_submit, served, body))
        samples = await _wait(request, future)
        content = await _answer_mistakes(
            lambda: run_in_threadpool(_encode, served, message, samples)
        )
        headers = {"X-Evaluations": f"{samples.evaluations:g}"}
        return Response(content, media_type=MEDIA_TYPES[message.format], headers=headers)

    return application


def _describe(served: ServedModel) -> dict[str, Any]:
    process, service = served.model.denoiser.process, served.service
    return {
        "status": "ok",
        "model": served.name,
        "shape": served.model.image_process.shape,
        "classes": process.classes,
        "rows": service.rows,
        "limits": vars(service.limits),
        "defaults": {name: str(value) for name, value in vars(served.defaults).items()},
        **service.gauges,
    }


async def _read_body(request: Request) -> bytes:
    """The body of a JSON request, of which no more than the maximum is read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the content type is {kind!r}, expected application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY:
            raise HTTPException(413, f"the body is longer than {MAXIMUM_BODY} bytes")
    return body


async def _answer_mistakes(call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call, whose errors become responses."""
    try:
        return await call()
    except QueueFullError as error:
        headers = {"Retry-After": RETRY_AFTER}
        raise HTTPException(503, str(error), headers) from None
    except (ValueError, TypeError) as error:
        raise HTTPException(422, str(error)) from None
    except RuntimeError as error:
        raise HTTPException(503, str(error)) from None


def _submit(served: ServedModel, body: bytes) -> tuple[GenerateMessage, Future[Samples]]:
    message = read_message(body)
    check_format(message, served.model.image_process)
    request = read_request(message, served.defaults)
    timeout = min(message.timeout or served.timeout, served.timeout)
    return message, served.service.submit(request, timeout)


async def _wait(request: Request, future: Future[Samples]) -> Samples:
    """Wait for samples; the request of a client that has gone is cancelled."""
    waiting = asyncio.wrap_future(future)
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=CONNECTION_CHECK)
            if not waiting.done() and await request.is_disconnected():
                future.cancel()
        return await _answer_mistakes(lambda: waiting)
    except TimeoutError as error:
        raise HTTPException(504, str(error)) from None
    except (CancelledError, asyncio.CancelledError):
        raise HTTPException(503, "the request was cancelled") from None


def _encode(served: ServedModel, message: GenerateMessage, samples: Samples) -> bytes:
    model = served.model
    decoded = samples._replace(x=model.decode(samples.x))
    null_label = model.denoiser.process.classes
    return encode_samples(message, decoded, model.image_process, null_label)
