"""LibreTranslate's interface, as its clients know it: routes, fields, and the messages that they match."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response

from kvx.runtime.errors import KvxError, OptionError
from kvx.runtime.serving import schema
from kvx.runtime.serving.admission import Refused, TooLarge
from kvx.runtime.serving.answers import JSON, answer, headers_of, status_of
from kvx.runtime.serving.detection import Detected
from kvx.runtime.serving.exchange import Exchange
from kvx.runtime.serving.keys import Unauthorized
from kvx.runtime.serving.languages import name_of
from kvx.runtime.serving.models import Route
from kvx.runtime.serving.texts import Text, sentences_of, split
from kvx.runtime.serving.work import Work
from kvx.runtime.translation import Translation

FORMATS = ("text", "html")
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
BOUNDARY = re.compile(r"""boundary=("[^"]{1,70}"|[^\s";,]{1,70})""", re.IGNORECASE)
KNOWN = ("q", "source", "target", "format", "alternatives", "api_key", "apiKey")

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of forms that clients get wrong


class Invalid(KvxError):  # noqa: N818
    """A request that LibreTranslate refuses, in the words that clients know."""

    def __init__(self, got: str, status: int = 400) -> None:
        super().__init__(got, expected="a request as LibreTranslate takes it", remedy="Correct it.")
        self.status = status


def failed(error: BaseException) -> Response:
    """The answer to an error: its text, under `error`."""
    status, phrase = status_of(error)
    if isinstance(error, Invalid):
        status, said = error.status, error.got
    elif isinstance(error, Unauthorized):  # 400 for none, 403 for a wrong one
        status = 403 if error.wrong else 400
        said = "Invalid API key" if error.wrong else "Please contact the server operator to get an API key"
    elif isinstance(error, TooLarge) and error.option in ("characters", "texts"):
        status, said = 400, f"Invalid request: {error.got}, which exceeds text limit ({error.most})"
    elif isinstance(error, Refused) and error.reason not in ("loading", "closing"):
        status, said = 429, f"Slowdown: {error.got}. {error.remedy}"
    elif isinstance(error, KvxError):
        said = str(error)
    else:
        said = phrase
    return Response(msgspec.json.encode({"error": said}), status, headers_of(error), JSON)


@dataclass(frozen=True, slots=True)
class Fields:
    """What a request has sent, in JSON, as a form or in its query string: each field once, or as a list."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    async def read(cls, exchange: Exchange) -> Fields:
        """Those of a request. Raises Invalid and TooLarge."""
        request = exchange.request
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await exchange.body()
        most = exchange.service.options.texts + len(KNOWN)
        query = _pairs(request.scope["query_string"], most)
        if kind == JSON:
            found = _object(body)
        elif kind == MULTIPART:
            found = {**query, **await _parts(request, body, most)}
        elif kind == FORM or not body:
            found = {**query, **_pairs(body, most)}
        else:
            raise Invalid("Invalid request: send JSON or a form")
        return cls({name: found[name] for name in KNOWN if name in found})  # the rest need not be kept

    def text(self, name: str) -> str | None:
        """A field that is one text, if it is there. Raises Invalid."""
        value = self.values.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None and not isinstance(value, str):
            raise Invalid(f"Invalid request: {name} is not a text")
        return value or None

    def needed(self, name: str) -> str:
        """One that has to be there. Raises Invalid."""
        found = self.text(name)
        if found is None:
            raise _missing(name)
        return found

    @property
    def q(self) -> str | list[str]:
        """The texts: one, or a list. Raises Invalid."""
        value = self.values.get("q")
        if value in (None, "", []):
            raise _missing("q")
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise Invalid("Invalid request: q is neither a text nor a list of texts")
        return value

    @property
    def alternatives(self) -> int:
        """How many are asked for. Raises Invalid."""
        value = self.values.get("alternatives") or 0
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value.strip()[:9])
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Invalid("Invalid request: 'alternatives' parameter is not a number")
        return value

    @property
    def key(self) -> str | None:
        """The API key, under the names that clients have for it."""
        return self.text("api_key") or self.text("apiKey")


async def translate(exchange: Exchange) -> Response:
    """POST /translate."""
    service, fields = exchange.service, await Fields.read(exchange)
    exchange.key = service.key_of(fields.key or exchange.key_in_head)
    q = fields.q
    given = q if isinstance(q, list) else [q]
    form = _format(fields)
    exchange.check_sizes(len(given), sum(map(len, given)))
    service.check_loaded()
    source, target, count = fields.needed("source"), fields.needed("target"), fields.alternatives
    if count >= service.options.beams:
        raise Invalid(f"Invalid request: 'alternatives' parameter must be < {service.options.beams}")
    if service.options.log_texts:
        exchange.facts["given"] = given
    await exchange.admit()
    routes, detected = await _routes(exchange, given, source, target)
    for route in set(routes):
        exchange.use(route)
    options = {"beam_size": count + 1, "n_best": count + 1} if count else {}
    ways = [service.way(route, options) for route in routes]
    texts = await split(list(zip(given, ways, detected, strict=True)), form)
    exchange.facts["model"] = routes[0].name
    results = await Work(sentences_of(texts), exchange.until).results()
    _refuse_late(results)
    exchange.facts["tokens"] = sum(len(one.ids) for one in results)
    return answer(_translated(texts, results, count, as_list=isinstance(q, list)))


def _translated(texts: Sequence[Text], results: Sequence[Translation], count: int, *, as_list: bool) -> dict[str, Any]:
    """The answer to a request for translations: lists where a list was sent."""
    left = iter(results)
    own = [[next(left) for _ in text.sentences] for text in texts]
    found: dict[str, list[Any]] = {
        "translatedText": [text.joined(sentences) for text, sentences in zip(texts, own, strict=True)]
    }
    if any(text.detected is not None for text in texts):
        found["detectedLanguage"] = [_detected(text.detected) for text in texts if text.detected is not None]
    if count:
        found["alternatives"] = [
            [text.joined(sentences, number) for number in range(1, count + 1)]
            for text, sentences in zip(texts, own, strict=True)
        ]
    return {name: values if as_list else values[0] for name, values in found.items()}


async def detect(exchange: Exchange) -> Response:
    """POST /detect."""
    fields = await Fields.read(exchange)
    exchange.key = exchange.service.key_of(fields.key or exchange.key_in_head)
    q = fields.q
    text = q if isinstance(q, str) else "\n".join(q)
    exchange.check_sizes(1, len(text))
    exchange.service.check_loaded()
    await exchange.admit()
    found = await asyncio.to_thread(exchange.service.detector.rank, text)
    return answer([_detected(one) for one in found])


async def languages(exchange: Exchange) -> Response:
    """GET /languages."""
    exchange.service.check_loaded()
    pairs = exchange.service.models.pairs
    return answer([{"code": code, "name": name_of(code), "targets": targets} for code, targets in pairs.items()])


async def settings(exchange: Exchange) -> Response:
    """GET /frontend/settings."""
    service = exchange.service
    pairs = service.models.pairs
    codes = list(pairs)
    source = {"code": schema.AUTO, "name": "Auto Detect"}
    target = next((code for targets in pairs.values() for code in targets), "")
    return answer(
        {
            "charLimit": service.options.characters,
            "frontendTimeout": 500,
            "apiKeys": service.keys is not None,
            "keyRequired": service.keys is not None,
            "suggestions": False,
            "filesTranslation": False,
            "supportedFilesFormat": [],
            "language": {
                "source": source if codes else {"code": "", "name": ""},
                "target": {"code": target, "name": name_of(target) if target else ""},
            },
        }
    )


async def refused(exchange: Exchange) -> Response:
    """POST /suggest and /translate_file."""
    raise Invalid("This feature is off on this server", status=403)


async def _routes(
    exchange: Exchange, given: Sequence[str], source: str, target: str
) -> tuple[list[Route], list[Detected | None]]:
    """The route of each text, and its language where that was asked for. Raises Invalid."""
    models = exchange.service.models
    to = models.target(target)
    if to is None:
        raise Invalid(f"{target} is not supported")
    if source.lower() == schema.AUTO:
        if not exchange.service.detector.useful:
            raise Invalid(f"{source} is not supported")
        found = await exchange.service.detect([(text, to) for text in given])
        return [_route(exchange, one.language, to, detected=True) for one in found], [*found]
    from_ = models.source(source)
    if from_ is None:
        raise Invalid(f"{source} is not supported")
    return [_route(exchange, from_, to)] * len(given), [None] * len(given)


def _route(exchange: Exchange, source: str, target: str, *, detected: bool = False) -> Route:
    try:
        return exchange.service.route(source, target, None, detected=detected)
    except OptionError:
        names = f"{name_of(target)} ({target})", f"{name_of(source)} ({source})"
        raise Invalid(f"{names[0]} is not available as a target language from {names[1]}") from None


def _format(fields: Fields) -> Literal["text", "html"]:
    found = fields.text("format") or "text"
    if found not in FORMATS:
        raise Invalid(f"{found} format is not supported")
    return "html" if found == "html" else "text"


def _refuse_late(results: Sequence[Translation]) -> None:
    """Raises TimeoutError where there was not enough time: clients here could not tell half a translation."""
    if any(one.finish_reason == "deadline" for one in results):
        raise TimeoutError


def _detected(found: Detected) -> dict[str, object]:
    return {"confidence": round(100 * found.confidence, 1), "language": found.language}


def _missing(name: str) -> Invalid:
    return Invalid(f"Invalid request: missing {name} parameter")


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Invalid("Invalid JSON format") from None
    if not isinstance(found, dict):
        raise Invalid("Invalid JSON format: expected an object")
    return found


def _pairs(encoded: bytes, most: int) -> dict[str, Any]:
    """A form or query string of at most this many fields; one that comes several times is a list."""
    if encoded.count(b"&") >= most:
        raise Invalid(f"Invalid request: the form has more than {most} fields")
    try:
        pairs = parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict")
    except ValueError:
        raise Invalid("Invalid request: the form is not UTF-8") from None
    return _collected(pairs)


async def _parts(request: Request, body: bytes, most: int) -> dict[str, Any]:
    """A form of several parts in UTF-8; files are left to those who can read them."""
    boundary = BOUNDARY.search(request.headers["content-type"])
    if boundary is None:
        raise Invalid("Invalid request: the form cannot be read (it names no boundary)")
    head = (b"content-type", f"{MULTIPART}; boundary={boundary[1]}".encode("latin-1"))  # and no codec of the client's

    async def whole() -> Any:  # noqa: ANN401  # as ASGI has it
        return {"type": "http.request", "body": body, "more_body": False}

    again = Request({**request.scope, "headers": [head]}, whole)
    try:
        async with again.form(max_files=0, max_fields=most) as form:
            return _collected([(name, value) for name, value in form.multi_items() if isinstance(value, str)])
    except (MultiPartException, ValueError, KeyError) as error:
        raise Invalid(f"Invalid request: the form cannot be read ({error})") from None
    except Exception as error:
        if type(error).__name__ == "HTTPException":
            raise Invalid("Invalid request: the form cannot be read") from None
        raise


def _collected(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in found:
            found[name] = value
        elif isinstance(found[name], list):
            found[name].append(value)
        else:
            found[name] = [found[name], value]
    return found
