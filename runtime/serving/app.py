"""The service as an ASGI application: which route is answered by what."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvx.runtime.serving import answers, libretranslate, metrics, native, openapi, schema
from kvx.runtime.serving.exchange import Answer, Endpoint, Exchange, Failed, note_failure
from kvx.runtime.serving.service import Service

PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/docs.css": ("docs.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
SAFE = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def application(service: Service) -> ASGIApp:
    """The application over a service. Its endpoints are found by their paths at once, all else by Starlette."""
    routes = _routes(service)
    endpoints = {route.path: route.endpoint for route in routes if isinstance(route.endpoint, Endpoint)}
    rest = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = endpoints.get(scope["path"].rstrip("/"))
        chosen = rest if endpoint is None or endpoint.method != scope["method"] else endpoint
        try:
            await chosen(scope, receive, send)
        except Exception as error:  # which the server answers or ends, and tells nobody
            note_failure(error, with_texts=service.options.log_texts)
            raise

    if not service.options.cors:
        return answer
    return CORSMiddleware(
        answer,
        allow_origins=service.options.cors,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type", "X-API-Key"),
        expose_headers=("Retry-After",),
    )


def _routes(service: Service) -> list[Route]:
    def route(path: str, method: str, answer: Answer, failed: Failed) -> Route:
        return Route(path, Endpoint(service, path, method, answer, failed), methods=[method])

    mine, theirs = partial(route, failed=answers.failed), partial(route, failed=libretranslate.failed)
    return [
        mine("/v1/translate", "POST", native.translate),
        mine("/v1/alternatives", "POST", native.alternatives),
        mine("/v1/score", "POST", native.score),
        mine("/v1/models", "GET", native.models),
        theirs("/translate", "POST", libretranslate.translate),
        theirs("/detect", "POST", libretranslate.detect),
        theirs("/languages", "GET", libretranslate.languages),
        theirs("/frontend/settings", "GET", libretranslate.settings),
        theirs("/suggest", "POST", libretranslate.refused),
        theirs("/translate_file", "POST", libretranslate.refused),
        mine("/ready", "GET", _ready),
        Route("/health", _health),
        Route("/metrics", partial(_metrics, service)),
        Route("/openapi.json", _description),
        Route("/spec", _description),
        Route("/docs", _docs),
        *map(_file, FILES),
    ]


async def _health(_: Request) -> Response:
    return answers.answer({"status": "ok"})


async def _ready(exchange: Exchange) -> Response:
    ready = await exchange.service.is_ready()
    return answers.answer({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


async def _metrics(service: Service, _: Request) -> Response:
    return Response(service.metrics.page(), media_type=metrics.CONTENT_TYPE)


async def _description(_: Request) -> Response:
    return answers.answer(openapi.description())


async def _docs(_: Request) -> Response:
    return Response(openapi.page(), media_type="text/html", headers=SAFE)


def _file(path: str) -> Route:
    """A file of the page, from memory."""
    name, kind = FILES[path]
    body = (PAGE / name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    async def give(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        return Response(body, media_type=kind, headers={**SAFE, "etag": tag})

    return Route(path, give)


async def _no_route(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException), "the handler is for these alone"
    allowed = (error.headers or {}).get("Allow")
    said = f"{request.method} {request.url.path:.200} is not answered" + (f", but {allowed}" if allowed else "")
    problem = schema.Problem(title=error.detail, status=error.status_code, detail=f"{said}. /docs has all routes.")
    form = msgspec.to_builtins(problem) | {"error": problem.detail}  # also for clients of LibreTranslate
    return Response(msgspec.json.encode(form), error.status_code, error.headers, answers.PROBLEM)
