"""kvx's own API, below /v1: everything that the library can do."""

from __future__ import annotations

import asyncio
import difflib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.responses import Response

from kvx.runtime.engine.scoring import Ranking
from kvx.runtime.errors import InputError, OptionError
from kvx.runtime.serving import schema
from kvx.runtime.serving.admission import TooLarge
from kvx.runtime.serving.answers import JSON, answer
from kvx.runtime.serving.exchange import EventStream, Exchange, NotAcceptable
from kvx.runtime.serving.languages import name_of
from kvx.runtime.serving.models import Model, Route
from kvx.runtime.serving.streaming import Stream, result_of_text, tokens_of
from kvx.runtime.serving.texts import Asked, Text, sentences_of, split
from kvx.runtime.serving.work import Work
from kvx.runtime.text.sources import Source
from kvx.runtime.translation import Translation

Form = TypeVar("Form", bound=Struct)


async def read(exchange: Exchange, form: type[Form]) -> Form:
    """The body of a request. Raises Unauthorized, NotAcceptable, TooLarge and OptionError."""
    exchange.key = exchange.service.key_of(exchange.key_in_head)
    kind = exchange.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise NotAcceptable(
            f"The content type is {kind or 'missing':.80}", expected=JSON, remedy="Send JSON, and say so."
        )
    return decoded(await exchange.body(), form)


def decoded(body: bytes, form: type[Form]) -> Form:
    """A body as a form. Raises OptionError with the name of the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), form) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(
            f"The body is not JSON ({error or 'nested too deeply'})",
            expected="one JSON object in UTF-8",
            remedy="Correct the body.",
        ) from None


def _invalid(said: str, form: type[Struct]) -> OptionError:
    """What msgspec says of a field, as an error of ours."""
    what, _, place = said.partition(" - at ")
    option = place.strip("`").removeprefix("$").lstrip(".").partition("[")[0].partition(".")[0] or None
    unknown = what.rpartition("unknown field ")[2].strip("`") if "unknown field" in what else None
    if unknown is not None and option is None:
        near = difflib.get_close_matches(unknown, form.__struct_fields__, 1)
        return OptionError(
            f"There is no field `{unknown:.60}`",
            expected=f"one like `{near[0]}`" if near else f"fields of {form.__name__}",
            remedy="Correct its name or leave it out. /docs has all fields.",
            option=unknown[:60],
        )
    expected, _, got = what.removeprefix("Expected ").partition(", got ")
    if got:
        what = f"{place or 'The body'} is of the type {got}"
    elif place:
        what += f" at {place}"
    return OptionError(
        what,
        expected=expected if got else "the fields that /docs describes",
        remedy="Correct the request.",
        option=option,
    )


async def translate(exchange: Exchange) -> Response:
    """POST /v1/translate."""
    asked: Any = await read(exchange, schema.TranslateRequest)
    given: list[Source] = asked.texts if isinstance(asked.texts, list) else [asked.texts]
    exchange.check_sizes(len(given), sum(map(len, given)) + schema.size_of(schema.asked_options(asked)))
    exchange.service.check_loaded()
    _note_texts(exchange, given)
    await exchange.admit()
    texts = await _texts(exchange, given, asked)
    exchange.facts["model"] = texts[0].way.route.name if texts else None
    until = exchange.until
    if asked.deadline is not None:
        until = min(until, time.monotonic() + _positive("deadline", asked.deadline))
    work = Work(sentences_of(texts), until)
    if asked.stream:
        return EventStream(Stream(exchange, texts, work).events(), until)
    found = iter(await work.results())
    results = [result_of_text(text, [next(found) for _ in text.sentences]) for text in texts]
    exchange.facts["tokens"] = sum(map(tokens_of, results))
    return answer(schema.TranslateResponse(results))


async def _texts(
    exchange: Exchange,
    given: Sequence[Source],
    asked: Any,  # noqa: ANN401  # made at run time
) -> list[Text]:
    """Each text with its way, whose models are there until it is answered, and its sentences. Raises OptionError and
    InputError.
    """
    service, options = exchange.service, schema.asked_options(asked)
    sources = _per_text("source_language", options.pop("source_language", None), len(given))
    targets = _per_text("target_language", options.pop("target_language", None), len(given))
    auto = [number for number, code in enumerate(sources) if code == schema.AUTO]
    words = [(text if isinstance(text := given[number], str) else "", targets[number]) for number in auto]
    detected = dict(zip(auto, await service.detect(words, asked.model) if auto else [], strict=True))
    if asked.format != "sentence":
        _refuse_several(options, asked.format)
    found: list[Asked] = []
    for number, text in enumerate(given):
        own = detected.get(number)
        route = service.route(
            own.language if own else sources[number], targets[number], asked.model, detected=bool(own)
        )
        way = service.way(route, options)
        found.append((text, way, own))
    for route in {way.route for _, way, _ in found}:
        exchange.use(route)
    return await split(found, asked.format)


def _per_text(option: str, codes: Any, count: int) -> Sequence[str | None]:  # noqa: ANN401  # a code, codes or None
    """The code of each text. Raises OptionError where there are not as many."""
    if codes is None or isinstance(codes, str):
        return [codes] * count
    if len(codes) != count:
        raise OptionError(
            f"`{option}` has {len(codes)} codes, and there are {count} texts",
            expected="one code, or one for each text",
            remedy="Give as many.",
            option=option,
        )
    return list(codes)


def _refuse_several(options: Mapping[str, Any], form: str) -> None:
    """Raises OptionError for what only one sentence can have."""
    for name in ("n_best", "samples", "prefix"):
        if options.get(name) not in (None, 1, "", ()):
            raise OptionError(
                f"`{name}` is given for texts of several sentences (`format` {form})",
                expected=f"no `{name}`, or `format` sentence",
                remedy="Send sentences.",
                option=name,
            )


def _positive(name: str, value: float) -> float:
    if not value >= 0:
        raise OptionError(
            f"`{name}` is {value:g}", expected="seconds from 0", remedy="Correct it or leave it out.", option=name
        )
    return value


def _note_texts(exchange: Exchange, given: Sequence[Source]) -> None:
    if exchange.service.options.log_texts:
        exchange.facts["given"] = [text if isinstance(text, str) else list(text) for text in given]


async def alternatives(exchange: Exchange) -> Response:
    """POST /v1/alternatives."""
    asked: Any = await read(exchange, schema.AlternativesRequest)
    exchange.check_sizes(1, len(asked.text) + len(asked.prefix) + schema.size_of(schema.asked_options(asked)))
    exchange.service.check_loaded()
    most = exchange.service.options.beams
    if asked.count > most:
        raise TooLarge(f"`count` is {asked.count}", most, "at a time", "count", "Ask for fewer.")
    _note_texts(exchange, [asked.text])
    await exchange.admit()
    options = schema.asked_options(asked)
    route = _route(exchange, asked, options)
    way = exchange.service.way(route, options).options[-1]

    def run(cancelled: Callable[[], bool]) -> list[Translation]:
        translator = route.legs[-1].model.translator
        return translator.alternatives(asked.text, asked.prefix, asked.count, way, cancelled=cancelled)

    found = await in_thread(exchange.service.calls, run, exchange.until)
    return answer({"model": route.name, "alternatives": [one.to_dict() for one in found]})


async def score(exchange: Exchange) -> Response:
    """POST /v1/score."""
    asked: Any = await read(exchange, schema.ScoreRequest)
    candidates = [[one] if isinstance(one, str) else one for one in asked.translations]
    count = len(asked.texts) + sum(map(len, candidates))
    characters = sum(map(len, asked.texts)) + sum(len(one) for each in candidates for one in each)
    exchange.check_sizes(count, characters)
    exchange.service.check_loaded()
    _note_texts(exchange, asked.texts)
    await exchange.admit()
    options = schema.asked_options(asked)
    route = _route(exchange, asked, options)
    way = exchange.service.scoring(route, options)

    def run(cancelled: Callable[[], bool]) -> list[Ranking]:
        translator = route.legs[-1].model.translator
        return translator.rank(asked.texts, candidates, by=asked.by, options=way, cancelled=cancelled)

    found = await in_thread(exchange.service.calls, run, exchange.until)
    return answer({"model": route.name, "results": [_ranked(one) for one in found]})


def _ranked(ranking: Ranking) -> schema.Ranked:
    scores = [schema.Scored(one.sum, one.per_token, one.tokens, list(one.log_probabilities)) for one in ranking.scores]
    return schema.Ranked(scores, ranking.best, ranking.margin)


def _route(
    exchange: Exchange,
    asked: Any,  # noqa: ANN401  # made at run time
    options: dict[str, Any],
) -> Route:
    """The one model of a request, which is there until it is answered. Raises OptionError."""
    languages = [options.pop(name, None) for name in schema.LANGUAGES]
    for name, code in zip(schema.LANGUAGES, languages, strict=True):
        if code is not None and not isinstance(code, str):
            raise OptionError(
                f"`{name}` is a list", expected="one code for all texts", remedy="Send others apart.", option=name
            )
    route = exchange.service.models.route(languages[0], languages[1], asked.model)
    if route.pivot is not None:
        raise OptionError(
            f"No model translates from {route.source} to {route.target} without a pivot",
            expected="a pair that one model has",
            remedy="Translate with /v1/translate.",
            option="target_language",
        )
    exchange.use(route)
    exchange.facts["model"] = route.name
    return route


Found = TypeVar("Found")


async def in_thread(calls: Executor, run: Callable[[Callable[[], bool]], Found], until: float) -> Found:
    """What a call of the library gives, in a thread of those for calls. It is called off where the task is cancelled
    or the moment `until` of time.monotonic has come, which raises TimeoutError.
    """
    stopped, late = threading.Event(), threading.Event()

    def is_called_off() -> bool:
        if time.monotonic() > until:
            late.set()
        return stopped.is_set() or late.is_set()

    try:
        found = await asyncio.get_running_loop().run_in_executor(calls, run, is_called_off)
    except InputError:
        if not late.is_set():
            raise
    finally:
        stopped.set()
    if late.is_set():
        raise TimeoutError
    return found


async def models(exchange: Exchange) -> Response:
    """GET /v1/models."""
    service = exchange.service
    options = service.options
    return answer(
        schema.ModelsResponse(
            models=[_described(model) for model in service.models],
            pairs=service.models.pairs,
            detection=service.detector.useful,
            limits=schema.Limits(
                options.body_bytes,
                options.characters,
                options.texts,
                options.tokens,
                options.beams,
                options.timeout,
            ),
        )
    )


def _described(model: Model) -> schema.ModelDescription:
    manifest = model.manifest
    sizes = manifest.model
    return schema.ModelDescription(
        name=model.name,
        source_languages=[schema.NamedLanguage(code, name_of(code)) for code in model.pairs.source.own],
        target_languages=[schema.NamedLanguage(code, name_of(code)) for code in model.pairs.target.own],
        family=manifest.family,
        precision=manifest.precision,
        lowering=manifest.lowering,
        source_positions=sizes["source_positions"],
        target_positions=sizes["target_positions"],
        max_new_tokens=manifest.max_new_tokens,
        attention=manifest.features.attention is not None,
        proof=_proof(manifest.parity),
        defaults={name: default.value for name, default in manifest.defaults.items()},
    )


def _proof(parity: Mapping[str, Any] | None) -> schema.Proof | None:
    if parity is None:
        return None
    found = [
        difference
        for check in parity.get("checks", ())
        for difference in check.get("differences", {}).values()
        if difference is not None
    ]
    return schema.Proof(bool(parity.get("passed")), max(found, default=None))
