"""The description of the service, OpenAPI 3.1, and a page to read it."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

import kvx
from kvx.runtime.serving import schema

TYPES = (
    schema.TranslateRequest,
    schema.TranslateResponse,
    schema.AlternativesRequest,
    schema.AlternativesResponse,
    schema.ScoreRequest,
    schema.ScoreResponse,
    schema.ModelsResponse,
    schema.Problem,
)
NAMED = re.compile(r"`(\w+)`")
SCHEMAS = "#/components/schemas/"
STREAM = (
    "With stream, server-sent events: `token` {index, text, id}, the next piece of the text with this index; `result` "
    "{index, translation}, once a text is whole; `error`, a problem; and `end`."
)
EXAMPLE = {"texts": ["Ein Hund schläft."], "source_language": "de", "target_language": "en"}
LIBRE_FIELDS = {
    "q": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "source": {"type": "string", "description": "A code, or auto."},
    "target": {"type": "string"},
    "format": {"type": "string", "enum": ["text", "html"], "default": "text"},
    "alternatives": {"type": "integer", "default": 0},
    "api_key": {"type": "string"},
}


@functools.cache
def description() -> dict[str, Any]:
    """The whole service."""
    _, components = msgspec.json.schema_components(TYPES, ref_template=SCHEMAS + "{name}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvx",
            "version": kvx.__version__,
            "description": "Translation with encoder-decoder Transformers. /v1 is kvx's own API; /translate, /detect "
            "and /languages speak LibreTranslate's.",
        },
        "servers": [{"url": "/"}],
        "paths": dict(_paths()),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, name, request, response, summary in (
        ("/v1/translate", "translate", schema.TranslateRequest, schema.TranslateResponse, "Translate texts."),
        (
            "/v1/alternatives",
            "alternatives",
            schema.AlternativesRequest,
            schema.AlternativesResponse,
            "Other ways to go on after a beginning of a translation.",
        ),
        ("/v1/score", "score", schema.ScoreRequest, schema.ScoreResponse, "How probable given translations are."),
    ):
        operation = _operation(name, summary, response)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
        if name == "translate":
            operation["description"] = STREAM
            operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLE
            operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        yield path, {"post": operation}
    models = _operation("models", "The models, their languages, limits and proofs.", schema.ModelsResponse)
    yield "/v1/models", {"get": models}
    yield from _compatible()
    for path, summary in (
        ("/health", "Whether the service is alive."),
        ("/ready", "Whether its models are loaded and their engines get on."),
        ("/metrics", "Counters for Prometheus."),
    ):
        ok = {"200": {"description": "Yes."}} | ({"503": {"description": "Not now."}} if path == "/ready" else {})
        yield path, {"get": {"operationId": path[1:], "summary": summary, "responses": ok}}


def _compatible() -> Iterator[tuple[str, dict[str, Any]]]:
    """LibreTranslate's routes."""
    for path, needed, summary in (
        ("/translate", ["q", "source", "target"], "Translate a text or a list, as LibreTranslate."),
        ("/detect", ["q"], "The languages that a text may be in, as LibreTranslate."),
    ):
        fields = LIBRE_FIELDS if path == "/translate" else {name: LIBRE_FIELDS[name] for name in ("q", "api_key")}
        form = {"schema": {"type": "object", "properties": fields, "required": needed}}
        content = {"application/json": form, "application/x-www-form-urlencoded": form}
        operation = {"operationId": f"libretranslate_{path[1:]}", "summary": summary, "responses": _json_answers()}
        yield path, {"post": operation | {"requestBody": {"required": True, "content": content}}}
    for path, name, summary in (
        ("/languages", "languages", "All languages, each with those to which it can be translated."),
        ("/frontend/settings", "settings", "The limits, as LibreTranslate tells them."),
    ):
        yield path, {"get": {"operationId": name, "summary": summary, "responses": _json_answers()}}
    for path in ("/suggest", "/translate_file"):
        off = {"4XX": _json_answers()["4XX"]}
        summary = "Off, as LibreTranslate says it."
        yield path, {"post": {"operationId": f"libretranslate_{path[1:]}", "summary": summary, "responses": off}}


def _json_answers() -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    return {
        "200": {"description": "The answer.", "content": {"application/json": {"schema": {}}}},
        "4XX": {"description": "What is wrong.", "content": {"application/json": {"schema": error}}},
    }


def _operation(name: str, summary: str, response: type) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": _ref(schema.Problem)}}
    wait = {"retry-after": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": _ref(response)}}},
            "400": {"description": "The request cannot be answered as it is.", "content": problem},
            "401": {"description": "A key is needed.", "content": problem},
            "408": {"description": "The request did not come in time.", "content": problem},
            "413": {"description": "The request is larger than a limit.", "content": problem},
            "415": {"description": "The request is not JSON.", "content": problem},
            "429": {"description": "Too many requests of one client.", "content": problem, "headers": wait},
            "500": {"description": "Something went wrong in the service.", "content": problem},
            "503": {"description": "Too many requests, or not ready yet.", "content": problem, "headers": wait},
            "504": {"description": "The request took too long.", "content": problem},
        },
    }


def _ref(form: type) -> dict[str, str]:
    return {"$ref": SCHEMAS + form.__name__}


@functools.cache
def page() -> str:
    """The description as HTML."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    found = description()
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kvx: API</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/docs.css">'
    yield '<link rel="icon" href="/favicon.svg"></head><body><main><h1>The API of this service</h1>'
    yield f'<p>{html.escape(found["info"]["description"])} <a href="/openapi.json">OpenAPI description</a>.</p>'
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(operation['summary'])}</p>"
            if "description" in operation:
                yield f"<p>{_html(operation['description'])}</p>"
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                yield from _fields(_resolved(content["schema"]))
            answer = operation["responses"].get("200", {})
            if answered := answer.get("content", {}).get("application/json", {}).get("schema"):
                name = answered["$ref"].removeprefix(SCHEMAS)
                yield f'<p>Answer: <a href="#{name}"><code>{name}</code></a></p>'
    yield "<h2>What is answered</h2>"
    for name, form in found["components"]["schemas"].items():
        if not name.endswith("Request"):
            yield f'<h3 id="{name}"><code>{name}</code></h3><p>{html.escape(form.get("description", ""))}</p>'
            yield from _fields(form)
    yield "</main></body></html>"


def _fields(form: Mapping[str, Any]) -> Iterator[str]:
    needed = form.get("required", ())
    yield '<div class="table"><table><thead><tr><th>field</th><th>type</th><th></th></tr></thead><tbody>'
    for name, field in form.get("properties", {}).items():
        about = _html(field.get("description", "")) + (" <b>Required.</b>" if name in needed else "")
        yield f"<tr><td><code>{name}</code></td><td>{_type(field)}</td><td>{about}</td></tr>"
    yield "</tbody></table></div>"


def _html(text: str) -> str:
    """A text with `names` in it."""
    return NAMED.sub(r"<code>\1</code>", html.escape(text))


def _resolved(form: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in form:
        return form
    found: Mapping[str, Any] = description()["components"]["schemas"][form["$ref"].removeprefix(SCHEMAS)]
    return found


def _type(field: Mapping[str, Any]) -> str:
    """A type in a few words."""
    if "$ref" in field:
        name = field["$ref"].removeprefix(SCHEMAS)
        return f'<a href="#{name}">{name}</a>'
    if "enum" in field:
        return " | ".join(html.escape(str(one)) for one in field["enum"])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " | ".join(map(_type, field[several]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
