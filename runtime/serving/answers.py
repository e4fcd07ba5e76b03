"""Answers in JSON, and errors as answers: problem details (RFC 9457)."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from kvx.runtime.errors import CapacityError, DeviceError, EngineClosed, InputError, KvxError, Overloaded
from kvx.runtime.serving import schema
from kvx.runtime.serving.admission import TooLarge
from kvx.runtime.serving.exchange import NotAcceptable, SlowBody
from kvx.runtime.serving.keys import Unauthorized

JSON = "application/json"
PROBLEM = "application/problem+json"

STATUS: tuple[tuple[type[BaseException], int, str], ...] = (  # the first that an error is decides
    (Unauthorized, 401, "Unauthorized"),
    (TooLarge, 413, "Content Too Large"),
    (SlowBody, 408, "Request Timeout"),
    (NotAcceptable, 415, "Unsupported Media Type"),
    (Overloaded, 503, "Service Unavailable"),
    (EngineClosed, 503, "Service Unavailable"),
    (CapacityError, 413, "Content Too Large"),
    (DeviceError, 500, "Internal Server Error"),
    (KvxError, 400, "Bad Request"),
    (TimeoutError, 504, "Gateway Timeout"),
)
TOO_MANY = "client"  # the reason of a refusal that concerns one client


def status_of(error: BaseException) -> tuple[int, str]:
    """The HTTP status of an error, with its phrase."""
    if getattr(error, "reason", None) == TOO_MANY:
        return 429, "Too Many Requests"
    return next(
        ((status, phrase) for kind, status, phrase in STATUS if isinstance(error, kind)),
        (500, "Internal Server Error"),
    )


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers of an answer to an error."""
    found = {"cache-control": "no-store"}
    if isinstance(error, Overloaded):
        found["retry-after"] = f"{max(1, round(error.retry_after))}"
    if isinstance(error, Unauthorized):
        found["www-authenticate"] = "Bearer"
    if isinstance(error, SlowBody):  # of a body that is too long, the rest is read, so that its sender hears of it
        found["connection"] = "close"
    return found


def problem_of(error: BaseException) -> schema.Problem:
    """An error as RFC 9457 has it. What is not kvx's own is told to nobody."""
    status, title = status_of(error)
    if not isinstance(error, KvxError):
        detail = "The request took too long." if status == 504 else "Something went wrong in the service."
        return schema.Problem(title=title, status=status, detail=detail)
    text = error.line - 1 if isinstance(error, InputError) and error.line is not None else None
    detail = f"{error.got}. Expected {error.expected}. {error.remedy}"
    return schema.Problem(title=title, status=status, detail=detail, option=error.option, text=text)


def failed(error: BaseException) -> Response:
    """The answer to an error."""
    problem = problem_of(error)
    body = msgspec.json.encode(problem)
    return Response(body, problem.status, headers_of(error), PROBLEM)


def answer(form: object, status: int = 200) -> Response:
    """An answer in JSON. Numbers that are not finite are null."""
    return Response(msgspec.json.encode(form), status, media_type=JSON, headers={"cache-control": "no-store"})
