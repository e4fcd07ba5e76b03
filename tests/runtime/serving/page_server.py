"""What the page's test talks to: a toy translator that answers as the service does, faults on demand, and a server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvx.tests.runtime.serving.serving import listening

Json = dict[str, Any]

PAGE = Path(__file__).resolve().parents[3] / "runtime" / "serving" / "page"
FILES = {"/": "index.html", **{f"/{name}": name for name in ("page.css", "page.js", "favicon.svg")}}
POLICY = "; ".join(
    ["default-src 'self'", "img-src 'self' data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

GERMAN = {"code": "de", "name": "German"}
ENGLISH = {"code": "en", "name": "English"}
WORDS = {
    "ein": "a", "eine": "a", "der": "the", "die": "the", "kleiner": "small", "hund": "dog", "katze": "cat",
    "läuft": "runs", "schläft": "sleeps", "schnell": "quickly", "über": "across", "grüne": "green", "wiese": "meadow",
    "auf": "on", "dem": "the", "dach": "roof", "und": "and", "träumt": "dreams",
}  # fmt: skip
OTHERS = {
    "dog": [
        "dog dashes over the green meadow.",
        "hound runs swiftly over the green meadow.",
        "puppy runs over a meadow.",
    ],
    "meadow": ["grass.", "lawn.", "field.", "pasture."],
}
PIECES = re.compile(r"\w+|[^\w\s]")


def model(name: str, source: list[Json], target: list[Json], attention: bool, verified: bool = True) -> Json:
    proof = {"verified": True, "max_abs_error": 1.2e-6} if verified else None
    languages = {"source_languages": source, "target_languages": target}
    limits = {"max_new_tokens": 256, "source_positions": 512}
    return {"name": name, **languages, "precision": "int8", "attention": attention, "proof": proof, **limits}


MODELS = [
    model("de-en", [GERMAN], [ENGLISH], attention=True),
    model("en-de", [ENGLISH], [GERMAN], attention=False, verified=False),
]
DESCRIPTION: Json = {"models": MODELS, "detection": True, "limits": {"characters": 2000, "texts": 100}}


@dataclass(slots=True)
class Toy:
    """Translates word by word. It waits where `held` words are written, says `broken` instead of a result, or nothing
    where that is empty, and `dress` gives pieces another look.
    """

    description: Json = field(default_factory=lambda: DESCRIPTION)
    held: int | None = None
    broken: Json | None = None
    dress: Callable[[str], str] = str

    async def models(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def translate(self, request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: Json) -> AsyncIterator[str]:
        found = translated(body)
        for one in found["sentences"]:
            one.update({name: [*map(self.dress, one[name])] for name in ("tokens", "source_tokens") if name in one})
        for i, piece in enumerate(re.findall(r"\s*\S+|\s+$", found["text"])):
            while self.held == i:
                await asyncio.sleep(0.01)
            yield event("token", {"index": 0, "text": piece})
        if self.broken is None:
            yield event("result", {"index": 0, "translation": found})
            yield event("end", {})
        elif self.broken:
            yield event("error", self.broken)

    async def alternatives(self, request: Request) -> Response:
        body = await request.json()
        whole = word_by_word(body["text"])
        rest = whole[len(body["prefix"]) :]
        others = OTHERS.get(PIECES.findall(rest)[0], [rest.swapcase()])
        texts = [whole, *(body["prefix"] + other for other in others)][: body["count"]]
        found = [{"text": text, "score": -float(i), "finish_reason": "end"} for i, text in enumerate(texts)]
        return JSONResponse({"alternatives": found})


def event(name: str, data: Json) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def word_by_word(text: str) -> str:
    return re.sub(r"\w+", lambda word: cased(word[0]), text)


def cased(word: str) -> str:
    found = WORDS.get(word.lower(), word)
    return found.capitalize() if word.lower() in ("ein", "eine", "der", "die") and word[0].isupper() else found


def pieces(text: str) -> list[str]:
    padded = f" {text}"
    found = [padded[match.start() - 1 : match.end()] for match in PIECES.finditer(padded)]
    return [f"▁{piece[1:]}" if piece[0].isspace() else piece[1:] for piece in found]


def translated(body: Json) -> Json:
    [text] = body["texts"]
    parts = re.split(r"([^\s.!?][^.!?]*[.!?]*)", text)
    sentences = [sentence(part, body.get("align", False)) for part in parts[1::2]]
    gaps = parts[::2]
    whole = gaps[0] + "".join(one["text"] + gap for one, gap in zip(sentences, gaps[1:], strict=True))
    detected = {"detected": {"language": "de", "confidence": 0.98}} if body.get("source_language") == "auto" else {}
    language = "de" if detected else body.get("source_language")
    name = body.get("model", "de-en")
    found = {"text": whole, "source_language": language, "model": name, "gaps": gaps, "sentences": sentences}
    return found | detected


def sentence(text: str, align: bool) -> Json:
    found = word_by_word(text)
    tokens, source = pieces(found), pieces(text)
    aligned = {"source_tokens": source, "alignment": list(range(len(tokens)))} if align else {}
    return {"source": text, "text": found, "finish_reason": "end", "tokens": tokens, **aligned}


async def page_file(request: Request) -> Response:
    path = PAGE / FILES[request.url.path]
    return FileResponse(path, media_type=TYPES[path.suffix], headers={"Content-Security-Policy": POLICY})


def toy_app(toy: Toy) -> Starlette:
    posts = {"/v1/translate": toy.translate, "/v1/alternatives": toy.alternatives}
    routes = [Route(path, page_file) for path in FILES] + [Route("/v1/models", toy.models)]
    return Starlette(routes=routes + [Route(path, answer, methods=["POST"]) for path, answer in posts.items()])


@dataclass(slots=True)
class Faults:
    """An app before which the next requests of a path fail as told, and which remembers what was asked."""

    app: ASGIApp
    coming: dict[str, list[Response]] = field(default_factory=dict)
    key: str | None = None
    asked: list[tuple[str, Json]] = field(default_factory=list)

    def fail(self, path: str, status: int, detail: str, times: int = 1, **headers: str) -> None:
        self.coming.setdefault(path, []).extend(problem(status, detail, **headers) for _ in range(times))

    def bodies(self, path: str) -> list[Json]:
        return [body for asked, body in self.asked if asked == path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        message = await receive()
        self.asked.append((scope["path"], json.loads(message.get("body") or b"{}")))
        failure = self._failure(scope)
        if failure is not None:
            await failure(scope, receive, send)
            return
        messages = iter([message])

        async def replayed() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replayed, send)

    def _failure(self, scope: Scope) -> Response | None:
        if self.key is not None and dict(scope["headers"]).get(b"authorization") != f"Bearer {self.key}".encode():
            return problem(401, "This service needs an API key.")
        coming = self.coming.get(scope["path"], [])
        return coming.pop(0) if coming else None


def problem(status: int, detail: str, **headers: str) -> Response:
    body = {"type": "about:blank", "title": "Refused", "status": status, "detail": detail}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, headers=names, media_type="application/problem+json")


def served(app: ASGIApp) -> AbstractContextManager[str]:
    """The address of a server of the app, on a free port of this machine."""
    return listening(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
