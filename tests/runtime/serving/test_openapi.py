"""The description of the service: valid, complete, and enough to make a client from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

pytest.importorskip("kvx.tests.runtime.serving.serving")  # which skips where the extra serve is missing

import msgspec
from starlette.routing import Route

from kvx.runtime.serving import app, openapi, schema
from kvx.testing import FakeTranslator
from kvx.tests.runtime.serving.serving import Client, Json, running, service

OF_READERS = {"/openapi.json", "/spec", "/docs", *app.FILES}  # the description itself and the page


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running(service({"de-en": FakeTranslator({"Hund": "dog"})})) as address:
        yield Client(address)


@pytest.fixture(scope="module")
def description(client: Client) -> Json:
    found: Json = client.get("/openapi.json").json
    return found


def operations(description: Json) -> dict[str, tuple[str, str]]:
    """The path and method of each operation, by its id."""
    found = [
        (operation["operationId"], (path, method.upper()))
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_description_is_openapi_3_1(description: Json) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    assert description["openapi"].startswith("3.1.")
    validator.validate(description)


def test_it_is_found_where_libretranslate_has_it(client: Client, description: Json) -> None:
    assert client.get("/spec").json == description


def test_every_route_is_described_and_no_other(description: Json) -> None:
    made = service({})
    routes = app._routes(made)
    assert all(isinstance(route, Route) for route in routes)
    known = {
        (route.path, method)
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if method != "HEAD" and route.path not in OF_READERS
    }
    assert set(operations(description).values()) == known


def test_what_is_answered_is_as_described(client: Client, description: Json) -> None:
    validator = pytest.importorskip("openapi_schema_validator")
    asked: dict[str, Json] = {
        "translate": {"texts": ["Hund", [75]], "scores": True, "beam_size": 2, "n_best": 2},
        "alternatives": {"text": "Hund"},
        "score": {"texts": ["Hund"], "translations": [["dog", "cat"]]},
        "models": {},
    }
    for name, form in asked.items():
        path, method = operations(description)[name]
        reply = client.post(path, form) if form else client.send(method, path)
        answers = description["paths"][path][method.lower()]["responses"]
        [(kind, content)] = [one for one in answers["200"]["content"].items() if one[0] != "text/event-stream"]
        assert (reply.status, reply.kind) == (200, kind)
        validator.validate(reply.json, whole(content["schema"], description), validator.OAS31Validator)
    for form in {"texts": "a", "model": "none"}, {"texts": "a" * 60_000}:
        reply = client.post("/v1/translate", form)
        answer = description["paths"]["/v1/translate"]["post"]["responses"][str(reply.status)]
        validator.validate(
            reply.json, whole(answer["content"][reply.kind]["schema"], description), validator.OAS31Validator
        )


def whole(form: Json, description: Json) -> Json:
    """A schema with all that it may refer to."""
    return {**form, "components": description["components"]}


def test_every_status_that_an_error_may_have_is_described(description: Json) -> None:
    from kvx.runtime.serving.answers import STATUS

    for path, methods in description["paths"].items():
        if path.startswith("/v1/") and "post" in methods:
            told = set(methods["post"]["responses"])
            assert {str(status) for _, status, _ in STATUS} | {"200", "429"} <= told


def test_requests_name_every_field(description: Json) -> None:
    for form in schema.TranslateRequest, schema.AlternativesRequest, schema.ScoreRequest:
        told = description["components"]["schemas"][form.__name__]
        assert set(told["properties"]) == set(form.__struct_fields__)
        assert told["additionalProperties"] is False
        assert all(field.get("description") for field in told["properties"].values())


def test_the_example_is_answered(client: Client, description: Json) -> None:
    example = description["paths"]["/v1/translate"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v1/translate", example).status == 200


def test_a_client_that_is_made_from_the_description_works(client: Client) -> None:
    aiopenapi3 = pytest.importorskip("aiopenapi3")
    api = aiopenapi3.OpenAPI.load_sync(f"{client.address}/openapi.json")

    def call(name: str, form: Json | None = None) -> Any:  # noqa: ANN401
        return getattr(api._, name)(data=form) if form is not None else getattr(api._, name)()

    asked: Json = {"texts": ["Hund", "Katze"], "source_language": "de", "target_language": "en"}
    assert [one.text for one in call("translate", asked).translations] == ["dog", "KATZE"]
    [scored] = call("score", {"texts": ["Hund"], "translations": [["cat", "dog"]]}).results
    assert scored.best == 1
    assert [one.name for one in call("models").models] == ["de-en"]
    assert len(call("alternatives", {"text": "Hund", "count": 3}).alternatives) == 3


class Page(HTMLParser):
    """Which elements are open, and the texts of those of code."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.codes: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if "href" in given else []
        if tag not in ("meta", "link", "br", "hr", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "code" in self.open:
            self.codes.append(data)


@pytest.fixture(scope="module")
def page(client: Client) -> Page:
    reply = client.get("/docs")
    assert (reply.status, reply.kind) == (200, "text/html; charset=utf-8")
    assert reply.body.startswith(b"<!doctype html>")
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    found = Page()
    found.feed(reply.body.decode())
    found.close()
    return found


def test_the_page_of_the_description_is_well_formed(page: Page, client: Client) -> None:
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert client.get(link).status == 200


def test_the_page_names_every_route_and_field(page: Page, description: Json) -> None:
    told = set(page.codes)
    assert {f"{method} {path}" for path, method in operations(description).values()} <= told
    forms = description["components"]["schemas"]
    assert {name for form in forms.values() for name in form["properties"]} <= told
    assert set(openapi.LIBRE_FIELDS) <= told


def test_the_page_has_no_name_of_python(page: Page, client: Client) -> None:
    text = re.sub(r"<[^>]*>", " ", client.get("/docs").body.decode())
    assert not re.search(r"\bNone\b|UNSET|UnsetType|typing\.|msgspec", text)


def test_types_of_the_description_read_what_the_service_writes(client: Client) -> None:
    reply = client.post("/v1/translate", {"texts": "Hund. Katze", "format": "text"})
    found = msgspec.json.decode(reply.body, type=schema.TranslateResponse)
    assert msgspec.json.encode(found) == reply.body
